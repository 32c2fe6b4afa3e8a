"""A machine that follows the operations of a pickle, imports nothing and calls nothing.

A pickle is a program: loading one can call any function. Here numbers, text and containers are real; tensors and numpy arrays are made
anew from their bytes after their type, size, strides and offset were checked; whatever else a pickle names becomes an `Inert`, which
holds the name, the arguments and the state.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_PICKLE = 512 << 20
"""bytes of one pickle"""
MAX_OPERATIONS = 20_000_000
"""of one pickle: each may make an object"""
MAX_NUMBERS = 1 << 32
"""of all tensors of one pickle: several may share a storage"""
MAX_COPIED = 64 << 20
"""bytes that one pickle may copy, beside four times its own: arrays, sets, dictionaries, text as bytes"""
MAX_KEY = 1 << 60
"""of whole numbers as keys: above it, many can be found that a dictionary does not tell apart at once"""
MAX_REPEATED = 1 << 20
"""of a tensor that has more numbers than its storage (an expanded one)"""
SIMPLE_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|[fc][248]|c16)")
DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}  # fmt: skip
PLAIN_TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
NAMED_DTYPES = {str(d).removeprefix("torch."): d for d in (*DTYPES.values(), torch.bfloat16)}
SCALARS = (str, int, float, bool, bytes, type(None))


class Inert:
    """What stands in for an object of somebody else's class: nothing of that class is here, only what the pickle says of it."""

    __slots__ = ("args", "entries", "items", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name = name
        """module and class, or function, that the pickle names"""
        self.args = args
        """what it would be called with"""
        self.state: Any = None
        """what would be set on it: of most objects their attributes"""
        self.items: list[Any] = []
        """what would be appended"""
        self.entries: list[tuple[Any, Any]] = []
        """what would be set by key"""

    @property
    def attributes(self) -> dict[str, Any]:
        """The state, where it is a dictionary (or one and a dictionary of slots)."""
        parts = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else (self.state,)
        return {str(k): v for part in parts if isinstance(part, dict) for k, v in part.items()}

    def __repr__(self) -> str:  # never that of the content: it may be deep
        return f"<{self.name}, not run>"


class _Name(Inert):
    """A class or function that is named; nothing can be set on it."""

    __slots__ = ()


class _Array:
    """A numpy array whose state has not come yet."""

    def __init__(self) -> None:
        self.places: list[int] = []
        """of the memory, where it will be"""


class _DType:
    """A numpy dtype of plain numbers."""

    def __init__(self, name: Any) -> None:
        if not (isinstance(name, str) and SIMPLE_DTYPE.fullmatch(name)):
            raise ValueError(f"an array of type {str(name)[:40]!r}, expected plain numbers such as 'f4' or 'i8'")
        self.dtype = np.dtype(name)

    def build(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) >= 5 else None
        if order not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise ValueError("a numpy dtype whose state is not that of plain numbers")
        self.dtype = self.dtype.newbyteorder(order)


@dataclass(frozen=True)
class _Storage:
    """Numbers of a tensor's memory."""

    values: Tensor


@dataclass
class _Machine:
    """The pickle machine, with nothing behind it: https://docs.python.org/3/library/pickletools.html lists its operations."""

    data: bytes
    storage: Callable[[str, torch.dtype, int], Tensor]
    """(key, dtype, count) -> the numbers of a storage"""
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    numbers: int = 0
    copied: int = 0

    def run(self) -> Any:
        for count, (operation, argument, _) in enumerate(pickletools.genops(io.BytesIO(self.data))):
            name = operation.name
            if count > MAX_OPERATIONS:
                raise ValueError(f"more than {MAX_OPERATIONS:,} operations")
            if name in ("PROTO", "FRAME"):
                continue
            if name == "STOP":
                return self.pop()
            if name in _VALUES:
                self.stack.append(_VALUES[name](argument))
            elif name in _STEPS:
                _STEPS[name](self, argument)
            else:
                raise ValueError(f"the operation {name}, which no saved model uses")
        raise ValueError("no end: the pickle was cut")

    # the stack

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("an operation without its operands: the pickle is damaged")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def since_mark(self) -> list[Any]:
        first = self.marks.pop() if self.marks else len(self.stack) + 1
        if first > len(self.stack):
            raise ValueError("an operation without its mark: the pickle is damaged")
        found = self.stack[first:]
        del self.stack[first:]
        return found

    def take(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self.pop() for _ in range(count)]))

    # what can be done to objects

    def put(self, place: int | None) -> None:
        place = len(self.memo) if place is None else place
        self.memo[place] = self.top()
        if isinstance(self.memo[place], _Array):
            self.memo[place].places.append(place)

    def get(self, place: int) -> None:
        if place not in self.memo:
            raise ValueError(f"an object at place {place} of the memory, where there is none")
        self.stack.append(self.memo[place])

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Inert) and not isinstance(target, _Name):
            target.items.extend(values)
        else:
            raise ValueError(f"an item for a {type(target).__name__}")

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        if len(values) % 2:
            raise ValueError("a key without a value")
        pairs = zip(values[::2], values[1::2], strict=True)
        if isinstance(target, dict):
            target.update((_key(k), v) for k, v in pairs)
        elif isinstance(target, Inert) and not isinstance(target, _Name):
            target.entries.extend(pairs)
        else:
            raise ValueError(f"an entry for a {type(target).__name__}")

    def pairs(self, values: list[Any]) -> dict[Any, Any]:
        self.stack.append({})
        self.set_items(values)
        found: dict[Any, Any] = self.pop()
        return found

    def named(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a class or function whose name is not text")
        self.stack.append(NAMED_DTYPES[name] if module == "torch" and name in NAMED_DTYPES else _Name(f"{module}.{name}"))

    def make(self, what: Any, arguments: Any) -> Any:
        """Where Python would call: a table of things that are safe to make, and stand-ins for the rest."""
        arguments = arguments if isinstance(arguments, tuple) else (arguments,)
        if not isinstance(what, Inert):
            raise ValueError(f"a call of a {type(what).__name__}")
        if not isinstance(what, _Name):
            return Inert(f"{what.name}(…)", (what, *arguments))
        maker = _MAKERS.get(what.name)
        return Inert(what.name, arguments) if maker is None else maker(self, *arguments)

    def build(self, state: Any) -> None:
        target = self.pop()
        if isinstance(target, _Name):
            raise ValueError(f"a state for {target.name} itself. It was refused: such a file can change the program that reads it")
        if isinstance(target, _Array):
            made = self.array(state)
            self.memo.update(dict.fromkeys(target.places, made))
            target = made
        elif isinstance(target, _DType):
            target.build(state)
        elif isinstance(target, Inert):
            if target.state is not None:
                raise ValueError(f"a second state for an object of {target.name}")
            target.state = state
        elif not isinstance(target, dict | Tensor):  # attributes of an OrderedDict or a Parameter carry no numbers
            raise ValueError(f"a state for a {type(target).__name__}")
        self.stack.append(target)

    # numbers

    def count(self, numbers: int) -> None:
        self.numbers += numbers
        if self.numbers > MAX_NUMBERS:
            raise ValueError(f"tensors of more than {MAX_NUMBERS:,} numbers together")

    def copy(self, count: int) -> None:
        """Bytes that are about to be copied: one operation of three bytes can copy any object again."""
        self.copied += count
        if self.copied > MAX_COPIED + 4 * len(self.data):
            raise ValueError(f"a pickle of {len(self.data):,} bytes that copies {self.copied:,} and more, which no package writes")

    def persistent(self, pid: Any) -> Any:
        if not (isinstance(pid, tuple) and pid and isinstance(pid[0], str)):
            raise ValueError("a reference to something outside the pickle that is no storage")
        if pid[0] != "storage":
            return Inert(f"persistent.{pid[0][:100]}", pid[1:])
        _, kind, key, _, count = pid[:5] if len(pid) >= 5 else (None,) * 5
        name = kind.name.rpartition(".")[2] if isinstance(kind, _Name) else ""
        if name not in DTYPES or type(key) not in (str, int) or not _sizes((count,)):
            raise ValueError("a storage that is not (type, key, place, count)")
        return _Storage(self.storage(str(key), DTYPES[name], count))

    def tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any = None, hooks: Any = None, marks: Any = None, *rest: Any
    ) -> Tensor:
        """A view of the storage that stays inside it."""
        if marks:  # conjugate, negative: the values are others than those stored
            raise ValueError(
                "a tensor that is marked as conjugate, negative or otherwise. Save it again as a copy (resolve_conj, resolve_neg)"
            )
        fits = isinstance(storage, _Storage) and _sizes((offset,)) and _sizes(shape) and _sizes(strides) and len(shape) == len(strides)
        if not fits:
            raise ValueError("a tensor that is not (storage, offset, shape, strides)")
        values, size = storage.values, math.prod(shape)
        if size == 0:
            return values.new_zeros(shape)
        last = offset + sum((n - 1) * k for n, k in zip(shape, strides, strict=True))
        if last >= len(values) or size > max(len(values), MAX_REPEATED):
            raise ValueError(f"a tensor of shape {list(shape)[:8]} that does not fit its storage of {len(values)} numbers")
        self.count(size)
        return torch.as_strided(values, shape, strides, offset)

    def typed_tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, marks: Any = None, *rest: Any
    ) -> Tensor:
        """Likewise of bytes whose type is told apart (`_rebuild_tensor_v3`)."""
        if not (isinstance(storage, _Storage) and isinstance(dtype, torch.dtype)):
            raise ValueError("a tensor that is not (storage, offset, shape, strides, …, dtype)")
        if storage.values.numel() % dtype.itemsize:
            raise ValueError(f"a storage of {storage.values.numel()} bytes for numbers of {dtype}")
        return self.tensor(_Storage(storage.values.view(dtype)), offset, shape, strides, grad, hooks, marks)

    def with_attributes(self, function: Any, kind: Any, arguments: Any, *state: Any) -> Any:
        """A tensor that has attributes of Python, or a Buffer; those of other classes are stand-ins."""
        if getattr(kind, "name", None) in PLAIN_TENSORS:
            return self.make(function, arguments)
        return Inert("torch._tensor._rebuild_from_type_v2", (function, kind, arguments, *state))

    def parameter(self, data: Any, *_: Any) -> Tensor:
        if not isinstance(data, Tensor):
            raise ValueError("a parameter that is no tensor")
        return data

    def array(self, state: Any) -> np.ndarray | Inert:
        """The array in a state (version, shape, dtype, order, bytes)."""
        if isinstance(state, tuple) and len(state) == 5 and isinstance(state[4], list):
            return Inert("numpy.ndarray", state)  # of objects
        if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _DType) and isinstance(state[4], bytes)):
            raise ValueError("an array whose state is not (version, shape, plain dtype, order, bytes)")
        _, shape, kind, fortran, data = state
        return self.from_bytes(data, kind, shape, "F" if fortran else "C")

    def from_bytes(self, data: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
        if not (isinstance(data, bytes | bytearray) and isinstance(kind, _DType) and order in ("C", "F") and _sizes(shape)):
            raise ValueError("an array that is not (bytes, plain dtype, shape, order)")
        if math.prod(shape) * kind.dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {list(shape)[:8]} with {len(data)} bytes")
        self.copy(len(data))
        return np.frombuffer(data, kind.dtype).reshape(shape, order=order).copy()

    def scalar(self, kind: Any, data: Any) -> Any:
        return self.from_bytes(data, kind, (), "C")[()].item()

    def encoded(self, text: Any, encoding: Any) -> bytes:
        """Bytes as old protocols write them."""
        if not (isinstance(text, str) and encoding == "latin1"):
            raise ValueError("bytes that are not text in latin1")
        self.copy(len(text))
        return text.encode("latin1")

    def collection(self, *values: Any) -> list[Any]:
        """A set, as a list."""
        if len(values) > 1 or (values and not isinstance(values[0], list | tuple)):
            raise ValueError("a set that is not made of a list")
        self.copy(8 * sum(map(len, values)))
        return list(values[0]) if values else []

    def mapping(self, *values: Any) -> dict[Any, Any]:
        """A dictionary, as empty as `collections.OrderedDict()` or from pairs."""
        pairs = values[-1] if values else []
        self.copy(64 * len(pairs) if isinstance(pairs, dict | list) else 0)
        if isinstance(pairs, dict):
            return dict(pairs)
        if isinstance(pairs, Inert):  # the factory of a defaultdict
            pairs = []
        if not isinstance(pairs, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
            raise ValueError("a dictionary that is not made of pairs")
        return {_key(k): v for k, v in pairs}

    def size(self, *values: Any) -> tuple[int, ...]:
        found = tuple(values[0]) if values and isinstance(values[0], list | tuple) else ()
        self.copy(8 * len(found))
        if not _sizes(found):
            raise ValueError("a size that is not made of numbers")
        return found


def _sizes(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def _key(key: Any) -> Any:
    """What can be a key: text, numbers, stand-ins. (Tuples and large numbers can be such that a dictionary of them takes for ever.)"""
    if isinstance(key, (*SCALARS, Inert, torch.dtype)) and not (isinstance(key, int) and not -MAX_KEY < key < MAX_KEY):
        return key
    return Inert(f"key.{type(key).__name__}", (key,))


_VALUES: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None, "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False, "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {}, "EMPTY_TUPLE": lambda _: (), "EMPTY_SET": lambda _: [],
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
                     "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
                     "BINBYTES8"), lambda value: value),
    "BYTEARRAY8": bytes,
}  # fmt: skip
"""operations that bring a value"""


def _step(name: str, count: int) -> Callable[[_Machine, Any], None]:
    """An operation on so many operands, whose result goes onto the stack."""

    def step(machine: _Machine, _: Any) -> None:
        result = _RESULTS[name](machine, *machine.take(count))
        machine.stack.append(result)

    return step


_RESULTS: dict[str, Callable[..., Any]] = {
    "TUPLE1": lambda _, *v: v, "TUPLE2": lambda _, *v: v, "TUPLE3": lambda _, *v: v,
    "REDUCE": lambda m, what, arguments: m.make(what, arguments),
    "NEWOBJ": lambda m, what, arguments: m.make(what, arguments),
    "NEWOBJ_EX": lambda m, what, arguments, keywords: m.make(what, (*arguments, *([keywords] if keywords else []))),
    "BINPERSID": lambda m, pid: m.persistent(pid),
}  # fmt: skip
_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.pop(), "POP_MARK": lambda m, _: m.since_mark(), "DUP": lambda m, _: m.stack.append(m.top()),
    "PUT": lambda m, k: m.put(k), "BINPUT": lambda m, k: m.put(k), "LONG_BINPUT": lambda m, k: m.put(k), "MEMOIZE": lambda m, _: m.put(None),
    "GET": lambda m, k: m.get(k), "BINGET": lambda m, k: m.get(k), "LONG_BINGET": lambda m, k: m.get(k),
    "LIST": lambda m, _: m.stack.append(m.since_mark()), "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "FROZENSET": lambda m, _: m.stack.append(m.since_mark()),
    "DICT": lambda m, _: m.stack.append(m.pairs(m.since_mark())),
    "APPEND": lambda m, _: m.append([m.pop()]), "APPENDS": lambda m, _: m.append(m.since_mark()),
    "ADDITEMS": lambda m, _: m.append(m.since_mark()),
    "SETITEM": lambda m, _: m.set_items(list(m.take(2))), "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "GLOBAL": lambda m, name: m.named(*name.split(" ", 1)), "STACK_GLOBAL": lambda m, _: m.named(*m.take(2)),
    "BUILD": lambda m, _: m.build(m.pop()),
    "OBJ": lambda m, _: (lambda v: m.stack.append(m.make(v[0], tuple(v[1:]))))(m.since_mark() or [None]),
    "INST": lambda m, name: m.stack.append(m.make(_Name(name.replace(" ", ".", 1)), tuple(m.since_mark()))),
    **{name: _step(name, count) for name, count in (("TUPLE1", 1), ("TUPLE2", 2), ("TUPLE3", 3), ("REDUCE", 2), ("NEWOBJ", 2),
                                                    ("NEWOBJ_EX", 3), ("BINPERSID", 1))},
}  # fmt: skip
"""operations on the stack"""
_MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _Machine.tensor,
    "torch._utils._rebuild_tensor": _Machine.tensor,
    "torch._utils._rebuild_tensor_v3": _Machine.typed_tensor,
    "torch._tensor._rebuild_from_type_v2": _Machine.with_attributes,
    "torch._utils._rebuild_parameter": _Machine.parameter,
    "torch._utils._rebuild_parameter_with_state": _Machine.parameter,
    "torch.Size": _Machine.size,
    "collections.OrderedDict": _Machine.mapping,
    "collections.defaultdict": _Machine.mapping,
    **dict.fromkeys(("builtins.dict", "__builtin__.dict"), _Machine.mapping),
    **dict.fromkeys(("builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset"), _Machine.collection),
    "_codecs.encode": _Machine.encoded,
    "numpy.dtype": lambda machine, name, *_: _DType(name),
    "numpy.ndarray": lambda machine, *_: _Array(),
    **{f"{core}.multiarray._reconstruct": lambda machine, *_: _Array() for core in ("numpy.core", "numpy._core")},
    **{f"{core}.multiarray.scalar": _Machine.scalar for core in ("numpy.core", "numpy._core")},
    **{f"{core}.numeric._frombuffer": _Machine.from_bytes for core in ("numpy.core", "numpy._core")},
}  # fmt: skip
"""calls that are followed by code of this file"""


def loads(data: bytes, storage: Callable[[str, torch.dtype, int], Tensor] | None = None) -> Any:
    """The object in a pickle, nothing of which is run: plain values, containers, tensors, arrays, and `Inert` for all others.

    Sets come as lists; names of torch's dtypes are dtypes.

    Args:
        data: The pickle.
        storage: (key, dtype, count) -> the numbers (count,) of a tensor's storage; None: there are none.

    Raises:
        ValueError: a damaged pickle, an operation no saved model uses, or a tensor or array that does not fit its bytes.
    """

    def none(key: str, dtype: torch.dtype, count: int) -> Tensor:
        raise ValueError("a tensor whose storage is not in the file")

    if len(data) > MAX_PICKLE:
        raise ValueError(f"a pickle of {len(data):,} bytes, {MAX_PICKLE:,} at most are read")
    try:
        return _Machine(data, storage or none).run()
    except (TypeError, KeyError, IndexError, AttributeError, OverflowError, UnicodeError, struct.error, RuntimeError, MemoryError) as error:
        # a damaged or forged pickle meets whatever check comes first
        raise ValueError(f"a damaged pickle ({type(error).__name__}: {str(error)[:200]})") from None
