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
from importlib.metadata import version
from typing import Any

import numpy as np
from ase import Atoms


def nequip(what: dict[str, Any], precision: str) -> Any:
    """A package or a checkpoint (its averaged weights), uncompiled. In the precision it was trained in: its 3j symbols are rounded to that."""
    from nequip.integrations.ase import NequIPCalculator

    return NequIPCalculator._from_saved_model(what["path"]) if precision == "native" else None


SOURCES: dict[str, tuple[str, Any]] = {"nequip": ("nequip", nequip)}
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
            with contextlib.suppress(NotImplementedError):
                stress = np.array(atoms.get_stress(voigt=True), dtype=np.float64)
        stresses.append(stress)
    return {"energy": np.array(energies), "forces": np.concatenate(forces), "stress": np.array(stresses)}


def sevennet(what: dict[str, Any], precision: str) -> Any:
    """The package's own calculator; it computes in float32."""
    if precision == "float64":
        return None
    from sevenn.calculator import SevenNetCalculator

    return SevenNetCalculator(what["path"], device="cpu", **({"modal": what["modal"]} if what["modal"] else {}))


SOURCES["sevennet"] = ("sevenn", sevennet)


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
    out = {"package": np.array(package), "version": np.array(version(package))}
    for precision in ("native", "float64"):
        calculator = make(what, precision)
        if calculator is not None:
            out.update({precision + "." + k: v for k, v in evaluate(calculator, frames).items()})
    np.savez(answer, **out)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
