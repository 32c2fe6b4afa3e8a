"""Kernels in the place of a network's operations, put there from outside.

The network is copied, its weights are shared, and each operation of the copy that a kernel can do is replaced by that kernel.
The network itself stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.engine.kernels import cpu, gpu, ops, polynomial
from gossamer.engine.kernels.cpu import Missing
from gossamer.engine.kernels.table import pack, passed, tabulate_all
from gossamer.nn.attention import Alignment, Attention
from gossamer.nn.layers import ElementLinear, ElementMaps
from gossamer.nn.polynomial import ElementPolynomial, Monomials, Polynomial
from gossamer.nn.products import Convolution, EdgeConvolution, Edges
from gossamer.potential import Potential

Use = Literal["inference", "validation", "training"]
"""weights stay as they are; weights change between calls; weights change, and forces are differentiated again"""
PAIR_BYTES = 1 << 28
"""of the tables of a layer for all pairs of elements, up to which they are all made beforehand"""


def attach_kernels(potential: Potential, use: Use = "inference") -> Potential:
    """A potential on the same weights that passes messages by kernels.

    For inference radial functions come from tables: energies and forces differ by about 1e-5 of the root mean square force in
    float32, 1e-9 in float64. Forces stay the exact gradient of the energy. Otherwise the kernels hold nothing of the weights.

    Args:
        potential: In the precision and on the device in which it will run.
        use: With "inference" its weights must not change afterwards.

    Raises:
        Missing: there are no kernels for this network and use, this device or this machine.
    """
    if potential.device.type not in ("cpu", "cuda"):
        raise Missing(f"there are no kernels for {potential.device.type}")
    quick = sharing_copy(potential, differentiable=use == "training")
    network = quick.network
    exact = copy.deepcopy(network).cpu().double() if use == "inference" else None
    replaced = 0
    for path, operation in list(network.named_modules()):
        with torch.device("cpu"):  # there tables are made, whatever the default is
            kernel = _kernel_for(operation, path, network, exact, use)
        if kernel is not None:
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, kernel)
            replaced += 1
    if not replaced:
        raise Missing(f"{potential.model_config.name} has no kernels" + (" for training" if use == "training" else ""))
    return quick.train(use == "training")


def sharing_copy(potential: Potential, differentiable: bool) -> Potential:
    """A copy of the modules on the same memory: weights that change in place change in both.

    If it is to be differentiable its parameters are the very ones of the potential, else they are detached.
    """
    shared: dict[int, Any] = {id(t): t for t in potential.buffers()}
    for p in potential.parameters():
        shared[id(p)] = p if differentiable else nn.Parameter(p.detach(), requires_grad=False)
    return copy.deepcopy(potential, shared)


def _kernel_for(operation: nn.Module, path: str, network: Any, exact: Any, use: Use) -> nn.Module | None:
    """What takes the place of an operation, if anything."""
    like = next(network.parameters())
    if isinstance(operation, EdgeConvolution):
        if use != "inference":
            return EdgeKernel(operation.convolution, operation.radial, like)
        radial = exact.get_submodule(path).radial
        return TableKernel(
            operation.convolution, lambda x, pair: radial(exact.pair_basis(x, pair)), like, network.radial_kinks, network.radial_pairs
        )
    if isinstance(operation, ElementLinear) and use == "inference":
        return FixedMaps(exact.get_submodule(path).maps(exact.embedding.weight).to(like))
    if isinstance(operation, ElementPolynomial) and use == "inference":
        return FixedPolynomial(operation, exact.get_submodule(path).coefficients().to(like))
    if isinstance(operation, Polynomial):
        return PolynomialKernel(operation.monomials, like, training=use == "training")
    if isinstance(operation, ElementMaps) and use == "inference":
        return FixedMaps(exact.get_submodule(path).maps().to(like))
    if isinstance(operation, Attention) and use != "training":
        return AttentionKernel(operation, like)
    if isinstance(operation, Alignment) and use != "training":
        return AlignmentKernel(operation, like)
    return None


# --- kernels as modules ----------------------------------------------------------------------------------------------


class Order(NamedTuple):
    """Edges by receiver and by sender, as kernels go through them."""

    edge_index: Int[Tensor, "2 E"]
    """(sender, receiver), sorted by receiver"""
    receiver_starts: Int[Tensor, " N+1"]
    """first edge of each receiver"""
    sender_starts: Int[Tensor, " N+1"]
    """first edge of each sender in ``by_sender``"""
    by_sender: Int[Tensor, " E"]
    """edges sorted by sender"""


def sort_edges(edge_index: Int[Tensor, "2 E"], nodes: Tensor) -> Order:
    """The order of edges that are sorted by receiver; ``nodes`` has one row per atom."""
    edge_index = edge_index.to(torch.int64).contiguous()
    return Order(edge_index, *torch.ops.gossamer.sort_edges(edge_index, nodes))


def harmonics_of(edges: Edges, convolution: Convolution) -> Float[Tensor, "E S"]:
    """The harmonics of the edges.

    Raises:
        ValueError: more or fewer than the kernel, which goes through memory by their number, was built for.
    """
    if edges.harmonics.shape[1] != convolution.n_harmonics:
        raise ValueError(f"edges have {edges.harmonics.shape[1]} harmonics, the convolution is one of {convolution.n_harmonics}")
    return edges.harmonics


def order_of(edges: Edges, nodes: Tensor) -> Order:
    """Likewise, made once for all layers."""
    found: Order = edges.once("order", lambda: sort_edges(edges.index, nodes))
    return found


class TableKernel(nn.Module):
    """An `EdgeConvolution` of weights that no longer change: its radial functions are a table, or one for each kind of pair of elements."""

    table: Tensor
    slots: Tensor

    def __init__(
        self,
        convolution: Convolution,
        radial: Callable[[Tensor, int], Tensor],
        like: Tensor,
        kinks: Sequence[float] = (),
        pairs: int = 0,
    ) -> None:
        """
        Args:
            convolution: The products.
            radial: Their radial functions of x = distance over cutoff, and kind of pair, (n,) -> (n, channels of all products), float64 on the CPU.
            like: A weight of the network, for its precision and device.
            kinks: x where their second derivative jumps.
            pairs: Kinds of pairs of elements that they tell apart; 0: none. Tables of all kinds are made at once where they
                fit into `PAIR_BYTES`, else when a kind is met for the first time.

        Raises:
            Missing: no kernel can be built on this machine, or the radial functions cannot be tabulated.
        """
        super().__init__()
        self.convolution, self.radial, self.kinks, self.pairs = convolution, radial, tuple(kinks), pairs
        self.key = ops.register(convolution, like.dtype, like.device.type)
        self.register_buffer("table", like.new_zeros(0), persistent=False)
        self.register_buffer("slots", torch.full((pairs,), -1, device=like.device), persistent=False)
        self.intervals = 0
        """of the table of each kind; 0: the one table decides"""
        self._add([0], like)
        everything = self.table.numel() * self.table.element_size() * max(pairs, 1)
        self.complete = everything <= PAIR_BYTES or pairs <= 1
        if self.complete and pairs > 1:
            self._add(list(range(1, pairs)), like)

    @torch.no_grad()
    def _add(self, kinds: list[int], like: Tensor) -> None:
        """Make the tables of these kinds of pairs beside those that there are.

        Raises:
            Missing: a radial function cannot be tabulated.
        """
        before = [k for _, k in sorted((slot, kind) for kind, slot in enumerate(self.slots.tolist()) if slot >= 0)]
        radials = [lambda x, kind=kind: self.radial(x, kind) for kind in (*before, *kinds)]
        try:
            tables = tabulate_all(radials, like.dtype, self.kinks, self.intervals)
        except ValueError as error:
            raise Missing(str(error)) from None
        if self.kinks or self.pairs:
            self.intervals = len(tables[0]) - 1 - len(self.kinks)
        rows = torch.cat(tables)
        on_gpu = like.device.type == "cuda"
        packed = pack(self.convolution, rows, gpu.LANES) if on_gpu else cpu.pack(self.convolution, rows, cpu.lanes(like.dtype))
        self.table = packed.to(like)
        if self.pairs:
            self.slots[kinds] = torch.arange(len(before), len(tables), device=self.slots.device)

    def first_row(self, edges: Edges) -> Int[Tensor, " E"] | None:
        """Row of the table where the intervals of each edge begin; None: the first."""
        row = edges.once(("passed", self.kinks), lambda: passed(edges.x, self.kinks)) if self.kinks else None
        if self.pairs:
            slots = self.slots.index_select(0, edges.pair)
            if not self.complete and (slots < 0).any():
                with torch.device("cpu"):
                    self._add(edges.pair[slots < 0].unique().tolist(), self.table)
                slots = self.slots.index_select(0, edges.pair)
            start = slots * (self.intervals + 1 + len(self.kinks))
            row = start if row is None else start + row
        return row

    def forward(self, features: Float[Tensor, "N width_in"], edges: Edges) -> Float[Tensor, "N width_out"]:
        order, row, harmonics = order_of(edges, features), self.first_row(edges), harmonics_of(edges, self.convolution)
        return torch.ops.gossamer.convolve(self.key, features, harmonics, edges.x, self.table, *order, row, self.intervals)


class EdgeKernel(nn.Module):
    """An `EdgeConvolution` whose radial functions are computed on every edge: can be differentiated any number of times."""

    def __init__(self, convolution: Convolution, radial: nn.Module, like: Tensor) -> None:
        """
        Raises:
            Missing: no kernel can be built on this machine.
        """
        super().__init__()
        self.convolution, self.radial = convolution, radial
        self.key = ops.register(convolution, like.dtype, like.device.type, edge_weights=True)

    def forward(self, features: Float[Tensor, "N width_in"], edges: Edges) -> Float[Tensor, "N width_out"]:
        order = order_of(edges, features)
        return torch.ops.gossamer.convolve_weighted(
            self.key, features, harmonics_of(edges, self.convolution), self.radial(edges.basis), *order
        )


class FixedMaps(nn.Module):
    """An `ElementLinear` or `ElementMaps` of weights that no longer change: the map of each element is kept."""

    maps: Tensor

    def __init__(self, maps: Float[Tensor, "elements n_in n_out"]) -> None:
        super().__init__()
        self.register_buffer("maps", maps.detach(), persistent=False)

    def forward(self, x: Float[Tensor, "N dim in"], species: Int[Tensor, " N"], table: Tensor | None = None) -> Tensor:
        return torch.ops.gossamer.map_by_species(x.contiguous(), species, self.maps)


class FixedPolynomial(ElementPolynomial):
    """An `ElementPolynomial` of weights that no longer change: the coefficients of each element are kept."""

    kept: Tensor

    def __init__(self, operation: ElementPolynomial, coefficients: Float[Tensor, "elements monomials C"]) -> None:
        nn.Module.__init__(self)
        self.monomials, self.polynomial = operation.monomials, operation.polynomial
        self.register_buffer("kept", coefficients.detach(), persistent=False)

    def coefficients(self) -> Float[Tensor, "elements monomials C"]:
        return self.kept


class PolynomialKernel(nn.Module):
    """A `Polynomial`; can be differentiated once, in x, or for training twice."""

    def __init__(self, monomials: Monomials, like: Tensor, training: bool) -> None:
        """
        Raises:
            Missing: no kernel can be built on this machine.
        """
        super().__init__()
        self.key = polynomial.register(monomials, like.dtype, like.device.type, training)

    def forward(
        self, x: Float[Tensor, "N n_in C"], species: Int[Tensor, " N"], coefficients: Float[Tensor, "elements monomials C"]
    ) -> Float[Tensor, "N n_out C"]:
        return torch.ops.gossamer.polynomial(self.key, x, species, coefficients)


class AttentionKernel(nn.Module):
    """`Attention` without dropout; can be differentiated once."""

    def __init__(self, operation: Attention, like: Tensor) -> None:
        """
        Raises:
            Missing: no kernel can be built on this machine.
        """
        super().__init__()
        _build_attention(operation.l_max, like)
        self.heads, self.channels = operation.heads, operation.channels

    def forward(self, queries: Tensor, keys: Tensor, scalars: Tensor, values: Tensor, steerables: Tensor | None, gates: Tensor,
                filters: Tensor, edges: Edges) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N S C"]]:  # fmt: skip
        x = queries.new_zeros(0, edges.harmonics.shape[1], queries.shape[1]) if steerables is None else steerables
        order = order_of(edges, queries)
        return torch.ops.gossamer.attend(self.heads, queries, keys, scalars, values, x, gates, filters, edges.harmonics, *order)


class AlignmentKernel(nn.Module):
    """`Alignment`; can be differentiated once."""

    def __init__(self, operation: Alignment, like: Tensor) -> None:
        """
        Raises:
            Missing: no kernel can be built on this machine.
        """
        super().__init__()
        _build_attention(operation.l_max, like)

    def forward(self, queries: Float[Tensor, "N S C"], keys: Float[Tensor, "N S C"], edges: Edges) -> Float[Tensor, "E C"]:
        return torch.ops.gossamer.perpendicular(queries, keys, edges.harmonics, *order_of(edges, queries))


def _build_attention(l_max: int, like: Tensor) -> None:
    if like.device.type == "cuda":
        gpu.need_triton()
    else:
        cpu.sorting()
        cpu.attention_library(l_max, like.dtype)
