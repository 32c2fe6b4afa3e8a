"""Neighbour lists that are rebuilt rarely, because they reach a skin beyond the cutoff."""

from __future__ import annotations

import logging

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from gossamer.neighbors import Edges, complete_cell, in_cells, nearest, neighbor_list, wrap

log = logging.getLogger(__name__)


class VerletList:
    """A neighbour list that is rebuilt only when atoms have moved, and the cell has changed, by as much as the skin allows.

    Wrapping atoms back into the cell looks like a large move and rebuilds the list; so do new periodicity or other atoms.
    The edges handed out are those within the cutoff, exactly as a fresh list would give them.
    """

    def __init__(self, cutoff: float, skin: float = 0.5, max_neighbors: int | None = None) -> None:
        """Args: cutoff, skin: Å; skin 0 rebuilds every time. max_neighbors: cap, applied to the edges handed out."""
        if skin < 0:
            raise ValueError(f"skin must not be negative, found {skin} Å.")
        self.cutoff, self.skin, self.max_neighbors = cutoff, skin, max_neighbors
        self.builds = 0
        self._edges: Edges = (np.zeros((2, 0), dtype=np.int64), np.zeros((0, 3), dtype=np.int64))

    def __call__(self, positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_]) -> Edges:
        """Edges of these atoms (contract: `gossamer.neighbors`)."""
        if not self._fresh(positions, cell, pbc):
            self._edges = neighbor_list(positions, cell, pbc, self.cutoff + self.skin)
            self._remember(positions, cell, pbc)
        (sender, receiver), shifts = self._edges
        vectors = positions[sender] + shifts @ cell - positions[receiver]
        inside = np.einsum("ex,ex->e", vectors, vectors) < self.cutoff**2
        edges = np.stack([sender[inside], receiver[inside]]), shifts[inside]
        return edges if self.max_neighbors is None else nearest(edges, positions, cell, self.max_neighbors)

    def _remember(self, positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_]) -> None:
        """A list was built for these atoms."""
        self._positions, self._cell, self._pbc = positions.copy(), cell.copy(), pbc.copy()
        self.builds += 1

    def _fresh(self, positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_]) -> bool:
        """Whether the list holds every pair that is now within the cutoff.

        With r = r0 F + u (rows; F the change of the cell), a pair at most rc apart was at most |F⁻¹| (rc + 2 max |u|) apart.
        """
        if not (np.isfinite(positions).all() and np.isfinite(cell).all()):
            complete_cell(positions, cell, pbc, self.cutoff)  # says which atom
        if not self.builds or len(positions) != len(self._positions) or np.any(pbc != self._pbc):
            return False
        before, stretch = self._positions, 1.0
        if np.any(cell != self._cell):
            if not pbc.all() or abs(np.linalg.det(cell)) < 1e-9:
                return False
            change = np.linalg.solve(self._cell, cell)
            before, stretch = before @ change, float(np.linalg.norm(np.linalg.inv(change), 2))
        moved = positions - before
        largest = float(np.sqrt(np.einsum("nx,nx->n", moved, moved).max(initial=0.0)))
        return stretch * (self.cutoff + 2 * largest) < self.cutoff + self.skin


class DeviceVerletList(VerletList):
    """The same on a GPU: the list stays there, and only positions travel."""

    def __init__(self, cutoff: float, skin: float, device: torch.device) -> None:
        super().__init__(cutoff, skin)
        self.device = device
        self._builds_there = True

    def on_device(
        self,
        positions: NDArray[np.float64],
        cell: NDArray[np.float64],
        pbc: NDArray[np.bool_],
        positions_there: Float[Tensor, "n_atoms 3"],
        cell_there: Float[Tensor, "3 3"],
    ) -> tuple[Int[Tensor, "2 n_edges"], Float[Tensor, "n_edges 3"]]:
        """Edges and shifts on the device (contract: `gossamer.neighbors`)."""
        if not self._fresh(positions, cell, pbc):
            self._list = self._build(positions, cell, pbc)
            self._remember(positions, cell, pbc)
        edge_index, shifts = self._list
        sender, receiver = edge_index
        vectors = positions_there.index_select(0, sender) + shifts @ cell_there - positions_there.index_select(0, receiver)
        inside = (vectors.square().sum(dim=1) < self.cutoff**2).nonzero()[:, 0]
        return edge_index.index_select(1, inside), shifts.index_select(0, inside)

    def _build(self, positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        reach = self.cutoff + self.skin
        if self._builds_there:
            try:
                return device_neighbor_list(positions, cell, pbc, reach, self.device)
            except RuntimeError as error:
                self._builds_there = False
                log.warning("neighbour lists are built on the CPU: %s", str(error).splitlines()[0])
        edges, shifts = neighbor_list(positions, cell, pbc, reach)
        return torch.from_numpy(edges).to(self.device), torch.from_numpy(shifts.astype(np.float64)).to(self.device)


def device_neighbor_list(
    positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_], cutoff: float, device: torch.device
) -> tuple[Int[Tensor, "2 n_edges"], Float[Tensor, "n_edges 3"]]:
    """``gossamer.neighbors.neighbor_list`` by vesin on a device, in the same order; shifts as float64.

    Raises:
        ValueError: as there.
        RuntimeError: vesin cannot build it on this device.
    """
    import vesin  # as there

    if device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"vesin does not build neighbour lists on {device.type}")
    cell = complete_cell(positions, cell, pbc, cutoff)
    wrapped, crossed = wrap(positions, cell, pbc)
    arrays = (*in_cells(wrapped, cell, pbc, cutoff), crossed)
    points, box, periodic, moved = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays)
    calculator = vesin.NeighborList(cutoff=float(cutoff), full_list=True)
    receiver, sender, shifts = calculator.compute(points=points, box=box, periodic=periodic, quantities="ijS")
    receiver, sender, shifts = (t.to(torch.int64) for t in (receiver, sender, shifts))
    shifts = shifts - moved.index_select(0, sender) + moved.index_select(0, receiver)
    order = torch.arange(len(sender), device=device)
    for key in (*shifts.unbind(1)[::-1], sender, receiver):  # the last one decides
        order = order[torch.argsort(key[order], stable=True)]
    return torch.stack([sender, receiver])[:, order], shifts[order].to(torch.float64)


class BatchVerletList:
    """The same for many structures at once: edges of a batch, of which only structures that moved too far are listed anew.

    A list knows geometry alone. Where another structure takes a place in the batch, it is listed anew, unless it has the same atoms
    at almost the same positions, for which the list is right.
    """

    def __init__(self, cutoff: float, skin: float = 0.5, max_neighbors: int | None = None) -> None:
        """As `VerletList`."""
        self._template = cutoff, skin, max_neighbors
        self._lists: list[VerletList] = [VerletList(*self._template)]

    @property
    def builds(self) -> int:
        """How often a structure was listed anew."""
        return sum(one.builds for one in self._lists)

    def __call__(
        self,
        positions: NDArray[np.float64],
        cells: NDArray[np.float64],
        pbc: NDArray[np.bool_],
        counts: NDArray[np.int64],
    ) -> Edges:
        """Edges of a batch, sorted by receiver, and their shifts.

        Args:
            positions: (N, 3) Å, structure after structure.
            cells: (G, 3, 3) Å, rows.
            pbc: (G, 3).
            counts: (G,) atoms of each structure.

        Raises:
            ValueError: positions that are not finite; says in which structure.
        """
        self._lists = self._lists[: len(counts)] + [VerletList(*self._template) for _ in range(len(counts) - len(self._lists))]
        starts = np.cumsum(counts) - counts
        edges, shifts = [], []
        for k, (one, start, n) in enumerate(zip(self._lists, starts, counts, strict=True)):
            try:
                pairs, images = one(positions[start : start + n], cells[k], pbc[k])
            except ValueError as error:
                raise ValueError(f"Structure {k}: {error}") from None
            edges.append(pairs + start)
            shifts.append(images)
        return np.concatenate(edges, axis=1), np.concatenate(shifts)
