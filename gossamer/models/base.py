"""What every model is given, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What a network may know of its training data when it is made."""

    atomic_numbers: tuple[int, ...]
    """element table; ``species`` counts along it"""
    mean_neighbors: float = 1.0
    """mean number of atoms within the cutoff"""
    scales: tuple[float, ...] | None = None
    """for each element, RMS force over that of all elements; None stands for ones"""


class ModelOutput(NamedTuple):
    """Per-atom output of a network, in its own units (the potential scales it)."""

    node_energies: Tensor
    """(n_atoms,)"""
    direct_forces: Tensor | None
    """(n_atoms, 3), not the gradient of the energy; None for a network without that head"""
