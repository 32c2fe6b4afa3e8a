"""LEIGNN: scalars and vectors, a directional message, and an optional global context.

Yang, Wang, Li, Lv, Chen, Shen, "Lightweight equivariant model for efficient machine learning interatomic potentials",
arXiv:2311.02869 (E2GNN, npj Comput. Mater. 2025). Equation numbers below are the paper's.

Shapes: N atoms, E directed edges, G structures, H channels, B radial functions. Scalars x (N, H), vectors v (N, 3, H).
`variant="published"` is the published network to rounding; `variant="sound"` (default) differs where a potential
for molecular dynamics needs it: messages vanish at the cutoff with three derivatives, the length of a vector is smooth
at zero, and sums are scaled by the mean number of neighbours.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.models.base import DataFacts, FitDefaults, ModelOutput, Network, distances, read_out
from gossamer.nn.filters import RadialLinear, VectorConvolution, bessel_basis, gaussian_basis, smooth_length
from gossamer.nn.layers import Constant, cat, decaying, linear, polynomial_envelope, split, sum_by_index
from gossamer.nn.products import Edges
from gossamer.settings import settings


@settings
class LEIGNNConfig:
    """Settings of the LEIGNN network (Yang et al., arXiv:2311.02869)."""

    name: Literal["leignn"] = "leignn"
    """Which network."""
    variant: Literal["sound", "published"] = "sound"
    """"sound": smooth at the cutoff, for molecular dynamics. "published": exactly the paper's network."""
    cutoff: Annotated[float, Field(gt=0, le=100)] = 5.0
    """Radius in Å within which atoms exchange messages."""
    max_neighbors: Annotated[int, Field(gt=0, le=10**6)] | None = None
    """Keep only this many nearest neighbours (paper: 20 or 50). The energy then jumps when ranks change; None keeps all."""
    num_features: Annotated[int, Field(ge=2, le=10_000)] = 64
    """Channels of the scalars and of the vectors (H; paper: 512)."""
    num_layers: Annotated[int, Field(ge=1, le=100)] = 3
    """Message-passing steps (paper: 4); the receptive field is num_layers * cutoff."""
    num_basis: Annotated[int, Field(ge=2, le=10_000)] = 12
    """Radial functions (B; paper: 128 Gaussians)."""
    radial_basis: Literal["bessel", "gaussian"] | None = None
    """Kind of radial functions; None takes Bessel for the sound variant and Gaussians for the published one, which has no other."""
    basis_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """k of the factor n^-k of the n-th radial function: above 0, what varies fast with distance is learned last, which few frames need."""
    update: Literal["nmu", "painn"] = "nmu"
    """Node update: "nmu" (Eq. 3, 4) or PaiNN's (row "Vanilla" of the paper's Table 2)."""
    global_context: bool = False
    """Global scalar and vector of each structure (Eq. 5-8). They couple distant parts; leave off for dynamics."""
    direct_forces: bool = False
    """Add a head that predicts forces directly. They are not the gradient of the energy."""

    @model_validator(mode="after")
    def _published_has_gaussians(self) -> LEIGNNConfig:
        if self.variant == "published" and self.radial_basis == "bessel":
            raise ValueError("the published variant has Gaussians: leave radial_basis out, or set variant: sound")
        if self.basis_decay and (self.variant == "published" or self.radial_basis == "gaussian"):
            raise ValueError(
                "basis_decay is for Bessel functions, and this network has Gaussians: leave it out, or set radial_basis: bessel"
            )
        return self


class ScaledSiLU(nn.Module):
    """SiLU / 0.6, which keeps the variance of normal input near one (Gasteiger et al., arXiv:2106.08903)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x) * (1 / 0.6)


def mean_by_index(values: Float[Tensor, "n ..."], index: Int[Tensor, " n"], size: int) -> Float[Tensor, "size ..."]:
    """out[k] = mean of the values whose index is k; zeros where there are none."""
    count = sum_by_index(torch.ones_like(index, dtype=values.dtype), index, size).clamp(min=1)
    return sum_by_index(values, index, size) / count.reshape(-1, *[1] * (values.dim() - 1))


class Message(nn.Module):
    """Local message, Eq. 1 and 2: the sums over neighbours of scalar and vector messages."""

    def __init__(self, config: LEIGNNConfig, relay: bool) -> None:
        """
        Args:
            config: Settings of the network.
            relay: Whether there are vectors yet.
        """
        super().__init__()
        h = config.num_features
        self.P = nn.Sequential(linear(h, h // 2), ScaledSiLU(), linear(h // 2, 3 * h))
        scale_x = 1 / math.sqrt(3)
        scale_v = 1 / math.sqrt(3 * h) if config.variant == "published" else scale_x
        # rows of R as in the paper: for relayed vectors, directions, scalars
        R = RadialLinear(config.num_basis, 3 * h, 3, [(2, scale_x), (1, scale_v), *([(0, scale_v)] if relay else [])])
        self.convolution = VectorConvolution(h, relay, R)

    def forward(self, x: Float[Tensor, "N H"], v: Float[Tensor, "N 3 H"] | None, edges: Edges) -> tuple[Tensor, Tensor]:
        h = x.shape[1]
        m1, m2, m3 = split(self.P(x), [h] * 3, 1)
        features = cat([m3, m2] if v is None else [m3, m2, (v * m1[:, None, :]).flatten(1)], 1)
        sum_x, sum_v = split(self.convolution(features, edges), [h, 3 * h], 1)
        sum_v = sum_v.reshape(-1, 3, h)
        return (x + sum_x) * (1 / math.sqrt(2)), sum_v if v is None else v + sum_v


class Update(nn.Module):
    """Local update: the paper's NMU (Eq. 3, 4) or PaiNN's (Schütt et al., arXiv:2102.03150, Eq. 9, 10)."""

    def __init__(self, config: LEIGNNConfig) -> None:
        super().__init__()
        h = config.num_features
        self.kind = config.update
        self.published = config.variant == "published"
        self.W_v = linear(h, 2 * h, bias=False)
        self.MLP_u = nn.Sequential(linear(2 * h, h), ScaledSiLU(), linear(h, 3 * h))

    def forward(self, x: Float[Tensor, "N H"], v: Float[Tensor, "N 3 H"]) -> tuple[Tensor, Tensor]:
        v1, v2 = split(self.W_v(v), [x.shape[1]] * 2, 2)
        length = torch.sqrt((v2 * v2).sum(dim=1) + 1e-8) if self.published else smooth_length(v2)
        a, b, c = split(self.MLP_u(cat([x, length], 1)), [x.shape[1]] * 3, 1)
        if self.kind == "nmu":
            return x + b * (1 / math.sqrt(2)) + x * torch.tanh(c), v + a[:, None, :] * v1
        inner = (v1 * v2).sum(dim=1) * (1 / math.sqrt(x.shape[1]))
        return x + (a + b * inner) * (1 / math.sqrt(2)), v + c[:, None, :] * v1


class Global(nn.Module):
    """One side of the global context: distribute (Eq. 5, 6) or aggregate (Eq. 7, 8); both have this form.

    scalars <- scalars + MLP([left, right]);   vectors <- vectors + W (v + g)
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        h = num_features
        self.MLP = nn.Sequential(linear(2 * h, h), ScaledSiLU(), linear(h, h), ScaledSiLU())
        self.W = linear(h, h, bias=False)

    def forward(self, left: Tensor, right: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        return self.MLP(torch.cat([left, right], dim=-1)), self.W(vectors)


class Layer(nn.Module):
    """The four phases of one layer."""

    def __init__(self, config: LEIGNNConfig, first: bool) -> None:
        super().__init__()
        self.distribute = Global(config.num_features) if config.global_context else None
        self.message = Message(config, relay=not first or config.global_context)
        self.update = Update(config)
        self.aggregate = Global(config.num_features) if config.global_context else None


class LEIGNN(Network):
    """Per-atom energies (and direct forces, if asked for) from species and edge vectors."""

    fit_defaults: ClassVar = FitDefaults(learning_rate=5e-3, compiled_share=0.7, compile_seconds=80.0)
    presets: ClassVar = {"tiny": {"num_features": 8, "num_layers": 2, "num_basis": 5}}
    renamed: ClassVar = {r"\.message\.R\.": ".message.convolution.radial."}

    def __init__(self, config: LEIGNNConfig, facts: DataFacts) -> None:
        """
        Args:
            config: Settings.
            facts: Elements, and the mean number of neighbours, which scales the sums of the sound variant.
        """
        super().__init__()
        h = config.num_features
        self.config = config
        self.subtract_isolated, self.local = config.variant == "sound", not config.global_context
        self.embedding = nn.Embedding(len(facts.atomic_numbers), h)
        nn.init.uniform_(self.embedding.weight, -math.sqrt(3), math.sqrt(3))
        scales = np.append(decaying(config.num_basis, config.basis_decay), 1.0)
        self.basis_scales = Constant(scales / math.sqrt(max(facts.mean_neighbors, 1.0)))
        self.global_scalar = nn.Parameter(torch.zeros(1, h)) if config.global_context else None
        self.layers: Any = nn.ModuleList(Layer(config, first=k == 0) for k in range(config.num_layers))
        self.MLP_E = nn.Sequential(linear(h, h // 2), ScaledSiLU(), linear(h // 2, 1))
        self.W_F = linear(h, 1, bias=False) if config.direct_forces else None

    def radial_basis(self, x: Float[Tensor, " E"]) -> Float[Tensor, "E columns"]:
        """Radial functions of distance over cutoff times the envelope that ends them, and what the bias multiplies."""
        if self.config.variant == "published":
            envelope = polynomial_envelope(x, p=5, k=2)[:, None]
            return cat([gaussian_basis(x, self.config.num_basis) * envelope, torch.ones_like(envelope)], 1)
        envelope = polynomial_envelope(x, p=5, k=3)[:, None]
        basis = gaussian_basis if self.config.radial_basis == "gaussian" else bessel_basis
        return cat([basis(x, self.config.num_basis) * envelope, envelope], 1) * self.basis_scales()

    def forward(
        self,
        species: Int[Tensor, " N"],
        edge_index: Int[Tensor, "2 E"],
        edge_vectors: Float[Tensor, "E 3"],
        graph_index: Int[Tensor, " N"],
        n_graphs: int,
    ) -> ModelOutput:
        """As `Network.forward`."""
        unit, distance = distances(edge_vectors, self.config.cutoff)
        # the paper's u points from the neighbour j to the centre i
        edges = Edges(edge_index, distance, cat([torch.ones_like(unit[:, :1]), -unit], 1), lambda: self.radial_basis(distance))
        x = self.embedding(species)
        v: Tensor | None = None
        s = g = None
        if self.global_scalar is not None:
            s = self.global_scalar.expand(n_graphs, -1)
            g = x.new_zeros(n_graphs, 3, x.shape[1])
        for layer in self.layers:
            if layer.distribute is not None:
                v = torch.zeros_like(x)[:, None, :].expand(-1, 3, -1) if v is None else v
                dx, dv = layer.distribute(x, s[graph_index], v + g[graph_index])
                x, v = x + dx, v + dv
            x, v = layer.update(*layer.message(x, v, edges))
            if layer.aggregate is not None:
                mean_x, mean_v = mean_by_index(x, graph_index, n_graphs), mean_by_index(v, graph_index, n_graphs)
                ds, dg = layer.aggregate(mean_x, s, mean_v + g)
                s, g = s + ds, g + dg
        assert v is not None
        forces = self.W_F(v)[:, :, 0] if self.W_F is not None else None
        energies, features = read_out(self.MLP_E, x)
        return ModelOutput(node_energies=energies, direct_forces=forces, features=features)
