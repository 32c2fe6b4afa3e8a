"""What a large set costs before the first step, and what its batches cost: CPU ms a frame of one core, from a store.

    python benchmarks/cost/start.py ../shared/data/mptrj/mptrj_random_train.extxyz.xz [--frames 20000]

The frames of the file are written again and again, atoms moved a little, each ten as one material. Prints a line for each part.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer.data.batch import collate
from gossamer.data.dataset import DataConfig, open_dataset, require_labels, split
from gossamer.data.fingerprint import SeenFrames
from gossamer.data.statistics import compute_statistics
from gossamer.data.store import Store, write_store
from gossamer.data.structure import Structure
from gossamer.neighbors import neighbor_list

CUTOFF, BATCH, SOME = 5.0, 64, 1280
"""Å; frames of a batch; frames on which the parts of a batch are timed"""


def said(what: str, frames: int, work: Callable[[], Any]) -> Any:
    began = time.process_time()
    found = work()
    print(f"{what}: {1000 * (time.process_time() - began) / frames:.3f} ms a frame", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--frames", type=int, default=20_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source, rng = list(open_dataset(arguments.data)), np.random.default_rng(0)

    def frames() -> Iterator[Structure]:
        for k in range(arguments.frames):
            s = source[k % len(source)]
            yield replace(s, positions=s.positions + rng.normal(scale=1e-3, size=s.positions.shape), group=f"material {k // 10}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        write_store(frames(), path)
        store, n = Store(path), arguments.frames
        chosen = rng.permutation(n)[:SOME].tolist()
        some = said("batches: read and verify", len(chosen), lambda: [store[k] for k in chosen])
        lists = said("batches: neighbour list", len(some), lambda: [neighbor_list(s.positions, s.cell, s.pbc, CUTOFF) for s in some])
        parts = [slice(k, k + BATCH) for k in range(0, len(some), BATCH)]
        said("batches: collate", len(some), lambda: [collate(some[p], CUTOFF, lists=lists[p]) for p in parts])
        pairs, atoms = sum(edges.shape[1] for edges, _ in lists), sum(s.n_atoms for s in some)
        print(f"pairs within {CUTOFF:g} Å: {pairs / len(some):.0f} a frame, {pairs / atoms:.1f} an atom")
        config = DataConfig(train=str(path), split="group", valid_fraction=0.02)
        train, valid = said("start: split", n, lambda: split(store, config))
        said("start: labels", n, lambda: require_labels(train, ["energy", "forces", "stress"], ""))
        said("start: statistics", n, lambda: compute_statistics(train, CUTOFF))
        said("start: fingerprints", n, lambda: SeenFrames.of(train, valid))


if __name__ == "__main__":
    main()
