"""Data sets and splits: what goes into training, validation and test, and that nothing leaks between them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import NDArray
from pydantic import Field, field_validator

from gossamer.arguments import at_home
from gossamer.data.atoms import own_results
from gossamer.data.fingerprint import Copies
from gossamer.data.from_atoms import from_atoms, suggestion
from gossamer.data.labels import LabelConfig, as_labels, leaving_out, refuse_unread
from gossamer.data.readers import checked, read_structures
from gossamer.data.store import Store
from gossamer.data.structure import REACH, Structure
from gossamer.settings import settings

log = logging.getLogger(__name__)


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
    """Fraction of the frames split off for validation where ``valid`` is None; by group, as nearly as whole groups allow."""
    valid_size: Annotated[int, Field(gt=0)] | None = None
    """Number of validation frames instead of a fraction."""
    train_size: Annotated[int, Field(gt=0)] | None = None
    """Use only this many training frames, chosen at random after the split (isolated atoms first)."""
    split: Literal["random", "group"] = "random"
    """"group" keeps frames of one ``labels.group`` on one side, so that similar frames do not leak."""
    seed: Annotated[int, Field(ge=0)] = 0
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
    """eV per element, or how to find them: frames of a single atom that has no neighbour within the cutoff, or a least-squares fit
    (in fine-tuning: to labels less the predictions of the start)."""

    @field_validator("elements")
    @classmethod
    def _known(cls, elements: list[str] | None) -> list[str] | None:
        for k, element in enumerate(elements or ()):
            if element not in chemical_symbols[1:]:
                raise ValueError(f"'{element}' is not the symbol of an element. Write them as in [H, C, O]")
            if element in (elements or ())[:k]:
                raise ValueError(f"{element} is named twice")
        return elements


def open_dataset(
    path: str | Path | Sequence[str | Path], labels: LabelConfig | Mapping[str, Any] | None = None, keep_broken: bool = False
) -> Sequence[Structure]:
    """Structures by index: a store stays on disk, everything else is read into memory. ``keep_broken`` as in `read_structures`."""
    path = at_home(path)
    if isinstance(path, str | Path) and (Path(path) / "store.json").exists():
        refuse_unread(as_labels(labels), f"'{path}'", ())
        return Store(path)
    return list(read_structures(path, labels, keep_broken))


Data = Path | str | Structure | Atoms | Iterable[Path | str] | Iterable[Structure | Atoms]
"""labelled frames: where they are, or they themselves"""


def as_dataset(data: Data, labels: LabelConfig | Mapping[str, Any] | None = None, keep_broken: bool = False) -> Sequence[Structure]:
    """Structures by index, of files (`open_dataset`) or of frames in memory: structures as they are, Atoms with the labels they carry.
    ``keep_broken`` as in `read_structures`.

    Raises:
        TypeError: something else among the frames.
        ValueError: Atoms whose calculator went on to other atoms, or names and units of labels for structures, which have their own.
    """
    if isinstance(data, str | Path):
        return open_dataset(data, labels, keep_broken)
    given: Any = [data] if isinstance(data, Structure | Atoms) else data
    if isinstance(given, Sequence) and not isinstance(given, list | tuple):
        return given  # a store, or some of one: not read whole
    items: list[Any] = list(given)
    if items and all(isinstance(item, str | Path) for item in items):
        return open_dataset(items, labels, keep_broken)
    config = as_labels(labels)
    if items and all(isinstance(item, Structure) for item in items):
        refuse_unread(config, "a Structure", ())
    return [_in_memory(item, config, k, keep_broken) for k, item in enumerate(items)]


def _in_memory(frame: Any, labels: LabelConfig, k: int, keep_broken: bool) -> Structure:
    """A frame with its labels."""
    if isinstance(frame, Structure):
        return checked(frame, keep_broken)
    if not isinstance(frame, Atoms):
        raise TypeError(f"frame {k}: expected ASE's Atoms or a gossamer.Structure, found {type(frame).__name__}.")
    own_results(frame, f"frame {k}")
    return checked(from_atoms(frame, labels, f"frame {k}"), keep_broken)


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


def load_data(config: DataConfig, cutoff: float = REACH) -> tuple[Sequence[Structure], Sequence[Structure], Sequence[Structure] | None]:
    """Training, validation and test structures as the settings say.

    Args:
        config: Settings.
        cutoff: Å, within which a single atom that sees no other is an isolated one: these are always trained on.

    Raises:
        ValueError: nothing to begin with or left on one side, or a structure that occurs on both sides.
    """
    everything = open_dataset(config.train, config.labels)
    given, test = (None if path is None else open_dataset(path, config.labels) for path in (config.valid, config.test))
    for name, part in (("train", everything), ("valid", given), ("test", test)):
        if part is not None and len(part) == 0:
            raise ValueError(f"data.{name} ({getattr(config, name)!r}) holds no structures. Give some, or leave it out.")
    if given is not None:
        train, valid = everything, given
    else:
        train, valid = split(everything, config, cutoff)
    if config.train_size is not None:
        if config.train_size > len(train):
            raise ValueError(f"data.train_size is {config.train_size}, but only {len(train)} training frames are there.")
        alone = isolated_atoms(train, cutoff)
        others = np.random.default_rng(config.seed + 1).permutation(np.flatnonzero(~alone))
        chosen = np.concatenate([np.flatnonzero(alone), others])[: config.train_size]
        train = Subset(train, np.sort(chosen).tolist())
    check_leaks(train, valid, "validation")
    if test is not None:
        check_leaks(train, test, "test")
        warn_of_shared(valid, test)
    return train, valid, test


def isolated_atoms(structures: Sequence[Structure], cutoff: float = REACH) -> NDArray[np.bool_]:
    """(n_structures,) which of them are isolated atoms."""
    found = sizes(structures) == 1
    for k in np.flatnonzero(found).tolist():
        found[k] = structures[k].is_isolated(cutoff)
    return found


def sizes(structures: Sequence[Structure]) -> NDArray[np.int64]:
    """(n_structures,) their numbers of atoms; in a store, nothing else is read."""
    if isinstance(structures, Store):
        return structures.sizes
    if isinstance(structures, Subset):
        return sizes(structures.parent)[structures.indices]
    return np.array([s.n_atoms for s in structures], dtype=np.int64)


def split(structures: Sequence[Structure], config: DataConfig, cutoff: float = REACH) -> tuple[Subset, Subset]:
    """Split off the validation frames at random, or by group.

    Among the training frames stay isolated atoms, of which there are few, and frames (with their groups) of elements that no other has.
    """
    n = len(structures)
    rng = np.random.default_rng(config.seed)
    if n < 2:
        raise ValueError(f"{n} structures in '{config.train}' cannot be split. Give more, or a file for data.valid.")
    alone = isolated_atoms(structures, cutoff)
    others = np.flatnonzero(~alone)
    if len(others) < 2:
        raise ValueError(
            f"{n} structures in '{config.train}' cannot be split: {n - len(others)} are isolated atoms, which are all trained on. Give "
            "more of the others, or a file for data.valid."
        )
    size = config.valid_size or max(1, round(config.valid_fraction * len(others)))
    is_valid = np.zeros(n, dtype=bool)
    if config.split == "group":
        groups = np.array([_group(structures[k]) for k in others.tolist()])
        is_valid[others] = np.isin(groups, choose_groups(groups, size, rng))
    else:
        groups = others
        is_valid[rng.permutation(others)[:size]] = True
    if is_valid[others].all():
        raise ValueError(f"The split leaves no training frames: {n} frames, {int(is_valid.sum())} of them for validation.")
    kept = np.isin(groups, groups[np.isin(others, untrained(structures, is_valid))]) & is_valid[others]
    is_valid[others[kept]] = False
    if not is_valid.any():
        raise ValueError(
            f"The split leaves no validation frames: those of '{config.train}' that were drawn hold elements that no others have. Give more "
            "frames, or a file for data.valid."
        )
    if kept.any():
        log.info("%d frames are trained on instead of validating: no others hold their elements", int(kept.sum()))
    return Subset(structures, np.flatnonzero(~is_valid).tolist()), Subset(structures, np.flatnonzero(is_valid).tolist())


def untrained(structures: Sequence[Structure], is_valid: NDArray[np.bool_]) -> list[int]:
    """Indices of the validation frames with an element that no training frame holds."""
    held = {k: set(structures[k].atomic_numbers.tolist()) for k in np.flatnonzero(is_valid).tolist()}
    missing = set().union(*held.values())
    for k in np.flatnonzero(~is_valid).tolist():
        if not missing:
            break
        missing -= set(structures[k].atomic_numbers.tolist())
    return [k for k, elements in held.items() if elements & missing]


def _group(structure: Structure) -> str:
    if structure.group is None:
        raise ValueError(
            f"data.split is 'group', but {structure.name} has no group: data.labels.group does not say which entry names it, this format holds "
            "none, or the data was converted without. Split at random, or give a file for data.valid."
        )
    return structure.group


def choose_groups(groups: NDArray[np.str_], n_frames: int, rng: np.random.Generator, tries: int = 20) -> NDArray[np.str_]:
    """Some groups, at least one and never all of several, whose frames are together about ``n_frames``.

    Groups are taken in a random order, each if it brings the number of frames nearer; the best of some orders counts.

    Args:
        groups: (n_structures,) the group of each.
        n_frames: How many frames to take.
        rng: Decides the orders.
        tries: How many orders.
    """
    names, counts = np.unique(groups, return_counts=True)
    best: list[int] = []
    nearest = n_frames
    for _ in range(tries):
        taken, total = [], 0
        for k in rng.permutation(len(names)).tolist():
            more = total + int(counts[k])
            if abs(more - n_frames) < abs(total - n_frames) and more < len(groups):
                taken.append(k)
                total = more
        if abs(total - n_frames) < nearest:
            best, nearest = taken, abs(total - n_frames)
    order = rng.permutation(len(names))
    return names[best] if best else names[order[[np.argmin(counts[order])]]]  # all are large: one of the smallest


def without(structures: Sequence[Structure], *others: Sequence[Structure]) -> Sequence[Structure]:
    """The structures that do not occur among others, by `Copies`."""
    known = Copies[bool]()
    for structure in chain(*others):
        known.add(structure, True)
    kept = [k for k in range(len(structures)) if known.find(structures[k]) is None]
    return structures if len(kept) == len(structures) else Subset(structures, kept)


def digest(structures: Sequence[Structure]) -> str:
    """sha256 over what training reads of structures, in their order: atoms, cells, labels and fixed atoms, wherever the file lies."""
    total = hashlib.sha256()
    for s in structures:
        for part in (s.atomic_numbers, s.positions, s.cell, s.pbc, s.free):
            total.update(np.ascontiguousarray(part).tobytes())
        for name, label in sorted(s.labels.items()):
            total.update(name.encode() + np.ascontiguousarray(label, dtype=np.float64).tobytes())
        if s.weight != 1:
            total.update(np.float64(s.weight).tobytes())
    return total.hexdigest()


def check_leaks(train: Sequence[Structure], other: Sequence[Structure], label: str, limit: int = 200_000) -> None:
    """Raise ValueError if a frame occurs among the training frames and the others (data up to ``limit`` frames)."""
    if len(train) + len(other) > limit:
        log.warning("%d frames are too many to look for %s frames among the training frames", len(train) + len(other), label)
        return
    seen = Copies[str]()
    for structure in train:
        seen.add(structure, structure.name)
    for structure in other:
        twin = seen.find(structure)
        if twin is not None:
            raise ValueError(
                f"{structure.name} ({label}) is the same structure as {twin} (training). Errors on it would mean nothing: "
                "leave copies out (gossamer data convert --drop-duplicates, for copies in one file), or keep them on one side (data.split: group)."
            )


def warn_of_shared(valid: Sequence[Structure], test: Sequence[Structure], limit: int = 200_000) -> None:
    """Say so if test frames are validation frames too (data up to ``limit`` frames)."""
    shared = len(test) - len(without(test, valid)) if len(valid) + len(test) <= limit else 0
    if shared:
        log.warning(
            "%d of %d test frames are validation frames too, which choose the best weights: errors on new frames are a little larger",
            shared,
            len(test),
        )


class LoneStresses(Sequence[Structure]):
    """A data set whose isolated atoms have a stress, by `Structure.with_lone_stress`: files that have stresses seldom have theirs."""

    def __init__(self, parent: Sequence[Structure], cutoff: float) -> None:
        self.parent, self.cutoff = parent, cutoff

    def __len__(self) -> int:
        return len(self.parent)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return LoneStresses(self.parent[index], self.cutoff)
        return self.parent[index].with_lone_stress(self.cutoff)


def require_labels(
    structures: Sequence[Structure], needed: Sequence[str], why: str, cutoff: float = REACH, missing: str = "error"
) -> dict[str, int]:
    """Of how many structures each needed label is learned: those that have it, and for the stress isolated atoms (``cutoff`` in Å).

    Raises:
        ValueError: naming the first frame that lacks one (`Structure.lacks`), and how many do, unless ``missing`` is "skip".
    """
    having, lacking = dict.fromkeys(needed, 0), dict.fromkeys(needed, 0)
    first: dict[str, Structure] = {}
    for structure in structures:
        for label in needed:
            if label in structure.labels or (label == "stress" and structure.is_isolated(cutoff)):
                having[label] += 1
            elif missing == "error" and structure.lacks(label, cutoff):
                first.setdefault(label, structure)
                lacking[label] += 1
    for label, structure in first.items():
        raise ValueError(
            f"{structure.name} has no {label}, but {why.format(label=label)}: {lacking[label]} of {len(structures)} frames have none. Set that weight "
            f"to 0, say under which name it is stored (data.labels.{label}), learn it from the frames that have it (loss.missing: skip), or leave "
            f"out frames without: {leaving_out(needed)}."
            + (f" In the file: {hint}." if (hint := suggestion(label, structure.entries)) else "")
        )
    return having
