"""How an energy behaves where an atom passes the cutoff; any ASE calculator."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray


def energies_along(
    calculator: Any, atoms: Atoms, atom: int, direction: NDArray[np.float64], offsets: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Energy in eV with one atom moved by each offset (Å) along a unit direction."""
    work = atoms.copy()
    work.calc = calculator
    out = []
    for offset in offsets:
        work.positions = atoms.positions
        work.positions[atom] += offset * direction
        out.append(work.get_potential_energy())
    return np.array(out)


def cutoff_exponent(calculator: Any, atoms: Atoms, cutoff: float, deltas: tuple[float, ...] = (0.1, 0.05, 0.025)) -> float:
    """Power n of |E(cutoff - δ) - E(outside)| ~ δ^n as the last atom leaves everything else behind.

    n - 1 derivatives are continuous at the cutoff; 4 means continuous through the third, as third-order force constants
    want. The last atom is put on a line from the one before it, so that only this pair is within reach: give a molecule
    (or fragment) whose last two atoms can be separated, such as a dimer or a bent trimer. Needs float64 models. A model
    without any interaction there returns infinity.
    """
    line = atoms.copy()
    direction = np.array([1.0, 0.0, 0.0])
    others = line.positions[:-1] @ direction
    line.positions[-2] += direction * (others.max() - others[-1])
    line.positions[-1] = line.positions[-2] + cutoff * direction
    outside = energies_along(calculator, line, len(line) - 1, direction, np.array([0.5]))[0]
    near = np.abs(energies_along(calculator, line, len(line) - 1, direction, -np.array(deltas)) - outside)
    if np.all(near < 1e-13):
        return float("inf")
    return float(np.polyfit(np.log(deltas), np.log(np.maximum(near, 1e-300)), 1)[0])


def energy_jump(calculator: Any, atoms: Atoms, cutoff: float, delta: float = 1e-6) -> float:
    """|E(cutoff - δ) - E(cutoff + δ)| in eV of the last atom against the one before it; zero for a continuous energy."""
    line = atoms.copy()
    line.positions[-1] = line.positions[-2] + np.array([cutoff, 0.0, 0.0])
    inside, outside = energies_along(calculator, line, len(line) - 1, np.array([1.0, 0.0, 0.0]), np.array([-delta, delta]))
    return float(abs(inside - outside))
