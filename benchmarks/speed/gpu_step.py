"""A training step on ten molecules of ethanol on a GPU, recorded as CUDA graphs, compiled and not: ms, and what its parts take.

python benchmarks/speed/gpu_step.py rmd17_ethanol_train.extxyz.xz [--networks nequip weft]
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch

from gossamer.config import make_config
from gossamer.data.readers import read_structures
from gossamer.data.statistics import compute_statistics
from gossamer.potential import Potential
from gossamer.timing import fastest
from gossamer.training.config import TrainingConfig
from gossamer.training.loop import train_step
from gossamer.training.losses import LossConfig, loss_counts
from gossamer.training.process_group import start_process_group
from gossamer.training.state import make_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--networks", nargs="+", default=["nequip"])
    arguments = parser.parse_args()
    frames = list(read_structures(arguments.data))[:10]
    loss, group = LossConfig(), start_process_group("cuda")
    for name in arguments.networks:
        for compiled in (True, False):
            began = time.perf_counter()
            model = make_config({"data": {"train": "-"}, "model": {"name": name}}).model
            potential = Potential(model, compute_statistics(frames, model.cutoff)).to("cuda")
            config = TrainingConfig(compile=compiled, device="cuda")
            state, graph = make_state(potential, config, loss), potential.collate(frames)
            for _ in range(4):  # the second and the third are recorded
                train_step(state, graph, loss, config, group)
            made = time.perf_counter() - began
            counts = torch.tensor(list(loss_counts(graph, loss).values()), dtype=torch.float64, device="cuda")
            parts = {
                "step": partial(train_step, state, graph, loss, config, group),
                "loss and gradients": partial(state.differentiate, graph, counts),
                "update": state.update,
            }
            times = ", ".join(f"{part} {1000 * fastest(run, 20, 3.0):.2f} ms" for part, run in parts.items())
            print(
                f"{name}, {'compiled' if state.forward.compiled is not None else 'not compiled'}, ready after {made:.0f} s: {times}",
                flush=True,
            )


if __name__ == "__main__":
    main()
