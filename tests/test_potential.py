"""A potential as a function of batches, and as a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import safetensors.torch
import torch
from ase import Atoms
from ase.build import molecule
from ase.data import chemical_symbols
from conftest import ETHANOL, MODELS, make_potential

from gossamer.cli import main
from gossamer.commands.common import print_errors
from gossamer.config import make_config
from gossamer.data.batch import collate
from gossamer.data.structure import Structure, as_structure
from gossamer.evaluation import evaluate_potential
from gossamer.potential import Potential, PotentialConfig
from gossamer.potential_file import FORMAT, _checksum, _kinds, as_potential, load, read_manifest, save, stored_structures
from gossamer.runs import train
from gossamer.simulation.calculator import Calculator

ELEMENTS = ["H", "C", "O", "Si"]
FORMAT_1 = Path(__file__).parent / "data" / "format1"


def structure(atoms: Atoms, name: str = "s") -> Structure:
    return Structure(
        atomic_numbers=atoms.numbers.astype(np.int64), positions=atoms.positions, cell=atoms.cell.array, pbc=np.array(atoms.pbc), name=name
    )


@pytest.mark.parametrize("name", MODELS)
def test_batch_equals_one_by_one(name: str, ethanol: Atoms, crystal: Atoms, slab: Atoms) -> None:
    potential = make_potential(ELEMENTS, **MODELS[name])
    structures = [structure(a) for a in (ethanol, crystal, slab, ethanol)]
    together = potential.predict(structures)
    for s, batch in zip(structures, together, strict=True):
        (alone,) = potential.predict([s])
        assert batch["energy"] == pytest.approx(alone["energy"], rel=1e-12)
        np.testing.assert_allclose(batch["forces"], alone["forces"], atol=1e-11)
        if alone["stress"] is not None:
            np.testing.assert_allclose(batch["stress"], alone["stress"], atol=1e-12)


def test_no_gradient_between_structures(ethanol: Atoms, crystal: Atoms) -> None:
    potential = make_potential(ELEMENTS, global_context=True)
    graph = potential.collate([structure(ethanol), structure(crystal)])
    vectors = graph.edge_vectors().requires_grad_()
    energies, *_ = potential._node_energies(graph, (vectors,), None)
    (slope,) = torch.autograd.grad(energies[: len(ethanol)].sum(), vectors)
    other = graph.edge_index[1] >= len(ethanol)
    assert float(slope[other].abs().max()) == 0.0
    assert float(slope[~other].abs().max()) > 0


@pytest.mark.parametrize("direct", [False, True])
def test_predictions_are_differentiable_in_training_only(direct: bool, crystal: Atoms) -> None:
    potential = make_potential(ELEMENTS, direct_forces=direct)
    graph = potential.collate([structure(crystal)])
    for training in (False, True):
        out = potential.train(training)(graph)
        assert [out.energy.requires_grad, out.node_energies.requires_grad, out.forces.requires_grad] == [training] * 3


def test_lone_atom_table_is_the_same_as_lone_atoms_riding_along(crystal: Atoms) -> None:
    potential = make_potential(ELEMENTS)
    graph = potential.collate([structure(crystal)])
    a, b = potential(graph), potential(graph, isolated=potential.isolated_outputs())
    assert float(a.energy) == pytest.approx(float(b.energy), abs=1e-12)


@pytest.mark.parametrize("long_range", [None, "latent_charges"])
def test_inference_mode_changes_nothing(long_range: Literal["latent_charges"] | None, crystal: Atoms, tmp_path: Path) -> None:
    """A potential that is loaded, a calculator that is made and a list of neighbours that is kept there serve outside too."""
    bare = make_potential(ELEMENTS)
    potential = Potential(bare.model_config, bare.statistics, PotentialConfig(long_range=long_range)).eval()
    potential.network.double()
    save(potential, tmp_path / "p.safetensors", [structure(crystal)])
    expected = Calculator(potential, way="plain").get_forces(crystal)
    with torch.inference_mode():
        calculator = Calculator(load(tmp_path / "p.safetensors"), way="plain")
        inside = calculator.get_forces(crystal), potential.predict(crystal)[0]["forces"]
        if long_range is None:
            calculator.get_stresses(crystal)
    outside = calculator.calculate(crystal) or calculator.results["forces"]
    for forces in (*inside, outside):
        np.testing.assert_allclose(forces, expected, atol=1e-12)


def test_compiled_shapes_are_checked() -> None:
    """jaxtyping is on while testing: a wrong shape fails at the call, naming the argument."""
    from gossamer.nn.filters import bessel_basis

    with pytest.raises(Exception, match="x"):
        bessel_basis(torch.zeros(3, 2), 4)


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, "float32") for name in MODELS] + [(name, "float64") for name in ("sound", "direct", "nequip", "geodite")]
)
def test_save_and_load(name: str, dtype: str, tmp_path: Path, ethanol: Atoms, crystal: Atoms) -> None:
    potential = make_potential(ELEMENTS, dtype=getattr(torch, dtype), **MODELS[name])
    checks = [structure(ethanol), structure(crystal)]
    save(potential, tmp_path / "p.safetensors", checks, {"note": "made by a test"})
    again = load(tmp_path / "p.safetensors")
    assert again.dtype == getattr(torch, dtype)
    assert again.conservative == ("direct" not in name)
    for a, b in zip(potential.predict(checks), again.predict(checks), strict=True):
        assert a["energy"] == b["energy"]
        np.testing.assert_array_equal(a["forces"], b["forces"])
    other = load(tmp_path / "p.safetensors", dtype="float64" if dtype == "float32" else "float32")
    np.testing.assert_allclose(other.predict(checks)[0]["forces"], again.predict(checks)[0]["forces"], atol=2e-3)
    manifest = read_manifest(tmp_path / "p.safetensors")
    assert manifest["format"] == FORMAT
    assert manifest["statistics"]["elements"] == ELEMENTS
    assert manifest["training"] == {"note": "made by a test"}
    assert list(tmp_path.iterdir()) == [tmp_path / "p.safetensors"]  # no temporary file is left


@pytest.mark.parametrize("path", sorted(FORMAT_1.glob("*.safetensors")), ids=lambda p: p.stem)
@pytest.mark.parametrize("dtype", [None, "float64"])
def test_files_of_format_1_load_for_ever(path: Path, dtype: str | None) -> None:
    """Files written by the first version give the predictions they were written with (tests/data/make_format1.py)."""
    potential = load(path, dtype=dtype)
    structures = stored_structures(path)
    assert len(structures) == 2
    stored = safetensors.torch.load_file(path)
    energies = json.loads((FORMAT_1 / "energies.json").read_text())[path.stem]
    for k, (predicted, energy) in enumerate(zip(potential.predict(structures), energies, strict=True)):
        assert predicted["energy"] == pytest.approx(energy, abs=2e-5)
        np.testing.assert_allclose(predicted["forces"], stored[f"check.{k}.forces"], atol=1e-4)
        if potential.conservative and k == 1:
            np.testing.assert_allclose(predicted["stress"], stored[f"check.{k}.stress"], atol=1e-5)


def saved(tmp_path: Path, atoms: Atoms) -> Path:
    save(make_potential(ELEMENTS), tmp_path / "p.safetensors", [structure(atoms)])
    return tmp_path / "p.safetensors"


def test_truncated_file_is_refused(tmp_path: Path, ethanol: Atoms) -> None:
    path = saved(tmp_path, ethanol)
    data = path.read_bytes()
    for size in (0, 5, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="not a readable safetensors file .* truncated"):
            load(path)


@pytest.mark.parametrize(
    "command", [["evaluate", "{}", ETHANOL], ["calibrate", "{}", ETHANOL], ["md", "{}", "{}"], ["export", "{}"], ["parity", "{}"], ["judge", "{}"]]
)  # fmt: skip
@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_devices_that_are_not_there(tmp_path: Path, ethanol: Atoms, capsys: pytest.CaptureFixture, command: list[str], device: str) -> None:
    path = tmp_path / "p.safetensors"
    save(make_potential(["H", "C", "O"], dtype=torch.float32), path)
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here .*PyTorch .* has cpu"):
        load(path, device)
    ethanol.write(tmp_path / "a.xyz")
    given = [word.replace("{}", str(tmp_path / "a.xyz" if k == 2 else path)) for k, word in enumerate(command)]
    assert main([*given, "--device", device]) == 2
    assert f"device '{device}' cannot be used here" in capsys.readouterr().err


def test_altered_weights_and_manifest_are_refused(tmp_path: Path, ethanol: Atoms) -> None:
    path = saved(tmp_path, ethanol)
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="was altered"):
        load(path)
    path = saved(tmp_path, ethanol)
    path.write_bytes(path.read_bytes().replace(b"-1.5", b"-2.5", 1))
    with pytest.raises(ValueError, match="was altered"):
        load(path)


def test_other_predictions_on_loading_are_refused(tmp_path: Path, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a broken build of PyTorch or a broken kernel would do: the stored predictions do not come out."""
    path = saved(tmp_path, ethanol)
    original = Potential.predict

    def wrong(self, structures, **options):
        out = original(self, structures, **options)
        return [{**p, "forces": p["forces"] + 0.01} for p in out]

    monkeypatch.setattr(Potential, "predict", wrong)
    with pytest.raises(ValueError, match="gives other forces here than when it was saved"):
        load(path)
    monkeypatch.setattr(
        Potential, "predict", lambda self, s, **options: [{**p, "energy": p["energy"] + 1} for p in original(self, s, **options)]
    )
    with pytest.raises(ValueError, match="gives another energy here"):
        load(path)


def test_not_a_potential(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load(tmp_path / "nothing")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="not a potential saved by gossamer"):
        load(tmp_path / "other")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "newer", {"gossamer": json.dumps({"format": 99, "gossamer": "9.9"})})
    with pytest.raises(ValueError, match=r"format 99; this gossamer .* reads up to 2"):
        load(tmp_path / "newer")


def altered(tmp_path: Path, atoms: Atoms, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A saved potential whose manifest was changed, with a fresh checksum."""
    path = saved(tmp_path, atoms)
    manifest, tensors = read_manifest(path), safetensors.torch.load_file(path)
    changed = change(manifest) or manifest
    if isinstance(changed, dict):
        changed["checksum"] = _checksum(tensors, changed)
    safetensors.torch.save_file(tensors, path, {"gossamer": json.dumps(changed)})
    return path


@pytest.mark.parametrize("name", ["weft", "nequip"])
def test_a_setting_that_came_later_is_what_it_was(name: str, tmp_path: Path, ethanol: Atoms) -> None:
    """A network saved before its norm could lie elsewhere gives the same predictions (loading compares them), and goes on so in fine-tuning."""
    path = tmp_path / "p.safetensors"
    save(make_potential(ELEMENTS, name=name, normalize="features"), path, [structure(ethanol)])
    manifest, tensors = read_manifest(path), safetensors.torch.load_file(path)
    del manifest["model"]["normalize"]
    manifest["checksum"] = _checksum(tensors, manifest)
    safetensors.torch.save_file(tensors, path, {"gossamer": json.dumps(manifest)})
    assert load(path).model_config.normalize == "features"
    assert make_config({"data": {"train": "x"}, "finetune": {"start": str(path)}}).model.normalize == "features"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_layers": 90}, r"p.safetensors' has model\.num_layers = 90, but \d+ tensors .* at most \d+ can be meant. It was altered"),
        ({"num_features": 10_000}, r"model\.num_features = 10000, but .* at most 512 can be meant"),
        ({"num_layers": 10**18}, r"p.safetensors' has a manifest .* cannot use \(model\.num_layers: .* or equal to 100"),
        ({"num_features": 10**9}, r"model\.num_features: .* or equal to 10000"),
        ({"cutoff": 1e18}, r"model\.cutoff: .* or equal to 100"),
        ({"num_features": 16}, "holds weights that are not those of its network"),
    ],
)
def test_forged_sizes_in_a_manifest_are_refused(setting: dict[str, Any], message: str, tmp_path: Path, ethanol: Atoms) -> None:
    path = altered(tmp_path, ethanol, lambda manifest: manifest["model"].update(setting))
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize(
    "model",
    [
        {"name": "nequip", "readout_width": 600},
        {"name": "nequip", "radial_depth": 0, "radial_width": 1024},
        {"name": "nequip", "readout_width": 600, "readout_depth": 1},
        {"name": "mace", "num_layers": 1, "readout_width": 1024, "hidden_l_max": 2},
        {"name": "sevennet", "denominators": [1000.0, 1e6]},
        {"name": "sevennet", "irreps": ["4x0e", "4x0e+4x1o", "4x0e"], "num_features": 600, "num_layers": 50, "embedding_features": 700},
    ],
)
def test_what_can_be_saved_can_be_loaded(model: dict[str, Any], tmp_path: Path, ethanol: Atoms) -> None:
    """Settings larger than any weight: of factors, or without effect beside the others."""
    potential = make_potential(ELEMENTS, **model)
    save(potential, tmp_path / "p.safetensors", [structure(ethanol)])
    again = load(tmp_path / "p.safetensors")
    assert again.predict(ethanol)[0]["energy"] == potential.predict(ethanol)[0]["energy"]
    assert make_config({"data": {"train": "x"}, "finetune": {"start": str(tmp_path / "p.safetensors")}}).model == again.model_config


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    """Channels of a degree that no layer has."""
    potential = make_potential(ELEMENTS, name="nequip", num_layers=1, num_features=[4, 1024, 4])
    with pytest.raises(ValueError, match=r"This network has model\.num_features = 1024, but .* at most 512 has an effect"):
        save(potential, tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []
    settings = {
        "data": {"train": ETHANOL, "valid_size": 4, "train_size": 8}, "out": str(tmp_path / "run"),
        "model": {"name": "nequip", "preset": "tiny", "num_layers": 1, "num_features": [4, 1024, 4]},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"num_features = 1024"):
        train(settings, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: ["no dictionary"], "a manifest without a format"),
        (lambda m: m["model"].update(name={"a": 1}), "cannot use .network"),
        (lambda m: m.update(model="leignn"), r"cannot use \(model\)"),
        (lambda m: m.update(dtype="int8"), r"cannot use \(network 'leignn', dtype 'int8'\)"),
    ],
)
def test_manifests_that_are_none_are_refused(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path, ethanol: Atoms) -> None:
    path = altered(tmp_path, ethanol, change)
    for read in (load, read_manifest):
        with pytest.raises(ValueError, match=message):
            read(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"n_check": 10}, r"holds 1 stored predictions, but its manifest has n_check = 10"),
        ({"n_check": -1}, r"n_check = -1"),
        ({"format": -3}, "a manifest without a format"),
        ({"uncertainty": {}}, r"cannot use \(uncertainty\.version\)"),
        ({"uncertainty": {"version": "9"}}, r"cannot use \(uncertainty\.version\)"),
        ({"uncertainty": "x"}, r"cannot use \(uncertainty\)"),
        ({"imported": "x"}, r"cannot use \(imported\)"),
        ({"potential": {"zbl_order": 9}}, r"cannot use \(potential\.zbl_order: "),
        ({"statistics": {"elements": "H"}}, r"cannot use \(statistics\.elements: "),
        ({"statistics": {"elements": ["Xx", "H", "C", "O"]}}, r"statistics\.elements = \['Xx', .* expected chemical symbols, each once"),
        ({"statistics": {"elements": ["H", "H", "C", "O"]}}, r"statistics\.elements = \['H', 'H'"),
        ({"statistics": {"reference_energies": {"H": 1.0, "C": 1.0}}}, r"statistics\.reference_energies without a finite number for O, Si"),
        (
            {"statistics": {"reference_energies": dict.fromkeys(ELEMENTS, np.nan)}},
            r"statistics\.reference_energies: Input should be a finite",
        ),
        ({"statistics": {"element_scales": {"H": 1.0}}}, r"statistics\.element_scales without a finite number for C"),
        ({"statistics": {"energy_scale": 0.0}}, r"statistics\.energy_scale = 0\.0, expected a finite number other than zero"),
        ({"statistics": {"energy_scale": np.inf}}, r"statistics\.energy_scale: Input should be a finite"),
        ({"statistics": {"mean_neighbors": -5.0}}, r"statistics\.mean_neighbors = -5\.0, expected a finite number, zero or more"),
        ({"statistics": {"shortest_distances": {"H": 1.0}}}, r"statistics\.shortest_distances with H: 1\.0, expected a pair of elements"),
        ({"statistics": {"shortest_distances": {"H-H": 0.0}}}, r"with H-H: 0\.0, .* a number above zero"),
        ({"statistics": {"fewest_neighbors": {"Xx": 1.0}}}, r"statistics\.fewest_neighbors with Xx: 1\.0, expected an element"),
    ],
)
def test_forged_entries_of_a_manifest_are_refused(entry: dict[str, Any], message: str, tmp_path: Path, ethanol: Atoms) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for name, value in entry.items():
            inside = name in ("statistics", "potential")
            manifest[name] = {**manifest[name], **value} if inside else value

    path = altered(tmp_path, ethanol, change)
    with pytest.raises(ValueError, match=rf"(?s)p\.safetensors' .*{message}"):
        load(path)


def test_weights_that_are_whole_numbers_are_refused(tmp_path: Path, ethanol: Atoms) -> None:
    path = saved(tmp_path, ethanol)
    manifest, tensors = read_manifest(path), safetensors.torch.load_file(path)
    tensors["network.embedding.weight"] = tensors["network.embedding.weight"].to(torch.int64)
    manifest["kinds"] = _kinds(tensors)
    manifest["checksum"] = _checksum(tensors, manifest)
    safetensors.torch.save_file(tensors, path, {"gossamer": json.dumps(manifest)})
    with pytest.raises(ValueError, match=r"weights that are no real numbers \(embedding\.weight is torch\.int64\)"):
        load(path)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load(tmp_path / "model.pt")


def test_unknown_element(ethanol: Atoms) -> None:
    with pytest.raises(ValueError, match=r"O \(8\) not among the potential's elements \(H, C\)"):
        make_potential(["H", "C"]).collate([structure(ethanol)])


def test_energies_of_large_offsets_keep_their_digits(ethanol: Atoms) -> None:
    """Reference energies of -1e5 eV per atom leave a float32 network's differences intact."""
    from gossamer.data.statistics import Statistics

    small = make_potential(ELEMENTS, dtype=torch.float32)
    big = Potential(
        small.model_config,
        Statistics(elements=ELEMENTS, reference_energies=dict.fromkeys(ELEMENTS, -1e5), energy_scale=0.7, mean_neighbors=12.0),
    ).eval()
    big.network.load_state_dict(small.network.state_dict())
    moved = ethanol.copy()
    moved.positions[0] += 0.01
    differences = []
    for potential in (small, big):
        a, b = potential.predict([structure(ethanol), structure(moved)])
        differences.append(b["energy"] - a["energy"])
    assert differences[0] == pytest.approx(differences[1], abs=1e-7)


def test_a_change_of_precision_is_one_of_the_network(ethanol: Atoms) -> None:
    """Reference energies, limits and the scale of the energy keep their digits, there and back."""
    from copy import deepcopy

    potential = make_potential(ELEMENTS)
    references = {"H": -13.587222780835477, "C": -1029.4889999155063, "O": -2041.9816003861047, "Si": -7900.123456789}
    statistics = replace(
        potential.statistics, reference_energies=references, energy_scale=1 / 3, shortest_distances={"C-H": 1.05},
        fewest_neighbors=dict.fromkeys(ELEMENTS, 1.2),
    )  # fmt: skip
    potential = Potential(potential.model_config, statistics).eval()
    network = deepcopy(potential)
    network.network.to(torch.float64)
    exact = network.predict(ethanol)[0]
    for dtypes in ([torch.float32], [torch.float64], [torch.float32, torch.float64], [torch.float16, torch.float32]):
        changed = deepcopy(potential)
        for dtype in dtypes:
            changed.to(dtype)
        assert changed.dtype == dtypes[-1]
        for name, values in changed.named_buffers():
            if not name.startswith("network."):
                assert torch.equal(values, dict(potential.named_buffers())[name]), name
    assert changed.half().double().reference_energies.tolist() == list(references.values())
    double = deepcopy(potential).to(torch.float64).predict(ethanol)[0]
    assert double["energy"] == exact["energy"]
    assert np.array_equal(double["forces"], exact["forces"])
    single = deepcopy(potential).to(torch.float64).to(torch.float32).predict(ethanol)[0]
    assert single["energy"] == pytest.approx(exact["energy"], abs=1e-5)


def test_collate_marks_missing_labels_with_nan(ethanol: Atoms) -> None:
    a = Structure(**{**vars(structure(ethanol)), "energy": 1.0, "forces": np.zeros((9, 3))})
    graph = collate([a, structure(ethanol)], 3.0)
    assert torch.isnan(graph.energy).tolist() == [False, True]
    assert torch.isnan(graph.forces).any(dim=1).tolist() == [False] * 9 + [True] * 9
    assert graph.stress is None


def test_predict_takes_atoms_of_ase(ethanol: Atoms, crystal: Atoms) -> None:
    """One, a list, or our structures, in batches: the same numbers as the calculator's."""
    potential = make_potential(ELEMENTS).train()
    frames = [ethanol, crystal, ethanol]
    answers = potential.predict(frames)
    for atoms, answer, one, batched in zip(
        frames, answers, potential.predict([structure(a) for a in frames]), potential.predict(frames, batch_atoms=10), strict=True
    ):
        assert one["energy"] == answer["energy"] == pytest.approx(batched["energy"], abs=1e-12)
        np.testing.assert_array_equal(answer["forces"], one["forces"])
        atoms.calc = Calculator(potential, way="plain")
        assert atoms.get_potential_energy() == pytest.approx(answer["energy"], abs=1e-9)
    assert answers[0]["stress"] is None
    (alone,) = potential.train().predict(crystal)
    np.testing.assert_allclose(alone["stress"], answers[1]["stress"], atol=1e-12)
    assert potential.training
    assert potential.predict([]) == []
    with pytest.raises(ValueError, match=r"structure 1: Cu \(29\) not among the potential's elements"):
        potential.predict([ethanol, Atoms("Cu")])
    with pytest.raises(ValueError, match="periodic along"):
        potential.predict(Atoms("H", pbc=True))
    with pytest.raises(TypeError, match=r"structure: expected ASE's Atoms or a gossamer.Structure, found str. Read files beforehand"):
        as_structure("frames.xyz")


def test_structures_in_single_precision(crystal: Atoms) -> None:
    """as simulations keep them: sums over charges need one precision."""
    bare = make_potential(ELEMENTS)
    potential = Potential(bare.model_config, bare.statistics, PotentialConfig(long_range="latent_charges"))
    exact = structure(crystal)
    single = replace(exact, positions=exact.positions.astype(np.float32), cell=exact.cell.astype(np.float32))
    assert potential.predict(single)[0]["energy"] == pytest.approx(potential.predict(exact)[0]["energy"], abs=1e-4)


def test_long_lists_of_elements_are_sorted_and_short() -> None:
    many = make_potential([chemical_symbols[z] for z in range(40, 10, -1)])
    with pytest.raises(ValueError, match=r"H \(1\), He \(2\), .*F \(9\), Ne \(10\) not among .* \(Na, Mg, Al, .* \.\.\. Zr, 30 in all\)"):
        many.check_elements(np.arange(1, 11))
    with pytest.raises(ValueError, match=r"Nb \(41\), .*Sn \(50\) \.\.\. not among"):
        many.check_elements(np.arange(41, 60))


def test_a_constant_offset_between_functionals_is_said(capsys: pytest.CaptureFixture) -> None:
    """Labels that differ by a constant per element, as of another functional, and by a little noise."""
    potential = make_potential(ELEMENTS)
    rng = np.random.default_rng(0)
    frames = []
    for k in range(24):
        atoms = molecule(["CH4", "H2O", "CO2", "CH3OH"][k % 4])
        atoms.rattle(0.05, seed=k)
        shift = {1: 3.0, 6: -400.0, 8: 25.0}
        energy = potential.predict(atoms)[0]["energy"] + sum(shift[z] for z in atoms.numbers) + rng.normal(scale=1e-3) * len(atoms)
        frames.append(Structure(**{**vars(structure(atoms)), "energy": energy, "forces": np.zeros((len(atoms), 3))}))
    summary = evaluate_potential(potential, frames).summary()
    assert summary["energy_mae_meV_per_atom"] > 1e4
    assert summary["energy_offset"]["mae_without_meV_per_atom"] < 2
    assert list(summary["forces_per_element_meV_per_A"]) == ["H", "C", "O"]
    print_errors(summary)
    assert str(evaluate_potential(potential, frames)).splitlines()[0] == "24 frames"  # printed in Python, it is the same table
    assert "meV/atom from the labels on average: another functional" in capsys.readouterr().out
    same = [Structure(**{**vars(s), "energy": p["energy"] + rng.normal()}) for s, p in zip(frames, potential.predict(frames), strict=True)]
    assert "energy_offset" not in evaluate_potential(potential, same).summary()


def test_precisions_are_two(tmp_path: Path, ethanol: Atoms) -> None:
    path = saved(tmp_path, ethanol)
    for dtype in ("float16", "double", torch.bfloat16):
        with pytest.raises(ValueError, match=f"dtype '{dtype}' is unknown. Choose float32 or float64"):
            load(path, dtype=dtype)
        with pytest.raises(ValueError, match="unknown"):
            as_potential(make_potential(ELEMENTS), dtype=dtype)
    assert load(path, dtype="float64").dtype == load(path, dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="needs a potential in float32 or float64, found torch.bfloat16"):
        Calculator(make_potential(ELEMENTS).to(torch.bfloat16))


def test_a_potential_in_memory_keeps_its_device_and_dtype() -> None:
    """What cannot be had is refused instead of ignored."""
    potential = make_potential(["C", "O"])
    assert as_potential(potential) is potential
    assert as_potential(potential, "cpu", "float64") is potential
    for asked in ({"dtype": "float32"}, {"device": "cuda"}):
        with pytest.raises(ValueError, match=r"is in memory, on cpu in torch\.float64"):
            Calculator(potential, **asked)
