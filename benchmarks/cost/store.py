"""Data larger than memory: a store written as a stream and trained on, time and memory against the number of frames.

    python benchmarks/cost/store.py [--frames 10000 100000 1000000] [--folder /tmp/store]

Invented frames of 2 to 60 atoms in a periodic cell (mean 31, as MPtrj's), with energy, forces and stress. Each size in a process of
its own; CPU times. Rows go to store.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

OUT = Path(__file__).with_suffix(".json")


def frames(n: int) -> Iterator:
    from gossamer.data.structure import Structure

    rng = np.random.default_rng(0)
    for k in range(n):
        n_atoms = int(rng.integers(2, 61))
        edge = (12.0 * n_atoms) ** (1 / 3)
        yield Structure(
            atomic_numbers=rng.choice([3, 8, 14, 26], n_atoms), positions=rng.uniform(0, edge, (n_atoms, 3)), cell=edge * np.eye(3), pbc=np.ones(3, bool),
            energy=float(rng.normal()), forces=rng.normal(size=(n_atoms, 3)), stress=np.zeros((3, 3)), group=str(k // 10),
        )  # fmt: skip


def megabytes() -> float:
    """Memory of its own; pages of files that the operating system keeps as long as there is room, and takes back, are not counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def measure(n: int, folder: Path, answer) -> None:  # type: ignore[no-untyped-def]
    from gossamer.config import make_config
    from gossamer.data.statistics import compute_statistics
    from gossamer.data.store import Store, write_store
    from gossamer.potential import Potential
    from gossamer.training.loader import Loader, epoch_batches

    row: dict[str, float] = {"frames": n, "imports_MB": megabytes()}
    shutil.rmtree(folder, ignore_errors=True)
    start = time.process_time()
    write_store(frames(n), folder)
    row |= {"write_seconds": time.process_time() - start, "write_MB": megabytes(), "bytes": sum(f.stat().st_size for f in folder.iterdir())}
    store = Store(folder)
    start = time.process_time()
    order = np.random.default_rng(1).permutation(n)[:20_000]
    for k in order:
        store[int(k)]
    row |= {"read_us_per_frame": 1e6 * (time.process_time() - start) / len(order), "read_MB": megabytes()}
    config = make_config({"data": {"train": "-"}, "model": {"name": "nequip"}})
    statistics = compute_statistics([store[int(k)] for k in order[:200]], config.model.cutoff)
    potential = Potential(config.model, statistics)
    start = time.process_time()
    batches = epoch_batches(n, 16, 0, 0)
    row |= {"order_seconds": time.process_time() - start}
    start, batches = time.process_time(), batches[:300]
    atoms = sum(graph.n_atoms for graph in Loader(potential, store).graphs(batches))
    row |= {"collate_us_per_atom": 1e6 * (time.process_time() - start) / atoms, "MB": megabytes()}
    shutil.rmtree(folder)
    answer.put(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/gossamer-store"))
    arguments = parser.parse_args()
    context, rows = multiprocessing.get_context("spawn"), []
    for n in arguments.frames:
        answer = context.Queue()
        process = context.Process(target=measure, args=(n, arguments.folder, answer))
        process.start()
        rows.append(answer.get())
        process.join()
        print({k: round(v, 1) for k, v in rows[-1].items()}, flush=True)
        OUT.write_text(json.dumps({"date": datetime.date.today().isoformat(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
