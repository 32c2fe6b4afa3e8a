"""Structures joined into one graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.data.structure import Structure, label_fields
from gossamer.graph import Graph
from gossamer.neighbors import neighbor_list
from gossamer.quantities import QUANTITIES, Quantity


def collate(
    structures: Sequence[Structure],
    cutoff: float,
    max_neighbors: int | None = None,
    lists: Sequence[tuple[NDArray[np.integer], NDArray[np.integer]]] | None = None,
) -> Graph:
    """Join structures into one graph, building each neighbour list.

    Args:
        structures: At least one structure.
        cutoff: Å.
        max_neighbors: Keep only this many nearest neighbours of each atom (the energy then jumps when ranks change).
        lists: Their neighbour lists, as ``neighbor_list`` gives them, where these are known.
    """
    if lists is None:
        lists = [neighbor_list(s.positions, s.cell, s.pbc, cutoff, max_neighbors) for s in structures]
    sizes = [s.n_atoms for s in structures]
    first = np.cumsum(sizes) - sizes
    edge_index = np.concatenate([edges + start for (edges, _), start in zip(lists, first, strict=True)], axis=1)
    edge_shifts = np.concatenate([shifts for _, shifts in lists])

    return Graph(
        atomic_numbers=torch.from_numpy(np.concatenate([s.atomic_numbers for s in structures]).astype(np.int64)),
        positions=torch.from_numpy(np.concatenate([s.positions for s in structures]).astype(np.float64, copy=False)),
        cell=torch.from_numpy(np.stack([s.cell for s in structures]).astype(np.float64, copy=False)),
        graph_index=torch.from_numpy(np.repeat(np.arange(len(structures)), sizes)),
        edge_index=torch.from_numpy(edge_index.astype(np.int64, copy=False)),
        edge_shifts=torch.from_numpy(edge_shifts.astype(np.float64)),
        pbc=torch.from_numpy(np.stack([s.pbc for s in structures])),
        **label_fields({name: _joined(quantity, structures) for name, quantity in QUANTITIES.items()}),
        free=torch.from_numpy(np.concatenate([s.free for s in structures])),
        incomplete=tuple(name for name in QUANTITIES if 0 < sum(name in s.labels for s in structures) < len(structures)),
        names=tuple(s.name for s in structures),
    )


def _joined(quantity: Quantity, structures: Sequence[Structure]) -> Tensor | None:
    """One label of all structures; NaN where it is absent, None where no structure has it."""
    labels = [s.labels.get(quantity.name) for s in structures]
    if all(label is None for label in labels):
        return None
    rows = [s.n_atoms if quantity.per == "atom" else 1 for s in structures]
    values = [np.full((n, *quantity.shape), np.nan if v is None else v, dtype=np.float64) for n, v in zip(rows, labels, strict=True)]
    return torch.from_numpy(np.concatenate(values))


def batches_by_atoms(structures: Sequence[Structure], batch_atoms: int) -> Iterator[tuple[int, list[Structure]]]:
    """Successive structures in batches of at most ``batch_atoms`` atoms (or one larger structure), each with the index of its first."""
    batch: list[Structure] = []
    start = atoms = 0
    for index in range(len(structures)):
        structure = structures[index]
        if batch and atoms + structure.n_atoms > batch_atoms:
            yield start, batch
            batch, start, atoms = [], index, 0
        batch.append(structure)
        atoms += structure.n_atoms
    if batch:
        yield start, batch
