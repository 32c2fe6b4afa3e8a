"""Extended XYZ, frame by frame, without believing what a file says of its size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import StringIO
from itertools import islice
from typing import IO

import ase.io
import numpy as np
from ase import Atoms

from gossamer.files import InputError

ENTRY = re.compile(
    r"""(?<![^\s="'{}\[\]])([^\s="'{}\[\]]+)\s*=\s*("""  # its name
    r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\{[^}=]*\}|\[(?:[^\[\]=]|\[[^\[\]=]*\])*\]|[^\s"'{\[]\S*|)"""
)
"""an entry of the line above a frame's atoms: its name, and the text of its value, with quotes or brackets"""
NAMES = {"lattice": "Lattice", "properties": "Properties", "pbc": "pbc"}
"""entries that say how the others are to be read, as ASE knows them; some programs write them in other letters"""
TENSORS = ("Lattice", "stress", "virial")
"""entries that ASE takes as nine numbers in quotes, and in no other form"""
ASIDE = "aside_"
"""what a stress or virial is called that is not so many numbers, no numbers, or not symmetric, while ASE reads the others"""


def xyz_frames(file: IO[str]) -> Iterator[Atoms]:
    """Frames of an (extended) XYZ file, one after the other, as ASE reads each.

    ASE first looks where all frames begin, and trusts their numbers of atoms; here a frame's lines are read before they are believed.

    Raises:
        ValueError: no number of atoms where a frame begins, or fewer lines than it announces.
        InputError: other columns than it announces, an entry that stands twice, a periodicity that is none, a word that is no element.
    """
    header = file.readline().removeprefix("\ufeff")  # which editors of Windows put before a text
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
        lines[1] = _entries(lines[1])
        _check_columns(lines)
        yield _as_ase(lines)


def xyz_heads(file: IO[str]) -> Iterator[str]:
    """The first line of each whole frame of an (extended) XYZ file, of which nothing else is looked at.

    Raises:
        ValueError: as ``xyz_frames``, of what a frame's number of atoms tells.
    """
    for header in file:
        if not header.strip() or header.lstrip().startswith("VEC"):
            continue
        n_lines = 1 + max(0, min(int(header.removeprefix("\ufeff")), 10**12))
        if sum(1 for _ in islice(file, n_lines)) != n_lines:
            raise ValueError("the file ends within a frame")
        yield header


def _as_ase(lines: list[str]) -> Atoms:
    """The frame of these lines."""
    try:
        atoms = ase.io.read(StringIO("".join(lines)), index=0, format="extxyz")
    except KeyError as error:
        raise InputError(f"{error} is not the symbol of an element") from None
    assert isinstance(atoms, Atoms)
    for name in TENSORS:
        if ASIDE + name in atoms.info:
            atoms.info[name] = atoms.info.pop(ASIDE + name)
    return atoms


def _entries(line: str) -> str:
    """The line above a frame's atoms in the form that ASE reads, where it would pass over something, or read it as something else."""
    found: dict[str, str] = {}

    def entry(match: re.Match[str]) -> str:
        name, text = NAMES.get(match[1].lower(), match[1]), match[2]
        if found.setdefault(name, text) != text:
            raise InputError(f"the entry {name} stands twice, as {found[name][:40]} and as {text[:40]}. Take the wrong one out")
        if name == "pbc":
            text = _periodicity(text)
        elif name in TENSORS:
            numbers = re.split(r"[\s,\[\]{}\"']+", text.strip("\"'{}[], \t"))
            if len(numbers) == 6 and name != "Lattice":
                numbers = [numbers[k] for k in (0, 5, 4, 5, 1, 3, 4, 3, 2)]
            if len(numbers) == 9 and (name == "Lattice" or _symmetric(numbers)):  # of a stress ASE keeps half of the off-diagonal numbers
                text = f'"{" ".join(numbers)}"'
            elif name != "Lattice":
                name, text = ASIDE + name, f'"{" ".join(numbers)}"' if len(numbers) == 9 else text
        return match[0] if (name, text) == match.groups() else f"{name}={text}"

    return ENTRY.sub(entry, line)


def _symmetric(numbers: list[str]) -> bool:
    """Whether nine words are a symmetric matrix to a thousandth of its largest number."""
    try:
        matrix = np.array(numbers, dtype=float).reshape(3, 3)
    except ValueError:
        return False
    return not np.isfinite(matrix).all() or bool(np.abs(matrix - matrix.T).max() <= 1e-3 * np.abs(matrix).max())


def _periodicity(text: str) -> str:
    """Three letters, T or F; ASE takes other words, FFF among them, for T."""
    words = re.split(r"[\s,]+", text.strip("\"'{}[], \t"))
    letters = ["T" if word.lower() in ("t", "true", "1") else "F" if word.lower() in ("f", "false", "0") else word for word in words]
    if re.fullmatch("[TF]{3}", letters[0]) and len(letters) == 1:
        letters = list(letters[0])
    if not (set(letters) <= {"T", "F"} and len(letters) in (1, 3)):
        raise InputError(f'pbc is {text[:40]}, expected T or F for each axis, as in pbc="T T F"')
    return f'"{" ".join(letters * (3 // len(letters)))}"'


def _check_columns(lines: list[str]) -> None:
    """Raise InputError if a frame announces other columns than its first atom has, or none of positions: ASE would make room, or pass over them."""
    found = re.search(r"Properties\s*=\s*[\"']?([^\"'\s]*)", lines[1])
    if found is None or len(lines) < 3:
        return
    words = found[1].split(":")
    announced, there = sum(int(word) for word in words[2::3] if word.isdecimal()), len(lines[2].split())
    if announced != there:
        raise InputError(f"Properties announces {announced} columns, but the first atom has {there}")
    if not {"pos", "positions"} & set(words[0::3]):
        raise InputError(f"Properties names no positions (pos:R:3), but {', '.join(words[0::3])}")
