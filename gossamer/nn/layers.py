"""Small pieces that the models share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn


def sum_by_index(values: Float[Tensor, "n ..."], index: Int[Tensor, " n"], size: int) -> Float[Tensor, "size ..."]:
    """out[k] = sum of the values whose index is k; zeros where there are none."""
    if isinstance(size, int) and size == 1:  # one structure; a scatter onto one number cannot be compiled for several threads
        return values.sum(dim=0, keepdim=True)
    return values.new_zeros((size, *values.shape[1:])).index_add(0, index, values)


def mean_by_index(values: Float[Tensor, "n ..."], index: Int[Tensor, " n"], size: int) -> Float[Tensor, "size ..."]:
    """out[k] = mean of the values whose index is k; zeros where there are none."""
    count = sum_by_index(torch.ones_like(index, dtype=values.dtype), index, size).clamp(min=1)
    return sum_by_index(values, index, size) / count.reshape(-1, *[1] * (values.dim() - 1))


class _Cat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dim: int, *parts: Tensor) -> Tensor:
        ctx.dim, ctx.sizes = dim, [p.shape[dim] for p in parts]
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Split.apply(gradients[0], ctx.sizes, ctx.dim)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, ...]:
        ctx.dim = dim
        return x.split(sizes, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Cat.apply(ctx.dim, *gradients), None, None


def cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    """``torch.cat`` whose derivatives, second ones too, are splits.

    PyTorch's own are slices, each with a gradient of the size of the whole, zeros all around it.
    """
    return parts[0] if len(parts) == 1 else _Cat.apply(dim, *parts)


def split(x: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
    """``torch.split`` whose derivatives, second ones too, are concatenations."""
    return (x,) if len(sizes) == 1 else _Split.apply(x, list(sizes), dim)


SMOOTH_LENGTH = 0.1
"""ε of the smooth length"""


def smooth_length(v: Float[Tensor, "n 3 c"]) -> Float[Tensor, "n c"]:
    """sqrt(|v|² + ε²) - ε along the middle axis, with bounded derivatives at zero."""
    return torch.sqrt((v**2).sum(dim=1) + SMOOTH_LENGTH**2) - SMOOTH_LENGTH


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


class Constant(nn.Module):
    """A constant tensor that stays exact when the module changes its precision to and fro."""

    values: Tensor

    def __init__(self, values: NDArray[np.float64]) -> None:
        super().__init__()
        self.exact = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
        self.register_buffer("values", self.exact.to(torch.get_default_dtype()), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Constant:
        super()._apply(fn, recurse)
        self.values = self.exact.to(self.values)
        return self

    def forward(self) -> Tensor:
        return self.values
