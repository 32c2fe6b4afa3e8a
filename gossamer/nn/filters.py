"""What networks with scalars and vectors share: bases of the distance, radial filters, a cutoff, a smooth length, messages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.nn.layers import cat, split, sum_by_index
from gossamer.nn.products import Convolution, EdgeConvolution, Edges, Product

SMOOTH_LENGTH = 0.1
"""ε of the smooth length"""


def smooth_length(v: Float[Tensor, "n 3 c"]) -> Float[Tensor, "n c"]:
    """sqrt(|v|² + ε²) - ε along the middle axis, with bounded derivatives at zero."""
    return torch.sqrt((v**2).sum(dim=1) + SMOOTH_LENGTH**2) - SMOOTH_LENGTH


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


class VectorConvolution(EdgeConvolution):
    """Messages of PaiNN and LEIGNN from node features (scalars a, scalars b, and with ``relay`` vectors v):

    scalars += Σ R_1 a_j,    vectors += Σ R_2 b_j u_ij + R_3 v_j,    harmonics (1, u_x, u_y, u_z)
    """

    def __init__(self, channels: int, relay: bool, radial: nn.Module) -> None:
        one, three = np.ones((1, 1, 1)), np.eye(3)
        products = [Product(0, 0, 0, 0, one), Product(1, 1, 1, 0, three[:, None, :])]
        if relay:
            products.append(Product(2, 0, 1, 0, three[:, :, None]))
        blocks_in = ((1, channels), (1, channels), *(((3, channels),) if relay else ()))
        super().__init__(Convolution(blocks_in, ((1, channels), (3, channels)), tuple(products), 4), radial)
        self.channels, self.relay = channels, relay

    def forward(self, features: Float[Tensor, "N width_in"], edges: Edges) -> Float[Tensor, "N width_out"]:
        h, n = self.channels, features.shape[0]
        a, b, *v = split(features.index_select(0, edges.sender), [h, h, 3 * h] if self.relay else [h, h], 1)
        r_a, r_b, *r_v = split(self.radial(edges.basis), self.convolution.channels, 1)
        vectors = (b * r_b)[:, None] * edges.harmonics[:, 1:, None]  # (E, 3, H)
        if self.relay:
            vectors = vectors + r_v[0][:, None] * v[0].reshape(-1, 3, h)
        return cat([sum_by_index(a * r_a, edges.receiver, n), sum_by_index(vectors, edges.receiver, n).flatten(1)], 1)
