"""Where a local network must fail: an ion pair without a chain of neighbours between its ions, and a gas of point charges.

    pip install 'gossamer[labels]'
    python benchmarks/accuracy/long_range.py --out runs/long_range           # minutes; prints the table

Ion pairs: methylammonium and tetrafluoroborate (13 atoms, no net charge), each relaxed, its atoms moved by 0.03 Å, turned at random, 4 to 15 Å
between the centres of mass, labelled by GFN2-xTB (tblite). Pairs nearer than 12 Å are learned, and tested at 6 to 12 Å (unseen) and at 12 to
15 Å. (Formate in the place of tetrafluoroborate loses 0.05 to 0.11 e to the cation beyond 9 Å in GFN2-xTB: an error of that method.)
Point charges: 32 of +1 e and 32 of -1 e at random in a periodic box of 16 Å, no two nearer than 2 Å, labelled by Ewald's sum, as in the first
test of Cheng, npj Comput. Mater. (2025), arXiv:2408.15165.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.optimize import BFGS
from scipy.spatial.transform import Rotation

from gossamer import Calculator, evaluate, load, train
from gossamer.files import write_json
from gossamer.machine import versions
from gossamer.nn.electrostatics import coulomb_energies

NETWORKS = ("leignn", "nequip", "geodite")


def labelled(atoms: Atoms, energy: float, forces: np.ndarray) -> Atoms:
    atoms = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms


# --- data ---------------------------------------------------------------------------------------------------------


def ions() -> tuple[Atoms, Atoms]:
    """Methylammonium and tetrafluoroborate, relaxed with charges of +1 and -1."""
    from tblite.ase import TBLite

    cation = molecule("H3CNH2")
    nitrogen = list(cation.symbols).index("N")
    bonded = cation.positions[np.argsort(cation.get_all_distances()[nitrogen])[1:4]]
    away = cation.positions[nitrogen] - bonded.mean(axis=0)
    cation += Atoms("H", [cation.positions[nitrogen] + away / np.linalg.norm(away)])
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 3**0.5
    anion = Atoms("BF4", np.vstack([np.zeros((1, 3)), 1.4 * corners]))
    for atoms, charge in ((cation, 1), (anion, -1)):
        atoms.calc = TBLite(method="GFN2-xTB", charge=charge, verbosity=0)
        BFGS(atoms, logfile=None).run(fmax=0.01, steps=200)
        atoms.calc = None
        atoms.positions -= atoms.get_center_of_mass()
    return cation, anion


def ion_pairs(n: int, nearest: float, farthest: float, seed: int) -> list[Atoms]:
    """Pairs at evenly drawn distances (Å) between centres of mass."""
    from tblite.ase import TBLite

    rng, monomers, frames = np.random.default_rng(seed), ions(), []
    while len(frames) < n:
        parts = []
        for atoms in monomers:
            moved = atoms.copy()
            moved.positions = Rotation.random(rng=rng).apply(atoms.positions + rng.normal(scale=0.03, size=atoms.positions.shape))
            parts.append(moved)
        distance = rng.uniform(nearest, farthest)
        parts[1].positions[:, 0] += distance
        pair = parts[0] + parts[1]
        if pair.get_all_distances()[: len(parts[0]), len(parts[0]) :].min() < 2.2:
            continue
        pair.calc = TBLite(method="GFN2-xTB", charge=0, multiplicity=1, accuracy=0.1, verbosity=0)
        frames.append(labelled(pair, pair.get_potential_energy(), pair.get_forces()))
        frames[-1].info["distance"] = distance
    return frames


def point_charges(n: int, seed: int, n_pairs: int = 32, edge: float = 16.0) -> list[Atoms]:
    """Boxes of charges of +1 e (Na) and -1 e (Cl)."""
    rng, frames = np.random.default_rng(seed), []
    while len(frames) < n:
        atoms = Atoms("Na" * n_pairs + "Cl" * n_pairs, cell=[edge] * 3, pbc=True)
        for k in range(2 * n_pairs):
            while True:
                atoms.positions[k] = rng.uniform(0, edge, size=3)
                if k == 0 or atoms.get_distances(k, list(range(k)), mic=True).min() > 2.0:
                    break
        charges = torch.tensor([1.0] * n_pairs + [-1.0] * n_pairs, dtype=torch.float64)
        positions = torch.tensor(atoms.positions, requires_grad=True)
        everywhere, one = torch.ones(1, 3, dtype=torch.bool), torch.zeros(len(atoms), dtype=torch.int64)
        energy = coulomb_energies(charges, positions, torch.tensor(atoms.cell.array)[None], everywhere, one, smearing=0.0).sum()
        (slope,) = torch.autograd.grad(energy, positions)
        frames.append(labelled(atoms, float(energy.detach()), -slope.numpy()))
    return frames


def make(out: Path) -> None:
    """All files that are not there yet."""
    makers = {
        "pairs_train": lambda: ion_pairs(300, 4.0, 12.0, 0), "pairs_near": lambda: ion_pairs(60, 6.0, 12.0, 1), "pairs_far": lambda: ion_pairs(60, 12.0, 15.0, 2),
        "gas_train": lambda: point_charges(100, 0), "gas_test": lambda: point_charges(20, 1),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for name, maker in makers.items():
        if not (out / f"{name}.extxyz").exists():
            ase.io.write(out / f"{name}.extxyz", maker())


# --- training -----------------------------------------------------------------------------------------------------


def run(out: Path, case: str, network: str, long_range: bool, steps: int) -> dict[str, Any]:
    """Train, and the errors on the test files."""
    folder = out / f"{case}-{network}-{'charges' if long_range else 'local'}"
    config = {
        "data": {"train": str(out / f"{case}_train.extxyz"), **({"reference_energies": {"Na": 0.0, "Cl": 0.0}} if case == "gas" else {})},
        "model": {"name": network},
        # a point charge has no wall, and lone ions are what the gas is about
        "potential": {"long_range": "latent_charges" if long_range else None, "zbl": case != "gas"},
        "loss": {"energy": 5.0, "forces": 10.0},
        "training": {"steps": steps, "batch_size": 8 if case == "pairs" else 1, "valid_every": max(1, steps // 4),
                     "learning_rate": {"nequip": 4e-2}.get(network, 5e-3)},
        "out": str(folder),
    }  # fmt: skip
    if not (folder / "results.json").exists():
        train(config, resume=True, progress=False)
    model = folder / "potential.safetensors"
    row: dict[str, Any] = {"case": case, "network": network, "long_range": long_range, "steps": steps}
    tests = ("pairs_near", "pairs_far") if case == "pairs" else ("gas_test",)
    for name in tests:
        errors = evaluate(model, out / f"{name}.extxyz", include_training=True).summary()
        row[name] = {k: errors[k] for k in ("energy_mae_meV_per_atom", "forces_mae_meV_per_A")}
    if long_range:
        calculator = Calculator(load(model), way="plain")
        charges = [calculator.get_charges(a) for a in ase.io.read(out / f"{tests[-1]}.extxyz", ":")]
        # of the cation, or of each positive ion
        row["charge"] = float(np.abs(np.mean([q[:8].sum() for q in charges] if case == "pairs" else [q[:32].mean() for q in charges])))
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Errors in meV/atom and meV/Å."""
    lines = [
        "| | charges | pairs, 6-12 Å | pairs, 12-15 Å | charge of the cation, e | gas | charge of an ion, e |",
        "|---|---|---|---|---|---|---|",
    ]
    for network in dict.fromkeys(r["network"] for r in rows):
        for long_range in (False, True):
            found = {r["case"]: r for r in rows if r["network"] == network and r["long_range"] == long_range}
            cells = []
            for case, name in (("pairs", "pairs_near"), ("pairs", "pairs_far"), ("gas", "gas_test")):
                e = found.get(case, {}).get(name)
                cells.append("" if e is None else f"{e['energy_mae_meV_per_atom']:.3g} / {e['forces_mae_meV_per_A']:.3g}")
            q = [f"{found[c]['charge']:.3f}" if "charge" in found.get(c, {}) else "" for c in ("pairs", "gas")]
            lines.append(f"| {network} | {'latent' if long_range else 'none'} | {cells[0]} | {cells[1]} | {q[0]} | {cells[2]} | {q[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/long_range"))
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--cases", nargs="+", default=["pairs", "gas"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    make(arguments.out)
    rows = [
        run(arguments.out, case, network, long_range, arguments.steps)
        for case in arguments.cases for network in arguments.networks for long_range in (False, True)
    ]  # fmt: skip
    if arguments.json:
        write_json(arguments.json, {"versions": versions(), "rows": rows})
    print(table(rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
