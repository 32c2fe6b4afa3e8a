"""The judge's page: verdict and worst finding, an overview with failures first, then numbers and pictures of each check."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import NullLocator

from gossamer.checks import page
from gossamer.checks.page import COLOURS, REFERENCE, SIGNS, number
from gossamer.checks.result import ORDER, Curve, Metric, Panel, Result

MOST_ROWS = 24
"""numbers of a check beyond which those that passed are folded"""
Results = dict[str, dict[str, Result]]
"""by potential and check"""


def write_page(path: Path, everyone: dict[str, dict[str, Any]], checks: dict[str, tuple[str, str, str]]) -> None:
    """Write the page.

    Args:
        path: HTML file.
        everyone: By potential: "about" (facts), "checks" (results as dictionaries) and "levels".
        checks: By check: title, question, and how the metric that stands for it is called.
    """
    results = {name: {n: Result.from_dict(c) for n, c in entry["checks"].items()} for name, entry in everyone.items()}
    names = list(results)
    colours = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(names)}
    order = list(checks)
    done = [c for c in order if any(c in results[n] and results[n][c].status != "skipped" for n in names)]
    done.sort(key=lambda c: -max(ORDER[results[n][c].status] for n in names if c in results[n]))  # stable: else the order of the checks
    levels = sorted({level for entry in everyone.values() for level in entry["levels"]})
    dates = sorted({entry["about"].get("date", "") for entry in everyone.values()})
    page.write(
        path,
        "judge.html",
        title=f"Is {names[0]} fit for use?" if len(names) == 1 else "Which potential is fit for use?",
        subtitle=f"Judged by gossamer, {', '.join(levels)} level, {', '.join(dates)}. Limits are for general use; yours may be tighter.",
        candidates=[headline(name, results[name], checks) for name in names],
        overview=[overview_row(c, checks[c], names, results, colours) for c in done],
        skipped=skipped_checks(order, checks, names, results),
        scores={name: entry["CPS"] for name, entry in everyone.items() if "CPS" in entry},
        sections=[section(c, checks[c], names, results, colours) for c in done],
        origins=[origin(name, entry["about"], results[name]) for name, entry in everyone.items()],
    )


def headline(name: str, found: dict[str, Result], checks: dict[str, tuple[str, str, str]]) -> dict[str, Any]:
    """Verdict of one potential, its worst finding, and how the other checks went."""
    groups = {s: [c for c in checks if c in found and found[c].status == s] for s in ORDER}
    status = next((s for s in ("failed", "weak", "passed", "measured", "skipped") if groups[s]), "skipped")
    first = groups[status][0] if status in ("failed", "weak") else None
    rest = [f"{'also ' if s == status else ''}{s}: {', '.join(checks[c][0].lower() for c in groups[s] if c != first)}"
            for s in ("failed", "weak") if [c for c in groups[s] if c != first]]  # fmt: skip
    rest += [f"{len(groups[s])} {s}" for s in ("passed", "measured", "skipped") if groups[s]]
    told = f"{'; '.join(rest)}." if rest else ""
    return {
        "name": name, "status": status, "finding": found[first].reason if first else "Nothing failed." if status == "passed" else "Nothing was judged.", "consequence": found[first].consequence if first else "",
        "link": {"id": first, "title": checks[first][0]} if first else None, "rest": told[:1].upper() + told[1:],
    }  # fmt: skip


def key_metric(result: Result, stem: str) -> Metric | None:
    """The number that decides a verdict; where all is well, the one that stands for the check."""
    if result.status in ("failed", "weak"):
        return next((m for m in result.metrics if m.status == result.status), None)
    known = [m for m in result.metrics if m.value is not None]
    named = [m for m in known if m.name.partition(": ")[2].startswith(stem) or m.name.startswith(stem)]
    return next(iter(named or known), None)


def overview_row(
    check: str, about: tuple[str, str, str], names: Sequence[str], results: Results, colours: dict[str, str]
) -> dict[str, Any]:
    """Title of a check and, for each potential, verdict, key number and small plot."""
    cells: list[dict[str, Any] | None] = []
    for name in names:
        result = results[name].get(check)
        if result is None:
            cells.append(None)
            continue
        metric = key_metric(result, about[2])
        shown = {"number": "", "unit": "", "what": ""}
        if metric is not None and metric.value is not None:
            shown = {"number": number(metric.value), "unit": metric.unit, "what": metric.name}
        cells.append({"status": result.status, **shown, "spark": thumbnail(result, colours[name])})
    return {"id": check, "title": about[0], "cells": cells}


def thumbnail(result: Result, colour: str) -> Markup:
    """The first curves of a result in small; parity plots only where there is nothing else."""
    lines = [p for p in result.panels if not p.points]
    if not lines:
        return Markup("")
    first = lines[0]

    def scaled(values: list[float], axis: str) -> list[float]:
        return [math.log10(v) if v > 0 else math.nan for v in values] if axis in first.log else values

    shown = [c for c in first.curves[:24] if not c.points]
    return page.spark(
        [(scaled(c.x, "x"), scaled(c.y, "y"), REFERENCE if c.reference else colour, c.reference) for c in shown], first.y_limits
    )


def skipped_checks(
    order: Sequence[str], checks: dict[str, tuple[str, str, str]], names: Sequence[str], results: Results
) -> list[dict[str, str]]:
    """Checks that were skipped, why, and by whom where not by everyone."""
    out = []
    for check in order:
        reasons: dict[str, list[str]] = {}
        for name in names:
            if check in results[name] and results[name][check].status == "skipped":
                reasons.setdefault(results[name][check].reason, []).append(name)
        out += [
            {"title": checks[check][0], "reason": reason, "who": ", ".join(who) if len(who) < len(names) else ""}
            for reason, who in reasons.items()
        ]
    return out


def section(check: str, about: tuple[str, str, str], names: Sequence[str], results: Results, colours: dict[str, str]) -> dict[str, Any]:
    """Verdicts, numbers, pictures and notes of one check."""
    present = {name: results[name][check] for name in names if check in results[name]}
    alike: dict[tuple[str, str, str], list[str]] = {}
    for name, result in present.items():
        alike.setdefault((result.status, result.reason, result.consequence), []).append(name)
    verdicts = [
        {"status": s, "reason": r, "consequence": c, "who": ", ".join(who) if len(names) > 1 else ""} for (s, r, c), who in alike.items()
    ]
    rows = number_rows(present)
    shown = rows if len(rows) <= MOST_ROWS else [r for r in rows if r["worst"] >= ORDER["weak"]]
    references = {c.label or "reference" for r in present.values() for p in r.panels for c in p.curves if c.reference}
    return {
        "id": check, "title": about[0], "question": about[1], "verdicts": sorted(verdicts, key=lambda v: -ORDER[v["status"]]), "columns": list(present),
        "shown": shown, "folded": [r for r in rows if r not in shown], "groups": groups_of_pictures(present, colours),
        "legend": [*((n, colours[n]) for n in present), *([(", ".join(sorted(references)), REFERENCE)] if references else [])],
        "notes": notes_of(present),
    }  # fmt: skip


def notes_of(present: dict[str, Result]) -> list[str]:
    """Notes of all, each once; one that is not everyone's says whose it is."""
    found: dict[str, list[str]] = {}
    for name, result in present.items():
        for note in result.notes:
            found.setdefault(note, []).append(name)
    return [note if len(who) == len(present) else f"{', '.join(who)}: {note}" for note, who in found.items()]


def number_rows(present: dict[str, Result]) -> list[dict[str, Any]]:
    """Metrics in rows, those that did not pass first; potentials in columns, the best in bold."""
    rows: dict[tuple[str, str], dict[str, Metric]] = {}
    for name, result in present.items():
        for metric in result.metrics:
            rows.setdefault((metric.name, metric.unit), {})[name] = metric
    out = []
    for (title, unit), found in rows.items():
        values = {n: m.value for n, m in found.items() if m.value is not None}
        best = next((m.best for m in found.values() if m.best), "")
        top = (min if best == "low" else max)(values.values()) if best and len(set(values.values())) > 1 else None
        cells = [None if (m := found.get(name)) is None else {
            "text": number(m.value), "best": top is not None and m.value == top, "status": m.status, "reason": m.reason,
            "sign": SIGNS[m.status] if m.status in ("passed", "weak", "failed") else "",
        } for name in present]  # fmt: skip
        worst = max(ORDER[m.status] for m in found.values())
        out.append(
            {
                "title": title,
                "unit": unit,
                "limit": "; ".join(dict.fromkeys(m.limit for m in found.values() if m.limit)),
                "cells": cells,
                "worst": worst,
            }
        )
    return sorted(out, key=lambda r: -r["worst"] if r["worst"] >= ORDER["weak"] else 0)


# --- pictures -------------------------------------------------------------------------------------------------------


def groups_of_pictures(present: dict[str, Result], colours: dict[str, str]) -> list[dict[str, Any]]:
    """Pictures by group; panels of one title are drawn as one picture of all potentials."""
    merged: dict[tuple[str, str], list[tuple[str, Panel]]] = {}
    for name, result in present.items():
        for panel in result.panels:
            merged.setdefault((panel.group, panel.title), []).append((name, panel))
    return [
        {
            "small": bool(group),
            "pictures": [_picture(title, panels, colours, bool(group)) for (g, title), panels in merged.items() if g == group],
        }
        for group in dict.fromkeys(g for g, _ in merged)
    ]


def _picture(title: str, panels: Sequence[tuple[str, Panel]], colours: dict[str, str], small: bool) -> dict[str, Any]:
    first = panels[0][1]
    figure, axes = page.new_axes(first.x_label, first.y_label, (2.7, 2.1) if small else (4.8, 3.3))
    several = len(panels) > 1
    drawn = False
    for name, panel in panels:
        labelled = [c for c in panel.curves if c.label and not c.reference]
        for k, c in enumerate(panel.curves):
            if c.reference and drawn:
                continue
            own = not several and len({c.label for c in panel.curves if not c.reference}) > 1
            _draw(axes, c, panel.points, COLOURS[k % len(COLOURS)] if own else colours[name], c.label if own else None)
        drawn = drawn or any(c.reference for c in panel.curves)
        if not several and len(labelled) > 1 and not panel.points:
            axes.legend(fontsize=8, frameon=False)
    _dress(axes, first, panels, small)
    return page.picture(figure, title, first.group)


def _draw(axes: Any, c: Curve, points: bool, colour: str, label: str | None) -> None:
    x, y = np.array(c.x, dtype=float), np.array(c.y, dtype=float)
    if c.reference and c.points:
        axes.plot(x, y, "o", ms=4, color=REFERENCE, zorder=3)
    elif c.reference:
        axes.plot(x, y, "--", color=REFERENCE, lw=1.3, zorder=3)
    elif points:
        size = 3 if len(x) > 300 else 6
        axes.plot(x, y, ".", ms=size, alpha=0.55, color=colour, rasterized=True)  # thousands of points as one picture
    else:
        axes.plot(x, y, color=colour, label=label)


def _dress(axes: Any, first: Panel, panels: Sequence[tuple[str, Panel]], small: bool) -> None:
    if "x" in first.log:
        axes.set_xscale("log")
    if "y" in first.log:
        axes.set_yscale("log")
    if first.x_limits:
        axes.set_xlim(*first.x_limits)
    limits = [p.y_limits for _, p in panels if p.y_limits]
    if limits:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    if first.ticks:
        axes.set_xticks([t for t, _ in first.ticks], [label for _, label in first.ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(first.ticks[0][0], first.ticks[-1][0])
        axes.axhline(0, color="#888", lw=0.8)
    if small:
        axes.tick_params(labelsize=8)
        axes.locator_params(nbins=4)
        axes.xaxis.label.set_size(8)
        axes.yaxis.label.set_size(8)


def origin(name: str, about: dict[str, Any], results: dict[str, Result]) -> dict[str, Any]:
    """On which machine, with which packages, after which training, and how long."""
    known = [about.get("unverified"), f"trained on {about['n_train']:,} frames" if about.get("n_train") else None]
    return {
        "name": name, "machine": about.get("machine", ""), "training": "".join(f"{text}; " for text in known if text),
        "versions": ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items()), "seconds": f"{sum(r.seconds for r in results.values()):.0f}",
        "slow": ", ".join(f"{n} {r.seconds:.0f} s" for n, r in results.items() if r.status != "skipped"),
    }  # fmt: skip
