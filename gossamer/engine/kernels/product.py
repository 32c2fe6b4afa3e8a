"""What the kernels compute: sums over neighbours of radial functions times products of features with harmonics.

    out_i[o][m, u] += Σ_j R_p,u(x_ij) Σ_{c, s} C_p[m, c, s] Y_s(ij) f_j[b][c, u]        for each product p: block b -> block o

Message passing of NequIP (C: 3j symbols), PaiNN and LEIGNN (C: ones) and SchNet (one product of scalars) has this form.
Features (N, width) and results lie block after block, within a block component by component, channels last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from gossamer.engine.kernels.table import interpolate


@dataclass(frozen=True)
class Product:
    """One product of a block of features with some of the harmonics."""

    block: int
    """of the features"""
    edge: int
    """first harmonic that takes part"""
    out: int
    """block of the result"""
    channel: int
    """first channel there; products that share channels are added"""
    coefficients: NDArray[np.float64] = field(compare=False)
    """C: (components of the result, components of the features, harmonics)"""


@dataclass(frozen=True)
class Convolution:
    """All products of one layer."""

    blocks_in: tuple[tuple[int, int], ...]
    """(components, channels) of each block of the features"""
    blocks_out: tuple[tuple[int, int], ...]
    products: tuple[Product, ...]
    """sorted by block; the radial functions are theirs in this order, one for each channel"""
    n_harmonics: int

    def __post_init__(self) -> None:
        assert [p.block for p in self.products] == sorted(p.block for p in self.products)

    @cached_property
    def channels(self) -> list[int]:
        """Channels of each product."""
        return [self.blocks_in[p.block][1] for p in self.products]

    @property
    def width_in(self) -> int:
        return sum(d * m for d, m in self.blocks_in)

    @property
    def width_out(self) -> int:
        return sum(d * m for d, m in self.blocks_out)

    @property
    def operations(self) -> int:
        """Multiply-adds per edge of the kernel, forward and backward, as `gossamer.engine.kernels.cpu` writes them."""
        total = 0
        for p, channels in zip(self.products, self.channels, strict=True):
            nonzero = np.abs(p.coefficients) > 1e-12
            matrix, harmonics = nonzero.any(axis=2).sum(), nonzero.any(axis=1).sum()  # entries (m, c) and (m, s)
            rows, columns, edges = p.coefficients.shape
            forward = 6 + matrix + rows
            backward = 12 + matrix + columns + harmonics + 2 * edges + 1
            total += channels * int(forward + backward)
        return total

    def structure(self) -> str:
        """Everything but the number of channels, as text: what the source of a kernel depends on."""
        products = [[p.block, p.edge, p.coefficients.shape, np.round(p.coefficients, 14).ravel().tolist()] for p in self.products]
        return json.dumps([[d for d, _ in self.blocks_in], products, self.n_harmonics])

    @cached_property
    def key(self) -> str:
        """Name of the structure."""
        return hashlib.sha256(self.structure().encode()).hexdigest()[:16]

    def layout(self, lanes: int) -> list[int]:
        """For each product: channels, first number and stride of the block, of the result, and first chunk of the table."""
        starts = np.cumsum([0, *(d * m for d, m in self.blocks_in)]).tolist()
        outs = np.cumsum([0, *(d * m for d, m in self.blocks_out)]).tolist()
        rows, chunk = [], 0
        for p, channels in zip(self.products, self.channels, strict=True):
            rows += [channels, starts[p.block], channels, outs[p.out] + p.channel, self.blocks_out[p.out][1], chunk]
            chunk += -(-channels // lanes)
        return rows

    def pack(self, table: Float[Tensor, "knots 3 values"], lanes: int) -> Float[Tensor, "chunks knots 3 lanes"]:
        """The table by chunks of channels, each product's last one filled up with zeros."""
        parts = []
        for part in torch.split(table, self.channels, dim=2):
            missing = -part.shape[2] % lanes
            filled = torch.nn.functional.pad(part, (0, missing))
            parts.append(filled.reshape(*filled.shape[:2], -1, lanes).permute(2, 0, 1, 3))
        return torch.cat(parts).contiguous()

    def unpack(self, packed: Float[Tensor, "chunks knots 3 lanes"]) -> Float[Tensor, "knots 3 values"]:
        lanes, first, parts = packed.shape[3], 0, []
        for channels in self.channels:
            chunks = -(-channels // lanes)
            parts.append(packed[first : first + chunks].permute(1, 2, 0, 3).flatten(2)[:, :, :channels])
            first += chunks
        return torch.cat(parts, dim=2)

    def plain(
        self,
        features: Float[Tensor, "N width_in"],
        harmonics: Float[Tensor, "E S"],
        x: Float[Tensor, " E"],
        table: Float[Tensor, "chunks knots 3 lanes"],
        edge_index: Int[Tensor, "2 E"],
    ) -> Float[Tensor, "N width_out"]:
        """The definition in PyTorch, with radial functions from a table; for tests."""
        return self.plain_weighted(features, harmonics, interpolate(self.unpack(table), x), edge_index)

    def plain_weighted(
        self,
        features: Float[Tensor, "N width_in"],
        harmonics: Float[Tensor, "E S"],
        weights: Float[Tensor, "E values"],
        edge_index: Int[Tensor, "2 E"],
    ) -> Float[Tensor, "N width_out"]:
        """The definition in PyTorch, with the radial functions of every edge; for tests."""
        sender, receiver = edge_index
        radial = torch.split(weights, self.channels, dim=1)
        blocks = [b.reshape(-1, *s) for b, s in zip(features.split([d * m for d, m in self.blocks_in], 1), self.blocks_in, strict=True)]
        out = [features.new_zeros(features.shape[0], d, m) for d, m in self.blocks_out]
        for p, own in zip(self.products, radial, strict=True):
            c = torch.from_numpy(p.coefficients).to(features)
            y = harmonics[:, p.edge : p.edge + c.shape[2]]
            messages = torch.einsum("mcs,es,ecu,eu->emu", c, y, blocks[p.block].index_select(0, sender), own)
            channels = torch.arange(p.channel, p.channel + own.shape[1], device=features.device)
            sums = torch.zeros_like(out[p.out]).index_select(2, channels).index_add(0, receiver, messages)
            out[p.out] = out[p.out].index_add(2, channels, sums)
        return torch.cat([o.flatten(1) for o in out], dim=1)


def vector_convolution(channels: int, relay: bool) -> Convolution:
    """Messages of PaiNN and LEIGNN from node features (scalars a, scalars b, and with ``relay`` vectors v):

    scalars += Σ R_1 a_j,    vectors += Σ R_2 b_j u_ij + R_3 v_j,    harmonics (1, u_x, u_y, u_z)
    """
    one, three = np.ones((1, 1, 1)), np.eye(3)
    products = [Product(0, 0, 0, 0, one), Product(1, 1, 1, 0, three[:, None, :])]
    if relay:
        products.append(Product(2, 0, 1, 0, three[:, :, None]))
    blocks: Sequence[tuple[int, int]] = [(1, channels), (1, channels), *([(3, channels)] if relay else [])]
    return Convolution(tuple(blocks), ((1, channels), (3, channels)), tuple(products), 4)


def scalar_convolution(channels: int) -> Convolution:
    """Messages of SchNet: scalars += Σ R a_j."""
    return Convolution(((1, channels),), ((1, channels),), (Product(0, 0, 0, 0, np.ones((1, 1, 1))),), 1)
