"""Memory of the submitter: python memory.py [--structures N ...]: peak resident memory with N small structures, each in a process of its own.

The task is next to nothing (energies and forces of nought), so that what is held for each structure shows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator


class Nought(Calculator):
    """Answers nought, at once."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def calculate(self, atoms: Atoms | None = None, *_: Any) -> None:
        self.results = {"energy": 0.0, "forces": np.zeros((len(atoms or ()), 3))}


def write(path: Path, n: int) -> None:
    """Rattled copper, four atoms each."""
    copper, generator = bulk("Cu", cubic=True), np.random.default_rng(0)
    cell = " ".join(str(x) for x in copper.cell.array.ravel())
    with path.open("w") as file:
        for _ in range(n):
            file.write(f'4\nLattice="{cell}" Properties=species:S:1:pos:R:3 pbc="T T T"\n')
            positions = copper.positions + 0.05 * generator.standard_normal((4, 3))
            file.writelines(f"Cu {x:.8f} {y:.8f} {z:.8f}\n" for x, y, z in positions)


def measure(n: int) -> dict[str, Any]:
    """Screen n structures in this process."""
    from gossamer.screening.screen import screen

    folder = Path.cwd()
    write(folder / "many.extxyz", n)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    answer = screen(folder / "many.extxyz", calculator="memory:Nought", task="single-point", workers=1, out=folder / "results.sqlite")
    peak, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time() - began
    return {"structures": n, "MB_before": round(before / 1024, 1), "MB_peak": round(peak / 1024, 1), "cpu_seconds": round(cpu, 1),
            "seconds": answer["seconds"], "statuses": answer["statuses"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--structures", type=int, nargs="+", default=[1000, 10000, 100000])
    parser.add_argument("--here", action="store_true", help="in this process and folder")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measure(given.structures[0])))
        return
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    for n in given.structures:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "--here", "--structures", str(n)], cwd=folder,
                           env={**os.environ, "PYTHONPATH": path}, check=True)  # fmt: skip


if __name__ == "__main__":
    main()
