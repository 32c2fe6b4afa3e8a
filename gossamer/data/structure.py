"""One labelled structure, in the units and signs of the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

from gossamer.data.labels import leaving_out
from gossamer.neighbors import neighbor_list
from gossamer.quantities import OWN, QUANTITIES

REACH = 6.0
"""Å, as long a cutoff as networks usually have: a single atom that sees no other within it is an isolated one"""

UNNAMED = "structure"
"""name of one that was given none"""


class Fault(NamedTuple):
    """Why a label that a file holds, or that was asked for by its name, cannot be used."""

    reason: str
    """in a few words, by which frames are counted"""
    text: str
    """in a sentence"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure:
    """Atoms with the labels that were read for them; a missing label is None, never zero."""

    atomic_numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    """(n_atoms, 3) Å"""
    cell: NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, 3)))
    """(3, 3) Å, rows are lattice vectors"""
    pbc: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(3, dtype=bool))
    energy: float | None = None
    """eV"""
    forces: NDArray[np.float64] | None = None
    """(n_atoms, 3) eV/Å"""
    stress: NDArray[np.float64] | None = None
    """(3, 3) eV/Å³, tension positive"""
    extras: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """labels of the table's further quantities (gossamer/quantities.py), in its units"""
    fixed: NDArray[np.bool_] | None = None
    """(n_atoms,) atoms held fixed when the data was made"""
    group: str | None = None
    """material or trajectory id, for splits that must not leak"""
    weight: float = 1.0
    """in the loss, beside other frames"""
    name: str = UNNAMED
    """file and frame, for messages"""
    entries: tuple[str, ...] = ()
    """names of what else the file holds for the frame, for messages"""
    remarks: tuple[str, ...] = ()
    """what reading met in the frame's labels, which inspection counts (`inspection.REMARKS`)"""
    faults: Mapping[str, Fault] = field(default_factory=dict)
    """labels that could not be read, by quantity: such a frame is refused, unless it was asked for (`validate`, `set_aside`)"""

    @property
    def labels(self) -> dict[str, Any]:
        """The labels that are there, by the names of their quantities."""
        named = {"energy": self.energy, "forces": self.forces, "stress": self.stress, **self.extras}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def n_atoms(self) -> int:
        return len(self.atomic_numbers)

    @property
    def free(self) -> NDArray[np.bool_]:
        return np.ones(self.n_atoms, dtype=bool) if self.fixed is None else ~self.fixed

    @property
    def volume(self) -> float:
        return float(abs(np.linalg.det(self.cell)))

    def is_isolated(self, cutoff: float = REACH) -> bool:
        """Whether this is one atom that sees no other, not even its own image: plane-wave codes put isolated atoms into large boxes."""
        return self.n_atoms == 1 and neighbor_list(self.positions, self.cell, self.pbc, cutoff)[0].size == 0

    def lacks(self, label: str, cutoff: float = REACH) -> bool:
        """Whether a label is not there and could be: without a volume there is no stress, and that of an isolated atom is zero in whatever box."""
        return label not in self.labels and not (label == "stress" and (not self.pbc.all() or self.is_isolated(cutoff)))

    def with_lone_stress(self, cutoff: float) -> Structure:
        """Itself; an isolated atom without a stress gets the one it has, zero, and where it has no volume a box of three cutoffs (Å)."""
        if self.stress is not None or not self.is_isolated(cutoff):
            return self
        cell = self.cell if self.pbc.all() else 3 * cutoff * np.eye(3)
        return replace(self, stress=np.zeros((3, 3)), cell=cell, pbc=np.ones(3, dtype=bool))

    def validate(self, labels: bool = True) -> Structure:
        """Return self if shapes and numbers make sense.

        Args:
            labels: Also those of the labels.

        Raises:
            ValueError: names the structure, what is wrong, and where.
        """
        for part in ("atomic_numbers", "positions", "cell", "pbc"):
            if not isinstance(getattr(self, part), np.ndarray):
                raise ValueError(f"{self.name}: {part} is a {type(getattr(self, part)).__name__}, expected an array: np.array(...).")
        n = self.n_atoms
        if n == 0:
            raise ValueError(f"{self.name}: no atoms. Remove the frame.")
        if self.atomic_numbers.shape != (n,):
            raise ValueError(f"{self.name}: atomic_numbers has shape {self.atomic_numbers.shape}, expected ({n},).")
        if self.atomic_numbers.min() < 1 or self.atomic_numbers.max() > 118:
            bad = int(self.atomic_numbers[(self.atomic_numbers < 1) | (self.atomic_numbers > 118)][0])
            raise ValueError(f"{self.name}: atomic number {bad} is not between 1 and 118.")
        for part, shape in (("positions", (n, 3)), ("cell", (3, 3))):
            if (fault := _fault(part, getattr(self, part), shape)) is not None:
                raise ValueError(f"{self.name}: {fault.text}. Remove the frame, or mend it.")
        if self.pbc.any() and np.linalg.matrix_rank(self.cell[self.pbc], tol=1e-6) < self.pbc.sum():
            raise ValueError(
                f"{self.name}: periodic along {np.flatnonzero(self.pbc).tolist()}, but the cell {self.cell.tolist()} has no "
                'volume there. Give the Lattice, or set pbc="F F F".'
            )
        for label, fault in self.set_aside().faults.items() if labels else ():
            raise ValueError(f"{self.name}: {fault.text}. Mend it, or leave such frames out: {leaving_out(['energy', 'forces', label])}")
        return self

    def set_aside(self) -> Structure:
        """Itself; labels of a wrong shape or with numbers that are not finite are taken out, and said in ``faults``."""
        values = self.labels
        found = {label: _fault(label, value, QUANTITIES[label].full_shape(self.n_atoms)) for label, value in values.items()}
        wrong = {label: fault for label, fault in found.items() if fault is not None}
        if not wrong:
            return self
        rest = {label: value for label, value in values.items() if label not in wrong}
        return replace(self, **label_fields(rest), faults={**self.faults, **wrong})

    def to_ase(self) -> Atoms:
        """The structure as ASE Atoms whose calculator holds energy, forces and stress; further labels are in arrays and info.

        Fixed atoms get a constraint: ``atoms.get_forces(apply_constraint=False)`` gives their labels too.
        """
        atoms = Atoms(self.atomic_numbers, self.positions, cell=self.cell, pbc=self.pbc)
        if self.fixed is not None and self.fixed.any():
            atoms.set_constraint(FixAtoms(np.flatnonzero(self.fixed)))
        labels: dict[str, Any] = {"energy": self.energy, "forces": self.forces}
        if self.stress is not None:
            labels["stress"] = full_3x3_to_voigt_6_stress(self.stress)
        labels = {k: v for k, v in labels.items() if v is not None}
        if labels:
            atoms.calc = SinglePointCalculator(atoms, **labels)
        for name, value in self.extras.items():
            (atoms.arrays if QUANTITIES[name].per == "atom" else atoms.info)[name] = value
        return atoms


def _fault(name: str, value: Any, shape: tuple[int, ...]) -> Fault | None:
    """What is wrong with an array of numbers; None if nothing is."""
    if np.shape(value) != shape:
        return Fault(f"{name} of another shape", f"{name} has shape {np.shape(value)}, expected {shape}")
    if not np.isfinite(value).all():
        where = [int(i) for i in np.argwhere(~np.isfinite(value))[0]]
        return Fault(f"{name} not finite", f"{name}{where or ''} is not finite")
    return None


def label_fields(labels: Mapping[str, Any]) -> dict[str, Any]:
    """Labels by quantity as arguments of Structure: three have fields of their own, the others are extras."""
    own = {name: labels.get(name) for name in OWN}
    return {**own, "extras": {name: value for name, value in labels.items() if name not in own and value is not None}}


def as_structure(atoms: Atoms | Structure, name: str = "structure") -> Structure:
    """Atoms without their labels; a Structure as it is.

    Raises:
        TypeError: something else, such as the name of a file.
        ValueError: as `Structure.validate`: no atoms, positions that are not as many, a periodic axis without a length.
    """
    if isinstance(atoms, Structure):
        return (replace(atoms, name=name) if atoms.name == UNNAMED else atoms).validate()
    if not isinstance(atoms, Atoms):
        raise TypeError(
            f"{name}: expected ASE's Atoms or a gossamer.Structure, found {type(atoms).__name__}. Read files beforehand (ase.io.read)."
        )
    return Structure(
        atomic_numbers=atoms.numbers.astype(np.int64),
        positions=atoms.positions.astype(np.float64),
        cell=atoms.cell.array.astype(np.float64),
        pbc=np.array(atoms.pbc, dtype=bool),
        name=name,
    ).validate()


def spread(n_all: int, n: int | None) -> list[int]:
    """Indices of ``n`` of so many frames, evenly spread; of all if there are no more, or if ``n`` is None."""
    return list(range(n_all)) if n is None or n >= n_all else np.unique(np.linspace(0, n_all - 1, n).astype(int)).tolist()
