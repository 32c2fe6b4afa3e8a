"""Geodite: directions enter as harmonics times scalars, come back as inner products; no tensor products anywhere.

Reschützegger, Aykent, Perin, Nunes, Cipcigan, Neumann Barros Ferreira, Steiner, Thiemann, "Equivariant Interatomic
Potentials without Tensor Products", arXiv:2601.15492, as released with the paper. It descends from GotenNet (Aykent and
Xia, ICLR 2025).

Shapes: N atoms, E directed edges, C channels, L degrees, S = (L + 1)² - 1 components of the harmonics without l = 0.
Scalars h (N, C), steerables X (N, S, C), edge features t (E, C). Linear maps have no biases, so every message vanishes
with the radial functions: the energy is C³ at the cutoff. The potential subtracts what a lone atom gives.

`variant="published"` has the paper's trained repulsion and its element-wise details; `variant="sound"` (default) leaves
the repulsion to the universal ZBL energy of the potential, whose envelope ends below bond length with four vanishing
derivatives, and has no dropout.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from ase.data import covalent_radii
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear as apply_linear
from torch.nn.functional import silu, softplus

from gossamer.models.base import DataFacts, FitDefaults, ModelOutput, Network
from gossamer.nn.attention import Alignment, Attention
from gossamer.nn.layers import Constant, cat, linear, polynomial_envelope, split, sum_by_index
from gossamer.nn.products import Edges, Ends
from gossamer.nn.spherical import SphericalHarmonics
from gossamer.settings import settings


@settings
class GeoditeConfig:
    """Settings of the Geodite network (Reschützegger et al., arXiv:2601.15492)."""

    name: Literal["geodite"] = "geodite"
    """Which network."""
    variant: Literal["sound", "published"] = "sound"
    """"sound": universal repulsion, for molecular dynamics. "published": exactly the released network, with its own repulsion."""
    cutoff: Annotated[float, Field(gt=0, le=100)] = 5.0
    """Radius in Å within which atoms exchange messages (paper: 6)."""
    max_neighbors: None = None
    """Always all neighbours within the cutoff."""
    num_features: Annotated[int, Field(ge=2, le=10_000)] = 64
    """Channels of scalars, steerables and edges (C; paper: 192)."""
    num_layers: Annotated[int, Field(ge=1, le=100)] = 3
    """Message-passing steps (paper: 4)."""
    num_heads: Annotated[int, Field(ge=1, le=10_000)] = 8
    """Attention heads (H); they divide the channels."""
    l_max: Annotated[int, Field(ge=1, le=4)] = 2
    """Highest degree of the steerables."""
    num_basis: Annotated[int, Field(ge=2, le=10_000)] = 12
    """Radial Bessel functions."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of the attention weights, in training; None: 0.2 for the published variant, 0 for the sound one."""
    direct_forces: bool = False
    """Add a head that predicts forces directly from l = 1. They are not the gradient of the energy."""

    @model_validator(mode="after")
    def _heads_divide_channels(self) -> GeoditeConfig:
        if self.num_features % self.num_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must divide num_features ({self.num_features})")
        return self


class RadialFeatures(nn.Module):
    """Bessel functions times a trained distance weight times the envelope f_6.

        φ_n = sqrt(2 / rc) sin(n π r / rc) / r · w(s) · f_6(r / rc),      s = r / (R_i + R_j),
        w = a s^q / (1 + s^(q - p) + a s^q),    q = 1 + 2 ln(1 + e^(q0 / 2)), p likewise,
        a = (4 p q - 2 p - 2 q) / (p² + p + q² + q)

    w is the complement of the Agnesi transform (Witt et al., JCP 2023, 10.1063/5.0158783) with covalent radii R: it
    switches the network off at short range, as s^q.
    """

    def __init__(self, config: GeoditeConfig, atomic_numbers: tuple[int, ...]) -> None:
        super().__init__()
        self.cutoff, self.num_basis = config.cutoff, config.num_basis
        self.offset = 1e-6 if config.variant == "published" else 0.0
        self.q0 = nn.Parameter(torch.tensor(3.2139))
        self.p0 = nn.Parameter(torch.tensor(-15.2013))
        self.radii = Constant(covalent_radii[np.array(atomic_numbers)])

    def distance_weight(self, s: Float[Tensor, " E"]) -> Float[Tensor, " E"]:
        """w(s)."""
        q, p = (1 + softplus(x, beta=0.5) for x in (self.q0, self.p0))
        a = (4 * p * q - 2 * p - 2 * q) / (p**2 + p + q**2 + q)
        logarithm = s.log()
        strength = a * torch.exp(q * logarithm)
        return strength / (1 + torch.exp((q - p) * logarithm) + strength)

    def forward(self, lengths: Float[Tensor, " E"], centre: Int[Tensor, " E"], neighbour: Int[Tensor, " E"]) -> Float[Tensor, "E B"]:
        radii = self.radii()
        x = lengths / self.cutoff
        n = torch.arange(1, self.num_basis + 1, dtype=x.dtype, device=x.device)
        weight = self.distance_weight(lengths / (radii.index_select(0, centre) + radii.index_select(0, neighbour)))
        factor = math.sqrt(2 / self.cutoff) * weight * polynomial_envelope(x, p=6) / (lengths + self.offset)
        return torch.sin(math.pi * n * x[:, None]) * factor[:, None]


class Density(nn.Module):
    """1 / (1 + ρ_i) with the learned local density ρ_i = Σ_j tanh(SiLU(w · φ_ij / B)²)."""

    def __init__(self, num_basis: int, divide: bool) -> None:
        super().__init__()
        self.w_rho = linear(num_basis, 1, bias=False)
        self.scale = 1 / num_basis if divide else 1.0

    def forward(self, basis: Float[Tensor, "E B"], receiver: Int[Tensor, " E"], n_atoms: int) -> Float[Tensor, "N 1"]:
        share = torch.tanh(silu(self.w_rho(basis) * self.scale) ** 2)
        return 1 / (1 + sum_by_index(share, receiver, n_atoms))


class NodeStart(nn.Module):
    """Scalars from the element and the elements around: h = W_u SiLU(W_d [A_na ; Σ_j A_nbr ⊙ W_ndp φ / (1 + ρ)])."""

    def __init__(self, num_features: int, num_basis: int, num_elements: int) -> None:
        super().__init__()
        self.A_na = nn.Embedding(num_elements, num_features)
        self.A_nbr = nn.Embedding(num_elements, num_features)
        self.W_ndp = linear(num_basis, num_features, bias=False)
        self.W_d = linear(2 * num_features, num_features, bias=False)
        self.W_u = linear(num_features, num_features, bias=False)
        self.density = Density(num_basis, divide=False)
        self.ends = Ends()

    def forward(self, species: Tensor, basis: Tensor, edge_index: Tensor) -> Float[Tensor, "N C"]:
        receiver = edge_index[1]
        messages = self.A_nbr(self.ends(species, edge_index)[0]) * self.W_ndp(basis)
        m = sum_by_index(messages, receiver, species.shape[0]) * self.density(basis, receiver, species.shape[0])
        return self.W_u(silu(self.W_d(cat([self.A_na(species), m], 1))))


class Layer(nn.Module):
    """Joint norm, message, edge update (not in the last layer) and equivariant coupling."""

    def __init__(self, config: GeoditeConfig, last: bool) -> None:
        super().__init__()
        c, l_max = config.num_features, config.l_max
        self.l_max = l_max
        self.last, self.uses_steerables = last, not last or config.direct_forces
        published = config.variant == "published"
        dropout = config.dropout if config.dropout is not None else 0.2 if published else 0.0
        self.attention: Any = Attention(c, config.num_heads, l_max, dropout)

        def square(times: int = 1) -> nn.Linear:
            return linear(c, times * c, bias=False)

        self.gamma = nn.ParameterList(nn.Parameter(torch.ones(c)) for _ in range(l_max + 1))
        self.W_q, self.W_k, self.W_s1, self.W_v1, self.W_re = (square() for _ in range(5))
        self.W_s2, self.W_v2, self.W_rs = (square(3) for _ in range(3))
        self.density = Density(config.num_basis, divide=True)
        if not last:
            self.W_t1, self.W_t2, self.W_vq, self.W_ed = (square() for _ in range(4))
            self.W_vk: Any = nn.ModuleList(square() for _ in range(l_max))
            self.LN_omega = nn.LayerNorm(c)
            self.alignment: Any = Alignment(l_max)
        self.W_vu = square()
        self.W_m1 = linear(2 * c, c, bias=False)
        self.W_m2 = square(2)

    def degrees(self, x: Tensor) -> list[Tensor]:
        """Views of the components (axis 1) of l = 1 … L."""
        return list(split(x, [2 * l + 1 for l in range(1, self.l_max + 1)], 1))

    def normalize(self, h: Float[Tensor, "N C"], x: Float[Tensor, "N S C"] | None) -> tuple[Tensor, Tensor | None]:
        """Divide both streams by their joint root mean square; it replaces h and X."""
        squares = h**2
        if x is not None:
            for l, part in enumerate(self.degrees(x), start=1):
                squares = squares + (part**2).sum(dim=1) / (2 * l + 1)
        scale = torch.rsqrt(squares.mean(dim=1, keepdim=True) + 1e-6)
        h = self.gamma[0] * h * scale
        if x is not None:
            x = cat([part * gamma for part, gamma in zip(self.degrees(x), list(self.gamma)[1:], strict=True)], 1) * scale[:, None]
        return h, x

    def forward(
        self, h: Float[Tensor, "N C"], x: Float[Tensor, "N S C"] | None, t: Float[Tensor, "E C"], edges: Edges
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The streams after this layer; X is None before the first layer, where it is zero."""
        h, x = self.normalize(h, x)
        h, x = self.message(h, x, t, edges)
        if not self.last:
            keys = cat([W(part) for W, part in zip(self.W_vk, self.degrees(x), strict=True)], 1)
            omega = self.alignment(self.W_vq(x), keys, edges)
            t = t + silu(self.W_t2(silu(self.W_t1(t)))) * self.W_ed(self.LN_omega(omega))
        return *self.couple(h, x), t

    def message(self, h: Tensor, x: Tensor | None, t: Float[Tensor, "E C"], edges: Edges) -> tuple[Tensor, Tensor]:
        """Attention and filtered scalars of the neighbours, in parts for h, for Y and for X, summed over neighbours."""
        n, c = h.shape
        width = (2 if x is None else 3) * c  # without steerables nobody reads the third part
        # one product with everything that reads h
        q, k, s, v = split(apply_linear(h, cat([w.weight for w in (self.W_q, self.W_k, self.W_s1, self.W_v1)], 0)), [c] * 4, 1)
        scalars, values = apply_linear(silu(s), self.W_s2.weight[:width]), apply_linear(silu(v), self.W_v2.weight[:width])
        sum_h, sums = self.attention(q, k, scalars, values, x, silu(self.W_re(t)), apply_linear(t, self.W_rs.weight[:width]), edges)
        dilution = self.density(edges.basis, edges.receiver, n)
        sums = sums * dilution[:, None]
        return h + sum_h * dilution, sums if x is None else x + sums

    def couple(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lengths of the steerables enter the scalars; scalars scale the steerables."""
        v = self.W_vu(x)
        hidden = silu(self.W_m1(cat([h, (v**2).sum(dim=1)], 1)))
        if not self.uses_steerables:
            return h + apply_linear(hidden, self.W_m2.weight[: h.shape[1]]), x
        m1, m2 = split(self.W_m2(hidden), [h.shape[1]] * 2, 1)
        return h + m1, x + m2[:, None] * v


class Repulsion(nn.Module):
    """The published pair repulsion, trained and unconstrained, in units of the energy scale.

    V = 14.3996 Z_i Z_j / r Σ_n c_n exp(-d_n r / a) f_5(r / (R_i + R_j)),    a = 0.529 a_0 / (Z_i^β + Z_j^β)
    """

    def __init__(self, atomic_numbers: tuple[int, ...]) -> None:
        super().__init__()
        self.a_0 = nn.Parameter(torch.tensor(0.4546))
        self.beta = nn.Parameter(torch.tensor(0.0842))
        self.c = nn.Parameter(torch.full((4,), 0.1663))
        self.d = nn.Parameter(torch.full((4,), 0.0354))
        self.numbers = Constant(np.array(atomic_numbers, dtype=np.float64))
        self.radii = Constant(covalent_radii[np.array(atomic_numbers)])
        self.ends = Ends()

    def forward(self, species: Int[Tensor, " N"], edge_index: Int[Tensor, "2 E"], lengths: Float[Tensor, " E"]) -> Float[Tensor, " N"]:
        """½ Σ_j V_ij of each atom."""
        neighbour, centre = self.ends(species, edge_index)
        z_i, z_j = self.numbers()[centre], self.numbers()[neighbour]
        reduced = lengths * (z_i**self.beta + z_j**self.beta) / (0.529 * self.a_0)
        screening = (self.c * torch.exp(-self.d * reduced[:, None])).sum(dim=1)
        envelope = polynomial_envelope(lengths / (self.radii()[centre] + self.radii()[neighbour]), p=5)
        return sum_by_index(0.5 * 14.3996 * z_i * z_j / lengths * screening * envelope, edge_index[1], species.shape[0])


class Geodite(Network):
    """The network: species and edge vectors in, per-atom energies (and direct forces) out."""

    fit_defaults: ClassVar = FitDefaults(learning_rate=5e-3, compiled_share=0.75, compile_seconds=100.0)
    presets: ClassVar = {"tiny": {"num_features": 8, "num_layers": 2, "num_basis": 4, "num_heads": 2}}
    subtract_isolated = True
    """the potential subtracts the energy of a lone atom (the paper's vacuum embedding)"""

    def __init__(self, config: GeoditeConfig, facts: DataFacts) -> None:
        """
        Args:
            config: Settings.
            facts: Elements of the training data.
        """
        super().__init__()
        c = config.num_features
        self.config = config
        self.ends = Ends()
        self.harmonics = SphericalHarmonics(config.l_max, "norm")
        self.radial = RadialFeatures(config, facts.atomic_numbers)
        self.node_start = NodeStart(c, config.num_basis, len(facts.atomic_numbers))
        self.W_erp = linear(config.num_basis, c, bias=False)
        last = config.num_layers - 1
        self.layers: Any = nn.ModuleList(Layer(config, last=k == last) for k in range(config.num_layers))
        self.readouts: Any = nn.ModuleList(nn.Linear(c, 1, bias=False) for _ in range(config.num_layers))
        self.force_readout = linear(c, 1, bias=False) if config.direct_forces else None
        self.repulsion = Repulsion(facts.atomic_numbers) if config.variant == "published" else None
        self.own_repulsion = self.repulsion is not None
        """whether the potential must not add a repulsion of its own"""

    @property
    def num_hops(self) -> int:
        """As `Network.num_hops`: scalars already start from the elements around, and edges from the scalars at both ends."""
        return int(self.config.num_layers) + 1

    def embed(
        self, species: Tensor, edge_index: Tensor, edge_vectors: Tensor, lengths: Tensor
    ) -> tuple[list[Float[Tensor, "N C"]], Float[Tensor, "N S C"]]:
        """Scalars after every layer, and the last steerables."""
        harmonics = split(self.harmonics(edge_vectors / lengths[:, None]), [1, (self.config.l_max + 1) ** 2 - 1], 1)[1]
        neighbour, centre = self.ends(species, edge_index)
        basis = self.radial(lengths, centre, neighbour)
        edges = Edges(edge_index, lengths / self.config.cutoff, harmonics, lambda: basis)
        h, x = self.node_start(species, basis, edge_index), None
        h_j, h_i = self.ends(h, edge_index)
        t = (h_i + h_j) * self.W_erp(basis)
        states = []
        for layer in self.layers:
            h, x, t = layer(h, x, t, edges)
            states.append(h)
        assert x is not None
        return states, x

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
        states, x = self.embed(species, edge_index, edge_vectors, lengths)
        energies = torch.stack([readout(h)[:, 0] for readout, h in zip(self.readouts, states, strict=True)]).sum(dim=0)
        if self.repulsion is not None:
            energies = energies + self.repulsion(species, edge_index, lengths)
        forces = self.force_readout(x[:, :3])[:, :, 0] if self.force_readout is not None else None
        return ModelOutput(node_energies=energies, direct_forces=forces, features=cat(states, 1))
