"""PaiNN: scalars and vectors, filters from distances, the baseline of equivariant message passing.

Schütt, Unke, Gastegger, ICML 2021, arXiv:2102.03150. `variant="published"` equals schnetpack's PaiNN (Gaussians, cosine
cutoff); `variant="sound"` (default) has an envelope with three vanishing derivatives, a smooth length, and gives lone
atoms their reference energy. `direct_forces` adds the paper's gated equivariant blocks: the baseline "PaiNN_Direct".

Shapes: N atoms, E edges, H channels, B radial functions. Scalars q (N, H), vectors mu (N, 3, H).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from gossamer.models.base import DataFacts, FitDefaults, ModelOutput, Network, distances, read_out
from gossamer.nn.filters import RadialLinear, VectorConvolution, bessel_basis, cosine_cutoff, gaussian_basis, smooth_length
from gossamer.nn.layers import Constant, cat, linear, polynomial_envelope, split
from gossamer.nn.products import Edges
from gossamer.settings import settings


@settings
class PaiNNConfig:
    """Settings of the PaiNN network (Schütt et al., arXiv:2102.03150)."""

    name: Literal["painn"] = "painn"
    """Which network."""
    variant: Literal["sound", "published"] = "sound"
    """"sound": smooth at the cutoff, for molecular dynamics. "published": as in schnetpack."""
    cutoff: Annotated[float, Field(gt=0, le=100)] = 5.0
    """Radius in Å within which atoms exchange messages."""
    max_neighbors: Annotated[int, Field(gt=0, le=10**6)] | None = None
    """Keep only this many nearest neighbours. The energy then jumps when ranks change; None keeps all."""
    num_features: Annotated[int, Field(ge=2, le=10_000)] = 64
    """Channels of the scalars and of the vectors (paper: 128)."""
    num_layers: Annotated[int, Field(ge=1, le=100)] = 3
    """Message-passing steps."""
    num_basis: Annotated[int, Field(ge=2, le=10_000)] = 20
    """Radial functions: Bessel for the sound variant, Gaussians for the published one."""
    direct_forces: bool = False
    """Add a head that predicts forces directly. They are not the gradient of the energy."""


def dense(num_in: int, num_hidden: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(linear(num_in, num_hidden), nn.SiLU(), linear(num_hidden, num_out))


class Layer(nn.Module):
    """Message (Eq. 7, 8) and update (Eq. 9, 10)."""

    def __init__(self, config: PaiNNConfig, first: bool) -> None:
        super().__init__()
        h = config.num_features
        self.published = config.variant == "published"
        self.context = dense(h, h, 3 * h)
        # before the first layer there are no vectors to relay
        filters = RadialLinear(config.num_basis, 3 * h, 3, [(k, 1.0) for k in range(2 if first else 3)])
        self.convolution = VectorConvolution(h, not first, filters)
        self.mix = linear(h, 2 * h, bias=False)
        self.update_net = dense(2 * h, h, 3 * h)

    def forward(self, q: Float[Tensor, "N H"], mu: Float[Tensor, "N 3 H"] | None, edges: Edges) -> tuple[Tensor, Tensor]:
        h = q.shape[1]
        dq, direction, relay = split(self.context(q), [h] * 3, 1)
        features = cat([dq, direction] if mu is None else [dq, direction, (relay[:, None] * mu).flatten(1)], 1)
        sum_q, sum_mu = split(self.convolution(features, edges), [h, 3 * h], 1)
        sum_mu = sum_mu.reshape(-1, 3, h)
        return self.update(q + sum_q, sum_mu if mu is None else mu + sum_mu)

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


class PaiNN(Network):
    """The network: species and edge vectors in, per-atom energies (and direct forces) out."""

    fit_defaults: ClassVar = FitDefaults(learning_rate=2e-3)
    presets: ClassVar = {"tiny": {"num_features": 8, "num_layers": 2, "num_basis": 5}}
    renamed: ClassVar = {r"^layers\.(\d+)\.filters\.": r"layers.\1.convolution.radial."}

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
        self.scale = Constant(np.array([max(facts.mean_neighbors, 1.0) ** -0.5]))
        self.embedding = nn.Embedding(len(facts.atomic_numbers), h)
        self.layers: Any = nn.ModuleList(Layer(config, first=k == 0) for k in range(config.num_layers))
        self.readout = dense(h, h // 2, 1)
        self.force_blocks: Any = None
        if config.direct_forces:
            self.force_blocks = nn.ModuleList([GatedBlock(h, h // 2, True, published), GatedBlock(h // 2, 1, False, published)])

    def radial_basis(self, x: Float[Tensor, " E"]) -> Float[Tensor, "E columns"]:
        """Radial functions of distance over cutoff times the envelope, and the envelope itself, for the bias; scaled for the sums."""
        if self.config.variant == "published":
            basis, envelope = gaussian_basis(x, self.config.num_basis), cosine_cutoff(x)
        else:
            basis, envelope = bessel_basis(x, self.config.num_basis), polynomial_envelope(x, p=5, k=3) * self.scale()
        return cat([basis * envelope[:, None], envelope[:, None]], 1)

    def forward(
        self,
        species: Int[Tensor, " N"],
        edge_index: Int[Tensor, "2 E"],
        edge_vectors: Float[Tensor, "E 3"],
        graph_index: Int[Tensor, " N"],
        n_graphs: int,
    ) -> ModelOutput:
        """As `Network.forward`; the network is local and needs no structures."""
        unit, x = distances(edge_vectors, self.config.cutoff)
        edges = Edges(edge_index, x, cat([torch.ones_like(unit[:, :1]), unit], 1), lambda: self.radial_basis(x))
        q, mu = self.embedding(species), None
        for layer in self.layers:
            q, mu = layer(q, mu, edges)
        energies, features = read_out(self.readout, q)
        if self.force_blocks is None:
            return ModelOutput(node_energies=energies, direct_forces=None, features=features)
        for block in self.force_blocks:
            q, mu = block(q, mu)
        return ModelOutput(node_energies=energies, direct_forces=mu[:, :, 0], features=features)
