"""Kinetic energy of one molecule in Nosé-Hoover chains, beside that of the canonical ensemble.

    python benchmarks/reliability/chains.py POTENTIAL STRUCTURE [--thermostat-time 10 100] [--picoseconds 20] [--out runs/chains]

Mean and width over those of so many degrees of freedom (the first quarter of each run left out), and how wide the second may be by chance.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from ase import units

import gossamer
from gossamer.data.atoms import read_frames
from gossamer.simulation.guard import degrees_of_freedom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("potential")
    parser.add_argument("structure", help="its first frame, without its velocities")
    parser.add_argument("--thermostat-time", type=float, nargs="+", default=[10.0, 100.0], help="fs")
    parser.add_argument("--picoseconds", type=float, default=20.0)
    parser.add_argument("--temperature", type=float, default=500.0)
    parser.add_argument("--out", type=Path, default=Path("runs/chains"))
    arguments = parser.parse_args()
    atoms = read_frames(arguments.structure, 0)[0]
    atoms.set_array("momenta", None)
    calculator = gossamer.Calculator(arguments.potential)
    for tau in arguments.thermostat_time:
        out = arguments.out / f"{tau:g}"
        gossamer.md(calculator, atoms, ensemble="nose-hoover", temperature=arguments.temperature, timestep=0.5, thermostat_time=tau, interval=20,
                    steps=round(2000 * arguments.picoseconds), out=out, progress=False)  # fmt: skip
        with open(out / "log.csv", newline="") as file:
            kinetic = np.array([float(r["total_energy_eV"]) - float(r["potential_energy_eV"]) for r in csv.DictReader(file)])
        kinetic = kinetic[len(kinetic) // 4 :]
        freedom = degrees_of_freedom(atoms, "nose-hoover")
        heat = units.kB * arguments.temperature
        print(json.dumps({
            "thermostat_time_fs": tau, "degrees_of_freedom": freedom, "frames": len(kinetic),
            "mean": round(kinetic.mean() / (freedom / 2 * heat), 3), "width": round(kinetic.std() / (np.sqrt(freedom / 2) * heat), 3),
            "chance": round(float(np.sqrt(0.5 / len(kinetic))), 3),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
