"""A training step on ten molecules of ethanol on a GPU, recorded as CUDA graphs, compiled and not: ms, and what its parts take.

python benchmarks/speed/gpu_step.py rmd17_ethanol_train.extxyz.xz [--networks nequip weft] [--optimizers muon soap] [--plain]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product

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
    parser.add_argument("--optimizers", nargs="+", default=["muon"])
    parser.add_argument("--plain", action="store_true", help="no compiled steps")
    arguments = parser.parse_args()
    frames = list(read_structures(arguments.data))[:10]
    loss, group = LossConfig(), start_process_group("cuda")
    for name, optimizer, compiled in product(arguments.networks, arguments.optimizers, (False,) if arguments.plain else (True, False)):
        began = time.perf_counter()
        model = make_config({"data": {"train": "-"}, "model": {"name": name}}).model
        potential = Potential(model, compute_statistics(frames, model.cutoff)).to("cuda")
        config = TrainingConfig(compile=compiled, device="cuda", optimizer=optimizer)
        state, graph = make_state(potential, config, loss), potential.collate(frames)
        for _ in range(4):  # the second and the third are recorded
            train_step(state, graph, loss, config, group)
        made = time.perf_counter() - began
        counts = torch.tensor(list(loss_counts(graph, loss).values()), dtype=torch.float64, device="cuda")
        parts: dict[str, Callable[[], object]] = {
            "step": partial(train_step, state, graph, loss, config, group),
            "loss and gradients": partial(state.differentiate, graph, counts),
            "update": state.update,
        }
        times = ", ".join(f"{part} {1000 * fastest(run, 20, 3.0):.2f} ms" for part, run in parts.items())
        recorded = "recorded" if getattr(state.update, "recording", None) is not None else "update not recorded"
        how = "compiled" if state.forward.compiled is not None else "not compiled"
        print(
            f"{name}, {optimizer}, {how}, {recorded}, ready after {made:.0f} s: {times}; {mean_step(parts['step']):.2f} ms on average",
            flush=True,
        )


def mean_step(step: Callable[[], object], steps: int = 100) -> float:
    """ms of a step on average, with what is done every few steps."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began) / steps


if __name__ == "__main__":
    main()
