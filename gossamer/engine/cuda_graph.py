"""One evaluation recorded as a CUDA graph: a small structure then costs one launch instead of one for every operation.

A recording has fixed sizes. A second structure of lone atoms beside the first takes up the edges that come and go: their
edges lead to their own images at just the cutoff, where every message vanishes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gossamer.graph import Graph
from gossamer.potential import Prediction
from gossamer.quantities import QUANTITIES

SHARE = 64
"""edges that one lone atom takes up"""


def pad(graph: Graph, n_edges: int, n_extra: int, length: float) -> Graph:
    """A batch of this structure and of ``n_extra`` lone atoms, with ``n_edges`` edges in all; nothing else changes.

    Args:
        graph: One structure.
        n_edges: At least as many as it has.
        n_extra: At least one.
        length: The cutoff in Å.
    """
    spare = spare_edges(graph, n_edges, n_extra)[:, graph.n_edges :]
    new, shift = graph.positions.new_zeros, graph.edge_shifts.new_zeros(spare.shape[1], 3)
    shift[:, 0] = 1.0
    return Graph(
        atomic_numbers=torch.cat([graph.atomic_numbers, graph.atomic_numbers[:1].expand(n_extra)]),
        positions=torch.cat([graph.positions, new(n_extra, 3)]),
        cell=torch.cat([graph.cell, length * torch.eye(3, dtype=graph.cell.dtype, device=graph.cell.device)[None]]),
        graph_index=torch.cat([graph.graph_index, graph.graph_index.new_ones(n_extra)]),
        edge_index=torch.cat([graph.edge_index, spare], dim=1),
        edge_shifts=torch.cat([graph.edge_shifts, shift]),
    )


def spare_edges(graph: Graph, n_edges: int, n_extra: int) -> Tensor:
    """Edges of the lone atoms to themselves (2, n_edges), the last SHARE of the last atom and so on; what is left, of the first one."""
    from_the_end = torch.arange(n_edges - 1, -1, -1, device=graph.positions.device) // SHARE
    own = graph.n_atoms + (n_extra - 1 - from_the_end).clamp(min=0)
    return torch.stack([own, own])


class CudaGraph:
    """A recording for one number of atoms and at most so many edges."""

    def __init__(self, run: Callable[[Graph], Prediction], graph: Graph, cutoff: float) -> None:
        """
        Args:
            run: What is recorded; it must not wait for the GPU.
            graph: One structure on the GPU; room is left for a few more edges.
            cutoff: Å.

        Raises:
            RuntimeError: it cannot be recorded.
        """
        self.n_atoms = graph.n_atoms
        spare = min(graph.n_edges // 20, 8 * math.isqrt(graph.n_edges))  # as much as it varies: each costs what an edge costs
        self.n_edges = -(-(graph.n_edges + max(SHARE, spare)) // SHARE) * SHARE
        n_extra = 2 * (1 + (self.n_edges - graph.n_edges) // SHARE)
        # recorded elsewhere than it is compared: a recording that did not read its inputs would show
        self.inputs = pad(replace(graph, positions=1.001 * graph.positions), self.n_edges, n_extra, cutoff)
        self.spare = spare_edges(graph, self.n_edges, n_extra)
        self.shift = graph.edge_shifts.new_tensor([1.0, 0.0, 0.0])
        with torch.cuda.device_of(graph.positions):
            self._record(run)

    def _record(self, run: Callable[[Graph], Prediction]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run(self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.recording = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.recording):
            self.outputs = run(self.inputs)

    def fits(self, graph: Graph) -> bool:
        """Whether this structure can take the place of the recorded one."""
        return graph.n_graphs == 1 and graph.n_atoms == self.n_atoms and graph.n_edges <= self.n_edges

    def __call__(self, graph: Graph) -> Prediction:
        """
        Raises:
            ValueError: other atoms, or more edges than there is room for.
        """
        if not self.fits(graph):
            raise ValueError(
                f"Recorded for {self.n_atoms} atoms and at most {self.n_edges} edges, found {graph.n_atoms} and {graph.n_edges}: record again."
            )
        n, own = graph.n_edges, self.inputs
        own.atomic_numbers[: self.n_atoms].copy_(graph.atomic_numbers)
        own.positions[: self.n_atoms].copy_(graph.positions)
        own.cell[:1].copy_(graph.cell)
        own.edge_index[:, :n].copy_(graph.edge_index)
        own.edge_index[:, n:].copy_(self.spare[:, n:])
        own.edge_shifts[:n].copy_(graph.edge_shifts)
        own.edge_shifts[n:].copy_(self.shift)
        self.recording.replay()
        return first_of(self.outputs, self.n_atoms)


def first_of(prediction: Prediction, n_atoms: int) -> Prediction:
    """Copies of what a batch says of its first structure."""
    assert prediction.forces is not None
    return Prediction(
        energy=prediction.energy[:1].clone(),
        node_energies=prediction.node_energies[:n_atoms].clone(),
        forces=prediction.forces[:n_atoms].clone(),
        stress=None if prediction.stress is None else prediction.stress[:1].clone(),
        extras={k: v[: n_atoms if QUANTITIES[k].per == "atom" else 1].clone() for k, v in prediction.extras.items()},
    )
