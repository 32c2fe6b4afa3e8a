"""Energies, forces and stress of a training batch as one compiled graph, with right second derivatives.

The force gradient is unrolled by `make_fx`, the `detach` nodes that would cut the second derivative are removed, and the
result goes through `torch.compile`. Gathers and sums over edges stay PyTorch's own calls: fused by inductor's C++
backend (PyTorch 2.13) they gave wrong losses and gradients, 57 % off for LEIGNN on ethanol, without a word; left whole
they are right, and deterministic. The compiled graph is compared with the plain one on the first batch, gradients of
the weights included, and is not used if they differ.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
import torch.fx.experimental._config as _fx_config
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from gossamer.graph import Graph
from gossamer.potential import Potential, Prediction

fx_config: Any = _fx_config  # its patch() is added at run time
log = logging.getLogger(__name__)
FIELDS = ("atomic_numbers", "positions", "cell", "graph_index", "edge_index", "edge_shifts")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}

_library = torch.library.Library("gossamer", "DEF")
_library.define("index_add(Tensor base, Tensor index, Tensor values) -> Tensor")
_library.define("index_select(Tensor values, Tensor index) -> Tensor")
_library.impl("index_add", lambda base, index, values: base.index_add(0, index, values), "CompositeExplicitAutograd")
_library.impl("index_select", lambda values, index: values.index_select(0, index), "CompositeExplicitAutograd")
torch.library.register_fake("gossamer::index_add", lambda base, index, values: torch.empty_like(base))
torch.library.register_fake("gossamer::index_select", lambda values, index: values.new_empty((index.shape[0], *values.shape[1:])))


def _add_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
    return gradient, None, torch.ops.gossamer.index_select(gradient.contiguous(), ctx.saved_tensors[0])


def _select_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    zeros = gradient.new_zeros((ctx.rows, *gradient.shape[1:]))
    return torch.ops.gossamer.index_add(zeros, ctx.saved_tensors[0], gradient.contiguous()), None


def _add_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _select_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.rows = inputs[0].shape[0]


torch.library.register_autograd("gossamer::index_add", _add_backward, setup_context=_add_context)
torch.library.register_autograd("gossamer::index_select", _select_backward, setup_context=_select_context)


class CompiledForward:
    """Stands in for ``potential(graph, forces=…, stress=…)`` in training; falls back to it where compiling is no use."""

    def __init__(self, potential: Potential, forces: bool, stress: bool) -> None:
        self.potential, self.forces, self.stress = potential, forces, stress
        self.names = ["energy", "node_energies", *(["forces"] if forces else []), *(["stress"] if stress else [])]
        self.compiled: Any = None
        self.usable = True
        # optimisers and averages change these tensors in place, so they can be collected once
        self.state = {**dict(potential.named_parameters()), **dict(potential.named_buffers())}

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
        """Energies and forces as one graph of primitive operations, for any sizes; ``opaque``: see ``rewrite``."""

        # a copy: tracing puts stand-ins in place of its tensors, and another thread may be collating with the potential's own
        potential = copy.deepcopy(self.potential)

        def outputs(state: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
            fields: dict[str, Any] = dict(zip(FIELDS, tensors, strict=True))
            batch = Graph(**fields)
            out = functional_call(potential, state, (batch,), {"forces": self.forces, "stress": self.stress})
            return tuple(getattr(out, name) for name in self.names)

        with fx_config.patch(use_duck_shape=False):
            module = make_fx(outputs, tracing_mode="symbolic")(self.state, *(getattr(graph, f) for f in FIELDS))
        rewrite(module, opaque)
        return module

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


def rewrite(module: torch.fx.GraphModule, opaque: bool = True) -> None:
    """Remove detach nodes and, if ``opaque``, put our gather and sum in place of those that inductor would fuse."""
    aten, ours = torch.ops.aten, torch.ops.gossamer
    replacement: tuple[Any, tuple[Any, ...]]
    for node in list(module.graph.nodes):
        if node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
            continue
        if not opaque:
            continue
        if node.target == aten.index_add.default and node.args[1] == 0 and not node.kwargs:
            replacement = (ours.index_add.default, (node.args[0], node.args[2], node.args[3]))
        elif node.target == aten.index_select.default and node.args[1] == 0:
            replacement = (ours.index_select.default, (node.args[0], node.args[2]))
        elif node.target == aten.embedding.default and len(node.args) == 2:
            replacement = (ours.index_select.default, (node.args[0], node.args[1]))
        elif node.target == aten.index.Tensor and len(node.args[1]) == 1 and node.args[1][0].meta["val"].dim() == 1:
            replacement = (ours.index_select.default, (node.args[0], node.args[1][0]))
        else:
            continue
        with module.graph.inserting_after(node):
            new = module.graph.call_function(*replacement)
        new.meta = node.meta
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
