"""SevenNet's and Nequix' files, against stored outputs of the packages for random weights; refused by name where something is unknown."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from gossamer.imports import import_potential, nequix, read_potential, sevennet
from gossamer.imports.contract import ImportOptions
from gossamer.imports.inert import open_tree
from gossamer.potential import Potential
from gossamer.potential_file import load
from gossamer.simulation.calculator import Calculator

REFERENCE = Path(__file__).parent / "reference"


@cache
def stored(name: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as data:
        return dict(data)


def below(data: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in sorted(data.items()) if k.startswith(prefix)}


def checkpoint(variant: str) -> dict:
    """What torch.save would have written."""
    data = stored("sevennet")
    config = json.loads(str(data[f"{variant}/config"]))
    config["_type_map"] = dict(config["_type_map"])
    return {"config": config, "model_state_dict": {k: torch.from_numpy(v.copy()) for k, v in below(data, f"{variant}/state/").items()}}


def imported(variant: str, modal: str | None = None, **changes: object) -> Potential:
    found = checkpoint(variant)
    options = ImportOptions(modal=modal, elements=changes.pop("elements", None))  # type: ignore[arg-type]
    return sevennet.from_dictionary({**found["config"], **changes}, found["model_state_dict"], options, "'x.pth'")


def errors(potential: Potential, data: dict[str, np.ndarray], prefix: str, modal: str = "") -> tuple[float, float, float]:
    atoms = Atoms(data["numbers"], data["positions"], cell=data["cell"], pbc=True, calculator=Calculator(potential, way="plain"))
    ending = f"/{modal}" if f"{prefix}energy/{modal}" in data else ""
    return (
        abs(atoms.get_potential_energy() - float(data[f"{prefix}energy{ending}"])),
        float(np.abs(atoms.get_forces() - data[f"{prefix}forces{ending}"]).max()),
        float(np.abs(atoms.get_stress() - data[f"{prefix}stress{ending}"]).max()),
    )


@pytest.mark.parametrize(("variant", "modal"), [("both parities", None), ("two modals", "PBE"), ("two modals", "R2SCAN")])
def test_sevennet_as_its_package_computes_it(variant: str, modal: str | None) -> None:
    """float64; the package's own constants have seven digits."""
    energy, forces, stress = errors(imported(variant, modal), stored("sevennet"), f"{variant}/", modal or "")
    assert energy < 1e-7
    assert forces < 1e-7
    assert stress < 1e-9


@pytest.mark.parametrize("variant", ["norm", "elements"])
def test_nequix_as_its_package_computes_it(variant: str) -> None:
    data = stored("nequix")
    arrays = [v for _, v in sorted(below(data, f"{variant}/tensor/").items())]
    found = nequix.from_arrays(json.loads(str(data[f"{variant}/config"])), arrays, ImportOptions(), "'x.nqx'")
    energy, forces, stress = errors(found, data, f"{variant}/")
    assert energy < 5e-6
    assert forces < 2e-6
    assert stress < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_thing": 3}, r"settings that this gossamer does not know: new_thing = 3"),
        ({"act_radial": "ssp"}, r"act_radial is ssp; this gossamer knows silu only"),
        ({"self_connection_type": "none"}, r"self_connection_type is none; this gossamer knows linear and nequip"),
        ({"modal": "SCAN"}, r"has no modal 'SCAN' \(it has R2SCAN, PBE\)"),
        ({"modal": None}, r"holds several: choose one with --modal \(R2SCAN, PBE\)"),
        ({"elements": ["H", "Fe"]}, r"does not know Fe \(--elements\)"),
    ],
)
def test_what_is_not_known_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        imported("two modals", **{"modal": "PBE", **changes})


@pytest.mark.parametrize("name", ["self_connection_type", "irreps_manual", "weight_nn_hidden_neurons"])
def test_settings_without_end_are_refused(name: str) -> None:
    """A small file can hold tuples of tuples whose text, or hash, would take for ever."""
    endless: tuple = ("linear",)
    for _ in range(60):
        endless = (endless, endless)
    with pytest.raises(ValueError, match=f"{name} are a tuple, expected a list of"):
        imported("both parities", **{name: endless})


def test_a_tensor_left_over_is_refused() -> None:
    found = checkpoint("both parities")
    found["model_state_dict"]["1_convolution.gain"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"tensors that this gossamer does not know: 1_convolution.gain \[3\]"):
        sevennet.from_dictionary(found["config"], found["model_state_dict"], ImportOptions(), "'x.pth'")


def test_files_are_recognised_and_kept(tmp_path: Path) -> None:
    """From a file of each package to a potential that is loaded again, for some of its elements."""
    torch.save(checkpoint("both parities"), tmp_path / "x.pth")
    data = stored("nequix")
    with open(tmp_path / "x.nqx", "wb") as file:
        file.write(str(data["norm/config"]).encode() + b"\n")
        for array in below(data, "norm/tensor/").values():
            np.save(file, array)
    for name, source in (("x.pth", "sevennet"), ("x.nqx", "nequix")):
        whole = read_potential(open_tree(tmp_path / name), ImportOptions())
        assert whole[0] == source
        import_potential(tmp_path / name, tmp_path / f"{source}.safetensors", elements=["H", "O"])
        part = load(tmp_path / f"{source}.safetensors")
        assert part.statistics.elements == ["H", "O"]
        water = Atoms("OHH", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
        energies = []
        for potential in (whole[1], part):
            water.calc = Calculator(potential, way="plain")
            energies.append(water.get_potential_energy())
        assert energies[0] == pytest.approx(energies[1], abs=1e-5)
    (tmp_path / "x.nqx").write_bytes((tmp_path / "x.nqx").read_bytes()[:-40])
    with pytest.raises(ValueError, match="is damaged"):
        read_potential(open_tree(tmp_path / "x.nqx"), ImportOptions())
