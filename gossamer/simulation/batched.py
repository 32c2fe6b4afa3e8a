"""Relaxation of many structures at once on TorchSim's FIRE, in batches that finished structures leave."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch_sim
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from tqdm import tqdm

from gossamer.data.atoms import as_atoms
from gossamer.dispersion import D3
from gossamer.files import atomic_path
from gossamer.potential import Potential
from gossamer.signals import StopRequested
from gossamer.simulation.calculator import digest_of
from gossamer.simulation.options import RelaxConfig
from gossamer.simulation.state import start_of
from gossamer.simulation.torchsim import TorchSimModel

try:
    from torch_sim import CellFilter, Optimizer  # from 0.4 on

    ATOMS: dict[str, Any] = {"optimizer": Optimizer.fire}
    CELL: dict[str, Any] = {"optimizer": Optimizer.fire, "init_kwargs": {"cell_filter": CellFilter.frechet}}
except ImportError:
    from torch_sim.optimizers import fire, frechet_cell_fire

    ATOMS, CELL = {"optimizer": fire}, {"optimizer": frechet_cell_fire}

log = logging.getLogger(__name__)
BATCH_ATOMS = 2048
"""atoms evaluated at once. A batch is written when it is done; none of it is swapped for others, as TorchSim counts steps from the start of
all, and late ones would get fewer"""
BETWEEN = 5
"""steps between two looks at which structures are finished"""
TOLD = ("converged", "steps")
"""of an answer, kept in the info of a relaxed file, with who relaxed it from where"""
ROUNDED = 1e-7
"""eV/Å that forces in files may be off"""


def relax_batched(
    potential: Potential, structures: Sequence[tuple[Atoms, Path]], config: RelaxConfig, bare: Any
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Relax structures in batches, and write each when its batch is done.

    Args:
        potential: With conservative forces where the cell is relaxed.
        structures: Atoms and the file that each is written to.
        config: Options; fmax, steps, cell and way are used.
        bare: What is kept of relaxed atoms, ``(atoms) -> atoms``.

    Yields:
        The file, and "converged", "steps" (a multiple of ``BETWEEN``, but for the last), "energy_eV", "max_force_eV_per_A", "volume_A3", or "error". SIGTERM ends the list after a batch, with
        "stopped" in the last.
    """
    model = TorchSimModel(potential, config.way, compute_stress=config.cell, dispersion=config.dispersion)
    maker = relaxed_by(potential, config)
    blocks = [[structures[k] for k in batch] for batch in batches([atoms for atoms, _ in structures])]
    with StopRequested() as stop, tqdm(total=len(structures), unit="structure", disable=None) as bar:
        for number, block in enumerate(blocks):
            relaxed, steps = _relaxed(model, [atoms for atoms, _ in block], config)
            stopped = stop.signal.name if stop.signal is not None and number + 1 < len(blocks) else None
            for (start, out), atoms, n_steps in zip(block, relaxed, steps, strict=True):
                answer = _judged(model, atoms, n_steps, config)
                if "error" not in answer:
                    left = bare(atoms)
                    left.info |= {name: answer[name] for name in TOLD} | {"relaxed_by": maker, "relaxed_from": f"start {start_of(start)}"}
                    with atomic_path(out) as temporary:
                        ase.io.write(temporary, left, format="extxyz")
                bar.update()
                yield out, {**answer, "stopped": stopped}
            if stopped is not None:
                log.warning("%s: stopped after %d of %d structures; --resume goes on", stopped, bar.n, len(structures))
                return


def relaxed_by(potential: Potential, config: RelaxConfig) -> str:
    """What relaxes, in words for files: the potential's digest, its dispersion, and whether cells are relaxed."""
    d3 = None if config.dispersion is None else D3(config.dispersion)
    return f"potential {digest_of(potential, d3)}{', cell' if config.cell else ''}"


def done_before(out: Path, start: Atoms, config: RelaxConfig, maker: str) -> dict[str, Any] | None:
    """What was answered of a structure that converged before, as its file says; None where it has to be relaxed.

    Args:
        out: The file.
        start: The structure.
        config: Options; fmax is used.
        maker: What relaxes now (`relaxed_by`).

    Raises:
        ValueError: the file cannot be read, or is of other atoms, positions, another potential or other options.
    """
    if not out.exists():
        return None
    atoms = as_atoms(out)
    before = atoms.info.get("relaxed_by", maker)  # older versions did not say
    if before != maker or not np.array_equal(atoms.numbers, start.numbers):
        raise ValueError(
            f"'{out}' is {atoms.get_chemical_formula()} relaxed by {before}; now it would be {start.get_chemical_formula()} by {maker}. "
            "Relax into another folder (--out)."
        )
    if atoms.info.get("relaxed_from", began := f"start {start_of(start)}") != began:
        raise ValueError(f"'{out}' was relaxed from other positions than the structure has now. Relax into another folder (--out).")
    if atoms.calc is None or not atoms.info.get("converged", True):  # older versions did not say
        return None
    largest = float(np.linalg.norm(atoms.get_forces(apply_constraint=False), axis=1).max())
    if largest > config.fmax + ROUNDED:
        return None
    return {
        "converged": True, **({"steps": int(atoms.info["steps"])} if "steps" in atoms.info else {}), "energy_eV": float(atoms.get_potential_energy()), "max_force_eV_per_A": largest,
        "volume_A3": float(atoms.get_volume()) if atoms.pbc.all() else None, "stopped": None,
    }  # fmt: skip


def batches(structures: Sequence[Atoms]) -> list[list[int]]:
    """Indices of structures that go together: of one periodicity, as TorchSim's states have, and at most ``BATCH_ATOMS`` atoms."""
    found: list[list[int]] = []
    for kind in sorted({tuple(a.pbc.tolist()) for a in structures}):
        atoms_in = BATCH_ATOMS
        for k, atoms in enumerate(structures):
            if tuple(atoms.pbc.tolist()) != kind:
                continue
            if atoms_in + len(atoms) > BATCH_ATOMS:
                found.append([])
                atoms_in = 0
            found[-1].append(k)
            atoms_in += len(atoms)
    return found


def relax_together(model: TorchSimModel, structures: Sequence[Atoms], config: RelaxConfig) -> list[tuple[Atoms, dict[str, Any]]]:
    """Relax structures in batches, in memory.

    Args:
        model: Its potential conservative where the cell is relaxed.
        structures: Without constraints, of elements that the potential knows, positions finite.
        config: Options; fmax, steps and cell are used.

    Returns:
        For each, in their order, relaxed atoms with their results, and what ``relax_batched`` yields of it.
    """
    found: dict[int, tuple[Atoms, dict[str, Any]]] = {}
    for batch in batches(structures):
        for k, atoms, n_steps in zip(batch, *_relaxed(model, [structures[k] for k in batch], config), strict=True):
            found[k] = (atoms, _judged(model, atoms, n_steps, config))
    return [found[k] for k in range(len(structures))]


def _relaxed(model: TorchSimModel, structures: Sequence[Atoms], config: RelaxConfig) -> tuple[list[Atoms], list[int]]:
    """The structures where FIRE left them, and how many steps each took."""
    model.instead = 0.0  # TorchSim's FIRE would mix no velocities of a batch in which one is not finite
    converged = torch_sim.generate_force_convergence_fn(force_tol=config.fmax, include_cell_forces=config.cell)
    steps, left, before = np.zeros(len(structures), dtype=int), np.arange(len(structures)), model.n_evaluations

    def criterion(state: Any, last_energy: Any = None) -> Any:
        """Which of those that are left are finished, after the steps of all so far: TorchSim tells neither. One evaluation was the start's."""
        nonlocal left
        finished = converged(state, last_energy)
        steps[left] = model.n_evaluations - before - 1
        left = left[~finished.cpu().numpy()]
        return finished

    batcher = torch_sim.InFlightAutoBatcher(model, memory_scales_with="n_atoms", max_memory_scaler=sum(map(len, structures)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(max steps|maximum number of steps).*")  # "not converged" is in the answer
        final = torch_sim.optimize(
            system=[_plain(a) for a in structures], model=model, convergence_fn=criterion, autobatcher=batcher, max_steps=config.steps,
            steps_between_swaps=min(BETWEEN, config.steps), **(CELL if config.cell else ATOMS),
        )  # fmt: skip
    positions, cells = final.positions.cpu().numpy(), final.cell.transpose(1, 2).cpu().numpy()
    parts = np.split(positions, np.cumsum([len(a) for a in structures])[:-1])
    found = [a.copy() for a in structures]
    for atoms, where, cell in zip(found, parts, cells, strict=True):
        atoms.set_constraint()
        if config.cell:
            atoms.set_cell(cell)
        atoms.positions = where
    return found, steps.tolist()


def _plain(atoms: Atoms) -> Atoms:
    """Elements, positions and cell alone."""
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)


def _judged(model: TorchSimModel, atoms: Atoms, n_steps: int, config: RelaxConfig) -> dict[str, Any]:
    """What became of a structure, by forces of its own; they become its calculator's results."""
    try:
        (found,) = model.potential.predict(atoms, stress=model.potential.conservative, run=model.engine)
    except ValueError as error:
        return {"converged": False, "error": str(error).removeprefix("structure 0: ")}
    largest = float(np.linalg.norm(found["forces"], axis=1).max())
    if not np.isfinite(largest):
        return {"converged": False, "error": "its forces are not finite: atoms lie on one another"}
    worst = largest
    if config.cell:  # as ASE's FrechetCellFilter counts them
        worst = max(worst, float(np.linalg.norm(found["stress"], axis=1).max() * atoms.get_volume() / len(atoms)))
    results = {"energy": found["energy"], "forces": found["forces"]}
    if found["stress"] is not None:
        results["stress"] = full_3x3_to_voigt_6_stress(found["stress"])
    atoms.calc = SinglePointCalculator(atoms, **results)
    return {
        "converged": worst <= config.fmax, "steps": n_steps, "energy_eV": found["energy"], "max_force_eV_per_A": largest,
        "volume_A3": float(atoms.get_volume()) if atoms.pbc.all() else None,
    }  # fmt: skip
