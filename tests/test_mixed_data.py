"""Frames that lack labels, and frames that do not all count alike: crystals, slabs and molecules in one training."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from conftest import make_potential

from gossamer.cli import main
from gossamer.config import load_config
from gossamer.data import store
from gossamer.data.batch import collate
from gossamer.data.dataset import digest
from gossamer.data.inspection import inspect
from gossamer.data.labels import LabelConfig
from gossamer.data.readers import read_structures
from gossamer.data.store import Store, write_store
from gossamer.data.structure import Structure
from gossamer.evaluation import evaluate_potential
from gossamer.fitting import choose_settings
from gossamer.models import MODELS
from gossamer.potential_file import load
from gossamer.runs import train
from gossamer.training.loader import Loader
from gossamer.training.losses import LossConfig, frame_weights, loss_counts, loss_sums
from gossamer.training.state import gradients


def labelled(atoms: Atoms, seed: int, **info: Any) -> Atoms:
    """By EMT, stress where there is a volume."""
    atoms = atoms.copy()
    atoms.rattle(0.08, seed=seed)
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if atoms.pbc.all():
        results["stress"] = atoms.get_stress()
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info = info
    return atoms


def mixture(n: int = 6) -> list[Atoms]:
    """Copper as a crystal and a slab, and a molecule of two."""
    kinds = {
        "bulk": bulk("Cu", cubic=True),
        "surface": fcc111("Cu", (2, 2, 2), vacuum=6.0),
        "molecule": Atoms("Cu2", [[0, 0, 0], [0, 0, 2.3]]),
    }
    return [
        labelled(atoms, 10 * k + i, config_type=kind, config_weight=0.5 + k)
        for k in range(n)
        for i, (kind, atoms) in enumerate(kinds.items())
    ]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    ase.io.write(tmp_path / "mixed.extxyz", mixture())
    return tmp_path / "mixed.extxyz"


def without(structure: Structure, *labels: str) -> Structure:
    return replace(structure, **dict.fromkeys(labels))


# --- labels that are missing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["l1", "mse", "huber", "conditional_huber"])
def test_what_a_frame_lacks_adds_nothing(kind: Any, file: Path) -> None:
    """Sums, counts and gradients are those of the frames that have the label, each label by itself."""
    potential = make_potential(["Cu"]).train()
    loss = LossConfig(kind=kind, stress=20.0)
    frames = list(read_structures(file))[:6]
    frames[3] = without(frames[3], "forces")
    frames[4] = without(frames[4], "energy")
    graph = potential.collate(frames)
    assert set(graph.incomplete) == {"energy", "forces", "stress"}
    counts = loss_counts(graph, loss)
    assert counts == {"energy": 5, "forces": 3 * (sum(s.n_atoms for s in frames) - frames[3].n_atoms), "stress": 18}
    found = loss_sums(potential(graph, stress=True), graph, loss)
    gradient = {}
    for name in loss.weights():
        parts = [s for s in frames if name in s.labels]
        part = potential.collate(parts)
        only = LossConfig(kind=kind, energy=0.0, forces=0.0, stress=0.0)
        only = replace(only, **{name: 1.0})
        wanted = loss_sums(potential(part, stress=True), part, only)[name]
        torch.testing.assert_close(found[name], wanted)
        parameters = [p for p in potential.parameters() if p.requires_grad]
        gradient[name] = [torch.autograd.grad(v, parameters, allow_unused=True, retain_graph=True) for v in (found[name], wanted)]
        for a, b in zip(*gradient[name], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert torch.isfinite(a).all()
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * float(b.abs().max()) + 1e-14)


def test_complete_batches_are_as_they_were(file: Path) -> None:
    potential = make_potential(["Cu"]).train()
    crystals = [s for s in read_structures(file) if s.stress is not None]
    graph = potential.collate(crystals)
    assert (graph.incomplete, graph.weights, graph.with_places(["energy", "stress"]) is graph) == ((), None, True)
    out = potential(graph, stress=True)
    found = loss_sums(out, graph, LossConfig(kind="mse", stress=1.0))
    assert torch.equal(found["stress"], ((out.stress - graph.stress) ** 2).sum())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_crystals_slabs_and_molecules_in_one_training(batch_size: int, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Batches without any stress among them; the log says which frames teach what, and the errors are of those that have labels."""
    caplog.set_level(logging.INFO)
    settings = {
        "data": {"train": str(file), "valid_size": 6},
        "model": {"name": "leignn", "num_features": 8, "num_layers": 1, "cutoff": 4.0},
        "loss": {"stress": 20.0},
        "training": {"steps": 16, "batch_size": batch_size, "valid_every": 8, "checkpoint_every": 8},
        "out": str(file.parent / "run"),
    }
    results = train(settings, progress=False)
    train_set = list(read_structures(file))
    n = sum(s.stress is not None for s in train_set)
    assert n == 6
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("stress: in ")]
    assert sum(int(m.split()[2]) for m in said) == n
    assert np.isfinite(results["valid"]["stress_mae_meV_per_A3"])
    potential = load(file.parent / "run" / "potential.safetensors")
    assert evaluate_potential(potential, train_set).errors["stress"].count == 9 * n
    assert potential.uncertainty is not None


def test_energies_that_some_frames_lack(file: Path, tmp_path: Path) -> None:
    """Refused, naming the frame and the setting; with that setting learned from the others."""
    frames = mixture()
    for atoms in frames[::3]:
        del atoms.calc.results["energy"]
    ase.io.write(tmp_path / "a.extxyz", frames)
    settings: dict[str, Any] = {
        "data": {"train": str(tmp_path / "a.extxyz"), "valid_size": 4},
        "model": {"name": "leignn", "num_features": 8, "num_layers": 1, "cutoff": 4.0},
        "training": {"steps": 6, "batch_size": 4, "valid_every": 6, "checkpoint_every": 6},
        "out": str(tmp_path / "run"),
    }
    with pytest.raises(ValueError, match=r"frame \d+ has no energy, but loss.energy is above 0.*\(loss.missing: skip\)"):
        train(settings, progress=False)
    results = train({**settings, "loss": {"missing": "skip"}}, progress=False)
    assert np.isfinite(results["valid"]["energy_mae_meV_per_atom"])
    nobody = [without(s, "stress") for s in read_structures(file)]
    assert not any(s.lacks("energy") for s in nobody)
    ase.io.write(tmp_path / "b.extxyz", [s.to_ase() for s in nobody if not s.pbc.all()])
    with pytest.raises(ValueError, match="None of the 8 training frames has stress, but loss.stress is above 0"):
        train(
            {
                **settings,
                "data": {"train": str(tmp_path / "b.extxyz"), "valid_size": 4},
                "loss": {"stress": 1.0},
                "out": str(tmp_path / "b"),
            },
            progress=False,
        )


def test_fit_learns_the_stress_of_the_crystals(file: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    frames = list(read_structures(file))
    assert choose_settings(str(file), frames).loss.stress > 0
    assert "the stress is learned from 6 of the 18 frames" in caplog.text
    assert choose_settings(str(file), [s for s in frames if not s.pbc.all()]).loss.stress == 0
    broken = [without(s, "stress") if k == 0 else s for k, s in enumerate(frames)]
    assert choose_settings(str(file), broken).loss.stress == 0, "a crystal lacks it"
    assert any("1 of 18 frames have no stress" in m for m in inspect(broken).errors)
    report = inspect(frames)
    assert report.errors == []
    assert any("12 of 18 frames have no stress" in m and "learned from the others" in m for m in report.warnings)


@pytest.mark.parametrize("name", [*MODELS])
def test_every_network_learns_from_a_mixed_batch(name: str, file: Path) -> None:
    """Finite gradients where stresses are undefined: a molecule without a cell beside a crystal."""
    potential = make_potential(["Cu"], name=name).train()
    loss = LossConfig(stress=20.0)
    graph = potential.collate(list(read_structures(file))[:3])
    parameters = [p for p in potential.network.parameters() if p.requires_grad]
    counts = torch.tensor(list(loss_counts(graph, loss).values())).double()
    found = gradients(potential(graph, stress=True), graph, counts, loss, None, parameters)
    assert torch.isfinite(found.loss)
    assert all(torch.isfinite(g).all() for g in found.gradients if g is not None)


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_are_read_and_multiply(file: Path, tmp_path: Path) -> None:
    labels = LabelConfig(weight="config_weight", group="config_type")
    frames = list(read_structures(file, labels))
    assert [s.weight for s in frames[:6]] == [0.5, 0.5, 0.5, 1.5, 1.5, 1.5]
    assert inspect(frames).facts["weights"] == "0.5 to 5.5, of 0 frames zero"
    assert not any("weight of their own" in m for m in inspect(frames).warnings)
    assert any("--weight NAME" in m for m in inspect(list(read_structures(file))).warnings)
    assert digest(frames) != digest([replace(s, weight=1.0) for s in frames])
    loss = LossConfig(kind="mse", stress=1.0, group_weights={"surface": 3.0, "molecule": 0.0})
    weights = frame_weights(frames, loss)
    assert weights is not None
    raw = np.array([s.weight * {"bulk": 1.0, "surface": 3.0, "molecule": 0.0}[s.group or ""] for s in frames])
    np.testing.assert_allclose(weights, raw / raw.mean())
    potential = make_potential(["Cu"]).train()
    chosen = [0, 1, 2, 4]
    (graph,) = Loader(potential, frames, weights=weights).graphs([chosen])
    found = loss_sums(potential(graph, stress=True), graph, loss)
    for name in loss.weights():
        parts = []
        for k in chosen:
            one = potential.collate([frames[k]]).with_places(loss.needed())
            parts.append(weights[k] * float(loss_sums(potential(one, stress=True), one, loss)[name].detach()))
        assert float(found[name].detach()) == pytest.approx(sum(parts), rel=1e-9)
    assert loss_counts(graph, loss)["energy"] == 4
    assert frame_weights(frames[:3], LossConfig()) is None, "all alike"


def test_weights_that_make_no_sense(file: Path, tmp_path: Path) -> None:
    frames = list(read_structures(file, LabelConfig(group="config_type")))
    with pytest.raises(ValueError, match=r"names slab, of which no training frame is. Their groups are bulk, molecule, surface"):
        frame_weights(frames, LossConfig(group_weights={"slab": 2.0}))
    with pytest.raises(ValueError, match="Their groups are not known"):
        frame_weights(list(read_structures(file)), LossConfig(group_weights={"bulk": 2.0}))
    with pytest.raises(ValueError, match="weight 0"):
        frame_weights([replace(s, weight=0.0) for s in frames], LossConfig())
    with pytest.raises(ValueError, match=r"frame 0: no entry 'wheight' \(data.labels.weight\)"):
        list(read_structures(file, LabelConfig(weight="wheight")))
    for value in (-1.0, "much"):
        ase.io.write(tmp_path / "b.extxyz", labelled(bulk("Cu"), 0, w=value))
        with pytest.raises(ValueError, match="expected a number from 0 on"):
            list(read_structures(tmp_path / "b.extxyz", LabelConfig(weight="w")))


def test_frames_of_weight_zero_teach_nothing(file: Path, tmp_path: Path) -> None:
    """Wrong energies of frames that count nothing change no bit; a run with weights resumes to the same ones."""
    frames = mixture()
    found = []
    for name, wrong in (("right", 0.0), ("wrong", 5.0), ("resumed", 0.0)):
        for atoms in frames:
            if atoms.info["config_type"] == "molecule":
                atoms.calc.results["energy"] += wrong
        ase.io.write(tmp_path / f"{name}.extxyz", frames[:15])
        ase.io.write(tmp_path / "valid.extxyz", frames[15:])
        settings: dict[str, Any] = {
            "data": {"train": str(tmp_path / f"{name}.extxyz"), "valid": str(tmp_path / "valid.extxyz"), "reference_energies": {"Cu": -0.5},
                     "labels": {"group": "config_type"}},
            "model": {"name": "leignn", "num_features": 8, "num_layers": 1, "cutoff": 4.0},
            "loss": {"stress": 20.0, "group_weights": {"molecule": 0.0, "surface": 2.0}},
            "training": {"steps": 8, "batch_size": 4, "valid_every": 4, "checkpoint_every": 4, "uncertainty": False},
            "out": str(tmp_path / name),
        }  # fmt: skip
        train(settings, progress=False)
        for atoms in frames:
            if atoms.info["config_type"] == "molecule":
                atoms.calc.results["energy"] -= wrong
        found.append(load(tmp_path / name / "potential.safetensors"))
    for a, b in zip(found[0].network.parameters(), found[1].network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert load_config(tmp_path / "right" / "config.yaml").loss.group_weights == {"molecule": 0.0, "surface": 2.0}


def test_stores_keep_weights(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        main(["data", "convert", str(file), "--out", str(tmp_path / "a.store"), "--weight", "config_weight", "--group", "config_type"]) == 0
    )
    kept = Store(tmp_path / "a.store")
    assert [s.weight for s in kept] == [s.weight for s in read_structures(file, LabelConfig(weight="config_weight"))]
    assert main(["data", "convert", str(tmp_path / "a.store"), "--out", str(tmp_path / "a.extxyz")]) == 0
    back = list(read_structures(tmp_path / "a.extxyz", LabelConfig(weight="weight", group="group")))
    assert [(s.weight, s.group) for s in back] == [(s.weight, s.group) for s in kept]
    with pytest.raises(ValueError, match="would change nothing"):
        list(read_structures(tmp_path / "a.store", {"weight": "config_weight"}))
    with monkeypatch.context() as older:  # as stores were before there were weights
        older.setattr(store, "FORMAT", 2)
        older.delitem(store.PER_FRAME, "weight")
        write_store(read_structures(file), tmp_path / "b.store")
    assert not (tmp_path / "b.store" / "weight.bin").exists()
    assert [s.weight for s in Store(tmp_path / "b.store")] == [1.0] * 18
    assert collate(list(Store(tmp_path / "b.store"))[:2], 4.0).weights is None


@pytest.mark.thorough
def test_compiled_steps_of_mixed_batches_are_the_plain_ones(file: Path, tmp_path: Path) -> None:
    """In processes of their own, where shapes are not checked: the same steps, in float64."""
    found = []
    for name in ("plain", "compiled"):
        settings = {
            "data": {"train": str(file), "valid_size": 6},
            "model": {"name": "leignn", "num_features": 8, "num_layers": 1, "cutoff": 4.0},
            "loss": {"stress": 20.0},
            "training": {
                "steps": 8,
                "batch_size": 4,
                "valid_every": 8,
                "dtype": "float64",
                "kernels": False,
                "compile": name == "compiled",
            },
            "out": str(tmp_path / name),
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(settings))
        environment = {**os.environ, "GOSSAMER_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "gossamer", "train", str(tmp_path / f"{name}.yaml")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["compiled"] is (name == "compiled"), done.stderr
        found.append(results["valid"])
    for key in ("forces_mae_meV_per_A", "stress_mae_meV_per_A3", "energy_mae_meV_per_atom"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-6)
