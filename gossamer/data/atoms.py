"""Structure files as ASE's Atoms: the one reader of the judge, of simulations and of benchmarks. Imports no torch."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import ase.io
from ase import Atoms

from gossamer.data.npz_file import npz_names, read_npz
from gossamer.data.xyz import xyz_frames
from gossamer.files import COMPRESSIONS, InputError, open_text


def as_atoms(structure: Atoms | Path | str, frame: int = 0, supercell: tuple[int, int, int] = (1, 1, 1)) -> Atoms:
    """Atoms from Atoms (copied, velocities kept) or from a frame of a file, repeated where asked.

    Args:
        structure: Atoms, or a file.
        frame: Which frame of the file; -1 is the last.
        supercell: How often along each cell vector. Copies would move in step for ever, so a repeated structure has no velocities.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, holds no atoms or not this frame; a frame of Atoms; repeats along an axis that is not periodic.
    """
    if isinstance(structure, Atoms) and frame != 0:
        raise ValueError(f"frame {frame} is asked of Atoms, which are one frame. Give a file, or the frame itself.")
    atoms = structure.copy() if isinstance(structure, Atoms) else read_frames(structure, frame)[0]
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


def read_frames(path: Path | str, frame: int | None = None) -> list[Atoms]:
    """All frames (or one; -1 is the last) of any file ASE reads; extended XYZ may be .xz, .gz or .bz2.

    A trajectory may also be an .npz file with ``frac`` (n_frames, n_atoms, 3), ``cell_A`` (3, 3) in Å and ``numbers``.

    Raises:
        FileNotFoundError: no such file.
        InputError: it cannot be read, or holds no frame, or one without atoms.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no structure file '{path}'.")
    if path.is_dir() and path.suffix != ".bundle":
        raise InputError(f"'{path}' is a folder; a structure file is expected (extxyz, cif, POSCAR, traj, ...).")
    try:
        frames = _read(path, frame)
    except (InputError, ImportError):
        raise
    except (IndexError, StopIteration):
        frames = []
    except Exception as error:  # ASE's parsers raise whatever they meet
        text = " ".join(str(error).split())[:200]
        raise InputError(f"'{path}' cannot be read as structures by ASE ({type(error).__name__}{': ' if text else ''}{text}).") from None
    if not frames:
        raise InputError(
            f"'{path}' has no frame{'' if frame is None else f' {frame}'}: it holds no atoms, or fewer frames. They count from 0; -1 is the last."
        )
    if any(len(f) == 0 for f in frames):
        raise InputError(f"'{path}' has a frame without atoms.")
    return frames


def _read(path: Path, frame: int | None) -> list[Atoms]:
    if path.suffix == ".npz":
        missing = {"frac", "cell_A", "numbers"} - set(npz_names(path))
        if missing:
            raise InputError(
                f"'{path}' lacks {', '.join(sorted(missing))}; expected frac (n_frames, n_atoms, 3), cell_A (3, 3) and numbers."
            )
        data = read_npz(path, ("frac", "cell_A", "numbers"))
        positions = data["frac"] if frame is None else data["frac"][[frame]]
        return [Atoms(data["numbers"], scaled_positions=f, cell=data["cell_A"], pbc=True) for f in positions]
    if path.suffix in (*COMPRESSIONS, ".xyz", ".extxyz"):
        with open_text(path) as file:
            frames = xyz_frames(file)
            if frame is None or frame < 0:
                return list(frames) if frame is None else [list(frames)[frame]]
            return list(islice(frames, frame, frame + 1))
    return list(ase.io.iread(path, ":" if frame is None else str(frame)))
