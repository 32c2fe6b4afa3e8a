"""Small pieces that the models share."""

from __future__ import annotations

import math
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


def linear(num_in: int, num_out: int, bias: bool = True) -> nn.Linear:
    """A linear layer with Xavier uniform weights and zero bias."""
    layer = nn.Linear(num_in, num_out, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


UNIT_SILU = 1.6791767923989418
"""c with <(c SiLU(z))²> = 1 for normal z, as e3nn estimates it"""


class UnitLinear(nn.Linear):
    """Linear map of the last axis with weights of unit variance, divided by sqrt(inputs) when used."""

    def __init__(self, num_in: int, num_out: int, uniform: bool = False, gain: float = 1.0) -> None:
        super().__init__(num_in, num_out, bias=False)
        self.scale = gain / math.sqrt(num_in)
        if uniform:
            nn.init.uniform_(self.weight, -math.sqrt(3), math.sqrt(3))
        else:
            nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # features of one degree are no contiguous block: PyTorch would multiply atom by atom
        return nn.functional.linear(rows, self.weight * self.scale).reshape(*x.shape[:-1], self.out_features)


def unit_mlp(sizes: Sequence[int], gain: float = UNIT_SILU) -> nn.Sequential:
    """SiLU network without biases of these widths, from input to output; the gain makes up for the activation."""
    layers: list[nn.Module] = []
    for k in range(len(sizes) - 1):
        layers += [*([nn.SiLU()] if k else []), UnitLinear(sizes[k], sizes[k + 1], uniform=True, gain=gain if k else 1.0)]
    return nn.Sequential(*layers)


class ElementLinear(nn.Module):
    """o = Σ_{u,t} x[u] a_t W[u, t] / sqrt(inputs attributes): one linear map per element, made from its attributes a."""

    def __init__(self, num_in: int, num_attributes: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_in, num_attributes, num_out))
        self.scale = 1 / math.sqrt(num_in * num_attributes)

    def forward(self, x: Float[Tensor, "N dim in"], species: Int[Tensor, " N"], table: Float[Tensor, "elements T"]) -> Tensor:
        """(N, dim, out); ``table`` holds the attributes of each element."""
        if len(table) < table.shape[1]:  # fewer elements than attributes: their one-hot codes are the shorter attributes
            attributes = nn.functional.one_hot(species, len(table)).to(x.dtype)
            weight = self.maps(table).transpose(0, 1).reshape(-1, self.weight.shape[2])
        else:
            attributes = table.index_select(0, species)
            weight = self.weight.reshape(-1, self.weight.shape[2]) * self.scale
        product = x[:, :, :, None] * attributes[:, None, None, :]  # (N, dim, in, T or elements)
        return product.flatten(2) @ weight

    def maps(self, table: Float[Tensor, "elements T"]) -> Float[Tensor, "elements n_in n_out"]:
        """The map of each element."""
        return torch.einsum("et,uto->euo", table, self.weight * self.scale)


class ElementMaps(nn.Module):
    """o = Σ_u x[u] W_e[u] / sqrt(inputs): one linear map per element."""

    def __init__(self, n_elements: int, num_in: int, num_out: int) -> None:
        super().__init__()
        self.shape = num_in, num_out
        self.table = nn.Embedding(n_elements, num_in * num_out)

    def forward(self, x: Float[Tensor, "N dim in"], species: Int[Tensor, " N"]) -> Float[Tensor, "N dim out"]:
        return torch.bmm(x, self.maps().index_select(0, species))

    def maps(self) -> Float[Tensor, "elements n_in n_out"]:
        """The map of each element."""
        return self.table.weight.reshape(-1, *self.shape) / math.sqrt(self.shape[0])


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


def decaying(num_basis: int, decay: float) -> NDArray[np.float64]:
    """n^-decay for n = 1 … num_basis, with unit mean square: scales of radial functions, of which those that vary fast are learned last."""
    scales = np.arange(1.0, num_basis + 1) ** -decay
    return scales / np.sqrt((scales**2).mean())


def unit_scale(num_basis: int, p: int, k: int) -> float:
    """Factor that gives sin(n π x) / x · f_p,k(x) unit mean square over n and over neighbours spread evenly in the outer 0.2 < x < 1."""
    x = torch.linspace(0.2, 1, 400, dtype=torch.float64)
    n = torch.arange(1, num_basis + 1, dtype=torch.float64)
    values = torch.sin(math.pi * n * x[:, None]) * (polynomial_envelope(x, p, k) / x)[:, None]
    return float(((values**2).mean(dim=1) * x**2).sum() / (x**2).sum()) ** -0.5


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
