"""Files with a fault of a disk or of a copy: refused with an error of ours, or the same numbers; never a crash, never other numbers.

    python benchmarks/reliability/campaign.py damage --count 2000

Whatever gossamer writes with checksums, or reads that has some: potentials, checkpoints, states, stores, kernels, programs, packages for
LAMMPS, compressed data. Text, trajectories and databases have none: for those see `fuzz`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import samples
import torch
from common import FINDING, Case, Target, campaign, damaged, drawn, random_of
from fuzz import OURS

from gossamer.data.readers import read_structures
from gossamer.engine import cache
from gossamer.engine.agreement import probe
from gossamer.engine.kernels import cpu
from gossamer.engine.program import Program, cached_program, make_program
from gossamer.imports import inert
from gossamer.potential_file import load, read_manifest
from gossamer.simulation.lammps import build_plugin, export_lammps, installation, surroundings
from gossamer.simulation.md import md
from gossamer.simulation.relax import relax
from gossamer.training.checkpoint import read_checkpoint


def digest(value: Any) -> str:
    """One line for everything that was read."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                add(str(key))
                add(value[key])
        elif isinstance(value, list | tuple):
            found.update(b"[%d" % len(value))
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor | np.ndarray):
            array = np.ascontiguousarray(value)
            found.update(f"{array.dtype} {array.shape}".encode())
            found.update(array.tobytes())
        else:
            found.update(repr(value).encode())

    add(value)
    return found.hexdigest()


def targets(folder: Path, machine: bool, package: bool) -> list[Target]:
    """All of them, written into the folder; kernels and programs, and the package for LAMMPS and a training step, take minutes to build."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data = samples.data_files(folder / "data")
    state = samples.states(folder / "states")
    foreign = samples.foreign_files(folder / "foreign")
    found = [
        Target("potential float32", samples.potential_file(folder / "leignn.safetensors", "sound"), potential, 8),
        Target("potential float64", samples.potential_file(folder / "nequip.safetensors", "nequip", torch.float64), potential, 8),
        Target("checkpoint", samples.checkpoint_file(folder / "checkpoint.safetensors"), read_checkpoint, 8),
        Target("store", data["a.store"], structures, 8),
        *(Target(name, data[name], structures, 1) for name in ("a.extxyz.xz", "a.extxyz.gz", "a.extxyz.bz2", "a.npz", "b.npz")),
        Target("state langevin", state["langevin"], go_on, 2, "state.npz"),
        Target("state nose-hoover", state["nose-hoover"], go_on, 2, "state.npz"),
        Target("state relaxation", state["relaxed.extxyz"].parent, relax_on, 3, "relaxed.state.npz"),
        Target("import", foreign["plain.pt"], archive, 3),
        Target("import nequip", foreign["nequip.ckpt"], archive, 3),
    ]
    compiled = [lammps(folder / "lammps"), compiled_step(folder / "compiled")] if package else []
    return [*found, *(machine_code(folder / "code") if machine else []), *compiled]


# --- what is read -----------------------------------------------------------------------------------------------------


def potential(path: Path) -> Any:
    loaded = load(path)
    atoms = samples.labelled_molecules(2)
    seen = None if loaded.seen is None else loaded.seen.to_arrays()
    return [loaded.predict(atoms), loaded.state_dict(), read_manifest(path), seen]


def structures(path: Path) -> Any:
    return [{k: v for k, v in vars(s).items() if k not in ("name", "entries")} for s in read_structures(path)]


def archive(path: Path) -> Any:
    """What was saved; an archive of which that cannot be seen is no source's, and refused."""
    root = inert.open_tree(path).root
    return REFUSAL if root is None else root


def go_on(folder: Path) -> Any:
    from ase.calculators.emt import EMT

    ensemble = "langevin" if "langevin" in folder.name else "nose-hoover"
    md(EMT(), folder.parent.parent / "inputs" / "states" / "copper.extxyz", out=folder, steps=22, interval=5, ensemble=ensemble, resume=True,
       progress=False)  # fmt: skip
    with np.load(folder / "state.npz") as data:
        return dict(data)


def relax_on(folder: Path) -> Any:
    from ase.calculators.emt import EMT

    answer = relax(EMT(), folder / "copper.extxyz", out=folder / "relaxed.extxyz", steps=6, fmax=1e-5, resume=True)
    return [answer["energy_eV"], answer["atoms"].positions, answer["steps"]]


# --- kernels and programs ---------------------------------------------------------------------------------------------


def machine_code(folder: Path) -> list[Target]:
    """A kernel and a program in the cache, and a program that was exported."""
    folder.mkdir()
    model = samples.make_potential(["H", "C", "O"], dtype=torch.float64, **samples.conftest.MODELS["schnet"])
    model.requires_grad_(False)
    graph = probe(model)
    cached, exported, library = folder / "program", folder / "exported.pt2", folder / "kernel"
    source = f"typedef double T;\n{cpu.text('vectors')}"
    for place in (cached, library):
        place.mkdir(mode=0o700)
    make_program(model, graph, exported)
    with in_cache(cached):
        cached_program(model, graph, make=True)
    with in_cache(library):
        cpu.build(source, "sorting")

    def numbers(program: Any) -> Any:
        out = program(graph)
        return [out.energy, out.forces, out.stress]

    def of_cache(path: Path) -> Any:
        with in_cache(path):
            program = cached_program(model, graph)
        return REFUSAL if program is None else numbers(program)

    def of_library(path: Path) -> Any:
        """As kernels are looked for: one that is not as it was kept is not loaded, but built again."""
        (file,) = (p for p in path.iterdir() if p.suffix == ".so")
        try:
            cache.check(file)
        except cache.Untrusted:
            return REFUSAL
        return file.read_bytes()

    return [
        Target("kernel in the cache", library, of_library, 6),
        Target("program in the cache", cached, of_cache, 4),
        Target("exported program", exported, lambda path: numbers(Program(path, model)), 6),
    ]


REFUSAL = "refused"


class in_cache:
    """Another folder as the cache, for a while."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        self.before = os.environ.get("GOSSAMER_CACHE")
        os.environ["GOSSAMER_CACHE"] = str(self.folder)

    def __exit__(self, *_: Any) -> None:
        if self.before is None:
            del os.environ["GOSSAMER_CACHE"]
        else:
            os.environ["GOSSAMER_CACHE"] = self.before


def lammps(folder: Path) -> Target:
    """A package, and LAMMPS, which runs ten steps with it."""
    folder.mkdir()
    with in_cache(folder / "cache"):
        export_lammps(samples.potential_file(folder / "p.safetensors", "schnet", uncertainty=False), folder / "package")
        plugin = build_plugin()["plugin"]
    executable = installation().executable

    def energies(path: Path) -> Any:
        text = (folder / "package" / "in.example").read_text()  # that and its data lie in the package, but are no part of the potential
        text = text.replace(f"pair_coeff * * {folder / 'package'} ", f"pair_coeff * * {path} ").replace("run 50", "run 10")
        (path.parent / "in").write_text(text)
        command = [str(executable), "-in", "in", "-log", "none", "-var", "plugin", plugin]
        done = subprocess.run(command, cwd=path.parent, env=surroundings(), capture_output=True, text=True, timeout=100, check=False)
        if done.returncode < 0:
            raise SystemError(f"LAMMPS ended by signal {-done.returncode}")
        if done.returncode:
            errors = [line for line in done.stdout.splitlines() if "ERROR" in line]
            if not errors:
                raise SystemError(f"LAMMPS ended with {done.returncode} and no error: {done.stderr[-200:]}")
            raise ValueError(errors[0])
        return re.findall(r"^\s*\d+ +\S+ +\S+ +\S+ +\S+\s*$", done.stdout, re.MULTILINE)

    return Target("package for LAMMPS", folder / "package", energies, 1)


STEP = """
import hashlib, logging, torch
from gossamer.config import make_config
from gossamer.data.statistics import Statistics
from gossamer.engine.agreement import probe
from gossamer.potential import Potential
from gossamer.training.compiled import CompiledForward
logging.basicConfig(level=logging.WARNING)
torch.manual_seed(0)
model = make_config({"data": {"train": "-"}, "model": {"name": "schnet", "preset": "tiny", "num_layers": 1}}).model
potential = Potential(model, Statistics(elements=["H", "O"], reference_energies={"H": 0.0, "O": 0.0}, mean_neighbors=10.0)).train()
forward, graph = CompiledForward(potential, forces=True, stress=False), probe(potential, 8, 3)
forward(graph)
results = forward._results(forward._run, graph)
print(hashlib.sha256(b"".join(r.numpy().tobytes() for r in results)).hexdigest())
"""


def compiled_step(folder: Path) -> Target:
    """What PyTorch's compiler made for a training step, and another process that trains with it: damaged files are made again."""
    folder.mkdir()

    def numbers(path: Path) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR")} | {"GOSSAMER_CACHE": str(path)}
        done = subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode < 0:
            raise SystemError(f"training ended by signal {-done.returncode}")
        if done.returncode:
            raise SystemError(f"training failed: {done.stderr[-200:]}")
        return done.stdout

    (folder / "cache").mkdir(mode=0o700)
    numbers(folder / "cache")
    return Target("compiled training step", folder / "cache", numbers, 1)


# --- cases ------------------------------------------------------------------------------------------------------------


def make_case(seed: int, folder: Path, only: str = "", machine: bool = True, package: bool = False) -> Case:
    """Case k of this seed, in a folder to work in."""
    every = [t for t in targets(folder / "inputs", machine, package) if only in t.name]
    sound = {t.name: digest(t.read(copied(t, folder / "work"))) for t in every}
    again = {t.name: digest(t.read(copied(t, folder / "work"))) for t in every}
    assert sound == again, f"not the same twice: {[k for k in sound if sound[k] != again[k]]}"

    def case(k: int) -> str:
        rng = random_of(seed, k)
        target = drawn(every, rng)
        path = copied(target, folder / "work")
        files = sorted(p for p in path.rglob(target.files) if p.is_file()) if path.is_dir() else [path]
        chosen = files[rng.integers(len(files))]
        before = chosen.read_bytes()
        after = damaged(before, rng)
        chosen.write_bytes(after)
        if before == after:
            return f"{target.name}: nothing changed"
        return f"{target.name}: {outcome(target, path, sound[target.name], chosen)}"

    return case


def copied(target: Target, work: Path) -> Path:
    """A copy to damage, under the name it has."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    path = work / target.path.name
    if target.path.is_dir():
        shutil.copytree(target.path, path)
    else:
        shutil.copy2(target.path, path)
    return path


def outcome(target: Target, path: Path, sound: str, chosen: Path) -> str:
    """ "refused", "the same numbers", or a finding."""
    try:
        found = target.read(path)
    except OURS as error:
        text = " ".join(str(error).split())[:250]
        return "refused" if type(error) in OURS and len(text) > 20 else f"{FINDING} {type(error).__name__}: {text} [{chosen.name}]"
    except Exception as error:
        return f"{FINDING} {type(error).__name__}: {' '.join(str(error).split())[:250]} [{chosen.name}]"
    if isinstance(found, str) and found == REFUSAL:
        return "refused"
    return "the same numbers" if digest(found) == sound else f"{FINDING} other numbers, and nothing said [{chosen.name}]"


def run(count: int, seed: int, minutes: float, out: Path, only: str = "") -> dict[str, Any]:
    """Damage so many files; see the module."""
    os.environ["GOSSAMER_CACHE"] = str(out / "cache")
    package = count >= 1000 or only in ("package", "compiled")
    settings = {"package": package, **({"only": only} if only else {})}
    return campaign("damage", make_case(seed, out / "damage", only, True, package), count, seed, minutes, out, settings)
