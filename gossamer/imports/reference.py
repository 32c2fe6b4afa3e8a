"""Runs in the environment of ANOTHER package, given to its Python on standard input: what does that package say of these structures?

    python - request.npz answer.npz < reference.py

It needs numpy, ASE and the package, and nothing of gossamer. The package loads the file as it always does; where that means unpickling,
whatever is in the file is run here, in the user's own environment and on the user's request.

For each source a function (what, precision) -> ASE calculator: ``what`` has the path, modal and head; precision is "native", as the file is,
or "float64"; None says that the package cannot.
"""

from __future__ import annotations

import contextlib
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from ase import Atoms


def nequip(what: dict[str, Any], precision: str) -> Any:
    """A package or a checkpoint (its averaged weights), uncompiled. In the precision it was trained in: its 3j symbols are rounded to that."""
    from nequip.integrations.ase import NequIPCalculator

    return NequIPCalculator._from_saved_model(what["path"]) if precision == "native" else None


def geodite(what: dict[str, Any], precision: str) -> Any:
    """A checkpoint of the authors' code, one fidelity of it."""
    from geodite.calculator import GeoditeCalculator

    fidelity = {} if what["modal"] is None else {"fidelity": what["modal"]}
    calculator = GeoditeCalculator(what["path"], "cpu", precision="64" if precision == "float64" else "32", **fidelity)
    if precision == "float64":  # constants that were made in float32
        import torch
        from ase.data import covalent_radii

        torch.set_default_dtype(torch.float64)
        for name, values in calculator.model.named_buffers():
            if name.endswith("covalent_radii"):
                values.copy_(torch.from_numpy(covalent_radii))
            if name.endswith("balance_degree_weight"):  # 1 / (2 l + 1)
                values.copy_(1 / (1 / values).round())
        basis = calculator.model.encoder.radial_basis
        basis.freqs.copy_(np.pi * torch.arange(1, basis.n_rbf + 1, dtype=torch.float64) / calculator.model.encoder.cutoff)
        basis.prefactor.copy_(torch.tensor(2 / calculator.model.encoder.cutoff, dtype=torch.float64).sqrt())
    return calculator


def schnetpack(what: dict[str, Any], precision: str) -> Any:
    """A saved model, in the unit of energies that was given; in float64 its weights are those of the file."""
    import os
    import typing

    import torch

    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # its calculator loads whole models in the old way
    import torch.utils.data.dataloader

    loader: Any = torch.utils.data.dataloader
    if not hasattr(loader, "T_co"):  # schnetpack 2.1 imports a name that newer versions of torch do not have
        loader.T_co = typing.TypeVar("T_co", covariant=True)
    from schnetpack.interfaces import SpkCalculator
    from schnetpack.transform import ASENeighborList

    model = torch.load(what["path"], map_location="cpu", weights_only=False)
    native = next(model.parameters()).dtype
    double = precision == "float64" or native == torch.float64
    if precision == "float64" and native == torch.float64:
        return None
    calculator = SpkCalculator(
        what["path"], ASENeighborList(cutoff=float(model.representation.cutoff)), energy_unit=what["given"]["energy_unit"],
        stress_key="stress" if any(type(m).__name__ == "Strain" for m in model.modules()) else None,
        dtype=torch.float64 if double else native,
    )  # fmt: skip
    basis = calculator.model.representation.radial_basis
    if double:  # the package makes these in float32, whatever the weights are
        basis.offsets = torch.linspace(0, float(model.representation.cutoff), basis.n_rbf, dtype=torch.float64)
        basis.widths = (basis.offsets[1] - basis.offsets[0]) * torch.ones_like(basis.offsets)
    return calculator


def sevennet(what: dict[str, Any], precision: str) -> Any:
    """The package's own calculator; it computes in float32."""
    if precision == "float64":
        return None
    from sevenn.calculator import SevenNetCalculator

    return SevenNetCalculator(what["path"], device="cpu", **({"modal": what["modal"]} if what["modal"] else {}))


def mace(what: dict[str, Any], precision: str) -> Any:
    """mace-torch, in the precision of the file: its couplings and 3j symbols are rounded to that."""
    if precision == "float64":
        return None
    import torch
    from mace.calculators import MACECalculator

    chosen = {} if what["head"] is None else {"head": what["head"]}
    calculator = MACECalculator(model_paths=what["path"], device="cpu", default_dtype="", **chosen)
    torch.set_default_dtype(next(calculator.models[0].parameters()).dtype)  # in which its repulsion multiplies whole numbers
    return calculator


def nequix(what: dict[str, Any], precision: str) -> Any:
    """The package's own calculator; it computes in float32."""
    if precision == "float64":
        return None
    from nequix.calculator import NequixCalculator

    return NequixCalculator(model_path=what["path"], use_kernel=False)


N_TURNS = 3
SOURCES: dict[str, tuple[str, Any]] = {
    "geodite": ("geodite", geodite),
    "schnetpack": ("schnetpack", schnetpack),
    "mace": ("mace-torch", mace),
    "nequip": ("nequip", nequip),
    "sevennet": ("sevenn", sevennet),
    "nequix": ("nequix", nequix),
}
"""name of the source -> (package, function)"""


def evaluate(calculator: Any, frames: list[Atoms]) -> dict[str, np.ndarray]:
    """Energies, forces, stresses (NaN where there is none)."""
    energies, forces, stresses = [], [], []
    for frame in frames:
        atoms = frame.copy()
        atoms.calc = calculator
        energies.append(float(atoms.get_potential_energy()))
        forces.append(np.array(atoms.get_forces(), dtype=np.float64))
        stress = np.full(6, np.nan)
        if atoms.pbc.all():
            with contextlib.suppress(Exception):  # packages say in ways of their own that they have no stress
                stress = np.array(atoms.get_stress(voigt=True), dtype=np.float64)
        stresses.append(stress)
    return {"energy": np.array(energies), "forces": np.concatenate(forces), "stress": np.array(stresses)}


def turned(atoms: Atoms, rotation: np.ndarray) -> Atoms:
    """The structure in another orientation."""
    copy = atoms.copy()
    copy.set_cell(atoms.cell.array @ rotation.T)
    copy.positions = atoms.positions @ rotation.T
    return copy


def turned_back(found: dict[str, np.ndarray], rotation: np.ndarray) -> dict[str, np.ndarray]:
    """What was found for turned structures, as of the unturned."""
    voigt = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
    full = np.empty((len(found["stress"]), 3, 3))
    for k, (i, j) in enumerate(voigt):
        full[:, i, j] = full[:, j, i] = found["stress"][:, k]
    stress = np.stack([(rotation.T @ full @ rotation)[:, i, j] for i, j in voigt], axis=1)
    return {"energy": found["energy"], "forces": found["forces"] @ rotation, "stress": stress}


def main() -> None:
    request, answer = sys.argv[1:3]
    data = np.load(request, allow_pickle=False)
    what = json.loads(str(data["what"]))
    package, make = SOURCES[what["source"]]
    ends = np.cumsum(data["sizes"])
    frames = [
        Atoms(data["numbers"][end - n : end], data["positions"][end - n : end], cell=cell, pbc=pbc)
        for n, end, cell, pbc in zip(data["sizes"], ends, data["cells"], data["pbc"], strict=True)
    ]
    try:
        number = version(package)
    except PackageNotFoundError:  # a folder on PYTHONPATH
        number = "unknown"
    out = {"package": np.array(package), "version": np.array(number)}
    for precision in ("native", "float64"):
        calculator = make(what, precision)
        if calculator is not None:
            out.update({precision + "." + k: v for k, v in evaluate(calculator, frames).items()})
        elif "native.energy" in out:  # its rounding, seen by what it says of turned structures
            for k in range(N_TURNS):
                rotation = np.linalg.qr(np.random.default_rng(k).normal(size=(3, 3)))[0]
                rotation *= np.linalg.det(rotation)
                found = evaluate(make(what, "native"), [turned(atoms, rotation) for atoms in frames])
                out.update({f"turned{k}.{name}": v for name, v in turned_back(found, rotation).items()})
    np.savez(answer, **out)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
