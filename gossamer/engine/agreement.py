"""Whether something that stands in for a potential gives its numbers, and on which structures that is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from ase.data import atomic_numbers, covalent_radii
from torch import Tensor

from gossamer.data.structure import Structure
from gossamer.graph import Graph
from gossamer.potential import Potential, Prediction

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""largest deviation of a force, relative to the root mean square force"""
TABLE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-7}
"""likewise where radial functions come from a table"""
RATTLE = 0.05
"""Å by which atoms are displaced before anything is compared: in a perfect crystal forces vanish, and rounding would look large"""


def probe(potential: Potential, n_atoms: int = 24, n_structures: int = 1) -> Graph:
    """Structures of a potential's elements to compare on: disordered and dense, from touching atoms to the cutoff; always the same.

    Args:
        potential: Gives elements, cutoff, device.
        n_atoms: At least so many; every element occurs.
        n_structures: More than one makes a batch.
    """
    elements = potential.statistics.elements
    numbers = np.array([atomic_numbers[e] for e in elements])
    nearest = covalent_radii[:, None] + covalent_radii
    if potential.zbl is not None and potential.limits is not None:  # nearer than in its data only the repulsion would be compared
        nearest = np.maximum(nearest, potential.zbl.pair_ends.cpu().numpy().reshape(nearest.shape))
    structures = []
    for seed in range(n_structures):
        rng = np.random.default_rng(seed)
        kinds = rng.permutation(np.resize(numbers, max(n_atoms, len(numbers)) + seed))
        # random sequential addition; spheres of 1.1 covalent radii (half the distances of like atoms) fill a quarter of the cell
        edge = (np.sum(4 / 3 * np.pi * (0.55 * nearest[kinds, kinds]) ** 3) / 0.25) ** (1 / 3)
        placed: list[np.ndarray] = []
        for k in range(len(kinds)):
            best, widest = np.zeros(3), -np.inf
            for point in rng.uniform(0, edge, (100, 3)):
                gap = _gap(point, placed, nearest[kinds[:k], kinds[k]], edge)
                if gap > widest:
                    best, widest = point, gap
                if gap > 1.0:
                    break
            placed.append(best)
        structures.append(
            Structure(
                atomic_numbers=kinds, positions=np.array(placed), cell=np.eye(3) * edge, pbc=np.ones(3, dtype=bool), name=f"probe {seed}"
            )
        )
    return potential.collate(structures)


def _gap(point: np.ndarray, others: Sequence[np.ndarray], bonds: np.ndarray, edge: float) -> float:
    """Least distance to the others in a cube, over the sum of the covalent radii."""
    if not len(others):
        return np.inf
    vectors = np.array(others) - point
    vectors -= edge * np.round(vectors / edge)
    return float((np.linalg.norm(vectors, axis=1) / bonds).min())


def rattled(graph: Graph) -> Graph:
    """The same graph with atoms displaced a little, always alike; edges are kept, those that grow beyond the cutoff too."""
    generator = torch.Generator().manual_seed(0)
    moves = RATTLE * torch.randn(graph.positions.shape, generator=generator, dtype=graph.positions.dtype)
    return replace(graph, positions=graph.positions + moves.to(graph.positions.device))


def part_of(graph: Graph, n_edges: int) -> Graph:
    """The first atoms of the first few structures, with the pairs among them, at most about ``n_edges``; small graphs as they are.

    Labels are left out. Of a batch at least two structures stay.
    """
    if graph.n_edges <= n_edges:
        return graph
    sender, receiver = graph.edge_index
    n_graphs = min(graph.n_graphs, 4)
    pairs = torch.bincount(receiver, minlength=graph.n_atoms)
    kept = torch.zeros_like(pairs, dtype=torch.bool)
    for number in range(n_graphs):
        atoms = (graph.graph_index == number).nonzero()[:, 0]
        few = pairs.index_select(0, atoms).cumsum(0) <= n_edges // n_graphs
        few[:2] = True
        kept[atoms] = few
    inside = (kept.index_select(0, sender) & kept.index_select(0, receiver)).nonzero()[:, 0]
    if len(inside) < 2:
        return graph
    atoms = kept.nonzero()[:, 0]
    return Graph(
        atomic_numbers=graph.atomic_numbers.index_select(0, atoms),
        positions=graph.positions.index_select(0, atoms),
        cell=graph.cell[:n_graphs],
        graph_index=graph.graph_index.index_select(0, atoms),
        edge_index=(kept.cumsum(0) - 1)[graph.edge_index.index_select(1, inside)],
        edge_shifts=graph.edge_shifts.index_select(0, inside),
        pbc=None if graph.pbc is None else graph.pbc[:n_graphs],
    )


def agree(plain: Prediction, other: Prediction, potential: Potential, graph: Graph, tolerance: float) -> None:
    """Raise RuntimeError unless two predictions of a potential are equal.

    Args:
        plain: By the potential itself.
        other: By what stands in for it.
        potential: The potential.
        graph: What was predicted: not a structure whose forces vanish by symmetry (`rattled`).
        tolerance: Largest deviation of a force relative to the root mean square force; of energies and stresses, to what such
            (for energies, at least usual) forces make of them over 0.01 Å, and over one Å.
    """
    assert plain.forces is not None
    scale = max(_rms(plain.forces), 1e-2 * potential.energy_scale)
    atoms = graph.atoms_per_graph().to(torch.float64)
    volumes = torch.linalg.det(graph.cell).abs().clamp(min=1.0)
    sizes = {
        "energy": 1e-2 * max(scale, potential.energy_scale) * atoms,
        "forces": plain.forces.new_tensor(scale),
        "stress": (scale * atoms / volumes)[:, None, None],
    }
    for name, size in sizes.items():
        a, b = getattr(plain, name), getattr(other, name)
        if a is None:  # stress of direct forces
            continue
        difference = (a.detach().nan_to_num() - b.detach().nan_to_num()).to(torch.float64).abs()  # NaN where there is no volume
        deviation = float((difference / size.to(difference.device)).max())
        if not deviation < tolerance:
            raise RuntimeError(f"the fast {name} differs from the plain one by {deviation:.1e} (relative)")


def _rms(values: Tensor) -> float:
    return float(values.detach().to(torch.float64).pow(2).mean().sqrt())
