"""Whether forces and stress are derivatives of the energy, and whether dynamics conserves it; any ASE calculator."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.stress import full_3x3_to_voigt_6_stress


def force_gradient_error(calculator: Any, atoms: Atoms, step: float = 1e-4, n_atoms: int = 8, seed: int = 0) -> float:
    """Largest |F + dE/dr| in eV/Å over ``n_atoms`` atoms chosen at random, by fourth-order central differences.

    Args:
        calculator: ASE calculator.
        atoms: Not changed.
        step: Å. A float32 model needs about 1e-2.
        n_atoms: Atoms differentiated (three components each).
        seed: Of the choice.
    """
    work = atoms.copy()
    work.calc = calculator
    forces = work.get_forces(apply_constraint=False)
    chosen = np.random.default_rng(seed).permutation(len(atoms))[:n_atoms]
    worst = 0.0
    for atom in chosen:
        for axis in range(3):
            energies = []
            for shift in (-2, -1, 1, 2):
                work.positions = atoms.positions
                work.positions[atom, axis] += shift * step
                energies.append(work.get_potential_energy())
            slope = (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * step)
            worst = max(worst, abs(forces[atom, axis] + slope))
    return float(worst)


def stress_gradient_error(calculator: Any, atoms: Atoms, step: float = 1e-4) -> float:
    """Largest |stress - (1/V) dE/d(strain)| in eV/Å³ over the six symmetric strains, by central differences."""
    work = atoms.copy()
    work.calc = calculator
    stress = work.get_stress(voigt=True)
    volume = atoms.get_volume()
    numerical = np.zeros((3, 3))
    for i in range(3):
        for j in range(i, 3):
            energies = []
            for shift in (-2, -1, 1, 2):
                strain = np.zeros((3, 3))
                strain[i, j] += 0.5 * shift * step
                strain[j, i] += 0.5 * shift * step
                strained = atoms.copy()
                strained.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
                strained.calc = calculator
                energies.append(strained.get_potential_energy())
            slope = (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * step)
            numerical[i, j] = numerical[j, i] = slope / volume
    return float(np.abs(stress - full_3x3_to_voigt_6_stress(numerical)).max())


def loop_work(calculator: Any, atoms: Atoms, radius: float = 0.1, points: int = 32, seed: int = 0) -> float:
    """Work in eV/atom around a closed circle in configuration space: zero for conservative forces.

    The circle lies in a random plane of the 3N coordinates; Simpson-exact trapezoids on a periodic path converge fast.
    """
    rng = np.random.default_rng(seed)
    a, b = (v / np.abs(v).max() for v in rng.normal(size=(2, len(atoms), 3)))
    work = atoms.copy()
    work.calc = calculator
    total = 0.0
    for angle in 2 * np.pi * np.arange(points) / points:
        work.positions = atoms.positions + radius * (np.cos(angle) * a + np.sin(angle) * b)
        tangent = radius * (-np.sin(angle) * a + np.cos(angle) * b)
        total += float((work.get_forces(apply_constraint=False) * tangent).sum()) * 2 * np.pi / points
    return abs(total) / len(atoms)


def nve_energies(calculator: Any, atoms: Atoms, timestep: float, steps: int) -> np.ndarray:
    """Total energy in eV after each step of velocity Verlet from the atoms' own momenta. Args: timestep in fs."""
    work = atoms.copy()
    work.calc = calculator
    dynamics = VelocityVerlet(work, timestep * units.fs)
    energies: list[float] = []
    dynamics.attach(lambda: energies.append(work.get_total_energy()))
    dynamics.run(steps)
    return np.array(energies)


def nve_conservation(
    calculator: Any, atoms: Atoms, temperature: float = 300.0, timestep: float = 0.5, picoseconds: float = 1.0, seed: int = 0
) -> dict[str, float]:
    """Drift and order of velocity Verlet at ``timestep`` and twice that, from the same start.

    Returns:
        drift_meV_per_atom_per_ps: slope of a least-squares line through the total energy at ``timestep``.
        fluctuation_meV_per_atom: standard deviation about that line.
        fluctuation_ratio: fluctuation at twice the step over that at the step; 4 for a smooth energy whose gradient the
            forces are (the integrator is of second order).
    """
    start = atoms.copy()
    if not start.has("momenta"):
        thermalize_momenta(start, temperature, rng=np.random.default_rng(seed))
        Stationary(start)
    results = []
    for factor in (1, 2):
        step = timestep * factor
        energies = nve_energies(calculator, start, step, max(10, round(picoseconds * 1000 / step)))
        times = np.arange(len(energies)) * step / 1000
        slope, intercept = np.polyfit(times, energies, 1)
        results.append((slope, (energies - slope * times - intercept).std()))
    scale = 1000 / len(atoms)
    return {
        "drift_meV_per_atom_per_ps": float(results[0][0] * scale),
        "fluctuation_meV_per_atom": float(results[0][1] * scale),
        "fluctuation_ratio": float(results[1][1] / max(results[0][1], 1e-300)),
    }
