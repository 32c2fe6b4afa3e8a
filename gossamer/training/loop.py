"""The training loop: read a batch, energy and forces, loss, backward, clip, step, average, log, validate, save.

Every step is a function one can call from a notebook; `run_training` strings them together. Killed at any step and
resumed, a run of a number of steps gives bitwise the same weights on the same device.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gossamer.data.dataset import Subset
from gossamer.data.structure import Structure
from gossamer.engine.engine import Engine
from gossamer.engine.memory import keep_freed_memory
from gossamer.evaluation import Evaluation, evaluate_potential
from gossamer.graph import Graph
from gossamer.models import MODELS
from gossamer.potential import Potential, PotentialConfig, Prediction
from gossamer.potential_file import model_settings
from gossamer.quantities import QUANTITIES
from gossamer.settings import build, settings, to_dict
from gossamer.signals import StopRequested
from gossamer.training.checkpoint import load_optimizer, optimizer_tensors, read_checkpoint, save_checkpoint
from gossamer.training.compiled import CompiledForward
from gossamer.training.loader import NeighborLists, epoch_batches, graphs
from gossamer.training.losses import LossConfig, loss_counts, loss_sums
from gossamer.training.optim import EMA, Clipper, Schedule, ScheduleConfig, make_optimizer, set_rate
from gossamer.training.process_group import ProcessGroup, shares
from gossamer.training.progress import Bar, Log
from gossamer.training.recorded import Gradients, RecordedGradients, RecordedUpdate

log = logging.getLogger(__name__)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TIMED_PARTS = 15
"""a run of a given time is validated this many times, or less often where validating takes long"""


@settings
class TrainingConfig:
    """How the weights are found."""

    steps: Annotated[int, Field(gt=0)] = 10_000
    """Optimiser steps; not used where ``minutes`` is given."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Train for this long instead of a number of steps: learning rate and average of the weights follow the clock and end with it.
    How many steps that makes depends on the machine and its load, so two such runs are not equal bit by bit."""
    clock: Literal["wall", "cpu"] = "wall"
    """What ``minutes`` counts: time on the wall, or CPU time of this process (where other jobs shall not count)."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Structures per step, over all processes."""
    batch_atoms: Annotated[int, Field(gt=0)] | None = None
    """At most this many atoms per step; whichever limit is reached first counts."""
    batch_edges: Annotated[int, Field(gt=0)] | None = None
    """At most this many edges (pairs within the cutoff, both directions) per step: they decide time and memory."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    """Largest learning rate, reached after the warm-up."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """"muon" makes the steps of weight matrices orthogonal and leaves the rest to AdamW: force errors a tenth to a half
    smaller after as many steps (benchmarks/accuracy). Learning rates are the same for both."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay of weight matrices; biases and element tables are never decayed."""
    amsgrad: bool = True
    """Use the AMSGrad variant (Reddi et al., arXiv:1904.09237) for what goes by AdamW, as LEIGNN's authors did."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate goes after the warm-up."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged weights, which are validated and saved; with ``minutes``, where the run is too short for it, an average over
    the last twentieth of the steps."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 10.0
    """Largest norm of the gradient; None does not clip."""
    zclip: Annotated[float, Field(gt=0)] | None = None
    """Also cut norms that lie this many standard deviations above their running mean (ZClip; Geodite: 2.5)."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the weights; energies are summed in float64 in any case."""
    device: str = "auto"
    """"auto" takes a GPU if there is one; else "cpu", "cuda", "cuda:1" ..."""
    seed: int = 0
    """Seed of the weights and of the order of the batches."""
    valid_every: Annotated[int, Field(gt=0)] = 500
    """Steps between validations, which also save a checkpoint; with ``minutes``, fifteen validations, fewer where they take long."""
    checkpoint_every: Annotated[int, Field(gt=0)] = 500
    """Steps between checkpoints; with ``minutes``, one is written at every validation and at least once a minute."""
    early_stopping: Annotated[int, Field(gt=0)] | None = None
    """Stop after this many validations without improvement; None never does."""
    compile: bool = False
    """Compile the training step (half a minute to two minutes once, then 2 to 4 times faster); checked against the plain one."""
    kernels: bool = True
    """Pass messages by kernels, on CPUs with a C++ compiler (built once, in seconds), on GPUs where faster; checked against the plain
    step."""
    cuda_graphs: bool = True
    """Record steps of small batches as CUDA graphs where there is a GPU; checked against the plain step."""
    reuse_memory: bool = True
    """Let this process keep large blocks of memory that it frees (a third of the time on Linux); concerns the whole process, as
    ``Calculator(reuse_memory=...)`` does."""
    uncertainty: bool = True
    """At the end measure how wrong the potential may be (docs/uncertainty.md), on training and validation frames: seconds."""
    timeout: Annotated[float, Field(gt=0)] = 30.0
    """Minutes after which processes under torchrun give up waiting for one that hangs."""
    tensorboard: bool = False
    """Also log to TensorBoard (needs the package tensorboard)."""
    wandb: bool = False
    """Also log to Weights & Biases (needs the package wandb)."""


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
        potential, loss.forces > 0, loss.stress > 0, compile=config.compile, kernels=config.kernels, timed=on_gpu and not recorded
    )

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


def train_step(state: State, graph: Graph, loss: LossConfig, config: TrainingConfig, group: ProcessGroup) -> float:
    """One optimiser step on one batch; returns the loss.

    Raises:
        FloatingPointError: the loss or the gradient is not finite (the weights are left as they were).
    """
    potential = state.potential
    if not potential.training:
        potential.train()
    progress = time_progress(state, config)
    set_rate(state.optimizer, state.schedule.rate(state.step, progress))
    own = list(loss_counts(graph, loss).values())
    counts = group.sum(torch.tensor(own, dtype=torch.float64, device=potential.device))
    found = state.differentiate(graph, counts)
    parameters: list[Tensor] = [p for p in potential.network.parameters() if p.requires_grad]
    for p, gradient in zip(parameters, found.gradients, strict=True):
        p.grad = gradient
    group.sum_gradients(parameters)
    norm = state.clipper.clip(parameters)
    sums = group.sum(torch.cat([found.loss[None], found.sums]))
    value, size, *penalties = torch.cat([sums[:1], norm.to(sums)[None], sums[1:]]).tolist()  # the one time that a GPU is waited for
    if not (math.isfinite(value) and math.isfinite(size)):
        raise FloatingPointError(f"loss {value}, gradient norm {size}")
    state.update()
    state.ema.update(progress)
    everywhere = own if group.world == 1 else counts.tolist()
    for name, penalty, count in zip(loss.weights(), penalties, everywhere, strict=True):
        totals = state.totals.setdefault(name, [0.0, 0.0])
        totals[0] += penalty
        totals[1] += count
    return float(value)


# --- how far the run is ---------------------------------------------------------------------------------------------


def time_progress(state: State, config: TrainingConfig) -> float | None:
    """Share of the run's time that has passed since the first step (0 to 1); None where steps count."""
    if config.minutes is None:
        return None
    left = 60 * config.minutes - state.first_seconds
    return min(1.0, (state.seconds - state.first_seconds) / left) if left > 0 else 1.0


def finished(state: State, config: TrainingConfig) -> bool:
    """Whether steps or time are used up, or validation has not improved for as long as the settings allow."""
    if config.early_stopping is not None and state.stale >= config.early_stopping:
        return True
    return state.step >= config.steps if config.minutes is None else state.seconds >= 60 * config.minutes


def validation_due(state: State, config: TrainingConfig) -> bool:
    """Whether to validate after this step; in a run of a given time, validation takes at most a fifth of it."""
    if config.minutes is None:
        return state.step % config.valid_every == 0
    return state.seconds - state.validated_at >= max(60 * config.minutes / TIMED_PARTS, 4 * state.valid_seconds)


def checkpoint_due(state: State, config: TrainingConfig, saved_at: float) -> bool:
    """Whether to write a checkpoint after this step; ``saved_at`` is what ``state.seconds`` was at the last one."""
    if config.minutes is None:
        return state.step % config.checkpoint_every == 0
    return state.seconds - saved_at >= min(60.0, 60 * config.minutes / TIMED_PARTS)


def validation_loss(evaluation: Evaluation, loss: LossConfig) -> float:
    """Weighted sum of mean absolute errors (eV/atom, eV/Å, eV/Å³): the number that picks the best weights."""
    errors = {name: evaluation.errors[name] for name in loss.weights()}
    return sum(loss.weights()[name] * e.mae / e.factor for name, e in errors.items() if e.count)


# --- checkpoints --------------------------------------------------------------------------------------------------


def save_state(state: State, path: Path, identity: dict[str, Any]) -> None:
    """Write a checkpoint; ``identity`` is compared when it is read back."""
    tensors = {f"network.{k}": v for k, v in state.potential.network.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in state.ema.module.network.state_dict().items()}
    tensors |= optimizer_tensors(state.optimizer)
    tensors["rng"] = torch.get_rng_state()
    scalars = {k: getattr(state, k) for k in SCALARS}
    extra = {"schedule": state.schedule.state(), "clipper": state.clipper.state(), "ema_updates": state.ema.updates, "identity": identity}
    save_checkpoint(path, tensors, {**scalars, **extra})


def load_state(state: State, path: Path, identity: dict[str, Any]) -> None:
    """Continue from a checkpoint.

    Raises:
        ValueError: it belongs to other settings or other data, or to an older version of the network.
    """
    tensors, stored = read_checkpoint(path)
    before = with_defaults(stored["identity"])
    differing = sorted(k for k in identity if before.get(k) != identity[k])
    if differing:
        raise ValueError(
            f"The checkpoint '{path}' belongs to another run: {', '.join(differing)} differ. Resume with the settings and data it was "
            "made with, or choose another folder (out)."
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
    for name in SCALARS:
        setattr(state, name, stored.get(name, getattr(state, name)))  # an older gossamer kept fewer
    state.schedule.load_state(stored["schedule"])
    state.clipper.load_state(stored["clipper"])
    state.ema.updates = stored["ema_updates"]


def with_defaults(identity: dict[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint, completed by the defaults of those that came later."""
    classes = {"training": TrainingConfig, "loss": LossConfig, "potential": PotentialConfig, "model": MODELS[identity["model"]["name"]][0]}
    identity = {**identity, "training": {"optimizer": "adamw", **identity["training"]}}  # before there was a choice
    identity["potential"] = {"zbl_radius": 0.8, **identity["potential"]}
    identity["model"] = model_settings(identity)
    return {k: to_dict(build(classes[k], v, k)) if k in classes else v for k, v in identity.items()}


# --- the loop -----------------------------------------------------------------------------------------------------


def run_training(
    state: State,
    train: Sequence[Structure],
    valid: Sequence[Structure],
    loss: LossConfig,
    config: TrainingConfig,
    group: ProcessGroup,
    folder: Path,
    identity: dict[str, Any],
    save_best: Callable[[Potential], None],
    progress: bool = True,
) -> State:
    """Train until ``config.steps`` or ``config.minutes``, early stopping or SIGTERM; checkpoints lie in ``folder``.

    Args:
        state: Fresh, or loaded from a checkpoint.
        train: Training structures.
        valid: Validation structures.
        loss: Loss.
        config: How to train.
        group: This process's place among the others.
        folder: Where the log and the checkpoint go.
        identity: What a checkpoint must share with the run that resumes it.
        save_best: Called with the averaged potential whenever validation improves.
        progress: Show a progress bar.

    Raises:
        RuntimeError: the loss became NaN or infinite; names step, structures and the last good checkpoint.
        ValueError: batches smaller than the number of processes.
    """
    checkpoint = folder / "checkpoint.safetensors"
    began = CLOCKS[config.clock]() - state.seconds
    lists = NeighborLists(state.potential)
    work = None if group.world == 1 and config.batch_edges is None else count_edges(lists, train, group)
    limits = batch_limits(train, config, work)
    logger = Log(folder, state.step, config.tensorboard, config.wandb) if group.rank == 0 else None
    first, saved_at, done = state.step, state.seconds, finished(state, config)

    def elapsed() -> float:  # where time decides, all processes go by the first one's
        seconds = CLOCKS[config.clock]() - began
        return seconds if config.minutes is None else group.broadcast(seconds)

    position = state.step if config.minutes is None else state.seconds
    bar = Bar(config.steps, config.minutes, logger.rows if logger else [], position, progress and group.rank == 0)
    with StopRequested() as stop, closing(logger) if logger else nullcontext(), bar:
        while not done:
            batches = shared_batches(len(train), state.epoch, config, group, limits, work)
            for graph in graphs(state.potential, train, batches[state.batch :], lists=lists):
                before = elapsed()
                checked_step(state, graph, loss, config, group, checkpoint)
                state.step, state.batch, state.seconds = state.step + 1, state.batch + 1, elapsed()
                if state.step == 1:
                    state.first_seconds = state.seconds
                if state.step > first + 1:  # the first one may compile
                    state.step_seconds, state.timed_steps = state.step_seconds + state.seconds - before, state.timed_steps + 1
                bar.show(state.step, state.seconds)
                done = finished(state, config)
                validated = done or validation_due(state, config)
                if validated:
                    row = validate(state, valid, loss, config, group, save_best)
                    state.valid_seconds, state.seconds = elapsed() - state.seconds, elapsed()
                    state.validated_at, done = state.seconds, finished(state, config)
                    if logger is not None:
                        logger.write(row)
                        bar.report()
                    elif group.world > 1:
                        log.info("step %d after %.1f s", state.step, state.seconds)
                stopping = stop.requested if group.world == 1 else group.any(stop.requested)
                if validated or stopping or checkpoint_due(state, config, saved_at):
                    saved_at = state.seconds
                    if group.rank == 0:
                        save_state(state, checkpoint, identity)
                if stopping and not done:
                    log.warning("SIGTERM: stopped at step %d; --resume goes on from '%s'", state.step, checkpoint)
                    return state
                if done:
                    break
            else:
                state.epoch, state.batch = state.epoch + 1, 0
    return state


def count_edges(lists: NeighborLists, train: Sequence[Structure], group: ProcessGroup) -> np.ndarray:
    """Edges of every structure, each process counting some: what decides time and memory."""
    counts = np.zeros(len(train))
    for k in range(group.rank, len(train), group.world):
        counts[k] = lists.of(k, train[k])[0].shape[1]
    return np.array(group.add_up(counts.tolist())) if group.world > 1 else counts


def batch_limits(train: Sequence[Structure], config: TrainingConfig, work: np.ndarray | None) -> list[tuple[np.ndarray, int]]:
    """For each limit of the settings: the sizes of all structures, and the largest sum of a batch; ``work``: their edges."""
    limits = []
    if config.batch_atoms is not None:
        limits.append((np.array([train[k].n_atoms for k in range(len(train))]), config.batch_atoms))
    if config.batch_edges is not None:
        assert work is not None
        limits.append((work, config.batch_edges))
    return limits


def shared_batches(
    n_train: int,
    epoch: int,
    config: TrainingConfig,
    group: ProcessGroup,
    limits: Sequence[tuple[np.ndarray, int]],
    work: np.ndarray | None = None,
) -> list[list[int]]:
    """This process's share of each batch of an epoch, about as much ``work`` (edges of each structure) as any other's.

    Raises:
        ValueError: no batch has a structure for every process.
    """
    batches = [b for b in epoch_batches(n_train, config.batch_size, config.seed, epoch, limits) if len(b) >= group.world]
    if not batches:
        raise ValueError(
            f"training.batch_size is {config.batch_size} for {group.world} processes and {n_train} training frames: "
            "no batch has a frame for every process. Raise training.batch_size, or start fewer processes."
        )
    if group.world == 1:
        return batches
    return [[b[k] for k in shares([1.0 if work is None else float(work[i]) for i in b], group.world)[group.rank]] for b in batches]


def checked_step(state: State, graph: Graph, loss: LossConfig, config: TrainingConfig, group: ProcessGroup, checkpoint: Path) -> None:
    """A training step, whose failure names the step, the structures and the checkpoint to go back to."""
    try:
        train_step(state, graph, loss, config, group)
    except FloatingPointError as error:
        last = f"'{checkpoint}'" if checkpoint.exists() else "none yet"
        raise RuntimeError(
            f"Training stopped at step {state.step}: {error}, on {', '.join(graph.names)}. Last good checkpoint: {last}. "
            "Look at these structures (gossamer data inspect), lower training.learning_rate or training.clip_norm."
        ) from None


def validate(
    state: State,
    valid: Sequence[Structure],
    loss: LossConfig,
    config: TrainingConfig,
    group: ProcessGroup,
    save_best: Callable[[Potential], None],
) -> dict[str, Any]:
    """Errors of the averaged weights; saves them if they are the best so far; returns a row of the log."""
    row: dict[str, Any] = {"step": state.step, "epoch": state.epoch, "learning_rate": float(state.optimizer.param_groups[0]["lr"])}
    evaluation = shared_evaluation(state, valid, group)
    metric = group.broadcast(validation_loss(evaluation, loss))
    row |= {
        f"valid_{name}_{kind}": value if errors.count else ""
        for name, errors in evaluation.errors.items()
        for kind, value in (("mae", errors.mae), ("rmse", errors.rmse))
    }
    state.schedule.observe(metric)
    if metric < state.best:
        state.best, state.stale = metric, 0
        if group.rank == 0:
            save_best(state.ema.module)
    else:
        state.stale += 1
    train_loss = sum(loss.weights()[k] * total / count for k, (total, count) in state.totals.items() if count)
    state.totals = {k: [0.0, 0.0] for k in QUANTITIES}
    row |= {"seconds": round(state.seconds, 3), "train_loss": train_loss, "valid_loss": metric}
    return row


def shared_evaluation(state: State, valid: Sequence[Structure], group: ProcessGroup) -> Evaluation:
    """Errors of the averaged weights on validation structures, of which each process takes some."""
    alone = group.world == 1 or len(valid) < group.world
    part = valid if alone else Subset(valid, range(group.rank, len(valid), group.world))
    evaluation = evaluate_potential(state.ema.module, part, keep=0, run=state.averaged)
    if not alone:
        for errors in evaluation.errors.values():
            errors.absolute, errors.squared, count = group.add_up([errors.absolute, errors.squared, errors.count])
            errors.count = int(count)
    return evaluation
