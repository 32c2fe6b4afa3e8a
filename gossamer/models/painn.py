"""PaiNN: scalars and vectors, filters from distances, the baseline of equivariant message passing.

Schütt, Unke, Gastegger, ICML 2021, arXiv:2102.03150. `variant="published"` equals schnetpack's PaiNN (Gaussians, cosine
cutoff); `variant="sound"` (default) has an envelope with three vanishing derivatives, a smooth length, and gives lone
atoms their reference energy. `direct_forces` adds the paper's gated equivariant blocks: the baseline "PaiNN_Direct".

Shapes: N atoms, E edges, H channels, B radial functions. Scalars q (N, H), vectors mu (N, 3, H).
"""

from __future__ import annotations

import copy
import math
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from gossamer.engine.kernels.attach import EdgeKernel, KernelEdges, KernelLayer, sort_edges
from gossamer.engine.kernels.product import vector_convolution
from gossamer.models.base import DataFacts, ModelOutput
from gossamer.nn.layers import cat, linear, smooth_length, split, sum_by_index
from gossamer.nn.radial import bessel_basis, cosine_cutoff, gaussian_basis, polynomial_envelope
from gossamer.settings import settings


@settings
class PaiNNConfig:
    """Settings of the PaiNN network (Schütt et al., arXiv:2102.03150)."""

    name: Literal["painn"] = "painn"
    """Which network."""
    variant: Literal["sound", "published"] = "sound"
    """"sound": smooth at the cutoff, for molecular dynamics. "published": as in schnetpack."""
    cutoff: Annotated[float, Field(gt=0)] = 5.0
    """Radius in Å within which atoms exchange messages."""
    max_neighbors: Annotated[int, Field(gt=0)] | None = None
    """Keep only this many nearest neighbours. The energy then jumps when ranks change; None keeps all."""
    num_features: Annotated[int, Field(ge=2)] = 64
    """Channels of the scalars and of the vectors (paper: 128)."""
    num_layers: Annotated[int, Field(ge=1)] = 3
    """Message-passing steps."""
    num_basis: Annotated[int, Field(ge=2)] = 20
    """Radial functions: Bessel for the sound variant, Gaussians for the published one."""
    direct_forces: bool = False
    """Add a head that predicts forces directly. They are not the gradient of the energy."""


def dense(num_in: int, num_hidden: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(linear(num_in, num_hidden), nn.SiLU(), linear(num_hidden, num_out))


class Layer(nn.Module):
    """Message (Eq. 7, 8) and update (Eq. 9, 10)."""

    def __init__(self, config: PaiNNConfig, scale: float) -> None:
        super().__init__()
        h = config.num_features
        self.published, self.scale = config.variant == "published", scale
        self.context = dense(h, h, 3 * h)
        self.filters = linear(config.num_basis, 3 * h)
        self.mix = linear(h, 2 * h, bias=False)
        self.update_net = dense(2 * h, h, 3 * h)
        self.kernel: KernelLayer | None = None
        self.edge_kernel: EdgeKernel | None = None

    def forward(
        self, q: Tensor, mu: Tensor | None, basis: Tensor, envelope: Tensor, unit: Tensor, edge_index: Tensor
    ) -> tuple[Float[Tensor, "N H"], Float[Tensor, "N 3 H"]]:
        sender, receiver = edge_index
        messages = self.context(q).index_select(0, sender) * (self.filters(basis) * envelope[:, None])
        dq, direction, relay = split(messages, [q.shape[1]] * 3, 1)
        vectors = direction[:, None] * unit[:, :, None]
        if mu is not None:  # mu = 0 before the first layer
            vectors = vectors + relay[:, None] * mu.index_select(0, sender)
        sums = sum_by_index(vectors, receiver, q.shape[0]) * self.scale
        return self.update(q + sum_by_index(dq, receiver, q.shape[0]) * self.scale, sums if mu is None else mu + sums)

    def with_kernel(
        self, q: Tensor, mu: Tensor | None, columns: Float[Tensor, "E columns"] | None, edges: KernelEdges
    ) -> tuple[Tensor, Tensor]:
        """The same by a kernel; its radial functions hold all factors. ``columns``: basis and 1, times the envelope."""
        h = q.shape[1]
        dq, direction, relay = split(self.context(q), [h] * 3, 1)
        features = cat([dq, direction] if mu is None else [dq, direction, (relay[:, None] * mu).flatten(1)], 1)
        if self.kernel is not None:
            both = self.kernel(features, edges)
        else:
            assert self.edge_kernel is not None
            assert columns is not None
            both = self.edge_kernel(features, self.radial_functions(columns, mu is not None), edges)
        sum_q, sums = split(both, [h, 3 * h], 1)
        sums = sums.reshape(-1, 3, h)
        return self.update(q + sum_q, sums if mu is None else mu + sums)

    def radial_functions(self, columns: Tensor, relay: bool) -> Tensor:
        """Radial functions of the kernel, one product: bias and factors are in its right side."""
        rows = cat([self.filters.weight, self.filters.bias[:, None]], 1) * self.scale
        width = self.filters.out_features
        return columns @ (rows if relay else split(rows, [2 * width // 3, width // 3], 0)[0]).T

    def update(self, q: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        v, w = split(self.mix(mu), [q.shape[1]] * 2, 2)
        length = torch.sqrt((v**2).sum(dim=1) + 1e-8) if self.published else smooth_length(v)
        a, b, c = split(self.update_net(cat([q, length], 1)), [q.shape[1]] * 3, 1)
        return q + a + c * (v * w).sum(dim=1), mu + b[:, None] * w


class GatedBlock(nn.Module):
    """Gated equivariant block (Weiler et al. 2018; PaiNN, Fig. 3): vectors are mixed and scaled by scalars."""

    def __init__(self, num_in: int, num_out: int, activate: bool, published: bool) -> None:
        super().__init__()
        self.activate, self.published = activate, published
        self.mix = linear(num_in, 2 * num_out, bias=False)
        self.net = dense(num_in + num_out, num_in, 2 * num_out)

    def forward(self, q: Float[Tensor, "N A"], mu: Float[Tensor, "N 3 A"]) -> tuple[Tensor, Tensor]:
        v, w = self.mix(mu).chunk(2, dim=2)
        length = torch.linalg.vector_norm(v, dim=1) if self.published else smooth_length(v)
        s, gate = self.net(torch.cat([q, length], dim=1)).chunk(2, dim=1)
        return nn.functional.silu(s) if self.activate else s, gate[:, None] * w


class PaiNN(nn.Module):
    """The network: species and edge vectors in, per-atom energies (and direct forces) out."""

    own_repulsion = False

    def __init__(self, config: PaiNNConfig, facts: DataFacts) -> None:
        """
        Args:
            config: Settings.
            facts: Elements, and the mean number of neighbours, which scales the sums of the sound variant.
        """
        super().__init__()
        h = config.num_features
        self.config = config
        published = config.variant == "published"
        self.subtract_isolated = not published
        scale = 1.0 if published else 1 / math.sqrt(max(facts.mean_neighbors, 1.0))
        self.embedding = nn.Embedding(len(facts.atomic_numbers), h)
        self.layers: Any = nn.ModuleList(Layer(config, scale) for _ in range(config.num_layers))
        self.readout = dense(h, h // 2, 1)
        self.force_blocks: Any = None
        if config.direct_forces:
            self.force_blocks = nn.ModuleList([GatedBlock(h, h // 2, True, published), GatedBlock(h // 2, 1, False, published)])

    def add_kernels(self) -> None:
        """From now on pass messages by kernels: for inference with these very weights."""
        exact = copy.deepcopy(self).cpu().double()
        h = self.config.num_features
        for k, layer in enumerate(self.layers):

            def radial(x: Tensor, k: int = k) -> Tensor:
                return exact.layers[k].radial_functions(exact.radial_columns(*exact.radial(x)), k > 0)

            layer.kernel = KernelLayer(vector_convolution(h, k > 0), radial, self.embedding.weight)

    def use_edge_kernels(self, on: bool) -> None:
        """Pass messages by kernels that training can differentiate, or no longer."""
        for k, layer in enumerate(self.layers):
            layer.edge_kernel = EdgeKernel(vector_convolution(self.config.num_features, k > 0), self.embedding.weight) if on else None

    def radial(self, x: Float[Tensor, " E"]) -> tuple[Float[Tensor, "E B"], Float[Tensor, " E"]]:
        """Radial functions of distance over cutoff, and the envelope that ends them."""
        if self.config.variant == "published":
            return gaussian_basis(x, self.config.num_basis), cosine_cutoff(x)
        return bessel_basis(x, self.config.num_basis), polynomial_envelope(x, p=5, k=3)

    @staticmethod
    def radial_columns(basis: Tensor, envelope: Tensor) -> Float[Tensor, "E columns"]:
        """What the radial functions of every layer are linear in: basis and a last column for the bias, times the envelope."""
        return cat([basis * envelope[:, None], envelope[:, None]], 1)

    def forward(
        self,
        species: Int[Tensor, " N"],
        edge_index: Int[Tensor, "2 E"],
        edge_vectors: Float[Tensor, "E 3"],
        graph_index: Int[Tensor, " N"],
        n_graphs: int,
    ) -> ModelOutput:
        """
        Args:
            species: Index of each atom in the model's table of elements.
            edge_index: (sender, receiver), sorted by receiver.
            edge_vectors: Å, from centre (receiver) to neighbour (sender).
            graph_index: Structure of each atom (not used: the network is local).
            n_graphs: Number of structures (not used).
        """
        lengths = torch.linalg.vector_norm(edge_vectors, dim=-1)
        unit = edge_vectors / lengths[:, None]
        x = lengths / self.config.cutoff
        q, mu = self.embedding(species), None
        first = self.layers[0]
        basis, envelope = (None, None) if first.kernel is not None else self.radial(x)
        edges: KernelEdges | None = None
        if first.kernel is not None or first.edge_kernel is not None:
            edges = KernelEdges(sort_edges(edge_index, q), cat([torch.ones_like(unit[:, :1]), unit], 1), x)
        columns = None if edges is None or basis is None else self.radial_columns(basis, envelope)
        for layer in self.layers:
            if edges is not None:
                q, mu = layer.with_kernel(q, mu, columns, edges)
            else:
                q, mu = layer(q, mu, basis, envelope, unit, edge_index)
        energies = self.readout(q)[:, 0]
        if self.force_blocks is None:
            return ModelOutput(node_energies=energies, direct_forces=None)
        for block in self.force_blocks:
            q, mu = block(q, mu)
        return ModelOutput(node_energies=energies, direct_forces=mu[:, :, 0])
