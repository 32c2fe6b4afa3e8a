"""Energies, forces and stress as one graph of primitive operations, for compilers.

The force gradient is unrolled by `make_fx`, and the `detach` nodes that would cut the second derivative are removed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx.experimental._config as _fx_config
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from gossamer.engine.kernels.attach import sharing_copy
from gossamer.graph import FIELDS, Graph
from gossamer.potential import Potential

fx_config: Any = _fx_config  # its patch() is added at run time
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


def unroll(
    potential: Potential, state: dict[str, Tensor], graph: Graph, names: list[str], opaque: bool = True, isolated: Tensor | None = None
) -> torch.fx.GraphModule:
    """A module of (state, *tensors of the graph in the order of FIELDS) that returns the named parts of a prediction, for any sizes but 0 and 1.

    Args:
        potential: In the mode (training or not) that the graph is for.
        state: As from ``state_of``; its tensors become inputs.
        graph: Example batch.
        names: Of "energy", "node_energies", "forces", "stress", "features".
        opaque: Keep gathers and sums away from the compiler's fusion; see ``rewrite``.
        isolated: As for ``Potential.forward``; becomes the input "isolated" of the state.

    Raises:
        RuntimeError: the potential predicts further quantities, which such a graph would lose, or is not local.
    """
    if potential.long_ranged:
        raise RuntimeError("sums over all charges of a structure (potential.long_range) have sizes that no compiled graph can know")
    extras = sharing_copy(potential, differentiable=False).eval()(graph, forces=False).extras
    if extras:
        raise RuntimeError(f"a compiled graph returns {', '.join(names)}, and this potential also predicts {', '.join(extras)}")
    # a copy: tracing puts stand-ins in place of its tensors, and another thread may be collating with the potential's own
    potential = sharing_copy(potential, differentiable=True)
    potential.fixed_sizes = True
    inputs = state if isolated is None else {**state, "isolated": isolated}

    def outputs(values: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        fields: dict[str, Any] = dict(zip(FIELDS, tensors, strict=True))
        own = {k: v for k, v in values.items() if k != "isolated"}
        options = {"forces": "forces" in names, "stress": "stress" in names, "isolated": values.get("isolated")}
        out = functional_call(potential, own, (Graph(**fields),), options)
        return tuple(getattr(out, name) for name in names)

    with fx_config.patch(use_duck_shape=False):
        module = make_fx(outputs, tracing_mode="symbolic")(inputs, *(getattr(graph, f) for f in FIELDS))
    rewrite(module, opaque)
    return module


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
