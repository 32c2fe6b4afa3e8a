"""A folder of plain arrays on disk, for data larger than memory: written once as a stream, read by index."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, overload

import ase.io
import numpy as np

from gossamer.arguments import as_path
from gossamer.data.structure import Structure, label_fields
from gossamer.files import atomic_path, locked, sync, write_json
from gossamer.quantities import OWN, QUANTITIES, Quantity

PER_ATOM: dict[str, tuple[Any, tuple[int, ...]]] = {
    "atomic_numbers": (np.int16, ()),
    "positions": (np.float64, (3,)),
    "fixed": (np.bool_, ()),
}
PER_FRAME: dict[str, tuple[Any, tuple[int, ...]]] = {
    "cell": (np.float64, (3, 3)),
    "pbc": (np.bool_, (3,)),
    "n_atoms": (np.int64, ()),
    "group": (np.dtype("S48"), ()),
    "weight": (np.float64, ()),
}
CHECKSUMS = "checksums"
"""of the frames, one CRC-32 each: a frame is read only as it was written. The first stores (format 1) have none"""
FORMAT = 3
SINCE = {"weight": 3}
"""formats before which there was none: what their frames have is the default"""


def _kinds(quantities: Iterable[Quantity]) -> dict[str, tuple[Any, tuple[int, ...]]]:
    return {q.name: (np.float64, q.shape) for q in quantities}


def write_store(structures: Iterable[Structure], path: Path | str) -> int:
    """Stream structures into a store; returns how many. A missing label is stored as NaN.

    Raises:
        FileExistsError: the target exists.
        RuntimeError: another process is writing it.
    """
    path = as_path("path", path, "the name of a folder")
    if path.exists():
        raise FileExistsError(f"'{path}' exists. Choose another name, or remove it first.")
    partial = path.with_name(f".{path.name}.part")
    with locked(path.parent, path.name):
        shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
        partial.mkdir(parents=True)
        try:
            count = _write(structures, partial)
            sync(partial)
            if path.exists():
                raise FileExistsError(f"'{path}' was made meanwhile. Choose another name, or remove it first.")
            os.replace(partial, path)
            sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return count


def write_xyz(structures: Iterable[Structure], path: Path | str, weights: bool = False) -> int:
    """Stream structures into extended XYZ, in our units and names (``group`` and, if asked for, ``weight`` are entries); returns how many.

    The file is written whole or not at all.

    Raises:
        FileExistsError: the target exists.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"'{path}' exists. Choose another name, or remove it first.")
    count = 0
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for s in structures:
            atoms = s.to_ase()
            if s.group is not None:
                atoms.info["group"] = s.group
            if weights:
                atoms.info["weight"] = s.weight
            ase.io.write(file, atoms, format="extxyz")
            count += 1
    return count


def _write(structures: Iterable[Structure], folder: Path) -> int:
    """The arrays, and then the file that makes them a store."""
    kinds = PER_ATOM | PER_FRAME | _kinds(QUANTITIES.values())
    count = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in [*kinds, CHECKSUMS]}
        for s in structures:
            values: dict[str, Any] = {
                "atomic_numbers": s.atomic_numbers,
                "positions": s.positions,
                "fixed": ~s.free,
                "cell": s.cell,
                "pbc": s.pbc,
                "n_atoms": s.n_atoms,
                "group": _group_name(s.group),
                "weight": s.weight,
                **{name: s.labels.get(name, np.full(q.full_shape(s.n_atoms), np.nan)) for name, q in QUANTITIES.items()},
            }
            rows = {name: np.ascontiguousarray(values[name], dtype=kind).tobytes() for name, (kind, _) in kinds.items()}
            for name, row in rows.items():
                files[name].write(row)
            files[CHECKSUMS].write(np.uint32(_checksum(rows)).tobytes())
            count += 1
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    write_json(folder / "store.json", {"format": FORMAT, "n_structures": count, "quantities": list(QUANTITIES)})
    return count


def _group_name(group: str | None) -> bytes:
    """At most 48 bytes; of a longer name its beginning and a digest, so that groups that begin alike stay apart."""
    name = (group or "").encode()
    if len(name) <= 48:
        return name
    return name[:31].decode(errors="ignore").encode() + b"~" + hashlib.sha256(name).hexdigest()[:16].encode()  # no half of a letter


def _checksum(rows: Mapping[str, bytes]) -> int:
    """CRC-32 of all that is stored of a frame."""
    return functools.reduce(lambda crc, name: zlib.crc32(rows[name], crc), sorted(rows), 0)


class Store(Sequence[Structure]):
    """The structures of a store, read from disk as they are asked for."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            content = json.loads((self.path / "store.json").read_text("utf-8"))
            count, labels = content["n_structures"], content.get("quantities", OWN)  # the first stores did not list them
            form = content["format"]
            if not (
                type(count) is int and 0 <= count < 1 << 48 and form in range(1, FORMAT + 1) and all(type(name) is str for name in labels)
            ):
                raise ValueError(f"{count!r} structures, format {form!r}, of which up to {FORMAT} are known")
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"'{path}' is not a complete store ({error}). Convert the data again.") from None
        known = [q for name, q in QUANTITIES.items() if name in labels]
        unknown = sorted(set(labels) - set(QUANTITIES))
        if unknown:
            raise ValueError(
                f"'{path}' holds {', '.join(unknown)}, which this gossamer does not know. Update gossamer, or convert the data again."
            )
        own = {name: kind for name, kind in PER_FRAME.items() if form >= SINCE.get(name, 1)}
        per_frame = own | _kinds(q for q in known if q.per == "structure")
        self._frames = {name: self._map(name, kind, count) for name, kind in per_frame.items()}
        if count and self._frames["n_atoms"].min() < 1:
            raise self._damaged("a frame without atoms")
        self._ends = np.cumsum(self._frames["n_atoms"])
        total = int(self._ends[-1]) if count else 0
        checked = form > 1 or (self.path / f"{CHECKSUMS}.bin").exists()
        self._checksums = self._map(CHECKSUMS, (np.uint32, ()), count) if checked else None
        per_atom = PER_ATOM | _kinds(q for q in known if q.per == "atom")
        self._atoms = {name: self._map(name, kind, total) for name, kind in per_atom.items()}

    def _map(self, name: str, kind: tuple[Any, tuple[int, ...]], rows: int) -> np.ndarray:
        dtype, shape = kind
        file = self.path / f"{name}.bin"
        expected, size = rows * np.dtype(dtype).itemsize * math.prod(shape), file.stat().st_size if file.exists() else 0
        if size != expected:
            raise self._damaged(f"'{file.name}' has {size} bytes, expected {expected}")
        return np.memmap(file, dtype=dtype, mode="r", shape=(rows, *shape)) if rows else np.zeros((0, *shape), dtype)

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"The store '{self.path}' is damaged ({what}): convert the data again, or copy the store again.")

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def sizes(self) -> np.ndarray:
        """(n_structures,) numbers of atoms"""
        return np.array(self._frames["n_atoms"], dtype=np.int64)

    @property
    def weighted(self) -> bool:
        """Whether frames do not all count alike."""
        return "weight" in self._frames and bool((self._frames["weight"] != 1).any())

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.path.absolute(),)  # another process maps the files itself

    @overload
    def __getitem__(self, index: int) -> Structure: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Structure]: ...
    def __getitem__(self, index: int | slice) -> Structure | Sequence[Structure]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = index % len(self)
        end = int(self._ends[index])
        rows = slice(end - int(self._frames["n_atoms"][index]), end)
        frame = {name: np.array(values[index]) for name, values in self._frames.items()}
        atom = {name: np.array(values[rows]) for name, values in self._atoms.items()}
        if self._checksums is not None:
            one = slice(index, index + 1)
            stored = {name: v[one].tobytes() for name, v in self._frames.items()} | {name: v.tobytes() for name, v in atom.items()}
            if _checksum(stored) != self._checksums[index]:
                raise self._damaged(f"frame {index} has another checksum than when it was written")
        group = bytes(frame["group"].item()).decode(errors="replace")
        labels: dict[str, Any] = {name: value for name, value in (frame | atom).items() if name in QUANTITIES and not np.isnan(value).any()}
        if "energy" in labels:
            labels["energy"] = float(labels["energy"])
        idle = not frame["pbc"].all() and labels.pop("stress", None) is not None  # stores that older versions wrote
        return Structure(
            atomic_numbers=atom["atomic_numbers"].astype(np.int64),
            positions=atom["positions"],
            cell=frame["cell"],
            pbc=frame["pbc"],
            **label_fields(labels),
            fixed=atom["fixed"] if atom["fixed"].any() else None,
            group=group or None,
            weight=float(frame.get("weight", 1.0)),
            name=f"'{self.path}' frame {index}",
            remarks=("stress without volume",) if idle else (),
        )

    def __iter__(self) -> Iterator[Structure]:
        return (self[k] for k in range(len(self)))
