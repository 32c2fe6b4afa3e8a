"""Crystals: relaxation, equation of state, elastic constants, vacancy and surface energies; any ASE calculator."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms, units
from ase.build import surface
from ase.eos import EquationOfState
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from numpy.typing import NDArray

from gossamer.checks.candidate import COMPOUNDS, Candidate, elemental_state, enlarged
from gossamer.checks.result import Metric, Panel, Result, at_least, at_most, attempt, conclude, curve, measured
from gossamer.checks.symmetry import consistent_energy

Array = NDArray[np.float64]
BULK_MODULUS = {
    "Li": 11.6, "Na": 6.8, "Al": 72.2, "Si": 98.8, "Fe": 168.3, "Ni": 186.0, "Cu": 137.0, "Ge": 77.2, "Mo": 272.5, "Ag": 100.7, "W": 323.2,
    "Au": 173.2, "Pt": 278.3, "Pd": 180.8, "C": 443.0, "Nb": 170.2, "Ta": 200.0, "V": 161.9, "Pb": 43.0, "Rh": 270.4, "Ir": 355.0,
}  # fmt: skip
"""GPa, experiment; Kittel, Introduction to Solid State Physics, 8th ed., ch. 3, table 3"""
STRAINS = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
"""Voigt order: xx, yy, zz, yz, xz, xy"""


class Unrelaxed(ValueError):
    """Atoms still feel forces after all steps of a relaxation that a number rests on."""


def relaxed(calculator: Any, atoms: Atoms, fmax: float = 0.01, steps: int = 300, cell: bool = True) -> tuple[Atoms, bool]:
    """Relaxed copy (FIRE, Fréchet cell filter) and whether it converged to ``fmax`` in eV/Å."""
    work = atoms.copy()
    work.calc = calculator
    converged = FIRE(FrechetCellFilter(work) if cell else work, logfile=None).run(fmax=fmax, steps=steps)
    out = work.copy()
    out.calc = None
    return out, bool(converged)


def settled(calculator: Any, atoms: Atoms, fmax: float, steps: int, what: str) -> Atoms:
    """Relaxed copy, positions only.

    Raises:
        Unrelaxed: it did not converge; says ``what`` it is.
    """
    out, converged = relaxed(calculator, atoms, fmax, steps, cell=False)
    if not converged:
        raise Unrelaxed(f"atoms of {what} still feel more than {fmax:g} eV/Å after {steps} steps of relaxation")
    return out


def unsettled(name: str, fmax: float, steps: int, consequence: str) -> Metric:
    """Says that the crystal behind the numbers of a check did not relax."""
    reason = f"{name}: the relaxation did not converge in {steps} steps"
    return Metric(f"{name}: relaxation", None, "", "weak", f"forces below {fmax:g} eV/Å", "", reason, consequence)


def energy_of(calculator: Any, atoms: Atoms) -> float:
    """eV"""
    work = atoms.copy()
    work.calc = calculator
    return float(work.get_potential_energy())


def equation_of_state(calculator: Any, atoms: Atoms, span: float = 0.06, points: int = 11) -> dict[str, Any]:
    """Birch-Murnaghan fit through the energies of scaled cells, ions not relaxed.

    Args:
        calculator: ASE calculator.
        atoms: Near its equilibrium volume.
        span: Largest relative change of the volume.
        points: Volumes.

    Returns:
        volumes (Å³), energies (eV), v0 (Å³), bulk_modulus (GPa), residual (meV/atom, root mean square of the fit).
    """
    volumes, energies = [], []
    for ratio in np.linspace(1 - span, 1 + span, points):
        scaled = atoms.copy()
        scaled.set_cell(atoms.cell.array * ratio ** (1 / 3), scale_atoms=True)
        volumes.append(scaled.get_volume())
        energies.append(energy_of(calculator, scaled))
    fit = EquationOfState(volumes, energies, eos="birchmurnaghan")
    v0, e0, modulus = fit.fit(warn=False)
    smooth = fit.func(np.array(volumes), *fit.eos_parameters)
    return {
        "volumes": np.array(volumes), "energies": np.array(energies), "v0": float(v0), "e0": float(e0), "bulk_modulus": float(modulus / units.GPa),
        "residual": 1000 * float(np.sqrt(np.mean((smooth - energies) ** 2))) / len(atoms),
    }  # fmt: skip


def two_moduli(calculator: Any, atoms: Atoms, spacing: float = 0.015) -> tuple[float, float]:
    """Bulk modulus in GPa from energies, V d²E/dV², and from stresses, -V dP/dV, of the same five scaled cells, ions not relaxed."""
    volume, energies, pressures = atoms.get_volume(), [], []
    for k in range(-2, 3):
        scaled = atoms.copy()
        scaled.set_cell(atoms.cell.array * (1 + k * spacing) ** (1 / 3), scale_atoms=True)
        scaled.calc = calculator
        energies.append(consistent_energy(scaled))
        pressures.append(-float(scaled.get_stress(voigt=True)[:3].mean()))
    from_energy = np.dot([-1, 16, -30, 16, -1], energies) / (12 * spacing**2 * volume)
    from_stress = -np.dot([1, -8, 0, 8, -1], pressures) / (12 * spacing)
    return float(from_energy / units.GPa), float(from_stress / units.GPa)


def elastic_constants(calculator: Any, atoms: Atoms, strain: float = 0.005, relax_ions: bool = True) -> Array:
    """(6, 6) stiffness in GPa, Voigt order, from stresses of strained cells by central differences, made symmetric.

        C_ij = d(stress_i) / d(strain_j),   engineering shear strains

    Args:
        calculator: ASE calculator with stress.
        atoms: Relaxed.
        strain: Size of each strain.
        relax_ions: Relax positions in each strained cell (fmax 0.2 meV/Å: stresses of half-relaxed ions are several percent off).

    Raises:
        Unrelaxed: positions in a strained cell did not.
    """
    columns = []
    for i, j in STRAINS:
        stresses = []
        for sign in (-1, 1):
            matrix = np.zeros((3, 3))
            matrix[i, j] += 0.5 * sign * strain
            matrix[j, i] += 0.5 * sign * strain
            strained = atoms.copy()
            strained.set_cell(atoms.cell.array @ (np.eye(3) + matrix), scale_atoms=True)
            if relax_ions:
                strained = settled(calculator, strained, 2e-4, 500, f"the cell strained by {sign * strain:g} along {'xyz'[i]}{'xyz'[j]}")
            strained.calc = calculator
            stresses.append(strained.get_stress(voigt=True))
        # the matrix holds e_xx = strain, or e_yz + e_zy = strain: the Voigt strain either way
        columns.append((stresses[1] - stresses[0]) / (2 * strain))
    stiffness = np.array(columns).T / units.GPa
    return 0.5 * (stiffness + stiffness.T)


def softest(stiffness: Array) -> float:
    """Smallest eigenvalue in GPa of a (6, 6) stiffness in Voigt order, the same however the crystal lies; below zero it is unstable.

    In Kelvin's form, shears times √2: of the matrix in Voigt's the signs are those of the tensor, the values depend on the axes
    (Mehrabadi and Cowin, Q. J. Mech. Appl. Math. 43, 15 (1990)).
    """
    kelvin = np.sqrt([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])
    return float(np.linalg.eigvalsh(stiffness * np.outer(kelvin, kelvin))[0])


def voigt_averages(stiffness: Array) -> tuple[float, float]:
    """Bulk and shear modulus in GPa, Voigt-Reuss-Hill averages (Hill, Proc. Phys. Soc. A 65, 349 (1952)).

    Raises:
        ValueError: some strain costs no stress, so that the average of the compliances does not exist.
    """
    c = stiffness
    if np.linalg.cond(c) > 1e12:
        raise ValueError("some strain of this crystal costs no stress: it has no averages of bulk and shear modulus")
    bulk_voigt = c[:3, :3].sum() / 9
    shear_voigt = (np.trace(c[:3, :3]) - (c[0, 1] + c[0, 2] + c[1, 2]) + 3 * np.trace(c[3:, 3:])) / 15
    s = np.linalg.inv(c)
    bulk_reuss = 1 / s[:3, :3].sum()
    shear_reuss = 15 / (4 * np.trace(s[:3, :3]) - 4 * (s[0, 1] + s[0, 2] + s[1, 2]) + 3 * np.trace(s[3:, 3:]))
    return float(bulk_voigt + bulk_reuss) / 2, float(shear_voigt + shear_reuss) / 2


def vacancy_energy(calculator: Any, atoms: Atoms, n_atoms: int = 60) -> float:
    """E(N-1) - (N-1)/N E(N) in eV for the first atom of a relaxed elemental crystal, positions relaxed at fixed cell.

    Raises:
        Unrelaxed: they did not.
    """
    large = enlarged(atoms, n_atoms)
    whole = energy_of(calculator, large)
    del large[0]
    open_ = settled(calculator, large, 0.02, 300, "the crystal with a vacancy")
    return energy_of(calculator, open_) - whole * len(large) / (len(large) + 1)


def surface_energy(calculator: Any, atoms: Atoms, miller: tuple[int, int, int] = (1, 0, 0), layers: int = 4, vacuum: float = 8.0) -> float:
    """(E_slab - E_bulk) / (2 A) in J/m² of a slab of a relaxed cubic crystal, positions relaxed.

    The bulk energy is the slope between slabs of ``layers`` and ``layers + 2`` cells, so that errors do not grow with
    thickness (Fiorentini and Methfessel, J. Phys.: Condens. Matter 8, 6525 (1996)).

    Raises:
        Unrelaxed: positions of a slab did not.
    """
    energies, counts, area = [], [], 0.0
    for n in (layers, layers + 2):
        slab = surface(atoms, miller, n, vacuum=vacuum, periodic=True)
        area = float(np.linalg.norm(np.cross(slab.cell[0], slab.cell[1])))
        slab = settled(calculator, slab, 0.02, 300, f"the slab of {n} cells")
        energies.append(energy_of(calculator, slab))
        counts.append(len(slab))
    per_atom = (energies[1] - energies[0]) / (counts[1] - counts[0])
    return (energies[0] - counts[0] * per_atom) / (2 * area) * 16.02177  # eV/Å² to J/m²


def experimental(name: str) -> tuple[float | None, float | None]:
    """Lattice constant (Å) and bulk modulus (GPa) of a built-in crystal; None where the table has none."""
    if name in COMPOUNDS:
        return COMPOUNDS[name][1], None
    state = elemental_state(name)
    return (state.get("a") if state.get("symmetry") in ("fcc", "bcc", "diamond") else None), BULK_MODULUS.get(name)


# --- verdict --------------------------------------------------------------------------------------------------------

UNBOUND = "The crystal does not hold together: nothing about this solid can be computed."
VOLUME = "Densities, thermal expansion and everything at constant pressure are off."
PRESSURE = "Stress and energy disagree: pressures are wrong."
STIFF = "Elastic response, sound and phonons at long wavelengths are off."
# Limits of vacancies and surfaces: solid argon, which holds and is held by dispersion alone, has 0.08 eV and 0.04 J/m² (Lennard-Jones).
SOFT = "Defects and surfaces form too easily or for free: the solid disorders by itself in simulations."


def check(candidate: Candidate) -> Result:
    """Every crystal of the candidate; built-in ones are compared with experiment."""
    metrics: list[Metric] = []
    panels: list[Panel] = []
    notes = []
    for name, atoms in candidate.bar(list(candidate.crystals.items()), "crystals"):
        metrics += attempt(
            name,
            lambda n=name, a=atoms: _crystal(candidate.calculator, n, a, panels, candidate.builtin_crystals),
            "failed",
        )
    if candidate.builtin_crystals:
        notes.append(
            "Compared with experiment at room temperature; functionals differ from it by 1 to 2 % in lattice constants and 10 to 20 % in moduli (PBE is soft)."
        )
    return conclude(metrics, panels, notes, "The crystals hold, respond and break as solids do.")


def _crystal(calculator: Any, name: str, atoms: Atoms, panels: list[Panel], compare: bool) -> list[Metric]:
    cell, converged = relaxed(calculator, atoms)
    metrics: list[Metric] = []
    if not converged:
        metrics.append(unsettled(name, 0.01, 300, UNBOUND))
    change = (cell.get_volume() / atoms.get_volume()) - 1
    lattice, modulus = experimental(name) if compare else (None, None)
    if lattice is not None:
        error = 100 * ((cell.get_volume() / atoms.get_volume()) ** (1 / 3) - 1)
        metrics.append(measured(f"{name}: lattice constant", lattice * (1 + error / 100), "Å"))
        metrics.append(at_most(f"{name}: error of the lattice constant", abs(error), "%", 2.0, 5.0, VOLUME))
    else:
        metrics.append(at_most(f"{name}: change of volume in relaxation", 100 * abs(change), "%", 6.0, 20.0, VOLUME))
    eos = equation_of_state(calculator, cell)
    panels.append(Panel(f"Equation of state, {name}", "volume, Å³/atom", "meV/atom",
                        [curve(eos["volumes"] / len(cell), 1000 * (eos["energies"] - eos["energies"].min()) / len(cell))]))  # fmt: skip
    metrics.append(measured(f"{name}: bulk modulus", eos["bulk_modulus"], "GPa"))
    metrics.append(at_most(f"{name}: residual of the equation of state", eos["residual"], "meV/atom", 0.5, 5.0, VOLUME))
    inside = eos["volumes"][0] < eos["v0"] < eos["volumes"][-1] and eos["bulk_modulus"] > 0
    metrics.append(at_least(f"{name}: minimum of the equation of state inside ±6 %", float(inside), "", 1.0, 1.0, UNBOUND, ""))
    if modulus is not None:
        metrics.append(at_most(f"{name}: error of the bulk modulus", 100 * abs(eos["bulk_modulus"] / modulus - 1), "%", 20.0, 50.0, STIFF))
    metrics += attempt(f"{name}: elastic constants", lambda: _elastic(calculator, name, cell))
    metrics += attempt(f"{name}: pressures", lambda: _pressures(calculator, name, scaled_to(cell, eos["v0"] if inside else None)))
    if len(set(atoms.numbers)) == 1:
        metrics += attempt(
            f"{name}: vacancy",
            lambda: at_least(f"{name}: vacancy energy", vacancy_energy(calculator, cell), "eV", 0.05, 0.0, SOFT, ""),
        )
    if np.allclose(cell.cell.angles(), 90, atol=0.5):
        metrics += attempt(
            f"{name}: surface",
            lambda: at_least(f"{name}: energy of the (100) surface", surface_energy(calculator, cell), "J/m²", 0.02, 0.0, SOFT, ""),
        )
    return metrics


def scaled_to(atoms: Atoms, volume: float | None) -> Atoms:
    """A copy of that volume in Å³; None: as it is."""
    copy = atoms.copy()
    if volume is not None:
        copy.set_cell(atoms.cell.array * (volume / atoms.get_volume()) ** (1 / 3), scale_atoms=True)
    return copy


def _pressures(calculator: Any, name: str, cell: Atoms) -> Metric:
    from_energy, from_stress = two_moduli(calculator, cell)
    off = 100 * abs(from_stress / from_energy - 1)
    return at_most(f"{name}: bulk modulus from stress against that from energy", off, "%", 5.0, 20.0, PRESSURE)


def _elastic(calculator: Any, name: str, cell: Atoms) -> list[Metric]:
    c = elastic_constants(calculator, cell)
    k, g = voigt_averages(c)
    c11, c12, c44 = c[[0, 1, 2], [0, 1, 2]].mean(), (c[0, 1] + c[0, 2] + c[1, 2]) / 3, c[[3, 4, 5], [3, 4, 5]].mean()
    cubic = np.diag([c11 - c12] * 3 + [c44] * 3)
    cubic[:3, :3] += c12
    is_cubic = np.abs(c - cubic).max() < 0.05 * np.abs(c).max()  # else three numbers do not say it, or the cell is turned
    constants = {"C11": c11, "C12": c12, "C44": c44} if is_cubic else {}
    return [
        *(measured(f"{name}: {label}", float(v), "GPa") for label, v in constants.items()),
        measured(f"{name}: bulk modulus, ions relaxed", k, "GPa"),
        measured(f"{name}: shear modulus", g, "GPa"),
        at_least(f"{name}: softest elastic eigenvalue", softest(c), "GPa", 0.5, 0.0, "The crystal is mechanically unstable: it shears by itself.", ""),
    ]  # fmt: skip
