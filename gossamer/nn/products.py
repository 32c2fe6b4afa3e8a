"""Sums over neighbours of radial functions times products of features with harmonics: the operations that networks pass messages by.

    out_i[o][m, u] += Σ_j R_p,u(x_ij) Σ_{c, s} C_p[m, c, s] Y_s(ij) f_j[b][c, u]        for each product p: block b -> block o

NequIP (C: 3j symbols), PaiNN and LEIGNN (C: ones) and SchNet (one product of scalars) have this form. Features (N, width) and
results lie block after block, within a block component by component, channels last. An operation owns its radial functions;
its ``forward`` is what a kernel that takes its place has to give (`gossamer.engine.kernels`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from gossamer.nn.edges import Edges
from gossamer.nn.layers import Constant, cat, split, sum_by_index
from gossamer.nn.spherical import wigner_3j

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

    def structure(self) -> str:
        """Everything but the number of channels, as text: what the source of a kernel depends on."""
        products = [[p.block, p.edge, p.coefficients.shape, np.round(p.coefficients, 14).ravel().tolist()] for p in self.products]
        return json.dumps([[d for d, _ in self.blocks_in], products, self.n_harmonics])

    @cached_property
    def key(self) -> str:
        """Name of the structure."""
        return hashlib.sha256(self.structure().encode()).hexdigest()[:16]

    def definition(
        self,
        features: Float[Tensor, "N width_in"],
        harmonics: Float[Tensor, "E S"],
        weights: Float[Tensor, "E values"],
        edge_index: Int[Tensor, "2 E"],
    ) -> Float[Tensor, "N width_out"]:
        """The sum as it is written above, with the radial functions of every edge; for tests."""
        sender, receiver = edge_index
        radial = torch.split(weights, self.channels, dim=1)
        parts = [b.reshape(-1, *s) for b, s in zip(features.split([d * m for d, m in self.blocks_in], 1), self.blocks_in, strict=True)]
        out = [features.new_zeros(features.shape[0], d, m) for d, m in self.blocks_out]
        for p, own in zip(self.products, radial, strict=True):
            c = torch.from_numpy(p.coefficients).to(features)
            y = harmonics[:, p.edge : p.edge + c.shape[2]]
            messages = torch.einsum("mcs,es,ecu,eu->emu", c, y, parts[p.block].index_select(0, sender), own)
            channels = torch.arange(p.channel, p.channel + own.shape[1], device=features.device)
            sums = torch.zeros_like(out[p.out]).index_select(2, channels).index_add(0, receiver, messages)
            out[p.out] = out[p.out].index_add(2, channels, sums)
        return torch.cat([o.flatten(1) for o in out], dim=1)


# --- operations ------------------------------------------------------------------------------------------------------


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

    def __init__(self, channels: int, radial: nn.Module) -> None:
        one = Product(0, 0, 0, 0, np.ones((1, 1, 1)))
        super().__init__(Convolution(((1, channels),), ((1, channels),), (one,), 1), radial)

    def forward(self, features: Float[Tensor, "N H"], edges: Edges) -> Float[Tensor, "N H"]:
        messages = features.index_select(0, edges.sender) * self.radial(edges.basis)
        return sum_by_index(messages, edges.receiver, features.shape[0])


class VectorConvolution(EdgeConvolution):
    """Messages of PaiNN and LEIGNN from node features (scalars a, scalars b, and with ``relay`` vectors v):

    scalars += Σ R_1 a_j,    vectors += Σ R_2 b_j u_ij + R_3 v_j,    harmonics (1, u_x, u_y, u_z)
    """

    def __init__(self, channels: int, relay: bool, radial: nn.Module) -> None:
        one, three = np.ones((1, 1, 1)), np.eye(3)
        products = [Product(0, 0, 0, 0, one), Product(1, 1, 1, 0, three[:, None, :])]
        if relay:
            products.append(Product(2, 0, 1, 0, three[:, :, None]))
        blocks_in = ((1, channels), (1, channels), *(((3, channels),) if relay else ()))
        super().__init__(Convolution(blocks_in, ((1, channels), (3, channels)), tuple(products), 4), radial)
        self.channels, self.relay = channels, relay

    def forward(self, features: Float[Tensor, "N width_in"], edges: Edges) -> Float[Tensor, "N width_out"]:
        h, n = self.channels, features.shape[0]
        a, b, *v = split(features.index_select(0, edges.sender), [h, h, 3 * h] if self.relay else [h, h], 1)
        r_a, r_b, *r_v = split(self.radial(edges.basis), self.convolution.channels, 1)
        vectors = (b * r_b)[:, None] * edges.harmonics[:, 1:, None]  # (E, 3, H)
        if self.relay:
            vectors = vectors + r_v[0][:, None] * v[0].reshape(-1, 3, h)
        return cat([sum_by_index(a * r_a, edges.receiver, n), sum_by_index(vectors, edges.receiver, n).flatten(1)], 1)


# --- products of O(3) representations --------------------------------------------------------------------------------


class Irrep(NamedTuple):
    """``mul`` copies of the irreducible representation of degree ``l`` and parity ``p`` (1 even, -1 odd)."""

    mul: int
    l: int
    p: int

    @property
    def dim(self) -> int:
        return 2 * self.l + 1

    @property
    def width(self) -> int:
        return self.mul * self.dim

    @property
    def kind(self) -> tuple[int, int]:
        return self.l, self.p


def blocks(features: Float[Tensor, "n width"], irreps: Sequence[Irrep]) -> list[Tensor]:
    """Views (n, 2 l + 1, mul) of the blocks of a feature tensor."""
    parts = split(features, [i.width for i in irreps], 1)
    return [part.reshape(-1, i.dim, i.mul) for part, i in zip(parts, irreps, strict=True)]


class Path(NamedTuple):
    """One coupling of a block of the first factor with a degree of the second."""

    block: int
    l_edge: int
    out: tuple[int, int]
    """degree and parity of the result"""


def paths_between(irreps: Sequence[Irrep], l_max: int, wanted: Sequence[tuple[int, int]]) -> list[Path]:
    """Paths from feature blocks times harmonics 0 … l_max (natural parity) to the wanted (l, p), sorted by block.

    Raises:
        ValueError: no path leads to one of them.
    """
    found = []
    for block, irrep in enumerate(irreps):
        for l_edge in range(l_max + 1):
            for l_out in range(abs(irrep.l - l_edge), irrep.l + l_edge + 1):
                out = (l_out, irrep.p * (-1) ** l_edge)
                if out in wanted:
                    found.append(Path(block, l_edge, out))
    unreached = [kind for kind in wanted if kind not in {p.out for p in found}]
    if unreached:
        raise ValueError(f"No product of {list(irreps)} with harmonics up to l = {l_max} gives (l, parity) {unreached}.")
    return found


def reachable(irreps: Sequence[Irrep], l_max: int, wanted: Irrep) -> bool:
    """Whether a product of some block with harmonics of natural parity up to l_max gives (l, p)."""
    return any(
        abs(i.l - l_edge) <= wanted.l <= i.l + l_edge and i.p * (-1) ** l_edge == wanted.p for i in irreps for l_edge in range(l_max + 1)
    )


class Coupling(EdgeConvolution):
    """Σ_j R_path,u(r_ij) sqrt(2 l_out + 1) Σ_{m1,m2} w3j(l1, l_e, l_out) y_j,l1[u] Y_l_e(r_ij), the "uvu" product of NequIP.

    Channel u of the input stays channel u. Per edge and input block the harmonics are first contracted with the 3j
    symbols of all its paths, (components out, components in), in one small matrix; that matrix then acts on all channels
    at once. The result holds, for each (l, p), all paths side by side: ``irreps_out``.
    """

    def __init__(self, irreps_in: Sequence[Irrep], l_max: int, paths: Sequence[Path], radial: nn.Module) -> None:
        """
        Args:
            irreps_in: Blocks of the node features.
            l_max: Highest degree of the harmonics.
            paths: From `paths_between`.
            radial: One radial function for each channel of each path, in their order.
        """
        kinds = sorted({p.out for p in paths})  # by degree, odd parity first, as e3nn sorts them
        channel = dict.fromkeys(kinds, 0)
        products = []
        for p in paths:
            irrep = irreps_in[p.block]
            symbols = wigner_3j(irrep.l, p.l_edge, p.out[0]) * math.sqrt(2 * p.out[0] + 1)  # (in, edge, out)
            products.append(Product(p.block, p.l_edge**2, kinds.index(p.out), channel[p.out], symbols.transpose(2, 0, 1)))
            channel[p.out] += irrep.mul
        irreps_out = [Irrep(channel[kind], *kind) for kind in kinds]
        blocks_in, blocks_out = (tuple((i.dim, i.mul) for i in irreps) for irreps in (irreps_in, irreps_out))
        super().__init__(Convolution(blocks_in, blocks_out, tuple(products), (l_max + 1) ** 2), radial)
        self.irreps_in, self.irreps_out = list(irreps_in), irreps_out
        self.rows = [[2 * p.out[0] + 1 for p in paths if p.block == k] for k in range(len(irreps_in))]
        """components of the results of each block"""
        tables = []
        for k, irrep in enumerate(irreps_in):
            table, first = np.zeros(((l_max + 1) ** 2, sum(self.rows[k]), irrep.dim)), 0
            for product in (p for p in products if p.block == k):
                rows, _, n_edge = product.coefficients.shape
                table[product.edge : product.edge + n_edge, first : first + rows] = product.coefficients.transpose(2, 0, 1)
                first += rows
            tables.append(Constant(table.reshape((l_max + 1) ** 2, -1)))
        self.tables: Any = nn.ModuleList(tables)

    def forward(self, features: Float[Tensor, "N width_in"], edges: Edges) -> Float[Tensor, "N width_out"]:
        n = features.shape[0]
        matrices = edges.once(self.convolution.key, lambda: self.matrices(edges.harmonics))
        messages = self.messages(features.index_select(0, edges.sender), matrices, self.radial(edges.basis))
        return self.by_kind(sum_by_index(messages, edges.receiver, n))

    def matrices(self, harmonics: Float[Tensor, "E S"]) -> list[Float[Tensor, "E rows dim"]]:
        """For each input block the matrix of each edge that holds all its paths; depends on directions alone."""
        return [
            (harmonics @ table()).reshape(harmonics.shape[0], sum(rows), i.dim)
            for table, rows, i in zip(self.tables, self.rows, self.irreps_in, strict=True)
        ]

    def messages(self, features: Float[Tensor, "E width"], matrices: Sequence[Tensor], weights: Float[Tensor, "E W"]) -> Tensor:
        """Products on edges: (E, sum over paths of (2 l_out + 1) mul), ordered by path."""
        radial = iter(split(weights, self.convolution.channels, 1))
        results = []
        for block, matrix, rows in zip(blocks(features, self.irreps_in), matrices, self.rows, strict=True):
            if rows:
                product = torch.bmm(matrix, block) if block.shape[1] > 1 else matrix * block
                results += [(part * next(radial)[:, None]).flatten(1) for part in split(product, rows, 1)]
        return cat(results, 1)

    def by_kind(self, sums: Float[Tensor, "N total"]) -> Float[Tensor, "N width_out"]:
        """Sums ordered by path, regrouped as ``irreps_out``."""
        products = self.convolution.products
        sizes = [(p.coefficients.shape[0], m) for p, m in zip(products, self.convolution.channels, strict=True)]
        parts = [part.reshape(-1, *s) for part, s in zip(split(sums, [d * m for d, m in sizes], 1), sizes, strict=True)]
        groups = [[part for part, p in zip(parts, products, strict=True) if p.out == k] for k in range(len(self.irreps_out))]
        return cat([cat(group, 2).flatten(1) for group in groups], 1)
