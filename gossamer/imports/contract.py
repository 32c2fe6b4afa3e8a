"""What a source is: a module of this folder that knows the files of one package, and the helpers by which nothing in a file is left over.

A source `gossamer/imports/NAME.py` has

    PACKAGE = "…"                                                    the name under which people install it
    def recognises(tree: Tree) -> bool                               whether the file is one of its own; cheap, never raises
    def potential(tree: Tree, options: ImportOptions) -> Potential   in the precision of the file's weights

and a row in `gossamer.imports.SOURCES`. ``potential`` takes every tensor through `Weights` and every setting through `Known`, so
that what it does not know is refused by name; it keeps ``options.elements`` only (`keep_elements` does it for networks whose element
tables are Embeddings), and refuses a modal or a head that the file lacks (`choose`). It may set ``potential.imported`` to what it
knows of its origin, {"version": …}, with the modal or head that was taken where the file has only one. How the package itself evaluates the file stands in `reference.py`.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, replace
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers as number_of
from torch import Tensor, nn

from gossamer.data.statistics import Statistics
from gossamer.imports.pickle_machine import Inert
from gossamer.models import NequIPConfig
from gossamer.potential import Potential
from gossamer.settings import settings

REQUIRED: Any = object()
"""stands for no default"""


@settings
class ImportOptions:
    """What is taken of a file that holds more than one potential."""

    modal: str | None = None
    """Which functional or fidelity, of files trained on several (SevenNet)."""
    elements: list[str] | None = None
    """Keep only these elements: tables become smaller. By default all of the file."""
    head: str | None = None
    """Which readout, of files that have several (MACE)."""
    given: dict[str, str] = field(default_factory=dict)
    """What the file does not say: the unit of energies (schnetpack), the cutoff (LEIGNN)."""


def given(options: ImportOptions, where: str, name: str, kind: Callable[[str], Any] | Mapping[str, Any], what: str) -> Any:
    """What the file does not say and somebody gave (`--given NAME=VALUE`).

    Args:
        options: With ``given``.
        where: The file, for messages.
        name: Of the value.
        kind: What makes it from text, or words and what they stand for.
        what: The value in words.

    Raises:
        ValueError: it was not given, or is none.
    """
    text = options.given.get(name)
    words = f" ({', '.join(kind)})" if isinstance(kind, Mapping) else ""
    if text is None:
        raise ValueError(f"{where} does not say {what}: give it with --given {name}=…{words}.")
    try:
        return kind[text] if isinstance(kind, Mapping) else kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"--given {name}={text}: expected {what}{words}.") from None


def short(value: Any) -> str:
    """A value in a message. Nested ones are not spelled out: a small file can hold one whose text has no end."""
    if isinstance(value, Inert):
        return repr(value)[:200]
    if isinstance(value, list | tuple) and len(value) <= 20 and all(isinstance(v, str | int | float | None) for v in value):
        return str(value)[:200]
    return str(value)[:200] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def texts(values: Any, where: str, what: str) -> list[str]:
    """A list of names, as such.

    Raises:
        ValueError: something else.
    """
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{where}: {what} are {short(values)}, expected a list of names.")
    return list(values)


def whole_numbers(values: Any, where: str, what: str) -> list[int]:
    """A list of sizes, as such: tuples of tuples have no end of numbers, to be hashed or shown.

    Raises:
        ValueError: something else.
    """
    if not isinstance(values, list | tuple) or not all(type(v) is int for v in values):
        raise ValueError(f"{where}: {what} are {short(values)}, expected a list of whole numbers.")
    return list(values)


def text_or_none(value: Any) -> str | None:
    """Text such as a version; None instead of anything else, whose text might have no end."""
    return value if isinstance(value, str) else None


def tensors_by_name(values: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    """The tensors of a state dictionary, without entries that are None.

    Raises:
        ValueError: something else is among them: a kind of tensor that is not rebuilt, without which the potential would be another one.
    """
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{where}: '{short(name)}' is {short(value)}, expected a plain tensor. It was refused.")
    return {str(name): value for name, value in values.items() if value is not None}


class _Left:
    """Things by name, each of which must be taken or named as unneeded."""

    kind = "things"

    def __init__(self, found: Mapping[str, Any], where: str) -> None:
        self.found = dict(found)
        self.left = dict(found)
        self.where = where

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def _take(self, name: str, default: Any = REQUIRED) -> Any:
        if name not in self.found:
            if default is not REQUIRED:
                return default
            near = difflib.get_close_matches(name, self.found, n=3) or list(self.found)[:8]
            raise ValueError(f"{self.where} has no {self.kind[:-1]} '{name}' (but {', '.join(near)}): another version of its package?")
        self.left.pop(name, None)
        return self.found[name]

    def drop(self, *patterns: str) -> None:
        """These (names or wildcards) are known, and change nothing of what is computed."""
        for pattern in patterns:
            for name in fnmatch.filter(list(self.left), pattern):
                del self.left[name]

    def done(self) -> None:
        """Refuse what was not taken.

        Raises:
            ValueError: with its names.
        """
        if self.left:
            listed = ", ".join(f"{name}{self._value(value)}" for name, value in list(self.left.items())[:12])
            more = f" and {len(self.left) - 12} more" if len(self.left) > 12 else ""
            raise ValueError(
                f"{self.where} holds {self.kind} that this gossamer does not know: {listed}{more}. It was refused, because a potential "
                "without them would be another one."
            )

    def _value(self, value: Any) -> str:
        raise NotImplementedError


class Weights(_Left):
    """Tensors of a file by name."""

    kind = "tensors"

    def take(self, name: str, shape: Sequence[int] | None = None) -> Tensor:
        """A tensor, which now counts as used.

        Raises:
            ValueError: there is none of this name, or it has another shape.
        """
        found: Tensor = self._take(name)
        if shape is not None and tuple(found.shape) != tuple(shape):
            raise ValueError(f"{self.where}: '{name}' has shape {list(found.shape)}, expected {list(shape)}.")
        return found

    def constant(self, name: str, expected: Any, tolerance: float = 1e-5) -> None:
        """A tensor whose values are known beforehand.

        Raises:
            ValueError: it has others.
        """
        found, wanted = self.take(name).detach().double(), torch.as_tensor(np.asarray(expected, dtype=np.float64))
        if found.numel() != wanted.numel() or not torch.allclose(found.flatten(), wanted.flatten(), rtol=tolerance, atol=tolerance):
            raise ValueError(f"{self.where}: '{name}' is {found.flatten()[:6].tolist()}, expected {wanted.flatten()[:6].tolist()}.")

    def _value(self, value: Any) -> str:
        return f" {list(value.shape)}"


class Known(_Left):
    """Settings of a file by name."""

    kind = "settings"

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """A setting, which now counts as known. A default only where the package itself has that one.

        Raises:
            ValueError: there is none of this name.
        """
        return self._take(name, default)

    def expect(self, name: str, *allowed: Any, default: Any = REQUIRED) -> Any:
        """A setting of which only some values are known.

        Raises:
            ValueError: it has another.
        """
        found = self._take(name, default)
        if not any(found is a or (type(found) is type(a) and found == a) for a in allowed):
            raise ValueError(
                f"{self.where}: {name} is {short(found)}; this gossamer knows {', '.join(map(str, allowed))} only, "
                "so the potential would be another one. It was refused."
            )
        return found

    def _value(self, value: Any) -> str:
        return f" = {str(value)[:60]}" if isinstance(value, str | int | float | bool | None) else ""


def choose(kind: str, wanted: str | None, available: Sequence[str], where: str) -> str | None:
    """One of several modals or heads: the one asked for, or the only one; None where there are none.

    Raises:
        ValueError: it is not there, or there are several and none was asked for.
    """
    if wanted is None:
        if len(available) > 1:
            raise ValueError(f"{where} holds several: choose one with --{kind} ({', '.join(available)}).")
        return available[0] if available else None
    if wanted not in available:
        has = f"it has {', '.join(available)}" if available else f"it has no {kind}s: leave --{kind} out"
        raise ValueError(f"{where} has no {kind} '{wanted}' ({has}).")
    return wanted


def chosen_elements(available: Sequence[str], options: ImportOptions, where: str) -> list[str]:
    """The elements that are kept, in the order of the file.

    Raises:
        ValueError: one that the file lacks.
    """
    if options.elements is None:
        return list(available)
    missing = [e for e in options.elements if e not in available]
    if missing:
        raise ValueError(f"{where} does not know {', '.join(missing)} (--elements). It knows {', '.join(available)}.")
    return [e for e in available if e in options.elements]


def keep_elements(potential: Potential, elements: Sequence[str]) -> Potential:
    """The same potential for some of its elements; for networks that know elements by Embeddings (and constants) alone.

    Args:
        potential: Any.
        elements: Chemical symbols, all among its own.
    """
    old = potential.statistics
    if list(elements) == old.elements:
        return potential
    rows = torch.tensor([old.elements.index(e) for e in elements])
    scales = old.element_scales
    statistics = replace(
        old,
        elements=list(elements),
        reference_energies={e: old.reference_energies[e] for e in elements},
        element_scales=None if scales is None else {e: scales[e] for e in elements},
    )
    config = potential.model_config
    if isinstance(config, NequIPConfig) and config.pair_cutoffs is not None:
        config = replace(config, pair_cutoffs=_pairs_of(config.pair_cutoffs, elements))
    if isinstance(config, NequIPConfig) and config.element_neighbors is not None:
        config = replace(config, element_neighbors={e: n for e, n in config.element_neighbors.items() if e in elements})
    kept = Potential(config, statistics, potential.potential_config).eval()
    kept.network.to(potential.dtype)
    weights = potential.network.state_dict()
    for name, module in potential.network.named_modules():
        if isinstance(module, nn.Embedding):
            weights[f"{name}.weight"] = weights[f"{name}.weight"][rows]
    kept.network.load_state_dict(weights)
    kept.imported = potential.imported
    return kept


def _pairs_of(table: Mapping[str, Any], elements: Iterable[str]) -> dict[str, Any] | None:
    """A table of cutoffs without the elements that were left out."""
    kept = set(elements)
    found = {
        centre: {n: v for n, v in entry.items() if n in kept} if isinstance(entry, Mapping) else entry
        for centre, entry in table.items()
        if centre in kept
    }
    return {k: v for k, v in found.items() if not isinstance(v, Mapping) or v} or None


def foreign_statistics(
    elements: Sequence[str], energies: Mapping[str, float], mean_neighbors: float = 1.0, scales: Mapping[str, float] | None = None,
    energy_scale: float = 1.0,
) -> Statistics:  # fmt: skip
    """Statistics of a potential that was trained elsewhere: elements in the order of the file, what a lone atom of each gets in eV.

    Raises:
        ValueError: a name that is no chemical symbol.
    """
    strange = [e for e in elements if e not in number_of or e == "X"]
    if strange:
        raise ValueError(
            f"The file's elements {', '.join(strange[:10])} are no chemical symbols: kinds of atoms of one's own are not known."
        )
    return Statistics(
        elements=list(elements),
        reference_energies={e: float(energies[e]) for e in elements},
        element_scales=None if scales is None else {e: float(scales[e]) for e in elements},
        mean_neighbors=float(mean_neighbors),
        energy_scale=energy_scale,
    )
