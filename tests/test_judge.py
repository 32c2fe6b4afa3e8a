"""The judge as a whole: its verdicts, its settings, what it judges on, going on, and its command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.morse import MorsePotential
from broken_calculators import Broken, by_name, candidate_of
from conftest import make_potential, often

from gossamer.checks import (
    dynamics,
    speed,
)
from gossamer.checks.candidate import (
    Candidate,
    builtin_crystals,
    builtin_molecules,
    enlarged,
    molecule_in,
)
from gossamer.checks.config import NAMES, JudgeConfig
from gossamer.checks.judge import CHECKS, judge
from gossamer.checks.page import number
from gossamer.checks.result import Result, at_least, at_most, close_to, conclude, measured
from gossamer.checks.source import parse_calculator, supported_elements
from gossamer.data.atoms import read_frames
from gossamer.files import InputError
from gossamer.machine import machine, versions
from gossamer.settings import describe

# --- verdicts -------------------------------------------------------------------------------------------------------


def test_metrics_follow_their_limits() -> None:
    assert [at_most("a", v, "eV", 1, 2, "").status for v in (1, 1.5, 3, float("nan"))] == ["passed", "weak", "failed", "failed"]
    assert [at_least("a", v, "", 2, 1, "").status for v in (2, 1.5, 0, float("nan"))] == ["passed", "weak", "failed", "failed"]
    assert [close_to("a", v, "", 4, 0.5, 1, "").status for v in (4.4, 3.1, 9)] == ["passed", "weak", "failed"]
    bad = conclude([at_most("drift", 3, "meV", 1, 2, "it heats up"), at_most("other", 1.5, "", 1, 2, "x"), measured("m", 1.0)])
    assert (bad.status, bad.reason, bad.consequence) == ("failed", "Drift: 3 meV, expected at most 1 meV.", "it heats up")
    assert conclude([measured("m", 1.0)]).status == "measured"
    assert conclude([]).status == "skipped"
    assert Result.from_dict(json.loads(json.dumps(bad.to_dict()))) == bad


@pytest.mark.parametrize(
    "check",
    often(
        ["symmetry", "conservation", "smoothness", "diatomics", "crystals", "speed"],
        ["symmetry", "conservation", "diatomics", "crystals", "speed"],
    ),
)
def test_sound_potential_passes(check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "time_evaluation", evaluations_take(1))
    make = EMT
    if check == "smoothness":  # EMT itself has steps at its cutoff
        make = lambda: MorsePotential(epsilon=0.34, r0=2.87, rho0=4.0, rcut1=1.2, rcut2=1.9)  # noqa: E731
    result = CHECKS[check].run(candidate_of(make, tmp_path))
    assert result.status in ("passed", "measured"), [m.reason for m in result.metrics if m.status in ("weak", "failed")]
    if check == "conservation":
        assert by_name(result, "ratio").value == pytest.approx(4, abs=0.5)


def evaluations_take(power: float) -> Callable[..., float]:
    """In the place of `time_evaluation`: forces are computed and take 30 ms for 32 atoms, however busy the machine is."""

    def time_evaluation(calculator: Any, atoms: Atoms, **options: Any) -> float:
        atoms = atoms.copy()
        atoms.calc = calculator
        atoms.get_forces()
        return float(0.03 * (len(atoms) / 32) ** power)

    return time_evaluation


@pytest.mark.parametrize(("power", "status"), [(1, "passed"), (1.3, "weak"), (2, "failed")])
def test_the_growth_of_time_is_judged(power: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "time_evaluation", evaluations_take(power))
    assert CHECKS["speed"].run(candidate_of(EMT, tmp_path)).status == status


def test_the_memory_of_a_potential_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what others have used before it in the judge's process, nor what that process held when it started another."""
    monkeypatch.setattr(speed, "time_evaluation", evaluations_take(1))
    held = np.ones(40_000_000)  # 320 MB
    assert speed.memory()() > 320
    result = CHECKS["speed"].run(candidate_of(EMT, tmp_path))
    assert 20 < by_name(result, "memory with it").value < 300
    del held
    lost = speed.memory_by_itself(lambda: EMT(), [bulk("Cu")])  # which cannot be sent
    assert np.isnan(lost).all()
    assert len(lost) == 1


@pytest.mark.parametrize(
    ("check", "defect", "says"),
    [
        ("symmetry", "rotation", "Rotation"), ("symmetry", "permutation", "Permutation"), ("symmetry", "translation", "Translation"),
        ("symmetry", "extensivity", "Supercell"), ("conservation", "non-conservative", "Forces against"),
        pytest.param("conservation", "stress sign", "Stress against", marks=pytest.mark.thorough),
        pytest.param("smoothness", "noise", "Noise of the forces", marks=pytest.mark.thorough),
    ],
)  # fmt: skip
def test_broken_potential_is_told_why(check: str, defect: str, says: str, tmp_path: Path) -> None:
    result = CHECKS[check].run(candidate_of(lambda: Broken(defect), tmp_path))
    assert result.status == "failed"
    named = [m for m in result.metrics if m.status in ("weak", "failed") and m.name.lower().startswith(says.lower())]
    assert named, [m.name for m in result.metrics if m.status == "failed"]
    assert named[0].consequence
    assert result.reason.endswith(".")


# --- candidates -------------------------------------------------------------------------------------------------------


def test_calculators_are_parsed() -> None:
    name, make = parse_calculator("ase.calculators.emt:EMT")
    assert name == "EMT"
    assert isinstance(make(), EMT)
    name, make = parse_calculator("mine=ase.calculators.morse:MorsePotential(epsilon=0.5, rho0=3)")
    assert name == "mine"
    assert make().parameters["epsilon"] == 0.5
    for text in ("EMT", "ase.calculators.emt:", "x:y z", "ase.calculators.emt:EMT(1)", "os:system('ls')", "a:b(c=open('x'))"):
        with pytest.raises(ValueError, match="is not a calculator"):
            parse_calculator(text)
    with pytest.raises(ImportError, match="cannot be imported"):
        parse_calculator("no_such_module:X")
    with pytest.raises(ValueError, match="has no 'Nothing'"):
        parse_calculator("ase.calculators.emt:Nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("os:system(command='touch ran')", "it is not called"),
        ("posix:system(command='touch ran')", "it is not called"),
        ("subprocess:run(args=['touch', 'ran'])", "module 'subprocess', which holds no ASE calculator"),
        ("shutil:rmtree(path='.')", "module 'shutil', which holds no ASE calculator"),
        ("builtins:open(file='ran', mode='w')", "it is not called"),
        ("ase.calculators.emt:EMT.name", "names a property"),
        ("pathlib:Path.touch", "holds no ASE calculator"),
        ("collections:OrderedDict", "the class OrderedDict, which is not an ASE calculator"),
    ],
)
def test_what_makes_no_calculator_is_not_called(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        parse_calculator(text)[1]()
    assert not (tmp_path / "ran").exists()


def test_functions_beside_calculators_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As mace.calculators:mace_mp, defined where a calculator class is at hand, and class methods such as from_checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "factories_of_a_test.py").write_text(
        "from ase.calculators.emt import EMT\n"
        "class Mine(EMT):\n    @classmethod\n    def from_nothing(cls):\n        return cls()\n"
        "def make(fixed=True):\n    return EMT(asap_cutoff=fixed)\n"
        "def wrong():\n    return 1\n"
    )
    with caplog.at_level("INFO"):
        assert isinstance(parse_calculator("factories_of_a_test:make(fixed=False)")[1](), EMT)
    assert "calling the function make of module factories_of_a_test" in caplog.text
    assert isinstance(parse_calculator("factories_of_a_test:Mine.from_nothing")[1](), EMT)
    with pytest.raises(ValueError, match="made a int, which is not an ASE calculator"):
        parse_calculator("factories_of_a_test:wrong")[1]()


def test_elements_and_structures_are_found() -> None:
    assert supported_elements(EMT()) == ["H", "C", "N", "O", "Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au"]
    found = builtin_crystals(["Na", "Cl", "Cu", "Xe"], 5)
    assert list(found) == ["Cu", "NaCl", "Na", "Xe"]
    assert builtin_crystals(["O", "H"], 3) == {}
    assert set(builtin_molecules(["O", "H"], 2)) == {"H2O", "H2O2"}
    assert len(enlarged(bulk("Cu", cubic=True), 30)) == 32
    assert len(enlarged(molecule("H2O"), 30)) == 3


def test_molecules_are_found_in_their_boxes() -> None:
    """However they are wrapped into whatever cell; what touches its images, or is two, is none."""
    ethanol = molecule("CH3CH2OH")
    skewed = np.array([[12.0, 0, 0], [4, 13, 0], [-3, 2, 12.5]])
    for cell in (10 * np.eye(3), skewed, skewed[[1, 0, 2]]):
        boxed = ethanol.copy()
        boxed.set_cell(cell)
        boxed.pbc = True
        boxed.positions += [3.0, -50.0, 7.0]
        boxed.wrap()
        boxed.positions += np.random.default_rng(0).integers(-2, 3, size=(9, 3)) @ cell
        whole = molecule_in(boxed)
        assert whole is not None
        assert not whole.pbc.any()
        assert whole.get_all_distances() == pytest.approx(ethanol.get_all_distances())
    alone, dimer = Atoms("Ar", cell=[10.0] * 3, pbc=True), ethanol.copy()
    dimer.positions += [4.5, 0, 0]
    dimer += ethanol
    dimer.set_cell([20.0] * 3)
    dimer.pbc = True
    assert molecule_in(alone) is not None
    assert molecule_in(dimer) is not None
    dimer.positions[:9, 0] += 5.0
    wire = Atoms("C8", [[1.5 * k, 0, 0] for k in range(8)], cell=[12, 20, 20], pbc=True)
    slab = fcc111("Cu", (2, 2, 3), vacuum=15.0, periodic=True)
    for atoms in (dimer, wire, slab, bulk("Xe"), bulk("Cs"), bulk("Cs", cubic=True).repeat(3), ethanol):
        assert molecule_in(atoms) is None


# --- the command ----------------------------------------------------------------------------------------------------


def test_checks_import_no_torch() -> None:
    code = "import sys, gossamer.checks.judge; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_judging_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from gossamer.cli import main
    from gossamer.potential_file import save

    monkeypatch.chdir(tmp_path)
    save(make_potential(["Al", "Cu"]), tmp_path / "ours.safetensors")
    bulk("Cu", cubic=True).write(tmp_path / "cu.extxyz")
    options = ["--only", "symmetry", "discovery", "--out", "verdict", "--structures", "cu.extxyz"]
    emt = ["--calculator", "ase.calculators.emt:EMT", "--elements", "Cu", "Si"]
    assert main(["judge", "mine=ours.safetensors", *emt, *options]) == 0
    assert "everything is in 'verdict/report.html'" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "verdict" / "judgement.json").read_text())
    assert set(numbers) == {"mine", "EMT"}
    assert numbers["EMT"]["checks"]["symmetry"]["status"] == "passed"
    assert numbers["mine"]["checks"]["symmetry"]["status"] == "passed"
    assert numbers["EMT"]["checks"]["discovery"]["status"] == "skipped"
    page = (tmp_path / "verdict" / "report.html").read_text()
    assert "Symmetry and extensivity" in page
    assert not [w for w in ("http:", "https:") if f'src="{w}' in page]
    # the second time nothing is done; another structure is another question; JSON for programs
    stamp = (tmp_path / "verdict" / "EMT" / "symmetry.json").stat().st_mtime_ns
    assert main(["judge", *emt, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["EMT"]["symmetry"]["status"] == "passed"
    assert (tmp_path / "verdict" / "EMT" / "symmetry.json").stat().st_mtime_ns == stamp
    assert set(json.loads((tmp_path / "verdict" / "judgement.json").read_text())) == {"mine", "EMT"}
    assert main(["judge", "--calculator", "EMT=ase.calculators.lj:LennardJones", *options]) == 2
    assert "holds the judgement of another potential" in capsys.readouterr().err
    assert main(["judge", *emt, *options, "--temperature", "-1"]) == 2
    assert "temperature: Input should be greater than 0" in capsys.readouterr().err


def test_a_failed_check_is_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.cli import main

    def broken(candidate: Candidate) -> Result:
        return Result("failed", "It fails.", "It cannot be used.")

    monkeypatch.setitem(CHECKS, "symmetry", replace(CHECKS["symmetry"], run=broken))
    arguments = ["--calculator", "ase.calculators.emt:EMT", "--elements", "Cu", "--only", "symmetry", "--out", str(tmp_path)]
    assert main(["judge", *arguments]) == 1


def test_settings_name_every_check_and_protocol() -> None:
    assert list(CHECKS) == list(NAMES)
    protocol = get_args(get_args(get_type_hints(JudgeConfig)["protocol"])[0])
    assert set(protocol) == set(dynamics.PROTOCOLS)
    help_of = {name: text for name, _, text in describe(JudgeConfig)}
    assert all(name in help_of["only"] for name in NAMES)
    assert {u for c in CHECKS.values() for u in c.uses} - {n for n, *_ in describe(JudgeConfig)} == {
        "structures", "crystals", "systems", "builtin_crystals", "builtin_systems"
    }  # fmt: skip


def test_options_replace_those_of_a_config(tmp_path: Path) -> None:
    config = JudgeConfig(only=("errors",), elements=("Cu",), level="quick")
    calls = dict(calculator="ase.calculators.emt:EMT", structures=bulk("Cu"), out=tmp_path, progress=False)
    assert list(judge(config=config, **calls)["EMT"]) == ["errors"]
    assert list(judge(config=config, only=["symmetry"], **calls)["EMT"]) == ["symmetry"]


def test_each_check_gets_a_fresh_calculator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one check does to a calculator must not change what the next one measures."""
    seen: list[Any] = []

    def look(candidate: Candidate) -> Result:
        seen.append(candidate.calculator)
        return conclude([measured("m", 1.0)])

    for name in ("symmetry", "smoothness", "speed"):
        monkeypatch.setitem(CHECKS, name, replace(CHECKS[name], run=look))
    judge(calculator="ase.calculators.emt:EMT", elements=["Cu"], only=["symmetry", "smoothness", "speed"], out=tmp_path, progress=False)
    assert len({id(c) for c in seen}) == 3


def test_results_of_earlier_versions_stand_beside(tmp_path: Path) -> None:
    calls = dict(calculator="ase.calculators.emt:EMT", elements=["Cu"], only=["symmetry"], out=tmp_path, progress=False)
    judge(**calls)
    path = tmp_path / "EMT" / "symmetry.json"
    stored = json.loads(path.read_text())
    stored["outcome"] = stored.pop("result")
    path.write_text(json.dumps(stored))
    assert judge(**calls)["EMT"]["symmetry"].status == "passed"
    assert "outcome" in json.loads(path.read_text())  # it was not done again


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.extxyz").write_text("not a number\n")
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "t.npz", frac=np.zeros((1, 1, 3)))
    for name in ("x.extxyz", "folder", "t.npz"):
        with pytest.raises(InputError, match=name):
            read_frames(tmp_path / name)
    np.savez(tmp_path / "t.npz", frac=np.full((3, 1, 3), 0.5), cell_A=2 * np.eye(3), numbers=[29])
    assert len(read_frames(tmp_path / "t.npz")) == 3
    (one,) = read_frames(tmp_path / "t.npz", -1)
    assert one.positions.tolist() == [[1.0, 1.0, 1.0]]
    bulk("Cu").write(tmp_path / "one.extxyz")
    assert len(read_frames(tmp_path / "one.extxyz", -1)) == 1
    for name in ("t.npz", "one.extxyz"):
        with pytest.raises(InputError, match="has no frame 7"):
            read_frames(tmp_path / name, 7)


def test_the_machine_is_named() -> None:
    assert re.fullmatch(r".+, \d+ threads?", machine("cpu"))
    found = versions(["ase", "no-such-package"])
    assert set(found) == {"gossamer", "python", "ase"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to judge"),
        ({"calculator": "ase.calculators.emt:EMT", "only": ["phonon"]}, "There is no check 'phonon'. Did you mean phonons?"),
        ({"calculator": "ase.calculators.emt:EMT", "protocol": "lithium"}, "protocol: Input should be .*lips.*lithium"),
        ({"calculator": "ase.calculators.emt:EMT", "level": "huge"}, "level: Input should be .*quick.*huge"),
        ({"calculator": "ase.calculators.emt:EMT", "temperature": -3}, "temperature: .*greater than 0.*-3"),
        ({"calculator": ["ase.calculators.emt:EMT", "ase.calculators.emt:EMT"]}, "Two potentials are called 'EMT'"),
        ({"models": "ase.calculators.emt:EMT"}, "For a calculator write --calculator"),
        ({"calculator": "ase.calculators.emt:EMT", "references": [__file__, __file__]}, "2 references for 1 system"),
        (
            {"calculator": "ase.calculators.emt:EMT", "elements": ["Si"]},
            r"could not evaluate any pair of atoms \(Si: NotImplementedError: No EMT-potential",
        ),
        ({"calculator": "ase.calculators.emt:EMT", "crystals": [bulk("Cu"), molecule("H2O")]}, "'H2O' is no crystal: it is periodic along"),
        ({"calculator": "ase.calculators.emt:EMT", "elements": ["Sx"]}, "'Sx' is not the symbol of an element"),
        ({"calculator": "ase.calculators.emt:EMT", "only": ["speed"], "skip": ["speed"]}, "No check is left"),
        ({"calculator": "ase.calculators.emt:EMT", "dtype": "float64"}, "dtype float64 would have no effect"),
        ({"calculator": "ase.calculators.emt:EMT", "temprature": 300}, "temprature: unknown setting. Did you mean temperature?"),
    ],
)
def test_wrong_questions(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        judge(out=tmp_path, progress=False, **options)


def test_what_a_potential_does_not_know_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {"structures": [bulk("Cu"), bulk("Si")], "crystals": [bulk("Si"), bulk("Cu")], "elements": ["Cu"]}
    judge(calculator="ase.calculators.emt:EMT", only=["symmetry"], out=tmp_path, progress=False, **given)
    for what in ("judgement on the structures", "judgement on the crystals"):
        assert f"EMT: no {what} Si, whose elements it does not know" in caplog.text


@pytest.mark.parametrize(
    "name", ["structures", "data", "crystals", "systems", "discovery", "discovery_table", "conductivity_crystals", "diatomics_reference"]
)
def test_files_that_are_not_there(name: str, tmp_path: Path) -> None:
    value = ["nowhere.extxyz"] if name in ("structures", "crystals", "systems") else "nowhere.extxyz"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        judge(calculator="ase.calculators.emt:EMT", out=tmp_path, progress=False, **{name: value})


def test_a_check_that_raises_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(candidate: Candidate) -> Result:
        raise ValueError("no luck")  # as a judged calculator may

    monkeypatch.setitem(CHECKS, "smoothness", replace(CHECKS["smoothness"], run=broken))
    found = judge(calculator="ase.calculators.emt:EMT", elements=["Cu"], only=["smoothness", "symmetry"], out=tmp_path, progress=False)[
        "EMT"
    ]
    assert found["smoothness"].status == "failed"
    assert "no luck" in found["smoothness"].reason
    assert found["symmetry"].status == "passed"


def test_a_number_beyond_its_limit_is_not_rounded_onto_it() -> None:
    assert at_most("error", 2.0004, "%", 2.0, 5.0, "").reason == "error: 2.0004 %, expected at most 2 %"
    assert at_least("well", -0.049999, "THz", -0.01, -1.0, "").reason == "well: -0.05 THz, expected at least -0.01 THz"
    assert at_least("well", 0.49999, "", 0.5, 0.1, "").reason == "well: 0.49999, expected at least 0.5"
    assert close_to("ratio", 4.5001, "", 4.0, 0.5, 1.0, "").reason == "ratio: 4.5001, expected 4 ± 0.5"
    assert at_most("error", float("inf"), "%", 2.0, 5.0, "").reason == "error: not a finite number, expected at most 2 %"


def test_numbers_are_readable() -> None:
    assert [number(v) for v in (None, 0.0, 1.23456, 12345.6, 1e-5, 3e7, float("nan"))] == [
        "–",
        "0",
        "1.235",
        "12,346",
        "1.00e-05",
        "3.00e+07",
        "–",
    ]


def test_growth_is_measured() -> None:
    sizes = [10, 20, 40, 80]
    assert speed.growth_exponent(sizes, [1e-3 * s for s in sizes]) == pytest.approx(1)
    assert speed.growth_exponent(sizes, [1e-5 * s**2 for s in sizes]) == pytest.approx(2)
    quadratic = candidate_of(EMT, Path())
    assert speed.time_evaluation(quadratic.calculator, bulk("Cu"), repeats=2) > 0
