"""Molecular dynamics on ASE's integrators: restartable exactly, guarded, nothing lost on a crash."""

from __future__ import annotations

import csv
import json
import logging
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator as ASECalculator
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import covalent_radii
from ase.io.trajectory import Trajectory
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.nose_hoover_chain import IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from numpy.typing import NDArray
from tqdm import tqdm

from gossamer.data.atoms import as_atoms
from gossamer.files import atomic_path
from gossamer.neighbors import neighbor_list
from gossamer.simulation.state import numbers_of, put_back

log = logging.getLogger(__name__)
Ensemble = Literal["nve", "langevin", "nose-hoover", "npt"]
COLUMNS = ["step", "time_fs", "temperature_K", "potential_energy_eV", "total_energy_eV", "conserved_energy_eV", "pressure_GPa", "volume_A3"]


@dataclass(frozen=True)
class Guard:
    """When a simulation has left sanity; checked at every logged frame."""

    max_temperature: float
    """K"""
    min_distance: float = 0.5
    """closest approach, as a fraction of the sum of the covalent radii"""
    max_bond_stretch: float | None = None
    """Å by which a bond of the first frame may change (molecules: 0.5); None does not watch bonds"""

    def problem(self, atoms: Atoms, bonds: NDArray[np.int64], bond_lengths: NDArray[np.float64]) -> str | None:
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
        if self.max_bond_stretch is not None and len(bonds):
            change = np.abs(lengths_of(atoms, bonds) - bond_lengths)
            worst = int(change.argmax())
            if change[worst] > self.max_bond_stretch:
                return f"bond {bonds[worst, 0]}-{bonds[worst, 1]} has changed by {change[worst]:.2f} Å"
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
    """3 N, less 3 where the centre of mass starts at rest and stays there (all ensembles but Langevin); at least 1."""
    return max(1, 3 * len(atoms) - (0 if ensemble == "langevin" else 3))


def temperature_of(atoms: Atoms, ensemble: str) -> float:
    """2 E_kin / (degrees of freedom * k_B) in K. `Atoms.get_temperature` always counts 3 N."""
    return float(2 * atoms.get_kinetic_energy() / (degrees_of_freedom(atoms, ensemble) * units.kB))


def as_calculator(model: Any, device: str = "cpu", dtype: str | None = None, way: Any = "auto") -> ASECalculator:
    """A calculator from an ASE calculator, a potential, or the file of one."""
    if hasattr(model, "get_property"):
        return model
    from gossamer.simulation.calculator import Calculator

    return Calculator(model, device=device, dtype=dtype, way=way)


def md(
    model: Any,
    structure: Atoms | Path | str,
    temperature: float = 300.0,
    steps: int = 1000,
    timestep: float = 0.5,
    ensemble: Ensemble = "langevin",
    out: Path | str = "md",
    interval: int = 20,
    pressure: float = 0.0,
    thermostat_time: float = 100.0,
    barostat_time: float = 1000.0,
    seed: int = 0,
    resume: bool = False,
    max_temperature: float | None = None,
    max_bond_stretch: float | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    way: Any = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Run molecular dynamics; the folder ``out`` gets trajectory.traj, log.csv and state.npz.

    Args:
        model: Saved potential, potential, or any ASE calculator.
        structure: Atoms or a file; velocities of the temperature are drawn unless it has some.
        temperature: K (of the thermostat, and of the velocities drawn).
        steps: Time steps in all, those before a resume included.
        timestep: fs.
        ensemble: "nve" (velocity Verlet), "langevin" (BAOAB), "nose-hoover" (chains), "npt" (isotropic MTK).
        out: Folder of the results.
        interval: Steps between frames of the trajectory and rows of the log.
        pressure: GPa, for npt.
        thermostat_time: fs, relaxation time of the thermostat.
        barostat_time: fs, relaxation time of the barostat.
        seed: Of the velocities and of the Langevin noise.
        resume: Go on from state.npz, bit for bit as if never stopped.
        max_temperature: K at which the run stops; by default 5 times ``temperature`` + 500 K.
        max_bond_stretch: Å by which a bond of the first frame may change before the run stops; None does not watch.
        device: Of a potential read from a file.
        dtype: Of a potential read from a file.
        compiled: True runs a compiled program of a saved potential, False the potential as it is; by default kernels, and a program if
            there is one in the cache, or if the run is so long that compiling (half a minute, once) pays. A resumed run goes on as it began.
        progress: Show a progress bar.

    Returns:
        steps, seconds, mean temperature, and "broken": None or what stopped the run (the frame is in broken.extxyz).

    Raises:
        FileExistsError: the folder holds a run and ``resume`` is False.
        ValueError: settings that do not fit together.
    """
    _check_arguments(ensemble, temperature=temperature, steps=steps, timestep=timestep, interval=interval)
    folder = Path(out)
    state_file = folder / "state.npz"
    if state_file.exists() and not resume:
        raise FileExistsError(f"'{folder}' holds a simulation already. Go on with it (--resume), or choose another folder (--out).")
    atoms = as_atoms(structure)
    calculator: Any = as_calculator(model, device, dtype, way)
    if ensemble == "npt" and (not atoms.pbc.all() or getattr(calculator, "conservative", True) is False):
        raise ValueError("npt needs a structure that is periodic along all axes, and a potential with stress (not direct forces).")
    if getattr(calculator, "conservative", True) is False:
        log.warning("this potential predicts forces directly: they are not the gradient of an energy, and energy is not conserved")
    rng = np.random.default_rng(seed)
    if not atoms.has("momenta"):
        thermalize_momenta(atoms, temperature, rng=rng)
        Stationary(atoms)
    first = atoms.copy()
    atoms.calc = calculator
    settings = {"ensemble": ensemble, "timestep": timestep, "temperature": temperature, "pressure": pressure,
                "thermostat_time": thermostat_time, "barostat_time": barostat_time, "interval": interval,
                "compiled": getattr(calculator, "mode", "plain")}  # fmt: skip
    stored = _read_state(state_file, settings, atoms) if resume and state_file.exists() else None
    dynamics = _integrator(atoms, settings, rng)
    if stored is not None:
        _restore(dynamics, atoms, stored)
    guard = Guard(5 * temperature + 500 if max_temperature is None else max_temperature, max_bond_stretch=max_bond_stretch)
    bonds = find_bonds(first)
    recorder = _Recorder(folder, atoms, dynamics, settings, interval, guard, bonds, lengths_of(first, bonds), stored is not None)
    dynamics.attach(recorder, interval=interval)
    broken = None
    began = time.perf_counter()
    bar = tqdm(total=steps, initial=dynamics.nsteps, unit="step", disable=None if progress else True, dynamic_ncols=True)
    stop = _Stop()
    with bar, stop:
        try:
            for _ in dynamics.irun(max(0, steps - dynamics.nsteps)):
                bar.update(dynamics.nsteps - bar.n)
                if dynamics.nsteps % interval == 0:
                    bar.set_postfix_str(recorder.brief)
                    if stop.requested:
                        break
        except (SimulationBroken, ValueError) as error:
            if not isinstance(error, SimulationBroken) and "finite" not in str(error):
                raise
            broken = f"step {dynamics.nsteps} ({dynamics.nsteps * timestep / 1000:.3f} ps): {error}"
            log.error("stopped at %s; the frame is in '%s'", broken, folder / "broken.extxyz")
            with atomic_path(folder / "broken.extxyz") as temporary:
                frame = atoms.copy()
                ase.io.write(temporary, frame, format="extxyz")
        finally:
            recorder.close()
    seconds = time.perf_counter() - began
    return {
        "out": str(folder),
        "steps": dynamics.nsteps,
        "time_ps": dynamics.nsteps * timestep / 1000,
        "seconds": round(seconds, 2),
        "mean_temperature_K": recorder.mean_temperature(),
        "broken": broken,
    }


def _check_arguments(ensemble: str, **positive: float) -> None:
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, found {value}.")
    if ensemble not in ("nve", "langevin", "nose-hoover", "npt"):
        raise ValueError(f"ensemble '{ensemble}' is unknown. Choose nve, langevin, nose-hoover or npt.")


class SimulationBroken(RuntimeError):
    """The guard found a frame that has left sanity."""


class _Stop:
    """Notes SIGTERM, so that the run ends after a recorded frame."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> None:
        try:
            self._previous = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "requested", True))
        except ValueError:  # not the main thread
            self._previous = None

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)


def _integrator(atoms: Atoms, settings: dict[str, Any], rng: np.random.Generator) -> Any:
    step = settings["timestep"] * units.fs
    # ASE's chains count 3 N degrees of freedom, of which 3 are at rest: without this 9 atoms would be 12 % too hot
    temperature = settings["temperature"] * degrees_of_freedom(atoms, settings["ensemble"]) / (3 * len(atoms))
    tau = settings["thermostat_time"] * units.fs
    if settings["ensemble"] == "nve":
        return VelocityVerlet(atoms, step)
    if settings["ensemble"] == "langevin":
        return LangevinBAOAB(atoms, step, temperature_K=temperature, T_tau=tau, rng=rng)
    if settings["ensemble"] == "nose-hoover":
        return NoseHooverChainNVT(atoms, step, temperature_K=temperature, tdamp=tau)
    pressure, pdamp = settings["pressure"] * units.GPa, settings["barostat_time"] * units.fs
    return IsotropicMTKNPT(atoms, step, temperature_K=temperature, pressure_au=pressure, tdamp=tau, pdamp=pdamp)


# --- exact restart: every number the integrator holds, and the state of its random generator ---------------------


def _restore(dynamics: Any, atoms: Atoms, stored: dict[str, Any]) -> None:
    atoms.set_cell(stored["cell"])
    atoms.set_positions(stored["positions"])
    atoms.set_momenta(stored["momenta"])
    put_back(dynamics, {k.removeprefix("integrator."): v for k, v in stored.items() if k.startswith("integrator.")})
    if hasattr(dynamics, "rng"):
        dynamics.rng.bit_generator.state = json.loads(str(stored["rng"]))


def _stored_settings(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as data:
            settings = dict(json.loads(str(data["settings"])))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"'{path}' cannot be read ({error}). Start again in another folder (--out).") from None
    before = settings.get("compiled", False)
    settings["compiled"] = before if isinstance(before, str) else "program" if before else "plain"  # files before kernels
    return settings


def _read_state(path: Path, settings: dict[str, Any], atoms: Atoms) -> dict[str, Any]:
    before = _stored_settings(path)
    with np.load(path, allow_pickle=False) as data:
        stored = {k: data[k] for k in data.files}
    changed = sorted(k for k in settings if before[k] != settings[k])
    if changed:
        raise ValueError(
            f"'{path}' was made with other settings: {', '.join(f'{k} {before[k]} (now {settings[k]})' for k in changed)}. "
            "Resume with the same ones, or start in another folder (--out)."
        )
    if not np.array_equal(stored["numbers"], atoms.numbers):
        raise ValueError(f"'{path}' belongs to other atoms than this structure. Resume with the same structure, or use another folder.")
    return stored


class _Recorder:
    """Writes a frame, a row of the log and the state, then asks the guard."""

    def __init__(
        self, folder: Path, atoms: Atoms, dynamics: Any, settings: dict[str, Any], interval: int, guard: Guard,
        bonds: NDArray[np.int64], bond_lengths: NDArray[np.float64], resumed: bool,
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.atoms, self.dynamics, self.settings = folder, atoms, dynamics, settings
        self.guard, self.bonds, self.bond_lengths, self.interval = guard, bonds, bond_lengths, interval
        self.temperatures: list[float] = []
        self.brief = ""
        kept = dynamics.nsteps // interval + 1 if resumed else 0
        trajectory, table = folder / "trajectory.traj", folder / "log.csv"
        rows: list[list[str]] = []
        if resumed:  # drop what was written after the state
            with open(table, newline="") as file:
                rows = list(csv.reader(file))[1 : kept + 1]
            with Trajectory(trajectory) as reader:
                frames = [reader[k] for k in range(min(kept, len(reader)))]
            with atomic_path(trajectory) as temporary, Trajectory(temporary, "w") as writer:
                for frame in frames:
                    writer.write(frame)
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
        temperature = temperature_of(atoms, self.settings["ensemble"])
        total = potential + kinetic
        conserved = self._conserved(total)
        pressure = volume = float("nan")
        if atoms.pbc.all():
            volume = atoms.get_volume()
            if "stress" in getattr(atoms.calc, "results", {}):
                pressure = -np.trace(atoms.get_stress(voigt=False, include_ideal_gas=True)) / 3 / units.GPa
        row = [dynamics.nsteps, dynamics.nsteps * self.settings["timestep"], temperature, potential, total, conserved, pressure, volume]
        csv.writer(self.table).writerow([repr(float(x)) if isinstance(x, float) else x for x in row])
        self.table.flush()
        self.trajectory.write(self._frame())
        self.temperatures.append(temperature)
        self.brief = f"{temperature:.0f} K  {potential / len(atoms):.4f} eV/atom"
        problem = self.guard.problem(atoms, self.bonds, self.bond_lengths)
        if problem is not None:
            raise SimulationBroken(problem)
        self.save_state()

    def _conserved(self, total: float) -> float:
        """The integrator's conserved quantity in eV; NaN for Langevin, and for calculators without a free_energy, which ASE asks for."""
        if self.settings["ensemble"] == "nve":
            return total
        if self.settings["ensemble"] == "langevin":
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
        arrays: dict[str, Any] = {f"integrator.{k}": v for k, v in numbers_of(self.dynamics).items()}
        if hasattr(self.dynamics, "rng"):
            arrays["rng"] = np.array(json.dumps(self.dynamics.rng.bit_generator.state))
        atoms = self.atoms
        with atomic_path(self.folder / "state.npz") as temporary:
            np.savez(
                temporary, numbers=atoms.numbers, positions=atoms.positions, momenta=atoms.get_momenta(), cell=atoms.cell.array,
                settings=np.array(json.dumps(self.settings)), **arrays,
            )  # fmt: skip

    def mean_temperature(self) -> float:
        """K, over the second half of the frames."""
        half = self.temperatures[len(self.temperatures) // 2 :]
        return round(float(np.mean(half)), 2) if half else float("nan")

    def close(self) -> None:
        self.table.close()
        self.trajectory.close()
