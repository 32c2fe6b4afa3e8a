"""Settings classes: what is refused, and the command-line flags made from them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
import torch
from pydantic import Field

from gossamer.config import load_config, make_config, save_config, without_effect
from gossamer.flags import add_flags, from_flags
from gossamer.models import MODELS
from gossamer.potential import PotentialConfig
from gossamer.settings import build, configured, settings, to_dict
from gossamer.simulation.options import MDConfig


@settings
class Options:
    """Options of everything."""

    width: Annotated[float, Field(gt=0)] = 2.5
    """Å, 10 % of it is ``tail``."""
    count: Annotated[int, Field(ge=1)] | None = None
    """How many; by default all."""
    kind: Literal["round", "flat"] = "round"
    """Shape."""
    order: Literal[1, 2] = 1
    """Of the method."""
    names: tuple[str, ...] = ()
    """Which."""
    sizes: list[int] = Field(default_factory=lambda: [1, 2])
    """How large."""
    repeats: tuple[int, int, int] = (1, 1, 1)
    """Along each axis."""
    folder: Path | None = None
    """Where."""
    fast: bool = False
    """Hurry."""
    careful: bool = True
    """Check."""
    compiled: bool | None = None
    """Compile."""
    seed: int = 0
    """Of noise."""


def parser(**options) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(exit_on_error=False)
    add_flags(made, Options, **options)
    return made


def parsed(*arguments: str) -> Options:
    return from_flags(Options, parser().parse_args(arguments))


def test_flags_give_the_settings() -> None:
    assert parsed() == Options()
    given = parsed("--width", "3", "--count", "4", "--kind", "flat", "--order", "2", "--names", "a", "b", "--sizes", "5", "--repeats", "1", "2", "3",
                   "--folder", "x", "--fast", "--no-careful", "--no-compiled")  # fmt: skip
    assert given == Options(
        width=3.0, count=4, kind="flat", order=2, names=("a", "b"), sizes=[5], repeats=(1, 2, 3), folder=Path("x"), fast=True, careful=False,
        compiled=False,
    )  # fmt: skip
    assert parsed("--careful", "--compiled") == Options(compiled=True)


def test_flags_say_defaults_and_choices() -> None:
    text = " ".join(parser().format_help().split())
    for part in (
        "10 % of it is tail (default: 2.5)",
        "How many; by default all.",
        "{round,flat}",
        "Along each axis (default: 1 1 1)",
        "--no-careful",
    ):
        assert part in text, part
    assert "--no-fast" not in text
    assert "--width" not in parser(without=["width"]).format_help()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "square"], "invalid choice: 'square'"),
        (["--order", "3"], "invalid choice: 3"),
        (["--count", "some"], "invalid int value: 'some'"),
        (["--repeats", "1", "2"], "expected 3 arguments"),
        (["--width", "0"], r"width: Input should be greater than 0 \(found 0.0\)"),
    ],
)
def test_wrong_flags(arguments: list[str], message: str) -> None:
    with pytest.raises((argparse.ArgumentError, ValueError), match=message):
        parsed(*arguments)


def test_a_field_that_no_flag_can_say() -> None:
    @settings
    class Deep:
        table: dict[str, float] = Field(default_factory=dict)

    with pytest.raises(TypeError, match=r"Deep\.table is a dict.* there is no flag for it"):
        add_flags(argparse.ArgumentParser(), Deep)


def test_objects_and_keywords() -> None:
    assert configured(Options, None, {"count": 2}) == Options(count=2)
    assert configured(Options, Options(count=2, fast=True), {"count": 3}) == Options(count=3, fast=True)
    with pytest.raises(TypeError, match=r"Expected Options, found 3\.0. Options are given by name: width=3\.0"):
        configured(Options, 3.0, {})
    with pytest.raises(ValueError, match=r"widht: unknown setting. Did you mean width\?"):
        build(Options, {"widht": 3})


# --- sizes that no machine has ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, message",
    [("cutoff=1e18", "less than or equal to 100"), ("num_features=1000000000", "10000"), ("num_layers=1000000000000", "100"), ("num_basis=1e9", "10000")],
)  # fmt: skip
@pytest.mark.parametrize("name", list(MODELS))
def test_sizes_that_no_machine_has_are_refused(name: str, setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.{setting.partition('=')[0]}: .*{message}"):
        make_config({"data": {"train": "x.extxyz"}, "model": {"name": name}}, [f"model.{setting}"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.minutes=.inf", "finite"), ("loss.energy=.nan", "finite"), ("data.reference_energies={H: .nan}", "finite"),
        ("training.seed=-1", "greater than or equal to 0"), ("data.seed=-1", "greater than or equal to 0"),
    ],
)  # fmt: skip
def test_numbers_that_no_run_could_use_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{setting.partition('=')[0]}: .*{message}"):
        make_config({"data": {"train": "x.extxyz"}}, [setting])


# --- settings without effect ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("training.schedule.patience=9", "training.schedule.patience is 9, which has no effect beside training.schedule.kind cosine"),
        ("loss={kind: l1, huber_delta: 0.1}", "loss.huber_delta is 0.1, which has no effect beside loss.kind l1"),
        ("loss.stress_huber_delta=0.1", "loss.stress_huber_delta is 0.1, which has no effect beside loss.stress 0"),
        ("potential={zbl: false, zbl_radius: 0.7}", "potential.zbl_radius is 0.7, which has no effect beside potential.zbl false"),
        ("potential.charge_smearing=2", "potential.charge_smearing is 2.0, which has no effect beside no potential.long_range"),
        ("training={minutes: 1, steps: 500}", "training.steps is 500, which has no effect beside training.minutes"),
        ("training.clock=cpu", "training.clock is cpu, which has no effect beside no training.minutes"),
        ("data={train: a, valid: b, split: group}", "data.split is group, which has no effect beside data.valid"),
        ("training.schedule={kind: plateau, patience: 9}", None),
    ],
)
def test_settings_of_a_run_without_effect_are_said(override: str, reason: str | None) -> None:
    assert without_effect(make_config({"data": {"train": "a"}}, [override])) == ([] if reason is None else [reason])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "nequip", "readout_width": 600}, r"model\.readout_width is 600, which has no effect beside readout_depth: 0"),
        ({"name": "nequip", "radial_depth": 0, "radial_width": 32}, r"model\.radial_width is 32, .* beside radial_depth: 0"),
        ({"name": "mace", "num_layers": 1, "readout_width": 32}, r"model\.readout_width is 32, .* beside num_layers: 1"),
        ({"name": "mace", "preset": "tiny", "num_layers": 1, "hidden_l_max": 0}, r"model\.hidden_l_max is 0, .* beside num_layers: 1"),
        ({"name": "sevennet", "irreps": ["4x0e", "4x0e"], "num_layers": 1}, r"model\.num_layers is 1, .* beside irreps. Leave one"),
    ],
)
def test_settings_without_effect_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config({"data": {"train": "x.extxyz"}, "model": model})


@pytest.mark.parametrize(
    "model",
    [
        {"name": "mace", "preset": "tiny", "num_layers": 1},
        {"name": "nequip", "preset": "S", "radial_depth": 0, "readout_width": None},
        {"name": "sevennet", "preset": "tiny", "irreps": ["4x0e", "4x0e"]},
    ],
)
def test_settings_without_effect_of_presets_are_as_by_default(model: dict[str, Any]) -> None:
    """What a run writes of its settings can be read again."""
    config = make_config({"data": {"train": "x.extxyz"}, "model": model})
    unused = MODELS[model["name"]][1].unused(to_dict(config.model))
    assert unused
    assert all(getattr(config.model, name) == getattr(type(config.model)(), name) for name in unused)
    assert make_config(to_dict(config)) == config


def unbounded(schema: Any, where: str) -> Iterator[str]:
    """Numbers of a JSON schema without a largest value."""
    if isinstance(schema, dict):
        if schema.get("type") in ("integer", "number") and not schema.keys() & {"maximum", "exclusiveMaximum", "enum", "const"}:
            yield where
        for key, part in schema.items():
            yield from unbounded(part, f"{where}.{key}")
    elif isinstance(schema, list):
        for part in schema:
            yield from unbounded(part, where)


@pytest.mark.parametrize("settings_class", [*(config for config, _ in MODELS.values()), PotentialConfig], ids=lambda c: c.__name__)
def test_every_number_of_a_network_has_an_upper_bound(settings_class: type) -> None:
    """But for cutoffs of pairs, which are compared with the cutoff."""
    found = list(unbounded(pydantic.TypeAdapter(settings_class).json_schema(), "model"))
    assert not [where for where in found if "pair_cutoffs" not in where]


def test_texts_that_look_like_numbers() -> None:
    """YAML 1.1 takes 1e-3 for a text and it is a number; a folder may be called 1.5."""
    config = make_config({"data": {"train": "1.5"}, "out": "2026.11", "training": {"learning_rate": "1e-3"}}, ["loss.energy=2E1"])
    assert (config.data.train, config.out, config.training.learning_rate, config.loss.energy) == ("1.5", "2026.11", 1e-3, 20.0)


NEQUIP = {"data": {"train": "a.xyz"}, "model": {"name": "nequip", "l_max": 2}}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.steps=1e4", 10_000),
        ("training.seed=007", 7),
        ("training.compile=on", True),
        ("training.compile=No", False),
        ("potential.zbl_radius=5e-1", 0.5),
        ("model.num_features=[1e1, 5, 5]", [10, 5, 5]),
        ("model.element_neighbors={No: 1e1}", {"No": 10.0}),
        ("data.reference_energies={No: -1e2, H: 3}", {"No": -100.0, "H": 3.0}),
        ("data.elements=[No, H]", ["No", "H"]),
        ("data.train=[1e5, no]", ["1e5", "no"]),
        ("data.labels.energy=off", "off"),
        ("out=1e5", "1e5"),
        ("out=2026-11-28", "2026-11-28"),
        ("out=12:30:00", "12:30:00"),
        ("out='2026'", "2026"),
    ],
)  # fmt: skip
def test_what_is_written_is_read_by_what_is_expected(override: str, value: Any, tmp_path: Path) -> None:
    """Numbers where there must be numbers, texts where there must be texts, whatever YAML takes them for; files keep them."""
    config = make_config(NEQUIP, [override])
    save_config(config, tmp_path / "config.yaml")
    for read in (config, load_config(tmp_path / "config.yaml")):
        found: Any = read
        for part in override.partition("=")[0].split("."):
            found = getattr(found, part)
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.device=null", "training.device: Input should be a valid string"),
        ("out=2026", r"out: Input should be a valid string \(found 2026\). A text that looks like a number stands in quotes: '2026'."),
        ("training.steps=true", "training.steps: found true, expected a number."),
        ("training.learning_rate=off", "training.learning_rate: Input should be a valid number"),
        ("training.steps=1.5", "training.steps: Input should be a valid integer"),
        ("training.compile=2", "training.compile: Input should be a valid boolean"),
        ("model.num_features=[4, true]", "model.num_features.1: found true, expected a number."),
        ("model.element_neighbors={No: yes}", "model.element_neighbors: Input should be a valid number"),
    ],
)  # fmt: skip
def test_wrong_kinds_of_values_are_said(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(NEQUIP, [override])


def test_a_device_of_torch_is_a_device() -> None:
    assert build(MDConfig, {"device": torch.device("cpu")}).device == "cpu"
    with pytest.raises(ValueError, match=r"device: Input should be a valid string \(found \[0, 0, 0, .* \.\.\.\)"):
        build(MDConfig, {"device": [0] * 1000})


def test_a_key_that_stands_twice_in_a_file(tmp_path: Path) -> None:
    """YAML keeps the last and loses the others, with all that is in them."""
    (tmp_path / "config.yaml").write_text("data: {train: a.xyz}\ntraining: {steps: 10, batch_size: 4}\ntraining: {steps: 12}\n")
    with pytest.raises(ValueError, match=r"config.yaml' is not valid YAML: 'training' stands twice\s+in .*line 3"):
        load_config(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("data: {train: a.xyz}\nloss: &l {energy: 2.0}\nout: x\n")
    assert load_config(tmp_path / "config.yaml").loss.energy == 2.0


def test_the_home_folder_is_meant_by_its_sign(tmp_path: Path) -> None:
    """A run with ``out: ~/run`` made a folder named ~ where it was started."""
    (tmp_path / "c.yaml").write_text("data: {train: ~/a.xyz}\nout: ~/run\n")
    config = load_config(tmp_path / "c.yaml", ["data.test=~/b.xyz"])
    assert [config.data.train, config.data.test, config.out] == [str(Path.home() / name) for name in ("a.xyz", "b.xyz", "run")]
