"""Machine code kept from one process to the next, and read back only if it is what was kept.

Beside each file lies its checksum. A file is loaded only if it and its folder belong to this user (or root), nobody else may write
it, and the checksum is right; a damaged library would end the process, and a foreign one would run in it. The folder holds no more than
`LIMIT`: what was used longest ago goes.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gossamer.files import atomic_path, cache_folder, checksum, locked, write_text

log = logging.getLogger(__name__)
CHECKSUM = ".sha256"
LIMIT = 4 * 1024**3
"""bytes: some hundred programs, or some dozen networks whose training steps were compiled"""


class Untrusted(Exception):
    """A kept file that must not be loaded, and why."""


def cached(name: str) -> Path:
    """Where a file of this name is kept; the folder is made.

    Raises:
        OSError: the folder cannot be made.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder / name


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """While the block runs, threads and processes that come to one for the same file wait: what one makes the others find.

    Where nothing can be written all go on at once.
    """
    with ExitStack() as held:
        with suppress(OSError):
            held.enter_context(locked(path.parent, path.name, wait=True))
        yield


@contextmanager
def keeping(path: Path) -> Iterator[Path]:
    """Yield a temporary path; if the block ends well, what it wrote there is kept under ``path``, with its checksum."""
    with atomic_path(path) as temporary:
        yield temporary
        temporary.chmod(0o600)
        write_text(_checksum_file(path), checksum(temporary))
    tidy()


def check(path: Path) -> None:
    """
    Raises:
        Untrusted: the file is not what was kept, or others could have changed it.
    """
    try:
        check_owner(path.parent)
        check_owner(path)
        kept = _checksum_file(path).read_text("utf-8")
        if kept.strip() != checksum(path):
            raise Untrusted(f"'{path}' was damaged or altered")
        with suppress(OSError):  # a folder that cannot be written is read all the same
            os.utime(path)
    except (OSError, UnicodeDecodeError) as error:
        raise Untrusted(f"'{path}' cannot be checked ({error})") from None


def check_owner(place: Path) -> None:
    """
    Raises:
        Untrusted: a file or folder belongs to another user, or others can write it.
        OSError: it cannot be looked at.
    """
    found = os.stat(place)
    if found.st_uid not in (os.getuid(), 0):
        raise Untrusted(f"'{place}' belongs to another user")
    folder = stat.S_ISDIR(found.st_mode)
    shared = found.st_mode & (stat.S_IWOTH | (0 if folder else stat.S_IWGRP))
    if shared and not (folder and found.st_mode & stat.S_ISVTX):
        raise Untrusted(f"'{place}' can be written by other users")


def tidy(limit: int = LIMIT) -> None:
    """Remove what was used longest ago until no more than ``limit`` bytes are left; a folder within counts as one thing."""
    found = []
    with suppress(OSError):  # another process may be tidying
        for path in cache_folder().iterdir():
            if path.name.startswith((".", "lammps-")) or path.suffix == CHECKSUM:
                continue  # being written; LAMMPS loads it by that name from users' inputs; goes with its file
            files = [p.stat() for p in path.rglob("*")] if path.is_dir() else [path.stat()]
            found.append((max((f.st_mtime for f in files), default=0.0), sum(f.st_size for f in files), path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            return
        log.info("'%s' is removed: the cache holds more than %.1f GiB", path, limit / 1024**3)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            forget(path)
        total -= size


def forget(path: Path) -> None:
    """Remove a kept file, as far as that is possible."""
    for file in (path, _checksum_file(path)):
        with suppress(OSError):
            file.unlink(missing_ok=True)


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + CHECKSUM)
