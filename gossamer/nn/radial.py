"""Radial functions: envelopes that vanish smoothly at the cutoff, and bases of the distance."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def polynomial_envelope(x: Float[Tensor, " n"], p: int, k: int = 2) -> Float[Tensor, " n"]:
    """Smooth step from 1 at x = 0 to 0 at x = 1, with ``k`` vanishing derivatives at x = 1.

        f_{p,k}(x) = 1 - x^p sum_{j=0..k} binom(p + j - 1, j) (1 - x)^j        for x < 1, else 0

    f vanishes as (1 - x)^(k + 1). k = 2 is the envelope of Gasteiger et al., ICLR 2020 (arXiv:2003.03123), Eq. 8,
    whose third derivative jumps at the cutoff; k = 3 is continuous through the third.

    Args:
        x: Distance over cutoff, not negative.
        p: Power of the leading term at small x.
        k: Number of derivatives that vanish at x = 1.
    """
    x = x.clamp(max=1.0)
    series = torch.zeros_like(x)
    for j in range(k, -1, -1):  # Horner in (1 - x)
        series = series * (1 - x) + math.comb(p + j - 1, j)
    return 1 - x**p * series


def gaussian_basis(x: Float[Tensor, " n"], num_basis: int) -> Float[Tensor, "n num_basis"]:
    """Gaussians with centres evenly on [0, 1] and width equal to their spacing.

        b_n(x) = exp(-(x - c_n)² / (2 w²)),    c_n = n / (num_basis - 1),  w = 1 / (num_basis - 1)

    Schütt et al., NeurIPS 2017 (arXiv:1706.08566), Eq. 3, on scaled distances. They do not vanish at the cutoff.
    """
    centres = torch.linspace(0, 1, num_basis, dtype=x.dtype, device=x.device)
    return torch.exp(-0.5 * ((x[:, None] - centres) * (num_basis - 1)) ** 2)


def bessel_basis(x: Float[Tensor, " n"], num_basis: int) -> Float[Tensor, "n num_basis"]:
    """Radial Bessel functions of the scaled distance x = r / cutoff, which vanish at x = 1 (their slope does not).

        b_n(x) = sqrt(2) sin(n pi x) / x,    n = 1 … num_basis

    Gasteiger et al., ICLR 2020 (arXiv:2003.03123), Eq. 7, times cutoff^(3/2), so without a unit. x must be positive.
    """
    n = torch.arange(1, num_basis + 1, dtype=x.dtype, device=x.device)
    return math.sqrt(2) * torch.sin(math.pi * n * x[:, None]) / x[:, None]


def unit_scale(num_basis: int, p: int, k: int) -> float:
    """Factor that gives sin(n π x) / x · f_p,k(x) unit mean square over n and over neighbours spread evenly in the outer 0.2 < x < 1."""
    x = torch.linspace(0.2, 1, 400, dtype=torch.float64)
    n = torch.arange(1, num_basis + 1, dtype=torch.float64)
    values = torch.sin(math.pi * n * x[:, None]) * (polynomial_envelope(x, p, k) / x)[:, None]
    return float(((values**2).mean(dim=1) * x**2).sum() / (x**2).sum()) ** -0.5
