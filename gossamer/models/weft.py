"""Weft: NequIP with products of features on the atoms. A network of gossamer's own.

NequIP (arXiv:2101.03164) multiplies features by harmonics, edge by edge; MACE (arXiv:2206.07697) multiplies the sums over edges by each
other, atom by atom. Weft does both: after each convolution but the last the features a of an atom are also multiplied in pairs,

    p_l = W_l [ sqrt(2 l + 1) Σ_{m1,m2} w3j(l1, l2, l) a_l1[c, m1] a_l2[c, m2]  for all l1 ≤ l2 of natural parity, all c ]

Atoms are fewer than edges by a factor of 10 to 100, so this costs little, and forces are learned in fewer steps (benchmarks/accuracy).
The self-connection scales each channel by a number of the element, and has one linear map for all. Else it is NequIP's sound variant:
no biases, so that an isolated atom gives zero, and features of unit variance, normalised for each atom. The norm acts on what a layer sums
up: `normalize="features"`, on what the next layer takes in, let weights before gates and products grow without bound (Muon does not care what a norm
takes out again), gates see ± 1,000 instead of ± 3, and SiLU be a kink there: forces jumped by 20 meV/Å within 0.01 Å.

Shapes: N atoms, E directed edges, C channels. Features are (N, S, C), S = (l + 1)² components of degrees 0 … l, channels last.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from gossamer.models.base import DataFacts, FitDefaults, ModelOutput, Network, distances
from gossamer.nn.coupling import Coupling, FeatureNorm, Irrep, blocks, gate, paths_between
from gossamer.nn.layers import Constant, UnitLinear, cat, decaying, polynomial_envelope, split, unit_mlp, unit_scale
from gossamer.nn.polynomial import Monomials, Polynomial
from gossamer.nn.products import Edges
from gossamer.nn.spherical import SphericalHarmonics, wigner_3j
from gossamer.settings import settings

PRESETS: dict[str, dict[str, Any]] = {"tiny": {"num_features": 4, "num_layers": 2, "num_basis": 4, "radial_width": 6}}


@settings
class WeftConfig:
    """Settings of Weft, NequIP with products on the atoms."""

    name: Literal["weft"] = "weft"
    """Which network."""
    variant: Literal["sound"] = "sound"
    """There is but one: smooth through the third derivative, features of unit variance, lone atoms at their reference energy."""
    cutoff: Annotated[float, Field(gt=0, le=100)] = 5.0
    """Radius in Å within which atoms exchange messages."""
    max_neighbors: None = None
    """Always all neighbours within the cutoff."""
    l_max: Annotated[int, Field(ge=1, le=4)] = 2
    """Highest degree of features and harmonics: 1 is fast, 2 accurate."""
    num_features: Annotated[int, Field(ge=1, le=10_000)] = 32
    """Channels of each degree."""
    num_layers: Annotated[int, Field(ge=2, le=100)] = 3
    """Interactions; the receptive field is num_layers * cutoff, and all but the last have products."""
    num_basis: Annotated[int, Field(ge=1, le=10_000)] = 8
    """Radial Bessel functions."""
    basis_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """k of the factor n^-k of the n-th radial function: above 0, what varies fast with distance is learned last, which few frames need."""
    envelope_power: Annotated[int, Field(ge=2, le=100)] = 6
    """Power p of the polynomial envelope."""
    radial_width: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Width of the hidden layer of the radial networks."""
    normalize: Literal["sums", "features"] = "sums"
    """Where the norm of each atom acts: on what a layer sums up, so that gates see numbers near one and stay smooth, or on what the next layer
    takes in (potentials from before this was a setting)."""
    direct_forces: Literal[False] = False
    """Forces are the gradient of the energy."""


def degrees(x: Float[Tensor, "N S C"]) -> list[Tensor]:
    """The components (N, 2 l + 1, C) of each degree."""
    return list(split(x, [2 * l + 1 for l in range(math.isqrt(x.shape[1]))], 1))


def couplings(l_max: int, l: int) -> list[NDArray[np.float64]]:
    """All ways to couple two copies of features of degrees 0 … l_max and natural parity to degree l, each (2 l + 1, S, S).

    As x_i x_j is x_j x_i, coefficients below the diagonal are added to those above it.
    """
    found = []
    for l1 in range(l_max + 1):
        for l2 in range(l1, min(l_max, l1 + l) + 1):
            if l <= l1 + l2 and (l1 + l2 + l) % 2 == 0:
                full = np.zeros((2 * l + 1, (l_max + 1) ** 2, (l_max + 1) ** 2))
                symbols = wigner_3j(l1, l2, l).transpose(2, 0, 1) * math.sqrt(2 * l + 1)
                full[:, l1**2 : (l1 + 1) ** 2, l2**2 : (l2 + 1) ** 2] = symbols
                found.append(np.triu(full) + np.tril(full, -1).transpose(0, 2, 1))
    return found


class Products(nn.Module):
    """Products of two features of an atom, channel by channel, and for each degree a linear map of all that couple to it."""

    def __init__(self, l_max: int, channels: int, outputs: list[int]) -> None:
        """``channels``: of each degree 0 … l_max of the features; ``outputs``: of each degree of the result."""
        super().__init__()
        found = [couplings(l_max, l) for l in range(l_max + 1)]
        rows = [way[m] for l, ways in enumerate(found) for m in range(2 * l + 1) for way in ways]  # ways side by side, as channels lie
        pairs = [np.argwhere(np.abs(row) > 1e-12) for row in rows]
        self.polynomial: Any = Polynomial(Monomials((l_max + 1) ** 2, tuple(tuple((int(i), int(j)) for i, j in p) for p in pairs)))
        self.coefficients = Constant(np.concatenate([row[tuple(p.T)] for row, p in zip(rows, pairs, strict=True)])[None, :, None])
        self.sizes = [(2 * l + 1, len(ways) * channels) for l, ways in enumerate(found)]
        self.linear: Any = nn.ModuleList(UnitLinear(width, n) for (_, width), n in zip(self.sizes, outputs, strict=True))

    def forward(self, a: Float[Tensor, "N S C"], species: Int[Tensor, " N"]) -> list[Tensor]:
        """(N, 2 l + 1, outputs) of each degree; coefficients are the same for all elements."""
        n, _, c = a.shape
        products = self.polynomial(a, torch.zeros_like(species), self.coefficients().expand(1, -1, c))
        parts = split(products, [dim * width // c for dim, width in self.sizes], 1)
        return [linear(part.reshape(n, *size)) for linear, part, size in zip(self.linear, parts, self.sizes, strict=True)]


class Interaction(nn.Module):
    """One layer: linear map, convolution, linear map, self-connection, products, gate."""

    def __init__(self, config: WeftConfig, l_in: int, l_out: int, facts: DataFacts, first: bool) -> None:
        """
        Args:
            config: Settings of the network.
            l_in: Highest degree of the features.
            l_out: Highest degree of the result; 0: no products.
            facts: Elements, and the mean number of neighbours, by whose root messages are divided.
            first: No self-connection, so that an isolated atom gives zero.
        """
        super().__init__()
        c = config.num_features
        self.scale = Constant(np.array([max(facts.mean_neighbors, 1.0) ** -0.5]))
        irreps, self.irreps_out = ([Irrep(c, l, (-1) ** l) for l in range(n + 1)] for n in (l_in, l_out))
        self.norm = FeatureNorm(irreps) if config.normalize == "features" and not first else None
        self.linear_in: Any = nn.ModuleList(UnitLinear(c, c) for _ in irreps)
        paths = paths_between(irreps, config.l_max, [i.kind for i in self.irreps_out])
        coupling = Coupling(irreps, config.l_max, paths, unit_mlp([config.num_basis, config.radial_width, c * len(paths)]))
        self.irreps_summed = coupling.irreps_out  # degree by degree, as ``irreps_out``
        self.convolution: Any = coupling
        outputs = [c * (1 + l_out), *[c] * l_out]  # scalars also carry the gates of the other degrees
        self.linear_out: Any = nn.ModuleList(UnitLinear(i.mul, n) for i, n in zip(self.irreps_summed, outputs, strict=True))
        before = [Irrep(n, i.l, i.p) for i, n in zip(self.irreps_out, outputs, strict=True)]
        self.sum_norm = FeatureNorm(before) if config.normalize == "sums" and l_out else None
        self.elements = None if first else nn.Embedding(len(facts.atomic_numbers), c)
        self.self_connection: Any = nn.ModuleList(UnitLinear(c, outputs[l]) for l in range(0 if first else l_out + 1))
        self.products = Products(l_out, c, outputs) if l_out else None

    def forward(self, x: Float[Tensor, "N S C"], species: Int[Tensor, " N"], edges: Edges) -> Float[Tensor, "N S_out C"]:
        n, _, c = x.shape
        if self.norm is not None:
            x = self.norm(x.flatten(1)).reshape(x.shape)
        mixed = cat([linear(part) for linear, part in zip(self.linear_in, degrees(x), strict=True)], 1) * self.scale()
        sums = blocks(self.convolution(mixed.flatten(1), edges), self.irreps_summed)
        results = [linear(part) for linear, part in zip(self.linear_out, sums, strict=True)]
        if self.elements is not None:
            own = degrees(x * self.elements(species)[:, None])[: len(results)]
            results = [(r + linear(part)) * math.sqrt(0.5) for r, linear, part in zip(results, self.self_connection, own, strict=True)]
        if self.sum_norm is not None:
            results = self.sum_norm.of(results)
        if self.products is not None:
            a = cat([split(results[0], [c, results[0].shape[2] - c], 2)[0], *results[1:]], 1)
            results = [(r + p) * math.sqrt(0.5) for r, p in zip(results, self.products(a, species), strict=True)]
        return gate(results, self.irreps_out).reshape(n, -1, c)


class Weft(Network):
    """The network: species and edge vectors in, per-atom energies out."""

    fit_defaults: ClassVar = FitDefaults(learning_rate=4e-2, soap_rate=8e-2, compiled_share=0.7, compile_seconds=130.0)
    earlier: ClassVar = {"normalize": "features"}
    presets: ClassVar = PRESETS
    subtract_isolated = False
    """without biases an isolated atom gives zero by itself"""

    def __init__(self, config: WeftConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config, last = config, config.num_layers - 1
        self.harmonics = SphericalHarmonics(config.l_max, "component")
        self.embedding = nn.Embedding(len(facts.atomic_numbers), config.num_features)
        degree = [0, *[config.l_max] * last, 0]
        self.layers: Any = nn.ModuleList(Interaction(config, degree[k], degree[k + 1], facts, k == 0) for k in range(last + 1))
        self.readout = UnitLinear(config.num_features, 1)
        scale = unit_scale(config.num_basis, config.envelope_power, 2)
        self.basis_scales = Constant(scale * decaying(config.num_basis, config.basis_decay))

    def radial_basis(self, x: Float[Tensor, " E"]) -> Float[Tensor, "E B"]:
        """As `Network.radial_basis`: b_n = s_n sin(n π x) / x · f_p(x), s_n ~ n^-k, of unit variance; sine and envelope vanish together as (1 - x)⁴."""
        n = torch.arange(1, self.config.num_basis + 1, dtype=x.dtype, device=x.device)
        return torch.sin(math.pi * n * x[:, None]) * (polynomial_envelope(x, self.config.envelope_power) / x)[:, None] * self.basis_scales()

    def forward(
        self,
        species: Int[Tensor, " N"],
        edge_index: Int[Tensor, "2 E"],
        edge_vectors: Float[Tensor, "E 3"],
        graph_index: Int[Tensor, " N"],
        n_graphs: int,
    ) -> ModelOutput:
        """As `Network.forward`; the network is local and needs no structures."""
        directions, x = distances(edge_vectors, self.config.cutoff)
        edges = Edges(edge_index, x, self.harmonics(directions), lambda: self.radial_basis(x))
        features = self.embedding(species)[:, None]
        for layer in self.layers:
            features = layer(features, species, edges)
        scalars = features[:, 0]
        return ModelOutput(node_energies=self.readout(scalars)[:, 0], direct_forces=None, features=scalars)
