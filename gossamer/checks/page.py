"""Pages from Jinja2 templates: one self-contained HTML file that opens offline, with pictures one can enlarge; no torch."""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from gossamer.files import write_text

COLOURS = ["#1f6f8b", "#e07a1f", "#6a994e", "#8e4a9e", "#c2a300", "#4059ad", "#a33b20", "#5f6c7b"]
REFERENCE = "#d1495b"
SIGNS = {"passed": "✓", "weak": "~", "failed": "✗", "skipped": "–", "measured": "•"}
STYLE: Any = {"font.size": 10, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "gossamer", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
              "grid.alpha": 0.25, "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.6, "path.simplify": True, "path.simplify_threshold": 0.3}  # fmt: skip


@cache
def environment() -> Environment:
    """The templates, with everything escaped that is not marked as HTML by us."""
    found = Environment(loader=PackageLoader("gossamer.checks", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    found.globals["signs"] = SIGNS
    return found


def write(path: Path | str, template: str, **values: Any) -> None:
    """Fill a template and write the page."""
    write_text(path, environment().get_template(template).render(**values))


def number(value: float | None) -> str:
    """Three or four digits, with thousands apart; a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def new_axes(x_label: str, y_label: str, size: tuple[float, float] = (4.8, 3.3)) -> tuple[Figure, Any]:
    """A figure of the house's style, and its axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def picture(figure: Figure, text: str, name: str = "") -> dict[str, Any]:
    """A figure for the templates: "svg" (drawn inline, so that it can be enlarged) and "text" (its caption).

    Args:
        figure: Closed or not; it is only drawn.
        text: Caption.
        name: Tells figures of one caption apart: identifiers are shared by the whole page.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None})
    svg = buffer.getvalue().decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).strip()
    prefix = f"f{zlib.crc32(f'{text} {name}'.encode()):08x}-"
    svg = re.sub(r'id="([^"]+)"', lambda m: f'id="{prefix}{m.group(1)}"', svg)
    svg = re.sub(r'(href="#|url\(#)', lambda m: m.group(1) + prefix, svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", svg, count=1)  # it takes the size of its place
    return {"svg": Markup(svg), "text": text}


def spark(lines: Iterable[tuple[Sequence[float], Sequence[float], str, bool]], limits: tuple[float, float] | None = None) -> Markup:
    """A small plot without axes, 96 by 30: lines of (x, y, colour, dashed) over common axes, y cut to the limits."""
    kept = []
    for x, y, colour, dashed in lines:
        every = max(1, len(x) // 60)
        pairs = [(float(a), float(b)) for a, b in zip(x[::every], y[::every], strict=True) if math.isfinite(a) and math.isfinite(b)]
        if len(pairs) > 1:
            kept.append((pairs, colour, dashed))
    if not kept:
        return Markup("")
    xs, ys = [a for pairs, *_ in kept for a, _ in pairs], [b for pairs, *_ in kept for _, b in pairs]
    bottom, top = limits or (min(ys), max(ys))
    width, height = max(xs) - min(xs) or 1.0, top - bottom or 1.0
    drawn = Markup("")
    for pairs, colour, dashed in kept:
        points = " ".join(
            f"{2 + 92 * (a - min(xs)) / width:.1f},{28 - 26 * (min(max(b, bottom), top) - bottom) / height:.1f}" for a, b in pairs
        )
        dash = Markup(' stroke-dasharray="3 2"') if dashed else Markup("")
        drawn += Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="1.4"{}/>').format(points, colour, dash)
    return Markup('<svg class="spark" viewBox="0 0 96 30" aria-hidden="true">{}</svg>').format(drawn)
