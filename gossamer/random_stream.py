"""Random numbers for code that draws PyTorch's global ones, apart from those of the caller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomStream:
    """Numbers of a seed, on the CPU and on one device: drawn within ``with stream.drawn():``, outside of which the caller's own go on."""

    def __init__(self, seed: int, device: torch.device) -> None:
        """
        Args:
            seed: As of `torch.manual_seed`.
            device: Beside the CPU.
        """
        self.devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(self.devices):
            torch.default_generator.manual_seed(seed)
            for each in self.devices:
                with torch.cuda.device(each):
                    torch.cuda.manual_seed(seed)
            self._states = self._now()

    def _now(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(each) for each in self.devices)]

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Whatever draws in the block draws from here."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self._states[0])
            for each, state in zip(self.devices, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, each)
            yield
            self._states = self._now()
