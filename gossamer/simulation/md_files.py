"""Molecular dynamics of several structures: one after the other on ASE, or many at once on TorchSim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from gossamer.data.atoms import as_atoms
from gossamer.settings import configured
from gossamer.simulation.md import as_calculator, foretell, md, way_before
from gossamer.simulation.options import MDConfig, Way
from gossamer.simulation.recorder import stored_settings
from gossamer.simulation.several import Job, failed, jobs


def md_files(
    model: Any, structures: Sequence[Path | str] | Path | str, config: MDConfig | None = None, *, progress: bool = True, **options: Any
) -> list[dict[str, Any]]:
    """Run molecular dynamics of several structures, each in a folder of its own within ``config.out``; one that fails or breaks does not
    stop the others.

    Args:
        model: Saved potential, potential, or (with ASE) any ASE calculator.
        structures: Files, or one; the folders have their names, with ``config.all_frames`` and the frame's number.
        config: Options of each, as an object. With ``resume`` every run goes on from its state, and those without one begin.
        progress: Show a progress bar.
        options: Options by name; they replace those of ``config``.

    Returns:
        For each structure "structure" and either the answer of ``md`` or "error". SIGTERM ends them all, states saved.

    Raises:
        TypeError: something else than files, such as Atoms.
        ValueError: two files of one name, or options that TorchSim does not have.
        ImportError: TorchSim is not installed.
    """
    config = configured(MDConfig, config, options)
    if config.collect is not None:
        raise ValueError(
            "collect writes the frames of one run to one file. Run structures one by one, or stop them (max_uncertainty alone)."
        )
    found, answers = jobs(structures, config.frame, config.all_frames, "folders", "md")
    run = _on_torchsim if config.engine == "torchsim" else _on_ase
    return answers + run(model, found, config, progress)


def _for(job: Job, number: int, config: MDConfig) -> MDConfig:
    return replace(config, out=config.out / job.name, frame=job.frame, all_frames=False, seed=config.seed + number)


def _on_ase(model: Any, found: Sequence[Job], config: MDConfig, progress: bool) -> list[dict[str, Any]]:
    """One structure after the other, with one calculator: what is compiled serves all that follow.

    A resumed run that began in another way goes on in that, with a calculator of its own.
    """
    calculators: dict[Way, BaseCalculator] = {}
    answers = []
    for number, job in enumerate(found):
        one = _for(job, number, config)
        try:
            state_file = one.out / "state.npz"
            way = way_before(one, stored_settings(state_file) if one.resume and state_file.exists() else None)
            if way not in calculators:
                calculators[way] = as_calculator(model, config.device, config.dtype, way, dispersion=config.dispersion)
            if calculators[way] is not model:
                # as many steps as are left of all, of structures like this one
                foretell(calculators[way], config.steps * (len(found) - number), as_atoms(job.path, job.frame, config.supercell))
            one = replace(one, engine="ase", way="auto", dtype=None, device="cpu", dispersion=None)
            answer = md(calculators[way], job.path, one, progress=progress)
        except (ValueError, RuntimeError, OSError) as error:
            answers.append(failed(job.said, error))
            continue
        answers.append({"structure": job.said, **answer})
        if answer["stopped"]:
            break
    return answers


def _on_torchsim(model: Any, found: Sequence[Job], config: MDConfig, progress: bool) -> list[dict[str, Any]]:
    """Many at once."""
    from gossamer.potential import Potential
    from gossamer.potential_file import as_potential
    from gossamer.simulation.md_batched import ENSEMBLES, md_batched
    from gossamer.simulation.torchsim import check_atoms

    if not isinstance(model, str | Path | Potential):
        raise ValueError(f"TorchSim runs potentials, found a calculator ({type(model).__name__}). Choose engine ase.")
    potential = as_potential(model, config.device, config.dtype)
    if config.ensemble not in ENSEMBLES:
        raise ValueError(f"Engine torchsim runs {' and '.join(ENSEMBLES)}, not {config.ensemble}. Choose one of them, or engine ase.")
    answers: dict[Path, dict[str, Any]] = {}
    chosen: list[tuple[Atoms, MDConfig]] = []
    named: dict[Path, str] = {}
    for number, job in enumerate(found):
        one = _for(job, number, config)
        named[one.out] = job.said
        try:
            atoms = as_atoms(job.path, job.frame, config.supercell)
            check_atoms(potential, atoms)
            chosen.append((atoms, one))
        except (ValueError, OSError) as error:
            answers[one.out] = failed(job.said, error)
    for out, answer in md_batched(potential, chosen, config, progress):
        answers[out] = {"structure": named[out], **answer} if isinstance(answer, dict) else failed(named[out], answer)
    return [answers[out] for out in named if out in answers]
