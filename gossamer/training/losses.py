"""Losses on energy, forces and stress."""

from __future__ import annotations

from collections.abc import Mapping
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

    kind: Literal["l1", "mse", "huber", "conditional_huber"] = "huber"
    """Penalty of each residual (in eV/atom, eV/Å, eV/Å³). "conditional_huber" shrinks the forces' delta where the labelled force is
    large: by 1, 0.7, 0.4, 0.1 below 100, 200, 300 eV/Å and above (MACE, NequIP foundation models)."""
    energy: Annotated[float, Field(ge=0)] = 5.0
    """Weight of the energy."""
    forces: Annotated[float, Field(ge=0)] = 10.0
    """Weight of the forces."""
    stress: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the stress; 0 leaves stress labels unread. About 20 suits residuals in eV/Å³."""
    huber_delta: Annotated[float, Field(gt=0)] = 0.01
    """Residual at which the Huber penalty turns from quadratic to linear."""
    stress_huber_delta: Annotated[float, Field(gt=0)] | None = None
    """Likewise for stress alone; None takes huber_delta."""
    normalize: bool = False
    """Divide residuals by the spread of the labels in the training data (energy per atom less reference energies, force components,
    stress components) before the penalty, as Geodite's recipe does."""
    energy_per_atom: bool = True
    """Divide energy residuals by the number of atoms (the LEIGNN paper does not)."""
    free_atoms_only: bool = False
    """Leave forces of atoms that were held fixed out of the loss (OC20)."""

    def needed(self) -> list[str]:
        """Labels that every training frame must have."""
        return [name for name in ("energy", "forces", "stress") if getattr(self, name) > 0]


def penalty(residual: Tensor, config: LossConfig, delta: float | Tensor | None = None) -> Tensor:
    """Elementwise penalty; Huber is divided by ``huber_delta``, so that its linear part has slope one like L1.

    Args:
        residual: Prediction minus label.
        config: Kind of penalty.
        delta: Where Huber turns linear, if not at ``config.huber_delta``.
    """
    if config.kind == "l1":
        return residual.abs()
    if config.kind == "mse":
        return residual**2
    limit = residual.new_tensor(config.huber_delta) if delta is None else torch.as_tensor(delta).to(residual)
    size = residual.abs()
    return torch.where(size <= limit, 0.5 * residual**2, limit * (size - 0.5 * limit)) / config.huber_delta


def conditional_deltas(forces: Tensor, delta: float) -> Tensor:
    """Delta of each atom's force components by the size of the labelled force in eV/Å: (n, 1)."""
    size = torch.linalg.vector_norm(forces, dim=1, keepdim=True)
    factors = torch.tensor([1.0, 0.7, 0.4, 0.1], dtype=forces.dtype, device=forces.device)
    return delta * factors[torch.bucketize(size, torch.tensor([100.0, 200.0, 300.0], dtype=forces.dtype, device=forces.device), right=True)]


def loss_sums(
    prediction: Prediction, graph: Graph, config: LossConfig, spreads: Mapping[str, float] | None = None
) -> dict[str, tuple[Tensor, int]]:
    """Sum of penalties and number of terms of each label with a weight; the caller divides (over all ranks, say).

    Args:
        prediction: Of the batch.
        graph: With labels.
        config: Weights and penalties.
        spreads: Spread of each label in the training data; used if ``config.normalize``.
    """
    unit = dict(spreads or {}) if config.normalize else {}
    out = {}

    def add(name: str, residual: Tensor, delta: float | Tensor | None = None) -> None:
        out[name] = (penalty(residual / unit.get(name, 1.0), config, delta).sum(), residual.numel())

    if config.energy > 0:
        difference = prediction.energy - graph.energy
        add("energy", difference / graph.atoms_per_graph() if config.energy_per_atom else difference)
    if config.forces > 0:
        difference, labels = prediction.forces - graph.forces, graph.forces
        if config.free_atoms_only:
            difference, labels = difference[graph.free], labels[graph.free]
        add("forces", difference, conditional_deltas(labels, config.huber_delta) if config.kind == "conditional_huber" else None)
    if config.stress > 0:
        add("stress", prediction.stress - graph.stress, config.stress_huber_delta)
    return out
