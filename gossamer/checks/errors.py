"""Errors of any ASE calculator on labelled structures, and whether its own uncertainties are honest."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from numpy.typing import NDArray

from gossamer.checks.candidate import Candidate
from gossamer.checks.result import Metric, Panel, Result, at_least, at_most, close_to, conclude, curve, measured, skipped
from gossamer.checks.symmetry import unconstrained
from gossamer.data.atoms import own_results, read_frames
from gossamer.files import write_text
from gossamer.simulation.uncertain import uncertainties

Array = NDArray[np.float64]


def predict(calculator: Any, frames: Sequence[Atoms], bar: Any = iter) -> list[dict[str, Any]]:
    """Labels and predictions of each frame: energy (eV), forces (eV/Å), stress (eV/Å³), uncertainty (eV/Å) where there are any.

    A frame that the calculator cannot evaluate has an "error" and no predictions.

    Labels are those of ASE's readers: the energy, forces and stress of the frame's own calculator.

    Raises:
        ValueError: a frame whose calculator went on to other atoms.
    """
    out = []
    for k, atoms in enumerate(bar(frames)):
        labels = own_results(atoms, f"frame {k}")
        entry: dict[str, Any] = {
            "symbols": np.array(atoms.get_chemical_symbols()),
            "n_atoms": len(atoms),
            "energy": (None, None),
            "forces": (None, None),
        }
        work = unconstrained(atoms)
        work.calc = calculator
        try:
            energy, forces = float(work.get_potential_energy()), work.get_forces()
        except Exception as error:  # a judged calculator may raise anything; the other frames still count
            out.append({**entry, "error": f"{type(error).__name__}: {error}", "uncertainty": None})
            continue
        entry["energy"], entry["forces"] = (labels.get("energy"), energy), (labels.get("forces"), forces)
        if labels.get("stress") is not None and atoms.pbc.all():
            try:
                entry["stress"] = (_full(labels["stress"]), _full(work.get_stress()))
            except Exception:
                entry["stress"] = (None, None)
        entry["uncertainty"] = uncertainties(work)
        out.append(entry)
    return out


def _full(stress: Any) -> Array:
    array = np.asarray(stress, dtype=float)
    return voigt_6_to_full_3x3_stress(array) if array.shape == (6,) else array.reshape(3, 3)


def aligned_energies(entries: Sequence[dict[str, Any]]) -> tuple[Array, Array, Array, Array]:
    """Energies per atom: errors (meV) as they are and after fitting one constant per element, and labels (eV) as they are and likewise.

    Potentials count energies from different zeros (isolated atoms, elements, nothing), so the second says how good the
    energy differences are, and the fourth what there is to predict of them. With no more frames than elements nothing is left of either.
    """
    kept = [e for e in entries if e["energy"][0] is not None]
    elements = sorted({s for e in kept for s in e["symbols"]})
    counts = np.array([[(e["symbols"] == s).sum() for s in elements] for e in kept], dtype=float)
    sizes = counts.sum(axis=1)
    errors = np.array([e["energy"][1] - e["energy"][0] for e in kept])
    labels = np.array([e["energy"][0] for e in kept])
    shares, found = counts / sizes[:, None], np.stack([errors, labels], axis=1) / sizes[:, None]
    left = found - shares @ np.linalg.lstsq(shares, found, rcond=None)[0]
    if len(kept) <= np.linalg.matrix_rank(shares):
        left[:] = 0.0
    return 1000 * found[:, 0], 1000 * left[:, 0], found[:, 1], left[:, 1]


def force_errors(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and root mean square errors in meV/Å: of all components, by element, and by the magnitude of the label."""
    kept = [e for e in entries if e["forces"][0] is not None]
    labels, predictions = (np.concatenate([e["forces"][k] for e in kept]) for k in (0, 1))
    symbols = np.concatenate([e["symbols"] for e in kept])
    difference = 1000 * (predictions - labels)
    magnitude = np.linalg.norm(labels, axis=1)
    edges = np.quantile(magnitude, np.linspace(0, 1, 9))
    bins = [(magnitude >= a) & (magnitude <= b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    norm = np.linalg.norm(labels, axis=1) * np.linalg.norm(predictions, axis=1)
    strong = magnitude > STRONG
    cosine = ((labels * predictions).sum(axis=1) / np.maximum(norm, 1e-300))[strong]
    return {
        "mae": float(np.abs(difference).mean()), "rmse": float(np.sqrt((difference**2).mean())), "rms_label": 1000 * float(np.sqrt((labels**2).mean())),
        "cosine": float(cosine.mean()) if strong.any() else float("nan"), "n_strong": int(strong.sum()),
        "by_element": {e: float(np.abs(difference[symbols == e]).mean()) for e in sorted(set(symbols))},
        "by_magnitude": [(float(magnitude[b].mean()), float(np.abs(difference[b]).mean())) for b in bins if b.any()],
        "labels": labels.ravel(), "predictions": predictions.ravel(),
    }  # fmt: skip


def calibration(entries: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Whether uncertainties of force components are honest; None where the calculator gives none.

    ``z_std`` is the standard deviation of error/uncertainty (1 if calibrated), ``within_1`` and ``within_2`` the shares of
    errors within one and two uncertainties (0.683 and 0.954 if normal), ``rank`` the Spearman correlation of size of error
    and uncertainty.
    """
    from scipy.stats import spearmanr  # a second

    kept = [e for e in entries if e["uncertainty"] is not None and e["forces"][0] is not None]
    if not kept:
        return None
    error = np.concatenate([(e["forces"][1] - e["forces"][0]).ravel() for e in kept])
    sigma = np.concatenate(
        [np.broadcast_to(np.asarray(e["uncertainty"], dtype=float).reshape(e["n_atoms"], -1), (e["n_atoms"], 3)).ravel() for e in kept]
    )
    z = error / np.maximum(sigma, 1e-12)
    return {"z_std": float(z.std()), "within_1": float((np.abs(z) <= 1).mean()), "within_2": float((np.abs(z) <= 2).mean()),
            "rank": float(spearmanr(np.abs(error), sigma).statistic)}  # fmt: skip


def read_labelled(path: Path | str) -> list[Atoms]:
    """Labelled frames of any file ASE reads; extended XYZ may be .xz, .gz or .bz2.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no frame has an energy or forces.
    """
    frames = read_frames(path)
    if not any(f.calc is not None and ("energy" in f.calc.results or "forces" in f.calc.results) for f in frames):
        raise ValueError(f"No frame of '{path}' has an energy or forces that ASE reads. Name them energy and forces in the file.")
    return frames


# --- verdict --------------------------------------------------------------------------------------------------------

STRONG = 0.05
"""eV/Å, from which the direction of a force says something; labels that are smaller (root mean square) count as large as that"""
FEWEST_ATOMS = 100
"""with uncertainties, below which it is not said what these are worth"""
LEAST = 1e-6
"""eV/atom, spread of labels from which there is something to predict"""
INACCURATE = "Quantities computed with this potential differ from those of the reference method; how much depends on the quantity."
TRAINED = "Errors on frames that were trained on say nothing of accuracy: give frames kept aside."
OVERCONFIDENT = "Uncertainties of the potential cannot be used to decide where to trust it."


def check(candidate: Candidate) -> Result:
    """Errors on the labelled file, by element and by force, the worst frames written beside the report."""
    frames = candidate.labelled
    if not frames:
        return skipped("No labelled data: give --data FILE.")
    known = [f for f in frames if set(f.symbols) <= set(candidate.elements)]
    if not known:
        return skipped(
            f"The data holds elements that the potential does not know ({', '.join(sorted({s for f in frames for s in f.symbols} - set(candidate.elements)))})."
        )
    fresh, metrics, notes = unseen(candidate, known)
    limit = {"quick": 100, "standard": 1000}.get(candidate.config.level, len(fresh))
    chosen = fresh[:: max(1, int(np.ceil(len(fresh) / limit)))]
    places = {id(frame): k for k, frame in enumerate(frames)}
    entries = predict(candidate.calculator, chosen, lambda items: candidate.bar(items, "errors"))
    lost = [e["error"] for e in entries if "error" in e]
    metrics.append(
        at_most("frames without an answer", 100 * len(lost) / len(entries), "%", 0.0, 1.0, "Such structures cannot be simulated at all.")
    )
    if lost:
        metrics[-1].reason += f" ({' '.join(lost[0].split())[:150]})"
    panels: list[Panel] = []
    if any(e["energy"][0] is not None for e in entries):
        metrics += _energies(entries, candidate.config.same_zero, panels)
    if any(e["forces"][0] is not None for e in entries):
        f = force_errors(entries)
        metrics += [
            measured("force, mean absolute error", f["mae"], "meV/Å", "low"), measured("force, root mean square error", f["rmse"], "meV/Å", "low"),
            *_relative(f),
        ]  # fmt: skip
        metrics += [measured(f"force on {e}, mean absolute error", v, "meV/Å", "low") for e, v in f["by_element"].items()]
        every = max(1, len(f["labels"]) // 3000)
        span = [float(f["labels"].min()), float(f["labels"].max())]
        panels.append(
            Panel(
                "Force components",
                "label, eV/Å",
                "prediction, eV/Å",
                [curve(f["labels"][::every], f["predictions"][::every]), curve(span, span, "equal", reference=True)],
                points=True,
            )
        )
        panels.append(
            Panel(
                "Force error by the size of the force",
                "label, eV/Å",
                "mean absolute error, meV/Å",
                [curve([m for m, _ in f["by_magnitude"]], [e for _, e in f["by_magnitude"]])],
            )
        )
    stresses = [e["stress"] for e in entries if e.get("stress", (None, None))[0] is not None and e["stress"][1] is not None]
    if stresses:
        difference = 1000 * np.array([p - t for t, p in stresses])
        metrics.append(measured("stress, mean absolute error", float(np.abs(difference).mean()), "meV/Å³", "low"))
    honest = calibration(entries)
    n_judged = sum(e["n_atoms"] for e in entries if e.get("uncertainty") is not None)
    if honest and n_judged < FEWEST_ATOMS:
        reason = f"needs {FEWEST_ATOMS} atoms in frames that were not trained on, found {n_judged}"
        metrics.append(Metric("rank correlation of error and uncertainty", None, "", "skipped", reason=reason))
    elif honest:
        metrics += [
            close_to("error over uncertainty, standard deviation", honest["z_std"], "", 1.0, 0.3, 1.0, OVERCONFIDENT),
            at_least("rank correlation of error and uncertainty", honest["rank"], "", 0.3, 0.1, OVERCONFIDENT),
            measured("errors within one uncertainty", honest["within_1"], "(0.68 if normal)"),
        ]
    notes.insert(0, f"{len(chosen)} of {len(frames)} frames." + ("" if honest else " The potential gives no uncertainty."))
    worst = _worst(chosen, [places[id(frame)] for frame in chosen], entries, candidate.folder / "worst.extxyz")
    notes.append(f"The frames with the largest errors: {worst}, in {candidate.name}/worst.extxyz.")
    return conclude(metrics, panels, notes, "Errors are small against what there is to predict.")


def _relative(found: dict[str, Any]) -> list[Metric]:
    """Errors of forces beside what there is to predict, which is little in perfect crystals and relaxed structures."""
    title = "mean cosine between predicted and true force"
    return [
        at_most("force error over the size of the labels (both root mean square)", found["rmse"] / np.maximum(found["rms_label"], 1000 * STRONG), "",
                0.15, 0.5, INACCURATE),
        at_least(title, found["cosine"], "", 0.97, 0.85, INACCURATE)
        if found["n_strong"]
        else Metric(title, None, "", "skipped", reason=f"needs labels of more than {STRONG:g} eV/Å"),
    ]  # fmt: skip


def _energies(entries: Sequence[dict[str, Any]], same_zero: bool, panels: list[Panel]) -> list[Metric]:
    """Errors of the energy, and beside what there is to predict: of both with one constant per element fitted, unless zeros are the same."""
    raw, shifted, labels, differing = aligned_energies(entries)
    counted, spread = (raw, labels.std()) if same_zero else (shifted, differing.std())
    panels.append(Panel("Energies", "label, eV/atom", "error, meV/atom", [curve(labels, counted)], points=True))
    title = "energy error over the spread of the labels"
    return [
        measured("energy, mean absolute error", float(np.abs(raw).mean()), "meV/atom", "low"),
        measured("energy, with one constant per element fitted", float(np.abs(shifted).mean()), "meV/atom", "low"),
        at_most(title, float(np.abs(counted).mean() / 1000 / spread), "", 0.2, 1.0, INACCURATE)
        if spread > LEAST
        else Metric(title, None, "", "skipped", reason="needs more frames than elements, of different energies"),
    ]


def unseen(candidate: Candidate, frames: list[Atoms]) -> tuple[list[Atoms], list[Metric], list[str]]:
    """Frames that were not trained on, as far as the potential remembers; all of them, and a failed metric, where none is left."""
    if candidate.seen is None:
        return frames, [], ["Training frames cannot be recognised: the potential does not remember them."]
    kinds = [candidate.seen.where(f) for f in frames]
    fresh = [f for f, kind in zip(frames, kinds, strict=True) if kind != "train"]
    n_train, n_valid = kinds.count("train"), kinds.count("valid")
    notes = [f"{n_train} of {len(frames)} frames were trained on and are left out."] if n_train and fresh else []
    if n_valid:
        notes.append(
            f"{n_valid} frame{'s' * (n_valid != 1)} chose the best weights (validation): errors on new frames are a little larger."
        )
    if fresh:
        return fresh, [], notes
    return frames, [at_most("frames that were trained on", 100.0, "%", 0.0, 0.0, TRAINED)], notes


def _worst(frames: Sequence[Atoms], places: Sequence[int], entries: Sequence[dict[str, Any]], path: Path, n: int = 10) -> str:
    """Write the worst frames, and name the three worst by their ``places`` in the file."""

    def size(k: int) -> float:
        if "error" in entries[k]:
            return float("inf")
        true, predicted = entries[k]["forces"]
        if true is not None:
            return float(np.sqrt(((predicted - true) ** 2).mean()))
        label, energy = entries[k]["energy"]
        if label is None:
            return 0.0
        return abs(energy - label) / entries[k]["n_atoms"]

    order = sorted(range(len(frames)), key=lambda k: -size(k))[:n]
    buffer = io.StringIO()
    ase.io.write(buffer, [frames[k] for k in order], format="extxyz")
    write_text(path, buffer.getvalue())
    units = ["meV/atom" if "error" not in entries[k] and entries[k]["forces"][0] is None else "meV/Å" for k in order[:3]]
    return ", ".join(
        f"{places[k]} ({'no answer' if 'error' in entries[k] else f'{1000 * size(k):.0f} {unit}'})"
        for k, unit in zip(order, units, strict=False)
    )
