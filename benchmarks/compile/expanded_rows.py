"""A second wrong gradient of inductor's C++ backend (PyTorch 2.13): heads spread over channels with expand and reshape.

    python benchmarks/compile/expanded_rows.py

A one-layer Geodite whose attention weights are spread by expand + reshape instead of by a product with a table of zeros
and ones; prints the relative deviation of the compiled weight gradients from the plain ones for both.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from gossamer.data.readers import read_structures
from gossamer.data.statistics import compute_statistics
from gossamer.models import GeoditeConfig
from gossamer.nn.layers import Table
from gossamer.potential import Potential
from gossamer.training.compiled import CompiledForward

DATA = Path(__file__).resolve().parents[2] / "demo" / "data" / "ethanol_500K.extxyz.xz"


class Spread:
    """Stands in for the table: ``alpha @ spread`` copies every head to its channels with expand and reshape."""

    def __init__(self, copies: int, total: int) -> None:
        self.copies, self.total = copies, total

    def __getitem__(self, key: tuple) -> Spread:
        return Spread(self.copies, key[1].stop)

    def __rmatmul__(self, alpha: torch.Tensor) -> torch.Tensor:
        return alpha[:, :, None].expand(-1, -1, self.copies).reshape(alpha.shape[0], -1)[:, : self.total]


class Expanded(torch.nn.Module):
    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = copies

    def forward(self) -> Spread:
        return Spread(self.copies, 0)


def deviation(expanded: bool) -> str:
    torch.manual_seed(0)
    structures = list(read_structures(DATA))[:4]
    config = GeoditeConfig(num_layers=1, num_features=16, num_heads=2)
    potential = Potential(config, compute_statistics(structures, 5.0)).train()
    if expanded:
        for layer in potential.network.layers:
            assert isinstance(layer.tiles, Table)
            layer.tiles = Expanded(3 * 16 // 2)
    forward = CompiledForward(potential, forces=True, stress=False)
    graph = potential.collate(structures)
    began = time.perf_counter()
    forward.compiled = forward._compile(graph)
    try:
        forward._compare(graph)
        return f"agrees ({time.perf_counter() - began:.0f} s)"
    except RuntimeError as error:
        return str(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("product with a table:", deviation(False), flush=True)
    print("expand and reshape:  ", deviation(True), flush=True)
