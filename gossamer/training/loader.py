"""Batches in an order that depends on the seed and the epoch alone, so that a run resumes where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gossamer.data.structure import Structure
from gossamer.graph import Graph
from gossamer.neighbors import neighbor_list
from gossamer.potential import Potential


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int, limits: Sequence[tuple[np.ndarray, int]] = ()) -> list[list[int]]:
    """Shuffled indices of one epoch in batches of ``batch_size`` structures.

    Args:
        n: Number of structures.
        batch_size: Most structures of a batch.
        seed: With ``epoch``, decides the order.
        epoch: Number of the epoch.
        limits: Sizes of all structures (atoms, edges) and the largest sum of a batch; one structure alone may be larger.
    """
    batches: list[list[int]] = [[]]
    sums = [0] * len(limits)
    for index in np.random.default_rng([seed, epoch]).permutation(n).tolist():
        grown = [total + int(sizes[index]) for total, (sizes, _) in zip(sums, limits, strict=True)]
        full = len(batches[-1]) >= batch_size or any(total > most for total, (_, most) in zip(grown, limits, strict=True))
        if full and batches[-1]:
            batches.append([])
            grown = [int(sizes[index]) for sizes, _ in limits]
        batches[-1].append(index)
        sums = grown
    return batches


class NeighborLists:
    """Neighbour lists of structures that come again in every epoch: kept as long as there is room."""

    ROOM = 1 << 29
    """bytes"""

    def __init__(self, potential: Potential) -> None:
        self.potential = potential
        self.kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.room = self.ROOM

    def of(self, index: int, structure: Structure) -> tuple[np.ndarray, np.ndarray]:
        """Edges and shifts of a structure, as ``neighbor_list`` gives them, in fewer bytes."""
        found = self.kept.get(index)
        if found is None:
            s = structure
            edges, shifts = neighbor_list(s.positions, s.cell, s.pbc, self.potential.cutoff, self.potential.max_neighbors)
            small = np.abs(shifts).max(initial=0) < 128
            found = edges.astype(np.int32), shifts.astype(np.int8 if small else np.int32)
            size = found[0].nbytes + found[1].nbytes
            if size <= self.room:
                self.kept[index], self.room = found, self.room - size
        return found


def graphs(
    potential: Potential,
    structures: Sequence[Structure],
    batches: Sequence[Sequence[int]],
    prefetch: int = 2,
    lists: NeighborLists | None = None,
) -> Iterator[Graph]:
    """Collated batches, prepared by one thread ahead of their use.

    Args:
        potential: Gives cutoff and device.
        structures: All of them.
        batches: Indices of the structures of each batch.
        prefetch: Batches prepared ahead.
        lists: Of these structures, from one epoch to the next.
    """
    if not batches:
        return
    kept = lists or NeighborLists(potential)

    def collated(batch: Sequence[int]) -> Graph:
        chosen = [structures[k] for k in batch]
        return potential.collate(chosen, [kept.of(k, s) for k, s in zip(batch, chosen, strict=True)])

    with ThreadPoolExecutor(max_workers=1) as executor:
        pending = [executor.submit(collated, b) for b in batches[:prefetch]]
        for k in range(len(batches)):
            graph = pending.pop(0).result()
            if k + prefetch < len(batches):
                pending.append(executor.submit(collated, batches[k + prefetch]))
            yield graph
