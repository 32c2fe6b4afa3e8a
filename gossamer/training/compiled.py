"""Energies, forces and stress of a training batch as one compiled graph, with right second derivatives.

The force gradient is unrolled by `make_fx`, the `detach` nodes that would cut the second derivative are removed, and the
result goes through `torch.compile`. Gathers and sums over edges stay PyTorch's own calls: fused by inductor's C++
backend (PyTorch 2.13) they gave wrong losses and gradients, 57 % off for LEIGNN on ethanol, without a word; left whole
they are right, and deterministic. The compiled graph is compared with the plain one on the first batch, gradients of
the weights included, and is not used if they differ.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from gossamer.graph import FIELDS, Graph
from gossamer.potential import Potential, Prediction, state_of
from gossamer.unrolled import fx_config, unroll

log = logging.getLogger(__name__)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


class CompiledForward:
    """Stands in for ``potential(graph, forces=…, stress=…)`` in training; falls back to it where compiling is no use."""

    def __init__(self, potential: Potential, forces: bool, stress: bool) -> None:
        self.potential, self.forces, self.stress = potential, forces, stress
        self.names = ["energy", "node_energies", *(["forces"] if forces else []), *(["stress"] if stress else [])]
        self.compiled: Any = None
        self.usable = True
        # optimisers and averages change these tensors in place, so they can be collected once
        self.state = state_of(potential)

    def plain(self, graph: Graph) -> Prediction:
        return self.potential(graph, forces=self.forces, stress=self.stress)

    def __call__(self, graph: Graph) -> Prediction:
        # sizes 0 and 1 would be frozen into the graph
        if not self.usable or min(graph.n_graphs, graph.n_atoms, graph.n_edges) < 2:
            return self.plain(graph)
        if self.compiled is None:
            try:
                self.compiled = self._compile(graph)
                self._compare(graph)
            except Exception as error:  # whatever the compiler raises, training goes on without it
                log.warning("training is not compiled: %s", str(error).strip().splitlines()[0] if str(error) else type(error).__name__)
                self.usable = False
                return self.plain(graph)
        return self._run(graph)

    def _run(self, graph: Graph) -> Prediction:
        out = dict(zip(self.names, self.compiled(self.state, *(getattr(graph, f) for f in FIELDS)), strict=True))
        return Prediction(**{"forces": None, "stress": None, **out})

    def unroll(self, graph: Graph, opaque: bool = True) -> torch.fx.GraphModule:
        """The graph that is compiled."""
        return unroll(self.potential, self.state, graph, self.names, opaque)

    def _compile(self, graph: Graph) -> Any:
        # larger fused kernels compile longer and run slower: 8 takes NequIP from 60 to 26 ms a step (benchmarks/compile)
        compiled = torch.compile(self.unroll(graph), dynamic=True, options={"max_fusion_size": 8})

        def call(*arguments: Any) -> Any:
            with fx_config.patch(use_duck_shape=False):
                return compiled(*arguments)

        return call

    def _compare(self, graph: Graph) -> None:
        """Raise RuntimeError unless outputs and weight gradients agree with the plain ones."""
        parameters = [p for p in self.potential.parameters() if p.requires_grad]
        results = []
        for prediction in (self.plain(graph), self._run(graph)):
            values = [getattr(prediction, name).nan_to_num() for name in self.names]
            generator = torch.Generator().manual_seed(0)
            weights = [torch.rand(v.shape, generator=generator, dtype=v.dtype).to(v.device) for v in values]
            total = torch.stack([(w * (v - v.detach().mean())).sum() for w, v in zip(weights, values, strict=True)]).sum()
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
            flat = torch.cat(
                [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, gradients, strict=True)]
            )
            results.append([*(v.detach() - v.detach().mean() for v in values), flat])
        for name, plain, compiled in zip([*self.names, "gradient of the weights"], *results, strict=True):
            # forces that vanish by symmetry, in a perfect crystal, are compared with what forces usually are
            floor = 1e-12 if name.startswith("gradient") else 1e-2 * self.potential.energy_scale * plain.numel() ** 0.5
            deviation = float((plain - compiled).norm() / plain.norm().clamp(min=floor))
            if not deviation < TOLERANCE[self.potential.dtype]:
                raise RuntimeError(f"the compiled {name} differs from the plain one by {deviation:.1e} (relative); the plain one is used")
