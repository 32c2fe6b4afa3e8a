"""The structures of the speed tables, made from nothing but ASE: a 21-atom molecule, water, silicon, copper."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule

NAMES = ("molecule21", "water192", "silicon512", "copper864")


def hexanol() -> Atoms:
    """1-hexanol, all-trans: 21 atoms."""
    numbers, positions = [], []
    heavy = np.array([[1.27 * k, 0.44 * (-1) ** k, 0.0] for k in range(7)])
    for k, place in enumerate(heavy):
        numbers.append(8 if k == 6 else 6)
        positions.append(place)
        sign = (-1) ** k
        if k < 6:
            for z in (0.88, -0.88):
                numbers.append(1)
                positions.append(place + [0.0, 0.63 * sign, z])
        if k in (0, 6):
            numbers.append(1)
            positions.append(place + ([-0.89, -0.63 * sign, 0.0] if k == 0 else [0.80, -0.55 * sign, 0.0]))
    return Atoms(numbers, positions)


def water(molecules_per_edge: int = 4) -> Atoms:
    """Randomly turned molecules on a grid at 1 g/cm³."""
    rng, mol = np.random.default_rng(0), molecule("H2O")
    mol.positions -= mol.get_center_of_mass()
    a = (mol.get_masses().sum() / 0.602214076) ** (1 / 3)
    n = molecules_per_edge
    atoms = Atoms(cell=[n * a] * 3, pbc=True)
    for index in np.ndindex(n, n, n):
        turned = mol.copy()
        q, r = np.linalg.qr(rng.normal(size=(3, 3)))
        turned.positions = turned.positions @ (q * np.sign(np.diag(r))).T + (np.array(index) + 0.5) * a
        atoms += turned
    return atoms


def structure(name: str, seed: int = 0) -> Atoms:
    """One of NAMES, slightly moved."""
    atoms = {
        "molecule21": hexanol,
        "water192": water,
        "silicon512": lambda: bulk("Si", cubic=True).repeat(4),
        "copper864": lambda: bulk("Cu", cubic=True).repeat(6),
    }[name]()
    atoms.rattle(0.02, seed=seed)
    return atoms
