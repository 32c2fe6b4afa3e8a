"""Losses on energy, forces and stress."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.graph import Graph
from gossamer.potential import Prediction
from gossamer.settings import settings


@settings
class LossConfig:
    """Weighted sum of errors of energy (per atom), force components and stress components."""

    kind: Literal["l1", "mse", "huber"] = "huber"
    """Penalty of each residual (in eV/atom, eV/Å, eV/Å³)."""
    energy: Annotated[float, Field(ge=0)] = 5.0
    """Weight of the energy."""
    forces: Annotated[float, Field(ge=0)] = 10.0
    """Weight of the forces."""
    stress: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the stress; 0 leaves stress labels unread. About 20 suits residuals in eV/Å³."""
    huber_delta: Annotated[float, Field(gt=0)] = 0.01
    """Residual at which the Huber penalty turns from quadratic to linear."""
    energy_per_atom: bool = True
    """Divide energy residuals by the number of atoms (the LEIGNN paper does not)."""
    free_atoms_only: bool = False
    """Leave forces of atoms that were held fixed out of the loss (OC20)."""

    def needed(self) -> list[str]:
        """Labels that every training frame must have."""
        return [name for name in ("energy", "forces", "stress") if getattr(self, name) > 0]


def penalty(residual: Tensor, config: LossConfig) -> Tensor:
    """Elementwise penalty; Huber is divided by delta, so that its linear part has slope one like L1."""
    if config.kind == "l1":
        return residual.abs()
    if config.kind == "mse":
        return residual**2
    return torch.nn.functional.huber_loss(residual, torch.zeros_like(residual), delta=config.huber_delta, reduction="none") / (
        config.huber_delta
    )


def residuals(prediction: Prediction, graph: Graph, config: LossConfig) -> dict[str, Tensor]:
    """Prediction minus label, flat, of each label with a weight; energies in eV/atom unless set otherwise."""
    out = {}
    if config.energy > 0:
        difference = prediction.energy - graph.energy
        out["energy"] = difference / graph.atoms_per_graph() if config.energy_per_atom else difference
    if config.forces > 0:
        difference = prediction.forces - graph.forces
        out["forces"] = (difference[graph.free] if config.free_atoms_only else difference).flatten()
    if config.stress > 0:
        out["stress"] = (prediction.stress - graph.stress).flatten()
    return out


def loss_sums(prediction: Prediction, graph: Graph, config: LossConfig) -> dict[str, tuple[Tensor, int]]:
    """Sum of penalties and number of terms of each label; the caller divides (over all ranks, say)."""
    return {name: (penalty(r, config).sum(), r.numel()) for name, r in residuals(prediction, graph, config).items()}
