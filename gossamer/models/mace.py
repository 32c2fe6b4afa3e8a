"""MACE: sums over neighbours as in NequIP, and polynomials of up to four of them in every layer, so that two layers suffice.

Batatia et al., NeurIPS 2022, arXiv:2206.07697; foundation potentials arXiv:2401.00096 (MP-0) and arXiv:2312.15211 (OFF23).
`variant="published"` equals mace-torch 0.3.16 for the same settings (tests/reference). `variant="sound"` (default) mends three
flaws: a lone atom gets its reference energy (the published self-connections of the first layer give it an energy of their own);
energies keep three continuous derivatives at the cutoff where distances are transformed (the published envelope leaves two, since
the Bessel functions no longer vanish there); the repulsion is the potential's (the published one is scaled by the RMS force).
And it keeps features of unit variance: the published sums start at 1e-2 and 1e-4 (first and second layer, liquid at 5 Å), so that
their products are lost, and grow without bound where atoms are dense. The sound ones have radial functions of unit variance, are
divided by the root of the mean number of neighbours, and each atom's sums A by sqrt(1 + mean A²) before they are multiplied.

Shapes: N atoms, E directed edges, C channels. Features are (N, S, C), S = (l + 1)² components of degrees 0 … l, channels last.
No map has a bias.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from ase.data import covalent_radii
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from gossamer.models.base import DataFacts, FitDefaults, ModelOutput, Network, read_out
from gossamer.nn.coupling import Coupling, Irrep, blocks, paths_between
from gossamer.nn.layers import Constant, ElementMaps, UnitLinear, cat, polynomial_envelope, split, sum_by_index, unit_mlp
from gossamer.nn.polynomial import ElementPolynomial, Monomial, Monomials
from gossamer.nn.products import Edges, Ends, ScalarConvolution
from gossamer.nn.spherical import SphericalHarmonics, wigner_3j
from gossamer.settings import settings

_MP = {"variant": "published", "cutoff": 6.0, "num_features": 128, "num_basis": 10, "radial_sizes": [64, 64, 64], "self_connections": "all"}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"num_features": 4, "num_basis": 4, "l_max": 2, "radial_sizes": [6], "readout_width": 3},
    "MP-small": {**_MP, "hidden_l_max": 0},
    "MP-medium": {**_MP, "hidden_l_max": 1},
    "MP-large": {**_MP, "hidden_l_max": 2},
    "MPA-medium": {**_MP, "hidden_l_max": 1, "density": True, "self_connections": "later", "transform": "agnesi", "repulsion": True},
}
"""MP-small to MP-large: sizes of MACE-MP-0 (arXiv:2401.00096); MPA-medium: of MACE-MPA-0, MACE-OMAT-0 and MACE-MATPES"""

AGNESI = (0.9183, 4.5791, 1.0805)
"""q, p and a of the Agnesi transform (Witt et al., J. Chem. Phys. 159, 164101, 2023)"""
SOFT_STEEPNESS = 4.0


@settings
class MACEConfig:
    """Settings of the MACE network (Batatia et al., arXiv:2206.07697)."""

    name: Literal["mace"] = "mace"
    """Which network."""
    variant: Literal["sound", "published"] = "sound"
    """"sound": smooth at the cutoff, lone atoms at their reference energy, features of unit variance. "published": as mace-torch."""
    cutoff: Annotated[float, Field(gt=0, le=100)] = 5.0
    """Radius in Å within which atoms exchange messages."""
    max_neighbors: None = None
    """Always all neighbours within the cutoff."""
    l_max: Annotated[int, Field(ge=0, le=4)] = 3
    """Highest degree of the harmonics, and of the sums that are multiplied (mace-torch: max_ell)."""
    hidden_l_max: Annotated[int, Field(ge=0, le=4)] = 1
    """Highest degree of the features that layers hand on (mace-torch: max_L): 0 is fast, 1 accurate, 2 a little more so."""
    num_features: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Channels of each degree."""
    num_layers: Annotated[int, Field(ge=1, le=100)] = 2
    """Interactions; the receptive field is num_layers * cutoff."""
    correlation: Annotated[int, Field(ge=1, le=4)] = 3
    """Most sums that are multiplied: with 3 a layer sees four bodies."""
    self_connections: Literal["all", "later", "none"] = "later"
    """Which layers add an element's map of the features they got (residual blocks): "all" as in MACE-MP-0, or but the first."""
    density: bool = False
    """Divide sums by 1 + a learned density of neighbours instead of their mean number (MACE-MPA-0, MACE-OMAT-0)."""
    basis: Literal["bessel", "gaussian"] = "bessel"
    """Radial functions."""
    num_basis: Annotated[int, Field(ge=2, le=10_000)] = 8
    """How many."""
    train_bessel: bool = False
    """Train their frequencies."""
    transform: Literal["none", "agnesi", "soft"] = "none"
    """Stretch short distances by the covalent radii of both elements before the radial functions (MACE-MPA-0: agnesi)."""
    envelope_power: Annotated[int, Field(ge=2, le=100)] = 5
    """Power p of the polynomial envelope."""
    envelope_order: Literal[2, 3, 4] | None = None
    """Derivatives of the envelope that vanish at the cutoff; None: 2, or 3 in the sound variant where the basis does not vanish there."""
    radial_sizes: list[Annotated[int, Field(ge=1, le=10_000)]] = Field(default_factory=lambda: [64, 64, 64])
    """Widths of the hidden layers of the radial networks."""
    readout_width: Annotated[int, Field(ge=1, le=10_000)] = 16
    """Width of the hidden layer of the last readout; the others are linear."""
    repulsion: bool = False
    """Published variant: the pair repulsion of mace-torch, ZBL up to the sum of the covalent radii, in units of the energy scale."""
    direct_forces: Literal[False] = False
    """Forces are the gradient of the energy."""

    @model_validator(mode="after")
    def _consistent(self) -> MACEConfig:
        if self.repulsion and self.variant == "sound":
            raise ValueError("repulsion is that of the published variant; the sound one has potential.zbl: leave it out")
        if self.train_bessel and self.basis != "bessel":
            raise ValueError(f"train_bessel needs basis bessel, found {self.basis}")
        return self

    @property
    def vanishing(self) -> int:
        """Derivatives of the envelope that vanish at the cutoff."""
        if self.envelope_order is not None:
            return self.envelope_order
        sine = self.basis == "bessel" and self.transform == "none" and not self.train_bessel
        return 3 if self.variant == "sound" and not sine else 2


def transformed(kind: str, lengths: Float[Tensor, " E"], bonds: Float[Tensor, " E"]) -> Float[Tensor, " E"]:
    """What radial functions are given instead of the distance: "agnesi" 1 / (1 + a y^p / (1 + y^(p - q))), y = 2 r / bond; "soft"
    the distance down to the bond length, and less and less below it.

    Args:
        kind: Which.
        lengths: Å.
        bonds: Å, sums of covalent radii.
    """
    if kind == "agnesi":
        q, p, a = AGNESI
        y = lengths / (0.5 * bonds)
        return 1 / (1 + a * y**p / (1 + y ** (p - q)))
    low, high = 0.75 * bonds, 4 / 3 * bonds
    switch = 0.5 * (1 + torch.tanh(SOFT_STEEPNESS / (high - low) * (lengths - 0.5 * (low + high))))
    return low + (lengths - low) * switch


class Repulsion(nn.Module):
    """Half the ZBL energy of every edge as mace-torch has it, with an envelope up to the sum of the covalent radii."""

    def __init__(self, numbers: tuple[int, ...], power: int) -> None:
        super().__init__()
        self.power, self.ends = power, Ends()
        self.numbers = Constant(np.array(numbers, dtype=np.float64))
        self.radii = Constant(covalent_radii[list(numbers)])

    def forward(self, species: Int[Tensor, " N"], edge_index: Int[Tensor, "2 E"], lengths: Float[Tensor, " E"]) -> Float[Tensor, " N"]:
        sender, receiver = self.ends(species, edge_index)
        z_i, z_j = (self.numbers().index_select(0, s) for s in (receiver, sender))
        reduced = lengths * (z_i**0.3 + z_j**0.3) / (0.4543 * 0.529)
        screening = sum(c * torch.exp(-d * reduced) for c, d in ((0.1818, 3.2), (0.5099, 0.9423), (0.2802, 0.4028), (0.02817, 0.2016)))
        ends = self.radii().index_select(0, receiver) + self.radii().index_select(0, sender)
        energies = 0.5 * 14.3996 * z_i * z_j / lengths * screening * polynomial_envelope(lengths / ends, self.power)
        return sum_by_index(energies, edge_index[1], species.shape[0])


class Density(nn.Sequential):
    """tanh(f²) of a linear function f of the radial basis."""

    def __init__(self, num_basis: int) -> None:
        super().__init__(UnitLinear(num_basis, 1))

    def forward(self, basis: Float[Tensor, "E B"]) -> Float[Tensor, "E 1"]:
        return torch.tanh(super().forward(basis) ** 2)


class DegreeLinear(nn.Module):
    """A map of channels for each degree."""

    def __init__(self, inputs: list[int], channels: int) -> None:
        """``inputs``: channels of degree 0, 1, …; ``channels``: of each degree of the result."""
        super().__init__()
        self.maps: Any = nn.ModuleList(UnitLinear(n, channels) for n in inputs)

    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        return [linear(part) for linear, part in zip(self.maps, parts, strict=True)]


def degrees(x: Float[Tensor, "N S C"]) -> list[Tensor]:
    """The components (N, 2 l + 1, C) of each degree."""
    return list(split(x, [2 * l + 1 for l in range(math.isqrt(x.shape[1]))], 1))


@functools.cache
def monomials(n_in: int, degree: int) -> tuple[Monomial, ...]:
    """All monomials of one degree."""
    return tuple(itertools.combinations_with_replacement(range(n_in), degree))


@functools.cache
def _raised(n_in: int, degree: int) -> NDArray[np.int64]:
    """(monomials of this degree, n_in): which monomial of the next degree each becomes when a factor joins it."""
    number = {m: k for k, m in enumerate(monomials(n_in, degree + 1))}
    return np.array([[number[tuple(sorted((*m, i)))] for i in range(n_in)] for m in monomials(n_in, degree)])


@functools.cache
def couplings(l_max: int, l_out: int, correlation: int) -> NDArray[np.float64]:
    """All ways to couple so many copies of one feature, of degrees 0 … l_max and natural parity, to degree l_out.

    Factors join one after another, each by 3j symbols times sqrt(2 l + 1) of the degree that results (Batatia et al.,
    arXiv:2206.07697, Eq. 10 and 11); degrees between may have either parity, for four factors natural parity only. Order and length
    are those of mace-torch, so that its weights are ours, but for the sign of couplings by way of unnatural parity, which e3nn 0.4.4
    has otherwise. As the factors are copies, some couplings depend on others.

    Returns:
        (couplings, 2 l_out + 1, monomials of this degree)
    """
    n_in = (l_max + 1) ** 2
    partial = [((l, (-1) ** l), np.eye(n_in)[l * l : (l + 1) ** 2]) for l in range(l_max + 1)]
    for degree in range(1, correlation):
        raised, joined = _raised(n_in, degree), []
        last = degree == correlation - 1
        reach = l_out + l_max * (correlation - degree - 1)
        for (l_left, p_left), left in partial:
            for l in range(l_max + 1):
                for l_new in range(abs(l_left - l), min(l_left + l, reach) + 1):
                    kind = l_new, p_left * (-1) ** l
                    wanted = kind == (l_out, (-1) ** l_out) if last else correlation < 4 or kind[1] == (-1) ** l_new
                    if wanted:
                        symbols = wigner_3j(l_new, l_left, l) * math.sqrt(2 * l_new + 1)
                        result = np.zeros((2 * l_new + 1, len(monomials(n_in, degree + 1))))
                        for m in range(2 * l + 1):
                            result[:, raised[:, l * l + m]] += symbols[:, :, m] @ left
                        joined.append((kind, result))
        partial = sorted(joined, key=lambda item: item[0])  # stable: within a kind as they came
    found = [values for kind, values in partial if kind == (l_out, (-1) ** l_out)]
    return np.stack(found) if found else np.zeros((0, 2 * l_out + 1, len(monomials(n_in, correlation))))


class SymmetricContraction(ElementPolynomial):
    """B = Σ over ν ≤ correlation and over couplings of w[z, coupling] times the coupled product of ν factors A, for each degree of the result.

    Batatia et al., arXiv:2206.07697, Eq. 10 and 11, as a polynomial in the components of A: its coefficients are linear in the weights.
    """

    def __init__(self, l_max: int, hidden_l_max: int, correlation: int, channels: int, n_elements: int) -> None:
        """
        Args:
            l_max: Highest degree of A.
            hidden_l_max: Highest degree of the result.
            correlation: Most factors.
            channels: Each has its own weights, and channels do not mix.
            n_elements: Each has its own weights.
        """
        n_in = (l_max + 1) ** 2
        parts = [(l, n, couplings(l_max, l, n)) for l in range(hidden_l_max + 1) for n in range(1, correlation + 1)]
        components: list[list[Monomial]] = [[] for _ in range((hidden_l_max + 1) ** 2)]
        rows: list[list[NDArray[np.float64]]] = [[] for _ in components]
        n_paths, first = sum(len(values) for *_, values in parts), 0
        for l, n, values in parts:
            for m, component in enumerate(values.transpose(1, 2, 0)):  # (monomials, couplings)
                for number in np.flatnonzero(np.abs(component).max(axis=1, initial=0) > 1e-12):
                    row = np.zeros(n_paths)
                    row[first : first + len(values)] = component[number]
                    components[l * l + m].append(monomials(n_in, n)[number])
                    rows[l * l + m].append(row)
            first += len(values)
        super().__init__(Monomials(n_in, tuple(tuple(c) for c in components)))
        self.sizes = [len(values) for *_, values in parts]
        """couplings of each degree of the result and number of factors, in the order of the weights"""
        self.channels = channels
        self.basis = Constant(np.stack([row for component in rows for row in component]))
        self.weights = nn.Embedding(n_elements, n_paths * channels)
        spread = torch.cat([torch.full((size * channels,), 1.0 / size) for size in self.sizes if size])
        self.weights.weight = nn.Parameter(torch.randn(n_elements, n_paths * channels) * spread)

    def coefficients(self) -> Float[Tensor, "elements monomials C"]:
        weights = self.weights.weight.reshape(self.weights.num_embeddings, -1, self.channels)
        return torch.matmul(self.basis(), weights)


class Interaction(nn.Module):
    """One layer: sums over neighbours of every degree, polynomials of them, linear maps, self-connection."""

    def __init__(self, config: MACEConfig, l_in: int, l_out: int, facts: DataFacts, connected: bool) -> None:
        """
        Args:
            config: Settings of the network.
            l_in: Highest degree of the features.
            l_out: Highest degree of the result.
            facts: Elements and mean number of neighbours.
            connected: Add an element's map of the features; without, the sums pass such a map.
        """
        super().__init__()
        c, n_elements = config.num_features, len(facts.atomic_numbers)
        published = config.variant == "published"
        irreps = [Irrep(c, l, (-1) ** l) for l in range(l_in + 1)]
        paths = paths_between(irreps, config.l_max, [(l, (-1) ** l) for l in range(config.l_max + 1)])
        self.linear_in = DegreeLinear([c] * (l_in + 1), c)
        radial = unit_mlp([config.num_basis, *config.radial_sizes, c * len(paths)])
        coupling = Coupling(irreps, config.l_max, paths, radial)
        self.irreps_summed = coupling.irreps_out
        self.convolution: Any = coupling
        self.linear_sums = DegreeLinear([i.mul for i in self.irreps_summed], c)
        self.density: Any = None
        if config.density:
            self.density = ScalarConvolution(1, Density(config.num_basis), (config.l_max + 1) ** 2)
        mean_neighbors = max(facts.mean_neighbors, 1.0) if not published else facts.mean_neighbors
        self.scale = Constant(np.array([1.0 if config.density else 1 / (mean_neighbors if published else math.sqrt(mean_neighbors))]))
        self.contraction = SymmetricContraction(config.l_max, l_out, config.correlation, c, n_elements)
        self.linear_products = DegreeLinear([c] * (l_out + 1), c)
        self.connected = connected
        self.bounded = not published
        n_maps = min(l_in, l_out) + 1 if connected else config.l_max + 1
        self.element_maps: Any = nn.ModuleList(ElementMaps(n_elements, c, c) for _ in range(n_maps))

    def forward(self, h: Float[Tensor, "N S C"], species: Int[Tensor, " N"], edges: Edges) -> Float[Tensor, "N S_out C"]:
        own = degrees(h)
        mixed = cat(self.linear_in(own), 1) * self.scale()
        sums = self.linear_sums(blocks(self.convolution(mixed.flatten(1), edges), self.irreps_summed))
        if not self.connected:
            sums = [element_map(part, species) for element_map, part in zip(self.element_maps, sums, strict=True)]
        a = cat(sums, 1)
        if self.density is not None:
            a = a / (1 + self.density(torch.ones_like(h[:, 0, :1]), edges))[:, None]
        if self.bounded:
            a = a * torch.rsqrt(1 + (a**2).mean(dim=(1, 2)))[:, None, None]
        products = self.linear_products(degrees(self.contraction(a, species)))
        if self.connected:
            for l, element_map in enumerate(self.element_maps):
                products[l] = products[l] + element_map(own[l], species)
        return cat(products, 1)


class MACE(Network):
    """The network: species and edge vectors in, per-atom energies out."""

    fit_defaults: ClassVar = FitDefaults(learning_rate=1e-2)
    presets: ClassVar = PRESETS

    def __init__(self, config: MACEConfig, facts: DataFacts) -> None:
        """
        Args:
            config: Settings.
            facts: Elements, and the mean number of neighbours, which scales the sums.
        """
        super().__init__()
        self.config = config
        c, n, last = config.num_features, len(facts.atomic_numbers), config.num_layers - 1
        self.subtract_isolated = config.variant == "sound" and config.self_connections == "all"
        radii = covalent_radii[list(facts.atomic_numbers)]
        self.bonds = Constant((radii[:, None] + radii)[np.tril_indices(n)])
        """Å, sum of the covalent radii of each pair of elements"""
        self.radial_pairs = n * (n + 1) // 2 if config.transform != "none" else 0
        self.ends = Ends()
        self.harmonics = SphericalHarmonics(config.l_max, "component")
        self.embedding = nn.Embedding(n, c)
        if config.variant == "published":
            nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(n))
        frequencies = torch.arange(1.0, config.num_basis + 1)
        self.frequencies = nn.Parameter(frequencies) if config.train_bessel else None
        degree = [0, *[config.hidden_l_max] * last, 0]
        connected = [config.self_connections == "all" or (config.self_connections == "later" and k > 0) for k in range(last + 1)]
        self.layers: Any = nn.ModuleList(Interaction(config, degree[k], degree[k + 1], facts, connected[k]) for k in range(last + 1))
        widths = [[c, config.readout_width, 1] if k == last and last else [c, 1] for k in range(last + 1)]
        self.readouts: Any = nn.ModuleList(unit_mlp(sizes) for sizes in widths)
        self.repulsion = Repulsion(facts.atomic_numbers, config.envelope_power) if config.repulsion else None
        self.own_repulsion = config.repulsion
        self.basis_scale = 1.0
        self.basis_scale = self._unit_scale() if config.variant == "sound" else 1.0

    @staticmethod
    def unused(settings: Mapping[str, Any]) -> dict[str, str]:
        """As `Network.unused`: one layer hands on nothing, and its readout is linear."""
        return dict.fromkeys(("hidden_l_max", "readout_width"), "num_layers: 1") if settings.get("num_layers") == 1 else {}

    def _unit_scale(self) -> float:
        """Factor that gives the radial basis unit mean square over neighbours spread evenly in the outer 0.2 < x < 1 (bonds of 2.5 Å)."""
        x = torch.linspace(0.2, 1, 400, dtype=torch.float64)
        with torch.no_grad():
            values = self._basis(x, torch.full_like(x, 2.5) if self.radial_pairs else None)
        return float(((values**2).mean(dim=1) * x**2).sum() / (x**2).sum()) ** -0.5

    def radial_basis(self, x: Float[Tensor, " E"]) -> Float[Tensor, "E B"]:
        """As `Network.radial_basis`: sqrt(2 / rc) sin(n π d / rc) / d, or Gaussians of d, times the envelope of the distance.

        d is the distance in Å, or what its transform makes of it.
        """
        return self._basis(x, None)

    def pair_basis(self, x: Float[Tensor, " E"], pair: int) -> Float[Tensor, "E B"]:
        """As `Network.pair_basis`."""
        return self._basis(x, self.bonds()[pair].expand(x.shape[0]) if self.radial_pairs else None)

    def _basis(self, x: Float[Tensor, " E"], bonds: Float[Tensor, " E"] | None) -> Float[Tensor, "E B"]:
        """Likewise; ``bonds``: Å, sum of the covalent radii."""
        cutoff, count = self.config.cutoff, self.config.num_basis
        d = x * cutoff if bonds is None else transformed(self.config.transform, x * cutoff, bonds)
        if self.config.basis == "bessel":
            n = torch.arange(1, count + 1, dtype=x.dtype, device=x.device) if self.frequencies is None else self.frequencies
            values = math.sqrt(2 / cutoff) * torch.sin(math.pi / cutoff * n * d[:, None]) / d[:, None]
        else:
            step = cutoff / (count - 1)
            centres = torch.arange(count, dtype=x.dtype, device=x.device) * step
            values = torch.exp(-0.5 * ((d[:, None] - centres) / step) ** 2)
        return values * (self.basis_scale * polynomial_envelope(x, self.config.envelope_power, self.config.vanishing))[:, None]

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
        x = lengths / self.config.cutoff
        pair = self._pairs(species, edge_index) if self.radial_pairs else None
        bonds = None if pair is None else self.bonds().index_select(0, pair)
        edges = Edges(edge_index, x, self.harmonics(edge_vectors / lengths[:, None]), lambda: self._basis(x, bonds), pair)
        h = self.embedding(species)[:, None]
        energies = h.new_zeros(species.shape[0]) if self.repulsion is None else self.repulsion(species, edge_index, lengths)
        features = []
        for layer, readout in zip(self.layers, self.readouts, strict=True):
            h = layer(h, species, edges)
            own, taken = read_out(readout, degrees(h)[0][:, 0])
            energies = energies + own
            features.append(taken)
        return ModelOutput(node_energies=energies, direct_forces=None, features=cat(features, 1))

    def _pairs(self, species: Int[Tensor, " N"], edge_index: Int[Tensor, "2 E"]) -> Int[Tensor, " E"]:
        """Number of each edge's pair of elements, whichever comes first."""
        sender, receiver = self.ends(species, edge_index)
        high, low = torch.maximum(sender, receiver), torch.minimum(sender, receiver)
        return high * (high + 1) // 2 + low
