"""The training loop: read a batch, energy and forces, loss, backward, clip, step, average, log, validate, save.

Every step is a function one can call from a notebook; `run_training` strings them together. Killed at any step and
resumed, a run of a number of steps gives bitwise the same weights on the same device.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.data.dataset import LoneStresses, Subset
from gossamer.data.structure import Structure
from gossamer.evaluation import Evaluation, evaluate_potential
from gossamer.files import atomic_path
from gossamer.graph import Graph
from gossamer.potential import Potential
from gossamer.quantities import QUANTITIES
from gossamer.signals import StopRequested
from gossamer.timing import cpu_seconds
from gossamer.training.config import TrainingConfig
from gossamer.training.loader import Loader, epoch_batches
from gossamer.training.losses import LossConfig, frame_weights, loss_counts
from gossamer.training.optim import set_rate
from gossamer.training.process_group import ProcessGroup, shares
from gossamer.training.progress import Bar, Log
from gossamer.training.recorded import Gradients
from gossamer.training.state import State, make_state, save_state, state_tensors  # noqa: F401 - make_state is for loops of your own, beside train_step

log = logging.getLogger(__name__)
CHECKPOINT = "checkpoint.safetensors"
CLOCKS = {"wall": time.perf_counter, "cpu": cpu_seconds}
TIMED_PARTS = 15
"""a run of a given time is validated this many times, or less often where validating takes long"""
MANY = 20_000
"""structures from which their numbers of edges are kept for a run that goes on"""
WAITING = 0.2
"""share of the time that goes into waiting for batches from which the log says so"""
DRIFT = 1e-3
"""of a tensor's largest value, by which processes may differ between two validations without a warning"""


def train_step(state: State, graph: Graph | None, loss: LossConfig, config: TrainingConfig, group: ProcessGroup) -> float:
    """One optimiser step on one batch, of which this process has a share (None: the others have it all); returns the loss.

    Raises:
        FloatingPointError: the loss or the gradient is not finite (the weights are left as they were).
    """
    potential = state.potential
    if not potential.training:
        potential.train()
    progress = time_progress(state, config)
    set_rate(state.optimizer, state.schedule.rate(state.step, progress))
    parameters: list[Tensor] = [p for p in potential.network.parameters() if p.requires_grad]
    graph = None if graph is None else graph.with_places(loss.needed())
    own = [0] * len(loss.weights()) if graph is None else list(loss_counts(graph, loss).values())
    counts = group.sum(torch.tensor(own, dtype=torch.float64, device=potential.device))
    if graph is None:
        found = Gradients(torch.zeros_like(counts).sum(), torch.zeros_like(counts), [None] * len(parameters))
    else:
        found = state.differentiate(graph, counts)
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
    if state.seconds + state.valid_seconds >= 60 * config.minutes:  # the learning rate comes down first; the last validation follows
        return False
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
    checkpoint = folder / CHECKPOINT
    began = CLOCKS[config.clock]() - state.seconds
    labelled = LoneStresses(train, state.potential.cutoff) if loss.stress > 0 else train
    loader = Loader(state.potential, labelled, config.num_workers, frame_weights(train, loss))
    work = None if group.world == 1 and config.batch_edges is None else count_edges(loader, group, folder, identity)
    limits = batch_limits(train, config, work)
    state.forward.single = mostly_single(shared_batches(len(train), 0, config, group, limits, work))
    logger = Log(folder, state.step, config.tensorboard, config.wandb) if group.rank == 0 else None
    first, saved_at, done, started = state.step, state.seconds, finished(state, config), time.perf_counter()

    def elapsed() -> float:  # where time decides, all processes go by the first one's
        seconds = CLOCKS[config.clock]() - began
        return seconds if config.minutes is None else group.broadcast(seconds)

    position = state.step if config.minutes is None else state.seconds
    bar = Bar(config.steps, config.minutes, logger.rows if logger else [], position, progress and group.rank == 0)
    with StopRequested() as stop, closing(logger) if logger else nullcontext(), closing(loader), bar:
        while not done:
            whole = shared_batches(len(train), state.epoch, config, group, limits, work)
            batches = whole[state.batch :]
            graphs = loader.graphs([batch for batch in batches if batch])
            for batch in batches:
                graph = next(graphs) if batch else None
                before = elapsed()
                checked_step(state, graph, loss, config, group, checkpoint)
                state.step, state.batch, state.seconds = state.step + 1, state.batch + 1, elapsed()
                state.epochs = state.epoch + state.batch / len(whole)
                if state.step == 1:
                    state.first_seconds = state.seconds
                    align(state, group)  # SOAP has chosen its first bases, which rounding decides
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
        report_waiting(loader, time.perf_counter() - started, config)
    return state


def align(state: State, group: ProcessGroup) -> None:
    """All processes go on with the first one's weights and optimiser: machines of different kinds round differently, which adds up."""
    tensors = state_tensors(state)  # in the order of their names: that in which a checkpoint is read is another in each process
    apart = group.align(tensors[name] for name in sorted(tensors))
    if apart > 0 and group.rank == 0:
        say = log.warning if apart > DRIFT else log.info
        say("step %d: numbers of the processes were up to %.1e of the largest apart; those of the first one go on", state.step, apart)


def report_waiting(loader: Loader, seconds: float, config: TrainingConfig) -> None:
    """Say so if batches came too slowly for the steps."""
    if seconds > 30 and loader.waited > WAITING * seconds:
        log.warning(
            "%.0f %% of the time went into waiting for batches; training.num_workers is %d: with more, steps wait less",
            100 * loader.waited / seconds,
            config.num_workers,
        )


def count_edges(loader: Loader, group: ProcessGroup, folder: Path, identity: Mapping[str, Any]) -> np.ndarray:
    """Edges of every structure, each process counting some: what decides time and memory.

    Of many structures that takes minutes, so they are kept in the folder for a run that goes on.
    """
    n, path = len(loader.structures), folder / "edges.npz"
    known = [identity[k] for k in ("data", "training_frames", "model") if k in identity]
    key = hashlib.sha256(json.dumps([*known, n], sort_keys=True).encode()).hexdigest()
    kept = read_counts(path, key, n) if group.rank == 0 else None
    if group.broadcast(float(kept is not None)):
        counts = np.zeros(n) if kept is None else kept
    else:
        mine = np.arange(group.rank, n, group.world)
        counts = np.zeros(n)
        counts[mine] = loader.edge_counts(mine.tolist())
    if group.world > 1:
        counts = np.array(group.add_up(counts.tolist()))
    if group.rank == 0 and kept is None and n >= MANY:
        with atomic_path(path) as temporary:
            np.savez(temporary, key=key, counts=counts)
    return counts


def read_counts(path: Path, key: str, n: int) -> np.ndarray | None:
    """Numbers of edges that were kept, if they are of this data and network."""
    try:
        with open(path, "rb") as file, np.load(file) as found:
            return found["counts"] if str(found["key"]) == key and found["counts"].shape == (n,) else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


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

    It is empty where a batch has fewer structures than there are processes: the last of an epoch, or one of large structures.

    Raises:
        ValueError: no batch has a structure for every process.
    """
    batches = epoch_batches(n_train, config.batch_size, config.seed, epoch, limits)
    if max(map(len, batches)) < group.world:
        raise ValueError(
            f"training.batch_size is {config.batch_size} for {group.world} processes and {n_train} training frames: "
            "no batch has a frame for every process. Raise training.batch_size, or start fewer processes."
        )
    if group.world == 1:
        return batches
    return [[b[k] for k in shares([1.0 if work is None else float(work[i]) for i in b], group.world)[group.rank]] for b in batches]


def mostly_single(batches: Sequence[Sequence[int]]) -> bool:
    """Whether most batches hold one structure: by ``batch_size``, by the limits of their atoms or edges, or as a share of a process."""
    return sum(len(b) == 1 for b in batches) > sum(len(b) > 1 for b in batches)


def checked_step(
    state: State, graph: Graph | None, loss: LossConfig, config: TrainingConfig, group: ProcessGroup, checkpoint: Path
) -> None:
    """A training step, whose failure names the step, the structures and the checkpoint to go back to."""
    try:
        train_step(state, graph, loss, config, group)
    except FloatingPointError as error:
        last = f"'{checkpoint}'" if checkpoint.exists() else "none yet"
        raise RuntimeError(
            f"Training stopped at step {state.step}: {error}, on {', '.join(graph.names if graph else ['frames of other processes'])}. "
            f"Last good checkpoint: {last}. "
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
    """Errors of the averaged weights, of which rank 0's count; saves them if they are the best so far; returns a row of the log."""
    align(state, group)
    row: dict[str, Any] = {"step": state.step, "epoch": state.epoch, "learning_rate": float(state.optimizer.param_groups[0]["lr"])}
    evaluation = shared_evaluation(state, valid, loss, group)
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
    if not math.isfinite(metric):
        log.warning("the error on the validation frames is not a number at step %d: weights of this step are not kept", state.step)
    train_loss = sum(loss.weights()[k] * total / count for k, (total, count) in state.totals.items() if count)
    state.totals = {k: [0.0, 0.0] for k in QUANTITIES}
    row |= {"seconds": round(state.seconds, 3), "train_loss": train_loss, "valid_loss": metric}
    return row


def shared_evaluation(state: State, valid: Sequence[Structure], loss: LossConfig, group: ProcessGroup) -> Evaluation:
    """Errors of the averaged weights on validation structures, of which each process takes some."""
    alone = group.world == 1 or len(valid) < group.world
    part = valid if alone else Subset(valid, range(group.rank, len(valid), group.world))
    evaluation = evaluate_potential(state.ema.module, part, keep=0, run=state.averaged, free_atoms_only=loss.free_atoms_only)
    if not alone:
        for errors in evaluation.errors.values():
            errors.absolute, errors.squared, count = group.add_up([errors.absolute, errors.squared, errors.count])
            errors.count = int(count)
    return evaluation
