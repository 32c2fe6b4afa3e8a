"""Symmetry and extensivity of any ASE calculator: each function returns numbers with units, and judges nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation


def evaluate_on(calculator: Any, atoms: Atoms) -> tuple[float, NDArray[np.float64]]:
    """Energy in eV and forces in eV/Å of a copy of the atoms."""
    copy = atoms.copy()
    copy.calc = calculator
    return float(copy.get_potential_energy()), copy.get_forces(apply_constraint=False)


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
        errors[name] = {"energy": energy_error, "forces": forces_error, "relative": max(energy_error, forces_error / scale)}
    return errors


def transformed(atoms: Atoms, matrix: NDArray[np.float64]) -> Atoms:
    """Atoms and cell under an orthogonal matrix."""
    copy = atoms.copy()
    copy.set_cell(atoms.cell.array @ matrix.T)
    copy.positions = atoms.positions @ matrix.T
    return copy


def displaced(atoms: Atoms, by: NDArray[np.float64]) -> Atoms:
    """Atoms moved by (n_atoms, 3) Å."""
    copy = atoms.copy()
    copy.positions = atoms.positions + by
    return copy


def supercell_error(calculator: Any, atoms: Atoms, repeats: tuple[int, int, int] = (2, 1, 1)) -> float:
    """|E(supercell)/copies - E| in eV/atom; periodic axes only are repeated."""
    repeats = tuple(n if periodic else 1 for n, periodic in zip(repeats, atoms.pbc, strict=True))  # type: ignore[assignment]
    energy, _ = evaluate_on(calculator, atoms)
    larger, _ = evaluate_on(calculator, atoms.repeat(repeats))
    return abs(larger / np.prod(repeats) - energy) / len(atoms)


def separation_error(calculator: Any, atoms: Atoms, distance: float = 100.0) -> float:
    """|E(A + B) - E(A) - E(B)| in eV of a molecule and its turned copy far away (the reach of the model must be less)."""
    lone = atoms.copy()
    lone.pbc = False
    lone.cell = None
    other = transformed(lone, Rotation.random(random_state=1).as_matrix())
    other = displaced(other, np.tile([distance, 0.0, 0.0], (len(lone), 1)))
    parts = sum(evaluate_on(calculator, part)[0] for part in (lone, other))
    return abs(evaluate_on(calculator, lone + other)[0] - parts)


def net_force(calculator: Any, atoms: Atoms) -> float:
    """Length of the sum of all forces in eV/Å; zero for the gradient of a translation-invariant energy."""
    return float(np.linalg.norm(evaluate_on(calculator, atoms)[1].sum(axis=0)))
