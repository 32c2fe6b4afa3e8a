"""Extended XYZ, frame by frame, without believing what a file says of its size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import StringIO
from itertools import islice
from typing import IO

import ase.io
from ase import Atoms

SIX = re.compile(r"(?<![\w-])((?:stress|virial)\s*=\s*[\"'{])([^\"'}]*)")
"""a stress or virial in the line above a frame's atoms"""


def xyz_frames(file: IO[str]) -> Iterator[Atoms]:
    """Frames of an (extended) XYZ file, one after the other, as ASE reads each.

    ASE first looks where all frames begin, and trusts their numbers of atoms; here a frame's lines are read before they are believed.

    Raises:
        ValueError: no number of atoms where a frame begins, or fewer lines or columns than it announces.
    """
    header = file.readline()
    while header:
        if not header.strip():
            header = file.readline()
            continue
        try:
            n_atoms = int(header)
        except ValueError:
            raise ValueError(f"expected the number of atoms, found {header.strip()[:40]!r}") from None
        lines = [header, file.readline(), *islice(file, max(0, min(n_atoms, 10**12)))]
        if len(lines) != n_atoms + 2:
            raise ValueError(f"a frame of {n_atoms} atoms is announced, but the file ends after {len(lines) - 2} of them")
        header = file.readline()
        while header.lstrip().startswith("VEC"):  # cell vectors, one a line, as some programs write them
            lines.append(header)
            header = file.readline()
        _check_columns(lines)
        lines[1] = SIX.sub(_as_nine, lines[1])
        atoms = ase.io.read(StringIO("".join(lines)), index=0, format="extxyz")
        assert isinstance(atoms, Atoms)
        yield atoms


def xyz_heads(file: IO[str]) -> Iterator[str]:
    """The first line of each whole frame of an (extended) XYZ file, of which nothing else is looked at.

    Raises:
        ValueError: as ``xyz_frames``, of what a frame's number of atoms tells.
    """
    for header in file:
        if not header.strip() or header.lstrip().startswith("VEC"):
            continue
        n_lines = 1 + max(0, min(int(header), 10**12))
        if sum(1 for _ in islice(file, n_lines)) != n_lines:
            raise ValueError("the file ends within a frame")
        yield header


def _as_nine(found: re.Match[str]) -> str:
    """Six numbers (xx, yy, zz, yz, xz, xy), which ASE refuses under these names, as the nine that it reads; others as they are."""
    numbers = found[2].split()
    return found[1] + (" ".join(numbers[k] for k in (0, 5, 4, 5, 1, 3, 4, 3, 2)) if len(numbers) == 6 else found[2])


def _check_columns(lines: list[str]) -> None:
    """Raise ValueError if a frame announces more columns than its first atom has: ASE would make room for them."""
    found = re.search(r"properties\s*=\s*[\"']?([^\"'\s]*)", lines[1], re.IGNORECASE)
    if found is None:
        return
    counts = [int(word) for word in found[1].split(":")[2::3] if word.isdecimal()]
    there = len(lines[2].split()) if len(lines) > 2 else 0
    if len(lines) > 2 and sum(counts) > there:
        raise ValueError(f"Properties announces {sum(counts)} columns, but the first atom has {there}")
