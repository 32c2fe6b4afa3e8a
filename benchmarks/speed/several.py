"""From how many steps on `gossamer md` on several structures pays for compiling: kernels beside a program that serves them all.

    python benchmarks/speed/several.py POTENTIAL [--repeats 2 2 2]

Twenty rattled crystals of silicon, CPU time of energies and forces on one thread, median over crystals, a neighbour list kept; and of compiling.
"""

from __future__ import annotations

import argparse
import json
import os
import time

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk

import gossamer


def milliseconds(calculator: gossamer.Calculator, structures: list[Atoms]) -> float:
    """Median CPU time of a step; the first of each structure, which makes its neighbour list, left out."""
    rng, times = np.random.default_rng(0), []
    for start in structures:
        atoms = start.copy()
        atoms.calc = calculator
        atoms.get_forces()
        for _ in range(5):
            atoms.positions += 1e-3 * rng.standard_normal(atoms.positions.shape)
            began = time.process_time()
            atoms.get_forces()
            times.append(1000 * (time.process_time() - began))
    return float(np.median(times))


def cpu_seconds() -> float:
    """Of this process and those it started."""
    return sum(os.times()[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("potential", help="that knows silicon")
    parser.add_argument("--repeats", type=int, nargs=3, default=[2, 2, 2], help="cells of eight atoms")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    structures = [bulk("Si", cubic=True) * arguments.repeats for _ in range(20)]
    for seed, atoms in enumerate(structures):
        atoms.rattle(0.05, seed=seed)
    kernels = milliseconds(gossamer.Calculator(arguments.potential, way="kernels"), structures)
    began = cpu_seconds()
    compiled = gossamer.Calculator(arguments.potential, way="program")
    compiled.expect(1, structures[0])
    compiling = cpu_seconds() - began
    program = milliseconds(compiled, structures)
    print(json.dumps({"atoms": len(structures[0]), "kernels_ms": round(kernels, 2), "program_ms": round(program, 2),
                      "ratio": round(program / kernels, 3), "compiling_cpu_s": round(compiling, 1),
                      "pays_from_steps": round(1000 * compiling / (kernels - program))}))  # fmt: skip


if __name__ == "__main__":
    main()
