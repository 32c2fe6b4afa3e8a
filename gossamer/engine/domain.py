"""The energy of a part of a structure as a compiled program, for engines that share one structure among processes (LAMMPS on MPI).

A program computes the energies of the first atoms, its own, from edges that end at them. What neighbours hold beyond these rows comes
through one operation, ``exchange``, which the engine implements: it brings the features of atoms that other processes own, and its
gradient takes theirs back. So every layer works on own atoms only. An engine that gives all atoms as own, with weight 0 for those that
only surround (a halo of num_hops * cutoff), has nothing to exchange: the same program serves both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from gossamer.engine.agreement import TABLE_TOLERANCE
from gossamer.engine.kernels.attach import AlignmentKernel, AttentionKernel, Order, TableKernel, attach_kernels
from gossamer.engine.kernels.inline import inline
from gossamer.engine.program import _Outputs, compiling
from gossamer.engine.unrolled import fx_config, rewrite
from gossamer.graph import Graph
from gossamer.nn.layers import cat, split
from gossamer.nn.products import Edges, Ends
from gossamer.potential import Potential, state_of

# --- operators -------------------------------------------------------------------------------------------------------
# `nodes` has a row for every atom that an edge begins at, `own` for every atom that an edge may end at: the first of them

_library = torch.library.Library("gossamer", "FRAGMENT")
for _schema in (
    "exchange(Tensor x, Tensor nodes, Tensor own) -> Tensor",
    "exchange_backward(Tensor gradient, Tensor nodes, Tensor own) -> Tensor",
    "own_rows(Tensor x, Tensor own) -> Tensor",
    "own_rows_backward(Tensor gradient, Tensor nodes) -> Tensor",
    "sort_own_edges(Tensor edge_index, Tensor nodes, Tensor own) -> (Tensor, Tensor, Tensor)",
):
    _library.define(_schema)

_owners: list[Tensor] = []
"""in this process, the own atom of which each further row is an image"""


@contextmanager
def images(owners: Int[Tensor, " n"]) -> Iterator[None]:
    """While the block runs, rows beyond the own atoms are images of these own atoms."""
    _owners.append(owners)
    try:
        yield
    finally:
        _owners.pop()


def _others(nodes: Tensor, own: Tensor) -> Tensor:
    n = nodes.shape[0] - own.shape[0]
    owners = _owners[-1] if _owners else nodes.new_zeros(0, dtype=torch.int64)
    if len(owners) != n:
        raise RuntimeError(f"{n} atoms belong to other processes, of which this one knows {len(owners)}")
    return owners


def _exchange(x: Tensor, nodes: Tensor, own: Tensor) -> Tensor:
    return torch.cat([x, x.index_select(0, _others(nodes, own))])


def _exchange_backward(gradient: Tensor, nodes: Tensor, own: Tensor) -> Tensor:
    n = own.shape[0]
    return gradient[:n].index_add(0, _others(nodes, own), gradient[n:])


def _own_rows_backward(gradient: Tensor, nodes: Tensor) -> Tensor:
    return torch.cat([gradient, gradient.new_zeros(nodes.shape[0] - gradient.shape[0], *gradient.shape[1:])])


def _sort_own_edges(edge_index: Tensor, nodes: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    receiver_starts, sender_starts, by_sender = torch.ops.gossamer.sort_edges(edge_index, nodes)
    return receiver_starts[: own.shape[0] + 1].clone(), sender_starts, by_sender


def _like(rows: Tensor, x: Tensor) -> Tensor:
    return x.new_empty((rows.shape[0], *x.shape[1:]))


def _fake_sort(edge_index: Tensor, nodes: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(edge_index.new_empty(n) for n in (own.shape[0] + 1, nodes.shape[0] + 1, edge_index.shape[1]))  # type: ignore[return-value]


for _device in ("CPU", "CUDA"):
    _library.impl("exchange", _exchange, _device)
    _library.impl("exchange_backward", _exchange_backward, _device)
    _library.impl("own_rows", lambda x, own: x[: own.shape[0]].clone(), _device)
    _library.impl("own_rows_backward", _own_rows_backward, _device)
    _library.impl("sort_own_edges", _sort_own_edges, _device)
torch.library.register_fake("gossamer::exchange", lambda x, nodes, own: _like(nodes, x))
torch.library.register_fake("gossamer::exchange_backward", lambda gradient, nodes, own: _like(own, gradient))
torch.library.register_fake("gossamer::own_rows", lambda x, own: _like(own, x))
torch.library.register_fake("gossamer::own_rows_backward", lambda gradient, nodes: _like(nodes, gradient))
torch.library.register_fake("gossamer::sort_own_edges", _fake_sort)


def _save_rows(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _save_nodes(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _exchange_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.gossamer.exchange_backward(gradient.contiguous(), *ctx.saved_tensors), None, None


def _own_rows_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return torch.ops.gossamer.own_rows_backward(gradient.contiguous(), *ctx.saved_tensors), None


torch.library.register_autograd("gossamer::exchange", _exchange_gradient, setup_context=_save_rows)
torch.library.register_autograd("gossamer::own_rows", _own_rows_gradient, setup_context=_save_nodes)


# --- operations of a network, in a domain ----------------------------------------------------------------------------


class _Rows:
    """Which rows there are in the call under way."""

    nodes: Tensor
    own: Tensor

    def exchange(self, x: Tensor) -> Tensor:
        """Values of all nodes from those of the own ones."""
        return torch.ops.gossamer.exchange(x.contiguous(), self.nodes, self.own)

    def keep(self, x: Tensor) -> Tensor:
        """Values of the own nodes."""
        return torch.ops.gossamer.own_rows(x.contiguous(), self.own)


class _Operation(nn.Module):
    """An operation whose values at senders may belong to other processes; abstract."""

    def __init__(self, operation: Any, rows: _Rows) -> None:
        super().__init__()
        self.operation, self.rows = operation, rows


class _Ends(_Operation):
    def forward(self, values: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.operation(self.rows.exchange(values), edge_index)
        return found


class _Convolution(_Operation):
    def forward(self, features: Tensor, edges: Edges) -> Tensor:
        rows = self.rows
        edges.once("order", lambda: Order(edges.index, *torch.ops.gossamer.sort_own_edges(edges.index, rows.nodes, rows.own)))
        found: Tensor = self.operation(rows.exchange(features), edges)
        return found


class _Attention(_Operation):
    def forward(self, queries: Tensor, keys: Tensor, scalars: Tensor, values: Tensor, steerables: Tensor | None, gates: Tensor, filters: Tensor,
                edges: Edges) -> tuple[Tensor, Tensor]:  # fmt: skip
        parts = [queries, keys, scalars, values, *([] if steerables is None else [steerables.flatten(1)])]
        everything = split(self.rows.exchange(cat(parts, 1)), [p.shape[1] for p in parts], 1)
        q, k, s, v, *x = (part.contiguous() for part in everything)
        vectors = None if steerables is None else x[0].reshape(-1, *steerables.shape[1:])
        sums, products = self.operation(q, k, s, v, vectors, gates, filters, edges)
        return self.rows.keep(sums), self.rows.keep(products)


class _Alignment(_Operation):
    def forward(self, queries: Tensor, keys: Tensor, edges: Edges) -> Tensor:
        found: Tensor = self.operation(*(self.rows.exchange(x) for x in (queries, keys)), edges)
        return found


_IN_A_DOMAIN = {Ends: _Ends, TableKernel: _Convolution, AttentionKernel: _Attention, AlignmentKernel: _Alignment}


# --- the program -----------------------------------------------------------------------------------------------------


def check_local(potential: Potential) -> None:
    """
    Raises:
        ValueError: the energy of an atom depends on more than its surroundings, or forces are no gradient; the message says which.
    """
    network = potential.network
    reasons = {
        "its forces are predicted directly: they are not the gradient of the energy": not potential.conservative,
        "it keeps only the nearest max_neighbors of each atom: the energy jumps where these change": potential.max_neighbors is not None,
        "its global context couples all atoms of a structure": not network.local,
        "its charges (potential.long_range) act on all atoms of a structure": potential.long_ranged,
    }
    for reason, true in reasons.items():
        if true:
            raise ValueError(f"A structure cannot be shared among processes with this potential: {reason}.")


class Domain(nn.Module):
    """Energies of own atoms, weighted, and their gradient with respect to edge vectors, by kernels."""

    def __init__(self, potential: Potential) -> None:
        """
        Args:
            potential: On the device and in the precision it will run in.

        Raises:
            ValueError: not local (`check_local`), or with tables for too many pairs of elements.
            Missing: no kernels on this machine.
        """
        super().__init__()
        check_local(potential)
        self.potential = attach_kernels(potential)
        self.potential.fixed_sizes = True
        with torch.no_grad():
            self.isolated = potential.isolated_outputs() if potential.network.subtract_isolated else None
        self.rows = _Rows()
        for path, operation in list(self.potential.named_modules()):
            if isinstance(operation, TableKernel) and not operation.complete:
                raise ValueError(
                    f"The potential has {len(potential.table)} elements, and tables for all their pairs would be too large. Keep fewer (gossamer import --elements)."
                )
            wrapper = _IN_A_DOMAIN.get(type(operation))
            if wrapper is not None:
                parent, _, name = path.rpartition(".")
                setattr(self.potential.get_submodule(parent), name, wrapper(operation, self.rows))

    def forward(
        self,
        atomic_numbers: Int[Tensor, " nodes"],
        edge_index: Int[Tensor, "2 E"],
        edge_vectors: Float[Tensor, "E 3"],
        weights: Float[Tensor, " own"],
        isolated: Tensor | None = None,
    ) -> tuple[Float[Tensor, " own"], Float[Tensor, "E 3"]]:
        """
        Args:
            atomic_numbers: Of all atoms that an edge begins at; the own atoms first.
            edge_index: (sender, receiver), sorted by receiver, which is an own atom.
            edge_vectors: Å, from receiver to sender, float64.
            weights: 1 for atoms whose energies count, 0 for those that only surround them; float64.
            isolated: As for `Potential.forward`.

        Returns:
            Energies of the own atoms in eV, and d Σ_i weights_i E_i / d edge vector in eV/Å, over all processes; float64.
        """
        with torch.enable_grad():
            self.rows.nodes, self.rows.own = atomic_numbers, weights
            vectors = edge_vectors.detach().requires_grad_()
            own = self.rows.keep(atomic_numbers)
            graph = Graph(
                atomic_numbers=own, positions=weights[:, None].expand(-1, 3), cell=vectors.new_zeros(1, 3, 3),
                graph_index=torch.zeros_like(own), edge_index=edge_index, edge_shifts=vectors,
            )  # fmt: skip
            energies, *_ = self.potential._node_energies(graph, (vectors,), isolated)
            (slopes,) = torch.autograd.grad((energies * weights).sum(), (vectors,))
        return energies.detach(), slopes


def inputs_of(graph: Graph) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a program takes, of a structure that one process has to itself."""
    return graph.atomic_numbers, graph.edge_index.contiguous(), graph.edge_vectors(), torch.ones_like(graph.positions[:, 0])


def with_images(graph: Graph, every: int = 5) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Likewise, but some edges begin at images of their atoms, rows of their own; and the atoms that these are images of."""
    numbers, index, vectors, weights = inputs_of(graph)
    sender = index[0].clone()
    chosen = torch.arange(0, len(sender), every)
    owners, place = sender[chosen].unique(return_inverse=True)
    sender[chosen] = len(numbers) + place
    return (torch.cat([numbers, numbers[owners]]), torch.stack([sender, index[1]]), vectors, weights), owners


def trace(domain: Domain, graph: Graph) -> tuple[torch.fx.GraphModule, dict[str, Tensor]]:
    """The graph of primitive operations of (state, *inputs) and its state, for any numbers of nodes, own atoms and edges from two on."""
    state = state_of(domain.potential)
    inputs = state if domain.isolated is None else {**state, "isolated": domain.isolated}

    def outputs(values: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        own = {f"potential.{k}": t for k, t in values.items() if k != "isolated"}
        found: tuple[Tensor, Tensor] = functional_call(domain, own, tensors, {"isolated": values.get("isolated")})
        return found

    example, _ = with_images(graph)  # sizes that differ, so that none is taken for another
    with fx_config.patch(use_duck_shape=False):
        module = make_fx(outputs, tracing_mode="symbolic")(inputs, *example)
    rewrite(module, opaque=False)
    if domain.potential.device.type == "cuda":
        inline(module)
    return module, inputs


def compile_domain(domain: Domain, graph: Graph, path: Path) -> list[str]:
    """Write the program of a domain to a file (.pt2), and return the keys of the kernels that it calls.

    On the CPU it runs on one thread of each process. On GPUs it calls none: its kernels are inside.

    Args:
        domain: What to compile.
        graph: A structure to trace; at least two atoms and edges.
        path: File to make.

    Raises:
        RuntimeError: the compiler failed.
    """
    from torch.export import Dim  # seconds to import: only who compiles pays for it

    module, inputs = trace(domain, graph)
    keys = sorted({n.args[0] for n in module.graph.nodes if n.op == "call_function" and n.args and isinstance(n.args[0], str)})
    nodes, own, edges = (Dim(name, min=2) for name in ("n_nodes", "n_own", "n_edges"))
    example, _ = with_images(graph)
    try:
        with compiling():
            shapes = ({0: nodes}, {1: edges}, {0: edges}, {0: own})
            exported = torch.export.export(_Outputs(module, inputs, []), ([], *example), dynamic_shapes=([], shapes))
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs={"cpp.threads": 1})
    except Exception as error:  # whatever the compiler raises
        text = str(error).strip().splitlines()
        raise RuntimeError(f"the potential cannot be compiled: {text[0] if text else type(error).__name__}") from error
    return keys


def compare(run: Any, potential: Potential, graph: Graph) -> tuple[Tensor, Tensor]:
    """Raise RuntimeError unless a domain gives the potential's energies and gradients, alone and with images; returns the potential's own.

    Args:
        run: Takes what `Domain.forward` takes.
        potential: Plain.
        graph: A disordered structure.
    """
    vectors = graph.edge_vectors().requires_grad_()
    energies, *_ = potential._node_energies(graph, (vectors,), None)
    (slopes,) = torch.autograd.grad(energies.sum(), (vectors,))
    energies, tolerance = energies.detach(), TABLE_TOLERANCE[potential.dtype]
    scale = float(slopes.pow(2).mean().sqrt())
    mapped, owners = with_images(graph)
    for tensors, known in ((inputs_of(graph), owners[:0]), (mapped, owners)):
        with images(known):
            found = run(*tensors)
        sizes = (max(1e-2 * scale, 1e-2 * potential.energy_scale), max(scale, 1e-2 * potential.energy_scale))
        for name, a, b, size in zip(("energies", "gradients"), (energies, slopes), found, sizes, strict=True):
            deviation = float((a - b).abs().max()) / size
            if not deviation < 10 * tolerance:
                raise RuntimeError(f"the {name} of a domain differ from the potential's by {deviation:.1e} (relative)")
    return energies, slopes
