"""The judge's page: verdicts first, then numbers side by side, then pictures one can enlarge; one file that opens offline."""

from __future__ import annotations

import html
import io
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from gossamer.checks.result import Metric, Panel, Result
from gossamer.files import write_text

COLOURS = ["#1f6f8b", "#e07a1f", "#6a994e", "#8e4a9e", "#c2a300", "#4059ad", "#a33b20", "#5f6c7b"]
REFERENCE = "#d1495b"
WORDS = {"passed": "passed", "weak": "weak", "failed": "failed", "skipped": "skipped", "measured": "measured"}
SIGNS = {"passed": "✓", "weak": "~", "failed": "✗", "skipped": "–", "measured": "•"}
STYLE: Any = {"font.size": 10, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "gossamer", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
              "grid.alpha": 0.25, "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.6, "path.simplify": True, "path.simplify_threshold": 0.3}  # fmt: skip

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>
:root {{ --ink:#20262e; --soft:#5d6672; --line:#e3e6ea; --good:#1f7a4d; --weak:#946000; --bad:#b3261e; --none:#68717d; --paper:#fff; --back:#f5f6f8; --link:#1f6f8b; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink:#e8eaed; --soft:#a4abb5; --line:#3a4048; --good:#5cc391; --weak:#e0a94a; --bad:#f08a80; --none:#a4abb5; --paper:#1d2126; --back:#14171a; --link:#6cb6d0; }} }}
* {{ box-sizing:border-box; }} html {{ scroll-behavior:smooth; }} body {{ margin:0; background:var(--back); color:var(--ink); font:16px/1.5 system-ui, sans-serif; }}
main {{ max-width:1120px; margin:0 auto; padding:24px 16px 64px; }} h1 {{ font-size:1.6rem; margin:.2em 0; }} h2 {{ font-size:1.2rem; margin:2.4em 0 .2em; }} h3 {{ font-size:1rem; margin:1.4em 0 .5em; }}
a {{ color:var(--link); text-decoration:none; }} a:hover {{ text-decoration:underline; }} .soft {{ color:var(--soft); margin:.2em 0 1em; }} .note {{ color:var(--soft); font-size:.88rem; margin:.5em 0; }}
.verdict {{ border-left:6px solid; padding:10px 16px; background:var(--paper); border-radius:6px; margin:10px 0; }} .verdict b {{ text-transform:uppercase; letter-spacing:.04em; font-size:.88rem; }} .verdict .why {{ color:var(--soft); display:block; }}
.passed {{ --c:var(--good); }} .weak {{ --c:var(--weak); }} .failed {{ --c:var(--bad); }} .skipped, .measured {{ --c:var(--none); }}
.verdict {{ border-color:var(--c); }} .verdict b {{ color:var(--c); }} .chip {{ color:var(--c); font-weight:600; white-space:nowrap; }}
.scroll {{ overflow-x:auto; background:var(--paper); border-radius:6px; margin:10px 0; }} table {{ border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; font-size:.93rem; }}
th,td {{ padding:6px 12px; text-align:right; border-bottom:1px solid var(--line); white-space:nowrap; }} tr:last-child td {{ border-bottom:0; }} th:first-child,td:first-child {{ position:sticky; left:0; background:var(--paper); text-align:left; white-space:normal; min-width:11em; }}
th {{ color:var(--soft); font-weight:600; font-size:.85rem; }} th.limit {{ text-align:left; }} td.unit {{ color:var(--soft); text-align:left; font-size:.85rem; }} td b {{ font-weight:700; }} td i {{ font-style:normal; color:var(--c); }}
.grid {{ display:grid; gap:14px; grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr)); margin:12px 0; }} .grid.small {{ grid-template-columns:repeat(auto-fill,minmax(min(46%,190px),1fr)); gap:8px; }}
figure {{ margin:0; background:#fff; color:#20262e; border-radius:6px; padding:8px; }} figure button {{ all:unset; cursor:zoom-in; display:block; width:100%; }} figure button:focus-visible {{ outline:3px solid var(--link); border-radius:4px; }}
figure svg {{ width:100%; height:auto; display:block; }} figcaption {{ color:#5d6672; font-size:.85rem; margin:2px 4px; }}
.legend {{ display:flex; flex-wrap:wrap; gap:4px 16px; font-size:.9rem; margin:8px 0; }} .legend span::before {{ content:""; display:inline-block; width:1.4em; height:.28em; margin-right:.45em; vertical-align:.25em; background:var(--k); border-radius:2px; }}
@media (max-width:600px) {{ th,td {{ padding:6px 8px; }} th:first-child,td:first-child {{ min-width:8.5em; max-width:42vw; }} }}
dialog {{ border:0; padding:0; width:100vw; height:100dvh; max-width:none; max-height:none; background:#fff; color:#20262e; }} dialog::backdrop {{ background:#0008; }} dialog .stage {{ width:100%; height:100%; touch-action:none; cursor:grab; overflow:hidden; }}
dialog svg {{ width:100%; height:100%; }} dialog .close {{ position:fixed; top:8px; right:8px; font:600 1rem system-ui; padding:8px 14px; border-radius:8px; border:1px solid #cfd4da; background:#fff; color:#20262e; cursor:pointer; }}
dialog p {{ position:fixed; bottom:4px; left:0; right:0; margin:0; text-align:center; color:#5d6672; font-size:.85rem; pointer-events:none; }}
details summary {{ cursor:pointer; color:var(--link); margin:8px 0; }} @media print {{ details > * {{ display:block; }} }}
</style></head><body><main><h1>{title}</h1><p class="soft">{subtitle}</p>{body}
</main><dialog aria-label="enlarged picture"><div class="stage"></div><button class="close" autofocus>Close</button><p>wheel or two fingers to zoom, drag to move, double-click to start again</p></dialog>
<script>
const dialog = document.querySelector("dialog"), stage = dialog.querySelector(".stage");
let view, home, svg, pointers = new Map(), spread = 0;
const show = () => svg.setAttribute("viewBox", view.join(" "));
const zoom = (factor, x, y) => {{ const r = svg.getBoundingClientRect(), s = Math.max(view[2] / r.width, view[3] / r.height);
  const px = view[0] + view[2] / 2 + (x - r.left - r.width / 2) * s, py = view[1] + view[3] / 2 + (y - r.top - r.height / 2) * s;
  view = [px + (view[0] - px) * factor, py + (view[1] - py) * factor, view[2] * factor, view[3] * factor]; show(); }};
document.querySelectorAll("figure button").forEach(b => b.addEventListener("click", () => {{
  stage.replaceChildren(b.querySelector("svg").cloneNode(true)); svg = stage.firstChild; svg.setAttribute("preserveAspectRatio", "xMidYMid meet");
  home = svg.getAttribute("viewBox").split(" ").map(Number); view = [...home]; dialog.showModal(); }}));
dialog.querySelector(".close").addEventListener("click", () => dialog.close());
stage.addEventListener("wheel", e => {{ e.preventDefault(); zoom(e.deltaY < 0 ? 0.87 : 1.15, e.clientX, e.clientY); }}, {{ passive: false }});
stage.addEventListener("dblclick", () => {{ view = [...home]; show(); }});
stage.addEventListener("pointerdown", e => {{ stage.setPointerCapture(e.pointerId); pointers.set(e.pointerId, e); }});
["pointerup", "pointercancel"].forEach(n => stage.addEventListener(n, e => {{ pointers.delete(e.pointerId); spread = 0; }}));
stage.addEventListener("pointermove", e => {{ const before = pointers.get(e.pointerId); if (!before) return; pointers.set(e.pointerId, e);
  const p = [...pointers.values()], r = svg.getBoundingClientRect(), s = Math.max(view[2] / r.width, view[3] / r.height);
  if (p.length === 1) {{ view[0] -= (e.clientX - before.clientX) * s; view[1] -= (e.clientY - before.clientY) * s; show(); }}
  if (p.length === 2) {{ const d = Math.hypot(p[0].clientX - p[1].clientX, p[0].clientY - p[1].clientY);
    if (spread) zoom(spread / d, (p[0].clientX + p[1].clientX) / 2, (p[0].clientY + p[1].clientY) / 2); spread = d; }} }});
</script></body></html>
"""


def write_page(path: Path, everyone: dict[str, dict[str, Any]], checks: dict[str, tuple[str, str]]) -> None:
    """Write the page.

    Args:
        path: HTML file.
        everyone: By potential: "about" (facts), "checks" (results as dictionaries) and "levels".
        checks: By check: title and question.
    """
    results = {name: {n: Result.from_dict(c) for n, c in entry["checks"].items()} for name, entry in everyone.items()}
    names = list(results)
    colours = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(names)}
    body = [_overview(names, results, checks)]
    scores = {name: entry["CPS"] for name, entry in everyone.items() if "CPS" in entry}
    if scores:
        body.append(
            "<p>Combined performance score (CPS) of Matbench Discovery, on the structures judged here: "
            + ", ".join(f"{_e(n)} <b>{v:.3f}</b>" for n, v in scores.items())
            + ".</p>"
        )
    for check, (title, question) in checks.items():
        present = {name: results[name][check] for name in names if check in results[name]}
        if not present:
            continue
        body.append(f'<section id="{check}"><h2>{_e(title)}</h2><p class="soft">{_e(question)}</p>')
        alike: dict[tuple[str, str, str], list[str]] = {}
        for name, result in present.items():
            alike.setdefault((result.status, result.reason, result.consequence), []).append(name)
        body += [_verdict(", ".join(who) if len(names) > 1 else "", *verdict) for verdict, who in alike.items()]
        body.append(_numbers(present))
        body.append(_pictures(present, colours))
        notes = {note for result in present.values() for note in result.notes}
        body += [f'<p class="note">{_e(note)}</p>' for note in sorted(notes)]
        body.append("</section>")
    body.append(_origin(everyone, results))
    title = f"Is {names[0]} fit for use?" if len(names) == 1 else "Which potential is fit for use?"
    levels = sorted({level for entry in everyone.values() for level in entry["levels"]})
    dates = sorted({entry["about"].get("date", "") for entry in everyone.values()})
    subtitle = f"Judged by gossamer, {', '.join(levels)} level, {', '.join(dates)}. Limits are for general use; yours may be tighter."
    write_text(path, PAGE.format(title=_e(title), subtitle=_e(subtitle), body="".join(body)))


def _e(text: Any) -> str:
    return html.escape(str(text), quote=True)


def _chip(status: str) -> str:
    return f'<span class="chip {status}">{SIGNS[status]} {WORDS[status]}</span>'


def _overview(names: Sequence[str], results: dict[str, dict[str, Result]], checks: dict[str, tuple[str, str]]) -> str:
    lines = []
    for name in names:
        found = results[name]
        bad = {s: [checks[n][0].lower() for n, o in found.items() if o.status == s] for s in ("failed", "weak")}
        status = "failed" if bad["failed"] else "weak" if bad["weak"] else "passed"
        parts = [f"{word}: {', '.join(bad[s])}" for s, word in (("failed", "failed"), ("weak", "weak")) if bad[s]]
        n_skipped = sum(o.status == "skipped" for o in found.values())
        done = len(found) - n_skipped
        sentence = (
            ("; ".join(parts) if parts else f"all {done} checks passed or only measured")
            + (f"; {n_skipped} skipped" if n_skipped else "")
            + "."
        )
        lines.append(f'<p class="verdict {status}"><b>{SIGNS[status]} {status}</b> {_e(name)} &mdash; {_e(sentence)}</p>')
    head = "".join(f"<th>{_e(n)}</th>" for n in names)
    rows = "".join(
        f'<tr><td><a href="#{check}">{_e(title)}</a></td>' + "".join(f"<td>{_chip(results[n][check].status) if check in results[n] else ''}</td>" for n in names) + "</tr>"
        for check, (title, _) in checks.items() if any(check in results[n] for n in names)
    )  # fmt: skip
    return "".join(lines) + f'<div class="scroll"><table><thead><tr><th>Check</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _verdict(who: str, status: str, reason: str, consequence: str) -> str:
    candidate = f"{_e(who)} &mdash; " if who else ""
    why = f'<span class="why">{_e(consequence)}</span>' if consequence else ""
    return f'<p class="verdict {status}"><b>{SIGNS[status]} {WORDS[status]}</b> {candidate}{_e(reason)}{why}</p>'


def number(value: float | None) -> str:
    """Three or four digits, with thousands apart; a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _numbers(present: dict[str, Result]) -> str:
    """Metrics in rows, potentials in columns, best in bold."""
    rows: dict[tuple[str, str], dict[str, Metric]] = {}
    for name, result in present.items():
        for metric in result.metrics:
            rows.setdefault((metric.name, metric.unit), {})[name] = metric
    if not rows:
        return ""
    lines = []
    for (title, unit), found in rows.items():
        values = {n: m.value for n, m in found.items() if m.value is not None}
        best = next((m.best for m in found.values() if m.best), "")
        top = (min if best == "low" else max)(values.values()) if best and len(set(values.values())) > 1 else None
        cells = []
        for name in present:
            one = found.get(name)
            if one is None:
                cells.append("<td></td>")
                continue
            shown = number(one.value)
            shown = f"<b>{shown}</b>" if top is not None and one.value == top else shown
            mark = f' <i title="{_e(one.reason)}">{SIGNS[one.status]}</i>' if one.status in ("passed", "weak", "failed") else ""
            cells.append(f'<td class="{one.status}">{shown}{mark}</td>')
        limit = next((m.limit for m in found.values() if m.limit), "")
        lines.append(f'<tr><td>{_e(title)}</td>{"".join(cells)}<td class="unit">{_e(unit)}</td><td class="unit">{_e(limit)}</td></tr>')
    head = "".join(f"<th>{_e(n)}</th>" for n in present)
    table = f'<div class="scroll"><table><thead><tr><th>Number</th>{head}<th></th><th class="limit">passes</th></tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    return table if len(lines) <= 24 else f"<details><summary>{len(lines)} numbers</summary>{table}</details>"


def _pictures(present: dict[str, Result], colours: dict[str, str]) -> str:
    merged: dict[tuple[str, str], list[tuple[str, Panel]]] = {}
    for name, result in present.items():
        for panel in result.panels:
            merged.setdefault((panel.group, panel.title), []).append((name, panel))
    if not merged:
        return ""
    legend = "".join(f'<span style="--k:{colours[n]}">{_e(n)}</span>' for n in present)
    reference = any(c.reference for o in present.values() for p in o.panels for c in p.curves)
    legend += f'<span style="--k:{REFERENCE}">reference</span>' if reference else ""
    out = [f'<div class="legend">{legend}</div>']
    for group in dict.fromkeys(g for g, _ in merged):
        cells = [_figure(title, panels, colours, bool(group)) for (g, title), panels in merged.items() if g == group]
        out.append(f'<div class="grid{" small" if group else ""}">{"".join(cells)}</div>')
    return "".join(out)


def _figure(title: str, panels: Sequence[tuple[str, Panel]], colours: dict[str, str], small: bool) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.7, 2.1) if small else (4.8, 3.3), layout="constrained")
        axes = figure.subplots()
        first = panels[0][1]
        several = len(panels) > 1
        drawn = False
        for name, panel in panels:
            shades = max(1, len({c.label for c in panel.curves if not c.reference}))
            labelled = [c for c in panel.curves if c.label and not c.reference]
            for k, c in enumerate(panel.curves):
                if c.reference and drawn:
                    continue
                x, y = np.array(c.x, dtype=float), np.array(c.y, dtype=float)
                if c.reference:
                    axes.plot(x, y, "--", color=REFERENCE, lw=1.3, zorder=3)
                elif panel.points:
                    axes.plot(x, y, ".", ms=3, alpha=0.55, color=colours[name], rasterized=True)  # thousands of points as one picture
                else:
                    own = not several and shades > 1
                    axes.plot(x, y, color=COLOURS[k % len(COLOURS)] if own else colours[name], label=c.label if own else None)
            drawn = drawn or any(c.reference for c in panel.curves)
            if not several and len(labelled) > 1 and not panel.points:
                axes.legend(fontsize=8)
        _dress(axes, first, panels, small)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None})
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :].strip()
    # identifiers are shared by the whole page, and the drawing scales with its place
    prefix = f"f{zlib.crc32(f'{title} {panels[0][1].group}'.encode()):08x}-"
    svg = re.sub(r'id="([^"]+)"', lambda m: f'id="{prefix}{m.group(1)}"', svg)
    svg = re.sub(r'(href="#|url\(#)', lambda m: m.group(1) + prefix, svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", svg, count=1)
    caption = f"<figcaption>{_e(title)}</figcaption>"
    return f'<figure><button type="button" aria-label="enlarge: {_e(title)}">{svg}</button>{caption}</figure>'


def _dress(axes: Any, first: Panel, panels: Sequence[tuple[str, Panel]], small: bool) -> None:
    axes.set_xlabel(first.x_label)
    axes.set_ylabel(first.y_label)
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


def _origin(everyone: dict[str, dict[str, Any]], results: dict[str, dict[str, Result]]) -> str:
    rows = []
    for name, entry in everyone.items():
        about = entry["about"]
        used = ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items())
        seconds = sum(o.seconds for o in results[name].values())
        slow = ", ".join(f"{n} {o.seconds:.0f} s" for n, o in results[name].items() if o.status != "skipped")
        rows.append(
            f"<p class='note'><b>{_e(name)}</b>: {_e(about.get('machine', ''))}; {_e(used)}; {seconds:.0f} s in all ({_e(slow)}).</p>"
        )
    return f"<h2>How this was made</h2>{''.join(rows)}"
