"""Active learning beside random selection and plain sampling, on ethanol by GFN2-xTB: what a label is worth.

    python benchmarks/reliability/learning.py --out runs/learning            needs tblite (pip install 'gossamer[labels]')
    python benchmarks/reliability/learning.py --out runs/learning --table     # for README.md

A potential is trained, as `gossamer fit` would, on 20 frames of half a picosecond at 300 K. From it three ways go on, with as many labels and training
steps in each round:

    learn    gossamer.learn: frames of its own walks that it is uncertain of, far from each other
    random   frames of its own walks, drawn at random (of those that learn would label: walks that are lost are left out)
    md       frames of dynamics by GFN2-xTB itself at 500 K, evenly spaced; each of its steps is an evaluation of the reference, too

Each round's potential is tested on frames of other dynamics by GFN2-xTB, at 500 and 1000 K; the last of each way, and the start, walk for 100 ps
at 500 K, and frames of that walk are labelled to see how right it was. Every stage is kept, and the same command does what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.trajectory import Trajectory

import gossamer
from gossamer.checks.source import find_sources
from gossamer.config import make_config
from gossamer.data.dataset import open_dataset
from gossamer.evaluation import evaluate_potential
from gossamer.files import atomic_path, write_json
from gossamer.fitting import choose_settings
from gossamer.learning import LOST, OUTSIDE, _explore, _fit, _labelled
from gossamer.runs import POTENTIAL
from gossamer.settings import to_dict
from gossamer.simulation.options import LearnConfig
from gossamer.simulation.uncertain import force_uncertainties

LABEL = "tblite.ase:TBLite(method='GFN2-xTB', verbosity=0)"
WAYS = ("learn", "random", "md")
TESTS = {"500 K": (500.0, 60, 11), "1000 K": (1000.0, 60, 12)}
"""temperature, frames, seed"""
SPACING = {"start": 25, "sample": 100, "test": 50}
"""steps of 1 fs between frames of dynamics by the reference"""


def reference(temperature: float, n: int, spacing: int, seed: int, out: Path) -> Path:
    """Labelled frames of dynamics by the reference; the first half picosecond is dropped (none of a start)."""
    file = out / "frames.extxyz"
    if file.exists() and len(ase.io.read(file, ":")) >= n:
        return file
    (source,) = find_sources([], [LABEL])
    skip = 500 // spacing
    gossamer.md(source.make(), molecule("CH3CH2OH"), temperature=temperature, steps=(n + skip) * spacing, timestep=1.0, interval=spacing,
                seed=seed, out=out, resume=True, progress=False)  # fmt: skip
    with Trajectory(out / "trajectory.traj") as frames:
        kept = [frames[k + 1 + skip] for k in range(n)]
    for atoms in kept:
        atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy(), forces=atoms.get_forces(apply_constraint=False))
        atoms.set_momenta(None)
    with atomic_path(file) as temporary:
        ase.io.write(temporary, kept, format="extxyz")
    return file


def begin(data: Path, network: str | None, steps: int, out: Path) -> Path:
    """The potential that all ways start from: what `fit` chooses, for a number of steps."""
    if not (out / "results.json").exists():
        chosen = to_dict(choose_settings(data, model=network, out=out))
        chosen["data"] |= {"valid_size": 4}
        chosen["training"] |= {"minutes": None, "steps": steps, "compile": False}
        gossamer.train(make_config(chosen), resume=True, progress=False)
    return out / POTENTIAL


def baseline(way: str, start: Path, data: Path, pool: Sequence[Atoms], config: LearnConfig) -> None:
    """The rounds of `gossamer.learn` with another choice of frames."""
    (source,) = find_sources([], [LABEL])
    current, old, limit = start, list(open_dataset(data)), np.inf
    for number in range(1, config.rounds + 1):
        folder = config.out / f"round-{number:02d}"
        if not (folder / "round.json").exists():
            potential, found = gossamer.load(current), {}
            chosen = list(pool[(number - 1) * config.frames : number * config.frames])
            if way == "random":
                limit = min(limit, OUTSIDE * potential.uncertainty.record["forces_rmse_eV_per_A"])
                found = _explore(potential, [molecule("CH3CH2OH")], limit, config, folder / "walks", number)
                frames = sane(potential, folder / "walks", LOST * limit)
                picks = np.random.default_rng(config.seed + number).permutation(len(frames))[: config.frames]
                chosen = [frames[k] for k in sorted(picks)]
            labelled = _labelled(chosen, source.make, folder)
            _fit(current, potential, old, config, folder)
            write_json(folder / "round.json", {"round": number, "n_labelled": len(labelled), **found})
        current = folder / "fit" / POTENTIAL


def sane(potential: Any, walks: Path, limit: float) -> list[Atoms]:
    """Frames of walks, but for those that are lost."""
    calculator, kept = gossamer.Calculator(potential, uncertainty=True), []
    for path in sorted(walks.glob("*/trajectory.traj")):
        with Trajectory(path) as frames:
            for atoms in frames[1:]:  # all walks begin with the same
                bare = Atoms(atoms.numbers, atoms.positions)
                bare.calc = calculator
                bare.get_potential_energy()
                if force_uncertainties(bare).max() < limit:
                    kept.append(Atoms(atoms.numbers, atoms.positions))
    return kept


def tested(file: Path, tests: dict[str, Path]) -> dict[str, float]:
    """Root mean square errors of forces, meV/Å, and mean absolute ones of energies, meV/atom, by test."""
    potential = gossamer.load(file)
    out = {}
    for name, path in tests.items():
        found = evaluate_potential(potential, open_dataset(path), keep=0)
        out |= {f"forces_rmse_meV_per_A, {name}": found.forces.rmse, f"energy_mae_meV_per_atom, {name}": found.energy.mae}
    return out


def walked(file: Path, picoseconds: float, out: Path) -> dict[str, Any]:
    """A walk at 500 K, or more of it where a longer one is asked for: how long it held, and how right it was (20 of its frames, by the reference)."""
    record = out / "walk.json"
    if not record.exists() or json.loads(record.read_text())["asked_ps"] < picoseconds:
        answer = gossamer.md(str(file), molecule("CH3CH2OH"), temperature=500.0, steps=round(1000 * picoseconds), timestep=1.0, interval=50,
                             max_bond_stretch=0.5, seed=5, out=out, resume=True, progress=False)  # fmt: skip
        (source,) = find_sources([], [LABEL])
        calculator = source.make()
        with Trajectory(out / "trajectory.traj") as frames:
            errors = [_error(frames[k], calculator) for k in np.linspace(1, len(frames) - 1, min(20, len(frames) - 1)).astype(int).tolist()]
        write_json(record, {"asked_ps": picoseconds, "held_ps": answer["time_ps"], "broken": answer["broken"], "mean_temperature_K": answer["mean_temperature_K"],
                            "forces_rmse_meV_per_A": 1000 * float(np.sqrt(np.mean(errors)))})  # fmt: skip
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def _error(atoms: Atoms, calculator: Any) -> float:
    """Mean square difference of the forces of a frame from the reference's, (eV/Å)²."""
    true = Atoms(atoms.numbers, atoms.positions)
    true.calc = calculator
    return float(((atoms.get_forces(apply_constraint=False) - true.get_forces()) ** 2).mean())


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All stages; the record."""
    out: Path = arguments.out
    n_labels = arguments.rounds * arguments.frames
    start_data = reference(300.0, 20, SPACING["start"], 1, out / "reference-start")
    pool = ase.io.read(reference(500.0, n_labels, SPACING["sample"], 2, out / "reference-sample"), ":")
    tests = {name: reference(t, n, SPACING["test"], seed, out / f"reference-{t:.0f}K") for name, (t, n, seed) in TESTS.items()}
    start = begin(start_data, arguments.network, arguments.start_steps, out / "start")
    record: dict[str, Any] = {
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("out", "table")}, "gossamer": gossamer.__version__,
        "start": tested(start, tests) | {"walk": walked(start, arguments.picoseconds, out / "walk-start")},
    }  # fmt: skip
    for way in arguments.ways:
        config = LearnConfig(
            out=out / way, rounds=arguments.rounds, frames=arguments.frames, temperatures=[500.0, 800.0], steps=arguments.walk_steps,
            timestep=1.0, spacing=20.0, train_steps=arguments.fit_steps, seed=arguments.seed,
        )  # fmt: skip
        if way == "learn":
            gossamer.learn(start, [molecule("CH3CH2OH")], LABEL, start_data, config)
        else:
            baseline(way, start, start_data, pool, config)
        rounds, last = [], start
        for folder in sorted(config.out.glob("round-*")):
            told = json.loads((folder / "round.json").read_text())
            if (folder / "fit" / "results.json").exists():
                last = folder / "fit" / POTENTIAL
                told |= tested(last, tests)
            rounds.append(told)
        record[way] = {"rounds": rounds, "n_labelled": sum(r["n_labelled"] for r in rounds),
                       "walk": walked(last, arguments.picoseconds, out / f"walk-{way}")}  # fmt: skip
        write_json(out / "learning.json", record)
        print(way, json.dumps(record[way]["rounds"][-1]), json.dumps(record[way]["walk"]), file=sys.stderr, flush=True)
    return record


def table(record: dict[str, Any]) -> str:
    """Errors by number of labels, and the long walks."""
    lines = ["| labels beside the first 20 | way | force RMSE at 500 K, meV/Å | at 1000 K | energy MAE at 500 K, meV/atom | uncertain frames of its walks | broken walks |", "|---|---|---|---|---|---|---|"]  # fmt: skip

    def row(labels: int, way: str, r: dict[str, Any]) -> str:
        errors = f"{r['forces_rmse_meV_per_A, 500 K']:.0f} | {r['forces_rmse_meV_per_A, 1000 K']:.0f} | {r['energy_mae_meV_per_atom, 500 K']:.2f}"
        share = f"{100 * r['uncertain_share']:.0f} % | {r['broken']}" if "uncertain_share" in r else " | "
        return f"| {labels} | {way} | {errors} | {share} |"

    lines.append(row(0, "start", record["start"]))
    ways = [w for w in WAYS if w in record]
    for k in range(max(len(record[w]["rounds"]) for w in ways)):
        for way in ways:
            rounds = record[way]["rounds"]
            if k < len(rounds) and "forces_rmse_meV_per_A, 500 K" in rounds[k]:
                lines.append(row(sum(r["n_labelled"] for r in rounds[: k + 1]), way, rounds[k]))
    lines += ["", "| walk at 500 K | labels | held, ps | force RMSE on its own frames, meV/Å |", "|---|---|---|---|"]
    for way in ("start", *ways):
        walk = record[way]["walk"]
        held = f"{walk['held_ps']:g}" + (f" ({walk['broken']})" if walk["broken"] else "")
        lines.append(f"| {way} | {record[way].get('n_labelled', 0)} | {held} | {walk['forces_rmse_meV_per_A']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / "learning")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--network", help="default: that of gossamer fit")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--frames", type=int, default=10, help="labels of each round")
    parser.add_argument("--start-steps", type=int, default=3000)
    parser.add_argument("--fit-steps", type=int, default=1000, help="training steps of each round")
    parser.add_argument("--walk-steps", type=int, default=1000, help="of 1 fs, of each walk of a round")
    parser.add_argument("--picoseconds", type=float, default=100.0, help="of the last walks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    record = json.loads((arguments.out / "learning.json").read_text()) if arguments.table else run(arguments)
    print(table(record), end="")


if __name__ == "__main__":
    main()
