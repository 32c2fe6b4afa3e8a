"""Which frames a potential has seen: short fingerprints of its training and validation frames, kept in its file.

An error on frames that were trained on says nothing of accuracy. With the fingerprints, `gossamer evaluate` and the judge
recognise such frames. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import safetensors
from ase import Atoms
from numpy.typing import NDArray

from gossamer.data.structure import Structure

T = TypeVar("T")
Hashes = NDArray[np.int64]
Seen = Literal["train", "valid", "new"]
GRID = 1e-3
"""Å: the projections of a frame are rounded to it"""
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)
"""of projections; what is kept with a potential has the first four"""
SLACK = 1e-4
"""Å: how much a projection may differ after a trip through files of fewer digits or single precision"""
MOST = 200_000
"""fingerprints kept of each kind: 1.6 MB; of larger sets those with the smallest values, which are a fair sample"""


def fingerprints(
    atomic_numbers: NDArray[Any], positions: NDArray[Any], cell: NDArray[Any], pbc: NDArray[Any], slack: float = 0.0
) -> list[int]:
    """Hash of a frame: elements, and four projections of positions (and of the cell, where periodic) in steps of 1e-3 Å.

        s_k = Σ_j x_j cos(j √p_k),    p = 2, 3, 5, 7;    x: all Cartesian coordinates, then the cell's

    Few numbers that depend on every coordinate are rounded more reliably than every coordinate itself.

    Args:
        atomic_numbers: (n_atoms,)
        positions: (n_atoms, 3) Å
        cell: (3, 3) Å
        pbc: (3,)
        slack: Å; a projection that lies closer than this to where rounding changes is rounded both ways.

    Returns:
        The 64-bit hash as a signed number; with ``slack``, of all ways to round.
    """
    pbc = np.asarray(pbc, dtype=bool)
    return _hashed(atomic_numbers, pbc, _projections(positions, cell, pbc), slack)


def _projections(positions: NDArray[Any], cell: NDArray[Any], pbc: NDArray[np.bool_], n: int = 4) -> NDArray[np.float64]:
    """The first so many projections in Å."""
    parts = [np.asarray(positions, dtype=float).ravel()] + ([np.asarray(cell, dtype=float)[pbc].ravel()] if pbc.any() else [])
    coordinates = np.concatenate(parts)
    weights = np.cos(np.sqrt(PRIMES[:n])[:, None] * np.arange(1, len(coordinates) + 1))
    return np.asarray(weights @ coordinates)


def _hashed(atomic_numbers: NDArray[Any], pbc: NDArray[np.bool_], projections: NDArray[np.float64], slack: float) -> list[int]:
    """The hashes of all ways to round the first four projections."""
    ways = [sorted({int(np.floor((s + d) / GRID)) for d in (-slack, slack)}) for s in projections[:4]]
    head = np.asarray(atomic_numbers, dtype=np.int64).tobytes() + pbc.tobytes()
    digests = [hashlib.blake2b(head + np.array(way, dtype=np.int64).tobytes(), digest_size=8).digest() for way in product(*ways)]
    return [int.from_bytes(d, "little", signed=True) for d in digests]


class Copies(Generic[T]):
    """Frames with something kept for each, found again by copies that went through files of five or more decimals, or single precision.

    What is compared is elements, periodicity and sixteen projections, which say what positions would and are fewer.
    """

    DIGITS = 1e-5
    """Å: five standard deviations of what a coordinate loses in five decimals, and a projection per root of their number"""

    def __init__(self) -> None:
        self.kept: dict[int, list[tuple[NDArray[np.float64], T]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.kept.values()))

    def find(self, frame: Structure) -> T | None:
        """What is kept for the frame that this is a copy of; None where there is none."""
        projections = _projections(frame.positions, frame.cell, frame.pbc, len(PRIMES))
        slack = min(self.DIGITS * np.sqrt(3 * frame.n_atoms), 0.4 * GRID)
        for key in _hashed(frame.atomic_numbers, frame.pbc, projections, slack):
            for others, value in self.kept.get(key, ()):
                if np.abs(others - projections).max() < slack:
                    return value
        return None

    def add(self, frame: Structure, value: T) -> None:
        """Keep something for a frame."""
        projections = _projections(frame.positions, frame.cell, frame.pbc, len(PRIMES))
        key = _hashed(frame.atomic_numbers, frame.pbc, projections, 0.0)[0]
        self.kept.setdefault(key, []).append((projections, value))


def _none() -> Hashes:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class SeenFrames:
    """Fingerprints of the frames that a potential was trained on, and of those that chose its best weights."""

    train: Hashes = field(default_factory=_none)
    """sorted"""
    valid: Hashes = field(default_factory=_none)
    """sorted"""
    n_train: int = 0
    """how many there were, remembered or not"""
    n_valid: int = 0

    @classmethod
    def of(cls, train: Iterable[Structure], valid: Iterable[Structure]) -> SeenFrames:
        """Of the frames of a run."""
        (a, n_a), (b, n_b) = _hashes(train), _hashes(valid)
        return cls(train=a, valid=b, n_train=n_a, n_valid=n_b)

    def __or__(self, other: SeenFrames | None) -> SeenFrames:
        """Of two trainings one after the other."""
        if other is None:
            return self
        return SeenFrames(
            train=_smallest(np.union1d(self.train, other.train)),
            valid=_smallest(np.union1d(self.valid, other.valid)),
            n_train=self.n_train + other.n_train,
            n_valid=self.n_valid + other.n_valid,
        )

    @property
    def complete(self) -> bool:
        """Whether all training frames are remembered."""
        return self.n_train <= MOST

    def where(self, frame: Structure | Atoms) -> Seen:
        """Whether a frame was among the training frames, among the validation frames, or in neither."""
        if isinstance(frame, Atoms):
            found = fingerprints(frame.numbers, frame.positions, frame.cell.array, frame.pbc, SLACK)
        else:
            found = fingerprints(frame.atomic_numbers, frame.positions, frame.cell, frame.pbc, SLACK)
        return "train" if _any_in(found, self.train) else "valid" if _any_in(found, self.valid) else "new"

    def to_arrays(self) -> dict[str, NDArray[np.int64]]:
        """What is stored with a potential."""
        return {"seen.train": self.train, "seen.valid": self.valid, "seen.counts": np.array([self.n_train, self.n_valid])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.int64]]) -> SeenFrames | None:
        """What ``to_arrays`` made; None where a potential says nothing of its frames."""
        if "seen.counts" not in arrays:
            return None
        n_train, n_valid = (int(n) for n in arrays["seen.counts"])
        return cls(train=arrays["seen.train"], valid=arrays["seen.valid"], n_train=n_train, n_valid=n_valid)


def _any_in(values: Sequence[int], known: Hashes) -> bool:
    """Whether one of the values is in a sorted array."""
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return len(known) > 0 and bool((known[places] == values).any())


def _hashes(structures: Iterable[Structure]) -> tuple[Hashes, int]:
    """Sorted fingerprints, at most ``MOST``, and the number of structures."""
    found = [fingerprints(s.atomic_numbers, s.positions, s.cell, s.pbc)[0] for s in structures]
    return _smallest(np.unique(np.array(found, dtype=np.int64))), len(found)


def _smallest(hashes: Hashes) -> Hashes:
    return hashes[:MOST]


def read_seen_frames(path: Path | str) -> SeenFrames | None:
    """The fingerprints in a saved potential; None if it has none (made by an older gossamer, or by hand).

    Raises:
        ValueError: not a safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return SeenFrames.from_arrays({k: file.get_tensor(k) for k in file.keys() if k.startswith("seen.")})  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"'{path}' is not a readable safetensors file ({error}). It may be truncated: copy it again.") from None


@dataclass(frozen=True)
class Sorted:
    """Indices of labelled frames: those to take errors on, and what is to be said of the others."""

    used: list[int]
    n_train: int
    """recognised training frames, left out or not"""
    n_valid: int
    """recognised validation frames; they are used"""
    training_error: bool
    """all frames used were trained on"""
    notes: list[str]
    """plain sentences for people"""


def leave_out_training_frames(seen: SeenFrames | None, frames: Sequence[Structure | Atoms], include: bool = False) -> Sorted:
    """Choose the frames whose errors say something of accuracy.

    Args:
        seen: What the potential knows of its training; None: nothing can be recognised, and all frames are used.
        frames: Labelled frames.
        include: Use training frames too.

    Returns:
        The frames that were not trained on; all of them, marked as training error, where none is left.
    """
    everything = list(range(len(frames)))
    if seen is None or not everything:
        return Sorted(everything, 0, 0, False, [])
    kinds = [seen.where(frames[k]) for k in everything]
    n_train, n_valid = kinds.count("train"), kinds.count("valid")
    fresh = [k for k in everything if kinds[k] != "train"]
    notes = list(_notes(seen, len(frames), n_train, n_valid, include))
    return Sorted(everything if include or not fresh else fresh, n_train, n_valid, not fresh, notes)


def _notes(seen: SeenFrames, n: int, n_train: int, n_valid: int, include: bool) -> Iterator[str]:
    if n_train == n:
        yield f"TRAINING ERROR: all {n} frames were trained on, so this says nothing of accuracy. Give frames kept aside."
    elif n_train:
        yield f"{n_train} of {n} frames were trained on; they are {'included: the errors are too small' if include else 'left out'}."
    if n_valid:
        yield f"{n_valid} chose the best weights (validation): errors on new frames are a little larger."
    if not seen.complete:
        yield (
            f"The potential remembers {len(seen.train):,} of its {seen.n_train:,} training frames: "
            f"{'most' if seen.n_train > 2 * len(seen.train) else 'some'} others cannot be recognised."
        )
