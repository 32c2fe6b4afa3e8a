"""One evaluation recorded as a CUDA graph: a small structure then costs one launch instead of one for every operation.

A recording has fixed sizes. A second structure of lone atoms beside the first takes up the edges that come and go: their
edges lead to their own images at just the cutoff, where every message vanishes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from gossamer.graph import FIELDS, Graph
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
    n, missing = graph.n_atoms, n_edges - graph.n_edges
    own = n + torch.arange(missing, device=graph.positions.device) * n_extra // max(missing, 1)
    new, shift = graph.positions.new_zeros, graph.edge_shifts.new_zeros(missing, 3)
    shift[:, 0] = 1.0
    return Graph(
        atomic_numbers=torch.cat([graph.atomic_numbers, graph.atomic_numbers[:1].expand(n_extra)]),
        positions=torch.cat([graph.positions, new(n_extra, 3)]),
        cell=torch.cat([graph.cell, length * torch.eye(3, dtype=graph.cell.dtype, device=graph.cell.device)[None]]),
        graph_index=torch.cat([graph.graph_index, graph.graph_index.new_ones(n_extra)]),
        edge_index=torch.cat([graph.edge_index, torch.stack([own, own])], dim=1),
        edge_shifts=torch.cat([graph.edge_shifts, shift]),
    )


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
        self.cutoff, self.n_atoms = cutoff, graph.n_atoms
        self.n_edges = -(-(graph.n_edges + max(SHARE, graph.n_edges // 20)) // SHARE) * SHARE
        self.n_extra = 1 + (self.n_edges - graph.n_edges) // SHARE
        # recorded elsewhere than it is compared: a recording that did not read its inputs would show
        self.inputs = self._pad(replace(graph, positions=1.001 * graph.positions))
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

    def _pad(self, graph: Graph) -> Graph:
        return pad(graph, self.n_edges, self.n_extra, self.cutoff)

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
        padded = self._pad(graph)
        for field in FIELDS:
            getattr(self.inputs, field).copy_(getattr(padded, field))
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
