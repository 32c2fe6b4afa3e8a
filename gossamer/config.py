"""One run's settings: assembled from those of each component, read from YAML, overridden, saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from gossamer.arguments import as_path
from gossamer.data.dataset import DataConfig
from gossamer.files import parse_yaml, write_text
from gossamer.models import DEFAULT, MODELS, ModelConfig
from gossamer.potential import PotentialConfig
from gossamer.potential_file import read_manifest
from gossamer.settings import build, settings, to_dict
from gossamer.training.config import TrainingConfig
from gossamer.training.finetune import FineTuneConfig, merge_model
from gossamer.training.losses import LossConfig


@settings
class Config:
    """Everything that defines a training run."""

    data: DataConfig
    model: ModelConfig = MODELS[DEFAULT][0]()
    potential: PotentialConfig = PotentialConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()
    finetune: FineTuneConfig | None = None
    """Start from a saved potential instead of random weights."""
    out: str = "runs/gossamer"
    """Folder of the run: log, checkpoint, saved potential."""


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``path.to.key=value`` overrides.

    Raises:
        FileNotFoundError, ValueError: unreadable file, unknown setting, value of the wrong kind.
    """
    path = as_path("config", path, "a YAML file of settings")
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration file '{path}'.")
    try:
        values = parse_yaml(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"'{path}' is not valid YAML: {error}") from None
    _check_size(values, path)
    if not isinstance(values, dict):
        raise ValueError(f"'{path}' must hold settings (name: value), found {type(values).__name__}.")
    return make_config(values, overrides)


def make_config(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Settings from nested dictionaries, with overrides. ``model.preset`` names a size (`Network.presets`).

    Raises:
        ValueError: as ``build``; or a setting of the network that is without effect beside the others, but not as by default.
    """
    merged = _plain(values)
    for override in overrides:
        _apply(override, merged)
    merged = _plain(merged)
    model, tune = merged.get("model"), merged.get("finetune")
    written = model if isinstance(model, dict) else {}
    if isinstance(model, dict) and "preset" in model:
        merged["model"] = expand_preset(model)
    elif isinstance(model, dict) and not tune:
        merged["model"] = {"name": DEFAULT, **model}
    start = tune.get("start") if isinstance(tune, dict) else None
    if isinstance(start, str):  # the network and its surroundings come from the file
        manifest = read_manifest(start)
        merged["model"] = merge_model(manifest["model"], merged.get("model") or {}, start)
        given = merged.get("potential") or {}
        merged["potential"] = {**manifest["potential"], **given} if isinstance(given, dict) else given
    config = build(Config, merged)
    unused = MODELS[config.model.name][1].unused(to_dict(config.model))
    if not unused:
        return config
    for name, reason in unused.items():
        value = getattr(config.model, name)
        if name in written and value != getattr(type(config.model)(), name):
            raise ValueError(f"model.{name} is {value}, which has no effect beside {reason}. Leave one of the two out.")
    # from a preset: it is written as by default, so that what a run writes can be read
    return build(Config, {**merged, "model": {k: v for k, v in merged["model"].items() if k not in unused}})


def without_effect(config: Config) -> list[str]:
    """Settings of a run that differ from their defaults and change nothing beside others, in words."""
    data, potential, loss, training = config.data, config.potential, config.loss, config.training
    schedule = training.schedule
    rules: tuple[tuple[bool, str, str, Any, tuple[str, ...]], ...] = (
        (data.valid is not None, "data.valid", "data", data, ("valid_fraction", "valid_size", "split")),
        (data.valid_size is not None, "data.valid_size", "data", data, ("valid_fraction",)),
        (not potential.zbl, "potential.zbl false", "potential", potential, ("zbl_radius", "zbl_power", "zbl_order")),
        (potential.long_range is None, "no potential.long_range", "potential", potential, ("charge_smearing", "net_charge")),
        (loss.kind in ("l1", "mse"), f"loss.kind {loss.kind}", "loss", loss, ("huber_delta", "stress_huber_delta")),
        (loss.stress == 0, "loss.stress 0", "loss", loss, ("stress_huber_delta",)),
        (loss.energy == 0, "loss.energy 0", "loss", loss, ("energy_per_atom",)),
        (schedule.kind != "plateau", f"training.schedule.kind {schedule.kind}", "training.schedule", schedule, ("factor", "patience")),
        (schedule.kind == "constant", "training.schedule.kind constant", "training.schedule", schedule, ("final",)),
        (schedule.warmup_steps == 0, "training.schedule.warmup_steps 0", "training.schedule", schedule, ("initial",)),
        (training.minutes is not None, "training.minutes", "training", training, ("steps", "valid_every", "checkpoint_every")),
        (training.minutes is None, "no training.minutes", "training", training, ("clock",)),
    )
    found: dict[str, str] = {}
    for idle, reason, where, part, names in rules:
        defaults = {f.name: f.default for f in fields(part)}
        for name in names if idle else ():
            if getattr(part, name) != defaults[name]:
                found.setdefault(f"{where}.{name}", f"{where}.{name} is {getattr(part, name)}, which has no effect beside {reason}")
    return list(found.values())


def _apply(override: str, values: dict[str, Any]) -> None:
    """Put the value of ``path.to.key=value`` where it belongs."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"'{override}' is not an override. Write path.to.key=value, for example training.steps=1000.")
    target = values
    *parents, last = key.strip().split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ValueError(f"'{override}': {parent} is a value, not a group of settings.")
    try:
        target[last] = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"'{override}': the value is not valid YAML ({' '.join(str(error).split())}).") from None


def expand_preset(model: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a named size; what is given beside the name wins.

    Raises:
        ValueError: this network has no preset of that name.
    """
    name, preset = model.get("name", DEFAULT), model["preset"]
    if not isinstance(preset, str):
        raise ValueError(f"model.preset: found {preset!r}, expected the name of a size, for example M.")
    known = MODELS[name][1].presets if isinstance(name, str) and name in MODELS else None
    if known is not None and preset not in known:
        raise ValueError(f"model.preset: the network {name} has no preset {preset!r}. Choose one of {', '.join(known)}.")
    return {"name": name, **(known or {}).get(preset, {}), **{k: v for k, v in model.items() if k != "preset"}}


def save_config(config: Config, path: Path) -> None:
    """Write every setting, defaults included, as YAML."""
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


def _check_size(values: Any, path: Path, limit: int = 100_000) -> None:
    """Raise ValueError for settings that YAML's aliases blow up (each is written out where it is used), or that hold themselves."""
    count, left = 0, [values]
    while left:
        value = left.pop()
        count += 1
        if count > limit:
            raise ValueError(f"'{path}' holds more than {limit} settings once its aliases (*name) are written out. Use fewer of them.")
        if isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
