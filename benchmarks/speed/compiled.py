"""Energy and forces of saved potentials through ASE: the potential itself, with kernels, and as a compiled program, in one run.

    python benchmarks/speed/compiled.py POTENTIAL STRUCTURE [REPEATS] [--threads 1]

CPU time on one thread (wall time on several), fastest of several calls with slightly moved atoms, neighbour list included.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from gossamer.comparison import machine
from gossamer.data.atoms import as_atoms
from gossamer.simulation.calculator import Calculator
from gossamer.timing import fastest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("potential", type=Path)
    parser.add_argument("structure", type=Path)
    parser.add_argument("repeats", type=int, nargs="?", default=1, help="copies along each axis")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    atoms = as_atoms(arguments.structure).repeat(arguments.repeats)
    positions = atoms.positions.copy()
    rng = np.random.default_rng(0)
    rows, forces = [], []
    for way in ("plain", "kernels", "program"):
        atoms.positions = positions
        began = time.perf_counter()
        atoms.calc = calculator = Calculator(arguments.potential, way=way)
        forces.append(atoms.get_forces())
        ready = time.perf_counter() - began
        repeats = 60 if len(atoms) < 100 else 15

        def call() -> None:
            atoms.positions = positions + 1e-3 * rng.normal(size=positions.shape)
            atoms.get_forces()

        through_ase = 1000 * fastest(call, repeats, clock=clock)
        atoms.positions = positions
        graph = calculator.graph(atoms)
        network = 1000 * fastest(lambda c=calculator, g=graph: c.engine(g), repeats, clock=clock)
        rows.append(f"{through_ase:.2f} ({network:.2f}; {ready:.0f} s)")
    deviation = np.abs(forces[2] - forces[0]).max()
    model = calculator.potential.network.config.name
    print(
        f"| {model}, {calculator.potential.num_parameters:,} | {arguments.structure.name.split('.')[0]}, {len(atoms)} | {graph.n_edges:,} | {' | '.join(rows)} | {deviation:.0e} | {machine(calculator.potential)} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
