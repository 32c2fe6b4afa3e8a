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


def edge_counts(structures: Sequence[Structure], cutoff: float, max_neighbors: int | None = None) -> np.ndarray:
    """Edges of every structure."""
    counts = [
        neighbor_list(s.positions, s.cell, s.pbc, cutoff, max_neighbors)[0].shape[1]
        for s in (structures[k] for k in range(len(structures)))
    ]
    return np.array(counts, dtype=np.int64)


def graphs(potential: Potential, structures: Sequence[Structure], batches: Sequence[Sequence[int]], prefetch: int = 2) -> Iterator[Graph]:
    """Collated batches, prepared by one thread ahead of their use."""
    if not batches:
        return
    with ThreadPoolExecutor(max_workers=1) as executor:
        pending = [executor.submit(_collate, potential, structures, b) for b in batches[:prefetch]]
        for k in range(len(batches)):
            graph = pending.pop(0).result()
            if k + prefetch < len(batches):
                pending.append(executor.submit(_collate, potential, structures, batches[k + prefetch]))
            yield graph


def _collate(potential: Potential, structures: Sequence[Structure], indices: Sequence[int]) -> Graph:
    return potential.collate([structures[k] for k in indices])
