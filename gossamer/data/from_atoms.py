"""A structure from ASE's Atoms: labels as they were stored, in our units and signs, and remarks on what else the frame says.

Labels are taken with constraints not applied (ASE would zero the forces of fixed atoms). A label that is absent is None (the force on an only atom is zero
by symmetry); whether that is an error is decided by the loss that needs it. The stress of a frame that is not periodic along all axes is absent, too: there is
no volume that it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian
from ase.stress import voigt_6_to_full_3x3_stress

from gossamer.data.labels import LabelConfig, names_virial
from gossamer.data.structure import REACH, Fault, Structure, label_fields
from gossamer.data.units import label_scales
from gossamer.neighbors import neighbor_list
from gossamer.quantities import OWN, QUANTITIES

WEIGHTS = {"config_weight": OWN, "weight": OWN, "config_energy_weight": ("energy",), "config_forces_weight": ("forces",),
           "config_stress_weight": ("stress",), "config_virials_weight": ("stress",)}  # fmt: skip
"""entries by which MACE (and GPUMD: weight) weighs frames and their labels, and which labels; a weight of zero marks a label that is missing"""
WEIGHTLESS = "weight 0 of "
"""what a remark begins with that says which label a frame weighs with zero"""
HEAD = "head "
"""what a remark begins with that says to which of MACE's heads a frame belongs"""
CHARGE = "charge "
"""likewise, which charge a structure has that is not neutral"""
SPIN = "spin "
"""likewise, which spin"""
CHARGES, SPINS = ("charge", "total_charge"), ("spin", "total_spin", "multiplicity", "spin_multiplicity")
"""entries of a structure's charge and spin"""
CELLS = ("lattice", "cell", "box", "unit_cell", "cell_vectors", "lattice_vectors")
"""entries by which programs say a cell, where ASE has found none; in small letters"""
SECOND = ("ref", "dft", "qm", "reference", "true", "target")
"""words before the name of a label in files that hold several of it: of a reference, say, beside those of another method"""
ASYMMETRY = 0.02
"""of the largest component, by which a stress may differ from its transpose"""
WORDS = {"energy": ("energy", "e", "etot"), "forces": ("force", "f"), "stress": ("stress", "virial")}
"""what names of labels contain, or are if they have one letter"""


def from_atoms(atoms: Atoms, labels: LabelConfig, name: str, extra: dict[str, Any] | None = None) -> Structure:
    """A structure from ASE Atoms with labels in its calculator, info or arrays (or in ``extra``)."""
    results = dict(getattr(atoms.calc, "results", {})) if atoms.calc is not None else {}
    found: dict[str, Any] = {**atoms.info, **atoms.arrays, **results, **(extra or {})}
    length_scale = label_scales(labels)[1]
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms) or (isinstance(constraint, FixCartesian) and np.all(constraint.mask)):
            fixed[constraint.index] = True
    values: dict[str, Any] = {}
    faults: dict[str, Fault] = {}
    for label, key in labels.names().items():
        if key in found and found[key] is not None:
            value = _value(label, found[key], key, atoms, labels)
            (faults if isinstance(value, Fault) else values)[label] = value
        elif (
            key != label
            and key not in found
            and not (label in ("forces", "stress") and len(atoms) == 1)
            and (label != "stress" or atoms.pbc.all())
        ):
            setting = "virial" if key == labels.virial else label
            faults[label] = Fault(f"no {label}", f"no entry '{key}' (data.labels.{setting}). Found: {_listed(found)}")
    if len(atoms) == 1 and "energy" in values:
        values.setdefault("forces", np.zeros((1, 3)))  # by symmetry, also of a crystal of one atom: files of isolated atoms often have none
    remarks = _remarks(found, values, atoms, labels)
    if not atoms.pbc.all():
        values.pop("stress", None)
    group = None if labels.group is None else found.get(labels.group)
    if labels.group is not None and group is None:
        raise ValueError(f"{name}: no entry '{labels.group}' (data.labels.group). Found: {_listed(found)}.")
    return Structure(
        atomic_numbers=atoms.numbers.astype(np.int64),
        positions=atoms.positions * length_scale,
        cell=atoms.cell.array * length_scale,
        pbc=np.array(atoms.pbc, dtype=bool),
        **label_fields(values),
        fixed=fixed if fixed.any() else None,
        group=None if group is None else str(group),
        weight=1.0 if labels.weight is None else _weight(found, labels.weight, name),
        name=name,
        faults=faults,
        entries=tuple(sorted(str(key) for key in found if key not in ("numbers", "positions", *labels.names().values()))),
        remarks=tuple(remarks),
    )


def _weight(found: Mapping[str, Any], key: str, name: str) -> float:
    """How much a frame counts.

    Raises:
        ValueError: there is no such entry, or it is no number from 0 on.
    """
    if key not in found:
        raise ValueError(f"{name}: no entry '{key}' (data.labels.weight). Found: {_listed(found)}.")
    try:
        weight = float(found[key])
    except (TypeError, ValueError):
        weight = np.nan
    if not (weight >= 0 and np.isfinite(weight)):
        raise ValueError(f"{name}: '{key}' (data.labels.weight) is {str(found[key])[:40]!r}, expected a number from 0 on.")
    return weight


def _remarks(found: Mapping[str, Any], values: Mapping[str, Any], atoms: Atoms, labels: LabelConfig) -> list[str]:
    """What is to be said of a frame whose labels are read: entries that are not, and mean something; numbers that can hardly be right."""
    numbers = {key: value for key, value in found.items() if isinstance(value, int | float | np.number) and not isinstance(value, bool)}
    remarks = ["stress without volume"] if "stress" in values and not atoms.pbc.all() else []
    if labels.energy == "energy" and "energy" in values and "free_energy" in numbers:
        energy_scale = label_scales(labels)[0]
        if abs(energy_scale * float(numbers["free_energy"]) - values["energy"]) > 1e-3 * len(atoms):
            remarks.append("another free energy")
    if _second_names(found, values, atoms, labels):
        remarks.append("another label")
    stress = values.get("stress")
    if stress is not None and np.isfinite(stress).all() and np.abs(stress - stress.T).max() > ASYMMETRY * np.abs(stress).max():
        remarks.append("a stress that is not symmetric")
    weights = {key: numbers[key] for key in WEIGHTS if key in numbers and key != labels.weight}
    if any(weight != 1 for weight in weights.values()):
        remarks.append("a weight of its own")
    remarks += {f"{WEIGHTLESS}{label}": None for key, weight in weights.items() if weight == 0 for label in WEIGHTS[key]}
    if isinstance(found.get("head"), str):
        remarks.append(f"{HEAD}{found['head']}")
    if charge := next((numbers[key] for key in CHARGES if key in numbers), 0):
        remarks.append(f"{CHARGE}{charge:+g}")
    if spin := next((key for key in SPINS if key in numbers), None):
        remarks.append(f"{SPIN}{numbers[spin]:g}")
    if not atoms.cell.any() and any(key.lower() in CELLS for key in found):
        remarks.append("a cell under another name")
    if len(atoms) == 1 and re.search("isolated.?atom", str(found.get("config_type", "")), re.IGNORECASE):
        scale = label_scales(labels)[1]
        with suppress(ValueError):  # of a place or a cell that is none, which is said where the structure is looked at
            if len(neighbor_list(atoms.positions * scale, atoms.cell.array * scale, atoms.pbc, REACH)[0][0]):
                remarks.append("isolated in name")
    return remarks


def _second_names(found: Mapping[str, Any], values: Mapping[str, Any], atoms: Atoms, labels: LabelConfig) -> list[str]:
    """Entries that are called as a label is, with a usual word before it, and say otherwise than what is read under its plain name."""
    differing = []
    for key in found:
        word, _, kind = key.rpartition("_")
        plain = {"force": "forces", "virial": "stress", "virials": "stress"}.get(kind, kind)
        if (word.lower() not in SECOND and (word or "virial" not in kind)) or labels.names().get(plain) != plain or plain not in values:
            continue
        other = _value(plain, found[key], key, atoms, replace(labels, virial=key) if names_virial(key) else labels)
        if isinstance(other, Fault) or other is None or np.shape(other) != np.shape(values[plain]):
            continue
        if not np.allclose(other, values[plain], rtol=1e-3, atol=1e-3 * len(atoms) if plain == "energy" else 1e-3):
            differing.append(key)
    return differing


def suggestion(label: str, entries: Sequence[str]) -> str:
    """Where a missing label may be, with the option that says so; empty if no name looks like it."""
    words = WORDS.get(label, (label,))
    alike = [e for e in entries if any(word == e.lower() if len(word) == 1 else word in e.lower() for word in words)]
    doubtful = ("kinetic", "free", "formation", "per_atom", "reference", "error", "std", "correct", "raw", "magm", "max", "mean", "above")
    alike.sort(key=lambda e: (any(word in e.lower() for word in doubtful), not e.lower().endswith(words[0]), len(e), e))
    if not alike:
        return ""
    option = "virial" if names_virial(alike[0]) else label
    shown = ", ".join(alike[:6]) + (" ..." if len(alike) > 6 else "")
    return f"found {shown}: if {alike[0]} is it, say --{option} {alike[0]} (data.labels.{option}: {alike[0]})"


def _value(label: str, stored: Any, key: str, atoms: Atoms, labels: LabelConfig) -> Any:
    """One label in our units and sign; a `Fault` where there are no numbers, or not as many as the quantity has."""
    try:
        value = np.asarray(stored, dtype=np.float64)
        if np.asarray(stored).dtype == bool:
            raise TypeError("true or false is no number")
    except (TypeError, ValueError):
        return Fault(f"{label} is no number", f"'{key}' holds {str(stored)[:40]!r}, expected numbers ({label})")
    energy_scale, length_scale, force_scale, stress_scale = label_scales(labels)
    shape = QUANTITIES[label].full_shape(len(atoms))
    expected = {"energy": "one total energy", "stress": "9 (3 x 3) or 6 (xx, yy, zz, yz, xz, xy)"}.get(label, f"{list(shape)} ({label})")
    if label != "forces" and value.size != np.prod(shape) and not (label == "stress" and value.size == 6):
        return Fault(f"{label} of another size", f"'{key}' holds {value.size} numbers, expected {expected}")
    if label == "energy":
        return float(value.reshape(())) * energy_scale
    if label == "forces":
        return value * force_scale
    if label == "stress":
        stress = stress_scale * (value.reshape(3, 3) if value.size == 9 else voigt_6_to_full_3x3_stress(value.reshape(6)))
        if not labels.is_virial():
            return stress
        return stress / (atoms.get_volume() * length_scale**3) if atoms.cell.rank == 3 else None
    return value.reshape(shape)


def _listed(found: Mapping[str, Any]) -> str:
    return ", ".join(sorted(str(k) for k in found if k not in ("numbers", "positions"))) or "no labels at all"
