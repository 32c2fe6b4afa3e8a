"""Networks beside each other after the same training time: costs of a step measured in one interleaved run, steps to match, then the runs.

    python benchmarks/accuracy/equal_time.py --data FOLDER [--sets ethanol] [--networks weft nequip] [--seeds 0 1] [--out equal_time.json]

NequIP takes the steps of optimizers.py (ethanol 2,000, water and silicon 500), every other network as many as cost the same CPU time.
Plain steps with kernels on one thread; recipes, Muon. Runs go one after another; rows are added to --out, where costs stand too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from optimizers import HERE, RECIPES, SETS, command, row

NETWORKS = ["nequip", "weft", "leignn"]
ROUNDS, STEPS = 7, 3


def files(name: str, data: Path) -> list[str]:
    """The paths of a data set as overrides of a recipe."""
    return [f"data.{part}={next(data.rglob(f'{name}_{part}.extxyz.xz'))}" for part in ("train", "test")]


def step_costs(which: str, data: Path, networks: list[str]) -> dict[str, float]:
    """CPU milliseconds of a training step of each network, lower quartile of rounds in turn."""
    import torch

    from gossamer.config import load_config
    from gossamer.run_frames import read_frames
    from gossamer.runs import prepare_potential
    from gossamer.training.loop import train_step
    from gossamer.training.process_group import start_process_group
    from gossamer.training.state import make_state

    torch.set_num_threads(1)
    recipe, name, _ = SETS[which]
    workers, steps, times = start_process_group("cpu"), {}, {}  # type: ignore[var-annotated]
    for network in networks:
        config = load_config(RECIPES / f"{recipe}-{network}.yaml", [*files(name, data), "training.compile=false"])
        frames = read_frames(config)
        potential, frames, _ = prepare_potential(config, frames, workers)
        state, size = make_state(potential, config.training, config.loss), config.training.batch_size
        graphs = [potential.collate([frames.train[k * size + j] for j in range(size)]) for k in range(STEPS)]
        steps[network], times[network] = (state, graphs, config), []
    for number in range(ROUNDS + 1):
        for network, (state, graphs, config) in steps.items():
            for graph in graphs:
                began = time.process_time()
                train_step(state, graph, config.loss, config.training, workers)
                if number:  # the first round builds kernels
                    times[network].append(1000 * (time.process_time() - began))
    return {network: round(statistics.quantiles(t, n=4)[0], 1) for network, t in times.items()}


def inference_costs(data: Path, networks: list[str]) -> dict[str, float]:
    """CPU milliseconds of energies and forces of 192 atoms of water by kernels, likewise."""
    import torch

    from gossamer.config import load_config
    from gossamer.engine.engine import Engine
    from gossamer.run_frames import read_frames
    from gossamer.runs import prepare_potential
    from gossamer.training.process_group import start_process_group

    torch.set_num_threads(1)
    calls, times = {}, {}  # type: ignore[var-annotated]
    for network in networks:
        config = load_config(RECIPES / f"water-{network}.yaml", files(SETS["water"][1], data))
        potential, frames, _ = prepare_potential(config, read_frames(config), start_process_group("cpu"))
        calls[network], times[network] = (Engine(potential.eval(), "kernels"), potential.collate([frames.train[0]])), []
    for number in range(5 * ROUNDS + 1):
        for network, (engine, graph) in calls.items():
            began = time.process_time()
            engine(graph)
            if number:
                times[network].append(1000 * (time.process_time() - began))
    return {network: round(statistics.quantiles(t, n=4)[0], 1) for network, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=[*SETS], default=[*SETS])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=HERE / "equal_time.json")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"step_ms": {}, "runs": []}
    if arguments.out.exists():
        found |= json.loads(arguments.out.read_text())
    if "water192_ms" not in found:
        found["water192_ms"] = inference_costs(arguments.data, NETWORKS)
        print("energies and forces", found["water192_ms"], flush=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    for which in arguments.sets:
        if which not in found["step_ms"]:
            found["step_ms"][which] = step_costs(which, arguments.data, NETWORKS)
            print(which, found["step_ms"][which], flush=True)
        costs = found["step_ms"][which]
        for seed in arguments.seeds:
            for network in arguments.networks:
                if any((r["data"], r["network"], r["seed"]) == (which, network, seed) for r in found["runs"]):
                    continue
                job, steps = (which, network, "muon", seed), round(SETS[which][2] * costs["nequip"] / costs[network])
                with tempfile.TemporaryDirectory() as work:
                    folder = Path(work) / "run"
                    line = [*command(job, arguments.data, folder), f"training.steps={steps}", f"training.valid_every={steps}"]
                    with open(f"{folder}.log", "w") as log:
                        subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, check=False)
                    found["runs"].append(row(job, folder))
                print(json.dumps(found["runs"][-1]), flush=True)
                arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
