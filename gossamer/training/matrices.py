"""What optimisers of matrices share: which weights are matrices, and AdamW for the rest.

What is no matrix (biases, element tables, norms, maps to one number) goes by AdamW, and so do maps of single elements (`ElementMaps`): a
step of such an optimiser is as large for an element that the batch lacks as for one that fills it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from gossamer.nn.layers import ElementLinear
from gossamer.nn.products import EdgeConvolution

Matrices = Callable[[Tensor], Sequence[Tensor]]
"""the matrices (m, n) of a parameter, as views"""
BETAS, EPSILON = (0.9, 0.999), 1e-8
"""of AdamW"""


def _whole(weight: Tensor) -> Sequence[Tensor]:
    return (weight,)


def _by_rows(rows: list[int], weight: Tensor) -> Sequence[Tensor]:
    return weight.split(rows)


def _by_attribute(weight: Tensor) -> Sequence[Tensor]:
    return weight.unbind(1)


def weight_matrices(network: nn.Module) -> dict[nn.Parameter, Matrices]:
    """Trainable parameters that are matrices, split by meaning: one for each attribute of an element, one for each product of a convolution."""
    found: dict[nn.Parameter, Matrices] = {}
    for module in network.modules():
        if isinstance(module, ElementLinear):
            found[module.weight] = _by_attribute
        elif not isinstance(module, nn.Embedding):
            found |= {p: _whole for p in module.parameters(recurse=False) if p.dim() == 2 and min(p.shape) > 1}
    for module in network.modules():
        if isinstance(module, EdgeConvolution):
            last = [p for p in module.radial.parameters() if p in found][-1:]  # none where it gives one number (MACE's density)
            if last and sum(module.convolution.channels) == len(last[0]):
                found[last[0]] = partial(_by_rows, module.convolution.channels)
    return {p: matrices for p, matrices in found.items() if p.requires_grad}


class MatrixOptimizer(torch.optim.Optimizer):
    """The matrices of a network by a rule of their own, AdamW for the rest of it."""

    def __init__(self, network: nn.Module, lr: float, weight_decay: float, amsgrad: bool) -> None:
        """
        Args:
            network: Its trainable parameters are optimised.
            lr: Learning rate, of the size that is right for AdamW.
            weight_decay: Decoupled decay of the matrices.
            amsgrad: For what goes by AdamW.
        """
        self.matrices = weight_matrices(network)
        rest = [p for p in network.parameters() if p.requires_grad and p not in self.matrices]
        groups: list[dict[str, Any]] = [
            {"params": list(self.matrices), "weight_decay": weight_decay, "are_matrices": True},
            {"params": rest, "weight_decay": 0.0, "are_matrices": False},
        ]
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "amsgrad": amsgrad, "capturable": False})

    def allow_recording(self) -> None:
        """From now on ``lr`` is a tensor on the GPU and no number is needed from there, so that `move` can be recorded as a CUDA graph."""
        for group in self.param_groups:
            device = group["params"][0].device
            group["lr"], group["capturable"] = torch.tensor(float(group["lr"]), device=device), True
            for p in group["params"]:
                if "step" in self.state[p]:
                    self.state[p]["step"] = self.state[p]["step"].to(device)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step from the gradients as they are."""
        self.move()
        self.look_around()

    @torch.no_grad()
    def move(self) -> None:
        """The step itself, which a GPU can record from the second one on."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self.move_matrices if group["are_matrices"] else self._adam_step)(parameters, group)

    def move_matrices(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Change these parameters, whose gradients are there."""
        raise NotImplementedError

    def look_around(self) -> None:
        """What is done between steps and cannot be recorded; nothing, by default."""

    def by_shape(self, parameters: list[nn.Parameter], tensors: Sequence[Tensor]) -> dict[torch.Size, list[tuple[Tensor, Tensor]]]:
        """Matrices of one shape together: the weights, and of ``tensors``, one for each parameter, what belongs to them; as views."""
        found: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for p, tensor in zip(parameters, tensors, strict=True):
            split = self.matrices[p]
            for weight, part in zip(split(p.data), split(tensor), strict=True):
                found.setdefault(part.shape, []).append((weight, part))
        return found

    def decay(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """The decoupled decay."""
        if group["weight_decay"]:
            torch._foreach_mul_([p.data for p in parameters], 1 - group["lr"] * group["weight_decay"])

    def _adam_step(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        for p in parameters:
            if not self.state[p]:
                step = torch.zeros((), device=p.device if group["capturable"] else "cpu")
                self.state[p] = {"step": step, **{name: torch.zeros_like(p) for name in names}}
        averages = {name: [self.state[p][name] for p in parameters] for name in names}
        gradients: list[Any] = [p.grad for p in parameters]
        adamw(
            list(parameters), gradients, averages["exp_avg"], averages["exp_avg_sq"],
            averages.get("max_exp_avg_sq", []), [self.state[p]["step"] for p in parameters], foreach=True, amsgrad=group["amsgrad"],
            capturable=group["capturable"],
            beta1=BETAS[0], beta2=BETAS[1], lr=group["lr"], weight_decay=0.0, eps=EPSILON, maximize=False,
        )  # fmt: skip
