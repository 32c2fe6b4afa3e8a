"""All that a training run carries from one step to the next: made, saved, and read back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.engine.engine import Engine
from gossamer.engine.memory import keep_freed_memory
from gossamer.graph import Graph
from gossamer.models import MODELS
from gossamer.potential import Potential, PotentialConfig, Prediction
from gossamer.potential_file import model_settings
from gossamer.quantities import QUANTITIES
from gossamer.settings import build, to_dict
from gossamer.training.checkpoint import load_optimizer, optimizer_tensors, read_checkpoint, save_checkpoint
from gossamer.training.compiled import CompiledForward
from gossamer.training.config import TrainingConfig
from gossamer.training.losses import LossConfig, loss_sums
from gossamer.training.optim import EMA, Clipper, Schedule, make_optimizer
from gossamer.training.recorded import Gradients, RecordedGradients, RecordedUpdate


@dataclass
class State:
    """All that a training run carries from one step to the next."""

    potential: Potential
    ema: EMA
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    clipper: Clipper
    forward: CompiledForward
    """energies, forces and stress of a batch: plain, with kernels, or compiled"""
    differentiate: Callable[[Graph, Tensor], Gradients]
    """loss and gradients of a batch by it, or recorded"""
    update: Callable[[], None]
    """the optimiser's step"""
    averaged: Engine
    """evaluates the averaged weights"""
    step: int = 0
    epoch: int = 0
    batch: int = 0
    """batches of this epoch already used"""
    epochs: float = 0.0
    """both as one number"""
    best: float = math.inf
    stale: int = 0
    """validations since the best one"""
    seconds: float = 0.0
    """of the whole run so far, by the clock of the settings: data, steps, validation"""
    first_seconds: float = 0.0
    """of these, up to the end of the first step, which compiles"""
    step_seconds: float = 0.0
    """of these, in steps, without the first one after a start"""
    timed_steps: int = 0
    """how many steps these were"""
    validated_at: float = 0.0
    """``seconds`` after the last validation"""
    valid_seconds: float = 0.0
    """how long it took"""
    totals: dict[str, list[float]] = field(default_factory=lambda: {k: [0.0, 0.0] for k in QUANTITIES})
    """penalty sums and counts since the last log row"""


SCALARS = (
    "step",
    "epoch",
    "batch",
    "epochs",
    "best",
    "stale",
    "seconds",
    "first_seconds",
    "step_seconds",
    "timed_steps",
    "validated_at",
    "valid_seconds",
    "totals",
)
"""what a checkpoint holds of the state as plain numbers"""


def make_state(potential: Potential, config: TrainingConfig, loss: LossConfig) -> State:
    """A fresh state around a potential."""
    if config.reuse_memory:
        keep_freed_memory()
    optimizer = make_optimizer(potential.network, config.optimizer, config.learning_rate, config.weight_decay, config.amsgrad)
    schedule = Schedule(config.schedule, config.learning_rate, config.steps)
    ema = EMA(potential, config.ema_decay)
    forward, differentiate, update = make_steps(potential, optimizer, config, loss)
    return State(
        potential=potential,
        ema=ema,
        averaged=Engine(ema.module, "auto" if config.kernels else "plain", weights_change=True),
        optimizer=optimizer,
        schedule=schedule,
        clipper=Clipper(config.clip_norm, config.zclip),
        forward=forward,
        differentiate=differentiate,
        update=update,
    )


def make_steps(
    potential: Potential, optimizer: torch.optim.Optimizer, config: TrainingConfig, loss: LossConfig
) -> tuple[CompiledForward, Callable[[Graph, Tensor], Gradients], Callable[[], None]]:
    """How predictions of a batch come about, loss and gradients, and the optimiser's step."""
    parameters = [p for p in potential.network.parameters() if p.requires_grad]
    on_gpu = potential.device.type == "cuda"
    recorded = config.cuda_graphs and on_gpu and not (loss.extras or loss.free_atoms_only or potential.long_ranged)
    forward = CompiledForward(
        potential, loss.forces > 0, loss.stress > 0, compile=config.compile, kernels=config.kernels, timed=on_gpu and not recorded,
        single=config.batch_size == 1,
    )  # fmt: skip

    def way(predict: Callable[[Graph], Prediction]) -> Callable[[Graph, Tensor], Gradients]:
        return lambda graph, counts: gradients(predict(graph), graph, counts, loss, potential.statistics.spreads, parameters)

    if not recorded:
        return forward, way(forward), optimizer.step
    differentiate = RecordedGradients([way(forward), way(forward.plain)], potential.cutoff, potential.dtype)
    return forward, differentiate, RecordedUpdate(optimizer, parameters, potential.dtype)


def gradients(
    prediction: Prediction, graph: Graph, counts: Tensor, loss: LossConfig, spreads: Mapping[str, float] | None, parameters: list[Tensor]
) -> Gradients:
    """The loss of a batch, this process's share of it, and how it changes with the weights.

    Args:
        prediction: Of the batch.
        graph: With labels.
        counts: (n_quantities,) terms in each sum of penalties, over all processes.
        loss: Weights and penalties.
        spreads: As for ``loss_sums``.
        parameters: What is differentiated by.
    """
    sums = torch.stack(list(loss_sums(prediction, graph, loss, spreads).values()))
    total = torch.stack([weight * value for weight, value in zip(loss.weights().values(), sums / counts.clamp(min=1), strict=True)]).sum()
    return Gradients(total.detach(), sums.detach(), list(torch.autograd.grad(total, parameters, allow_unused=True)))


def state_tensors(state: State) -> dict[str, Tensor]:
    """Weights, averaged weights and what the optimiser keeps, by the names they have in a checkpoint."""
    tensors = {f"network.{k}": v for k, v in state.potential.network.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in state.ema.module.network.state_dict().items()}
    return tensors | optimizer_tensors(state.optimizer)


def save_state(state: State, path: Path, identity: dict[str, Any]) -> None:
    """Write a checkpoint; ``identity`` is compared when it is read back."""
    tensors = {**state_tensors(state), "rng": torch.get_rng_state()}
    if state.potential.device.type == "cuda":  # dropout draws there
        tensors["rng_cuda"] = torch.cuda.get_rng_state(state.potential.device)
    scalars = {k: getattr(state, k) for k in SCALARS}
    extra = {"schedule": state.schedule.state(), "clipper": state.clipper.state(), "ema_updates": state.ema.updates, "identity": identity}
    save_checkpoint(path, tensors, {**scalars, **extra})


def load_state(state: State, path: Path, identity: dict[str, Any]) -> None:
    """Continue from a checkpoint.

    Raises:
        ValueError: it belongs to other settings or other data, or to an older version of the network.
    """
    tensors, stored = read_checkpoint(path)
    if found := differing(with_defaults(stored["identity"]), identity):
        raise ValueError(
            f"The checkpoint '{path}' belongs to another run: {', '.join(found)}. Resume with the settings and data it was made with, or choose "
            "another folder (out); to train longer, start from its potential.safetensors (finetune.start, of gossamer fit --start)."
        )
    weights = {k[8:]: v for k, v in tensors.items() if k.startswith("network.")}
    if weights.keys() != state.potential.network.state_dict().keys():  # the optimiser's state would go to the wrong ones
        raise ValueError(
            f"The checkpoint '{path}' was written by an older gossamer, whose network named its weights otherwise. Finish the run with "
            "that version, or fine-tune its potential.safetensors (finetune.start), which this one reads."
        )
    state.potential.network.load_state_dict(weights)
    state.ema.module.network.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")})
    load_optimizer(state.optimizer, tensors)
    torch.set_rng_state(tensors["rng"])
    if state.potential.device.type == "cuda" and "rng_cuda" in tensors:  # a checkpoint of a CPU, or of an older gossamer, has none
        torch.cuda.set_rng_state(tensors["rng_cuda"], state.potential.device)
    for name in SCALARS:
        setattr(state, name, stored.get(name, getattr(state, name)))  # an older gossamer kept fewer
    state.schedule.load_state(stored["schedule"])
    state.clipper.load_state(stored["clipper"])
    state.ema.updates = stored["ema_updates"]


FREE = (
    "num_workers", "timeout", "tensorboard", "wandb", "device", "checkpoint_every", "uncertainty", "reuse_memory", "compile", "kernels",
    "cuda_graphs",
)  # fmt: skip
"""training settings that change no number, or by rounding alone: a run may go on with others"""
LATER = ("elements", "reference_energies", "training_frames", "validation_frames")
"""what checkpoints of an older gossamer do not say of a run: they go on without"""
PLACES = ("start", "replay", "replay_labels")
"""settings of fine-tuning that say where something lies: a checksum and the training frames say what it is"""


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What decides the numbers of a run and is not the same in both identities, as a checkpoint and this run have them, in words."""
    now = {k: v for k, v in now.items() if k in before or k not in LATER}
    named = "training_frames" in now
    before, now = decisive(before, named), decisive(now, named)
    found = []
    for key in sorted(k for k in now if before.get(k) != now[k] and not (k == "reference_energies" and close(before[k], now[k]))):
        old, new = before.get(key), now[key]
        if key in ("model", "potential", "loss", "training") and old is not None:
            found += [f"{key}.{k} is {old.get(k)} (now {new.get(k)})" for k in {**old, **new} if old.get(k) != new.get(k)]
        else:
            found.append(f"other {key.replace('_', ' ')}")
    return found


def decisive(identity: dict[str, Any], named: bool = True) -> dict[str, Any]:
    """What decides the numbers of a run; ``named``: training frames are known by all that they are, so that they may lie elsewhere."""
    out = {**identity, "training": {k: v for k, v in identity["training"].items() if k not in FREE}}
    if named:
        out.pop("data")  # part of the training frames
        if "finetune" in out:
            out["finetune"] = {k: v for k, v in out["finetune"].items() if k not in PLACES}
    return out


def close(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Whether numbers of eV by name are the same but for rounding, which is another on another machine."""
    return before.keys() == now.keys() and all(math.isclose(before[e], now[e], rel_tol=1e-6, abs_tol=1e-3) for e in now)


def with_defaults(identity: dict[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint, completed by the defaults of those that came later."""
    classes = {"training": TrainingConfig, "loss": LossConfig, "potential": PotentialConfig, "model": MODELS[identity["model"]["name"]][0]}
    identity = {**identity, "training": {"optimizer": "adamw", **identity["training"]}}  # before there was a choice
    identity["potential"] = {"zbl_radius": 0.8, **identity["potential"]}
    identity["model"] = model_settings(identity)
    return {k: to_dict(build(classes[k], v, k)) if k in classes else v for k, v in identity.items()}
