"""Batches in an order that depends on the seed and the epoch alone, so that a run resumes where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gossamer.data.structure import Structure
from gossamer.graph import Graph
from gossamer.potential import Potential


def epoch_batches(n_atoms: np.ndarray, batch_size: int, batch_atoms: int | None, seed: int, epoch: int) -> list[list[int]]:
    """Shuffled indices of one epoch in batches of ``batch_size`` structures and at most ``batch_atoms`` atoms."""
    order = np.random.default_rng([seed, epoch]).permutation(len(n_atoms))
    batches: list[list[int]] = [[]]
    atoms = 0
    for index in order.tolist():
        full = len(batches[-1]) >= batch_size or (batch_atoms is not None and atoms + n_atoms[index] > batch_atoms)
        if full and batches[-1]:
            batches.append([])
            atoms = 0
        batches[-1].append(index)
        atoms += int(n_atoms[index])
    return batches


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
