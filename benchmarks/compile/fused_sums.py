"""Does torch.compile fuse gathers and sums over edges into wrong training gradients on this machine?

    python benchmarks/compile/fused_sums.py

The unrolled energy-and-force graph of LEIGNN on ten ethanol molecules (detach nodes removed), compiled with PyTorch's own gather and
sum, and with ours, which the compiler leaves alone. Prints the relative deviation of the loss and of the weight gradients from the plain step.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gossamer.data.readers import read_structures
from gossamer.data.statistics import compute_statistics
from gossamer.engine.unrolled import fx_config
from gossamer.graph import FIELDS
from gossamer.models import LEIGNNConfig
from gossamer.potential import Potential
from gossamer.training.compiled import CompiledForward

torch.manual_seed(0)
torch.set_num_threads(1)
structures = list(read_structures(Path(__file__).resolve().parents[2] / "demo" / "data" / "ethanol_500K.extxyz.xz"))[:10]
potential = Potential(LEIGNNConfig(), compute_statistics(structures, 5.0)).train()
graph, forward = potential.collate(structures), CompiledForward(potential, forces=True, stress=False)
parameters = list(potential.parameters())


def step(call):
    energy, _, forces = call(forward.state, *(getattr(graph, f) for f in FIELDS))
    loss = 1e-3 * (energy - graph.energy).square().mean() + (forces - graph.forces).abs().mean()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, gradients, strict=True)]
    )


loss, gradient = step(forward.unroll(graph, opaque=False))
for name, opaque in (("PyTorch's own gather and sum", False), ("gossamer's, left alone", True)):
    torch._dynamo.reset()
    module = forward.unroll(graph, opaque=opaque)
    with fx_config.patch(use_duck_shape=False):
        other, theirs = step(torch.compile(module, dynamic=True))
    print(
        f"{name:30s} loss {abs(other / loss - 1):.1e}   weight gradients {float((theirs - gradient).norm() / gradient.norm()):.1e}   torch {torch.__version__}",
        flush=True,
    )
