"""All networks on one data set for the same time: the recipes of recipes/, `gossamer compare`, one thread.

    python benchmarks/accuracy/compare.py ethanol --minutes 25 --only nequip geodite
    python benchmarks/accuracy/compare.py aspirin water lips silicon --minutes 4

Runs lie under --runs (kept, so that a second call goes on: --resume is always on); tables and plots come here, as
compare/SET.json, .md and .png. Rows of LEIGNN's ablation: leignn-vanilla (PaiNN's update), leignn-global (global context).
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parents[1] / "recipes"
SETS = {
    "ethanol": ("rmd17", {"train": "rmd17/rmd17_ethanol_train.extxyz.xz", "test": "rmd17/rmd17_ethanol_test.extxyz.xz"}),
    "aspirin": ("rmd17", {"train": "rmd17/rmd17_aspirin_train.extxyz.xz", "test": "rmd17/rmd17_aspirin_test.extxyz.xz"}),
    "water": (
        "water",
        {"train": "water_pbe0ts_330K/water_pbe0ts_train.extxyz.xz", "test": "water_pbe0ts_330K/water_pbe0ts_test.extxyz.xz"},
    ),
    "lips": ("lips", {"train": "lips/lips_train.extxyz.xz", "valid": "lips/lips_val.extxyz.xz", "test": "lips/lips_test.extxyz.xz"}),
    **{
        name: ("mlearn", {"train": f"mlearn/mlearn_{symbol}_train.extxyz.xz", "test": f"mlearn/mlearn_{symbol}_test.extxyz.xz"})
        for name, symbol in {"silicon": "Si", "copper": "Cu", "molybdenum": "Mo", "lithium": "Li", "germanium": "Ge"}.items()
    },
}
ROWS = {
    "leignn": {}, "leignn-vanilla": {"update": "painn"}, "leignn-global": {"global_context": True}, "nequip": {}, "geodite": {}, "painn": {}, "schnet": {},
}  # fmt: skip


def write_configs(name: str, data: Path, folder: Path, rows: list[str]) -> list[Path]:
    """The recipes of a data set with the paths of this machine, and the changes of each row."""
    recipe, files = SETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for row in rows:
        values = yaml.safe_load((RECIPES / f"{recipe}-{row.split('-')[0]}.yaml").read_text())
        values["data"].update({k: str(data / v) for k, v in files.items()})
        values["model"].update(ROWS[row])
        if name == "aspirin":
            values["training"]["batch_size"] = 5
        if name == "copper":  # its stress labels have a constant offset
            values["loss"]["stress"] = 0.0
        paths.append(folder / f"{row}.yaml")
        paths[-1].write_text(yaml.safe_dump(values, sort_keys=False))
    return paths


def main() -> None:
    import torch

    from gossamer.comparison import compare, table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=[*SETS])
    parser.add_argument("--only", nargs="+", choices=[*ROWS], default=[*ROWS])
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "compare")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    for name in arguments.sets:
        runs = arguments.runs / f"{name}-{arguments.minutes:g}min"
        configs = write_configs(name, arguments.data, runs / "configs", arguments.only)
        records = compare(configs, arguments.minutes, runs, resume=True, progress=False)
        print(name, table(records), sep="\n", flush=True)
        target = HERE / "compare"
        target.mkdir(exist_ok=True)
        for suffix in ("md", "png"):
            shutil.copy(runs / f"comparison.{suffix}", target / f"{name}-{arguments.minutes:g}min.{suffix}")
        for record in records:  # no paths of this machine
            record["settings"]["out"] = "run"
            record["settings"]["data"].update({k: SETS[name][1].get(k) for k in ("train", "valid", "test")})
            for part in ("valid", "test"):
                (record[part] or {}).pop("out", None)
        (target / f"{name}-{arguments.minutes:g}min.json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
