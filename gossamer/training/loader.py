"""Batches in an order that depends on the seed and the epoch alone, so that a run resumes where it stopped.

They are prepared ahead of their use, by a thread of this process that keeps neighbour lists, or, where a GPU would have to wait for it, by
processes beside it. Either way they are the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gossamer.data.batch import collate
from gossamer.data.structure import Structure
from gossamer.graph import Graph
from gossamer.neighbors import neighbor_list
from gossamer.potential import Potential
from gossamer.processes import without_script

AHEAD, AHEAD_OF_THREAD = 4, 2
"""batches that each process prepares ahead, or the thread"""
COUNTED = 256
"""structures whose edges a process counts at a time"""


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


class Loader:
    """Gives the batches of an epoch as graphs, and counts edges."""

    def __init__(
        self,
        potential: Potential,
        structures: Sequence[Structure],
        num_workers: int = 0,
        weights: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            potential: Gives cutoff, elements and device.
            structures: All of them; with ``num_workers`` every process gets them once, of a store its path.
            num_workers: Processes; 0: one thread of this one.
            weights: (n_structures,) of each in the loss; None: all count alike.
        """
        self.potential, self.structures, self.weights = potential, structures, weights
        self.lists = NeighborLists(potential)
        self.waited = 0.0
        """s that batches were waited for"""
        self._order = _Order()
        self._processes: DataLoader[Any] | None = None
        if num_workers:
            self._processes = DataLoader(
                _Frames(structures), batch_sampler=self._order, collate_fn=_Prepare(potential.cutoff, potential.max_neighbors),
                num_workers=num_workers, prefetch_factor=AHEAD, persistent_workers=True, multiprocessing_context="spawn", worker_init_fn=_stand_apart,
                generator=torch.Generator(),  # it draws seeds for its processes, which must not come from those of the training (dropout)
            )  # fmt: skip

    def graphs(self, batches: Sequence[Sequence[int]]) -> Iterator[Graph]:
        """Collated batches on the potential's device; ``batches``: indices of the structures of each."""
        found = self._by_thread(batches) if self._processes is None else self._by_processes(batches)
        for batch in batches:
            began = time.perf_counter()
            graph = next(found)
            if self.weights is not None:
                graph = replace(graph, weights=torch.from_numpy(self.weights[batch]).to(graph.positions))
            self.waited += time.perf_counter() - began
            yield graph

    def edge_counts(self, indices: Sequence[int]) -> np.ndarray:
        """Edges of these structures, as they are collated."""
        if self._processes is None:
            return np.array([self.lists.of(k, self.structures[k])[0].shape[1] for k in indices])
        parts = [list(indices[k : k + COUNTED]) for k in range(0, len(indices), COUNTED)]
        counts = []
        for graph in self._prepared(parts):
            receivers = graph.graph_index[graph.edge_index[1]]
            counts.append(np.bincount(receivers.numpy(), minlength=graph.n_graphs))
        return np.concatenate(counts) if counts else np.zeros(0, dtype=np.int64)

    def close(self) -> None:
        """End the processes."""
        self._processes = None

    def _by_thread(self, batches: Sequence[Sequence[int]]) -> Iterator[Graph]:
        def collated(batch: Sequence[int]) -> Graph:
            chosen = [self.structures[k] for k in batch]
            return self.potential.collate(chosen, [self.lists.of(k, s) for k, s in zip(batch, chosen, strict=True)])

        with ThreadPoolExecutor(max_workers=1) as executor:
            pending = [executor.submit(collated, b) for b in batches[:AHEAD_OF_THREAD]]
            for k in range(len(batches)):
                graph = pending.pop(0).result()
                if k + AHEAD_OF_THREAD < len(batches):
                    pending.append(executor.submit(collated, batches[k + AHEAD_OF_THREAD]))
                yield graph

    def _by_processes(self, batches: Sequence[Sequence[int]]) -> Iterator[Graph]:
        for graph in self._prepared(batches):
            self.potential.check_elements(graph.atomic_numbers.numpy(), f"a batch with {graph.names[0]}")
            yield self.potential.adopt(graph)

    def _prepared(self, batches: Sequence[Sequence[int]]) -> Iterator[Graph]:
        """Graphs as the processes make them.

        Raises:
            RuntimeError: one of them ended.
        """
        assert self._processes is not None
        self._order.batches = batches
        try:
            with without_script():  # the processes start with the first epoch
                prepared = iter(self._processes)
            yield from prepared
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(
                f"A process that prepares batches ended: {str(error).splitlines()[0]} Is there too little memory for "
                f"training.num_workers {self._processes.num_workers}? --resume goes on from the last checkpoint."
            ) from None


def _stand_apart(number: int) -> None:
    """Signals to a group of processes, as torchrun and terminals send them, are for those that train: these end the others in time."""
    os.setpgrp()


class _Order:
    """The batches of one epoch after the other, for a loader that stays."""

    batches: Sequence[Sequence[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Frames(Dataset[list[Structure]]):
    """The structures, a batch at a time."""

    def __init__(self, structures: Sequence[Structure]) -> None:
        self.structures = structures

    def __getitems__(self, indices: Sequence[int]) -> list[Structure]:
        return [self.structures[k] for k in indices]


@dataclass(frozen=True)
class _Prepare:
    """What a process does with the structures of a batch."""

    cutoff: float
    max_neighbors: int | None

    def __call__(self, structures: Sequence[Structure]) -> Graph:
        return collate(structures, self.cutoff, self.max_neighbors)
