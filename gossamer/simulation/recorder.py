"""What a simulation writes: frames, log, and the state that an exact restart needs; and how these are read back."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.trajectory import Trajectory
from ase.md.langevinbaoab import LangevinBAOAB

from gossamer.data.npz_file import read_npz
from gossamer.files import atomic_path
from gossamer.simulation.guard import Guard, SimulationBroken, temperature_of
from gossamer.simulation.options import MDConfig
from gossamer.simulation.state import cut_trajectory, damaged_advice, numbers_of, strange, without_labels
from gossamer.simulation.uncertain import UncertainError, Watch

log = logging.getLogger(__name__)
STATE, TRAJECTORY, TABLE = "state.npz", "trajectory.traj", "log.csv"
COLUMNS = ["step", "time_fs", "temperature_K", "potential_energy_eV", "total_energy_eV", "conserved_energy_eV", "pressure_GPa", "volume_A3",
           "max_forces_uncertainty_eV_per_A"]  # fmt: skip


def write_broken(atoms: Atoms, step: int, config: MDConfig, error: Exception) -> str:
    """Write the frame that broke a run; returns where and why."""
    frame = config.out / "broken.extxyz"
    with atomic_path(frame) as temporary:
        ase.io.write(temporary, without_labels(atoms), format="extxyz")
    why = f"step {step} ({step * config.timestep / 1000:.3f} ps): {error}"
    log.error("stopped at %s; the frame is in '%s'", why, frame)
    return why


def run_settings(config: MDConfig, way: str, belonging: dict[str, str]) -> dict[str, Any]:
    """What a resumed run must share with the one before; ``belonging`` says to which potential and atoms it belongs."""
    names = ("ensemble", "timestep", "temperature", "temperature_end", "pressure", "thermostat_time", "barostat_time", "interval",
             "dispersion", "engine")  # fmt: skip
    ramp = config.steps if config.temperature_end is not None else None
    return {**{name: getattr(config, name) for name in names}, "ramp_steps": ramp, "way": way, "belonging": belonging}


def begun(config: MDConfig) -> bool:
    """Whether the folder holds a run that is to go on.

    Raises:
        FileExistsError: it holds one that is not to go on, or files that would be written over.
    """
    if (config.out / STATE).exists():
        if not config.resume:
            raise FileExistsError(f"'{config.out}' holds a simulation already. Go on with it (--resume), or choose another folder (--out).")
        return True
    foreign = [name for name in (TRAJECTORY, TABLE) if (config.out / name).exists()]
    if foreign:
        raise FileExistsError(
            f"'{config.out}' holds {' and '.join(foreign)} of no simulation (there is no {STATE}), which would be written over. "
            "Move them away, or choose another folder (--out)."
        )
    return False


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
    passing = ["way", "belonging", *([] if settings["ensemble"].startswith("npt") else ["pressure"])]  # which older versions ignored there
    changed = sorted(k for k in settings if before.get(k) != settings[k] and k not in passing)
    if changed:
        raise ValueError(
            f"'{path}' was made with other settings: {', '.join(f'{k} {before.get(k)} (now {settings[k]})' for k in changed)}. "
            "Resume with the same ones, or start in another folder (--out)."
        )
    if not np.array_equal(stored.get("numbers", ()), atoms.numbers):
        raise ValueError(f"'{path}' belongs to other atoms than this structure. Resume with the same structure, or use another folder.")
    others = strange(before.get("belonging", {}), settings["belonging"])
    if others:
        raise ValueError(f"'{path}' belongs to something else: {others}. Resume with the same, or start in another folder (--out).")
    if before["way"] != settings["way"]:
        log.warning(
            "'%s' was made the %s way, and goes on the %s way: the same to rounding, not to the bit", path, before["way"], settings["way"]
        )
    return stored


class Recorder:
    """Writes a frame, a row of the log and the state, then asks the guard."""

    def __init__(self, config: MDConfig, atoms: Atoms, dynamics: Any, settings: dict[str, Any], guard: Guard, resumed: bool) -> None:
        self.config, self.atoms, self.dynamics, self.settings, self.guard = config, atoms, dynamics, settings, guard
        self.first_step = dynamics.nsteps
        self.rows: list[list[float]] = []
        """of the log, from its first"""
        self.n_sound = 0
        """rows that the guard let pass"""
        self.brief = ""
        self.watch = Watch(config.max_uncertainty, config.collect, config.collect_spacing, dynamics.nsteps if resumed else None)
        trajectory, table = config.out / TRAJECTORY, config.out / TABLE
        rows: list[list[str]] = []
        if not resumed:
            self.save_state()  # before the others, which are known by it as a simulation's
        goes_on = resumed and dynamics.nsteps > 0  # what belongs to step 0 is written at the start, now again
        if goes_on:
            rows = _cut_back(trajectory, table, dynamics.nsteps // config.interval + 1)
            self.rows = [[float(value) for value in row] for row in rows]
            self.n_sound = len(rows)
        with atomic_path(table) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        self.table = open(table, "a", encoding="utf-8", newline="")  # noqa: SIM115 - closed by close()
        self.trajectory = Trajectory(trajectory, "a" if goes_on else "w")

    def __call__(self) -> None:
        atoms, dynamics = self.atoms, self.dynamics
        if not np.isfinite(atoms.get_potential_energy()):
            raise SimulationBroken("energy is not finite")
        potential, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
        temperature = temperature_of(atoms, self.config.ensemble)
        total = potential + kinetic
        free = atoms.calc.results.get("free_energy", potential)  # to which the forces belong: of smeared electrons it is another
        conserved = self._conserved(free + kinetic)
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
        self.rows.append(row)
        self.brief = f"{temperature:.0f} K  {potential / len(atoms):.4f} eV/atom"
        problem = self.guard.problem(atoms)
        if problem is not None:
            raise SimulationBroken(problem)
        self.n_sound = len(self.rows)
        self.save_state()
        if doubt is not None:
            raise UncertainError(doubt)

    def finish(self) -> None:
        """At the last step: the guard and the state, where no frame is due; a frame would not be one of equal distances."""
        if self.dynamics.nsteps % self.config.interval:
            problem = self.guard.problem(self.atoms)
            if problem is not None:
                raise SimulationBroken(problem)
            self.save_state()

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
        frame = without_labels(self.atoms)
        results = {k: v for k, v in self.atoms.calc.results.items() if k in ("energy", "free_energy", "forces", "stress")}
        frame.calc = SinglePointCalculator(frame, **results)
        return frame

    def save_state(self) -> None:
        """Write what an exact restart needs."""
        arrays: dict[str, Any] = {f"integrator.{k}": v for k, v in numbers_of(self.dynamics).items()}
        if isinstance(self.dynamics, LangevinBAOAB):
            arrays["rng"] = np.array(json.dumps(self.dynamics.rng.bit_generator.state))
        atoms = self.atoms
        if self.rows:
            arrays["energy"] = np.array(float(atoms.calc.results["energy"]))
        with atomic_path(self.config.out / STATE) as temporary:
            np.savez(
                temporary, numbers=atoms.numbers, positions=atoms.positions, momenta=atoms.get_momenta(), cell=atoms.cell.array,
                settings=np.array(json.dumps(self.settings)), **arrays,
            )  # fmt: skip

    def answer(self, seconds: float, broken: str | None, uncertain: str | None, stopped: str | None) -> dict[str, Any]:
        """What ``md`` returns."""
        return {
            "out": str(self.config.out),
            "steps": self.dynamics.nsteps,
            "new_steps": self.dynamics.nsteps - self.first_step,
            "time_ps": self.dynamics.nsteps * self.config.timestep / 1000,
            "seconds": round(seconds, 2),
            **self.means(),
            "broken": broken,
            "uncertain": uncertain,
            "collected": len(self.watch.frames),
            "stopped": stopped,
        }

    def means(self) -> dict[str, float | None]:
        """Over the second half of the frames, without one that broke the run: temperature, pressure and density where there are any; and the
        drift of what is conserved.

        The drift is the slope of a line through the conserved energy of that half, None below 1 ps and for thermostats that conserve nothing.
        """
        half = np.array(self.rows[self.n_sound // 2 : self.n_sound]).reshape(-1, len(COLUMNS))
        time, temperature, conserved, pressure, volume = (
            half[:, COLUMNS.index(name)] for name in ("time_fs", "temperature_K", "conserved_energy_eV", "pressure_GPa", "volume_A3")
        )
        grams = self.atoms.get_masses().sum() * units._amu * 1e3
        drift = None
        if len(half) > 2 and time[-1] - time[0] >= 1000 and np.isfinite(conserved).all():  # in less, what it swings by is no drift
            drift = float(np.polyfit(time / 1000, 1000 * conserved / len(self.atoms), 1)[0])
        return {
            "mean_temperature_K": None if (mean := _mean(temperature)) is None else round(mean, 2),
            "mean_pressure_GPa": _mean(pressure),
            "mean_density_g_per_cm3": _mean(grams / (volume * 1e-24)),
            "energy_drift_meV_per_atom_per_ps": drift,
        }

    def close(self) -> None:
        """Close the files; a run that did not come to its first frame leaves none."""
        self.table.close()
        self.trajectory.close()
        if not self.rows:
            for name in (TRAJECTORY, TABLE, STATE):
                (self.config.out / name).unlink(missing_ok=True)


def _mean(values: np.ndarray) -> float | None:
    """None for no values, and for those of structures that have none."""
    return float(values.mean()) if len(values) and np.isfinite(values).all() else None


def _cut_back(trajectory: Path, table: Path, kept: int) -> list[list[str]]:
    """Drop the frames and the rows of the log after the first ``kept``; returns the rows that stay.

    Raises:
        ValueError: one of the two cannot be read.
    """
    try:
        with open(table, encoding="utf-8", newline="") as file:
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
