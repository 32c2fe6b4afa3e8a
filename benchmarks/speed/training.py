"""Training steps (energy and forces in the loss, optimiser included) of ours and of other packages on the same batches.

    python benchmarks/speed/training.py --python nequip=/path/to/venv/bin/python schnetpack=... [--only ROW ...]

Batches: 5 molecules of 21 atoms, 4 boxes of 192 atoms of water (structures.py), 5 Å, random labels, float32, one thread,
CPU time, median; the batch is made beforehand. Ours as trained by default: compiled. nequip eagerly (its default on
CPUs; `compile_mode="compile"` too, where it works).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
BATCHES = {"molecule21": (5, 9), "water192": (4, 5)}
"""structures of a batch, steps that are timed"""


def ours(model: dict[str, Any], compiled: bool) -> tuple[Callable[[str], Callable[[], Any]], int]:
    from peers import ELEMENTS
    from structures import structure

    from gossamer.config import make_config
    from gossamer.data.statistics import Statistics
    from gossamer.data.structure import Structure
    from gossamer.engine.memory import keep_freed_memory
    from gossamer.potential import Potential
    from gossamer.training.config import TrainingConfig
    from gossamer.training.loop import train_step
    from gossamer.training.losses import LossConfig
    from gossamer.training.process_group import start_process_group
    from gossamer.training.state import make_state

    keep_freed_memory()
    symbols = list(ELEMENTS.values())
    config = make_config({"data": {"train": "-"}, "model": model}).model

    def potential() -> Potential:
        return Potential(config, Statistics(elements=symbols, reference_energies=dict.fromkeys(symbols, 0.0), mean_neighbors=30.0))

    def prepare(name: str) -> Callable[[], Any]:
        frames = []
        for k in range(BATCHES[name][0]):
            a = structure(name, k)
            frames.append(
                Structure(
                    atomic_numbers=a.numbers, positions=a.positions, cell=a.cell.array, pbc=a.pbc, energy=0.0, forces=0.1 * a.positions
                )
            )
        one = potential()
        training = TrainingConfig(compile=compiled)
        state, graph, workers = make_state(one, training, LossConfig()), one.collate(frames), start_process_group("cpu")
        return lambda: train_step(state, graph, LossConfig(), training, workers)

    return prepare, potential().num_parameters


def nequip(preset: str, mode: str) -> tuple[Callable[[str], Callable[[], Any]], int]:
    import nequip_package as package
    import torch
    from nequip.data import AtomicDataDict, from_ase
    from nequip.integrations.utils import basic_transforms, handle_chemical_species_map
    from nequip.model import NequIPGNNModel
    from nequip.model.nequip_models import _NEQUIP_GNN_PRESETS, _NEQUIP_GNN_STANDARD_PRESET
    from nequip.utils.global_state import set_global_state
    from peers import ELEMENTS
    from structures import structure

    set_global_state(allow_tf32=False)
    names = list(ELEMENTS.values())
    settings = {**_NEQUIP_GNN_STANDARD_PRESET, **(package.OWN[preset] if preset in package.OWN else _NEQUIP_GNN_PRESETS[preset])}
    model = NequIPGNNModel(
        seed=1, model_dtype="float32", type_names=names, r_max=5.0, avg_num_neighbors=30.0, per_type_energy_scales=1.0,
        per_type_energy_shifts=dict.fromkeys(names, 0.0), compile_mode=mode, **settings,
    ).train()  # fmt: skip

    def prepare(name: str) -> Callable[[], Any]:
        steps = basic_transforms(model.metadata, 5.0, names, handle_chemical_species_map(None, names), neighborlist_backend="matscipy")
        frames, atoms = [], [structure(name, k) for k in range(BATCHES[name][0])]
        for a in atoms:
            data = from_ase(a)
            for step in steps:
                data = step(data)
            frames.append(data)
        batch = AtomicDataDict.batched_from_list(frames)
        forces = torch.cat([torch.tensor(0.1 * a.positions) for a in atoms])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

        def train() -> None:
            optimizer.zero_grad(set_to_none=True)
            out = model(dict(batch))
            energy, force = out[AtomicDataDict.TOTAL_ENERGY_KEY], out[AtomicDataDict.FORCE_KEY]
            (energy.square().mean() + (force - forces).square().mean()).backward()
            optimizer.step()

        return train

    return prepare, sum(p.numel() for p in model.parameters())


def schnetpack() -> tuple[Callable[[str], Callable[[], Any]], int]:
    import peers
    import torch
    from structures import structure

    calculator, parameters = peers.schnetpack("painn", 3)
    model, converter = calculator.model.train(), calculator.converter

    def prepare(name: str) -> Callable[[], Any]:
        atoms = [structure(name, k) for k in range(BATCHES[name][0])]
        batch = converter(atoms)
        forces = torch.cat([torch.tensor(0.1 * a.positions, dtype=torch.float32) for a in atoms])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def train() -> None:
            optimizer.zero_grad(set_to_none=True)
            out = model(dict(batch))
            (out["energy"].square().mean() + (out["forces"] - forces).square().mean()).backward()
            optimizer.step()

        return train

    return prepare, parameters


SAME = {"name": "nequip", "variant": "published", "embedding_features": 32, "radial_depth": 1, "radial_width": 128}
WIDE = {"num_features": 128, "num_layers": 3, "num_basis": 20}
ROWS: dict[str, tuple[str, Callable[[], Any]]] = {
    **{
        f"{label}{suffix}": ("ours", lambda m=model, c=compiled: ours(m, c))
        for label, model in {
            "nequip l2 32, both parities, 4 layers": {**SAME, "num_layers": 4, "l_max": 2, "num_features": 32, "parity": True},
            "nequip M": {"name": "nequip", "preset": "M"}, "nequip (default)": {"name": "nequip"},
            "leignn (default)": {"name": "leignn"}, "leignn 128": {"name": "leignn", **WIDE}, "painn 128": {"name": "painn", **WIDE},
            "geodite (default)": {"name": "geodite"},
        }.items()
        for suffix, compiled in {"": False, ", compiled": True}.items()
    },
    "package nequip l2 32, both parities, 4 layers": ("nequip", lambda: nequip("l2", "eager")),
    "package nequip l2 32, both parities, 4 layers, compiled": ("nequip", lambda: nequip("l2", "compile")),
    "package nequip M": ("nequip", lambda: nequip("M", "eager")),
    "package schnetpack painn 128": ("schnetpack", schnetpack),
}  # fmt: skip


def measure(name: str, batches: list[str]) -> None:
    import resource

    import torch

    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    prepare, parameters = ROWS[name][1]()
    found, memory = {}, {}
    for which in batches:
        step = prepare(which)
        for _ in range(2):
            step()
        times = []
        for _ in range(BATCHES[which][1]):
            began = time.process_time()
            step()
            times.append(1000 * (time.process_time() - began))
        found[which] = sorted(times)[len(times) // 2]
        memory[which] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"ms": found, "peak_MB": memory, "parameters": parameters}), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[], metavar="PACKAGE=PYTHON")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--batches", nargs="+", default=[*BATCHES], choices=[*BATCHES])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.batches)
        return
    pythons = {"ours": sys.executable, **dict(text.split("=", 1) for text in arguments.python)}
    target = HERE / "training.json"
    record = json.loads(target.read_text()) if target.exists() else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for name, (package, _) in ROWS.items():
        if package not in pythons or (arguments.only and name not in arguments.only):
            continue
        command = [pythons[package], __file__, "--measure", name, "--batches", *arguments.batches]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
        if not lines:
            print(f"{name}: failed: {result.stderr.strip().splitlines()[-1:]}", flush=True)
            continue
        record[name] = {**json.loads(lines[-1]), "date": datetime.date.today().isoformat()}
        target.write_text(json.dumps(record, indent=1) + "\n")
        print(name, record[name], flush=True)
    head = (
        "| model | parameters | "
        + " | ".join(f"{n} x {BATCHES[n][0]}, ms | peak MB" for n in BATCHES)
        + " |\n"
        + "|---" * (2 + 2 * len(BATCHES))
        + "|\n"
    )
    lines = []
    for name in ROWS:
        if name in record:
            cells = [f"{record[name]['ms'].get(n, float('nan')):.3g} | {record[name]['peak_MB'].get(n, float('nan')):.0f}" for n in BATCHES]
            lines.append(f"| {name} | {record[name]['parameters']:,} | {' | '.join(cells)} |")
    target.with_suffix(".md").write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
