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
import sys
import time
from pathlib import Path

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--md-steps", type=int, default=2000, help="steps of molecular dynamics")
    parser.add_argument("--folder", type=Path, default=HERE / "run")
    parser.add_argument("--report", type=Path, default=HERE / "report.html")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began = time.perf_counter()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    reference, late = split(arguments.folder)

    print(f"1. training on GFN1-xTB water, {arguments.steps} steps", flush=True)
    trained = gossamer.train(settings(arguments.folder, arguments.steps))
    model = arguments.folder / "potential" / "potential.safetensors"
    trained_seconds = time.perf_counter() - began

    print("2. errors on the test frames", flush=True)
    evaluation = gossamer.evaluate(model, arguments.folder / "test.extxyz", out=arguments.folder / "evaluation")

    print(f"3. molecular dynamics at 350 K, {arguments.md_steps * TIMESTEP / 1000:g} ps", flush=True)
    run, frames = simulate(model, late[0], arguments.folder / "md", arguments.md_steps)

    print("4. energy conservation and other checks", flush=True)
    gossamer.md(
        model, frames[-1], temperature=350, steps=600, timestep=0.5, ensemble="nve", out=arguments.folder / "nve", interval=INTERVAL
    )
    calculator = gossamer.Calculator(gossamer.load(model, dtype="float64"))
    symmetry = max(e["relative"] for e in symmetry_errors(calculator, late[0]).values())
    gradient = force_gradient_error(calculator, late[0], step=1e-3, n_atoms=2)
    nve = nve_conservation(gossamer.Calculator(model), frames[-1], timestep=0.5, picoseconds=0.4)
    r_max = 6.0
    _, g_reference = liquids.rdf(reference, r_max, 300)
    r, g = liquids.rdf(frames, r_max, 300)
    rdf_error = liquids.rdf_error(g, g_reference, r_max)
    curves = {pair: (liquids.rdf(frames, r_max, 150, pair)[1], liquids.rdf(reference, r_max, 150, pair)[1]) for pair in PAIRS}
    displacement, displacement_reference = msd(frames), msd(reference)
    half = min(len(displacement), len(displacement_reference)) // 2
    moved = float(displacement[half - 1] / displacement_reference[half - 1])

    errors = evaluation.summary()
    rows = [
        ["energy MAE, meV/atom", errors["energy_mae_meV_per_atom"], "-"],
        ["force MAE, meV/Å", errors["forces_mae_meV_per_A"], "-"],
        ["force RMSE, meV/Å", errors["forces_rmse_meV_per_A"], "-"],
        ["RDF error, Å (integral of |g - g_ref|)", rdf_error, "at most 0.5"],
        *[[f"RDF overlap {a}-{b}", liquids.rdf_overlap(*curves[a, b]), "near 1"] for a, b in PAIRS],
        ["MSD of O over that of the reference", moved, "0.5 to 2"],
        ["mean temperature, K", run["mean_temperature_K"], "near 350"],
        ["NVE drift, meV/atom/ps", nve["drift_meV_per_atom_per_ps"], "within ±1"],
        ["NVE fluctuation ratio, 1.0 fs over 0.5 fs", nve["fluctuation_ratio"], "4 ± 1"],
        ["symmetry error, relative (float64)", symmetry, "at most 1e-8"],
        ["|force - energy gradient|, eV/Å (float64)", gradient, "at most 1e-5"],
        ["MD speed, ms/step (96 atoms)", 1000 * run["seconds"] / run["steps"], "-"],
        ["training, s", trained_seconds, "-"],
    ]
    problems = []
    if run["broken"]:
        problems.append(("failed", f"the simulation broke at {run['broken']}"))
    if symmetry > 1e-8 or gradient > 1e-5:
        problems.append(("failed", "the symmetry or gradient check failed"))
    if rdf_error > 0.5:
        problems.append(("failed" if rdf_error > 1 else "weak", f"the RDF is {rdf_error:.2f} Å from the reference"))
    if abs(nve["drift_meV_per_atom_per_ps"]) > 1 or abs(nve["fluctuation_ratio"] - 4) > 1:
        problems.append(("weak", "energy is not conserved as it should be"))
    if not 0.5 < moved < 2:
        problems.append(("weak", f"oxygen moves {moved:.2f} times as far as in the reference"))
    status = "failed" if any(s == "failed" for s, _ in problems) else "weak" if problems else "passed"
    stable = (
        f"stable for {run['time_ps']:g} ps at 350 K, RDF error {rdf_error:.2f} Å, force error {errors['forces_mae_meV_per_A']:.0f} meV/Å"
    )
    sentence = "; ".join(text for _, text in problems) if problems else stable

    report = Report(
        "Liquid water with LEIGNN",
        f"gossamer {gossamer.__version__}, PyTorch {torch.__version__}, {os.cpu_count()} cores; labels GFN1-xTB, 32 D2O; conservative forces, "
        f"{trained['num_parameters']:,} parameters, {trained['steps']} training steps.",
    )
    report.verdict(status, sentence)
    report.table(["quantity", "potential", "expected"], rows)
    report.note(
        "Trained on frames of the first three quarters of the reference trajectory and 31 hot ones; errors are those of frames of its last quarter, "
        "which were not trained on. The simulation starts from the first of these, equilibrated by the reference method at 350 K; its first sixth is dropped."
    )
    report.heading("Training and errors")
    learning = (plot_learning_curve(arguments.folder / "potential" / "log.csv"), "Validation errors during training.")
    report.figures([learning, *parity_figures(evaluation)])
    report.heading("Structure and dynamics")
    rdf_figure = plot_curves(r, [(g, "potential")], "r, Å", "g(r), all pairs", (r, g_reference, "GFN1-xTB"))
    rr = (np.arange(150) + 0.5) * r_max / 150
    pair_figures = [
        (
            plot_curves(rr, [(curves[p][0], "potential")], "r, Å", f"g(r) {p[0]}-{p[1]}", (rr, curves[p][1], "GFN1-xTB")),
            f"RDF of {p[0]}-{p[1]}.",
        )
        for p in PAIRS
    ]
    t = np.arange(half) * INTERVAL * TIMESTEP / 1000
    msd_figure = plot_curves(
        t, [(displacement[:half], "potential")], "time, ps", "MSD of O, Å²", (t, displacement_reference[:half], "GFN1-xTB")
    )
    msd_text = "Mean squared displacement of oxygen over all time origins, both under the same Langevin friction (1/50 fs). "
    msd_text += f"At the end {moved:.2f} times the reference."
    temperature, *_ = plot_traces(arguments.folder / "md" / "log.csv", 350.0)
    _, conserved = plot_traces(arguments.folder / "nve" / "log.csv")
    report.figures(
        [
            (rdf_figure, f"Radial distribution function; error {rdf_error:.2f} Å."),
            *pair_figures,
            (msd_figure, msd_text),
            temperature,
            (conserved[0], "Total energy in a constant-energy run of 0.3 ps at 0.5 fs, less its first value (whole box)."),
        ]
    )
    report.write(arguments.report)

    print(f"\n{'':46s}{'potential':>12s}{'expected':>14s}")
    for name, value, expected in rows:
        print(f"{name:46s}" + "".join(f"{v:12.4g}" if isinstance(v, float) else f"{v:>14s}" for v in (value, expected)))
    print(f"\nverdict: {status} - {sentence}\nreport: {arguments.report} ({time.perf_counter() - began:.0f} s in all)")
    return 0 if status != "failed" else 1


if __name__ == "__main__":
    sys.exit(main())
