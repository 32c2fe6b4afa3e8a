"""Structure files as ASE's Atoms: the one reader of the judge, of simulations and of benchmarks. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import ase.io
from ase import Atoms

from gossamer.arguments import as_path, at_home
from gossamer.data.npz_file import npz_names, read_npz
from gossamer.data.xyz import xyz_frames, xyz_heads
from gossamer.files import COMPRESSIONS, InputError, open_text

FULL = 0.01
"""by which the occupancy of a site may differ from 1: refinements do"""
PLACE = ("positions", "numbers", "cell", "pbc")
"""what results belong to; readers may set charges and magnetic moments afterwards"""
TEXT = (*COMPRESSIONS, ".xyz", ".extxyz")
"""endings of files of (extended) XYZ"""


def as_atoms(structure: Atoms | Path | str, frame: int = 0, supercell: tuple[int, int, int] = (1, 1, 1)) -> Atoms:
    """Atoms from Atoms (copied, velocities kept) or from a frame of a file, repeated where asked.

    Args:
        structure: Atoms, or a file.
        frame: Which frame of the file; -1 is the last.
        supercell: How often along each cell vector. Copies would move in step for ever, so a repeated structure has no velocities.

    Raises:
        TypeError: something else, such as several Atoms.
        FileNotFoundError: no such file.
        ValueError: it cannot be read, holds no atoms or not this frame; a frame of Atoms; repeats along an axis that is not periodic.
    """
    if isinstance(structure, Atoms) and frame != 0:
        raise ValueError(f"frame {frame} is asked of Atoms, which are one frame. Give a file, or the frame itself.")
    atoms = (
        structure.copy()
        if isinstance(structure, Atoms)
        else read_frames(as_path("structure", structure, "a file or ASE's Atoms"), frame)[0]
    )
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
        InputError: it cannot be read, or holds no frame, one without atoms, or one that is disordered.
    """
    found = list(iterate_frames(path, frame))
    for atoms in found:
        if disordered := disorder(atoms):
            raise InputError(f"'{path}': {disordered}")
    return found


def disorder(atoms: Atoms) -> str:
    """What is wrong with sites that are shared by elements or partly occupied, as CIF files may have them; nothing where all is in order.

    ASE puts one atom of the most frequent element on each, and says the rest in ``info``.
    """
    sites = atoms.info.get("occupancy")
    for kinds in sites.values() if isinstance(sites, dict) else ():
        if isinstance(kinds, dict) and (len(kinds) > 1 or any(abs(share - 1) > FULL for share in kinds.values())):
            said = ", ".join(f"{share:g} {element}" for element, share in kinds.items())
            return f"a site holds {said}: no calculator knows disordered crystals. Give an ordered structure (or several)."
    return ""


def own_results(atoms: Atoms, name: str = "structure") -> dict[str, Any]:
    """What the calculator of the atoms found for them: a label, where it is the reference's. Nothing is computed.

    Raises:
        ValueError: the calculator went on to other atoms (frames share it), or the atoms moved since.
    """
    results = dict(getattr(atoms.calc, "results", None) or {})
    known = results and getattr(atoms.calc, "atoms", None) is not None
    changes = [what for what in atoms.calc.check_state(atoms) if what in PLACE] if known else []
    if changes:
        raise ValueError(
            f"{name}: the results of its calculator are of other atoms ({', '.join(changes)} differ), as of frames that share one calculator. "
            "Keep those of each frame: frame.calc = ase.calculators.singlepoint.SinglePointCalculator(frame, **frame.calc.results) after its evaluation."
        )
    return results


def iterate_frames(path: Path | str, frame: int | None = None) -> Iterator[Atoms]:
    """What ``read_frames`` reads, one frame after the other: (extended) XYZ that is not compressed, and what ASE reads frame by frame
    (its trajectories and databases), are never held whole.

    Raises: as ``read_frames``, of a frame when its turn comes.
    """
    path = Path(at_home(path))
    if not path.exists():
        raise FileNotFoundError(f"There is no structure file '{path}'.")
    if path.is_dir() and path.suffix != ".bundle":
        raise InputError(f"'{path}' is a folder; a structure file is expected (extxyz, cif, POSCAR, traj, ...).")
    n = 0
    try:
        for atoms in _read(path, frame):
            if len(atoms) == 0:
                raise InputError(f"'{path}' has a frame without atoms{f', {n}' if n else ''}.")
            yield atoms
            n += 1
    except (InputError, ImportError) as error:
        if isinstance(error, ImportError) or str(path) in str(error):
            raise
        raise InputError(f"'{path}' frame {n if frame is None else frame}: {error}.") from None
    except Exception as error:  # ASE's parsers raise whatever they meet
        if n or not isinstance(error, IndexError):
            text = " ".join(str(error).split())[:200]
            where = f" from frame {n} on" if n else ""
            raise InputError(
                f"'{path}' cannot be read{where} as structures by ASE ({type(error).__name__}{': ' if text else ''}{text})."
            ) from None
    if not n:
        raise InputError(
            f"'{path}' has no frame{'' if frame is None else f' {frame}'}: it holds no atoms, or fewer frames. They count from 0; -1 is the last."
        )


def count_frames(path: Path | str) -> int:
    """How many frames ``iterate_frames`` gives before it ends or raises; of (extended) XYZ without making atoms of them.

    Raises:
        FileNotFoundError: no such file.
    """
    n = 0
    with suppress(ValueError):
        for _ in _heads(Path(path)):
            n += 1
    return n


def _heads(path: Path) -> Iterator[Any]:
    """Something for each frame."""
    if not path.is_file() or path.suffix not in TEXT:
        yield from iterate_frames(path)
        return
    with open_text(path) as file:
        yield from xyz_heads(file)


def _read(path: Path, frame: int | None) -> Iterator[Atoms]:
    if path.suffix == ".npz":
        missing = {"frac", "cell_A", "numbers"} - set(npz_names(path))
        if missing:
            raise InputError(
                f"'{path}' lacks {', '.join(sorted(missing))}; expected frac (n_frames, n_atoms, 3), cell_A (3, 3) and numbers."
            )
        data = read_npz(path, ("frac", "cell_A", "numbers"))
        positions = data["frac"] if frame is None else data["frac"][[frame]]
        for scaled in positions:
            yield Atoms(data["numbers"], scaled_positions=scaled, cell=data["cell_A"], pbc=True)
    elif path.suffix in TEXT:
        with open_text(path) as file:
            frames = xyz_frames(file)
            if frame is None:
                yield from frames
            elif frame < 0:
                yield list(frames)[frame]
            else:
                yield from islice(frames, frame, frame + 1)
    else:
        yield from ase.io.iread(path, ":" if frame is None else str(frame))
