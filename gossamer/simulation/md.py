"""Molecular dynamics on ASE's integrators: restartable exactly, guarded, nothing lost on a crash."""

from __future__ import annotations

import csv
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import BaseCalculator, PropertyNotImplementedError
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import covalent_radii
from ase.io.trajectory import Trajectory
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.velocitydistribution import Stationary, ZeroRotation, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from numpy.typing import NDArray
from tqdm import tqdm

from gossamer.data.atoms import as_atoms
from gossamer.data.npz_file import read_npz
from gossamer.files import atomic_path, locked
from gossamer.neighbors import neighbor_list
from gossamer.settings import configured
from gossamer.signals import StopRequested
from gossamer.simulation.dispersion import with_dispersion
from gossamer.simulation.options import MDConfig, Way
from gossamer.simulation.state import cut_trajectory, damaged_advice, numbers_of, put_back, put_back_atoms
from gossamer.simulation.uncertain import UncertainError, Watch

log = logging.getLogger(__name__)
NPT = ("npt", "npt-anisotropic")
COLUMNS = ["step", "time_fs", "temperature_K", "potential_energy_eV", "total_energy_eV", "conserved_energy_eV", "pressure_GPa", "volume_A3",
           "max_forces_uncertainty_eV_per_A"]  # fmt: skip


@dataclass(frozen=True)
class Guard:
    """When a simulation has left sanity; checked at every logged frame."""

    max_temperature: float
    """K"""
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
        return cls(limit, config.max_bond_stretch, bonds, lengths_of(first, bonds))

    def problem(self, atoms: Atoms) -> str | None:
        """What is wrong with the frame, or None."""
        if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.get_potential_energy())):
            return "positions or energy are not finite"
        temperature = atoms.get_temperature()
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


def find_bonds(atoms: Atoms, factor: float = 1.25) -> NDArray[np.int64]:
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
    """3 N, less what starts at rest and stays there in all ensembles but Langevin: the centre of mass, and in a vacuum the rotation; at least 1."""
    if ensemble == "langevin":
        return 3 * len(atoms)
    at_rest = 3 if atoms.pbc.any() or rotates(atoms) else min(6, len(atoms) + 3)
    return max(1, 3 * len(atoms) - at_rest)


def rotates(atoms: Atoms) -> bool:
    """Whether the angular momentum about the centre of mass is more than a thousandth of what it can be: Σ L² against Σ m r² and Σ m v²."""
    positions, momenta, masses = atoms.positions - atoms.get_center_of_mass(), atoms.get_momenta(), atoms.get_masses()[:, None]
    most = float((masses * positions**2).sum() * (momenta**2 / masses).sum())
    return bool((np.cross(positions, momenta).sum(axis=0) ** 2).sum() > 1e-6 * most)


def temperature_of(atoms: Atoms, ensemble: str) -> float:
    """2 E_kin / (degrees of freedom * k_B) in K. `Atoms.get_temperature` always counts 3 N."""
    return float(2 * atoms.get_kinetic_energy() / (degrees_of_freedom(atoms, ensemble) * units.kB))


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
        ValueError: ``way`` or ``dtype`` for a calculator, which runs as it was made; dispersion that the potential's labels held already.
    """
    if not isinstance(model, str | Path | BaseCalculator):
        from gossamer.potential import Potential

        if not isinstance(model, Potential):  # calculators that are none of ASE's classes
            return model if dispersion is None else with_dispersion(model, dispersion)
    if isinstance(model, BaseCalculator):
        if way != "auto" or dtype is not None:
            raise ValueError("way and dtype are for potentials: a calculator runs as it was made. Give them where the calculator is made.")
        return model if dispersion is None else with_dispersion(model, dispersion)
    from gossamer.simulation.calculator import Calculator

    calculator = Calculator(model, device=device, dtype=dtype, way=way, dispersion=dispersion)
    if expect is not None:
        calculator.expect(*expect)
    return calculator


def foretell(calculator: BaseCalculator, n_evaluations: int, atoms: Atoms) -> None:
    """Say that about so many evaluations of such atoms will come, from which one of ours may choose to compile."""
    from gossamer.simulation.calculator import Calculator

    if isinstance(calculator, Calculator):
        calculator.expect(n_evaluations, atoms)


def way_before(config: MDConfig) -> Way:
    """In which a run that is resumed began; as configured where that is said, or nothing is resumed."""
    state_file = config.out / "state.npz"
    if config.way != "auto" or not (config.resume and state_file.exists()):
        return config.way
    way: Way = stored_settings(state_file)["way"]
    return way


def way_of(calculator: BaseCalculator) -> str:
    """What a calculator runs; "plain" for those that are not ours."""
    from gossamer.simulation.calculator import Calculator

    return calculator.engine.way if isinstance(calculator, Calculator) else "plain"


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
        out, steps, time_ps, seconds, mean_temperature_K, "broken": None or what stopped the run (the frame is in broken.extxyz),
        "uncertain": None or where ``max_uncertainty`` stopped it (a resume with a larger one goes on), "collected": number of frames
        beyond it that were written, and "stopped": None or the signal that ended it early.

    Raises:
        FileExistsError: the folder holds a run and ``resume`` is False.
        RuntimeError: another process runs in the folder.
        ValueError: unknown options, or options that do not fit together.
    """
    config = configured(MDConfig, config, options)
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
    state_file = config.out / "state.npz"
    resumed = state_file.exists()
    if resumed and not config.resume:
        raise FileExistsError(f"'{config.out}' holds a simulation already. Go on with it (--resume), or choose another folder (--out).")
    atoms = as_atoms(structure, config.frame, config.supercell)
    before = stored_settings(state_file) if resumed else None
    _set_calculator(atoms, model, config, before)
    rng = np.random.default_rng(config.seed)
    give_velocities(atoms, config, rng)
    guard = Guard.of(atoms, config)
    settings = run_settings(config, way_of(atoms.calc))
    stored = read_state(state_file, before, settings, atoms) if before is not None else None
    dynamics = _integrator(atoms, config, rng)
    if stored is not None:
        _restore(dynamics, atoms, stored, state_file)
    recorder = Recorder(config, atoms, dynamics, settings, guard, resumed)
    dynamics.attach(recorder, interval=config.interval)
    return _Run(atoms, dynamics, recorder)


def bring_to_rest(atoms: Atoms, ensemble: str) -> None:
    """Take out the motion of the centre of mass, and what Nosé-Hoover chains cannot thermostat.

    They scale the angular momentum of what is not periodic and leave its direction. So its rotation never gets its share of the heat, and
    vibrations get too much or too little (nine atoms: 12 %, typically): it starts without rotation.
    """
    Stationary(atoms, preserve_temperature=False)
    if ensemble == "nose-hoover" and not atoms.pbc.any():
        ZeroRotation(atoms, preserve_temperature=False)


def give_velocities(atoms: Atoms, config: MDConfig, rng: np.random.Generator) -> None:
    """Draw those of the temperature, unless the atoms have some."""
    if not atoms.has("momenta"):
        thermalize_momenta(atoms, config.temperature, rng=rng)
        bring_to_rest(atoms, config.ensemble)
    elif config.ensemble == "nose-hoover" and not atoms.pbc.any() and rotates(atoms):
        log.warning(
            "the given velocities turn the structure, which is not periodic: nose-hoover keeps the direction of the angular momentum, so that "
            "rotation is not at the temperature asked for, and vibrations neither. Take langevin, or a start without momenta"
        )


def _set_calculator(atoms: Atoms, model: Any, config: MDConfig, before: dict[str, Any] | None) -> None:
    """Give the atoms their calculator; a resumed run goes on in the way it began."""
    way = config.way if before is None or config.way != "auto" or isinstance(model, BaseCalculator) else before["way"]
    atoms.calc = as_calculator(model, config.device, config.dtype, way, (config.steps, atoms), config.dispersion)
    direct = has_direct_forces(atoms.calc)
    if config.ensemble in NPT and (not atoms.pbc.all() or direct):
        raise ValueError(
            f"{config.ensemble} needs a structure that is periodic along all axes, and a potential with stress (not direct forces)."
        )
    if direct:
        log.warning("this potential predicts forces directly: they are not the gradient of an energy, and energy is not conserved")
    if config.temperature_end is not None and config.ensemble == "nve":
        raise ValueError("temperature_end needs a thermostat, and nve has none. Choose another ensemble.")


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
                    _set_temperature(dynamics, config, config.temperature + reached * (config.temperature_end - config.temperature))
        except UncertainError as error:
            where = f"step {dynamics.nsteps} ({dynamics.nsteps * config.timestep / 1000:.3f} ps): {error}"
            log.warning("stopped at %s; the state is saved, resume with a larger max_uncertainty goes on", where)
            return None, where, None
        except (SimulationBroken, ValueError) as error:
            if not isinstance(error, SimulationBroken) and "finite" not in str(error):
                raise
            return write_broken(run.atoms, dynamics.nsteps, config, error), None, None
    return None, None, None


def write_broken(atoms: Atoms, step: int, config: MDConfig, error: Exception) -> str:
    """Write the frame that broke a run; returns where and why."""
    frame = config.out / "broken.extxyz"
    with atomic_path(frame) as temporary:
        ase.io.write(temporary, atoms.copy(), format="extxyz")
    why = f"step {step} ({step * config.timestep / 1000:.3f} ps): {error}"
    log.error("stopped at %s; the frame is in '%s'", why, frame)
    return why


class SimulationBroken(RuntimeError):
    """The guard found a frame that has left sanity."""


def run_settings(config: MDConfig, way: str) -> dict[str, Any]:
    """What a resumed run must share with the one before."""
    names = ("ensemble", "timestep", "temperature", "temperature_end", "pressure", "thermostat_time", "barostat_time", "interval",
             "dispersion", "engine")  # fmt: skip
    ramp = config.steps if config.temperature_end is not None else None
    return {**{name: getattr(config, name) for name in names}, "ramp_steps": ramp, "way": way}


def thermostat_temperature(atoms: Atoms, ensemble: str, temperature: float) -> float:
    """ASE's chains count 3 N degrees of freedom, of which 3 are at rest: without this 9 atoms would be 12 % too hot."""
    return temperature * degrees_of_freedom(atoms, ensemble) / (3 * len(atoms))


def _integrator(atoms: Atoms, config: MDConfig, rng: np.random.Generator) -> Any:
    step, tau, pdamp = (t * units.fs for t in (config.timestep, config.thermostat_time, config.barostat_time))
    temperature = thermostat_temperature(atoms, config.ensemble, config.temperature)
    if config.ensemble == "nve":
        return VelocityVerlet(atoms, step)
    if config.ensemble == "langevin":
        return LangevinBAOAB(atoms, step, temperature_K=temperature, T_tau=tau, rng=rng)
    if config.ensemble == "nose-hoover":
        return NoseHooverChainNVT(atoms, step, temperature_K=temperature, tdamp=tau)
    kind = IsotropicMTKNPT if config.ensemble == "npt" else MTKNPT
    return kind(atoms, step, temperature_K=temperature, pressure_au=config.pressure * units.GPa, tdamp=tau, pdamp=pdamp)


def _set_temperature(dynamics: Any, config: MDConfig, temperature: float) -> None:
    """Change the temperature of the thermostat (and of the barostat's own); their masses stay those of the start."""
    kelvin = thermostat_temperature(dynamics.atoms, config.ensemble, temperature)
    if isinstance(dynamics, LangevinBAOAB):
        dynamics.set_temperature(kelvin)
    else:
        put_back(dynamics, {k: np.array(kelvin * units.kB) for k in numbers_of(dynamics) if k.endswith("_kT")})


# --- exact restart: every number the integrator holds, and the state of its random generator ---------------------


def _restore(dynamics: Any, atoms: Atoms, stored: dict[str, Any], path: Path) -> None:
    with state_of(path):
        put_back_atoms(atoms, stored)
        put_back(dynamics, {k.removeprefix("integrator."): v for k, v in stored.items() if k.startswith("integrator.")})
        if isinstance(dynamics, LangevinBAOAB):
            dynamics.rng.bit_generator.state = json.loads(str(stored["rng"]))


@contextmanager
def state_of(path: Path) -> Iterator[None]:
    """Name the file where numbers of a stored state are missing, or are none of this simulation."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"'{path}' does not hold the state of this simulation ({type(error).__name__}: {error}). Start again in another folder (--out)."
        ) from None


def stored_settings(path: Path) -> dict[str, Any]:
    """Settings of the run that wrote a state, those of older versions in today's words."""
    try:
        settings = dict(json.loads(str(read_npz(path, ["settings"])["settings"])))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"'{path}' cannot be read ({error}). Start again in another folder (--out).") from None
    if "way" not in settings:  # until 0.1.0: the words of today, and before kernels a yes or no
        compiled = settings.pop("compiled", False)
        settings["way"] = compiled if isinstance(compiled, str) else "program" if compiled else "plain"
    return {"temperature_end": None, "ramp_steps": None, "dispersion": None, "engine": "ase", **settings}


def read_state(path: Path, before: dict[str, Any], settings: dict[str, Any], atoms: Atoms) -> dict[str, Any]:
    """Arrays of a stored run that had the same settings and atoms."""
    stored = read_npz(path)
    changed = sorted(k for k in settings if before.get(k) != settings[k] and k != "way")
    if changed:
        raise ValueError(
            f"'{path}' was made with other settings: {', '.join(f'{k} {before.get(k)} (now {settings[k]})' for k in changed)}. "
            "Resume with the same ones, or start in another folder (--out)."
        )
    if not np.array_equal(stored.get("numbers", ()), atoms.numbers):
        raise ValueError(f"'{path}' belongs to other atoms than this structure. Resume with the same structure, or use another folder.")
    if before["way"] != settings["way"]:
        log.warning(
            "'%s' was made the %s way, and goes on the %s way: the same to rounding, not to the bit", path, before["way"], settings["way"]
        )
    return stored


class Recorder:
    """Writes a frame, a row of the log and the state, then asks the guard."""

    def __init__(self, config: MDConfig, atoms: Atoms, dynamics: Any, settings: dict[str, Any], guard: Guard, resumed: bool) -> None:
        self.config, self.atoms, self.dynamics, self.settings, self.guard = config, atoms, dynamics, settings, guard
        self.temperatures: list[float] = []
        self.brief = ""
        self.watch = Watch(config.max_uncertainty, config.collect, config.collect_spacing, dynamics.nsteps if resumed else None)
        trajectory, table = config.out / "trajectory.traj", config.out / "log.csv"
        rows: list[list[str]] = []
        if resumed:
            kept = dynamics.nsteps // config.interval + 1 if dynamics.nsteps else 0  # that of step 0 is written at the start, now again
            rows = _cut_back(trajectory, table, kept)
            self.temperatures = [float(row[COLUMNS.index("temperature_K")]) for row in rows]
        with atomic_path(table) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        self.table = open(table, "a", newline="")  # noqa: SIM115 - closed by close()
        self.trajectory = Trajectory(trajectory, "a" if resumed else "w")

    def __call__(self) -> None:
        atoms, dynamics = self.atoms, self.dynamics
        if not np.isfinite(atoms.get_potential_energy()):
            raise SimulationBroken("energy is not finite")
        potential, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
        temperature = temperature_of(atoms, self.config.ensemble)
        total = potential + kinetic
        conserved = self._conserved(total)
        pressure = volume = float("nan")
        if atoms.pbc.all():
            volume = atoms.get_volume()
            if "stress" in atoms.calc.results:
                pressure = -np.trace(atoms.get_stress(voigt=False, include_ideal_gas=True)) / 3 / units.GPa
        time = dynamics.nsteps * self.config.timestep
        largest, doubt = self.watch(atoms, dynamics.nsteps, time)
        row = [dynamics.nsteps, time, temperature, potential, total, conserved, pressure, volume, largest]
        csv.writer(self.table).writerow([repr(float(x)) if isinstance(x, float) else x for x in row])
        self.table.flush()
        self.trajectory.write(self._frame())
        self.temperatures.append(temperature)
        self.brief = f"{temperature:.0f} K  {potential / len(atoms):.4f} eV/atom"
        problem = self.guard.problem(atoms)
        if problem is not None:
            raise SimulationBroken(problem)
        self.save_state()
        if doubt is not None:
            raise UncertainError(doubt)

    def _conserved(self, total: float) -> float:
        """The integrator's conserved quantity in eV.

        NaN for Langevin, for a thermostat whose temperature changes, and for calculators without a free_energy, which ASE asks for.
        """
        if self.config.ensemble == "nve":
            return total
        if self.config.ensemble == "langevin" or self.config.temperature_end is not None:
            return float("nan")
        try:
            return float(self.dynamics.get_conserved_energy())
        except PropertyNotImplementedError:
            return float("nan")

    def _frame(self) -> Atoms:
        """The atoms with plain results: ASE's writer would also store the calculator's parameters, and fails on some."""
        frame = self.atoms.copy()
        results = {k: v for k, v in self.atoms.calc.results.items() if k in ("energy", "free_energy", "forces", "stress")}
        frame.calc = SinglePointCalculator(frame, **results)
        return frame

    def save_state(self) -> None:
        """Write what an exact restart needs."""
        arrays: dict[str, Any] = {f"integrator.{k}": v for k, v in numbers_of(self.dynamics).items()}
        if isinstance(self.dynamics, LangevinBAOAB):
            arrays["rng"] = np.array(json.dumps(self.dynamics.rng.bit_generator.state))
        atoms = self.atoms
        with atomic_path(self.config.out / "state.npz") as temporary:
            np.savez(
                temporary, numbers=atoms.numbers, positions=atoms.positions, momenta=atoms.get_momenta(), cell=atoms.cell.array,
                settings=np.array(json.dumps(self.settings)), **arrays,
            )  # fmt: skip

    def answer(self, seconds: float, broken: str | None, uncertain: str | None, stopped: str | None) -> dict[str, Any]:
        """What ``md`` returns."""
        return {
            "out": str(self.config.out),
            "steps": self.dynamics.nsteps,
            "time_ps": self.dynamics.nsteps * self.config.timestep / 1000,
            "seconds": round(seconds, 2),
            "mean_temperature_K": self.mean_temperature(),
            "broken": broken,
            "uncertain": uncertain,
            "collected": len(self.watch.frames),
            "stopped": stopped,
        }

    def mean_temperature(self) -> float:
        """K, over the second half of the frames."""
        half = self.temperatures[len(self.temperatures) // 2 :]
        return round(float(np.mean(half)), 2) if half else float("nan")

    def close(self) -> None:
        self.table.close()
        self.trajectory.close()


def _cut_back(trajectory: Path, table: Path, kept: int) -> list[list[str]]:
    """Drop the frames and the rows of the log after the first ``kept``; returns the rows that stay.

    Raises:
        ValueError: one of the two cannot be read.
    """
    try:
        with open(table, newline="") as file:
            rows = [
                row + ["nan"] * (len(COLUMNS) - len(row)) for row in list(csv.reader(file))[1 : kept + 1]
            ]  # older logs have fewer columns
        [[float(value) for value in row] for row in rows]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"'{table}' cannot be read ({error}). {damaged_advice(table)}") from None
    frames = cut_trajectory(trajectory, kept)
    for path, found in ((table, len(rows)), (trajectory, frames)):
        if found < kept:
            log.warning("'%s' holds %d of the %d frames until here: the others were lost", path, found, kept)
    return rows
