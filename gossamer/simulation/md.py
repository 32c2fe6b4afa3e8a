"""Molecular dynamics on ASE's integrators: restartable exactly, guarded, nothing lost on a crash."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import BaseCalculator
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.velocitydistribution import Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet
from tqdm import tqdm

from gossamer.arguments import said
from gossamer.data.atoms import as_atoms
from gossamer.files import locked
from gossamer.settings import configured
from gossamer.signals import StopRequested
from gossamer.simulation.dispersion import with_dispersion
from gossamer.simulation.guard import (
    Guard,
    SimulationBroken,
    check_constraints,
    degrees_of_freedom,
    drifts,
    free_axes,
    rotates,
    share_of_drift,
    temperature_of,
)
from gossamer.simulation.options import MDConfig, Way
from gossamer.simulation.recorder import STATE, Recorder, begun, read_state, run_settings, state_of, stored_settings, write_broken
from gossamer.simulation.state import belonging, check_energy, numbers_of, put_back, put_back_atoms
from gossamer.simulation.uncertain import UncertainError

log = logging.getLogger(__name__)
NPT = ("npt", "npt-anisotropic")


# --- the potential: the one place that knows how a calculator is told what to run ----------------------------------


def as_calculator(
    model: Any,
    device: str = "cpu",
    dtype: str | None = None,
    way: Way = "auto",
    expect: tuple[int, Atoms] | None = None,
    dispersion: str | None = None,
) -> BaseCalculator:
    """A calculator from an ASE calculator, a potential, or the file of one.

    Args:
        model: The three; a calculator comes back as it is, unchanged.
        device: Of a potential read from a file.
        dtype: Of a potential read from a file.
        way: How a potential runs.
        expect: About how many evaluations of which atoms will come, from which a calculator made here may choose to compile.
        dispersion: Functional whose D3 is added.

    Raises:
        TypeError: none of the three.
        ValueError: ``way``, ``dtype`` or ``device`` for a calculator, which runs as it was made; dispersion that the potential's labels held already.
    """
    if not isinstance(model, str | Path | BaseCalculator):
        from gossamer.potential import Potential

        if not isinstance(model, Potential):  # calculators that are none of ASE's classes
            if isinstance(model, type) or not hasattr(model, "get_potential_energy") or isinstance(model, Atoms):
                raise TypeError(f"model: expected a saved potential, a potential or an ASE calculator, found {said(model)}.")
            return model if dispersion is None else with_dispersion(model, dispersion)
    if isinstance(model, BaseCalculator):
        if way != "auto" or dtype is not None or device != "cpu":
            raise ValueError(
                "way, dtype and device are for potentials: a calculator runs as it was made. Give them where the calculator is made."
            )
        return model if dispersion is None else with_dispersion(model, dispersion)
    from gossamer.simulation.calculator import Calculator

    calculator = Calculator(model, device=device, dtype=dtype, way=way, dispersion=dispersion)
    if expect is not None:
        calculator.expect(*expect)
    return calculator


def check_options(config: MDConfig) -> None:
    """Refuse options that the ensemble would ignore.

    Raises:
        ValueError: says which.
    """
    usual, ensemble = MDConfig(), config.ensemble
    thermostat, barostat = (ensemble != "nve", "a thermostat", "another ensemble"), (ensemble in NPT, "a barostat", " or ".join(NPT))
    for name, unit, (there, needed, others) in (
        ("temperature_end", "K", thermostat), ("thermostat_time", "fs", thermostat), ("pressure", "GPa", barostat), ("barostat_time", "fs", barostat)
    ):  # fmt: skip
        value = getattr(config, name)
        if not there and value != getattr(usual, name):
            raise ValueError(f"{name} {value:g} {unit} needs {needed}, and {ensemble} has none. Choose {others}, or leave it out.")
    if config.collect is None and config.collect_spacing != usual.collect_spacing:
        raise ValueError("collect_spacing is between the frames that collect writes, and there is no collect: give both.")


def foretell(calculator: BaseCalculator, n_evaluations: int, atoms: Atoms) -> None:
    """Say that about so many evaluations of such atoms will come, from which one of ours may choose to compile."""
    from gossamer.simulation.calculator import Calculator

    if isinstance(calculator, Calculator):
        calculator.expect(n_evaluations, atoms)


def way_before(config: MDConfig, before: dict[str, Any] | None) -> Way:
    """In which a run with these settings began; as configured where that is said, or nothing is resumed."""
    way: Way = config.way if before is None or config.way != "auto" else before["way"]
    return way


def way_of(calculator: BaseCalculator) -> str:
    """What a calculator runs; "plain" for those that are not ours."""
    from gossamer.simulation.calculator import Calculator

    return calculator.engine.way if isinstance(calculator, Calculator) else "plain"


def identity_of(calculator: Any) -> str | None:
    """A digest of the weights of a potential of ours; None for other calculators, of which energies alone tell (`check_energy`)."""
    from gossamer.simulation.calculator import Calculator, digest_of

    return digest_of(calculator.potential, calculator.engine.dispersion) if isinstance(calculator, Calculator) else None


def has_direct_forces(calculator: BaseCalculator) -> bool:
    """Whether it is one of our potentials that predict forces directly: no gradient of an energy, no stress."""
    from gossamer.simulation.calculator import Calculator

    return isinstance(calculator, Calculator) and not calculator.conservative


# --- a run -------------------------------------------------------------------------------------------------------


def md(
    model: Any, structure: Atoms | Path | str, config: MDConfig | None = None, *, progress: bool = True, **options: Any
) -> dict[str, Any]:
    """Run molecular dynamics; the folder ``out`` gets trajectory.traj, log.csv and state.npz.

        md("potential.safetensors", "water.xyz", temperature=350, steps=10_000, out="hot")

    SIGTERM ends the run after the current step with its state saved, so that a resume goes on from there.

    Args:
        model: Saved potential, potential, or any ASE calculator (which is not changed).
        structure: Atoms or a file; velocities of the temperature are drawn unless it has some.
        config: Options as an object; ``MDConfig`` says which there are.
        progress: Show a progress bar.
        options: Options by name; they replace those of ``config``.

    Returns:
        out, steps, time_ps; new_steps and seconds, of this call (a resumed run has more steps); over the second half of the frames mean_temperature_K, mean_pressure_GPa and mean_density_g_per_cm3
        (None for what is not periodic, and where there are no frames), energy_drift_meV_per_atom_per_ps (of the conserved energy; None for langevin, ramps, and below 2 ps);
        "broken": None or what stopped the run (the frame is in broken.extxyz),
        "uncertain": None or where ``max_uncertainty`` stopped it (a resume with a larger one goes on), "collected": number of frames
        beyond it that were written, and "stopped": None or the signal that ended it early.

    Raises:
        FileExistsError: the folder holds a run and ``resume`` is False, or files of the names of its own that are of no run.
        RuntimeError: another process runs in the folder.
        ValueError: unknown options, or options that do not fit together.
    """
    config = configured(MDConfig, config, options)
    check_options(config)
    if config.engine != "ase" or config.all_frames:
        raise ValueError("engine and all_frames are for several structures: gossamer.md_files, or the command line.")
    with locked(config.out):
        run = _prepare(model, structure, config)
        began = time.perf_counter()
        try:
            broken, uncertain, stopped = _advance(run, config, progress)
        finally:
            run.recorder.close()
    if stopped is not None:
        log.warning("%s: stopped at step %d of %d; the state is saved, resume goes on", stopped, run.dynamics.nsteps, config.steps)
    return run.recorder.answer(time.perf_counter() - began, broken, uncertain, stopped)


@dataclass(frozen=True)
class _Run:
    """Atoms, their integrator, and what writes both down."""

    atoms: Atoms
    dynamics: Any
    recorder: Recorder


def _prepare(model: Any, structure: Atoms | Path | str, config: MDConfig) -> _Run:
    """Everything up to the first step: the atoms at the start, or where the stored run was."""
    state_file, resumed = config.out / STATE, begun(config)
    atoms = as_atoms(structure, config.frame, config.supercell)
    before = stored_settings(state_file) if resumed else None
    _set_calculator(atoms, model, config, before)
    rng = np.random.default_rng(config.seed)
    give_velocities(atoms, config, rng)
    guard = Guard.of(atoms, config)
    settings = run_settings(config, way_of(atoms.calc), belonging(atoms, identity_of(atoms.calc)))
    stored = read_state(state_file, before, settings, atoms) if before is not None else None
    dynamics = _integrator(atoms, config, rng)
    if stored is not None:
        _restore(dynamics, atoms, stored, state_file)
        check_energy(atoms, stored, state_file)
    recorder = Recorder(config, atoms, dynamics, settings, guard, resumed)
    dynamics.attach(recorder, interval=config.interval)
    return _Run(atoms, dynamics, recorder)


def draw_momenta(atoms: Atoms, temperature: float, rng: np.random.Generator) -> None:
    """Those of a temperature in K, as constraints allow; the numbers that ASE draws, whose function for it has changed its name with its versions."""
    widths = np.sqrt(atoms.get_masses() * units.kB * temperature)
    atoms.set_momenta(rng.standard_normal((len(atoms), 3)) * widths[:, None])


def bring_to_rest(atoms: Atoms, ensemble: str) -> None:
    """Take out the motion of the centre of mass, unless constraints hold atoms in space, and what Nosé-Hoover chains cannot thermostat.

    They scale the angular momentum of what is not periodic, and of wires about their axis, and leave its direction. So its rotation never gets
    its share of the heat, and vibrations get too much or too little (nine atoms: 12 %, typically): it starts without rotation.
    """
    if drifts(atoms):
        Stationary(atoms, preserve_temperature=False)
    if ensemble != "nose-hoover":
        return
    axes = free_axes(atoms)
    if len(axes) == 3:
        ZeroRotation(atoms, preserve_temperature=False)
    elif len(axes) == 1:
        arms, masses = np.cross(axes[0], atoms.positions - atoms.get_center_of_mass()), atoms.get_masses()[:, None]
        inertia = float((masses * arms**2).sum())
        if inertia > 0:
            momenta = atoms.get_momenta()
            atoms.set_momenta(momenta - masses * arms * (arms * momenta).sum() / inertia)


def give_velocities(atoms: Atoms, config: MDConfig, rng: np.random.Generator) -> None:
    """Draw those of the temperature, unless the atoms have some that are to be kept, less the motion of the centre of mass: only Langevin's
    thermostat, which moves it, counts it as heat (`degrees_of_freedom`). Atoms all at rest have none: VASP ends relaxed structures so."""
    if config.new_velocities or not atoms.get_momenta().any():
        draw_momenta(atoms, config.temperature, rng)
        bring_to_rest(atoms, config.ensemble)
        return
    if config.ensemble != "langevin" and drifts(atoms) and (share := share_of_drift(atoms)) > 1e-6:
        log.info("the motion of the centre of mass, %.2g of the kinetic energy, is taken out of the velocities of the structure", share)
        Stationary(atoms, preserve_temperature=False)
    if atoms.constraints:
        atoms.set_momenta(atoms.get_momenta())  # those that constraints allow
    kelvin = temperature_of(atoms, config.ensemble)
    if abs(kelvin / config.temperature - 1) > 0.2:
        log.log(
            logging.WARNING if config.ensemble == "nve" else logging.INFO,
            "the velocities of the structure are kept: %.0f K, where temperature says %g K (new_velocities draws others)",
            kelvin, config.temperature,
        )  # fmt: skip
    if config.ensemble == "nose-hoover" and rotates(atoms):
        log.warning(
            "the given velocities turn the structure, which is free to turn: nose-hoover keeps the direction of the angular momentum, so that "
            "rotation is not at the temperature asked for, and vibrations neither. Take langevin, or a start without momenta"
        )


def _set_calculator(atoms: Atoms, model: Any, config: MDConfig, before: dict[str, Any] | None) -> None:
    """Give the atoms their calculator; a resumed run goes on in the way it began."""
    way = config.way if isinstance(model, BaseCalculator) else way_before(config, before)
    atoms.calc = as_calculator(model, config.device, config.dtype, way, (config.steps, atoms), config.dispersion)
    check_constraints(atoms, config.ensemble)
    direct = has_direct_forces(atoms.calc)
    if config.ensemble in NPT and (not atoms.pbc.all() or direct):
        raise ValueError(
            f"{config.ensemble} needs a structure that is periodic along all axes, and a potential with stress (not direct forces)."
        )
    if direct:
        log.warning("this potential predicts forces directly: they are not the gradient of an energy, and energy is not conserved")


def _advance(run: _Run, config: MDConfig, progress: bool) -> tuple[str | None, str | None, str | None]:
    """Take the steps; what broke the run, where it became too uncertain, and the signal that stopped it."""
    dynamics = run.dynamics
    bar = tqdm(total=config.steps, initial=dynamics.nsteps, unit="step", disable=None if progress else True, dynamic_ncols=True)
    with bar, StopRequested() as stop:
        try:
            for _ in dynamics.irun(max(0, config.steps - dynamics.nsteps)):
                bar.update(dynamics.nsteps - bar.n)
                bar.set_postfix_str(run.recorder.brief, refresh=False)
                if stop.signal is not None and dynamics.nsteps < config.steps:
                    run.recorder.save_state()
                    return None, None, stop.signal.name
                if config.temperature_end is not None:
                    reached = dynamics.nsteps / config.steps
                    _set_temperature(dynamics, config.temperature + reached * (config.temperature_end - config.temperature))
            run.recorder.finish()
        except UncertainError as error:
            where = f"step {dynamics.nsteps} ({dynamics.nsteps * config.timestep / 1000:.3f} ps): {error}"
            log.warning("stopped at %s; the state is saved, resume with a larger max_uncertainty goes on", where)
            return None, where, None
        except (SimulationBroken, ValueError, ArithmeticError) as error:
            reason = _insane(error, run.atoms)
            if reason is None:
                raise
            return write_broken(run.atoms, dynamics.nsteps, config, reason), None, None
    return None, None, None


def _insane(error: Exception, atoms: Atoms) -> Exception | None:
    """Why the run is broken, if this error comes of a structure that has left sanity, and not of a wrong question."""
    if isinstance(error, SimulationBroken) or "finite" in str(error):
        return error
    if isinstance(error, np.linalg.LinAlgError):  # of the matrices by which cells of any shape move
        return SimulationBroken(f"the cell has left sanity ({error})")
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        return SimulationBroken(f"positions or cell are not finite ({error})")
    return None


def _integrator(atoms: Atoms, config: MDConfig, rng: np.random.Generator) -> Any:
    step, tau, pdamp = (t * units.fs for t in (config.timestep, config.thermostat_time, config.barostat_time))
    temperature = config.temperature
    if config.ensemble == "nve":
        return VelocityVerlet(atoms, step)
    if config.ensemble == "langevin":
        return LangevinBAOAB(atoms, step, temperature_K=temperature, T_tau=tau, rng=rng)
    if config.ensemble == "nose-hoover":
        chains: Any = NoseHooverChainNVT(atoms, step, temperature_K=temperature, tdamp=tau)
    else:
        kind = IsotropicMTKNPT if config.ensemble == "npt" else MTKNPT
        chains = kind(atoms, step, temperature_K=temperature, pressure_au=config.pressure * units.GPa, tdamp=tau, pdamp=pdamp)
    _count_freedom(chains, degrees_of_freedom(atoms, config.ensemble))
    return chains


def _count_freedom(chains: Any, freedom: int) -> None:
    """Let ASE's chains and barostats, which count 3 N degrees of freedom, count those that move: eight atoms whose centre of mass is at rest
    would be 14 % too hot, and a temperature that makes up for it would hold the cell, and the chains beyond the first, too cold.

    A cell of any shape moves by a symmetric matrix, which has six: of ASE's nine the cell is too hot, and its volume varies 1.2 times too much.
    """
    thermostat = chains._thermostat
    thermostat._Q[0] *= freedom / (3 * thermostat._num_atoms_global)
    for counting in (chains, thermostat):
        counting._num_atoms_global = freedom / 3
    if isinstance(chains, MTKNPT):
        chains._barostat._R[0] *= 6 / chains._barostat._cell_dof
        chains._barostat._cell_dof = 6


def _set_temperature(dynamics: Any, temperature: float) -> None:
    """Change the temperature of the thermostat (and of the barostat's own); their masses stay those of the start."""
    if isinstance(dynamics, LangevinBAOAB):
        dynamics.set_temperature(temperature)
    else:
        put_back(dynamics, {k: np.array(temperature * units.kB) for k in numbers_of(dynamics) if k.endswith("_kT")})


def _restore(dynamics: Any, atoms: Atoms, stored: dict[str, Any], path: Path) -> None:
    with state_of(path):
        put_back_atoms(atoms, stored)
        numbers = {k.removeprefix("integrator."): v for k, v in stored.items() if k.startswith("integrator.")}
        # what heats is known from the settings: older versions counted otherwise, of a temperature that made up for some of it
        put_back(dynamics, {k: v for k, v in numbers.items() if not k.endswith(("_num_atoms_global", "_cell_dof", "_kT"))})
        if isinstance(dynamics, LangevinBAOAB):
            dynamics.rng.bit_generator.state = json.loads(str(stored["rng"]))
