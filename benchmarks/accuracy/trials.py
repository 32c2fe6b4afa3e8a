"""The short trials on rMD17 ethanol behind docs/training.md: 4,000 compiled steps each, force MAE on 50 validation frames.

python benchmarks/accuracy/trials.py --data ../shared/data
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from gossamer.runs import train

TRIALS = {
    "base": [],
    "batch 5": ["training.batch_size=5"],
    "learning rate 5e-3": ["training.learning_rate=5e-3"],
    "20 Gaussians": ["model.radial_basis=gaussian", "model.num_basis=20"],
    "force weight 50": ["loss.forces=50"],
    "PaiNN's update": ["model.update=painn"],
    "L1": ["loss.kind=l1"],
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[3] / "shared" / "data")
parser.add_argument("--runs", type=Path, default=Path("runs") / "trials")
arguments = parser.parse_args()
torch.set_num_threads(1)
for name, overrides in TRIALS.items():
    config = {
        "data": {"train": str(arguments.data / "rmd17" / "rmd17_ethanol_train.extxyz.xz"), "valid_size": 50},
        "potential": {"zbl": False},
        "loss": {"energy": 1.0, "forces": 10.0},
        "training": {"steps": 4000, "batch_size": 10, "learning_rate": 2e-3, "valid_every": 1000, "compile": True},
        "out": str(arguments.runs / name.replace(" ", "-")),
    }
    print(f"{name:20s} {train(config, overrides, progress=False)['valid']['forces_mae_meV_per_A']:.1f} meV/Å", flush=True)
