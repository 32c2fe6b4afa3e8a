"""A potential with kernels: the same numbers, several times faster; compared with the potential before use."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gossamer.engine.kernels.cpu import Missing
from gossamer.graph import Graph
from gossamer.potential import Potential, Prediction
from gossamer.timing import fastest

log = logging.getLogger(__name__)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""largest deviation of a compiled force, relative to the root mean square force or a hundredth of the usual one"""
LARGEST = 50_000
"""pairs of the part of a structure that is compared: plain potentials of large systems may not fit into memory"""
TABLE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-7}
"""likewise where radial functions come from a table"""


def has_kernels(potential: Potential) -> bool:
    """Whether kernels were added."""
    return any(name.endswith("kernel.table") for name, _ in potential.named_buffers()) or getattr(potential.network, "kernels", False)


def add_kernels(potential: Potential) -> Potential:
    """A copy for inference that passes messages by kernels (`gossamer.engine.kernels`).

    Radial functions come from tables: energies and forces differ by about 1e-5 of the root mean square force in float32,
    1e-9 in float64. Forces stay the exact gradient of the energy.

    Args:
        potential: Weights must not change afterwards.

    Raises:
        Missing: there are no kernels for this network, device or machine.
    """
    network: Any = potential.network
    if not hasattr(network, "add_kernels"):
        raise Missing(f"{potential.model_config.name} has no kernels")
    if potential.device.type not in ("cpu", "cuda"):
        raise Missing(f"there are no kernels for {potential.device.type}")
    fast = copy.deepcopy(potential).eval().requires_grad_(False)
    try:
        fast.network.add_kernels()
    except ValueError as error:
        raise Missing(str(error)) from None
    return fast


def fixed_sizes(potential: Potential) -> Potential:
    """A copy in which no size depends on values, outside training too: for compilers, and for recordings on a GPU."""
    potential = copy.deepcopy(potential)
    for module in potential.modules():
        if hasattr(module, "dynamic_sizes"):
            vars(module)["dynamic_sizes"] = False
    return potential


def part_of(graph: Graph, n_edges: int = LARGEST) -> Graph:
    """The first atoms of the structure, or of the first few, with the pairs among them, at most about ``n_edges``; small graphs as they are.

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
    )


def verified_kernels(potential: Potential, graph: Graph) -> Potential | None:
    """``add_kernels``, compared with the potential on this structure; None, with one line of the log, if that is not possible.

    Of a large structure a part is compared. On a GPU both are timed too, and None is returned if the potential itself is faster.
    """
    graph, was_training = part_of(graph), potential.training
    potential.eval()
    try:
        fast = add_kernels(potential)
        compare(fast, potential, graph, TABLE_TOLERANCE[potential.dtype])
        if potential.device.type == "cuda" and fastest(lambda: potential(graph)) < fastest(lambda: fast(graph)):
            return None
    except (Missing, RuntimeError) as error:
        level = logging.WARNING if potential.device.type == "cpu" and hasattr(potential.network, "add_kernels") else logging.INFO
        log.log(level, "the potential runs without kernels: %s", str(error).splitlines()[0])
        return None
    finally:
        potential.train(was_training)
    return fast


@contextmanager
def changing_kernels(potential: Potential, graph: Graph) -> Iterator[None]:
    """Within this block the potential passes messages by kernels that hold nothing of its weights; later these may change.

    They are compared with the potential on this graph of one structure; where there are none, or they differ, it runs as it is.
    """
    network: Any = potential.network
    switch: Any = getattr(network, "use_edge_kernels", getattr(network, "use_kernels", None))
    usable = switch is not None and potential.device.type in ("cpu", "cuda") and graph.n_edges > 0
    if usable:
        plain = potential(graph, stress=potential.conservative)
        try:
            switch(True)
            agree(plain, potential(graph, stress=potential.conservative), potential, graph, TOLERANCE[potential.dtype])
        except (Missing, RuntimeError) as error:
            log.log(logging.INFO if isinstance(error, Missing) else logging.WARNING, "without kernels: %s", error)
            switch(False)
    try:
        yield
    finally:
        if usable:
            switch(False)


def compare(fast: Callable[..., Prediction], potential: Potential, graph: Graph, tolerance: float) -> None:
    """Raise RuntimeError unless something that stands in for a potential gives its energy, forces and stress.

    Args:
        fast: Takes a graph.
        potential: The potential.
        graph: One structure.
        tolerance: Largest deviation, relative to the root mean square or a hundredth of the usual size.
    """
    stress = potential.conservative
    plain = potential(graph, stress=stress)
    agree(plain, fast(graph, stress=stress) if isinstance(fast, Potential) else fast(graph), potential, graph, tolerance)


def agree(plain: Prediction, other: Prediction, potential: Potential, graph: Graph, tolerance: float) -> None:
    """Raise RuntimeError unless two predictions of a potential for one structure are equal; tolerance as for ``compare``."""
    scale = 1e-2 * potential.energy_scale
    volume = max(float(torch.linalg.det(graph.cell[0].cpu()).abs()), 1.0)
    floors = {"energy": scale * graph.n_atoms, "forces": scale, "stress": scale * graph.n_atoms / volume}
    for name, floor in floors.items():
        if name == "stress" and not potential.conservative:
            continue
        a, b = (getattr(p, name).detach().nan_to_num().to(torch.float64) for p in (plain, other))
        # reference energies are exact and large: an energy is compared with the scale of forces, not with itself
        size = float(floor) if name == "energy" else max(float(a.pow(2).mean().sqrt()), float(floor))
        deviation = float((a - b).abs().max()) / size
        if not deviation < tolerance:
            raise RuntimeError(f"the fast {name} differs from the plain one by {deviation:.1e} (relative)")
