"""A message passing step done by a kernel, as the networks use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.engine.kernels import cpu, gpu, ops
from gossamer.engine.kernels.product import Convolution
from gossamer.engine.kernels.table import tabulate


class SortedEdges(NamedTuple):
    """Edges by receiver and by sender: what all layers share."""

    edge_index: Int[Tensor, "2 E"]
    """(sender, receiver), sorted by receiver"""
    rows: Int[Tensor, " N+1"]
    """first edge of each receiver"""
    columns: Int[Tensor, " N+1"]
    """first edge of each sender in ``order``"""
    order: Int[Tensor, " E"]
    """edges sorted by sender"""


def sort_edges(edge_index: Int[Tensor, "2 E"], nodes: Tensor) -> SortedEdges:
    """Edges (sorted by receiver) as kernels need them; ``nodes`` has one row per atom."""
    edge_index = edge_index.contiguous()
    rows, columns, order = torch.ops.gossamer.sort_edges(edge_index, nodes)
    return SortedEdges(edge_index, rows, columns, order)


class KernelEdges(NamedTuple):
    """Sorted edges with their harmonics and distances."""

    sorted: SortedEdges
    harmonics: Float[Tensor, "E S"]
    x: Float[Tensor, " E"]
    """distance over cutoff"""


class KernelLayer(nn.Module):
    """Sum over neighbours of radial functions times products of features with harmonics (`gossamer.engine.kernels.product`)."""

    table: Tensor

    def __init__(self, convolution: Convolution, radial: Callable[[Tensor], Tensor], like: Tensor) -> None:
        """
        Args:
            convolution: The products.
            radial: Their radial functions of x = distance over cutoff, (n,) -> (n, channels of all products), float64 on the CPU.
            like: A weight of the network, for its precision and device.

        Raises:
            Missing: no kernel can be built on this machine.
            ValueError: the radial functions cannot be tabulated.
        """
        super().__init__()
        self.convolution = convolution
        self.key = ops.register(convolution, like.dtype, like.device.type)
        lanes = gpu.LANES if like.device.type == "cuda" else cpu.LANES[like.dtype]
        with torch.no_grad():
            packed = convolution.pack(tabulate(radial, like.dtype), lanes).to(like)
        self.register_buffer("table", packed, persistent=False)

    def forward(self, features: Float[Tensor, "N width_in"], edges: KernelEdges) -> Float[Tensor, "N width_out"]:
        return torch.ops.gossamer.convolve(self.key, features, edges.harmonics, edges.x, self.table, *edges.sorted)


class EdgeKernel:
    """The same sum with the radial functions of every edge as an input: for training, since it can be differentiated any number of times."""

    def __init__(self, convolution: Convolution, like: Tensor) -> None:
        """
        Raises:
            Missing: no kernel can be built on this machine.
        """
        self.key = ops.register(convolution, like.dtype, like.device.type, edge_weights=True)

    def __call__(
        self, features: Float[Tensor, "N width_in"], weights: Float[Tensor, "E values"], edges: KernelEdges
    ) -> Float[Tensor, "N width_out"]:
        return torch.ops.gossamer.weigh(self.key, features, edges.harmonics, weights, *edges.sorted)
