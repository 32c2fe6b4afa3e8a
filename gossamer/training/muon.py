"""Muon: steps of weight matrices made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al., arXiv:2502.16982).

    M <- μ M + (1 - μ) G,    W <- W - η 0.2 sqrt(max(m, n)) U Vᵀ    for the singular vectors U, V of (1 - μ) G + μ M

The factor gives the entries of a step the size that Adam's have, so that learning rates carry over.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.training.matrices import MatrixOptimizer

MOMENTUM, ITERATIONS = 0.95, 5


def orthogonalized(matrices: Tensor) -> Tensor:
    """(b, m, n): U Vᵀ of each, with singular values between 0.7 and 1.2, by a quintic Newton-Schulz iteration."""
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315) @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


class Muon(MatrixOptimizer):
    """Muon for the matrices of a network, AdamW for the rest of it."""

    def move_matrices(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        directions = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        self.decay(parameters, group)
        for shape, pairs in self.by_shape(parameters, directions).items():
            steps = orthogonalized(torch.stack([part for _, part in pairs]))
            torch._foreach_add_([w for w, _ in pairs], list(steps * (-0.2 * math.sqrt(max(shape)) * group["lr"])))
