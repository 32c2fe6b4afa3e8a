"""Radial functions as quintic Hermite splines: exact derivatives, continuous to the second, six numbers per value; and where they lie."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gossamer.nn.products import Convolution

KNOTS = (64, 128, 256, 512, 1024, 2048, 4096)
TOLERANCE = {torch.float32: 3e-7, torch.float64: 1e-11}
"""largest error of a spline, relative to the largest value of the radial functions: in float32 1e-6 leaves PaiNN 8 times its rounding error"""
NEAR = 9
"""points of the polynomial at zero"""


def hermite_weights(t: Tensor) -> tuple[Tensor, ...]:
    """Weights of (f, f', f'') at 0 and (f, f', f'') at 1 for the value at t in [0, 1]; f', f'' with respect to t."""
    t2, t3 = t * t, t * t * t
    late = t3 * (10 - 15 * t + 6 * t2)
    return (
        1 - late,
        t - t3 * (6 - 8 * t + 3 * t2),
        0.5 * t2 - t3 * (1.5 - 1.5 * t + 0.5 * t2),
        late,
        t3 * (-4 + 7 * t - 3 * t2),
        t3 * (0.5 - t + 0.5 * t2),
    )


def hermite_slopes(t: Tensor) -> tuple[Tensor, ...]:
    """Derivatives of ``hermite_weights``."""
    t2 = t * t
    late = 30 * t2 * (1 - t) ** 2
    return (
        -late,
        1 - t2 * (18 - 32 * t + 15 * t2),
        t - t2 * (4.5 - 6 * t + 2.5 * t2),
        late,
        t2 * (-12 + 28 * t - 15 * t2),
        t2 * (1.5 - 4 * t + 2.5 * t2),
    )


def tabulate(radial: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Float[Tensor, "knots 3 values"]:
    """Values and first two derivatives (in units of the interval) of a radial function at evenly spaced knots on [0, 1].

    Args:
        radial: Function of x = distance over cutoff (n,) in float64 that returns (n, values) in float64.
        dtype: Precision in which the table will be used; it decides how many knots are needed.

    Returns:
        float64 table.

    Raises:
        ValueError: no number of knots reaches the tolerance.
    """
    for intervals in KNOTS:
        x = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)
        x[-1] = math.nextafter(1.0, 0.0)  # from inside
        inside = torch.stack([f / intervals**k for k, f in enumerate(derivatives(radial, x[1:]))], dim=1)
        table = torch.cat([at_zero(radial, 1 / intervals)[None], inside])
        between = (torch.arange(intervals, dtype=torch.float64)[:, None] + torch.tensor([0.25, 0.5, 0.75])).flatten() / intervals
        error = float((interpolate(table, between) - radial(between)).abs().max())
        scale = float(table[:, 0].abs().max())
        if not math.isfinite(error):
            raise ValueError("a radial function is not finite")
        if error <= TOLERANCE[dtype] * max(scale, 1e-300):
            return table
    raise ValueError(
        f"a radial function cannot be tabulated: {KNOTS[-1]} intervals leave an error of {error / scale:.1e} of its largest value"
    )


def at_zero(radial: Callable[[Tensor], Tensor], interval: float) -> Float[Tensor, "3 values"]:
    """Value and first two derivatives (in units of the interval) at x = 0, from a polynomial through points beside it.

    There sin(x) / x and its like cannot be evaluated, and their derivatives lose all digits.
    """
    points = 0.5 - 0.5 * np.cos(math.pi * (np.arange(NEAR) + 0.5) / NEAR)  # in units of the interval
    values = radial(torch.from_numpy(points * interval)).numpy()
    powers = np.linalg.inv(np.vander(points, increasing=True))[:3] @ values
    return torch.from_numpy(powers * np.array([1.0, 1.0, 2.0])[:, None])


def derivatives(f: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """f, f', f'' of a function that acts on each element of x by itself: (n,) -> (n, values)."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        found = [f(x)]
        for _ in range(2):
            # Σ_w c_w f_w'(x) by reverse mode is linear in c: its derivative with respect to c is f'
            c = torch.ones_like(found[-1], requires_grad=True)
            (total,) = torch.autograd.grad(found[-1], x, c, create_graph=True)
            (slope,) = torch.autograd.grad(total.sum(), c, create_graph=True)
            found.append(slope)
    return [y.detach() for y in found]


def interpolate(table: Float[Tensor, "knots 3 values"], x: Float[Tensor, " n"]) -> Float[Tensor, "n values"]:
    """The spline at x, clamped to [0, 1]; differentiable with respect to x."""
    intervals = table.shape[0] - 1
    scaled = x.clamp(0, 1) * intervals
    knot = scaled.detach().floor().clamp(max=intervals - 1).to(torch.int64)
    weights = torch.stack(hermite_weights(scaled - knot), dim=1)
    both = torch.cat([table.index_select(0, knot), table.index_select(0, knot + 1)], dim=1)
    return torch.einsum("ek,ekw->ew", weights, both)


# --- how a kernel knows its products, and where they lie in its table ------------------------------------------------------------------------------


def structure_key(convolution: Convolution) -> str:
    """Name of everything but the number of channels: what the source of a kernel depends on."""
    products = [[p.block, p.edge, p.coefficients.shape, np.round(p.coefficients, 14).ravel().tolist()] for p in convolution.products]
    text = json.dumps([[d for d, _ in convolution.blocks_in], products, convolution.n_harmonics])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def layout(convolution: Convolution, lanes: int) -> list[int]:
    """For each product: channels, first number and stride of the block, of the result, and first chunk of the table."""
    starts = np.cumsum([0, *(d * m for d, m in convolution.blocks_in)]).tolist()
    outs = np.cumsum([0, *(d * m for d, m in convolution.blocks_out)]).tolist()
    numbers, chunk = [], 0
    for p, channels in zip(convolution.products, convolution.channels, strict=True):
        numbers += [channels, starts[p.block], channels, outs[p.out] + p.channel, convolution.blocks_out[p.out][1], chunk]
        chunk += -(-channels // lanes)
    return numbers


def pack(convolution: Convolution, table: Float[Tensor, "knots 3 values"], lanes: int) -> Float[Tensor, "chunks knots 3 lanes"]:
    """The table by chunks of channels, each product's last one filled up with zeros."""
    parts = []
    for part in torch.split(table, convolution.channels, dim=2):
        missing = -part.shape[2] % lanes
        filled = torch.nn.functional.pad(part, (0, missing))
        parts.append(filled.reshape(*filled.shape[:2], -1, lanes).permute(2, 0, 1, 3))
    return torch.cat(parts).contiguous()


def unpack(convolution: Convolution, packed: Float[Tensor, "chunks knots 3 lanes"]) -> Float[Tensor, "knots 3 values"]:
    lanes, first, parts = packed.shape[3], 0, []
    for channels in convolution.channels:
        chunks = -(-channels // lanes)
        parts.append(packed[first : first + chunks].permute(1, 2, 0, 3).flatten(2)[:, :, :channels])
        first += chunks
    return torch.cat(parts, dim=2)
