"""Products of O(3) representations: 3j symbols, bookkeeping of irreps, and the channel-wise product of NequIP.

Features of several irreps lie in one tensor (n, width): block after block, and within a block component by component,
channels last: (2 l + 1, mul) row by row. One gather or sum then serves all irreps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn


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
    parts = features.split([i.width for i in irreps], dim=1)
    return [part.reshape(-1, i.dim, i.mul) for part, i in zip(parts, irreps, strict=True)]


class Table(nn.Module):
    """A constant tensor that stays exact when the module changes its precision to and fro."""

    values: Tensor

    def __init__(self, values: NDArray[np.float64]) -> None:
        super().__init__()
        self.exact = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
        self.register_buffer("values", self.exact.to(torch.get_default_dtype()), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Table:
        super()._apply(fn, recurse)
        self.values = self.exact.to(self.values)
        return self

    def forward(self) -> Tensor:
        return self.values


# --- 3j symbols ---------------------------------------------------------------------------------------------------


def _clebsch_gordan(l1: int, m1: int, l2: int, m2: int, l3: int, m3: int) -> float:
    """<l1 m1 l2 m2 | l3 m3> by Racah's formula."""
    if m1 + m2 != m3:
        return 0.0
    f = math.factorial
    scale = (2 * l3 + 1) * f(l3 + l1 - l2) * f(l3 - l1 + l2) * f(l1 + l2 - l3) / f(l1 + l2 + l3 + 1)
    scale *= f(l3 + m3) * f(l3 - m3) * f(l1 - m1) * f(l1 + m1) * f(l2 - m2) * f(l2 + m2)
    total = 0.0
    for k in range(l1 + l2 - l3 + 1):
        terms = (k, l1 + l2 - l3 - k, l1 - m1 - k, l2 + m2 - k, l3 - l2 + m1 + k, l3 - l1 - m2 + k)
        if min(terms) >= 0:
            total += (-1) ** k / math.prod(f(t) for t in terms)
    return math.sqrt(scale) * total


def _real_basis(l: int) -> NDArray[np.complex128]:
    """Rows: complex orders m; columns: the real harmonics of `spherical_harmonics`, times (-i)^l so that 3j symbols are real."""
    q = np.zeros((2 * l + 1, 2 * l + 1), dtype=complex)
    q[l, l] = 1
    for m in range(1, l + 1):
        q[l - m, l + m], q[l - m, l - m] = 1 / math.sqrt(2), -1j / math.sqrt(2)
        q[l + m, l + m], q[l + m, l - m] = (-1) ** m / math.sqrt(2), 1j * (-1) ** m / math.sqrt(2)
    return (-1j) ** l * q


@functools.cache
def wigner_3j(l1: int, l2: int, l3: int) -> NDArray[np.float64]:
    """Real 3j symbols (2 l1 + 1, 2 l2 + 1, 2 l3 + 1): the invariant tensor of three degrees, with norm 1.

    Its sign is that of e3nn's ``wigner_3j``.
    """
    if not abs(l1 - l2) <= l3 <= l1 + l2:
        raise ValueError(f"l = {l1}, {l2}, {l3} do not couple: the third must lie between |l1 - l2| and l1 + l2.")
    order = sorted(range(3), key=lambda k: (l1, l2, l3)[k])
    if order != [0, 1, 2]:  # exchanging two degrees multiplies by (-1)^(l1 + l2 + l3), exactly
        even = order in ([1, 2, 0], [2, 0, 1])
        symbols = wigner_3j(*sorted((l1, l2, l3))).transpose(np.argsort(order))
        return symbols if even else symbols * (-1) ** (l1 + l2 + l3)
    shape = (2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1)
    coupled = np.zeros(shape)
    for m1 in range(-l1, l1 + 1):
        for m2 in range(-l2, l2 + 1):
            if abs(m1 + m2) <= l3:
                coupled[l1 + m1, l2 + m2, l3 + m1 + m2] = _clebsch_gordan(l1, m1, l2, m2, l3, m1 + m2)
    q1, q2, q3 = (_real_basis(l) for l in (l1, l2, l3))
    real = np.einsum("ia,jb,kc,ijk->abc", q1, q2, q3.conj(), coupled).real
    return real / np.linalg.norm(real)


# --- the channel-wise product -------------------------------------------------------------------------------------


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
            tables.append(Table(table.reshape((l_max + 1) ** 2, -1)))
        self.tables: Any = nn.ModuleList(tables)
        kinds = sorted({p.out for p in self.paths})  # by degree, odd parity first, as e3nn sorts them
        self.irreps_out = [Irrep(sum(self.irreps_in[p.block].mul for p in self.paths if p.out == kind), *kind) for kind in kinds]
        """what `collect` returns: for each (l, p) all paths side by side, in the order of ``paths``"""

    def matrices(self, harmonics: Float[Tensor, "E S"]) -> list[Float[Tensor, "E rows dim"]]:
        """For each input block the matrix of each edge that holds all its paths; depends on directions alone."""
        return [(harmonics @ table()).reshape(len(harmonics), -1, i.dim) for table, i in zip(self.tables, self.irreps_in, strict=True)]

    def messages(self, features: Float[Tensor, "E width"], matrices: Sequence[Tensor], weights: Float[Tensor, "E W"]) -> Tensor:
        """Products on edges: (E, sum over paths of (2 l_out + 1) mul), ordered by path.

        Args:
            features: Features of the sender of each edge.
            matrices: From ``matrices``.
            weights: Radial weights, one per path and channel, ordered by path.
        """
        results = []
        first = 0
        for k, (block, matrix) in enumerate(zip(blocks(features, self.irreps_in), matrices, strict=True)):
            mine = [p for p in self.paths if p.block == k]
            if not mine:
                continue
            product = torch.bmm(matrix, block) if block.shape[1] > 1 else matrix * block
            mul = self.irreps_in[k].mul
            row = 0
            for p in mine:
                rows = 2 * p.out[0] + 1
                scaled = product[:, row : row + rows] * weights[:, None, first : first + mul]
                results.append(scaled.reshape(-1, rows * mul))
                row += rows
                first += mul
        return torch.cat(results, dim=1)

    def collect(self, sums: Float[Tensor, "N total"]) -> list[Float[Tensor, "N dim channels"]]:
        """Sums over neighbours of ``messages``, regrouped as ``irreps_out``."""
        widths = [(2 * p.out[0] + 1) * self.irreps_in[p.block].mul for p in self.paths]
        parts = [part.reshape(len(sums), 2 * p.out[0] + 1, -1) for part, p in zip(sums.split(widths, dim=1), self.paths, strict=True)]
        return [torch.cat([part for part, p in zip(parts, self.paths, strict=True) if p.out == i.kind], dim=2) for i in self.irreps_out]
