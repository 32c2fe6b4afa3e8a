"""Simulations under judgement: protocols, how they start, what they leave, and what they are compared with.

Protocols of "Forces are not enough" (Fu et al., TMLR 2023, arXiv:2210.07237).
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.io.trajectory import Trajectory
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import Stationary
from ase.optimize import FIRE
from numpy.typing import NDArray

from gossamer.checks.candidate import Candidate, molecule_in
from gossamer.data.atoms import read_frames
from gossamer.files import InputError, atomic_path, write_json
from gossamer.simulation.md import bring_to_rest, draw_momenta, md

log = logging.getLogger(__name__)
Array = NDArray[np.float64]
COVALENT = frozenset(["H", "B", "C", "N", "O", "F", "Si", "P", "S", "Cl", "Ge", "As", "Se", "Br", "Te", "I"])
"""elements whose bonds keep their lengths: neighbours in metals and salts move by half an Å and more at room temperature"""


@dataclass(frozen=True)
class Protocol:
    """How a system is simulated and what is asked of it."""

    ensemble: str = "langevin"
    temperature: float = 300.0
    timestep: float = 0.5
    """fs"""
    thermostat_time: float = 100.0
    """fs"""
    interval: int = 20
    """steps between frames"""
    picoseconds: float | None = None
    """None: the effort decides"""
    window: float = 1.0
    """ps of trajectory in each radial distribution of the stability test"""
    skip: float = 0.0
    """ps dropped before structure and diffusion are measured; 0 drops the first half, but no more than that is ever dropped"""
    species: str | None = None
    """element whose diffusion is measured; None takes all atoms"""
    yields: bool = False
    """a structure's own temperature_K goes before its temperature"""


PROTOCOLS = {
    "lips": Protocol("nose-hoover", 520.0, 0.25, 5.0, 50, 50.0, 1.0, 5.0, "Li"),
    "water": Protocol("langevin", 300.0, 0.5, 100.0, 100, 50.0, 2.0, 5.0, "O"),
    "methane": Protocol("langevin", 300.0, 0.5, 100.0, 100, 50.0, 2.0, 5.0, "C"),
    "molecule": Protocol("nose-hoover", 500.0, 0.5, 10.0, 20, 300.0, 1.0, 0.0, None),
    "electrolyte": Protocol("nose-hoover", 600.0, 1.0, 100.0, 100, 1000.0, 1.0, 50.0, "Li", yields=True),
}
"""lips, water, methane, molecule: Fu et al. and LEIGNN; electrolyte: 1 ns at the reference temperature (Geodite; step and thermostat are ours)"""
TEMPERATURE = "temperature_K"
"""entry of info of structures"""


def prepare(
    calculator: Any, atoms: Atoms, temperature: float, timestep: float, picoseconds: float, ensemble: str = "langevin", seed: int = 0
) -> tuple[Atoms, str]:
    """A start for which the given frame is not to blame: relaxed a little, then equilibrated.

    A frame of a hot run, or one made by hand, holds potential energy that heats a simulation at once and has nothing to do
    with the potential under judgement. At most 50 steps of FIRE take it out (down to 0.1 eV/Å); velocities of twice the
    temperature follow, half of which goes into vibrations, and Langevin dynamics with a friction of 1/(20 fs).

    Args:
        calculator: ASE calculator.
        atoms: Not changed; velocities they may have are not used.
        temperature: K.
        timestep: fs.
        picoseconds: Of Langevin dynamics.
        ensemble: Of the simulation to come: where it keeps the rotation of a molecule, this starts without.
        seed: Of velocities and noise.

    Returns:
        The start with its momenta, and a sentence on how it was made. If preparing it ends in nonsense, the frame as given
        with velocities of the temperature, so that the simulation shows what happens.
    """
    work = atoms.copy()
    work.calc = calculator
    rng = np.random.default_rng(seed)
    before = _largest_force(work)
    hottest = 5 * temperature + 500
    relaxation = FIRE(work, logfile=None)
    relaxation.run(fmax=0.1, steps=50)
    after = _largest_force(work)
    draw_momenta(work, 2 * temperature, rng)
    Stationary(work, preserve_temperature=False)
    steps = max(1, round(picoseconds * 1000 / timestep))
    try:
        sane = np.isfinite(after)
        for _ in Langevin(work, timestep * units.fs, temperature_K=temperature, friction=0.05 / units.fs, rng=rng, fixcm=False).irun(steps):
            sane = sane and work.get_temperature() < hottest
            if not sane:
                break
    except (ValueError, ArithmeticError) as error:
        log.info("preparing a start ended: %s", error)
        sane = False
    if not sane:
        start = atoms.copy()
        draw_momenta(start, temperature, np.random.default_rng(seed))
        bring_to_rest(start, ensemble)
        return start, "as given, since relaxing and equilibrating it ended in nonsense"
    bring_to_rest(work, ensemble)
    work.calc = None
    return work, (
        f"relaxed by {relaxation.nsteps} steps (largest force {before:.2g} to {after:.2g} eV/Å), "
        f"then {steps * timestep / 1000:g} ps with a thermostat at {temperature:g} K"
    )


def _largest_force(atoms: Atoms) -> float:
    return float(np.linalg.norm(atoms.get_forces(), axis=1).max())


def prepared(candidate: Candidate, folder: Path, atoms: Atoms, protocol: Protocol) -> tuple[Atoms, str]:
    """The start of a simulation, kept in its folder so that a continued one begins the same."""
    kept, said = folder / "start.traj", folder / "start.json"
    if kept.exists() and said.exists():
        with Trajectory(kept) as reader:
            return reader[0], json.loads(said.read_text("utf-8"))["prepared"]
    start, sentence = prepare(
        candidate.calculator, atoms, protocol.temperature, protocol.timestep, candidate.effort.equilibration_ps, protocol.ensemble
    )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(kept) as temporary, Trajectory(temporary, "w") as writer:
        writer.write(start)
    write_json(said, {"prepared": sentence})
    return start, sentence


def simulate(candidate: Candidate, name: str, atoms: Atoms, protocol: Protocol, picoseconds: float, label: str = "") -> dict[str, Any]:
    """Run (or go on with) the simulation of a system in the candidate's folder.

    Returns:
        The answer of `gossamer.md`, with "folder", "interval_ps" (between frames) and "prepared" (how the start was made).
    """
    folder = candidate.folder / "dynamics" / f"{name}{label}"
    steps = round(picoseconds * 1000 / protocol.timestep)
    interval = min(protocol.interval, max(1, steps // 50))
    start, sentence = prepared(candidate, folder, atoms, protocol)
    candidate.expect(steps, start)
    answer = md(
        candidate.calculator, start, temperature=protocol.temperature, steps=steps, timestep=protocol.timestep, ensemble=protocol.ensemble,
        out=folder, interval=interval, thermostat_time=protocol.thermostat_time, seed=0, resume=(folder / "state.npz").exists(),
        max_bond_stretch=0.5 if bonds_last(atoms) else None, progress=candidate.progress,
    )  # fmt: skip
    if answer["stopped"]:
        raise KeyboardInterrupt(answer["stopped"])  # the whole judgement ends; the next one goes on from here
    return {**answer, "folder": folder, "interval_ps": interval * protocol.timestep / 1000, "prepared": sentence}


def bonds_last(atoms: Atoms) -> bool:
    """Whether it is a molecule, of which a right potential breaks no bond."""
    return set(atoms.symbols) <= COVALENT and (not atoms.pbc.any() or molecule_in(atoms) is not None)


def read_trajectory(folder: Path) -> tuple[list[Atoms], dict[str, Array]]:
    """Frames, and the columns of log.csv."""
    with Trajectory(folder / "trajectory.traj") as reader:
        frames = [reader[k] for k in range(len(reader))]
    with open(folder / "log.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return frames, {key: np.array([float(r[key]) for r in rows]) for key in rows[0]}


def whole(frames: Sequence[Atoms]) -> list[Atoms]:
    """Frames of a molecule without the box in which it may be."""
    return [molecule_in(frame) or frame for frame in frames]


def read_reference(path: str, atoms: Atoms) -> list[Atoms]:
    """Frames of a reference trajectory of a system; of a molecule without the box in which it may be.

    Raises:
        ValueError: it is of other elements, or periodic along other axes.
    """
    frames = read_frames(path) if atoms.pbc.any() else whole(read_frames(path))
    for k, frame in enumerate(frames):
        if set(frame.symbols) != set(atoms.symbols) or (frame.pbc != atoms.pbc).any():
            raise InputError(
                f"'{path}' frame {k} is {frame.get_chemical_formula()} with pbc {frame.pbc.tolist()}, and the system "
                f"{atoms.get_chemical_formula()} with {atoms.pbc.tolist()}: a reference has the elements and the periodicity of its system."
            )
    return frames
