"""Predictions into a file: the calculator's numbers, frame by frame, and nothing lost of what the frames said."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from conftest import make_potential
from small_formats import write_mptrj
from test_electrostatics import with_charges
from test_uncertainty import measured

import gossamer
from gossamer.cli import main
from gossamer.data.readers import read_structures
from gossamer.data.store import write_store
from gossamer.potential_file import save
from gossamer.simulation.calculator import Calculator


@pytest.fixture
def frames() -> list[Atoms]:
    """A labelled crystal with a fixed atom, a molecule, a larger crystal, a slab."""
    crystal, large, slab = bulk("Si", cubic=True), bulk("Si", cubic=True).repeat((2, 1, 1)), bulk("Si", cubic=True)
    for k, atoms in enumerate((crystal, large, slab)):
        atoms.rattle(0.1, seed=k)
    slab.pbc = [True, True, False]
    crystal.set_constraint(FixAtoms([0]))
    crystal.info |= {"origin": "somewhere", "magnetised": True}
    crystal.calc = SinglePointCalculator(crystal, energy=-3.0, forces=np.arange(24.0).reshape(8, 3), stress=np.arange(6.0))
    return [crystal, molecule("H2O"), large, slab]


@pytest.mark.parametrize("batch_atoms", [1, 12, 2048])
def test_what_is_written_is_what_the_calculator_says(frames: list[Atoms], tmp_path: Path, batch_atoms: int) -> None:
    """For batches of one, some and all, across files."""
    potential = make_potential(["H", "O", "Si"], name="painn")
    ase.io.write(tmp_path / "a.extxyz", frames[:1])
    ase.io.write(tmp_path / "b.traj", frames[1:])
    answer = gossamer.predict(
        potential, [tmp_path / "a.extxyz", tmp_path / "b.traj"], tmp_path / "p.extxyz", batch_atoms=batch_atoms, progress=False
    )
    assert (answer["frames"], answer["atoms"]) == (4, 35)
    assert "most_uncertain_frame" not in answer
    found = ase.io.read(tmp_path / "p.extxyz", ":")
    calculator = Calculator(potential)
    for frame, atoms in zip(found, frames, strict=True):
        alone = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, calculator=calculator)
        assert frame.get_potential_energy() == pytest.approx(alone.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(frame.get_forces(apply_constraint=False), alone.get_forces(), atol=2e-6)  # fixed atoms too
        assert frame.symbols.get_chemical_formula() == atoms.symbols.get_chemical_formula()
        if atoms.pbc.all():
            np.testing.assert_allclose(frame.get_stress(), alone.get_stress(), atol=1e-6)
        else:
            assert "stress" not in frame.calc.results


def test_what_a_frame_said_is_kept(frames: list[Atoms], tmp_path: Path) -> None:
    """As references, also when the file that was written is predicted again by another potential."""
    ase.io.write(tmp_path / "a.extxyz", frames)
    gossamer.predict(make_potential(["H", "O", "Si"], name="painn"), tmp_path / "a.extxyz", tmp_path / "p.extxyz", progress=False)
    gossamer.predict(make_potential(["H", "O", "Si"], name="schnet"), tmp_path / "p.extxyz", tmp_path / "q.extxyz", progress=False)
    first, second = (ase.io.read(tmp_path / f"{name}.extxyz", 0) for name in "pq")
    assert first.get_potential_energy() != second.get_potential_energy()
    for frame in (first, second):
        assert (frame.info["reference_energy"], frame.info["origin"], frame.info["magnetised"]) == (-3.0, "somewhere", True)
        np.testing.assert_array_equal(frame.arrays["reference_forces"], np.arange(24.0).reshape(8, 3))
        np.testing.assert_array_equal(frame.info["reference_stress"], np.arange(6.0))
        assert [c.index.tolist() for c in frame.constraints] == [[0]]


def test_uncertainties_features_and_charges(frames: list[Atoms], tmp_path: Path) -> None:
    potential = measured()
    atoms = molecule("CH3CH2OH")
    other = atoms.copy()
    other.rattle(0.3, seed=3)
    ase.io.write(tmp_path / "a.extxyz", [atoms, other, atoms])
    answer = gossamer.predict(potential, tmp_path / "a.extxyz", tmp_path / "p.extxyz", features=True, progress=False)
    found = ase.io.read(tmp_path / "p.extxyz", ":")
    calculator = Calculator(potential)
    other.calc = calculator
    calculator.calculate(other, ["energy", "energy_uncertainty", "forces_uncertainty"])
    assert found[1].info["energy_uncertainty"] == pytest.approx(calculator.results["energy_uncertainty"], rel=1e-5)
    np.testing.assert_allclose(found[1].arrays["forces_uncertainty"], calculator.results["forces_uncertainty"], rtol=1e-5, atol=1e-7)
    assert answer["most_uncertain_frame"] == 1
    assert answer["forces_uncertainty_eV_per_A"] == pytest.approx(found[1].arrays["forces_uncertainty"].max(), rel=1e-6)
    turned = atoms.copy()
    turned.rotate(40, (1, 2, 3))
    ase.io.write(tmp_path / "turned.extxyz", turned)
    gossamer.predict(potential, tmp_path / "turned.extxyz", tmp_path / "t.extxyz", features=True, progress=False)
    features = found[0].arrays["features"]
    assert features.shape[0] == 9
    assert np.ptp(features, axis=0).max() > 0.01
    np.testing.assert_allclose(ase.io.read(tmp_path / "t.extxyz").arrays["features"], features, atol=2e-4)
    charged = with_charges()
    gossamer.predict(charged, tmp_path / "a.extxyz", tmp_path / "c.extxyz", progress=False)
    atoms.calc = Calculator(charged)
    atoms.get_potential_energy()
    np.testing.assert_allclose(ase.io.read(tmp_path / "c.extxyz", 0).calc.results["charges"], atoms.calc.results["charges"], atol=1e-6)


def test_what_cannot_be_done_is_refused_and_leaves_nothing(frames: list[Atoms], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(make_potential(["H", "O", "Si"], name="painn"), tmp_path / "p.safetensors")
    ase.io.write(tmp_path / "a.extxyz", [*frames, bulk("Cu")])
    model, structures = str(tmp_path / "p.safetensors"), str(tmp_path / "a.extxyz")
    before = (tmp_path / "a.extxyz").read_bytes()
    for out, structure, words in (
        ("p.extxyz", structures, ("a.extxyz', frame 4", "Cu")),
        ("a.extxyz", structures, ("is read, and would be written over",)),
        ("p.traj", structures, ("extended XYZ",)),
        ("p.extxyz", str(tmp_path / "none.cif"), ("none.cif",)),
    ):
        assert main(["predict", model, structure, "--out", str(tmp_path / out), "--batch-atoms", "8"]) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
    assert (tmp_path / "a.extxyz").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.extxyz", "p.safetensors"]
    ase.io.write(tmp_path / "a.extxyz", frames)
    assert main(["predict", model, structures, "--out", str(tmp_path / "p.extxyz"), "--dtype", "float64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == len(ase.io.read(tmp_path / "p.extxyz", ":")) == 4


def test_entries_called_like_predictions_are_references(tmp_path: Path) -> None:
    """Of Atoms that somebody gave an energy without a calculator; extended XYZ cannot hold both under one name."""
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.1, seed=0)
    atoms.info["energy"] = -3.0
    ase.io.write(tmp_path / "a.traj", atoms)
    gossamer.predict(make_potential(["Si"], name="painn"), tmp_path / "a.traj", tmp_path / "p.extxyz", progress=False)
    found = ase.io.read(tmp_path / "p.extxyz")
    assert found.info["reference_energy"] == -3.0
    assert found.get_potential_energy() != -3.0


def test_errors_of_labels_that_some_frames_lack(frames: list[Atoms], caplog: pytest.LogCaptureFixture) -> None:
    """How many frames each error is of is said, and what reading remarks on them."""
    frames[0].info["free_energy"] = -4.0
    evaluation = gossamer.evaluate(make_potential(["H", "O", "Si"], name="painn"), [frames[0], frames[0], frames[1]])
    assert evaluation.notes == [
        f"errors of {label} are of 2 of 3 frames: the others have no {label}" for label in ("energy", "forces", "stress")
    ]
    assert "2 of 3 frames have a free_energy more than 1 meV/atom from the energy" in caplog.text


def test_data_that_ase_does_not_read(tmp_path: Path) -> None:
    """Stores, folders, npz in the layout of MD17, MPtrj's JSON: their labels are references, in our units."""
    rng = np.random.default_rng(0)
    water = molecule("H2O")
    positions = water.positions + rng.normal(scale=0.05, size=(2, 3, 3))
    np.savez(tmp_path / "md.npz", z=water.numbers, R=positions, E=np.array([1.0, np.nan]), F=np.ones((2, 3, 3)))
    write_mptrj(tmp_path / "m.json", 2)
    write_store(read_structures(tmp_path / "m.json"), tmp_path / "m.store")
    (tmp_path / "folder").mkdir()
    ase.io.write(tmp_path / "folder" / "a.extxyz", water)
    paths = [tmp_path / name for name in ("md.npz", "m.json", "m.store", "folder")]
    potential = make_potential(["H", "O", "Cu", "Au"], name="painn")
    assert gossamer.predict(potential, paths, tmp_path / "p.extxyz", progress=False)["frames"] == 7
    found = ase.io.read(tmp_path / "p.extxyz", ":")
    np.testing.assert_allclose([a.positions for a in found[:2]], positions, atol=1e-7)
    assert found[0].info["reference_energy"] == pytest.approx(units.kcal / units.mol)
    np.testing.assert_allclose(found[1].arrays["reference_forces"], units.kcal / units.mol, rtol=1e-6)
    assert "reference_energy" not in found[1].info  # which is not finite
    assert [a.info["reference_energy"] for a in found[2:4]] == [a.info["reference_energy"] for a in found[4:6]]
    assert found[2].get_potential_energy() == pytest.approx(found[4].get_potential_energy(), abs=1e-6)
