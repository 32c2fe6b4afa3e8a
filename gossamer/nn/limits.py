"""Where the training data ends: distances shorter than any in it, and atoms with fewer neighbours than any in it.

A network says anything there: trained on bulk silicon or on a molecule, curves of two atoms have holes of 1.5 to 350 eV before
the wall. What it is not asked it cannot get wrong:

- A pair closer than the shortest distance r0 of its elements in the data is shown to the network at the distance

      c(r) = r0 (1 - t q(t)),    q(t) = (1 + (t / τ)⁴)^(-1/4),    t = 1 - r / r0,    τ = 0.1,

  which falls ever more slowly, to 0.9 r0 at most, and is four times continuously differentiable at r0. Below, the repulsion
  (`gossamer.nn.zbl`), which is zero from r0 on, has the word.
- The energy of an atom with n neighbours, each counted by (1 - (r / cutoff)⁴)⁴, is multiplied by a step of n, seven times a
  polynomial, from 0 at n = least / 1.75 to 1 at n = least: the least in the data of that element, or 1.75 if that is smaller. Two atoms
  alone have at most one neighbour each: if the data has no such pairs, only the repulsion acts between them.

On the training data both are exactly one: c(r) = r, and a factor of 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from ase.data import atomic_numbers as number_of
from jaxtyping import Float, Int
from torch import Tensor

from gossamer.neighbors import company
from gossamer.nn.float64 import Float64
from gossamer.nn.layers import polynomial_envelope, sum_by_index

SOFTNESS = 0.1
"""τ"""
ENOUGH = 1.75
"""neighbours from which an atom is one that a network may be asked about, if the data has none with fewer"""
N_ELEMENTS = 119
"""rows of tables by atomic number"""


def stretch(lengths: Float[Tensor, " n_edges"], shortest: Float[Tensor, " n_edges"]) -> Float[Tensor, " n_edges"]:
    """c(r) / r - 1, exactly zero from ``shortest`` on.

    Args:
        lengths: Å, positive.
        shortest: Å, r0 of each pair.
    """
    t = (1 - lengths / shortest).clamp(min=0)
    fourth = (t * (1 / SOFTNESS)) ** 4
    return t * (1 - torch.rsqrt(torch.sqrt(1 + fourth))) * shortest / lengths


class Limits(Float64):
    """The least number of neighbours of each element; shortest distances are those at which the repulsion ends."""

    least: Tensor

    def __init__(self, fewest: Mapping[str, float]) -> None:
        """
        Args:
            fewest: By symbol, the smallest number of neighbours in the training data, counted by `company`.
        """
        super().__init__()
        least = torch.full((N_ELEMENTS,), ENOUGH, dtype=torch.float64)
        for symbol, count in fewest.items():
            least[number_of[symbol]] = min(count, ENOUGH)
        self.register_buffer("least", least, persistent=False)

    def count(self, x: Float[Tensor, " n_edges"], receiver: Int[Tensor, " n_edges"], n_atoms: int) -> Float[Tensor, " n_atoms"]:
        """Neighbours of each atom; ``x``: distance over cutoff."""
        return sum_by_index(company(x), receiver, n_atoms)

    def trust(self, count: Float[Tensor, " n_atoms"], atomic_numbers: Int[Tensor, " n_atoms"]) -> Float[Tensor, " n_atoms"]:
        """Factor of each atom's energy."""
        share = count / self.least[atomic_numbers].to(count)
        return 1 - polynomial_envelope(((share - 1 / ENOUGH) / (1 - 1 / ENOUGH)).clamp(min=0.0), p=4, k=3)
