"""Dispersion: D3 of a density functional, by the package dftd3 (simple-dftd3), in our units and signs.

    E = -½ Σ_AB Σ_{n=6,8} s_n C_n(AB) / (R^n + f(R0)^n)        D3(BJ): Grimme et al., J. Comput. Chem. 32, 1456 (2011), Eq. 4 to 6
    C_n depend on the fractional coordination of both atoms        D3: Grimme et al., J. Chem. Phys. 132, 154104 (2010)

Pairs alone, as plane-wave codes have it: no three-body term. Pairs are counted up to 60 Bohr, over whose last 4 Bohr they end smoothly,
so that forces and stress are gradients of the energy. Neighbours stop being counted at 40 Bohr without that, as everywhere D3 is computed:
each is 1e-7 of a neighbour even there (the counting function does not reach zero), and the energy jumps by 1e-6 eV as one passes, which no
gradient has. Crystalline silicon: 2e-3 of 5.6 eV in the trace of the virial, 0.6 MPa; copper, whose coordination is beyond the table's end: nothing.
"""

from __future__ import annotations

import difflib
import logging
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from ase.data import chemical_symbols
from ase.units import Bohr, Hartree
from numpy.typing import NDArray

from gossamer.data.structure import Structure

log = logging.getLogger(__name__)
HEAVIEST = 103
"""Lr; the package knows nothing of heavier elements, and does not say so"""
PAIRS, COORDINATION, SMOOTH = 60.0, 40.0, 4.0
"""Bohr: where pairs end, where they no longer count as neighbours, and over which distance they end"""
DAMPINGS = {"bj": "RationalDampingParam", "zero": "ZeroDampingParam"}


class Dispersed(NamedTuple):
    """Dispersion of one structure."""

    energy: float
    """eV"""
    forces: NDArray[np.float64]
    """(n_atoms, 3) eV/Å"""
    virial: NDArray[np.float64]
    """(3, 3) eV, dE/d(strain): stress times volume"""


def nothing(n_atoms: int) -> Dispersed:
    """NaN: of what has no dispersion."""
    return Dispersed(np.nan, np.full((n_atoms, 3), np.nan), np.full((3, 3), np.nan))


class D3:
    """Energy, forces and stress of D3 for one functional."""

    def __init__(self, functional: str) -> None:
        """
        Args:
            functional: As simple-dftd3 names it, in any case: pbe, revpbe, pbe0, r2scan, b3lyp, wb97x ... Becke-Johnson damping, unless
                the name ends with "/zero".

        Raises:
            ImportError: the package is not installed.
            TypeError: no name.
            ValueError: a functional or a damping without parameters.
        """
        try:
            from dftd3 import interface
        except ImportError:
            raise ImportError("Dispersion is computed by the package dftd3: pip install 'gossamer[dispersion]'") from None
        if not isinstance(functional, str):
            raise TypeError(f"dispersion: expected the name of a functional, such as pbe, found {functional!r}.")
        self.functional, _, damping = functional.strip().lower().replace("-", "").partition("/")
        self.damping = damping or "bj"
        if self.damping not in DAMPINGS:
            raise ValueError(
                f"dispersion '{functional}': the damping '{damping}' is unknown. Write {self.functional} or {self.functional}/zero."
            )
        try:
            self._parameters: Any = getattr(interface, DAMPINGS[self.damping])(method=self.functional)
        except RuntimeError:
            near = difflib.get_close_matches(self.functional, _functionals(self.damping), n=4)
            hint = f" Did you mean {', '.join(near)}?" if near else " Write it as simple-dftd3 does: pbe, r2scan, b3lyp."
            raise ValueError(f"dispersion '{functional}': D3 with {self.damping} damping has no parameters for it.{hint}") from None
        self._model: Any = interface.DispersionModel

    def __str__(self) -> str:
        return self.functional if self.damping == "bj" else f"{self.functional}/{self.damping}"

    def __reduce__(self) -> tuple[Any, ...]:
        return D3, (str(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> D3:
        return self  # nothing of it changes

    def __call__(
        self, atomic_numbers: NDArray[np.integer], positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_]
    ) -> Dispersed:
        """
        Args:
            atomic_numbers: (n_atoms,)
            positions: (n_atoms, 3) Å.
            cell: (3, 3) Å, rows are lattice vectors.
            pbc: (3,); axes that are not periodic have no images.

        Raises:
            ValueError: an element without parameters, a periodic axis without a vector, or atoms on one spot.
        """
        heavy = sorted({int(z) for z in atomic_numbers if z > HEAVIEST})
        if heavy:
            raise ValueError(
                f"D3 has no parameters for {', '.join(chemical_symbols[z] for z in heavy)}: it ends with {chemical_symbols[HEAVIEST]}."
            )
        axes = np.flatnonzero(pbc)
        if len(axes) and np.linalg.matrix_rank(cell[axes], tol=1e-6) < len(axes):
            raise ValueError(
                f"Axes {axes.tolist()} are periodic, but their lattice vectors {cell[axes].tolist()} are zero or linearly dependent. "
                "Give a cell with a volume, or switch periodicity off along that axis."
            )
        if 0 < len(axes) < 3:
            positions, cell = _with_room(positions, cell, pbc)
        around = (cell / Bohr, np.ones(3, dtype=bool)) if len(axes) else (None, None)
        try:
            model = self._model(atomic_numbers, positions / Bohr, *around)
            model.set_realspace_cutoff(PAIRS, COORDINATION, COORDINATION, SMOOTH, 0.0)
            found = model.get_dispersion(self._parameters, grad=True)
        except RuntimeError as error:
            raise ValueError(f"D3 cannot be computed: {error}. Separate overlapping atoms.") from None
        return Dispersed(float(found["energy"]) * Hartree, found["gradient"] * (-Hartree / Bohr), found["virial"] * Hartree)


def _with_room(
    positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The atoms in the middle of a cell that may be periodic along all axes: across the open ones, images are beyond the end of pairs.

    simple-dftd3 wraps atoms along open axes too, from where they lie outside the cell to elsewhere, and finds too few images of a slab that
    does not lie along x and y.
    """
    axes = np.linalg.svd(cell[pbc])[2][int(pbc.sum()) :]
    along = positions @ axes.T
    lowest, highest = along.min(axis=0), along.max(axis=0)
    lengths = highest - lowest + PAIRS * Bohr
    roomy = cell.copy()
    roomy[~pbc] = axes * lengths[:, None]
    return positions + ((lengths - lowest - highest) / 2) @ axes, roomy


def _functionals(damping: str) -> list[str]:
    """Names of the functionals that have parameters for this damping, as the package lists them."""
    table = tomllib.loads(resources.files("dftd3").joinpath("parameters.toml").read_text())["parameter"]
    return sorted(name for name, kinds in table.items() if damping in kinds.get("d3", {}))


def subtract_dispersion(structures: Iterable[Structure], functional: str) -> Iterator[Structure]:
    """The structures with labels that hold no dispersion: D3 of the functional is taken off energies, forces and stresses."""
    d3 = D3(functional)
    for s in structures:
        try:
            energy, forces, virial = d3(s.atomic_numbers, s.positions, s.cell, s.pbc)
        except ValueError as error:
            raise ValueError(f"{s.name}: {error}") from None
        yield replace(
            s,
            energy=None if s.energy is None else s.energy - energy,
            forces=None if s.forces is None else s.forces - forces,
            stress=None if s.stress is None else s.stress - virial / s.volume,
        )


def checked(functional: str, labels_functional: str | None, labels_dispersion: str | None) -> D3:
    """D3 of a functional, for a potential whose labels are of this functional, with or without dispersion, as far as is known.

    Raises:
        ValueError: the labels held dispersion already, or are of another functional.
    """
    d3 = D3(functional)
    if labels_dispersion == "included":
        raise ValueError(
            f"dispersion '{functional}': this potential was trained on labels that hold dispersion already, or it is added already, which would "
            "be counted twice. Leave it out, or train on labels without (gossamer data convert --subtract-dispersion)."
        )
    if labels_functional is not None and labels_functional.lower().replace("-", "") != d3.functional:
        raise ValueError(
            f"dispersion '{functional}': the labels of this potential are of the functional {labels_functional}, and D3's parameters belong "
            f"to one functional. Write {labels_functional}."
        )
    if labels_dispersion is None:
        log.warning("whether the potential's labels held dispersion is not known (data.dispersion): %s is added on trust", d3)
    return d3
