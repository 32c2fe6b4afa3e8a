"""Harmonic lattice vibrations through phonopy: bands, density of states, imaginary modes, sum rule; any ASE calculator."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry import minkowski_reduce
from numpy.typing import NDArray

from gossamer.checks.candidate import Candidate
from gossamer.checks.crystals import relaxed, unsettled
from gossamer.checks.result import (
    Curve,
    Metric,
    NoQuestionError,
    Panel,
    Result,
    at_least,
    at_most,
    attempt,
    conclude,
    curve,
    measured,
    skipped,
)
from gossamer.files import InputError, open_text

Array = NDArray[np.float64]
INSTALL = "This check needs phonopy: pip install 'gossamer[phonons]'."


@contextmanager
def quiet() -> Iterator[None]:
    """Without phonopy's notes on defaults that differ from its older versions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="primitive_matrix defaulted")
        warnings.filterwarnings("ignore", message=".*acoustic mode.* at Gamma")
        warnings.filterwarnings("ignore", message=".*magnetic ordering that breaks")
        yield


def to_phonopy(atoms: Atoms) -> Any:
    """phonopy's atoms, with masses and magnetic moments of their own where they have some; left-handed cells, which it refuses, by the opposite vectors.

    Isotopes of one element get numbers ("Fe", "Fe1"): no symmetry may exchange them, where phonopy is told to look at the numbers.

    Raises:
        NoQuestionError: a charge, or a spin of the whole: of a supercell neither is known.
    """
    from phonopy.structure.atoms import PhonopyAtoms

    charge = atoms.info.get("charge", 0) or atoms.get_initial_charges().sum()
    if abs(charge) > 1e-6 or atoms.info.get("spin", 1) not in (0, 1):
        raise NoQuestionError(
            f"Vibrations are those of supercells, whose charge and spin are not known: this cell has charge {charge:g} and spin "
            f"{atoms.info.get('spin', 1)}. Give initial magnetic moments in place of a spin; charged crystals have no supercell."
        )
    masses = atoms.get_masses() if atoms.has("masses") else None
    moments = atoms.get_initial_magnetic_moments()
    right = atoms.copy()
    right.set_cell(atoms.cell.array * (1 if atoms.cell.handedness > 0 else -1))
    return PhonopyAtoms(
        symbols=_numbered(atoms), cell=right.cell.array, scaled_positions=right.get_scaled_positions(), masses=masses,
        magnetic_moments=moments if moments.any() else None,
    )  # fmt: skip


def _numbered(atoms: Atoms) -> list[str]:
    """Symbols; the second and further masses of an element have a number."""
    kinds: dict[str, list[float]] = {}
    found = []
    for symbol, mass in zip(atoms.get_chemical_symbols(), atoms.get_masses().tolist(), strict=True):
        known = kinds.setdefault(symbol, [])
        if mass not in known:
            known.append(mass)
        found.append(f"{symbol}{known.index(mass) or ''}")
    return found


def forces_of(calculator: Any, supercells: Sequence[Any], bar: Any = iter, net: bool = False) -> Array:
    """(n, n_atoms, 3) forces in eV/Å on phonopy's displaced supercells, the net force of each removed unless ``net`` is to stay."""
    out = []
    for cell in bar(supercells):
        atoms = Atoms(cell.numbers, scaled_positions=cell.scaled_positions, cell=cell.cell, pbc=True, magmoms=cell.magnetic_moments)
        atoms.calc = calculator
        forces = atoms.get_forces()
        out.append(forces if net else forces - forces.mean(axis=0))
    return np.array(out)


def supercell_for(atoms: Atoms, length: float = 9.5) -> list[int]:
    """Repeats that bring no two images of an atom nearer than ``length`` Å: of cells with small angles it is not the sides that are shortest."""
    sides, repeats = atoms.cell.lengths(), np.ones(3, dtype=int)
    while True:
        vectors, coefficients = minkowski_reduce(atoms.cell.array * repeats[:, None])
        distances = np.linalg.norm(vectors, axis=1)
        if distances.min() >= length:
            return [int(n) for n in repeats]
        involved = np.flatnonzero(coefficients[distances.argmin()])
        shortest = sides[involved[(repeats * sides)[involved].argmin()]]
        repeats[np.isclose(sides, shortest, rtol=1e-3)] += 1  # equal sides stay equal, and the symmetry with them


def make_phonons(calculator: Any, atoms: Atoms, supercell: Sequence[int] | None = None, displacement: float = 0.01, bar: Any = iter) -> Any:
    """A `phonopy.Phonopy` with force constants from finite displacements (Å) of a relaxed structure.

    The force constants are as computed, net forces and all: ``sum_rule_error`` looks at them before they are made to obey the sum rule.
    """
    from phonopy import Phonopy

    with quiet():
        phonons = Phonopy(
            to_phonopy(atoms),
            supercell_matrix=np.diag(supercell or supercell_for(atoms)),
            primitive_matrix="auto",
            distinguish_symbol_index=True,
        )
    phonons.generate_displacements(distance=displacement)
    assert phonons.supercells_with_displacements is not None
    phonons.forces = forces_of(calculator, phonons.supercells_with_displacements, bar, net=True)
    phonons.produce_force_constants()
    return phonons


def sum_rule_error(phonons: Any) -> float:
    """Largest |Σ_j Φ_ij| in eV/Å²: zero if a rigid shift costs nothing."""
    constants = phonons.force_constants
    return float(np.abs(constants.sum(axis=1)).max())


def band_path(atoms: Atoms, points: int = 120) -> tuple[Array, Array, list[tuple[float, str]]]:
    """q points (n, 3), their places along the path, and the named ones, for a primitive cell (Setyawan-Curtarolo paths of ASE).

    Places go from 0 to 1, so that bands of lattices of unlike size can be drawn over each other. Where the path jumps from one point to another they share a place: "K|U".
    """
    path = atoms.cell.bandpath(npoints=points)
    x, places, labels = path.get_linear_kpoint_axis()
    x, places = x / x[-1], places / x[-1]
    ticks: dict[float, str] = {}
    for place, label in zip(places.tolist(), labels, strict=True):
        name = label.replace("G", "Γ")
        ticks[place] = f"{ticks[place]}|{name}" if place in ticks else name
    return path.kpts, x, list(ticks.items())


def frequencies_at(phonons: Any, qpoints: Array) -> Array:
    """(n, n_bands) THz; imaginary modes are negative."""
    phonons.run_qpoints(qpoints)
    return np.array(phonons.qpoints.frequencies)


def read_reference(path: Path | str) -> dict[str, dict[str, Array]]:
    """Reference frequencies in THz by crystal and place: {"Si": {"X": [4.49, 4.49, 12.32, ...], "Γ-X": [[0, 0, 0, 15.5, ...], ...]}}.

    Returns:
        By crystal and place (n_points, n_bands) frequencies, sorted in each point: one point for a named place of the Brillouin
        zone, several at even distances for a line between two.

    Raises:
        InputError: not such a file.
    """
    with open_text(Path(path)) as file:
        text = file.read()
    try:
        found = {
            c: {p: np.sort(np.atleast_2d(np.array(v, dtype=float))) for p, v in places.items()} for c, places in json.loads(text).items()
        }
        if wrong := [p for places in found.values() for p, v in places.items() if v.ndim != 2 or ("-" in p) != (len(v) > 1)]:
            raise ValueError(f"'{wrong[0]}': a point has one list, a line has several of one length")
        return found
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f'\'{path}\' is not a file of phonon frequencies: expected {{"Si": {{"X": [4.49, ...], "Γ-X": [[0.0, ...], ...]}}}}, '
            f"THz at named points and along lines between them ({error!r})."
        ) from None


def beside_reference(
    phonons: Any, cell: Atoms, ticks: list[tuple[float, str]], reference: dict[str, Array], name: str
) -> tuple[list[Curve], list[Metric]]:
    """Reference frequencies drawn on the band path, named points as points and lines as curves, and the mean error there.

    Args:
        phonons: `phonopy.Phonopy` with force constants.
        cell: Primitive cell.
        ticks: Places of the band path, as of ``band_path``.
        reference: (n_points, n_bands) THz by place, as of ``read_reference``.
        name: Of the crystal.

    Raises:
        InputError: a point that this lattice does not have, or another number of bands.
    """
    special = {("Γ" if label == "G" else label): q for label, q in cell.cell.bandpath().special_points.items()}
    curves, errors = [], []
    for place, expected in reference.items():
        ends = ["Γ" if point in ("G", "GAMMA") else point for point in place.split("-")]
        if len(ends) > 2 or (missing := [point for point in ends if point not in special]):
            raise InputError(f"The lattice of {name} has no point '{place if len(ends) > 2 else missing[0]}'. It has {', '.join(special)}.")
        along = np.linspace(special[ends[0]], special[ends[-1]], len(expected))
        ours = np.sort(frequencies_at(phonons, along))
        if ours.shape[1] != expected.shape[1]:
            raise InputError(
                f"The reference of {name} has {expected.shape[1]} frequencies at {place}; its primitive cell has {ours.shape[1]} bands."
            )
        errors.append(np.abs(ours - expected).ravel())
        curves += _on_path(ends, expected, ticks)
    error = float(np.concatenate(errors).mean())
    return curves, [measured(f"{name}: mean error against the reference at {', '.join(reference)}", error, "THz", "low")]


def _on_path(ends: list[str], frequencies: Array, ticks: list[tuple[float, str]]) -> list[Curve]:
    """Reference points at every place of their name, reference lines at every part of the path between their ends, in either direction."""
    if len(ends) == 1:
        places = [x for x, label in ticks if ends[0] in label.split("|")]
        return [curve([x] * frequencies.shape[1], frequencies[0], "reference", reference=True, points=True) for x in places]
    drawn = []
    for (start, left), (stop, right) in pairwise(ticks):
        part = [left.split("|")[-1], right.split("|")[0]]  # "U|K" ends one part at U and begins the next at K
        if sorted(part) == sorted(ends):
            x = np.linspace(start, stop, len(frequencies))
            drawn += [curve(x, band, "reference", reference=True) for band in (frequencies if part == ends else frequencies[::-1]).T]
    return drawn


def mesh_frequencies(phonons: Any, mesh: float = 30.0) -> tuple[Array, Array]:
    """Frequencies (n, n_bands) in THz and weights (n,) on a mesh of ``mesh`` Å."""
    phonons.run_mesh(mesh)
    return np.array(phonons.mesh.frequencies), np.array(phonons.mesh.weights, dtype=float)


# --- verdict --------------------------------------------------------------------------------------------------------

IMAGINARY = "The potential says that the crystal would deform by itself: free energies, thermal conductivity and phase stability are meaningless for it."
SUM_RULE = "A rigid shift of the crystal costs energy: forces are noisy or not translation invariant."


def check(candidate: Candidate) -> Result:
    """Bands, density of states and thermal properties of every crystal of the candidate."""
    try:
        import phonopy  # noqa: F401
    except ImportError:
        return skipped(INSTALL)
    metrics: list[Metric] = []
    panels: list[Panel] = []
    known = read_reference(candidate.config.phonons_reference) if candidate.config.phonons_reference else {}
    notes = [
        "Cells relaxed first; displacements of 0.01 Å in supercells of at least 9.5 Å; without the non-analytical term of polar crystals."
    ]
    if unused := [name for name in known if name not in candidate.crystals]:
        notes.append(f"References not used: {', '.join(unused)}; the crystals are {', '.join(candidate.crystals)}.")
    for name, atoms in candidate.crystals.items():
        metrics += attempt(f"{name}: phonons", lambda n=name, a=atoms: _phonons(candidate, n, a, panels, known.get(n, {})), "failed")
    return conclude(metrics, panels, notes, "No imaginary modes; the acoustic sum rule holds.")


def _phonons(candidate: Candidate, name: str, atoms: Atoms, panels: list[Panel], reference: dict[str, Array]) -> list[Metric]:
    cell, converged = relaxed(candidate.calculator, atoms, fmax=0.001, steps=500)
    phonons = make_phonons(candidate.calculator, cell, bar=lambda items: candidate.bar(items, f"phonons of {name}"))
    drift = sum_rule_error(phonons)
    scale = float(np.abs(phonons.force_constants).max())
    acoustic = float(np.abs(np.sort(np.abs(frequencies_at(phonons, np.zeros((1, 3)))[0]))[:3]).max())
    phonons.symmetrize_force_constants()
    primitive = Atoms(phonons.primitive.numbers, scaled_positions=phonons.primitive.scaled_positions, cell=phonons.primitive.cell, pbc=True)
    qpoints, x, ticks = band_path(primitive)
    bands = frequencies_at(phonons, qpoints)
    drawn, compared = beside_reference(phonons, primitive, ticks, reference, name) if reference else ([], [])
    panels.append(Panel(f"Phonon bands, {name}", "", "THz", [*(curve(x, band) for band in bands.T), *drawn], ticks=ticks))
    frequencies, weights = mesh_frequencies(phonons)
    top = float(frequencies.max())
    grid = np.linspace(min(0.0, float(frequencies.min())) - 0.3, top * 1.05, 300)
    width = max(top / 80, 1e-3)
    density = (
        (weights[:, None, None] / weights.sum() * np.exp(-0.5 * ((grid - frequencies[..., None]) / width) ** 2)).sum(axis=(0, 1))
        / width
        / np.sqrt(2 * np.pi)
    )
    panels.append(Panel(f"Phonon density of states, {name}", "THz", "states/THz/cell", [curve(grid, density)]))
    with quiet():
        phonons.run_thermal_properties(t_min=300, t_max=300, t_step=1)
    thermal = phonons.thermal_properties
    lowest = float(min(frequencies.min(), bands.min()))
    return [
        *([] if converged else [unsettled(name, 0.001, 500, IMAGINARY)]),
        at_least(f"{name}: lowest frequency", lowest, "THz", -0.05 * max(1.0, top / 10), -0.02 * top - 0.1, IMAGINARY, ""),
        measured(f"{name}: highest frequency", top, "THz"),
        at_most(f"{name}: acoustic sum rule", drift / scale, "of the largest constant", 1e-3, 2e-2, SUM_RULE),
        at_most(f"{name}: acoustic frequency at Γ before it is enforced", acoustic, "THz", 0.1, 0.5, SUM_RULE),
        measured(f"{name}: heat capacity at 300 K", float(thermal.heat_capacity[0]) / len(primitive), "J/K/mol of atoms"),
        *compared,
    ]  # fmt: skip
