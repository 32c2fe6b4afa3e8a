"""Every number that one of ASE's integrators or optimisers holds, so that it can go on exactly where it stopped; its path so far; and what
atoms are beside where they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io.trajectory import Trajectory
from numpy.typing import NDArray

from gossamer.files import atomic_path

OWNED = ("_thermostat", "_barostat", "state")
ELECTRONS, CHARGED = ("initial_charges", "initial_magmoms"), ("charge", "spin")
"""arrays and entries of info that say to calculators how many electrons there are, and their spins"""
SAME = 1e-3
"""eV per atom that energies of one potential may differ by: precision, devices, and where a density functional code converges"""
MOVING = ("positions", "momenta", "masses", *ELECTRONS)
"""arrays of floats that every frame of a simulation has"""


def numbers_of(value: Any, prefix: str = "") -> dict[str, NDArray[Any]]:
    """Numbers, arrays and lists of them among the attributes, by dotted name."""
    found: dict[str, NDArray[Any]] = {}
    for name, item in vars(value).items():
        if isinstance(item, bool | int | float | np.ndarray | np.generic) or (
            isinstance(item, list) and item and all(isinstance(x, float | np.ndarray | np.generic) for x in item)
        ):
            found[prefix + name] = np.array(item)
        elif name in OWNED:
            found |= numbers_of(item, f"{prefix}{name}.")
    return found


def put_back(target: Any, numbers: Mapping[str, NDArray[Any]]) -> None:
    """Set what ``numbers_of`` found, in the types that are there (lists stay lists).

    Raises:
        ValueError: a number that the target has not, or of another kind.
    """
    for key, value in numbers.items():
        owner = target
        *owners, name = key.split(".")
        for step in owners:
            owner = vars(owner).get(step)
        if owner is None or name not in vars(owner) or value.dtype.kind not in "biuf":
            raise ValueError(f"'{key}' is no number of a {type(target).__name__}")
        old = vars(owner)[name]
        if isinstance(old, list):
            setattr(owner, name, list(value))
        elif isinstance(old, bool | int | float) and not isinstance(old, np.generic):
            setattr(owner, name, type(old)(value))
        else:
            setattr(owner, name, value.copy() if value.ndim else value[()])


def put_back_atoms(atoms: Atoms, stored: Mapping[str, NDArray[Any]]) -> None:
    """Positions and cell, and momenta where there are some, as they were stored: constraints would leave fixed atoms where they began.

    Raises:
        KeyError, ValueError: they are not there, or are none of so many atoms.
    """
    shape = (len(atoms), 3)
    for name, expected in (("positions", shape), ("cell", (3, 3)), *([("momenta", shape)] if "momenta" in stored else [])):
        if stored[name].shape != expected or stored[name].dtype.kind != "f" or not np.isfinite(stored[name]).all():
            raise ValueError(f"{name} are not {list(expected)} finite numbers")
    atoms.set_cell(stored["cell"], apply_constraint=False)
    atoms.set_positions(stored["positions"], apply_constraint=False)
    if "momenta" in stored:
        atoms.set_momenta(stored["momenta"], apply_constraint=False)


def belonging(atoms: Atoms, potential: str | None) -> dict[str, str]:
    """What a state belongs to beside its elements, so that it goes on with nothing else: one word or two for each that is known."""
    return {
        **({} if potential is None else {"potential": potential}),
        "masses": f"{atoms.get_masses().sum():.1f} ({_digest(atoms.get_masses().round(2).tolist())})",
        "pbc": " ".join("FT"[p] for p in atoms.pbc.astype(int)),
        "constraints": ", ".join(f"{type(c).__name__} ({_digest(_told(c))})" for c in atoms.constraints) or "none",
    }


def start_of(atoms: Atoms) -> str:
    """Positions and cell that a relaxation began with, to a millionth of an Å, in eight letters."""
    return _digest([(values.round(6) + 0.0).tolist() for values in (atoms.positions, atoms.cell.array)])


def strange(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, and how; what is not known of the state (of older versions) passes."""
    return ", ".join(f"{k} {before[k]} (now {now[k]})" for k in sorted(now) if k in before and before[k] != now[k])


def check_energy(atoms: Atoms, stored: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Refuse a calculator that gives the stored atoms another energy.

    Raises:
        ValueError: says both.
    """
    before = stored.get("energy")
    if before is None or before.ndim or before.dtype.kind != "f":  # of older versions, or before the first step
        return
    now = float(atoms.calc.get_potential_energy(atoms))
    if not abs(now - float(before)) <= SAME * len(atoms):
        raise ValueError(
            f"'{path}' belongs to another potential: its energy is {float(before):.6g} eV there, and now {now:.6g} eV. "
            "Resume with the same, or choose another --out."
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def _told(constraint: Any) -> Any:
    try:
        return constraint.todict()
    except NotImplementedError:
        return None


def without_labels(atoms: Atoms) -> Atoms:
    """A copy that moves as the atoms do, without numbers that were said of the frame they came from: labels, times, uncertainties.

    Arrays of floats go, but for those of `MOVING`, and all entries of info that are no words, charge or spin. Names of residues and the like stay.
    """
    copy = atoms.copy()
    for name in [k for k, v in copy.arrays.items() if k not in MOVING and v.dtype.kind == "f"]:
        del copy.arrays[name]
    copy.info = {k: v for k, v in copy.info.items() if isinstance(v, str) or k in CHARGED}
    return copy


def bare(atoms: Atoms) -> Atoms:
    """Elements, positions, cell, charges and spins alone: nothing that was said of one frame."""
    copy = Atoms(
        atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info={k: atoms.info[k] for k in CHARGED if k in atoms.info}
    )
    for name in ELECTRONS:
        if name in atoms.arrays:
            copy.set_array(name, atoms.arrays[name])
    return copy


def cut_trajectory(path: Path, kept: int) -> int:
    """Drop the frames after the first ``kept``, and what a killed process left of a frame; returns how many there are.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with Trajectory(path) as reader:
            frames = [reader[k] for k in range(min(kept, len(reader)))]
    except FileNotFoundError:
        raise
    except Exception as error:  # ASE's parser raises whatever it meets
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"'{path}' cannot be read ({reason}). {damaged_advice(path)}") from None
    with atomic_path(path) as temporary, Trajectory(temporary, "w") as writer:
        for frame in frames:
            writer.write(frame)
    return len(frames)


def damaged_advice(path: Path) -> str:
    """What to do where the path so far is lost, and the state is not."""
    return f"It may be damaged: repair it, or start again elsewhere (--out) from the last frame of '{path.parent}' that can be read."
