"""What is judged, and on what: a potential as a calculator, its elements, and structures to ask it about."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.collections import g2
from ase.data import atomic_numbers, covalent_radii, reference_states
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order
from tqdm import tqdm

from gossamer.checks.config import JudgeConfig
from gossamer.neighbors import neighbor_list
from gossamer.simulation.guard import BONDED

log = logging.getLogger(__name__)


ALONE = 5.0
"""Å within which atoms of a solid or liquid have neighbours, if these are not bonded farther out (rubidium, caesium)"""
UNBOXED = "without_box"
"""entry of info of what was taken out of a box"""


@dataclass(frozen=True)
class Effort:
    """How much each check does."""

    n_structures: int
    n_crystals: int
    diatomic_points: int
    equilibration_ps: float
    nve_ps: float
    md_ps: float
    md_atoms: int
    speed_atoms: int
    speed_seconds: float
    """longest single evaluation of the speed check"""


LEVELS = {
    "quick": Effort(1, 1, 60, 0.1, 0.25, 1.0, 64, 1000, 1.0),
    "standard": Effort(3, 3, 119, 1.0, 2.0, 5.0, 64, 10_000, 5.0),
    "full": Effort(5, 8, 119, 1.0, 10.0, 50.0, 216, 100_000, 60.0),
}
"""quick: minutes; standard: up to an hour on a laptop; full: as the published protocols ask"""

COMPOUNDS = {
    "MgO": ("rocksalt", 4.212), "NaCl": ("rocksalt", 5.640), "LiF": ("rocksalt", 4.026), "GaAs": ("zincblende", 5.653), "SiC": ("zincblende", 4.358),
    "ZnS": ("zincblende", 5.409), "CsCl": ("cesiumchloride", 4.123),
}  # fmt: skip
"""compound: structure, experimental lattice constant in Å at room temperature"""
PREFERRED = ["Si", "Cu", "MgO", "NaCl", "Al", "GaAs", "W", "C", "Ge", "Mo", "Li", "Fe", "LiF", "Ni", "Ag", "Au"]
MOLECULES = ["CH3CH2OH", "H2O", "CH4", "NH3", "C6H6", "CO2", "H2O2", "N2", "O2", "H2", "SiH4", "NaCl", "LiF"]


class SeenFrames(Protocol):
    """What a potential knows of the frames it was trained on."""

    def where(self, frame: Atoms) -> str:
        """ "train" if the frame was trained on, "valid" if it chose the best weights, "new" otherwise."""


@dataclass
class Candidate:
    """One potential under judgement."""

    name: str
    make: Callable[[], Any]
    """makes an ASE calculator"""
    elements: list[str]
    structures: list[Atoms]
    """what symmetry, conservation, smoothness and speed are judged on"""
    crystals: dict[str, Atoms]
    """what equation of state, elasticity, phonons and thermal conductivity are judged on"""
    systems: dict[str, Atoms]
    """what molecular dynamics is judged on"""
    folder: Path
    """finished work of this potential"""
    effort: Effort = LEVELS["quick"]
    config: JudgeConfig = field(default_factory=JudgeConfig)
    """what the judge was asked"""
    references: dict[str, str] = field(default_factory=dict)
    """reference trajectories of systems"""
    labelled: list[Atoms] = field(default_factory=list)
    """frames with labels, for the errors"""
    builtin_crystals: bool = True
    """the crystals are not the user's: their experimental values are known"""
    builtin_systems: bool = True
    """the systems are not the user's: they may be enlarged"""
    origin: str = ""
    """where the structures come from, in words"""
    conservative: bool | None = None
    """what the potential says of its own forces; None if it does not say"""
    cutoff: float | None = None
    """Å, where it is known"""
    progress: bool = True
    seen: SeenFrames | None = None
    """its training frames, if it remembers them: they are left out of the errors"""
    ours: bool = False
    """a potential of ours, which compiles itself for long runs"""
    _calculator: Any = field(default=None, repr=False)
    _needs_box: bool | None = field(default=None, repr=False)

    @property
    def calculator(self) -> Any:
        """The calculator, made on first use."""
        if self._calculator is None:
            self._calculator = self.make()
        return self._calculator

    def expect(self, n_evaluations: int, atoms: Atoms) -> None:
        """Say that so many evaluations of such atoms will come: a potential of ours compiles itself where that pays."""
        if self.ours:
            self.calculator.expect(n_evaluations, atoms)

    def exact(self) -> Any:
        """A calculator without the rounding of float32, where there is one (a saved potential of ours)."""
        make: Any = self.make
        return make.in_double() if self.ours else self.calculator

    def renew(self) -> None:
        """Forget the calculator: the next one asked for is fresh, so that no check depends on what was asked before it."""
        self._calculator = None

    def free(self, atoms: Atoms, vacuum: float = 15.0) -> Atoms:
        """Atoms without a cell, or in a large periodic box for calculators that refuse them without one."""
        lone = atoms.copy()
        lone.pbc = False
        lone.cell = None
        if self._needs_box is None:
            probe = Atoms([self.elements[0]] * 2, [[0, 0, 0], [2.2, 0, 0]])
            try:
                probe.calc = self.calculator
                probe.get_forces()
                self._needs_box = False
            except Exception as error:
                log.debug("%s refuses atoms without a cell: %s", self.name, error)
                self._needs_box = True
        if self._needs_box:
            lone.set_cell(np.ptp(lone.positions, axis=0) + 2 * vacuum)
            lone.pbc = True
        return lone

    def unboxed(self, structures: Sequence[Atoms]) -> list[Atoms]:
        """The structures, of which molecules that lie alone in a periodic box go without it, where the calculator needs none."""
        out = []
        for atoms in structures:
            whole = molecule_in(atoms)
            if whole is not None and not self.free(whole).pbc.any():
                whole.info[UNBOXED] = True
                out.append(whole)
            else:
                out.append(atoms)
        return out

    def bar(self, items: Sequence[Any], text: str) -> Any:
        """The items with a progress bar."""
        return tqdm(items, desc=f"{self.name}: {text}", disable=None if self.progress else True, dynamic_ncols=True, leave=False)


# --- structures -----------------------------------------------------------------------------------------------------


def builtin_crystals(elements: Sequence[str], n: int) -> dict[str, Atoms]:
    """Cubic (conventional) cells of simple crystals made of these elements, well known ones first."""
    known = {name: bulk(name, crystal, a=a, cubic=True) for name, (crystal, a) in COMPOUNDS.items()}
    cells = {name: atoms for name, atoms in known.items() if set(atoms.symbols) <= set(elements)}
    for element in elements:
        state = elemental_state(element)
        if state.get("symmetry") in ("fcc", "bcc", "diamond") and state.get("a"):
            cells[element] = bulk(element, cubic=True)
    ranked = sorted(cells, key=lambda name: (PREFERRED.index(name) if name in PREFERRED else len(PREFERRED), name))
    return {name: cells[name] for name in ranked[:n]}


def elemental_state(element: str) -> dict[str, Any]:
    """ASE's table of the solid elements: "symmetry" and "a" (Å, experiment); empty for what is no element or no solid."""
    states: Any = reference_states
    return dict(states[atomic_numbers[element]] or {}) if element in atomic_numbers else {}


def builtin_molecules(elements: Sequence[str], n: int) -> dict[str, Atoms]:
    """Small molecules made of these elements (geometries of the G2 set, Curtiss et al., J. Chem. Phys. 106, 1063 (1997))."""
    names = [*MOLECULES, *(m for m in g2.names if m not in MOLECULES)]
    found = {name: molecule(name) for name in names if set(molecule(name).symbols) <= set(elements)}
    several = {name: atoms for name, atoms in found.items() if len(atoms) > 1}
    return dict(list(several.items())[:n])


def rattled(atoms: Atoms, amplitude: float = 0.05, seed: int = 0) -> Atoms:
    """A copy with every coordinate moved by normal noise (Å), so that nothing vanishes by symmetry."""
    copy = atoms.copy()
    copy.positions += np.random.default_rng(seed).normal(scale=amplitude, size=copy.positions.shape)
    return copy


def enlarged(atoms: Atoms, n_atoms: int) -> Atoms:
    """The smallest near-cubic supercell with at least ``n_atoms`` atoms; molecules stay as they are."""
    if not atoms.pbc.all():
        return atoms.copy()
    repeats = np.ones(3, dtype=int)
    lengths = atoms.cell.lengths()
    while len(atoms) * repeats.prod() < n_atoms:
        repeats[np.argmin(lengths * repeats)] += 1
    return atoms.repeat(tuple(int(r) for r in repeats))


def molecule_in(atoms: Atoms) -> Atoms | None:
    """What lies alone in a periodic box, as plane-wave codes have molecules: whole, and without the box. None for anything else.

    Atoms that are bonded, or within `ALONE` of each other, belong together; they are alone if all do, and none with an image of another.
    """
    if not atoms.pbc.any():
        return None
    radii, n = covalent_radii[atoms.numbers], len(atoms)
    (sender, receiver), shifts = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, max(ALONE, 2 * BONDED * radii.max()))
    lengths = np.linalg.norm(atoms.positions[sender] + shifts @ atoms.cell.array - atoms.positions[receiver], axis=1)
    near = lengths < np.maximum(ALONE, BONDED * (radii[sender] + radii[receiver]))
    sender, receiver, shifts = sender[near], receiver[near], shifts[near]
    pairs = receiver * n + sender  # rising
    if (np.diff(pairs) == 0).any() or (sender == receiver).any():  # two images of an atom
        return None
    order, before = breadth_first_order(csr_array((np.ones(len(pairs)), (receiver, sender)), shape=(n, n)), 0)
    if len(order) < n:
        return None
    crossed = np.zeros((n, 3), dtype=np.int64)
    steps = shifts[np.searchsorted(pairs, before[order[1:]].astype(np.int64) * n + order[1:])]
    for atom, step in zip(order[1:], steps, strict=True):
        crossed[atom] = crossed[before[atom]] + step
    if (crossed[sender] - crossed[receiver] != shifts).any():  # the same image by two ways
        return None
    whole = atoms.copy()
    whole.positions += crossed @ atoms.cell.array
    whole.pbc, whole.cell = False, None
    return whole


def bond_length(first: str, second: str) -> float:
    """Sum of the covalent radii in Å."""
    return float(covalent_radii[atomic_numbers[first]] + covalent_radii[atomic_numbers[second]])
