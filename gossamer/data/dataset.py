"""Data sets and splits: what goes into training, validation and test, and that nothing leaks between them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from gossamer.data.labels import LabelConfig, refuse_unread
from gossamer.data.readers import read_structures, suggestion
from gossamer.data.store import Store
from gossamer.data.structure import Structure
from gossamer.settings import settings


@settings
class DataConfig:
    """Which structures, which labels, which split."""

    train: str | list[str]
    """File, folder or store with the training structures; a list is read in order."""
    valid: str | list[str] | None = None
    """Validation structures; None splits them off the training file."""
    test: str | list[str] | None = None
    """Test structures, evaluated at the end of training; None skips."""
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction (of frames or groups) split off for validation where ``valid`` is None."""
    valid_size: Annotated[int, Field(gt=0)] | None = None
    """Number of validation frames instead of a fraction (random split only)."""
    train_size: Annotated[int, Field(gt=0)] | None = None
    """Use only this many training frames, chosen at random after the split."""
    split: Literal["random", "group"] = "random"
    """"group" keeps frames of one ``labels.group`` on one side, so that similar frames do not leak."""
    seed: int = 0
    """Seed of the split."""
    labels: LabelConfig = LabelConfig()
    """Names and units of the labels."""
    functional: str | None = None
    """Functional of the labels as simple-dftd3 names it (pbe, r2scan ...), kept with the potential for its users and for ``--dispersion``."""
    dispersion: Literal["none", "included"] | None = None
    """Whether the labels hold a dispersion correction: then ``--dispersion`` is refused for the potential. None: not known
    (``--dispersion`` warns). `gossamer data convert --subtract-dispersion` takes it off."""
    elements: list[str] | None = None
    """Element table; by default the elements of the training structures."""
    reference_energies: Literal["auto", "isolated", "least_squares"] | dict[str, float] = "auto"
    """eV per element, or how to find them: single-atom frames, or a least-squares fit."""


def open_dataset(path: str | Path | Sequence[str | Path], labels: LabelConfig | None = None) -> Sequence[Structure]:
    """Structures by index: a store stays on disk, everything else is read into memory."""
    if isinstance(path, str | Path) and (Path(path) / "store.json").exists():
        refuse_unread(labels or LabelConfig(), f"'{path}'", ())
        return Store(path)
    return list(read_structures(path, labels))


class Subset(Sequence[Structure]):
    """Some structures of a data set, by index, without copying them."""

    def __init__(self, parent: Sequence[Structure], indices: Sequence[int]) -> None:
        self.parent, self.indices = parent, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return Subset(self.parent, self.indices[index])
        return self.parent[self.indices[index]]


def load_data(config: DataConfig) -> tuple[Sequence[Structure], Sequence[Structure], Sequence[Structure] | None]:
    """Training, validation and test structures as the settings say.

    Raises:
        ValueError: nothing left on one side, or a structure that occurs on both sides.
    """
    everything = open_dataset(config.train, config.labels)
    test = None if config.test is None else open_dataset(config.test, config.labels)
    if config.valid is not None:
        train, valid = everything, open_dataset(config.valid, config.labels)
    else:
        train, valid = split(everything, config)
    if config.train_size is not None:
        if config.train_size > len(train):
            raise ValueError(f"data.train_size is {config.train_size}, but only {len(train)} training frames are there.")
        chosen = np.random.default_rng(config.seed + 1).permutation(len(train))[: config.train_size]
        train = Subset(train, np.sort(chosen).tolist())
    check_leaks(train, valid, "validation")
    if test is not None:
        check_leaks(train, test, "test")
    return train, valid, test


def split(structures: Sequence[Structure], config: DataConfig) -> tuple[Subset, Subset]:
    """Split off the validation frames at random, or by group."""
    n = len(structures)
    rng = np.random.default_rng(config.seed)
    if n < 2:
        raise ValueError(f"{n} structures in '{config.train}' cannot be split. Give more, or a file for data.valid.")
    if config.split == "group":
        found = [structures[k].group for k in range(n)]
        if config.labels.group is None and None in found:
            raise ValueError("data.split is 'group', but data.labels.group does not say which entry names the group.")
        groups = np.array(found)
        names = np.unique(groups)
        chosen = rng.permutation(names)[: max(1, round(config.valid_fraction * len(names)))]
        is_valid = np.isin(groups, chosen)
    else:
        size = config.valid_size or max(1, round(config.valid_fraction * n))
        is_valid = np.zeros(n, dtype=bool)
        is_valid[rng.permutation(n)[:size]] = True
    if is_valid.all():
        raise ValueError(f"The split leaves no training frames: {n} frames, {int(is_valid.sum())} of them for validation.")
    return Subset(structures, np.flatnonzero(~is_valid).tolist()), Subset(structures, np.flatnonzero(is_valid).tolist())


def identity(structure: Structure) -> bytes:
    """A key that two frames with the same atoms, cell and positions (to 1e-6 Å) share."""
    digest = hashlib.sha256(structure.atomic_numbers.astype(np.int64).tobytes())
    digest.update(np.round(structure.positions, 6).tobytes() + np.round(structure.cell, 6).tobytes())
    return digest.digest()


def check_leaks(train: Sequence[Structure], other: Sequence[Structure], label: str, limit: int = 200_000) -> None:
    """Raise ValueError if a frame occurs among the training frames and the others (data up to ``limit`` frames)."""
    if len(train) + len(other) > limit:
        return
    seen = {identity(s): s.name for s in train}
    for structure in other:
        twin = seen.get(identity(structure))
        if twin is not None:
            raise ValueError(
                f"{structure.name} ({label}) is the same structure as {twin} (training). Errors on it would mean nothing: "
                "leave copies out (gossamer data convert --drop-duplicates, for copies in one file), or keep them on one side (data.split: group)."
            )


def require_labels(structures: Sequence[Structure], needed: Sequence[str], why: str) -> None:
    """Raise ValueError naming the first frame that lacks a needed label."""
    for structure in structures:
        for label in needed:
            if label not in structure.labels:
                raise ValueError(
                    f"{structure.name} has no {label}, but {why.format(label=label)}. Set that weight to 0, remove frames "
                    f"without {label}, or say under which name it is stored (data.labels.{label})."
                    + (f" In the file: {hint}." if (hint := suggestion(label, structure.entries)) else "")
                )
