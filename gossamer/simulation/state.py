"""Every number that one of ASE's integrators or optimisers holds, so that it can go on exactly where it stopped."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

OWNED = ("_thermostat", "_barostat", "state")


def numbers_of(value: Any, prefix: str = "") -> dict[str, NDArray[Any]]:
    """Numbers, arrays and lists of them among the attributes, by dotted name."""
    found: dict[str, NDArray[Any]] = {}
    for name, item in vars(value).items():
        if isinstance(item, bool | int | float | np.ndarray | np.generic) or (
            isinstance(item, list) and item and all(isinstance(x, float | np.ndarray | np.generic) for x in item)
        ):
            found[prefix + name] = np.array(item)
        elif name in OWNED:
            found |= numbers_of(item, f"{prefix}{name}.")
    return found


def put_back(target: Any, numbers: dict[str, NDArray[Any]]) -> None:
    """Set what ``numbers_of`` found, in the types that are there (lists stay lists)."""
    for key, value in numbers.items():
        owner = target
        *owners, name = key.split(".")
        for step in owners:
            owner = getattr(owner, step)
        old = getattr(owner, name)
        if isinstance(old, list):
            setattr(owner, name, list(value))
        elif isinstance(old, bool | int | float) and not isinstance(old, np.generic):
            setattr(owner, name, type(old)(value))
        else:
            setattr(owner, name, value.copy() if value.ndim else value[()])
