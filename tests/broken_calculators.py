"""Calculators that are broken in one way each, and a small candidate for the judge's checks."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT

from gossamer.checks.candidate import (
    LEVELS,
    Candidate,
)
from gossamer.checks.config import JudgeConfig
from gossamer.checks.result import Result

TINY = replace(
    LEVELS["quick"], diatomic_points=40, equilibration_ps=0.02, nve_ps=0.12, md_ps=0.25, md_atoms=32, speed_atoms=32, speed_seconds=0.05
)


def candidate_of(
    make: Any,
    folder: Path,
    elements: tuple[str, ...] = ("Cu",),
    structures: list[Atoms] | None = None,
    labelled: Sequence[Atoms] = (),
    **options: Any,
) -> Candidate:
    """Copper for every check, with as little effort as it takes; options are those of the judge."""
    found = [bulk("Cu", cubic=True)] if structures is None else structures
    config = JudgeConfig(**{"timestep": 2.0, **options})
    return Candidate("it", make, list(elements), found, {"Cu": bulk("Cu", cubic=True)}, {"Cu": bulk("Cu", cubic=True)}, folder, TINY,
                     config, labelled=list(labelled), references=dict(zip(["Cu"], config.references, strict=False)), progress=False)  # fmt: skip


def by_name(result: Result, part: str) -> Any:
    found = [m for m in result.metrics if part in m.name]
    assert found, (part, [m.name for m in result.metrics])
    return found[0]


class Defect(Calculator):
    """A calculator whose results a function spoils."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012 - ASE's own convention

    def __init__(self, inner: Any, spoil: Any) -> None:
        super().__init__()
        self.inner, self.spoil = inner, spoil

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        copy = self.atoms.copy()
        copy.calc = self.inner
        self.results = {"energy": copy.get_potential_energy(), "forces": copy.get_forces().copy()}
        if copy.pbc.all():
            self.results["stress"] = copy.get_stress()
        self.spoil(copy, self.results)


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True).repeat((2, 1, 1))
    atoms.rattle(0.05, seed=0)
    return atoms


class Broken(Calculator):
    """EMT with one defect."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012 - ASE's own convention

    def __init__(self, defect: str) -> None:
        super().__init__()
        self.defect, self.inner = defect, EMT()

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        copy = self.atoms.copy()
        copy.calc = self.inner
        energy, forces = copy.get_potential_energy(), copy.get_forces()
        stress = copy.get_stress() if copy.pbc.all() else np.zeros(6)
        if self.defect == "non-conservative":
            forces = forces + 0.05 * np.cross(copy.positions, [0, 0, 1.0])
        elif self.defect == "stress sign":
            stress = -stress
        elif self.defect == "rotation":
            energy += 0.1 * float((copy.get_all_distances(mic=True, vector=True)[..., 0] ** 2).sum())
        elif self.defect == "extensivity":
            energy += 0.01 * len(copy) ** 2
        elif self.defect == "noise":
            rng = np.random.default_rng(zlib.crc32(copy.positions.tobytes()))  # hash() differs between processes
            forces = forces + rng.normal(scale=0.01, size=forces.shape)
        elif self.defect == "permutation":
            forces = forces * (1 + 0.01 * np.arange(len(copy)))[:, None]
        elif self.defect == "translation":
            energy += 0.01 * copy.positions[0, 0]
        elif self.defect == "handedness":  # 0.02 eV/atom between cells of either hand
            energy += 0.01 * len(copy) * np.sign(np.linalg.det(copy.cell.array))
        self.results = {"energy": energy, "free_energy": energy, "forces": forces, "stress": stress}
