"""Compiled programs give the potential's numbers, are refused where they do not belong, and never stand in the way."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from conftest import make_potential, often

from gossamer.data.from_atoms import from_atoms
from gossamer.data.labels import LabelConfig
from gossamer.engine import engine as engine_module
from gossamer.engine import program
from gossamer.engine.agreement import probe
from gossamer.engine.cache import check, keeping, tidy
from gossamer.engine.engine import Engine, Way
from gossamer.engine.program import Program, cache_name, cached_program, compare, identity, make_program, open_program
from gossamer.graph import FIELDS
from gossamer.potential_file import save
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.md import md


@pytest.fixture
def cache(tmp_path: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without programs; it holds the kernels that tests have built."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for file in kernels.glob("*.so*"):
        shutil.copy2(file, folder)
    monkeypatch.setenv("GOSSAMER_CACHE", str(folder))
    return folder


def run_without_hook(code: str, folder: Path) -> str:
    """Compilation needs a process without the shape checks of the test suite."""
    tests = Path(__file__).resolve().parent
    head = f"import sys; sys.path.insert(0, {str(tests)!r}); import jaxtyping; jaxtyping.install_import_hook = lambda *a, **k: None\n"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", head + code], cwd=folder, capture_output=True, text=True, check=False, timeout=500
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


CHECK = """
import numpy as np, torch
from pathlib import Path
from ase.build import bulk, molecule
from conftest import MODELS, make_potential
torch.set_num_threads(2)  # other code is generated than for one
from dataclasses import replace
from gossamer.calibration import measure_uncertainty
from gossamer.data.structure import as_structure
from gossamer.checks.conservation import force_gradient_error, stress_gradient_error
from gossamer.checks.symmetry import supercell_error, symmetry_errors
from gossamer.simulation.calculator import Calculator

def potential_of(*elements, **data):
    potential = make_potential(list(elements), **data, **MODELS[{name!r}])
    measure_uncertainty(potential, frames[:8], frames[8:])
    return potential

crystal = bulk("SiC", "zincblende", a=4.36)
crystal.rattle(0.1, seed=0)
crystal.set_cell(crystal.cell.array @ (np.eye(3) + 0.03 * np.array([[1, 2, 0], [0, -1, 1], [1, 0, 1]])), scale_atoms=True)
frames = []
for k in range(12):
    frames.append(as_structure((crystal.copy(), molecule("CH3OH"))[k % 2]))
    frames[-1] = replace(frames[-1], positions=frames[-1].positions + 0.1 * np.random.default_rng(k).normal(size=frames[-1].positions.shape),
                         energy=0.0, forces=np.zeros_like(frames[-1].positions))
potential = potential_of("C", "H", "O", "Si")
plain, fast = Calculator(potential, way="plain"), Calculator(potential, way="program")
worst = 0.0
for atoms in (crystal, crystal.repeat((2, 2, 1)), molecule("C2H6")[:2], crystal.repeat((3, 1, 2))):
    found = []
    for calculator in (plain, fast):
        atoms.calc = calculator
        wants = atoms.pbc.all() and potential.conservative
        found.append((atoms.get_potential_energy(), atoms.get_potential_energies(), atoms.get_forces(), atoms.get_stress() if wants else np.zeros(6)))
    assert fast.engine.way == "program"
    sure, sure_fast = (calculator.get_property("forces_uncertainty", atoms) for calculator in (plain, fast))
    np.testing.assert_allclose(sure_fast, sure, rtol=1e-5)
    for a, b in zip(*found):
        worst = max(worst, float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(1.0, np.abs(np.asarray(a)).max())))
print("worst", worst)
assert worst < (1e-10 if fast.engine.quick is None else 1e-8), worst  # radial functions from tables
if potential.conservative:
    assert force_gradient_error(fast, crystal) < 1e-6
    assert stress_gradient_error(fast, crystal) < 1e-7
    assert max(e["relative"] for e in symmetry_errors(fast, crystal).values()) < 1e-9
# other weights, another order of the elements, other data: the same program, found without asking
other = potential_of("O", "Si", "H", "C", seed=1, energy_scale=0.31, mean_neighbors=7.3)
exact, quick = Calculator(other, way="plain"), Calculator(other)
assert quick.engine.way == "program"
for atoms in (crystal, crystal.repeat((2, 2, 1))):
    a, b = (calculator.get_property("forces", atoms) for calculator in (exact, quick))
    assert np.abs(a - b).max() < (1e-10 if fast.engine.quick is None else 1e-8) * max(1.0, np.abs(a).max())
    assert abs(exact.get_property("energy", atoms) - quick.get_property("energy", atoms)) < 1e-7
    a, b = (calculator.get_property("forces", atoms) for calculator in (plain, fast))  # and the first has kept its own
    assert np.abs(a - b).max() < (1e-10 if fast.engine.quick is None else 1e-8) * max(1.0, np.abs(a).max())
# a graph of one's own in other precisions
graph = plain.graph(crystal)
others = dict(atomic_numbers=torch.int32, edge_shifts=torch.int64, edge_index=torch.int32, cell=torch.float32)
cast = replace(graph, **dict((k, getattr(graph, k).to(t)) for k, t in others.items()))
assert float((plain.engine(cast).forces - fast.engine(cast).forces).abs().max()) < 1e-5
lone = molecule("C2H6")[:1]  # one atom: left to the potential itself
lone.calc = fast
lone.get_forces()
"""


BATCHES = """
# batches: a program of their own
from gossamer.data.from_atoms import from_atoms
from gossamer.data.labels import LabelConfig
frames = [crystal, crystal.repeat((2, 1, 1)), molecule("CH3OH"), molecule("C2H6")[:1], molecule("H2O")]
for structures in (frames, frames[:2] * 2):
    graph = potential.collate([from_atoms(a, LabelConfig(), "frame") for a in structures])
    assert fast.engine.batch_program is not None or fast.expect(1, crystal) == "program"
    fast.engine.expect(1, graph)
    assert fast.engine.batch_program is not None
    a, b = plain.engine(graph), fast.engine(graph)
    for name in ("energy", "node_energies", "forces"):
        assert float((getattr(a, name) - getattr(b, name)).abs().max()) < (1e-10 if fast.engine.quick is None else 1e-7), name
    if a.stress is not None:
        assert torch.equal(a.stress.isnan(), b.stress.isnan())
        assert float((a.stress - b.stress).nan_to_num().abs().max()) < 1e-7
"""


@pytest.mark.parametrize("name", [*often(["schnet"], []), *(pytest.param(n, marks=pytest.mark.slow) for n in (
    "sound", "published", "direct", "nequip", "nequip-l3-pairs", "nequip-parity", "nequip-published", "geodite", "geodite-published", "painn", "weft"))])  # fmt: skip
def test_program_is_the_potential(name: str, cache: Path) -> None:
    """Energies, forces and stress to 1e-10 in float64 for other sizes than it was traced with; derivatives and symmetries by itself."""
    assert "worst" in run_without_hook(CHECK.format(name=name), cache.parent)
    assert len(list(cache.glob("*.pt2"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sound", "sound-global", "direct", "nequip", "geodite", "painn", "schnet"])
def test_programs_of_batches_are_the_potential(name: str, cache: Path) -> None:
    assert "worst" in run_without_hook(CHECK.format(name=name) + BATCHES, cache.parent)
    assert len(list(cache.glob("*.pt2"))) == 2  # of one structure and of batches


COMMANDS = """
import json, shutil, numpy as np, torch
from pathlib import Path
torch.set_num_threads(1)
import ase.io
from ase.build import bulk
from conftest import make_potential, often
from gossamer.cli import main
from gossamer.potential_file import save
from gossamer.files import cache_folder
from gossamer.engine import cache
from gossamer.engine.program import Program, cache_name
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.md import md

# exported programs hold no kernels; with them the cache is tested in test_program_is_the_potential
import gossamer.engine.engine
def missing(potential, use):
    raise gossamer.engine.engine.Missing("none here")
gossamer.engine.engine.attach_kernels = missing
save(make_potential(["Si"], dtype=torch.float32, name="schnet"), "p.safetensors")
atoms = bulk("Si", cubic=True)
atoms.rattle(0.05, seed=0)
ase.io.write("si.extxyz", atoms)
assert main(["export", "p.safetensors", "p.pt2", "--structure", "si.extxyz", "--json"]) == 0
calculator = Calculator("p.safetensors", way="plain")
program = Program(Path("p.pt2"), calculator.potential)
# plain torch runs it, without gossamer
graph = calculator.graph(atoms)
from gossamer.graph import FIELDS
out = torch._inductor.aoti_load_package("p.pt2")(*(getattr(graph, f) for f in FIELDS))
atoms.calc = calculator
assert np.abs(out[2].numpy() - atoms.get_forces()).max() < 1e-4
# of another potential: refused
other = make_potential(["Si"], seed=1, dtype=torch.float32, name="schnet")
try:
    Program(Path("p.pt2"), other)
except ValueError as error:
    assert "made for something else: weights" in str(error), error
else:
    raise AssertionError
# in the cache it is found, by default; a run that resumes goes on as it began
with cache.keeping(cache.cached(cache_name(calculator.engine.potential))) as path:
    shutil.copy("p.pt2", path)
assert Calculator("p.safetensors", way="program").engine.way == "program"
assert Calculator("p.safetensors").engine.way == "program"
short = dict(steps=20, interval=5, progress=False, temperature=100)
md("p.safetensors", "si.extxyz", out="whole", **{**short, "steps": 40})
md("p.safetensors", "si.extxyz", out="parts", **short)
for file in cache_folder().glob("*.pt2"):
    assert file.stat().st_size > 1000
md("p.safetensors", "si.extxyz", out="parts", resume=True, **{**short, "steps": 40})
a, b = (np.load(f"{n}/state.npz")["positions"] for n in ("whole", "parts"))
assert np.array_equal(a, b)
assert json.loads(str(np.load("whole/state.npz")["settings"]))["way"] == "program"
# a cached file that is damaged is thrown away, and the potential runs
for file in cache_folder().glob("*.pt2"):
    flipped = bytearray(file.read_bytes())
    flipped[len(flipped) // 2 : len(flipped) // 2 + 60] = bytes(60)
    file.write_bytes(flipped)
atoms.calc = safe = Calculator("p.safetensors")
atoms.get_forces()
assert safe.engine.way == "plain"
assert not list(cache_folder().glob("*.pt2"))
print("done")
"""


@pytest.mark.thorough
def test_export_cache_and_resume(cache: Path) -> None:
    assert "done" in run_without_hook(COMMANDS, cache.parent)


def test_a_program_that_differs_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    potential = make_potential(["Si"])
    graph = probe(potential)

    class Wrong:
        names = program.NAMES

        def __init__(self, size: float) -> None:
            self.size = size

        def __call__(self, graph):
            out = potential(graph, stress=True)
            return type(out)(energy=out.energy, node_energies=out.node_energies, forces=out.forces * (1 + self.size), stress=out.stress)

    compare(Wrong(0.0), potential, graph)
    with pytest.raises(RuntimeError, match="fast forces differs"):
        compare(Wrong(1e-6), potential, graph)

    def fails(*_: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(program, "make_program", fails)
    with pytest.raises(RuntimeError, match="way 'program' cannot be had: no compiler here"):
        Calculator(potential, way="program")
    engine = Engine(potential)
    assert engine.expect(10**9, graph) in ("plain", "kernels")
    assert "runs without compilation: no compiler here" in caplog.text


def test_the_cache_keeps_what_was_used_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("GOSSAMER_CACHE", str(cache))
    for age, name in enumerate(("lammps-1-plugin.so", "new.pt2", "old.so", "older.pt2")):
        with keeping(cache / name) as file:
            file.write_bytes(bytes(1000))
        os.utime(cache / name, (1e9 - age, 1e9 - age))
    (cache / "compiler" / "a").mkdir(parents=True)
    (cache / "compiler" / "a" / "code.so").write_bytes(bytes(1000))
    for path in (cache / "compiler" / "a" / "code.so", cache / "compiler" / "a"):
        os.utime(path, (1e9 - 10, 1e9 - 10))
    (cache / ".half.pt2").write_bytes(bytes(1000))

    def kept() -> set[str]:
        return {p.name for p in cache.iterdir() if p.suffix != ".sha256"} - {".half.pt2", "lammps-1-plugin.so"}

    check(cache / "older.pt2")  # it is used
    tidy(4 * 1000 + 5000)
    assert kept() == {"new.pt2", "old.so", "older.pt2", "compiler"}
    tidy(3 * 1000)
    assert kept() == {"new.pt2", "old.so", "older.pt2"}
    tidy(2 * 1000)
    assert kept() == {"new.pt2", "older.pt2"}
    assert not (cache / "old.so.sha256").exists()
    tidy(0)
    assert kept() == set()
    assert {p.name for p in cache.iterdir()} == {".half.pt2", "lammps-1-plugin.so", "lammps-1-plugin.so.sha256"}


def test_a_cache_that_cannot_be_written(caplog: pytest.LogCaptureFixture) -> None:
    """No obstacle to a potential; an error for who asked for a program."""
    potential = make_potential(["Si"])
    atoms = bulk("Si")
    atoms.calc = Calculator(potential)  # conftest puts the cache where no folder can be
    assert np.isfinite(atoms.get_forces()).all()
    assert atoms.calc.engine.way != "program"
    with pytest.raises(RuntimeError, match="way 'program' cannot be had"):
        Calculator(potential, way="program")


def test_programs_get_the_precision_they_were_made_for() -> None:
    """They read memory as it is: whole shifts would be denormal numbers, positions in float32 the half of as many in float64."""
    graph = probe(make_potential(["Si"]))
    others = {"atomic_numbers": torch.int32, "positions": torch.float32, "edge_index": torch.int32, "edge_shifts": torch.int64}
    cast: Any = SimpleNamespace(**{name: getattr(graph, name).to(others.get(name)) for name in FIELDS})
    for name, found in zip(FIELDS, program.tensors_of(cast), strict=True):
        torch.testing.assert_close(found, getattr(graph, name), rtol=0, atol=1e-6)


def test_wrong_programs_and_sizes(cache: Path, tmp_path: Path) -> None:
    potential = make_potential(["Si"])
    (tmp_path / "x.pt2").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="is not a compiled potential"):
        Program(tmp_path / "x.pt2", potential)
    graph = potential.collate([from_atoms(Atoms("Si"), LabelConfig(), "lone")])
    with pytest.raises(ValueError, match="At least two atoms and edges"):
        make_program(potential, graph, tmp_path / "y.pt2")
    assert cached_program(potential, probe(potential)) is None
    save(potential, tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=r"is a \.pt2 file"):
        program.export(tmp_path / "p.safetensors", tmp_path / "p.bin")
    assert identity(potential)["weights"] != identity(make_potential(["Si"], seed=1))["weights"]
    assert identity(potential) != identity(potential, batch=True)


@pytest.mark.parametrize("name", ["leignn", "weft"])
def test_names_of_programs(name: str, cache: Path) -> None:
    """Nothing of the data is part of the name, and all that could be part of the graph."""

    def named(*elements: str, way: Way = "kernels", **options: Any) -> str:
        engine = Engine(make_potential(list(elements), name=name, **options), way)
        return cache_name(engine.quick or engine.potential)

    first = named("Si", "O", seed=0)
    assert named("H", "C", seed=1, energy_scale=0.2, mean_neighbors=40.0) == first
    others = [
        named("Si"), named("Si", "O", cutoff=4.5), named("Si", "O", num_layers=1 if name != "weft" else 3), named("Si", "O", dtype=torch.float32),
        named("Si", "O", zbl=False), named("Si", "O", way="plain"),
    ]  # fmt: skip
    assert len({first, *others}) == len(others) + 1


def test_long_runs_compile_and_short_ones_do_not(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(engine_module, "cached_program", lambda potential, graph, make=False: asked.append(make))
    atoms = bulk("Si", cubic=True)
    potential = make_potential(["Si"])
    Calculator(potential).expect(10, atoms)
    assert asked == [False, False]  # looked for when made, and again
    Calculator(potential).expect(10_000_000, atoms)
    assert asked == [False, False, False, True]
    Calculator(potential, way="plain").expect(10_000_000, atoms)
    Calculator(potential, way="kernels").expect(10_000_000, atoms)
    assert len(asked) == 4
    md(potential, atoms, steps=2, out=tmp_path / "a", progress=False, way="plain")
    assert len(asked) == 4
    assert json.loads(str(np.load(tmp_path / "a" / "state.npz")["settings"]))["way"] == "plain"


def test_md_leaves_the_calculator_as_it_was(cache: Path, tmp_path: Path) -> None:
    """A calculator that the caller made runs as it was made, before and after a simulation."""
    atoms = bulk("Si", cubic=True)
    calculator = Calculator(make_potential(["Si"]), way="plain")
    before = dict(vars(calculator.engine))
    md(calculator, atoms, steps=2, out=tmp_path / "a", progress=False)
    assert all(vars(calculator.engine)[k] is v for k, v in before.items())


def test_calculators_in_threads_and_copies() -> None:
    """Each thread gets the answer to its own question; copies and pickles give the same numbers."""
    calculator = Calculator(make_potential(["Si"]), way="plain")
    frames = [bulk("Si", cubic=True) for _ in range(12)]
    for seed, frame in enumerate(frames):
        frame.rattle(0.1, seed=seed)
    wanted = [Calculator(calculator.potential, way="plain").get_potential_energy(frame.copy()) for frame in frames]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(calculator.get_potential_energy, frames * 3))
    np.testing.assert_array_equal(found, wanted * 3)
    for other in (copy.deepcopy(calculator), pickle.loads(pickle.dumps(calculator))):
        assert other.get_potential_energy(frames[0].copy()) == wanted[0]


def test_copies_in_threads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deep copies share an engine, whose tables, programs and recordings answer one at a time."""
    calculator = Calculator(make_potential(["Si"]), way="plain")
    original, inside, most = Engine._predict, [], []

    def watched(self: Engine, *arguments: Any) -> Any:
        inside.append(0)
        most.append(len(inside))
        time.sleep(0.02)
        answer = original(self, *arguments)
        inside.pop()
        return answer

    monkeypatch.setattr(Engine, "_predict", watched)
    copies = [copy.deepcopy(calculator) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        energies = list(pool.map(lambda one: one.get_potential_energy(bulk("Si", cubic=True)), copies))
    assert len(set(energies)) == 1
    assert max(most) == 1


@pytest.mark.parametrize("signal", [0, 11])
def test_a_loader_that_crashes_ends_another_process(signal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once found to open programs, a machine is not asked again, in this process or another; one that crashes is an error."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(program, "_sure", set())
    monkeypatch.setattr(program, "OPEN", f"import os; os.kill(os.getpid(), {signal})")
    opened: list[str] = []
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", lambda path, *_: opened.append(path))
    (tmp_path / "cache").mkdir(mode=0o700)
    path = tmp_path / "p.pt2"
    if signal:
        with pytest.raises(program.Crash, match="ends by signal 11 on this machine"):
            open_program(path)
        assert not opened
        assert not list((tmp_path / "cache").iterdir())
        return
    open_program(path)
    monkeypatch.setattr(program, "OPEN", "import os; os.kill(os.getpid(), 9)")
    open_program(path)
    monkeypatch.setattr(program, "_sure", set())
    open_program(path)
    assert opened == [str(path)] * 3
