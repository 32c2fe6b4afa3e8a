"""Files: written so that nothing is lost (to a temporary file, synced, then renamed), locked, read when compressed; errors explained."""

from __future__ import annotations

import bz2
import errno
import filecmp
import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import platform
import re
import secrets
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)
COMPRESSIONS = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
UNPACKED, SHRINKS = 2**28, 50
"""bytes that any compressed file may unpack to, and times its own size that a larger one may"""


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it replaces ``path`` only if the block ends without an error.

    No other thread has the same one, nor a process of the same number in another container or on another machine.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.part{path.suffix}")
    try:
        with naming(path, temporary):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Errors of the system in the block that name no file (a full disk), or its temporary one, name this file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, temporary, str(temporary)):
            error.filename = str(path)
        raise


@contextmanager
def keeping_before(path: Path | str) -> Iterator[Path]:
    """As ``atomic_path``; what ``path`` held, if it was something else, gets the first free name of NAME.previous, NAME.previous-2 ..."""
    path = Path(path)
    with atomic_path(path) as temporary:
        yield temporary
        if path.exists() and not filecmp.cmp(temporary, path, shallow=False):
            set_aside(path)


def set_aside(path: Path) -> None:
    """Rename a file that is in the way, and say so."""
    names = (path.with_name(f"{path.name}.previous{f'-{k}' if k > 1 else ''}") for k in count(1))
    free = next(name for name in names if not name.exists())
    path.rename(free)
    log.warning("'%s' was there before: it is called '%s' now", path, free.name)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder; it takes the place of ``path``, whole and synced, only if the block ends without an error.

    A system renames one folder at a time: the old one is set aside, then the new one gets the name. A process that is killed in between
    leaves the old one in a hidden folder, and the next call puts it back, with a line of the log.

    Raises:
        RuntimeError: another process writes the same folder.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.replacing")
    with locked(path.parent, path.name):
        _put_back(path, aside)
        new = aside / "new"
        new.mkdir(parents=True)
        try:
            yield new
            for file in (*new.rglob("*"), new):
                sync(file)
            if path.exists():
                path.rename(aside / "old")
            new.rename(path)
            sync(path.parent)
        finally:
            _put_back(path, aside)


def _put_back(path: Path, aside: Path) -> None:
    """End what ``atomic_folder`` began: nothing set aside is lost."""
    old = aside / "old"
    if old.exists() and not path.exists():
        old.rename(path)
        sync(path.parent)
        log.warning("'%s' is back: what was to replace it ended before it could", path)
    shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_parts(folder: Path, stems: Sequence[str] | None = None) -> None:
    """Remove temporary files of ``atomic_path`` that killed processes left; with ``stems``, only those of files of these names."""
    for path in folder.glob(".*.part*"):
        found = re.fullmatch(r"\.(.+)\.(\d+)(?:-[0-9a-f]+)?\.part(\.[^.]*)?", path.name)
        if found and (stems is None or found[1] in stems) and not _alive(int(found[2])):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def locked(folder: Path | str, name: str = "", wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs, and clear it of what killed ones left half written.

    The lock belongs to the open file: it ends with the process, however that ends. A second lock on the same folder in the same
    process is refused too. Where the file system has no locks, a line of the log says so.

    Args:
        folder: Made if it is not there (and removed again if the block leaves it empty).
        name: Lock only the file of this name in the folder, and what is written beside it.
        wait: For whoever holds the lock. Nothing is cleared then: processes of other machines may be writing, which no lock keeps out.

    Raises:
        RuntimeError: another run holds the lock; the message says which process.
    """
    folder = Path(folder)
    made = not folder.exists()
    path = folder / (f".{name}.lock" if name else ".lock")
    descriptor = _lock(path, folder / name if name else folder, wait)
    try:
        stem = Path(name).stem
        if not wait:
            remove_parts(folder, [stem, f"{stem}.state"] if name else None)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still ours
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # forked children may hold the file open
        os.close(descriptor)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def _lock(path: Path, what: Path, wait: bool) -> int:
    """Descriptor of the locked file, with a line that says who holds it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise RuntimeError(f"'{what}' is in use by {holder}. Wait for it, stop it, or choose another --out.") from None
        except OSError as error:
            log.warning("'%s' is not protected against a second run: no locks on this file system (%s)", what, error.strerror)
        if path.exists() and os.path.samestat(os.stat(path), os.fstat(descriptor)):  # not removed by its last owner meanwhile
            with suppress(OSError):  # the disk may be full, which is no reason to keep the lock for ever
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {platform.node()} ({' '.join(sys.argv)[:300]})\n".encode())
            return descriptor
        os.close(descriptor)


ADVICE = {
    errno.ENOSPC: "Free some space; what was finished before is intact.",
    errno.EDQUOT: "Free some space; what was finished before is intact.",
    errno.EFBIG: "What was finished before is intact.",
    errno.EACCES: "Choose another place, or change its permissions.",
    errno.EPERM: "Choose another place, or change its permissions.",
    errno.EROFS: "Choose another place.",
    errno.EISDIR: "A file is expected there, not a folder.",
    errno.ENOTDIR: "A folder is expected there, not a file.",
    errno.EEXIST: "A file is in the way: move it, or choose another name.",
}


def explain(error: OSError) -> str:
    """An operating system's error in one line: what happened, where, what to do. Our own errors stay as they are."""
    if error.errno is None or error.strerror is None:
        return str(error) or type(error).__name__
    where = f"'{error.filename}': " if error.filename else ""
    return f"{where}{error.strerror}. {ADVICE.get(error.errno, '')}".rstrip()


def checksum(path: Path | str) -> str:
    """SHA-256 of a file; of a folder, of the names and checksums of all files in it."""
    path = Path(path)
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        return hashlib.sha256("".join(f"{p.relative_to(path)} {checksum(p)}\n" for p in inside).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


YAML_WORDS = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
    ("merge", r"<<", "<"),
)
"""what a word without quotes may be, beside text: kind, pattern, first letters"""


def parse_yaml(text: str) -> Any:
    """What a YAML text holds; as in YAML 1.2, No, on, 010, 12:30:00 and 2026-11-28 are texts. So is 1e5 (`gossamer.settings.build`).

    Raises:
        yaml.YAMLError: it is not valid, or a key stands twice in one group, of which YAML itself would keep the last.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own, of YAML 1.1, are not wanted

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands twice", key.start_mark)
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    for kind, pattern, first in YAML_WORDS:
        Loader.add_implicit_resolver(
            f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), [*first, *([""] if kind == "null" else [])]
        )
    return yaml.load(text, Loader)


def say_replaced(*paths: Path | str) -> None:
    """Say in the log, before the work begins, which results of before it will replace."""
    there = [str(path) for path in paths if Path(path).exists()]
    if there:
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        log.warning("%s%s will be replaced: results of before", ", ".join(f"'{path}'" for path in there[:3]), more)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Replace the content of a file, or leave the old one untouched."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def open_text(path: Path) -> io.TextIOWrapper:
    """Text of a possibly compressed file; compressed ones are held in memory, since ASE seeks backwards.

    Raises:
        ValueError: it cannot be decompressed, or unpacks to more than real data does.
    """
    if path.suffix not in COMPRESSIONS:
        return open(path, encoding="utf-8")
    largest = most_unpacked(path.stat().st_size)
    try:
        with COMPRESSIONS[path.suffix](path, "rb") as file:  # type: ignore[operator]
            data = file.read(largest + 1)
    except (lzma.LZMAError, zlib.error, OSError, EOFError) as error:
        raise ValueError(f"'{path}' cannot be decompressed ({error}). It may be truncated: copy it again.") from None
    if len(data) > largest:
        raise ValueError(
            f"'{path}' has {path.stat().st_size:.2g} bytes and unpacks to more than {largest:.2g}: real data does not shrink so. Refused. "
            "If you trust it, unpack it yourself: files that are not compressed are read frame by frame."
        )
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")


def most_unpacked(packed: int) -> int:
    """Bytes that a compressed file of so many may unpack to before it is refused."""
    return max(UNPACKED, SHRINKS * packed)


def cache_folder() -> Path:
    """Where compiled programs and kernels are kept: $GOSSAMER_CACHE, or gossamer in the user's cache folder."""
    own = os.environ.get("GOSSAMER_CACHE")
    folder = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gossamer"
    return folder.absolute()  # libraries without a folder are looked for elsewhere


class InputError(ValueError):
    """A file or option of the user is wrong. (The judge stops at it, where an error of the judged calculator counts against it.)"""
