"""A potential in OpenMM (8.6 and later), by OpenMM-ML's MLPotential: whole systems, or a part of one beside a force field.

    MLPotential("gossamer", modelPath="potential.safetensors").createSystem(topology)

OpenMM computes in nm and kJ/mol; it asks a PythonForce for energy and forces at every step, which the ASE calculator gives.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from numpy.typing import NDArray

from gossamer.engine.engine import Way
from gossamer.potential import Potential
from gossamer.potential_file import as_potential
from gossamer.simulation.calculator import Calculator

try:
    import openmm
    from openmm import app
    from openmm.unit import angstrom, nanometer
    from openmmml.mlpotential import MLPotentialImpl
except ImportError:
    raise ImportError("OpenMM needs the packages openmm and openmmml: pip install 'gossamer[openmm]'") from None

log = logging.getLogger(__name__)
KJ_PER_MOL = units.kJ / units.mol
"""in eV"""
EMBEDDING = ("linkAtomDistances",)
"""what embeddings of createMixedSystem take, and hand on to the potential"""


class PotentialImpl(MLPotentialImpl):
    """What MLPotential("gossamer", ...) runs: one PythonForce for the atoms of the potential."""

    def __init__(
        self,
        modelPath: Potential | Path | str,
        device: str = "cpu",
        dtype: str | None = None,
        way: Way = "auto",
        dispersion: str | None = None,
    ) -> None:
        """
        Args:
            modelPath: File of a potential, or a potential; the name is OpenMM-ML's.
            device: Where the potential runs, whatever the platform of OpenMM; concerns files.
            dtype: "float32" or "float64" of a file; by default as saved.
            way: How it runs (`gossamer.engine.engine`); "program" is compiled once per machine and potential.
            dispersion: Functional whose D3 is added (`gossamer.dispersion.D3`).

        Raises:
            ValueError, RuntimeError, OSError: as `gossamer.Calculator`.
        """
        self.running: dict[str, Any] = {"way": way, "dispersion": dispersion}
        self.potential = as_potential(modelPath, device, dtype)
        self.file: dict[str, Any] | None = None
        if not isinstance(modelPath, Potential):
            self.file = {"potential": Path(modelPath).resolve(), "device": device, "dtype": dtype}

    def getMLLongRange(self) -> bool:
        """Whether atoms of the potential interact beyond its cutoff, by latent charges."""
        return self.potential.long_ranged

    def addForces(
        self,
        topology: Any,
        system: Any,
        atoms: Iterable[int] | None,
        forceGroup: int,
        charge: int = 0,
        **settings: Any,
    ) -> None:
        """Add the potential to a system; called by createSystem and createMixedSystem.

        Args:
            topology: OpenMM's, of all atoms; periodic if it has box vectors.
            system: OpenMM's, which gets the force.
            atoms: Indices of the atoms of the potential; None are all.
            forceGroup: Of the force.
            charge: Total charge in e; only 0, see the error.
            settings: Of embeddings, which they read themselves.

        Raises:
            TypeError: an unknown setting.
            ValueError: an atom without an element or of one that the potential does not know, or a charge.
        """
        unknown = sorted(set(settings) - set(EMBEDDING))
        if unknown:
            raise TypeError(f"createSystem: {', '.join(unknown)} unknown. Of a potential of gossamer it takes charge; device, dtype, way and "
                            "dispersion belong to MLPotential('gossamer', ...).")  # fmt: skip
        if charge != 0:
            raise ValueError(f"charge is {charge}: potentials of gossamer take no total charge, they know that of the frames they were trained "
                             "on. Train on frames of this charge, and leave charge out.")  # fmt: skip
        chosen = list(topology.atoms())
        if atoms is not None:
            atoms = list(atoms)
            chosen = [chosen[k] for k in atoms]
        if not chosen:
            raise ValueError("There are no atoms for the potential.")
        for atom in chosen:
            if atom.element is None:
                raise ValueError(f"Atom {atom.index} ({atom.name}) has no element: a potential computes atoms alone, no other particles. "
                                 "Leave it to the force field (createMixedSystem).")  # fmt: skip
        numbers = np.array([atom.element.atomic_number for atom in chosen])
        self.potential.check_elements(numbers, "The topology")
        formal = sum(atom.formalCharge or 0 for atom in chosen)
        if formal:
            log.warning("formal charges of these atoms sum to %+d e: right only if the potential's training frames had this charge", formal)
        periodic = topology.getPeriodicBoxVectors() is not None
        force = openmm.PythonForce(
            Compute(Calculator(self.potential, **self.running), numbers, periodic, self.file and {**self.file, **self.running})
        )
        force.setName("gossamer")
        force.setForceGroup(forceGroup)
        force.setUsesPeriodicBoundaryConditions(periodic)
        if atoms is not None:
            force.setParticles(atoms)
        system.addForce(force)


class Compute:
    """Energy in kJ/mol and forces in kJ/mol/nm of OpenMM's states. OpenMM saves systems with it pickled: then it is its file and settings."""

    def __init__(self, calculator: Calculator, numbers: NDArray[np.int64], periodic: bool, origin: dict[str, Any] | None = None) -> None:
        """
        Args:
            calculator: For these atoms alone.
            numbers: (n_atoms,) atomic numbers, in the order of the states.
            periodic: Whether states have a box.
            origin: What makes the calculator again, if that is a file.
        """
        self.calculator, self.origin = calculator, origin
        self.atoms = Atoms(numbers, pbc=periodic)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.origin or self.calculator, self.atoms.numbers, bool(self.atoms.pbc.all()))

    def __call__(self, state: Any) -> tuple[float, NDArray[np.float64]]:
        """Args: state: OpenMM's State of these atoms.

        Raises:
            ValueError: forces that are not finite, as when atoms lie on one another; OpenMM hands it on.
        """
        self.atoms.positions = state.getPositions(asNumpy=True).value_in_unit(angstrom)
        if self.atoms.pbc.all():
            self.atoms.set_cell(state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(angstrom))
        self.calculator.calculate(self.atoms, ["energy", "forces"])
        results = self.calculator.results
        return results["energy"] / KJ_PER_MOL, results["forces"].astype(np.float64) * (10 / KJ_PER_MOL)


def from_ase(atoms: Atoms) -> tuple[Any, Any, NDArray[np.float64]]:
    """OpenMM's topology and positions of ASE's atoms, in one residue; a crystal is turned into OpenMM's reduced box.

    Args:
        atoms: Periodic along all axes, or none.

    Returns:
        Topology (masses are its elements'), positions with their unit, and the rotation (3, 3): vectors of ASE @ rotation.T are OpenMM's,
        those of OpenMM @ rotation ASE's.

    Raises:
        ValueError: periodicity along some axes only, which OpenMM does not have.
    """
    if atoms.pbc.any() and not atoms.pbc.all():
        raise ValueError(f"pbc is {atoms.pbc.tolist()}, and OpenMM has all axes or none.")
    topology = app.Topology()
    residue = topology.addResidue("ALL", topology.addChain())
    for k, z in enumerate(atoms.numbers):
        element = app.Element.getByAtomicNumber(int(z))
        topology.addAtom(f"{element.symbol}{k}", element, residue)
    rotation = np.eye(3)
    if atoms.pbc.all():
        cell, rotation = atoms.cell.standard_form()
        vectors = cell.array / 10 * np.sign(np.diag(cell.array))[:, None]  # nm; the opposite of a lattice vector is as good
        box = np.array(app.internal.unitcell.reducePeriodicBoxVectors(vectors).value_in_unit(nanometer))
        for row, column in ((1, 0), (2, 0), (2, 1)):  # half a vector and rounding is not reduced to OpenMM
            box[row, column] = np.clip(box[row, column], -box[column, column] / 2, box[column, column] / 2)
        topology.setPeriodicBoxVectors(box)
    return topology, atoms.positions @ rotation.T * angstrom, rotation


def _again(origin: dict[str, Any] | Calculator, numbers: NDArray[np.int64], periodic: bool) -> Compute:
    """What was pickled, on this machine."""
    if isinstance(origin, dict):
        return Compute(Calculator(**origin), numbers, periodic, origin)
    return Compute(origin, numbers, periodic)
