"""The quantities that potentials learn and predict, in one table: shape, unit, behaviour under rotations, how errors are told.

Whatever carries labels (readers, structures, stores, batches, loss, predictions, errors, saved files, log) reads this table. A new
quantity, say charges, is an entry here and a head of a network whose output becomes `Prediction.extras["charges"]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """What is known of one quantity."""

    name: str
    per: Literal["structure", "atom"]
    unit: str
    """of labels and predictions"""
    shape: tuple[int, ...] = ()
    """of one value: () scalar, (3,) vector, (3, 3) tensor; Cartesian, so that it turns with the structure"""
    parity: Literal[1, -1] = 1
    """sign that a reflection through the origin gives it: -1 for forces and dipoles, 1 for scalars and stress"""
    error_unit: str
    """of reported errors, for people"""
    error_factor: float = 1000.0
    """from ``unit`` to ``error_unit``"""
    error_per_atom: bool = False
    """whether errors of a structure's value are divided by its number of atoms"""

    @property
    def error_key(self) -> str:
        """The unit of errors in names of JSON entries."""
        return self.error_unit.replace("/", "_per_").replace(" ", "_").replace("Å", "A").replace("³", "3")

    def full_shape(self, n_atoms: int) -> tuple[int, ...]:
        """Shape of the label of a structure."""
        return (n_atoms, *self.shape) if self.per == "atom" else self.shape


OWN = ("energy", "forces", "stress")
"""quantities with fields and settings of their own; those of all others are in ``extras``"""
QUANTITIES: dict[str, Quantity] = {
    quantity.name: quantity
    for quantity in (
        Quantity(name="energy", per="structure", unit="eV", error_unit="meV/atom", error_per_atom=True),
        Quantity(name="forces", per="atom", shape=(3,), parity=-1, unit="eV/Å", error_unit="meV/Å"),
        Quantity(name="stress", per="structure", shape=(3, 3), unit="eV/Å³", error_unit="meV/Å³"),
    )
}
"""every quantity by name"""


def known_extras(extras: Mapping[str, T]) -> dict[str, T]:
    """Settings of further quantities, by name.

    Raises:
        ValueError: a name that the table lacks, or that has a setting of its own.
    """
    further = [name for name in QUANTITIES if name not in OWN]
    unknown = [name for name in extras if name not in further]
    if unknown:
        listed = f"expected one of {', '.join(further)}" if further else "but gossamer/quantities.py has none beside " + ", ".join(OWN)
        raise ValueError(f"found {', '.join(unknown)}, {listed}")
    return dict(extras)
