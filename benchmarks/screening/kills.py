"""Random SIGKILLs of a screening lose and repeat nothing: python benchmarks/screening/kills.py [--kills 20] [--structures 400]

Alloys are relaxed (EMT, or a saved potential on frames of yours). At random times the submitter, Parsl's interchange, its pool or a worker is
killed; the same command goes on. At the end every structure has one row, rows written before a kill are untouched, energies are those of a
screening that nobody disturbed, and no process is left.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import psutil
from ase.build import bulk

from gossamer.screening.executor import MARK

METALS = ["Ni", "Cu", "Pd", "Ag", "Pt", "Au"]
Snapshot = dict[str, tuple[Any, ...]]


def alloys(n: int, seed: int = 0) -> list[Any]:
    """Rattled fcc alloys of four atoms; every fiftieth is broken."""
    generator = np.random.default_rng(seed)
    found = []
    for k in range(n):
        atoms = bulk("Cu", a=3.6 + 0.4 * generator.random(), cubic=True)
        atoms.symbols = generator.choice(METALS, size=4)
        atoms.rattle(0.1, seed=k)
        if k % 50 == 7:
            atoms.positions[1] = atoms.positions[0]
        found.append(atoms)
    return found


def read(path: Path, question: str) -> list[tuple[Any, ...]]:
    """Rows of the results; none while there is no file."""
    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            return connection.execute(question).fetchall()
        finally:
            connection.close()
    except sqlite3.OperationalError:
        return []


def marked(path: Path) -> list[psutil.Process]:
    """Processes of the screenings that wrote these results."""
    marks = {mark for (mark,) in read(path, "select mark from run")}
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) in marks and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def victims(path: Path) -> dict[str, list[psutil.Process]]:
    """Processes by what they do; those that keep a pool's books are among the workers."""
    kinds: dict[str, list[psutil.Process]] = {"interchange": [], "pool": [], "worker": []}
    for process in marked(path):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if "interchange" in line:
            kinds["interchange"].append(process)
        elif "gossamer.screening.pool" in line:
            kinds["pool"].append(process)
        elif "spawn_main" in line:
            kinds["worker"].append(process)
    return kinds


def snapshot(path: Path) -> Snapshot:
    """Rows by id."""
    return {row[0]: row for row in read(path, "select id, status, energy, steps, seconds, finished from result")}


def start(arguments: list[str], out: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gossamer.cli", "screen", *arguments, "--out", str(out), "--workers", str(workers)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open(out.with_suffix(".log"), "ab"))


def disturbed(arguments: list[str], out: Path, kills: int, workers: int, longest: float, seed: int) -> dict[str, Any]:
    """Screen to the end, with so many kills on the way; raises AssertionError if a row is lost or done twice."""
    dice = random.Random(seed)
    killed: dict[str, int] = {}
    process = start(arguments, out, workers)
    before: Snapshot = {}
    while True:
        if dice.random() < 0.8:  # most kills hit a screening that has got somewhere since the last
            while len(snapshot(out)) == len(before) and process.poll() is None:
                time.sleep(0.05)
        time.sleep(dice.uniform(0.1, longest))
        after = snapshot(out)
        changed = [k for k, row in before.items() if after.get(k) != row]
        assert not changed, f"rows lost or done again: {changed[:5]}"
        before = after
        if process.poll() is not None:
            if process.returncode in (0, 1):  # 1: some did not converge
                return {"killed": killed, "rows": len(after)}
            process = start(arguments, out, workers)
        elif sum(killed.values()) < kills:
            kinds = {"submitter": [psutil.Process(process.pid)], **victims(out)}
            kind = dice.choice([k for k, found in kinds.items() if found])
            try:
                dice.choice(kinds[kind]).send_signal(signal.SIGKILL)
                killed[kind] = killed.get(kind, 0) + 1
            except psutil.NoSuchProcess:
                continue
            process.poll()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--structures", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--block", type=int, default=5)
    parser.add_argument("--longest", type=float, default=3.0, help="s, at most, from a new row to the next kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("kills"))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    structures = given.folder / "alloys.extxyz"
    ase.io.write(structures, alloys(given.structures))
    arguments = [str(structures), "--calculator", "ase.calculators.emt:EMT", "--fmax", "0.01", "--block", str(given.block)]
    began = time.time()
    out = given.folder / "disturbed.sqlite"
    answer = disturbed(arguments, out, given.kills, given.workers, given.longest, given.seed)
    answer["seconds"] = round(time.time() - began, 1)
    calm = given.folder / "calm.sqlite"
    began = time.time()
    assert start(arguments, calm, given.workers).wait() in (0, 1)
    answer["seconds_undisturbed"] = round(time.time() - began, 1)
    left, first, second = [*marked(out), *marked(calm)], snapshot(out), snapshot(calm)
    assert not left, f"processes are left: {left}"
    assert first.keys() == second.keys(), "structures are missing"
    assert len(first) == given.structures
    differ = [k for k in first if first[k][1:4] != second[k][1:4]]
    assert not differ, f"other answers than undisturbed: {[(first[k], second[k]) for k in differ[:3]]}"
    print(json.dumps({**answer, "structures": given.structures, "agree": True}))


if __name__ == "__main__":
    main()
