"""The whole path from settings to a saved potential, and its errors, on one page."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer import __version__
from gossamer.arguments import as_path
from gossamer.calibration import measure_uncertainty
from gossamer.config import Config, load_config, make_config, save_config, without_effect
from gossamer.data.dataset import Subset, digest, require_labels, without
from gossamer.data.fingerprint import SeenFrames
from gossamer.data.statistics import compute_statistics, find_limits, widened
from gossamer.data.structure import Structure
from gossamer.evaluation import evaluate_potential
from gossamer.files import keeping_before, locked, set_aside, write_json
from gossamer.potential import DTYPES, Potential
from gossamer.potential_file import check_sizes, load, read_manifest, save, save_again
from gossamer.random_stream import RandomStream
from gossamer.run_frames import Frames, old_frames, read_frames, reads, say_unused, write_frames
from gossamer.settings import build, to_dict
from gossamer.training.finetune import Concatenated, adapt_statistics, choose_replay, choose_weights, merge_adapters, transfer_weights
from gossamer.training.loop import CHECKPOINT, finished, run_training
from gossamer.training.optim import Schedule
from gossamer.training.process_group import ProcessGroup, log_of_rank, restarted, start_process_group
from gossamer.training.state import State, close, load_state, make_state

log = logging.getLogger(__name__)
POTENTIAL = "potential.safetensors"
VALID = "valid.extxyz"


def train(
    config: Config | Path | str | Mapping[str, Any], overrides: Sequence[str] | str = (), resume: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Train a potential from settings, a YAML file or a dictionary.

    The folder ``config.out`` gets the complete settings (config.yaml), log.csv, checkpoint.safetensors, the best
    potential by validation (potential.safetensors) and results.json; also the validation frames (valid.extxyz), if they
    were split off the training data.

    Args:
        config: Settings, or where they are.
        overrides: ``path.to.key=value``, one or several.
        resume: Continue from the folder's checkpoint (if there is one). So does a process that torchrun started anew.
        progress: Show a progress bar.

    Returns:
        What results.json holds: errors on validation and test data, steps, epochs, seconds. Of a run that SIGTERM stopped: "stopped"
        (the signal's name), "stopped_at_step", "out".

    Raises:
        TypeError: no settings.
        FileExistsError: the folder holds a run and ``resume`` is False.
        ValueError: settings, data or labels that do not fit together.
        RuntimeError: the loss became NaN, or another process trains into the same folder.
    """
    chosen = isinstance(config, Config) and not overrides
    config = _as_config(config, overrides)
    folder = Path(config.out)
    checkpoint = folder / CHECKPOINT
    resume = resume or restarted()
    if not resume:
        check_free(folder)
    check_loss(config)
    check_schedule(config)
    for sentence in () if chosen else without_effect(config):
        log.warning("%s", sentence)
    frames = read_frames(config)
    if not chosen:  # a program, such as `fit` and `compare`, has said what it leaves out
        say_unused(frames, config)
    group = start_process_group(config.training.device, config.training.timeout)
    numbers = RandomStream(config.training.seed, group.device)
    with closing(group), locked(folder) if group.rank == 0 else nullcontext(), log_of_rank(folder, group), numbers.drawn():
        potential, frames, tuning = prepare_potential(config, frames, group)
        state = make_state(potential, config.training, config.loss)
        settings = to_dict(config)
        identity = run_identity(settings, potential, frames, tuning)
        resumed = resume and checkpoint.exists()
        if resumed:
            load_state(state, checkpoint, identity)
            check_statistics(folder / POTENTIAL, potential)
        if group.rank == 0:
            write_start(config, folder, frames, potential, tuning, resumed)
        checks = check_structures(frames.valid)

        def save_best(best: Potential) -> None:
            save(merge_adapters(best), folder / POTENTIAL, checks, settings)

        if resumed:
            replace_lost(state, folder / POTENTIAL, group, save_best)
        try:
            run_training(state, frames.train, frames.valid, config.loss, config.training, group, folder, identity, save_best, progress)
        except KeyboardInterrupt:
            from_where = f"--resume goes on from '{checkpoint}'" if checkpoint.exists() else "there is no checkpoint yet to go on from"
            log.warning("interrupted at step %d; %s", state.step, from_where)
            raise
        if not finished(state, config.training):
            return {"stopped": "SIGTERM", "stopped_at_step": state.step, "out": str(folder)}
        results: dict[str, Any] = {
            "steps": state.step,
            "epochs": round(state.epochs, 2),
            "seconds": round(state.seconds, 1),
            "out": str(folder),
        }
        if group.rank == 0:
            results |= step_times(state) | measure(config, folder, frames, tuning, group.device)
            write_json(folder / "results.json", results)
        return results


def check_free(folder: Path) -> None:
    """Refuse, by a FileExistsError, a folder that holds a run."""
    if (folder / POTENTIAL).exists() or (folder / CHECKPOINT).exists():
        raise FileExistsError(
            f"'{folder}' holds a run already. Go on with it (--resume), or choose another folder (out=..., of gossamer fit --out)."
        )


# --- the steps of training --------------------------------------------------------------------------------------------


def prepare_potential(config: Config, frames: Frames, group: ProcessGroup) -> tuple[Potential, Frames, dict[str, Any]]:
    """A potential ready to train, the frames with those that fine-tuning adds, and the report of fine-tuning (empty without).

    Raises:
        ValueError: labels that do not vary, elements that the training frames lack, test frames without labels, or settings of the
            network that no file could hold.
    """
    if config.model.max_neighbors is not None:
        log.warning("model.max_neighbors keeps %d neighbours: energy and forces jump when ranks change", config.model.max_neighbors)
    tuning: dict[str, Any] = {}
    seen = SeenFrames.of(frames.train, frames.valid)
    if config.finetune is None:
        statistics = compute_statistics(
            frames.train, config.model.cutoff, config.data.reference_energies, config.data.elements, config.model.max_neighbors,
            config.loss.free_atoms_only,
        )  # fmt: skip
        potential = Potential(config.model, statistics, config.potential)
        check_sizes(potential)
        if potential.needs_limits:
            potential.set_statistics(widened(statistics, *limits_of(potential, frames.train)))
        potential.seen = seen
    else:
        potential, frames, tuning = start_finetuning(config, frames)
        potential.seen = seen | potential.seen
    before = potential.statistics
    potential.statistics = replace(before, functional=config.data.functional, dispersion=config.data.dispersion)
    for name in ("functional", "dispersion"):
        if getattr(before, name) is not None and getattr(potential.statistics, name) is None:
            log.warning(
                "data.%s says nothing of the new labels, so it is no longer known; of the start's it was %s", name, getattr(before, name)
            )
    if config.loss.normalize:
        spreads = potential.statistics.spreads or {}
        absent = [label for label in config.loss.needed() if label not in spreads]
        if absent:
            raise ValueError(
                f"loss.normalize divides by the spread of the labels, but {', '.join(absent)} do not vary in the "
                "training data. Set loss.normalize to false, or their weights to 0."
            )
    potential.network.to(DTYPES[config.training.dtype])
    potential.to(group.device)
    for part in (frames.valid, frames.test or ()):
        for structure in part:
            potential.check_elements(structure.atomic_numbers, structure.name)
    if frames.test is not None and not any(s.labels for s in frames.test):
        raise ValueError(
            f"No frame of data.test ('{config.data.test}') has a label, so there is nothing to compare with. Say under which names they "
            "are stored (data.labels), or leave data.test out."
        )
    return potential, frames, tuning


def limits_of(potential: Potential, structures: Sequence[Structure]) -> tuple[dict[str, float], dict[str, float]]:
    """Where structures end for a potential, as `find_limits` says it."""
    table, numbers = potential.network.pair_cutoffs(), potential.table.tolist()
    reaches = None if table is None else {(a, b): float(table[i, j]) for i, a in enumerate(numbers) for j, b in enumerate(numbers)}
    return find_limits(structures, potential.cutoff, potential.max_neighbors, reaches)


def start_finetuning(config: Config, frames: Frames) -> tuple[Potential, Frames, dict[str, Any]]:
    """A potential with the weights of the start, the frames with replayed ones and old ones to test, and a report.

    Raises:
        ValueError: labels missing in the replayed data, patterns that match no weight, heads or elements left untrained.
    """
    tune = config.finetune
    assert tune is not None
    start = load(tune.start)
    Potential(
        start.model_config, start.statistics, start.potential_config
    )  # draws what `load` drew before it kept to itself: a seed gives what it gave
    for name, part in (("validation", frames.valid), ("test", frames.test or ())):
        known = 0 if start.seen is None else sum(start.seen.where(s) == "train" for s in part)
        if known:
            log.warning(
                "%d of %d %s frames were trained on by '%s': errors on them are too small, and uncertainties and best weights go by them. Give "
                "others (data.valid, data.test)", known, len(part), name, tune.start,
            )  # fmt: skip
    if start.dtype != DTYPES[config.training.dtype]:
        log.warning(
            "'%s' is in %s, and the fine-tuned potential will be in training.dtype, %s",
            tune.start, str(start.dtype).removeprefix("torch."), config.training.dtype,
        )  # fmt: skip
    given = config.data.reference_energies
    fresh = compute_statistics(
        frames.train, config.model.cutoff, "least_squares" if given == "auto" else given, config.data.elements, config.model.max_neighbors,
        config.loss.free_atoms_only,
    )  # fmt: skip
    n_new, used, kept = len(frames.train), None, None
    if tune.replay is not None:
        old = old_frames(config, frames)
        indices, others = choose_replay(old, n_new, tune.replay_fraction, config.data.seed)
        used = Subset(old, indices)
        kept = without(Subset(old, others), frames.train, used) or None
        why = "loss.{label} is above 0 (frames of finetune.replay)"
        require_labels(used, config.loss.needed(), why, config.model.cutoff, config.loss.missing)
        for structure in old:
            start.check_elements(structure.atomic_numbers, structure.name)
    statistics = adapt_statistics(start, fresh, frames.train, used or ())
    if given not in ("auto", "least_squares"):  # these fit what the start leaves, above
        statistics = replace(statistics, reference_energies={**statistics.reference_energies, **fresh.reference_energies})
    potential = Potential(config.model, statistics, config.potential)
    if potential.limits is not None:  # those of the start, and of the new frames
        potential.set_statistics(widened(statistics, *limits_of(potential, frames.train)))
    potential.network.to(start.dtype)
    potential.seen = start.seen if used is None else SeenFrames.of(used, ()) | start.seen
    potential.imported = None if start.imported is None else {**start.imported, "fine_tuned": True}
    transferred = transfer_weights(start, potential)
    weights = choose_weights(potential.network, tune, transferred)
    train_set = frames.train if used is None else Concatenated(frames.train, used)
    shifts = {e: statistics.reference_energies[e] - start.statistics.reference_energies.get(e, 0.0) for e in statistics.elements}
    report = {
        "start": tune.start, "start_checksum": read_manifest(tune.start)["checksum"], "labels": list(config.loss.needed()),
        "n_new_frames": n_new, "n_replayed_frames": len(train_set) - n_new, "reference_energy_shifts_eV": shifts, **transferred, **weights,
    }  # fmt: skip
    log.info(
        "fine-tuning '%s': %d weights train, %d are frozen, %d adapters; labels: %s; %d new frames, %d replayed",
        tune.start, weights["n_trained"], weights["n_frozen"], weights["adapters"], ", ".join(report["labels"]), n_new, report["n_replayed_frames"],
    )  # fmt: skip
    return potential, replace(frames, train=train_set, old=kept), report


def run_identity(settings: Mapping[str, Any], potential: Potential, frames: Frames, tuning: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint must share with the run that goes on from it (`gossamer.training.state.differing`)."""
    statistics = potential.statistics
    identity = {k: settings[k] for k in ("model", "potential", "loss", "training")} | {
        "data": statistics.fingerprint, "elements": statistics.elements, "reference_energies": statistics.reference_energies,
        "training_frames": digest(frames.train), "validation_frames": digest(frames.valid),
    }  # fmt: skip
    if tuning:
        identity["finetune"] = settings["finetune"] | {"checksum": tuning["start_checksum"]}
    return identity


def check_statistics(path: Path, potential: Potential) -> None:
    """Raise ValueError if the saved potential of a run that goes on has other scales: its weights would mean something else."""
    if not path.exists():
        return
    before, now = (
        {**s["reference_energies"], "scale": s["energy_scale"]} for s in (read_manifest(path)["statistics"], to_dict(potential.statistics))
    )
    if not close(before, now):
        raise ValueError(
            f"'{path}' has other reference energies or another scale of energy than gossamer {__version__} finds in the same data: the run was "
            "begun with an older one. Finish it with that, or fine-tune its potential (finetune.start)."
        )


def replace_lost(state: State, path: Path, group: ProcessGroup, save_best: Callable[[Potential], None]) -> None:
    """Where the saved potential of a run that goes on is gone, the averaged weights take its place, until a validation finds others."""
    if not group.broadcast(float(state.best < math.inf and not path.exists())):
        return
    state.best, state.stale = math.inf, 0
    if group.rank == 0:
        log.warning("'%s' is gone: the averaged weights of the checkpoint take its place, and those of the next validation", path)
        save_best(state.ema.module)


def write_start(config: Config, folder: Path, frames: Frames, potential: Potential, tuning: dict[str, Any], resumed: bool) -> None:
    """What is known before the first step: settings, frames kept aside, errors of the start of fine-tuning.

    What a folder of the user's holds under these names, or a run left that ended before its first checkpoint, is kept.
    """
    with nullcontext(folder / "config.yaml") if resumed else keeping_before(folder / "config.yaml") as path:
        save_config(config, path)
    path = folder / VALID
    if not (resumed and path.exists()) and not reads(config, path):
        if config.data.valid is None:
            write_frames(frames.valid, path)
        elif path.exists():
            set_aside(path)
    if tuning and not resumed:
        tuning["before"] = tuning_errors(potential, frames.valid, frames.old, config.loss.free_atoms_only)
        write_json(folder / "finetune.json", tuning)


def step_times(state: State) -> dict[str, Any]:
    """How fast the steps were, and whether they were compiled."""
    step = state.step_seconds / state.timed_steps if state.timed_steps else state.first_seconds
    return {
        "step_ms": 1000 * step, "first_step_seconds": round(state.first_seconds, 1), "compiled": state.forward.compiled is not None,
    }  # fmt: skip


def measure(config: Config, folder: Path, frames: Frames, tuning: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What the potential that a run has saved is worth: its uncertainty, which goes into its file, and its errors.

    Raises:
        RuntimeError: there is none.
    """
    if not (folder / POTENTIAL).exists():
        raise RuntimeError(
            f"'{folder}' has no potential: at no validation was the error a number. Look at the validation frames (gossamer data inspect), or "
            "lower training.learning_rate."
        )
    if config.training.uncertainty:
        log.info("measuring what the potential's uncertainties are worth, and its last errors")
        add_uncertainty(folder / POTENTIAL, frames, device, config.loss.free_atoms_only)
    return final_errors(folder, frames, tuning, device, config.loss.free_atoms_only)


def add_uncertainty(path: Path, frames: Frames, device: torch.device, free_atoms_only: bool = False) -> None:
    """Measure how wrong a saved potential may be, and keep that in its file; a training does not fail because that does."""
    potential = load(path, device)
    try:
        measure_uncertainty(potential, frames.train, frames.valid, free_atoms_only=free_atoms_only)
    except (ValueError, RuntimeError) as error:
        log.warning("the potential has no uncertainty: %s", str(error).splitlines()[0])
        return
    save_again(potential, path, path)


def final_errors(
    folder: Path, frames: Frames, tuning: dict[str, Any], device: torch.device, free_atoms_only: bool = False
) -> dict[str, Any]:
    """Errors of the saved potential on validation and test data; with fine-tuning, also finetune.json."""
    best = load(folder / POTENTIAL, device)
    results: dict[str, Any] = {"num_parameters": best.num_parameters}
    for name, part in (("valid", frames.valid), ("test", frames.test)):
        if part is not None:
            results[name] = evaluate_potential(best, part, free_atoms_only=free_atoms_only).summary()
    if tuning:
        tuning["before"] = json.loads((folder / "finetune.json").read_text("utf-8"))["before"]
        tuning["after"] = tuning_errors(best, frames.valid, frames.old, free_atoms_only)
        write_json(folder / "finetune.json", tuning)
        results["finetune"] = {k: v for k, v in tuning.items() if not k.endswith("_weights")}
    return results


def tuning_errors(
    potential: Potential, valid_set: Sequence[Structure], old: Sequence[Structure] | None, free_atoms_only: bool
) -> dict[str, Any]:
    """Errors on the validation frames, and on old frames that were not replayed."""
    was_training = potential.training
    potential.eval()
    out = {
        name: evaluate_potential(potential, part, keep=0, free_atoms_only=free_atoms_only).summary()
        for name, part in (("valid", valid_set), ("old_data", old))
        if part
    }
    potential.train(was_training)
    return out


def _as_config(config: Config | Path | str | Mapping[str, Any], overrides: Sequence[str] | str) -> Config:
    overrides = [overrides] if isinstance(overrides, str) else overrides
    if isinstance(config, Config):
        return make_config(to_dict(config), overrides) if overrides else build(Config, to_dict(config))  # ~/ is the home folder
    if isinstance(config, Mapping):
        return make_config(config, overrides)
    return load_config(as_path("config", config, "settings, or a YAML file of them"), overrides)


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


def check_schedule(config: Config) -> None:
    """Say so if the learning rate would rise to the end of the run."""
    training, warmup = config.training, config.training.schedule.warmup_steps
    if training.minutes is None and training.steps <= warmup:
        log.warning(
            "training.steps is %d and training.schedule.warmup_steps %d: the learning rate rises to %.2g of training.learning_rate and never "
            "falls. Lower warmup_steps to a tenth of the steps, say",
            training.steps, warmup, Schedule(training.schedule, 1.0, training.steps).rate(training.steps - 1),
        )  # fmt: skip


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
