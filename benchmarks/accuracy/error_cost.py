"""The picture on the front page: force error after the same time of training against the time of a step of dynamics.

    python benchmarks/accuracy/error_cost.py

Everything is read from committed results. Errors: mlearn silicon, six minutes of training each on one thread (ours: rows of variants.json, minutes of
CPU time; the packages nequip and mace by peers.py, compare/silicon-6min-*.json, on the same frames). Time: energy and forces of 512 atoms of
silicon through each ASE calculator, one thread, of the same networks with random weights (../speed/peers-1thread.json); ours as by default
(kernels) and as a program. That table is older than Weft: its time is NequIP's there times the ratio of the two in ../speed/in_turn.json, from
another machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
SPEED, CELL = HERE.parent / "speed", "silicon512"
OURS, THEIRS = "#1f6f8b", "#d1495b"
PACKAGES = {
    "nequip": ("nequip package", "nequip l2 32, 3 layers, AOTInductor"),
    "mace": ("mace package", "mace 64x0e+64x1o, correlation 2"),
}
"""by file of errors: label, and row of the speed table"""


def ours(speed: dict[str, Any], name: str) -> list[float]:
    """ms of a step as a program and by kernels."""
    rows = [f"{{}} (default), {way}" for way in ("program", "kernels")]
    if name != "weft":
        return [float(speed[row.format(name)]["ms"][CELL]) for row in rows]
    own = json.loads((SPEED / "in_turn.json").read_text())
    return [speed[r.format("nequip")]["ms"][CELL] * own[r.format(name)]["ms"][CELL] / own[r.format("nequip")]["ms"][CELL] for r in rows]


def points() -> list[tuple[str, float, list[float], bool]]:
    """Label, force error in meV/Å, times of a step in ms (the fastest first), and whether it is ours."""
    speed = json.loads((SPEED / "peers-1thread.json").read_text())
    trained = {
        r["job"]: r["test_forces_mae_meV_per_A"] for r in json.loads((HERE / "variants.json").read_text()) if r.get("minutes") == 6.0
    }
    found = []
    for name, label in {"weft": "Weft", "nequip": "NequIP", "geodite": "Geodite", "leignn": "LEIGNN"}.items():
        found.append((label, trained[f"silicon {name} training.clock=cpu"], ours(speed, name), True))
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
            below = label == "Weft"  # NequIP is just above
            axes.annotate(
                label, (times[0], error), (0, -17 if below else 9), textcoords="offset points", ha="center", color=colour, weight="bold"
            )
        axes.set(xscale="log", xlim=(8, 2500), ylim=(0, 132), xlabel="ms per step of dynamics, 512 atoms of silicon, one CPU thread",
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
