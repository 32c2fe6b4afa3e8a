"""Every reader on inputs that nobody wrote: an error of ours that names the file, or an answer; never another traceback, a hang, a crash.

python benchmarks/reliability/campaign.py fuzz --count 100000
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import samples
import torch
from common import FINDING, Case, Target, campaign, drawn, mutated, random_of

from gossamer.config import load_config, make_config
from gossamer.data.atoms import read_frames
from gossamer.data.legacy import read_legacy_lmdb, restricted_loads
from gossamer.data.readers import read_structures
from gossamer.files import InputError
from gossamer.imports import ImportOptions, inert, open_tree, read_potential
from gossamer.potential_file import load, read_manifest
from gossamer.simulation.md import md
from gossamer.simulation.relax import relax
from gossamer.training.checkpoint import read_checkpoint

PACKED = {".xz": (lzma.decompress, lzma.compress), ".gz": (gzip.decompress, gzip.compress), ".bz2": (bz2.decompress, bz2.compress)}
OURS = (ValueError, InputError, FileNotFoundError, FileExistsError, ImportError, RuntimeError)
"""types, exactly these, that gossamer raises itself; others, and those that name no file, are a finding"""


NAMES_SETTINGS = (".yaml",)
"""errors of these name the setting, and not the file"""


def targets(folder: Path) -> list[Target]:
    """Readers with sound files for each, which are written into the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = [Target(name, path, legacy if name == "legacy.lmdb" else structures, 1 if path.is_dir() else 2)
             for name, path in samples.data_files(folder / "data").items()]  # fmt: skip
    found += [
        Target(f"frames {t.name}", t.path, frames, 1) for t in found if t.path.is_file() and t.path.suffix not in (".lmdb", ".aselmdb")
    ]
    found += [Target(f"frames {name}", path, frames, 1) for name, path in samples.structure_files(folder / "structures").items()]
    found += [Target(f"config {name}", path, load_config, 1) for name, path in samples.config_files(folder / "config").items()]
    for name in ("sound", "nequip"):
        found.append(Target(f"potential {name}", samples.potential_file(folder / f"{name}.safetensors", name), potential, 4))
    found.append(Target("checkpoint", samples.checkpoint_file(folder / "checkpoint.safetensors"), read_checkpoint, 3))
    found += [Target(f"import {name}", path, foreign, 4) for name, path in samples.foreign_files(folder / "foreign").items()]
    (folder / "bare.pkl").write_bytes(_pickle())
    (folder / "graph.pkl").write_bytes(samples.pickled_graph(2))
    found += [Target("pickle", folder / "bare.pkl", bare, 8), Target("legacy pickle", folder / "graph.pkl", legacy_bare, 4)]
    state = samples.states(folder / "states")
    found += [Target("resume langevin", state["langevin"], go_on, 2), Target("resume nose-hoover", state["nose-hoover"], go_on, 2),
              Target("resume relaxation", state["relaxed.extxyz"], relax_on, 2)]  # fmt: skip
    return found


# --- readers ----------------------------------------------------------------------------------------------------------


def structures(path: Path) -> int:
    return sum(s.n_atoms for s in read_structures(path))


def frames(path: Path) -> int:
    return len(read_frames(path)) + len(read_frames(path, -1))


def legacy(path: Path) -> int:
    return sum(s.n_atoms for s in read_legacy_lmdb(path))


def potential(path: Path) -> Any:
    read_manifest(path)
    return load(path)


def foreign(path: Path) -> Any:
    return read_potential(open_tree(path), ImportOptions(given={"energy_unit": "eV"} if path.suffix == ".model" else {}))


def bare(path: Path) -> Any:
    with named(path):
        return inert.loads(path.read_bytes(), lambda key, dtype, count: torch.zeros(count if count < 1000 else 0, dtype=dtype))


def legacy_bare(path: Path) -> Any:
    try:
        return restricted_loads(path.read_bytes())
    except Exception as error:  # as a record of an LMDB is read
        raise ValueError(f"'{path}': {error}") from None


class named:
    """Names the file in errors of a function that is not told of it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is ValueError:
            raise ValueError(f"'{self.path}': {error}") from None


def go_on(folder: Path) -> Any:
    from ase.calculators.emt import EMT

    ensemble = "langevin" if "langevin" in folder.name else "nose-hoover"
    structure = folder.parent.parent / "inputs" / "states" / "copper.extxyz"
    return md(EMT(), structure, out=folder, steps=21, interval=5, ensemble=ensemble, resume=True, progress=False)


def relax_on(path: Path) -> Any:
    from ase.calculators.emt import EMT

    structure = path.parent.parent / "inputs" / "states" / "copper.extxyz"
    return relax(EMT(), structure, out=path, steps=4, fmax=1e-5, resume=True)


def _pickle() -> bytes:
    """A pickle as torch writes it, with tensors of every kind."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3, 2), "b": [1, "x", (2.5, None, True)], "c": np.arange(4.0), "d": {1: {"e": b"raw"}}, "f": torch.Size([3]),
                "g": torch.nn.Parameter(torch.zeros(2)), "h": {1, 2}, "i": np.float32(2)}, buffer)  # fmt: skip
    with zipfile.ZipFile(buffer) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        return archive.read(name)


# --- inputs -----------------------------------------------------------------------------------------------------------


def write_mutated(source: Path, target: Path, rng: np.random.Generator) -> None:
    """A mutation of a file; or of one file of a folder, or one of those beside a file that belong to it."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
        names = sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())
        name = names[rng.integers(len(names))]
        (target / name).write_bytes(mutate(source / name, rng))
        return
    family = sorted(p for p in source.parent.iterdir() if p.is_file() and p.stem.split(".")[0] == source.stem.split(".")[0])
    beside = [p for p in family if p.suffix in (".traj", ".npz")] if source.name == "relaxed.extxyz" else [source]
    chosen = beside[rng.integers(len(beside))]
    for path in {source, *beside}:
        (target.parent / path.name).write_bytes(mutate(path, rng) if path == chosen else path.read_bytes())


def mutate(path: Path, rng: np.random.Generator) -> bytes:
    """A mutation below the packing, where there is one, half of the time: what is packed again has its right checksums."""
    data = path.read_bytes()
    if rng.random() < 0.3 or path.name.endswith("state.npz"):  # states are ours: damaged, not forged
        return mutated(data, rng)
    if path.suffix in PACKED:
        unpack, pack = PACKED[path.suffix]
        return pack(mutated(unpack(data), rng))
    if data[:2] == b"PK":
        return _repacked(data, rng)
    if path.suffix == ".safetensors":
        return _header(data, rng)
    return mutated(data, rng)


def _repacked(data: bytes, rng: np.random.Generator) -> bytes:
    """A zip archive with one member changed, dropped or renamed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w") as new:
        names = archive.namelist()
        chosen = names[rng.integers(len(names))]
        likely = [n for n in names if n.endswith((".pkl", ".npy", ".json"))]
        if likely and rng.random() < 0.7:
            chosen = likely[rng.integers(len(likely))]
        for name in names:
            content = archive.read(name)
            if name != chosen:
                new.writestr(name, content)
            elif rng.random() < 0.95:
                new.writestr(name, mutated(content, rng))
    return out.getvalue()


def _header(data: bytes, rng: np.random.Generator) -> bytes:
    """A safetensors file with its header, or a value in the JSON inside it, changed."""
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    try:
        if rng.random() < 0.5:
            content = json.loads(header)
            for key in ("gossamer", "state"):
                if key in content["__metadata__"]:
                    content["__metadata__"][key] = json.dumps(_other_value(json.loads(content["__metadata__"][key]), rng))
            header = json.dumps(content).encode()
        else:
            header = mutated(header, rng)
    except (ValueError, UnicodeDecodeError):
        pass
    return len(header).to_bytes(8, "little") + header + rest


def _other_value(value: Any, rng: np.random.Generator) -> Any:
    """JSON with one value changed somewhere inside."""
    others = [None, True, -1, 0, 10**9, 1e300, -1e-300, "", "x", [], {}, [1], {"a": 1}, float("nan"), float("inf"), 2**70, [[[]]]]
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = list(value)[rng.integers(len(value))]
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {k: _other_value(v, rng) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and rng.random() < 0.7:
        where = int(rng.integers(len(value)))
        return [_other_value(v, rng) if k == where else v for k, v in enumerate(value)]
    return others[rng.integers(len(others))]


def override(rng: np.random.Generator) -> str:
    """Settings by the command line: one of ours with another value."""
    names = [
        "training.steps",
        "training.schedule",
        "model.name",
        "model.cutoff",
        "loss.energy",
        "data.train",
        "finetune.start",
        "",
        "a.b",
        "out",
    ]
    return f"{names[rng.integers(len(names))]}={mutated(b'[1, {a: 2}]', rng).decode(errors='replace')}"


# --- cases ------------------------------------------------------------------------------------------------------------


def outcome(read: Callable[[], Any], path: Path) -> str:
    """What came of reading: "read", "refused", or a finding."""
    try:
        read()
        return "read"
    except OURS as error:
        if type(error) not in OURS:
            return f"{FINDING} {type(error).__name__}: {' '.join(str(error).split())[:250]}"
        if (
            isinstance(error, ValueError)
            and path.suffix not in NAMES_SETTINGS
            and str(path) not in str(error)
            and str(path.with_suffix("")) not in str(error)
        ):
            return f"{FINDING} no file named: {' '.join(str(error).split())[:250]}"
        return "refused"
    except Exception as error:
        return f"{FINDING} {type(error).__name__}: {' '.join(str(error).split())[:250]}"


def make_case(seed: int, folder: Path, only: str = "") -> Case:
    """Case k of this seed, in a folder to work in."""
    every = [t for t in targets(folder / "inputs") if only in t.name]
    wrong = {
        t.name: what for t in every if (what := _sound(t, folder / "work")) != "read" and not (what == "refused" and t.name in REFUSED)
    }
    assert not wrong, f"sound files are not read: {wrong}"

    def case(k: int) -> str:
        rng = random_of(seed, k)
        target = drawn(every, rng)
        if target.name.startswith("config") and rng.random() < 0.2:
            text = override(rng)
            found = outcome(lambda: make_config({"data": {"train": "a.extxyz"}}, [text]), Path("x.yaml"))
            return f"override: {found}" + (f" [{text!r}]" if FINDING in found else "")
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        path = work / target.path.name
        write_mutated(target.path, path, rng)
        return f"{target.name}: {outcome(lambda: target.read(path), path)}"

    return case


REFUSED = {"frames a.npz", "frames b.npz", "frames rmd17.npz", "frames mptrj.json", "config aliases.yaml", "import plain.pt", "import painn.model",
           "config direct-then-conservative-2.yaml", "config finetune-low-rank.yaml",
           "config mptrj-geodite-2.yaml"}  # fmt: skip
"""sound files that are not for this reader, settings that are unknown, or that start from a potential: refused, which is tried too"""


def _sound(target: Target, work: Path) -> str:
    """What comes of the file as it is; of a copy, since a run that goes on changes its folder."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    path = work / target.path.name
    if target.path.is_dir():
        shutil.copytree(target.path, path)
    else:
        for beside in {target.path, *target.path.parent.glob(f"{target.path.stem}.*")}:
            if beside.is_file():
                shutil.copy(beside, work / beside.name)
    return outcome(lambda: target.read(path), path)


def run(count: int, seed: int, minutes: float, out: Path, only: str = "") -> dict[str, Any]:
    """Read so many inputs; see the module."""
    return campaign("fuzz", make_case(seed, out / "fuzz", only), count, seed, minutes, out, {"only": only} if only else None)
