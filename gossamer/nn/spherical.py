"""Real spherical harmonics of unit vectors."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.nn.layers import Table, join
from gossamer.nn.wigner import wigner_3j


class SphericalHarmonics(nn.Module):
    """Real spherical harmonics of degrees 0 … l_max, degree by degree, orders m = -l … l.

    The y axis is the pole, and components have the order and sign of e3nn: Y_1 = (x, y, z) up to its length. Each degree
    is the coupling of the one below with the vector itself, two small operations instead of dozens:

        Y_l = c_l Σ w3j(1, l - 1, l) u Y_(l-1)

    Every degree has a constant length: sum_m Y_lm² is 1 ("norm") or 2 l + 1 ("component").
    """

    def __init__(self, l_max: int, normalization: Literal["norm", "component"]) -> None:
        super().__init__()
        pole = np.array([0.0, 1.0, 0.0])
        value = np.ones(1)
        tables = []
        for l in range(1, l_max + 1):
            coupling = wigner_3j(1, l - 1, l).reshape(-1, 2 * l + 1)
            at_pole = np.outer(pole, value).ravel() @ coupling  # only m = 0 is not zero there, and is 1
            coupling = coupling / at_pole[l]
            tables.append(Table(coupling))
            value = np.eye(2 * l + 1)[l]
        self.tables: Any = nn.ModuleList(tables)
        self.lengths = [math.sqrt(2 * l + 1) if normalization == "component" else 1.0 for l in range(l_max + 1)]

    def forward(self, unit: Float[Tensor, "n 3"]) -> Float[Tensor, "n components"]:
        """Values (n, (l_max + 1)²) at unit vectors."""
        degree = torch.ones_like(unit[:, :1])
        degrees = [degree]
        for table, length in zip(self.tables, self.lengths[1:], strict=True):
            degree = (unit[:, :, None] * degree[:, None, :]).flatten(1) @ table()
            degrees.append(degree * length if length != 1 else degree)
        return join(degrees, 1)
