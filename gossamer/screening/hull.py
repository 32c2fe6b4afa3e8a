"""Energy above the convex hull of reference structures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase.formula import Formula
from numpy.typing import NDArray
from scipy.optimize import linprog

from gossamer.data.atoms import read_frames
from gossamer.files import InputError, checksum
from gossamer.screening.database import Results

Composition = dict[str, float]
"""fraction of each element"""


@dataclass(frozen=True)
class Reference:
    """A phase that structures may decompose into."""

    composition: Composition
    energy: float
    """eV per atom"""


def energy_above_hull(composition: Composition, energy: float, references: Sequence[Reference]) -> float | None:
    """Energy in eV per atom above the cheapest mixture of references of the same composition; negative below all of them.

        E_hull(x) = min Σ λ_k e_k   with   Σ λ_k x_k = x,   λ_k >= 0

    The lower convex hull of (x, e), as a linear program; Ong et al., Chem. Mater. 20, 1798 (2008), sec. 2.

    Args:
        composition: Of the structure.
        energy: eV per atom.
        references: Of the same method and zero of energy.

    Returns:
        None where the references cannot make up the composition.
    """
    elements = sorted(composition)
    inside = [r for r in references if set(r.composition) <= set(elements)]
    if not inside:
        return None
    fractions: NDArray[np.float64] = np.array([[r.composition.get(e, 0.0) for r in inside] for e in elements])
    found = linprog([r.energy for r in inside], A_eq=fractions, b_eq=[composition[e] for e in elements], bounds=(0, None))
    return energy - float(found.fun) if found.status == 0 else None


def fractions_of(formula: str) -> Composition:
    """Fraction of each element in a chemical formula."""
    counts = Formula(formula).count()
    total = sum(counts.values())
    return {element: n / total for element, n in counts.items()}


def read_references(path: Path | str) -> list[Reference]:
    """Phases of a file: structures with energies (any file ASE reads), or results of a screening.

    Raises:
        FileNotFoundError: no such file.
        InputError: it cannot be read, or a frame has no energy.
    """
    path = Path(path)
    if _is_screening(path):
        with Results(path) as results:
            rows = [r for r in results.rows() if r["energy_per_atom"] is not None and r["status"] != "not converged"]
        return [Reference(fractions_of(r["formula"]), r["energy_per_atom"]) for r in rows]
    found = []
    for k, atoms in enumerate(read_frames(path)):
        energy = None if atoms.calc is None else atoms.calc.results.get("energy")
        if energy is None or not np.isfinite(energy):
            there = "no energy" if energy is None else f"the energy is {energy}"
            raise InputError(f"'{path}', frame {k}: {there}. Every reference needs one, of the method of the screened structures.")
        found.append(Reference(fractions_of(atoms.get_chemical_formula()), float(energy) / len(atoms)))
    return found


def _is_screening(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(15) == b"SQLite format 3"


def _method(question: Mapping[str, Any]) -> str:
    """Whose energies a screening holds: calculator, or potential and dispersion; its precision and way of running are of no account."""
    fingerprint, d3 = str(question["fingerprint"]), question.get("dispersion")
    if question.get("calculator"):
        return fingerprint
    return fingerprint.partition("-")[0] + ("" if d3 is None else f" with D3 of {d3}")


def add_hull(results: Path | str, reference: Path | str) -> dict[str, Any]:
    """Write the energy above the hull of every structure that has an energy.

    Returns:
        "references", "placed", "not_placed": structures without an energy, or of elements that the references lack.

    Raises:
        FileNotFoundError: no such file.
        InputError: of ``read_references``, or references that another potential screened.
    """
    references = read_references(reference)
    content = checksum(reference)[:16]
    with Results(results) as open_:
        if _is_screening(Path(reference)):
            with Results(reference) as others:
                asked, theirs = _method(open_.question), _method(others.question)
            if asked != theirs:
                raise InputError(
                    f"'{reference}' was screened by another potential ({theirs[:80]}) than '{results}' ({asked[:80]}). Energies of two make no hull: "
                    "screen both by the same, or, if the two are one method, export the references first (gossamer screen export)."
                )
        energies = {
            r["id"]: None
            if r["energy_per_atom"] is None
            else energy_above_hull(fractions_of(r["formula"]), r["energy_per_atom"], references)
            for r in open_.rows()
        }
        open_.set_hull(energies, f"{reference} ({content})")
    placed = sum(e is not None for e in energies.values())
    return {"references": len(references), "placed": placed, "not_placed": len(energies) - placed}
