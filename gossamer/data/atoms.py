"""Structure files as ASE's Atoms."""

from __future__ import annotations

from pathlib import Path

import ase.io
from ase import Atoms

from gossamer.files import COMPRESSIONS, open_text


def as_atoms(structure: Atoms | Path | str) -> Atoms:
    """Atoms from Atoms (copied, velocities kept) or from the first frame of a file."""
    if isinstance(structure, Atoms):
        return structure.copy()
    path = Path(structure)
    if not path.exists():
        raise FileNotFoundError(f"There is no structure file '{path}'.")
    if path.suffix in COMPRESSIONS:
        with open_text(path) as file:
            atoms = ase.io.read(file, index=0, format="extxyz")
    else:
        atoms = ase.io.read(path, index=0)
    assert isinstance(atoms, Atoms)
    if len(atoms) == 0:
        raise ValueError(f"'{path}' holds no atoms.")
    return atoms
