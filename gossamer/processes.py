"""Processes that are started afresh (spawned) to work beside this one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def without_script() -> Iterator[None]:
    """A process started meanwhile does not run the caller's script again: it need not be written for that, with a main guard."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
