"""Small pieces that the models share."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def sum_by_index(values: Float[Tensor, "n ..."], index: Int[Tensor, " n"], size: int) -> Float[Tensor, "size ..."]:
    """out[k] = sum of the values whose index is k; zeros where there are none."""
    return values.new_zeros((size, *values.shape[1:])).index_add(0, index, values)


def mean_by_index(values: Float[Tensor, "n ..."], index: Int[Tensor, " n"], size: int) -> Float[Tensor, "size ..."]:
    """out[k] = mean of the values whose index is k; zeros where there are none."""
    count = sum_by_index(torch.ones_like(index, dtype=values.dtype), index, size).clamp(min=1)
    return sum_by_index(values, index, size) / count.reshape(-1, *[1] * (values.dim() - 1))


class ScaledSiLU(nn.Module):
    """SiLU / 0.6, which keeps the variance of normal input near one (Gasteiger et al., arXiv:2106.08903)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x) * (1 / 0.6)


def linear(num_in: int, num_out: int, bias: bool = True) -> nn.Linear:
    """A linear layer with Xavier uniform weights and zero bias."""
    layer = nn.Linear(num_in, num_out, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
