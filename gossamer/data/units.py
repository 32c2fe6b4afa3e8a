"""Units of labels: what they are called here and in files that state them, and their factors to ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ase import units

from gossamer.data.labels import LabelConfig
from gossamer.data.npz_file import npz_names, read_npz

ENERGY_UNITS = {"eV": 1.0, "meV": 1e-3, "Hartree": units.Hartree, "Ry": units.Rydberg, "kcal/mol": units.kcal / units.mol,
                "kJ/mol": units.kJ / units.mol}  # fmt: skip
LENGTH_UNITS = {"Angstrom": 1.0, "Bohr": units.Bohr, "nm": 10.0}
FORCE_UNITS = {"eV/Angstrom": 1.0, "meV/Angstrom": 1e-3, "Hartree/Bohr": units.Hartree / units.Bohr, "Hartree/Angstrom": units.Hartree,
               "Ry/Bohr": units.Rydberg / units.Bohr, "kcal/mol/Angstrom": units.kcal / units.mol,
               "kJ/mol/Angstrom": units.kJ / units.mol, "kJ/mol/nm": 0.1 * units.kJ / units.mol}  # fmt: skip
STRESS_UNITS = {"eV/Angstrom^3": 1.0, "Hartree/Bohr^3": units.Hartree / units.Bohr**3, "Ry/Bohr^3": units.Rydberg / units.Bohr**3,
                "GPa": units.GPa, "kbar": 0.1 * units.GPa, "bar": 1e-4 * units.GPa}  # fmt: skip
STATED_ENERGY = {"ev": "eV", "mev": "meV", "hartree": "Hartree", "ha": "Hartree", "ry": "Ry", "rydberg": "Ry", "kcal/mol": "kcal/mol",
                 "kj/mol": "kJ/mol"}  # fmt: skip
STATED_LENGTH = {"ang": "Angstrom", "angstrom": "Angstrom", "a": "Angstrom", "å": "Angstrom", "bohr": "Bohr", "a0": "Bohr", "nm": "nm"}
STATED_UNITS = {
    "energy_unit": STATED_ENERGY,
    "length_unit": STATED_LENGTH,
    "force_unit": {f"{e}/{r}": f"{energy}/{length}" for e, energy in STATED_ENERGY.items() for r, length in STATED_LENGTH.items()
                   if f"{energy}/{length}" in FORCE_UNITS},
    "stress_unit": {"gpa": "GPa", "kbar": "kbar", "bar": "bar"} | {f"{e}/{r}{power}": f"{energy}/{length}^3" for e, energy in STATED_ENERGY.items()
                   for r, length in STATED_LENGTH.items() for power in ("^3", "**3", f"/{r}/{r}") if f"{energy}/{length}^3" in STRESS_UNITS},
}  # fmt: skip
"""units as npz files of sGDML and databases of schnetpack state them, in small letters, by setting"""


def label_scales(labels: LabelConfig, default_energy: str = "eV") -> tuple[float, float, float, float]:
    """Factors of energy, length, forces and stress (or virial) to eV, Å, eV/Å and eV/Å³ (or eV) with the sign of ASE's stress."""
    energy = ENERGY_UNITS[labels.energy_unit or default_energy]
    length = LENGTH_UNITS[labels.length_unit or "Angstrom"]
    force = energy / length if labels.force_unit is None else FORCE_UNITS[labels.force_unit]
    stress = -energy if labels.is_virial() else STRESS_UNITS[labels.stress_unit]
    return energy, length, force, stress * (-1.0 if labels.stress_sign == "vasp" else 1.0)


def units_of_npz(path: Path) -> dict[str, tuple[str, str]]:
    """Entry and text of each unit that the file states, as those of sGDML do, by setting."""
    keys = {"e_unit": "energy_unit", "r_unit": "length_unit"}
    stated = {}
    for key, value in read_npz(path, keys.keys() & set(npz_names(path))).items():
        word = value.ravel()[0] if value.size == 1 else value
        stated[keys[key]] = (key, word.decode(errors="replace") if isinstance(word, bytes) else str(word))
    return stated


def units_of_database(metadata: Any, labels: LabelConfig) -> dict[str, tuple[str, str]]:
    """Likewise of the metadata that schnetpack keeps with a database of ASE: units of lengths, and of each property."""
    written = dict(metadata.get("_property_unit_dict") or {})
    names = {
        "energy_unit": (labels.energy, "total_energy"),
        "force_unit": (labels.forces, "atomic_forces"),
        "stress_unit": (labels.stress,),
    }
    stated = {
        setting: (f"the unit of {name}", str(written[name])) for setting, found in names.items() for name in found[::-1] if name in written
    }
    if "_distance_unit" in metadata:
        stated["length_unit"] = ("the unit of distances", str(metadata["_distance_unit"]))
    return stated


def with_stated_units(path: Path, labels: LabelConfig, stated: dict[str, tuple[str, str]]) -> LabelConfig:
    """The labels with the units that the file itself states.

    Args:
        path: The file, for messages.
        labels: As asked for.
        stated: By setting, what the file calls it and the text that it has.

    Raises:
        ValueError: a unit that is not known, or another one than was asked for.
    """
    found: dict[str, Any] = {}
    for setting, (key, written) in stated.items():
        known, text = STATED_UNITS[setting], written.strip()
        if text.lower() in ("", "1", "1.0", "none", "unknown"):
            continue
        unit = known.get(text.lower())
        if unit is None:
            raise ValueError(
                f"'{path}' states {key} {text[:40]!r}, expected one of {', '.join(dict.fromkeys(known.values()))}. Convert it, and mend {key}."
            )
        given = getattr(labels, setting)
        if given not in (getattr(LabelConfig(), setting), unit):
            raise ValueError(
                f"'{path}' states {key} {text!r}, but data.labels.{setting} is {given}. Leave the setting out, or mend {key} in the file."
            )
        found[setting] = unit
    return replace(labels, **found)
