"""A batch of structures as named tensors, and the vectors along its edges.

Conventions (docs/conventions.md): `edge_index` is (sender, receiver) = (neighbour, centre); an edge vector points from
the centre to the neighbour; rows of `cell` are lattice vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FIELDS = ("atomic_numbers", "positions", "cell", "graph_index", "edge_index", "edge_shifts")
"""tensors of a graph, in the order in which compiled graphs take them"""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One or more structures with their neighbour lists; labels are None where the batch has none.

    Positions, cells and labels are float64: a float32 energy of a large system cannot resolve 1 meV.
    """

    atomic_numbers: Int[Tensor, " n_atoms"]
    positions: Float[Tensor, "n_atoms 3"]
    """Å"""
    cell: Float[Tensor, "n_graphs 3 3"]
    """Å, rows are lattice vectors; zero for a molecule without a cell"""
    graph_index: Int[Tensor, " n_atoms"]
    edge_index: Int[Tensor, "2 n_edges"]
    """(sender, receiver), sorted by receiver"""
    edge_shifts: Float[Tensor, "n_edges 3"]
    """whole cell vectors crossed on the way from receiver to sender"""
    pbc: Bool[Tensor, "n_graphs 3"] | None = None
    """which axes are periodic; None: those with a cell vector"""
    energy: Float[Tensor, " n_graphs"] | None = None
    """eV"""
    forces: Float[Tensor, "n_atoms 3"] | None = None
    """eV/Å; NaN in a frame without this label"""
    stress: Float[Tensor, "n_graphs 3 3"] | None = None
    """eV/Å³, tension positive; NaN in a frame without this label"""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """labels of further quantities (gossamer/quantities.py); NaN in a frame without"""
    free: Bool[Tensor, " n_atoms"] | None = None
    """False for atoms that were held fixed when the labels were made"""
    incomplete: tuple[str, ...] = ()
    """labels that some of its structures have and others lack (NaN)"""
    weights: Float[Tensor, " n_graphs"] | None = None
    """of each structure in the loss; None: all count alike"""
    names: tuple[str, ...] = ()
    """where each structure came from, for error messages"""
    n_padding: int = 0
    """structures at the end that only fill the batch up: they have nothing to learn from"""

    @property
    def labels(self) -> dict[str, Tensor]:
        """The labels that the batch has, by the names of their quantities."""
        named = {"energy": self.energy, "forces": self.forces, "stress": self.stress, **self.extras}
        return {name: value for name, value in named.items() if value is not None}

    def with_places(self, labels: Sequence[str]) -> Graph:
        """The same, in which each of these labels (energy, forces, stress) has a place, NaN where no structure has it."""
        shapes = {"energy": (self.n_graphs,), "forces": (self.n_atoms, 3), "stress": (self.n_graphs, 3, 3)}
        absent = [name for name in labels if name in shapes and getattr(self, name) is None]
        if not absent:
            return self
        empty: dict[str, Any] = {name: self.positions.new_full(shapes[name], torch.nan) for name in absent}
        return replace(self, **empty, incomplete=(*self.incomplete, *absent))

    @property
    def n_graphs(self) -> int:
        return self.cell.shape[0]

    @property
    def n_atoms(self) -> int:
        return self.positions.shape[0]

    @property
    def n_edges(self) -> int:
        return self.edge_index.shape[1]

    @property
    def periodic(self) -> Bool[Tensor, "n_graphs 3"]:
        """Which axes are periodic."""
        return self.cell.abs().sum(dim=2) > 0 if self.pbc is None else self.pbc

    def name(self, k: int) -> str:
        """What messages call a structure."""
        return self.names[k] if self.names else f"Structure {k}"

    def atoms_per_graph(self) -> Float[Tensor, " n_graphs"]:
        ones = torch.ones_like(self.graph_index, dtype=self.cell.dtype)
        return torch.zeros(self.n_graphs, dtype=self.cell.dtype, device=ones.device).index_add(0, self.graph_index, ones)

    def to(self, device: torch.device | str) -> Graph:
        return self._changed(lambda v: v.to(device, non_blocking=True))

    def double(self) -> Graph:
        """Real numbers in float64."""
        return self._changed(lambda v: v.double() if v.is_floating_point() else v)

    def differentiable(self) -> Graph:
        """Copies of tensors that were made under inference mode, which gradients refuse; else the graph itself."""
        return self._changed(torch.clone) if self.positions.is_inference() or self.atomic_numbers.is_inference() else self

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Graph:
        found: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: change(v) for k, v in found.items() if isinstance(v, Tensor)}
        return replace(self, **changed, extras={k: change(v) for k, v in self.extras.items()})

    def edge_vectors(self) -> Float[Tensor, "n_edges 3"]:
        """Vectors in Å from each receiver (centre) to its sender (neighbour): r_j + shift · cell - r_i.

        For short-range networks these are the leaves of differentiation: one gradient gives forces and stress (`Potential.forward`).
        Terms that are no function of the edges, such as a long-range sum, need positions and strain as leaves of their own.
        """
        sender, receiver = self.edge_index
        structure = self.graph_index.index_select(0, receiver)
        # one cell vector after the other: a matrix product for every edge takes longer, on a GPU several times
        a, b, c = (self.edge_shifts[:, k : k + 1] * self.cell[:, k].index_select(0, structure) for k in range(3))
        return self.positions[sender] + (a + b + c) - self.positions[receiver]
