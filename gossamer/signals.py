"""Stopping where it is safe: SIGTERM, which batch systems send before they kill, becomes a request that a loop can look at."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

STOPPED = 128 + signal.SIGTERM
"""exit status after SIGTERM, as the shell's own"""


class Stopped(RuntimeError):
    """SIGTERM ended what was asked for before it was done; the message says how to go on."""


class StopRequested:
    """Context manager that notes SIGTERM instead of dying of it; the loop inside asks ``requested`` where it can stop.

        with StopRequested() as stop:
            while not done and not stop.requested:
                step()

    Off the main thread, where Python handles no signals, nothing is ever noted. The handler found is put back at the end.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """which signal came, or None"""
        self._previous: Any = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def __enter__(self) -> StopRequested:
        try:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # not the main thread: signals are someone else's business
            self._previous = None
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
