"""rMD17: what `gossamer fit` makes of 50 or 950 frames of each molecule in some minutes of one thread, beside published errors.

    python benchmarks/accuracy/rmd17.py --data ../shared/data --frames 50 --minutes 5 [--seeds 0 1] [aspirin ethanol ...]
    python benchmarks/accuracy/rmd17.py --table    # for README.md

Settings are those that `fit` chooses for so many frames and minutes, found without the test frames; 50 further frames choose the best weights, as in
the publications. Test frames are the official 1,000. Training counts CPU time; a step is compiled where that was done before (a minute or two of
both cores, once a machine). Rows are kept in --out as they come, and those that are there stay. With --work FOLDER a training that was stopped goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import platform
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gossamer
from gossamer.config import make_config
from gossamer.data.dataset import open_dataset
from gossamer.files import write_json
from gossamer.fitting import choose_settings
from gossamer.runs import train
from gossamer.settings import to_dict

HERE = Path(__file__).resolve().parent
MOLECULES = ["aspirin", "azobenzene", "benzene", "ethanol", "naphthalene", "paracetamol", "salicylic", "toluene"]
PUBLISHED = {50: ("NequIP_N50", "MACE_N50"), 950: ("PaiNN_N1000", "NequIP_N1000", "MACE_N1000")}
"""columns of the published table for so many training frames"""


def run(molecule: str, frames: int, minutes: float, seed: int, data: Path, changes: list[str], work: Path | None) -> dict[str, Any]:
    """Train and test one potential, in a folder of ``work`` that stays, or in one that goes."""
    files = {side: str(data / "rmd17" / f"rmd17_{molecule}_{side}.extxyz.xz") for side in ("train", "test")}
    structures = open_dataset(files["train"])
    name = "-".join([molecule, str(frames), f"{minutes:g}", str(seed), *(c.replace("/", "_") for c in changes)])
    with tempfile.TemporaryDirectory() if work is None else contextlib.nullcontext(work / name) as folder:
        chosen = choose_settings(files["train"], structures[:frames], out=folder, minutes=minutes)
        split = {"train_size": frames, "valid_size": 50, "valid_fraction": 0.1, "test": files["test"], "seed": seed}
        asked = to_dict(chosen) | {"data": to_dict(chosen.data) | split}
        config = make_config(asked, ["training.clock=cpu", f"training.seed={seed}", *changes])
        results = train(config, resume=work is not None, progress=False)
        if "stopped" in results:
            raise SystemExit(f"{results['stopped']}: the same command goes on from '{folder}'")
        published = read_published(data)[molecule]
    errors = {part: {k: results[part][k] for k in ("forces_mae_meV_per_A", "energy_mae_meV_per_atom")} for part in ("valid", "test")}
    n_atoms = structures[0].n_atoms
    settings = {"network": config.model.name, "cutoff": config.model.cutoff, "batch_size": config.training.batch_size, "changes": changes}
    return {
        "molecule": molecule, "n_atoms": n_atoms, "frames": frames, "minutes": minutes, "seed": seed, **settings, "compiled": results["compiled"],
        "steps": results["steps"], **errors, "published": {c: published[f"{c}_F_meV_per_A"] for c in PUBLISHED.get(frames, ())},
        "date": f"{date.today()}", "versions": {"gossamer": gossamer.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip


def read_published(data: Path) -> dict[str, dict[str, float | None]]:
    """Errors by molecule and column (the file says where they were published)."""
    with open(data / "published" / "rmd17_published_mae.csv") as file:
        rows = list(csv.DictReader(file))
    return {r["molecule"]: {k: float(v) if v else None for k, v in r.items() if k != "molecule"} for r in rows}


def table(rows: list[dict[str, Any]]) -> str:
    """Test force MAE of each molecule: mean over the seeds, and the published values; rows without changes to the settings."""
    lines = []
    rows = [r for r in rows if not r["changes"]]
    for frames, minutes in sorted({(r["frames"], r["minutes"]) for r in rows}):
        of_size = [r for r in rows if (r["frames"], r["minutes"]) == (frames, minutes)]
        columns = PUBLISHED.get(frames, ())
        lines += [
            f"**{frames} frames, {minutes:g} minutes**", "",
            f"| molecule | forces, meV/Å (each seed) | energy, meV | steps | {' | '.join(c.split('_')[0] + ', published' for c in columns)} |",
            "|---" * (4 + len(columns)) + "|",
        ]  # fmt: skip
        for molecule in MOLECULES:
            found = [r for r in of_size if r["molecule"] == molecule]
            if found:
                forces, energies = ([r["test"][k] for r in found] for k in ("forces_mae_meV_per_A", "energy_mae_meV_per_atom"))
                seeds = f" ({', '.join(f'{f:.1f}' for f in forces)})" if len(forces) > 1 else ""
                steps = ", ".join(f"{r['steps']:,}" for r in found)
                theirs = ["" if found[0]["published"][c] is None else f"{found[0]['published'][c]:g}" for c in columns]
                lines.append(
                    f"| {molecule} | {np.mean(forces):.1f}{seeds} | {found[0]['n_atoms'] * np.mean(energies):.1f} | {steps} | {' | '.join(theirs)} |"
                )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("molecules", nargs="*", default=MOLECULES)
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--frames", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=5.0, help="CPU time of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the split, the weights and the order")
    parser.add_argument("--set", nargs="*", default=[], help="settings to change, as for gossamer train")
    parser.add_argument("--out", type=Path, default=HERE / "rmd17.json")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where trainings stay, and go on")
    parser.add_argument("--table", action="store_true", help="only the table of the rows in --out")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.out.read_text())))
        return
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for seed in arguments.seeds:
        for molecule in arguments.molecules:
            rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
            key = (molecule, arguments.frames, arguments.minutes, seed, arguments.set)
            if any((r["molecule"], r["frames"], r["minutes"], r["seed"], r["changes"]) == key for r in rows):
                continue
            row = run(molecule, arguments.frames, arguments.minutes, seed, arguments.data, arguments.set, arguments.work)
            rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []  # another run may have added to them
            write_json(arguments.out, [*rows, row])
            print(molecule, seed, f"{row['test']['forces_mae_meV_per_A']:.2f} meV/Å", row["steps"], flush=True)


if __name__ == "__main__":
    main()
