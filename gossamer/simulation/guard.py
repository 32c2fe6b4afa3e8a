"""When a simulation has left sanity: temperature, distances and bonds, and how they are counted."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from ase import Atoms, units
from ase.constraints import FixAtoms, FixBondLengths, FixCartesian, FixCom, FixedLine, FixedPlane, FixInternals, FixLinearTriatomic
from ase.data import covalent_radii
from numpy.typing import NDArray

from gossamer.neighbors import neighbor_list
from gossamer.simulation.options import MDConfig

HOLDING = (FixAtoms, FixCartesian, FixedLine, FixedPlane, FixCom)
"""constraints that hold by what they take from the momenta, whoever integrates"""
BONDED = 1.25
"""times the sum of the covalent radii, up to which two atoms are bonded"""
INTERNAL = (FixBondLengths, FixInternals, FixLinearTriatomic)
"""constraints between atoms: the centre of mass moves as without them"""


@dataclass(frozen=True)
class Guard:
    """When a simulation has left sanity; checked at every logged frame."""

    max_temperature: float
    """K"""
    ensemble: str
    """by which degrees of freedom are counted"""
    max_bond_stretch: float | None = None
    """Å by which a bond of the first frame may change (molecules: 0.5); None does not watch bonds"""
    bonds: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    """(n_bonds, 2) atoms of the first frame's bonds"""
    bond_lengths: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """(n_bonds,) Å, in the first frame"""
    min_distance: float = 0.5
    """closest approach, as a fraction of the sum of the covalent radii"""

    @classmethod
    def of(cls, first: Atoms, config: MDConfig) -> Guard:
        """The guard of a run that starts with this frame."""
        hottest = max(config.temperature, config.temperature_end or 0.0)
        limit = 5 * hottest + 500 if config.max_temperature is None else config.max_temperature
        bonds = find_bonds(first)
        return cls(limit, config.ensemble, config.max_bond_stretch, bonds, lengths_of(first, bonds))

    def problem(self, atoms: Atoms) -> str | None:
        """What is wrong with the frame, or None."""
        if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.get_potential_energy())):
            return "positions or energy are not finite"
        temperature = temperature_of(atoms, self.ensemble)
        if not temperature <= self.max_temperature:
            return f"temperature {temperature:.0f} K is above {self.max_temperature:.0f} K"
        radii = covalent_radii[atoms.numbers]
        (sender, receiver), shifts = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, 2 * self.min_distance * radii.max() + 1e-9)
        if len(sender):
            lengths = np.linalg.norm(atoms.positions[sender] + shifts @ atoms.cell.array - atoms.positions[receiver], axis=1)
            ratio = lengths / (radii[sender] + radii[receiver])
            worst = int(ratio.argmin())
            if ratio[worst] < self.min_distance:
                return f"atoms {receiver[worst]} and {sender[worst]} are {lengths[worst]:.2f} Å apart"
        if self.max_bond_stretch is not None and len(self.bonds):
            change = np.abs(lengths_of(atoms, self.bonds) - self.bond_lengths)
            worst = int(change.argmax())
            if change[worst] > self.max_bond_stretch:
                return f"bond {self.bonds[worst, 0]}-{self.bonds[worst, 1]} has changed by {change[worst]:.2f} Å"
        return None


def find_bonds(atoms: Atoms, factor: float = BONDED) -> NDArray[np.int64]:
    """Pairs (n_bonds, 2) closer than ``factor`` times the sum of their covalent radii."""
    radii = covalent_radii[atoms.numbers]
    (sender, receiver), shifts = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, 2 * factor * radii.max())
    lengths = np.linalg.norm(atoms.positions[sender] + shifts @ atoms.cell.array - atoms.positions[receiver], axis=1)
    bonded = (lengths < factor * (radii[sender] + radii[receiver])) & (receiver < sender)
    return np.stack([receiver[bonded], sender[bonded]], axis=1)


def lengths_of(atoms: Atoms, bonds: NDArray[np.int64]) -> NDArray[np.float64]:
    """Lengths in Å of the bonds, by the minimum image."""
    from ase.geometry import find_mic

    vectors = atoms.positions[bonds[:, 1]] - atoms.positions[bonds[:, 0]]
    return find_mic(vectors, atoms.cell, atoms.pbc)[1]


def degrees_of_freedom(atoms: Atoms, ensemble: str) -> int:
    """3 N less what constraints take, and less what starts at rest and stays there in all ensembles but Langevin, unless constraints hold atoms
    in space: the centre of mass, and the rotation of a molecule, or of a wire about its axis; at least 1."""
    free = 3 * len(atoms) - int(sum(constraint.get_removed_dof(atoms) for constraint in atoms.constraints))
    if ensemble == "langevin" or not drifts(atoms):
        return max(1, free)
    axes = 0 if rotates(atoms) else len(free_axes(atoms))
    return max(1, free - 3 - min(axes, len(atoms)))


def drifts(atoms: Atoms) -> bool:
    """Whether the centre of mass moves freely: no constraint holds atoms in space."""
    return all(isinstance(constraint, INTERNAL) for constraint in atoms.constraints)


def share_of_drift(atoms: Atoms) -> float:
    """The share of the kinetic energy that is motion of the centre of mass; 0 of atoms at rest."""
    total = atoms.get_kinetic_energy()
    return float((atoms.get_momenta().sum(axis=0) ** 2).sum() / (2 * atoms.get_masses().sum() * total)) if total > 0 else 0.0


def check_constraints(atoms: Atoms, ensemble: str) -> None:
    """Refuse constraints that the integrator of an ensemble does not hold, or whose degrees of freedom are not known.

    Raises:
        ValueError: says which constraint, and what to do.
    """
    for constraint in atoms.constraints:
        name = type(constraint).__name__
        if ensemble == "langevin" and not isinstance(constraint, HOLDING):
            known = ", ".join(kind.__name__ for kind in HOLDING)
            raise ValueError(f"langevin does not hold {name}: it knows {known}. Choose ensemble nve, or remove the constraint.")
        if ensemble not in ("langevin", "nve"):
            raise ValueError(
                f"{ensemble} does not hold constraints, found {name}: ASE's chains would take the heat away. "
                "Choose ensemble langevin, or remove the constraint."
            )
        try:
            constraint.get_removed_dof(atoms)
        except NotImplementedError:
            raise ValueError(
                f"ASE does not say how many degrees of freedom {name} takes, so that there is no temperature. Remove the constraint."
            ) from None
    if atoms.constraints and atoms.get_number_of_degrees_of_freedom() <= 0:
        raise ValueError("The constraints hold every atom: nothing is left to move. Remove some.")


def free_axes(atoms: Atoms) -> NDArray[np.float64]:
    """Directions (n, 3) of length 1 about which nothing keeps the whole from turning: all of a molecule, that of a wire; none of slabs and crystals."""
    if not atoms.pbc.any():
        return np.eye(3)
    along = atoms.cell.array[atoms.pbc]
    return along / np.linalg.norm(along) if len(along) == 1 else np.zeros((0, 3))


def rotates(atoms: Atoms) -> bool:
    """Whether the angular momentum about these is more than a thousandth of what it can be: Σ L² against Σ m r² and Σ m v²."""
    axes = free_axes(atoms)
    positions, momenta, masses = atoms.positions - atoms.get_center_of_mass(), atoms.get_momenta(), atoms.get_masses()[:, None]
    arms = np.cross(axes[:, None], positions)  # from each axis
    most = float((masses * arms**2).sum() * (momenta**2 / masses).sum())
    return bool(((arms * momenta).sum(axis=(1, 2)) ** 2).sum() > 1e-6 * most)


def temperature_of(atoms: Atoms, ensemble: str) -> float:
    """2 E_kin / (degrees of freedom * k_B) in K. `Atoms.get_temperature` counts what is at rest too."""
    return float(2 * atoms.get_kinetic_energy() / (degrees_of_freedom(atoms, ensemble) * units.kB))


class SimulationBroken(RuntimeError):
    """The guard found a frame that has left sanity."""
