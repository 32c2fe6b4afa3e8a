"""Active learning: walk until the potential does not know, label that, fine-tune, and again, until it knows.

A round explores by dynamics at several temperatures, chooses frames that the potential is uncertain of and that differ from each other,
labels them with an ASE calculator, and fine-tunes on everything labelled. Each stage writes files and is skipped or gone on with where
they exist: a run killed anywhere continues with the same command, and no frame is labelled twice.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.calculators.abc import GetPropertiesMixin
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.singlepoint import SinglePointCalculator
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from gossamer.arguments import FILES, as_path, listed, said
from gossamer.checks.run_page import Report, plot_curves
from gossamer.checks.source import CalculatorInMemory, find_sources
from gossamer.config import load_config, make_config
from gossamer.data.atoms import read_frames
from gossamer.data.dataset import open_dataset
from gossamer.data.fingerprint import SeenFrames, fingerprints
from gossamer.data.structure import Structure, as_structure
from gossamer.evaluation import evaluate_potential
from gossamer.files import InputError, atomic_path, checksum, locked, write_bytes, write_json
from gossamer.fitting import choose_settings
from gossamer.potential import NO_UNCERTAINTY, Potential
from gossamer.potential_file import load, read_manifest
from gossamer.runs import POTENTIAL, train
from gossamer.settings import configured, to_dict
from gossamer.signals import Stopped
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.md import md
from gossamer.simulation.options import LearnConfig
from gossamer.simulation.state import bare

log = logging.getLogger(__name__)
OUTSIDE = 3.0
"""times the root mean square error of forces on validation frames, from which a force is uncertain; later rounds, which validate on the hard
frames found by then, ask for no less than the first"""
LOST = 10.0
"""times that limit, beyond which a frame is no longer worth a label: the walk had left sanity"""
HELD = 0.01
"""share of uncertain frames below which the potential knows where it walks"""
VALID_EVERY = 5
"""of the labelled frames one in so many validates"""


def learn(
    start: Path | str,
    structures: Sequence[Path | str | Atoms] | Path | str | Atoms,
    label: Any,
    data: Path | str | None = None,
    config: LearnConfig | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Improve a potential where its own dynamics lead it astray.

        learn("start.safetensors", ["ethanol.xyz"], "tblite.ase:TBLite(method='GFN2-xTB', verbosity=0)", data="20_frames.extxyz")

    Args:
        start: Saved potential with an uncertainty.
        structures: From which walks start: files (their first frames) or Atoms, or one.
        label: ASE calculator as `gossamer judge` takes them, "module:factory" or "module:factory(...)", or a calculator; where a folder goes
            on, that is known again by its class and its parameters, or without these by its energies of a few clusters.
        data: Labelled frames that the start was trained on, to be trained on again; labels must be those of the calculator.
        config: Options as an object; ``LearnConfig`` says which there are.
        options: Options by name; they replace those of ``config``.

    Returns:
        "out", "held" (whether the last walks met hardly anything uncertain), "rounds", "n_labelled"; potential.safetensors, report.html
        and learning.json are in the folder.

    Raises:
        TypeError: a potential in memory, no calculator, or something else than files and atoms.
        ValueError: a potential without uncertainty, unknown options, or a folder that was begun with others.
        Stopped: SIGTERM; the same command goes on.
    """
    config = configured(LearnConfig, config, options)
    if data is None and config.frames < 2:
        raise ValueError(
            "frames 1 without data: the first round needs a frame to train on and another to validate. Raise frames, or give data."
        )
    start = as_path("start", start, "the file of a potential (gossamer.save writes one)")
    structures = listed("structures", structures, (*FILES, Atoms), "files or ASE's Atoms")
    if not structures:
        raise ValueError("There are no structures to walk from: give at least one.")
    if not isinstance(label, str | GetPropertiesMixin):
        raise TypeError(f"label: expected module:factory or an ASE calculator, found {said(label)}.")
    if "uncertainty" not in read_manifest(start):  # before there is a folder that these settings began
        raise ValueError(NO_UNCERTAINTY)
    (source,) = find_sources([], [label if isinstance(label, str) else (type(label).__name__, label)])
    walkers = [s if isinstance(s, Atoms) else read_frames(s)[0] for s in structures]
    old = [] if data is None else list(open_dataset(data))
    current, held = start, False
    curve: list[dict[str, Any]] = []
    files = [Path(s).name for s in structures if not isinstance(s, Atoms)]
    contents = [checksum(s)[:16] for s in (*structures, data) if isinstance(s, str | Path)]
    atoms = [fingerprints(s.numbers, s.positions, s.cell.array, s.pbc)[0] for s in structures if isinstance(s, Atoms)]
    question = {"start": checksum(start)[:16], "structures": files, "label": label if isinstance(label, str) else source.fingerprint, "data": None if data is None else as_path("data", data, "a file of labelled frames").name,
                "contents": contents, "atoms": atoms, **to_dict(config)}  # fmt: skip
    with locked(config.out):
        before = config.out / "question.json"
        question |= _known_by(source.make, sorted({s for a in walkers for s in a.symbols}), before)
        _check_question(before, question)
        for number in range(1, config.rounds + 1):
            folder = config.out / f"round-{number:02d}"
            done = folder / "round.json"
            if not done.exists():
                largest = curve[-1]["limit_eV_per_A"] if curve else np.inf
                write_json(done, _round(current, walkers, source.make, old, config, folder, number, largest))
            curve.append(json.loads(done.read_text("utf-8")))
            held = curve[-1]["held"]
            if held:
                break
            current = folder / "fit" / POTENTIAL
        write_bytes(config.out / POTENTIAL, current.read_bytes())
        write_json(config.out / "learning.json", curve)
        _report(curve, held, config.out / "report.html")
    return {"out": str(config.out), "held": held, "rounds": len(curve), "n_labelled": sum(r["n_labelled"] for r in curve)}


KNOWN_BY = "label_settings", "label_energies"
"""entries of a question by which a calculator in memory is known again"""


def _known_by(make: Any, symbols: Sequence[str], path: Path) -> dict[str, Any]:
    """Settings of a calculator in memory, and where it has none energies of clusters: those of the question before, if it still has them."""
    if not isinstance(make, CalculatorInMemory):
        return dict.fromkeys(KNOWN_BY)
    settings = make.settings()
    if settings:
        return dict(zip(KNOWN_BY, (settings, None), strict=True))
    before = json.loads(path.read_text(encoding="utf-8")).get(KNOWN_BY[1]) if path.exists() else None
    return dict(zip(KNOWN_BY, (settings, before if before and make.alike(before) else make.probed(symbols)), strict=True))


def _check_question(path: Path, question: dict[str, Any]) -> None:
    """Refuse to go on with what other settings began; how many rounds, and on which device, may change."""
    asked = {k: v for k, v in question.items() if k not in ("out", "rounds", "device")}
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else asked
    before = {name: asked[name] for name in ("contents", "atoms", *KNOWN_BY)} | before  # older folders do not know them
    differ = [f"{k} {before.get(k)} (now {asked[k]})" for k in asked if before.get(k) != asked[k]]
    if differ:
        raise InputError(
            f"'{path.parent}' was begun with other settings: {', '.join(differ)}. Ask the same to go on, or choose another --out."
        )
    write_json(path, asked)


def _round(
    current: Path,
    walkers: Sequence[Atoms],
    make: Any,
    old: Sequence[Structure],
    config: LearnConfig,
    folder: Path,
    number: int,
    largest: float,
) -> dict[str, Any]:
    """One round; what is known of it at its end. ``largest``: eV/Å that the limit may not exceed."""
    potential = load(current, config.device)
    if potential.uncertainty is None:
        raise ValueError(NO_UNCERTAINTY)
    rmse: float | None = potential.uncertainty.record.get("forces_rmse_eV_per_A")
    if rmse is None:
        raise ValueError("The potential's uncertainty was measured without labels of forces. Calibrate it with some (gossamer calibrate).")
    limit = config.max_uncertainty or min(OUTSIDE * rmse, largest)
    found = _explore(potential, walkers, limit, config, folder / "walks", number)
    result = {"round": number, "limit_eV_per_A": limit, "n_labelled": 0, **found}
    result["held"] = found["broken"] == 0 and found["uncertain_share"] < HELD
    if result["held"]:
        return result
    known = SeenFrames.of([*old, *(as_structure(atoms) for atoms in labelled_before(config.out))], ())
    chosen = _chosen(potential, limit, config.frames, known, folder)
    if not chosen:
        raise RuntimeError(
            f"All uncertain frames of round {number} are far from sane, or labelled already ('{folder}/walks'): start with more labelled frames, "
            "or walk colder."
        )
    labelled = _labelled(chosen, make, folder)
    if not labelled:
        raise RuntimeError(f"The calculator labelled none of the {len(chosen)} frames; why is in '{folder}/failed.json'.")
    before = evaluate_potential(potential, open_dataset(folder / "labelled.extxyz"), keep=0)
    result |= {
        "n_labelled": len(labelled),
        "new_forces_rmse_meV_per_A": before.forces.rmse,
        "new_energy_mae_meV_per_atom": before.energy.mae,
    }
    fitted = _fit(current, potential, old, config, folder)
    return result | {"valid_forces_rmse_meV_per_A": fitted["valid"]["forces_rmse_meV_per_A"], "n_train": fitted["n_train"]}


# --- the stages ------------------------------------------------------------------------------------------------------


def _explore(
    potential: Potential, walkers: Sequence[Atoms], limit: float, config: LearnConfig, folder: Path, number: int
) -> dict[str, Any]:
    """Walk from every structure at every temperature; what the walks met."""
    calculator = Calculator(potential)
    broken, largest = 0, []
    for k, (atoms, temperature) in enumerate((a, t) for a in walkers for t in config.temperatures):
        out = folder / f"{k:02d}-{temperature:.0f}K"
        walk = md(
            calculator, atoms.copy(), out=out, temperature=temperature, steps=config.steps, timestep=config.timestep, resume=True,
            seed=config.seed + 1000 * number + k, interval=max(1, round(config.spacing / config.timestep / 4)), max_uncertainty=limit,
            collect=out / "uncertain.extxyz", collect_spacing=config.spacing, progress=False,
        )  # fmt: skip
        if walk["stopped"]:
            raise Stopped(f"stopped by {walk['stopped']} while walking; the same command goes on")
        broken += walk["broken"] is not None
        if (out / "log.csv").exists():  # not of a walk that broke before its first frame
            with open(out / "log.csv", encoding="utf-8", newline="") as file:
                largest += [float(row["max_forces_uncertainty_eV_per_A"]) for row in csv.DictReader(file)]
    if not largest:
        raise RuntimeError(f"Every walk of round {number} broke before its first frame: look at the structures, and at '{folder}'.")
    share = float(np.mean(np.array(largest) > limit))
    log.info("round %d: %.1f %% of the frames are uncertain, %d walks broke", number, 100 * share, broken)
    return {"broken": broken, "uncertain_share": share, "median_uncertainty_eV_per_A": float(np.median(largest))}


def labelled_before(out: Path) -> list[Atoms]:
    """All frames labelled so far, in their order."""
    return [atoms for path in sorted(out.glob("round-*/labelled.extxyz")) for atoms in ase.io.read(path, ":", format="extxyz")]


def _chosen(potential: Potential, limit: float, n: int, known: SeenFrames, folder: Path) -> list[Atoms]:
    """The most uncertain frame, and then again and again the one that is farthest from those chosen; none that has a label already."""
    file = folder / "chosen.extxyz"
    if not file.exists():
        paths = sorted((folder / "walks").glob("*/uncertain.extxyz"))
        frames = [f for path in paths for f in ase.io.read(path, ":", format="extxyz")]
        frames = [f for f in frames if f.info["max_forces_uncertainty"] < LOST * limit and known.where(f) == "new"]
        if not frames:
            return []
        order = farthest(_worst_deviations(potential, frames), int(np.argmax([f.info["max_forces_uncertainty"] for f in frames])), n)
        with atomic_path(file) as temporary:
            ase.io.write(temporary, [frames[k] for k in order], format="extxyz")
    chosen: Any = ase.io.read(file, ":", format="extxyz")
    return list(chosen)


def _worst_deviations(potential: Potential, frames: Sequence[Atoms]) -> NDArray[np.float64]:
    """Deviations (n, K) of the last features of the most uncertain atom of each frame."""
    assert potential.uncertainty is not None
    found = []
    for atoms in frames:
        graph = potential.collate([as_structure(atoms)])
        features = potential(graph, forces=False).features
        assert features is not None
        with torch.no_grad():
            scaled = potential.uncertainty.deviations(features, potential.species_of[graph.atomic_numbers])[1].cpu().numpy()
        found.append(scaled[int(np.argmax(atoms.arrays["forces_uncertainty"]))])
    return np.array(found)


def farthest(points: NDArray[np.float64], first: int, n: int) -> list[int]:
    """Indices of at most ``n`` of the points (m, K), each the farthest from those before it; none that is there already."""
    chosen = [first]
    distances = np.linalg.norm(points - points[first], axis=1)
    while len(chosen) < min(n, len(points)) and distances.max() > 0:
        chosen.append(int(distances.argmax()))
        distances = np.minimum(distances, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return chosen


def _labelled(chosen: Sequence[Atoms], make: Any, folder: Path) -> list[Atoms]:
    """The chosen frames with labels, each written as soon as it has them; those that the calculator cannot label are left out."""
    file, failures = folder / "labelled.extxyz", folder / "failed.json"
    found: Any = list(ase.io.read(file, ":", format="extxyz")) if file.exists() else []
    failed: dict[str, str] = json.loads(failures.read_text("utf-8")) if failures.exists() else {}
    done = {int(a.info["candidate"]) for a in found} | {int(k) for k in failed}
    calculator = None
    for k in sorted(set(range(len(chosen))) - done):
        calculator = make() if calculator is None else calculator
        atoms = bare(chosen[k])
        atoms.info["candidate"] = k
        work = atoms.copy()
        work.calc = calculator
        try:
            values = _labels(work)
        except Exception as error:  # a calculator may raise anything; the other frames still count
            failed[str(k)] = f"{type(error).__name__}: {error}"
            write_json(failures, failed)
            continue
        atoms.calc = SinglePointCalculator(atoms, **values)
        found.append(atoms)
        with atomic_path(file) as temporary:
            ase.io.write(temporary, found, format="extxyz")
    return list(found)


def _labels(atoms: Atoms) -> dict[str, Any]:
    """Energy, forces, and stress where the calculator of these atoms gives one.

    Raises:
        ValueError: one of them is not finite.
        Exception: a calculator may raise anything.
    """
    values = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if atoms.pbc.all():
        with suppress(PropertyNotImplementedError):
            values["stress"] = atoms.get_stress()
    strange = [name for name, value in values.items() if not np.isfinite(value).all()]
    if strange:
        raise ValueError(f"{' and '.join(strange)} of the calculator are not finite")
    return values


def _fit(current: Path, potential: Potential, old: Sequence[Structure], config: LearnConfig, folder: Path) -> dict[str, Any]:
    """Fine-tune on all frames labelled so far; a frame that validated once does so for ever."""
    sides: dict[str, list[Atoms]] = {"train": [], "valid": []}
    kinds = ["new" if potential.seen is None else potential.seen.where(s) for s in old]
    for k, (structure, kind) in enumerate(zip(old, kinds, strict=True)):
        valid = kind == "valid" if "valid" in kinds else k % VALID_EVERY == VALID_EVERY - 1
        sides["valid" if valid else "train"].append(structure.to_ase())
    new = labelled_before(config.out)
    for number, atoms in enumerate(new, 1):
        sides["valid" if number % VALID_EVERY == 2 else "train"].append(atoms)
    for side, frames in sides.items():
        with atomic_path(folder / f"{side}.extxyz") as temporary:
            ase.io.write(temporary, frames, format="extxyz")
    if not sides["train"] or not sides["valid"]:
        raise RuntimeError(f"{len(new)} labelled frames are too few to train and to validate: raise frames, or give data.")
    start = {"start": str(current)}
    values = to_dict(choose_settings(folder / "train.extxyz", out=folder / "fit", minutes=config.minutes, finetune=start))
    method = {"functional": potential.statistics.functional, "dispersion": potential.statistics.dispersion}  # labels are of the start's
    values["data"] |= {"valid": str(folder / "valid.extxyz"), "split": "random", **method}
    begun = folder / "fit" / "config.yaml"
    if begun.exists():  # compiled or not as it began, whatever this machine has compiled since
        values["training"]["compile"] = load_config(begun).training.compile
    values["training"] |= {"device": config.device} | ({"minutes": None, "steps": config.train_steps} if config.train_steps else {})
    answer = train(make_config(values), resume=True, progress=False)
    if "stopped" in answer:
        raise Stopped(f"stopped by {answer['stopped']} while fine-tuning; the same command goes on")
    return answer | {"n_train": len(sides["train"])}


def labelled_in(n_labelled: int, n_rounds: int) -> str:
    """What a run has done, in words."""
    return f"{n_labelled} frame{'s' * (n_labelled != 1)} labelled in {n_rounds} round{'s' * (n_rounds != 1)}"


def _report(curve: Sequence[dict[str, Any]], held: bool, path: Path) -> None:
    """One page: what each round met, and the learning curve."""
    report = Report("Active learning", labelled_in(sum(r["n_labelled"] for r in curve), len(curve)))
    last = curve[-1]
    sentence = f"{100 * last['uncertain_share']:.1f} % of the frames of the last walks were uncertain, {last['broken']} walk{'s' * (last['broken'] != 1)} broke."
    report.verdict("passed" if held else "weak", sentence)
    columns = {
        "round": "round", "n_labelled": "labelled", "n_train": "trained on", "uncertain_share": "uncertain frames, %", "broken": "broken walks",
        "new_forces_rmse_meV_per_A": "force error on new frames before, meV/Å", "valid_forces_rmse_meV_per_A": "on validation frames after, meV/Å",
    }  # fmt: skip
    rows = [r | {"uncertain_share": 100 * r["uncertain_share"]} for r in curve]
    report.table(list(columns.values()), [[r.get(key, "–") for key in columns] for r in rows])
    labels = np.cumsum([0, *(r["n_labelled"] for r in curve[:-1])]).astype(float)
    shares = np.array([100 * r["uncertain_share"] for r in curve])
    errors = np.array([r.get("new_forces_rmse_meV_per_A", np.nan) for r in curve])
    figures = [
        (plot_curves(labels, [(shares, "uncertain frames")], "frames labelled before", "%"), "Frames of the walks beyond the limit.")
    ]
    if np.isfinite(errors).any():
        figures.append((plot_curves(labels, [(errors, "new frames")], "frames labelled before", "force error, meV/Å"),
                        "Errors on frames that were labelled because they were uncertain, before training on them."))  # fmt: skip
    for figure, _ in figures:
        figure.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    report.figures(figures)
    report.write(path)
