"""Optimiser, learning-rate schedules, exponential moving average."""

from __future__ import annotations

import copy
import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gossamer.settings import settings
from gossamer.training.muon import Muon
from gossamer.training.soap import Soap


@settings
class ScheduleConfig:
    """Learning-rate schedule: a linear warm-up, then one of four shapes."""

    kind: Literal["cosine", "linear", "constant", "plateau"] = "cosine"
    """"plateau" multiplies by ``factor`` when validation has not improved ``patience`` times in a row."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps over which the rate rises linearly; with training.minutes, at most a tenth of the time."""
    initial: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Rate before the first of them, as a fraction of ``learning_rate``."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Rate at the end (or lowest rate of the plateau schedule), as a fraction of ``learning_rate``."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Of the plateau schedule."""
    patience: Annotated[int, Field(ge=0)] = 5
    """Of the plateau schedule, in validations."""


class Schedule:
    """Learning rate as a function of the step, or of the time; the plateau kind also listens to validation."""

    def __init__(self, config: ScheduleConfig, learning_rate: float, total_steps: int) -> None:
        self.config, self.base, self.total = config, learning_rate, total_steps
        self.scale, self.best, self.bad = 1.0, math.inf, 0

    def rate(self, step: int, progress: float | None = None) -> float:
        """Learning rate of a step.

        Args:
            step: Counted from 0.
            progress: In a run of a given time, the share of it that has passed (0 to 1); None where steps decide.
        """
        c = self.config
        if progress is not None:
            rise = min(1.0, max((step + 1) / max(1, c.warmup_steps), progress / 0.1))
            return self.base * (c.initial + (1 - c.initial) * rise) * self._shape(progress)
        if step < c.warmup_steps:
            return self.base * (c.initial + (1 - c.initial) * (step + 1) / c.warmup_steps)
        return self.base * self._shape(min(1.0, (step - c.warmup_steps) / max(1, self.total - c.warmup_steps)))

    def _shape(self, progress: float) -> float:
        """Rate over the largest one."""
        c = self.config
        if c.kind == "cosine":
            return c.final + (1 - c.final) * 0.5 * (1 + math.cos(math.pi * progress))
        if c.kind == "linear":
            return 1 - (1 - c.final) * progress
        return self.scale

    def observe(self, metric: float) -> None:
        """Tell the validation metric (smaller is better)."""
        if metric < self.best:
            self.best, self.bad = metric, 0
            return
        self.bad += 1
        if self.config.kind == "plateau" and self.bad > self.config.patience:
            self.scale, self.bad = max(self.scale * self.config.factor, self.config.final), 0

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "best": self.best, "bad": self.bad}

    def load_state(self, state: dict[str, Any]) -> None:
        self.scale, self.best, self.bad = state["scale"], state["best"], state["bad"]


class EMA:
    """Exponential moving average of the weights, decay min(d, (1 + n) / (10 + n)) at update n."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module: Any = copy.deepcopy(module).requires_grad_(False)
        self.decay, self.updates = decay, 0
        self._pairs = [(a.data, b) for a, b in zip(self.module.parameters(), module.parameters(), strict=True)]

    @torch.no_grad()
    def update(self, progress: float | None = None) -> None:
        """Move towards the weights as they are.

        Args:
            progress: In a run of a given time, the share of it that has passed: the average is then never longer than a
                twentieth of the steps that the whole run will have taken.
        """
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if progress is not None:
            decay = min(decay, max(0.0, 1 - 20 * progress / self.updates))
        averaged = [a for a, _ in self._pairs]
        torch._foreach_lerp_(averaged, [b.data for _, b in self._pairs], 1 - decay)


def make_optimizer(
    module: nn.Module, kind: Literal["soap", "muon", "adamw"], learning_rate: float, weight_decay: float, amsgrad: bool
) -> torch.optim.Optimizer:
    """SOAP, Muon or AdamW; no weight decay on biases, one-dimensional parameters and element tables."""
    if kind != "adamw":
        return (Soap if kind == "soap" else Muon)(module, learning_rate, weight_decay, amsgrad)
    tables = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    trainable = [p for p in module.parameters() if p.requires_grad]
    plain = [p for p in trainable if p.dim() < 2 or id(p) in tables]
    decayed = [p for p in trainable if not (p.dim() < 2 or id(p) in tables)]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, amsgrad=amsgrad, foreach=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate; where it is a tensor, of a recorded step, in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class Clipper:
    """Limits the norm of the gradient: to a fixed value, and to what is usual (ZClip, Kumar et al., arXiv:2504.02507).

    With running mean μ and standard deviation σ of the norm, a norm g with z = (g - μ) / σ above ``z_score`` is cut to
    μ + z_score² σ / z. The first 25 norms only start the averages.
    """

    WARMUP = 25
    DECAY = 0.97

    def __init__(self, max_norm: float | None, z_score: float | None) -> None:
        self.max_norm, self.z_score = max_norm, z_score
        self.mean = self.variance = 0.0
        self.first: list[float] = []

    def limit(self, norm: float) -> float:
        """Largest norm allowed now; remembers the (cut) norm."""
        allowed = math.inf if self.max_norm is None else self.max_norm
        if self.z_score is None or not math.isfinite(norm):
            return allowed
        if len(self.first) < self.WARMUP:
            self.first.append(min(norm, allowed))
            self.mean = sum(self.first) / len(self.first)
            self.variance = sum((g - self.mean) ** 2 for g in self.first) / len(self.first)
            return allowed
        spread = math.sqrt(self.variance)
        z = (norm - self.mean) / max(spread, 1e-12)
        if z > self.z_score:
            allowed = min(allowed, self.mean + self.z_score**2 * spread / z)
        kept = min(norm, allowed)
        self.variance = self.DECAY * self.variance + (1 - self.DECAY) * (kept - self.mean) ** 2
        self.mean = self.DECAY * self.mean + (1 - self.DECAY) * kept
        return allowed

    def clip(self, parameters: list[Tensor]) -> Tensor:
        """Scale the gradients so that their joint norm is within the limit; returns the norm before."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.max_norm is not None or self.z_score is not None:
            allowed = self.max_norm if self.z_score is None else self.limit(float(norm))
            if allowed is not None and math.isfinite(allowed):
                torch.nn.utils.clip_grads_with_norm_(parameters, allowed, norm)
        return norm

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean, "variance": self.variance, "first": self.first}

    def load_state(self, state: dict[str, Any]) -> None:
        self.mean, self.variance, self.first = state["mean"], state["variance"], list(state["first"])
