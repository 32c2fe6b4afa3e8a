"""Where a potential knows that it may be wrong: dynamics stop there, or collect such frames for labelling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from gossamer.files import atomic_path
from gossamer.simulation.state import bare

NAMES = ("forces_uncertainty", "forces_std")
"""entries of a calculator's results that hold the standard deviation of force components in eV/Å, for each atom or each component"""
NONE = (
    "max_uncertainty needs a potential that says how wrong it may be, and this one does not. "
    "Measure it with gossamer calibrate POTENTIAL FRAMES (docs/uncertainty.md)."
)


class UncertainError(RuntimeError):
    """A force is more uncertain than allowed."""


def uncertainties(atoms: Atoms) -> NDArray[np.float64] | None:
    """Standard deviations of the errors of force components, as the calculator of these atoms, just evaluated, says them.

    Returns:
        eV/Å, (n_atoms,) or (n_atoms, 3); None if it says nothing.
    """
    calculator: Any = atoms.calc
    found = next((calculator.results[name] for name in NAMES if name in getattr(calculator, "results", {})), None)
    if found is None and NAMES[0] in getattr(calculator, "implemented_properties", ()):
        found = calculator.get_property(NAMES[0], atoms)
    return None if found is None else np.asarray(found, dtype=float)


def force_uncertainties(atoms: Atoms) -> NDArray[np.float64] | None:
    """The same as one number for each atom, root mean squares of the components."""
    found = uncertainties(atoms)
    return None if found is None else np.sqrt((found.reshape(len(atoms), -1) ** 2).mean(axis=1))


class Watch:
    """Compares the most uncertain force with a limit; beyond it the run stops, or the frame is collected."""

    def __init__(self, limit: float | None, collect: Path | None, spacing: float, step: int | None) -> None:
        """
        Args:
            limit: eV/Å; None only looks.
            collect: File (extended XYZ) for frames beyond; None stops there.
            spacing: fs between two collected frames.
            step: At which a run goes on: frames collected later are dropped; None: a new run.

        Raises:
            FileExistsError: a new run, and the file exists.
            ValueError: a file, but no limit, or a file of others.
        """
        if collect is not None and limit is None:
            raise ValueError("collect takes frames beyond max_uncertainty: give both.")
        self.limit, self.collect, self.spacing = limit, collect, spacing
        self.frames: list[Atoms] = []
        if collect is not None and collect.exists():
            if step is None:
                raise FileExistsError(f"'{collect}' exists. Move it away, or collect into another file (--collect).")
            found: Any = ase.io.read(collect, ":", format="extxyz")
            if not all({"step", "time_fs"} <= frame.info.keys() for frame in found):
                raise ValueError(
                    f"'{collect}' holds frames that no simulation collected: they have no step. Collect into another file (--collect)."
                )
            self.frames = [frame for frame in found if frame.info["step"] <= step]

    def __call__(self, atoms: Atoms, step: int, time: float) -> tuple[float, str | None]:
        """Look at a frame.

        Args:
            atoms: Evaluated.
            step: Its number.
            time: fs.

        Returns:
            Largest uncertainty of a force in eV/Å, NaN where the calculator says nothing; and why the run must stop, or None.

        Raises:
            ValueError: a limit, and a calculator that says nothing.
        """
        sigma = force_uncertainties(atoms)
        if sigma is None:
            if self.limit is not None:
                raise ValueError(NONE)
            return float("nan"), None
        doubt = None
        worst = int(np.argmax(sigma))
        largest = float(sigma[worst])
        if self.limit is not None and not largest <= self.limit:
            if self.collect is None:
                doubt = f"the force on atom {worst} ({atoms.symbols[worst]}) is uncertain by {largest:.3g} eV/Å, more than {self.limit:g}"
            elif not self.frames or time - self.frames[-1].info["time_fs"] >= self.spacing - 1e-9:
                self._keep(atoms, sigma, step, time)
        return largest, doubt

    def _keep(self, atoms: Atoms, sigma: NDArray[np.float64], step: int, time: float) -> None:
        assert self.collect is not None
        frame = bare(atoms)  # no predictions that might pass for labels
        frame.info |= {"step": step, "time_fs": time, "max_forces_uncertainty": float(sigma.max())}
        frame.arrays["forces_uncertainty"] = sigma
        self.frames.append(frame)
        self.collect.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.collect) as temporary:
            ase.io.write(temporary, self.frames, format="extxyz")
