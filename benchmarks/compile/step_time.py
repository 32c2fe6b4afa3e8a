"""ms of a training step on ten ethanol molecules: plain, compiled with several fusion sizes, and with PyTorch's own cat and split.

    python benchmarks/compile/step_time.py nequip --fusion 0 8 64      # 0 is the plain step
    python benchmarks/compile/step_time.py nequip --fusion 0 --torch-cat

CPU time of one thread, median of eleven steps after three; the compiler's cache is emptied before each (TORCHINDUCTOR_CACHE_DIR).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def time_steps(config, structures: list, repeats: int) -> tuple[list[float], bool]:
    """CPU seconds of each of some training steps, the first ones with compilation; and whether they were compiled."""
    from gossamer.data.statistics import compute_statistics
    from gossamer.potential import Potential
    from gossamer.training.loop import train_step
    from gossamer.training.process_group import start_process_group
    from gossamer.training.state import make_state

    size = min(len(structures), config.training.batch_size)
    potential = Potential(config.model, compute_statistics(structures, config.model.cutoff), config.potential)
    state = make_state(potential, config.training, config.loss)
    times = []
    for k in range(repeats):
        graph = potential.collate([structures[(k * size + i) % len(structures)] for i in range(size)])
        began = time.process_time()
        train_step(state, graph, config.loss, config.training, start_process_group("cpu"))
        times.append(time.process_time() - began)
    return times, state.forward.compiled is not None


def measure(name: str, fusion: int, torch_cat: bool, data: str) -> None:
    """One timing, in a process of its own."""
    import numpy as np
    import torch
    import yaml

    torch.set_num_threads(1)
    compile_with = torch.compile

    def chosen(graph, **options):
        return compile_with(graph, **{**options, "options": {"max_fusion_size": fusion}})

    torch.compile = chosen
    if torch_cat:
        for module in ("leignn", "nequip", "geodite", "painn"):
            scope = vars(__import__(f"gossamer.models.{module}", fromlist=["x"]))
            scope.update(cat=lambda parts, dim: torch.cat(list(parts), dim), split=lambda x, sizes, dim: x.split(list(sizes), dim))
        for module in ("spherical", "products"):
            scope = vars(__import__(f"gossamer.nn.{module}", fromlist=["x"]))
            scope.update(cat=lambda parts, dim: torch.cat(list(parts), dim))
            if "split" in scope:
                scope.update(split=lambda x, sizes, dim: x.split(list(sizes), dim))
    from gossamer.config import make_config
    from gossamer.data.readers import read_structures

    values = yaml.safe_load((ROOT / "recipes" / f"rmd17-{name}.yaml").read_text())
    values["data"]["train"] = data
    config = make_config(values, [f"training.compile={str(fusion > 0).lower()}", "training.batch_size=10"])
    structures = list(read_structures(data))[:100]
    began = time.process_time()
    times, compiled = time_steps(config, structures, 14)
    if fusion and not compiled:
        raise SystemExit(f"{name}: compilation failed")
    how = f"fusion {fusion}" if fusion else "plain"
    print(
        f"{name:8s} {how:10s} {'cat of PyTorch' if torch_cat else 'cat of ours':16s} {1000 * np.median(times[3:]):7.1f} ms, first step after {times[0]:.0f} s of {time.process_time() - began:.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=["leignn", "nequip", "geodite", "painn", "schnet"])
    parser.add_argument("--fusion", nargs="+", type=int, default=[0, 8])
    parser.add_argument("--torch-cat", action="store_true")
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data" / "rmd17" / "rmd17_ethanol_train.extxyz.xz"))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        measure(arguments.names[0], arguments.fusion[0], arguments.torch_cat, arguments.data)
        return
    for name in arguments.names:
        for fusion in arguments.fusion:
            with tempfile.TemporaryDirectory() as cache:
                command = [
                    sys.executable,
                    __file__,
                    name,
                    "--fusion",
                    str(fusion),
                    "--data",
                    arguments.data,
                    "--here",
                    *(["--torch-cat"] if arguments.torch_cat else []),
                ]
                subprocess.run(command, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}, check=True)


if __name__ == "__main__":
    main()
