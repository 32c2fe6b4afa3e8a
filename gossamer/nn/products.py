"""Products of O(3) representations: bookkeeping of irreps, and the channel-wise product of NequIP.

Features of several irreps lie in one tensor (n, width): block after block, and within a block component by component,
channels last: (2 l + 1, mul) row by row. One gather or sum then serves all irreps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.engine.kernels.product import Convolution, Product
from gossamer.nn.layers import Constant, cat, split
from gossamer.nn.spherical import wigner_3j


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
    """Paths from feature blocks times harmonics 0 … l_max (natural parity) to the wanted (l, p), sorted by block."""
    found = []
    for block, irrep in enumerate(irreps):
        for l_edge in range(l_max + 1):
            for l_out in range(abs(irrep.l - l_edge), irrep.l + l_edge + 1):
                out = (l_out, irrep.p * (-1) ** l_edge)
                if out in wanted:
                    found.append(Path(block, l_edge, out))
    return found


class Coupling(nn.Module):
    """Σ_j R_path,u(r_ij) sqrt(2 l_out + 1) Σ_{m1,m2} w3j(l1, l_e, l_out) y_j,l1[u] Y_l_e(r_ij), the "uvu" product.

    Channel u of the input stays channel u. Per edge and input block the harmonics are first contracted with the 3j
    symbols of all its paths, (components out, components in), in one small matrix; that matrix then acts on all channels
    at once.
    """

    def __init__(self, irreps_in: Sequence[Irrep], l_max: int, wanted: Sequence[tuple[int, int]]) -> None:
        """
        Args:
            irreps_in: Blocks of the node features.
            l_max: Highest degree of the harmonics.
            wanted: Degrees and parities of the results that are used.

        Raises:
            ValueError: no path leads to one of them.
        """
        super().__init__()
        self.irreps_in = list(irreps_in)
        self.n_harmonics = (l_max + 1) ** 2
        self.paths = paths_between(irreps_in, l_max, wanted)
        unreached = [kind for kind in wanted if kind not in {p.out for p in self.paths}]
        if unreached:
            raise ValueError(f"No product of {list(irreps_in)} with harmonics up to l = {l_max} gives (l, parity) {unreached}.")
        self.num_weights = sum(self.irreps_in[p.block].mul for p in self.paths)
        tables = []
        for k, irrep in enumerate(self.irreps_in):
            mine = [p for p in self.paths if p.block == k]
            rows = sum(2 * p.out[0] + 1 for p in mine)
            table = np.zeros(((l_max + 1) ** 2, rows, irrep.dim))
            first = 0
            for p in mine:
                symbols = wigner_3j(irrep.l, p.l_edge, p.out[0]) * math.sqrt(2 * p.out[0] + 1)  # (in, edge, out)
                table[p.l_edge**2 : (p.l_edge + 1) ** 2, first : first + 2 * p.out[0] + 1] = symbols.transpose(1, 2, 0)
                first += 2 * p.out[0] + 1
            tables.append(Constant(table.reshape((l_max + 1) ** 2, -1)))
        self.tables: Any = nn.ModuleList(tables)
        self.rows = [sum(2 * p.out[0] + 1 for p in self.paths if p.block == k) for k in range(len(self.irreps_in))]
        kinds = sorted({p.out for p in self.paths})  # by degree, odd parity first, as e3nn sorts them
        self.irreps_out = [Irrep(sum(self.irreps_in[p.block].mul for p in self.paths if p.out == kind), *kind) for kind in kinds]
        """what `collect` returns: for each (l, p) all paths side by side, in the order of ``paths``"""

    def convolution(self) -> Convolution:
        """The same products for a kernel, which returns what ``collect`` does, block after block."""
        kinds = [i.kind for i in self.irreps_out]
        channel = dict.fromkeys(kinds, 0)
        products = []
        for p in self.paths:
            irrep = self.irreps_in[p.block]
            symbols = wigner_3j(irrep.l, p.l_edge, p.out[0]) * math.sqrt(2 * p.out[0] + 1)  # (in, edge, out)
            products.append(Product(p.block, p.l_edge**2, kinds.index(p.out), channel[p.out], symbols.transpose(2, 0, 1)))
            channel[p.out] += irrep.mul
        blocks_in, blocks_out = (tuple((i.dim, i.mul) for i in irreps) for irreps in (self.irreps_in, self.irreps_out))
        return Convolution(blocks_in, blocks_out, tuple(products), self.n_harmonics)

    def matrices(self, harmonics: Float[Tensor, "E S"]) -> list[Float[Tensor, "E rows dim"]]:
        """For each input block the matrix of each edge that holds all its paths; depends on directions alone."""
        return [
            (harmonics @ table()).reshape(harmonics.shape[0], rows, i.dim)
            for table, rows, i in zip(self.tables, self.rows, self.irreps_in, strict=True)
        ]

    def messages(self, features: Float[Tensor, "E width"], matrices: Sequence[Tensor], weights: Float[Tensor, "E W"]) -> Tensor:
        """Products on edges: (E, sum over paths of (2 l_out + 1) mul), ordered by path.

        Args:
            features: Features of the sender of each edge.
            matrices: From ``matrices``.
            weights: Radial weights, one per path and channel, ordered by path.
        """
        radial = iter(split(weights, [self.irreps_in[p.block].mul for p in self.paths], 1))
        results = []
        for k, (block, matrix) in enumerate(zip(blocks(features, self.irreps_in), matrices, strict=True)):
            rows = [2 * p.out[0] + 1 for p in self.paths if p.block == k]
            if rows:
                product = torch.bmm(matrix, block) if block.shape[1] > 1 else matrix * block
                results += [(part * next(radial)[:, None]).flatten(1) for part in split(product, rows, 1)]
        return cat(results, 1)

    def collect(self, sums: Float[Tensor, "N total"]) -> list[Float[Tensor, "N dim channels"]]:
        """Sums over neighbours of ``messages``, regrouped as ``irreps_out``."""
        widths = [(2 * p.out[0] + 1) * self.irreps_in[p.block].mul for p in self.paths]
        parts = [part.reshape(sums.shape[0], 2 * p.out[0] + 1, -1) for part, p in zip(split(sums, widths, 1), self.paths, strict=True)]
        return [cat([part for part, p in zip(parts, self.paths, strict=True) if p.out == i.kind], 2) for i in self.irreps_out]
