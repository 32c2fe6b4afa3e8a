"""21 atoms (1-hexanol) through ASE by kernels and by program, turn by turn in one process: CPU time, fastest of 60, one thread.

python benchmarks/speed/molecule.py /path/to/checkpoint_sevennet_0.pth      what `gossamer import` reads, or without: MACE of MP-0 small's size
"""

from __future__ import annotations

import sys
import time

import numpy as np
import peers
import torch
from structures import hexanol

from gossamer.imports import read_potential
from gossamer.imports.contract import ImportOptions
from gossamer.imports.inert import open_tree
from gossamer.simulation.calculator import Calculator

ROUNDS = 60


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:]:
        _, potential = read_potential(open_tree(sys.argv[1]), ImportOptions())
    else:
        calculator, _ = peers.ours({"name": "mace", "preset": "MP-small", "variant": "published"}, "kernels", peers.ALL)
        potential = calculator.potential
    rng, fastest = np.random.default_rng(0), {}
    calculators = {way: Calculator(potential, way=way) for way in ("kernels", "program")}
    for _ in range(ROUNDS):
        for way, calculator in calculators.items():
            atoms = hexanol()
            atoms.positions += rng.normal(scale=0.005, size=atoms.positions.shape)
            start = time.process_time()
            calculator.calculate(atoms, ["energy", "forces"])
            fastest[way] = min(fastest.get(way, np.inf), time.process_time() - start)
    print({way: f"{1000 * seconds:.2f} ms" for way, seconds in fastest.items()})


if __name__ == "__main__":
    main()
