"""Every recipe is read and trained for some steps on small data of its format; sizes are cut, nothing else."""

from __future__ import annotations

from pathlib import Path

import ase.io
import pytest
import yaml
from conftest import DEMO, ETHANOL, often
from small_formats import crystals, write_iso17, write_mptrj, write_oc20

from gossamer.config import load_config, make_config
from gossamer.models import MODELS
from gossamer.potential_file import load
from gossamer.runs import train

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))
FEW = ("rmd17-weft", "mptrj-nequip-L")
SMALL = {"num_features": 8, "num_layers": 2, "num_basis": 4, "cutoff": 4.0}


def data_for(name: str, tmp_path: Path) -> dict:
    if name.startswith("oc20"):
        folder = str(write_oc20(tmp_path / "s2ef"))
        return {"train": folder, "valid": None, "valid_fraction": 0.3}
    if name.startswith("iso17"):
        return {"train": str(write_iso17(tmp_path / "reference.db")), "test": None, "valid_fraction": 0.3}
    if name.startswith("mptrj"):
        return {"train": str(write_mptrj(tmp_path / "mptrj.json")), "valid_fraction": 0.3}
    if name.startswith("mlearn"):
        ase.io.write(tmp_path / "crystals.extxyz", crystals())
        return {"train": str(tmp_path / "crystals.extxyz"), "test": None, "valid_size": 2}
    file = "water_liquid_350K" if name.startswith(("water", "direct")) else "ethanol_500K"
    part = {"train": str(DEMO / f"{file}.extxyz.xz"), "valid": None, "test": None, "train_size": 6, "valid_size": 2}
    if name.startswith("finetune"):
        del part["valid"], part["test"]
    return part


def cut(values: dict, out: Path) -> dict:
    """Small sizes and few steps."""
    training = {"steps": 3, "valid_every": 3, "checkpoint_every": 3, "compile": False, "batch_size": 2}
    values = {**values, "training": {**values["training"], **training}, "out": str(out)}
    if "preset" in values.get("model", {}):
        values["model"] = {**values["model"], "num_features": [4, 3, 2, 2], "num_layers": 2, "embedding_features": 4, "radial_width": 8}
    elif "model" in values and "name" in values["model"]:
        values["model"] = {**values["model"], **SMALL}
    return values


@pytest.mark.parametrize("path", often(RECIPES, [p for p in RECIPES if p.stem in FEW]), ids=lambda p: p.stem)
def test_recipe_runs(path: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    values["data"] = {**values["data"], **data_for(path.stem, tmp_path)}
    if "finetune" in values:  # a start of the right kind, trained just as little
        first = f"{path.stem[:-2]}-1" if path.stem.endswith("-2") else "rmd17-leignn"
        before = yaml.safe_load((path.parent / f"{first}.yaml").read_text())
        before["data"] = {**before["data"], **data_for(first, tmp_path)}
        train(cut(before, tmp_path / "start"), progress=False)
        values["finetune"]["start"] = str(tmp_path / "start" / "potential.safetensors")
        if "replay" in values["finetune"]:
            values["finetune"]["replay"] = values["data"]["train"]
    results = train(cut(values, tmp_path / "run"), progress=False)
    assert results["steps"] == 3
    assert results["valid"]["forces_mae_meV_per_A"] > 0
    assert load(tmp_path / "run" / "potential.safetensors").conservative is not values.get("model", {}).get("direct_forces", False)


@pytest.mark.parametrize("path", [p for p in RECIPES if "finetune:" not in p.read_text()], ids=lambda p: p.stem)
def test_recipe_as_written_is_valid(path: Path) -> None:
    config = load_config(path)
    assert config.out.startswith("runs/")
    assert path.read_text().startswith("#"), "a recipe says what it is for"


def test_there_is_a_recipe_for_every_network_and_data_set() -> None:
    names = " ".join(p.stem for p in RECIPES)
    for name in MODELS:
        assert all(f"{data}-{name}" in names for data in ("rmd17", "lips", "water")), name
    assert "mptrj-geodite-1" in names
    assert "iso17" in names


def test_recipe_that_asks_for_labels_the_data_lacks(tmp_path: Path) -> None:
    values = yaml.safe_load((RECIPES[0].parent / "mlearn-leignn.yaml").read_text())
    values["data"] = {"train": ETHANOL}
    with pytest.raises(ValueError, match=r"frames has stress, but loss.stress is above 0"):
        train(cut(values, tmp_path / "run"), progress=False)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "nequip", "num_features": [8, 4], "l_max": 2}, "num_features lists 2 numbers, but l_max is 2"),
        ({"name": "nequip", "l_max": 0, "direct_forces": True}, "direct_forces needs l_max of 1 or more"),
        ({"name": "nequip", "pair_cutoffs": {"H": 9.0}}, r"gives 9.0 Å for H-any: it must be above 0 and at most cutoff"),
        ({"name": "nequip", "pair_cutoffs": {"Hh": 2.0}}, "names 'Hh', which is no chemical symbol"),
        ({"name": "nequip", "preset": "XXL"}, "has no preset 'XXL'. Choose one of tiny, S, M, L, XL, MP-L"),
        ({"name": "geodite", "preset": "S"}, "the network geodite has no preset 'S'. Choose one of tiny"),
        ({"name": "geodite", "num_heads": 7}, r"num_heads \(7\) must divide num_features \(64\)"),
        ({"name": "schnet", "direct_forces": True}, "model.direct_forces"),
        ({"name": "allegro"}, "leignn"),
        ({"name": "geodite", "l_maxx": 2}, "unknown setting. Did you mean model.l_max"),
    ],
)
def test_wrong_networks(model: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config({"data": {"train": "x"}, "model": model})


def test_pair_cutoffs_of_absent_elements_are_refused(tmp_path: Path) -> None:
    config = {
        "data": {"train": ETHANOL},
        "model": {"name": "nequip", "pair_cutoffs": {"Si": 3.0}},
        "out": str(tmp_path / "r"),
    }
    with pytest.raises(ValueError, match="pair_cutoffs names Si, which is not among the elements of the data"):
        train(config, progress=False)


def test_two_repulsions_are_refused(tmp_path: Path) -> None:
    config = {
        "data": {"train": ETHANOL},
        "model": {"name": "geodite", "variant": "published"},
        "out": str(tmp_path / "r"),
    }
    with pytest.raises(ValueError, match="has a repulsion of its own: set potential.zbl to false"):
        train(config, progress=False)
