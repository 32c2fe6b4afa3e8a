"""Products of O(3) representations along edges: the irreps of features, and the channel-wise product of NequIP.

Features of several irreps lie in one tensor (n, width): block after block, and within a block component by component, channels last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.nn.layers import UNIT_SILU, Constant, cat, split, sum_by_index
from gossamer.nn.products import Convolution, EdgeConvolution, Edges, Product
from gossamer.nn.spherical import wigner_3j

UNIT_TANH = 1.5937334472592695
"""c with <(c tanh(z))²> = 1 for normal z, as e3nn estimates it"""


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


def paths_between(irreps: Sequence[Irrep], l_max: int, wanted: Sequence[tuple[int, int]], parity: int = -1) -> list[Path]:
    """Paths from feature blocks times harmonics 0 … l_max to the wanted (l, p), sorted by block; ``parity`` of odd harmonics: -1 is natural.

    Raises:
        ValueError: no path leads to one of them.
    """
    found = [path for path in _all_paths(irreps, l_max, parity) if path.out in wanted]
    unreached = [kind for kind in wanted if kind not in {p.out for p in found}]
    if unreached:
        raise ValueError(f"No product of {list(irreps)} with harmonics up to l = {l_max} gives (l, parity) {unreached}.")
    return found


def reachable(irreps: Sequence[Irrep], l_max: int, wanted: Irrep, parity: int = -1) -> bool:
    """Whether a path leads from some block to (l, p)."""
    return any(path.out == wanted.kind for path in _all_paths(irreps, l_max, parity))


def _all_paths(irreps: Sequence[Irrep], l_max: int, parity: int) -> Iterator[Path]:
    for block, irrep in enumerate(irreps):
        for l_edge in range(l_max + 1):
            for l_out in range(abs(irrep.l - l_edge), irrep.l + l_edge + 1):
                yield Path(block, l_edge, (l_out, irrep.p * parity**l_edge))


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
        self.signature = tuple(i.kind for i in irreps_in), tuple(paths)  # layers that share it share their matrices
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
        matrices = edges.once(self.signature, lambda: self.matrices(edges.harmonics))
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


class FeatureNorm(nn.Module):
    """x_l <- γ_l x_l / sqrt(Σ_l s_l <|x_l|² / (2 l + 1)> + ε), where <> is the mean over the channels of a block."""

    def __init__(self, irreps: Sequence[Irrep], shares: Sequence[float] | None = None, epsilon: float = 1e-2, gamma: float = 1.0) -> None:
        """
        Args:
            irreps: Blocks of the features.
            shares: s_l of each block; by default that of its channels among all.
            epsilon: Small: features get unit variance. 1: large ones are bounded, and with γ = sqrt(2) those near unit variance hardly change.
            gamma: At first.
        """
        super().__init__()
        self.irreps, self.epsilon = list(irreps), epsilon
        self.gamma = nn.ParameterList(nn.Parameter(torch.full((i.mul,), gamma)) for i in self.irreps)
        muls = np.array([float(i.mul) for i in self.irreps])
        self.shares = Constant(muls / muls.sum() if shares is None else np.array(shares))

    def forward(self, x: Float[Tensor, "N width"]) -> Tensor:
        return cat([part.flatten(1) for part in self.of(blocks(x, self.irreps))], 1)

    def of(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The same of blocks (N, 2 l + 1, mul)."""
        squares = torch.stack([(part**2).mean(dim=1).mean(dim=1) for part in parts], dim=1)
        scale = torch.rsqrt((squares * self.shares()).sum(dim=1) + self.epsilon)  # smooth at zero: an atom without neighbours stays zero
        return [part * gamma * scale[:, None, None] for part, gamma in zip(parts, self.gamma, strict=True)]


def gate(results: Sequence[Tensor], irreps: Sequence[Irrep]) -> Tensor:
    """SiLU of even scalars, tanh of odd ones, and the other blocks times SiLU of their gates, which follow the even scalars; all of unit variance.

    Args:
        results: Blocks (N, 2 l + 1, mul) of ``irreps``, that of even scalars with the gates of all others.
        irreps: Blocks of the result, even scalars first of all that have gates.
    """
    gates: Any = iter(())
    out = []
    for irrep, block in zip(irreps, results, strict=True):
        if irrep.kind == (0, 1):
            block = UNIT_SILU * nn.functional.silu(block)
            block, *gates = split(block, [irrep.mul, *(i.mul for i in irreps if i.l > 0)], 2)
            gates = iter(gates)
        elif irrep.l == 0:
            block = UNIT_TANH * torch.tanh(block)
        else:
            block = block * next(gates)
        out.append(block.flatten(1))
    return cat(out, 1)
