"""Long-ranged electrostatics of charges that a network predicts: latent charges, and the Coulomb energy of Gaussian charges.

Cheng, "Latent Ewald summation for machine learning of long-range interactions", npj Comput. Mater. (2025), arXiv:2408.15165: charges are
not labels but whatever makes energies and forces right. Two charges interact as Gaussians of width σ / sqrt 2,

    E = ½ k Σ_{i ≠ j, images} q_i q_j erf(r / (sqrt 2 σ)) / r,        k = 14.4 eV Å,

so that what happens at short range is left to the network. In periodic cells the sum is Ewald's, split at a width η ≥ σ of no meaning:

    E = k / (2 V) Σ_{κ ≠ 0} 4 π / κ² exp(-η² κ² / 2) |S(κ)|²,        S(κ) = Σ_j q_j exp(i κ · r_j)
      + ½ k Σ_{i ≠ j, images} q_i q_j [erf(r / (sqrt 2 σ)) - erf(r / (sqrt 2 η))] / r
      - k / (sqrt (2 π) η) Σ_i q_i² - k π (η² - σ²) / V (Σ_i q_i)²

A cell that is not neutral has a uniform background (κ = 0 is left out, and the last term does the same for the second). At η = σ this is
Cheng's Eq. 3 without the interaction of each charge with itself. σ = 0 is the energy of point charges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from ase.units import Bohr, Hartree
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.neighbors import pairs_within
from gossamer.nn.layers import linear, sum_by_index

COULOMB = Hartree * Bohr
"""e² / (4 π ε0) in eV Å"""
REACH = 5.5
"""widths at which sums end: exp(-REACH² / 2) = 3e-7 of a wave, and less of a pair, is left out"""
BLOCK = 1 << 15
"""atoms times waves worked on at once"""
PAIR_COST = 12.0
"""time of a pair of atoms over that of an atom and a wave, on which the split is chosen; both are right at any split"""


class LatentCharges(nn.Module):
    """Charges of atoms from the features that the readout of the energy takes: a small network, and a constant of each element."""

    def __init__(self, num_features: int, n_elements: int, width: int = 32) -> None:
        """
        Args:
            num_features: M.
            n_elements: In the potential's table.
            width: Of the hidden layer.
        """
        super().__init__()
        self.hidden = linear(num_features, width)
        self.out = linear(width, 1, bias=False)
        self.table = nn.Embedding(n_elements, 1)
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, features: Float[Tensor, "N M"], species: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Charges in units of e."""
        return (self.out(nn.functional.silu(self.hidden(features))) + self.table(species))[:, 0]


def neutralised(charges: Float[Tensor, " N"], graph_index: Int[Tensor, " N"], n_graphs: int) -> Float[Tensor, " N"]:
    """Charges less the mean of their structure."""
    ones = torch.ones_like(charges)
    means = sum_by_index(charges, graph_index, n_graphs) / sum_by_index(ones, graph_index, n_graphs).clamp(min=1)
    return charges - means.index_select(0, graph_index)


def coulomb_energies(
    charges: Float[Tensor, " N"],
    positions: Float[Tensor, "N 3"],
    cell: Float[Tensor, "G 3 3"],
    pbc: Bool[Tensor, "G 3"],
    graph_index: Int[Tensor, " N"],
    smearing: float,
    split: float | None = None,
    names: Sequence[str] = (),
) -> Float[Tensor, " N"]:
    """Electrostatic energy of each atom, half of that of its pairs; differentiable twice by charges, positions and cells.

    Args:
        charges: In units of e.
        positions: Å.
        cell: Å, rows are lattice vectors; read for periodic structures.
        pbc: Along all axes, or along none: then pairs are summed one by one.
        graph_index: Structure of each atom, ascending.
        smearing: σ in Å; 0: point charges.
        split: η in Å, not below σ; None: what takes the least time.
        names: What messages call the structures.

    Returns:
        eV, float64 where positions are.

    Raises:
        ValueError: a structure that is periodic along some axes only.
    """
    periodic = pbc.all(dim=1).tolist()
    mixed = [k for k, flags in enumerate(pbc.tolist()) if any(flags) and not all(flags)]
    if mixed:
        name = names[mixed[0]] if names else f"structure {mixed[0]}"
        raise ValueError(
            f"Long-range charges need a structure that is periodic along all axes or along none; {name} has "
            f"pbc {pbc[mixed[0]].tolist()}. Give a slab vacuum, and make it periodic along all axes."
        )
    charges = charges.to(positions.dtype)
    counts = torch.bincount(graph_index, minlength=len(periodic)).tolist()
    starts = [sum(counts[:k]) for k in range(len(counts))]
    parts = []
    energies = torch.zeros_like(charges)
    free = [(start, n) for start, n, bound in zip(starts, counts, periodic, strict=True) if not bound]
    if free:
        energies = energies + _pairs(charges, positions, free, smearing)
    for start, n, bound, vectors in zip(starts, counts, periodic, cell.unbind(), strict=True):
        where = slice(start, start + n)
        parts.append(_ewald(charges[where], positions[where], vectors, smearing, split) if bound else energies[where])
    return COULOMB * torch.cat(parts)


def _pairs(charges: Tensor, positions: Tensor, structures: Sequence[tuple[int, int]], smearing: float) -> Tensor:
    """Sum over all pairs of each structure, given by first atom and number of atoms; in e²/Å."""
    first, second = torch.cat([torch.triu_indices(n, n, 1, device=positions.device) + start for start, n in structures], 1)
    lengths = torch.linalg.vector_norm(positions[first] - positions[second], dim=1)
    halves = 0.5 * charges[first] * charges[second] * _damped(lengths, smearing)
    n = len(charges)
    return sum_by_index(halves, first, n) + sum_by_index(halves, second, n)


def _damped(lengths: Tensor, width: float) -> Tensor:
    """erf(r / (sqrt 2 width)) / r."""
    return (torch.erf(lengths / (math.sqrt(2) * width)) if width > 0 else 1.0) / lengths


def _ewald(charges: Tensor, positions: Tensor, cell: Tensor, smearing: float, split: float | None) -> Tensor:
    """Ewald's sum of one cell, by atoms; in e²/Å."""
    volume = torch.linalg.det(cell).abs()
    width = choose_split(len(charges), float(volume.detach()), smearing) if split is None else split
    waves, shares = _waves(charges, positions, cell, volume, width)
    energies = shares + (waves - shares.sum()) / len(charges)  # the shares, with the slope of the sum
    energies = energies - charges**2 / (math.sqrt(2 * math.pi) * width)
    if width > smearing:
        energies = energies + _near(charges, positions, cell, smearing, width)
        energies = energies - math.pi * (width**2 - smearing**2) / volume * charges * charges.sum()
    return energies


def choose_split(n_atoms: int, volume: float, smearing: float) -> float:
    """η at which waves, N V / η³ of them, and pairs, N² η³ / V, take the least time together; the time grows as N^1.5."""
    return max(smearing, (volume**2 / (16 * math.pi**3 * n_atoms * PAIR_COST)) ** (1 / 6))


def _waves(charges: Tensor, positions: Tensor, cell: Tensor, volume: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """The sum over reciprocal vectors, and how much of it each atom has."""
    inverse = torch.linalg.inv(cell)
    reach = REACH / width
    limits = (reach * torch.linalg.vector_norm(cell.detach(), dim=1) / (2 * math.pi)).floor().int().tolist()
    ranges = [torch.arange(-m if k else 0, m + 1, device=cell.device, dtype=cell.dtype) for k, m in enumerate(limits)]
    waves = torch.cartesian_prod(*ranges)
    a, b, c = waves.unbind(dim=1)
    half = (a > 0) | ((a == 0) & ((b > 0) | ((b == 0) & (c > 0))))  # of κ and -κ one
    squares = (2 * math.pi * waves @ inverse.detach().T).pow(2).sum(dim=1)
    waves = waves[half & (squares < reach**2)]
    squares = (2 * math.pi * waves @ inverse.T).pow(2).sum(dim=1)
    weights = 8 * math.pi / volume * torch.exp(-0.5 * width**2 * squares) / squares
    found: tuple[Tensor, Tensor] = _WaveSum.apply(charges, positions @ inverse, weights, waves)
    return found


def wave_sum(charges: Tensor, places: Tensor, weights: Tensor, waves: Tensor) -> Tensor:
    """½ Σ_κ w_κ |S(κ)|² of positions in units of the cell vectors."""
    phases = (2 * math.pi * places) @ waves.T
    return 0.5 * (weights * ((charges @ torch.cos(phases)) ** 2 + (charges @ torch.sin(phases)) ** 2)).sum()


class _WaveSum(torch.autograd.Function):
    """`wave_sum` with its gradient in one pass through blocks of waves that fit into the cache; and each atom's share ½ q dE/dq of it."""

    @staticmethod
    def forward(ctx: Any, charges: Tensor, places: Tensor, weights: Tensor, waves: Tensor) -> tuple[Tensor, Tensor]:
        slopes = torch.zeros_like(charges)[:, None].repeat(1, 4)  # by charge, and by place over 2 π q
        squares = []
        size = max(16, BLOCK // len(charges))
        for w, n in zip(weights.split(size), waves.split(size), strict=True):
            phases = (2 * math.pi * places) @ n.T
            cosines, sines = torch.cos(phases), torch.sin(phases)
            c, s = charges @ cosines, charges @ sines
            squares.append(c**2 + s**2)
            wc, ws = (w * c)[:, None], (w * s)[:, None]
            slopes += cosines @ torch.cat([wc, ws * n], 1) + sines @ torch.cat([ws, -wc * n], 1)
        squared = torch.cat(squares) if squares else weights
        by_charge, by_place = slopes[:, 0], 2 * math.pi * charges[:, None] * slopes[:, 1:]
        ctx.save_for_backward(charges, places, weights, waves, by_charge, by_place, 0.5 * squared)
        shares = 0.5 * charges * by_charge
        ctx.mark_non_differentiable(shares)
        return 0.5 * (weights * squared).sum(), shares

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        charges, places, weights, waves, *slopes = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in (charges, places, weights)]
            slopes = list(torch.autograd.grad(wave_sum(inputs[0], inputs[1], inputs[2], waves), inputs, create_graph=True))
        return *(gradient * slope for slope in slopes), None


def _near(charges: Tensor, positions: Tensor, cell: Tensor, smearing: float, width: float) -> Tensor:
    """The sum over pairs near one another of what the waves lack, by atoms."""
    found = pairs_within(positions.detach().cpu().numpy(), cell.detach().cpu().numpy(), REACH * width)
    first, second, shifts = (torch.from_numpy(x).to(cell.device) for x in found)
    vectors = positions.index_select(0, second) + shifts.to(cell) @ cell - positions.index_select(0, first)
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    potentials = _damped(lengths, smearing) - _damped(lengths, width)
    halves = 0.5 * charges.index_select(0, first) * charges.index_select(0, second) * potentials
    return sum_by_index(halves, first, len(charges)) + sum_by_index(halves, second, len(charges))
