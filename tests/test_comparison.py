"""Several networks on the same data for the same time."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
import yaml
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from conftest import ETHANOL

from gossamer.cli import main
from gossamer.comparison import RECORD, check_same_data, compare, contents_of, finished_run, name_configs, table
from gossamer.config import load_config, make_config
from gossamer.files import write_json
from gossamer.settings import to_dict
from gossamer.training import loop


def write(folder: Path, name: str, model: dict, **data) -> Path:
    values = {
        "data": {"train": ETHANOL, "train_size": 40, "valid_size": 10, **data},
        "model": {"num_features": 8, "num_layers": 2, "cutoff": 4.0, **model},
        "loss": {"energy": 1.0, "forces": 10.0},
        "training": {"batch_size": 4, "learning_rate": 2e-3},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.thorough
def test_one_table_and_one_plot(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths = [write(tmp_path, n, {"name": n}) for n in ("leignn", "schnet")]
    out = tmp_path / "out"
    assert main(["compare", *map(str, paths), "--minutes", "0.04", "--out", str(out)]) == 0
    assert "| schnet |" in capsys.readouterr().out
    records = json.loads((out / "comparison.json").read_text())
    assert [r["name"] for r in records] == ["leignn", "schnet"]
    for r in records:
        assert r["steps"] >= 10
        assert r["frames_seen"] == 4 * r["steps"]
        assert r["inference_ms"] > 0
        assert f" {r['inference_ms']:.1f} ({r['inference_way']}) |" in (out / "comparison.md").read_text()
        assert r["training_seconds"] == pytest.approx(2.4, abs=1.0)
        assert r["settings"]["training"]["minutes"] == 0.04
        assert r["settings"]["training"]["clock"] == "cpu"  # other jobs on the machine take nothing from one thread
    text = (out / "comparison.md").read_text()
    assert text.count("\n| ") == 3
    assert "40 training frames" in text
    assert (out / "comparison.png").stat().st_size > 10_000
    # finished runs are kept
    before = (out / "leignn" / "potential.safetensors").stat().st_mtime
    again = compare(paths, 0.04, out, resume=True, progress=False)
    assert table(again) == table(records)
    assert (out / "leignn" / "potential.safetensors").stat().st_mtime == before


@pytest.mark.thorough
def test_a_cut_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its checkpoint, for what is left of its time; and only if asked to."""
    path, out = write(tmp_path, "leignn", {"name": "leignn"}), tmp_path / "out"
    original, calls, checkpoint = loop.train_step, [], out / "leignn" / "checkpoint.safetensors"

    def cut(state, *others):
        if checkpoint.exists():
            raise KeyboardInterrupt
        return original(state, *others)

    monkeypatch.setattr(loop, "train_step", cut)
    with pytest.raises(KeyboardInterrupt):
        compare([path], 0.04, out, progress=False)
    monkeypatch.setattr(loop, "train_step", lambda state, *others: (calls.append(state.seconds), original(state, *others))[1])
    with pytest.raises(FileExistsError, match="holds a run already"):
        compare([path], 0.04, out, progress=False)
    with pytest.raises(ValueError, match="holds a run of 0.04 minutes, not of 1 minutes"):
        compare([path], 1.0, out, resume=True, progress=False)
    calls.clear()
    (record,) = compare([path], 0.04, out, resume=True, progress=False)
    assert 0 < calls[0] < 2.4
    assert calls[-1] < 2.4 <= record["training_seconds"]
    assert record["steps"] > len(calls)


def test_a_finished_run_is_kept_only_for_the_same_question(tmp_path: Path) -> None:
    path, run = write(tmp_path, "a", {"name": "leignn"}), tmp_path / "out" / "a"
    config = load_config(path, ["training.minutes=1.0", "training.clock=cpu", f"out={run}"])
    run.mkdir(parents=True)
    write_json(run / RECORD, {"name": "a", "minutes": 1.0, "settings": to_dict(config)})
    record = finished_run(load_config(path), 1.0, run)
    assert record is not None
    assert record["name"] == "a"
    assert finished_run(load_config(path, ["training.steps=7", "training.valid_every=3"]), 1.0, run) == record  # not used by the clock
    assert finished_run(load_config(path), 1.0, tmp_path) is None
    with pytest.raises(ValueError, match="holds a run of 1 minutes, not of 2 minutes: choose another folder"):
        compare([path], 2.0, tmp_path / "out", resume=True, progress=False)
    for setting, found in (
        ("training.batch_size=9", r"training.batch_size 4 \(now 9\)"),
        ("data.train_size=30", r"data.train_size 40 \(now 30\)"),
    ):
        with pytest.raises(ValueError, match=f"holds a finished run of other settings: {found}"):
            finished_run(load_config(path, [setting]), 1.0, run)
    assert finished_run(load_config(path, ["training.compile=true"]), 1.0, run) == record  # a minute leaves no time to compile
    contents = contents_of(load_config(path))
    assert list(contents) == [to_dict(config)["data"]["train"]]
    write_json(run / RECORD, {**record, "contents": dict.fromkeys(contents, "of other data")})
    with pytest.raises(ValueError, match="has changed since the finished run"):
        finished_run(load_config(path), 1.0, run)
    write(tmp_path, "a", {"name": "schnet"})
    with pytest.raises(ValueError, match=r"model.name 'leignn' \(now 'schnet'\)"):
        compare([path], 1.0, tmp_path / "out", resume=True, progress=False)


def test_a_run_that_fails_takes_no_time_from_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error comes at the end, and they are in the table."""
    paths = [write(tmp_path, n, {"name": n}) for n in ("leignn", "schnet", "painn")]
    kept = (
        "num_parameters",
        "train_step_ms",
        "inference_ms",
        "wall_seconds",
        "steps",
        "epochs",
        "n_train",
        "n_test",
        "n_valid",
        "inference_atoms",
    )
    rest = {"compiled": False, "test": None, "machine": "", "date": "", "versions": {"gossamer": "", "torch": ""}}
    told = []

    def run(config, *_) -> dict:
        told.append(config.model.name)
        if config.model.name == "schnet":
            raise RuntimeError("the loss is NaN at step 3")
        return {**dict.fromkeys(kept, 1), **rest, "valid": {"forces_mae_meV_per_A": 9.0}}

    monkeypatch.setattr("gossamer.comparison.run_one", run)
    with pytest.raises(RuntimeError, match=r"1 of 3 runs failed; the others are in .*schnet: the loss is NaN"):
        compare(paths, 1.0, tmp_path / "out", progress=False)
    assert told == ["leignn", "schnet", "painn"]
    assert [r["name"] for r in json.loads((tmp_path / "out" / "comparison.json").read_text())] == ["leignn", "painn"]


def test_a_split_that_hangs_on_the_cutoff_is_refused(tmp_path: Path) -> None:
    """Isolated atoms are always trained on, and a copper of 4.5 Å is one within 4 Å."""
    atoms = [bulk("Cu", a=a) for a in (3.6, 3.7, 6.4)]
    for one in atoms:
        one.calc = SinglePointCalculator(one, energy=0.0, forces=np.zeros((1, 3)))
    ase.io.write(tmp_path / "copper.extxyz", atoms)
    near, far = (make_config({"data": {"train": str(tmp_path / "copper.extxyz")}, "model": {"cutoff": cutoff}}) for cutoff in (4.0, 5.0))
    with pytest.raises(ValueError, match=r"within the shortest cutoff of the networks \(4 Å\) and not within the longest \(5 Å\)"):
        check_same_data({"near": near, "far": far})
    check_same_data({"near": near, "again": near})


def test_the_best_comes_first() -> None:
    """By forces, or by energies where there are none; an error that is no number is the worst."""

    def record(name: str, **found: float) -> dict:
        taken = dict.fromkeys(("num_parameters", "train_step_ms", "inference_ms", "wall_seconds", "steps", "epochs"), 1)
        return {"name": name, "compiled": False, "test": None, "valid": found, **taken}

    def order(key: str, *values: float) -> list[str]:
        lines = table([record(f"{value:g}", **{key: value}) for value in values]).splitlines()[2:]
        return [line.split("|")[1].strip() for line in lines]

    assert order("forces_mae_meV_per_A", 30.0, float("nan"), 10.0) == ["10", "30", "nan"]
    assert order("energy_mae_meV_per_atom", 3.0, 1.0, 2.0) == ["1", "2", "3"]


def test_wrong_use(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a", {"name": "leignn"}), write(tmp_path, "b", {"name": "schnet"}, seed=3)
    with pytest.raises(ValueError, match=r"'a' and 'b' differ in data.seed \(0 and 3\)"):
        compare([a, b], 1.0, tmp_path / "out")
    fixed = make_config({"data": {"train": ETHANOL}, "model": {"name": "schnet"}, "loss": {"free_atoms_only": True}})
    with pytest.raises(ValueError, match=r"differ in loss.free_atoms_only \(False and True\)"):
        check_same_data({"a": make_config({"data": {"train": ETHANOL}}), "b": fixed})  # errors of all forces, and of some
    with pytest.raises(ValueError, match="Two configurations are called 'leignn'"):
        compare([make_config({"data": {"train": ETHANOL}})] * 2, 1.0, tmp_path / "out")
    (tmp_path / "c").mkdir()
    c = write(tmp_path / "c", "a", {"name": "schnet"})
    assert list(name_configs([a, c])) == [f"{tmp_path.name}-a", "c-a"]  # as two runs of fit, whose files are called config.yaml
    with pytest.raises(ValueError, match="nothing to compare"):
        compare([], 1.0, tmp_path / "out")
    with pytest.raises(ValueError, match="minutes must be positive"):
        compare([a], 0.0, tmp_path / "out")
