"""Changes to a recipe beside each other at equal time, side by side on one thread each: what ends lower after so many minutes?

    python benchmarks/accuracy/variants.py --data FOLDER --minutes 5 "ethanol weft" "ethanol weft training.weight_decay=0.1" ...

A job is a data set, a network and settings that differ from the recipe's; with "fit" for the network, what `gossamer fit` chooses for the data
and the time, beside hand-made recipes. FOLDER holds the training and test files. Plain steps with
kernels; seeds are settings too. Rows are printed as they come and kept in --out (those that are there stay).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
SETS = {
    "ethanol": ("rmd17", "rmd17_ethanol"),
    "aspirin": ("rmd17", "rmd17_aspirin"),
    "silicon": ("mlearn", "mlearn_Si"),
    "water": ("water", "water_pbe0ts"),
    "copper": ("mlearn", "mlearn_Cu", "loss.stress=0"),  # its stress labels have a constant offset
    "lips": ("lips", "lips"),
}
"""recipe, files, and settings that the data needs"""


def command(job: str, minutes: float, data: Path, folder: Path) -> list[str]:
    which, network, *changes = job.split()
    recipe, name, *needs = SETS[which]
    files = {side: next(data.rglob(f"{name}_{side}.extxyz.xz"), None) for side in ("train", "val", "test")}
    settings = {
        **{f"data.{'valid' if side == 'val' else side}": file for side, file in files.items() if file is not None},
        "training.minutes": minutes,
        "training.compile": "false",
        "out": folder,
    }
    path = HERE.parents[1] / "recipes" / f"{recipe}-{'weft' if network == 'fit' else network}.yaml"
    if network == "fit":
        path = chosen(path, files["train"], minutes, Path(f"{folder}.yaml"))
    return [sys.executable, "-m", "gossamer.cli", "train", str(path), *(f"{k}={v}" for k, v in settings.items()), *needs, *changes]


def chosen(recipe: Path, data: Path | None, minutes: float, path: Path) -> Path:
    """Writes the settings that `gossamer fit` chooses, on the recipe's split."""
    from gossamer.fitting import choose_settings
    from gossamer.settings import to_dict

    assert data is not None
    settings = to_dict(choose_settings(data, out="-", minutes=minutes))
    path.write_text(yaml.safe_dump({**settings, "data": yaml.safe_load(recipe.read_text())["data"]}))
    return path


def row(job: str, folder: Path) -> dict[str, Any]:
    results = folder / "results.json"
    if not results.exists():
        return {"job": job, "failed": Path(f"{folder}.log").read_text().strip().splitlines()[-1:]}
    r = json.loads(results.read_text())
    errors = {
        f"{part}_{k}": round(r[part][k], 3) for part in ("valid", "test") for k in ("forces_mae_meV_per_A", "energy_mae_meV_per_atom")
    }
    return {"job": job, **errors, "steps": r["steps"], "step_ms": round(r["step_ms"], 1), "seconds": r["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", help='"DATA NETWORK [setting=value ...]"')
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--gpu", action="store_true", help="let them see the GPU")
    parser.add_argument("--out", type=Path, default=HERE / "variants.json")
    arguments = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    if not arguments.gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    jobs, running = list(enumerate(arguments.jobs)), []  # type: ignore[var-annotated]
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    with tempfile.TemporaryDirectory() as work:
        while jobs or running:
            while jobs and len(running) < arguments.at_once:
                number, job = jobs.pop(0)
                folder = Path(work) / str(number)
                with open(f"{folder}.log", "w") as log:
                    run = command(job, arguments.minutes, arguments.data, folder)
                    running.append((job, folder, subprocess.Popen(run, env=environment, stdout=log, stderr=subprocess.STDOUT)))
            for item in [i for i in running if i[2].poll() is not None]:
                running.remove(item)
                rows.append({**row(*item[:2]), "minutes": arguments.minutes})
                print(json.dumps(rows[-1]), flush=True)
                arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
            time.sleep(0.2)


if __name__ == "__main__":
    main()
