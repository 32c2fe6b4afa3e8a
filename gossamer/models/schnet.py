"""SchNet: continuous-filter convolutions of scalars, the invariant baseline.

Schütt, Kindermans, Sauceda, Chmiela, Tkatchenko, Müller, NeurIPS 2017, arXiv:1706.08566. `variant="published"` equals
schnetpack's SchNet (cosine cutoff); `variant="sound"` (default) has an envelope with three vanishing derivatives and gives
lone atoms their reference energy. It has no vectors, hence no direct forces.

Shapes: N atoms, E edges, H channels, B radial functions.
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
from gossamer.engine.kernels.product import scalar_convolution
from gossamer.models.base import DataFacts, ModelOutput
from gossamer.nn.layers import linear, sum_by_index
from gossamer.nn.radial import cosine_cutoff, gaussian_basis, polynomial_envelope
from gossamer.settings import settings


@settings
class SchNetConfig:
    """Settings of the SchNet network (Schütt et al., arXiv:1706.08566)."""

    name: Literal["schnet"] = "schnet"
    """Which network."""
    variant: Literal["sound", "published"] = "sound"
    """"sound": smooth at the cutoff, for molecular dynamics. "published": as in schnetpack."""
    cutoff: Annotated[float, Field(gt=0)] = 5.0
    """Radius in Å within which atoms exchange messages."""
    max_neighbors: Annotated[int, Field(gt=0)] | None = None
    """Keep only this many nearest neighbours. The energy then jumps when ranks change; None keeps all."""
    num_features: Annotated[int, Field(ge=2)] = 64
    """Channels."""
    num_layers: Annotated[int, Field(ge=1)] = 3
    """Interactions."""
    num_basis: Annotated[int, Field(ge=2)] = 20
    """Gaussians."""
    direct_forces: Literal[False] = False
    """SchNet has no vectors, so forces can only be the gradient of the energy."""


class ShiftedSoftplus(nn.Module):
    """ln(½ e^x + ½), which is 0 at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x) - math.log(2.0)


class Layer(nn.Module):
    """x_i += f( Σ_j W_in x_j ⊙ filter(r_ij) )."""

    def __init__(self, config: SchNetConfig, scale: float) -> None:
        super().__init__()
        h = config.num_features
        self.scale = scale
        self.to_filters = linear(h, h, bias=False)
        self.filters = nn.Sequential(linear(config.num_basis, h), ShiftedSoftplus(), linear(h, h))
        self.out = nn.Sequential(linear(h, h), ShiftedSoftplus(), linear(h, h))
        self.kernel: KernelLayer | None = None
        self.edge_kernel: EdgeKernel | None = None

    def forward(self, x: Float[Tensor, "N H"], basis: Tensor, envelope: Tensor, edge_index: Tensor) -> Float[Tensor, "N H"]:
        sender, receiver = edge_index
        messages = self.to_filters(x).index_select(0, sender) * (self.filters(basis) * envelope[:, None])
        return x + self.out(sum_by_index(messages, receiver, x.shape[0]) * self.scale)

    def with_kernel(
        self, x: Float[Tensor, "N H"], basis: Tensor | None, envelope: Tensor | None, edges: KernelEdges
    ) -> Float[Tensor, "N H"]:
        """The same by a kernel; its radial functions hold all factors."""
        features = self.to_filters(x)
        if self.kernel is not None:
            return x + self.out(self.kernel(features, edges))
        assert self.edge_kernel is not None
        return x + self.out(self.edge_kernel(features, self.radial_functions(basis, envelope), edges))

    def radial_functions(self, basis: Tensor, envelope: Tensor) -> Tensor:
        """Radial functions of the kernel."""
        return self.filters(basis) * (envelope * self.scale)[:, None]


class SchNet(nn.Module):
    """The network: species and edge vectors in, per-atom energies out."""

    own_repulsion = False

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
        scale = 1.0 if published else 1 / math.sqrt(max(facts.mean_neighbors, 1.0))
        self.embedding = nn.Embedding(len(facts.atomic_numbers), h)
        self.layers: Any = nn.ModuleList(Layer(config, scale) for _ in range(config.num_layers))
        self.readout = nn.Sequential(linear(h, h // 2), nn.SiLU(), linear(h // 2, 1))

    def add_kernels(self) -> None:
        """From now on pass messages by kernels: for inference with these very weights."""
        exact = copy.deepcopy(self).cpu().double()
        for k, layer in enumerate(self.layers):

            def radial(x: Tensor, k: int = k) -> Tensor:
                return exact.layers[k].radial_functions(*exact.radial(x))

            layer.kernel = KernelLayer(scalar_convolution(self.config.num_features), radial, self.embedding.weight)

    def use_edge_kernels(self, on: bool) -> None:
        """Pass messages by kernels that training can differentiate, or no longer."""
        for layer in self.layers:
            layer.edge_kernel = EdgeKernel(scalar_convolution(self.config.num_features), self.embedding.weight) if on else None

    def radial(self, x: Float[Tensor, " E"]) -> tuple[Float[Tensor, "E B"], Float[Tensor, " E"]]:
        """Gaussians of distance over cutoff, and the envelope that ends them."""
        envelope = cosine_cutoff(x) if self.config.variant == "published" else polynomial_envelope(x, p=5, k=3)
        return gaussian_basis(x, self.config.num_basis), envelope

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
            edge_vectors: Å, from centre (receiver) to neighbour (sender); only their lengths matter.
            graph_index: Structure of each atom (not used: the network is local).
            n_graphs: Number of structures (not used).
        """
        x = torch.linalg.vector_norm(edge_vectors, dim=-1) / self.config.cutoff
        h = self.embedding(species)
        first = self.layers[0]
        basis, envelope = (None, None) if first.kernel is not None else self.radial(x)
        edges: KernelEdges | None = None
        if first.kernel is not None or first.edge_kernel is not None:
            edges = KernelEdges(sort_edges(edge_index, h), torch.ones_like(x[:, None]), x)
        for layer in self.layers:
            h = layer(h, basis, envelope, edge_index) if edges is None else layer.with_kernel(h, basis, envelope, edges)
        return ModelOutput(node_energies=self.readout(h)[:, 0], direct_forces=None)
