"""A folder of plain arrays on disk, for data larger than memory: written once as a stream, read by index."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from gossamer.data.structure import Structure, label_fields
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
}


def _kinds(quantities: Iterable[Quantity]) -> dict[str, tuple[Any, tuple[int, ...]]]:
    return {q.name: (np.float64, q.shape) for q in quantities}


def write_store(structures: Iterable[Structure], path: Path | str) -> int:
    """Stream structures into a store; returns how many. A missing label is stored as NaN.

    Raises:
        FileExistsError: the target exists.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"'{path}' exists. Choose another name, or remove it first.")
    partial = path.with_name(f".{path.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    kinds = PER_ATOM | PER_FRAME | _kinds(QUANTITIES.values())
    files = {name: open(partial / f"{name}.bin", "wb") for name in kinds}  # noqa: SIM115
    count = 0
    try:
        for s in structures:
            values: dict[str, Any] = {
                "atomic_numbers": s.atomic_numbers,
                "positions": s.positions,
                "fixed": ~s.free,
                "cell": s.cell,
                "pbc": s.pbc,
                "n_atoms": s.n_atoms,
                "group": (s.group or "").encode()[:48],
                **{name: s.labels.get(name, np.full(q.full_shape(s.n_atoms), np.nan)) for name, q in QUANTITIES.items()},
            }
            for name, value in values.items():
                dtype, _ = kinds[name]
                files[name].write(np.ascontiguousarray(value, dtype=dtype).tobytes())
            count += 1
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()
    (partial / "store.json").write_text(json.dumps({"format": 1, "n_structures": count, "quantities": list(QUANTITIES)}))
    os.replace(partial, path)
    return count


class Store(Sequence[Structure]):
    """The structures of a store, read from disk as they are asked for."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            content = json.loads((self.path / "store.json").read_text())
            count, labels = content["n_structures"], content.get("quantities", OWN)  # the first stores did not list them
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"'{path}' is not a complete store ({error}). Convert the data again.") from None
        known = [q for name, q in QUANTITIES.items() if name in labels]
        per_frame = PER_FRAME | _kinds(q for q in known if q.per == "structure")
        self._frames = {name: self._map(name, kind, count) for name, kind in per_frame.items()}
        self._ends = np.cumsum(self._frames["n_atoms"])
        total = int(self._ends[-1]) if count else 0
        per_atom = PER_ATOM | _kinds(q for q in known if q.per == "atom")
        self._atoms = {name: self._map(name, kind, total) for name, kind in per_atom.items()}

    def _map(self, name: str, kind: tuple[Any, tuple[int, ...]], rows: int) -> np.ndarray:
        dtype, shape = kind
        file = self.path / f"{name}.bin"
        expected = rows * np.dtype(dtype).itemsize * int(np.prod(shape))
        if file.stat().st_size != expected:
            raise ValueError(f"'{file}' has {file.stat().st_size} bytes, expected {expected}. The store is damaged: convert again.")
        return np.memmap(file, dtype=dtype, mode="r", shape=(rows, *shape)) if rows else np.zeros((0, *shape), dtype)

    def __len__(self) -> int:
        return len(self._ends)

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
        group = bytes(frame["group"].item()).decode()
        labels: dict[str, Any] = {name: value for name, value in (frame | atom).items() if name in QUANTITIES and not np.isnan(value).any()}
        if "energy" in labels:
            labels["energy"] = float(labels["energy"])
        return Structure(
            atomic_numbers=atom["atomic_numbers"].astype(np.int64),
            positions=atom["positions"],
            cell=frame["cell"],
            pbc=frame["pbc"],
            **label_fields(labels),
            fixed=atom["fixed"] if atom["fixed"].any() else None,
            group=group or None,
            name=f"'{self.path}' frame {index}",
        )

    def __iter__(self) -> Iterator[Structure]:
        return (self[k] for k in range(len(self)))
