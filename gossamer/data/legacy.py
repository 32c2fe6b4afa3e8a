"""Converter of legacy OC20 LMDB files, which hold pickled graphs. Unpickling is restricted to plain tensors and arrays.

Only `gossamer data convert --legacy-lmdb` calls this. A pickle can run any code; here every class it names is looked up
in a short table, and anything else is refused.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer.data.structure import Structure


class _Bag:
    """Stands in for the graph class: keeps what the pickle sets."""

    def __init__(self, *_: Any, **values: Any) -> None:
        self.__dict__.update(values)

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def _tensor_from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


_multiarray: Any = np._core.multiarray  # type: ignore[attr-defined]


def _allowed() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch.storage", "_load_from_bytes"): _tensor_from_bytes,
        ("collections", "OrderedDict"): OrderedDict,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        table |= {(module, "_reconstruct"): _multiarray._reconstruct, (module, "scalar"): _multiarray.scalar}
    for module in ("torch_geometric.data.data", "torch_geometric.data"):
        for name in ("Data", "DataEdgeAttr", "DataTensorAttr"):
            table[(module, name)] = _Bag
    for name in ("GlobalStorage", "NodeStorage", "EdgeStorage", "BaseStorage"):
        table[("torch_geometric.data.storage", name)] = _Bag
    return table


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles tensors, arrays and graph containers; refuses everything else."""

    table = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.table[(module, name)]
        except KeyError:
            raise ValueError(
                f"The pickle asks for {module}.{name}, which is not a tensor, an array or a graph. It was refused: such a file can run "
                "any code."
            ) from None


def restricted_loads(data: bytes) -> Any:
    """The object in a pickle of tensors, arrays and graphs."""
    return RestrictedUnpickler(io.BytesIO(data)).load()


def _fields(graph: Any) -> dict[str, Any]:
    values = dict(vars(graph))
    store = values.pop("_store", None)
    if isinstance(store, _Bag):
        values |= store.__dict__.get("_mapping", {})
    return values


def read_legacy_lmdb(path: Path | str) -> Iterator[Structure]:
    """Structures of a legacy OC20 LMDB: atomic_numbers, pos, cell, y (eV), force (eV/Å), fixed.

    Raises:
        ImportError: lmdb is not installed.
        ValueError: a record that is not such a graph, or that asks for code.
    """
    try:
        import lmdb
    except ImportError:
        raise ImportError("Legacy LMDB files need lmdb: pip install 'gossamer[lmdb]'") from None
    path = Path(path)
    environment = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False)
    with environment.begin() as transaction:
        for key, value in transaction.cursor():
            if not key.isdigit():
                continue
            name = f"'{path}' record {key.decode()}"
            try:
                values = _fields(restricted_loads(value))
                cell = np.zeros((3, 3)) if values.get("cell") is None else np.asarray(values["cell"], dtype=np.float64).reshape(3, 3)
                fixed = values.get("fixed")
                yield Structure(
                    atomic_numbers=np.asarray(values["atomic_numbers"]).astype(np.int64).ravel(),
                    positions=np.asarray(values["pos"], dtype=np.float64),
                    cell=cell,
                    pbc=np.full(3, bool(cell.any())),
                    energy=None if values.get("y") is None else float(values["y"]),
                    forces=None if values.get("force") is None else np.asarray(values["force"], dtype=np.float64),
                    fixed=None if fixed is None else np.asarray(fixed).astype(bool).ravel(),
                    group=None if values.get("sid") is None else str(int(values["sid"])),
                    name=name,
                ).validate()
            except (pickle.UnpicklingError, KeyError, AttributeError, EOFError, TypeError) as error:
                raise ValueError(f"{name} is not a legacy graph ({type(error).__name__}: {error}).") from None
    environment.close()
