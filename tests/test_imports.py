"""Potentials of other packages: files are read without being run, nothing in them is left over, and the numbers are the same."""

from __future__ import annotations

import collections
import contextlib
import io
import operator
import os
import pickle
import pickletools
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.imports import inert
from gossamer.imports.contract import ImportOptions
from gossamer.imports.inert import Tree, modules_of, open_tree, tensors_of
from gossamer.imports.pickle_machine import Inert, loads
from gossamer.imports.verify import ask_reference


class Ours(nn.Module):
    """A module of a class that the reader does not import."""

    def __init__(self, extra: object = None) -> None:
        super().__init__()
        self.sizes, self.extra = [1, 2, (3, "four")], extra
        self.linear = nn.Linear(3, 2)
        self.register_buffer("table", torch.arange(12.0).reshape(3, 4).T, persistent=False)
        self.register_buffer("wide", torch.ones(3).expand(4, 3), persistent=True)


def saved(tmp_path: Path, value: object, name: str = "file.pth") -> Tree:
    torch.save(value, tmp_path / name)
    return open_tree(tmp_path / name)


def test_dictionaries_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    noted = torch.ones(2)
    noted.note = "an attribute of Python"  # type: ignore[attr-defined]
    values = {
        "a": torch.randn(3, 4), "view": torch.arange(24.0).reshape(2, 3, 4)[:, 1].T, "half": torch.randn(2).half(), "none": None, "b": True,
        "bfloat": torch.randn(3).bfloat16(), "long": torch.tensor([1 << 40]), "empty": torch.zeros(0, 3), "complex": torch.randn(2, dtype=torch.complex64),
        "array": np.arange(6.0).reshape(2, 3), "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)), "number": np.float64(1.5),
        "nested": {"list": [1, 2.5, "x", b"\x00\xff"], 3: (1, 2)}, "ordered": collections.OrderedDict(a=1), "set": {1, 2}, "dtype": torch.float64,
        "parameter": nn.Parameter(torch.ones(2)), "size": torch.Size([2, 3]), "buffer": nn.Buffer(torch.ones(3)), "noted": noted, "big": 1 << 70, "counts": collections.defaultdict(int, a=2),
    }  # fmt: skip
    found = saved(tmp_path, values).root
    assert list(found) == list(values)
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name
        elif isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
            assert np.array_equal(found[name], value)
        elif name == "set":
            assert sorted(found[name]) == [1, 2]
        else:
            assert found[name] == value, name


def test_modules_are_read_without_their_classes(tmp_path: Path) -> None:
    module = nn.Sequential(Ours(), nn.SiLU(), Ours())
    found = saved(tmp_path, module).root
    assert isinstance(found, Inert)
    assert found.name == "torch.nn.modules.container.Sequential"
    children = modules_of(found)
    assert list(children) == ["", "0.", "0.linear.", "1.", "2.", "2.linear."]
    assert children["0."].name == f"{Ours.__module__}.Ours"
    assert children["0."].attributes["sizes"] == [1, 2, (3, "four")]
    expected = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors = tensors_of(found)
    assert sorted(tensors) == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name


def test_tensors_that_are_not_made_anew_are_refused(tmp_path: Path) -> None:
    """None is left out: a potential without it would be another one."""
    module = nn.Linear(2, 1)
    module.register_buffer("table", torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match=r"0\.table is <torch\._utils\._rebuild_sparse_tensor, not run>, expected a plain tensor"):
        tensors_of(saved(tmp_path, nn.Sequential(module)).root)
    values = torch.conj(torch.randn(2, dtype=torch.complex64))
    for marked in (values, values.imag):
        with pytest.raises(ValueError, match="marked as conjugate, negative or otherwise"):
            _ = saved(tmp_path, marked).root
    assert torch.equal(saved(tmp_path, values.imag.resolve_neg()).root, values.imag)


class Touch:
    """Unpickled, it calls what it holds."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def attacks(mark: Path) -> dict[str, object]:
    """Objects that leave a file behind when Python loads them."""
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    system = Touch(os.system, f"touch {mark}")
    return {
        "os.system": system,
        "eval": Touch(eval, code),
        "exec": Touch(exec, code),
        "mkdir": Touch(os.mkdir, str(mark)),
        "call of a made object": Touch(operator.methodcaller("touch"), mark),
        "in a state": {"state_dict": collections.OrderedDict(w=torch.ones(2), x=system)},
        "in a module": nn.Sequential(nn.Linear(1, 1), Ours(system)),
    }


@pytest.mark.parametrize("kind", list(attacks(Path("x"))))
def test_nothing_is_run(tmp_path: Path, kind: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "evil.pth"
    torch.save(attacks(mark)[kind], path)
    assert open_tree(path).root is not None
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the attack is one


@pytest.mark.parametrize("kind", ["os.system", "eval", "exec", "mkdir", "call of a made object"])
def test_nothing_of_a_package_is_run(tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "mark"
    evil = pickle.dumps(attacks(mark)[kind])
    path = archive_of(tmp_path / "evil.zip", {"evil/.data/version": b"6", "evil/model/model.pkl": evil, "evil/os.py": b"raise SystemExit"})
    tree = open_tree(path)
    assert tree.form == "package"
    assert isinstance(tree.pickle("model/model.pkl"), Inert)
    assert not mark.exists()
    pickle.loads(evil)
    assert mark.exists()


def test_names_with_dots_and_states_of_classes_do_nothing() -> None:
    attribute = loads(b"\x80\x04\x8c\x02os\x8c\x0bpath.exists\x93\x8c\x01/\x85R.")  # os.path.exists("/")
    assert isinstance(attribute, Inert)
    assert (attribute.name, attribute.args) == ("os.path.exists", ("/",))
    with pytest.raises(ValueError, match=r"a state for gossamer\.files itself"):
        loads(b"\x80\x02cgossamer\nfiles\n}X\x01\x00\x00\x00aK\x01sb.")
    with pytest.raises(ValueError, match="the operation EXT1"):
        loads(b"\x80\x02\x82\x01.")
    called = loads(
        b"\x80\x02cbuiltins\ngetattr\nX\x02\x00\x00\x00osX\x06\x00\x00\x00system\x86RX\x01\x00\x00\x00x\x85R."
    )  # getattr(...)("x")
    assert called.name == "builtins.getattr(…)"


def test_depth_and_repetition_are_no_harm() -> None:
    deep = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    assert isinstance(loads(deep), list)
    tuples = b"\x80\x02N\x85" + b"2\x86" * 60 + b"."  # 2^60 leaves, as many objects as bytes
    assert isinstance(loads(tuples), tuple)
    key = loads(b"\x80\x02}N\x85" + b"2\x86" * 60 + b"K\x01s.")  # whose hash would never end
    assert [type(k) for k in key] == [Inert]
    far = loads(b"\x80\x02K\x01r\xff\xff\xff\xff.")  # place 4294967295 of the memory
    assert far == 1


@pytest.mark.parametrize(
    ("value", "call"),
    [
        (b"X\x40\x42\x0f\x00" + b"x" * 1_000_000 + b"q\x00X\x06\x00\x00\x00latin1q\x01", b"c_codecs\nencode\nh\x00h\x01\x86R"),
        (b"](" + b"N" * 1_000_000 + b"eq\x00", b"cbuiltins\nset\nh\x00\x85R"),
        (b"](" + b"N)\x86" * 300_000 + b"eq\x00", b"ccollections\nOrderedDict\nh\x00\x85R"),
        (b"(" + b"K\x01" * 1_000_000 + b"tq\x00", b"ctorch\nSize\nh\x00\x85R"),
        (b"B\x40\x42\x0f\x00" + b"x" * 1_000_000 + b"q\x00cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85Rq\x01J\x40\x42\x0f\x00\x85q\x02",
         b"cnumpy.core.numeric\n_frombuffer\n(h\x00h\x01h\x02X\x01\x00\x00\x00CtR"),
    ],
    ids=["text", "set", "dictionary", "size", "array"],
)  # fmt: skip
def test_few_bytes_copy_no_gigabytes(value: bytes, call: bytes) -> None:
    start = b"\x80\x03" + value
    assert loads(start + call + b".") is not None
    with pytest.raises(ValueError, match="bytes that copies"):
        loads(start + b"(" + call * 200 + b"l.")


def test_keys_that_a_dictionary_cannot_tell_apart_are_none() -> None:
    """Whole numbers that differ by 2^61 - 1 have the same hash."""
    large = [k * ((1 << 61) - 1) for k in range(1, 4)]
    found = loads(pickle.dumps({1 << 59: 0, -5: 1, **dict.fromkeys(large), (1, 2): 3}, 2))
    assert [k if isinstance(k, int) else k.args[0] for k in found] == [1 << 59, -5, *large, (1, 2)]
    assert [type(k) for k in found] == [int, int, *[Inert] * 4]


def test_modules_are_not_nested_beyond_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    def nest(depth: int) -> Inert:
        top = Inert("Module")
        for _ in range(depth):
            outer = Inert("Module")
            outer.state, top = {"_modules": {"name": top}, "_buffers": {"table": torch.ones(1)}}, outer
        return top

    assert len(tensors_of(nest(100))) == 100
    with pytest.raises(ValueError, match="modules 100 deep"):
        modules_of(nest(101))
    monkeypatch.setattr(inert, "MAX_NAMES", 1000)
    assert len(tensors_of(nest(15))) == 15
    with pytest.raises(ValueError, match=r"names of 1,\d+ letters"):
        tensors_of(nest(25))
    odd = Inert("Module")
    odd.state = {"_modules": {(1, 2): nest(1)}}
    with pytest.raises(ValueError, match="whose name is a tuple"):
        modules_of(odd)


def forged(shape: tuple, stride: tuple, offset: int, count: int, data: bytes) -> bytes:
    """An archive of one tensor that says of itself what it likes."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Storage) else None

    out = io.BytesIO()
    pickler = Pickler(out, 2)
    pickler.dump(Touch(torch._utils._rebuild_tensor_v2, Storage(), offset, shape, stride, False, collections.OrderedDict()))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", out.getvalue())
        archive.writestr("a/data/0", data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "count", "message"),
    [
        ((3,), (1,), 0, 4, None),
        ((2, 2), (1, 2), 0, 4, None),
        ((5,), (1,), 0, 4, "does not fit its storage of 4 numbers"),
        ((2,), (1,), 3, 4, "does not fit"),
        ((2, 2), (3, 1), 0, 4, "does not fit"),
        ((2,), (-1,), 3, 4, "a tensor that is not"),
        ((4,), (1,), -1, 4, "a tensor that is not"),
        ((1 << 40,), (0,), 0, 4, "does not fit"),
        ((3,), (1,), 0, 1 << 40, "claims 1099511627776"),
        ((3,), (1, 1), 0, 4, "a tensor that is not"),
        ((3,), (1 << 61,), 0, 4, "does not fit"),
    ],
)
def test_tensors_stay_inside_their_storage(
    tmp_path: Path, shape: tuple, stride: tuple, offset: int, count: int, message: str | None
) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(forged(shape, stride, offset, count, np.arange(4, dtype=np.float32).tobytes()))
    if message is None:
        assert torch.equal(open_tree(path).root, torch.arange(4.0).as_strided(shape, stride, offset))
    else:
        with pytest.raises(ValueError, match=message):
            _ = open_tree(path).root


@pytest.mark.parametrize("seed", range(4))
def test_damaged_pickles_are_refused_or_read_never_run(seed: int) -> None:
    """Bytes changed at random: a value or a ValueError, within moments."""
    good = pickle.dumps({"a": [1.0, (2, 3)], "b": np.arange(4.0), "c": collections.OrderedDict(x=np.float32(1))}, 2 + seed % 3)
    rng = np.random.default_rng(seed)
    for _ in range(300):
        bad = bytearray(good)
        for place in rng.integers(0, len(good), 3):
            bad[place] = rng.integers(256)
        with contextlib.suppress(ValueError):
            loads(bytes(bad))
    for length in range(len(good) - 1):
        with pytest.raises(ValueError):  # cut anywhere
            loads(good[:length])


def archive_of(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_no_package_writes_are_refused(tmp_path: Path) -> None:
    empty = pickle.dumps({}, 2)
    with pytest.raises(ValueError, match="would grow to"):
        open_tree(archive_of(tmp_path / "bomb", {"a/data.pkl": empty, "a/data/0": bytes(1 << 24)}, zipfile.ZIP_DEFLATED))
    for name in ("../data.pkl", "/etc/data.pkl", "a/../../b", "C:\\x"):
        with pytest.raises(ValueError, match="which no package writes"):
            open_tree(archive_of(tmp_path / "path", {"a/data.pkl": empty, name: b""}))
    with zipfile.ZipFile(tmp_path / "twice", "w") as archive:
        archive.writestr("a/data.pkl", empty)
        archive.writestr("a/data.pkl", empty)
    with pytest.raises(ValueError, match="twice of the same name"):
        open_tree(tmp_path / "twice")
    with pytest.raises(ValueError, match="'a/data.pkl', which no package writes"):
        open_tree(archive_of(tmp_path / "packed", {"a/data.pkl": empty}, zipfile.ZIP_LZMA))
    good = archive_of(tmp_path / "good", {"a/data.pkl": empty}).read_bytes()
    (tmp_path / "cut").write_bytes(good[:20] + bytes(8) + good[28:])
    with pytest.raises(ValueError, match=r"damaged archive|no 'data.pkl'"):
        _ = open_tree(tmp_path / "cut").root
    with pytest.raises(ValueError, match="byte order"):
        open_tree(archive_of(tmp_path / "big", {"a/data.pkl": empty, "a/byteorder": b"big"}))
    with pytest.raises(ValueError, match="bare pickle or a tar file"):
        open_tree(_written(tmp_path / "old", pickle.dumps({})))
    with pytest.raises(FileNotFoundError, match="There is no file"):
        open_tree(tmp_path / "none")


@pytest.mark.parametrize("seed", range(3))
def test_damaged_archives_are_refused_or_read(seed: int, tmp_path: Path) -> None:
    """Bytes changed at random, more of them in the table of contents: a value or a ValueError."""
    torch.save({"a": torch.randn(3, 4), "b": np.arange(3.0)}, tmp_path / "good")
    good, rng, path = (tmp_path / "good").read_bytes(), np.random.default_rng(seed), tmp_path / "bad"
    refused = 0
    for _ in range(150):
        bad = bytearray(good)
        for place in [*rng.integers(0, len(good), 2), *rng.integers(len(good) - 600, len(good), 3)]:
            bad[place] = rng.integers(256)
        path.write_bytes(bad)
        try:
            _ = open_tree(path).root
        except ValueError:
            refused += 1
    assert refused > 30


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_members_that_lie_upon_one_another_are_refused(tmp_path: Path) -> None:
    """Two names for the same bytes: each would be decompressed."""
    data = bytes(100_000)
    path = archive_of(tmp_path / "a", {"a/data.pkl": pickle.dumps({}, 2), "a/0": data, "a/1": b"x"})
    raw = bytearray(path.read_bytes())
    entries = [m for m in range(len(raw)) if raw[m : m + 4] == b"PK\x01\x02"]
    offset, sizes = raw[entries[1] + 42 : entries[1] + 46], raw[entries[1] + 16 : entries[1] + 28]
    raw[entries[2] + 42 : entries[2] + 46], raw[entries[2] + 16 : entries[2] + 28] = offset, sizes
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="would grow to|damaged"):
        open_tree(path).read("1")


def test_no_more_of_a_member_is_read_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of a large pickle, nor of a member that says it is small."""
    monkeypatch.setattr(inert, "MAX_PICKLE", 1000)
    tree = open_tree(archive_of(tmp_path / "a", {"a/data.pkl": bytes(1001), "a/data/0": bytes(1001)}))
    for read in (tree.read, tree.pickle):
        with pytest.raises(ValueError, match=r"data\.pkl: 1,001 bytes, 1,000 at most are read"):
            read("data.pkl")
    path = archive_of(tmp_path / "b", {"a/data.pkl": bytes(1 << 26)}, zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    size = raw.rindex(b"PK\x01\x02") + 24
    raw[size : size + 4] = (500).to_bytes(4, "little")
    tracemalloc.start()
    with pytest.raises(ValueError, match="damaged archive"):
        open_tree(_written(path, raw)).read("data.pkl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


def test_every_operation_of_pickles_is_known_or_refused() -> None:
    """None falls through to something that Python would do."""
    from gossamer.imports import pickle_machine

    known = {*pickle_machine._VALUES, *pickle_machine._STEPS, "PROTO", "FRAME", "STOP"}
    refused = {o.name for o in pickletools.opcodes} - known
    assert refused == {"PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}


def test_a_package_without_a_calculator_is_no_reference(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leignn.* has no ASE calculator. Leave --reference out"):
        ask_reference(sys.executable, "leignn", tmp_path / "model.pt", ImportOptions(), [], seconds=1)
