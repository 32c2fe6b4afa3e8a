"""One evaluation recorded as a CUDA graph: a small structure then costs one launch instead of one for every operation.

A recording has fixed sizes. One more structure, of lone atoms, takes up the atoms and edges that come and go: their edges
lead to their own images at just the cutoff, where every message vanishes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gossamer.graph import Graph
from gossamer.potential import Prediction
from gossamer.quantities import QUANTITIES

SHARE = 64
"""edges that one lone atom takes up"""


def pad(graph: Graph, n_atoms: int, n_edges: int, length: float) -> Graph:
    """A batch of these structures and one more, of lone atoms: ``n_atoms`` and ``n_edges`` in all; nothing else changes.

    Args:
        graph: One structure or more; labels of the lone atoms are zero, further quantities are left out.
        n_atoms: More than it has.
        n_edges: At least as many as it has.
        length: The cutoff in Å.
    """
    n_extra = n_atoms - graph.n_atoms
    spare = spare_edges(n_atoms, n_edges, n_extra, graph.positions.device)[:, graph.n_edges :]
    shift = graph.edge_shifts.new_zeros(spare.shape[1], 3)
    shift[:, 0] = 1.0
    none = graph.positions.new_zeros(n_extra, 3)
    return Graph(
        atomic_numbers=torch.cat([graph.atomic_numbers, graph.atomic_numbers[:1].expand(n_extra)]),
        positions=torch.cat([graph.positions, none]),
        cell=torch.cat([graph.cell, length * torch.eye(3, dtype=graph.cell.dtype, device=graph.cell.device)[None]]),
        graph_index=torch.cat([graph.graph_index, graph.graph_index.new_full((n_extra,), graph.n_graphs)]),
        edge_index=torch.cat([graph.edge_index, spare], dim=1),
        edge_shifts=torch.cat([graph.edge_shifts, shift]),
        energy=None if graph.energy is None else torch.nn.functional.pad(graph.energy, (0, 1)),
        forces=None if graph.forces is None else torch.cat([graph.forces, none]),
        stress=None if graph.stress is None else torch.cat([graph.stress, graph.stress.new_zeros(1, 3, 3)]),
        n_padding=1,
    )


def spare_edges(n_atoms: int, n_edges: int, n_extra: int, device: torch.device) -> Tensor:
    """Edges of the last ``n_extra`` atoms to themselves (2, n_edges): the last SHARE of the last atom and so on; what is left, of the first one."""
    from_the_end = torch.arange(n_edges - 1, -1, -1, device=device) // SHARE
    own = (n_atoms - 1 - from_the_end).clamp(min=n_atoms - n_extra)
    return torch.stack([own, own])


def sizes_for(graph: Graph) -> tuple[int, int]:
    """Atoms and edges of a recording that has room for graphs like this one, with a few edges more."""
    spare = min(graph.n_edges // 20, 8 * math.isqrt(graph.n_edges))  # as much as it varies: each costs what an edge costs
    n_edges = -(-(graph.n_edges + max(SHARE, spare)) // SHARE) * SHARE
    return graph.n_atoms + 2 * (1 + (n_edges - graph.n_edges) // SHARE), n_edges


class Inputs:
    """A graph of fixed sizes and addresses into which others are copied."""

    def __init__(self, graph: Graph, n_atoms: int, n_edges: int, cutoff: float) -> None:
        """
        Args:
            graph: What lies in it first.
            n_atoms: Room for one fewer.
            n_edges: Room for so many.
            cutoff: Å.
        """
        self.graph = pad(graph, n_atoms, n_edges, cutoff)
        self.n_graphs, self.n_atoms, self.n_edges = graph.n_graphs, n_atoms, n_edges
        self.spare = spare_edges(n_atoms, n_edges, n_atoms, graph.positions.device)
        self.shift = graph.edge_shifts.new_tensor([1.0, 0.0, 0.0])

    def fits(self, graph: Graph) -> bool:
        """Whether this one can take the place of what lies in it."""
        return graph.n_graphs == self.n_graphs and graph.n_atoms < self.n_atoms and graph.n_edges <= self.n_edges

    def fill(self, graph: Graph) -> None:
        """Copy one that fits; does not wait for the GPU."""
        n, e, own = graph.n_atoms, graph.n_edges, self.graph
        own.atomic_numbers[:n].copy_(graph.atomic_numbers)
        own.atomic_numbers[n:].copy_(graph.atomic_numbers[:1])
        own.positions[:n].copy_(graph.positions)
        own.positions[n:].zero_()
        own.cell[:-1].copy_(graph.cell)
        own.graph_index[:n].copy_(graph.graph_index)
        own.graph_index[n:].fill_(self.n_graphs)
        own.edge_index[:, :e].copy_(graph.edge_index)
        own.edge_index[:, e:].copy_(self.spare[:, e:].clamp(min=n))
        own.edge_shifts[:e].copy_(graph.edge_shifts)
        own.edge_shifts[e:].copy_(self.shift)
        for name in ("energy", "forces", "stress"):
            label, room = getattr(graph, name), getattr(own, name)
            if room is not None:
                room[: len(label)].copy_(label)
                room[len(label) :].zero_()


def record(run: Callable[[], Any], warm_ups: int = 3) -> tuple[torch.cuda.CUDAGraph, Any]:
    """What is to be replayed, and what it returned, whose tensors every replay overwrites.

    Args:
        run: Must not wait for the GPU.
        warm_ups: Calls beforehand, in which libraries allocate and kernels are built.

    Raises:
        RuntimeError: it cannot be recorded.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            run()
    torch.cuda.current_stream().wait_stream(side)
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording, capture_error_mode="thread_local"):  # other threads may be copying batches
        outputs = run()
    return recording, outputs


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
        # recorded elsewhere than it is compared: a recording that did not read its inputs would show
        self.inputs = Inputs(replace(graph, positions=1.001 * graph.positions), *sizes_for(graph), cutoff)
        with torch.cuda.device_of(graph.positions):
            self.recording, self.outputs = record(lambda: run(self.inputs.graph))

    def fits(self, graph: Graph) -> bool:
        """Whether this structure can take the place of the recorded one."""
        return graph.n_atoms == self.n_atoms and self.inputs.fits(graph)

    def __call__(self, graph: Graph) -> Prediction:
        """
        Raises:
            ValueError: other atoms, or more edges than there is room for.
        """
        if not self.fits(graph):
            raise ValueError(
                f"Recorded for {self.n_atoms} atoms and at most {self.inputs.n_edges} edges, found {graph.n_atoms} and {graph.n_edges}: "
                "record again."
            )
        self.inputs.fill(graph)
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
        features=None if prediction.features is None else prediction.features[:n_atoms].clone(),
        extras={k: v[: n_atoms if QUANTITIES[k].per == "atom" else 1].clone() for k, v in prediction.extras.items()},
    )
