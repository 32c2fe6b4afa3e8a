"""LEIGNN on real ab initio data under a stated time budget: errors on the given test splits.

    python benchmarks/accuracy/run.py --data ../shared/data --minutes 20 ethanol water lips aspirin
    python benchmarks/accuracy/run.py --data ../shared/data --minutes 6 --direct ethanol water lips aspirin
    python benchmarks/accuracy/run.py --table          # results/*.json -> results.md

Splits: rMD17 950 training + 50 validation frames out of the official 1,000 and the 1,000 official test frames; LiPS and
water as given. The budget covers compilation, training and validation, not the test. One thread unless --threads says
otherwise. Each run's folder is kept under --runs; results/NAME.json holds settings, errors, machine and versions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SETS = {
    "ethanol": dict(train="rmd17/rmd17_ethanol_train.extxyz.xz", test="rmd17/rmd17_ethanol_test.extxyz.xz", valid_size=50, batch_size=10,
                    learning_rate=5e-3, forces=10.0, features=96, published="PaiNN 10.0"),
    "aspirin": dict(train="rmd17/rmd17_aspirin_train.extxyz.xz", test="rmd17/rmd17_aspirin_test.extxyz.xz", valid_size=50, batch_size=5,
                    learning_rate=4e-3, forces=10.0, features=96, published="PaiNN 16.1, NequIP 8.2, MACE 6.6"),
    "water": dict(train="water_pbe0ts_330K/water_pbe0ts_train.extxyz.xz", test="water_pbe0ts_330K/water_pbe0ts_test.extxyz.xz", valid_size=20,
                  batch_size=1, learning_rate=4e-3, forces=10.0, features=64, published="-"),
    "lips": dict(train="lips/lips_train.extxyz.xz", valid="lips/lips_val.extxyz.xz", test="lips/lips_test.extxyz.xz", batch_size=2,
                 learning_rate=4e-3, forces=10.0, features=64, published="LEIGNN 1.5, NequIP 3.7 (19,000 frames; here 100)"),
    "methane": dict(train="no_upstream_licence/ch4/ch4_aimd_1000K.extxyz.xz", test="no_upstream_licence/ch4/ch4_aimd_300K.extxyz.xz",
                    valid_size=100, batch_size=10, learning_rate=5e-3, forces=10.0, features=64, published="-"),
}  # fmt: skip


def config_of(name: str, data: Path, direct: bool, out: Path, steps: int) -> dict:
    s = SETS[name]
    paths = {k: str(data / s[k]) for k in ("train", "valid", "test") if k in s}
    every = max(50, min(1000, steps // 20))
    return {
        "data": {**paths, **({"valid_size": s["valid_size"]} if "valid_size" in s else {})},
        "model": {"name": "leignn", "num_features": s["features"], "num_layers": 3, "cutoff": 5.0, "direct_forces": direct},
        "loss": {"energy": 1.0, "forces": s["forces"]},
        "training": {"steps": steps, "batch_size": s["batch_size"], "learning_rate": s["learning_rate"], "compile": True, "valid_every": every,
                     "checkpoint_every": every, "schedule": {"kind": "cosine", "warmup_steps": 100, "final": 0.01}},
        "out": str(out),
    }  # fmt: skip


def measure(name: str, arguments: argparse.Namespace) -> dict:
    """Time the compiled step, choose the number of steps that fills the budget, train, and report the test errors."""
    import torch

    import gossamer
    from gossamer.config import make_config
    from gossamer.data.dataset import load_data
    from gossamer.data.statistics import compute_statistics
    from gossamer.potential import Potential
    from gossamer.runs import train
    from gossamer.training.loop import train_step
    from gossamer.training.process_group import start_process_group
    from gossamer.training.state import make_state

    torch.set_num_threads(arguments.threads)
    label = f"{name}-{'direct' if arguments.direct else 'conservative'}{arguments.suffix}"
    out = arguments.runs / label
    config = make_config(config_of(name, arguments.data, arguments.direct, out, 10_000))
    began = time.perf_counter()
    structures, _, _ = load_data(config.data, config.model.cutoff)
    potential = Potential(config.model, compute_statistics(structures, config.model.cutoff), config.potential)
    state, workers = make_state(potential, config.training, config.loss), start_process_group("cpu")
    size = config.training.batch_size
    for k in range(12):
        graph = potential.collate([structures[(k * size + i) % len(structures)] for i in range(size)])
        if k == 2:
            started = time.perf_counter()
        train_step(state, graph, config.loss, config.training, workers)
    step = (time.perf_counter() - started) / 10
    compiled = started - began
    # compilation happens again in the run, mostly out of its cache; validation takes about a tenth
    steps = int(0.9 * (60 * arguments.minutes - compiled) / step)
    results = train(config_of(name, arguments.data, arguments.direct, out, steps), progress=False)
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?"
    )
    record = {
        "name": label, "minutes_budget": arguments.minutes, "minutes_total": round((time.perf_counter() - began) / 60, 1),
        "threads": arguments.threads, "step_ms": round(1000 * step, 1), "steps": results["steps"], "num_parameters": results["num_parameters"],
        "test": results["test"], "valid": results["valid"], "published_force_mae": SETS[name]["published"],
        "settings": config_of(name, Path("data"), arguments.direct, Path("run"), steps), "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {cpu}", "versions": {"gossamer": gossamer.__version__, "torch": torch.__version__},
    }  # fmt: skip
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{label}.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def table() -> str:
    """results/*.json as one Markdown table."""
    rows = [
        "| run | parameters | budget min (threads) | steps | ms/step | energy MAE meV/atom | energy MAE meV | force MAE meV/Å | force RMSE | published force MAE |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    atoms = {"ethanol": 9, "aspirin": 21, "water": 192, "lips": 83, "methane": 5}
    for path in sorted((HERE / "results").glob("*.json")):
        r = json.loads(path.read_text())
        t = r["test"]
        energy = t["energy_mae_meV_per_atom"]
        rows.append(
            f"| {r['name']} | {r['num_parameters']:,} | {r['minutes_budget']:g} ({r['threads']}) | {r['steps']:,} | {r['step_ms']} | {energy:.3f} | "
            f"{energy * atoms[r['name'].split('-')[0]]:.2f} | {t['forces_mae_meV_per_A']:.1f} | {t['forces_rmse_meV_per_A']:.1f} | {r['published_force_mae']} |"
        )
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*SETS, []], help="data sets")
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "accuracy")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--suffix", default="")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    for name in arguments.names:
        record = measure(name, arguments)
        print(name, json.dumps(record["test"]), flush=True)
    (HERE / "results.md").write_text(table())
    if arguments.table:
        print(table())


if __name__ == "__main__":
    main()
