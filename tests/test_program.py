"""Compiled programs give the potential's numbers, are refused where they do not belong, and never stand in the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from conftest import make_potential

from gossamer.engine import program
from gossamer.engine.program import Program, cached_program, compare, identity, make_program
from gossamer.potential_file import save
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.md import md


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
from gossamer.checks.conservation import force_gradient_error, stress_gradient_error
from gossamer.checks.symmetry import supercell_error, symmetry_errors
from gossamer.engine.program import compare, fits
from gossamer.simulation.calculator import Calculator

potential = make_potential(["C", "H", "O", "Si"], **MODELS[{name!r}])
crystal = bulk("SiC", "zincblende", a=4.36)
crystal.rattle(0.1, seed=0)
crystal.set_cell(crystal.cell.array @ (np.eye(3) + 0.03 * np.array([[1, 2, 0], [0, -1, 1], [1, 0, 1]])), scale_atoms=True)
plain, fast = Calculator(potential, compiled=False), Calculator(potential, compiled=True)
worst = 0.0
for atoms in (crystal, crystal.repeat((2, 2, 1)), molecule("C2H6")[:2], crystal.repeat((3, 1, 2))):
    found = []
    for calculator in (plain, fast):
        atoms.calc = calculator
        wants = atoms.pbc.all() and potential.conservative
        found.append((atoms.get_potential_energy(), atoms.get_potential_energies(), atoms.get_forces(), atoms.get_stress() if wants else np.zeros(6)))
    assert fast.program is not None
    for a, b in zip(*found):
        worst = max(worst, float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(1.0, np.abs(np.asarray(a)).max())))
print("worst", worst)
assert worst < (1e-10 if fast.fast is None else 1e-8), worst  # radial functions from tables
if potential.conservative:
    assert force_gradient_error(fast, crystal) < 1e-6
    assert stress_gradient_error(fast, crystal) < 1e-7
    assert max(e["relative"] for e in symmetry_errors(fast, crystal).values()) < 1e-9
lone = molecule("C2H6")[:1]  # one atom: left to the potential itself
lone.calc = fast
lone.get_forces()
"""


@pytest.mark.parametrize("name", ["sound", *(pytest.param(n, marks=pytest.mark.slow) for n in (
    "published", "direct", "nequip", "nequip-l3-pairs", "nequip-parity", "nequip-published", "geodite", "geodite-published", "painn", "schnet"))])  # fmt: skip
def test_program_is_the_potential(name: str, cache: Path) -> None:
    """Energies, forces and stress to 1e-10 in float64 for other sizes than it was traced with; derivatives and symmetries by itself."""
    assert "worst" in run_without_hook(CHECK.format(name=name), cache.parent)
    assert len(list(cache.glob("*.pt2"))) == 1


COMMANDS = """
import json, shutil, numpy as np, torch
from pathlib import Path
torch.set_num_threads(1)
import ase.io
from ase.build import bulk
from conftest import make_potential
from gossamer.cli import main
from gossamer.potential_file import save
from gossamer.engine.program import Program, cache_folder, cache_path
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.md import md

# exported programs hold no kernels; with them the cache is tested in test_program_is_the_potential
import gossamer.engine.agreement
def missing(potential):
    raise gossamer.engine.agreement.Missing("none here")
gossamer.engine.agreement.add_kernels = missing
save(make_potential(["Si"], dtype=torch.float32), "p.safetensors")
atoms = bulk("Si", cubic=True)
atoms.rattle(0.05, seed=0)
ase.io.write("si.extxyz", atoms)
assert main(["export", "p.safetensors", "p.pt2", "--structure", "si.extxyz", "--json"]) == 0
calculator = Calculator("p.safetensors", compiled=False)
program = Program(Path("p.pt2"), calculator.potential)
# plain torch runs it, without gossamer
graph = calculator._graph(atoms)
from gossamer.graph import FIELDS
out = torch._inductor.aoti_load_package("p.pt2")(*(getattr(graph, f) for f in FIELDS))
atoms.calc = calculator
assert np.abs(out[2].numpy() - atoms.get_forces()).max() < 1e-4
# of another potential: refused
other = make_potential(["Si"], seed=1, dtype=torch.float32)
try:
    Program(Path("p.pt2"), other)
except ValueError as error:
    assert "made for something else: weights" in str(error), error
else:
    raise AssertionError
# in the cache it is found, by default; a run that resumes goes on as it began
cache_folder().mkdir(parents=True)
shutil.copy("p.pt2", cache_path(calculator.potential))
atoms.calc = made = Calculator("p.safetensors", compiled=True)
atoms.get_forces()
assert made.program is not None
atoms.calc = found = Calculator("p.safetensors")
atoms.get_forces()
assert found.program is not None
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
    file.write_bytes(b"nonsense")
atoms.calc = safe = Calculator("p.safetensors")
atoms.get_forces()
assert safe.program is None
assert not list(cache_folder().glob("*.pt2"))
print("done")
"""


def test_export_cache_and_resume(cache: Path) -> None:
    assert "done" in run_without_hook(COMMANDS, cache.parent)


def test_a_program_that_differs_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    potential = make_potential(["Si"])
    calculator = Calculator(potential, compiled=False)
    atoms = bulk("Si")
    atoms.rattle(0.1, seed=0)
    graph = calculator._graph(atoms)

    class Wrong:
        names = program.NAMES

        def __init__(self, size: float) -> None:
            self.size = size

        def __call__(self, graph):
            out = potential(graph, stress=True)
            return type(out)(energy=out.energy, node_energies=out.node_energies, forces=out.forces * (1 + self.size), stress=out.stress)

    compare(Wrong(0.0), potential, graph, 1e-10)
    with pytest.raises(RuntimeError, match="fast forces differs"):
        compare(Wrong(1e-6), potential, graph, 1e-10)
    monkeypatch.setattr(program, "make_program", lambda *a: (_ for _ in ()).throw(RuntimeError("no compiler here")))
    atoms.calc = Calculator(potential, compiled=True)
    forces = atoms.get_forces()
    assert atoms.calc.program is None
    assert "runs without compilation: no compiler here" in caplog.text
    atoms.calc = calculator
    np.testing.assert_allclose(forces, atoms.get_forces(), atol=1e-8)


def test_a_cache_that_cannot_be_written_is_no_obstacle(caplog: pytest.LogCaptureFixture) -> None:
    potential = make_potential(["Si"])
    atoms = bulk("Si")
    atoms.calc = Calculator(potential, compiled=True)  # conftest puts the cache where no folder can be
    assert np.isfinite(atoms.get_forces()).all()
    assert "runs without compilation" in caplog.text


def test_wrong_programs_and_sizes(cache: Path, tmp_path: Path) -> None:
    potential = make_potential(["Si"])
    (tmp_path / "x.pt2").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="is not a compiled potential"):
        Program(tmp_path / "x.pt2", potential)
    lone = Calculator(potential, compiled=True)
    graph = lone._graph(Atoms("Si"))
    with pytest.raises(ValueError, match="at least two atoms and edges"):
        make_program(potential, graph, tmp_path / "y.pt2")
    assert cached_program(potential, graph) is None
    save(potential, tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=r"is a \.pt2 file"):
        program.export(tmp_path / "p.safetensors", tmp_path / "p.bin")
    assert identity(potential)["weights"] != identity(make_potential(["Si"], seed=1))["weights"]


def test_long_runs_compile_and_short_ones_do_not(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("gossamer.simulation.calculator.cached_program", lambda potential, graph, make=False: asked.append(make))
    atoms = bulk("Si", cubic=True)
    potential = make_potential(["Si"])
    Calculator(potential).compile_if_worth(atoms, 10)
    assert asked == [False]
    Calculator(potential).compile_if_worth(atoms, 10_000_000)
    assert asked == [False, False, True]
    Calculator(potential, compiled=False).compile_if_worth(atoms, 10_000_000)
    assert len(asked) == 3
    md(potential, atoms, steps=2, out=tmp_path / "a", progress=False, way="plain")
    assert len(asked) == 3
    assert json.loads(str(np.load(tmp_path / "a" / "state.npz")["settings"]))["way"] == "plain"
