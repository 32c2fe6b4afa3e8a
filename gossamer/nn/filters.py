"""What networks with scalars and vectors share: radial filters, a cutoff, a smooth length."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.nn.layers import cat, split

SMOOTH_LENGTH = 0.1
"""ε of the smooth length"""


def smooth_length(v: Float[Tensor, "n 3 c"]) -> Float[Tensor, "n c"]:
    """sqrt(|v|² + ε²) - ε along the middle axis, with bounded derivatives at zero."""
    return torch.sqrt((v**2).sum(dim=1) + SMOOTH_LENGTH**2) - SMOOTH_LENGTH


class RadialLinear(nn.Linear):
    """Radial functions that are linear in a basis: columns @ [W, b]ᵀ, rows taken and scaled in parts.

    The last of the columns is what the bias multiplies, an envelope or ones: the whole is one matrix product.
    """

    def __init__(self, num_basis: int, num_out: int, n_parts: int, parts: Sequence[tuple[int, float]]) -> None:
        """
        Args:
            num_basis: Columns less the last one.
            num_out: Rows of W.
            n_parts: Into how many equal parts the rows fall.
            parts: (number, factor) of those that are used, in the order of the result.
        """
        super().__init__(num_basis, num_out)
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)
        self.n_parts, self.parts = n_parts, list(parts)

    def forward(self, columns: Float[Tensor, "E columns"]) -> Float[Tensor, "E values"]:
        rows = split(cat([self.weight, self.bias[:, None]], 1), [self.out_features // self.n_parts] * self.n_parts, 0)
        return columns @ cat([rows[k] * factor for k, factor in self.parts], 0).T


def cosine_cutoff(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """½ (cos(π x) + 1) for x < 1, else 0; its second derivative jumps at 1 (Behler, J. Chem. Phys. 134, 074106, 2011)."""
    return torch.where(x < 1, 0.5 * (torch.cos(math.pi * x) + 1), torch.zeros_like(x))
