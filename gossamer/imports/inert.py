"""Reads what other packages save with torch (dictionaries, whole modules, packages) without running anything of it.

Pickles go through a machine that calls nothing (`pickle_machine`). Members of a zip archive are read into memory, never written, and a
file that would grow far beyond its size is refused.
"""

from __future__ import annotations

import contextlib
import errno
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.arguments import as_path
from gossamer.files import checksum
from gossamer.imports.pickle_machine import MAX_PICKLE, Inert, loads

MAX_BYTES = 16 << 30
"""bytes of all members of an archive"""
MAX_RATIO = 100
"""how many times a member may grow when it is decompressed"""
MAX_DEPTH = 100
"""of modules inside modules"""
MAX_NAMES = 1 << 26
"""letters of all names of modules, or of tensors, with those of the modules they lie in"""


@dataclass(frozen=True)
class Tree:
    """A file of another package, opened without running it."""

    path: Path
    form: str
    """"torch" (torch.save, or TorchScript), "package" (torch.package, such as `.nequip.zip`), or "bytes" (no archive)"""
    members: tuple[str, ...]
    """names inside the archive, without the folder that all of them lie in"""

    @cached_property
    def sha256(self) -> str:
        return checksum(self.path)

    @cached_property
    def head(self) -> bytes:
        """The first 64 KiB of the file."""
        with open(self.path, "rb") as file:
            return file.read(1 << 16)

    @cached_property
    def root(self) -> Any:
        """What was saved: the object in data.pkl; None where there is none.

        Raises:
            ValueError: as `pickle`.
        """
        return self.pickle("data.pkl") if "data.pkl" in self.members else None

    def read(self, member: str) -> bytes:
        """Bytes of a member other than a storage.

        Raises:
            ValueError: there is none of this name, it is damaged, or larger than a pickle may be.
        """
        with _archive(self.path) as (archive, prefix):
            return self._read(archive, prefix, member, MAX_PICKLE)

    def _read(self, archive: zipfile.ZipFile, prefix: str, member: str, limit: int = MAX_BYTES) -> bytes:
        if member not in self.members:
            raise ValueError(f"'{self.path}' has no '{member}' inside. It may be another kind of file, or cut: copy it again.")
        size = archive.getinfo(prefix + member).file_size
        if size > limit:
            raise ValueError(f"'{self.path}', {member}: {size:,} bytes, {limit:,} at most are read. No package writes such members.")
        with _damaged(self.path), archive.open(prefix + member) as file:
            return file.read(size)  # no more is decompressed

    def text(self, member: str) -> str:
        """Text of a member, as `read`."""
        return self.read(member).decode("utf-8", errors="replace")

    def pickle(self, member: str) -> Any:
        """The object in a pickle of the archive, inert: `loads`.

        Raises:
            ValueError: as `read` and `loads`.
        """
        with _archive(self.path) as (archive, prefix):
            return self._pickle(archive, prefix, member)

    def _pickle(self, archive: zipfile.ZipFile, prefix: str, member: str) -> Any:
        storages: dict[tuple[str, torch.dtype], Tensor] = {}

        def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
            if (key, dtype) not in storages:
                names = [n for n in (f"data/{key}", f".data/{key}.storage", f"constants/{key}", key) if n in self.members]
                if not names:
                    raise ValueError(f"a tensor whose storage '{key[:100]}' is not in the archive")
                found = bytearray(self._read(archive, prefix, names[0]))
                if len(found) % dtype.itemsize:
                    raise ValueError(f"a storage of {len(found)} bytes for numbers of {dtype}")
                storages[key, dtype] = torch.frombuffer(found, dtype=dtype) if found else torch.zeros(0, dtype=dtype)
            if len(storages[key, dtype]) != count:
                raise ValueError(f"a storage of {len(storages[key, dtype])} numbers of {dtype} that claims {count}")
            return storages[key, dtype]

        try:
            return loads(self._read(archive, prefix, member, MAX_PICKLE), storage)
        except ValueError as error:
            where = "" if str(self.path) in str(error) else f"'{self.path}', {member}: "
            raise ValueError(f"{where}{error}") from None


def open_tree(path: Path | str) -> Tree:
    """Open a file that another package saved. Nothing in it is run; archives are looked through for bombs first.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a damaged archive, or one that grows beyond measure or has members that lie upon one another or leave the folder; or a
            file of torch's before 2020, which is a row of pickles.
    """
    path = as_path("path", path, "a file of another package")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    with _damaged(path):
        archived = zipfile.is_zipfile(path)
    if not archived:
        with open(path, "rb") as file:
            head = file.read(512)
        if head[:1] == b"\x80" or head[257:262] == b"ustar":
            raise ValueError(
                f"'{path}' is a bare pickle or a tar file, as torch wrote them before 2020: these are not read. Load it where its package "
                "is installed, and save it again with torch.save."
            )
        return Tree(path, "bytes", ())
    with _archive(path) as (archive, prefix):
        members = tuple(name[len(prefix) :] for name in archive.namelist() if name.startswith(prefix) and not name.endswith("/"))
        order = archive.read(prefix + "byteorder").strip() if "byteorder" in members else b"little"
    if order != b"little":
        raise ValueError(f"'{path}' was written on a machine of byte order {order[:20]!r}; only little is read. Save it again on another.")
    package = "data.pkl" not in members and any(m.startswith(".data/") for m in members)
    return Tree(path, "package" if package else "torch", members)


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[tuple[zipfile.ZipFile, str]]:
    """An archive that was looked through, and the folder that all its members lie in."""
    with _damaged(path), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [e.filename for e in entries]
        bad = next((e.filename for e in entries if e.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)), None)
        bad = bad or next(
            (n for n in names if n.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", n) or "\0" in n or ":" in n[:2]), None
        )
        if bad is not None or len(set(names)) != len(names):
            raise ValueError(
                f"'{path}' has a member {bad or 'twice of the same name'!r}, which no package writes. It was refused: use another copy."
            )
        size = path.stat().st_size
        large = [e.filename for e in entries if e.file_size > MAX_RATIO * e.compress_size + (1 << 16)]
        if large or sum(e.file_size for e in entries) > MAX_BYTES or sum(e.compress_size for e in entries) > size:
            raise ValueError(
                f"'{path}' of {size:,} bytes would grow to {sum(e.file_size for e in entries):,}"
                f"{f' (member {large[0][:100]!r})' if large else ''}. It was refused: no package writes such archives."
            )
        first = names[0].split("/")[0] + "/" if names and "/" in names[0] else ""
        yield archive, first if all(n.startswith(first) for n in names) else ""


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        NotImplementedError,
        EOFError,
        OverflowError,
        RuntimeError,
        UnicodeDecodeError,
        struct.error,
        zlib.error,
    ) as error:
        raise ValueError(f"'{path}' is a damaged archive ({error}). Copy it again.") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the beginning of the file
            raise
        raise ValueError(f"'{path}' is a damaged archive ({error}). Copy it again.") from None


# --- modules ------------------------------------------------------------------------------------------------------


def tensors_of(module: Any) -> dict[str, Tensor]:
    """Parameters and buffers of a pickled `torch.nn.Module` and its children by the names of its state dictionary.

    Buffers that are not saved in one (persistent=False) are there too.

    Raises:
        ValueError: a parameter or buffer that is no plain tensor, or as `modules_of`.
    """
    found, letters = {}, 0
    for prefix, child in modules_of(module).items():
        for name, value in _own_tensors(prefix, child):
            letters = _counted(letters, prefix, name)
            found[f"{prefix}{name}"] = value
    return found


def _counted(letters: int, prefix: str, name: Any) -> int:
    """The letters of all names with those of one more."""
    if not isinstance(name, str):
        raise ValueError(f"a part of '{prefix[:200]}' whose name is a {type(name).__name__}, expected text")
    letters += len(prefix) + len(name) + 1
    if letters > MAX_NAMES or prefix.count(".") >= MAX_DEPTH:
        raise ValueError(
            f"modules {prefix.count('.')} deep, with names of {letters:,} letters; {MAX_DEPTH} and {MAX_NAMES:,} at most are read. No "
            "package writes such models."
        )
    return letters


def _own_tensors(prefix: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    state = module_state(module)
    for group in ("_parameters", "_buffers"):
        for name, value in (state.get(group) or {}).items() if isinstance(state.get(group), dict) else ():
            if value is not None and not isinstance(value, Tensor):
                kind = repr(value) if isinstance(value, Inert) else f"a {type(value).__name__}"
                raise ValueError(f"{prefix[:200]}{str(name)[:200]} is {kind}, expected a plain tensor. It was refused.")
            if value is not None:
                yield name, value


def modules_of(module: Any) -> dict[str, Inert]:
    """The module and all its children: prefix of the names of its tensors ("", "layers.0.", …) -> stand-in. Each is listed once.

    Raises:
        ValueError: modules inside one another, or names, beyond measure.
    """
    found: dict[str, Inert] = {}
    seen: set[int] = set()
    letters = 0
    todo = [("", module)]
    while todo:
        prefix, current = todo.pop()
        if not isinstance(current, Inert) or id(current) in seen:
            continue
        seen.add(id(current))
        found[prefix] = current
        children = module_state(current).get("_modules")
        if isinstance(children, dict):
            for name, child in reversed(children.items()):
                letters = _counted(letters, prefix, name)
                todo.append((f"{prefix}{name}.", child))
    return found


def module_state(module: Any) -> Mapping[str, Any]:
    """Attributes of a pickled module. Those of `torch.fx` come as an argument."""
    if not isinstance(module, Inert):
        return {}
    first = module.args[0] if module.args else None
    return module.attributes or (first if isinstance(first, dict) and "_modules" in first else {})
