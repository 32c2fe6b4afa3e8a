"""Screened nuclear repulsion (Ziegler, Biersack and Littmark, 1985) with an envelope; shared by all models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from ase.data import atomic_numbers as number_of
from ase.data import covalent_radii
from jaxtyping import Float, Int
from torch import Tensor

from gossamer.nn.float64 import Float64
from gossamer.nn.layers import polynomial_envelope

COULOMB = 14.399645
"""e² / (4 pi eps_0) in eV Å"""
SCREENING_LENGTH = 0.46850
"""0.8854 Bohr radii in Å"""
WEIGHTS = (0.18175, 0.50986, 0.28022, 0.02817)
DECAYS = (3.19980, 0.94229, 0.40290, 0.20162)


def zbl_energy(
    edge_lengths: Float[Tensor, " n_edges"], z_i: Float[Tensor, " n_edges"], z_j: Float[Tensor, " n_edges"]
) -> Float[Tensor, " n_edges"]:
    """Universal ZBL energy of each pair in eV, without an envelope.

        V = e² Z_i Z_j / r  sum_n c_n exp(-d_n r / a),    a = 0.46850 Å / (Z_i^0.23 + Z_j^0.23)

    Args:
        edge_lengths: Å, positive.
        z_i: Atomic numbers, in the dtype of the lengths.
        z_j: Likewise, of the other atom.
    """
    reduced = edge_lengths * (z_i**0.23 + z_j**0.23) / SCREENING_LENGTH
    screening = torch.zeros_like(reduced)
    for weight, decay in zip(WEIGHTS, DECAYS, strict=True):
        screening = screening + weight * torch.exp(-decay * reduced)
    return COULOMB * z_i * z_j / edge_lengths * screening


class ZBL(Float64):
    """Half the ZBL energy of every directed edge, times an envelope f_{p,k}.

    f_{5,4} ends where the training data begins, or at a fraction of the bond length: no pair in the data feels it, and with
    four vanishing derivatives third-order force constants see no kink. NequIP's package ends f_{6,2} at the model's cutoff
    instead: the repulsion then acts on all bonds, and the network learns the difference.
    """

    pair_ends: Tensor

    def __init__(
        self,
        radius_factor: float | None = 0.8,
        cutoff: float = 5.0,
        power: int = 5,
        order: int = 4,
        shortest: Mapping[str, float] | None = None,
    ) -> None:
        """
        Args:
            radius_factor: End of the repulsion as a fraction of the sum of the two covalent radii; None: at ``cutoff``.
            cutoff: Å, of the list of neighbours, beyond which no repulsion reaches: one that ended there at another value than zero would jump.
            power: Power p of the envelope.
            order: Number k of its derivatives that vanish at the end.
            shortest: Å at which it ends instead, for pairs of elements ("H-O").
        """
        super().__init__()
        self.radius_factor, self.cutoff, self.power, self.order = radius_factor, cutoff, power, order
        radii = torch.tensor(covalent_radii, dtype=torch.float64)
        ends = (radii[:, None] + radii) * (0.8 if radius_factor is None else radius_factor)
        for pair, distance in (shortest or {}).items():
            first, second = (number_of[symbol] for symbol in pair.split("-"))
            ends[first, second] = ends[second, first] = distance
        self.register_buffer("pair_ends", ends.flatten().clamp(max=cutoff), persistent=False)

    def forward(
        self,
        z_i: Int[Tensor, " n_edges"],
        z_j: Int[Tensor, " n_edges"],
        edge_lengths: Float[Tensor, " n_edges"],
        ends: Float[Tensor, " n_edges"] | None = None,
    ) -> Float[Tensor, " n_edges"]:
        """Energy in eV of each directed edge (half of the pair's), in the dtype of the lengths; ``ends``: Å, as from `ends`."""
        ends = self.ends(z_i, z_j) if ends is None else ends
        envelope = polynomial_envelope(edge_lengths / ends.to(edge_lengths), self.power, self.order)
        return 0.5 * envelope * zbl_energy(edge_lengths, z_i.to(edge_lengths), z_j.to(edge_lengths))

    def ends(
        self, z_i: Int[Tensor, " n_edges"], z_j: Int[Tensor, " n_edges"], pair_cutoffs: Float[Tensor, " n_edges"] | None = None
    ) -> Float[Tensor, " n_edges"]:
        """Å at which the repulsion of each pair ends.

        ``pair_cutoffs``: Å, cutoff of each edge where pairs have their own; a repulsion that ends at the cutoff ends there.
        """
        if self.radius_factor is not None:
            return self.pair_ends.index_select(0, z_i * len(covalent_radii) + z_j)
        return self.pair_ends.new_full(z_i.shape, self.cutoff) if pair_cutoffs is None else pair_cutoffs
