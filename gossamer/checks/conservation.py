"""Whether forces and stress are derivatives of the energy, and whether dynamics conserves it; any ASE calculator."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from ase.stress import full_3x3_to_voigt_6_stress

from gossamer.checks.candidate import Candidate, enlarged, rattled
from gossamer.checks.config import TEMPERATURE, TIMESTEP
from gossamer.checks.crystals import relaxed
from gossamer.checks.result import Metric, Panel, Result, at_most, attempt, close_to, conclude, curve, largest, measured
from gossamer.checks.symmetry import consistent_energy, evaluate_on, net_force, unconstrained
from gossamer.simulation.md import draw_momenta


def force_gradient_error(calculator: Any, atoms: Atoms, step: float = 1e-4, n_atoms: int = 8, seed: int = 0) -> float:
    """Largest |F + dE/dr| in eV/Å over ``n_atoms`` atoms chosen at random, by fourth-order central differences.

    Args:
        calculator: ASE calculator.
        atoms: Not changed.
        step: Å. A float32 model needs about 1e-2.
        n_atoms: Atoms differentiated (three components each).
        seed: Of the choice.
    """
    work = unconstrained(atoms)
    work.calc = calculator
    forces = work.get_forces()
    chosen = np.random.default_rng(seed).permutation(len(atoms))[:n_atoms]
    worst = 0.0
    for atom in chosen:
        for axis in range(3):
            energies = []
            for shift in (-2, -1, 1, 2):
                work.positions = atoms.positions
                work.positions[atom, axis] += shift * step
                energies.append(consistent_energy(work))
            slope = (energies[0] - 8 * energies[1] + 8 * energies[2] - energies[3]) / (12 * step)
            worst = largest([worst, abs(forces[atom, axis] + slope)])
    return float(worst)


def stress_gradient_error(calculator: Any, atoms: Atoms, step: float = 1e-4) -> float:
    """Largest |stress - (1/V) dE/d(strain)| in eV/Å³ over the six symmetric strains, by central differences."""
    work = unconstrained(atoms)
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
                strained = unconstrained(atoms)
                strained.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
                strained.calc = calculator
                energies.append(consistent_energy(strained))
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
    dynamics.attach(lambda: energies.append(consistent_energy(work) + work.get_kinetic_energy()))
    dynamics.run(steps)
    return np.array(energies)


def nve_conservation(
    calculator: Any,
    atoms: Atoms,
    temperature: float = 300.0,
    timestep: float = 0.5,
    picoseconds: float = 1.0,
    seed: int = 0,
    equilibration: float = 0.0,
) -> dict[str, Any]:
    """Drift and order of velocity Verlet at ``timestep`` and twice that, from the same start.

    ``drift_meV_per_atom_per_ps`` is the slope of a least-squares line through the total energy at the smaller step, and
    ``drift_error`` its standard error from four blocks. ``fluctuation_ratio`` compares the fluctuations around the lines:
    velocity Verlet is of second order, so a smooth surface with its own gradient as forces gives 4; ``ratio_error`` is its standard
    error, from four blocks. Protocol: 0.5 and 1 fs over 10 ps after 1 ps of equilibration.

    Args:
        calculator: ASE calculator.
        atoms: Not changed. Their momenta are used if they have any.
        temperature: K of the momenta drawn otherwise, and of the thermostat.
        timestep: fs.
        picoseconds: Length of each run.
        seed: Of the momenta and of the thermostat.
        equilibration: ps of Langevin dynamics (friction 1/(20 fs)) before.

    Returns:
        The numbers above, ``fluctuation_meV_per_atom``, and the traces: ``times_ps`` and ``energies_meV_per_atom`` at the
        smaller step, less their first value.
    """
    start = atoms.copy()
    rng = np.random.default_rng(seed)
    if not start.has("momenta"):
        draw_momenta(start, temperature, rng)
        Stationary(start)
    if equilibration > 0:
        start.calc = calculator
        Langevin(start, timestep * units.fs, temperature_K=temperature, friction=0.05 / units.fs, rng=rng, fixcm=False).run(
            round(equilibration * 1000 / timestep)
        )
        start.calc = None
        Stationary(start)
    results, traces = [], []
    for factor in (1, 2):
        step = timestep * factor
        energies = nve_energies(calculator, start, step, max(10, round(picoseconds * 1000 / step)))
        times = np.arange(len(energies)) * step / 1000
        slope, intercept = np.polyfit(times, energies, 1)
        rest = energies - slope * times - intercept
        results.append((slope, rest.std(), np.array([part.std() for part in np.array_split(rest, 4)])))
        traces.append((times, energies))
    ratios = results[1][2] / np.maximum(results[0][2], 1e-300)
    scale = 1000 / len(atoms)
    times, energies = traces[0]
    blocks = [np.polyfit(t, e, 1)[0] for t, e in zip(np.array_split(times, 4), np.array_split(energies, 4), strict=True) if len(t) > 2]
    # a slope over a quarter of the time is 4^1.5 times less certain; four of them were averaged
    error = np.std(blocks, ddof=1) / 4**1.5 if len(blocks) > 1 else np.inf
    return {
        "drift_meV_per_atom_per_ps": float(results[0][0] * scale),
        "drift_error": float(error * scale),
        "fluctuation_meV_per_atom": float(results[0][1] * scale),
        "fluctuation_ratio": float(results[1][1] / max(results[0][1], 1e-300)),
        "ratio_error": float(ratios.std(ddof=1) / 2),
        "times_ps": times,
        "energies_meV_per_atom": (energies - energies[0]) * scale,
    }


def smallest(measure: Any, steps: tuple[float, ...] = (2e-2, 5e-3, 1e-3, 1e-4)) -> float:
    """The smallest disagreement over several finite-difference steps.

    Rounding spoils small steps and curvature large ones, more so in float32; a force that is not the gradient disagrees at
    every step.
    """
    return -largest(-measure(step) for step in steps)


# --- verdict --------------------------------------------------------------------------------------------------------

WIDE = 6.0
"""Å, sides of a cell from which an atom in it is taken to be alone"""
MOST_SPREAD = 1.0
"""by which chance in a short run may widen the limits of the ratio of fluctuations, at most"""
NOT_A_GRADIENT = "Energy is not conserved: simulations without a thermostat heat up or cool down, and phonons, barriers and free energies are unreliable."
WRONG_STRESS = "Cell relaxation, pressure and constant-pressure dynamics go to the wrong volume."
NOT_SMOOTH = "The surface is not smooth on the scale of a time step: shorter steps are needed, and energy drifts."


def check(candidate: Candidate) -> Result:
    """Forces and stress against finite differences, work around a loop, and dynamics at constant energy."""
    calculator = candidate.calculator
    metrics: list[Metric] = []
    notes: list[str] = []
    if candidate.conservative is False:
        notes.append("The potential says of itself that its forces are not the gradient of its energy.")
    probes = [rattled(a, 0.03, seed=k) for k, a in enumerate(candidate.structures)]
    found: dict[str, list[float]] = {"forces": [], "net": [], "loop": [], "stress": []}
    for atoms in candidate.bar(probes, "conservation"):
        scale = 1 + 0.05 * float(np.abs(evaluate_on(calculator, atoms)[1]).max())
        found["forces"].append(1000 * smallest(lambda h, a=atoms: force_gradient_error(calculator, a, h, n_atoms=4)) / scale)
        found["net"].append(1000 * net_force(calculator, atoms) / len(atoms))
        found["loop"].append(1000 * loop_work(calculator, atoms))
        if atoms.pbc.all():
            metrics_stress = attempt(
                "stress",
                lambda a=atoms: measured("s", 1000 * smallest(lambda h: stress_gradient_error(calculator, a, h / 4))),
            )
            if metrics_stress[0].status == "measured":
                value = metrics_stress[0].value
                found["stress"].append(np.nan if value is None else value)
            elif not any(m.name == "stress" for m in metrics):
                metrics += metrics_stress[:1]
    metrics.append(at_most("forces against the energy's gradient", largest(found["forces"]), "meV/Å", 2.0, 20.0, NOT_A_GRADIENT))
    metrics.append(at_most("work around a closed loop", largest(found["loop"]), "meV/atom", 0.1, 5.0, NOT_A_GRADIENT))
    metrics.append(at_most("net force per atom", largest(found["net"]), "meV/Å", 0.5, 10.0, "The centre of mass accelerates by itself."))
    if found["stress"]:
        metrics.append(at_most("stress against the energy's gradient", largest(found["stress"]), "meV/Å³", 0.1, 1.0, WRONG_STRESS))
    panels: list[Panel] = []
    metrics += attempt("dynamics at constant energy", lambda: _dynamics(candidate, panels, notes), "failed")
    what = "Forces and stress are" if found["stress"] else "Forces are"
    return conclude(metrics, panels, notes, f"{what} the gradient of the energy, and dynamics conserves it.")


def _dynamics(candidate: Candidate, panels: list[Panel], notes: list[str]) -> list[Metric]:
    config, effort = candidate.config, candidate.effort
    temperature, timestep = config.temperature or TEMPERATURE, config.timestep or TIMESTEP
    moving = [a for a in candidate.structures if len(a) > 1 or (a.pbc.any() and a.cell.lengths()[a.pbc].min() < WIDE)]
    if not moving:
        return [Metric("drift of the total energy", None, "", "skipped", reason="needs a structure of at least two atoms")]
    given = enlarged(moving[0], 8)
    start, _ = relaxed(candidate.calculator, given, fmax=0.1, steps=50, cell=False)  # the frame's own heat is not the potential's fault
    start.arrays.pop("momenta", None)
    run = nve_conservation(candidate.calculator, start, temperature, timestep, effort.nve_ps, equilibration=effort.equilibration_ps)
    notes.append(
        f"Dynamics: {start.get_chemical_formula()}, relaxed by at most 50 steps, {effort.equilibration_ps:g} ps with a thermostat at {temperature:g} K, "
        f"then constant energy at {timestep:g} and {2 * timestep:g} fs over {effort.nve_ps:g} ps."
    )
    panels.append(Panel("Total energy at constant energy", "time, ps", "meV/atom", [curve(run["times_ps"], run["energies_meV_per_atom"])]))
    # of energies that are no numbers nothing is certain
    uncertain, spread = 2 * np.nan_to_num(run["drift_error"]), min(2 * np.nan_to_num(run["ratio_error"]), MOST_SPREAD)
    return [
        at_most("drift of the total energy", abs(run["drift_meV_per_atom_per_ps"]), "meV/atom/ps", 0.1 + uncertain, 1.0 + uncertain, NOT_A_GRADIENT),
        measured("standard error of the drift", run["drift_error"], "meV/atom/ps"),
        close_to("ratio of fluctuations at two time steps", run["fluctuation_ratio"], "", 4.0, 0.5 + spread, 1.5 + spread, NOT_SMOOTH),
        measured("standard error of the ratio", run["ratio_error"], ""),
    ]  # fmt: skip
