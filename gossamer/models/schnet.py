"""SchNet: continuous-filter convolutions of scalars, the invariant baseline.

Schütt, Kindermans, Sauceda, Chmiela, Tkatchenko, Müller, NeurIPS 2017, arXiv:1706.08566. `variant="published"` equals
schnetpack's SchNet (cosine cutoff); `variant="sound"` (default) has an envelope with three vanishing derivatives and gives
lone atoms their reference energy. It has no vectors, hence no direct forces.

Shapes: N atoms, E edges, H channels, B radial functions.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from gossamer.models.base import DataFacts, FitDefaults, ModelOutput, Network, distances, read_out
from gossamer.nn.filters import cosine_cutoff, gaussian_basis
from gossamer.nn.layers import Constant, cat, linear, polynomial_envelope, split
from gossamer.nn.products import Edges, ScalarConvolution
from gossamer.settings import settings


@settings
class SchNetConfig:
    """Settings of the SchNet network (Schütt et al., arXiv:1706.08566)."""

    name: Literal["schnet"] = "schnet"
    """Which network."""
    variant: Literal["sound", "published"] = "sound"
    """"sound": smooth at the cutoff, for molecular dynamics. "published": as in schnetpack."""
    cutoff: Annotated[float, Field(gt=0, le=100)] = 5.0
    """Radius in Å within which atoms exchange messages."""
    max_neighbors: Annotated[int, Field(gt=0, le=10**6)] | None = None
    """Keep only this many nearest neighbours. The energy then jumps when ranks change; None keeps all."""
    num_features: Annotated[int, Field(ge=2, le=10_000)] = 64
    """Channels."""
    num_layers: Annotated[int, Field(ge=1, le=100)] = 3
    """Interactions."""
    num_basis: Annotated[int, Field(ge=2, le=10_000)] = 20
    """Gaussians."""
    direct_forces: Literal[False] = False
    """SchNet has no vectors, so forces can only be the gradient of the energy."""


class ShiftedSoftplus(nn.Module):
    """ln(½ e^x + ½), which is 0 at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x) - math.log(2.0)


class Filters(nn.Sequential):
    """Radial functions: a small network of the Gaussians, times the envelope (last column)."""

    def __init__(self, num_basis: int, num_out: int) -> None:
        super().__init__(linear(num_basis, num_out), ShiftedSoftplus(), linear(num_out, num_out))
        self.num_basis = num_basis

    def forward(self, columns: Float[Tensor, "E columns"]) -> Float[Tensor, "E H"]:
        basis, envelope = split(columns, [self.num_basis, 1], 1)
        return super().forward(basis) * envelope


class Layer(nn.Module):
    """x_i += f( Σ_j W_in x_j ⊙ filter(r_ij) )."""

    def __init__(self, config: SchNetConfig) -> None:
        super().__init__()
        h = config.num_features
        self.to_filters = linear(h, h, bias=False)
        self.convolution = ScalarConvolution(h, Filters(config.num_basis, h))
        self.out = nn.Sequential(linear(h, h), ShiftedSoftplus(), linear(h, h))

    def forward(self, x: Float[Tensor, "N H"], edges: Edges) -> Float[Tensor, "N H"]:
        return x + self.out(self.convolution(self.to_filters(x), edges))


class SchNet(Network):
    """The network: species and edge vectors in, per-atom energies out."""

    fit_defaults: ClassVar = FitDefaults(learning_rate=2e-3)
    presets: ClassVar = {"tiny": {"num_features": 8, "num_layers": 2, "num_basis": 5}}
    renamed: ClassVar = {r"^layers\.(\d+)\.filters\.": r"layers.\1.convolution.radial."}

    def __init__(self, config: SchNetConfig, facts: DataFacts) -> None:
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
        self.layers: Any = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.readout = nn.Sequential(linear(h, h // 2), nn.SiLU(), linear(h // 2, 1))

    def radial_basis(self, x: Float[Tensor, " E"]) -> Float[Tensor, "E columns"]:
        """Gaussians of distance over cutoff, and the envelope that ends them, scaled for the sums."""
        envelope = cosine_cutoff(x) if self.config.variant == "published" else polynomial_envelope(x, p=5, k=3) * self.scale()
        return cat([gaussian_basis(x, self.config.num_basis), envelope[:, None]], 1)

    def forward(
        self,
        species: Int[Tensor, " N"],
        edge_index: Int[Tensor, "2 E"],
        edge_vectors: Float[Tensor, "E 3"],
        graph_index: Int[Tensor, " N"],
        n_graphs: int,
    ) -> ModelOutput:
        """As `Network.forward`; the network is local and needs no structures."""
        _, x = distances(edge_vectors, self.config.cutoff)
        edges = Edges(edge_index, x, torch.ones_like(x[:, None]), lambda: self.radial_basis(x))
        h = self.embedding(species)
        for layer in self.layers:
            h = layer(h, edges)
        energies, features = read_out(self.readout, h)
        return ModelOutput(node_energies=energies, direct_forces=None, features=features)
