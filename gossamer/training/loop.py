"""The training loop: read a batch, energy and forces, loss, backward, clip, step, average, log, validate, save.

Every step is a function one can call from a notebook; `run_training` strings them together. Killed at any step and
resumed, a run gives bitwise the same weights on the same device.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from gossamer.data.structure import Structure
from gossamer.engine.engine import Engine
from gossamer.engine.memory import keep_freed_memory
from gossamer.evaluation import Evaluation, evaluate_potential
from gossamer.files import write_text
from gossamer.graph import Graph
from gossamer.potential import Potential
from gossamer.quantities import QUANTITIES
from gossamer.settings import settings
from gossamer.training.checkpoint import load_optimizer, optimizer_tensors, read_checkpoint, save_checkpoint
from gossamer.training.compiled import CompiledForward
from gossamer.training.loader import edge_counts, epoch_batches, graphs
from gossamer.training.losses import LossConfig, loss_sums
from gossamer.training.optim import EMA, Clipper, Schedule, ScheduleConfig, make_optimizer
from gossamer.training.process_group import ProcessGroup

log = logging.getLogger(__name__)


@settings
class TrainingConfig:
    """How the weights are found."""

    steps: Annotated[int, Field(gt=0)] = 10_000
    """Optimiser steps."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Structures per step, over all processes."""
    batch_atoms: Annotated[int, Field(gt=0)] | None = None
    """At most this many atoms per step; whichever limit is reached first counts."""
    batch_edges: Annotated[int, Field(gt=0)] | None = None
    """At most this many edges (pairs within the cutoff, both directions) per step: they decide time and memory."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    """Largest learning rate, reached after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decay of weight matrices (AdamW); biases and element tables are never decayed."""
    amsgrad: bool = True
    """Use the AMSGrad variant of AdamW, as the paper did."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate goes after the warm-up."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged weights, which are validated and saved."""
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
    """Steps between validations, which also save a checkpoint."""
    checkpoint_every: Annotated[int, Field(gt=0)] = 500
    """Steps between checkpoints."""
    early_stopping: Annotated[int, Field(gt=0)] | None = None
    """Stop after this many validations without improvement; None never does."""
    compile: bool = False
    """Compile the training step (half a minute to two minutes once, then 2 to 4 times faster); checked against the plain one."""
    kernels: bool = True
    """Pass messages by kernels, on CPUs with a C++ compiler (built once, in seconds), on GPUs where faster; checked against the plain step."""
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
    totals: dict[str, list[float]] = field(default_factory=lambda: {k: [0.0, 0.0] for k in QUANTITIES})
    """penalty sums and counts since the last log row"""


def make_state(potential: Potential, config: TrainingConfig, loss: LossConfig) -> State:
    """A fresh state around a potential."""
    keep_freed_memory()
    optimizer = make_optimizer(potential.network, config.learning_rate, config.weight_decay, config.amsgrad)
    schedule = Schedule(config.schedule, config.learning_rate, config.steps)
    forward = CompiledForward(potential, loss.forces > 0, loss.stress > 0, compile=config.compile, kernels=config.kernels)
    ema = EMA(potential, config.ema_decay)
    return State(
        potential=potential,
        ema=ema,
        averaged=Engine(ema.module, "auto" if config.kernels else "plain", weights_change=True),
        optimizer=optimizer,
        schedule=schedule,
        clipper=Clipper(config.clip_norm, config.zclip),
        forward=forward,
    )


def train_step(state: State, graph: Graph, loss: LossConfig, config: TrainingConfig, workers: ProcessGroup) -> float:
    """One optimiser step on one batch; returns the loss.

    Raises:
        FloatingPointError: the loss or the gradient is not finite (the weights are left as they were).
    """
    potential = state.potential
    if not potential.training:
        potential.train()
    for group in state.optimizer.param_groups:
        group["lr"] = state.schedule.rate(state.step)
    prediction = state.forward(graph)
    sums = loss_sums(prediction, graph, loss, potential.statistics.spreads)
    counts = workers.sum(torch.tensor([float(n) for _, n in sums.values()], dtype=torch.float64, device=potential.device))
    weights = loss.weights()
    parts = [weights[name] * value / count.clamp(min=1) for (name, (value, _)), count in zip(sums.items(), counts, strict=True)]
    total = torch.stack(parts).sum()
    state.optimizer.zero_grad(set_to_none=True)
    parameters: list[Tensor] = [p for p in potential.network.parameters() if p.requires_grad]
    total.backward(inputs=parameters)  # and not into the edge vectors
    workers.sum_gradients(parameters)
    norm = state.clipper.clip(parameters)
    value = float(workers.sum(total.detach().clone()))
    if not (math.isfinite(value) and math.isfinite(float(norm))):
        raise FloatingPointError(f"loss {value}, gradient norm {float(norm)}")
    state.optimizer.step()
    state.ema.update()
    for (name, (penalties, _)), count in zip(sums.items(), counts.tolist(), strict=True):
        totals = state.totals.setdefault(name, [0.0, 0.0])
        totals[0] += float(workers.sum(penalties.detach().clone()))
        totals[1] += count
    return value


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
    scalars = {k: getattr(state, k) for k in ("step", "epoch", "batch", "best", "stale", "seconds", "totals")}
    extra = {"schedule": state.schedule.state(), "clipper": state.clipper.state(), "ema_updates": state.ema.updates, "identity": identity}
    save_checkpoint(path, tensors, {**scalars, **extra})


def load_state(state: State, path: Path, identity: dict[str, Any]) -> None:
    """Continue from a checkpoint.

    Raises:
        ValueError: it belongs to other settings or other data.
    """
    tensors, stored = read_checkpoint(path)
    differing = sorted(k for k in identity if stored["identity"].get(k) != identity[k])
    if differing:
        raise ValueError(
            f"The checkpoint '{path}' belongs to another run: {', '.join(differing)} differ. Resume with the settings and data it was "
            "made with, or choose another folder (out)."
        )
    state.potential.network.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("network.")})
    state.ema.module.network.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("ema.")})
    load_optimizer(state.optimizer, tensors)
    torch.set_rng_state(tensors["rng"])
    for name in ("step", "epoch", "batch", "best", "stale", "seconds", "totals"):
        setattr(state, name, stored[name])
    state.schedule.load_state(stored["schedule"])
    state.clipper.load_state(stored["clipper"])
    state.ema.updates = stored["ema_updates"]


# --- logging ------------------------------------------------------------------------------------------------------


def columns() -> list[str]:
    """Names of the log's columns."""
    errors = [f"valid_{name}_{kind}" for name in QUANTITIES for kind in ("mae", "rmse")]
    return ["step", "epoch", "learning_rate", "seconds", "train_loss", "valid_loss", *errors]


class Log:
    """A CSV file always; TensorBoard and Weights & Biases if asked for."""

    def __init__(self, folder: Path, config: TrainingConfig, step: int) -> None:
        self.path = folder / "log.csv"
        self.writers: list[Callable[[dict[str, Any]], None]] = []
        rows = []
        if step > 0 and self.path.exists():  # drop rows of steps that are about to be repeated
            with open(self.path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns())
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ImportError("training.tensorboard needs the package tensorboard: pip install tensorboard") from None
            board = SummaryWriter(str(folder / "tensorboard"))

            def to_board(row: dict[str, Any]) -> None:
                for key, value in row.items():
                    if value != "":
                        board.add_scalar(key, value, row["step"])

            self.writers.append(to_board)
        if config.wandb:
            try:
                import wandb
            except ImportError:
                raise ImportError("training.wandb needs the package wandb: pip install wandb") from None
            run = wandb.init(project="gossamer", dir=str(folder))
            self.writers.append(lambda row: run.log(row, step=row["step"]))

    def write(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, columns()).writerow(row)
            file.flush()
        for writer in self.writers:
            writer(row)


# --- the loop -----------------------------------------------------------------------------------------------------


def run_training(
    state: State,
    train: Sequence[Structure],
    valid: Sequence[Structure],
    loss: LossConfig,
    config: TrainingConfig,
    workers: ProcessGroup,
    folder: Path,
    identity: dict[str, Any],
    save_best: Callable[[Potential], None],
    progress: bool = True,
) -> State:
    """Train until ``config.steps``, early stopping or SIGTERM; checkpoints lie in ``folder``.

    Args:
        state: Fresh, or loaded from a checkpoint.
        train: Training structures.
        valid: Validation structures.
        loss: Loss.
        config: How to train.
        workers: This process's place among the others.
        folder: Where the log and the checkpoint go.
        identity: What a checkpoint must share with the run that resumes it.
        save_best: Called with the averaged potential whenever validation improves.
        progress: Show a progress bar.

    Raises:
        RuntimeError: the loss became NaN or infinite; names step, structures and the last good checkpoint.
    """
    checkpoint = folder / "checkpoint.safetensors"
    limits = []
    if config.batch_atoms is not None:
        limits.append((np.array([train[k].n_atoms for k in range(len(train))]), config.batch_atoms))
    if config.batch_edges is not None:
        limits.append((edge_counts(train, state.potential.cutoff, state.potential.max_neighbors), config.batch_edges))
    logger = Log(folder, config, state.step) if workers.rank == 0 else None
    stop = _StopOnSignal()
    bar = tqdm(total=config.steps, initial=state.step, unit="step", disable=quiet(progress and workers.rank == 0), dynamic_ncols=True)
    done = state.step >= config.steps or stopped_early(state, config)
    with stop, bar:
        while not done:
            batches = epoch_batches(len(train), config.batch_size, config.seed, state.epoch, limits)
            mine = [b[workers.rank :: workers.world] for b in batches if len(b) >= workers.world]
            if not mine:
                raise ValueError(
                    f"training.batch_size is {config.batch_size} for {workers.world} processes and {len(train)} training frames: "
                    "no batch has a frame for every process. Raise training.batch_size, or start fewer processes."
                )
            for graph in graphs(state.potential, train, mine[state.batch :]):
                began = time.perf_counter()
                try:
                    train_step(state, graph, loss, config, workers)
                except FloatingPointError as error:
                    last = f"'{checkpoint}'" if checkpoint.exists() else "none yet"
                    raise RuntimeError(
                        f"Training stopped at step {state.step}: {error}, on {', '.join(graph.names)}. Last good checkpoint: {last}. "
                        "Look at these structures (gossamer data inspect), lower training.learning_rate or training.clip_norm."
                    ) from None
                state.step += 1
                state.batch += 1
                state.seconds += time.perf_counter() - began
                bar.update()
                done = state.step >= config.steps
                if state.step % config.valid_every == 0 or done:
                    row = validate(state, valid, loss, config, workers, save_best)
                    done = done or stopped_early(state, config)
                    if logger is not None:
                        logger.write(row)
                        bar.set_postfix_str(_brief(row))
                        if bar.disable:  # no terminal: a line now and then instead of a bar
                            log.info("step %d of %d: %s", state.step, config.steps, _brief(row))
                stopping = stop.requested if workers.world == 1 else workers.any(stop.requested)
                if (state.step % config.checkpoint_every == 0 or done or stopping) and workers.rank == 0:
                    save_state(state, checkpoint, identity)
                if stopping:
                    log.warning("stopped by a signal at step %d; resume goes on from '%s'", state.step, checkpoint)
                    return state
                if done:
                    break
            else:
                state.epoch, state.batch = state.epoch + 1, 0
    return state


def stopped_early(state: State, config: TrainingConfig) -> bool:
    """Whether validation has not improved for as long as the settings allow."""
    return config.early_stopping is not None and state.stale >= config.early_stopping


def validate(
    state: State,
    valid: Sequence[Structure],
    loss: LossConfig,
    config: TrainingConfig,
    workers: ProcessGroup,
    save_best: Callable[[Potential], None],
) -> dict[str, Any]:
    """Errors of the averaged weights; saves them if they are the best so far; returns a row of the log."""
    row: dict[str, Any] = {"step": state.step, "epoch": state.epoch, "learning_rate": state.schedule.rate(state.step - 1)}
    metric = math.inf
    if workers.rank == 0:
        evaluation = evaluate_potential(state.ema.module, valid, keep=0, run=state.averaged)
        metric = validation_loss(evaluation, loss)
        row |= {
            f"valid_{name}_{kind}": value if errors.count else ""
            for name, errors in evaluation.errors.items()
            for kind, value in (("mae", errors.mae), ("rmse", errors.rmse))
        }
    metric = workers.broadcast(metric)
    state.schedule.observe(metric)
    if metric < state.best:
        state.best, state.stale = metric, 0
        if workers.rank == 0:
            save_best(state.ema.module)
    else:
        state.stale += 1
    train_loss = sum(loss.weights()[k] * total / count for k, (total, count) in state.totals.items() if count)
    state.totals = {k: [0.0, 0.0] for k in QUANTITIES}
    row |= {"seconds": round(state.seconds, 3), "train_loss": train_loss, "valid_loss": metric}
    return row


def quiet(progress: bool) -> bool | None:
    """What tqdm's ``disable`` should be: None shows the bar on a terminal only."""
    return None if progress else True


def _brief(row: dict[str, Any]) -> str:
    parts = [("E", "valid_energy_mae", "meV/atom"), ("F", "valid_forces_mae", "meV/Å"), ("S", "valid_stress_mae", "meV/Å³")]
    return "  ".join(f"{s} {row[k]:.2f} {unit}" for s, k, unit in parts if row.get(k, "") != "")


class _StopOnSignal:
    """Notes SIGTERM instead of dying of it, while the loop runs (in the main thread)."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> None:
        try:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # not the main thread: signals are someone else's business
            self._previous = None

    def _note(self, *_: object) -> None:
        self.requested = True

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
