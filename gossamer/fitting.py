"""Training without a configuration: settings that suit the data, the time, and what the potential is for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gossamer.arguments import as_path, listed, positive, said
from gossamer.config import Config, expand_preset, load_config, make_config
from gossamer.data.dataset import open_dataset
from gossamer.data.inspection import Inspection, inspect
from gossamer.data.labels import LabelConfig, as_labels, leaving_out
from gossamer.data.structure import Structure
from gossamer.engine.compiler_cache import is_kept, step_name
from gossamer.models import ACCURATE, MODELS
from gossamer.neighbors import neighbor_list
from gossamer.potential_file import read_manifest
from gossamer.quantities import QUANTITIES
from gossamer.runs import check_free, train
from gossamer.settings import to_dict
from gossamer.training.process_group import restarted

log = logging.getLogger(__name__)
MINUTES = 30.0
"""how long `fit` trains where nothing else is asked"""


def fit(
    data: Path | str,
    model: str | None = None,
    out: Path | str = "fit",
    minutes: float | None = None,
    labels: LabelConfig | Mapping[str, Any] | None = None,
    resume: bool = False,
    force: bool = False,
    start: Path | str | None = None,
    weights: Sequence[str] | str | None = None,
    low_rank: int | None = None,
    replay: Path | str | None = None,
    speed: bool = False,
    progress: bool = True,
    accuracy: bool = False,
    functional: str | None = None,
    dispersion: Literal["none", "included"] | None = None,
) -> dict[str, Any]:
    """Train on a labelled file without a configuration: inspect, split, choose settings, write them down, train.

    Args:
        data: Labelled structures; one tenth is kept for validation (valid.extxyz in the folder of the run).
        model: Name of the network, or of one of its presets (nequip/M); None: that of ``start``, else weft, which ends lowest.
        out: Folder of the run; its config.yaml holds the settings chosen and can be trained again.
        minutes: How long to train, by the clock on the wall; reading data and the last errors come on top. None: 30.
        labels: Names and units of the labels.
        resume: Go on with the run in ``out``, with the arguments that began it; those left out are the run's own.
        force: Train even if inspection finds errors.
        start: Fine-tune this saved potential instead of training from random weights.
        weights: With ``start``: names of the weights to train, with wildcards; the others stay frozen.
        low_rank: With ``start``: train adapters of this rank.
        replay: With ``start``: labelled structures of the old data to mix in.
        speed: Take half of its channels: dynamics of many atoms take 0.7 of the time, errors after short trainings are about the same.
        progress: Show a progress bar.
        accuracy: Take features of degree 3 as well: smaller errors (50 frames of ethanol: by a tenth), dynamics of many atoms take 1.8 times as long.
        functional: Of the labels, as `DataConfig.functional`.
        dispersion: Whether the labels hold a dispersion correction, as `DataConfig.dispersion`.

    Returns:
        As ``train``.

    Raises:
        TypeError: frames or a potential in memory.
        FileExistsError: ``out`` holds a run, and ``resume`` is False.
        ValueError: inspection found errors, the model is unknown, ``speed`` or ``accuracy`` beside each other, a model or a start, or a
            run to go on with that other arguments began.
    """
    _check_network(model, start, speed, accuracy)
    labels = None if labels is None else as_labels(labels)
    method = {k: v for k, v in (("functional", functional), ("dispersion", dispersion)) if v is not None}
    minutes = None if minutes is None else positive("minutes", minutes)
    weights = None if weights is None else listed("weights", weights, (str,), "names of weights")
    expected = "a file, which the settings of the run name (of Atoms: ase.io.write, of a potential: gossamer.save)"
    data = as_path("data", data, expected)
    start, replay = (None if path is None else as_path(name, path, expected) for name, path in (("start", start), ("replay", replay)))
    finetune = _finetuning(start, weights, low_rank, replay)
    folder = as_path("out", out, "the name of a folder")
    if resume and (folder / "config.yaml").exists():
        _check_same(folder / "config.yaml", data, model, minutes, labels, finetune, speed, accuracy, method)
        return train(folder / "config.yaml", resume=True, progress=progress)
    if not restarted():
        check_free(folder)  # before the data is inspected
    minutes = MINUTES if minutes is None else minutes
    structures = open_dataset(data, labels)
    if len(structures) < 2:
        raise ValueError(f"'{data}' holds one frame: one to train on and one to validate with are the least. Give more frames.")
    report = inspect(structures)
    for message in (*report.warnings, *(report.errors if force else ())):
        if message != report.offset_warning:  # said with what follows from it
            log.warning("%s", message)
    if report.errors and not force:
        raise ValueError("The data is not fit for training: " + "; ".join(report.errors) + ". Mend it, or insist with --force.")
    config = choose_settings(
        data, structures, model=model, out=folder, minutes=minutes, labels=labels, finetune=finetune, speed=speed, accuracy=accuracy, method=method,
        report=report,
    )  # fmt: skip
    log.info("training for %g minutes; settings are in '%s'", minutes, folder / "config.yaml")
    return train(config, progress=progress)


def _check_network(model: str | None, start: Path | str | None, speed: bool, accuracy: bool) -> None:
    """Refuse arguments of `fit` that name no network, or more than one."""
    asked = [name for name, given in (("speed", speed), ("accuracy", accuracy)) if given]
    if asked and (model is not None or start is not None):
        raise ValueError(f"{asked[0]} chooses the network, and {'model' if start is None else 'start'} names one: leave one of them out.")
    if len(asked) > 1:
        raise ValueError("speed takes a smaller network than fit's own, accuracy a larger one: leave one of them out, or both.")
    if model is not None and not isinstance(model, str):
        raise TypeError(f"model: expected the name of a network, found {said(model)}.")
    if model is not None and model.split("/")[0] not in MODELS:
        raise ValueError(f"model '{model}' is unknown. Choose one of {', '.join(MODELS)}.")


def _finetuning(
    start: Path | str | None, weights: Sequence[str] | None, low_rank: int | None, replay: Path | str | None
) -> dict[str, Any] | None:
    """The section of the settings for fine-tuning; None without a start."""
    tuning: dict[str, Any] = {"train": list(weights) if weights else None, "low_rank": low_rank, "replay": replay and str(replay)}
    tuning = {k: v for k, v in tuning.items() if v is not None}
    if start is None and tuning:
        raise ValueError(
            f"{', '.join('weights' if k == 'train' else k for k in tuning)}: only fine-tuning has these. "
            "Name the potential to start from (start)."
        )
    if replay is not None and (Path(replay) / "store.json").exists():  # labels are those of the new data
        tuning["replay_labels"] = {}
    return None if start is None else {"start": str(start), **tuning}


def _check_same(
    path: Path,
    data: Path | str,
    model: str | None,
    minutes: float | None,
    labels: LabelConfig | None,
    finetune: Mapping[str, Any] | None,
    speed: bool,
    accuracy: bool,
    method: Mapping[str, Any],
) -> None:
    """Refuse arguments of `fit` that contradict the settings of the run to go on with; what is left out contradicts nothing."""
    before = to_dict(load_config(path))
    name, _, preset = (model or "").partition("/")
    network = expand_preset({"name": name, "preset": preset}) if preset else {"name": name} if name else {}
    if speed or accuracy:
        network = {"name": ACCURATE, **({"num_features": SLIM} if speed else {"l_max": 3})}
    asked = {
        "data": {"train": str(data), **method},
        "data.labels": {} if labels is None else labels.given(),
        "model": network,
        "finetune": {k: v for k, v in (finetune or {}).items() if k != "replay_labels"},  # follows from replay
        "training": {} if minutes is None else {"minutes": float(minutes)},
    }
    differ = []
    for section, values in asked.items():
        found: Any = before
        for part in section.split("."):
            found = found[part] or {}
        differ += [f"{section}.{k} is {found.get(k)} (now {v})" for k, v in values.items() if not _same(found.get(k), v)]
    if differ:
        raise ValueError(
            f"'{path.parent}' was begun with other settings: {', '.join(differ)}. Go on with the arguments that began it, or choose another --out "
            f"(to train longer: --start {path.parent / 'potential.safetensors'})."
        )


def _same(before: Any, now: Any) -> bool:
    """Whether two settings are alike; files may be written in two ways."""
    return bool(before == now) or (isinstance(before, str) and isinstance(now, str) and Path(before).resolve() == Path(now).resolve())


def choose_settings(
    data: Path | str,
    structures: Sequence[Structure] | None = None,
    *,
    model: str | None = None,
    out: Path | str = "fit",
    minutes: float = MINUTES,
    labels: LabelConfig | None = None,
    finetune: Mapping[str, Any] | None = None,
    speed: bool = False,
    accuracy: bool = False,
    method: Mapping[str, Any] | None = None,
    report: Inspection | None = None,
) -> Config:
    """Settings that suit a data set: which labels, which split, how far and how sharply atoms see, how many structures per step, compiled or not.

    Args:
        data: Labelled structures.
        structures: Those of them to choose by; by default all.
        model: As for `fit`; so are ``out``, ``minutes``, ``labels``, ``speed`` and ``accuracy``.
        finetune: Section of the settings, with a ``start``.
        method: Settings of the data that say how they were labelled (functional, dispersion).
        report: What inspection said of the structures, where they were inspected before.

    Raises:
        ValueError: neither energies nor forces are in every frame, or one of them is in most frames and not in all.
    """
    labels = labels or LabelConfig()
    structures = open_dataset(data, labels) if structures is None else structures
    sample = [structures[k] for k in range(0, len(structures), max(1, len(structures) // 200))]
    atoms = float(np.mean([s.n_atoms for s in sample]))
    has = _labels_to_train(data, structures, report)
    grouped = all(s.group is not None for s in sample) and len({s.group for s in structures}) > 1
    batch_size = min(int(np.clip(round(160 / atoms), 1, 16)), max(2, len(structures) // FRAMES_OF_BATCH))
    if len(structures) < 20:
        log.warning("%d frames are few: expect large errors", len(structures))
    started = {} if finetune is None else read_manifest(finetune["start"])["model"]
    name, _, preset = (model or started.get("name") or ACCURATE).partition("/")
    if finetune is not None and has["stress"] and started.get("direct_forces"):
        has["stress"] = False
        log.warning(
            "the stress is not trained on: the forces of '%s' are not the gradient of its energy (direct_forces)", finetune["start"]
        )
    network: dict[str, Any] = {"name": name}
    if preset:
        network["preset"] = preset
    n_forces = 3 * atoms * len(structures)
    if finetune is None and not preset:  # a saved potential keeps its own
        network["cutoff"] = choose_cutoff(sample[::5])
        if n_forces < FEW_FORCES and "basis_decay" in {f.name for f in fields(MODELS[name][0])}:
            network["basis_decay"] = 1.0
    if speed:
        network["num_features"] = SLIM
    if accuracy:
        network["l_max"] = 3
    defaults = MODELS[name][1].fit_defaults
    soap = defaults.soap_rate if finetune is None and n_forces >= FEW_FOR_SOAP else None
    if soap:
        rate = soap / 2 if minutes >= LONG else soap
    else:
        rate = defaults.learning_rate * (1.0 if finetune is None else 0.2)  # near a good solution large steps only destroy
    config = make_config(
        {
            "data": {"train": str(data), "labels": to_dict(labels), "split": "group" if grouped else "random", **(method or {})},
            "model": network,
            **({} if finetune is None else {"finetune": dict(finetune)}),
            # stress in eV/Å³ is small: 20 makes it about the virial per atom
            "loss": {"energy": 5.0 * has["energy"], "forces": 10.0 * has["forces"], "stress": 20.0 * has["stress"]},
            "training": {
                "minutes": minutes,
                "batch_size": min(batch_size, max(1, len(structures) // 2)),
                "optimizer": "soap" if soap else "muon",
                "learning_rate": rate,
            },
            "out": str(out),
        }
    )
    n_elements = len({int(z) for s in sample for z in s.atomic_numbers})
    training = config.training
    kept = is_kept(step_name(config.model, n_elements, has["forces"], has["stress"], training.batch_size == 1, training.dtype))
    return replace(config, training=replace(training, compile=compile_pays(name, minutes, kept)))


def _labels_to_train(data: Path | str, structures: Sequence[Structure], report: Inspection | None) -> dict[str, bool]:
    """Which labels go into the loss: those that every frame has that can have them. What is left out, or stands in the way, is said."""
    lacking = {label: [s.name for s in structures if s.lacks(label)] for label in QUANTITIES}
    has = {label: not names and any(label in s.labels for s in structures) for label, names in lacking.items()}
    for label in ("energy", "forces"):
        n, first = len(lacking[label]), lacking[label][:1]
        if 0 < n < len(structures) / 2:
            raise ValueError(
                f"{n} of the {len(structures)} frames of '{data}' have no {label}, the first is {first[0]}: most have, and a training on {label} "
                "needs them in every frame. Label the others, learn from what there is (gossamer train with loss.missing: skip), or leave them out: "
                f"{leaving_out(['energy', 'forces'])}"
            )
        if 0 < n < len(structures):
            log.warning(
                "%s not trained on: %d of the %d frames have none, the first is %s",
                "the energy is" if label == "energy" else "the forces are",
                n,
                len(structures),
                first[0],
            )
    if has["stress"] and (idle := sum(not s.pbc.all() for s in structures)):
        log.info(
            "the stress is learned from %d of the %d frames: the others are not periodic along all axes",
            len(structures) - idle,
            len(structures),
        )
    if has["stress"] and (report := report or inspect(structures)).stress_offset is not None:
        has["stress"] = False
        said = report.facts["stress offset"]
        log.warning(
            "the stress is not trained on: its labels hold a constant %s that the energies lack (Pulay stress of a small basis set?)", said
        )
    if not has["energy"] and not has["forces"]:
        counts = ", ".join(f"{label} in {len(structures) - len(lacking[label])}" for label in ("energy", "forces"))
        raise ValueError(
            f"Neither energy nor forces are in every frame of '{data}' (of {len(structures)} frames {counts}): there is nothing to learn from. Label the "
            f"others, or leave them out: {leaving_out(['energy', 'forces'])}"
        )
    return has


SLIM = 16
"""channels of the network where dynamics shall be fast: half of its own (benchmarks/accuracy)"""
FEW_FORCES = 30_000
"""force components below which radial functions that vary fast are held back: fewer of them teach their noise (benchmarks/accuracy)"""
FEW_FOR_SOAP = 20_000
"""force components below which Muon is always the optimiser: SOAP learns few frames by heart (benchmarks/accuracy)"""
LONG = 40.0
"""minutes from which SOAP takes half its rate: aspirin ends at 8.1 after 40 minutes and 7.5 after 56, at the whole rate at 8.2 (benchmarks/accuracy)"""
FRAMES_OF_BATCH = 50
"""so many times as many frames as a batch holds, at least: what is learned from large ones of few frames holds less well for others (benchmarks/accuracy)"""
NEIGHBORS = 28.0
"""neighbours of an atom that a cutoff of `fit` takes in on average: with more, steps cost more than they teach (benchmarks/accuracy)"""
CUTOFFS = (4.0, 5.0)
"""Å, the shortest and longest it takes; messages go on from atom to atom, several cutoffs far"""


def choose_cutoff(structures: Sequence[Structure]) -> float:
    """The longest cutoff, Å, within which atoms have at most `NEIGHBORS` neighbours on average."""
    shortest, longest = CUTOFFS
    lengths = []
    for s in structures:
        (sender, receiver), shifts = neighbor_list(s.positions, s.cell, s.pbc, longest)
        lengths.append(np.linalg.norm(s.positions[sender] + shifts @ s.cell - s.positions[receiver], axis=1))
    allowed = int(NEIGHBORS * sum(s.n_atoms for s in structures))
    found = np.sort(np.concatenate(lengths))
    return longest if len(found) <= allowed else max(shortest, float(np.floor(10 * found[allowed]) / 10))


WORTHWHILE = 1.25
"""times as many steps as without, from which compiling is worth its risk"""


KEPT = 0.15
"""time that compiling takes, of the first time's, where this machine has kept what that made (measured 0.12: benchmarks/compile)"""


def compile_pays(name: str, minutes: float, kept: bool = False) -> bool:
    """Whether clearly more steps fit into the time if the first part of it goes into compiling them: compiling cannot be cut short.

    A busy machine compiles several times as slowly, so what pays by a few percent on a free one can cost the whole time there.
    ``kept``: such a step has been compiled on this machine before.
    """
    defaults = MODELS[name][1].fit_defaults
    seconds, compiling = 60 * minutes, defaults.compile_seconds * (KEPT if kept else 1.0)
    return (seconds - compiling) / defaults.compiled_share > WORTHWHILE * seconds
