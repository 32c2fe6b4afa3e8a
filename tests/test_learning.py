"""Active learning: it labels what the potential does not know, once, and goes on where it was cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import SumCalculator
from ase.io import read, write
from conftest import make_potential

from gossamer import learning
from gossamer.calibration import measure_uncertainty
from gossamer.checks.source import CalculatorInMemory
from gossamer.data.readers import read_structures
from gossamer.files import InputError
from gossamer.learning import farthest, learn
from gossamer.potential_file import load, read_manifest, save


class Counting(EMT):
    """EMT that counts, fails on the frame it is told to, and may be cut off."""

    calls = 0
    fails_at: int | None = None
    cut_at: int | None = None
    nan_at: int | None = None
    electrons: ClassVar[set[tuple[Any, ...]]] = set()
    """charges, magnetic moments, charge and spin that it was asked for"""

    def calculate(self, *arguments: Any, **keywords: Any) -> None:
        if Counting.calls == Counting.cut_at:
            raise KeyboardInterrupt
        Counting.calls += 1
        if Counting.calls - 1 == Counting.fails_at:
            raise RuntimeError("no convergence")
        super().calculate(*arguments, **keywords)
        atoms = self.atoms
        sums = float(atoms.get_initial_charges().sum()), float(atoms.get_initial_magnetic_moments().sum())
        Counting.electrons.add((*sums, atoms.info.get("charge"), atoms.info.get("spin")))
        if Counting.calls - 1 == Counting.nan_at:
            self.results["forces"][0, 0] = np.nan


def copper(size: float, seed: int) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(size, seed=seed)
    atoms.calc = EMT()
    atoms.get_potential_energy()
    atoms.get_stress()
    return atoms


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A random potential that was measured, its frames, and options of a short loop."""
    for name, value in (("calls", 0), ("fails_at", None), ("cut_at", None), ("nan_at", None), ("electrons", set())):
        monkeypatch.setattr(Counting, name, value)
    potential = make_potential(["Cu"], cutoff=3.5)
    write(tmp_path / "old.extxyz", [copper(0.05, k) for k in range(8)])
    frames = list(read_structures(tmp_path / "old.extxyz"))
    measure_uncertainty(potential, frames[:5], frames[5:])
    potential.statistics = replace(potential.statistics, functional="pbe", dispersion="none")
    save(potential, tmp_path / "start.safetensors")
    limit = 0.3 * potential.uncertainty.record["forces_rmse_eV_per_A"]
    return dict(
        start=tmp_path / "start.safetensors", structures=[copper(0.02, 99)], label="test_learning:Counting", data=tmp_path / "old.extxyz",
        out=tmp_path / "learn", rounds=1, frames=4, temperatures=[300.0], steps=60, spacing=2.0, max_uncertainty=limit, train_steps=4,
    )  # fmt: skip


def test_a_loop_and_the_same_again(start: dict[str, Any]) -> None:
    """New frames are labelled by the calculator, as ions and magnets if they are some, and trained on beside the old ones; the same command
    again does nothing."""
    walker = start["structures"][0]
    walker.set_initial_charges([1, 0, 0, 0])
    walker.set_initial_magnetic_moments([2, 0, 0, 0])
    walker.info |= {"charge": 1, "spin": 3}
    answer = learn(**start)
    folder = start["out"] / "round-01"
    labelled = read(folder / "labelled.extxyz", ":")
    assert (answer["n_labelled"], answer["rounds"], answer["held"]) == (4, 1, False)
    assert len(labelled) == 4
    assert Counting.electrons == {(1.0, 2.0, 1, 3)}
    for atoms in labelled:
        expected = atoms.copy()
        expected.calc = EMT()
        np.testing.assert_allclose(atoms.get_forces(), expected.get_forces(), atol=1e-6)
    assert len(read(folder / "train.extxyz", ":")) + len(read(folder / "valid.extxyz", ":")) == 12
    assert load(start["out"] / "potential.safetensors").uncertainty is not None
    assert (start["out"] / "report.html").exists()
    calls = Counting.calls
    assert learn(**start) == answer
    with pytest.raises(InputError, match=r"begun with other settings: steps 60 \(now 70\)"):
        learn(**start | {"steps": 70})
    tuned = read_manifest(start["out"] / "potential.safetensors")["statistics"]
    assert (tuned["functional"], tuned["dispersion"]) == ("pbe", "none")  # labels are of the start's method
    with pytest.raises(InputError, match="begun with other settings: atoms"):
        learn(**start | {"structures": [copper(0.02, 98)]})
    write(start["data"], [copper(0.05, k) for k in range(9)])
    with pytest.raises(InputError, match="begun with other settings: contents"):
        learn(**start)
    assert Counting.calls == calls


class Bare(Counting):
    """Without parameters, as calculators of other potentials are."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.parameters.clear()
        self.scale = scale

    def calculate(self, *arguments: Any, **keywords: Any) -> None:
        self.parameters["asap_cutoff"] = False
        super().calculate(*arguments, **keywords)
        self.parameters.clear()
        self.results["energy"] *= self.scale


def test_a_calculator_with_other_settings_is_another(start: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its labels would be mixed with those of the first."""
    monkeypatch.setattr(learning, "_round", lambda *arguments: {"round": 1, "n_labelled": 0, "held": True, "limit_eV_per_A": 1.0})
    monkeypatch.setattr(learning, "_report", lambda *arguments: None)
    answer = learn(**start | {"label": EMT()})
    assert learn(**start | {"label": EMT()}) == answer
    with pytest.raises(InputError, match=r"label_settings \{'asap_cutoff': 'False'\} \(now \{'asap_cutoff': 'True'\}\)"):
        learn(**start | {"label": EMT(asap_cutoff=True)})
    with pytest.raises(InputError, match="begun with other settings: label "):
        learn(**start | {"label": Bare()})
    start["out"] = start["out"].with_name("bare")
    learn(**start | {"label": Bare()})
    learn(**start | {"label": Bare()})
    with pytest.raises(InputError, match="begun with other settings: label_energies"):
        learn(**start | {"label": Bare(scale=1.1)})
    summed = CalculatorInMemory(SumCalculator([EMT(), LennardJones(sigma=2.0)])).settings()
    assert summed["LennardJones-2 sigma"] == "2.0"


@pytest.mark.thorough
def test_cut_while_labelling_nothing_is_labelled_twice(start: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "cut_at", 2)
    with pytest.raises(KeyboardInterrupt):
        learn(**start)
    first = read(start["out"] / "round-01" / "labelled.extxyz", ":")
    monkeypatch.setattr(Counting, "cut_at", None)
    learn(**start)
    labelled = read(start["out"] / "round-01" / "labelled.extxyz", ":")
    assert len(first) == 2
    assert sorted(a.info["candidate"] for a in labelled) == [0, 1, 2, 3]
    assert all((a.positions == b.positions).all() for a, b in zip(first, labelled, strict=False))
    assert Counting.calls == 4


@pytest.mark.thorough
def test_frames_that_cannot_be_labelled_are_left_out(start: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "fails_at", 1)
    monkeypatch.setattr(Counting, "nan_at", 2)
    for _ in range(2):
        assert learn(**start)["n_labelled"] == 2
    failed = json.loads((start["out"] / "round-01" / "failed.json").read_text())
    assert "no convergence" in failed["1"]
    assert failed["2"] == "ValueError: forces of the calculator are not finite"
    assert len(read(start["out"] / "round-01" / "labelled.extxyz", ":")) == 2


@pytest.mark.thorough
def test_hard_frames_found_do_not_make_later_rounds_content(start: dict[str, Any]) -> None:
    """Validation errors grow with the frames that are found, the limit of uncertainty does not."""
    potential = load(start["start"])
    potential.uncertainty.record["forces_rmse_eV_per_A"] *= 0.05  # a start that was easy to validate
    save(potential, start["start"])
    answer = learn(**start | {"max_uncertainty": None, "rounds": 2})
    first, second = json.loads((start["out"] / "learning.json").read_text())
    record = load(start["out"] / "round-01" / "fit" / "potential.safetensors").uncertainty.record
    assert answer["rounds"] == 2
    assert 3 * record["forces_rmse_eV_per_A"] > first["limit_eV_per_A"] == second["limit_eV_per_A"]


@pytest.mark.thorough
def test_where_the_potential_knows_it_asks_for_nothing(start: dict[str, Any]) -> None:
    answer = learn(**start | {"max_uncertainty": 1e3})
    assert (answer["held"], answer["n_labelled"], Counting.calls) == (True, 0, 0)
    assert (start["out"] / "potential.safetensors").read_bytes() == start["start"].read_bytes()


def test_without_an_uncertainty_it_says_so(start: dict[str, Any], tmp_path: Path) -> None:
    save(make_potential(["Cu"], cutoff=3.5), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="gossamer calibrate"):
        learn(**start | {"start": tmp_path / "plain.safetensors"})


def test_one_label_cannot_train_and_validate(start: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Raise frames, or give data"):
        learn(**start | {"frames": 1, "data": None})
    assert Counting.calls == 0


def test_farthest_points() -> None:
    points = np.array([[0.0], [0.1], [5.0], [5.0], [2.0]])
    assert farthest(points, 0, 3) == [0, 2, 4]
    assert farthest(points, 0, 10) == [0, 2, 4, 1]


@pytest.mark.thorough
def test_a_cut_training_goes_on_as_it_began(start: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has compiled meanwhile, and from another device."""
    answer = learn(**start)
    (start["out"] / "round-01" / "round.json").unlink()  # killed after its last step
    monkeypatch.setattr("gossamer.fitting.compile_pays", lambda *_: True)
    monkeypatch.setattr("gossamer.learning.load", lambda path, device: load(path))
    assert learn(**start, device="auto") == answer
