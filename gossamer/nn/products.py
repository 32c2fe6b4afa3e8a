"""Sums over neighbours of radial functions times products of features with harmonics: the operations that networks pass messages by.

    out_i[o][m, u] += Σ_j R_p,u(x_ij) Σ_{c, s} C_p[m, c, s] Y_s(ij) f_j[b][c, u]        for each product p: block b -> block o

NequIP (C: 3j symbols), PaiNN and LEIGNN (C: ones) and SchNet (one product of scalars) have this form. Features (N, width) and
results lie block after block, within a block component by component, channels last. An operation owns its radial functions;
its ``forward`` is what a kernel that takes its place has to give (`gossamer.engine.kernels`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from gossamer.nn.layers import sum_by_index

# --- which products --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """One product of a block of features with some of the harmonics."""

    block: int
    """of the features"""
    edge: int
    """first harmonic that takes part"""
    out: int
    """block of the result"""
    channel: int
    """first channel there; products that share channels are added"""
    coefficients: NDArray[np.float64] = field(compare=False)
    """C: (components of the result, components of the features, harmonics)"""


@dataclass(frozen=True)
class Convolution:
    """All products of one operation."""

    blocks_in: tuple[tuple[int, int], ...]
    """(components, channels) of each block of the features"""
    blocks_out: tuple[tuple[int, int], ...]
    products: tuple[Product, ...]
    """sorted by block; the radial functions are theirs in this order, one for each channel"""
    n_harmonics: int

    def __post_init__(self) -> None:
        assert [p.block for p in self.products] == sorted(p.block for p in self.products)

    @cached_property
    def channels(self) -> list[int]:
        """Channels of each product."""
        return [self.blocks_in[p.block][1] for p in self.products]

    @property
    def width_in(self) -> int:
        return sum(d * m for d, m in self.blocks_in)

    @property
    def width_out(self) -> int:
        return sum(d * m for d, m in self.blocks_out)


# --- edges, as operations see them ------------------------------------------------------------------------------------


class Edges:
    """Indices, directions and distances of the edges; what several layers need of them is made once, by the first that asks."""

    def __init__(
        self,
        index: Int[Tensor, "2 E"],
        x: Float[Tensor, " E"],
        harmonics: Float[Tensor, "E S"],
        basis: Callable[[], Float[Tensor, "E B"]],
        pair: Int[Tensor, " E"] | None = None,
    ) -> None:
        """
        Args:
            index: (sender, receiver), sorted by receiver.
            x: Distance over cutoff.
            harmonics: Functions of the direction from receiver to sender.
            basis: Makes what radial functions are made from; called at most once, and not at all where kernels read tables.
            pair: Kind of the pair of elements, where the basis differs between them (`Network.radial_pairs`).
        """
        self.index, self.x, self.harmonics, self.pair = index, x, harmonics, pair
        self.sender, self.receiver = index
        self._basis = basis
        self._made: dict[Hashable, Any] = {}

    @property
    def basis(self) -> Float[Tensor, "E B"]:
        """Radial basis on every edge."""
        return self.once("basis", self._basis)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, made by the first that asks for ``key``."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


# --- operations ------------------------------------------------------------------------------------------------------


class Ends(nn.Module):
    """What atoms hold, at both ends of every edge: the operation by which networks look at neighbours, where no sum follows at once."""

    def forward(self, values: Tensor, edge_index: Int[Tensor, "2 E"]) -> tuple[Tensor, Tensor]:
        """(N, ...) values to those of the senders and those of the receivers, each (E, ...)."""
        sender, receiver = edge_index
        return values.index_select(0, sender), values.index_select(0, receiver)


class EdgeConvolution(nn.Module):
    """A sum over neighbours, (N, width_in) features and edges to (N, width_out); abstract."""

    convolution: Convolution
    radial: nn.Module
    """(E, B) basis -> (E, values) radial functions, all factors included"""

    def __init__(self, convolution: Convolution, radial: nn.Module) -> None:
        super().__init__()
        self.convolution, self.radial = convolution, radial

    def forward(self, features: Float[Tensor, "N width_in"], edges: Edges) -> Float[Tensor, "N width_out"]:
        raise NotImplementedError


class ScalarConvolution(EdgeConvolution):
    """Messages of SchNet: scalars += Σ R a_j."""

    def __init__(self, channels: int, radial: nn.Module, n_harmonics: int = 1) -> None:
        """``n_harmonics``: how many the edges have, of which the first is 1."""
        one = Product(0, 0, 0, 0, np.ones((1, 1, 1)))
        super().__init__(Convolution(((1, channels),), ((1, channels),), (one,), n_harmonics), radial)

    def forward(self, features: Float[Tensor, "N H"], edges: Edges) -> Float[Tensor, "N H"]:
        messages = features.index_select(0, edges.sender) * self.radial(edges.basis)
        return sum_by_index(messages, edges.receiver, features.shape[0])
