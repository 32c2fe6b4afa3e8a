"""Our networks on a GPU: each way of running them against the plain one, time, memory and deviation, and training steps.

    python benchmarks/speed/gpu.py [--device cuda] [--waters 4 8 15] [--only leignn nequip ...] [--out gpu.md]

Water boxes of n³ molecules and a 21-atom molecule (structures.py), random weights, float32, energy and forces through the
ASE calculator with slightly moved atoms: what a step of dynamics costs, neighbour list included. The default sizes of
each network, NequIP's MP-L, and Geodite at its published size (192 channels, 4 layers, 6 Å).
"""

from __future__ import annotations

import argparse
import datetime
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from structures import structure, water  # noqa: E402

from gossamer.config import make_config  # noqa: E402
from gossamer.data.statistics import Statistics  # noqa: E402
from gossamer.potential import Potential  # noqa: E402
from gossamer.simulation.calculator import Calculator  # noqa: E402
from gossamer.timing import fastest  # noqa: E402

MODELS: dict[str, dict[str, Any]] = {
    "leignn": {"name": "leignn"},
    "nequip": {"name": "nequip"},
    "nequip-MP-L": {"name": "nequip", "preset": "MP-L"},
    "geodite": {"name": "geodite"},
    "geodite-published": {"name": "geodite", "num_features": 192, "num_layers": 4, "cutoff": 6.0},
    "painn": {"name": "painn"},
}
MODES: dict[str, dict[str, Any]] = {
    "plain": {"way": "plain"},
    "kernels": {"way": "auto"},
    "program": {"way": "program"},
    "CUDA graph": {"way": "graph"},
}
ELEMENTS = ["H", "C", "O"]


def potential(model: dict[str, Any], device: str) -> Potential:
    config = make_config({"data": {"train": "-"}, "model": model}).model
    made = Potential(config, Statistics(elements=ELEMENTS, reference_energies=dict.fromkeys(ELEMENTS, 0.0), mean_neighbors=50.0))
    return made.to(device)


def run(model: dict[str, Any], options: dict[str, Any], atoms: Any, device: str) -> tuple[float, Any, str, float]:
    """ms of a step, forces, what ran, and MB on the GPU."""
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    calculator = Calculator(potential(model, device), **options)
    atoms = atoms.copy()
    atoms.calc = calculator
    forces = atoms.get_forces()
    rng, start = np.random.default_rng(0), atoms.positions.copy()

    def step() -> None:
        atoms.positions = start + 1e-3 * rng.normal(size=start.shape)
        atoms.get_forces()

    step()
    ran = calculator.engine.way
    return 1000 * fastest(step, 10, 10.0), forces, ran, torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else 0.0


def training_step(model: dict[str, Any], kernels: bool, compiled: bool, batch: list[Any], device: str) -> tuple[float, float]:
    """ms of a training step, and MB."""
    from gossamer.data.structure import Structure
    from gossamer.training.loop import LossConfig, TrainingConfig, make_state, train_step
    from gossamer.training.process_group import start_process_group

    frames = [
        Structure(atomic_numbers=a.numbers, positions=a.positions, cell=a.cell.array, pbc=a.pbc, energy=0.0, forces=0.1 * a.positions)
        for a in batch
    ]
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.empty_cache()
    one, training = potential(model, device), TrainingConfig(compile=compiled, kernels=kernels, device=device)
    state, graph, workers = make_state(one, training, LossConfig()), one.collate(frames), start_process_group(device)
    one_step: Callable[[], Any] = lambda: train_step(state, graph, LossConfig(), training, workers)  # noqa: E731
    one_step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return 1000 * fastest(one_step, 8, 10.0), torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--waters", type=int, nargs="+", default=[4, 8, 15], help="molecules along an edge of the box")
    parser.add_argument("--only", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--modes", nargs="+", choices=[*MODES], default=[*MODES])
    parser.add_argument("--out", type=Path, default=HERE / "gpu.md")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = arguments.device
    on = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [f"{on}, torch {torch.__version__}, {datetime.date.today().isoformat()}; float32.", ""]
    lines += [
        "| network | parameters | atoms | asked for, what ran | ms a step | µs/atom | MB | largest deviation of a force / RMS |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def keep(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        arguments.out.write_text("\n".join(lines) + "\n")

    for name in arguments.only:
        count = potential(MODELS[name], "cpu").num_parameters
        for atoms in [structure("molecule21"), *(water(n) for n in arguments.waters)]:
            wanted = None
            for mode in arguments.modes:
                if mode == "CUDA graph" and device != "cuda":
                    continue
                try:
                    ms, forces, ran, memory = run(MODELS[name], MODES[mode], atoms, device)
                except RuntimeError as error:  # out of memory
                    keep(f"| {name} | {count:,} | {len(atoms):,} | {mode}: {str(error).splitlines()[0][:80]} | | | | |")
                    continue
                wanted = forces if wanted is None else wanted
                deviation = np.abs(forces - wanted).max() / np.sqrt((wanted**2).mean())
                row = [
                    name,
                    f"{count:,}",
                    f"{len(atoms):,}",
                    f"{mode}, {ran}",
                    f"{ms:.3g}",
                    f"{1000 * ms / len(atoms):.3g}",
                    f"{memory:.0f}",
                ]
                keep("| " + " | ".join([*row, f"{deviation:.0e}"]) + " |")
    keep("\n| training step | batch | plain ms, MB | kernels | compiled | both |\n|---|---|---|---|---|---|")
    for name in arguments.only:
        for label, batch in (
            ("32 x 21 atoms", [structure("molecule21", k) for k in range(32)]),
            ("8 x 192 atoms of water", [structure("water192", k) for k in range(8)]),
        ):
            cells = []
            for kernels, compiled in ((False, False), (True, False), (False, True), (True, True)):
                try:
                    ms, memory = training_step(MODELS[name], kernels, compiled, batch, device)
                    cells.append(f"{ms:.3g}, {memory:.0f}")
                except RuntimeError as error:
                    cells.append(str(error).splitlines()[0][:60])
            keep("| " + " | ".join([name, label, *cells]) + " |")


if __name__ == "__main__":
    main()
