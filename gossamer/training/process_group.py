"""The processes of one training run: one by default, several under torchrun. Collectives do nothing when alone."""

from __future__ import annotations

import datetime
import logging
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessGroup:
    """Rank of this process, number of processes, and what they do together."""

    rank: int
    world: int
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: list[Tensor]) -> None:
        """Add up the gradients of all ranks (each rank's loss is its share of the sum already)."""
        if self.world == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        for p, g in zip(parameters, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            p.grad = g.reshape(p.shape).clone()

    def add_up(self, values: Sequence[float]) -> list[float]:
        """Sums of plain numbers over all ranks."""
        return self.sum(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item() > 0)

    def broadcast(self, value: float) -> float:
        """Rank 0's value."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return float(tensor)

    @torch.no_grad()
    def align(self, tensors: Iterable[Tensor]) -> float:
        """Give the tensors rank 0's values, in place; the largest difference there was on any rank, relative to a tensor's largest value."""
        if self.world == 1:
            return 0.0
        apart = torch.zeros((), device=self.device)
        for tensor in (t for t in tensors if t.numel()):
            value = tensor.to(self.device, copy=True).contiguous()
            dist.broadcast(value, 0)
            difference = (value.double() - tensor.to(value).double()).abs().max() / value.double().abs().max().clamp(min=1e-30)
            apart = torch.maximum(apart, difference.float())
            tensor.copy_(value)
        dist.all_reduce(apart, dist.ReduceOp.MAX)
        return float(apart)

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def shares(work: Sequence[float], n: int) -> list[list[int]]:
    """Positions of what is to be done, shared out so that every one of ``n`` has about as much work: the largest piece first, to who has least."""
    loads, found = [0.0] * n, [[] for _ in range(n)]  # type: ignore[var-annotated]
    for k in sorted(range(len(work)), key=lambda k: -work[k]):
        least = loads.index(min(loads))
        loads[least] += max(work[k], 1e-9)
        found[least].append(k)
    return [sorted(part) for part in found]


def restarted() -> bool:
    """Whether torchrun started this process anew after one had failed (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def store_after_restart(timeout: datetime.timedelta) -> dist.Store | None:
    """Where processes that torchrun started anew on one machine find each other; None: where PyTorch says.

    Since PyTorch 2.4 they all share the launcher's store, in which the addresses of the processes before still stand
    (pytorch/pytorch issue 135712): each start gets names of its own here. On several machines the launchers count restarts
    differently; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 must be set for torchrun (docs/training.md).
    """
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if not (restarted() and one_machine and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    return dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def start_process_group(device: str = "auto", timeout: float = 30.0) -> ProcessGroup:
    """Join the process group if torchrun started this process, and choose the device.

    Args:
        device: As ``training.device``.
        timeout: Minutes after which waiting for another process is an error.

    Raises:
        ValueError: the device is not there.
    """
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError("training.device is 'cuda', but PyTorch sees no GPU here. Use 'cpu' or 'auto'.")
        if world > 1:
            device = f"cuda:{local}"
            torch.cuda.set_device(local)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"training.device is '{device}', which PyTorch does not have here ({reason}). Use 'cpu', 'cuda' or 'auto'."
        ) from None
    if world > 1 and not dist.is_initialized():
        limit = datetime.timedelta(minutes=timeout)
        backend, store = "nccl" if device.startswith("cuda") else "gloo", store_after_restart(limit)
        if store is None:
            dist.init_process_group(backend, timeout=limit)
        else:
            dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=world)
    return ProcessGroup(rank, world, torch.device(device))


@contextmanager
def log_of_rank(folder: Path, group: ProcessGroup) -> Iterator[None]:
    """Where there are several processes, what each of them says also goes to ``folder``/rank-K.log, starting with where it runs."""
    if group.world == 1:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank-{group.rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
    package = logging.getLogger("gossamer")
    package.addHandler(handler)
    try:
        log.info("rank %d of %d: process %d on %s, %s", group.rank, group.world, os.getpid(), platform.node(), group.device)
        yield
    except BaseException as error:
        log.error("rank %d ends: %s: %s", group.rank, type(error).__name__, error)
        raise
    finally:
        package.removeHandler(handler)
        handler.close()
