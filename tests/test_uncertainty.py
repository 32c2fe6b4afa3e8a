"""Uncertainties: what they must do by themselves, how they are measured, kept and asked for."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.io import read, write
from conftest import MODELS, make_potential

from gossamer.calibration import honesty, measure_uncertainty, plot_honesty, sample
from gossamer.checks.errors import predict
from gossamer.cli import main
from gossamer.data.structure import Structure, as_structure
from gossamer.engine.engine import Engine
from gossamer.evaluation import evaluate_potential
from gossamer.potential import Potential
from gossamer.potential_file import load, read_manifest, save
from gossamer.run_frames import Frames
from gossamer.runs import add_uncertainty
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.md import md

NETWORKS = ["sound", "nequip", "geodite", "mace", "painn", "schnet", "sevennet", "weft"]


def walk(n: int, size: float, seed: int = 0) -> list[Atoms]:
    """Ethanol with its atoms displaced."""
    frames = []
    for k in range(n):
        atoms = molecule("CH3CH2OH")
        atoms.rattle(size, seed=1000 * seed + k)
        frames.append(atoms)
    return frames


def labelled(potential: Potential, frames: list[Atoms], error: float = 0.1) -> list[Structure]:
    """Frames with labels that the potential misses, the more the farther a frame is from the molecule at rest."""
    rng = np.random.default_rng(0)
    found = []
    for atoms, answer in zip(frames, potential.predict(frames), strict=True):
        size = error * np.linalg.norm(atoms.positions - molecule("CH3CH2OH").positions, axis=1)[:, None]
        forces = answer["forces"] + rng.normal(size=(len(atoms), 3)) * size
        s = as_structure(atoms)
        energy = answer["energy"] + error * rng.normal()
        found.append(
            Structure(atomic_numbers=s.atomic_numbers, positions=s.positions, cell=s.cell, pbc=s.pbc, energy=energy, forces=forces)
        )
    return found


def measured(name: str = "sound", dtype: torch.dtype = torch.float64) -> Potential:
    """A tiny potential that knows how wrong it may be."""
    potential = make_potential(["H", "C", "O"], dtype=dtype, zbl=False, **MODELS[name])
    measure_uncertainty(potential, labelled(potential, walk(30, 0.04)), labelled(potential, walk(15, 0.04, seed=1)))
    return potential


@pytest.mark.parametrize("name", MODELS)
def test_energies_are_linear_in_the_last_features(name: str) -> None:
    """Up to a constant of the element: a least-squares fit on many atoms leaves nothing."""
    potential = make_potential(["H", "C", "O"], zbl=False, **MODELS[name])
    potential.network.repulsion = None  # of MACE and Geodite, beside the readout
    graph = potential.collate([as_structure(a) for a in walk(12, 0.15)])
    species = potential.species_of[graph.atomic_numbers]
    out = potential.network(species, graph.edge_index, graph.edge_vectors(), graph.graph_index, graph.n_graphs)
    columns = torch.cat([out.features, torch.nn.functional.one_hot(species, 3)], dim=1).to(torch.float64)
    assert len(columns) > 2 * columns.shape[1]
    energies = out.node_energies.detach()[:, None]
    fitted = columns.detach() @ torch.linalg.lstsq(columns.detach(), energies, driver="gelsd").solution
    assert float((fitted - energies).abs().max()) < 1e-7 * float(energies.std())


@pytest.mark.parametrize("name", NETWORKS)
def test_moving_turning_and_renumbering_change_nothing(name: str) -> None:
    potential = measured(name)
    atoms = walk(1, 0.1, seed=2)[0]
    moved = atoms.copy()
    moved.rotate(37, (1, 2, 3))
    moved.positions += [1.0, -2.0, 3.0]
    order = np.random.default_rng(0).permutation(len(atoms))
    one, other = potential.predict([atoms, moved[order]], uncertainty=True)
    assert other["energy_uncertainty"] == pytest.approx(one["energy_uncertainty"], rel=1e-7)
    np.testing.assert_allclose(other["forces_uncertainty"], one["forces_uncertainty"][order], rtol=1e-7)


@pytest.mark.parametrize("name", ["sound", "nequip"])
def test_two_far_copies(name: str) -> None:
    """They are wrong in the same way: the energy's uncertainty doubles, those of the atoms stay."""
    potential = measured(name)
    atoms = walk(1, 0.1, seed=2)[0]
    other = atoms.copy()
    other.positions += 50.0
    one, two = potential.predict([atoms, atoms + other], uncertainty=True)
    assert two["energy_uncertainty"] == pytest.approx(2 * one["energy_uncertainty"], rel=1e-7)
    np.testing.assert_allclose(two["forces_uncertainty"], np.tile(one["forces_uncertainty"], 2), rtol=1e-7)


@pytest.mark.parametrize("name", NETWORKS)
def test_grows_outside_the_training_data(name: str) -> None:
    potential = measured(name)
    inside, outside = (potential.predict(walk(10, size, seed=3), uncertainty=True) for size in (0.04, 0.12))
    for key in ("energy_uncertainty", "forces_uncertainty"):
        assert np.mean([a[key] for a in outside]) > 1.3 * np.mean([a[key] for a in inside])


def test_smooth() -> None:
    """Second differences along a path fall with the square of the step."""
    potential = measured("sound")
    atoms = walk(1, 0.1, seed=2)[0]
    direction = np.random.default_rng(1).normal(size=(len(atoms), 3))

    def values(step: float) -> np.ndarray:
        frames = [Atoms(atoms.numbers, atoms.positions + k * step * direction) for k in (-1, 0, 1)]
        out = potential.predict(frames, uncertainty=True)
        return np.array([[a["energy_uncertainty"], *a["forces_uncertainty"]] for a in out])

    coarse, fine = (np.abs(np.diff(values(step), 2, axis=0)).max() for step in (2e-3, 1e-3))
    assert fine == pytest.approx(coarse / 4, rel=0.02)


def test_precisions_agree(tmp_path: Path) -> None:
    """A file read in float32 and float64 gives the same, and so does what was written."""
    potential = measured("sound", torch.float32)
    path = tmp_path / "potential.safetensors"
    save(potential, path)
    frames = walk(5, 0.1, seed=2)
    expected = potential.predict(frames, uncertainty=True)
    for dtype, tolerance in (("float32", 1e-12), ("float64", 1e-3)):
        for a, b in zip(load(path, dtype=dtype).predict(frames, uncertainty=True), expected, strict=True):
            assert a["energy_uncertainty"] == pytest.approx(b["energy_uncertainty"], rel=tolerance)
            np.testing.assert_allclose(a["forces_uncertainty"], b["forces_uncertainty"], rtol=tolerance)


def test_a_change_of_precision_leaves_the_tables() -> None:
    potential = measured("sound", torch.float32)
    frames = walk(2, 0.1, seed=2)
    expected = potential.predict(frames, uncertainty=True)
    for a, b in zip(potential.double().float().predict(frames, uncertainty=True), expected, strict=True):
        assert a["energy_uncertainty"] == b["energy_uncertainty"]
        assert np.array_equal(a["forces_uncertainty"], b["forces_uncertainty"])


@pytest.mark.parametrize("name", ["sound", "nequip", "geodite", "mace", "weft"])
def test_kernels_agree(name: str, kernels: Path) -> None:
    potential = measured(name)
    frames = walk(3, 0.1, seed=2)
    plain, quick = (potential.predict(frames, run=run, uncertainty=True) for run in (None, Engine(potential, "kernels")))
    for a, b in zip(plain, quick, strict=True):
        assert b["energy_uncertainty"] == pytest.approx(a["energy_uncertainty"], rel=1e-5)
        np.testing.assert_allclose(b["forces_uncertainty"], a["forces_uncertainty"], rtol=1e-5)


def test_calibrated_where_it_was_measured() -> None:
    """Errors are as large as expected, on all atoms and on those of each element; larger errors where more is expected."""
    potential = make_potential(["H", "C", "O"], zbl=False)
    train, valid = labelled(potential, walk(40, 0.04)), labelled(potential, walk(20, 0.02, seed=1) + walk(20, 0.06, seed=2))
    measure_uncertainty(potential, train, valid)
    evaluation = evaluate_potential(potential, valid)
    worth = evaluation.summary()["uncertainty"]
    assert worth["energy"]["ratio"] == pytest.approx(1.0, rel=1e-6)
    assert worth["forces"]["ratio"] == pytest.approx(1.0, rel=0.02)
    assert worth["forces"]["rank"] > 0.2
    assert {"energy_uncertainty", "forces_uncertainty"} <= set(evaluation.frames[0])


def test_isolated_atoms_say_nothing_of_errors() -> None:
    """Far from all that was trained on, and right by construction: they would make every other expectation too small."""
    potential = make_potential(["H", "C", "O"], zbl=False)
    train, valid = labelled(potential, walk(20, 0.04)), labelled(potential, walk(10, 0.04, seed=1))
    lone = Structure(
        atomic_numbers=np.array([8]),
        positions=np.zeros((1, 3)),
        energy=potential.statistics.reference_energies["O"],
        forces=np.zeros((1, 3)),
    )
    measure_uncertainty(potential, train, valid)
    expected = evaluate_potential(potential, valid).honesty()
    measure_uncertainty(potential, train, [*valid, lone])
    assert evaluate_potential(potential, [lone, *valid]).honesty() == expected


def test_one_measured_quantity_is_enough() -> None:
    """Without labels of forces there is an uncertainty of energies alone."""
    potential = make_potential(["H", "C", "O"], zbl=False)
    train = labelled(potential, walk(10, 0.04))
    energies = [Structure(atomic_numbers=s.atomic_numbers, positions=s.positions, cell=s.cell, pbc=s.pbc, energy=s.energy) for s in train]
    measure_uncertainty(potential, train, energies)
    assert potential.uncertainty is not None
    assert potential.uncertainty.known == ("energy",)
    assert "forces_uncertainty" not in potential.predict(walk(1, 0.1), uncertainty=True)[0]
    with pytest.raises(ValueError, match="found 10 and 0"):
        measure_uncertainty(potential, train, [as_structure(a) for a in walk(3, 0.1)])


def test_an_element_that_the_training_data_lacked_is_not_trusted() -> None:
    potential = make_potential(["H", "C", "O", "N"], zbl=False)
    measure_uncertainty(potential, labelled(potential, walk(10, 0.04)), labelled(potential, walk(5, 0.04, seed=1)))
    (answer,) = potential.predict(molecule("CH3CN"), uncertainty=True)
    assert np.isinf(answer["energy_uncertainty"])
    assert np.isinf(answer["forces_uncertainty"]).tolist() == [z == 7 for z in molecule("CH3CN").numbers]


def test_features_that_do_not_vary() -> None:
    """All training frames are one: whatever is elsewhere is far, and nothing is infinite or undefined."""
    potential = make_potential(["H", "C", "O"], zbl=False)
    frames = labelled(potential, walk(1, 0.04) * 3)
    measure_uncertainty(potential, frames, labelled(potential, walk(5, 0.04, seed=1)))
    (answer,) = potential.predict(walk(1, 0.1, seed=2), uncertainty=True)
    assert np.isfinite(answer["forces_uncertainty"]).all()
    assert np.isfinite(answer["energy_uncertainty"])


def test_a_sample_has_every_element() -> None:
    potential = make_potential(["H", "C", "O", "N"], zbl=False)
    frames = [*labelled(potential, walk(300, 0.04)), as_structure(molecule("CH3CN"))]
    chosen = sample(frames, 500)
    assert sum(s.n_atoms for s in chosen) < 1200
    assert any((s.atomic_numbers == 7).any() for s in chosen)


def test_calculator_gives_it_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked after an evaluation nothing is evaluated again; not asked it is not in the results."""
    potential = measured("sound")
    atoms = walk(1, 0.1, seed=2)[0]
    (expected,) = potential.predict(atoms, uncertainty=True)
    atoms.calc = calculator = Calculator(potential)
    atoms.get_forces()
    assert "forces_uncertainty" not in calculator.results
    engine = calculator.engine
    monkeypatch.setattr(calculator, "engine", None)
    np.testing.assert_allclose(calculator.get_property("forces_uncertainty", atoms), expected["forces_uncertainty"], rtol=1e-7)
    assert calculator.get_property("energy_uncertainty", atoms) == pytest.approx(expected["energy_uncertainty"], rel=1e-7)
    monkeypatch.setattr(calculator, "engine", engine)
    atoms.positions[0, 0] += 0.2
    assert not np.allclose(calculator.get_property("forces_uncertainty", atoms), expected["forces_uncertainty"])
    always = Calculator(potential, uncertainty=True)
    always.calculate(atoms)
    assert {"energy", "forces", "energy_uncertainty", "forces_uncertainty"} <= set(always.results)


def test_the_judge_asks_for_it() -> None:
    (entry,) = predict(Calculator(measured("sound")), walk(1, 0.1))
    assert entry["uncertainty"].shape == (9,)


def test_without_it_says_so() -> None:
    potential = make_potential(["H", "C", "O"], zbl=False)
    atoms = walk(1, 0.1)[0]
    with pytest.raises(PropertyNotImplementedError, match="gossamer calibrate"):
        Calculator(potential).get_property("energy_uncertainty", atoms)
    with pytest.raises(ValueError, match="gossamer calibrate"):
        Calculator(potential, uncertainty=True)
    with pytest.raises(ValueError, match="gossamer calibrate"):
        potential.predict(atoms, uncertainty=True)


def test_files_of_newer_versions_go_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "potential.safetensors"
    monkeypatch.setattr("gossamer.potential_file.UNCERTAINTY", 2)
    save(measured("sound"), path)
    monkeypatch.undo()
    assert load(path).uncertainty is None
    assert "version 2" in caplog.text


def test_calibrate_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It tells training frames from others, keeps what the file held, and refuses training frames alone."""
    from gossamer.data.fingerprint import SeenFrames

    potential = make_potential(["H", "C", "O"], zbl=False)
    train, valid = labelled(potential, walk(20, 0.04)), labelled(potential, walk(10, 0.04, seed=1))
    potential.seen = SeenFrames.of(train, [])
    path, data, new = tmp_path / "potential.safetensors", tmp_path / "train.extxyz", tmp_path / "new.extxyz"
    save(potential, path, train[:2], {"out": "somewhere"})
    write(data, [s.to_ase() for s in train])
    write(new, [s.to_ase() for s in valid])
    assert main(["calibrate", str(path), str(data)]) == 2
    assert "trained on all 20 frames" in capsys.readouterr().err
    write(tmp_path / "one.extxyz", valid[0].to_ase())
    assert main(["calibrate", str(path), str(tmp_path / "one.extxyz")]) == 2
    assert "Found 1 frame: some must say what the potential knows, others what it errs" in capsys.readouterr().err
    assert main(["calibrate", str(path), str(data), str(new), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["n_training_frames"], answer["n_validation_frames"]) == (20, 10)
    manifest = read_manifest(path)
    assert (manifest["training"], manifest["n_check"], manifest["uncertainty"]["version"]) == ({"out": "somewhere"}, 2, 1)
    again = load(path)
    assert again.seen is not None
    assert again.seen.n_train == 20
    assert main(["evaluate", str(path), str(new)]) == 0
    assert "times what was expected" in capsys.readouterr().out
    assert (tmp_path / "evaluation" / "uncertainty.png").exists()


def test_training_does_not_fail_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where nothing can be measured the potential stays as it was, and the log says why."""
    path = tmp_path / "potential.safetensors"
    save(make_potential(["H", "C", "O"], zbl=False), path)
    before = path.read_bytes()
    unlabelled = [as_structure(a) for a in walk(3, 0.1)]
    add_uncertainty(path, Frames(train=unlabelled, valid=unlabelled), torch.device("cpu"))
    assert path.read_bytes() == before
    assert "has no uncertainty: " in caplog.text


def test_honesty() -> None:
    """Errors drawn with the expected size are found to be so; twice as large ones too."""
    rng = np.random.default_rng(0)
    expected = rng.uniform(0.5, 2.0, 20_000)
    worth = honesty(2 * expected * rng.normal(size=len(expected)), expected)
    assert worth["ratio"] == pytest.approx(2.0, rel=0.03)
    assert 0.3 < worth["rank"] < 0.5
    np.testing.assert_allclose([found / e for e, found in worth["curve"]], 2.0, rtol=0.1)
    assert honesty(np.zeros(1), np.ones(1)) == {"rank": None, "ratio": None, "curve": []}


def test_nothing_of_another_structure_is_left_where_one_fails() -> None:
    """A molecule has no stress; asked for its uncertainty next, the answer is its own, not that of the structure before."""
    potential = make_potential(["H", "C", "O"])
    measure_uncertainty(potential, labelled(potential, walk(10, 0.04)), labelled(potential, walk(5, 0.04, seed=1)))
    calculator, first, second = Calculator(potential), molecule("CH3CH2OH"), molecule("H2O")
    calculator.get_property("energy_uncertainty", first)
    with pytest.raises(PropertyNotImplementedError, match="Stress needs periodicity"):
        calculator.get_property("stress", second)
    assert calculator.get_property("forces_uncertainty", second).shape == (3,)
    calculator.get_property("energy", first)
    with pytest.raises(ValueError, match="not among the potential's elements"):
        calculator.calculate(molecule("N2"))
    assert not calculator.results
    for atoms, message in ((Atoms(), "has no atoms"), (Atoms("H", cell=[1, np.nan, 1], pbc=True), "not finite")):
        with pytest.raises(ValueError, match=message):
            calculator.get_property("energy", atoms)


def test_a_calculator_leaves_the_potential_as_it_was() -> None:
    """One that is being trained goes on to be, and its weights change in both."""
    potential = make_potential(["H", "C", "O"]).train()
    calculator = Calculator(potential, way="plain")
    assert potential.training
    assert all(p.requires_grad for p in potential.parameters())
    before = calculator.get_potential_energy(molecule("H2O"))
    with torch.no_grad():
        for p in potential.parameters():
            p.mul_(1.1)
    assert Calculator(potential, way="plain").get_potential_energy(molecule("H2O")) != before


# --- dynamics --------------------------------------------------------------------------------------------------------


def run(potential: Potential, out: Path, **options) -> dict:
    """Dynamics of ethanol from rest."""
    return md(potential, molecule("CH3CH2OH"), out=out, temperature=300.0, progress=False, interval=2, way="plain", **options)


def test_dynamics_stop_where_the_potential_is_uncertain(tmp_path: Path) -> None:
    """The state is kept: with a larger limit the run goes on as if it had never been watched."""
    potential = measured("sound")
    free = run(potential, tmp_path / "free", steps=20)
    with open(tmp_path / "free" / "log.csv", newline="") as file:
        seen = [float(row["max_forces_uncertainty_eV_per_A"]) for row in csv.DictReader(file)]
    limit = sorted(seen)[-3]
    first = 2 * next(k for k, s in enumerate(seen) if s > limit)
    cut = run(potential, tmp_path / "cut", steps=20, max_uncertainty=limit)
    assert (cut["steps"], cut["broken"]) == (first, None)
    assert f"step {first} " in cut["uncertain"]
    assert "uncertain by" in cut["uncertain"]
    again = run(potential, tmp_path / "cut", steps=20, max_uncertainty=2 * max(seen), resume=True)
    assert (again["steps"], again["uncertain"]) == (20, None)
    assert (tmp_path / "cut" / "log.csv").read_bytes() == (tmp_path / "free" / "log.csv").read_bytes()
    assert free["uncertain"] is None


def test_dynamics_collect_what_the_potential_is_uncertain_of(tmp_path: Path) -> None:
    """Frames lie apart in time, hold no predictions as labels, and are dropped where a resumed run goes back."""
    potential, file = measured("sound"), tmp_path / "uncertain.extxyz"
    options = dict(max_uncertainty=1e-6, collect=file, collect_spacing=4.0)
    answer = run(potential, tmp_path / "run", steps=20, **options)
    frames = read(file, ":")
    assert [f.info["step"] for f in frames] == [0, 8, 16]
    assert (answer["collected"], answer["steps"], answer["uncertain"]) == (3, 20, None)
    assert all(f.calc is None and len(f.arrays["forces_uncertainty"]) == len(f) for f in frames)
    with pytest.raises(FileExistsError, match="--collect"):
        run(potential, tmp_path / "other", steps=20, **options)
    frames[-1].info["step"] = 1000
    write(file, frames)
    run(potential, tmp_path / "run", steps=24, resume=True, **options)
    assert [f.info["step"] for f in read(file, ":")] == [0, 8, 22]
    write(file, [f.copy() for f in frames])
    foreign = [f for f in read(file, ":") if f.info.pop("step") >= 0]
    write(file, foreign)
    with pytest.raises(ValueError, match="frames that no simulation collected"):
        run(potential, tmp_path / "run", steps=28, resume=True, **options)


def test_dynamics_need_a_potential_that_knows(tmp_path: Path) -> None:
    potential = make_potential(["H", "C", "O"], zbl=False)
    with pytest.raises(ValueError, match="gossamer calibrate"):
        run(potential, tmp_path / "a", steps=4, max_uncertainty=0.1)
    with pytest.raises(ValueError, match="give both"):
        run(potential, tmp_path / "b", steps=4, collect=tmp_path / "c.extxyz")


def test_the_picture_of_honesty_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Axes end where the errors do; before, they all began at 1e-6, and the points lay in a corner."""
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: seen.append(figure) or Path(path).touch())
    plot_honesty({"forces": {"curve": [(0.01, 0.012), (0.04, 0.03)]}, "energy": {"curve": [(0.0, 0.0)]}}, tmp_path / "p.png")
    forces = seen[0].axes[0]
    assert forces.get_xlim() == forces.get_ylim() == pytest.approx((10 / 1.5, 40 * 1.5))
    assert "meV/Å" in forces.get_xlabel()
