"""Molecular dynamics of the systems of LEIGNN's paper, per "Forces are not enough" (Fu et al., TMLR 2023), one network beside the other.

    python benchmarks/reliability/own.py --data ../shared/data --out runs/own leignn:lips painn:water nequip:methane ...
    python benchmarks/md/run.py runs/own                 # the finished rows into results.json, results.md and results/SYSTEM.html here

own.py trains every network equally long with the settings that `gossamer fit` chooses and has it judged; here stands what the judge says of
dynamics (50 ps, as published) and of energy conservation (velocity Verlet with two steps), and its page of each system with all curves.

lips: Li6.75P3S11, 83 atoms, Nosé-Hoover, 520 K, 0.25 fs, thermostat time 20 steps; windows of 1 ps.
water: 192 atoms, Langevin, 330 K (the temperature of the labelled frames), 0.5 fs; windows of 2 ps.
methane: one molecule, trained at 1000 K, Langevin, 300 K, 0.5 fs; bonds within 0.5 Å.
The labelled frames that g(r) is compared with are those that nothing was trained on; methane's are one picosecond of one molecule, too few.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gossamer
from gossamer.files import write_json, write_text

HERE = Path(__file__).resolve().parent
SYSTEMS = ("lips", "water", "methane")
COLUMNS = {
    "breaks, ps": ("time before it breaks", ".3g"),
    "mean T, K": ("mean temperature", ".0f"),
    "error of g(r), Å": ("error of g(r), all pairs", ".3f"),
    "leaves the reference, ps": (("time before g(r) leaves the reference", "time before a bond changes by 0.5 Å"), ".3g"),
    "D, 1e-9 m²/s": (("diffusivity of Li", "diffusivity of O"), ".2f"),
    "its error": ("its standard error", ".2f"),
    "NVE drift, meV/atom/ps": ("drift of the total energy", ".4f"),
    "fluctuation ratio": ("ratio of fluctuations at two time steps", ".2f"),
}
"""of the table: how the judge's metric is called behind the system's name, and how it is written"""


def collect(folder: Path) -> list[dict[str, Any]]:
    """All rows of results.json, with the finished ones of a folder of own.py, which replace older ones."""
    file = HERE / "results.json"
    old = json.loads(file.read_text("utf-8")) if file.exists() else []
    new = []
    for path in folder.glob("*-*.json"):
        row = json.loads(path.read_text("utf-8"))
        if row["system"] not in SYSTEMS or row["changes"]:
            continue
        row["status"] = {name: row["verdicts"][name]["status"] for name in ("conservation", "dynamics")}
        row["metrics"] = {}
        for name in ("conservation", "dynamics"):
            row["metrics"] |= {key.split(": ")[-1]: value for key, value in row["verdicts"][name]["metrics"].items()}
        del row["verdicts"], row["judge_seconds"]
        new.append(row)
    rows = {(r["system"], r["network"]): r for r in (*old, *new)}
    kept = sorted(rows.values(), key=lambda r: (SYSTEMS.index(r["system"]), r["network"]))
    write_json(file, kept)
    return kept


def number(metrics: dict[str, float | None], names: str | tuple[str, ...], form: str) -> str:
    """The first of the metrics that is there, or a dash."""
    for name in (names,) if isinstance(names, str) else names:
        if metrics.get(name) is not None:
            return format(metrics[name], form)
    return "-"


def table(rows: list[dict[str, Any]]) -> str:
    heads = ["system", "network", "CPU minutes, steps", "force MAE meV/Å", "energy MAE meV/atom", "conservation", "dynamics", *COLUMNS, "overlap of g(r)"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in rows:
        metrics = r["metrics"]
        overlaps = {key.rpartition(", ")[2]: value for key, value in metrics.items() if key.startswith("overlap of g(r), ")}
        cells = [
            r["system"], r["network"], f"{r['minutes']:g}, {r['steps']:,}", f"{r['test']['forces_mae_meV_per_A']:.1f}",
            f"{r['test']['energy_mae_meV_per_atom']:.2f}", r["status"]["conservation"], f"{r['status']['dynamics']}, {r['picoseconds']:g} ps",
            *(number(metrics, *column) for column in COLUMNS.values()),
            ", ".join(f"{pair} {value:.3f}" for pair, value in overlaps.items() if pair != "all pairs") or "-",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of own.py's rows")
    folder = parser.parse_args().folder
    write_text(HERE / "results.md", f"gossamer {gossamer.__version__}.\n\n" + table(collect(folder)))
    (HERE / "results").mkdir(exist_ok=True)
    for system in SYSTEMS:
        page = folder / f"judge-{system}" / "report.html"
        if page.exists():
            write_text(HERE / "results" / f"{system}.html", page.read_text("utf-8"))


if __name__ == "__main__":
    main()
