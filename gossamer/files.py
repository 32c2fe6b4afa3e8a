"""Writing files so that nothing is lost (to a temporary file, synced, then renamed), and reading compressed ones."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMPRESSIONS = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it replaces ``path`` only if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Replace the content of a file, or leave the old one untouched."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def open_text(path: Path) -> io.StringIO | io.TextIOWrapper:
    """Text of a possibly compressed file; compressed ones are held in memory, since ASE seeks backwards."""
    if path.suffix not in COMPRESSIONS:
        return open(path, encoding="utf-8")
    try:
        with COMPRESSIONS[path.suffix](path, "rt") as file:  # type: ignore[operator]
            return io.StringIO(file.read())
    except (lzma.LZMAError, zlib.error, UnicodeDecodeError, OSError, EOFError) as error:
        raise ValueError(f"'{path}' cannot be decompressed ({error}). It may be truncated: copy it again.") from None


def cache_folder() -> Path:
    """Where compiled programs and kernels are kept: $GOSSAMER_CACHE, or gossamer in the user's cache folder."""
    own = os.environ.get("GOSSAMER_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gossamer"


class InputError(ValueError):
    """A file or option of the user is wrong. (The judge stops at it, where an error of the judged calculator counts against it.)"""
