"""Dispersion as an ASE calculator, and the sum of any calculator with it."""

from __future__ import annotations

from typing import Any

from ase import Atoms
from ase.calculators.calculator import Calculator as ASECalculator
from ase.calculators.calculator import PropertyNotImplementedError, all_changes
from ase.calculators.mixing import SumCalculator
from ase.stress import full_3x3_to_voigt_6_stress

from gossamer.arguments import said
from gossamer.dispersion import D3, checked


class D3Calculator(ASECalculator):
    """D3 alone: energy, forces, and the stress of periodic structures."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012 - ASE's own convention

    def __init__(self, functional: str, **kwargs: Any) -> None:
        """
        Args:
            functional: As `gossamer.dispersion.D3`, which raises the errors.
        """
        super().__init__(**kwargs)
        self.d3 = D3(functional)

    def calculate(self, atoms: Atoms | None = None, properties: list[str] | None = None, system_changes: list[str] = all_changes) -> None:
        """All of them at once.

        Raises:
            ValueError: an element without parameters, or atoms on one spot.
            PropertyNotImplementedError: stress of a structure that is not periodic.
        """
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        energy, forces, virial = self.d3(self.atoms.numbers, self.atoms.positions, self.atoms.cell.array, self.atoms.pbc)
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}
        if self.atoms.pbc.all():
            self.results["stress"] = full_3x3_to_voigt_6_stress(virial / self.atoms.get_volume())
        elif "stress" in (properties or ()):
            raise PropertyNotImplementedError(f"Stress needs periodicity along all three axes, found pbc {self.atoms.pbc.tolist()}.")


def with_dispersion(calculator: Any, functional: str) -> SumCalculator:
    """Any ASE calculator with D3 of a functional on top; it gives what both give. One of our potentials takes ``dispersion`` itself.

    Raises:
        TypeError: no calculator, but a potential, say.
        ValueError: a calculator of one of our potentials that has dispersion already, by its labels or as it was made, or of another functional.
    """
    if isinstance(calculator, type) or not hasattr(calculator, "implemented_properties"):
        raise TypeError(f"Expected an ASE calculator, found {said(calculator)}. Of a potential: gossamer.Calculator(..., dispersion=...).")
    known = getattr(getattr(calculator, "potential", None), "statistics", None)
    if known is not None:
        checked(functional, known.functional, "included" if calculator.engine.dispersion is not None else known.dispersion)
    return SumCalculator([calculator, D3Calculator(functional)])
