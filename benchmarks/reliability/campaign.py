"""Can it be broken? Kills, full disks, damaged files, nonsense for readers, sanitizers, random cells, and a very long simulation.

    python benchmarks/reliability/campaign.py                       # all parts, some minutes (make campaign)
    python benchmarks/reliability/campaign.py fuzz --count 100000   # one part, in full
    python benchmarks/reliability/campaign.py --table runs/campaign # what was found, as a table

Results are written as they come to OUT/PART.json; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

PARTS = {"fuzz": 3000, "damage": 600, "cells": 400, "sanitize": 60, "disk": 30, "kills": 12, "long_md": 20_000}
"""parts and their counts where none is asked for: minutes. In full: 100000 inputs, 2000 mutations, 10000 cells, 200 kills, 10⁶ steps"""


def table(folder: Path) -> str:
    """Results of all parts in Markdown."""
    lines = ["| Part | Cases | Seconds | Findings | Outcomes |", "|---|---|---|---|---|"]
    for name in [*PARTS, "lists"]:
        file = folder / f"{name}.json"
        if file.exists():
            found = json.loads(file.read_text())
            totals: dict[str, int] = {}
            for what, n in found["outcomes"].items():
                last = what.rsplit(": ", 1)[-1]
                totals[last] = totals.get(last, 0) + n
            said = ", ".join(f"{what} {n:,}" for what, n in sorted(totals.items()))
            lines.append(f"| {name} | {found['done']:,} | {found['seconds']:.0f} | {len(found['findings'])} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--count", "--steps", type=int, help="cases, mutations, inputs, kills or steps (default: a few minutes' worth)")
    parser.add_argument("--minutes", type=float, default=1e9, help="at most, for each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        default="",
        help="only targets, networks or works with this in their name (fuzz, damage, cells, sanitize, kills); of cells 'lists' alone",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/campaign"))
    parser.add_argument("--table", type=Path, metavar="OUT", help="print what was found as a table")
    given = parser.parse_args()
    if given.table is not None:
        print(table(given.table), end="")
        return 0
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}. Parts are {', '.join(PARTS)}.")
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    findings = 0
    for name in given.parts or PARTS:
        options: dict[str, Any] = {"only": given.only} if given.only else {}
        result = importlib.import_module(name).run(given.count or PARTS[name], given.seed, given.minutes, out, **options)
        findings += len(result["findings"])
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
