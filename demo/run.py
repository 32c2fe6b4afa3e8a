"""The whole path in a few minutes on two cores: train on labelled water, evaluate, simulate, judge, report.

    python demo/run.py            # writes demo/report.html and demo/run/

Liquid heavy water labelled by GFN1-xTB (demo/make_data.py). The first three quarters of the trajectory train the potential
(with 31 hot frames, so that rare close contacts are known), the last quarter tests it. The small network and short
simulations keep the demo short; they are no measure of what longer training gives.
"""

from __future__ import annotations

import argparse
import io
import logging
import lzma
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import ase.io
import numpy as np
import torch
from ase import Atoms

import gossamer
from gossamer.checks import liquids
from gossamer.checks.conservation import force_gradient_error, nve_conservation
from gossamer.checks.run_page import Report, parity_figures, plot_curves, plot_learning_curve, plot_traces
from gossamer.checks.symmetry import symmetry_errors

HERE = Path(__file__).resolve().parent
PAIRS = (("O", "O"), ("O", "H"), ("H", "H"))
TIMESTEP, INTERVAL = 1.25, 4  # fs, steps: as in the reference trajectory
R_MAX = 6.0
"""Å to which radial distribution functions are compared"""


def read(name: str) -> list[Atoms]:
    return ase.io.read(io.StringIO(lzma.open(HERE / "data" / name, "rt").read()), ":", format="extxyz")


def split(folder: Path) -> tuple[list[Atoms], list[Atoms]]:
    """Write train, valid and test files; returns the reference trajectory and the test frames."""
    liquid, hot = read("water_liquid_350K.extxyz.xz"), read("water_hot_600K.extxyz.xz")
    early, late = liquid[: 3 * len(liquid) // 4], liquid[3 * len(liquid) // 4 :]
    folder.mkdir(parents=True)
    ase.io.write(folder / "train.extxyz", [f for k, f in enumerate(early) if k % 15] + hot)
    ase.io.write(folder / "valid.extxyz", early[::15])
    ase.io.write(folder / "test.extxyz", late[::4])
    return liquid, late


def settings(folder: Path, steps: int) -> dict:
    return {
        "data": {part: str(folder / f"{part}.extxyz") for part in ("train", "valid", "test")},
        "model": {"name": "leignn", "num_features": 48, "num_layers": 2, "cutoff": 4.5},
        "loss": {"energy": 1.0, "forces": 10.0},
        "training": {"steps": steps, "batch_size": 2, "learning_rate": 5e-3, "ema_decay": 0.99, "valid_every": max(1, steps // 10)},
        "out": str(folder / "potential"),
    }


def simulate(model: Path, start: Atoms, folder: Path, steps: int) -> tuple[dict, list[Atoms]]:
    """Dynamics with the thermostat and friction of the reference, so that the displacements compare too."""
    result = gossamer.md(
        model,
        start,
        temperature=350,
        steps=steps,
        timestep=TIMESTEP,
        ensemble="langevin",
        out=folder,
        interval=INTERVAL,
        thermostat_time=50,
    )
    frames = ase.io.read(folder / "trajectory.traj", ":")
    return result, frames[len(frames) // 6 :]


def msd(frames: list[Atoms]) -> np.ndarray:
    oxygen = frames[0].numbers == 8
    return liquids.mean_squared_displacement(liquids.unwrapped_positions(frames), frames[0].get_masses(), oxygen)


@dataclass
class Measured:
    """What the simulation and the checks gave."""

    run: dict[str, Any]
    """answer of ``gossamer.md``"""
    nve: dict[str, Any]
    symmetry: float
    """largest relative error"""
    gradient: float
    """eV/Å, forces against differences of the energy"""
    rdf: tuple[np.ndarray, np.ndarray, np.ndarray]
    """r in Å, g(r) of the simulation and of the reference, all pairs"""
    rdf_error: float
    """Å"""
    curves: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]
    """g(r) of each pair, likewise"""
    displacements: tuple[np.ndarray, np.ndarray]
    """Å², mean squared displacement of O in the simulation and in the reference, up to half of the shorter"""

    @property
    def moved(self) -> float:
        """Mean squared displacement at the end, over that of the reference."""
        return float(self.displacements[0][-1] / self.displacements[1][-1])


def measure(model: Path, reference: list[Atoms], late: list[Atoms], folder: Path, steps: int) -> Measured:
    """Simulate, then check the potential and compare with the reference."""
    print(f"3. molecular dynamics at 350 K, {steps * TIMESTEP / 1000:g} ps", flush=True)
    run, frames = simulate(model, late[0], folder / "md", steps)

    print("4. energy conservation and other checks", flush=True)
    gossamer.md(model, frames[-1], temperature=350, steps=600, timestep=0.5, ensemble="nve", out=folder / "nve", interval=INTERVAL)
    calculator = gossamer.Calculator(gossamer.load(model, dtype="float64"))
    r, g = liquids.rdf(frames, R_MAX, 300)
    _, g_reference = liquids.rdf(reference, R_MAX, 300)
    displacement, displacement_reference = msd(frames), msd(reference)
    half = min(len(displacement), len(displacement_reference)) // 2
    return Measured(
        run=run,
        nve=nve_conservation(gossamer.Calculator(model), frames[-1], timestep=0.5, picoseconds=0.4),
        symmetry=max(e["relative"] for e in symmetry_errors(calculator, late[0]).values()),
        gradient=force_gradient_error(calculator, late[0], step=1e-3, n_atoms=2),
        rdf=(r, g, g_reference),
        rdf_error=liquids.rdf_error(g, g_reference, R_MAX),
        curves={pair: (liquids.rdf(frames, R_MAX, 150, pair)[1], liquids.rdf(reference, R_MAX, 150, pair)[1]) for pair in PAIRS},
        displacements=(displacement[:half], displacement_reference[:half]),
    )


def table(errors: dict[str, Any], measured: Measured, trained_seconds: float) -> list[list[Any]]:
    """Quantity, value, what is expected."""
    return [
        ["energy MAE, meV/atom", errors["energy_mae_meV_per_atom"], "-"],
        ["force MAE, meV/Å", errors["forces_mae_meV_per_A"], "-"],
        ["force RMSE, meV/Å", errors["forces_rmse_meV_per_A"], "-"],
        ["RDF error, Å (integral of |g - g_ref|)", measured.rdf_error, "at most 0.5"],
        *[[f"RDF overlap {a}-{b}", liquids.rdf_overlap(*measured.curves[a, b]), "near 1"] for a, b in PAIRS],
        ["MSD of O over that of the reference", measured.moved, "0.5 to 2"],
        ["mean temperature, K", measured.run["mean_temperature_K"], "near 350"],
        ["NVE drift, meV/atom/ps", measured.nve["drift_meV_per_atom_per_ps"], "within ±1"],
        ["NVE fluctuation ratio, 1.0 fs over 0.5 fs", measured.nve["fluctuation_ratio"], "4 ± 1"],
        ["symmetry error, relative (float64)", measured.symmetry, "at most 1e-8"],
        ["|force - energy gradient|, eV/Å (float64)", measured.gradient, "at most 1e-5"],
        ["MD speed, ms/step (96 atoms)", 1000 * measured.run["seconds"] / measured.run["steps"], "-"],
        ["training, s", trained_seconds, "-"],
    ]


def verdict(errors: dict[str, Any], measured: Measured) -> tuple[str, str]:
    """passed, weak or failed, and why."""
    run, nve, moved, rdf_error = measured.run, measured.nve, measured.moved, measured.rdf_error
    problems = []
    if run["broken"]:
        problems.append(("failed", f"the simulation broke at {run['broken']}"))
    if measured.symmetry > 1e-8 or measured.gradient > 1e-5:
        problems.append(("failed", "the symmetry or gradient check failed"))
    if rdf_error > 0.5:
        problems.append(("failed" if rdf_error > 1 else "weak", f"the RDF is {rdf_error:.2f} Å from the reference"))
    if abs(nve["drift_meV_per_atom_per_ps"]) > 1 or abs(nve["fluctuation_ratio"] - 4) > 1:
        problems.append(("weak", "energy is not conserved as it should be"))
    if not 0.5 < moved < 2:
        problems.append(("weak", f"oxygen moves {moved:.2f} times as far as in the reference"))
    if not problems:
        force_error = errors["forces_mae_meV_per_A"]
        return "passed", f"stable for {run['time_ps']:g} ps at 350 K, RDF error {rdf_error:.2f} Å, force error {force_error:.0f} meV/Å"
    status = "failed" if any(s == "failed" for s, _ in problems) else "weak"
    return status, "; ".join(text for _, text in problems)


def write_report(
    path: Path, folder: Path, trained: dict[str, Any], evaluation: Any, measured: Measured, rows: list[list[Any]], said: tuple[str, str]
) -> None:
    """The page: verdict, table, training and errors, structure and dynamics."""
    report = Report(
        "Liquid water with LEIGNN",
        f"gossamer {gossamer.__version__}, PyTorch {torch.__version__}, {os.cpu_count()} cores; labels GFN1-xTB, 32 D2O; conservative forces, "
        f"{trained['num_parameters']:,} parameters, {trained['steps']} training steps.",
    )
    report.verdict(*said)
    report.table(["quantity", "potential", "expected"], rows)
    report.note(
        "Trained on frames of the first three quarters of the reference trajectory and 31 hot ones; errors are those of frames of its last quarter, "
        "which were not trained on. The simulation starts from the first of these, equilibrated by the reference method at 350 K; its first sixth is dropped."
    )
    report.heading("Training and errors")
    learning = (plot_learning_curve(folder / "potential" / "log.csv"), "Validation errors during training.")
    report.figures([learning, *parity_figures(evaluation)])
    report.heading("Structure and dynamics")
    temperature, *_ = plot_traces(folder / "md" / "log.csv", 350.0)
    _, conserved = plot_traces(folder / "nve" / "log.csv")
    text = "Total energy in a constant-energy run of 0.3 ps at 0.5 fs, less its first value (whole box)."
    report.figures([*figures(measured), temperature, (conserved[0], text)])
    report.write(path)


def figures(measured: Measured) -> list[tuple[str, str]]:
    """Radial distribution functions and displacements beside the reference, with their captions."""

    def beside(x: np.ndarray, y: np.ndarray, reference: np.ndarray, x_label: str, y_label: str) -> str:
        return plot_curves(x, [(y, "potential")], x_label, y_label, (x, reference, "GFN1-xTB"))

    r, g, g_reference = measured.rdf
    found = [(beside(r, g, g_reference, "r, Å", "g(r), all pairs"), f"Radial distribution function; error {measured.rdf_error:.2f} Å.")]
    r_pairs = (np.arange(150) + 0.5) * R_MAX / 150
    for (a, b), curves in measured.curves.items():
        found.append((beside(r_pairs, *curves, "r, Å", f"g(r) {a}-{b}"), f"RDF of {a}-{b}."))
    t = np.arange(len(measured.displacements[0])) * INTERVAL * TIMESTEP / 1000
    text = "Mean squared displacement of oxygen over all time origins, both under the same Langevin friction (1/50 fs). "
    text += f"At the end {measured.moved:.2f} times the reference."
    return [*found, (beside(t, *measured.displacements, "time, ps", "MSD of O, Å²"), text)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--md-steps", type=int, default=2000, help="steps of molecular dynamics")
    parser.add_argument("--folder", type=Path, default=HERE / "run")
    parser.add_argument("--report", type=Path, default=HERE / "report.html")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began = time.perf_counter()
    folder = arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    reference, late = split(folder)

    print(f"1. training on GFN1-xTB water, {arguments.steps} steps", flush=True)
    trained = gossamer.train(settings(folder, arguments.steps))
    if "stopped" in trained:
        return 128 + signal.SIGTERM
    model = folder / "potential" / "potential.safetensors"
    trained_seconds = time.perf_counter() - began

    print("2. errors on the test frames", flush=True)
    evaluation = gossamer.evaluate(model, folder / "test.extxyz", out=folder / "evaluation")
    measured = measure(model, reference, late, folder, arguments.md_steps)
    errors = evaluation.summary()
    rows, (status, sentence) = table(errors, measured, trained_seconds), verdict(errors, measured)
    write_report(arguments.report, folder, trained, evaluation, measured, rows, (status, sentence))

    print(f"\n{'':46s}{'potential':>12s}{'expected':>14s}")
    for name, value, expected in rows:
        print(f"{name:46s}" + "".join(f"{v:12.4g}" if isinstance(v, float) else f"{v:>14s}" for v in (value, expected)))
    print(f"\nverdict: {status} - {sentence}\nreport: {arguments.report} ({time.perf_counter() - began:.0f} s in all)")
    return 0 if status != "failed" else 1


if __name__ == "__main__":
    sys.exit(main())
