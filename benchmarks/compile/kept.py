"""Seconds until the first compiled training step: never compiled here, on other data, and again; and what the steps cost.

    python benchmarks/compile/kept.py --data ../shared/data weft nequip leignn > kept.md

Each in a process and for each network with a cache of its own: 2, then 10 molecules of ethanol (rMD17), the same once more, 5 molecules of
aspirin, which has the same elements, 2 cells of silicon with stress and 1 of water, which are other graphs. CPU ms of a step on one thread, lower
quartile of 30 after three, beside those of the plain step with kernels.
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

HERE = Path(__file__).resolve().parent
BATCHES = [("ethanol", 2), ("ethanol", 10), ("ethanol", 10), ("aspirin", 5), ("silicon", 2), ("water", 1)]
FILES = {
    "ethanol": "rmd17/rmd17_ethanol",
    "aspirin": "rmd17/rmd17_aspirin",
    "silicon": "mlearn/mlearn_Si",
    "water": "water_pbe0ts_330K/water_pbe0ts",
}


def measure(network: str, data: Path, system: str, size: int, compiled: bool) -> dict[str, float]:
    """One timing, in a process of its own."""
    import numpy as np
    import torch

    from gossamer.config import make_config
    from gossamer.data.dataset import open_dataset
    from gossamer.data.statistics import compute_statistics
    from gossamer.engine.memory import keep_freed_memory
    from gossamer.potential import Potential
    from gossamer.training.loop import train_step
    from gossamer.training.process_group import start_process_group
    from gossamer.training.state import make_state

    torch.set_num_threads(1)
    keep_freed_memory()
    frames = open_dataset(data / f"{FILES[system]}_train.extxyz.xz")
    settings = {"data": {"train": "-"}, "model": {"name": network}, "loss": {"stress": 20.0 * (system == "silicon")}}
    config = make_config(settings | {"training": {"compile": compiled, "learning_rate": 1e-3, "batch_size": size}})
    potential = Potential(config.model, compute_statistics([frames[k] for k in range(0, len(frames), 20)], 5.0))
    state = make_state(potential, config.training, config.loss)
    graph, group = potential.collate([frames[k] for k in range(size)]), start_process_group("cpu")
    times, began = [], time.perf_counter()
    for _ in range(33):
        at = time.process_time()
        train_step(state, graph, config.loss, config.training, group)
        times.append(time.process_time() - at)
        if len(times) == 1:
            first = time.perf_counter() - began
    if compiled and state.forward.compiled is None:
        raise RuntimeError("the step was not compiled")
    return {"first_s": first, "step_ms": 1000 * float(np.quantile(times[3:], 0.25))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        system, size, compiled = arguments.one
        print(json.dumps(measure(arguments.networks[0], arguments.data, system, int(size), compiled == "compiled")))
        return
    print("| network | batch | plain step, ms | compiled step, ms | share | until the first step, s |\n|---|---|---|---|---|---|")
    for network in arguments.networks:
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "GOSSAMER_CACHE": cache, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
            for system, size in BATCHES:
                rows = []
                for way in ("plain", "compiled"):
                    command = [sys.executable, __file__, network, "--data", arguments.data, "--one", system, str(size), way]
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                    rows.append(json.loads(done.stdout.splitlines()[-1]))
                plain, compiled = rows
                times = f"{plain['step_ms']:.1f} | {compiled['step_ms']:.1f} | {compiled['step_ms'] / plain['step_ms']:.2f}"
                print(f"| {network} | {size} x {system} | {times} | {compiled['first_s']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
