"""Radial functions as quintic Hermite splines: exact derivatives, continuous to the second, six numbers per value; and where they lie."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gossamer.nn.products import Convolution

KNOTS = (64, 128, 256, 512, 1024, 2048, 4096)
TOLERANCE = {torch.float32: 3e-7, torch.float64: 1e-11}
"""largest error of a spline, relative to the largest value of the radial functions: in float32 1e-6 leaves PaiNN 8 times its rounding error"""
NEAR = 9
"""points of the polynomial at zero"""
FINEST = 4096
"""largest denominator of a kink"""
BETWEEN = 16
"""intervals from one kink to the next, or to an end, at least: there a function can be steep"""


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


def tabulate(
    radial: Callable[[Tensor], Tensor], dtype: torch.dtype, kinks: Sequence[float] = (), at_least: int = 0
) -> Float[Tensor, "rows 3 values"]:
    """Values and first two derivatives (in units of the interval) of a radial function at evenly spaced knots on [0, 1].

    Args:
        radial: Function of x = distance over cutoff (n,) in float64 that returns (n, values) in float64.
        dtype: Precision in which the table will be used; it decides how many knots are needed.
        kinks: Where the second derivative jumps. There is a knot, and it has two rows: derivatives from below, and from above.
            The interval from knot k on begins at row k + `passed` kinks.
        at_least: Intervals.

    Returns:
        float64 table, with a row for each knot and one more for each kink.

    Raises:
        ValueError: no number of knots reaches the tolerance, or no even knots meet the kinks.
    """
    fractions = [Fraction(kink).limit_denominator(FINEST) for kink in kinks]
    common = math.lcm(*(f.denominator for f in fractions))
    if common > FINEST or any(abs(f - kink) > 1e-12 for f, kink in zip(fractions, kinks, strict=True)):
        raise ValueError(
            f"a radial function cannot be tabulated: no even knots meet its kinks, at {', '.join(f'{k:.9g}' for k in kinks)} of the cutoff"
        )
    narrowest = min(b - a for a, b in itertools.pairwise([0.0, *kinks, 1.0]))
    at_least = max(at_least, math.ceil(BETWEEN / narrowest) if kinks else 0)
    for intervals in dict.fromkeys(-(-max(knots, at_least) // common) * common for knots in KNOTS):
        table = _spline(radial, intervals, kinks)
        between = (torch.arange(intervals, dtype=torch.float64)[:, None] + torch.tensor([0.25, 0.5, 0.75])).flatten() / intervals
        error = float((interpolate(table, between, kinks) - radial(between)).abs().max())
        scale = float(table[:, 0].abs().max())
        if not math.isfinite(error):
            raise ValueError("a radial function is not finite")
        if error <= TOLERANCE[dtype] * max(scale, 1e-300):
            return table
    raise ValueError(
        f"a radial function cannot be tabulated: {intervals} intervals leave an error of {error / scale:.1e} of its largest value"
    )


def tabulate_all(
    radials: Sequence[Callable[[Tensor], Tensor]], dtype: torch.dtype, kinks: Sequence[float] = (), at_least: int = 0
) -> list[Float[Tensor, "rows 3 values"]]:
    """Tables of several functions, all with the same knots; as `tabulate`."""
    tables: list[Tensor] = []
    for radial in radials:
        tables.append(tabulate(radial, dtype, kinks, at_least))
        at_least = len(tables[-1]) - 1 - len(kinks)
    return [t if len(t) == len(tables[-1]) else tabulate(r, dtype, kinks, at_least) for r, t in zip(radials, tables, strict=True)]


def passed(x: Float[Tensor, " n"], kinks: Sequence[float]) -> Int[Tensor, " n"]:
    """How many kinks lie at or below x; on a GPU without a copy from the CPU, which CUDA graphs cannot record."""
    x = x.detach()
    return torch.stack([x >= kink for kink in kinks]).sum(dim=0) if kinks else x.new_zeros(x.shape, dtype=torch.int64)


def _spline(radial: Callable[[Tensor], Tensor], intervals: int, kinks: Sequence[float]) -> Float[Tensor, "rows 3 values"]:
    """The table with so many intervals."""
    x = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)
    x[-1] = math.nextafter(1.0, 0.0)  # from inside
    doubled = torch.tensor([round(kink * intervals) for kink in kinks], dtype=torch.int64)
    repeats = torch.ones(intervals + 1, dtype=torch.int64)
    repeats[doubled] = 2
    x = x.repeat_interleave(repeats)
    above = doubled + torch.arange(1, len(kinks) + 1)
    x[above - 1] *= 1 - 1e-13
    x[above] *= 1 + 1e-13
    inside = torch.stack([f / intervals**k for k, f in enumerate(derivatives(radial, x[1:]))], dim=1)
    return torch.cat([at_zero(radial, 1 / intervals)[None], inside])


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


def interpolate(table: Float[Tensor, "rows 3 values"], x: Float[Tensor, " n"], kinks: Sequence[float] = ()) -> Float[Tensor, "n values"]:
    """The spline at x, clamped to [0, 1]; differentiable with respect to x."""
    intervals = table.shape[0] - 1 - len(kinks)
    scaled = x.clamp(0, 1) * intervals
    knot = scaled.detach().floor().clamp(max=intervals - 1).to(torch.int64)
    weights = torch.stack(hermite_weights(scaled - knot), dim=1)
    row = knot + passed(x, kinks)
    both = torch.cat([table.index_select(0, row), table.index_select(0, row + 1)], dim=1)
    return torch.einsum("ek,ekw->ew", weights, both)


def powers(table: Float[Tensor, "rows 3 values"]) -> Float[Tensor, "rows 6 values"]:
    """The spline from each row to the next as a polynomial in t, the place between them: coefficients of t^5 … 1; zeros for the last row."""
    t = torch.linspace(0, 1, 6, dtype=table.dtype)
    weights = torch.linalg.solve(
        t[:, None] ** torch.arange(5, -1, -1), torch.stack(hermite_weights(t), dim=1)
    )  # of (f, f', f'') at both rows
    both = torch.cat([table[:-1], table[1:]], dim=1)
    return torch.cat([torch.einsum("nk,rkv->rnv", weights.round(decimals=6), both), torch.zeros_like(table[:1]).repeat(1, 2, 1)])


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
