"""How wrong a potential may be: the distance of an atom's last features from those of the training data, in units of measured errors.

The features φ of an atom are what the last linear map of the readout takes (`ModelOutput.features`). With μ_z and C_z, mean and
covariance of the training atoms of element z, an atom's distance and the expected error of a force component on it are

    d² = (φ - μ_z)ᵀ C_z⁻¹ (φ - μ_z),        σ_F = a_z d

(the Mahalanobis distance; Lee et al., arXiv:1807.03888). For the energy of a structure the sum of its atoms' deviations is taken, as
prediction rigidity takes the sum of features (Bigi, Chong, Ceriotti, Grasselli, arXiv:2403.02251, Eq. 12):

    D² = (Σ φ - μ_z)ᵀ C⁻¹ (Σ φ - μ_z),      σ_E = b D

a_z and b are the ratios of root mean square errors to root mean square distances on validation frames. Only the ``COMPONENTS`` directions
in which the features of the data vary most are used; more told errors no better (docs/uncertainty.md).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gossamer.nn.float64 import Float64
from gossamer.nn.layers import sum_by_index

COMPONENTS = 32
FLOOR = 1e-6
"""variance of a direction, relative to the largest, below which features are taken not to vary"""


class Uncertainty(Float64):
    """Expected errors of energies and forces from last features. All tables are float64, whatever the precision of the network."""

    centres: Tensor
    axes: Tensor
    roots: Tensor
    whole: Tensor
    force_scales: Tensor
    energy_scale: Tensor

    def __init__(self, n_elements: int, num_features: int) -> None:
        """
        Args:
            n_elements: In the potential's table.
            num_features: M, length of the features.
        """
        super().__init__()
        self.record: dict[str, Any] = {}
        """of how many frames and labels it was measured"""
        k = min(COMPONENTS, num_features)
        shapes = {
            "centres": (n_elements, num_features), "axes": (num_features, k), "roots": (n_elements, k, k), "whole": (k, k),
            "force_scales": (n_elements,), "energy_scale": (1,),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_buffer(name, torch.full(shape, torch.nan, dtype=torch.float64))

    @property
    def known(self) -> tuple[str, ...]:
        """Of "energy" and "forces", those whose errors were measured."""
        scales = {"energy": self.energy_scale, "forces": self.force_scales}
        return tuple(name for name, values in scales.items() if not bool(values.isnan().all()))

    def forward(
        self, features: Float[Tensor, "N M"], species: Int[Tensor, " N"], graph_index: Int[Tensor, " N"], n_graphs: int
    ) -> tuple[Float[Tensor, " G"], Float[Tensor, " N"]]:
        """σ_E of each structure in eV, and σ_F of each atom in eV/Å; infinite for atoms of elements that the training data lacked."""
        scores, own = self.distances(features, species)
        sums = sum_by_index(scores, graph_index, n_graphs)
        scales = self.force_scales.index_select(0, species)
        energy = self.energy_scale * torch.linalg.vector_norm(sums @ self.whole, dim=1)
        strange = sum_by_index(scales.isinf().to(energy), graph_index, n_graphs)
        return torch.where(strange > 0, torch.inf, energy), scales * own

    def distances(self, features: Float[Tensor, "N M"], species: Int[Tensor, " N"]) -> tuple[Float[Tensor, "N K"], Float[Tensor, " N"]]:
        """Deviations along the axes, and the distance d of each atom."""
        scores, scaled = self.deviations(features, species)
        return scores, torch.linalg.vector_norm(scaled, dim=1)

    def deviations(self, features: Float[Tensor, "N M"], species: Int[Tensor, " N"]) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]:
        """Deviations along the axes, and those of length d."""
        scores = (features.to(torch.float64) - self.centres.index_select(0, species)) @ self.axes
        n, k, n_elements = len(scores), scores.shape[1], len(self.roots)
        # by the map of every element, of which one is taken: moves less memory than a map for each atom
        mapped = (scores @ self.roots.transpose(0, 1).reshape(k, -1)).reshape(-1, k)
        rows = torch.arange(n, device=species.device) * n_elements + species
        return scores, mapped.index_select(0, rows)

    @torch.no_grad()
    def fit(self, features: Float[Tensor, "N M"], species: Int[Tensor, " N"], graph_index: Int[Tensor, " N"]) -> None:
        """Take over means and covariances of the training atoms.

        A covariance of n samples is drawn towards that of all by K samples' worth, so that few atoms do.
        """
        x = features.to(torch.float64)
        n_elements, k = len(self.centres), self.axes.shape[1]
        counts = torch.bincount(species, minlength=n_elements).to(x)
        centres = sum_by_index(x, species, n_elements) / counts.clamp(min=1)[:, None]
        self.centres.copy_(torch.where(counts[:, None] > 0, centres, x.mean(dim=0)))
        deviations = x - self.centres[species]
        variances, directions = torch.linalg.eigh(deviations.T @ deviations / len(x))
        largest = torch.clamp(variances[-1], min=FLOOR**2 * x.pow(2).mean() + 1e-300)
        self.axes.copy_((directions / torch.sqrt(variances.clamp(min=0) + FLOOR * largest)).flip(1)[:, :k])
        scores = deviations @ self.axes
        for element in range(n_elements):
            self.roots[element] = _inverse_root(scores[species == element])
        sizes = torch.bincount(graph_index).to(x)
        sums = sum_by_index(scores, graph_index, len(sizes))[sizes > 0] / sizes[sizes > 0].sqrt()[:, None]
        self.whole.copy_(_inverse_root(sums))
        self.force_scales.copy_(torch.where(counts > 0, torch.ones_like(counts), torch.inf))
        self.energy_scale.fill_(1.0)


def _inverse_root(samples: Float[Tensor, "n K"]) -> Float[Tensor, "K K"]:
    """R with R Rᵀ = C⁻¹, C the second moment of samples with, beside them, K of unit variance in all directions."""
    n, k = samples.shape
    moment = (samples.T @ samples + k * torch.eye(k, dtype=samples.dtype, device=samples.device)) / (n + k)
    values, vectors = torch.linalg.eigh(moment)
    return vectors / values.sqrt()
