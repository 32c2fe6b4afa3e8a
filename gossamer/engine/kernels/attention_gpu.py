"""Geodite's attention and alignment in Triton: what attention.hpp does, one warp for each atom and 32 channels.

Shapes as there: N atoms, E edges, C channels, S components of the harmonics (padded to SP, a power of two), H heads that
tile all 3 C channels of a message, W = parts · C. An atom collects from its neighbours forward, and from the atoms it sent
to backward. Gradients of the harmonics, which all channels share, are summed over chunks of channels afterwards.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.engine.kernels.gpu import launch

LANES = 32
"""channels of one program"""
EDGES = 16
"""edges of one program, where edges stand for themselves"""
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["n_edges"], do_not_specialize_on_alignment=["receiver", "far"])
def logits(q, k, sl, sender, receiver, out, n_edges, C: tl.constexpr, H: tl.constexpr, EDGES: tl.constexpr, WIDTH: tl.constexpr):
    """Attention of each edge and head before its SiLU."""
    head = tl.program_id(1)
    e = tl.program_id(0) * EDGES + tl.arange(0, EDGES)
    c = tl.arange(0, WIDTH)
    here = e < n_edges
    inside = here[:, None] & (c < C // H)[None, :]
    i = tl.load(receiver + e, mask=here, other=0)
    j = tl.load(sender + e, mask=here, other=0)
    u = (head * (C // H) + c)[None, :]
    product = tl.load(q + i[:, None] * C + u, mask=inside, other=0.0) * tl.load(k + j[:, None] * C + u, mask=inside, other=0.0)
    product = product * tl.load(sl + e[:, None] * C + u, mask=inside, other=0.0)
    tl.store(out + e * H + head, tl.sum(product, axis=1), mask=here)


@triton.jit
def channels(C: tl.constexpr, LANES: tl.constexpr):
    """The atom of this program, its channels, and which of them exist."""
    c = tl.program_id(1) * LANES + tl.arange(0, LANES)
    return tl.program_id(0).to(tl.int64), c, c < C


@triton.jit
def components(c, mask, C: tl.constexpr, S: tl.constexpr, SP: tl.constexpr):
    """Components of the harmonics, which of them exist, and with the channels: which exist, and where they lie."""
    s = tl.arange(0, SP)
    return s, s < S, (s < S)[:, None] & mask[None, :], s[:, None] * C + c[None, :]


@triton.jit
def collect(
    g, v, x, alpha, f, y, sender, receiver_starts, h, out,
    C: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Sums of the messages to one atom."""
    i, c, mask = channels(C, LANES)
    s, row, block, place = components(c, mask, C, S, SP)
    WIDE: tl.constexpr = 3 * C // H
    W: tl.constexpr = PARTS * C
    sum_h = tl.zeros((LANES,), dtype=f.dtype.element_ty)
    sums = tl.zeros((SP, LANES), dtype=f.dtype.element_ty)
    for e in range(tl.load(receiver_starts + i), tl.load(receiver_starts + i + 1)):
        j = tl.load(sender + e)
        ye = tl.load(y + e * S + s, mask=row, other=0.0)
        share = tl.load(alpha + e * H + c // WIDE, mask=mask, other=0.0)
        m = tl.load(f + e * W + c, mask=mask, other=0.0) * tl.load(g + j * W + c, mask=mask, other=0.0)
        sum_h += m + share * tl.load(v + j * W + c, mask=mask, other=0.0)
        share = tl.load(alpha + e * H + (C + c) // WIDE, mask=mask, other=0.0)
        m = tl.load(f + e * W + C + c, mask=mask, other=0.0) * tl.load(g + j * W + C + c, mask=mask, other=0.0)
        m += share * tl.load(v + j * W + C + c, mask=mask, other=0.0)
        sums += ye[:, None] * m[None, :]
        if PARTS == 3:
            share = tl.load(alpha + e * H + (2 * C + c) // WIDE, mask=mask, other=0.0)
            m = tl.load(f + e * W + 2 * C + c, mask=mask, other=0.0) * tl.load(g + j * W + 2 * C + c, mask=mask, other=0.0)
            m += share * tl.load(v + j * W + 2 * C + c, mask=mask, other=0.0)
            sums += m[None, :] * tl.load(x + j * S * C + place, mask=block, other=0.0)
    tl.store(h + i * C + c, sum_h, mask=mask)
    tl.store(out + i * S * C + place, sums, mask=block)


@triton.jit(do_not_specialize=["n_edges"], do_not_specialize_on_alignment=["receiver", "far"])
def distribute(
    g, v, x, alpha, f, y, receiver, sender_starts, by_sender, dh, dout, dg, dv, dx, df, dshare, dy, n_edges,
    C: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, H: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Gradients of the messages of one atom, and what follows from them."""
    j, c, mask = channels(C, LANES)
    s, row, block, place = components(c, mask, C, S, SP)
    WIDE: tl.constexpr = 3 * C // H
    W: tl.constexpr = PARTS * C
    g0 = tl.load(g + j * W + c, mask=mask, other=0.0)
    g1 = tl.load(g + j * W + C + c, mask=mask, other=0.0)
    v0 = tl.load(v + j * W + c, mask=mask, other=0.0)
    v1 = tl.load(v + j * W + C + c, mask=mask, other=0.0)
    zero = tl.zeros((LANES,), dtype=f.dtype.element_ty)
    dg0, dg1, dg2, dv0, dv1, dv2 = zero, zero, zero, zero, zero, zero
    if PARTS == 3:
        g2 = tl.load(g + j * W + 2 * C + c, mask=mask, other=0.0)
        v2 = tl.load(v + j * W + 2 * C + c, mask=mask, other=0.0)
        xj = tl.load(x + j * S * C + place, mask=block, other=0.0)
        to_x = tl.zeros((SP, LANES), dtype=f.dtype.element_ty)
    for at in range(tl.load(sender_starts + j), tl.load(sender_starts + j + 1)):
        e = tl.load(by_sender + at)
        i = tl.load(receiver + e)
        ye = tl.load(y + e * S + s, mask=row, other=0.0)
        d = tl.load(dout + i * S * C + place, mask=block, other=0.0)
        m0 = tl.load(dh + i * C + c, mask=mask, other=0.0)
        m1 = tl.sum(ye[:, None] * d, axis=0)
        f0 = tl.load(f + e * W + c, mask=mask, other=0.0)
        f1 = tl.load(f + e * W + C + c, mask=mask, other=0.0)
        a0 = tl.load(alpha + e * H + c // WIDE, mask=mask, other=0.0)
        a1 = tl.load(alpha + e * H + (C + c) // WIDE, mask=mask, other=0.0)
        tl.store(dy + (tl.program_id(1) * n_edges + e) * S + s, tl.sum(d * (f1 * g1 + a1 * v1)[None, :], axis=1), mask=row)
        tl.store(df + e * W + c, m0 * g0, mask=mask)
        tl.store(df + e * W + C + c, m1 * g1, mask=mask)
        tl.store(dshare + e * 3 * C + c, m0 * v0, mask=mask)
        tl.store(dshare + e * 3 * C + C + c, m1 * v1, mask=mask)
        dg0 += m0 * f0
        dg1 += m1 * f1
        dv0 += m0 * a0
        dv1 += m1 * a1
        if PARTS == 3:
            f2 = tl.load(f + e * W + 2 * C + c, mask=mask, other=0.0)
            a2 = tl.load(alpha + e * H + (2 * C + c) // WIDE, mask=mask, other=0.0)
            m2 = tl.sum(d * xj, axis=0)
            to_x += d * (f2 * g2 + a2 * v2)[None, :]
            tl.store(df + e * W + 2 * C + c, m2 * g2, mask=mask)
            tl.store(dshare + e * 3 * C + 2 * C + c, m2 * v2, mask=mask)
            dg2 += m2 * f2
            dv2 += m2 * a2
    tl.store(dg + j * W + c, dg0, mask=mask)
    tl.store(dg + j * W + C + c, dg1, mask=mask)
    tl.store(dv + j * W + c, dv0, mask=mask)
    tl.store(dv + j * W + C + c, dv1, mask=mask)
    if PARTS == 3:
        tl.store(dg + j * W + 2 * C + c, dg2, mask=mask)
        tl.store(dv + j * W + 2 * C + c, dv2, mask=mask)
        tl.store(dx + j * S * C + place, to_x, mask=block)


@triton.jit
def to_keys(q, k, sl, ds, receiver, sender_starts, by_sender, dk, dsl, C: tl.constexpr, H: tl.constexpr, LANES: tl.constexpr):
    """From the gradient of the logits: gradients of an atom's key, and of the gates of its edges."""
    j, c, mask = channels(C, LANES)
    kj = tl.load(k + j * C + c, mask=mask, other=0.0)
    total = tl.zeros((LANES,), dtype=k.dtype.element_ty)
    for at in range(tl.load(sender_starts + j), tl.load(sender_starts + j + 1)):
        e = tl.load(by_sender + at)
        i = tl.load(receiver + e)
        scaled = tl.load(ds + e * H + c // (C // H), mask=mask, other=0.0) * tl.load(q + i * C + c, mask=mask, other=0.0)
        total += scaled * tl.load(sl + e * C + c, mask=mask, other=0.0)
        tl.store(dsl + e * C + c, scaled * kj, mask=mask)
    tl.store(dk + j * C + c, total, mask=mask)


@triton.jit
def to_queries(k, sl, ds, sender, receiver_starts, dq, C: tl.constexpr, H: tl.constexpr, LANES: tl.constexpr):
    """From the gradient of the logits: gradient of an atom's query."""
    i, c, mask = channels(C, LANES)
    total = tl.zeros((LANES,), dtype=k.dtype.element_ty)
    for e in range(tl.load(receiver_starts + i), tl.load(receiver_starts + i + 1)):
        j = tl.load(sender + e)
        scaled = tl.load(ds + e * H + c // (C // H), mask=mask, other=0.0) * tl.load(k + j * C + c, mask=mask, other=0.0)
        total += scaled * tl.load(sl + e * C + c, mask=mask, other=0.0)
    tl.store(dq + i * C + c, total, mask=mask)


@triton.jit
def along(values, ye, s, DEGREES: tl.constexpr):
    """For every row, the component along Y of the degree it belongs to."""
    weighted = ye[:, None] * values
    found = tl.zeros_like(values)
    for l in tl.static_range(1, DEGREES + 1):
        mine = ((s >= l * l - 1) & (s < (l + 1) * (l + 1) - 1))[:, None]
        component = tl.sum(tl.where(mine, weighted, 0.0), axis=0)
        found = tl.where(mine, component[None, :], found)
    return found


@triton.jit
def align(
    q, p, y, sender, receiver_starts, omega, C: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, DEGREES: tl.constexpr, LANES: tl.constexpr
):
    """Σ_l of the inner products of the parts of Q_i and P_j perpendicular to Y_l: Q·P - Σ_l (Q·Y_l)(P·Y_l)."""
    i, c, mask = channels(C, LANES)
    s, row, block, place = components(c, mask, C, S, SP)
    qi = tl.load(q + i * S * C + place, mask=block, other=0.0)
    for e in range(tl.load(receiver_starts + i), tl.load(receiver_starts + i + 1)):
        pj = tl.load(p + tl.load(sender + e) * S * C + place, mask=block, other=0.0)
        ye = tl.load(y + e * S + s, mask=row, other=0.0)
        # (Q·Y_l)(P·Y_l) = Σ_s in l of Q_s Y_s (P·Y_l)
        total = tl.sum(qi * (pj - ye[:, None] * along(pj, ye, s, DEGREES)), axis=0)
        tl.store(omega + e * C + c, total, mask=mask)


@triton.jit(do_not_specialize=["n_edges"], do_not_specialize_on_alignment=["receiver", "far"])
def align_gradient(
    own, other, y, far, first, by_sender, gradient, d_own, dy, n_edges,
    C: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, DEGREES: tl.constexpr, LANES: tl.constexpr, RECEIVERS: tl.constexpr,
):  # fmt: skip
    """Gradients of Q of the receivers and of the harmonics; or, from the other end, of P of the senders."""
    i, c, mask = channels(C, LANES)
    s, row, block, place = components(c, mask, C, S, SP)
    mine = tl.load(own + i * S * C + place, mask=block, other=0.0)
    total = tl.zeros((SP, LANES), dtype=own.dtype.element_ty)
    for at in range(tl.load(first + i), tl.load(first + i + 1)):
        if RECEIVERS:
            e = at
        else:
            e = tl.load(by_sender + at)
        theirs = tl.load(other + tl.load(far + e) * S * C + place, mask=block, other=0.0)
        ye = tl.load(y + e * S + s, mask=row, other=0.0)
        d = tl.load(gradient + e * C + c, mask=mask, other=0.0)
        b = along(theirs, ye, s, DEGREES)
        total += d[None, :] * (theirs - b * ye[:, None])
        if RECEIVERS:
            slope = tl.sum(d[None, :] * (mine * b + theirs * along(mine, ye, s, DEGREES)), axis=1)
            tl.store(dy + (tl.program_id(1) * n_edges + e) * S + s, -slope, mask=row)
    tl.store(d_own + i * S * C + place, total, mask=block)


# --- launches --------------------------------------------------------------------------------------------------------


def _sizes(y: Tensor, channels: int) -> dict[str, Any]:
    return {"C": channels, "S": y.shape[1], "SP": triton.next_power_of_2(y.shape[1]), "LANES": LANES, **OPTIONS}


def _grid(n: int, channels: int) -> tuple[int, int]:
    return n, triton.cdiv(channels, LANES)


def _parts(y: Tensor, channels: int) -> Tensor:
    """Room for the gradient of the harmonics from each chunk of channels."""
    return y.new_empty(triton.cdiv(channels, LANES), *y.shape)


def _logits(heads: int, q: Tensor, k: Tensor, sl: Tensor, edge_index: Tensor) -> Tensor:
    n_edges, c = sl.shape
    out = sl.new_empty(n_edges, heads)
    width = triton.next_power_of_2(c // heads)
    launch(logits, (triton.cdiv(n_edges, EDGES), heads))(
        q, k, sl, edge_index[0], edge_index[1], out, n_edges, C=c, H=heads, EDGES=EDGES, WIDTH=width, **OPTIONS
    )
    return out


def attend(heads: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Forward pass of the attention; arguments as for the operator."""
    *values, edge_index, receiver_starts, _, _ = tensors
    q, k, g, v, x, sl, f, y = (t.contiguous() for t in values)
    n, c = q.shape
    alpha = torch.nn.functional.silu(_logits(heads, q, k, sl, edge_index)) / math.sqrt(c)
    h, out = torch.empty_like(q), q.new_empty(n, y.shape[1], c)
    launch(collect, _grid(n, c))(
        g, v, x, alpha, f, y, edge_index[0], receiver_starts, h, out, H=heads, PARTS=f.shape[1] // c, **_sizes(y, c)
    )
    return h, out


def attend_backward(heads: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Backward pass of the attention; arguments as for the operator."""
    *values, edge_index, receiver_starts, sender_starts, by_sender = tensors
    dh, dout, q, k, g, v, x, sl, f, y = (t.contiguous() for t in values)
    n, c = q.shape
    sender, receiver = edge_index
    a = _logits(heads, q, k, sl, edge_index)
    z = torch.sigmoid(a)
    alpha = a * z / math.sqrt(c)
    dg, dv, dx, df = (torch.empty_like(t) for t in (g, v, x, f))
    dy, dshare = _parts(y, c), f.new_zeros(f.shape[0], 3 * c) if f.shape[1] < 3 * c else torch.empty_like(f)
    launch(distribute, _grid(n, c))(
        g, v, x, alpha, f, y, receiver, sender_starts, by_sender, dh, dout, dg, dv, dx, df, dshare, dy, y.shape[0],
        H=heads, PARTS=f.shape[1] // c, **_sizes(y, c),
    )  # fmt: skip
    ds = dshare.reshape(f.shape[0], heads, 3 * c // heads).sum(dim=2) * (z * (1 + a * (1 - z)) / math.sqrt(c))
    dq, dk, dsl = (torch.empty_like(t) for t in (q, k, sl))
    sizes = {"C": c, "H": heads, "LANES": LANES, **OPTIONS}
    launch(to_keys, _grid(n, c))(q, k, sl, ds, receiver, sender_starts, by_sender, dk, dsl, **sizes)
    launch(to_queries, _grid(n, c))(k, sl, ds, sender, receiver_starts, dq, **sizes)
    return dq, dk, dg, dv, dx, dsl, df, dy.sum(dim=0)


def perpendicular(*tensors: Tensor) -> Tensor:
    """Forward pass of the alignment; arguments as for the operator."""
    *values, edge_index, receiver_starts, _, _ = tensors
    q, p, y = (t.contiguous() for t in values)
    n, _, c = q.shape
    omega = q.new_empty(edge_index.shape[1], c)
    launch(align, _grid(n, c))(q, p, y, edge_index[0], receiver_starts, omega, DEGREES=math.isqrt(y.shape[1] + 1) - 1, **_sizes(y, c))
    return omega


def perpendicular_backward(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Backward pass of the alignment; arguments as for the operator."""
    *values, edge_index, receiver_starts, sender_starts, by_sender = tensors
    gradient, q, p, y = (t.contiguous() for t in values)
    n, _, c = q.shape
    dq, dp, dy = torch.empty_like(q), torch.empty_like(p), _parts(y, c)
    sizes = {"DEGREES": math.isqrt(y.shape[1] + 1) - 1, **_sizes(y, c)}
    launch(align_gradient, _grid(n, c))(
        q, p, y, edge_index[0], receiver_starts, by_sender, gradient, dq, dy, y.shape[0], RECEIVERS=True, **sizes
    )
    launch(align_gradient, _grid(n, c))(
        p, q, y, edge_index[1], sender_starts, by_sender, gradient, dp, dy, y.shape[0], RECEIVERS=False, **sizes
    )
    return dq, dp, dy.sum(dim=0)
