"""Fine-tuning: from where, with which weights, new elements, adapters, replay, and what the report says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from conftest import ETHANOL, make_potential, often

from gossamer import fitting
from gossamer.config import make_config
from gossamer.data.fingerprint import SeenFrames
from gossamer.data.labels import LabelConfig
from gossamer.data.readers import read_structures
from gossamer.data.statistics import compute_statistics
from gossamer.data.store import write_store
from gossamer.fitting import fit
from gossamer.potential import Potential, PotentialConfig
from gossamer.potential_file import load, read_manifest, save, unverified
from gossamer.runs import train
from gossamer.training.finetune import FineTuneConfig, adapt_statistics, choose_weights, merge_adapters, transfer_weights


def settings(out: Path, **changes) -> dict:
    return {
        "data": {"train": ETHANOL, "valid_size": 10, "train_size": 20},
        "training": {"steps": 6, "batch_size": 5, "valid_every": 3, "learning_rate": 1e-3},
        "out": str(out),
        **changes,
    }


@pytest.fixture(scope="module", params=often(["leignn", "nequip", "geodite", "painn"], ["leignn"]))
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A potential of each architecture that has both kinds of forces, trained a little with direct ones."""
    folder = tmp_path_factory.mktemp(request.param)
    size = {"num_features": 8, "num_layers": 2, "cutoff": 4.0, **({"num_heads": 2} if request.param == "geodite" else {})}
    train(settings(folder, model={"name": request.param, "direct_forces": True, **size}), progress=False)
    return folder / "potential.safetensors"


def test_direct_then_conservative(start: Path, tmp_path: Path) -> None:
    """The two-stage recipe: the head goes, everything else stays, and forces are then the gradient."""
    results = train(settings(tmp_path / "run", finetune={"start": str(start)}, model={"direct_forces": False}), progress=False)
    tuned = load(tmp_path / "run" / "potential.safetensors")
    assert tuned.conservative
    assert not load(start).conservative
    report = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert report["dropped"]
    assert report["fresh"] == []
    assert report["n_frozen"] == 0
    assert results["finetune"]["labels"] == ["energy", "forces"]
    assert {"valid"} == set(report["before"]) == set(report["after"])


def test_fit_leaves_the_stress_out_where_forces_are_direct(start: Path, caplog: pytest.LogCaptureFixture) -> None:
    structures = [replace(s, stress=np.zeros((3, 3))) for s in read_structures(ETHANOL)]
    loss = fitting.choose_settings("a.extxyz", structures, finetune={"start": str(start)}).loss
    assert (loss.energy, loss.forces, loss.stress) == (5.0, 10.0, 0.0)
    assert "the stress is not trained on: the forces of" in caplog.text


def test_energies_survive_a_change_of_heads(start: Path) -> None:
    """With the head gone, or there again, the energy is the same."""
    direct = load(start, dtype="float64")
    structure = next(iter(read_structures(ETHANOL)))
    energies = [direct.predict([structure])[0]["energy"]]
    for forces in (False, True):
        other = Potential(replace(direct.model_config, direct_forces=forces), direct.statistics, direct.potential_config)
        other.network.double()
        transfer_weights(direct, other)
        energies.append(other.predict([structure])[0]["energy"])
        direct = other
    assert energies == pytest.approx([energies[0]] * 3, abs=1e-10)


def test_from_conservative_to_direct_needs_the_head_trained(start: Path, tmp_path: Path) -> None:
    direct = load(start)
    conservative = Potential(replace(direct.model_config, direct_forces=False), direct.statistics, direct.potential_config)
    save(conservative.eval(), tmp_path / "a.safetensors")
    again = {"start": str(tmp_path / "a.safetensors"), "train": ["layers.0.*"]}
    with pytest.raises(ValueError, match=r"leaves .* frozen at untrained values, but a head that the start lacks needs them"):
        train(settings(tmp_path / "b", finetune=again, model={"direct_forces": True}), progress=False)


@pytest.mark.parametrize("low_rank", often([None, 2], [None]))
def test_what_another_package_trained_is_said(low_rank: int | None, tmp_path: Path) -> None:
    potential = make_potential(["H", "C", "O"], name="painn")
    potential.imported = {"package": "mace-torch", "version": "0.3.16", "file": "a.model", "verified": None}
    save(potential, tmp_path / "imported.safetensors")
    tune = {"start": str(tmp_path / "imported.safetensors"), **({} if low_rank is None else {"low_rank": low_rank})}
    train(settings(tmp_path / "run", finetune=tune, training={"steps": 1, "batch_size": 2}), progress=False)
    manifest = read_manifest(tmp_path / "run" / "potential.safetensors")
    assert manifest["imported"] == {**potential.imported, "fine_tuned": True}
    assert (unverified(manifest) or "").startswith("fine-tuned from an unverified import from mace-torch")
    assert unverified({"imported": {**manifest["imported"], "verified": {"structures": 12}}}) is None


def test_frozen_weights_do_not_move(start: Path, tmp_path: Path) -> None:
    tune = {"start": str(start), "train": ["layers.1.*"]}
    train(settings(tmp_path / "run", finetune=tune), progress=False)
    old, new = load(start).network.state_dict(), load(tmp_path / "run" / "potential.safetensors").network.state_dict()
    moved = {k for k in old if not torch.equal(old[k], new[k])}
    assert moved
    assert all(k.startswith("layers.1.") for k in moved)
    report = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert moved <= set(report["trained_weights"])
    assert report["n_trained"] + report["n_frozen"] == load(start).num_parameters


@pytest.mark.thorough
def test_adapters_are_merged_and_resume(start: Path, tmp_path: Path) -> None:
    tune = {"start": str(start), "low_rank": 2}
    whole = train(settings(tmp_path / "a", finetune=tune), progress=False)
    tuned = load(tmp_path / "a" / "potential.safetensors")
    assert tuned.num_parameters == load(start).num_parameters  # plain weights again
    assert set(tuned.network.state_dict()) == set(load(start).network.state_dict())
    assert 0 < whole["finetune"]["n_trained"] < whole["finetune"]["n_frozen"] * 2
    # a run stopped half-way and resumed gives the same
    (tmp_path / "b").mkdir()
    from gossamer import runs

    original = runs.run_training

    def half(state, train_set, valid_set, loss, config, *rest):
        return original(state, train_set, valid_set, loss, replace(config, steps=3), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "run_training", half)
        train(settings(tmp_path / "b", finetune=tune), progress=False)
    resumed = train(settings(tmp_path / "b", finetune=tune), resume=True, progress=False)
    assert resumed["valid"] == whole["valid"]


def with_silicon(path: Path, n: int = 20) -> Path:
    """Frames with an element that ethanol lacks; labels of a made-up method, shifted by 3 eV per atom."""
    rng = np.random.default_rng(0)
    frames = []
    for structure in list(read_structures(ETHANOL))[:n]:
        atoms = structure.to_ase()
        forces, energy = atoms.get_forces(), atoms.get_potential_energy()
        atoms.numbers[0] = 14
        atoms.positions += rng.normal(scale=0.01, size=atoms.positions.shape)
        atoms.calc = SinglePointCalculator(atoms, energy=energy + 3.0 * len(atoms), forces=forces)
        frames.append(atoms)
    ase.io.write(path, frames)
    return path


def test_new_elements_and_replay(start: Path, tmp_path: Path) -> None:
    data = with_silicon(tmp_path / "si.extxyz")
    tune = {"start": str(start), "replay": ETHANOL, "replay_fraction": 0.5}
    config = settings(tmp_path / "run", finetune=tune, data={"train": str(data), "valid_size": 4})
    results = train(config, progress=False)
    tuned = load(tmp_path / "run" / "potential.safetensors")
    assert tuned.statistics.elements == ["H", "C", "O", "Si"]
    report = results["finetune"]
    assert report["new_elements"] == ["Si"]
    assert (report["n_new_frames"], report["n_replayed_frames"]) == (16, 8)
    assert set(report["after"]) == {"valid", "old_data"}
    with pytest.raises(ValueError, match="new elements Si needs them"):
        train(config | {"finetune": {**tune, "train": ["layers.0.*"]}, "out": str(tmp_path / "x")}, progress=False)


def test_replay_takes_no_frames_to_validate_or_test_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Old frames that are new ones too are trained on only if these are, and do not tell what is forgotten."""
    start = tmp_path / "start.safetensors"
    save(make_potential(["H", "C", "O"], dtype=torch.float32), start)
    frames = [s.to_ase() for s in read_structures(ETHANOL)]
    names = {"new": frames[:20], "old": frames[:40], "valid": frames[40:50], "test": frames[50:60], "all": frames[:60]}
    files = {name: str(tmp_path / f"{name}.extxyz") for name in names}
    for name, chosen in names.items():
        ase.io.write(files[name], chosen)
    tune = {"start": str(start), "replay": files["all"], "replay_fraction": 1.5}
    data = {"train": files["new"], "valid": files["valid"], "test": files["test"]}
    results = train(settings(tmp_path / "run", finetune=tune, data=data), progress=False)
    assert "20 of 60 frames of finetune.replay are validation or test frames: left out" in caplog.text
    seen = load(tmp_path / "run" / "potential.safetensors").seen
    assert [seen.where(a) for a in names["valid"]] == ["valid"] * 10
    assert [seen.where(a) for a in names["test"]] == ["new"] * 10
    tested = results["finetune"]["after"]["old_data"]["n_frames"]
    assert tested == sum(seen.where(a) == "new" for a in names["old"]) > 0
    data = {"train": files["new"], "valid_size": 4}
    train(settings(tmp_path / "again", finetune={**tune, "replay": files["new"], "replay_fraction": 1.0}, data=data), progress=False)
    seen = load(tmp_path / "again" / "potential.safetensors").seen
    assert [seen.where(s) for s in read_structures(tmp_path / "again" / "valid.extxyz")] == ["valid"] * 4
    with pytest.raises(ValueError, match="All 10 frames of finetune.replay .* are validation or test frames"):
        train(
            settings(tmp_path / "x", finetune={**tune, "replay": files["valid"]}, data={"train": files["new"], "valid": files["valid"]}),
            progress=False,
        )


def test_references_follow_another_method(start: Path, tmp_path: Path) -> None:
    """Labels shifted by 3 eV per atom: the shift goes into the reference energies, so training begins near the labels."""
    frames = []
    for structure in list(read_structures(ETHANOL))[:20]:
        atoms = structure.to_ase()
        energy, forces = atoms.get_potential_energy() + 3.0 * len(atoms), atoms.get_forces()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        frames.append(atoms)
    ase.io.write(tmp_path / "shifted.extxyz", frames)
    structures = list(read_structures(tmp_path / "shifted.extxyz"))
    assert abs(mean_error(load(start), structures)) > 1  # eV per atom
    assert abs(mean_error(adapted(start, structures), structures)) < 1e-5


def adapted(start: Path, structures: list, old: list = ()) -> Potential:  # type: ignore[assignment]
    """The start's weights with reference energies fitted to these labels."""
    before = load(start)
    statistics = adapt_statistics(before, compute_statistics(structures, 4.0), structures, old)
    potential = Potential(before.model_config, statistics, before.potential_config).eval()
    transfer_weights(before, potential)
    return potential


def mean_error(potential: Potential, structures: list) -> float:
    """eV per atom, prediction minus label."""
    return float(np.mean([(p["energy"] - s.energy) / s.n_atoms for p, s in zip(potential.predict(structures), structures, strict=True)]))


def test_references_of_one_composition_fit_another_too(start: Path, tmp_path: Path) -> None:
    """Trained on ethanol alone, the split of its energy into elements means nothing; methane and replayed ethanol fix it."""
    frames = []
    for k in range(12):
        atoms = molecule("CH4")
        atoms.rattle(0.03, seed=k)
        energy = -1000.0 - 13.6 * 4  # nothing that the split found on ethanol could know
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((5, 3)))
        frames.append(atoms)
    ase.io.write(tmp_path / "methane.extxyz", frames)
    new, old = list(read_structures(tmp_path / "methane.extxyz")), list(read_structures(ETHANOL))[:12]
    potential = adapted(start, new, old)
    assert abs(mean_error(potential, new)) < 1e-4
    assert abs(mean_error(potential, old)) < 1e-4


def test_a_new_element_takes_its_own_energy(tmp_path: Path) -> None:
    """One composition cannot tell whose the energy of silicon is; hydrogen's stays what it was, and with it all that the start knew."""
    start, frames = make_potential(["H", "C", "O"]), []
    for k in range(6):
        atoms = molecule("Si2H6")
        atoms.rattle(0.03, seed=k)
        energy = sum({"H": -1.5, "Si": -7900.0}[s] for s in atoms.symbols)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((8, 3)))
        frames.append(atoms)
    ase.io.write(tmp_path / "disilane.extxyz", frames)
    structures = list(read_structures(tmp_path / "disilane.extxyz"))
    statistics = adapt_statistics(start, compute_statistics(structures, 4.0), structures)
    assert {e: statistics.reference_energies[e] for e in "HCO"} == pytest.approx(start.statistics.reference_energies)
    assert statistics.reference_energies["Si"] == pytest.approx(-7900.0, rel=2e-3)


def test_what_binds_alloys_with_a_new_element_is_no_shift(tmp_path: Path) -> None:
    """Gold that binds as copper: the network's energies are not counted once more in the references."""
    start, frames, rng = make_potential(["Cu"]), [], np.random.default_rng(0)
    for k in range(12):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=k)
        energy = start.predict(atoms)[0]["energy"]
        atoms.symbols = rng.choice(["Cu", "Au"], size=4)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((4, 3)))
        frames.append(atoms)
    assert abs(energy / 4 + 1.5) > 0.1  # eV per atom that bind
    ase.io.write(tmp_path / "alloys.extxyz", frames)
    structures = list(read_structures(tmp_path / "alloys.extxyz"))
    state = torch.get_rng_state()
    statistics = adapt_statistics(start, compute_statistics(structures, 4.0), structures)
    assert statistics.reference_energies == pytest.approx({"Cu": -1.5, "Au": -1.5}, abs=1e-3)
    assert torch.equal(torch.get_rng_state(), state)


def test_replay_is_said_whole() -> None:
    with pytest.raises(ValueError, match="replay_fraction has no effect without replay"):
        FineTuneConfig(start="x", replay_fraction=0.5)


def test_least_squares_by_name_fit_what_the_start_leaves(start: Path, tmp_path: Path) -> None:
    """As reference energies found by themselves do; fitted to whole labels they would hold once more what the network says."""
    found = []
    for how in ("auto", "least_squares"):
        data = {"train": ETHANOL, "valid_size": 10, "train_size": 20, "reference_energies": how}
        train(settings(tmp_path / how, data=data, finetune={"start": str(start)}, training={"steps": 1, "batch_size": 5}), progress=False)
        found.append(load(tmp_path / how / "potential.safetensors").statistics.reference_energies)
    assert found[0] == pytest.approx(found[1], abs=1e-9)


def test_transfer_moves_rows_by_element() -> None:
    small, large = make_potential(["C", "O"], seed=1), make_potential(["H", "C", "N", "O"], seed=2)
    report = transfer_weights(small, large)
    assert report["new_elements"] == ["H", "N"]
    assert torch.equal(large.network.embedding.weight[[1, 3]], small.network.embedding.weight)
    carbon_oxide = Atoms("CO", positions=[[0, 0, 0], [1.1, 0, 0]])
    from gossamer.simulation.calculator import Calculator

    forces = []
    for potential in (small, large):
        carbon_oxide.calc = Calculator(potential)
        forces.append(carbon_oxide.get_forces())
    np.testing.assert_allclose(forces[0], forces[1], atol=1e-12)


def test_adapters_start_as_nothing_and_merge_exactly() -> None:
    potential = make_potential(["C", "O"], name="nequip", num_features=6)
    config = FineTuneConfig(start="x", low_rank=2)
    before = potential.network.layers[0].linear_out[0].weight.clone()
    choose_weights(potential.network, config, {"fresh": [], "new_elements": []})
    linear = potential.network.layers[0].linear_out[0]
    assert torch.equal(linear.weight, before)
    torch.nn.init.normal_(linear.parametrizations.weight[0].B)
    merged = merge_adapters(potential)
    assert torch.allclose(merged.network.layers[0].linear_out[0].weight, linear.weight)
    assert not hasattr(merged.network.layers[0].linear_out[0], "parametrizations")


def test_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"finetune.train is empty, so that no weight would train"):
        choose_weights(make_potential(["H"]).network, FineTuneConfig(start="", train=[]), {"fresh": [], "new_elements": []})
    path = tmp_path / "p.safetensors"
    save(make_potential(["H", "C", "O"], dtype=torch.float32), path)
    for model, message in [
        ({"name": "geodite"}, "holds a leignn network, but model.name is geodite"),
        ({"num_layers": 5}, r"num_layers is 5 \(the file has 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_config(settings(tmp_path / "run", finetune={"start": str(path)}, model=model))
    with pytest.raises(FileNotFoundError):
        make_config(settings(tmp_path / "run", finetune={"start": str(tmp_path / "absent")}))
    for tune, message in [
        ({"train": ["layer.9.*"]}, r"no weight matches 'layer.9.\*'. The network has .*layers.0"),
        ({"low_rank": 64}, "no linear map is that large"),
        ({"replay": ETHANOL, "replay_fraction": 1000.0}, "asks for 20000 old frames"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(settings(tmp_path / "run", finetune={"start": str(path), **tune}), progress=False)
    with pytest.raises(ValueError, match="only fine-tuning has these"):
        fit(ETHANOL, low_rank=2)
    with pytest.raises(ValueError, match=r"finetune.ranc: unknown setting"):
        make_config(settings(tmp_path / "run", finetune={"start": str(path), "ranc": 2}))


def test_settings_of_the_start_stay_but_for_what_is_given(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    potential = make_potential(["H", "C", "O"], dtype=torch.float32)
    save(Potential(potential.model_config, potential.statistics, PotentialConfig(zbl=False, zbl_power=7)), path)
    for given, expected in [({}, (False, 7)), ({"zbl_power": 5}, (False, 5)), ({"zbl": True}, (True, 7))]:
        config = make_config(settings(tmp_path / "run", finetune={"start": str(path)}, potential=given))
        assert (config.potential.zbl, config.potential.zbl_power) == expected
    with pytest.raises(ValueError, match=r"potential.zbl_pover: unknown setting"):
        make_config(settings(tmp_path / "run", finetune={"start": str(path)}, potential={"zbl_pover": 5}))
    with pytest.raises(ValueError, match="potential: "):
        make_config(settings(tmp_path / "run", finetune={"start": str(path)}, potential="none"))


def test_the_method_of_the_labels_is_that_of_the_new_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "p.safetensors"
    potential = make_potential(["H", "C", "O"], dtype=torch.float32)
    potential.statistics = replace(potential.statistics, functional="pbe", dispersion="none")
    save(potential, path)
    for k, said in enumerate([{}, {"functional": "r2scan"}, {"functional": "pbe", "dispersion": "included"}]):
        caplog.clear()
        config = settings(tmp_path / str(k), finetune={"start": str(path)})
        config["data"] |= said
        train(config, progress=False)
        tuned = load(tmp_path / str(k) / "potential.safetensors").statistics
        assert {"functional": tuned.functional, "dispersion": tuned.dispersion} == {"functional": None, "dispersion": None, **said}
        lost = {"functional", "dispersion"} - set(said)
        assert {name for name in ("functional", "dispersion") if f"data.{name} says nothing of the new labels" in caplog.text} == lost


def test_what_fine_tuning_changes_or_blurs_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, frames = tmp_path / "p.safetensors", list(read_structures(ETHANOL))
    potential = make_potential(["H", "C", "O"])
    potential.seen = SeenFrames.of(frames[:14], frames[14:20])
    save(potential, path)
    files = {name: str(tmp_path / f"{name}.extxyz") for name in ("train", "valid", "test")}
    for name, chosen in zip(files, (frames[20:30], frames[10:20], frames[30:35]), strict=True):
        ase.io.write(files[name], [s.to_ase() for s in chosen])
    train(settings(tmp_path / "run", finetune={"start": str(path)}, data=files), progress=False)
    assert f"4 of 10 validation frames were trained on by '{path}': errors on them are too small" in caplog.text
    assert "test frames were trained on" not in caplog.text
    assert "is in float64, and the fine-tuned potential will be in training.dtype, float32" in caplog.text


def test_fixed_scales_stay_fixed(tmp_path: Path) -> None:
    """NequIP's scales per element are not trained without train_scales, by fine-tuning neither."""
    path = tmp_path / "p.safetensors"
    save(make_potential(["H", "C", "O"], dtype=torch.float32, name="nequip", scales="per_element"), path)
    train(settings(tmp_path / "run", finetune={"start": str(path)}), progress=False)
    old, new = load(path).network, load(tmp_path / "run" / "potential.safetensors").network
    assert torch.equal(old.scales.weight, new.scales.weight)
    assert not torch.equal(old.embedding.weight, new.embedding.weight)


def test_fit_refuses_another_model_beside_a_start(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save(make_potential(["H", "C", "O"], dtype=torch.float32), path)
    with pytest.raises(ValueError, match="holds a leignn network, but model.name is geodite"):
        fit(ETHANOL, model="geodite", out=tmp_path / "run", start=path)


def test_fit_reads_a_replayed_store_by_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and units are those of the new data; a store has its own."""
    path = tmp_path / "p.safetensors"
    save(make_potential(["H", "C", "O"], dtype=torch.float32), path)
    write_store(list(read_structures(ETHANOL))[:20], tmp_path / "old.store")
    monkeypatch.setattr(fitting, "train", lambda config, **_: config)
    labels = LabelConfig(force_unit="eV/Angstrom")
    config = fit(ETHANOL, out=tmp_path / "run", start=path, replay=tmp_path / "old.store", labels=labels)
    assert (config.finetune.replay_labels, config.data.labels) == (LabelConfig(), labels)


@pytest.mark.thorough
def test_fit_from_a_potential(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save(make_potential(["H", "C", "O"], dtype=torch.float32), path)
    results = fit(ETHANOL, out=tmp_path / "run", minutes=0.02, start=path, weights=["MLP_E.*"], low_rank=2, progress=False)
    assert results["finetune"]["adapters"] > 0
    assert "MLP_E.0.bias" in json.loads((tmp_path / "run" / "finetune.json").read_text())["trained_weights"]
