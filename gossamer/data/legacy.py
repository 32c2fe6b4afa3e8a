"""Converter of legacy OC20 LMDB files, which hold pickled graphs. Only plain arrays are built from them.

Only `gossamer data convert --legacy-lmdb` calls this. A pickle can run any code and set any state, so nothing that a pickle names is
handed to it: each name in a short table is answered by a stand-in of this file, which checks what it is given and makes an array from
it. Operations that legacy graphs do not use are refused before unpickling.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer.data.lmdb_file import check_lmdb
from gossamer.data.readers import checked
from gossamer.data.structure import Structure

OPERATIONS = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG",
    "LONG1", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "NEWOBJ", "PUT", "BINPUT",
    "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET", "MEMOIZE",
}  # fmt: skip
"""of the pickle machine: numbers, text, containers, names, calls, states, memory"""
SIMPLE_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")


class _Graph:
    """Stands in for the graph class and its stores: keeps the values that the pickle sets."""

    def __init__(self, *_: Any, **values: Any) -> None:
        self.values: dict[str, Any] = values

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"a graph with a state of type {type(state).__name__}, expected a dictionary")
        self.values = {str(name): value for name, value in state.items()}


class _DType:
    """Stands in for a numpy dtype of plain numbers, and refuses all others."""

    def __init__(self, name: Any, *_: Any) -> None:
        if not (isinstance(name, str) and SIMPLE_DTYPE.fullmatch(name)):
            raise ValueError(f"an array of type {str(name)[:40]!r}, expected plain numbers such as 'f4' or 'i8'")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) >= 5 else None
        if order not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise ValueError("a dtype whose state is not that of plain numbers")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for a numpy array: its state is checked, and the array is made anew from its bytes."""

    def __init__(self, *_: Any) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _DType) and isinstance(state[4], bytes)):
            raise ValueError("an array whose state is not (version, shape, plain dtype, order, bytes)")
        _, shape, kind, fortran, data = state
        flat = np.frombuffer(data, kind.dtype)
        if not _sizes(shape) or math.prod(shape) != flat.size:
            raise ValueError(f"an array of shape {str(shape)[:40]} with {flat.size} numbers")
        self.array = flat.reshape(shape, order="F" if fortran else "C").copy()


class _Call:
    """A function of the table: the pickle can call it, and can set nothing on it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a state for a function. It was refused: such a file can change the program that reads it")


def _sizes(values: Any) -> bool:
    return isinstance(values, tuple) and all(isinstance(v, int) and v >= 0 for v in values)


def _scalar(kind: Any, data: Any) -> Any:
    if not (isinstance(kind, _DType) and isinstance(data, bytes) and len(data) == kind.dtype.itemsize):
        raise ValueError("a number that is not (plain dtype, bytes)")
    return np.frombuffer(data, kind.dtype)[0]


def _storage(data: Any) -> np.ndarray:
    """The numbers in a storage of torch, which has a restricted unpickler of its own."""
    if not isinstance(data, bytes):
        raise ValueError("a storage of torch that is not bytes")
    storage = torch.load(io.BytesIO(data), weights_only=True)
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ValueError(f"a storage of torch of type {type(storage).__name__}")
    untyped = storage._untyped_storage
    return torch.empty(0, dtype=storage.dtype).set_(untyped, 0, (untyped.nbytes() // storage.dtype.itemsize,), (1,)).numpy()  # type: ignore[call-overload]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray:
    """An array with a tensor's values: those of a storage from an offset on, by strides that stay inside it."""
    if not (isinstance(storage, np.ndarray) and _sizes((offset,)) and _sizes(shape) and _sizes(strides) and len(shape) == len(strides)):
        raise ValueError("a tensor that is not (storage, offset, shape, strides)")
    if math.prod(shape) == 0:
        return np.zeros(shape, storage.dtype)
    if math.prod(shape) > storage.size or offset + sum((n - 1) * k for n, k in zip(shape, strides, strict=True)) >= storage.size:
        raise ValueError(f"a tensor of shape {list(shape)} that does not fit its storage of {storage.size} numbers")
    bytes_ = [k * storage.itemsize for k in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, bytes_).copy()


def _stand_ins() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
        ("torch.storage", "_load_from_bytes"): _Call(_storage),
        ("collections", "OrderedDict"): _Call(lambda *_: {}),
        ("numpy", "ndarray"): _Call(_Array),
        ("numpy", "dtype"): _Call(_DType),
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        table |= {(module, "_reconstruct"): _Call(_Array), (module, "scalar"): _Call(_scalar)}
    for module in ("torch_geometric.data.data", "torch_geometric.data"):
        for name in ("Data", "DataEdgeAttr", "DataTensorAttr"):
            table[(module, name)] = _Graph
    for name in ("GlobalStorage", "NodeStorage", "EdgeStorage", "BaseStorage"):
        table[("torch_geometric.data.storage", name)] = _Graph
    return table


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles arrays and graph containers through stand-ins; refuses everything else."""

    table = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.table[(module, name)]
        except KeyError:
            raise ValueError(
                f"The pickle asks for {module}.{name}, which is not a tensor, an array or a graph. It was refused: such a file can run "
                "any code."
            ) from None


def restricted_loads(data: bytes) -> Any:
    """The object in a pickle of tensors, arrays and graphs; tensors and arrays come as stand-ins or arrays.

    Raises:
        ValueError: an operation, a name or a value that legacy graphs do not use, or a damaged pickle.
    """
    for operation, argument, position in pickletools.genops(data):
        if operation.name not in OPERATIONS:
            raise ValueError(f"the pickle's operation {operation.name} at byte {position} is not one that legacy graphs use")
        if "PUT" in operation.name and int(argument or 0) > len(data):
            raise ValueError(f"the pickle's memory is asked for place {argument} at byte {position}: the record is damaged")
    return RestrictedUnpickler(io.BytesIO(data)).load()


def _fields(graph: Any) -> dict[str, Any]:
    """Values of a graph by name, arrays as arrays."""
    if not isinstance(graph, _Graph):
        raise ValueError(f"a {type(graph).__name__}, expected a graph")
    values = dict(graph.values)
    store = values.pop("_store", None)
    if isinstance(store, _Graph):
        mapping = store.values.get("_mapping", {})
        values |= mapping if isinstance(mapping, dict) else {}
    return {name: value.array if isinstance(value, _Array) else value for name, value in values.items()}


def _structure(values: dict[str, Any], name: str) -> Structure:
    cell = np.zeros((3, 3)) if values.get("cell") is None else np.asarray(values["cell"], dtype=np.float64).reshape(3, 3)
    fixed = values.get("fixed")
    return Structure(
        atomic_numbers=np.asarray(values["atomic_numbers"]).astype(np.int64).ravel(),
        positions=np.asarray(values["pos"], dtype=np.float64),
        cell=cell,
        pbc=np.full(3, bool(cell.any())),
        energy=None if values.get("y") is None else float(values["y"]),
        forces=None if values.get("force") is None else np.asarray(values["force"], dtype=np.float64),
        fixed=None if fixed is None else np.asarray(fixed).astype(bool).ravel(),
        group=None if values.get("sid") is None else str(int(values["sid"])),
        name=name,
    ).validate(labels=False)


def read_legacy_lmdb(path: Path | str, keep_broken: bool = False) -> Iterator[Structure]:
    """Structures of a legacy OC20 LMDB: atomic_numbers, pos, cell, y (eV), force (eV/Å), fixed. ``keep_broken`` as in `read_structures`.

    Raises:
        ImportError: lmdb is not installed.
        ValueError: no readable database, a record that is not such a graph, or one that asks for code.
    """
    try:
        import lmdb
    except ImportError:
        raise ImportError("Legacy LMDB files need lmdb: pip install 'gossamer[lmdb]'") from None
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no data file '{path}'.")
    check_lmdb(path / "data.mdb" if path.is_dir() else path)
    try:
        with (
            lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False) as environment,
            environment.begin() as transaction,
        ):
            for key, value in transaction.cursor():
                if key.isdigit():
                    yield checked(_record(value, f"'{path}' record {key.decode()}"), keep_broken)
    except lmdb.Error as error:
        raise ValueError(f"'{path}' is not a readable LMDB ({error}). It may be truncated: copy it again.") from None


def _record(data: bytes, name: str) -> Structure:
    try:
        return _structure(_fields(restricted_loads(data)), name)
    except Exception as error:  # a forged or damaged record meets whatever check comes first
        raise ValueError(f"{name} is not a legacy graph ({type(error).__name__}: {error}).") from None
