"""Modules that hold numbers in float64 whatever the precision of the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Float64(nn.Module):
    """A module whose own buffers of float64 move between devices, but stay as they are when it changes its precision."""

    def _apply(self, fn: Any, recurse: bool = True) -> Float64:
        exact = {name: values for name, values in self._buffers.items() if values is not None and values.dtype == torch.float64}
        super()._apply(fn, recurse)
        for name, values in exact.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != torch.float64:
                self._buffers[name] = values.to(moved.device)
        return self
