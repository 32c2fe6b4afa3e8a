"""Random cells against brute force, in every way of running: lists of neighbours, kernels, programs, batches, TorchSim.

    python benchmarks/reliability/campaign.py cells --count 10000

Small, flat, skewed, left-handed and long cells, every periodicity, atoms far outside, alone, or on one another's images. Edges are compared
with all images of all atoms; energies and forces with the plain network in float64 on those edges.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import samples
import torch
from ase import Atoms
from common import FINDING, Case, campaign, random_of

from gossamer.data.structure import as_structure
from gossamer.engine.agreement import TABLE_TOLERANCE
from gossamer.engine.engine import Engine
from gossamer.neighbors import MOST_NEIGHBORS, complete_cell, neighbor_list, neighbor_list_reference, pairs_within
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.verlet import BatchVerletList, DeviceVerletList, VerletList, device_neighbor_list
from gossamer.ways import WAYS, _compared

NETWORKS = ("sound", "nequip", "geodite", "weft", "schnet", "painn", "mace", "sevennet")
COMPILED = ("schnet", "nequip")
"""networks that are compiled too, half a minute for each of the two programs"""
MOST_EDGES = 6000
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, float]
"""positions, cell, pbc, cutoff"""

# --- cells ------------------------------------------------------------------------------------------------------------


def rotation(rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(3, 3)))[0]


def ordinary(rng: np.random.Generator) -> Arrays:
    cell = np.diag(rng.uniform(2.5, 7, 3)) + rng.normal(size=(3, 3))
    return rng.random((rng.integers(1, 13), 3)) @ cell, cell, np.ones(3, bool), 4.0


def small(rng: np.random.Generator) -> Arrays:
    """Many images of one or two atoms."""
    cell = np.diag(rng.uniform(1.2, 2.2, 3)) + 0.3 * rng.normal(size=(3, 3))
    return rng.random((rng.integers(1, 3), 3)) @ cell, cell, np.ones(3, bool), 4.0


def flat(rng: np.random.Generator) -> Arrays:
    """Two vectors almost along each other."""
    a, b, c = rotation(rng) * rng.uniform(3, 6, 3)[:, None]
    other = rng.choice([-3, -1, 1, 2]) * a + rng.uniform(0.15, 0.5) * b
    return rng.random((rng.integers(1, 5), 3)) @ np.array([a, other, c]), np.array([a, other, c]), np.ones(3, bool), 4.0


def skewed(rng: np.random.Generator) -> Arrays:
    """The same lattice by vectors that nobody would choose."""
    cell = np.diag(rng.uniform(3, 6, 3)) + 0.3 * rng.normal(size=(3, 3))
    change = np.eye(3, dtype=int)
    for _ in range(4):
        i, j = rng.permutation(3)[:2]
        change[i] += rng.integers(-3, 4) * change[j]
    return rng.random((rng.integers(1, 9), 3)) @ cell, change @ cell, np.ones(3, bool), 4.0


def left_handed(rng: np.random.Generator) -> Arrays:
    positions, cell, pbc, cutoff = ordinary(rng)
    return positions, cell[[1, 0, 2]] if rng.random() < 0.5 else cell * rng.choice([-1, 1], (3, 1)), pbc, cutoff


def long(rng: np.random.Generator) -> Arrays:
    cell = rotation(rng) * np.array([2.0, 2.5, rng.uniform(30, 300)])[:, None]
    return rng.random((rng.integers(2, 30), 3)) @ cell, cell, np.ones(3, bool), 4.0


def mixed(rng: np.random.Generator) -> Arrays:
    """Slabs and wires; what is not periodic has no vector, any, or one almost along the others."""
    pbc = np.array(list(itertools.product([False, True], repeat=3))[rng.integers(1, 7)])
    cell = np.diag(rng.uniform(2, 6, 3)) + 0.7 * rng.normal(size=(3, 3))
    positions = rng.uniform(-1, 2, (rng.integers(1, 10), 3)) @ cell
    for axis in np.flatnonzero(~pbc):
        kind = rng.integers(3)
        cell[axis] = 0 if kind == 0 else cell[axis] * 0.01 if kind == 1 else cell[(axis + 1) % 3] + 1e-9
    return positions, cell, pbc, 4.0


def cluster(rng: np.random.Generator) -> Arrays:
    """No periodicity, with a cell or without; some so far apart that nothing has a neighbour."""
    size = rng.choice([3.0, 8.0, 100.0])
    cell = np.zeros((3, 3)) if rng.random() < 0.5 else np.eye(3) * rng.uniform(1, 5)
    return rng.uniform(-size, size, (rng.integers(1, 10), 3)), cell, np.zeros(3, bool), 4.0


def outside(rng: np.random.Generator) -> Arrays:
    """Atoms some cells away, or a hundred thousand."""
    positions, cell, pbc, cutoff = ordinary(rng)
    far = 10 ** rng.uniform(0, 5)
    pbc = rng.random(3) < 0.8
    return positions + np.where(pbc, rng.integers(-far, far + 1, positions.shape), 0) @ cell, cell, pbc, cutoff


def alone(rng: np.random.Generator) -> Arrays:
    """One atom, or two, with or without an image within reach."""
    cell = np.diag(rng.choice([3.0, 3.99, 4.01, 9.0], 3))
    return rng.random((rng.integers(1, 3), 3)) @ cell, cell, rng.random(3) < 0.5, 4.0


def special(rng: np.random.Generator) -> Arrays:
    """Atoms exactly on faces, edges and corners, and a rounding beside them; one in two cells rotated."""
    a = rng.uniform(2.5, 5)
    cell = np.eye(3) * a if rng.random() < 0.5 else (np.ones((3, 3)) - np.eye(3)) * a / 2
    places = np.array([0.0, -0.0, 0.5, 1.0, 1 - 1e-16, -1e-17, 1e-17, 0.25, -1.0, 2.0, 1 / 3])
    fractional = places[rng.integers(len(places), size=(rng.integers(1, 6), 3))]
    turned = cell @ rotation(rng) if rng.random() < 0.5 else cell
    return fractional @ turned, turned, np.ones(3, bool), float(rng.choice([4.0, a, a / np.sqrt(2)]))


KINDS: list[Callable[[np.random.Generator], Arrays]] = [
    ordinary, small, flat, skewed, left_handed, long, mixed, cluster, outside, alone, special
]  # fmt: skip

# --- edges ------------------------------------------------------------------------------------------------------------


def brute(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Every pair (sender, receiver, shift) within the cutoff and a little more, and its distance; by all images that can be reached."""
    cell = complete_cell(positions, cell, pbc, cutoff)
    inverse = np.linalg.inv(cell)
    span = np.ptp(positions @ inverse, axis=0)
    reach = np.where(pbc, np.floor(1.001 * cutoff * np.linalg.norm(inverse, axis=0) + span + 1e-6), 0).astype(int)
    home = np.round(positions @ inverse) * pbc  # images are counted from the atom's own, else atoms far outside would need all between
    if (reach > 5).any():
        reach = np.where(pbc, np.floor(1.001 * cutoff * np.linalg.norm(inverse, axis=0) + 1.001), 0).astype(int)
    else:
        home = np.zeros_like(home)
    inside = positions - home @ cell
    shifts = np.array(list(itertools.product(*(range(-n, n + 1) for n in reach))))
    rows, lengths = [], []
    for receiver in range(len(positions)):
        for sender in range(len(positions)):
            distances = np.linalg.norm(inside[sender] - inside[receiver] + shifts @ cell, axis=1)
            near = distances < cutoff + 1e-3
            if sender == receiver:
                near &= (shifts != 0).any(axis=1)
            crossed = shifts[near] - (home[sender] - home[receiver]).astype(int)
            rows.append(np.hstack([np.full((near.sum(), 1), sender), np.full((near.sum(), 1), receiver), crossed]))
            lengths.append(distances[near])
    table = np.concatenate(rows).astype(np.int64)
    order = np.lexsort((*table[:, :1:-1].T, table[:, 0], table[:, 1]))
    return table[order], np.concatenate(lengths)[order]


def differs(table: np.ndarray, lengths: np.ndarray, edges: Any, arrays: Arrays) -> str | None:
    """What of a list is wrong; pairs at the cutoff, to rounding, may be there or not."""
    positions, _, _, cutoff = arrays
    found = np.hstack([np.asarray(edges[0]).T, np.asarray(edges[1])]).astype(np.int64)
    order = np.lexsort((*found[:, :1:-1].T, found[:, 0], found[:, 1]))
    if not np.array_equal(order, np.arange(len(order))):
        return "not sorted"
    slack = 1e-9 + 1e-14 * float(np.abs(positions).max(initial=0.0)) * 100
    all_pairs = {tuple(row): length for row, length in zip(table.tolist(), lengths.tolist(), strict=True)}
    mine = set(map(tuple, found.tolist()))
    if len(mine) != len(found):
        return "a pair twice"
    missing = [row for row, length in all_pairs.items() if length < cutoff - slack and row not in mine]
    added = [row for row in mine if all_pairs.get(row, np.inf) > cutoff + slack]
    if missing or added:
        return f"{len(missing)} pairs are missing, {len(added)} too many: {(missing + added)[:2]}"
    return None


def lists(arrays: Arrays, rng: np.random.Generator) -> dict[str, Any]:
    """Edges by every way to list them."""
    positions, cell, pbc, cutoff = arrays
    there = torch.from_numpy(positions.copy()), torch.from_numpy(cell.copy())
    cpu = torch.device("cpu")
    moved = positions + 0.1 * rng.uniform(-1, 1, positions.shape)
    skinned, batched, on_device = VerletList(cutoff, 0.5), BatchVerletList(cutoff, 0.5), DeviceVerletList(cutoff, 0.5, cpu)
    skinned(moved, cell, pbc)
    two = np.concatenate([positions, moved])
    cells, periods, counts = np.stack([cell, cell]), np.stack([pbc, pbc]), np.array([len(positions)] * 2)
    edges, shifts = batched(two, cells, periods, counts)
    mine = edges[1] < len(positions)
    on_device.on_device(moved, cell, pbc, torch.from_numpy(moved), there[1])
    found = {
        "fresh": neighbor_list(positions, cell, pbc, cutoff),
        "on a device": device_neighbor_list(positions, cell, pbc, cutoff, cpu),
        "with a skin": skinned(positions, cell, pbc),
        "with a skin on a device": on_device.on_device(positions, cell, pbc, *there),
        "of a batch": (edges[:, mine], shifts[mine]),
    }
    if len(positions) < 12 and np.abs(positions).max() < 100 and len(found["fresh"][1]) < 2000:
        found["reference"] = neighbor_list_reference(positions, cell, pbc, cutoff)
    if pbc.all():
        first, second, images = pairs_within(positions, cell, cutoff)
        both = np.concatenate([np.column_stack([second, first, images]), np.column_stack([first, second, -images])])
        both = both[np.lexsort((*both[:, :1:-1].T, both[:, 0], both[:, 1]))]
        found["each pair once"] = (both[:, :2].T, both[:, 2:])
    return found


# --- energies ---------------------------------------------------------------------------------------------------------


class Runs:
    """A small potential of one network and every way to run it, made when first asked for."""

    def __init__(self, name: str) -> None:
        self.potential = samples.make_potential(["H", "C", "O"], dtype=torch.float64, **samples.conftest.MODELS[name])
        self.potential.requires_grad_(False)
        self.calculators = {way: Calculator(self.potential, way=way) for way in ("kernels", *(["program"] if name in COMPILED else []))}  # type: ignore[arg-type]
        self.engine = Engine(self.potential, "kernels")
        if name in COMPILED:
            self.programs = Engine(self.potential, "program")
            self.programs.expect(1, self.potential.collate([as_structure(samples.labelled_molecules(1)[0])] * 2))
        self.compiled = name in COMPILED
        self.before: list[Atoms] = [samples.labelled_molecules(1)[0]]

    def exact(self, arrays: Arrays, table: np.ndarray, atoms: Atoms) -> dict[str, Any]:
        """The plain network on the edges of brute force."""
        graph = self.potential.collate([as_structure(atoms)])
        edges = torch.from_numpy(np.ascontiguousarray(table[:, :2].T))
        graph = replace(graph, edge_index=edges, edge_shifts=torch.from_numpy(table[:, 2:].astype(np.float64)))
        out = self.potential(graph, stress=self.potential.conservative)
        stress = out.stress[0].numpy() if out.stress is not None and arrays[2].all() else None
        return {"energy": float(out.energy), "forces": out.forces.numpy(), "stress": stress}

    def all(self, atoms: Atoms) -> dict[str, dict[str, Any]]:
        """Answers of all ways for one structure; in batches it lies between others."""
        found = {}
        for way, calculator in self.calculators.items():
            calculator.calculate(atoms, ["energy"])
            results = calculator.results
            stress = None if results.get("stress") is None else voigt(results["stress"])
            found[way] = {"energy": results["energy"], "forces": results["forces"], "stress": stress}
        batch = [*self.before, atoms, self.before[-1]]
        for way, engine in {"batch": self.engine, **({"batch program": self.programs} if self.compiled else {})}.items():
            found[way] = self.potential.predict([as_structure(a) for a in batch], run=engine, batch_atoms=10**6)[len(self.before)]
        if len({bool(p) for p in atoms.pbc}) == 1 and (atoms.pbc.all() or not atoms.cell.array.any()):
            found["torchsim"] = WAYS["torchsim"](self.potential, [atoms], Path())()[0]
        self.before = [*self.before, atoms][-3:]
        return found


def voigt(values: np.ndarray) -> np.ndarray:
    xx, yy, zz, yz, xz, xy = values
    return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])


def make_case(seed: int, names: tuple[str, ...] = NETWORKS) -> Case:
    """Case k of this seed."""
    runs: dict[str, Runs] = {name: Runs(name) for name in names}

    def case(k: int) -> str:
        rng = random_of(seed, k)
        kind = KINDS[k % len(KINDS)]
        arrays = kind(rng)
        positions, cell, pbc, cutoff = arrays
        try:
            table, lengths = brute(*arrays)
        except ValueError:
            neighbors = len(positions) * 4 / 3 * np.pi * cutoff**3 / max(abs(np.linalg.det(cell)), 1e-300)
            if pbc.all() and neighbors > MOST_NEIGHBORS:  # by chance the vectors lie in a plane
                return f"{kind.__name__}: refused as too small"
            raise
        for name, edges in lists(arrays, rng).items():
            wrong = differs(table, lengths, edges, arrays)
            if wrong:
                return f"{kind.__name__}, list {name}: {FINDING} {wrong}"
        if cutoff != 4.0 or not len(names):
            return f"{kind.__name__}: lists agree"
        inside = table[lengths < cutoff]
        if len(inside) > MOST_EDGES or (len(inside) and lengths.min() < 0.3):
            return f"{kind.__name__}: lists agree"
        atoms = Atoms(rng.choice([1, 6, 8], len(positions)), positions, cell=cell, pbc=pbc)
        run = runs[names[(k // len(KINDS)) % len(names)]]
        exact = run.exact(arrays, inside, atoms)
        for way, answer in run.all(atoms).items():
            stress = answer.get("stress") if exact["stress"] is not None else None
            row = _compared(way, [atoms], [{**answer, "stress": stress}], [exact], run.potential.energy_scale, 1.0, 0.0)
            limit = 10 * TABLE_TOLERANCE[torch.float64] * (1 + 1e-5 * float(np.abs(positions).max(initial=0.0)))
            if not row.relative <= limit:
                return f"{kind.__name__}, {run.potential.model_config.name} {way}: {FINDING} differs by {row.relative:.1e} ({row})"
        return f"{kind.__name__}: all agree"

    return case


def run(count: int, seed: int, minutes: float, out: Path, only: str = "") -> dict[str, Any]:
    """Compare so many cells; with "lists" lists of neighbours alone. See the module."""
    os.environ.setdefault("GOSSAMER_CACHE", str(out / "cache"))
    names = () if only == "lists" else tuple(n for n in NETWORKS if only in n)
    return campaign(
        "lists" if only == "lists" else "cells", make_case(seed, names), count, seed, minutes, out, {"only": only} if only else None
    )
