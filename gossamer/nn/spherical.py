"""Real spherical harmonics of unit vectors."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


def spherical_harmonics(
    unit: Float[Tensor, "n 3"], l_max: int, normalization: Literal["norm", "component"]
) -> Float[Tensor, "n components"]:
    """Real spherical harmonics of degrees 0 … l_max, degree by degree, orders m = -l … l.

        Y_lm = N_lm P_l^(m)(y) Re or Im (z + i x)^|m|,      N_lm² = (2 - δ_m0) (l - |m|)! / (l + |m|)!

    with P_l^(m) the m-th derivative of the Legendre polynomial: y is the polar axis and the order of components is that
    of e3nn, so Y_1 = (x, y, z). Every degree has a constant length: sum_m Y_lm² is 1 ("norm") or 2 l + 1 ("component").

    Args:
        unit: Unit vectors.
        l_max: Highest degree.
        normalization: Length of each degree.
    """
    x, y, z = unit.unbind(dim=1)
    cosine, sine = [torch.ones_like(x)], [torch.zeros_like(x)]  # real and imaginary part of (z + i x)^m
    for _ in range(l_max):
        cosine, sine = [*cosine, cosine[-1] * z - sine[-1] * x], [*sine, cosine[-1] * x + sine[-1] * z]
    # derivatives of Legendre polynomials by recursion in l at fixed m
    legendre: dict[tuple[int, int], Tensor] = {}
    for m in range(l_max + 1):
        legendre[m, m] = torch.full_like(y, math.prod(range(1, 2 * m, 2)))
        for l in range(m + 1, l_max + 1):
            below = legendre[l - 2, m] * (l + m - 1) if l > m + 1 else 0.0
            legendre[l, m] = ((2 * l - 1) * y * legendre[l - 1, m] - below) / (l - m)
    components = []
    for l in range(l_max + 1):
        length = math.sqrt(2 * l + 1) if normalization == "component" else 1.0
        for m in range(-l, l + 1):
            a = abs(m)
            factor = length * math.sqrt((2 if m else 1) * math.factorial(l - a) / math.factorial(l + a))
            components.append(factor * legendre[l, a] * (sine[a] if m < 0 else cosine[a]))
    return torch.stack(components, dim=1)
