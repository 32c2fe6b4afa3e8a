"""Relaxation of positions, and of the cell where asked, on ASE's optimisers."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.filters import FrechetCellFilter
from ase.io.formats import UnknownFileTypeError, filetype
from ase.io.formats import ioformats as FORMATS
from ase.io.trajectory import Trajectory
from ase.optimize import FIRE, LBFGS

from gossamer.data.atoms import as_atoms
from gossamer.data.npz_file import read_npz
from gossamer.files import atomic_path, locked, say_replaced
from gossamer.potential import Potential
from gossamer.potential_file import as_potential
from gossamer.settings import configured
from gossamer.signals import StopRequested
from gossamer.simulation.md import as_calculator, foretell, has_direct_forces, identity_of, way_of
from gossamer.simulation.options import RelaxConfig
from gossamer.simulation.several import Job, failed, jobs
from gossamer.simulation.state import (
    CHARGED,
    ELECTRONS,
    belonging,
    check_energy,
    cut_trajectory,
    numbers_of,
    put_back,
    put_back_atoms,
    start_of,
    strange,
)

log = logging.getLogger(__name__)
OPTIMIZERS = {"fire": FIRE, "lbfgs": LBFGS}
STEPS = 60
"""of a typical relaxation: decides, before any is done, whether compiling the potential pays"""
KEPT_ARRAYS = ("numbers", "positions", "tags", "masses", *ELECTRONS)
"""what a relaxed structure keeps of the frame it came from, beside names: all else (velocities, labels, times) was said of other positions"""


def relax(model: Any, structure: Atoms | Path | str, config: RelaxConfig | None = None, **options: Any) -> dict[str, Any]:
    """Minimise the energy until no force is above ``fmax``.

        relax("potential.safetensors", "crystal.cif", cell=True, out="relaxed.cif")

    Args:
        model: Saved potential, potential, or any ASE calculator (which is not changed).
        structure: Atoms or a file. Atoms passed in are not changed.
        config: Options as an object; ``RelaxConfig`` says which there are.
        options: Options by name; they replace those of ``config``.

    Returns:
        converged, steps, energy_eV, max_force_eV_per_A, volume_A3 (None without a cell), stopped (the name of the signal that ended
        it early, SIGTERM, or None: then ``out`` is not written, but what ``resume`` needs is), and "atoms".

    Raises:
        ValueError: unknown options, a cell asked for without periodicity or stress, a file format that cannot be written, nothing to resume.
        FileExistsError: a file would be written over that is the structure, the path (.traj) of no relaxation, or of one that was stopped.
        RuntimeError: another process writes the same file.
    """
    config = configured(RelaxConfig, config, options)
    if config.engine != "ase" or config.all_frames:
        raise ValueError("engine and all_frames are for several structures: gossamer.relax_files, or the command line.")
    atoms = as_atoms(structure, config.frame, config.supercell)
    atoms.calc = as_calculator(model, config.device, config.dtype, config.way, dispersion=config.dispersion)
    if config.cell and not atoms.pbc.all():
        raise ValueError(f"Relaxing the cell needs periodicity along all axes, found pbc {atoms.pbc.tolist()}.")
    if config.cell and has_direct_forces(atoms.calc):
        raise ValueError("Relaxing the cell needs stress, which a potential with direct forces does not have.")
    if config.out is None:
        if config.resume:
            raise ValueError("resume needs out: the files beside it hold the relaxation.")
        algorithm, stopped = _algorithm(atoms, config), None
        converged = bool(algorithm.run(fmax=config.fmax, steps=config.steps))
    else:
        kind = _format(config.out)
        if kind == "vasp" and atoms.cell.rank < 3:
            raise ValueError(
                f"'{config.out}': VASP's format needs a cell, and the structure has none along {3 - atoms.cell.rank} of its axes. Choose another "
                "--out, for example relaxed.extxyz."
            )
        _keep_input(structure, config.out)
        with locked(config.out.parent, config.out.name):
            if not config.resume:
                _check_path(structure, config.out)
                say_replaced(config.out)
            converged, stopped, algorithm = _relax_to_disk(atoms, config, config.out)
            if stopped is None:
                with atomic_path(config.out) as temporary:
                    ase.io.write(temporary, _bare(atoms), format=kind)
    return {
        "converged": converged,
        "steps": algorithm.nsteps,
        "energy_eV": float(atoms.get_potential_energy()),
        "max_force_eV_per_A": float(np.linalg.norm(atoms.get_forces(), axis=1).max()),
        "volume_A3": float(atoms.get_volume()) if atoms.pbc.all() else None,
        "stopped": stopped,
        "atoms": atoms,
    }


def relax_files(
    model: Any, structures: Sequence[Path | str] | Path | str, config: RelaxConfig | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Relax several structures with one calculator, each into the folder ``config.out``; one that fails does not stop the others.

    Args:
        model: Saved potential, potential, or (with ASE) any ASE calculator.
        structures: Files, or one; the relaxed ones have their names, with ``config.all_frames`` and the frame's number, and the ending .extxyz.
        config: Options of each, as an object. With TorchSim ``resume`` leaves out what converged before, as the files in the folder say, and
            begins the others.
        options: Options by name; they replace those of ``config``.

    Returns:
        For each structure "structure" and either the answer of ``relax`` without the atoms, with "out", or
        "error". SIGTERM ends the list.

    Raises:
        TypeError: something else than files, such as Atoms.
        ValueError: two files of one name, no folder, or options that TorchSim does not have.
        FileExistsError: ``config.out`` is a file.
        ImportError: TorchSim is not installed.
    """
    config = configured(RelaxConfig, config, options)
    folder = config.out
    if folder is None:
        raise ValueError("Several structures need out: the folder of the relaxed ones.")
    if folder.is_file():
        raise FileExistsError(f"'{folder}' is a file; several structures are relaxed into a folder. Choose another --out.")
    found, answers = jobs(structures, config.frame, config.all_frames, "relaxed ones", "relax")
    run = _on_torchsim if config.engine == "torchsim" else _on_ase
    return [{**a, "converged": False} for a in answers] + run(model, [(job, folder / f"{job.name}.extxyz") for job in found], config)


def _failed(structure: str, error: Exception) -> dict[str, Any]:
    return {"converged": False, **failed(structure, error)}


def _on_ase(model: Any, chosen: Sequence[tuple[Job, Path]], config: RelaxConfig) -> list[dict[str, Any]]:
    """One structure after the other, with one calculator: what is compiled serves all that follow.

    A resumed relaxation that began in another way goes on in that, with a calculator of its own.
    """
    calculators = {config.way: as_calculator(model, config.device, config.dtype, config.way, dispersion=config.dispersion)}
    ours = isinstance(model, str | Path | Potential)
    answers = []
    steps: list[int] = []
    for number, (job, out) in enumerate(chosen):
        memory, way = out.with_suffix(".state.npz"), config.way
        resume = config.resume and memory.exists()
        one = replace(
            config, out=out, frame=job.frame, all_frames=False, resume=resume, way="auto", dtype=None, device="cpu", dispersion=None
        )  # fmt: skip
        try:
            if resume and ours and way == "auto":
                way = str(read_npz(memory).get("way", way))  # type: ignore[assignment]
            if way not in calculators:
                calculators[way] = as_calculator(model, config.device, config.dtype, way, dispersion=config.dispersion)
            doubled = number & (number - 1) == 0  # 0, 1, 2, 4, 8 ...: asking costs evaluations, and guesses get better
            if ours and way == config.way and doubled:
                left = [o for _, o in chosen[number:] if not (config.resume and o.exists())]
                each = min(config.steps, round(sum(steps) / len(steps)) if steps else STEPS)
                foretell(calculators[way], each * len(left), as_atoms(job.path, job.frame, config.supercell))
            answer = relax(calculators[way], job.path, one)
            answers.append({"structure": job.said, **{k: v for k, v in answer.items() if k != "atoms"}, "out": str(out)})
            if not resume:
                steps.append(answer["steps"])
            if answer["stopped"]:
                break
        except (ValueError, RuntimeError, OSError) as error:
            answers.append(_failed(job.said, error))
    return answers


def _on_torchsim(model: Any, asked: Sequence[tuple[Job, Path]], config: RelaxConfig) -> list[dict[str, Any]]:
    """Many at once."""
    from gossamer.simulation.batched import done_before, relax_batched, relaxed_by
    from gossamer.simulation.torchsim import check_atoms

    if not isinstance(model, str | Path | Potential):
        raise ValueError(f"TorchSim runs potentials, found a calculator ({type(model).__name__}). Choose engine ase.")
    potential = as_potential(model, config.device, config.dtype)
    if config.optimizer != "fire":
        raise ValueError(f"TorchSim relaxes by FIRE, not by {config.optimizer}. Leave optimizer out, or choose engine ase.")
    if config.cell and not potential.conservative:
        raise ValueError("Relaxing the cell needs stress, which a potential with direct forces does not have.")
    maker = relaxed_by(potential, config)
    answers: list[dict[str, Any]] = []
    chosen: list[tuple[Atoms, Path]] = []
    named: dict[Path, str] = {}
    for job, out in asked:
        named[out] = job.said
        try:
            _keep_input(job.path, out)
            atoms = as_atoms(job.path, job.frame, config.supercell)
            before = done_before(out, atoms, config, maker) if config.resume else None
            if before is not None:
                log.info("%s: done before, in '%s'", named[out], out)
                answers.append({"structure": named[out], **before, "out": str(out)})
                continue
            check_atoms(potential, atoms)
            if config.cell and not atoms.pbc.all():
                raise ValueError(f"Relaxing the cell needs periodicity along all axes, found pbc {atoms.pbc.tolist()}.")
            chosen.append((atoms, out))
        except (ValueError, OSError) as error:
            answers.append(_failed(named[out], error))
    assert config.out is not None
    if chosen:
        if not config.resume:
            say_replaced(*(out for _, out in chosen))
        config.out.mkdir(parents=True, exist_ok=True)
        with locked(config.out, "relax"):
            for out, answer in relax_batched(potential, chosen, config, _bare):
                answers.append({"structure": named[out], **answer, **({} if "error" in answer else {"out": str(out)})})
    return answers


def _algorithm(atoms: Atoms, config: RelaxConfig) -> Any:
    """ASE's optimiser of the atoms, or of atoms and cell."""
    return OPTIMIZERS[config.optimizer](FrechetCellFilter(atoms) if config.cell else atoms, logfile=None)


def _relax_to_disk(atoms: Atoms, config: RelaxConfig, out: Path) -> tuple[bool, str | None, Any]:
    """Relax with the path and the optimiser's memory beside ``out``; whether it converged, the signal that ended it, the optimiser."""
    path, memory = out.with_suffix(".traj"), out.with_suffix(".state.npz")
    kind = [config.optimizer, str(config.cell), *([] if config.dispersion is None else [config.dispersion])]
    way = way_of(atoms.calc)
    who = {k: v for k, v in belonging(atoms, identity_of(atoms.calc)).items() if k != "masses"} | {"start": start_of(atoms)}
    algorithm = _algorithm(atoms, config)  # from the original cell also when resuming: the filter measures strain from there
    stored = _go_back(atoms, path, memory, kind, who, algorithm) if config.resume else {}

    def remember() -> None:
        state: dict[str, Any] = {f"optimizer.{k}": v for k, v in numbers_of(algorithm).items()}
        if algorithm.nsteps:
            state["energy"] = np.array(float(atoms.calc.get_potential_energy(atoms)))
        with atomic_path(memory) as temporary:
            np.savez(
                temporary, kind=kind, way=way, belonging=json.dumps(who), numbers=atoms.numbers, positions=atoms.positions,
                cell=atoms.cell.array, **state,
            )  # fmt: skip

    done = int(stored.get("nsteps", 0))
    if not stored:
        remember()  # before the path, which is known by it as a relaxation's
    with Trajectory(path, "a" if done else "w", atoms) as trajectory:

        def record() -> None:
            if algorithm.nsteps > done or not done:
                trajectory.write()
                remember()

        algorithm.attach(record)
        converged = False
        with StopRequested() as stop:
            for converged in algorithm.irun(fmax=config.fmax, steps=max(0, config.steps - algorithm.nsteps)):
                if stop.signal is not None and not converged and algorithm.nsteps < config.steps:
                    log.warning("%s: stopped at step %d; --resume goes on from '%s'", stop.signal.name, algorithm.nsteps, memory)
                    return False, stop.signal.name, algorithm
    return bool(converged), None, algorithm


def _keep_input(structure: Atoms | Path | str, out: Path) -> None:
    """Refuse to write a relaxed structure over the one that is read."""
    if not isinstance(structure, Atoms) and out.exists() and out.samefile(structure):
        raise FileExistsError(f"'{out}' is the structure that is to be relaxed, and would be written over. Choose another --out.")


def _check_path(structure: Atoms | Path | str, out: Path) -> None:
    """Refuse to write the path of a new relaxation over what is read, of no relaxation, or of one that is to go on."""
    path, memory = out.with_suffix(".traj"), out.with_suffix(".state.npz")
    if not path.exists():
        return
    if not isinstance(structure, Atoms) and path.samefile(structure):
        raise FileExistsError(f"'{path}' is read, and the path to '{out}' would be written over it. Choose another --out.")
    if memory.exists() and not out.exists() and int(read_npz(memory).get("optimizer.nsteps", 0)) > 0:
        raise FileExistsError(
            f"'{memory}' is of a relaxation that was stopped before it wrote '{out}'. Go on with it (--resume), choose another --out, or remove it."
        )
    if not memory.exists():
        raise FileExistsError(
            f"'{path}' is of no relaxation (there is no '{memory.name}' beside it), and the path to '{out}' would be written over it. "
            "Move it away, or choose another --out."
        )


def _format(out: Path) -> str:
    """ASE's name of the format that the file's name says, known before anything is relaxed."""
    advice = "Choose another --out, for example relaxed.extxyz, relaxed.cif or POSCAR."
    if out.suffix == ".traj":
        raise ValueError(f"'{out}': the path of the relaxation lies in the .traj file of this name. {advice}")
    if out.is_dir():
        raise ValueError(f"'{out}' is a folder; the relaxed structure is one file. {advice}")
    try:
        kind = str(filetype(str(out), read=False))
    except UnknownFileTypeError:  # a name without an ending
        kind = ""
    if kind not in FORMATS or not FORMATS[kind].can_write:
        raise ValueError(f"'{out}': ASE writes no file format of this name. {advice}")
    return kind


def _bare(atoms: Atoms) -> Atoms:
    """The relaxed atoms with their energy, forces (of fixed atoms too) and stress, without what was said of the frame they came from."""
    bare = atoms.copy()
    for name in set(bare.arrays) - set(KEPT_ARRAYS):
        del bare.arrays[name]
    bare.info = {k: v for k, v in bare.info.items() if isinstance(v, str) or k in CHARGED}
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(apply_constraint=False)}
    if "stress" in atoms.calc.results:
        results["stress"] = atoms.calc.results["stress"]
    bare.calc = SinglePointCalculator(bare, **results)
    return bare


def _go_back(atoms: Atoms, path: Path, memory: Path, kind: list[str], who: dict[str, str], algorithm: Any) -> dict[str, Any]:
    """Put atoms and optimiser where a relaxation left them, and its path back to there; returns the optimiser's numbers."""
    if not memory.exists():
        raise ValueError(f"There is nothing to resume: '{memory}' does not exist. Start without --resume.")
    stored = read_npz(memory)
    if not np.array_equal(stored.get("numbers", ()), atoms.numbers):
        raise ValueError(f"'{memory}' belongs to other atoms than this structure. Resume with the same structure, or choose another --out.")
    if np.ravel(stored.get("kind", ())).tolist() != kind:
        raise ValueError(
            f"'{memory}' was made with optimizer, cell and dispersion {np.ravel(stored.get('kind', ())).tolist()}, now {kind}. "
            "Resume with the same options."
        )
    others = strange(_belonging(stored, memory), who)
    if others:
        raise ValueError(f"'{memory}' belongs to something else: {others}. Resume with the same, or choose another --out.")
    numbers = {k.removeprefix("optimizer."): v for k, v in stored.items() if k.startswith("optimizer.")}
    try:
        put_back_atoms(atoms, stored)
        put_back(algorithm, numbers)
        steps = int(numbers["nsteps"])
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"'{memory}' does not hold the state of this relaxation ({type(error).__name__}: {error}). Start without --resume."
        ) from None
    check_energy(atoms, stored, memory)
    if steps and not path.exists():
        raise ValueError(f"There is nothing to resume: '{path}' does not exist. Start without --resume.")
    if steps:
        cut_trajectory(path, steps + 1)
    return numbers


def _belonging(stored: dict[str, Any], memory: Path) -> dict[str, Any]:
    """What the memory of a relaxation says that it belongs to; nothing in those of older versions."""
    try:
        return dict(json.loads(str(stored.get("belonging", "{}"))))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"'{memory}' cannot be read ({error}). Start without --resume.") from None
