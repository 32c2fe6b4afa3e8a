"""NequIP: node features of all degrees l, mixed along edges by O(3) tensor products.

Batzner et al., Nat. Commun. 13, 2453 (2022), arXiv:2101.03164; Tan et al., arXiv:2504.16068. `variant="published"` equals
the package nequip 0.19 for the same settings (tests/reference). In it features start small and shrink by orders of magnitude
per degree and layer, and training has to make up for it. `variant="sound"` (default) scales radial functions and activations
so that features of every degree start with unit variance, normalises the features of each atom between layers, and bounds
what gates see (why: see Weft).

Shapes: N atoms, E directed edges, S = (l_max + 1)² harmonics. Node features are one tensor (N, width); its blocks are
(2 l + 1, mul), channels last (`gossamer.nn.products`). Every map has no bias, so an isolated atom gives zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from ase.data import atomic_numbers as number_of
from ase.data import chemical_symbols
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.models.base import DataFacts, FitDefaults, ModelOutput, Network, read_out
from gossamer.nn.coupling import Coupling, FeatureNorm, Irrep, blocks, gate, paths_between, reachable
from gossamer.nn.layers import UNIT_SILU, Constant, ElementLinear, UnitLinear, cat, decaying, polynomial_envelope, unit_mlp, unit_scale
from gossamer.nn.products import Edges, Ends
from gossamer.nn.spherical import SphericalHarmonics
from gossamer.settings import settings

_FOUNDATION = {"variant": "published", "parity": False, "embedding_features": 32, "radial_depth": 1, "radial_width": 128}
_LARGE = {**_FOUNDATION, "num_layers": 6, "l_max": 3, "num_features": [128, 64, 32, 32]}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"num_features": 4, "num_layers": 2, "num_basis": 4, "radial_width": 6},
    "S": {**_FOUNDATION, "num_layers": 2, "l_max": 1, "num_features": [128, 64]},
    "M": {**_FOUNDATION, "num_layers": 4, "l_max": 2, "num_features": [128, 64, 32]},
    "L": _LARGE,
    "XL": {**_FOUNDATION, "num_layers": 6, "l_max": 4, "num_features": [320, 96, 64, 32, 32]},
    "MP-L": {
        **_LARGE, "embedding_features": 48, "train_bessel": True, "envelope_power": 5, "cutoff": 6.0,
        "scales": "per_element", "train_scales": True,
    },
}  # fmt: skip
"""S to MP-L: sizes of the authors' foundation potentials (arXiv:2504.16068)"""


@settings
class NequIPConfig:
    """Settings of the NequIP network (Batzner et al., arXiv:2101.03164)."""

    name: Literal["nequip"] = "nequip"
    """Which network."""
    variant: Literal["sound", "published"] = "sound"
    """"sound": features have unit variance, from the start and in every layer. "published": the constants of the nequip package."""
    cutoff: Annotated[float, Field(gt=0, le=100)] = 5.0
    """Radius in Å within which atoms exchange messages."""
    max_neighbors: None = None
    """Always all neighbours within the cutoff."""
    l_max: Annotated[int, Field(ge=0, le=8)] = 2
    """Highest degree of features and harmonics: 1 is fast, 2 accurate, 3 more so."""
    num_features: Annotated[int, Field(ge=1, le=10_000)] | list[Annotated[int, Field(ge=1, le=10_000)]] = 32
    """Channels of each degree: one number, or a list of l_max + 1."""
    num_layers: Annotated[int, Field(ge=1, le=100)] = 3
    """Interactions; the receptive field is num_layers * cutoff."""
    parity: bool = False
    """Also features of unnatural parity (0o, 1e, 2o ...): about twice the work, rarely worth it."""
    num_basis: Annotated[int, Field(ge=1, le=10_000)] = 8
    """Radial Bessel functions."""
    basis_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """k of the factor n^-k of the n-th radial function: above 0, what varies fast with distance is learned last, which few frames need."""
    train_bessel: bool = False
    """Train their frequencies. The sine then loses its zero at the cutoff: with envelope_order 2 the energy is only C² there."""
    envelope_power: Annotated[int, Field(ge=2, le=100)] = 6
    """Power p of the polynomial envelope."""
    envelope_order: Literal[2, 3, 4] = 2
    """Derivatives of the envelope that vanish at the cutoff (package: 2; the fixed sine adds one)."""
    element_neighbors: dict[str, Annotated[float, Field(ge=1, le=1e6)]] | None = None
    """Mean numbers of neighbours by element, {H: 12.5}: what an atom of it sends is divided by the root of its number; None, and elements
    that are missing: by that of the mean of the data."""
    pair_cutoffs: dict[str, float | dict[str, float]] | None = None
    """Smaller cutoffs by centre and neighbour, {H: 3.0, O: {H: 3.5}}: a number holds for all neighbours; what is missing is ``cutoff``."""
    embedding_features: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Length of the element embedding; None takes the channels of l = 0."""
    radial_depth: Annotated[int, Field(ge=0, le=100)] = 1
    """Hidden layers of the radial networks."""
    radial_width: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Width of those layers (package: 128)."""
    self_connection: Literal["element", "linear"] = "element"
    """"element": one linear map per element (NequIP); "linear": the same for all (SevenNet-l3i5, Nequix)."""
    layer_norm: bool | None = None
    """Scale the features of every atom to unit mean square before each interaction, with a learned weight per channel (as Nequix
    does); None: in the sound variant, not in the published one."""
    normalize: Literal["both", "features"] = "both"
    """Where that norm acts, if there is one: also on what a layer sums up, which it bounds, so that gates see numbers near one and stay smooth; or
    only on what the next layer takes in (potentials from before this was a setting)."""
    readout_depth: Annotated[int, Field(ge=0, le=100)] = 0
    """Hidden layers of the energy readout; 0 is one linear map."""
    readout_width: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Width of those layers; None takes the channels of l = 0."""
    scales: Literal["global", "per_element"] = "global"
    """Scale the energies of each element by that element's RMS force, or all by the same."""
    train_scales: bool = False
    """Train these scales."""
    direct_forces: bool = False
    """Add a head that predicts forces directly from l = 1 features. They are not the gradient of the energy."""

    @model_validator(mode="after")
    def _consistent(self) -> NequIPConfig:
        if isinstance(self.num_features, list) and len(self.num_features) != self.l_max + 1:
            raise ValueError(f"num_features lists {len(self.num_features)} numbers, but l_max is {self.l_max}: give {self.l_max + 1}")
        if self.direct_forces and self.l_max < 1:
            raise ValueError("direct_forces needs l_max of 1 or more: forces are vectors")
        if self.pair_cutoffs is not None:
            pair_cutoff_matrix(self.pair_cutoffs, self.cutoff, [])
        strange = [name for name in self.element_neighbors or {} if name not in number_of]
        if strange:
            raise ValueError(f"element_neighbors names '{strange[0]}', which is no chemical symbol")
        return self

    @property
    def channels(self) -> list[int]:
        """Channels of l = 0 … l_max."""
        return list(self.num_features) if isinstance(self.num_features, list) else [self.num_features] * (self.l_max + 1)


def pair_cutoff_matrix(table: Mapping[str, float | Mapping[str, float]], cutoff: float, numbers: Sequence[int]) -> np.ndarray:
    """Cutoffs (centre, neighbour) in Å of the elements with these atomic numbers.

    Raises:
        ValueError: a symbol that is unknown or not among the elements, or a cutoff that is not between 0 and ``cutoff``.
    """
    matrix = np.full((len(numbers), len(numbers)), cutoff)
    for centre, entry in table.items():
        for neighbour, value in entry.items() if isinstance(entry, Mapping) else [(None, entry)]:
            for symbol in (centre, *([neighbour] if neighbour else [])):
                if symbol not in number_of:
                    raise ValueError(f"pair_cutoffs names '{symbol}', which is no chemical symbol")
                if numbers and number_of[symbol] not in numbers:
                    raise ValueError(
                        f"pair_cutoffs names {symbol}, which is not among the elements of the data: leave it out, or add it to data.elements"
                    )
            if not 0 < value <= cutoff:
                raise ValueError(
                    f"pair_cutoffs gives {value} Å for {centre}-{neighbour or 'any'}: it must be above 0 and at most cutoff, {cutoff} Å"
                )
            rows = [k for k, z in enumerate(numbers) if z == number_of[centre]]
            columns = [k for k, z in enumerate(numbers) if neighbour is None or z == number_of[neighbour]]
            matrix[np.ix_(rows, columns)] = value
    return matrix


def senders_neighbors(config: NequIPConfig, facts: DataFacts) -> list[float]:
    """By whose root messages are divided: one number, or one for each element."""
    mean, table = max(facts.mean_neighbors, 1.0), config.element_neighbors
    return [mean] if table is None else [table.get(chemical_symbols[z], mean) for z in facts.atomic_numbers]


def scalar_mlp(num_in: int, num_out: int, depth: int, width: int, published: bool) -> nn.Sequential:
    """SiLU network; the package's gain is sqrt 2, that of the sound variant the exact one."""
    return unit_mlp([num_in, *[width] * depth, num_out], math.sqrt(2) if published else UNIT_SILU)


class Interaction(nn.Module):
    """One layer: linear map, products along edges, sum over neighbours, linear map, self-connection, gate."""

    def __init__(
        self,
        config: NequIPConfig,
        irreps_in: Sequence[Irrep],
        irreps_out: Sequence[Irrep],
        num_attributes: int,
        mean_neighbors: Sequence[float],
        first: bool,
        last: bool,
    ) -> None:
        """
        Args:
            config: Settings of the network.
            irreps_in: Blocks of the features.
            irreps_out: Blocks of the result after the gate.
            num_attributes: Length of the element embedding.
            mean_neighbors: Messages are divided by its square root; one number, or one for each element.
            first: No self-connection, so that an isolated atom gives zero.
            last: Nothing of the result is normalised.
        """
        super().__init__()
        self.irreps_in, self.irreps_out = list(irreps_in), list(irreps_out)
        self.published = config.variant == "published"
        self.num_gates = sum(i.mul for i in irreps_out if i.l > 0)
        self.scales = Constant(np.array(mean_neighbors)[:, None] ** -0.5)
        norm = config.variant == "sound" if config.layer_norm is None else config.layer_norm
        self.norm = FeatureNorm(self.irreps_in) if norm and not first else None
        self.linear_in: Any = nn.ModuleList(UnitLinear(i.mul, i.mul) for i in self.irreps_in)
        paths = paths_between(irreps_in, config.l_max, [i.kind for i in irreps_out])
        n_radial = sum(irreps_in[p.block].mul for p in paths)
        radial = scalar_mlp(config.num_basis, n_radial, config.radial_depth, config.radial_width, self.published)
        coupling = Coupling(irreps_in, config.l_max, paths, radial)
        self.irreps_summed = coupling.irreps_out
        self.convolution: Any = coupling
        # even scalars also carry the gates of the other blocks
        outputs = [i.mul + (self.num_gates if i.kind == (0, 1) else 0) for i in self.irreps_out]
        before = [Irrep(n, i.l, i.p) for i, n in zip(self.irreps_out, outputs, strict=True)]
        bounded = norm and config.normalize == "both" and not last
        self.sum_norm = FeatureNorm(before, epsilon=1.0, gamma=math.sqrt(2)) if bounded else None
        summed = {i.kind: i.mul for i in self.irreps_summed}
        self.sum_of = [[i.kind for i in self.irreps_summed].index(i.kind) for i in self.irreps_out]
        self.linear_out: Any = nn.ModuleList(UnitLinear(summed[i.kind], n) for i, n in zip(self.irreps_out, outputs, strict=True))
        self.self_connection: Any = nn.ModuleList()
        self.per_element = config.self_connection == "element"
        self.sources: list[int | None] = []
        """for each block of the result, the block of the input that its self-connection reads"""
        kinds = [i.kind for i in self.irreps_in]
        for i, n in zip(self.irreps_out, outputs, strict=True):
            source = None if first or i.kind not in kinds else kinds.index(i.kind)
            self.sources.append(source)
            if source is not None:
                mul = self.irreps_in[source].mul
                self.self_connection.append(ElementLinear(mul, num_attributes, n) if self.per_element else UnitLinear(mul, n))

    def forward(
        self, x: Float[Tensor, "N width"], species: Int[Tensor, " N"], table: Float[Tensor, "elements T"], edges: Edges
    ) -> Float[Tensor, "N width_out"]:
        if self.norm is not None:
            x = self.norm(x)
        parts = blocks(x, self.irreps_in)
        scale = self.scales() if len(self.scales()) == 1 else self.scales().index_select(0, species)
        mixed = cat([linear(part).flatten(1) for linear, part in zip(self.linear_in, parts, strict=True)], 1) * scale
        sums = blocks(self.convolution(mixed, edges), self.irreps_summed)
        connections = iter(self.self_connection)
        results = []
        for linear, which, source in zip(self.linear_out, self.sum_of, self.sources, strict=True):
            out = linear(sums[which])
            if source is not None:
                connection = next(connections)
                own = connection(parts[source], species, table) if self.per_element else connection(parts[source])
                out = out + own if self.published else (out + own) * math.sqrt(0.5)
            results.append(out)
        if self.sum_norm is not None:
            results = self.sum_norm.of(results)
        return gate(results, self.irreps_out)


class NequIP(Network):
    """The network: species and edge vectors in, per-atom energies (and direct forces) out."""

    fit_defaults: ClassVar = FitDefaults(learning_rate=4e-2, compiled_share=0.7, compile_seconds=110.0)
    earlier: ClassVar = {"normalize": "features"}
    presets: ClassVar = PRESETS
    renamed: ClassVar = {r"^layers\.(\d+)\.radial\.": r"layers.\1.convolution.radial."}
    subtract_isolated = False
    """without biases an isolated atom gives zero by itself"""

    def __init__(self, config: NequIPConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        channels = config.channels
        num_attributes = config.embedding_features or channels[0]
        self.harmonics = SphericalHarmonics(config.l_max, "component")
        self.embedding = nn.Embedding(len(facts.atomic_numbers), num_attributes)
        self.ends = Ends()
        self.pair_table: Constant | None = None
        if config.pair_cutoffs is not None:
            self.pair_table = Constant(pair_cutoff_matrix(config.pair_cutoffs, config.cutoff, facts.atomic_numbers))
        frequencies = torch.arange(1.0, config.num_basis + 1)
        self.frequencies = nn.Parameter(frequencies) if config.train_bessel else None
        parities = (1, -1) if config.parity else (0,)
        hidden = [Irrep(channels[l], l, p or (-1) ** l) for l in range(config.l_max + 1) for p in parities]
        last = [Irrep(channels[0], 0, 1), *([Irrep(channels[1], 1, -1)] if config.direct_forces else [])]
        layers, irreps = [], [Irrep(num_attributes, 0, 1)]
        for k in range(config.num_layers):
            wanted = last if k == config.num_layers - 1 else [i for i in hidden if reachable(irreps, config.l_max, i)]
            ends = {"first": k == 0, "last": k == config.num_layers - 1}
            layers.append(Interaction(config, irreps, wanted, num_attributes, senders_neighbors(config, facts), **ends))
            irreps = wanted
        self.layers: Any = nn.ModuleList(layers)
        published = config.variant == "published"
        self.readout = scalar_mlp(channels[0], 1, config.readout_depth, config.readout_width or channels[0], published)
        scale = 2 / config.cutoff**2 if published else unit_scale(config.num_basis, config.envelope_power, config.envelope_order)
        self.basis_scales = Constant(scale * decaying(config.num_basis, config.basis_decay))
        self.force_readout = UnitLinear(channels[1], 1) if config.direct_forces else None
        self.scales: nn.Embedding | None = None
        if config.scales == "per_element" or config.train_scales:
            values = facts.scales if config.scales == "per_element" and facts.scales is not None else [1.0] * len(facts.atomic_numbers)
            self.scales = nn.Embedding.from_pretrained(torch.tensor(values)[:, None], freeze=not config.train_scales)

    @staticmethod
    def unused(settings: Mapping[str, Any]) -> dict[str, str]:
        """As `Network.unused`: widths of hidden layers that are not there."""
        return {f"{part}_width": f"{part}_depth: 0" for part in ("radial", "readout") if settings.get(f"{part}_depth") == 0}

    def energy_rows(self) -> dict[str, tuple[int, Tensor]]:
        """As `Network.energy_rows`: the scalars of the last layer, and the radial functions of the paths to them."""
        last = self.layers[-1]
        prefix, scalars = f"layers.{len(self.layers) - 1}", torch.arange(self.config.channels[0])
        products = last.convolution.convolution
        serves = [last.irreps_summed[p.out].kind == (0, 1) for p in products.products]
        rows = torch.tensor(serves).repeat_interleave(torch.tensor(products.channels)).nonzero()[:, 0]
        names = {
            f"{prefix}.convolution.radial.{2 * self.config.radial_depth}.weight": (0, rows),
            f"{prefix}.linear_out.0.weight": (0, scalars),
        }
        if len(self.layers) > 1:
            names[f"{prefix}.self_connection.0.weight"] = (2 if last.per_element else 0, scalars)
        return names

    def pair_cutoffs(self) -> Float[Tensor, "elements elements"] | None:
        """Å, by centre and neighbour."""
        return None if self.pair_table is None else self.pair_table()

    def scaled(self, lengths: Float[Tensor, " E"], species: Int[Tensor, " N"], edge_index: Int[Tensor, "2 E"]) -> Float[Tensor, " E"]:
        """Distance over cutoff, that of the pair where pairs have their own."""
        table = self.pair_cutoffs()
        if table is None:
            return lengths / self.config.cutoff
        neighbour, centre = self.ends(species, edge_index)
        return lengths / table.flatten().index_select(0, centre * len(table) + neighbour)

    def radial_basis(self, x: Float[Tensor, " E"]) -> Float[Tensor, "E B"]:
        """b_n = s_n sin(n π x) / x · f_p(x),  x = r / rc (or over the pair's own cutoff); s_n = 2 / rc² in the package."""
        n = torch.arange(1, self.config.num_basis + 1, dtype=x.dtype, device=x.device) if self.frequencies is None else self.frequencies
        envelope = polynomial_envelope(x, self.config.envelope_power, self.config.envelope_order)
        return torch.sin(math.pi * n * x[:, None]) * (envelope / x)[:, None] * self.basis_scales()

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
        distance = self.scaled(lengths, species, edge_index)
        edges = Edges(edge_index, distance, self.harmonics(edge_vectors / lengths[:, None]), lambda: self.radial_basis(distance))
        x = self.embedding(species)
        for layer in self.layers:
            x = layer(x, species, self.embedding.weight, edges)
        scalars, *vectors = blocks(x, self.layers[-1].irreps_out)
        energies, features = read_out(self.readout, scalars[:, 0])
        if self.scales is not None:
            scale = self.scales(species)
            energies, features = energies * scale[:, 0], features * scale
        forces = self.force_readout(vectors[0])[:, :, 0] if self.force_readout is not None else None
        return ModelOutput(node_energies=energies, direct_forces=forces, features=features)
