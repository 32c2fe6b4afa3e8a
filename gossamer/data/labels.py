"""Where the labels of a data file are, and in which units. Imports nothing heavy: the command line makes its flags from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, Literal

from pydantic import field_validator

from gossamer.arguments import said
from gossamer.quantities import QUANTITIES, known_extras
from gossamer.settings import build, settings

ForceUnit = Literal["eV/Angstrom", "meV/Angstrom", "Hartree/Bohr", "Hartree/Angstrom", "Ry/Bohr", "kcal/mol/Angstrom", "kJ/mol/Angstrom",
                    "kJ/mol/nm"]  # fmt: skip


@settings
class LabelConfig:
    """Where the labels are and in which units; the defaults fit files written by ASE."""

    energy: str = "energy"
    """Name of the total energy in the file."""
    forces: str = "forces"
    """Name of the forces in the file."""
    stress: str = "stress"
    """Name of the stress in the file; one with "virial" in it, and not "stress" (REF_virials), is read as ``virial`` is."""
    virial: str | None = None
    """Name of a virial in the file, in the energy's unit, to read instead of a stress: stress = -virial / volume."""
    energy_unit: Literal["eV", "meV", "Hartree", "Ry", "kcal/mol", "kJ/mol"] | None = None
    """None: eV; for npz files in the layout of MD17 and rMD17 what the file states (e_unit), else kcal/mol."""
    length_unit: Literal["Angstrom", "Bohr", "nm"] | None = None
    """Unit of positions and cell, and of length in forces. None: Angstrom; for npz files what the file states (r_unit), else Angstrom."""
    force_unit: ForceUnit | None = None
    """None: energy_unit / length_unit. Hartree/Bohr, say, where positions are in Angstrom all the same."""
    stress_unit: Literal["eV/Angstrom^3", "Hartree/Bohr^3", "Ry/Bohr^3", "GPa", "kbar", "bar"] = "eV/Angstrom^3"
    """Unit of the stress."""
    stress_sign: Literal["ase", "vasp"] = "ase"
    """"ase": tension positive. "vasp": compression positive (the "in kB" line of OUTCAR)."""
    extras: dict[str, str] | None = None
    """Names in the file of further quantities (gossamer/quantities.py), where they differ from ours; read in the table's units."""
    group: str | None = None
    """Name of a per-frame entry that says which frames belong together (material or trajectory id)."""
    weight: str | None = None
    """Name of a per-frame entry by which the frame counts in the loss (config_weight); set beside the mean over all training frames."""

    @field_validator("extras")
    @classmethod
    def _known(cls, extras: dict[str, str] | None) -> dict[str, str] | None:
        return extras and known_extras(extras)

    def names(self) -> dict[str, str]:
        """Name in the file of each quantity."""
        return (
            {name: name for name in QUANTITIES}
            | {"energy": self.energy, "forces": self.forces, "stress": self.virial or self.stress}
            | (self.extras or {})
        )

    def is_virial(self) -> bool:
        """Whether the stress is made from a virial."""
        return self.virial is not None or names_virial(self.stress)

    def given(self) -> dict[str, Any]:
        """Settings that differ from their defaults, or from those that older versions wrote down."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        plain, old = LabelConfig(), {"length_unit": "Angstrom"}
        return {name: value for name, value in found.items() if value not in (getattr(plain, name), old.get(name))}


def names_virial(name: str) -> bool:
    """Whether an entry of this name is a virial, and not a stress: virial, dft_virial, REF_virials, but not virial_stress."""
    return "virial" in name.lower() and "stress" not in name.lower()


def leaving_out(labels: Collection[str]) -> str:
    """The command that leaves frames out of which one of these labels is missing or broken, for messages."""
    return f"gossamer data convert DATA --out NAME.store --require {' '.join(dict.fromkeys(labels))}"


def as_labels(given: LabelConfig | Mapping[str, Any] | None) -> LabelConfig:
    """Names and units of labels, as an object, a dictionary, or by default.

    Raises:
        TypeError: something else.
        ValueError: an unknown name, or a wrong value.
    """
    if given is not None and not isinstance(given, LabelConfig | Mapping):
        raise TypeError(f"labels: expected a LabelConfig or a dictionary of its names, found {said(given)}.")
    return given if isinstance(given, LabelConfig) else build(LabelConfig, given or {}, "labels")


def refuse_unread(labels: LabelConfig, what: str, read: Collection[str] | None = None) -> None:
    """Refuse settings that would change nothing.

    Args:
        labels: Settings.
        what: The file, for the message.
        read: Names of the settings by which it is read; None: all.

    Raises:
        ValueError: another one is given, or the name or unit of a stress beside a virial.
    """
    given = labels.given()
    passed = [name for name in given if read is not None and name not in read]
    why = "has names and units of its own"
    if not passed and labels.is_virial():
        passed = [name for name in ("stress", "stress_unit") if name in given and not (name == "stress" and labels.virial is None)]
        why = "is to be read with a virial, which takes the place of the stress and is in the energy's unit"
    if passed:
        listed = ", ".join(f"data.labels.{name} ({given[name]})" for name in passed)
        raise ValueError(f"{what} {why}: {listed} would change nothing. Leave {'it' if len(passed) == 1 else 'them'} out.")
