"""SOAP, Muon and AMSGrad: the recipes of a data set, the same number of steps with each, many runs side by side on one thread each.

    python benchmarks/accuracy/optimizers.py --data FOLDER [--at-once 8] [--minutes 30] [--optimizers soap muon] [--out optimizers.json]

FOLDER holds the training and test files of the recipes (rMD17 ethanol, mlearn silicon, water). Plain steps with kernels where
there are any; learning rates, schedules and all else as in the recipes. Rows are added to --out; those that are there stay.
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

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parents[1] / "recipes"
SETS = {"ethanol": ("rmd17", "rmd17_ethanol", 2000), "silicon": ("mlearn", "mlearn_Si", 500), "water": ("water", "water_pbe0ts", 500)}
OPTIMIZERS = ["soap", "muon", "adamw"]
NETWORKS = ["weft", "nequip", "leignn", "painn", "schnet", "geodite"]


def command(job: tuple[str, str, str, int], data: Path, folder: Path) -> list[str]:
    which, network, optimizer, seed = job
    recipe, name, steps = SETS[which]
    settings = {
        "data.train": next(data.rglob(f"{name}_train.extxyz.xz")),
        "data.test": next(data.rglob(f"{name}_test.extxyz.xz")),
        "training.steps": steps,
        "training.compile": "false",
        "training.valid_every": steps // 4,
        "training.checkpoint_every": steps,
        "training.seed": seed,
        "training.optimizer": optimizer,
        "out": folder,
    }
    path = RECIPES / f"{recipe}-{network}.yaml"
    return [sys.executable, "-m", "gossamer.cli", "train", str(path), *(f"{k}={v}" for k, v in settings.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=60.0, help="no run starts later")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--sets", nargs="+", choices=[*SETS], default=[*SETS])
    parser.add_argument("--out", type=Path, default=HERE / "optimizers.json")
    arguments = parser.parse_args()
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    there = [tuple(r[k] for k in ("data", "network", "optimizer", "seed")) for r in rows]
    jobs = [(d, n, o, s) for s in arguments.seeds for d in arguments.sets for n in arguments.networks for o in arguments.optimizers]
    jobs = [j for j in jobs if j not in there]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    began, running = time.time(), []  # type: ignore[var-annotated]
    with tempfile.TemporaryDirectory() as work:
        while jobs or running:
            while jobs and len(running) < arguments.at_once:
                job = jobs.pop(0)
                folder = Path(work) / "-".join(map(str, job))
                with open(f"{folder}.log", "w") as log:
                    process = subprocess.Popen(command(job, arguments.data, folder), env=environment, stdout=log, stderr=subprocess.STDOUT)
                running.append((job, folder, process))
            for item in [i for i in running if i[2].poll() is not None]:
                running.remove(item)
                rows.append(row(*item[:2]))
                print(json.dumps(rows[-1]), flush=True)
                arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
            if time.time() - began > 60 * arguments.minutes:
                jobs = []
            time.sleep(0.2)


def row(job: tuple[str, str, str, int], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = dict(zip(("data", "network", "optimizer", "seed"), job, strict=True))
    results = folder / "results.json"
    if not results.exists():
        return {**found, "failed": Path(f"{folder}.log").read_text().strip().splitlines()[-1:]}
    r = json.loads(results.read_text())
    errors = {
        f"{part}_{k}": round(r[part][k], 3) for part in ("valid", "test") for k in ("forces_mae_meV_per_A", "energy_mae_meV_per_atom")
    }
    return {**found, **errors, "steps": r["steps"], "step_ms": round(r["step_ms"], 1), "seconds": r["seconds"]}


if __name__ == "__main__":
    main()
