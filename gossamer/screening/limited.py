"""A time limit for each structure: a worker asks a process of its own, and ends that process when an answer takes too long.

A process can be ended whatever it does; an exception or a signal's handler would wait until native code returns to Python. Its own
children (programs that a calculator starts) are in its group and end with it.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.screening.database import Row
    from gossamer.screening.tasks import Asked, Block

ORPHAN = 2.0
"""times the limit after which the system ends a process whose worker has died and cannot end it"""
RAISED = ("builtins", "gossamer.files")
"""modules whose errors are raised in the worker as they are"""
READY = 600.0
"""s that loading and compiling the potential may take beside the limit"""


class Died(RuntimeError):
    """The process ended by itself: a crash of the calculator, or too little memory."""


class OutOfTime(Exception):
    """An answer took too long; the process was ended."""


class Process:
    """A Python process that answers questions about structures."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        command = [sys.executable, "-m", "gossamer.screening.limited", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
        theirs.close()
        atexit.register(self.end)

    def ask(self, what: str, asked: Asked, block: Block, seconds: float) -> Any:
        """The answer.

        Args:
            what: "get ready" or "answer", of tasks.
            asked: The question.
            block: Structures.
            seconds: That it may take, together.

        Raises:
            OutOfTime: it took longer.
            Died: it ended by itself.
            Exception: what was raised there, if of Python's own; else a RuntimeError that says it.
        """
        try:
            self.connection.send((what, asked, list(block), seconds))
            if not self.connection.poll(seconds):
                self.end()
                raise OutOfTime
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            self.end()
            raise Died(f"a process ended by itself, with status {self.process.returncode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return not self.connection.closed and self.process.poll() is None

    def end(self) -> None:
        """End it and its children."""
        atexit.unregister(self.end)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


_process: Process | None = None
"""of this worker: it keeps the potential from block to block"""


def _ask(asked: Asked, unit: Block, seconds: float) -> list[Row]:
    """Rows of structures; the time in which the potential is loaded is not theirs."""
    global _process
    if _process is None or not _process.alive:
        _process = Process()
    _process.ask("get ready", asked, unit, seconds + READY)
    return list(_process.ask("answer", asked, unit, seconds))


def answer_in_time(asked: Asked, units: Sequence[Block], seconds: float) -> list[Row]:
    """Rows of units of structures that are computed together, each structure within a time.

    Several together may take the time of all: a batch says nothing of the time of one. Where that is not enough, one at least takes more
    than its own, and each is asked alone; so "timed out" is always said of a structure that was alone, and a batch never makes it so.

    Args:
        asked: The question.
        units: Structures.
        seconds: For one structure.

    Raises:
        Died: the process ended by itself.
        Exception: the potential cannot be had.
    """
    from gossamer.screening.tasks import timed_out

    rows: list[Row] = []
    for unit in units:
        try:
            rows += _ask(asked, unit, seconds * len(unit))
        except OutOfTime:
            rows += [timed_out(*unit[0], seconds)] if len(unit) == 1 else answer_in_time(asked, [[one] for one in unit], seconds)
    return rows


def serve(connection: Connection) -> None:
    """Answer until the worker is gone."""
    from gossamer.screening import tasks

    works = {"get ready": tasks.get_ready, "answer": tasks.answer}
    while True:
        try:
            what, asked, block, seconds = connection.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, ORPHAN * seconds)
        try:
            answer: Any = works[what](asked, block)
        except Exception as error:
            answer = error if type(error).__module__ in RAISED else RuntimeError(f"{type(error).__name__}: {error}")
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        connection.send(answer)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
