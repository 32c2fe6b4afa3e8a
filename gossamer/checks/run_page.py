"""One self-contained HTML page of a run: verdict first, then tables, then pictures; opens offline, readable on a phone."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from gossamer.evaluation import Evaluation
from gossamer.files import write_text

OURS, REFERENCE, THIRD = "#1f6f8b", "#d1495b", "#8a8f98"
STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True,
         "legend.frameon": False, "lines.linewidth": 1.8}  # fmt: skip

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ --ink:#20262e; --soft:#68717d; --line:#e3e6ea; --good:#1f7a4d; --weak:#a86a00; --bad:#b3261e; --paper:#fff; --back:#f5f6f8; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink:#e8eaed; --soft:#a4abb5; --line:#3a4048; --paper:#1d2126; --back:#14171a; --good:#5cc391; --weak:#e0a94a; --bad:#f08a80; }} img {{ background:#fff; border-radius:6px; }} }}
* {{ box-sizing:border-box; }} body {{ margin:0; background:var(--back); color:var(--ink); font:16px/1.5 system-ui, sans-serif; }}
main {{ max-width:1080px; margin:0 auto; padding:24px 16px 64px; }} h1 {{ font-size:1.6rem; margin:.2em 0; }} h2 {{ font-size:1.15rem; margin:2em 0 .6em; }}
.soft {{ color:var(--soft); }} .verdict {{ border-left:6px solid; padding:12px 16px; background:var(--paper); border-radius:6px; margin:16px 0; font-size:1.05rem; }}
.passed {{ border-color:var(--good); }} .weak {{ border-color:var(--weak); }} .failed {{ border-color:var(--bad); }} .verdict b {{ text-transform:uppercase; letter-spacing:.04em; }}
.passed b {{ color:var(--good); }} .weak b {{ color:var(--weak); }} .failed b {{ color:var(--bad); }}
.scroll {{ overflow-x:auto; background:var(--paper); border-radius:6px; }} table {{ border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; }}
th,td {{ padding:7px 12px; text-align:right; border-bottom:1px solid var(--line); white-space:nowrap; }} th:first-child,td:first-child {{ text-align:left; white-space:normal; }}
th {{ color:var(--soft); font-weight:600; font-size:.85rem; }} .grid {{ display:grid; gap:16px; grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr)); }}
figure {{ margin:0; background:var(--paper); border-radius:6px; padding:12px; }} figure img {{ width:100%; height:auto; display:block; }} figcaption {{ color:var(--soft); font-size:.9rem; margin-top:6px; }}
</style></head><body><main><h1>{title}</h1><p class="soft">{subtitle}</p>{body}</main></body></html>
"""


@dataclass
class Report:
    """Parts of the page, in order."""

    title: str
    subtitle: str = ""
    parts: list[str] = field(default_factory=list)

    def verdict(self, status: str, sentence: str) -> None:
        """status: "passed", "weak" or "failed"."""
        if status not in ("passed", "weak", "failed"):
            raise ValueError(f"status must be passed, weak or failed, found '{status}'.")
        self.parts.append(f'<p class="verdict {status}"><b>{status}</b> &mdash; {html.escape(sentence)}</p>')

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(_text(value))}</td>" for value in row) + "</tr>" for row in rows)
        self.parts.append(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')

    def figures(self, figures: Sequence[tuple[Figure, str]]) -> None:
        """Pictures side by side where there is room, each with one sentence under it."""
        cells = "".join(
            f'<figure><img alt="{html.escape(text, quote=True)}" src="data:image/png;base64,{_png(f)}"><figcaption>{html.escape(text)}</figcaption></figure>'
            for f, text in figures
        )
        self.parts.append(f'<div class="grid">{cells}</div>')

    def write(self, path: Path | str) -> None:
        write_text(path, PAGE.format(title=html.escape(self.title), subtitle=html.escape(self.subtitle), body="".join(self.parts)))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return base64.b64encode(buffer.getvalue()).decode()


def _axes(x: str, y: str, size: tuple[float, float] = (5.4, 3.7)) -> tuple[Figure, Any]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def plot_learning_curve(log: Path) -> Figure:
    """Validation errors of energy and forces against steps, from log.csv."""
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(r["step"]) for r in rows]
    figure, axes = _axes("step", "validation MAE")
    for column, label, colour in (("valid_energy_mae", "energy, meV/atom", REFERENCE), ("valid_forces_mae", "forces, meV/Å", OURS),
                                  ("valid_stress_mae", "stress, meV/Å³", THIRD)):  # fmt: skip
        if rows and rows[0].get(column):
            axes.plot(steps, [float(r[column]) for r in rows], "o-", ms=3, color=colour, label=label)
    axes.set_yscale("log")
    axes.legend()
    return figure


def plot_parity(labels: np.ndarray, predictions: np.ndarray, unit: str) -> Figure:
    """Predictions against labels, with the identity."""
    figure, axes = _axes(f"label, {unit}", f"prediction, {unit}", (4.4, 4.0))
    low, high = float(min(labels.min(), predictions.min())), float(max(labels.max(), predictions.max()))
    axes.plot([low, high], [low, high], color=THIRD, lw=1)
    if len(labels) > 5000:
        axes.hexbin(labels, predictions, gridsize=90, bins="log", mincnt=1, cmap="viridis", linewidths=0.1)
    else:
        axes.plot(labels, predictions, ".", ms=3, color=OURS, alpha=0.6)
    axes.set_aspect("equal", adjustable="datalim")
    axes.locator_params(nbins=5)
    return figure


def parity_figures(evaluation: Evaluation) -> list[tuple[Figure, str]]:
    """Parity of energies and of force components, with their errors underneath."""
    out = []
    if evaluation.energies:
        labels, predictions = np.array(evaluation.energies).T
        text = f"Energy per atom less reference energies: MAE {evaluation.energy.mae:.2f} meV/atom on {len(labels)} frames."
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
    figure, axes = _axes(x_label, y_label)
    colours = [OURS, "#6a994e", "#bc6c25", "#5e548e"]
    for k, (y, label) in enumerate(curves):
        axes.plot(x[: len(y)], y, color=colours[k % len(colours)], label=label)
    if reference is not None:
        axes.plot(reference[0], reference[1], "--", color=REFERENCE, label=reference[2], lw=1.5)
    axes.legend()
    return figure


def plot_traces(log: Path) -> list[tuple[Figure, str]]:
    """Temperature, and total and conserved energy, of a simulation's log.csv."""
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    time = np.array([float(r["time_fs"]) for r in rows]) / 1000
    temperature = np.array([float(r["temperature_K"]) for r in rows])
    out = [(plot_curves(time, [(temperature, "temperature")], "time, ps", "K"),
            f"Temperature: mean {temperature[len(temperature) // 2 :].mean():.0f} K over the second half.")]  # fmt: skip
    conserved = np.array([float(r["conserved_energy_eV"]) for r in rows])
    if np.isfinite(conserved).all():
        out.append((plot_curves(time, [(1000 * (conserved - conserved[0]), "conserved energy")], "time, ps", "meV"),
                    "Conserved quantity of the integrator, less its first value."))  # fmt: skip
    return out
