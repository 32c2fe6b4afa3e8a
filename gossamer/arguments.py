"""What the public functions are given: one of something or several, files, whole numbers; what else it is, is said."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

FILES = (str, Path)


def at_home(given: Any) -> Any:
    """The name of a file with the home folder for the ~ that it begins with; anything else is what it was."""
    return type(given)(Path(given).expanduser()) if isinstance(given, FILES) and str(given).startswith("~/") else given


def listed(name: str, given: Any, kinds: tuple[type, ...], expected: str) -> list[Any]:
    """One thing of these kinds, or several, as a list.

    Args:
        name: Of the argument, for the message.
        given: Its value.
        kinds: Types that count.
        expected: What they are, for the message.

    Raises:
        TypeError: something else, or among them.
    """
    from ase import Atoms  # here: the flags of the command line read labels, which are named here, and answer at once

    several = isinstance(given, Iterable) and not isinstance(given, (*kinds, str, Atoms, Mapping))
    items = list(given) if several else [given]
    for item in items:
        if not isinstance(item, kinds):
            raise TypeError(f"{name}: expected {expected}, found {said(item)}.")
    return [at_home(item) for item in items]


def as_path(name: str, given: Any, expected: str) -> Path:
    """A path; ~/ is the home folder.

    Raises:
        TypeError: something else than the name of a file.
    """
    if not isinstance(given, FILES):
        raise TypeError(f"{name}: expected {expected}, found {said(given)}.")
    return Path(at_home(given))


def whole(name: str, given: Any, least: int) -> int:
    """A whole number.

    Raises:
        ValueError: something else, or less than ``least``.
    """
    try:
        number = operator.index(given)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, found {given!r}.") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, found {number}.")
    return number


def positive(name: str, given: Any) -> float:
    """A number above zero.

    Raises:
        ValueError: something else.
    """
    if not isinstance(given, Real) or not float(given) > 0:
        raise ValueError(f"{name} must be positive, found {given!r}.")
    return float(given)


def said(thing: Any) -> str:
    """What something is, for a message."""
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    return type(thing).__name__ + (" (its to_ase() gives Atoms)" if hasattr(thing, "to_ase") else "")
