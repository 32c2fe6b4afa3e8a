"""Molecular dynamics of the systems of LEIGNN's paper, per "Forces are not enough" (Fu et al., TMLR 2023), one network beside the other.

    python benchmarks/md/run.py --data ../shared/data --out runs/md leignn:lips weft:lips painn:methane ...
    python benchmarks/md/run.py --page                  # results.md and a page for each system, from the rows in results/

Each NETWORK:SYSTEM is a row: trained with the settings that `gossamer fit` chooses for so many minutes of CPU time, all networks equally long,
then simulated from a test frame, and for 1 ps each at constant energy with two time steps. The same command again does what is missing.

lips: Li6.75P3S11, 83 atoms, Nosé-Hoover, 520 K, 0.25 fs, thermostat time 20 steps; RDFs against all labelled frames, in windows of 1 ps.
water: 192 atoms, Nosé-Hoover, 330 K (the temperature of the labelled frames), 0.5 fs; RDFs against the labelled frames, windows of 2 ps.
methane: one molecule, trained at 1000 K, Nosé-Hoover, 300 K, 0.5 fs; h(r) against the labelled frames, bonds within 0.5 Å.
The published protocol runs 50 ps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ase.io
import numpy as np
import torch
from ase import Atoms

import gossamer
from gossamer.checks import liquids
from gossamer.checks.conservation import nve_conservation
from gossamer.checks.run_page import Report, plot_curves
from gossamer.config import make_config
from gossamer.data.dataset import open_dataset
from gossamer.data.readers import read_structures
from gossamer.engine.engine import Engine
from gossamer.evaluation import evaluate_potential
from gossamer.files import write_text
from gossamer.fitting import choose_settings
from gossamer.runs import train
from gossamer.settings import to_dict
from gossamer.simulation.guard import find_bonds

HERE = Path(__file__).resolve().parent
SYSTEMS: dict[str, dict[str, Any]] = {
    "lips": {"train": "lips/lips_train", "test": "lips/lips_test", "others": ["lips/lips_val"], "temperature": 520.0, "timestep": 0.25,
             "thermostat_time": 5.0, "interval": 50, "window": 1.0, "pairs": [("Li", "Li"), ("Li", "S"), ("P", "S")], "diffusing": "Li"},
    "water": {"train": "water_pbe0ts_330K/water_pbe0ts_train", "test": "water_pbe0ts_330K/water_pbe0ts_test", "others": [], "temperature": 330.0,
              "timestep": 0.5, "thermostat_time": 50.0, "interval": 20, "window": 2.0, "pairs": [("O", "O"), ("O", "H"), ("H", "H")], "diffusing": "O"},
    "methane": {"train": "no_upstream_licence/ch4/ch4_aimd_1000K", "test": "no_upstream_licence/ch4/ch4_aimd_300K", "others": None, "temperature": 300.0,
                "timestep": 0.5, "thermostat_time": 50.0, "interval": 10, "window": 2.0, "pairs": [], "diffusing": None},
}  # fmt: skip
"""training and test frames; the reference are both and the others (methane: the test frames, which are at its temperature)"""
NETWORKS = ("leignn", "weft", "nequip", "geodite", "mace", "painn", "schnet", "sevennet")
N_TEST = 100
"""test frames for the errors"""
CURVE = 150
"""bins of the curves that are kept and drawn; the errors of all pairs are of 500, as published"""


def run(network: str, system: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, simulate, write the record of one row and return it."""
    s = SYSTEMS[system]
    files = {name: arguments.data / f"{s[name]}.extxyz.xz" for name in ("train", "test")}
    folder = arguments.out / f"{network}-{system}"
    file = folder / "potential.safetensors"
    if not (folder / "results.json").exists():
        config = choose_settings(files["train"], model=network, out=folder, minutes=arguments.minutes)
        changes = ["training.clock=cpu", "training.compile=false"]
        train(make_config(to_dict(config), changes), resume=(folder / "checkpoint.safetensors").exists(), progress=False)
    trained = json.loads((folder / "results.json").read_text())
    potential = gossamer.load(file)
    test = [x.to_ase() for x in read_structures(files["test"])]
    reference = list(test)
    if s["others"] is not None:
        for other in (files["train"], *(arguments.data / f"{name}.extxyz.xz" for name in s["others"])):
            reference += [x.to_ase() for x in read_structures(other)]
    walk = folder / "md"
    result = gossamer.md(file, test[-1].copy(), temperature=s["temperature"], steps=round(arguments.picoseconds * 1000 / s["timestep"]),
                         timestep=s["timestep"], ensemble="nose-hoover", out=walk, interval=s["interval"], thermostat_time=s["thermostat_time"],
                         max_bond_stretch=0.5 if system == "methane" else None, resume=(walk / "state.npz").exists(), progress=False)  # fmt: skip
    trajectory = ase.io.read(walk / "trajectory.traj", ":")
    nve = nve_conservation(gossamer.Calculator(file), trajectory[-1], timestep=s["timestep"], picoseconds=1.0)
    errors = evaluate_potential(potential, open_dataset(files["test"])[:N_TEST], run=Engine(potential)).summary()
    record = {
        "network": network, "system": system, "minutes": arguments.minutes, "training_steps": trained["steps"],
        "test": {name: errors[name] for name in ("forces_mae_meV_per_A", "energy_mae_meV_per_atom")},
        "picoseconds": result["time_ps"], "broken": result["broken"], "mean_temperature_K": result["mean_temperature_K"],
        "ms_per_step": cost_of_a_step(file, trajectory[-1]), **structure(system, trajectory, reference),
        "nve": {name: nve[name] for name in ("drift_meV_per_atom_per_ps", "fluctuation_ratio")},
        "date": datetime.date.today().isoformat(), "machine": f"{os.cpu_count()} cores, one thread",
        "versions": {"gossamer": gossamer.__version__, "torch": torch.__version__},
    }  # fmt: skip
    write_text(HERE / "results" / f"{network}-{system}.json", json.dumps(record) + "\n")
    return record


def cost_of_a_step(potential: Path, atoms: Atoms) -> float:
    """CPU milliseconds of energy and forces on one thread, after a small move, neighbour list included."""
    atoms, rng = atoms.copy(), np.random.default_rng(0)
    atoms.calc = gossamer.Calculator(potential)
    atoms.get_forces()
    began = time.process_time()
    for _ in range(50):
        atoms.positions += rng.normal(scale=1e-3, size=atoms.positions.shape)
        atoms.get_forces()
    return (time.process_time() - began) / 50 * 1000


def structure(system: str, trajectory: list[Atoms], reference: list[Atoms]) -> dict[str, Any]:
    """What a walk looks like beside the labelled frames: distances or RDFs, how long they hold, diffusivity; its first tenth is left out."""
    s = SYSTEMS[system]
    interval = s["interval"] * s["timestep"] / 1000
    settled = trajectory[len(trajectory) // 10 :]
    if system == "methane":
        r, h = liquids.distance_distribution(settled)
        _, expected = liquids.distance_distribution(reference)
        return {
            "error": float(np.abs(h - expected).sum() * (r[1] - r[0])),
            "stable_ps": liquids.bond_stability_time(trajectory, find_bonds(trajectory[0]), interval),
            "curves": {"h(r)": [rounded(h[: 2 * CURVE : 2]), rounded(expected[: 2 * CURVE : 2]), float(r[0]), float(r[2] - r[0])]},
        }
    _, g = liquids.rdf(settled)
    _, expected = liquids.rdf(reference)
    selected = np.array(trajectory[0].get_chemical_symbols()) == s["diffusing"]
    unwrapped, masses = liquids.unwrapped_positions(settled), trajectory[0].get_masses()
    mean, error = liquids.diffusivity_blocks(unwrapped, masses, selected, interval)
    msd = liquids.mean_squared_displacement(unwrapped, masses, selected)
    every = max(1, len(msd) // 2 // CURVE)
    found: dict[str, Any] = {
        "error": liquids.rdf_error(g, expected),
        "error_of_halves": liquids.rdf_error(liquids.rdf(reference[::2])[1], liquids.rdf(reference[1::2])[1]),
        "stable_ps": liquids.stability_time(trajectory, expected, interval, s["window"]),
        "diffusivity_1e-9_m2_per_s": [mean, error],
        "msd": [rounded(msd[: len(msd) // 2 : every]), every * interval],
        "overlaps": {}, "curves": {},
    }  # fmt: skip
    for a, b in s["pairs"]:
        r, ours = liquids.rdf(settled, 6.0, CURVE, (a, b))
        _, theirs = liquids.rdf(reference, 6.0, CURVE, (a, b))
        found["overlaps"][f"{a}-{b}"] = liquids.rdf_overlap(ours, theirs)
        found["curves"][f"g(r) {a}-{b}"] = [rounded(ours), rounded(theirs), float(r[0]), float(r[1] - r[0])]
    return found


def rounded(values: Any) -> list[float]:
    return [float(f"{v:.4g}") for v in values]


def records() -> list[dict[str, Any]]:
    """Rows that are there: by system, then in the order of the networks."""
    found = [json.loads(path.read_text()) for path in (HERE / "results").glob("*.json")]
    return sorted(found, key=lambda r: (list(SYSTEMS).index(r["system"]), NETWORKS.index(r["network"])))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| system | network | CPU minutes, steps | force MAE meV/Å | energy MAE meV/atom | stable, of ps | mean T, K "
        "| RDF error, Å (methane: h(r)) | overlap of g(r) | D, 1e-9 m²/s | NVE drift, meV/atom/ps | fluctuation ratio | CPU ms per step |",
        "|---" * 13 + "|",
    ]
    for r in rows:
        mean, error = r.get("diffusivity_1e-9_m2_per_s", (None, None))
        lines.append(
            f"| {r['system']} | {r['network']} | {r['minutes']:g}, {r['training_steps']:,} | {r['test']['forces_mae_meV_per_A']:.1f} "
            f"| {r['test']['energy_mae_meV_per_atom']:.2f} | {r['stable_ps']:.3g} of {r['picoseconds']:g} | {r['mean_temperature_K'] or float('nan'):.0f} | {r['error']:.3f} "
            f"| {', '.join(f'{pair} {value:.3f}' for pair, value in r.get('overlaps', {}).items()) or '-'} "
            f"| {'-' if mean is None else f'{mean:.2f} ± {error:.2f}'} | {r['nve']['drift_meV_per_atom_per_ps']:.4f} "
            f"| {r['nve']['fluctuation_ratio']:.2f} | {r['ms_per_step']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def write_pages(rows: list[dict[str, Any]]) -> None:
    """A page for each system: the table, and every network's curves beside those of the labelled frames."""
    for system in SYSTEMS:
        ours = [r for r in rows if r["system"] == system]
        if not ours:
            continue
        report = Report(f"{system}: molecular dynamics", f"{SYSTEMS[system]['temperature']:g} K, gossamer {gossamer.__version__}")
        broken = [f"{r['network']}: {r['broken']}" for r in ours if r["broken"]]
        report.verdict("failed" if broken else "passed", "; ".join(broken) or "every network is stable as long as it ran")
        head, _, *body = table(ours).splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *body)]
        report.table(cells[0], cells[1:])
        figures = []
        for name, (_, theirs, first, width) in ours[0]["curves"].items():
            r = first + width * np.arange(len(theirs))
            curves = [(np.array(row["curves"][name][0]), row["network"]) for row in ours]
            figures.append(
                (plot_curves(r, curves, "r, Å", name, (r, np.array(theirs), "labelled frames")), f"{name} beside the labelled frames.")
            )
        if "msd" in ours[0]:
            longest = max(ours, key=lambda row: len(row["msd"][0]) * row["msd"][1])["msd"]
            times = longest[1] * np.arange(len(longest[0]))
            curves = [(np.interp(times[times <= row["msd"][1] * (len(row["msd"][0]) - 1)], row["msd"][1] * np.arange(len(row["msd"][0])), row["msd"][0]),
                       row["network"]) for row in ours]  # fmt: skip
            figures.append(
                (plot_curves(times, curves, "time, ps", f"MSD of {SYSTEMS[system]['diffusing']}, Å²"), "Mean squared displacement.")
            )
        report.figures(figures)
        report.write(HERE / "results" / f"{system}.html")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"NETWORK:SYSTEM; networks: {', '.join(NETWORKS)}; systems: {', '.join(SYSTEMS)}")
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path, default=Path("runs") / "md")
    parser.add_argument("--minutes", type=float, default=6.0, help="of CPU time, to train each")
    parser.add_argument("--picoseconds", type=float, default=50.0)
    parser.add_argument("--page", action="store_true", help="only draw the rows that are there")
    arguments = parser.parse_args()
    asked = [row.split(":") for row in arguments.rows]
    if wrong := [":".join(row) for row in asked if len(row) != 2 or row[0] not in NETWORKS or row[1] not in SYSTEMS]:
        parser.error(f"{', '.join(wrong)}: NETWORK:SYSTEM was expected, of {', '.join(NETWORKS)} and {', '.join(SYSTEMS)}")
    torch.set_num_threads(1)
    (HERE / "results").mkdir(exist_ok=True)
    for network, system in asked:
        row = run(network, system, arguments)
        print(table([row]).splitlines()[-1], flush=True)
    rows = records()
    (HERE / "results.md").write_text(table(rows))
    write_pages(rows)


if __name__ == "__main__":
    main()
