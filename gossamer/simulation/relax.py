"""Relaxation of positions, and of the cell where asked, on ASE's optimisers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.filters import FrechetCellFilter
from ase.io.trajectory import Trajectory
from ase.optimize import BFGS, FIRE, LBFGS

from gossamer.files import atomic_path
from gossamer.simulation.md import as_atoms, as_calculator

OPTIMIZERS = {"fire": FIRE, "bfgs": BFGS, "lbfgs": LBFGS}


def relax(
    model: Any,
    structure: Atoms | Path | str,
    fmax: float = 0.01,
    steps: int = 500,
    cell: bool = False,
    optimizer: str = "fire",
    out: Path | str | None = None,
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
        optimizer: "fire", "bfgs" or "lbfgs".
        out: File of the relaxed structure (extxyz); the path is written beside it as ``.traj``.
        device: Of a potential read from a file.
        dtype: Of a potential read from a file.

    Returns:
        converged, steps, energy_eV, max_force_eV_per_A, volume_A3 (None without a cell), and "atoms".

    Raises:
        ValueError: an unknown optimiser, or a cell asked for without periodicity or stress.
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
    target = FrechetCellFilter(atoms) if cell else atoms
    if out is None:
        algorithm = OPTIMIZERS[optimizer](target, logfile=None)
        converged = bool(algorithm.run(fmax=fmax, steps=steps))
    else:
        with Trajectory(Path(out).with_suffix(".traj"), "w", atoms) as trajectory:
            algorithm = OPTIMIZERS[optimizer](target, logfile=None, trajectory=trajectory)
            converged = bool(algorithm.run(fmax=fmax, steps=steps))
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
