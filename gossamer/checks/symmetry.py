"""Symmetry and extensivity of any ASE calculator: each function returns numbers with units, and judges nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from gossamer.checks.candidate import Candidate, rattled
from gossamer.checks.result import Metric, Result, at_most, attempt, conclude, largest


def evaluate_on(calculator: Any, atoms: Atoms) -> tuple[float, NDArray[np.float64]]:
    """Energy in eV and forces in eV/Å of a copy of the atoms, without their constraints."""
    copy = unconstrained(atoms)
    copy.calc = calculator
    return float(copy.get_potential_energy()), copy.get_forces()


def consistent_energy(atoms: Atoms) -> float:
    """Energy in eV of which the forces are the gradient: of smeared electrons the free energy, where the calculator gives one."""
    try:
        return float(atoms.get_potential_energy(force_consistent=True))
    except PropertyNotImplementedError:
        return float(atoms.get_potential_energy())


def unconstrained(atoms: Atoms) -> Atoms:
    """A copy that shows what the calculator alone says: ASE lets constraints change energies, forces, stresses and cells."""
    copy = atoms.copy()
    copy.set_constraint()
    return copy


def lone(atoms: Atoms) -> Atoms:
    """A copy without a cell."""
    copy = atoms.copy()
    copy.pbc = False
    copy.cell = None
    return copy


def symmetry_errors(calculator: Any, atoms: Atoms, seed: int = 0) -> dict[str, dict[str, float]]:
    """How far energy and forces are from the symmetries of nature.

    For each of rotation, reflection (both of the whole frame, cell included), translation, permutation of the atoms, and
    moving atoms by whole lattice vectors: ``energy`` is the change of the energy in eV/atom, ``forces`` the largest
    difference to the forces turned with the frame in eV/Å, ``relative`` the larger of both relative to the spread of the
    energy (1 eV/atom) and the largest force.
    """
    rng = np.random.default_rng(seed)
    energy, forces = evaluate_on(calculator, atoms)
    scale = max(float(np.abs(forces).max()), 1e-3)
    turn = Rotation.random(random_state=seed).as_matrix()
    normal = rng.normal(size=3)
    normal /= np.linalg.norm(normal)
    order = rng.permutation(len(atoms))
    shifts = rng.integers(-2, 3, size=(len(atoms), 3)) * atoms.pbc
    moved: dict[str, tuple[Atoms, NDArray[np.float64]]] = {
        "rotation": (transformed(atoms, turn), forces @ turn.T),
        "reflection": (transformed(atoms, mirror := np.eye(3) - 2 * np.outer(normal, normal)), forces @ mirror.T),
        "translation": (displaced(atoms, np.tile(rng.normal(size=3) * 3, (len(atoms), 1))), forces),
        "permutation": (atoms[order], forces[order]),
    }
    if atoms.pbc.any():
        moved["lattice shifts"] = (displaced(atoms, shifts @ atoms.cell.array), forces)
    errors = {}
    for name, (other, expected) in moved.items():
        e, f = evaluate_on(calculator, other)
        energy_error = abs(e - energy) / len(atoms)
        forces_error = float(np.abs(f - expected).max())
        errors[name] = {"energy": energy_error, "forces": forces_error, "relative": largest([energy_error, forces_error / scale])}
    return errors


def transformed(atoms: Atoms, matrix: NDArray[np.float64]) -> Atoms:
    """Atoms and cell under an orthogonal matrix, without constraints."""
    copy = unconstrained(atoms)
    copy.set_cell(atoms.cell.array @ matrix.T)
    copy.positions = atoms.positions @ matrix.T
    return copy


def displaced(atoms: Atoms, by: NDArray[np.float64]) -> Atoms:
    """Atoms moved by (n_atoms, 3) Å."""
    copy = atoms.copy()
    copy.positions = atoms.positions + by
    return copy


def supercell_error(calculator: Any, atoms: Atoms) -> float:
    """Largest |E(supercell)/2 - E| in eV/atom of cells doubled along each periodic axis in turn.

    Raises:
        ValueError: no axis is periodic.
    """
    if not atoms.pbc.any():
        raise ValueError("The structure is periodic along no axis: there is nothing to double.")
    energy, _ = evaluate_on(calculator, atoms)
    doubled = (evaluate_on(calculator, atoms.repeat([1 + (k == axis) for k in range(3)]))[0] for axis in np.flatnonzero(atoms.pbc))
    return largest(abs(larger / 2 - energy) / len(atoms) for larger in doubled)


def separation_error(calculator: Any, atoms: Atoms, distance: float = 100.0, prepare: Callable[[Atoms], Atoms] = lone) -> float:
    """|E(A + B) - E(A) - E(B)| in eV of a molecule and its turned copy far away (the reach of the model must be less).

    ``prepare`` takes the cell away, or gives a large one to calculators that need one.
    """
    one = lone(atoms)
    other = transformed(one, Rotation.random(random_state=1).as_matrix())
    other = displaced(other, np.tile([distance, 0.0, 0.0], (len(one), 1)))
    parts = sum(evaluate_on(calculator, prepare(part))[0] for part in (one, other))
    return abs(evaluate_on(calculator, prepare(one + other))[0] - parts)


def net_force(calculator: Any, atoms: Atoms) -> float:
    """Length of the sum of all forces in eV/Å; zero for the gradient of a translation-invariant energy."""
    return float(np.linalg.norm(evaluate_on(calculator, atoms)[1].sum(axis=0)))


def left_handed_error(calculator: Any, atoms: Atoms) -> float:
    """Change of the energy in eV/atom when two lattice vectors are exchanged, which leaves the crystal as it is."""
    other = unconstrained(atoms)
    other.set_cell(atoms.cell.array[[1, 0, 2]])
    other.pbc = atoms.pbc[[1, 0, 2]]
    return abs(evaluate_on(calculator, other)[0] - evaluate_on(calculator, atoms)[0]) / len(atoms)


def isolated_atom_error(calculator: Any, element: str, distance: float = 100.0, prepare: Callable[[Atoms], Atoms] = lone) -> float:
    """Largest of the force on a lone atom (eV/Å) and the interaction of two of them ``distance`` Å apart (eV)."""
    energy, force = evaluate_on(calculator, prepare(Atoms([element])))
    both, forces = evaluate_on(calculator, prepare(Atoms([element] * 2, [[0, 0, 0], [distance, 0, 0]])))
    return largest([abs(both - 2 * energy), np.abs(force).max(), np.abs(forces).max()])


# --- verdict --------------------------------------------------------------------------------------------------------

TURNED = "Results depend on how the system lies in space: relaxations, phonons and long simulations drift or come out wrong."
ORDER = "Results depend on how the file lists the atoms."
SIZE = "Energies of systems of different size cannot be compared: no formation, surface or reaction energies."
CHANGES = {
    "rotation": TURNED, "reflection": "Mirror images differ: enantiomers and handed crystals come out wrong.", "translation": TURNED,
    "permutation": ORDER, "lattice shifts": "Results depend on how atoms are wrapped into the cell: jumps at the cell's border.",
}  # fmt: skip


def check(candidate: Candidate) -> Result:
    """Symmetry and extensivity of the candidate's structures; limits are met by float32 arithmetic of a symmetric model."""
    calculator = candidate.calculator
    worst: dict[str, dict[str, float]] = {}
    metrics: list[Metric] = []
    periodic: list[Atoms] = []
    molecules: list[Atoms] = []
    for k, atoms in enumerate(candidate.bar(candidate.structures, "symmetry")):
        probe = rattled(atoms, 0.03, seed=k)
        (periodic if atoms.pbc.any() else molecules).append(probe)
        try:
            errors = symmetry_errors(calculator, probe, seed=k)
        except Exception as error:
            metrics += attempt(
                f"evaluation of {atoms.get_chemical_formula()}",
                lambda e=error: _raise(e),
                "failed",
            )
            continue
        for name, values in errors.items():
            known = worst.setdefault(name, dict.fromkeys(values, 0.0))
            for key, value in values.items():
                known[key] = largest([known[key], value])
    for name, values in worst.items():
        metrics.append(at_most(f"{name}, energy", values["energy"] * 1000, "meV/atom", 0.02, 1.0, CHANGES[name]))
        metrics.append(at_most(f"{name}, forces relative to the largest", values["relative"], "", 5e-4, 1e-2, CHANGES[name]))
    for atoms in periodic[:1]:
        metrics += attempt(
            "supercell",
            lambda a=atoms: at_most("supercell, energy", 1000 * supercell_error(calculator, a), "meV/atom", 0.05, 1.0, SIZE),
        )
        metrics += attempt(
            "left-handed cell",
            lambda a=atoms: at_most("left-handed cell, energy", 1000 * left_handed_error(calculator, a), "meV/atom", 0.02, 1.0, TURNED),
        )
    lone = "Reactions, adsorption, evaporation and gas phases start from a wrong zero."
    parts = molecules[0] if molecules else Atoms([candidate.elements[0]] * 2, [[0, 0, 0], [2.2, 0, 0]])
    metrics += attempt(
        "two far copies",
        lambda: at_most(
            "two far copies, energy",
            1000 * separation_error(calculator, parts, prepare=candidate.free),
            "meV",
            0.1 * len(parts),
            20.0,
            SIZE,
        ),
    )
    elements = sorted({s for a in candidate.structures for s in a.symbols}) or candidate.elements[:3]
    metrics += attempt(
        "isolated atoms",
        lambda: at_most("isolated atoms, interaction at 100 Å and self-force", largest(isolated_atom_error(calculator, e, prepare=candidate.free) for e in elements), "eV or eV/Å", 1e-4, 1e-2, lone),
    )  # fmt: skip
    names = ", ".join(a.get_chemical_formula() for a in candidate.structures)
    return conclude(
        metrics,
        notes=[f"Judged on {names}, every coordinate moved by 0.03 Å."],
        passed="Energy and forces follow every symmetry, and energies add up.",
    )


def _raise(error: Exception) -> Any:
    raise error
