"""Real spherical harmonics of unit vectors, and the 3j symbols that couple them."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from gossamer.nn.layers import Constant, cat


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


class SphericalHarmonics(nn.Module):
    """Real spherical harmonics of degrees 0 … l_max, degree by degree, orders m = -l … l.

    The y axis is the pole, and components have the order and sign of e3nn: Y_1 = (x, y, z) up to its length. Each degree
    is the coupling of the one below with the vector itself, two small operations instead of dozens:

        Y_l = c_l Σ w3j(1, l - 1, l) u Y_(l-1)

    Every degree has a constant length: sum_m Y_lm² is 1 ("norm") or 2 l + 1 ("component").
    """

    def __init__(self, l_max: int, normalization: Literal["norm", "component"]) -> None:
        super().__init__()
        pole = np.array([0.0, 1.0, 0.0])
        value = np.ones(1)
        tables = []
        for l in range(1, l_max + 1):
            coupling = wigner_3j(1, l - 1, l).reshape(-1, 2 * l + 1)
            at_pole = np.outer(pole, value).ravel() @ coupling  # only m = 0 is not zero there, and is 1
            coupling = coupling / at_pole[l]
            tables.append(Constant(coupling))
            value = np.eye(2 * l + 1)[l]
        self.tables: Any = nn.ModuleList(tables)
        self.lengths = [math.sqrt(2 * l + 1) if normalization == "component" else 1.0 for l in range(l_max + 1)]

    def forward(self, unit: Float[Tensor, "n 3"]) -> Float[Tensor, "n components"]:
        """Values (n, (l_max + 1)²) at unit vectors."""
        degree = torch.ones_like(unit[:, :1])
        degrees = [degree]
        for table, length in zip(self.tables, self.lengths[1:], strict=True):
            degree = (unit[:, :, None] * degree[:, None, :]).flatten(1) @ table()
            degrees.append(degree * length if length != 1 else degree)
        return cat(degrees, 1)
