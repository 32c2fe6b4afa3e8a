"""Energies, forces and stress of a training batch with kernels and as one compiled graph, with right second derivatives.

The force gradient is unrolled by `make_fx`, the `detach` nodes that would cut the second derivative are removed, and the
result goes through `torch.compile`. Gathers and sums over edges stay PyTorch's own calls: fused by inductor's C++
backend (PyTorch 2.13) they gave wrong losses and gradients, 57 % off for LEIGNN on ethanol, without a word; left whole
they are right, and deterministic. The compiled graph is compared with the plain one on (a part of) the first batch, gradients of
the weights included, and is not used if they differ.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from gossamer.engine.agreement import TOLERANCE, part_of, rattled
from gossamer.engine.compiler_cache import kept_compiler_files, step_name
from gossamer.engine.kernels.attach import attach_kernels
from gossamer.engine.kernels.cpu import Missing
from gossamer.engine.unrolled import fx_config, unroll
from gossamer.graph import FIELDS, Graph
from gossamer.potential import Potential, Prediction, state_of
from gossamer.timing import fastest

log = logging.getLogger(__name__)
NOISE = 3.0
"""times as far from float64 as the plain step in its own precision: the farthest that is right"""
LARGEST = 50_000
"""edges of the part of a batch that is timed on a GPU"""
COMPARED = 5_000
"""edges of the part of a batch that is compared: the plain step takes several times the memory"""


class CompiledForward:
    """Stands in for ``potential(graph, forces=…, stress=…)`` in training: with kernels, compiled, or as it is where neither is right."""

    def __init__(
        self,
        potential: Potential,
        forces: bool,
        stress: bool,
        compile: bool = True,
        kernels: bool = False,
        timed: bool = False,
        single: bool = False,
    ) -> None:
        """
        Args:
            potential: In training mode.
            forces: Predict forces.
            stress: Predict stress.
            compile: Compile the step.
            kernels: Pass messages by kernels (`gossamer.engine.kernels`).
            timed: And only if they are faster than without on the first batch.
            single: Batches hold one structure: the compiled step is then for such, else for two and more.
        """
        self.potential, self.forces, self.stress = potential, forces, stress
        self.names = ["energy", "node_energies", *(["forces"] if forces else []), *(["stress"] if stress else [])]
        self.single, self.compile, self.kernels, self.timed = single, compile, kernels, timed
        """what is still to be done on the first batch"""
        self.quick = potential
        """the potential, or with kernels on the same weights"""
        self.compiled: Any = None
        """the compiled step, once there is one"""

    def plain(self, graph: Graph) -> Prediction:
        return self.potential(graph, forces=self.forces, stress=self.stress)

    def uncompiled(self, graph: Graph) -> Prediction:
        return self.quick(graph, forces=self.forces, stress=self.stress)

    def __call__(self, graph: Graph) -> Prediction:
        if self.kernels and graph.n_edges > 0:
            self.kernels = False  # asked for once
            self._add_kernels(graph)
        # sizes 0 and 1 are frozen into the graph
        if min(graph.n_atoms, graph.n_edges) < 2 or (graph.n_graphs == 1) != self.single:
            return self.uncompiled(graph)
        if self.compile:
            self.compile = False
            try:
                with kept_compiler_files(self.name):
                    self.compiled = self._compile(graph)
                    self._agree(self._run, graph, "compiled")
            except Exception as error:  # whatever the compiler raises, training goes on without it
                log.warning("training is not compiled: %s", str(error).strip().splitlines()[0] if str(error) else type(error).__name__)
                self.compiled = None
        return self.uncompiled(graph) if self.compiled is None else self._run(graph)

    def _add_kernels(self, graph: Graph) -> None:
        """Pass messages by kernels from now on, unless they differ from the plain step on a part of this batch."""
        try:
            quick = attach_kernels(self.potential, "training")

            def accelerated(graph: Graph) -> Prediction:
                return quick(graph, forces=self.forces, stress=self.stress)

            self._agree(accelerated, graph, "accelerated")
            if self.timed:
                timed = part_of(graph, LARGEST)
                if fastest(lambda: self._results(self.plain, timed)) < fastest(lambda: self._results(accelerated, timed)):
                    return
            self.quick = quick
        except (Missing, RuntimeError) as error:
            log.log(logging.INFO if isinstance(error, Missing) else logging.WARNING, "training runs without kernels: %s", error)

    def _run(self, graph: Graph) -> Prediction:
        out = dict(zip(self.names, self.compiled(self.state, *(getattr(graph, f) for f in FIELDS)), strict=True))
        return Prediction(**{"forces": None, "stress": None, **out})

    @property
    def name(self) -> str:
        """Of the graph, among those that were compiled on this machine."""
        potential = self.potential
        return step_name(
            potential.model_config, len(potential.statistics.elements), self.forces, self.stress, self.single, str(potential.dtype)
        )

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """Weights and tables of what is compiled: optimisers and averages change these tensors in place."""
        return state_of(self.quick)

    def unroll(self, graph: Graph, opaque: bool = True) -> torch.fx.GraphModule:
        """The graph that is compiled."""
        return unroll(self.quick, self.state, graph, self.names, opaque)

    def _compile(self, graph: Graph) -> Any:
        # larger fused kernels compile longer and run slower: 8 takes NequIP from 60 to 26 ms a step (benchmarks/compile)
        compiled = torch.compile(self.unroll(graph), dynamic=True, options={"max_fusion_size": 8})

        def call(*arguments: Any) -> Any:
            with fx_config.patch(use_duck_shape=False):
                return compiled(*arguments)

        return call

    def _results(self, run: Callable[[Graph], Prediction], graph: Graph, potential: Potential | None = None) -> list[Tensor]:
        """Outputs of this potential, and the gradient of its weights of a random sum of them."""
        parameters = [p for p in (potential or self.potential).parameters() if p.requires_grad]
        prediction = run(graph)
        values = [getattr(prediction, name).nan_to_num() for name in self.names]
        generator = torch.Generator().manual_seed(0)
        weights = [torch.rand(v.shape, generator=generator, dtype=torch.float64).to(v) for v in values]
        total = torch.stack([(w * (v - v.detach().mean())).sum() for w, v in zip(weights, values, strict=True)]).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        flat = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, gradients, strict=True)])
        return [*(v.detach() - v.detach().mean() for v in values), flat]

    def _agree(self, run: Callable[[Graph], Prediction], graph: Graph, what: str) -> None:
        """Compare on a part of a batch, atoms displaced a little.

        Raises:
            RuntimeError: results differ from the plain ones, and by more than `NOISE` times what rounding does to these. (Of a network that
                is not trained yet, rounding can grow far: SevenNet's forces on molecules are then a thousand times the labels'.)
        """
        graph = rattled(part_of(graph, COMPARED))
        plain, other = self._results(self.plain, graph), self._results(run, graph)
        exact: list[Tensor] = []
        for number, name in enumerate([*self.names, "gradient of the weights"]):
            a, b = plain[number], other[number]
            floor = 1e-12 if name.startswith("gradient") else 1e-2 * self.potential.energy_scale * a.numel() ** 0.5
            deviation = float((a - b).norm() / a.norm().clamp(min=floor))
            if deviation < TOLERANCE[self.potential.dtype]:
                continue
            exact = exact or self._exact(graph)
            noise = float((a - exact[number]).norm())
            if not float((b - exact[number]).norm()) < NOISE * noise:
                raise RuntimeError(f"the {what} {name} differs from the plain one by {deviation:.1e} (relative); the plain one is used")

    def _exact(self, graph: Graph) -> list[Tensor]:
        """Plain results in float64."""
        potential = copy.deepcopy(self.potential).to(torch.float64)
        return self._results(partial(potential, forces=self.forces, stress=self.stress), graph.double(), potential)
