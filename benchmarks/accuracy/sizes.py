"""Networks of several sizes and cutoffs: error after the same time of training against the cost of a step of dynamics.

    python benchmarks/accuracy/variants.py --minutes 2 --out benchmarks/accuracy/sizes.json --data FOLDER "silicon weft training.clock=cpu" ...
    python benchmarks/accuracy/sizes.py --data FOLDER > benchmarks/accuracy/sizes.md

The first trains (as many rows as there are), the second times energies and forces of each network on the first test frame of its data, through
the ASE calculator with kernels, one call of each network in turn (CPU time, lower quartile), and writes a table. `gossamer fit` chooses by it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from variants import SETS

import gossamer
from gossamer.config import make_config
from gossamer.data.atoms import read_frames
from gossamer.data.statistics import Statistics
from gossamer.machine import machine, versions

HERE = Path(__file__).resolve().parent
HEAD = "| network | steps | ms of a training step | force MAE, meV/Å | energy MAE, meV/atom | ms of energy and forces |\n|---|---|---|---|---|---|"


def name_of(job: str) -> str:
    """The network of a job and what differs from its recipe, in short."""
    _, network, *changes = job.split()
    return ", ".join([network, *(c.removeprefix("model.").replace("=", " ") for c in changes if c.startswith("model."))])


def calculator(job: str, elements: list[str]) -> gossamer.Calculator:
    """The network with random weights: what it costs does not depend on them."""
    _, network, *changes = job.split()
    model = make_config({"data": {"train": "none"}, "model": {"name": network}}, [c for c in changes if c.startswith("model.")]).model
    torch.manual_seed(0)
    about = Statistics(elements=elements, reference_energies=dict.fromkeys(elements, 0.0), mean_neighbors=30.0)
    return gossamer.Calculator(gossamer.Potential(model, about))


def milliseconds(jobs: list[str], frame: Path, rounds: int) -> dict[str, float]:
    """CPU time of energies and forces of each job's network, one call of each in turn."""
    atoms = read_frames(frame)[0]
    start, rng = atoms.positions.copy(), np.random.default_rng(0)
    elements = sorted(set(atoms.get_chemical_symbols()))
    calculators = {job: calculator(job, elements) for job in jobs}
    times: dict[str, list[float]] = {job: [] for job in jobs}
    for number in range(rounds + 3):
        atoms.positions = start + 1e-3 * rng.standard_normal(start.shape)
        for job, calc in calculators.items():
            atoms.calc = calc
            began = time.process_time()
            atoms.get_forces()
            if number >= 3:
                times[job].append(1000 * (time.process_time() - began))
    return {job: round(statistics.quantiles(values, n=4)[0], 2) for job, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=Path, default=HERE / "sizes.json", help="of variants.py")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [r for r in json.loads(arguments.rows.read_text()) if "failed" not in r]
    print(f"{datetime.date.today().isoformat()}, {machine()}, {versions(('gossamer', 'torch'))}, one thread.")
    for which, (_, files, *_) in SETS.items():
        mine = [r for r in rows if r["job"].split()[0] == which]
        frame = next(arguments.data.rglob(f"{files}_test.extxyz.xz"))
        cost = milliseconds(list(dict.fromkeys(r["job"] for r in mine)), frame, arguments.rounds) if mine else {}
        for minutes in sorted({r["minutes"] for r in mine}):
            print(f"\n**{which}**, {minutes:g} CPU minutes of training:\n")
            print(HEAD)
            for r in sorted((r for r in mine if r["minutes"] == minutes), key=lambda r: r["test_forces_mae_meV_per_A"]):
                print(
                    f"| {name_of(r['job'])} | {r['steps']:,} | {r['step_ms']:.0f} | {r['test_forces_mae_meV_per_A']:.1f} "
                    f"| {r['test_energy_mae_meV_per_atom']:.2f} | {cost[r['job']]:.2f} |"
                )


if __name__ == "__main__":
    main()
