"""Molecular dynamics of many structures at once on TorchSim's steps, each with a log, a trajectory, a guard and a state of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_sim
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor
from torch_sim.integrators import MDState
from tqdm import tqdm

from gossamer.files import locked
from gossamer.potential import Potential
from gossamer.random_stream import RandomStream
from gossamer.signals import StopRequested
from gossamer.simulation.batched import batches
from gossamer.simulation.calculator import digest_of
from gossamer.simulation.guard import Guard, SimulationBroken
from gossamer.simulation.md import check_options, give_velocities
from gossamer.simulation.options import MDConfig
from gossamer.simulation.recorder import STATE, Recorder, begun, read_state, run_settings, state_of, stored_settings, write_broken
from gossamer.simulation.state import belonging, put_back_atoms
from gossamer.simulation.torchsim import TorchSimModel
from gossamer.simulation.uncertain import UncertainError

try:  # from 0.4 on: steps are functions, and noise belongs to the state
    from torch_sim.integrators.nve import nve_step
    from torch_sim.integrators.nvt import nvt_langevin_step
except ImportError:
    from torch_sim.integrators import nve, nvt_langevin

    nve_step = nvt_langevin_step = None

log = logging.getLogger(__name__)
ENSEMBLES = ("nve", "langevin")
MOST = 250
"""structures in a batch: each holds two files open"""
LEAP = 5.0
"""Å that no atom may move in one step"""
Step = Callable[[Any, Tensor], Any]
"""(state, kT (G,) in eV) -> state one time step later"""


@dataclass
class _Clock:
    """What the recorder asks of an integrator."""

    nsteps: int = 0


@dataclass
class _Walker:
    """One structure on its way."""

    atoms: Atoms
    config: MDConfig
    clock: _Clock
    recorder: Recorder
    began: float = field(default_factory=time.perf_counter)

    def answer(self, broken: str | None = None, uncertain: str | None = None, stopped: str | None = None) -> dict[str, Any]:
        """What `md` returns of it; its files are closed."""
        self.recorder.close()
        return self.recorder.answer(time.perf_counter() - self.began, broken, uncertain, stopped)


def md_batched(
    potential: Potential, structures: Sequence[tuple[Atoms, MDConfig]], config: MDConfig, progress: bool = True
) -> Iterator[tuple[Path, dict[str, Any] | Exception]]:
    """Run structures in batches of at most 2048 atoms, one batch after the other.

    Args:
        potential: Any.
        structures: Atoms, and the options of each, which differ in nothing but ``out`` and ``seed``.
        config: The options that all share.
        progress: Show a progress bar.

    Yields:
        The folder, and the answer of ``md``, or the error that kept a structure from starting. SIGTERM ends the batch and the list, with
        "stopped" in all that were running.
    """
    model = TorchSimModel(potential, config.way, compute_stress=potential.conservative, dispersion=config.dispersion)
    blocks = [part for batch in batches([a for a, _ in structures]) for part in (batch[k : k + MOST] for k in range(0, len(batch), MOST))]
    with StopRequested() as stop, tqdm(total=config.steps * len(structures), unit="step", disable=None if progress else True) as bar:
        for block in blocks:
            with ExitStack() as locks:
                walkers: list[_Walker] = []
                for k in block:
                    atoms, one = structures[k]
                    try:
                        locks.enter_context(locked(one.out))
                        walkers.append(_start(atoms, one, model))
                    except (ValueError, RuntimeError, OSError) as error:
                        yield one.out, error
                bar.update(sum(w.clock.nsteps for w in walkers))
                yield from _run(model, walkers, config, stop, bar)
            if stop.requested:
                log.warning("%s: stopped; the states are saved, --resume goes on", stop.signal)
                return


def _start(atoms: Atoms, config: MDConfig, model: TorchSimModel) -> _Walker:
    """A structure at its start, or where its stored run was."""
    state_file, resumed = config.out / STATE, begun(config)
    check_options(config)
    give_velocities(atoms, config, np.random.default_rng(config.seed))
    who = belonging(atoms, digest_of(model.potential, model.engine.dispersion))
    clock, settings, guard = _Clock(), run_settings(config, model.engine.way, who), Guard.of(atoms, config)
    if resumed:
        stored = read_state(state_file, stored_settings(state_file), settings, atoms)
        with state_of(state_file):
            put_back_atoms(atoms, stored)
            clock.nsteps = int(stored["integrator.nsteps"])
    return _Walker(atoms, config, clock, Recorder(config, atoms, clock, settings, guard, resumed))


def _run(
    model: TorchSimModel, walkers: list[_Walker], config: MDConfig, stop: StopRequested, bar: Any
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Move a batch until each has taken its steps, has broken, or all are told to stop; those that are done, some from the start, leave it."""
    for walker in [w for w in walkers if w.clock.nsteps >= config.steps]:
        yield walker.config.out, walker.answer()
    walkers = [w for w in walkers if w.clock.nsteps < config.steps]
    if not walkers:
        return
    watched, model.instead = _Watched(model), float("nan")
    seed = int(np.random.SeedSequence([config.seed, *(w.clock.nsteps for w in walkers)]).generate_state(1)[0])
    numbers = RandomStream(seed, model.device)
    noise = torch.Generator(model.device).manual_seed(seed)
    step = _stepper(watched, config)
    state = _state(watched, walkers, noise)
    with suppress(ValueError):  # of one that is refused, and leaves the batch now
        model.engine.expect(config.steps, watched.graph(state))
    done = _look(watched, state, walkers, [w.clock.nsteps == 0 for w in walkers])
    while True:
        for k, answer in done.items():
            yield walkers[k].config.out, answer
        if done:
            walkers = [w for k, w in enumerate(walkers) if k not in done]
            if not walkers:
                return
            state = _state(watched, walkers, noise)
        with numbers.drawn():  # TorchSim 0.3 draws global ones
            state = step(state, _temperatures(walkers, state))
        for walker in walkers:
            walker.clock.nsteps += 1
        bar.update(len(walkers))
        due = [w.clock.nsteps % config.interval == 0 or w.clock.nsteps >= config.steps for w in walkers]
        done = _look(watched, state, walkers, due, None if stop.signal is None else stop.signal.name)


def _look(
    watched: _Watched, state: Any, walkers: Sequence[_Walker], due: Sequence[bool], stopped: str | None = None
) -> dict[int, dict[str, Any]]:
    """Record those that are due; answers of those that leave the batch, by their place in it. If any leaves, all atoms are up to date."""
    leap = state.forces.isfinite().all(dim=1) & ((state.velocities * watched.timestep).norm(dim=1) < LEAP)
    if leap.all() and not any(due) and stopped is None:
        return {}
    refused = watched.model.refused
    sound = np.array([part.all().item() for part in torch.split(leap, [len(w.atoms) for w in walkers])])
    _bring_back(watched, state, walkers)
    done: dict[int, dict[str, Any]] = {}
    for k, walker in enumerate(walkers):
        step = walker.clock.nsteps
        finished = step >= walker.config.steps
        try:
            if not sound[k]:
                raise SimulationBroken(refused.get(k, f"an atom moves more than {LEAP:g} Å in a step"))
            if due[k] and (step % walker.config.interval == 0):
                walker.recorder()
            elif finished:
                walker.recorder.finish()
            elif stopped is not None:
                walker.recorder.save_state()
        except UncertainError as error:
            done[k] = walker.answer(uncertain=f"step {step} ({step * walker.config.timestep / 1000:.3f} ps): {error}")
            continue
        except SimulationBroken as error:
            done[k] = walker.answer(broken=write_broken(walker.atoms, step, walker.config, error))
            continue
        if finished or stopped is not None:
            done[k] = walker.answer(stopped=None if finished else stopped)
    return done


# --- between TorchSim's states and ASE's atoms ---------------------------------------------------------------------


class _Watched:
    """A model for TorchSim's steps that keeps what it said last, so that a logged frame costs no evaluation of its own.

    The steps of TorchSim 0.3 wrap atoms into their cells, after which neighbour lists are made anew: they see no periodicity, the model does.
    """

    def __init__(self, model: TorchSimModel) -> None:
        self.model, self.device, self.dtype = model, model.device, model.dtype
        self.last: dict[str, Tensor] = {}
        self.pbc: Any = False
        self.timestep = 0.0

    def __call__(self, state: Any) -> dict[str, Tensor]:
        self.last = self.model(self._periodic(state))
        return self.last

    def graph(self, state: Any) -> Any:
        return self.model.graph(self._periodic(state))

    def _periodic(self, state: Any) -> dict[str, Any]:
        return {**vars(state), "system_idx": state.system_idx, "pbc": self.pbc}


def _stepper(watched: _Watched, config: MDConfig) -> Step:
    """One step of the ensemble, in ASE's units, which are TorchSim's: Å, eV, amu."""

    def constant(value: float) -> Tensor:
        return torch.tensor(value, dtype=watched.dtype, device=watched.device)

    watched.timestep = config.timestep * units.fs
    dt, gamma, model = constant(watched.timestep), constant(1 / (config.thermostat_time * units.fs)), watched
    if nve_step is None:
        if config.ensemble == "nve":
            update = nve(model=model, dt=dt, kT=constant(0.0))[1]
            return lambda state, kT: update(state, dt=dt)
        update = nvt_langevin(model=model, dt=dt, kT=constant(0.0), gamma=gamma)[1]
        return lambda state, kT: update(state, dt=dt, kT=kT, gamma=gamma)
    if config.ensemble == "nve":
        return lambda state, kT: nve_step(state, model, dt=dt)
    return lambda state, kT: nvt_langevin_step(state, model, dt=dt, kT=kT, gamma=gamma)


def _temperatures(walkers: Sequence[_Walker], state: Any) -> Tensor:
    """kT (G,) in eV of the thermostat at the step to come."""
    kelvin = []
    for walker in walkers:
        config, temperature = walker.config, walker.config.temperature
        if config.temperature_end is not None:
            temperature += walker.clock.nsteps / config.steps * (config.temperature_end - temperature)
        kelvin.append(temperature)
    return torch.tensor(kelvin, dtype=state.dtype, device=state.device) * units.kB


def _state(watched: _Watched, walkers: Sequence[_Walker], noise: torch.Generator) -> Any:
    """TorchSim's state of the atoms, with their momenta, and forces evaluated."""
    plain = [Atoms(w.atoms.numbers, w.atoms.positions, cell=w.atoms.cell, pbc=w.atoms.pbc, masses=w.atoms.get_masses()) for w in walkers]
    bare = torch_sim.initialize_state(plain, watched.device, watched.dtype)
    watched.pbc = bare.pbc
    found = watched(bare)
    kept = {name: getattr(bare, name) for name in ("positions", "masses", "cell", "atomic_numbers", "system_idx")}
    momenta = torch.as_tensor(np.concatenate([w.atoms.get_momenta() for w in walkers]), dtype=watched.dtype, device=watched.device)
    state = MDState(**kept, pbc=False, momenta=momenta, energy=found["energy"], forces=found["forces"])
    if nve_step is not None:
        state.rng = noise
    return state


def _bring_back(watched: _Watched, state: Any, walkers: Sequence[_Walker]) -> None:
    """Put positions (continuous across boundaries, which TorchSim does not see), momenta and results into the atoms."""
    positions, momenta, forces = (t.detach().cpu().numpy() for t in (state.positions, state.momenta, state.forces))
    energies = state.energy.detach().cpu().numpy()
    stress = watched.last["stress"].detach().cpu().numpy() if "stress" in watched.last else None
    doubt = watched.model.uncertainties()
    start = 0
    for k, walker in enumerate(walkers):
        atoms, part = walker.atoms, slice(start, start + len(walker.atoms))
        start += len(atoms)
        atoms.positions = positions[part]
        atoms.set_momenta(momenta[part])
        results: dict[str, Any] = {"energy": float(energies[k]), "free_energy": float(energies[k]), "forces": forces[part].copy()}
        if stress is not None and atoms.pbc.all():
            results["stress"] = full_3x3_to_voigt_6_stress(stress[k])
        if doubt is not None:
            results["forces_uncertainty"] = doubt[part]
        atoms.calc = SinglePointCalculator(atoms)
        atoms.calc.results = results
