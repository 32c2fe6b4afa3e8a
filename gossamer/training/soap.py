"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., arXiv:2409.11321).

    L <- β L + (1 - β) G Gᵀ,    R <- β R + (1 - β) Gᵀ G,    L = Q_L Λ Q_Lᵀ,    R = Q_R Λ Q_Rᵀ
    W <- W - η Q_L Adam(Q_Lᵀ G Q_R) Q_Rᵀ

Q_L and Q_R follow every `EVERY` steps, by one power iteration and a QR decomposition, and the averages of Adam turn with them. The first
gradient only starts the averages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.training.matrices import MatrixOptimizer

BETA = 0.95
"""of L, R and both averages of Adam, as published"""
EVERY = 10
EPSILON = 1e-8
RIDGE = 1e-5
"""of the mean eigenvalue"""


class Soap(MatrixOptimizer):
    """SOAP for the matrices of a network, AdamW for the rest of it.

    Matrices of one shape are a stack (b, m, n); its averages and bases are kept in the state of the first of their parameters.
    """

    def __init__(self, network: nn.Module, lr: float, weight_decay: float, amsgrad: bool) -> None:
        """As `MatrixOptimizer`."""
        super().__init__(network, lr, weight_decay, amsgrad)
        self.stacks: dict[str, dict[str, Tensor]] = {}
        self.steps = 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimiser."""
        super().load_state_dict(state_dict)
        self.stacks = {}
        for state in self.state.values():
            for name, value in state.items():
                if "." in name:
                    shape, what = name.split(".")
                    self.stacks.setdefault(shape, {})[what] = value
        self.steps = 1 + max((int(stack["steps"]) for stack in self.stacks.values()), default=-1)

    def move_matrices(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """One step of all matrices; those without a gradient (a head that this batch has no labels for) have one of zero."""
        parameters = group["params"]
        self.decay(parameters, group)
        for (m, n), pairs in self.by_shape(parameters, [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]).items():
            gradients = torch.stack([part for _, part in pairs])
            stack = self.stacks.get(f"{m}x{n}")
            if stack is None:
                self._start(f"{m}x{n}", next(p for p in parameters if any(w.shape == (m, n) for w in self.matrices[p](p))), gradients)
                continue
            turned = stack["left_basis"].mT @ gradients @ stack["right_basis"]
            stack["steps"] += 1
            stack["mean"].lerp_(turned, 1 - BETA)
            stack["square"].lerp_(turned * turned, 1 - BETA)
            stack["left"].lerp_(gradients @ gradients.mT, 1 - BETA)
            stack["right"].lerp_(gradients.mT @ gradients, 1 - BETA)
            started = 1 - BETA ** stack["steps"]
            steps = (stack["mean"] / started) / ((stack["square"] / started).sqrt() + EPSILON)
            torch._foreach_add_([w for w, _ in pairs], list(stack["left_basis"] @ steps @ stack["right_basis"].mT * -group["lr"]))

    def _start(self, shape: str, owner: nn.Parameter, gradients: Tensor) -> None:
        left, right = gradients @ gradients.mT, gradients.mT @ gradients
        self.stacks[shape] = {
            "steps": gradients.new_zeros(()), "mean": torch.zeros_like(gradients), "square": torch.zeros_like(gradients),
            "left": left, "right": right, "left_basis": eigenvectors(left), "right_basis": eigenvectors(right),
        }  # fmt: skip
        self.state[owner] |= {f"{shape}.{name}": value for name, value in self.stacks[shape].items()}

    @torch.no_grad()
    def look_around(self) -> None:
        """Every `EVERY` steps the bases follow L and R."""
        self.steps += 1
        if self.steps % EVERY:
            return
        sides = [(stack, side) for stack in self.stacks.values() for side in ("left", "right")]
        for size in sorted({len(stack[side][0]) for stack, side in sides}):  # those of one size together: a GPU waits for launches
            alike = [(stack, side) for stack, side in sides if len(stack[side][0]) == size]
            matrices = torch.cat([stack[side] for stack, side in alike])
            old = torch.cat([stack[f"{side}_basis"] for stack, side in alike])
            order = (old * (matrices @ old)).sum(dim=-2).argsort(dim=-1, descending=True)
            new = orthonormal(matrices, old.gather(-1, order[:, None].expand_as(old)))
            numbers = [len(stack[side]) for stack, side in alike]
            parts = zip(alike, *(t.split(numbers) for t in (new, new.mT @ old, order)), strict=True)
            for (stack, side), basis, turn, places in parts:
                mean, square = stack["mean"], stack["square"]
                mean.copy_(turn @ mean if side == "left" else mean @ turn.mT)
                dim, places = (-2, places[:, :, None]) if side == "left" else (-1, places[:, None])
                square.copy_(square.gather(dim, places.expand_as(square)))
                stack[f"{side}_basis"].copy_(basis)


def orthonormal(matrices: Tensor, bases: Tensor) -> Tensor:
    """Q of the QR decomposition of ``matrices`` (b, n, n) times ``bases``.

    On a GPU, where that goes matrix by matrix, by Cholesky's decomposition, twice in float64; what is added to the diagonal turns no
    eigenvector and keeps it well-conditioned.
    """
    if not matrices.is_cuda:
        return torch.linalg.qr(matrices @ bases)[0]
    return by_cholesky(matrices, bases)


def by_cholesky(matrices: Tensor, bases: Tensor) -> Tensor:
    """As `orthonormal`, up to the signs of columns."""
    scale = matrices.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None].clamp(min=torch.finfo(matrices.dtype).tiny)
    found = ((matrices / scale) @ bases).double() + RIDGE * bases
    for _ in range(2):
        upper = torch.linalg.cholesky_ex(found.mT @ found, upper=True)[0]
        found = torch.linalg.solve_triangular(upper, found, upper=True, left=False)
    return found.to(matrices)


def eigenvectors(matrices: Tensor) -> Tensor:
    """(b, n, n): of symmetric ones, as columns, that of the largest eigenvalue first."""
    vectors: Tensor = torch.linalg.eigh(matrices.double())[1].flip(-1).to(matrices)
    return vectors.contiguous()  # as they come back from a checkpoint: products round otherwise where columns lie one behind the other
