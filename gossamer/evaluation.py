"""Errors of a potential on labelled structures, in field units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from gossamer.calibration import honesty
from gossamer.data.batch import batches_by_atoms
from gossamer.data.from_atoms import suggestion
from gossamer.data.structure import Structure
from gossamer.graph import Graph
from gossamer.potential import Potential, Prediction
from gossamer.quantities import QUANTITIES


@dataclass
class Errors:
    """Sums of absolute and squared errors, so that batches and ranks can be added up."""

    factor: float = 1000.0
    """from the quantity's unit to that of its errors"""
    absolute: float = 0.0
    squared: float = 0.0
    count: int = 0

    def add(self, difference: np.ndarray) -> None:
        self.absolute += float(np.abs(difference).sum())
        self.squared += float((difference**2).sum())
        self.count += int(difference.size)

    @property
    def mae(self) -> float:
        return self.factor * self.absolute / self.count if self.count else float("nan")

    @property
    def rmse(self) -> float:
        return self.factor * float(np.sqrt(self.squared / self.count)) if self.count else float("nan")


@dataclass(repr=False)
class Evaluation:
    """Errors on a data set, in the units of the table of quantities: meV/atom, meV/Å, meV/Å³. Printed, it is a table of them."""

    errors: dict[str, Errors] = field(default_factory=lambda: {name: Errors(q.error_factor) for name, q in QUANTITIES.items()})
    """by quantity"""
    per_element: dict[str, Errors] = field(default_factory=dict)
    """force errors by element"""
    frames: list[dict[str, Any]] = field(default_factory=list)
    """per frame: index, name, and for each quantity energy_error (one number, with its sign) or forces_rmse (several)"""
    energies: list[tuple[float, float]] = field(default_factory=list)
    """(label, prediction) in eV/atom less the reference energies, for parity plots"""
    shifts: list[tuple[float, np.ndarray]] = field(default_factory=list)
    """(prediction less label in eV, number of atoms of each atomic number), to find constant offsets"""
    components: list[np.ndarray] = field(default_factory=list)
    """(2, n) labels and predictions of force components in eV/Å"""
    expected: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """of a potential with an uncertainty: (2, n) errors and expected errors of energies (eV/atom) and of forces (eV/Å, root mean square of
    the three components)"""
    conservative: bool = True
    n_training_frames: int = 0
    """frames that the potential was trained on, as far as it knows; left out, unless there were no others or they were asked for"""
    n_validation_frames: int = 0
    """frames that chose its best weights; used"""
    training_error: bool = False
    """there were training frames only: the errors say nothing of accuracy"""
    notes: list[str] = field(default_factory=list)
    """what to know of the frames, in sentences"""

    @property
    def energy(self) -> Errors:
        return self.errors["energy"]

    @property
    def forces(self) -> Errors:
        return self.errors["forces"]

    @property
    def stress(self) -> Errors:
        return self.errors["stress"]

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        out: dict[str, Any] = {"n_frames": len(self.frames), "conservative_forces": self.conservative}
        if self.notes:
            out |= {"n_training_frames": self.n_training_frames, "n_validation_frames": self.n_validation_frames,
                    "training_error": self.training_error, "notes": self.notes}  # fmt: skip
        for name, errors in self.errors.items():
            unit = QUANTITIES[name].error_key
            if errors.count:
                out[f"{name}_mae_{unit}"], out[f"{name}_rmse_{unit}"] = errors.mae, errors.rmse
        if self.energy_offset() is not None:
            out["energy_offset"] = self.energy_offset()
        if self.expected:
            out["uncertainty"] = self.honesty()
        elements = sorted(self.per_element, key=chemical_symbols.index)
        out["forces_per_element_meV_per_A"] = {e: {"mae": self.per_element[e].mae, "rmse": self.per_element[e].rmse} for e in elements}
        return out

    def __repr__(self) -> str:
        return "\n".join([*self.notes, described(self.summary())])

    def honesty(self) -> dict[str, dict[str, Any]]:
        """What the uncertainties of energy and forces are worth, by `gossamer.calibration.honesty`."""
        return {name: honesty(*np.concatenate(parts, axis=1)) for name, parts in self.expected.items()}

    def expect(self, structure: Structure, predicted: Mapping[str, Any], counted: np.ndarray, isolated: bool) -> dict[str, float]:
        """Add one structure's uncertainties; returns the entries of its frame, in meV/atom and meV/Å (root mean square of its atoms).

        ``counted``: (n_atoms,) whether an atom's force counts. ``isolated``: an isolated atom, whose energy is known, says nothing of them.
        """
        entries, n = {}, structure.n_atoms
        if "energy_uncertainty" in predicted:
            sigma = float(predicted["energy_uncertainty"]) / n
            entries["energy_uncertainty"] = 1000 * sigma
            if structure.energy is not None and not isolated:
                self.expected.setdefault("energy", []).append(np.array([[(predicted["energy"] - structure.energy) / n], [sigma]]))
        if "forces_uncertainty" in predicted and counted.any():
            sigmas = predicted["forces_uncertainty"][counted]
            entries["forces_uncertainty"] = 1000 * float(np.sqrt((sigmas**2).mean()))
            if structure.forces is not None and not isolated:
                errors = np.sqrt(((predicted["forces"] - structure.forces) ** 2).mean(axis=1))[counted]
                self.expected.setdefault("forces", []).append(np.stack([errors, sigmas]))
        return entries

    def energy_offset(self) -> dict[str, float] | None:
        """Mean energy error per atom, and what is left of the error without it, where a constant makes most of the error.

        So it is between functionals, codes, or zeros of energy: a constant for each element where frames are enough to tell, else one
        for all atoms. None where no constant accounts for two thirds of the error, or where the error is below 5 meV/atom.
        """
        if len(self.shifts) < 2:
            return None
        differences, counts = (np.array(column, dtype=float) for column in zip(*self.shifts, strict=True))
        sizes = counts.sum(axis=1)
        used = counts.any(axis=0)
        rows = counts[:, used] if len(differences) >= 5 * used.sum() else sizes[:, None]
        constants, *_ = np.linalg.lstsq(rows / sizes[:, None], differences / sizes, rcond=1e-10)
        rest = 1000 * float(np.abs((differences - rows @ constants) / sizes).mean())
        if self.energy.mae < max(5.0, 3 * rest):
            return None
        return {"mean_meV_per_atom": 1000 * float((differences / sizes).mean()), "mae_without_meV_per_atom": rest}

    def add(self, name: str, difference: np.ndarray) -> dict[str, float]:
        """Add one structure's differences of one quantity; returns the entry of its frame."""
        factor = self.errors[name].factor
        self.errors[name].add(difference)
        if difference.ndim == 0:
            return {f"{name}_error": factor * float(difference)}
        return {f"{name}_rmse": factor * float(np.sqrt((difference**2).mean()))}

    def worst(self, n: int = 20) -> list[int]:
        """Indices of the frames with the largest errors (forces where there are labels, else energy)."""
        key = "forces_rmse" if any("forces_rmse" in f for f in self.frames) else "energy_error"
        return [f["index"] for f in sorted(self.frames, key=lambda f: -abs(f.get(key, 0.0)))[:n]]


def described(summary: Mapping[str, Any]) -> str:
    """Errors, as `Evaluation.summary` gives them, as a table for people."""
    n = summary["n_frames"]
    lines = [f"{n} frame{'s' * (n != 1)}{'' if summary['conservative_forces'] else '; forces are NOT the gradient of the energy'}"]
    lines.append(f"{'':16s}{'MAE':>10s}{'RMSE':>10s}")
    for label, quantity in QUANTITIES.items():
        mae, rmse = (summary.get(f"{label}_{kind}_{quantity.error_key}") for kind in ("mae", "rmse"))
        if mae is not None:
            lines.append(f"{label:16s} {mae:9.3f} {rmse:9.3f}  {quantity.error_unit}")
    for label, worth in summary.get("uncertainty", {}).items():
        if worth["ratio"] is not None:
            rank = "" if worth["rank"] is None else f", rank correlation {worth['rank']:.2f}"
            lines.append(f"{label + ' uncertainty':22s}errors are {worth['ratio']:.2f} times what was expected{rank}")
    if "energy_offset" in summary:
        offset = summary["energy_offset"]
        lines.append(
            f"energies lie {offset['mean_meV_per_atom']:+.6g} meV/atom from the labels on average: another functional, code or zero of energy?"
        )
        lines.append(f"without a constant per element the MAE is {offset['mae_without_meV_per_atom']:.4g} meV/atom")
    of_elements = summary["forces_per_element_meV_per_A"]
    worst = sorted(of_elements, key=lambda element: -of_elements[element]["mae"])[:8]  # the rest is in the summary
    for element, errors in of_elements.items():
        if element in worst:
            lines.append(f"{'forces on ' + element:16s}{errors['mae']:10.3f}{errors['rmse']:10.3f}  meV/Å")
    if len(of_elements) > len(worst):
        lines.append(f"(the {len(worst)} elements with the largest errors of forces, of {len(of_elements)})")
    return "\n".join(lines)


def evaluate_potential(
    potential: Potential,
    structures: Sequence[Structure],
    batch_atoms: int = 2048,
    keep: int = 200_000,
    run: Callable[[Graph, bool], Prediction] | None = None,
    free_atoms_only: bool = False,
) -> Evaluation:
    """Compare predictions with whatever labels the structures have.

    Args:
        potential: Any potential, left in the mode it was in.
        structures: At least one of them with a label.
        batch_atoms: Atoms evaluated at once.
        keep: Most force components kept for plots.
        run: An engine of the potential that evaluates in its place.
        free_atoms_only: Leave out forces of atoms that were held fixed, as `LossConfig.free_atoms_only` does.

    Raises:
        ValueError: no labels at all, or an unknown element.
    """
    out = Evaluation(conservative=potential.conservative)
    kept = 0
    for start, batch in batches_by_atoms(structures, batch_atoms):
        wants_stress = potential.conservative and any(s.stress is not None for s in batch)
        predictions = potential.predict(batch, wants_stress, run, uncertainty=potential.uncertainty is not None, refuse=False)
        for offset, (s, p) in enumerate(zip(batch, predictions, strict=True)):
            frame: dict[str, Any] = {"index": start + offset, "name": s.name}
            counted = s.free if free_atoms_only else np.ones(s.n_atoms, dtype=bool)
            for name, quantity in QUANTITIES.items():
                if name in s.labels and p.get(name) is not None:
                    difference = np.asarray(p[name] - s.labels[name])
                    if name == "forces":
                        difference = difference[counted]
                    if difference.size:
                        frame |= out.add(name, difference / s.n_atoms if quantity.error_per_atom else difference)
            if s.energy is not None:
                out.shifts.append((p["energy"] - s.energy, np.bincount(s.atomic_numbers, minlength=119)))
                references = sum(potential.statistics.reference_energies[chemical_symbols[z]] for z in s.atomic_numbers)
                out.energies.append(((s.energy - references) / s.n_atoms, (p["energy"] - references) / s.n_atoms))
            if s.forces is not None:
                difference = p["forces"] - s.forces
                for z in np.unique(s.atomic_numbers[counted]):
                    errors = out.per_element.setdefault(chemical_symbols[z], Errors())
                    errors.add(difference[counted & (s.atomic_numbers == z)])
                if kept < keep:
                    out.components.append(np.stack([s.forces[counted].ravel(), p["forces"][counted].ravel()]))
                    kept += out.components[-1].shape[1]
            out.frames.append(frame | out.expect(s, p, counted, s.is_isolated(potential.cutoff)))
    if not any(errors.count for errors in out.errors.values()):
        hints = [hint for label in QUANTITIES if (hint := suggestion(label, structures[0].entries))] if len(structures) else []
        raise ValueError(
            "None of the structures has a label (energy, forces or stress), so there is nothing to compare with."
            + (f" In {structures[0].name}: {'; '.join(hints)}." if hints else "")
        )
    return out
