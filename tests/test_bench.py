"""gossamer bench: what it measures is there, larger is later, and one candidate's failure is its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ase.io
import pytest
import torch
from ase.build import bulk, molecule
from conftest import make_potential
from test_kernels import scalar_convolution, vector_convolution

from gossamer import bench as bench_module
from gossamer.bench import bench, ceilings, floor, least_work, table
from gossamer.checks.source import named_path
from gossamer.cli import main
from gossamer.data.from_atoms import from_atoms
from gossamer.data.labels import LabelConfig
from gossamer.engine.kernels.cpu import Missing, operations
from gossamer.potential_file import save
from gossamer.simulation.calculator import Calculator
from gossamer.timing import cpu_seconds
from gossamer.training.loop import CLOCKS


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(make_potential(["Cu"], dtype=torch.float32), tmp_path / "cu.safetensors")
    return tmp_path / "cu.safetensors"


@pytest.mark.thorough
def test_bench_of_a_potential_and_a_calculator(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(saved), "--calculator", "ase.calculators.emt:EMT", "--sizes", "30", "60", "120", "--threads", "1",
                 "--seconds", "1", "--out", str(tmp_path / "out"), "--way", "plain"]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    ours, emt = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [r["atoms"] for r in ours["rows"]] == [r["atoms"] for r in emt["rows"]]
    assert ours["system"] == emt["system"] == "Cu"
    assert ours["way"] == "plain"
    for row in ours["rows"]:
        assert row["us_per_atom"] == pytest.approx(1000 * row["ms"] / row["atoms"])
        assert row["times_floor"] > 1
        assert row["network_ms"] < 1.5 * row["ms"]
        assert row["memory_MB"] > 50
    assert ours["rows"][2]["edges"] > 3 * ours["rows"][0]["edges"]
    assert "the largest size asked for" in ours["stopped"]
    assert "ms/step" in printed
    assert "EMT" in (tmp_path / "out" / "bench.md").read_text()
    assert (tmp_path / "out" / "bench.png").stat().st_size > 10_000


@pytest.mark.thorough
def test_a_candidate_that_fails_stands_alone(saved: Path, tmp_path: Path) -> None:
    structure = tmp_path / "gold.extxyz"
    ase.io.write(structure, bulk("Au", cubic=True))
    options = {"structure": structure, "sizes": (10,), "seconds": 2.0, "threads": 1, "out": tmp_path / "out"}
    ours, emt = bench([f"small={saved}"], ["ase.calculators.emt:EMT"], **options)
    assert ours["rows"] == []
    assert "Au (79) not among the potential's elements" in ours["stopped"]
    assert len(emt["rows"]) == 1
    assert main(["bench", str(saved), "--structure", str(structure), "--sizes", "10", "--out", str(tmp_path / "out")]) == 1
    water = tmp_path / "water.extxyz"
    ase.io.write(water, molecule("H2O"))
    (emt,) = bench([], ["ase.calculators.emt:EMT"], **{**options, "structure": water, "sizes": (10, 100)})
    assert emt["stopped"] == "one molecule"
    assert len(table([emt]).splitlines()) == 3


@pytest.mark.thorough
def test_what_a_potential_was_tested_on_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "water.safetensors"
    save(make_potential(["H", "O"], dtype=torch.float32), path, check=[from_atoms(molecule("H2O"), LabelConfig(), "water")])
    (record,) = bench([path], sizes=(3, 50), seconds=1.0, threads=1, out=tmp_path / "out")
    assert record["system"] == "H2O"
    assert [r["atoms"] for r in record["rows"]] == [3]


@pytest.mark.thorough
def test_a_large_cell_serves_several_sizes(saved: Path, tmp_path: Path) -> None:
    ase.io.write(tmp_path / "cu.extxyz", bulk("Cu", cubic=True).repeat(2))
    (record,) = bench([saved], structure=tmp_path / "cu.extxyz", sizes=(5, 10, 60), seconds=1.0, threads=1, out=tmp_path / "out")
    assert [r["atoms"] for r in record["rows"]] == [32, 64]
    assert record["stopped"] == "the largest size asked for"


JOB = {
    "sizes": [4, 32],
    "seconds": 0.1,
    "threads": None,
    "cpu_time": False,
    "way": "plain",
    "device": "cpu",
    "dtype": None,
    "atoms": bulk("Cu", cubic=True),
}


def test_the_table_says_what_ran(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what was asked for: "auto" goes without kernels where they cannot be had."""

    def none(*_: Any) -> None:
        raise Missing("no compiler here")

    monkeypatch.setattr("gossamer.engine.engine.attach_kernels", none)
    rows: list[dict[str, Any]] = []
    job = {**JOB, "sizes": [4], "way": "auto", "model": saved}
    bench_module.measure(job, lambda kind, value: rows.append(value) if kind == "row" else None)
    assert [row["way"] for row in rows] == ["plain"]
    assert "| cu (plain) |" in table([{"name": "cu", "rows": rows}])


def test_memory_is_read_before_the_ceilings_are_measured(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their arrays, 268 MB, are no potential's."""
    told: list[str] = []
    monkeypatch.setattr(bench_module, "ceilings", lambda potential: told.append("ceilings") or {"macs": 1e9, "bytes": 1e9})
    bench_module.measure({**JOB, "model": saved}, lambda kind, value: told.append(kind) if kind == "row" else None)
    assert told[:-1] == ["row"] * (len(told) - 1)  # one or two: the second size may take too long
    assert told[-1] == "ceilings"
    assert len(told) > 1


def test_a_candidate_that_fails_has_its_notes_and_gives_its_structure_to_the_next(tmp_path: Path) -> None:
    save(
        make_potential(["H", "O"], dtype=torch.float32), tmp_path / "o.safetensors", check=[from_atoms(molecule("H2O"), LabelConfig(), "")]
    )
    said: dict[str, Any] = {}
    job = {**JOB, "model": tmp_path / "o.safetensors", "atoms": None, "way": "nonsense"}
    with pytest.raises(ValueError, match="nonsense"):
        bench_module.measure(job, lambda kind, value: said.update(value))
    assert said["system"] == "H2O"
    assert len(said["atoms"]) == 3
    assert {"clock", "machine", "date", "versions", "parameters"} <= said.keys()
    assert "stopped" not in said


@pytest.mark.parametrize(("options", "cpu_time"), [({}, False), ({"threads": 1}, True), ({"threads": 1, "device": "cuda"}, False)])
def test_one_clock_for_all(options: dict[str, Any], cpu_time: bool, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the surroundings say: times in one column compare."""
    jobs: list[dict[str, Any]] = []
    record = {"rows": [], "stopped": "", "growth": None}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(bench_module, "_in_own_process", lambda job: jobs.append(job) or {"name": job["name"], **record})
    bench([saved], ["ase.calculators.emt:EMT"], out=tmp_path / "out", **options)
    assert [job["cpu_time"] for job in jobs] == [cpu_time] * 2
    for name in ({"model": saved}, {"calculator": "ase.calculators.emt:EMT"}):
        clocks: list[str] = []
        job = {**JOB, **name, "sizes": [], "cpu_time": cpu_time}
        bench_module.measure(job, lambda kind, value, clocks=clocks: clocks.extend([value["clock"]] if "clock" in value else []))
        assert clocks == ["CPU time, one thread" if cpu_time else "wall time"]


def test_programs_that_a_calculator_or_a_compiler_runs_count() -> None:
    began = cpu_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    assert cpu_seconds() - began > 0.1  # of this process alone: some ms
    assert CLOCKS["cpu"] is cpu_seconds


def test_names_of_potentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("rate=0.01") / "potential.safetensors"
    path.parent.mkdir()
    path.touch()
    for text, found in (
        (str(path), ("rate=0.01", str(path))),
        (f"{tmp_path}/{path}", ("rate=0.01", f"{tmp_path}/{path}")),
        (f"small={path}", ("small", str(path))),
        ("small=cu.safetensors", ("small", "cu.safetensors")),
        ("./rate=0.1/cu.safetensors", ("cu", "./rate=0.1/cu.safetensors")),
        ("cu.safetensors", ("cu", "cu.safetensors")),
    ):
        assert named_path(text) == found


def test_wrong_use(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device cuda, way kernels would have no effect"):
        bench([], ["ase.calculators.emt:EMT"], device="cuda", way="kernels", out=tmp_path)
    with pytest.raises(ValueError, match="nothing to time"):
        bench()
    with pytest.raises(ValueError, match="one name"):
        bench([f"a={saved}", f"a={saved}"])
    with pytest.raises(FileNotFoundError, match="no potential 'missing"):
        bench(["missing.safetensors"])
    with pytest.raises(ValueError, match="must be positive"):
        bench([saved], sizes=(0,))
    with pytest.raises(ValueError, match="is not a calculator"):
        bench([], ["nonsense"])


@pytest.mark.thorough
def test_floor_counts_what_must_be_done() -> None:
    """Arithmetic grows with pairs, and doubling the machine's rates halves the floor."""
    potential = make_potential(["Si"], dtype=torch.float32)
    calculator = Calculator(potential, way="plain")
    rates = ceilings(potential)
    assert rates["macs"] > 1e8
    assert rates["bytes"] > 1e8
    small, large = (least_work(calculator.engine, calculator.graph(bulk("Si", cubic=True).repeat(n))) for n in (1, 2))
    assert large["multiply_adds"] == pytest.approx(8 * small["multiply_adds"], rel=0.02)
    assert floor(small, {k: 2 * v for k, v in rates.items()}) == pytest.approx(floor(small, rates) / 2)
    # one product of scalars: spline 5, coefficient 1, sum 1; backward: spline and slope 9, coefficient 1, features and slope 2, harmonic 1 + 1, slope 1
    assert operations(scalar_convolution(1)) == (5 + 1 + 1) + (9 + 1 + 2 + 1 + 1 + 1)
    assert operations(vector_convolution(10, True)) == 10 * operations(vector_convolution(1, True))


def test_a_script_needs_no_main_guard_and_one_candidate_no_list(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "cu.extxyz", bulk("Cu", cubic=True))
    script = tmp_path / "script.py"
    script.write_text(
        "print('begins')\nfrom gossamer.bench import bench\n"
        "found = bench(calculator='ase.calculators.emt:EMT', structure='cu.extxyz', sizes=(4,), seconds=0.1)\n"
        "print(len(found[0]['rows']), found[0]['stopped'])\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["begins", "1 the largest size asked for"]


def test_work_is_counted_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise Missing("no compiler")

    calculator = Calculator(make_potential(["Si"]), way="plain")
    monkeypatch.setattr("gossamer.engine.kernels.attach.attach_kernels", missing)
    assert least_work(calculator.engine, calculator.graph(bulk("Si", cubic=True)))["multiply_adds"] > 1e4


def test_the_legend_has_every_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: (
        told.append([t.get_text() for t in self.axes[0].get_legend().get_texts()]), Path(path).touch()))  # fmt: skip
    rows = [{"atoms": n, "us_per_atom": 10.0, "memory_MB": 100.0} for n in (10, 20)]
    bench_module.plot([{"name": "_mine", "rows": rows}, {"name": "none", "rows": []}, {"name": "other", "rows": rows}], tmp_path / "b.png")
    assert told == [["_mine", "other"]]
