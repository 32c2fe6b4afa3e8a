"""Several structures in one command: their names, and what is said of those that fail."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.arguments import FILES, listed
from gossamer.data.atoms import read_frames
from gossamer.files import explain

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One frame of a structure file."""

    path: str
    frame: int
    name: str
    """of the file, and with all frames the frame's number"""
    said: str
    """how it is called in messages and answers"""


def distinct(paths: Sequence[Path | str]) -> list[str]:
    """Names of files without their endings; of those that share one, their folders' in front: a-POSCAR, b-POSCAR."""
    stems = [Path(p).stem for p in paths]
    return [s if stems.count(s) == 1 else f"{Path(p).absolute().parent.name}-{s}" for p, s in zip(paths, stems, strict=True)]


def jobs(
    structures: Sequence[Path | str] | Path | str, frame: int, all_frames: bool, what: str, alone: str
) -> tuple[list[Job], list[dict[str, Any]]]:
    """The frames asked for, and answers for files that cannot be read.

    Args:
        structures: Files, or one.
        frame: Which frame of each.
        all_frames: Every frame of each.
        what: Files or folders that come of it, for messages.
        alone: The function for one structure.

    Raises:
        TypeError: something else than files.
        ValueError: two files of one name in folders of one name, or both a frame and all frames.
    """
    expected = f"files, whose names the {what} get (of Atoms gossamer.{alone}, one after the other)"
    structures = listed("structures", structures, FILES, expected)
    names = distinct(structures)
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(
            f"Several structures are called {', '.join(twice)}, folder and all, and would be written over each other. Take them one by one."
        )
    if all_frames and frame != 0:
        raise ValueError(f"all_frames takes every frame, and frame {frame} one: give one of them.")
    found: list[Job] = []
    failures: list[dict[str, Any]] = []
    for name, path in zip(names, map(str, structures), strict=True):
        if not all_frames:
            found.append(Job(path, frame, name, path))
            continue
        try:
            n = len(read_frames(path))
        except (ValueError, OSError) as error:
            failures.append(failed(path, error))
            continue
        found += [Job(path, k, f"{name}-{k:0{len(str(n - 1))}d}", f"{path}, frame {k}") for k in range(n)]
    return found, failures


def failed(structure: str, error: Exception) -> dict[str, Any]:
    """The answer for a structure that could not be done, said in the log too."""
    message = explain(error) if isinstance(error, OSError) else str(error)
    log.error("%s: %s", structure, message)
    return {"structure": structure, "error": message}
