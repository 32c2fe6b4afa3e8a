"""Uncertainty from one run beside a committee of five, inside and outside the training data.

    python benchmarks/reliability/uncertainty.py TRAIN.extxyz 600K=TEST.extxyz ... --out FOLDER

Five potentials are trained on the same frames from different seeds (finished runs in FOLDER are kept). Three numbers for each force are
compared with its error: the distance of last features of the first potential; the spread of the five; and, with --llpr, the force
variance of a last layer drawn from its posterior (Bigi et al., arXiv:2403.02251), by one gradient per feature. All are scaled for each element
on the validation frames. One line of JSON per test file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer import train
from gossamer.calibration import honesty, measure_uncertainty
from gossamer.config import load_config, make_config
from gossamer.data.dataset import load_data, open_dataset
from gossamer.data.structure import Structure
from gossamer.potential import Potential
from gossamer.potential_file import load

Values = tuple[np.ndarray, np.ndarray]
"""of each energy (eV), of each force (eV/Å)"""


def members(arguments: argparse.Namespace) -> list[Path]:
    """Folders of the trained potentials."""
    folders = []
    for seed in range(arguments.members):
        folder = Path(arguments.out) / f"seed-{seed}"
        if not (folder / "results.json").exists():
            config = {
                "data": {"train": arguments.train, "valid_size": arguments.valid, "train_size": arguments.train_size},
                "model": {"name": arguments.model, **json.loads(arguments.settings)},
                "loss": {"energy": 1.0, "forces": 10.0},
                "training": {"steps": arguments.steps, "batch_size": arguments.batch, "learning_rate": arguments.rate, "seed": seed},
                "out": str(folder),
            }
            train(make_config(config), resume=True, progress=False)
        folders.append(folder)
    return folders


def errors(frames: Sequence[Structure], energies: Sequence[float], forces: Sequence[np.ndarray]) -> Values:
    """Of each energy, and of each force the root mean square of its components."""
    off = [np.sqrt(((f - s.forces) ** 2).mean(axis=1)) for f, s in zip(forces, frames, strict=True)]
    return np.abs([e - s.energy for e, s in zip(energies, frames, strict=True)]), np.concatenate(off)


def spread(answers: Sequence[Sequence[dict[str, Any]]]) -> tuple[list[float], list[np.ndarray], Values]:
    """Mean energies and forces of a committee, and standard deviations."""
    energies = np.array([[a["energy"] for a in member] for member in answers])
    forces = [np.stack([member[k]["forces"] for member in answers]) for k in range(len(answers[0]))]
    sigma = np.concatenate([np.sqrt(f.var(axis=0, ddof=1).mean(axis=1)) for f in forces])
    return energies.mean(axis=0).tolist(), [f.mean(axis=0) for f in forces], (energies.std(axis=0, ddof=1), sigma)


def slopes(potential: Potential, frame: Structure) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the last features (M,), and minus its gradient by positions (n_atoms, 3, M)."""
    graph = potential.collate([frame])
    vectors = graph.edge_vectors().detach().requires_grad_()
    *_, features = potential._node_energies(graph, (vectors,), None)
    columns = [torch.autograd.grad(features[:, k].sum(), vectors, retain_graph=True)[0] for k in range(features.shape[1])]
    lone = potential.network(*_lone(potential)).features[potential.species_of[graph.atomic_numbers]]
    gradient = torch.stack([potential._forces(graph, (c,)) for c in columns], dim=2)
    return (features - lone).sum(dim=0).detach().double().numpy(), gradient.double().numpy()


def _lone(potential: Potential) -> tuple[Any, ...]:
    n = len(potential.table)
    return torch.arange(n), potential.table.new_zeros((2, 0)), torch.zeros((0, 3), dtype=potential.dtype), torch.arange(n), n


def posterior(potential: Potential, frames: Sequence[Structure]) -> Callable[[Sequence[Structure]], Values]:
    """Energies' and forces' standard deviations, up to a factor, of a last layer that has seen the labels of these frames."""
    moment: Any = 0.0
    for frame in frames:
        total, gradient = slopes(potential, frame)
        moment = moment + np.outer(total, total) / frame.n_atoms + 10 * np.einsum("nxm,nxk->mk", gradient, gradient)
    inverse = np.linalg.inv(moment + 1e-6 * np.trace(moment) / len(moment) * np.eye(len(moment)))

    def sigma(frames: Sequence[Structure]) -> Values:
        found = [slopes(potential, f) for f in frames]
        return (
            np.array([np.sqrt(t @ inverse @ t) for t, _ in found]),
            np.concatenate([np.sqrt(np.einsum("nxm,mk,nxk->n", g, inverse, g) / 3) for _, g in found]),
        )

    return sigma


def scaled(sigma: Values, scale: tuple[float, dict[int, float]], numbers: np.ndarray) -> Values:
    """Uncertainties in units of measured errors."""
    return scale[0] * sigma[0], np.array([scale[1][z] for z in numbers.tolist()]) * sigma[1]


def scale_of(error: Values, sigma: Values, numbers: np.ndarray) -> tuple[float, dict[int, float]]:
    """Root mean square errors over root mean square uncertainties, of forces for each element."""

    def ratio(e: np.ndarray, s: np.ndarray) -> float:
        return float(np.sqrt((e**2).mean() / (s**2).mean()))

    return ratio(error[0], sigma[0]), {z: ratio(error[1][numbers == z], sigma[1][numbers == z]) for z in np.unique(numbers).tolist()}


def row(error: Values, sigma: Values) -> dict[str, Any]:
    """What an uncertainty is worth."""
    (energy, forces) = (honesty(e, s) for e, s in zip(error, sigma, strict=True))
    return {
        "forces_rank": forces["rank"], "forces_ratio": forces["ratio"], "energy_rank": energy["rank"], "energy_ratio": energy["ratio"],
        "curve_meV_per_A": [[round(1000 * x, 1) for x in pair] for pair in forces["curve"]],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("tests", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", default="leignn")
    parser.add_argument("--settings", default='{"num_layers": 2}', help="of the network, JSON")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--valid", type=int, default=100)
    parser.add_argument("--train-size", type=int)
    parser.add_argument("--llpr", type=int, default=0, metavar="FRAMES", help="frames of each file for the exact last-layer posterior")
    arguments = parser.parse_args()
    folders = members(arguments)
    potentials = [load(f / "potential.safetensors") for f in folders]
    config = load_config(folders[0] / "config.yaml")
    training, valid, _ = load_data(config.data, config.model.cutoff)
    one = potentials[0]
    began = time.process_time()
    measure_uncertainty(one, training, valid)
    print(json.dumps({"measured_seconds": round(time.process_time() - began, 2)}), flush=True)
    exact = posterior(one, [training[k] for k in range(arguments.llpr)]) if arguments.llpr else None
    scales: dict[str, Any] = {}
    for name, frames in [
        ("validation", list(valid)),
        *((n, list(open_dataset(f))) for n, _, f in (t.partition("=") for t in arguments.tests)),
    ]:
        answers = [p.predict(frames, uncertainty=p is one) for p in potentials]
        own = errors(frames, [a["energy"] for a in answers[0]], [a["forces"] for a in answers[0]])
        numbers = np.concatenate([s.atomic_numbers for s in frames])
        energies, forces, sigma = spread(answers)
        mean = errors(frames, energies, forces)
        distance = np.array([a["energy_uncertainty"] for a in answers[0]]), np.concatenate([a["forces_uncertainty"] for a in answers[0]])
        cases = {"features": (own, distance, numbers), "committee": (mean, sigma, numbers)}
        if exact is not None:
            few = frames[: arguments.llpr]
            n = sum(s.n_atoms for s in few)
            cases["llpr"] = (own[0][: len(few)], own[1][:n]), exact(few), numbers[:n]
        result: dict[str, Any] = {"test": name, "n_frames": len(frames)}
        for kind, (error, uncertain, z) in cases.items():
            if name == "validation":
                scales[kind] = scale_of(error, uncertain, z)
            result[kind] = {"forces_rmse_meV_per_A": round(1000 * float(np.sqrt((error[1] ** 2).mean())), 1),
                            **row(error, scaled(uncertain, scales[kind], z))}  # fmt: skip
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
