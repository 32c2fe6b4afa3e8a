"""Losses on energy, forces, stress and whatever else the table of quantities holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from gossamer.data.structure import Structure
from gossamer.graph import Graph
from gossamer.potential import Prediction
from gossamer.quantities import QUANTITIES, known_extras
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
    """Weight of the stress; 0 leaves stress labels unread. About 20 suits residuals in eV/Å³. Frames that are not periodic along all axes
    have none, and it is learned from the others."""
    missing: Literal["error", "skip"] = "error"
    """What becomes of a frame that lacks a label with a weight. "error": it is refused. "skip": the label is learned from the others."""
    group_weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """How much frames count, by the groups of data.labels.group, {surface: 3.0}; 1 where a group is not named. Set beside their mean over all training frames."""
    extras: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Weights of further quantities (gossamer/quantities.py), by name, for networks with such heads."""
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
    """Leave forces of atoms that were held fixed out of the loss (OC20), and with it out of the scales that the data gives, of the errors
    that choose the best weights, and of the uncertainty."""

    @field_validator("extras")
    @classmethod
    def _known(cls, extras: dict[str, float] | None) -> dict[str, float] | None:
        return extras and known_extras(extras)

    def weights(self) -> dict[str, float]:
        """Weight of each quantity that has one above zero."""
        named = {"energy": self.energy, "forces": self.forces, "stress": self.stress, **(self.extras or {})}
        return {name: weight for name, weight in named.items() if weight > 0}

    def needed(self) -> list[str]:
        """Labels that are learned."""
        return list(self.weights())


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
    limit = config.huber_delta if delta is None else delta
    size = residual.abs()
    return torch.where(size <= limit, 0.5 * residual**2, limit * (size - 0.5 * limit)) / config.huber_delta


def conditional_deltas(forces: Tensor, delta: float) -> Tensor:
    """Delta of each atom's force components by the size of the labelled force in eV/Å: (n, 1)."""
    size = torch.linalg.vector_norm(forces, dim=1, keepdim=True)
    factor = torch.ones_like(size)
    for limit, value in ((100.0, 0.7), (200.0, 0.4), (300.0, 0.1)):
        factor = torch.where(size >= limit, value, factor)
    return delta * factor


def frame_weights(structures: Sequence[Structure], config: LossConfig) -> np.ndarray | None:
    """(n_structures,) how much each counts, 1 on average; None if all count alike.

    Raises:
        ValueError: a group that no structure is of, or all count nothing.
    """
    by_group = dict(config.group_weights or {})
    unknown = sorted(by_group.keys() - {s.group for s in structures}) if by_group else []
    if unknown:
        found = sorted({str(s.group) for s in structures if s.group is not None})
        raise ValueError(
            f"loss.group_weights names {', '.join(unknown)}, of which no training frame is. Their groups are {', '.join(found[:12]) or 'not known'}"
            f"{' ...' if len(found) > 12 else ''} (data.labels.group)."
        )
    weights = np.array([s.weight * by_group.get(s.group or "", 1.0) for s in structures])
    if not weights.any():
        raise ValueError("All training frames have weight 0 (data.labels.weight, loss.group_weights): there is nothing to learn from.")
    return None if (weights == weights[0]).all() else weights / weights.mean()


def loss_counts(graph: Graph, config: LossConfig) -> dict[str, int]:
    """Number of terms in the sum of penalties of each label with a weight."""
    counts = {}
    for name in config.weights():
        label = graph.labels[name]
        if name == "forces" and config.free_atoms_only:
            assert graph.free is not None
            label = label[graph.free]
        counts[name] = int((~label.isnan()).sum()) if name in graph.incomplete else label.numel()
    return counts


def loss_sums(prediction: Prediction, graph: Graph, config: LossConfig, spreads: Mapping[str, float] | None = None) -> dict[str, Tensor]:
    """Sum of penalties of each label with a weight; the caller divides (by the counts of all ranks, say).

    What a structure lacks (NaN) adds nothing, and has no gradient.

    Args:
        prediction: Of the batch; lone atoms that pad it count nothing.
        graph: With labels.
        config: Weights and penalties.
        spreads: Spread of each label in the training data; used if ``config.normalize``.
    """
    unit = dict(spreads or {}) if config.normalize else {}
    out = {}
    predictions, targets = prediction.values, graph.labels
    for name in config.weights():
        label = targets[name]
        residual = torch.where(label.isnan(), 0.0, predictions[name] - label)
        weights = graph.weights
        if weights is not None and QUANTITIES[name].per == "atom":
            weights = weights.index_select(0, graph.graph_index)
        delta: float | Tensor | None = None
        if name == "forces":
            if config.free_atoms_only:
                residual, label = residual[graph.free], label[graph.free]
                weights = None if weights is None else weights[graph.free]
            delta = conditional_deltas(label, config.huber_delta) if config.kind == "conditional_huber" else None
        elif name == "stress":
            delta = config.stress_huber_delta
        elif QUANTITIES[name].error_per_atom and (name != "energy" or config.energy_per_atom):
            residual = residual / graph.atoms_per_graph().reshape(-1, *[1] * (residual.ndim - 1))
        if QUANTITIES[name].per == "structure" and graph.n_padding:
            residual = residual[: -graph.n_padding]
        penalties = penalty(residual / unit.get(name, 1.0), config, delta)
        out[name] = (penalties if weights is None else weights.reshape(-1, *[1] * (penalties.ndim - 1)) * penalties).sum()
    return out
