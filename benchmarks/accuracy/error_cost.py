"""The picture on the front page: force error after the same time of training against the time of a step of dynamics.

    python benchmarks/accuracy/error_cost.py

Everything is read from committed results. Errors: mlearn silicon, six minutes of training each on one thread (ours: rows of variants.json, minutes of
CPU time; packages by peers.py, compare/silicon-6min-*.json, on the same frames; linear ACE is done in less than a minute). Time: energy and forces
of 512 atoms of silicon through each ASE calculator, one thread, of the same networks with random weights, all on one machine one after the other
(../speed/silicon-1thread.json, by ../speed/peers.py --record silicon --structures silicon512); ours as by default (kernels) and as a program.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
SPEED, CELL = HERE.parent / "speed", "silicon512"
OURS, THEIRS = "#1f6f8b", "#d1495b"
PACKAGES = {
    "nequip": ("nequip package", "nequip l2 32, 3 layers, AOTInductor"),
    "mace": ("mace package", "mace 64x0e+64x1o, correlation 2"),
    "pace": ("linear ACE", "pace linear, 700 functions"),
}
"""by file of errors: label, and row of the speed table"""
NETWORKS = {
    "Weft": ("weft (default)", "silicon weft training.clock=cpu"),
    "Weft, small": ("weft 16, 4 Å", "silicon weft training.clock=cpu model.num_features=16 model.cutoff=4"),
    "NequIP": ("nequip (default)", "silicon nequip training.clock=cpu"),
    "Geodite": ("geodite (default)", "silicon geodite training.clock=cpu"),
    "LEIGNN": ("leignn (default)", "silicon leignn training.clock=cpu"),
}
"""by label: row of the speed table, and job of variants.json"""
PLACES = {"Weft": (0, -18, "center"), "Weft, small": (0, -18, "center"), "NequIP": (58, -4, "left")}
"""of labels that would lie on others: points to the right and up, and how they are aligned"""


def points() -> list[tuple[str, float, list[float], bool]]:
    """Label, force error in meV/Å, times of a step in ms (the fastest first), and whether it is ours."""
    speed = json.loads((SPEED / "silicon-1thread.json").read_text())
    trained = {
        r["job"]: r["test_forces_mae_meV_per_A"] for r in json.loads((HERE / "variants.json").read_text()) if r.get("minutes") == 6.0
    }
    found = []
    for label, (row, job) in NETWORKS.items():
        found.append((label, trained[job], [float(speed[f"{row}, {way}"]["ms"][CELL]) for way in ("program", "kernels")], True))
    for file, (label, key) in PACKAGES.items():
        if key not in speed:
            print(f"left out: {label}, whose speed was not measured")
            continue
        error = json.loads((HERE / "compare" / f"silicon-6min-{file}.json").read_text())["forces_mae_meV_per_A"]
        found.append((label, error, [speed[key]["ms"][CELL]], False))
    return found


def main() -> None:
    style = {"font.size": 11, "font.family": "sans-serif", "svg.hashsalt": "gossamer", "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(7.2, 3.7), layout="constrained")
        for label, error, times, own in points():
            colour = OURS if own else THEIRS
            axes.plot(times, [error] * len(times), "-", color=colour, lw=2, alpha=0.5)
            axes.plot(times[:1], [error], "o", ms=9, color=colour)
            axes.plot(times[1:], [error] * (len(times) - 1), "o", ms=9, mfc="white", mew=2, color=colour)
            x, y, aligned = PLACES.get(label, (0, 9, "center"))
            axes.annotate(label, (times[0], error), (x, y), textcoords="offset points", ha=aligned, color=colour, weight="bold")
        axes.set(xscale="log", xlim=(6, 2500), ylim=(0, 132), xlabel="ms per step of dynamics, 512 atoms of silicon, one CPU thread",
                 ylabel="force error, meV/Å")  # fmt: skip
        axes.set_xticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1,000"])
        axes.grid(alpha=0.25, which="major")
        axes.minorticks_off()
        axes.text(0.985, 0.04, "● program   ○ default (kernels)", transform=axes.transAxes, ha="right", color=OURS)
        axes.text(0.015, 0.04, "better: down and to the left", transform=axes.transAxes, color="#666")
        figure.patch.set_facecolor("white")
        figure.savefig(HERE / "error_cost.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
