"""What a potential needs to know of its training data: elements, reference energies, scales."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from ase.data import atomic_numbers as number_of
from ase.data import chemical_symbols

from gossamer.data.structure import Structure, spread
from gossamer.neighbors import company, neighbor_list
from gossamer.quantities import QUANTITIES
from gossamer.settings import settings

log = logging.getLogger(__name__)
MOST = 20_000
"""structures whose neighbours are looked at for the limits of the data"""
ReferenceEnergies = Literal["auto", "isolated", "least_squares"] | Mapping[str, float]


@settings
class Statistics:
    """Numbers computed once from the training data and stored with the potential."""

    elements: list[str]
    """chemical symbols of the element table, in its order"""
    reference_energies: dict[str, float]
    """eV per atom of each element: what an isolated atom gets"""
    energy_scale: float = 1.0
    """eV per unit of the network's output; the RMS force times 1 Å"""
    mean_neighbors: float = 1.0
    element_scales: dict[str, float] | None = None
    """RMS force of each element over that of all"""
    spreads: dict[str, float] | None = None
    """spread of the labels: energy per atom less the reference energies (eV), force components (eV/Å), stress components (eV/Å³)"""
    shortest_distances: dict[str, float] | None = None
    """Å, of each pair of elements ("H-O") within the cutoff, where `potential.zbl_radius` is "data"; None: not known"""
    fewest_neighbors: dict[str, float] | None = None
    """likewise the smallest number of neighbours of an atom of each element, counted by `gossamer.neighbors.company`"""
    functional: str | None = None
    """of the labels, where the settings say it (data.functional)"""
    dispersion: Literal["none", "included"] | None = None
    """whether the labels hold dispersion, where the settings say it (data.dispersion)"""
    n_structures: int = 0
    fingerprint: str = ""
    """sha256 over atoms, cells and labels of the training structures"""


def compute_statistics(
    structures: Sequence[Structure],
    cutoff: float,
    reference_energies: ReferenceEnergies = "auto",
    elements: Sequence[str] | None = None,
    max_neighbors: int | None = None,
    free_atoms_only: bool = False,
) -> Statistics:
    """One pass over the training structures.

    Args:
        structures: Training structures.
        cutoff: Å, for the mean number of neighbours.
        reference_energies: "isolated" takes single-atom frames, "least_squares" fits energies to compositions, "auto"
            the first where every element has such a frame, else the second; a mapping gives eV per symbol.
        elements: Element table; by default the elements that occur.
        max_neighbors: Cap of the neighbour list, if the model has one.
        free_atoms_only: Leave forces of fixed atoms out of the scales, as `LossConfig.free_atoms_only` leaves them out of the loss.

    Raises:
        ValueError: an element without a reference energy, or a structure with an element outside the table.
    """
    present: set[int] = set()
    digest = hashlib.sha256()
    force_squares, force_count = 0.0, 0
    edges, edge_atoms = 0, 0
    composition_rows: list[np.ndarray] = []
    energies: list[float] = []
    isolated: dict[int, float] = {}
    squares_of, count_of = np.zeros(119), np.zeros(119)
    further: dict[str, list[np.ndarray]] = {name: [] for name in QUANTITIES if name not in ("energy", "forces")}
    stride = max(1, len(structures) // 500)
    for index, structure in enumerate(structures):
        present.update(np.unique(structure.atomic_numbers).tolist())
        for part in (structure.atomic_numbers, structure.positions, structure.cell, structure.forces, structure.energy):
            digest.update(np.ascontiguousarray(0.0 if part is None else part).tobytes())
        if structure.forces is not None:
            counted = structure.free if free_atoms_only else slice(None)
            forces, numbers = structure.forces[counted], structure.atomic_numbers[counted]
            force_squares += float((forces**2).sum())
            force_count += forces.size
            np.add.at(squares_of, numbers, (forces**2).sum(axis=1))
            np.add.at(count_of, numbers, 3)
        for name, values in further.items():
            if name in structure.labels:
                values.append(np.ravel(structure.labels[name]))
        for name in sorted(structure.extras):
            digest.update(name.encode() + np.ascontiguousarray(structure.extras[name]).tobytes())
        if structure.energy is not None:
            composition_rows.append(np.bincount(structure.atomic_numbers, minlength=119))
            energies.append(structure.energy)
            if structure.is_isolated(cutoff):
                isolated.setdefault(int(structure.atomic_numbers[0]), structure.energy)
        if index % stride == 0:
            found, _ = neighbor_list(structure.positions, structure.cell, structure.pbc, cutoff, max_neighbors)
            edges += found.shape[1]
            edge_atoms += structure.n_atoms
    table = _element_table(present, elements)
    references = _reference_energies(reference_energies, table, np.array(composition_rows), np.array(energies), isolated, cutoff)
    force_rms = float(np.sqrt(force_squares / force_count)) if force_count else 0.0
    element_rms = {chemical_symbols[z]: float(np.sqrt(squares_of[z] / count_of[z])) for z in table if squares_of[z] > 0}
    return Statistics(
        elements=[chemical_symbols[z] for z in table],
        reference_energies=references,
        energy_scale=force_rms if force_rms > 0 else 1.0,
        mean_neighbors=edges / max(edge_atoms, 1),
        element_scales={chemical_symbols[z]: element_rms.get(chemical_symbols[z], force_rms) / force_rms for z in table}
        if force_rms
        else None,
        spreads=_spreads(references, table, np.array(composition_rows), np.array(energies), force_rms, further),
        n_structures=len(structures),
        fingerprint=digest.hexdigest(),
    )


def _element_table(present: set[int], elements: Sequence[str] | None) -> list[int]:
    """Atomic numbers of the element table: of ``elements``, or of what is present."""
    table = sorted(present) if elements is None else [number_of[e] for e in elements]
    missing = sorted(present - set(table))
    if missing:
        raise ValueError(
            f"The data holds {', '.join(chemical_symbols[z] for z in missing)}, which the list of elements "
            f"({', '.join(chemical_symbols[z] for z in table)}) lacks. Add them to data.elements."
        )
    return table


def find_limits(
    structures: Sequence[Structure],
    cutoff: float,
    max_neighbors: int | None = None,
    pair_cutoffs: Mapping[tuple[int, int], float] | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Where training structures end: ``shortest_distances`` and ``fewest_neighbors`` of `Statistics`.

    Lone atoms do not count: what a potential says of them is known. Of more than `MOST` structures so many are taken, spread evenly.

    Args:
        structures: Training structures.
        cutoff: Å.
        max_neighbors: Cap of the neighbour list, if the model has one.
        pair_cutoffs: Å, smaller cutoffs by atomic numbers of centre and neighbour.
    """
    distances = np.full((119, 119), np.inf)
    fewest = np.full(119, np.inf)
    reaches = np.full((119, 119), cutoff)
    for pair, reach in (pair_cutoffs or {}).items():
        reaches[pair] = reach
    for index in spread(len(structures), MOST):
        structure = structures[index]
        numbers = structure.atomic_numbers
        (sender, receiver), shifts = neighbor_list(structure.positions, structure.cell, structure.pbc, cutoff, max_neighbors)
        vectors = structure.positions[sender] + shifts @ structure.cell - structure.positions[receiver]
        lengths = np.linalg.norm(vectors, axis=1)
        centre, neighbour = numbers[receiver], numbers[sender]
        np.minimum.at(distances, (centre, neighbour), lengths)
        count = np.bincount(receiver, company(lengths / reaches[centre, neighbour]), len(numbers))
        np.minimum.at(fewest, numbers[count > 0], count[count > 0])
    found = [(a, b) for a, b in np.argwhere(np.isfinite(distances)).tolist() if a <= b]
    pairs = {f"{chemical_symbols[a]}-{chemical_symbols[b]}": float(min(distances[a, b], distances[b, a])) for a, b in found}
    return pairs, {chemical_symbols[z]: float(fewest[z]) for z in np.flatnonzero(np.isfinite(fewest)).tolist()}


def widened(statistics: Statistics, shortest: Mapping[str, float], fewest: Mapping[str, float]) -> Statistics:
    """The statistics with limits that hold for more structures, whose own (as from `find_limits`) these are: the smaller of both."""

    def smaller(before: Mapping[str, float] | None, found: Mapping[str, float]) -> dict[str, float]:
        both = [before or {}, found]
        return {key: min(values[key] for values in both if key in values) for key in sorted({k for values in both for k in values})}

    return replace(
        statistics,
        shortest_distances=smaller(statistics.shortest_distances, shortest),
        fewest_neighbors=smaller(statistics.fewest_neighbors, fewest),
    )


def _spreads(
    references: Mapping[str, float],
    table: list[int],
    rows: np.ndarray,
    energies: np.ndarray,
    force_rms: float,
    further: Mapping[str, list[np.ndarray]],
) -> dict[str, float]:
    """Standard deviations of energies per atom and of components of further labels, RMS of force components; only those above zero."""
    found = {"forces": force_rms}
    if len(energies):
        shifts = np.array([references[chemical_symbols[z]] for z in table])
        found["energy"] = float(np.std((energies - rows[:, table] @ shifts) / rows.sum(axis=1)))
    found |= {name: float(np.std(np.concatenate(values))) for name, values in further.items() if values}
    return {name: value for name, value in found.items() if value > 0}


def _reference_energies(
    kind: ReferenceEnergies, table: list[int], rows: np.ndarray, energies: np.ndarray, isolated: dict[int, float], cutoff: float
) -> dict[str, float]:
    symbols = [chemical_symbols[z] for z in table]
    if isinstance(kind, Mapping):
        absent = [s for s in symbols if s not in kind]
        if absent:
            raise ValueError(
                f"data.reference_energies has no value for {', '.join(absent)}; it has some for {', '.join(map(str, kind)) or 'none'}. Give one in "
                "eV for each element, by its symbol."
            )
        return {s: float(kind[s]) for s in symbols}
    lone = [z for z in table if z not in isolated]
    if kind == "isolated" and lone:
        raise ValueError(
            f"data.reference_energies is 'isolated', but no frame holds a single atom of "
            f"{', '.join(chemical_symbols[z] for z in lone)} that has no neighbour within {cutoff:g} Å. Add one, give numbers, or use "
            "'least_squares'."
        )
    if kind == "isolated" or (kind == "auto" and not lone):
        return {chemical_symbols[z]: isolated[z] for z in table}
    if len(energies) == 0:
        return dict.fromkeys(symbols, 0.0)
    matrix = rows[:, table].astype(np.float64)
    solution, _, rank, _ = np.linalg.lstsq(matrix, energies, rcond=1e-10)
    if rank < len(table):
        log.info("compositions cannot tell all reference energies apart (rank %d of %d); the smallest solution is used", rank, len(table))
    return dict(zip(symbols, solution.tolist(), strict=True))
