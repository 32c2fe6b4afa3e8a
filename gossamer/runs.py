"""The whole path from settings to a saved potential, and its errors, on one page."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch

from gossamer.config import Config, load_config, make_config, save_config
from gossamer.data.dataset import Subset, load_data, open_dataset, require_labels
from gossamer.data.inspection import inspect
from gossamer.data.readers import LabelConfig
from gossamer.data.statistics import compute_statistics
from gossamer.data.structure import Structure
from gossamer.engine.engine import Engine, Way
from gossamer.evaluation import Evaluation, evaluate_potential
from gossamer.files import atomic_path, write_json
from gossamer.models import DEFAULT, MODELS
from gossamer.potential import DTYPES, Potential
from gossamer.potential_file import load, read_manifest, save
from gossamer.quantities import QUANTITIES
from gossamer.settings import to_dict
from gossamer.training.finetune import Joined, adapt_statistics, choose_replay, choose_weights, merge_adapters, transfer_weights
from gossamer.training.loop import load_state, make_state, run_training, stopped_early, train_step
from gossamer.training.process_group import start_process_group

log = logging.getLogger(__name__)
POTENTIAL = "potential.safetensors"


def train(
    config: Config | Path | str | Mapping[str, Any], overrides: Sequence[str] = (), resume: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Train a potential from settings, a YAML file or a dictionary.

    The folder ``config.out`` gets the complete settings (config.yaml), log.csv, checkpoint.safetensors, the best
    potential by validation (potential.safetensors) and results.json.

    Args:
        config: Settings, or where they are.
        overrides: ``path.to.key=value``.
        resume: Continue from the folder's checkpoint (if there is one).
        progress: Show a progress bar.

    Returns:
        What results.json holds: errors on validation and test data, steps, seconds.

    Raises:
        FileExistsError: the folder holds a run and ``resume`` is False.
        ValueError: settings, data or labels that do not fit together.
        RuntimeError: the loss became NaN.
    """
    config = _as_config(config, overrides)
    folder = Path(config.out)
    checkpoint = folder / "checkpoint.safetensors"
    if not resume and ((folder / POTENTIAL).exists() or checkpoint.exists()):
        raise FileExistsError(f"'{folder}' holds a run already. Go on with it (--resume), or choose another folder (out=...).")
    check_loss(config)
    train_set, valid_set, test_set = load_data(config.data)
    needed = config.loss.needed()
    for part in (train_set, valid_set):
        require_labels(part, needed, "loss.{label} is above 0")
    for label in train_set[0].labels:
        if label not in needed:
            log.warning("%s labels are in the data but not in the loss (loss.%s is 0)", label, label)
    if config.model.max_neighbors is not None:
        log.warning("model.max_neighbors keeps %d neighbours: energy and forces jump when ranks change", config.model.max_neighbors)
    workers = start_process_group(config.training.device)
    try:
        torch.manual_seed(config.training.seed)
        replayed: Sequence[Structure] | None = None
        tuning: dict[str, Any] = {}
        if config.finetune is None:
            statistics = compute_statistics(
                train_set, config.model.cutoff, config.data.reference_energies, config.data.elements, config.model.max_neighbors
            )
            potential = Potential(config.model, statistics, config.potential)
        else:
            potential, train_set, replayed, tuning = start_finetuning(config, train_set, needed)
        if config.loss.normalize:
            spreads = potential.statistics.spreads or {}
            absent = [label for label in needed if label not in spreads]
            if absent:
                raise ValueError(
                    f"loss.normalize divides by the spread of the labels, but {', '.join(absent)} do not vary in the "
                    "training data. Set loss.normalize to false, or their weights to 0."
                )
        potential.network.to(DTYPES[config.training.dtype])
        potential.to(workers.device)
        for structure in valid_set:
            potential.check_elements(structure.atomic_numbers, structure.name)
        state = make_state(potential, config.training, config.loss)
        settings = to_dict(config)
        identity = {k: settings[k] for k in ("model", "potential", "loss", "training")} | {"data": potential.statistics.fingerprint}
        if config.finetune is not None:
            identity["finetune"] = settings["finetune"] | {"checksum": tuning["start_checksum"]}
        if resume and checkpoint.exists():
            load_state(state, checkpoint, identity)
        elif config.finetune is not None and workers.rank == 0:
            tuning["before"] = tuning_errors(potential, valid_set, replayed)
            write_json(folder / "finetune.json", tuning)
        if workers.rank == 0:
            save_config(config, folder / "config.yaml")
        checks = check_structures(valid_set)

        def save_best(best: Potential) -> None:
            save(merge_adapters(best), folder / POTENTIAL, checks, settings)

        run_training(state, train_set, valid_set, config.loss, config.training, workers, folder, identity, save_best, progress)
        if state.step < config.training.steps and not stopped_early(state, config.training):
            return {"stopped_at_step": state.step, "out": str(folder)}
        results: dict[str, Any] = {"steps": state.step, "seconds": round(state.seconds, 1), "out": str(folder)}
        if workers.rank == 0:
            best = load(folder / POTENTIAL, workers.device)
            results["num_parameters"] = best.num_parameters
            results["valid"] = evaluate_potential(best, valid_set).summary()
            if test_set is not None:
                results["test"] = evaluate_potential(best, test_set).summary()
            if config.finetune is not None:
                tuning["before"] = json.loads((folder / "finetune.json").read_text())["before"]
                tuning["after"] = tuning_errors(best, valid_set, replayed)
                write_json(folder / "finetune.json", tuning)
                results["finetune"] = {k: v for k, v in tuning.items() if not k.endswith("_weights")}
            write_json(folder / "results.json", results)
        return results
    finally:
        workers.close()


def start_finetuning(
    config: Config, train_set: Sequence[Structure], needed: Sequence[str]
) -> tuple[Potential, Sequence[Structure], Sequence[Structure] | None, dict[str, Any]]:
    """A potential with the weights of the start, the training frames with replayed ones, old frames to test, and a report.

    Raises:
        ValueError: labels missing in the replayed data, patterns that match no weight, heads or elements left untrained.
    """
    tune = config.finetune
    assert tune is not None
    start = load(tune.start)
    given = config.data.reference_energies
    fresh = compute_statistics(
        train_set, config.model.cutoff, "least_squares" if given == "auto" else given, config.data.elements, config.model.max_neighbors
    )
    n_new, used, replayed = len(train_set), None, None
    if tune.replay is not None:
        old = open_dataset(tune.replay, tune.replay_labels or config.data.labels)
        indices, kept = choose_replay(old, n_new, tune.replay_fraction, config.data.seed)
        used, replayed = Subset(old, indices), Subset(old, kept) if kept else None
        require_labels(used, needed, "loss.{label} is above 0 (frames of finetune.replay)")
        for structure in old:
            start.check_elements(structure.atomic_numbers, structure.name)
    statistics = adapt_statistics(start, fresh, train_set, used or ())
    if given != "auto":
        statistics = replace(statistics, reference_energies={**statistics.reference_energies, **fresh.reference_energies})
    potential = Potential(config.model, statistics, config.potential)
    potential.network.to(start.dtype)
    transferred = transfer_weights(start, potential)
    weights = choose_weights(potential.network, tune, transferred)
    if used is not None:
        train_set = Joined(train_set, used)
    shifts = {e: statistics.reference_energies[e] - start.statistics.reference_energies.get(e, 0.0) for e in statistics.elements}
    report = {
        "start": tune.start, "start_checksum": read_manifest(tune.start)["checksum"], "labels": list(needed), "n_new_frames": n_new,
        "n_replayed_frames": len(train_set) - n_new, "reference_energy_shifts_eV": shifts, **transferred, **weights,
    }  # fmt: skip
    log.info(
        "fine-tuning '%s': %d weights train, %d are frozen, %d adapters; labels: %s; %d new frames, %d replayed", tune.start, weights["n_trained"],
        weights["n_frozen"], weights["adapters"], ", ".join(needed), n_new, report["n_replayed_frames"],
    )  # fmt: skip
    return potential, train_set, replayed, report


def tuning_errors(potential: Potential, valid_set: Sequence[Structure], replayed: Sequence[Structure] | None) -> dict[str, Any]:
    """Errors on the validation frames, and on old frames that were not replayed."""
    was_training = potential.training
    out = {"valid": evaluate_potential(potential.eval(), valid_set, keep=0).summary()}
    if replayed:
        out["old_data"] = evaluate_potential(potential, replayed, keep=0).summary()
    potential.train(was_training)
    return out


def fit(
    data: Path | str,
    model: str | None = None,
    out: Path | str = "fit",
    minutes: float = 30.0,
    labels: LabelConfig | None = None,
    resume: bool = False,
    force: bool = False,
    start: Path | str | None = None,
    weights: Sequence[str] | None = None,
    low_rank: int | None = None,
    replay: Path | str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train on a labelled file without a configuration: inspect, split, choose settings, write them down, train.

    Args:
        data: Labelled structures; one tenth is kept for validation.
        model: Name of the network, or of one of its presets (nequip/M); None: that of ``start``, else leignn.
        out: Folder of the run; its config.yaml holds the settings chosen and can be trained again.
        minutes: About how long training may take on this machine (measured with a few steps).
        labels: Names and units of the labels.
        resume: Go on with the run in ``out``.
        force: Train even if inspection finds errors.
        start: Fine-tune this saved potential instead of training from random weights.
        weights: With ``start``: names of the weights to train, with wildcards; the others stay frozen.
        low_rank: With ``start``: train adapters of this rank.
        replay: With ``start``: labelled structures of the old data to mix in.
        progress: Show a progress bar.

    Returns:
        As ``train``.

    Raises:
        ValueError: inspection found errors, or the model is unknown.
    """
    if model is not None and model.split("/")[0] not in MODELS:
        raise ValueError(f"model '{model}' is unknown. Choose one of {', '.join(MODELS)}.")
    tuning = {"train": list(weights) if weights else None, "low_rank": low_rank, "replay": None if replay is None else str(replay)}
    tuning = {k: v for k, v in tuning.items() if v is not None}
    if start is None and tuning:
        raise ValueError(
            f"{', '.join('weights' if k == 'train' else k for k in tuning)}: only fine-tuning has these. Name the potential to start from (start)."
        )
    if not minutes > 0:
        raise ValueError(f"minutes must be positive, found {minutes}.")
    folder = Path(out)
    if resume and (folder / "config.yaml").exists():
        return train(folder / "config.yaml", resume=True, progress=progress)
    structures = open_dataset(data, labels)
    report = inspect(structures, labels)
    for message in report.warnings:
        log.warning("%s", message)
    if report.errors and not force:
        raise ValueError("The data is not fit for training: " + "; ".join(report.errors) + ". Mend it, or insist with --force.")
    finetune = None if start is None else {"start": str(start), **tuning}
    config = choose_settings(structures, str(data), model, str(out), labels or LabelConfig(), finetune)
    seconds = float(np.median(time_steps(config, structures)[0][1:]))
    defaults = MODELS[config.model.name][1].fit_defaults
    share, wait = defaults.compiled_share, defaults.compile_seconds
    compiled = 60 * minutes > 4 * wait
    steps = (60 * minutes - wait) / (share * seconds) if compiled else 60 * minutes / seconds
    training: dict[str, Any] = {"steps": max(100, round(0.85 * steps)), "compile": compiled}
    every = max(1, min(1000, training["steps"] // 10))
    training["ema_decay"] = round(min(0.999, 1 - 20 / training["steps"]), 4)  # an average over the last part of the run, not over all of it
    config = make_config(
        to_dict(config), [f"training.{k}={v}" for k, v in {**training, "valid_every": every, "checkpoint_every": every}.items()]
    )
    log.info(
        "one step takes %.0f ms: training %d steps; settings are in '%s'", 1000 * seconds, config.training.steps, folder / "config.yaml"
    )
    return train(config, progress=progress)


def choose_settings(
    structures: Sequence[Structure], data: str, model: str | None, out: str, labels: LabelConfig, finetune: Mapping[str, Any] | None = None
) -> Config:
    """Settings that suit a data set: which labels, which split, how many structures per step."""
    sample = [structures[k] for k in range(0, len(structures), max(1, len(structures) // 200))]
    atoms = float(np.mean([s.n_atoms for s in sample]))
    has = {label: all(label in s.labels for s in structures) for label in QUANTITIES}
    if not has["energy"] and not has["forces"]:
        raise ValueError(f"Neither energy nor forces are in every frame of '{data}': there is nothing to learn from.")
    grouped = all(s.group is not None for s in sample)
    batch_size = int(np.clip(round(160 / atoms), 1, 16))
    if len(structures) < 20:
        log.warning("%d frames are few: expect large errors", len(structures))
    started = None if finetune is None else read_manifest(finetune["start"])["model"]["name"]
    name, _, preset = (model or started or DEFAULT).partition("/")
    rate = MODELS[name][1].fit_defaults.learning_rate * (1.0 if finetune is None else 0.2)  # near a good solution large steps only destroy
    return make_config(
        {
            "data": {"train": data, "labels": to_dict(labels), "split": "group" if grouped else "random"},
            "model": {"name": name, **({"preset": preset} if preset else {})},
            **({} if finetune is None else {"finetune": dict(finetune)}),
            # stress in eV/Å³ is small: 20 makes it about the virial per atom
            "loss": {"energy": 5.0 * has["energy"], "forces": 10.0 * has["forces"], "stress": 20.0 * has["stress"]},
            "training": {"batch_size": min(batch_size, max(1, len(structures) // 2)), "learning_rate": rate},
            "out": out,
        }
    )


def time_steps(
    config: Config, structures: Sequence[Structure], repeats: int = 5, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[float], bool]:
    """Seconds of each of some training steps with these settings here, the first ones with compilation; and whether they were compiled."""
    workers = start_process_group(config.training.device)
    size = min(len(structures), config.training.batch_size)
    statistics = compute_statistics(structures, config.model.cutoff)
    potential = Potential(config.model, statistics, config.potential)
    potential.network.to(DTYPES[config.training.dtype])
    state = make_state(potential.to(workers.device), config.training, config.loss)
    times = []
    for k in range(repeats):
        graph = potential.collate([structures[(k * size + i) % len(structures)] for i in range(size)])
        began = clock()
        train_step(state, graph, config.loss, config.training, workers)
        times.append(clock() - began)
    return times, state.forward.compiled is not None


def _as_config(config: Config | Path | str | Mapping[str, Any], overrides: Sequence[str]) -> Config:
    if isinstance(config, Config):
        return make_config(to_dict(config), overrides) if overrides else config
    return make_config(config, overrides) if isinstance(config, Mapping) else load_config(config, overrides)


def check_loss(config: Config) -> None:
    """Raise ValueError for a loss that cannot train this model."""
    loss = config.loss
    if not loss.needed():
        raise ValueError("loss.energy, loss.forces and loss.stress are all 0: there is nothing to learn from.")
    if config.model.direct_forces and loss.stress > 0:
        raise ValueError(
            "loss.stress is above 0, but model.direct_forces predicts no stress. Set loss.stress to 0, or direct_forces to false."
        )
    if config.model.direct_forces and loss.forces == 0:
        raise ValueError("model.direct_forces needs loss.forces above 0: its force head learns from forces alone.")


def check_structures(structures: Sequence[Structure], n: int = 3) -> list[Structure]:
    """A few small structures, different in composition where possible, to store with the potential."""
    order = sorted(range(min(len(structures), 1000)), key=lambda k: structures[k].n_atoms)
    chosen: list[Structure] = []
    seen: set[tuple[int, ...]] = set()
    for k in order:
        key = tuple(np.unique(structures[k].atomic_numbers).tolist())
        if key not in seen:
            seen.add(key)
            chosen.append(structures[k])
        if len(chosen) == n:
            return chosen
    return chosen + [structures[k] for k in order if structures[k] not in chosen][: n - len(chosen)]


def evaluate(
    model: Potential | Path | str,
    data: Path | str | Sequence[Structure],
    labels: LabelConfig | None = None,
    out: Path | str | None = None,
    worst: int = 20,
    device: str = "cpu",
    way: Way = "auto",
) -> Evaluation:
    """Errors of a potential on labelled data.

    Args:
        model: Potential, or file of one.
        data: Structures, or where they are.
        labels: Names and units of the labels.
        out: Folder for errors.json and worst.extxyz (the frames with the largest errors, labels and predictions).
        worst: How many of those.
        device: Where to compute, if ``model`` is a file.
        way: How to evaluate (`gossamer.engine.engine`).
    """
    potential = model if isinstance(model, Potential) else load(model, device)
    structures = open_dataset(data, labels) if isinstance(data, str | Path) else data
    evaluation = evaluate_potential(potential, structures, run=Engine(potential, way))
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "errors.json", evaluation.summary())
        write_worst(potential, structures, evaluation, folder / "worst.extxyz", worst)
    return evaluation


def write_worst(potential: Potential, structures: Sequence[Structure], evaluation: Evaluation, path: Path, n: int) -> None:
    """The frames with the largest errors: labels as energy and forces, predictions under names of their own."""
    frames = []
    by_index = {f["index"]: f for f in evaluation.frames}
    for index in evaluation.worst(n):
        atoms = structures[index].to_ase()
        predicted = potential.predict([structures[index]])[0]
        atoms.info |= {k: v for k, v in by_index[index].items() if k != "name"} | {"predicted_energy": predicted["energy"]}
        atoms.info["source"] = structures[index].name.replace("'", "")
        atoms.arrays["predicted_forces"] = predicted["forces"]
        frames.append(atoms)
    with atomic_path(path) as temporary:
        ase.io.write(temporary, frames, format="extxyz")
