"""What every model returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ModelOutput(NamedTuple):
    """Per-atom output of a network, in its own units (the potential scales it)."""

    node_energies: Tensor
    """(n_atoms,)"""
    direct_forces: Tensor | None
    """(n_atoms, 3), not the gradient of the energy; None for a network without that head"""
