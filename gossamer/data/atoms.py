"""Structure files as ASE's Atoms."""

from __future__ import annotations

from pathlib import Path

import ase.io
from ase import Atoms

from gossamer.files import COMPRESSIONS, open_text


def as_atoms(structure: Atoms | Path | str, frame: int = 0, supercell: tuple[int, int, int] = (1, 1, 1)) -> Atoms:
    """Atoms from Atoms (copied, velocities kept) or from a frame of a file, repeated where asked.

    Args:
        structure: Atoms, or a file.
        frame: Which frame of the file; -1 is the last.
        supercell: How often along each cell vector. Copies would move in step for ever, so a repeated structure has no velocities.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without atoms or without this frame, a frame of Atoms, or repeats along an axis that is not periodic.
    """
    if isinstance(structure, Atoms):
        if frame != 0:
            raise ValueError(f"frame {frame} is asked of Atoms, which are one frame. Give a file, or the frame itself.")
        atoms = structure.copy()
    else:
        atoms = _read_frame(Path(structure), frame)
    if tuple(supercell) == (1, 1, 1):
        return atoms
    if any(n > 1 and not periodic for n, periodic in zip(supercell, atoms.pbc, strict=True)):
        raise ValueError(
            f"supercell {' '.join(map(str, supercell))} repeats along axes that are not periodic: pbc is {atoms.pbc.tolist()}."
        )
    repeated = atoms.repeat(supercell)
    if repeated.has("momenta"):
        del repeated.arrays["momenta"]
    return repeated


def _read_frame(path: Path, frame: int) -> Atoms:
    if not path.exists():
        raise FileNotFoundError(f"There is no structure file '{path}'.")
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder; a structure file is expected (extxyz, cif, POSCAR, traj, ...).")
    try:
        if path.suffix in COMPRESSIONS:
            with open_text(path) as file:
                atoms = ase.io.read(file, index=frame, format="extxyz")
        else:
            atoms = ase.io.read(path, index=frame)
    except (IndexError, StopIteration):
        raise ValueError(f"'{path}' has no frame {frame}, or no frame at all. Frames count from 0; -1 is the last.") from None
    except Exception as error:  # ASE's many readers raise everything there is
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"'{path}' cannot be read as a structure ({type(error).__name__}: {error}).") from None
    assert isinstance(atoms, Atoms)
    if len(atoms) == 0:
        raise ValueError(f"'{path}' holds no atoms.")
    return atoms
