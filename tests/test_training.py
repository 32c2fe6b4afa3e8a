"""Training: it learns, it resumes bitwise after SIGKILL, it stops cleanly, it spreads over processes."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from conftest import DEMO, ETHANOL, make_potential, often
from conftest import MODELS as VARIANTS
from safetensors.torch import load_file, save_file

from gossamer import fitting
from gossamer.accuracy import evaluate
from gossamer.cli import main
from gossamer.config import load_config, make_config, save_config
from gossamer.data.dataset import load_data
from gossamer.data.from_atoms import from_atoms
from gossamer.data.labels import LabelConfig
from gossamer.data.readers import read_structures
from gossamer.data.statistics import compute_statistics
from gossamer.data.structure import Structure
from gossamer.engine.compiler_cache import is_kept, kept_compiler_files
from gossamer.evaluation import evaluate_potential
from gossamer.files import locked
from gossamer.fitting import compile_pays, fit
from gossamer.graph import FIELDS, Graph
from gossamer.models import MODELS
from gossamer.potential_file import load, save
from gossamer.runs import check_schedule, check_statistics, train
from gossamer.training import loop, soap, state
from gossamer.training.checkpoint import read_checkpoint, save_checkpoint
from gossamer.training.compiled import CompiledForward
from gossamer.training.config import TrainingConfig
from gossamer.training.losses import LossConfig, conditional_deltas, loss_sums, penalty
from gossamer.training.matrices import weight_matrices
from gossamer.training.muon import orthogonalized
from gossamer.training.optim import EMA, Clipper, Schedule, ScheduleConfig, make_optimizer
from gossamer.training.process_group import ProcessGroup, shares
from gossamer.training.progress import Bar, Log, expected_error
from gossamer.training.state import LATER

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def settings(out: Path, **training) -> dict:
    return {
        "data": {"train": ETHANOL, "valid_size": 20, "train_size": 60},
        "model": {"name": "leignn", "num_features": 16, "num_layers": 2, "cutoff": 4.0},
        "training": {"steps": 60, "batch_size": 8, "valid_every": 20, "checkpoint_every": 10, "seed": 1, **training},
        "out": str(out),
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_file(folder / "checkpoint.safetensors").items() if k != "rng"}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_it_learns_and_writes_everything(tmp_path: Path) -> None:
    torch.manual_seed(7)
    results = train(settings(tmp_path / "run", steps=80, valid_every=20), progress=False)
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(7)))  # the caller's random numbers go on
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.yaml", "log.csv", "potential.safetensors", "results.json", "valid.extxyz", "checkpoint.safetensors", "checkpoint.safetensors.previous",
    }  # fmt: skip
    with open(tmp_path / "run" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == [20, 40, 60, 80]
    assert float(rows[-1]["valid_forces_mae"]) < 0.8 * float(rows[0]["valid_forces_mae"])
    assert results["valid"]["forces_mae_meV_per_A"] == pytest.approx(min(float(r["valid_forces_mae"]) for r in rows), rel=1e-3)
    config = make_config(
        json.loads(json.dumps(load(tmp_path / "run" / "potential.safetensors") and _manifest(tmp_path / "run")["training"]))
    )
    assert config.training.steps == 80
    # the written settings train again
    again = train(tmp_path / "run" / "config.yaml", [f"out={tmp_path / 'again'}"], progress=False)
    assert again["valid"] == results["valid"]
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(settings(tmp_path / "run"), progress=False)


def test_stress_beside_isolated_atoms(tmp_path: Path) -> None:
    """They have an energy and no stress, as in files for MACE; batches of one, so that some hold nothing else."""
    frames = [bulk("Cu", cubic=True) for _ in range(8)]
    for k, atoms in enumerate(frames):
        atoms.rattle(0.1, seed=k)
        atoms.calc = EMT()
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
        atoms.calc = SinglePointCalculator(atoms, **results)
    lone = Atoms("Cu")
    lone.calc = SinglePointCalculator(lone, energy=3.5)
    ase.io.write(tmp_path / "a.extxyz", [lone, *frames])
    config = settings(tmp_path / "run", steps=12, batch_size=1, valid_every=12, checkpoint_every=12)
    config |= {"data": {"train": str(tmp_path / "a.extxyz"), "valid_size": 2}, "loss": {"stress": 20.0}}
    results = train(config, progress=False)
    assert np.isfinite(results["valid"]["stress_mae_meV_per_A3"])


def _manifest(folder: Path) -> dict:
    from gossamer.potential_file import read_manifest

    return read_manifest(folder / "potential.safetensors")


def start(tmp_path: Path, name: str, **training) -> tuple[subprocess.Popen, Path]:
    folder = tmp_path / name
    config = tmp_path / f"{name}.yaml"
    config.write_text(json.dumps(settings(folder, **training)))
    command = [sys.executable, "-m", "gossamer.cli", "train", str(config), "--resume"]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), folder


def wait_for(path: Path, process: subprocess.Popen, reached: Callable[[Path], bool] = Path.exists, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not reached(path):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"no {path}: {process.communicate()[0]}")
        time.sleep(0.01)


@pytest.mark.thorough
@pytest.mark.parametrize("optimizer", ["soap", "muon", "adamw"])
def test_killed_and_resumed_is_bitwise_the_same(optimizer: str, tmp_path: Path) -> None:
    """Killed by SIGKILL, then stopped by SIGTERM (which saves and exits with 143), then finished."""
    options = dict(steps=40, checkpoint_every=5, valid_every=20, optimizer=optimizer)
    cut, folder = start(tmp_path, "cut", **options)
    wait_for(folder / "checkpoint.safetensors", cut)
    cut.send_signal(signal.SIGKILL)
    cut.communicate()
    assert not (folder / "results.json").exists()
    killed_at = read_checkpoint(folder / "checkpoint.safetensors")[1]["step"]
    cut, _ = start(tmp_path, "cut", **options)
    wait_for(folder / "checkpoint.safetensors", cut, lambda path: read_checkpoint(path)[1]["step"] > killed_at)
    cut.send_signal(signal.SIGTERM)
    out, _ = cut.communicate(timeout=60)
    assert cut.returncode == 143, out
    assert "SIGTERM: stopped at step" in out
    assert "stopped_at_step" in out
    assert "--resume" in out
    assert train(settings(folder, **options), resume=True, progress=False)["steps"] == 40
    train(settings(tmp_path / "whole", **options), progress=False)
    assert same(weights(tmp_path / "whole"), weights(folder))
    assert log_rows(tmp_path / "whole") == log_rows(folder)


def log_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of the log but for the times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader((folder / "log.csv").read_text().splitlines())]


def interrupt(monkeypatch: pytest.MonkeyPatch, config: dict, step: int, **options) -> None:
    """Train up to a step and press control-C."""
    original = loop.train_step

    def cut(state, *others):
        if state.step == step:
            raise KeyboardInterrupt
        return original(state, *others)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", cut)
        with pytest.raises(KeyboardInterrupt):
            train(config, progress=False, **options)


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    config = settings(tmp_path / "run", checkpoint_every=5)
    interrupt(monkeypatch, config, 3)
    assert "interrupted at step 3; there is no checkpoint yet to go on from" in caplog.text
    interrupt(monkeypatch, config, 7, resume=True)
    assert re.search(r"interrupted at step 7; --resume goes on from '.*checkpoint\.safetensors'", caplog.text)


def test_validation_frames_are_those_of_the_run(tmp_path: Path) -> None:
    """Also after a run that ended before its first checkpoint, which left others; a file of the settings is left alone."""
    folder = tmp_path / "run"
    folder.mkdir()
    frames = [s.to_ase() for s in read_structures(ETHANOL)][:20]
    for valid in (None, str(tmp_path / "own.extxyz"), str(folder / "valid.extxyz")):
        for left in ("log.csv", "potential.safetensors", "checkpoint.safetensors"):
            (folder / left).unlink(missing_ok=True)
        ase.io.write(folder / "valid.extxyz", frames[:3])
        ase.io.write(tmp_path / "own.extxyz", frames[:3])
        ase.io.write(tmp_path / "train.extxyz", frames[3:])
        config = settings(folder, steps=2)
        config["data"] = {"train": str(tmp_path / "train.extxyz"), "valid": valid, "valid_size": 5}
        train(config, progress=False)
        if valid is None:
            seen = load(folder / "potential.safetensors").seen
            assert [seen.where(s) for s in read_structures(folder / "valid.extxyz")] == ["valid"] * 5
        else:
            assert (folder / "valid.extxyz").exists() == (Path(valid).parent == folder)


def test_files_of_the_user_in_the_folder_of_a_run_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With ``out: .`` a hand-written config.yaml and a valid.extxyz beside the training data were written over."""
    config, own = tmp_path / "config.yaml", tmp_path / "valid.extxyz"
    text = "# mine\n" + json.dumps(settings(tmp_path, steps=1))
    config.write_text(text)
    ase.io.write(own, ase.io.read(ETHANOL, ":3"))
    frames = own.read_text()
    train(config, progress=False)
    assert (tmp_path / "config.yaml.previous").read_text() == text
    assert (tmp_path / "valid.extxyz.previous").read_text() == frames
    assert "'valid.extxyz.previous' now" in caplog.text
    for name in ("potential", "checkpoint"):
        (tmp_path / f"{name}.safetensors").unlink()
    train(config, ["training.seed=2"], progress=False)
    assert {p.name for p in tmp_path.glob("*.previous*")} == {"config.yaml.previous", "config.yaml.previous-2", "valid.extxyz.previous"}
    assert (tmp_path / "config.yaml.previous").read_text() == text


def test_faults_of_test_data_show_before_training(tmp_path: Path) -> None:
    frames = [s.to_ase() for s in read_structures(ETHANOL)][90:93]
    for atoms in frames:
        atoms.calc = None
    ase.io.write(tmp_path / "bare.extxyz", frames)
    frames[1].numbers[0] = 14
    ase.io.write(tmp_path / "silicon.extxyz", frames)
    for name, message in [("bare", r"No frame of data\.test .*bare\.extxyz'\) has a label"), ("silicon", "frame 1.*Si")]:
        config = settings(tmp_path / "run")
        config["data"]["test"] = str(tmp_path / f"{name}.extxyz")
        config["data"]["train_size"] = 30
        with pytest.raises(ValueError, match=message):
            train(config, progress=False)
        assert not (tmp_path / "run" / "log.csv").exists()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(RuntimeError, match=r"run' is in use by process \d+"):
        train(settings(tmp_path / "run", steps=2), progress=False)
    train(settings(tmp_path / "run", steps=2), progress=False)


def test_resume_refuses_other_settings(tmp_path: Path) -> None:
    train(settings(tmp_path / "run", steps=20), progress=False)
    with pytest.raises(ValueError, match=r"belongs to another run: training.learning_rate is .* \(now 0.1\)\. Resume"):
        train(settings(tmp_path / "run", steps=20, learning_rate=0.1), resume=True, progress=False)
    changed = settings(tmp_path / "run", steps=20)
    changed["data"]["train_size"] = 50
    with pytest.raises(ValueError, match="belongs to another run: .*other training frames"):
        train(changed, resume=True, progress=False)


def test_resume_takes_other_settings_that_change_no_number(tmp_path: Path) -> None:
    """What one would turn off after a compiler or a GPU ended the run, say."""
    train(settings(tmp_path / "run", steps=4), progress=False)
    others = dict(compile=True, kernels=False, cuda_graphs=False, reuse_memory=False, uncertainty=False, checkpoint_every=2)
    assert train(settings(tmp_path / "run", steps=4, **others), resume=True, progress=False)["steps"] == 4


def test_resume_refuses_other_data_wherever_it_lies(tmp_path: Path) -> None:
    """Whatever of the data decides the numbers counts, to the order of the elements; not where it lies."""
    cell = {"cell": 20 * np.eye(3), "pbc": np.ones(3, dtype=bool), "stress": 0.01 * np.eye(3)}
    structures = [replace(s, **cell) for s in read_structures(ETHANOL)][:13]

    def write(name: str, chosen: list[Structure]) -> str:
        ase.io.write(tmp_path / name, [s.to_ase() for s in chosen])
        return str(tmp_path / name)

    files = {"train": write("train.extxyz", structures[:8]), "valid": write("valid.extxyz", structures[8:12])}

    def run(resume: bool = True, **data) -> dict:
        config = settings(tmp_path / "run", steps=4, valid_every=2, checkpoint_every=2)
        return train({**config, "data": {**files, **data}}, resume=resume, progress=False)

    run(resume=False)
    third = structures[3]
    others = [replace(third, stress=0.02 * np.eye(3)), replace(third, pbc=np.zeros(3, dtype=bool)), replace(third, fixed=np.arange(9) == 2)]
    for k, other in enumerate(others):
        with pytest.raises(ValueError, match=r"belongs to another run: other training frames\."):
            run(train=write(f"{k}.extxyz", [*structures[:3], other, *structures[4:8]]))
    for data, what in [
        ({"valid": write("v.extxyz", structures[9:13])}, "validation frames"),
        ({"elements": ["O", "C", "H"]}, "elements"),
        ({"reference_energies": {"H": -13.0, "C": -1000.0, "O": -2000.0}}, "reference energies"),
    ]:
        with pytest.raises(ValueError, match=rf"belongs to another run: other {what}\."):
            run(**data)
    moved = {"train": write("moved.extxyz", structures[:8]), "valid": write("moved_too.extxyz", structures[8:12])}
    assert run(**moved)["steps"] == 4


def test_resume_refuses_other_scales(tmp_path: Path) -> None:
    """As an older gossamer may have found them in the same data."""
    potential, path = make_potential(["H", "C", "O"], dtype=torch.float32), tmp_path / "potential.safetensors"
    check_statistics(path, potential)
    save(potential, path)
    check_statistics(path, potential)
    potential.statistics = replace(potential.statistics, energy_scale=2 * potential.statistics.energy_scale)
    with pytest.raises(ValueError, match=r"begun with an older one\. Finish it with that"):
        check_statistics(path, potential)


@pytest.mark.parametrize("step", [45, 60])
def test_a_potential_that_is_gone_is_made_again(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Moved away to be used, say: the run ended without one, and said that no validation had a number."""
    config, path = settings(tmp_path / "run", uncertainty=False), tmp_path / "run" / "potential.safetensors"
    if step < 60:
        interrupt(monkeypatch, config, step)
    else:
        train(config, progress=False)
    path.unlink()
    train(config, resume=True, progress=False)
    assert "is gone: the averaged weights" in caplog.text
    averaged = {
        k.removeprefix("ema."): v for k, v in load_file(tmp_path / "run" / "checkpoint.safetensors").items() if k.startswith("ema.")
    }
    saved = load_file(path)
    assert all(torch.equal(saved[f"network.{k}"], v) for k, v in averaged.items())


def test_damaged_checkpoint_points_to_the_one_before(tmp_path: Path) -> None:
    """Cut short, or with a single bit flipped in a weight, in the optimiser, in the numbers beside them."""
    config = settings(tmp_path / "run", steps=20)
    train(config, progress=False)
    path = tmp_path / "run" / "checkpoint.safetensors"
    whole = path.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    where = json.loads(whole[8 : 8 + header])
    places = [8 + header + where[name]["data_offsets"][0] + 2 for name in ("network.embedding.weight", "optimizer.0.momentum")]
    places.append(whole.index(b'\\"best\\": ') + len(b'\\"best\\": '))
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"altered after it was written.*Rename the one before, '.*\.previous', to 'checkpoint\.safetensors'"
        ):
            train(config, resume=True, progress=False)
    path.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"cannot be read .*\.previous"):
        train(config, resume=True, progress=False)
    path.with_name(path.name + ".previous").rename(path)
    assert train(config, resume=True, progress=False)["steps"] == 20


def test_checkpoints_where_hard_links_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    path = tmp_path / "checkpoint.safetensors"
    monkeypatch.setattr(os, "link", refuse)
    for step in range(3):
        save_checkpoint(path, {"weight": torch.full((2,), float(step))}, {"step": step})
    assert read_checkpoint(path)[1]["step"] == 2
    previous = path.with_name(path.name + ".previous")
    assert read_checkpoint(previous)[1]["step"] == 1
    assert {p.name for p in tmp_path.iterdir()} == {path.name, previous.name}


@pytest.mark.thorough
def test_checkpoints_of_older_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a checksum, without what was added to settings and state since: they go on. With other names of weights they are refused."""
    config = settings(tmp_path / "run", steps=20)
    interrupt(monkeypatch, config, 15)
    path = tmp_path / "run" / "checkpoint.safetensors"
    tensors, state = read_checkpoint(path)
    for name in ("minutes", "clock"):
        del state["identity"]["training"][name]
    for name in LATER:
        del state["identity"][name]
    for name in ("first_seconds", "step_seconds", "timed_steps", "validated_at", "valid_seconds"):
        del state[name]
    save_file(tensors, path, {"state": json.dumps(state)})
    assert train(config, resume=True, progress=False)["steps"] == 20
    other = {k.replace("network.embedding", "network.table"): v for k, v in tensors.items()}
    save_file(other, path, {"state": json.dumps(state)})
    with pytest.raises(ValueError, match=r"written by an older gossamer.*finetune\.start"):
        train(config, resume=True, progress=False)


def torchrun(tmp_path: Path, config: dict, *options: str) -> subprocess.Popen:
    """A training on two processes."""
    path = tmp_path / "two.yaml"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    return subprocess.Popen(
        [*command, "-m", "gossamer.cli", "train", str(path)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def process_of(log: Path, at_least: int = 1, timeout: float = 120.0) -> int:
    """The process that a rank's log names, after it has started so many times."""
    for _ in range(int(10 * timeout)):
        found = re.findall(r"process (\d+) on", log.read_text()) if log.exists() else []
        if len(found) >= at_least:
            return int(found[-1])
        time.sleep(0.1)
    raise TimeoutError(f"'{log}' names no process")


@pytest.mark.parametrize("steps", [3, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.thorough
def test_two_processes_equal_one(tmp_path: Path, steps: int) -> None:
    """The same batches shared by two processes give the same weights up to the order of sums, and the same errors.

    Every other batch is a single frame, of which one process has nothing.
    """
    one_two = [settings(tmp_path / name, steps=steps, dtype="float64", valid_every=steps) for name in ("one", "two")]
    for config in one_two:
        config["data"]["train_size"] = 9
    process = torchrun(tmp_path, one_two[1])
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    train(one_two[0], progress=False)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in (k for k in one if k.startswith("network.")):
        torch.testing.assert_close(one[name], two[name], atol=1e-9, rtol=1e-7)
    rows = [list(csv.DictReader((tmp_path / run / "log.csv").read_text().splitlines()))[-1] for run in ("one", "two")]
    assert float(rows[1]["valid_forces_mae"]) == pytest.approx(float(rows[0]["valid_forces_mae"]), rel=1e-7)
    assert "rank 1 of 2" in (tmp_path / "two" / "rank-1.log").read_text()


UNEVEN = """
import json, os, sys, torch
from safetensors.torch import save_file
from gossamer.runs import train
from gossamer.training import loop, soap

rank, eigenvectors, step, validate = os.environ["RANK"], soap.eigenvectors, loop.train_step, loop.validate

def uneven(state, *rest):
    step(state, *rest)
    for p in state.potential.network.parameters():
        p.data *= 1.01

def watched(state, *rest):
    row = validate(state, *rest)
    save_file({name: value.clone(memory_format=torch.contiguous_format) for name, value in loop.state_tensors(state).items()}, f"{sys.argv[2]}/{rank}.safetensors")
    return row

if rank == "1":
    soap.eigenvectors, loop.train_step = lambda matrices: -eigenvectors(matrices), uneven
loop.validate = watched
train(json.load(open(sys.argv[1])), progress=False)
"""


def test_processes_that_go_on_align_tensors_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is read in another order by each process: they gave each other unlike tensors, or ended in an error of gloo."""
    config = settings(tmp_path / "run", steps=2)
    train(config, progress=False)
    path = tmp_path / "run" / "checkpoint.safetensors"
    tensors, stored = read_checkpoint(path)
    found = []
    for names in (sorted(tensors), sorted(tensors, reverse=True)):
        monkeypatch.setattr(state, "read_checkpoint", lambda _, names=names: ({name: tensors[name] for name in names}, stored))
        training = make_config(config).training
        made = state.make_state(load(tmp_path / "run" / "potential.safetensors").train(), training, LossConfig())
        state.load_state(made, path, stored["identity"])
        group = types.SimpleNamespace(align=lambda given: found.append([t.clone() for t in given]) or 0.0, rank=0)
        loop.align(made, group)
    assert len(found[0]) > 50
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.thorough
def test_processes_that_round_differently_stay_together(tmp_path: Path) -> None:
    """Rank 1 turns its first bases of SOAP and moves its weights after every step; rank 0's numbers go on, and the log tells."""
    (tmp_path / "uneven.py").write_text(UNEVEN)
    config = settings(tmp_path / "run", steps=6, dtype="float64", valid_every=3, optimizer="soap", learning_rate=0.01)
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "uneven.py", "config.json", "."], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert any("left_basis" in name for name in first)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    told = (tmp_path / "run" / "rank-0.log").read_text()
    assert re.findall(r"WARNING: step (\d+): numbers of the processes were up to", told) == ["1", "3", "6"], told


def test_work_is_shared_out_evenly() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 8):
        work = rng.lognormal(size=40).tolist()
        parts = shares(work, n)
        assert sorted(k for part in parts for k in part) == list(range(40))
        loads = [sum(work[k] for k in part) for part in parts]
        assert max(loads) <= max(1.1 * sum(work) / n, max(work))
    assert shares([0.0, 0.0, 0.0], 3) == [[0], [1], [2]]  # nobody is left without
    assert [len(part) for part in shares([1.0] * 7, 2)] == [4, 3]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_however_many_processes_train_on_every_frame(world: int) -> None:
    """Frames too large to share a batch with others, too, whose batch has no frame for every process."""
    edges = np.array([10.0] * 20 + [300.0] * 3)
    config = TrainingConfig(batch_size=8, batch_edges=200)
    groups = [ProcessGroup(rank, world, torch.device("cpu")) for rank in range(world)]
    parts = [loop.shared_batches(len(edges), 0, config, group, [(edges, 200)], edges) for group in groups]
    assert sorted(k for batches in parts for batch in batches for k in batch) == list(range(len(edges)))
    assert len({len(batches) for batches in parts}) == 1
    with pytest.raises(ValueError, match="no batch has a frame for every process"):
        loop.shared_batches(len(edges), 0, TrainingConfig(batch_size=8), ProcessGroup(0, 9, torch.device("cpu")), [])


@pytest.mark.slow
def test_killed_processes_start_again_and_nothing_is_lost(tmp_path: Path) -> None:
    """torchrun --max-restarts: a rank killed at any moment, twice; the run goes on from its checkpoint to the same weights."""
    options = dict(steps=120, valid_every=10, checkpoint_every=10, dtype="float64")
    whole = torchrun(tmp_path, settings(tmp_path / "whole", **options))
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    process = torchrun(tmp_path, settings(tmp_path / "run", **options), "--max-restarts", "3")
    for start in (1, 2):
        victim = process_of(tmp_path / "run" / f"rank-{start % 2}.log", at_least=start)
        wait_for_step(tmp_path / "run" / "log.csv", 40 * start)
        os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert len(re.findall("process", (tmp_path / "run" / "rank-0.log").read_text())) == 3
    for name, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], value, rtol=0, atol=0)


def wait_for_step(log: Path, step: int, timeout: float = 120.0) -> None:
    for _ in range(int(20 * timeout)):
        rows = log.read_text().splitlines()[1:] if log.exists() else []
        if rows and int(rows[-1].split(",")[0]) >= step:
            return
        time.sleep(0.05)
    raise TimeoutError(f"'{log}' does not reach step {step}")


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run(tmp_path: Path) -> None:
    """The others give up after training.timeout, and torchrun ends them all."""
    process = torchrun(tmp_path, settings(tmp_path / "run", steps=100_000, timeout=0.1))
    victim = process_of(tmp_path / "run" / "rank-1.log")
    wait_for_step(tmp_path / "run" / "log.csv", 1)
    os.kill(victim, signal.SIGSTOP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "rank 0 ends: RuntimeError" in (tmp_path / "run" / "rank-0.log").read_text(), output
    psutil = pytest.importorskip("psutil")
    assert not psutil.pid_exists(victim) or psutil.Process(victim).status() == psutil.STATUS_ZOMBIE


def test_nan_stops_with_the_frame_and_the_checkpoint(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", learning_rate=1e18, clip_norm=None)
    config["training"]["schedule"] = {"warmup_steps": 0}
    with pytest.raises(
        RuntimeError, match=r"Training stopped at step \d+: loss .*ethanol_500K.* frame \d+.*Last good checkpoint: none yet"
    ):
        train(config, progress=False)


def test_validations_without_a_number_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(loop, "validation_loss", lambda *given: float("nan"))
    with pytest.raises(RuntimeError, match="has no potential: at no validation was the error a number"):
        train(settings(tmp_path / "run", steps=2), progress=False)
    assert "is not a number at step 2" in caplog.text


@pytest.mark.thorough
def test_processes_that_prepare_batches_change_nothing(tmp_path: Path) -> None:
    """Nor does it matter with how many a run goes on; random numbers, of dropout, are the same too."""
    options = dict(steps=12, valid_every=6, checkpoint_every=6, batch_edges=400, dtype="float64")
    train(settings(tmp_path / "plain", **options), progress=False)
    train(settings(tmp_path / "run", num_workers=1, **options), progress=False)
    plain, run = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("plain", "run"))
    assert "rng" in plain
    assert same(plain, run)
    assert train(settings(tmp_path / "run", num_workers=0, **options), resume=True, progress=False)["steps"] == 12
    with pytest.raises(ValueError, match="training.batch_edges is 400 .now 500."):
        train(settings(tmp_path / "run", **{**options, "batch_edges": 500}), resume=True, progress=False)


@pytest.mark.thorough
def test_a_signal_to_all_processes_stops_a_run_whose_batches_others_prepare(tmp_path: Path) -> None:
    """As torchrun sends it: the run ends at a checkpoint, and not because those others ended."""
    config = settings(tmp_path / "run", steps=100_000, valid_every=100_000, checkpoint_every=20, num_workers=1)
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "gossamer.cli", "train", str(tmp_path / "c.yaml")]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    wait_for(tmp_path / "run" / "checkpoint.safetensors", process)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "--resume goes on from" in output


def test_waiting_for_batches_is_said(caplog: pytest.LogCaptureFixture) -> None:
    for waited, said in ((5.0, False), (50.0, True)):
        loop.report_waiting(types.SimpleNamespace(waited=waited), 100.0, loop.TrainingConfig(num_workers=2))  # type: ignore[arg-type]
        assert ("50 % of the time went into waiting for batches; training.num_workers is 2" in caplog.text) is said


def test_epochs_are_those_of_the_batches_that_were_made(tmp_path: Path) -> None:
    """Not of as many frames as batch_size allows: atoms and edges limit them too."""
    config = settings(tmp_path / "run", steps=9, valid_every=100, batch_size=5, batch_atoms=1)  # of one frame each
    n_train = 6
    config["data"] |= {"train_size": n_train}
    assert train(config, progress=False)["epochs"] == pytest.approx(9 / n_train)


def test_early_stopping(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", steps=1000, valid_every=5, early_stopping=2, learning_rate=1e-12)
    config["training"]["ema_decay"] = 0.0
    results = train(config, progress=False)
    assert results["steps"] < 1000
    assert train(config, resume=True, progress=False)["steps"] == results["steps"]  # resuming does not train on


def test_direct_forces_train(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", steps=6, valid_every=6)
    config["model"]["direct_forces"] = True
    results = train(config, progress=False)
    assert results["valid"]["conservative_forces"] is False


@pytest.mark.parametrize("name", ["leignn", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n != "leignn")])
@pytest.mark.thorough
def test_unrolled_graph_has_right_second_derivatives(name: str) -> None:
    """The graph that is compiled, run uncompiled: values and weight gradients of energies and forces, on two batch shapes; and of single structures."""
    script = f"""
import torch
from gossamer.config import make_config
from gossamer.data.readers import read_structures
from gossamer.data.statistics import compute_statistics
from gossamer.potential import Potential
from gossamer.training.compiled import CompiledForward
torch.manual_seed(0)
structures = list(read_structures({ETHANOL!r}))[:7]
config = make_config(dict(data=dict(train="x"), model=dict(name={name!r}, preset="tiny", num_layers={2 if name == "weft" else 1}, cutoff=3.5)))
potential = Potential(config.model, compute_statistics(structures, 3.5)).double().train()
for parts in ((structures[:3], structures[3:]), (structures[:1], structures[1:2])):
    forward = CompiledForward(potential, forces=True, stress=False, single=len(parts[0]) == 1)
    forward.compiled = forward.unroll(potential.collate(parts[0]))
    for part in parts:
        graph = potential.collate(part)
        forward._agree(forward._run, graph, "unrolled")
print("agreed")
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.stdout.strip() == "agreed", result.stderr


@pytest.mark.slow
def test_collating_while_tracing_does_no_harm() -> None:
    """The loader's thread uses the potential while its graph is traced; tracing must not put stand-ins into it."""
    script = f"""
import threading, torch
from gossamer.config import make_config
from gossamer.data.readers import read_structures
from gossamer.data.statistics import compute_statistics
from gossamer.potential import Potential
from gossamer.training.compiled import CompiledForward
structures = list(read_structures({ETHANOL!r}))[:4]
config = make_config(dict(data=dict(train="x"), model=dict(name="schnet", num_features=8, num_layers=1)))
potential = Potential(config.model, compute_statistics(structures, 5.0)).train()
graph, failed, done = potential.collate(structures), [], threading.Event()
def collate():
    while not done.is_set():
        try:
            potential.collate(structures[:1])
        except BaseException as error:
            failed.append(error)
            return
thread = threading.Thread(target=collate)
thread.start()
CompiledForward(potential, forces=True, stress=False).unroll(graph)
done.set()
thread.join()
print("fine" if not failed else failed)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.stdout.strip() == "fine", result.stderr + result.stdout


def test_comparison_refuses_a_wrong_graph(caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph whose forces are 1 % off is noticed on the first batch, said in one line, and not used."""
    from gossamer.training import compiled

    def wrong(self, graph):
        def call(state, *tensors):
            out = self.plain(compiled.Graph(**dict(zip(compiled.FIELDS, tensors, strict=True))))
            return out.energy, out.node_energies, out.forces * 1.01

        return call

    monkeypatch.setattr(compiled.CompiledForward, "_compile", wrong)
    results = train(settings(tmp_path / "run", steps=5, compile=True), progress=False)
    assert results["steps"] == 5
    assert "training is not compiled: the compiled forces differs from the plain one by 1.0e-02" in caplog.text


@pytest.mark.parametrize(("limits", "n_graphs"), [({}, 8), ({"batch_size": 1}, 1), ({"batch_atoms": 9}, 1), ({"batch_edges": 80}, 1)])
def test_batches_of_one_structure_are_compiled_whatever_makes_them(
    limits: dict[str, int], n_graphs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(self, graph):
        seen.append(graph.n_graphs)
        return lambda state, *tensors: tuple(
            getattr(self.plain(Graph(**dict(zip(FIELDS, tensors, strict=True)))), name) for name in self.names
        )

    monkeypatch.setattr(CompiledForward, "_compile", watched)
    results = train(settings(tmp_path / "run", steps=3, compile=True, **limits), progress=False)
    assert results["compiled"]
    assert seen == [n_graphs]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiled_training_equals_plain(name: str, tmp_path: Path) -> None:
    """In a process without the shape checks, which torch.compile cannot trace."""
    script = f"""
import json, torch
from gossamer.runs import train
torch.set_num_threads(1)
for name, compiled in (("plain", False), ("compiled", True)):
    config = json.loads({json.dumps(json.dumps(settings(tmp_path / "X", steps=8, dtype="float64", valid_every=8)))})
    config["training"]["compile"] = compiled
    config["model"]["name"] = {name!r}
    config["out"] = config["out"][:-1] + name
    train(config, progress=False)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "not compiled" not in result.stderr, result.stderr
    plain, compiled = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    for name in (k for k in plain if k.startswith("network.")):
        torch.testing.assert_close(plain[name], compiled[name], atol=1e-8, rtol=1e-6)


def test_graphs_of_other_data_are_one_to_the_compiler() -> None:
    """What comes from the data (mean number of neighbours, scale, reference energies) is an input, so that the compiler finds what it kept."""
    script = f"""
import json
from dataclasses import replace
from gossamer.config import make_config
from gossamer.data.readers import read_structures
from gossamer.data.statistics import compute_statistics
from gossamer.potential import Potential
from gossamer.training.compiled import CompiledForward
structures = list(read_structures({ETHANOL!r}))[:3]
statistics = compute_statistics(structures, 3.5)
other = replace(statistics, mean_neighbors=7.3, energy_scale=0.37, reference_energies=dict(H=-1.5, C=-2.5, O=-3.5))
codes = []
for facts in (statistics, other):
    config = make_config(dict(data=dict(train="x"), model=dict(name="weft", preset="tiny", cutoff=3.5)))
    forward = CompiledForward(Potential(config.model, facts).train(), forces=True, stress=False)
    codes.append((forward.name, forward.unroll(forward.potential.collate(structures)).print_readable(print_output=False)))
print("equal" if codes[0] == codes[1] else "different")
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.stdout.strip() == "equal", result.stderr


def test_compiler_files_are_kept_and_those_altered_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    folder = tmp_path / "compiler"
    with pytest.raises(RuntimeError), kept_compiler_files("a"):
        raise RuntimeError
    assert not is_kept("a")
    with kept_compiler_files("a"):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
        (folder / "one.so").write_bytes(b"one")
        (folder / "two.so").write_bytes(b"two")
    assert is_kept("a")
    assert not is_kept("b")
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") != str(folder)
    assert folder.stat().st_mode & 0o077 == 0
    (folder / "one.so").write_bytes(b"One")
    with kept_compiler_files("b"):
        assert not (folder / "one.so").exists()
        assert (folder / "two.so").exists()
    assert "one.so' was damaged or altered" in caplog.text
    (folder / "digests.json").write_text("{")
    with kept_compiler_files("b"):
        assert not (folder / "two.so").exists()
    assert not is_kept("a")
    assert is_kept("b")
    with pytest.raises(OSError, match="No space left"), kept_compiler_files("c"):  # the compiler's, whose step must not be used
        raise OSError("No space left on device")
    assert not is_kept("c")
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") != str(folder)


def test_compiler_files_stay_where_the_user_or_a_broken_cache_wants_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "compiler"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "own")
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    with kept_compiler_files("a"):
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "own"
    assert not is_kept("a")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("GOSSAMER_CACHE", "/dev/null/nowhere")
    with kept_compiler_files("a"):
        assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") != str(folder)
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    with kept_compiler_files("a"):
        assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") != str(folder)


@pytest.mark.thorough
def test_a_step_compiled_before_is_compiled_in_no_time(tmp_path: Path) -> None:
    """Other weights, other reference energies, another process: the compiler makes nothing anew."""
    script = f"""
import sys, torch
from gossamer.runs import train
from torch._dynamo.utils import counters
torch.set_num_threads(1)
config = {settings(tmp_path / "run", steps=2, compile=True, valid_every=2)!r}
config["model"] = dict(name="schnet", preset="tiny", cutoff=3.5)
config["out"] += sys.argv[1]
config["training"]["seed"] = int(sys.argv[1])
config["data"]["train_size"] = 10 + int(sys.argv[1])
assert train(config, progress=False)["compiled"]
print(counters["aot_autograd"]["autograd_cache_miss"])
"""
    misses = []
    for k in range(2):
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, str(k)], env={**ENVIRONMENT, "GOSSAMER_CACHE": str(tmp_path / "cache")},
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        misses.append(int(result.stdout.split()[-1]))
    assert misses[0] > 0
    assert misses[1] == 0


# --- a given time ---------------------------------------------------------------------------------------------------


class Clock:
    """Stands still but for ``tick`` seconds at every look."""

    def __init__(self, tick: float) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def timed(out: Path, **training) -> dict:
    return settings(out, minutes=0.5, schedule={"warmup_steps": 5, "final": 0.01}, **training)


@pytest.mark.parametrize("tick", often([0.2, 0.8], [0.8]))
def test_a_run_of_a_given_time_ends_with_it(tick: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine four times slower there are a quarter of the steps, and the learning rate has come down all the same."""
    monkeypatch.setitem(loop.CLOCKS, "wall", Clock(tick))
    rates = []
    original = Schedule.rate
    monkeypatch.setattr(Schedule, "rate", lambda self, *a: rates.append(original(self, *a)) or rates[-1])
    results = train(timed(tmp_path / "run"), progress=False)
    assert 30 <= results["seconds"] <= 30 + 4 * tick
    # two looks at the clock per step, three per validation
    assert 30 / tick / 2 - 3 * 17 / 2 <= results["steps"] <= 30 / tick / 2
    assert results["step_ms"] == pytest.approx(1000 * tick)
    assert max(rates) == pytest.approx(5e-3, rel=0.2)
    assert rates[-1] < 0.05 * 5e-3
    rows = log_rows(tmp_path / "run")
    assert 5 <= len(rows) <= loop.TIMED_PARTS + 1
    assert int(rows[-1]["step"]) == results["steps"]


def test_no_validation_keeps_the_learning_rate_from_coming_down() -> None:
    """One that would go on beyond the end of the time is left to the end: 10 s each, of a minute that has 5 s left."""
    config = TrainingConfig(minutes=1.0)
    due = types.SimpleNamespace(seconds=49.0, validated_at=9.0, valid_seconds=10.0)
    assert loop.validation_due(due, config)
    due.seconds = 55.0
    assert not loop.validation_due(due, config)


@pytest.mark.thorough
def test_slow_validation_comes_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.2)
    monkeypatch.setitem(loop.CLOCKS, "wall", clock)
    original = loop.evaluate_potential

    def slow(*arguments, **options):
        clock.now += 2.0
        return original(*arguments, **options)

    monkeypatch.setattr(loop, "evaluate_potential", slow)
    results = train(timed(tmp_path / "run"), progress=False)
    assert 2 <= len(log_rows(tmp_path / "run")) <= 5
    assert results["seconds"] <= 30 + 3


@pytest.mark.thorough
def test_time_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was used before a stop counts."""
    monkeypatch.setitem(loop.CLOCKS, "wall", Clock(0.4))
    config = timed(tmp_path / "run")
    interrupt(monkeypatch, config, 20)
    used = read_checkpoint(tmp_path / "run" / "checkpoint.safetensors")[1]["seconds"]
    assert used > 10
    clock = Clock(0.4)
    monkeypatch.setitem(loop.CLOCKS, "wall", clock)
    results = train(config, resume=True, progress=False)
    assert 30 <= results["seconds"] <= 32
    assert clock.now == pytest.approx(30 - used, abs=2)
    with pytest.raises(ValueError, match="training.minutes is 0.5 .now 2.0."):
        train(config | {"training": config["training"] | {"minutes": 2}}, resume=True, progress=False)


def test_schedule_and_average_by_time() -> None:
    schedule = Schedule(ScheduleConfig(kind="cosine", warmup_steps=10, final=0.1), 1.0, 10_000)
    assert schedule.rate(0, 0.0) == pytest.approx(0.1)  # a tenth of the warm-up
    assert schedule.rate(1, 0.05) == pytest.approx(0.5, rel=0.01)  # few steps fit: a tenth of the time
    assert schedule.rate(500, 0.5) == pytest.approx(0.55)
    assert schedule.rate(900, 1.0) == pytest.approx(0.1)
    linear = Schedule(ScheduleConfig(kind="linear", warmup_steps=0, final=0.0), 1.0, 10_000)
    assert [linear.rate(50, p) for p in (0.5, 1.0)] == pytest.approx([0.5, 0.0])
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    long, short = EMA(module, 0.999), EMA(module, 0.999)
    for n in range(1, 201):
        module.weight.data.fill_(float(n))
        long.update()
        short.update(n / 200)  # 200 steps in all: an average over the last ten
    assert 200 - float(short.module.weight) == pytest.approx(9, abs=1.5)
    assert 200 - float(long.module.weight) > 15


def test_fit_needs_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loop.CLOCKS, "wall", Clock(0.05))
    results = fit(
        str(DEMO / "ethanol_500K.extxyz.xz"), out=tmp_path / "fit", minutes=0.1, progress=False, functional="pbe0", dispersion="none"
    )
    assert results["valid"]["forces_mae_meV_per_A"] < 700
    assert load_config(tmp_path / "fit" / "config.yaml").training.minutes == 0.1
    said = load(tmp_path / "fit" / "potential.safetensors").statistics
    assert (said.functional, said.dispersion) == ("pbe0", "none")
    with pytest.raises(ValueError, match=r"data.functional is pbe0 \(now pbe\)"):
        fit(str(DEMO / "ethanol_500K.extxyz.xz"), out=tmp_path / "fit", resume=True, functional="pbe")
    with pytest.raises(FileExistsError, match="holds a run already"):  # at once, before anything is read
        fit("nothing.extxyz", out=tmp_path / "fit")
    # the frames kept aside are there, and are no training frames
    evaluation = evaluate(tmp_path / "fit" / "potential.safetensors", tmp_path / "fit" / "valid.extxyz")
    assert evaluation.summary()["n_frames"] == results["valid"]["n_frames"] == 30
    assert evaluation.forces.mae == pytest.approx(results["valid"]["forces_mae_meV_per_A"], rel=1e-3)
    assert (evaluation.n_training_frames, evaluation.n_validation_frames) == (0, 30)
    assert "30 chose the best weights" in evaluation.notes[0]


def test_the_last_error_is_foretold() -> None:
    """A power law goes on with three quarters of its exponent; nothing is said too early, or at the end."""
    shares = np.linspace(0.1, 1, 10)
    errors = 20 * shares**-0.8
    assert expected_error(shares[:5], errors[:5]) == pytest.approx(errors[4] * 0.5**0.6)
    assert expected_error(shares[:3], errors[:3]) is None
    assert expected_error(shares / 5, errors) is None
    assert expected_error(shares, errors) is None
    assert expected_error(shares[:5], [*errors[:4], errors[0]]) <= errors[0]  # errors that rise are not thought to go on rising


def test_a_run_of_less_than_a_second_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"step": k, "seconds": 0.05 * k, "valid_forces_mae": 9.0 / k} for k in range(1, 6)]
    caplog.set_level("INFO")
    Bar(10, 0.3 / 60, rows, 0, visible=False).report()
    assert "step 5 (0 of 0 s): F 1.80 meV/Å  (F about 1.6 at the end)" in caplog.text


@pytest.mark.parametrize("name", [*MODELS])
def test_fit_compiles_only_where_it_clearly_pays(name: str) -> None:
    """Compiling takes several times as long on a busy machine, and nothing can stop it: five minutes were lost to it."""
    assert not compile_pays(name, 5)
    assert compile_pays(name, 60)
    assert compile_pays(name, 10, kept=True)


def test_fit_of_few_frames_takes_small_batches_and_slow_radial_functions() -> None:
    """50 frames of ethanol: 2 a step, by Muon; 16 of 2,000, which are enough to learn what varies fast, by SOAP."""
    frames = list(read_structures(ETHANOL))
    for count, batch_size, decay in ((50, 2, 1.0), (2_000, 16, 0.0)):
        some = [frames[k % len(frames)] for k in range(count)]
        config = fitting.choose_settings(ETHANOL, some)
        assert (config.training.batch_size, config.model.basis_decay) == (batch_size, decay)
        assert (config.training.optimizer, config.training.learning_rate) == (("muon", 0.04) if count == 50 else ("soap", 0.08))
    assert fitting.choose_settings(ETHANOL, some, minutes=60).training.learning_rate == 0.04  # which ends lower after many steps
    assert not hasattr(fitting.choose_settings(ETHANOL, some[:50], model="painn").model, "basis_decay")


def test_fit_for_speed_or_accuracy_takes_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(
        fitting, "train", lambda config, **options: chosen.append((config.model.name, config.model.num_features, config.model.l_max))
    )
    for options in ({"speed": True}, {}, {"accuracy": True}):
        fit(ETHANOL, out=tmp_path / "fit", **options)
    assert chosen == [("weft", 16, 2), ("weft", 32, 2), ("weft", 32, 3)]
    for wish in ("speed", "accuracy"):
        for name in ("model", "start"):
            with pytest.raises(ValueError, match=f"{wish} chooses the network, and {name} names one"):
                fit(ETHANOL, out=tmp_path / "fit", **{wish: True, name: "nequip"})
    with pytest.raises(ValueError, match="leave one of them out, or both"):
        fit(ETHANOL, out=tmp_path / "fit", speed=True, accuracy=True)


@pytest.mark.parametrize(("spacing", "cutoff"), [(2.0, 4.0), (2.42, 4.8), (3.5, 5.0), (9.0, 5.0)])
def test_fit_sees_about_as_many_neighbours_in_whatever_it_is_given(spacing: float, cutoff: float) -> None:
    """Simple cubic crystals, dense to thin, and atoms on their own: 26 neighbours are within √3 spacings, 32 within two."""

    structure = from_atoms(Atoms("X", cell=[spacing] * 3, pbc=True), LabelConfig(), "crystal")
    assert fitting.choose_cutoff([structure] * 3) == pytest.approx(cutoff)


@pytest.mark.parametrize(
    ("asked", "differ"),
    [
        ({}, None),
        ({"minutes": 5, "model": "nequip/S", "labels": LabelConfig(force_unit="eV/Angstrom"), "force": True}, None),
        ({"data": "nothing.extxyz"}, r"data\.train is .*ethanol.* \(now nothing\.extxyz\)"),
        ({"minutes": 30}, r"training\.minutes is 5\.0 \(now 30\.0\)"),
        ({"model": "schnet"}, r"model\.name is nequip \(now schnet\)"),
        ({"model": "nequip/M"}, r"model\.num_layers is 2 \(now 4\), model\.l_max is 1 \(now 2\), model\.num_features is \[128, 64\]"),
        ({"labels": LabelConfig(energy="zzz")}, r"data\.labels\.energy is energy \(now zzz\)"),
        ({"accuracy": True}, r"model\.name is nequip \(now weft\), model\.l_max is 1 \(now 3\)"),
        ({"start": "p.safetensors", "weights": ["a"]}, r"finetune\.start is None \(now p\.safetensors\), finetune\.train is None"),
    ],
)  # fmt: skip
def test_fit_goes_on_only_with_what_began_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict, differ: str | None) -> None:
    """The same command line with --resume goes on, and so does a shorter one; what contradicts the run is named."""
    gone_on = []
    monkeypatch.setattr(fitting, "train", lambda config, resume=False, **_: gone_on.append(resume) or config)
    labels = LabelConfig(force_unit="eV/Angstrom")
    config = fit(ETHANOL, out=tmp_path / "fit", minutes=5, model="nequip/S", labels=labels)
    (tmp_path / "fit").mkdir()
    save_config(config, tmp_path / "fit" / "config.yaml")
    arguments = {"data": ETHANOL, "out": tmp_path / "fit", "resume": True, **asked}
    if differ is None:
        fit(**arguments)
        assert gone_on == [False, True]
        return
    with pytest.raises(
        ValueError, match=f"fit' was begun with other settings: {differ}.*Go on with the arguments that began it, or choose"
    ):
        fit(**arguments)
    assert gone_on == [False]


def test_fit_says_what_it_does_not_train_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """--force and a frame without forces: they are never left out without a word."""
    import ase.io

    monkeypatch.setattr(fitting, "train", lambda config, **_: config)
    frames = [s.to_ase() for s in read_structures(ETHANOL)][:40]
    for atoms in frames[3:10]:
        del atoms.calc.results["forces"]
    path = tmp_path / "some.extxyz"
    ase.io.write(path, frames)
    with pytest.raises(ValueError, match="not fit for training: 7 of 40 frames have no forces"):
        fit(path, out=tmp_path / "fit")
    with pytest.raises(
        ValueError,
        match=r"7 of the 40 frames of .*some\.extxyz' have no forces, the first is .* frame 3: .*leave them out: gossamer data convert",
    ):
        fit(path, out=tmp_path / "fit", force=True)
    assert "7 of 40 frames have no forces" in caplog.text
    for atoms in frames[10:30]:
        del atoms.calc.results["forces"]
    ase.io.write(path, frames)
    config = fit(path, out=tmp_path / "fit", force=True)
    assert (config.loss.energy, config.loss.forces) == (5.0, 0.0)
    assert "the forces are not trained on: 27 of the 40 frames have none, the first is" in caplog.text


def test_fit_of_one_frame(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "one.extxyz", next(iter(read_structures(ETHANOL))).to_ase())
    with pytest.raises(ValueError, match=r"one\.extxyz' holds one frame.*Give more frames"):
        fit(tmp_path / "one.extxyz", out=tmp_path / "fit", progress=False)


def test_fit_refuses_bad_data(tmp_path: Path) -> None:
    frames = [s.to_ase() for s in read_structures(ETHANOL)][:40]
    for atoms in frames:
        atoms.calc.results["energy"] /= 27.2114
    ase.io.write(tmp_path / "bad.extxyz", frames)
    with pytest.raises(ValueError, match="not fit for training"):
        fit(tmp_path / "bad.extxyz", out=tmp_path / "fit", minutes=0.05, progress=False)


@pytest.mark.thorough
def test_training_frames_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of the file trained on, only the other frames are evaluated; their indices are those of the file."""
    results = train(settings(tmp_path / "run", steps=20), progress=False)
    path = tmp_path / "run" / "potential.safetensors"
    evaluation = evaluate(path, ETHANOL, out=tmp_path / "evaluation", worst=5)
    assert (evaluation.n_training_frames, evaluation.n_validation_frames, evaluation.training_error) == (60, 20, False)
    assert "60 of 100 frames were trained on; they are left out." in evaluation.notes
    structures = list(read_structures(ETHANOL))
    assert [f["name"] for f in evaluation.frames] == [structures[f["index"]].name for f in evaluation.frames]
    frames = ase.io.read(tmp_path / "evaluation" / "worst.extxyz", ":")
    assert len(frames) == 5
    assert frames[0].info["forces_rmse"] == pytest.approx(max(f["forces_rmse"] for f in evaluation.frames), rel=1e-5)
    by_hand = np.concatenate([a.arrays["predicted_forces"] - a.get_forces() for a in frames[:1]])
    assert 1000 * np.sqrt((by_hand**2).mean()) == pytest.approx(frames[0].info["forces_rmse"], rel=1e-4)
    summary = json.loads((tmp_path / "evaluation" / "errors.json").read_text())
    assert set(summary["forces_per_element_meV_per_A"]) == {"H", "C", "O"}
    assert (summary["n_frames"], summary["n_training_frames"]) == (40, 60)
    # asked for, they count; alone, they are called what they are
    everything = evaluate(path, ETHANOL, include_training=True)
    assert len(everything.frames) == 100
    assert "included" in everything.notes[0]
    train_set, valid_set, _ = load_data(make_config(settings(tmp_path)).data)
    alone = evaluate(path, train_set)
    assert alone.training_error
    assert len(alone.frames) == 60
    assert alone.notes == ["TRAINING ERROR: all 60 frames were trained on, so this says nothing of accuracy. Give frames kept aside."]
    ase.io.write(tmp_path / "trained.extxyz", [s.to_ase() for s in train_set])
    assert main(["evaluate", str(path), str(tmp_path / "trained.extxyz")]) == 0
    assert "TRAINING ERROR" in capsys.readouterr().out
    assert evaluate(path, valid_set).forces.mae == pytest.approx(results["valid"]["forces_mae_meV_per_A"], rel=1e-3)


def test_training_says_what_reading_remarks_on_frames(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As inspection does, which nobody need have asked."""
    frames = [s.to_ase() for s in read_structures(ETHANOL)][:12]
    for atoms in frames:
        atoms.info["config_weight"] = 0.5
    ase.io.write(tmp_path / "a.extxyz", frames)
    train(settings(tmp_path / "run", steps=2) | {"data": {"train": str(tmp_path / "a.extxyz"), "valid_size": 2}}, progress=False)
    assert "10 of 10 frames have a weight of their own" in caplog.text


def test_evaluation_adds_up(tmp_path: Path) -> None:
    train(settings(tmp_path / "run", steps=20), progress=False)
    potential = load(tmp_path / "run" / "potential.safetensors")
    structures = list(read_structures(ETHANOL))[:12]
    evaluation = evaluate_potential(potential, structures, batch_atoms=20)
    predictions = [potential.predict([s])[0] for s in structures]
    energy = np.array([(p["energy"] - s.energy) / 9 for p, s in zip(predictions, structures, strict=True)])
    forces = np.array([p["forces"] - s.forces for p, s in zip(predictions, structures, strict=True)])
    assert evaluation.energy.mae == pytest.approx(1000 * np.abs(energy).mean(), rel=1e-4)
    assert evaluation.forces.rmse == pytest.approx(1000 * np.sqrt((forces**2).mean()), rel=1e-4)


# --- pieces -------------------------------------------------------------------------------------------------------


def test_fixed_atoms_count_nowhere(tmp_path: Path) -> None:
    """With loss.free_atoms_only, absurd forces of fixed atoms change neither scales, errors, best weights nor the uncertainty."""
    structures = list(read_structures(ETHANOL))[:16]
    fixed = np.arange(9) < 3
    sound = [replace(s, fixed=fixed) for s in structures]
    absurd = [replace(s, fixed=fixed, forces=np.where(fixed[:, None], 50.0, s.forces)) for s in structures]
    found = []
    for name, chosen in (("sound", sound), ("absurd", absurd)):
        ase.io.write(tmp_path / f"{name}.extxyz", [s.to_ase() for s in chosen])
        config = settings(tmp_path / name, steps=4, valid_every=2)
        config |= {"data": {"train": str(tmp_path / f"{name}.extxyz"), "valid_size": 6}, "loss": {"free_atoms_only": True}}
        results = train(config, progress=False)
        potential = load(tmp_path / name / "potential.safetensors")
        found.append((results["valid"], potential.statistics.energy_scale, potential.uncertainty.record, log_rows(tmp_path / name)))
        kept = list(read_structures(tmp_path / name / "valid.extxyz"))
        assert all(s.fixed.tolist() == fixed.tolist() for s in kept)
    assert found[0] == found[1]
    every = evaluate_potential(potential, absurd).forces
    free = evaluate_potential(potential, absurd, free_atoms_only=True).forces
    assert every.count == 16 * 27
    assert free.count == 16 * 18
    assert every.mae > 3 * free.mae
    file = tmp_path / "absurd" / "potential.safetensors"
    of_file = evaluate(file, absurd, include_training=True)  # as it was trained
    assert (of_file.forces.count, of_file.notes[-1]) == (
        16 * 18, "forces of 48 atoms held fixed do not count, as in its training (loss.free_atoms_only)"
    )  # fmt: skip
    assert evaluate(load(file), absurd, include_training=True).forces.count == 16 * 27
    held = replace(absurd[0], fixed=np.ones(9, dtype=bool))
    assert "forces_rmse" not in evaluate_potential(potential, [held], free_atoms_only=True).frames[0]


def test_conditional_huber_follows_the_size_of_the_force() -> None:
    config = LossConfig(kind="conditional_huber", huber_delta=0.01)
    forces = torch.tensor([[1.0, 0, 0], [0, 150.0, 0], [0, 0, 250.0], [400.0, 0, 0]], dtype=torch.float64)
    deltas = conditional_deltas(forces, 0.01)
    assert deltas[:, 0].tolist() == pytest.approx([0.01, 0.007, 0.004, 0.001])
    residual = torch.full((4, 3), 1.0, dtype=torch.float64)
    slopes = penalty(residual, config, deltas) - penalty(residual - 0.1, config, deltas)
    assert slopes[:, 0].tolist() == pytest.approx([0.1, 0.07, 0.04, 0.01])


def test_normalised_residuals() -> None:
    """Divided by the spreads of the labels: the loss of a potential is the same in other units."""
    structures = list(read_structures(ETHANOL))[:4]
    potential = make_potential(["H", "C", "O"], zbl=False)
    graph = potential.collate(structures)
    out = potential(graph)
    config = LossConfig(normalize=True, kind="mse")
    plain = loss_sums(out, graph, LossConfig(kind="mse"))
    scaled = loss_sums(out, graph, config, {"energy": 2.0, "forces": 0.5})
    assert float(scaled["energy"]) == pytest.approx(float(plain["energy"]) / 4)
    assert float(scaled["forces"]) == pytest.approx(float(plain["forces"]) * 4)


def test_spreads_of_labels() -> None:
    structures = list(read_structures(ETHANOL))[:30]
    statistics = compute_statistics(structures, 4.0)
    forces = np.concatenate([s.forces.ravel() for s in structures])
    assert statistics.spreads["forces"] == pytest.approx(np.sqrt((forces**2).mean()))
    energies = np.array([s.energy / s.n_atoms for s in structures])
    assert statistics.spreads["energy"] == pytest.approx(energies.std(), rel=1e-6)  # one composition: references shift all alike
    of_h = np.concatenate([s.forces[s.atomic_numbers == 1].ravel() for s in structures])
    assert statistics.element_scales["H"] * statistics.energy_scale == pytest.approx(np.sqrt((of_h**2).mean()))


def test_zclip() -> None:
    """Outliers are cut to the published limit and do not move the averages as they are; a hard cap holds from the start."""
    rng = np.random.default_rng(0)
    clipper = Clipper(max_norm=5.0, z_score=2.5)
    for norm in 1 + 0.1 * rng.normal(size=200):
        clipper.limit(float(norm))
    mean, spread = clipper.mean, clipper.variance**0.5
    assert mean == pytest.approx(1.0, abs=0.1)
    z = (3.0 - mean) / spread
    assert clipper.limit(3.0) == pytest.approx(mean + 2.5**2 * spread / z)
    assert clipper.mean < mean + 0.1
    assert clipper.limit(mean) == 5.0
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([30.0, 40.0])
    assert float(Clipper(5.0, None).clip([parameter])) == 50.0
    assert float(parameter.grad.norm()) == pytest.approx(5.0, rel=1e-5)
    other = Clipper(5.0, 2.5)
    other.load_state(json.loads(json.dumps(clipper.state())))
    assert other.limit(4.0) == clipper.limit(4.0)


@pytest.mark.thorough
def test_zclip_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after the averages of the norm have begun to count, the run ends as without; with fresh averages it would not."""
    monkeypatch.setattr(Clipper, "WARMUP", 5)
    monkeypatch.setattr(Clipper, "DECAY", 0.5)
    options = dict(steps=20, checkpoint_every=5, valid_every=20, batch_size=2, zclip=0.1, clip_norm=1e6)
    train(settings(tmp_path / "whole", **options), progress=False)
    config = settings(tmp_path / "cut", **options)
    interrupt(monkeypatch, config, 12)
    assert len(read_checkpoint(tmp_path / "cut" / "checkpoint.safetensors")[1]["clipper"]["first"]) == Clipper.WARMUP
    train(config, resume=True, progress=False)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    forgetful = settings(tmp_path / "forgetful", **options)
    interrupt(monkeypatch, forgetful, 12)
    monkeypatch.setattr(Clipper, "load_state", lambda self, state: None)
    train(forgetful, resume=True, progress=False)
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "forgetful"))


def test_penalties() -> None:
    r = torch.tensor([-0.02, 0.005, 1.0])
    assert penalty(r, LossConfig(kind="l1")).tolist() == pytest.approx([0.02, 0.005, 1.0])
    assert penalty(r, LossConfig(kind="mse")).tolist() == pytest.approx([4e-4, 2.5e-5, 1.0])
    assert penalty(r, LossConfig(kind="huber", huber_delta=0.01)).tolist() == pytest.approx([0.015, 0.00125, 0.995])


def test_schedules() -> None:
    cosine = Schedule(ScheduleConfig(kind="cosine", warmup_steps=10, final=0.1), 1.0, 110)
    assert [cosine.rate(k) for k in (0, 9, 10, 60, 110)] == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1])
    linear = Schedule(ScheduleConfig(kind="linear", warmup_steps=0, final=0.0), 1.0, 100)
    assert linear.rate(25) == pytest.approx(0.75)
    plateau = Schedule(ScheduleConfig(kind="plateau", warmup_steps=0, factor=0.5, patience=1, final=0.3), 1.0, 100)
    rates = []
    for metric in (1.0, 1.1, 1.2, 0.9, 1.0, 1.0, 1.0, 1.0):
        plateau.observe(metric)
        rates.append(plateau.rate(50))
    assert rates == pytest.approx([1, 1, 0.5, 0.5, 0.5, 0.3, 0.3, 0.3])


@pytest.mark.parametrize(("steps", "told"), [(100, True), (101, False)])
def test_a_learning_rate_that_never_falls_is_said(steps: int, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_schedule(make_config(settings(tmp_path, steps=steps)))
    assert ("rises to 1 of training.learning_rate and never falls" in caplog.text) == told


def test_ema_follows_its_formula() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    ema = EMA(module, 0.9)
    expected = 0.0
    for n in range(1, 6):
        module.weight.data.fill_(float(n))
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert float(ema.module.weight) == pytest.approx(expected, rel=1e-6)


def test_no_decay_of_tables_and_biases() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Linear(2, 2))
    groups = make_optimizer(module, "adamw", 1e-3, 0.1, True).param_groups
    assert {tuple(p.shape) for p in groups[0]["params"]} == {(2, 2)}
    assert groups[1]["weight_decay"] == 0.0
    assert {tuple(p.shape) for p in groups[1]["params"]} == {(3, 2), (2,)}


@pytest.mark.parametrize("name", [*MODELS, "mace-agnesi"])
def test_muon_takes_the_matrices_of_every_network(name: str) -> None:
    network = make_potential(["H", "O"], **VARIANTS.get(name, {"name": name})).network
    optimizer = make_optimizer(network, "muon", 1e-2, 0.0, True)
    found = weight_matrices(network)
    assert found
    tables = {p for m in network.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    assert not tables & found.keys()
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    before = {p: p.detach().clone() for p in network.parameters()}
    optimizer.step()
    for p, split in found.items():
        for old, new in zip(split(before[p]), split(p.detach()), strict=True):
            assert old.dim() == 2
            size = 0.01 * 0.2 * max(old.shape) ** 0.5  # what an orthogonal matrix is multiplied by
            values = torch.linalg.svdvals((old - new) / size)
            assert float(values.max()) < 1.3
            assert float(values.max()) > 0.6
    rest = [p for p in network.parameters() if p not in found]
    adam = torch.optim.AdamW([b.clone() for b in (before[p] for p in rest)], lr=1e-2, weight_decay=0.0, amsgrad=True)
    for ours, theirs in zip(rest, adam.param_groups[0]["params"], strict=True):
        theirs.grad = ours.grad
    adam.step()
    for ours, theirs in zip(rest, adam.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-12, atol=1e-14)


def test_muon_orthogonalizes() -> None:
    x = torch.randn(4, 12, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for matrices in (x, x.mT):
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        found = u.mT @ orthogonalized(matrices) @ v.mT
        diagonal = found.diagonal(dim1=1, dim2=2)
        assert float((found - torch.diag_embed(diagonal)).abs().max()) < 1e-10
        assert float(diagonal.min()) > 0.6
        assert float(diagonal.max()) < 1.25


def matrix_steps(gradients: torch.Tensor, **options: float) -> torch.Tensor:
    """(steps, m, n): weights of one matrix after each step of SOAP from nothing, with these gradients."""
    layer = torch.nn.Linear(*gradients.shape[:0:-1], bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    optimizer = make_optimizer(layer, "soap", options.get("lr", 1.0), 0.0, True)
    found = []
    for gradient in gradients:
        layer.weight.grad = gradient.clone()
        optimizer.step()
        found.append(layer.weight.detach().clone())
    return torch.stack(found)


def noisy_gradients() -> torch.Tensor:
    """(35, 9, 9): one direction and noise; of full rank, so that the first bases are not free."""
    generator = torch.Generator().manual_seed(0)
    shape = torch.randn(9, 9, dtype=torch.float64, generator=generator) * torch.linspace(3, 0.1, 9)
    return shape + 0.3 * torch.randn(35, 9, 9, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("way", ["as on a CPU", "as on a GPU"])
def test_soap_does_not_see_how_a_matrix_is_turned(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam does; beyond 30 steps the bases have been followed three times."""
    if way == "as on a GPU":
        monkeypatch.setattr(soap, "orthonormal", soap.by_cholesky)
    gradients = noisy_gradients()
    u, v = torch.linalg.qr(torch.randn(2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    plain, turned = matrix_steps(gradients), matrix_steps(u @ gradients @ v)
    torch.testing.assert_close(turned, u @ plain @ v, rtol=1e-8, atol=1e-8)
    assert float((matrix_steps(2 * gradients) - plain).abs().max()) < 1e-6  # nor how large the gradients are


@pytest.mark.parametrize("rank", [0, 1, 16, 32])
def test_bases_by_cholesky_are_those_by_qr(rank: int) -> None:
    """Gradients over six powers of ten and of any rank: orthonormal in any case, and the same where there is something to see."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(4, 32, rank, generator=generator) * torch.logspace(0, -6, rank)
    bases = torch.linalg.qr(torch.randn(4, 32, 32, generator=generator))[0]
    matrices = gradients @ gradients.mT
    found, wanted = soap.by_cholesky(matrices, bases), soap.orthonormal(matrices, bases)
    torch.testing.assert_close(found.mT @ found, torch.eye(32).expand(4, 32, 32), rtol=0, atol=2e-6)
    alike = (found * wanted).sum(dim=-2).abs()[:, : -(-rank // 4)]
    torch.testing.assert_close(alike, torch.ones_like(alike), rtol=0, atol=2e-4)


def test_soap_is_adam_in_the_eigenbasis() -> None:
    """Diagonal gradients have the identity for a basis, up to order and sign, so that the steps are Adam's with both decays 0.95."""
    gradients = torch.diag_embed(torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64) + 0.2 * torch.rand(25, 3, dtype=torch.float64))
    found = matrix_steps(gradients, lr=0.1)
    weight = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    adam = torch.optim.Adam([weight], lr=0.1, betas=(0.95, 0.95), eps=1e-8)
    assert float(found[0].abs().max()) == 0
    for k in range(1, 25):
        weight.grad = gradients[k].clone()
        adam.step()
        torch.testing.assert_close(found[k], weight.detach(), rtol=1e-9, atol=1e-9)


def test_soap_goes_on_from_its_state() -> None:
    gradients, layer = noisy_gradients(), torch.nn.Linear(9, 9, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    wanted = matrix_steps(gradients)[-1]
    optimizer = make_optimizer(layer, "soap", 1.0, 0.0, True)
    for k, gradient in enumerate(gradients):
        if k in (1, 15):
            state = optimizer.state_dict()
            optimizer = make_optimizer(layer, "soap", 1.0, 0.0, True)
            optimizer.load_state_dict(state)
        layer.weight.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(layer.weight.detach(), wanted)


def test_muon_splits_by_meaning() -> None:
    network = make_potential(["H", "O"], name="nequip").network
    layer = network.layers[1]
    found = weight_matrices(network)
    last = list(layer.convolution.radial.parameters())[-1]
    assert [len(m) for m in found[last](last)] == layer.convolution.convolution.channels
    maps = layer.self_connection[0].weight
    assert [tuple(m.shape) for m in found[maps](maps)] == [(maps.shape[0], maps.shape[2])] * maps.shape[1]


def test_a_row_of_the_log_that_was_cut_is_made_again(tmp_path: Path) -> None:
    """As a machine leaves it that loses its power: with it, the first validation of a resumed run ended in a TypeError."""
    writer = Log(tmp_path, 0, False, False)
    writer.write({"step": 5, "valid_forces_mae": 3.0})
    whole = (tmp_path / "log.csv").read_text()
    for cut in ("1", "10,0.2", "\0\0\0"):
        (tmp_path / "log.csv").write_text(whole + cut)
        assert [row["step"] for row in Log(tmp_path, 100, False, False).rows] == ["5"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_loggers_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else "wandb", None)
    with pytest.raises(ImportError, match=f"pip install {name}"):
        train(settings(tmp_path / "run", **{name: True}), progress=False)


def test_wandb_gets_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []

    class Run:
        def log(self, row: dict, step: int) -> None:
            calls.append((step, row["valid_loss"]))

        def finish(self) -> None:
            calls.append(("finished",))

    fake = types.ModuleType("wandb")
    fake.init = lambda **options: calls.append((options["project"], options["dir"])) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(settings(tmp_path / "run", steps=4, valid_every=2, wandb=True), progress=False)
    rows = log_rows(tmp_path / "run")
    assert calls[0] == ("gossamer", str(tmp_path / "run"))
    assert calls[1:-1] == [(int(r["step"]), pytest.approx(float(r["valid_loss"]))) for r in rows]
    assert calls[-1] == ("finished",)


def test_tensorboard_gets_every_row(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs the package tensorboard")
    train(settings(tmp_path / "run", steps=4, valid_every=2, tensorboard=True), progress=False)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    written = [(e.step, e.value) for e in events.Scalars("valid_loss")]
    assert written == [(int(r["step"]), pytest.approx(float(r["valid_loss"]), rel=1e-5)) for r in log_rows(tmp_path / "run")]


def test_batches_keep_to_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []
    original = loop.train_step

    def watched(state, graph, *others):
        seen.append((graph.n_graphs, graph.n_atoms, graph.n_edges))
        return original(state, graph, *others)

    monkeypatch.setattr(loop, "train_step", watched)
    train(settings(tmp_path / "free", steps=3), progress=False)
    free, seen[:] = list(seen), []
    most = max(edges for _, _, edges in free) // 2
    train(settings(tmp_path / "edges", steps=3, batch_edges=most), progress=False)
    assert all(edges <= most or graphs == 1 for graphs, _, edges in seen)
    assert seen != free
    seen.clear()
    train(settings(tmp_path / "atoms", steps=3, batch_atoms=20), progress=False)
    assert all(atoms <= 20 or graphs == 1 for graphs, atoms, _ in seen)


@pytest.mark.parametrize("reuse", [True, False])
def test_the_process_keeps_its_memory_only_if_the_settings_say_so(reuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(state, "keep_freed_memory", lambda: asked.append(True))
    state.make_state(make_potential(["C", "H", "O"]), loop.TrainingConfig(reuse_memory=reuse), LossConfig())
    assert asked == [True] * reuse
