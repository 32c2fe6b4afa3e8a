"""What is screened: frames of files, each with an id that says where it comes from and what it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import atomic_masses
from ase.neighborlist import neighbor_list

from gossamer.data.atoms import disorder, iterate_frames
from gossamer.files import InputError, checksum
from gossamer.simulation.state import CHARGED

KEPT = ("numbers", "positions", "tags", "masses", "initial_charges", "initial_magmoms")
CLOSEST = 0.4
"""Å: no two atoms of any molecule or crystal are nearer (H2 has 0.74)"""


@dataclass(frozen=True)
class Item:
    """A structure to be screened."""

    source: str
    """its file, as given, or ``MEMORY``"""
    frame: int
    digest: str
    """of elements, masses, positions, cell, periodicity, charges, spins and constraints; of the file where it cannot be read"""
    atoms: Atoms | None
    """without labels; None where there is a problem"""
    problem: str = ""
    """why it cannot be read or asked about"""

    @property
    def id(self) -> str:
        """File, frame and content: a changed structure is another one."""
        return f"{self.source}#{self.frame}@{self.digest}"


MEMORY = "memory"
"""source of Atoms that are of no file"""


def read_items(given: Sequence[Path | str | Atoms]) -> Iterator[Item]:
    """Atoms, and every frame of every file, read when its turn comes; what cannot be read of a file is one item that says why, a disordered
    frame another.

    Raises:
        FileNotFoundError: no such file.
    """
    for k, atoms in enumerate(one for one in given if isinstance(one, Atoms)):
        problem = disorder(atoms) if len(atoms) else "There are no atoms."
        yield Item(MEMORY, k, digest_of(atoms), None if problem else bare(atoms), problem)
    for source in sources_of([one for one in given if not isinstance(one, Atoms)]):
        frame = 0
        try:
            for atoms in iterate_frames(source):
                problem = disorder(atoms)
                yield Item(source, frame, digest_of(atoms), None if problem else bare(atoms), problem)
                frame += 1
        except InputError as error:
            yield Item(source, frame, _digest_of_file(Path(source)), None, str(error))


def sources_of(paths: Sequence[Path | str]) -> list[str]:
    """Names of files, each file once and as it is named first: ids begin with them, so that no other two structures have the same.

    Raises:
        FileNotFoundError: no such file.
    """
    found: dict[str, str] = {}
    for path in map(os.path.normpath, paths):
        if not Path(path).exists():
            raise FileNotFoundError(f"There is no structure file '{path}'.")
        found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def bare(atoms: Atoms) -> Atoms:
    """Elements, masses, positions, cell, charges, constraints and name, without labels and velocities."""
    copy = atoms.copy()
    for name in set(copy.arrays) - set(KEPT):
        del copy.arrays[name]
    copy.info = {k: v for k, v in copy.info.items() if k in (*CHARGED, "name", "material_id")}
    return copy


def _digest_of_file(path: Path) -> str:
    if not path.is_file():
        return hashlib.sha256(b"").hexdigest()[:16]
    return checksum(path)[:16]


def digest_of(atoms: Atoms) -> str:
    """Sixteen letters of what a calculator sees, and of masses that are not the elements' own."""
    found = hashlib.sha256()
    also = [atoms.arrays[name] for name in ("initial_charges", "initial_magmoms") if name in atoms.arrays]
    for array in (atoms.numbers.astype(np.int64), atoms.positions, atoms.cell.array, np.asarray(atoms.pbc), *also):
        found.update(np.ascontiguousarray(array).tobytes())
    if atoms.has("masses") and not np.allclose(atoms.get_masses(), atomic_masses[atoms.numbers], rtol=1e-4):
        found.update(b"masses" + atoms.get_masses().tobytes())
    for name in CHARGED:
        if name in atoms.info:
            found.update(f"{name} {atoms.info[name]}".encode())
    for constraint in atoms.constraints:
        found.update(repr(constraint.todict()).encode())
    return found.hexdigest()[:16]


def check_structure(atoms: Atoms) -> None:
    """Refuse what no calculator can say anything about.

    Raises:
        ValueError: numbers that are not finite, a periodic cell without a volume, or two atoms on (nearly) one spot; says which.
    """
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        bad = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
        raise ValueError(f"The position of atom {bad[0]} is not finite." if len(bad) else "The cell is not finite.")
    if atoms.pbc.any() and np.linalg.matrix_rank(atoms.cell.array[atoms.pbc], tol=1e-6) < atoms.pbc.sum():
        raise ValueError(f"Periodic along {np.flatnonzero(atoms.pbc).tolist()}, but the cell has no volume there.")
    first, second, distances = neighbor_list("ijd", atoms, CLOSEST)
    if len(distances):
        k = int(distances.argmin())
        raise ValueError(f"Atoms {first[k]} and {second[k]} are {distances[k]:.3f} Å apart: separate overlapping atoms.")
