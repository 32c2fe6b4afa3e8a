"""How far a saved potential is off on labelled data, and whether it knows: evaluate, calibrate."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import ase.io
import numpy as np

from gossamer.arguments import as_path, at_home, whole
from gossamer.calibration import measure_uncertainty, plot_honesty
from gossamer.data.dataset import Data, Subset, as_dataset
from gossamer.data.fingerprint import leave_out_training_frames
from gossamer.data.from_atoms import suggestion
from gossamer.data.inspection import tell_remarks
from gossamer.data.labels import LabelConfig
from gossamer.data.structure import Structure
from gossamer.engine.engine import Engine, Way
from gossamer.evaluation import Evaluation, evaluate_potential
from gossamer.files import atomic_path, say_replaced, write_json
from gossamer.potential import Potential
from gossamer.potential_file import as_potential, load, read_manifest, save_again

log = logging.getLogger(__name__)
ERRORS, WORST, HONESTY = "errors.json", "worst.extxyz", "uncertainty.png"


def evaluate(
    model: Potential | Path | str,
    data: Data,
    labels: LabelConfig | Mapping[str, Any] | None = None,
    out: Path | str | None = None,
    worst: int = 20,
    device: str = "cpu",
    way: Way = "auto",
    include_training: bool = False,
    dispersion: str | None = None,
) -> Evaluation:
    """Errors of a potential on labelled data; frames that it was trained on are left out, if there are others.

    Forces of atoms that were held fixed are left out, too, if ``model`` is a file of a potential trained without them
    (`LossConfig.free_atoms_only`); ``notes`` says so.

    Args:
        model: Potential, or file of one.
        data: File, folder or store, or several; or frames in memory: structures, or Atoms with the labels they were read with.
        labels: Names and units of the labels, as an object or a dictionary; structures have their own.
        out: Folder for errors.json, worst.extxyz (the frames with the largest errors, labels and predictions) and, of a potential with an
            uncertainty, uncertainty.png (errors found against errors expected); those of an evaluation before are replaced.
        worst: How many of those.
        device: Where to compute, if ``model`` is a file.
        way: How to evaluate (`gossamer.engine.engine`).
        include_training: Count the frames that it was trained on, too.
        dispersion: Functional whose D3 is added to the predictions (`gossamer.dispersion.D3`).

    Returns:
        Errors, with the frames' positions in ``data`` as indices; ``notes`` says what was left out, ``training_error``
        whether there were training frames only.

    Raises:
        ValueError: a negative ``worst``, or no label to compare with.
    """
    worst = whole("worst", worst, 0)
    potential = as_potential(model, device)
    folder = None if out is None else as_path("out", out, "the name of a folder")
    if folder is not None:
        say_replaced(*(folder / name for name in (ERRORS, WORST, HONESTY)))
    structures = as_dataset(data, labels)
    tell_remarks(structures)
    chosen = leave_out_training_frames(potential.seen, structures, include_training)
    engine = Engine(potential, way, dispersion=dispersion)
    used = Subset(structures, chosen.used)
    free_atoms_only = not isinstance(model, Potential) and trained_on_free_atoms(model)
    evaluation = evaluate_potential(potential, used, run=engine, free_atoms_only=free_atoms_only)
    for frame in evaluation.frames:
        frame["index"] = chosen.used[frame["index"]]
    evaluation.n_training_frames, evaluation.n_validation_frames = chosen.n_train, chosen.n_valid
    evaluation.training_error, evaluation.notes = chosen.training_error, [*chosen.notes]
    for label in evaluation.errors:
        n_with = sum(bool({f"{label}_error", f"{label}_rmse"} & frame.keys()) for frame in evaluation.frames)
        if n_with == 0 and (hint := suggestion(label, sorted({entry for s in islice(used, 100) for entry in s.entries}))):
            evaluation.notes.append(f"no frame has {label}: {hint}")
        if 0 < n_with < len(evaluation.frames):
            evaluation.notes.append(f"errors of {label} are of {n_with} of {len(evaluation.frames)} frames: the others have no {label}")
    fixed = sum(int((~s.free).sum()) for s in used) if free_atoms_only else 0
    if fixed:
        evaluation.notes.append(f"forces of {fixed:,} atoms held fixed do not count, as in its training (loss.free_atoms_only)")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / ERRORS, evaluation.summary())
        (folder / HONESTY).unlink(missing_ok=True)  # of another potential, where this one has no uncertainty
        if evaluation.expected:
            plot_honesty(evaluation.honesty(), folder / HONESTY)
        write_worst(engine, structures, evaluation, folder / WORST, worst)
    return evaluation


def trained_on_free_atoms(path: Path | str) -> bool:
    """Whether the forces of atoms that were held fixed were no part of the training of a saved potential."""
    return bool((read_manifest(path)["training"].get("loss") or {}).get("free_atoms_only", False))


def write_worst(engine: Engine, structures: Sequence[Structure], evaluation: Evaluation, path: Path, n: int) -> None:
    """The frames with the largest errors: labels as energy and forces, predictions under names of their own."""
    frames = []
    by_index = {f["index"]: f for f in evaluation.frames}
    for index in evaluation.worst(n):
        atoms = structures[index].to_ase()
        predicted = engine.potential.predict([structures[index]], run=engine, refuse=False)[0]
        atoms.info |= {k: v for k, v in by_index[index].items() if k != "name"} | {"predicted_energy": predicted["energy"]}
        atoms.info["source"] = structures[index].name.replace("'", "")
        atoms.arrays["predicted_forces"] = predicted["forces"]
        frames.append(atoms)
    with atomic_path(path) as temporary:
        ase.io.write(temporary, frames, format="extxyz")


def calibrate(
    model: Path | str,
    data: Data,
    labels: LabelConfig | Mapping[str, Any] | None = None,
    out: Path | str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure how wrong a saved potential may be, and write that into its file (docs/uncertainty.md).

        calibrate("potential.safetensors", ["train.extxyz", "valid.extxyz"])

    The potential tells training frames by their fingerprints: their features say what it knows, the errors on all others what its
    uncertainties are worth. Of one that remembers none of these frames (imported, say) a random half does each.

    Args:
        model: Saved potential.
        data: Labelled structures, training frames and others, as in ``evaluate``.
        labels: Names and units of the labels.
        out: File to write; by default ``model``.
        device: Where to compute.

    Returns:
        "out", numbers of frames and labels, and for energy and forces the rank correlation of uncertainty and error (``honesty``).

    Raises:
        TypeError: a potential in memory.
        ValueError: no labels, or no frames that it was not trained on.
    """
    if not isinstance(model, str | Path):
        raise TypeError(f"calibrate writes into the file of a potential: expected its path, found {type(model).__name__}.")
    model, out = at_home(model), at_home(out)
    if out is not None and Path(out).resolve() != Path(model).resolve():
        say_replaced(out)
    structures = as_dataset(data, labels)
    potential = load(model, device)
    trained = [potential.seen is not None and potential.seen.where(s) == "train" for s in structures]
    halves = not any(trained)
    if halves and len(structures) < 2:
        raise ValueError(
            f"Found {len(structures)} frame{'s' * (len(structures) != 1)}: some must say what the potential knows, others what it errs. Give two at least, better hundreds."
        )
    if halves:
        log.warning(
            "the potential was trained on none of these frames, as far as it knows: half of them say what it knows, half what it errs"
        )
        trained = np.random.default_rng(0).permutation(np.arange(len(structures)) % 2 == 0).tolist()
    if all(trained):
        raise ValueError(
            f"The potential was trained on all {len(structures)} frames: errors on them are too small. Give also frames kept aside."
        )
    known, new = ([s for s, t in zip(structures, trained, strict=True) if t == wanted] for wanted in (True, False))
    free_atoms_only = trained_on_free_atoms(model)
    measure_uncertainty(potential, known, new, free_atoms_only=free_atoms_only)
    target = Path(model if out is None else out)
    save_again(potential, model, target)
    assert potential.uncertainty is not None
    worth = evaluate_potential(potential, new, keep=0, free_atoms_only=free_atoms_only).honesty()
    ranks = {f"{name}_rank_correlation": numbers["rank"] for name, numbers in worth.items()}
    return {"out": str(target), **potential.uncertainty.record, **ranks}
