"""The processes of one training run: one by default, several under torchrun. Collectives do nothing when alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


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

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item() > 0)

    def broadcast(self, value: float) -> float:
        """Rank 0's value."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return float(tensor)

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def start_process_group(device: str = "auto") -> ProcessGroup:
    """Join the process group if torchrun started this process, and choose the device.

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
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return ProcessGroup(rank, world, torch.device(device))
