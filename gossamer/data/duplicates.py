"""Frames that occur more than once in a data set."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gossamer.data.fingerprint import Copies
from gossamer.data.structure import Structure

if TYPE_CHECKING:
    from gossamer.data.inspection import Inspection

log = logging.getLogger(__name__)


def find_duplicates(structures: Sequence[Structure], report: Inspection) -> list[Structure]:
    """Report frames that occur more than once; returns one of each.

    `check_leaks` refuses a split that puts a frame and its copy on either side: an error, unless both are of one group.
    """
    seen = Copies[Structure]()
    first: list[Structure] = []
    together: list[str] = []
    apart: list[str] = []
    different: list[str] = []
    grouped = all(s.group is not None for s in structures)
    for s in structures:
        twin = seen.find(s)
        if twin is None:
            seen.add(s, s)
            first.append(s)
            continue
        found = different if not _agree(s, twin) else together if grouped and s.group == twin.group else apart
        found.append(f"{s.name} and {twin.name}")
    if together:
        report.warnings.append(f"{len(together)} duplicate frames{_shown(together)}; a split by group keeps them on one side")
    if apart:
        report.errors.append(
            f"{len(apart)} duplicate frames{_shown(apart)}; a split would put some into training and validation alike. Leave copies out: "
            "gossamer data convert DATA --out NAME.store --drop-duplicates"
            + ("" if grouped else ", or name an entry that groups them (--group)")
        )
    if different:
        report.errors.append(f"{len(different)} pairs of equal structures with different energies: {different[0]}")
    report.numbers["duplicates"] = len(together) + len(apart) + len(different)
    return first


def _shown(pairs: Sequence[str]) -> str:
    return f": {pairs[0]}{' ...' if len(pairs) > 1 else ''}"


def _agree(a: Structure, b: Structure) -> bool:
    """Whether the energies of two equal structures are the same to 1 meV/atom."""
    return a.energy is None or b.energy is None or abs(a.energy - b.energy) <= 1e-3 * a.n_atoms


def without_duplicates(structures: Iterable[Structure]) -> Iterator[Structure]:
    """Each structure once, the first of its copies; how many were left out goes to the log.

    Raises:
        ValueError: a copy with another energy.
    """
    seen = Copies[tuple[str, float | None]]()
    n_left = 0
    for s in structures:
        twin = seen.find(s)
        if twin is None:
            seen.add(s, (s.name, s.energy))
            yield s
            continue
        name, energy = twin
        if energy is not None and not _agree(s, replace(s, energy=energy)):
            raise ValueError(
                f"{s.name} is the same structure as {name}, with another energy. Find out which is right, and remove the other."
            )
        n_left += 1
    log.info("%d duplicate frames are left out, %d are kept", n_left, len(seen))
