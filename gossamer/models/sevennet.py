"""SevenNet and Nequix: NequIP with a self-connection in every layer, and features of chosen sizes per layer.

Park et al., J. Chem. Theory Comput. 20, 4857 (2024), arXiv:2402.03789; several functionals in one network: Kim et al., JACS 147, 1042
(2025), arXiv:2409.07947; Nequix: Koker et al., arXiv:2508.16067. `variant="published"` equals the package sevenn 0.13 for the same
settings, and nequix with `NEQUIX` beside them. In it a lone atom does not get its reference energy, SevenNet-0's cutoff function (XPLOR)
has kinks in the second derivative, trained frequencies make the energy C² at the cutoff, and without parity (`parity="none"`, all
published weights) the energy of a structure differs from that of its mirror image. `variant="sound"` (default) mends these.

Shapes as in `gossamer.models.nequip`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.models.base import DataFacts, FitDefaults, ModelOutput, Network, read_out
from gossamer.nn.coupling import Coupling, FeatureNorm, Irrep, blocks, gate, paths_between, reachable
from gossamer.nn.layers import Constant, ElementMaps, UnitLinear, cat, polynomial_envelope, unit_mlp, unit_scale
from gossamer.nn.products import Edges
from gossamer.nn.spherical import SphericalHarmonics
from gossamer.settings import settings

_SEVENNET = {"variant": "published", "parity": "none", "num_layers": 5, "train_bessel": True}
NEQUIX: dict[str, Any] = {"variant": "published", "layer_norm": True, "train_embedding": False}
"""settings by which Nequix differs from SevenNet"""
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"num_features": 4, "num_layers": 2, "num_basis": 4, "radial_widths": [6]},
    "0": {**_SEVENNET, "num_features": [128, 64, 32], "cutoff_on": 4.5},
    "l3i5": {**_SEVENNET, "l_max": 3, "num_features": [128, 64, 32, 32]},
    "nequix-mp-1": {**NEQUIX, "cutoff": 6.0, "num_layers": 4, "l_max": 3, "num_features": [128, 64, 32, 32], "embedding_features": 89},
}  # fmt: skip
"""0, l3i5, nequix-mp-1: sizes of the published weights"""


@settings
class SevenNetConfig:
    """Settings of the SevenNet network (Park et al., arXiv:2402.03789), and of Nequix (arXiv:2508.16067)."""

    name: Literal["sevennet"] = "sevennet"
    """Which network."""
    variant: Literal["sound", "published"] = "sound"
    """"sound": smooth through the third derivative, a lone atom gets its reference energy. "published": as in sevenn."""
    cutoff: Annotated[float, Field(gt=0, le=100)] = 5.0
    """Radius in Å within which atoms exchange messages."""
    cutoff_on: Annotated[float, Field(gt=0, le=100)] | None = None
    """Å; the XPLOR function from here to the cutoff instead of the polynomial envelope. Only published: its second derivative jumps."""
    max_neighbors: None = None
    """Always all neighbours within the cutoff."""
    l_max: Annotated[int, Field(ge=0, le=8)] = 2
    """Highest degree of the harmonics, and of features made from ``num_features``."""
    num_features: Annotated[int, Field(ge=1, le=10_000)] | list[Annotated[int, Field(ge=1, le=10_000)]] = 32
    """Channels of each degree: one number, or a list of l_max + 1."""
    num_layers: Annotated[int, Field(ge=1, le=100)] = 3
    """Interactions; the receptive field is num_layers * cutoff."""
    parity: Literal["natural", "both", "none"] = "natural"
    """Features of natural parity, of both, or of degrees alone ("none": products that change sign in a mirror are mixed in)."""
    irreps: list[str] | None = None
    """Features before the first and after every layer, ["32x0e", "32x0e+16x1o", "32x0e"], instead of num_features, num_layers and embedding_features."""
    embedding_features: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Length of the element embedding; None takes the channels of l = 0."""
    train_embedding: bool = True
    """Train it; else elements are told apart by fixed unit vectors (Nequix)."""
    num_basis: Annotated[int, Field(ge=1, le=10_000)] = 8
    """Radial Bessel functions."""
    train_bessel: bool = False
    """Train their frequencies (sevenn: always). The sine then loses its zero at the cutoff: take envelope_order 3."""
    envelope_power: Annotated[int, Field(ge=2, le=100)] = 6
    """Power p of the polynomial envelope."""
    envelope_order: Literal[2, 3, 4] = 2
    """Derivatives of the envelope that vanish at the cutoff (sevenn: 2; the fixed sine adds one)."""
    radial_widths: list[Annotated[int, Field(ge=1, le=10_000)]] = Field(default_factory=lambda: [64, 64])
    """Widths of the hidden layers of the radial networks."""
    unit_harmonics: bool = True
    """Harmonics of unit vectors; else of the vectors in Å themselves, which grow with r^l (sevenn before 0.9.2)."""
    denominators: list[Annotated[float, Field(gt=0, le=1e6)]] | None = None
    """What the sums over neighbours are divided by in each layer; None: the root of the mean number of neighbours."""
    self_connection: Literal["linear", "element"] = "linear"
    """One linear map for all elements, or one for each ("nequip" in sevenn)."""
    bias: bool = False
    """Constants beside the linear maps of even scalars. One modal of a network of several fidelities is such constants."""
    layer_norm: bool = False
    """Scale the features of every atom to unit mean square in each layer, before the gate (Nequix)."""
    readout_widths: list[Annotated[int, Field(ge=1, le=10_000)]] = Field(default_factory=list)
    """Widths of hidden layers of the readout. sevenn's two linear maps in a row are one."""
    scales: Literal["global", "per_element"] = "global"
    """Scale the energies of each element by that element's RMS force, or all by the same."""
    direct_forces: Literal[False] = False
    """Forces are the gradient of the energy."""

    @model_validator(mode="after")
    def _consistent(self) -> SevenNetConfig:
        if self.irreps is None and isinstance(self.num_features, list) and len(self.num_features) != self.l_max + 1:
            raise ValueError(f"num_features lists {len(self.num_features)} numbers, but l_max is {self.l_max}: give {self.l_max + 1}")
        if self.cutoff_on is not None and (self.variant != "published" or self.cutoff_on >= self.cutoff):
            raise ValueError("cutoff_on needs variant published, and must be below cutoff: its kinks are what the sound variant avoids")
        layers = self.layers
        if self.denominators is not None and len(self.denominators) != len(layers) - 1:
            raise ValueError(f"denominators lists {len(self.denominators)} numbers for {len(layers) - 1} layers")
        for place, wanted in ((0, "before the first"), (-1, "after the last")):
            if [i.kind for i in layers[place]] != [(0, 1)]:
                raise ValueError(f"irreps {wanted} layer must be even scalars, NUMBERx0e")
        return self

    @property
    def harmonics_parity(self) -> int:
        """Parity of odd degrees."""
        return 1 if self.parity == "none" else -1

    @property
    def layers(self) -> list[list[Irrep]]:
        """Features before the first and after every layer."""
        if self.irreps is not None:
            return [parse_irreps(text) for text in self.irreps]
        n = self.num_features
        channels = list(n) if isinstance(n, list) else [n] * (self.l_max + 1)
        parities = [(-1, 1) if self.parity == "both" else (self.harmonics_parity**l,) for l in range(self.l_max + 1)]
        hidden = [Irrep(channels[l], l, p) for l in range(self.l_max + 1) for p in parities[l]]
        layers = [[Irrep(self.embedding_features or channels[0], 0, 1)]]
        for _ in range(self.num_layers - 1):
            layers.append([i for i in hidden if reachable(layers[-1], self.l_max, i, self.harmonics_parity)])
        return [*layers, [Irrep(channels[0], 0, 1)]]


def parse_irreps(text: str) -> list[Irrep]:
    """ "32x0e+16x1o" as blocks by degree, odd parity first.

    Raises:
        ValueError: another form, or a degree and parity twice.
    """
    found = [re.fullmatch(r"\s*(\d+)x(\d+)([eo])\s*", part) for part in text.split("+")]
    irreps = [Irrep(int(m[1]), int(m[2]), 1 if m[3] == "e" else -1) for m in found if m]
    if len(irreps) != len(found) or len({i.kind for i in irreps}) != len(irreps) or not all(i.mul for i in irreps):
        raise ValueError(f"irreps '{text}': expected channels, degree and parity, each pair once, as in 32x0e+16x1o")
    return sorted(irreps, key=lambda i: i.kind)


class BlockLinear(nn.Module):
    """A linear map of the channels of each (l, p), the same for all elements or one for each; where the input has no such block, nothing."""

    def __init__(self, irreps_in: Sequence[Irrep], irreps_out: Sequence[Irrep], bias: bool = False, n_elements: int | None = None) -> None:
        """
        Args:
            irreps_in: Blocks of the features.
            irreps_out: Blocks of the result.
            bias: A constant beside the map of even scalars.
            n_elements: One map for each of so many elements.
        """
        super().__init__()
        self.per_element = n_elements is not None
        kinds = {i.kind: k for k, i in enumerate(irreps_in)}
        self.sources = [kinds.get(i.kind) for i in irreps_out]
        """for each block of the result the block that it is made from, if any"""
        self.maps: Any = nn.ModuleList()
        for i, source in zip(irreps_out, self.sources, strict=True):
            if source is not None:
                mul = irreps_in[source].mul
                self.maps.append(UnitLinear(mul, i.mul) if n_elements is None else ElementMaps(n_elements, mul, i.mul))
        self.scalars = [i.kind for i in irreps_out].index((0, 1))
        self.bias = nn.Parameter(torch.zeros(irreps_out[self.scalars].mul)) if bias else None

    def forward(self, parts: Sequence[Tensor], species: Int[Tensor, " N"]) -> list[Tensor | None]:
        """(N, 2 l + 1, mul) blocks to such blocks."""
        maps, given = iter(self.maps), (species,) if self.per_element else ()
        results = [None if source is None else next(maps)(parts[source], *given) for source in self.sources]
        if self.bias is not None:
            results[self.scalars] = results[self.scalars] + self.bias
        return results


class Interaction(nn.Module):
    """One layer: linear map, products along edges, sum over neighbours, linear map, self-connection, norm, gate."""

    def __init__(
        self, config: SevenNetConfig, irreps_in: Sequence[Irrep], irreps_out: Sequence[Irrep], n_elements: int, denominator: float
    ) -> None:
        """
        Args:
            config: Settings of the network.
            irreps_in: Blocks of the features.
            irreps_out: Blocks of the result after the gate.
            n_elements: Length of the table of elements.
            denominator: Divides the sums.
        """
        super().__init__()
        self.irreps_in, self.irreps_out = list(irreps_in), list(irreps_out)
        self.scale = Constant(np.array([1 / denominator]))
        self.mean = math.sqrt(0.5) if config.variant == "sound" else 1.0
        paths = paths_between(irreps_in, config.l_max, [i.kind for i in irreps_out], config.harmonics_parity)
        widths = [config.num_basis, *config.radial_widths, sum(irreps_in[p.block].mul for p in paths)]
        coupling = Coupling(irreps_in, config.l_max, paths, unit_mlp(widths))
        self.irreps_summed, self.convolution = coupling.irreps_out, coupling
        gates = sum(i.mul for i in irreps_out if i.l > 0)  # even scalars also carry the gates of the other blocks
        before = [Irrep(i.mul + (gates if i.kind == (0, 1) else 0), i.l, i.p) for i in irreps_out]
        self.linear_in = BlockLinear(irreps_in, irreps_in, config.bias)
        self.linear_out = BlockLinear(self.irreps_summed, before, config.bias)
        self.self_connection = BlockLinear(irreps_in, before, n_elements=n_elements if config.self_connection == "element" else None)
        self.norm = None
        if config.layer_norm:  # nequix takes the mean over components and the sum over channels
            theirs: dict[str, Any] = {"shares": [i.mul / (i.dim * len(before)) for i in before], "epsilon": 1e-12}
            self.norm = FeatureNorm(before, **(theirs if config.variant == "published" else {}))

    def forward(self, x: Float[Tensor, "N width"], species: Int[Tensor, " N"], edges: Edges) -> Float[Tensor, "N width_out"]:
        parts = blocks(x, self.irreps_in)
        mixed = cat([part.flatten(1) for part in self.linear_in(parts, species)], 1) * self.scale()
        sums = blocks(self.convolution(mixed, edges), self.irreps_summed)
        pairs = zip(self.linear_out(sums, species), self.self_connection(parts, species), strict=True)
        results = [new if own is None else (new + own) * self.mean for new, own in pairs]
        if self.norm is not None:
            results = blocks(self.norm(cat([part.flatten(1) for part in results], 1)), self.norm.irreps)
        return gate(results, self.irreps_out)


def xplor_envelope(x: Float[Tensor, " n"], on: float) -> Float[Tensor, " n"]:
    """1 for x < on, else (1 - x²)² (1 + 2 x² - 3 on²) / (1 - on²)³, 0 for x > 1: its second derivative jumps at both ends (HOOMD-blue, "xplor")."""
    squares = x.clamp(max=1.0) ** 2
    outer = (1 - squares) ** 2 * (1 + 2 * squares - 3 * on**2) / (1 - on**2) ** 3
    return torch.where(x < on, torch.ones_like(x), outer)


class SevenNet(Network):
    """The network: species and edge vectors in, per-atom energies out."""

    fit_defaults: ClassVar = FitDefaults(learning_rate=2e-2, compiled_share=0.7, compile_seconds=110.0)
    presets: ClassVar = PRESETS

    def __init__(self, config: SevenNetConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.subtract_isolated = config.variant == "sound"
        layers, n_elements = config.layers, len(facts.atomic_numbers)
        self.harmonics = SphericalHarmonics(config.l_max, "component")
        self.degrees = None if config.unit_harmonics else [2 * l + 1 for l in range(config.l_max + 1)]
        width = layers[0][0].mul
        self.embedding = nn.Embedding(n_elements, width)
        if not config.train_embedding:
            if width < n_elements:
                raise ValueError(
                    f"train_embedding is off, but {width} features cannot tell {n_elements} elements apart: raise embedding_features"
                )
            self.embedding = nn.Embedding.from_pretrained(torch.eye(n_elements, width), freeze=True)
        frequencies = torch.arange(1.0, config.num_basis + 1)
        self.frequencies = nn.Parameter(frequencies) if config.train_bessel else None
        denominators = config.denominators or [math.sqrt(max(facts.mean_neighbors, 1.0))] * (len(layers) - 1)
        self.layers: Any = nn.ModuleList(Interaction(config, layers[k], layers[k + 1], n_elements, d) for k, d in enumerate(denominators))
        published = config.variant == "published"
        self.readout: Any = unit_mlp([layers[-1][0].mul, *config.readout_widths, 1])
        self.readout_bias = nn.Parameter(torch.zeros(1)) if config.bias else None
        self.basis_scale = 2 / config.cutoff**2 if published else unit_scale(config.num_basis, config.envelope_power, config.envelope_order)
        self.radial_kinks = () if config.cutoff_on is None else (config.cutoff_on / config.cutoff,)
        self.scales: nn.Embedding | None = None
        if config.scales == "per_element":
            values = facts.scales if facts.scales is not None else [1.0] * n_elements
            self.scales = nn.Embedding.from_pretrained(torch.tensor(values)[:, None], freeze=True)

    @staticmethod
    def unused(settings: Mapping[str, Any]) -> dict[str, str]:
        """As `Network.unused`: what irreps say, too."""
        said = ("num_features", "num_layers", "embedding_features")
        return {} if settings.get("irreps") is None else dict.fromkeys(said, "irreps")

    @property
    def num_hops(self) -> int:
        """As `Network.num_hops`."""
        return len(self.layers)

    def radial_basis(self, x: Float[Tensor, " E"]) -> Float[Tensor, "E B"]:
        """b_n = s · sin(n π x) / x · f(x),  x = r / rc; s = 2 / rc² in the package."""
        c = self.config
        n = torch.arange(1, c.num_basis + 1, dtype=x.dtype, device=x.device) if self.frequencies is None else self.frequencies
        if c.cutoff_on is None:
            envelope = polynomial_envelope(x, c.envelope_power, c.envelope_order)
        else:
            envelope = xplor_envelope(x, c.cutoff_on / c.cutoff)
        return torch.sin(math.pi * n * x[:, None]) * (self.basis_scale * envelope / x)[:, None]

    def forward(
        self,
        species: Int[Tensor, " N"],
        edge_index: Int[Tensor, "2 E"],
        edge_vectors: Float[Tensor, "E 3"],
        graph_index: Int[Tensor, " N"],
        n_graphs: int,
    ) -> ModelOutput:
        """As `Network.forward`; the network is local and needs no structures."""
        lengths = torch.linalg.vector_norm(edge_vectors, dim=-1)
        distance = lengths / self.config.cutoff
        harmonics = self.harmonics(edge_vectors / lengths[:, None])
        if self.degrees is not None:
            powers = [lengths[:, None].expand(-1, n) ** l for l, n in enumerate(self.degrees)]
            harmonics = harmonics * cat(powers, 1)
        edges = Edges(edge_index, distance, harmonics, lambda: self.radial_basis(distance))
        x = self.embedding(species)
        for layer in self.layers:
            x = layer(x, species, edges)
        energies, features = read_out(self.readout, x)
        if self.readout_bias is not None:
            energies = energies + self.readout_bias
        if self.scales is not None:
            scale = self.scales(species)
            energies, features = energies * scale[:, 0], features * scale
        return ModelOutput(node_energies=energies, direct_forces=None, features=features)
