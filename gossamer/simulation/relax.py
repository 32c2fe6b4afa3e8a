"""Relaxation of positions, and of the cell where asked, on ASE's optimisers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.filters import FrechetCellFilter
from ase.io.trajectory import Trajectory
from ase.optimize import FIRE, LBFGS

from gossamer.data.atoms import as_atoms
from gossamer.files import atomic_path
from gossamer.simulation.md import as_calculator
from gossamer.simulation.state import numbers_of, put_back

OPTIMIZERS = {"fire": FIRE, "lbfgs": LBFGS}


def relax(
    model: Any,
    structure: Atoms | Path | str,
    fmax: float = 0.01,
    steps: int = 500,
    cell: bool = False,
    optimizer: str = "fire",
    out: Path | str | None = None,
    resume: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Minimise the energy until no force is above ``fmax``.

    Args:
        model: Saved potential, potential, or any ASE calculator.
        structure: Atoms or a file. Atoms passed in are not changed.
        fmax: eV/Å.
        steps: Most steps taken.
        cell: Relax the cell too (FrechetCellFilter; needs stress).
        optimizer: "fire" or "lbfgs".
        out: File of the relaxed structure (extxyz); beside it the path (``.traj``) and the optimiser's memory (``.state.npz``).
        resume: Go on from the files beside ``out``, exactly as if never stopped. Give the original structure again.
        device: Of a potential read from a file.
        dtype: Of a potential read from a file.

    Returns:
        converged, steps, energy_eV, max_force_eV_per_A, volume_A3 (None without a cell), and "atoms".

    Raises:
        ValueError: an unknown optimiser, a cell asked for without periodicity or stress, nothing to resume.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer '{optimizer}' is unknown. Choose one of {', '.join(OPTIMIZERS)}.")
    if not fmax > 0 or not steps > 0:
        raise ValueError(f"fmax and steps must be positive, found {fmax} and {steps}.")
    atoms = as_atoms(structure)
    atoms.calc = as_calculator(model, device, dtype)
    if cell and not atoms.pbc.all():
        raise ValueError(f"Relaxing the cell needs periodicity along all axes, found pbc {atoms.pbc.tolist()}.")
    if cell and getattr(atoms.calc, "conservative", True) is False:
        raise ValueError("Relaxing the cell needs stress, which a potential with direct forces does not have.")
    if resume and out is None:
        raise ValueError("resume needs out: the files beside it hold the relaxation.")
    # made from the original cell also when resuming, since the filter measures strain from there
    target = FrechetCellFilter(atoms) if cell else atoms
    if out is None:
        algorithm = OPTIMIZERS[optimizer](target, logfile=None)
        converged = bool(algorithm.run(fmax=fmax, steps=steps))
    else:
        path, memory = Path(out).with_suffix(".traj"), Path(out).with_suffix(".state.npz")
        stored = _go_back(atoms, path, memory, [optimizer, str(cell)]) if resume else {}
        with Trajectory(path, "a" if resume else "w", atoms) as trajectory:
            algorithm = OPTIMIZERS[optimizer](target, logfile=None)
            put_back(algorithm, stored)

            def record() -> None:
                if algorithm.nsteps > int(stored.get("nsteps", -1)):
                    trajectory.write()
                    with atomic_path(memory) as temporary:
                        state: dict[str, Any] = {f"optimizer.{k}": v for k, v in numbers_of(algorithm).items()}
                        np.savez(
                            temporary,
                            kind=[optimizer, str(cell)],
                            numbers=atoms.numbers,
                            positions=atoms.positions,
                            cell=atoms.cell.array,
                            **state,
                        )

            algorithm.attach(record)
            converged = bool(algorithm.run(fmax=fmax, steps=max(0, steps - algorithm.nsteps)))
        with atomic_path(out) as temporary:
            ase.io.write(temporary, atoms, format="extxyz")
    return {
        "converged": converged,
        "steps": algorithm.nsteps,
        "energy_eV": float(atoms.get_potential_energy()),
        "max_force_eV_per_A": float(np.linalg.norm(atoms.get_forces(), axis=1).max()),
        "volume_A3": float(atoms.get_volume()) if atoms.pbc.all() else None,
        "atoms": atoms,
    }


def _go_back(atoms: Atoms, path: Path, memory: Path, kind: list[str]) -> dict[str, Any]:
    """Put the atoms where a relaxation left them; returns the optimiser's numbers."""
    if not (path.exists() and memory.exists()):
        raise ValueError(f"There is nothing to resume: '{memory}' does not exist. Start without --resume.")
    with np.load(memory, allow_pickle=False) as data:
        stored = {k: data[k] for k in data.files}
    if not np.array_equal(stored["numbers"], atoms.numbers):
        raise ValueError(f"'{memory}' belongs to other atoms than this structure. Resume with the same structure, or choose another --out.")
    if stored["kind"].tolist() != kind:
        raise ValueError(
            f"'{memory}' was made with optimizer and cell {stored['kind'].tolist()}, now {kind}. Resume with the same options."
        )
    atoms.set_cell(stored["cell"])
    atoms.set_positions(stored["positions"])
    return {k.removeprefix("optimizer."): v for k, v in stored.items() if k.startswith("optimizer.")}
