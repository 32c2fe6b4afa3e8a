"""The operations by which Geodite passes messages; kernels can take their place (`gossamer.engine.kernels`)."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from gossamer.nn.layers import Constant, cat, split, sum_by_index
from gossamer.nn.products import Edges


class Attention(nn.Module):
    """Sums over neighbours of values weighted by attention plus filtered scalars, in parts for scalars, for harmonics, for steerables.

    α_ij = SiLU( Σ_(channels of the head) q_i k_j γ_ij ) / sqrt(C),      m_ij = f_ij ⊙ s_j + α_ij ⊙ v_j,
    sum_h = Σ_j m^h_ij,      sum_X = Σ_j m^Y_ij ⊗ Y_ij + m^X_ij ⊙ X_j
    """

    def __init__(self, channels: int, heads: int, l_max: int, dropout: float = 0.0) -> None:
        """Args: channels C, which the heads divide; heads; l_max of the harmonics; dropout of α, in training."""
        super().__init__()
        self.channels, self.heads, self.l_max, self.dropout = channels, heads, l_max, dropout
        # the heads tile all 3 C channels of the message
        self.tiles = Constant(np.repeat(np.eye(heads), 3 * channels // heads, axis=1))

    def forward(
        self,
        queries: Float[Tensor, "N C"],
        keys: Float[Tensor, "N C"],
        scalars: Float[Tensor, "N width"],
        values: Float[Tensor, "N width"],
        steerables: Float[Tensor, "N S C"] | None,
        gates: Float[Tensor, "E C"],
        filters: Float[Tensor, "E width"],
        edges: Edges,
    ) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N S C"]]:
        """Two parts without steerables, else three."""
        n, c = queries.shape
        parts = 2 if steerables is None else 3
        aligned = queries.index_select(0, edges.receiver) * keys.index_select(0, edges.sender) * gates
        alpha = silu(aligned.reshape(-1, self.heads, c // self.heads).sum(dim=2)) / math.sqrt(c)  # (E, heads)
        if self.training and self.dropout > 0:
            alpha = nn.functional.dropout(alpha, self.dropout)
        share = alpha @ self.tiles()[:, : parts * c]
        s, v = split(cat([scalars, values], 1).index_select(0, edges.sender), [parts * c] * 2, 1)
        m_h, m_y, *m_x = split(torch.addcmul(filters * s, share, v), [c] * parts, 1)
        vectors = m_y[:, None] * edges.harmonics[:, :, None]  # (E, S, C)
        if steerables is not None:
            vectors = torch.addcmul(vectors, m_x[0][:, None], steerables.index_select(0, edges.sender))
        return sum_by_index(m_h, edges.receiver, n), sum_by_index(vectors, edges.receiver, n)


class Alignment(nn.Module):
    """ω_ij = Σ_l [ Q_i·P_j - (Q_i·Y_ij)(P_j·Y_ij) ], the inner products of the parts perpendicular to Y_l."""

    def __init__(self, l_max: int) -> None:
        super().__init__()
        self.l_max = l_max
        degrees = np.repeat(np.arange(1, l_max + 1), 2 * np.arange(1, l_max + 1) + 1)
        self.rows = Constant((degrees == np.arange(1, l_max + 1)[:, None]).astype(float))

    def forward(self, queries: Float[Tensor, "N S C"], keys: Float[Tensor, "N S C"], edges: Edges) -> Float[Tensor, "E C"]:
        along = edges.once("along", lambda: edges.harmonics[:, None, :] * self.rows())  # (E, L, S), each degree in a row
        q, p = queries.index_select(0, edges.receiver), keys.index_select(0, edges.sender)
        omega = (q * p).sum(dim=1)
        return omega - (torch.bmm(along, q) * torch.bmm(along, p)).sum(dim=1)
