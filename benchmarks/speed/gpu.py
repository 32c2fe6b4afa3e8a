"""Our networks on a GPU: each way of running them against the plain one, time, memory and deviation, and training steps.

    python benchmarks/speed/gpu.py [--waters 4 8 15] [--only leignn nequip ...] [--modes plain kernels ...] [--seconds 300] [--out gpu.md]

Water boxes of n³ molecules and a 21-atom molecule (structures.py), random weights, float32, energy and forces through the
ASE calculator with slightly moved atoms: what a step of dynamics costs, neighbour list included. The default sizes of
each network, NequIP's MP-L, Geodite at its published size (192 channels, 4 layers, 6 Å), MACE-MP-0's and SevenNet-0's sizes.

What takes long comes last, and nothing is begun after ``--seconds``: programs at the smallest and the largest box, and compiled training
steps, of LEIGNN and NequIP alone. What does not fit into memory is a row that says so; plain ways of large networks are not tried
where they do not (LARGEST_PLAIN).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import logging
import sys
import time
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
    "mace-MP-small": {"name": "mace", "preset": "MP-small"},
    "mace-MP-medium": {"name": "mace", "preset": "MP-medium"},
    "sevennet-0": {"name": "sevennet", "preset": "0", "variant": "published"},
    "weft": {"name": "weft"},
    "leignn, limits": {"name": "leignn", "limits": True},
}
MODES: dict[str, Any] = {"plain": "plain", "kernels": "kernels", "CUDA graph": "graph", "program": "program"}
TRAINING: dict[str, dict[str, bool]] = {
    "plain": {"kernels": False, "cuda_graphs": False},
    "kernels": {"kernels": True, "cuda_graphs": False},
    "CUDA graphs": {"kernels": True, "cuda_graphs": True},
}
LARGEST_PLAIN = {"nequip-MP-L": 4000, "geodite-published": 4000, "mace-MP-small": 4000, "mace-MP-medium": 4000, "sevennet-0": 4000}
"""atoms beyond which 140 GB do not suffice"""
ELEMENTS = ["H", "C", "O"]
COMPILED = ("leignn", "nequip")
"""networks of which programs and compiled training steps are made"""


def potential(model: dict[str, Any], device: str) -> Potential:
    config = make_config({"data": {"train": "-"}, "model": {k: v for k, v in model.items() if k != "limits"}}).model
    limits: dict[str, Any] = {}
    if model.get("limits"):  # as every trained potential knows them
        pairs = itertools.combinations_with_replacement(sorted(ELEMENTS), 2)
        limits = {"shortest_distances": {f"{a}-{b}": 0.8 for a, b in pairs}, "fewest_neighbors": dict.fromkeys(ELEMENTS, 4.0)}
    made = Potential(config, Statistics(elements=ELEMENTS, reference_energies=dict.fromkeys(ELEMENTS, 0.0), mean_neighbors=50.0, **limits))
    return made.to(device)


def step_of(calculator: Calculator, atoms: Any, device: str) -> tuple[float, Any, float]:
    """ms of a step, forces of the structure itself, and MB on the GPU."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    atoms = atoms.copy()
    atoms.calc = calculator
    rng, start = np.random.default_rng(0), atoms.positions.copy()

    def step() -> None:
        atoms.positions = start + 1e-3 * rng.normal(size=start.shape)
        atoms.get_forces()

    for _ in range(3):
        step()
    ms = 1000 * fastest(step, 10, 3.0)
    atoms.positions = start
    return ms, atoms.get_forces(), torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else 0.0


def training_step(model: dict[str, Any], ways: dict[str, bool], batch: list[Any], device: str) -> tuple[float, float, str]:
    """ms of a training step, MB, and what was recorded."""
    from gossamer.data.structure import Structure
    from gossamer.training.config import TrainingConfig
    from gossamer.training.loop import train_step
    from gossamer.training.losses import LossConfig
    from gossamer.training.process_group import start_process_group
    from gossamer.training.state import make_state

    frames = [
        Structure(atomic_numbers=a.numbers, positions=a.positions, cell=a.cell.array, pbc=a.pbc, energy=0.0, forces=0.1 * a.positions)
        for a in batch
    ]
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.empty_cache()
    one, training = potential(model, device), TrainingConfig(**ways, device=device)
    state, graph, workers = make_state(one, training, LossConfig()), one.collate(frames), start_process_group(device)
    one_step: Callable[[], Any] = lambda: train_step(state, graph, LossConfig(), training, workers)  # noqa: E731
    for _ in range(3):  # the second and the third are recorded
        one_step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ms = 1000 * fastest(one_step, 10, 3.0)
    recorded = [name for name in ("differentiate", "update") if getattr(getattr(state, name), "on", False)]
    return ms, torch.cuda.max_memory_reserved() / 1e6 if device == "cuda" else 0.0, " and ".join(recorded)


class Table:
    """Rows that are printed and kept as they come."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, []

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)
        self.path.write_text("\n".join(self.lines) + "\n")


def inference(name: str, modes: list[str], waters: list[int], device: str, keep: Table, plain: dict[tuple[str, int], Any]) -> None:
    """Rows of one network; a calculator serves all sizes. ``plain``: forces to compare with."""
    for mode in modes:
        try:
            torch.manual_seed(0)
            calculator = Calculator(potential(MODELS[name], device), way=MODES[mode])
        except RuntimeError as error:
            keep(f"| {name} | | {mode}: {str(error).splitlines()[0][:80]} | | | | |")
            continue
        for atoms in [structure("molecule21"), *(water(n) for n in waters)]:
            if mode == "plain" and len(atoms) > LARGEST_PLAIN.get(name, len(atoms)):
                continue
            try:
                ms, forces, memory = step_of(calculator, atoms, device)
            except RuntimeError as error:  # out of memory
                keep(f"| {name} | {len(atoms):,} | {mode}: {str(error).splitlines()[0][:80]} | | | | |")
                continue
            wanted = plain.setdefault((name, len(atoms)), forces) if mode == modes[0] else plain.get((name, len(atoms)))
            deviation = "" if wanted is None else f"{np.abs(forces - wanted).max() / np.sqrt((wanted**2).mean()):.0e}"
            row = [name, f"{len(atoms):,}", mode, f"{ms:.3g}", f"{1000 * ms / len(atoms):.3g}", f"{memory:.0f}", deviation]
            keep("| " + " | ".join(row) + " |")
        del calculator


def training(name: str, compiled: bool, device: str, keep: Table) -> None:
    """Rows of one network's training steps."""
    for label, batch in (
        ("32 x 21 atoms", [structure("molecule21", k) for k in range(32)]),
        ("8 x 192 atoms of water", [structure("water192", k) for k in range(8)]),
    ):
        for how, ways in TRAINING.items():
            ways = {**ways, "compile": compiled}
            try:
                ms, memory, recorded = training_step(MODELS[name], ways, batch, device)
                keep(f"| {name} | {label} | {how}{', compiled' if compiled else ''} | {ms:.3g} | {memory:.0f} | {recorded} |")
            except RuntimeError as error:
                keep(f"| {name} | {label} | {how}: {str(error).splitlines()[0][:60]} | | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--waters", type=int, nargs="+", default=[4, 8, 15], help="molecules along an edge of the box")
    parser.add_argument("--only", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--modes", nargs="+", choices=[*MODES], default=[*MODES])
    parser.add_argument("--training-only", action="store_true", help="no evaluations, no compiled steps")
    parser.add_argument("--seconds", type=float, default=300.0, help="nothing is begun later")
    parser.add_argument("--out", type=Path, default=HERE / "gpu.md")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device, keep, began = arguments.device, Table(arguments.out), time.perf_counter()
    on = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    keep(f"{on}, torch {torch.__version__}, {datetime.date.today().isoformat()}; float32.\n")
    for name in arguments.only:
        keep(f"{name}: {potential(MODELS[name], 'cpu').num_parameters:,} parameters  ")
    quick = [m for m in arguments.modes if m != "program" and (m != "CUDA graph" or device == "cuda")]
    compiled = [name for name in COMPILED if name in arguments.only]
    head = "\n| network | atoms | way | ms a step | µs/atom | MB | largest deviation of a force / RMS |\n|---|---|---|---|---|---|---|"
    training_head = "\n| network | batch | training step | ms | MB reserved | recorded |\n|---|---|---|---|---|---|"
    plain: dict[tuple[str, int], Any] = {}
    ends = sorted({min(arguments.waters), max(arguments.waters)})
    parts: list[tuple[str, Callable[[], None]]] = [
        *((head, lambda n=n: inference(n, quick, arguments.waters, device, keep, plain)) for n in arguments.only),
        *((training_head, lambda n=n: training(n, False, device, keep)) for n in arguments.only),
        *((head, lambda n=n: inference(n, ["program"], ends, device, keep, plain)) for n in compiled if "program" in arguments.modes),
        *((training_head, lambda n=n: training(n, True, device, keep)) for n in compiled),
    ]
    if arguments.training_only:
        parts = [(training_head, lambda n=n: training(n, False, device, keep)) for n in arguments.only]
    shown = ""
    for title, part in parts:
        if time.perf_counter() - began > arguments.seconds:
            keep(f"\nNot all was done in {arguments.seconds:.0f} s.")
            break
        if title != shown:
            keep(title)
            shown = title
        part()


if __name__ == "__main__":
    main()
