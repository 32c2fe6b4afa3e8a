"""Cost of LEIGNN beside schnetpack's PaiNN at equal width: parameters, training step, inference; alternating in one run.

    python benchmarks/cost/run.py --schnetpack /path/to/venv/bin/python

schnetpack lives in an environment of its own (schnetpack 2.1.1 over the dependencies of 2.0.4; torch 2.13.0). Both sides
run as their users run them: plain PyTorch (rows called compiled: our compiled program for inference, compiled step for training), float32, one thread,
conservative forces, neighbour list included for inference through each ASE calculator and excluded for training. The
two processes are asked in turn, several rounds, so that a busy machine slows both; CPU time of the process, median.
128 channels, 3 layers, 20 radial functions, cutoff 5 Å.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
HERE = Path(__file__).resolve().parent
WIDTH, LAYERS, BASIS, CUTOFF = 128, 3, 20, 5.0
# one ASE structure of each kind, made from nothing but ASE: a 9-atom molecule and 64 water molecules at 1 g/cm³
SYSTEMS = ("ethanol", "water192")


def structure(name: str, seed: int = 0):
    import numpy as np
    from ase import Atoms
    from ase.build import molecule

    if name == "ethanol":
        atoms = molecule("CH3CH2OH")
    else:
        rng, mol = np.random.default_rng(0), molecule("H2O")
        mol.positions -= mol.get_center_of_mass()
        a = (mol.get_masses().sum() / 0.602214076) ** (1 / 3)
        atoms = Atoms(cell=[4 * a] * 3, pbc=True)
        for index in np.ndindex(4, 4, 4):
            m = mol.copy()
            q, r = np.linalg.qr(rng.normal(size=(3, 3)))
            m.positions = m.positions @ (q * np.sign(np.diag(r))).T + (np.array(index) + 0.5) * a
            atoms += m
    atoms.rattle(0.02, seed=seed)
    return atoms


def ours(kind: str):
    """(number of parameters, {system: (inference, training step)})"""
    import torch

    from gossamer.data.statistics import Statistics
    from gossamer.data.structure import Structure
    from gossamer.models import MODELS
    from gossamer.potential import Potential
    from gossamer.simulation.calculator import Calculator
    from gossamer.training.config import TrainingConfig
    from gossamer.training.loop import train_step
    from gossamer.training.losses import LossConfig
    from gossamer.training.process_group import start_process_group
    from gossamer.training.state import make_state

    torch.set_num_threads(1)
    options = {
        "leignn": {"global_context": True},
        "leignn-sound": {},
        "direct": {"direct_forces": True, "global_context": True},
        "painn-update": {"update": "painn"},
        "painn": {},
    }
    base, compiled = kind.removesuffix("-compiled"), kind.endswith("-compiled")
    flags = options[base]
    config = MODELS["painn" if base == "painn" else "leignn"][0](
        num_features=WIDTH, num_layers=LAYERS, num_basis=BASIS, cutoff=CUTOFF, **flags
    )
    statistics = Statistics(elements=["H", "C", "O"], reference_energies={"H": 0, "C": 0, "O": 0}, mean_neighbors=30.0)

    def infer(name: str):
        atoms = structure(name)
        atoms.calc = Calculator(Potential(config, statistics), way="program" if compiled else "plain")
        start = atoms.positions.copy()
        import numpy as np

        rng = np.random.default_rng(0)

        def step() -> None:
            atoms.positions = start + 1e-3 * rng.standard_normal(start.shape)
            atoms.get_forces()

        return step

    def train(name: str):
        potential = Potential(config, statistics)
        frames = []
        for k in range(5 if name == "ethanol" else 2):
            atoms = structure(name, k)
            frames.append(Structure(atomic_numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc, energy=0.0,
                                    forces=0.1 * atoms.positions))  # fmt: skip
        training = TrainingConfig(compile=compiled)
        state, graph = make_state(potential, training, LossConfig()), potential.collate(frames)
        workers = start_process_group("cpu")
        return lambda: train_step(state, graph, LossConfig(), training, workers)

    return Potential(config, statistics).num_parameters, infer, train


def schnetpack():
    import typing

    import torch
    import torch.utils.data.dataloader as dataloader

    torch.set_num_threads(1)
    if not hasattr(dataloader, "T_co"):  # schnetpack 2.1.1 imports this name, which torch 2.13 no longer has
        dataloader.T_co = typing.TypeVar("T_co", covariant=True)
    import schnetpack as spk
    import schnetpack.transform as trn
    from schnetpack.interfaces import AtomsConverter

    def model():
        basis = spk.nn.GaussianRBF(n_rbf=BASIS, cutoff=CUTOFF)
        network = spk.representation.PaiNN(
            n_atom_basis=WIDTH, n_interactions=LAYERS, radial_basis=basis, cutoff_fn=spk.nn.CosineCutoff(CUTOFF)
        )
        return spk.model.NeuralNetworkPotential(
            representation=network, input_modules=[spk.atomistic.PairwiseDistances()],
            output_modules=[spk.atomistic.Atomwise(n_in=WIDTH, output_key="energy"), spk.atomistic.Forces(energy_key="energy", force_key="forces")],
        )  # fmt: skip

    converter = AtomsConverter(neighbor_list=trn.MatScipyNeighborList(cutoff=CUTOFF), dtype=torch.float32, device="cpu")

    def infer(name: str):
        import numpy as np

        atoms, network, rng = structure(name), model().eval(), np.random.default_rng(0)
        base = atoms.positions.copy()

        def step() -> None:
            atoms.positions = base + 1e-3 * rng.standard_normal(base.shape)
            network(converter(atoms))["forces"].detach().numpy()

        return step

    def train(name: str):
        network = model().train()
        frames = [structure(name, k) for k in range(5 if name == "ethanol" else 2)]
        batch = converter(frames)
        forces = torch.cat([torch.tensor(0.1 * f.positions, dtype=torch.float32) for f in frames])
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            out = network(dict(batch))
            (out["energy"].square().mean() + (out["forces"] - forces).square().mean()).backward()
            optimizer.step()

        return step

    return sum(p.numel() for p in model().parameters()), infer, train


def serve(kind: str) -> None:
    """Answer timing requests on standard input, one line each: milliseconds of CPU time per step."""
    parameters, infer, train = schnetpack() if kind == "schnetpack" else ours(kind)
    print(json.dumps({"parameters": parameters}), flush=True)
    steps: dict[tuple[str, str], object] = {}
    for line in sys.stdin:
        what, name, repeats = line.split()
        if (what, name) not in steps:
            steps[what, name] = (infer if what == "inference" else train)(name)
            for _ in range(3):
                steps[what, name]()
        began = time.process_time()
        for _ in range(int(repeats)):
            steps[what, name]()
        print(json.dumps((time.process_time() - began) / int(repeats) * 1000), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schnetpack", help="Python of an environment with schnetpack")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--kinds",
        nargs="+",
        default=["leignn-sound", "leignn", "painn-update", "direct", "painn", "leignn-sound-compiled", "painn-compiled"],
    )
    parser.add_argument("--only", choices=["inference", "training"], help="default: both")
    parser.add_argument("--name", default="results", help="of the files written here")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    questions = [arguments.only] if arguments.only else ["inference", "training"]
    pythons = dict.fromkeys(arguments.kinds, sys.executable) | ({"schnetpack": arguments.schnetpack} if arguments.schnetpack else {})
    servers = {}
    for kind, python in pythons.items():
        servers[kind] = subprocess.Popen(
            [python, "-W", "ignore", __file__, "--serve", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    parameters = {kind: json.loads(p.stdout.readline())["parameters"] for kind, p in servers.items()}
    times: dict[str, dict[str, list[float]]] = {kind: {} for kind in servers}
    for _ in range(arguments.rounds):
        for what in questions:
            for name in SYSTEMS:
                for kind, process in servers.items():
                    process.stdin.write(f"{what} {name} {12 if name == 'ethanol' else 2}\n")
                    process.stdin.flush()
                    times[kind].setdefault(f"{what} {name}", []).append(json.loads(process.stdout.readline()))
    for process in servers.values():
        process.stdin.close()
        process.wait()
    columns = [f"{what} {name}" for what in questions for name in SYSTEMS]
    medians = {k: {c: sorted(v[c])[len(v[c]) // 2] for c in columns if c in v} for k, v in times.items()}
    lines = ["| model | parameters | " + " | ".join(f"{c} ms" for c in columns) + " |", "|---|---|" + "---|" * len(columns)]
    for kind, row in medians.items():
        lines.append(f"| {kind} | {parameters[kind]:,} | " + " | ".join(f"{row[c]:.1f}" if c in row else "-" for c in columns) + " |")
    record = {"parameters": parameters, "cpu_ms_per_step": medians, "rounds": arguments.rounds, "date": datetime.date.today().isoformat()}
    (HERE / f"{arguments.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / f"{arguments.name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
