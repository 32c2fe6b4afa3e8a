"""How a potential is trained: the settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gossamer.settings import settings
from gossamer.training.optim import ScheduleConfig


@settings
class TrainingConfig:
    """How the weights are found."""

    steps: Annotated[int, Field(gt=0)] = 10_000
    """Optimiser steps; not used where ``minutes`` is given."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Train for this long instead of a number of steps: learning rate and average of the weights follow the clock and end with it.
    How many steps that makes depends on the machine and its load, so two such runs are not equal bit by bit."""
    clock: Literal["wall", "cpu"] = "wall"
    """What ``minutes`` counts: time on the wall, or CPU time of this process and its compilers (where other jobs shall not count)."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Structures per step, over all processes."""
    batch_atoms: Annotated[int, Field(gt=0)] | None = None
    """At most this many atoms per step; whichever limit is reached first counts."""
    batch_edges: Annotated[int, Field(gt=0)] | None = None
    """At most this many edges (pairs within the cutoff, both directions) per step: they decide time and memory."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    """Largest learning rate, reached after the warm-up."""
    optimizer: Literal["muon", "soap", "adamw"] = "muon"
    """"muon" makes the steps of weight matrices orthogonal and leaves the rest to AdamW: force errors a tenth to a half smaller after as
    many steps, at the same learning rates. "soap" goes by Adam in the eigenbasis of each matrix's gradients: best for Weft where frames are not
    few, at twice the rate (benchmarks/accuracy)."""
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
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the weights and of the order of the batches."""
    valid_every: Annotated[int, Field(gt=0)] = 500
    """Steps between validations, which also save a checkpoint; with ``minutes``, fifteen validations, fewer where they take long."""
    checkpoint_every: Annotated[int, Field(gt=0)] = 500
    """Steps between checkpoints; with ``minutes``, one is written at every validation and at least once a minute."""
    early_stopping: Annotated[int, Field(gt=0)] | None = None
    """Stop after this many validations without improvement; None never does."""
    compile: bool = False
    """Compile the training step (one to three minutes once, seconds from then on; small batches then take half the time); checked against the plain
    one."""
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
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Processes beside each process that trains which read structures and make their neighbour lists ahead; 0: a thread does. They pay where a
    GPU waits for batches (the log says so). Batches are the same."""
    timeout: Annotated[float, Field(gt=0)] = 30.0
    """Minutes after which processes under torchrun give up waiting for one that hangs."""
    tensorboard: bool = False
    """Also log to TensorBoard (needs the package tensorboard)."""
    wandb: bool = False
    """Also log to Weights & Biases (needs the package wandb)."""
