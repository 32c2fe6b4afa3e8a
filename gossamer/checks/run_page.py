"""The page of a run of training or simulation: verdict first, then tables, then pictures."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from gossamer.checks.page import COLOURS, REFERENCE, new_axes, number, picture, write

if TYPE_CHECKING:  # it imports torch
    from gossamer.evaluation import Evaluation

OURS, THIRD = COLOURS[0], "#8a8f98"
FEW = 20
"""points of a curve that are marked: one or two would not be seen"""


@dataclass
class Report:
    """Parts of the page, in order."""

    title: str
    subtitle: str = ""
    parts: list[dict[str, Any]] = field(default_factory=list)

    def verdict(self, status: str, sentence: str) -> None:
        """status: "passed", "weak" or "failed"."""
        if status not in ("passed", "weak", "failed"):
            raise ValueError(f"status must be passed, weak or failed, found '{status}'.")
        self.parts.append({"kind": "verdict", "status": status, "text": sentence})

    def heading(self, text: str) -> None:
        self.parts.append({"kind": "heading", "text": text})

    def note(self, text: str) -> None:
        """A small line on how something was made."""
        self.parts.append({"kind": "note", "text": text})

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        shown = [[number(value) if value is None or isinstance(value, float) else str(value) for value in row] for row in rows]
        self.parts.append({"kind": "table", "columns": list(columns), "rows": shown})

    def figures(self, figures: Sequence[tuple[Figure, str]]) -> None:
        """Pictures side by side where there is room, each with one sentence under it."""
        place = len(self.parts)
        pictures = [picture(figure, text, f"{place}-{k}") for k, (figure, text) in enumerate(figures)]
        self.parts.append({"kind": "figures", "pictures": pictures})

    def write(self, path: Path | str) -> None:
        write(path, "run.html", title=self.title, subtitle=self.subtitle, body=self.parts)


def plot_learning_curve(log: Path) -> Figure:
    """Validation errors of energy and forces against steps, from log.csv."""
    with open(log, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(r["step"]) for r in rows]
    figure, axes = new_axes("step", "validation MAE")
    for column, label, colour in (("valid_energy_mae", "energy, meV/atom", REFERENCE), ("valid_forces_mae", "forces, meV/Å", OURS),
                                  ("valid_stress_mae", "stress, meV/Å³", THIRD)):  # fmt: skip
        if rows and rows[0].get(column):
            axes.plot(steps, [float(r[column]) for r in rows], "o-", ms=3, color=colour, label=label)
    axes.set_yscale("log")
    axes.legend(frameon=False)
    return figure


def plot_parity(labels: np.ndarray, predictions: np.ndarray, unit: str) -> Figure:
    """Predictions against labels, with the identity."""
    figure, axes = new_axes(f"label, {unit}", f"prediction, {unit}", (4.6, 3.6))
    low, high = float(min(labels.min(), predictions.min())), float(max(labels.max(), predictions.max()))
    axes.plot([low, high], [low, high], color=THIRD, lw=1)
    if len(labels) > 5000:
        axes.hexbin(labels, predictions, gridsize=90, bins="log", mincnt=1, cmap="viridis", linewidths=0.1, rasterized=True)
    else:
        axes.plot(labels, predictions, ".", ms=3 if len(labels) > 300 else 6, color=OURS, alpha=0.6, rasterized=True)
    axes.set_aspect("equal", adjustable="datalim")
    axes.locator_params(nbins=5)
    return figure


def parity_figures(evaluation: Evaluation) -> list[tuple[Figure, str]]:
    """Parity of energies and of force components, with their errors underneath."""
    out = []
    if evaluation.energies:
        labels, predictions = np.array(evaluation.energies).T
        text = f"Energy per atom less reference energies: MAE {evaluation.energy.mae:.2f} meV/atom on {len(labels)} frame{'s' * (len(labels) != 1)}."
        out.append((plot_parity(labels, predictions, "eV/atom"), text))
    if evaluation.components:
        labels, predictions = np.concatenate(evaluation.components, axis=1)
        out.append(
            (
                plot_parity(labels, predictions, "eV/Å"),
                f"Force components: MAE {evaluation.forces.mae:.1f} meV/Å on {len(labels)} components.",
            )
        )
    return out


def plot_curves(
    x: np.ndarray,
    curves: Sequence[tuple[np.ndarray, str]],
    x_label: str,
    y_label: str,
    reference: tuple[np.ndarray, np.ndarray, str] | None = None,
) -> Figure:
    """Curves over one axis, the reference on top (dashed)."""
    figure, axes = new_axes(x_label, y_label)
    colours = [OURS, "#6a994e", "#bc6c25", "#5e548e"]
    for k, (y, label) in enumerate(curves):
        axes.plot(x[: len(y)], y, marker="o" if len(y) <= FEW else None, ms=4, color=colours[k % len(colours)], label=label)
    if reference is not None:
        axes.plot(reference[0], reference[1], "--", color=REFERENCE, label=reference[2], lw=1.5)
    axes.legend(frameon=False)
    return figure


def plot_traces(log: Path, target: float | None = None) -> list[tuple[Figure, str]]:
    """Temperature (with a line for the target in K, if given) and conserved energy of a simulation's log.csv; nothing of one without rows."""
    with open(log, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return []
    time = np.array([float(r["time_fs"]) for r in rows]) / 1000
    temperature = np.array([float(r["temperature_K"]) for r in rows])
    line = None if target is None else (time[[0, -1]], np.array([target, target]), f"target, {target:g} K")
    out = [(plot_curves(time, [(temperature, "temperature")], "time, ps", "K", line),
            f"Temperature: mean {temperature[len(temperature) // 2 :].mean():.0f} K over the second half.")]  # fmt: skip
    conserved = np.array([float(r["conserved_energy_eV"]) for r in rows])
    if np.isfinite(conserved).all():
        out.append((plot_curves(time, [(1000 * (conserved - conserved[0]), "conserved energy")], "time, ps", "meV"),
                    "Conserved quantity of the integrator, less its first value."))  # fmt: skip
    return out
