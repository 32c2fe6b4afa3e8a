"""The kernels as PyTorch operators with derivatives, opaque to compilers.

``convolve_weighted``, for training, can be differentiated any number of times; the others, for inference, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gossamer.engine.kernels import cpu, gpu
from gossamer.engine.kernels.table import structure_key
from gossamer.nn.products import Convolution

_library = torch.library.Library("gossamer", "FRAGMENT")
_EDGES = "Tensor edge_index, Tensor receiver_starts, Tensor sender_starts, Tensor by_sender"
_ROWS = "Tensor? first_row=None, int intervals=0"
"""row of the table where the intervals of each edge begin, and how many these are; by default all of the table"""
for _schema in (
    "sort_edges(Tensor edge_index, Tensor nodes) -> (Tensor, Tensor, Tensor)",
    f"convolve(str key, Tensor features, Tensor harmonics, Tensor x, Tensor table, {_EDGES}, {_ROWS}) -> Tensor",
    f"convolve_backward(str key, Tensor gradient, Tensor features, Tensor harmonics, Tensor x, Tensor table, {_EDGES}, {_ROWS})"
    " -> (Tensor, Tensor, Tensor)",
    f"convolve_weighted(str key, Tensor features, Tensor harmonics, Tensor weights, {_EDGES}) -> Tensor",
    f"convolve_weighted_backward(str key, Tensor gradient, Tensor features, Tensor harmonics, Tensor weights, {_EDGES}) -> (Tensor, Tensor, Tensor)",
    f"attend(int heads, Tensor q, Tensor k, Tensor g, Tensor v, Tensor x, Tensor sl, Tensor f, Tensor y, {_EDGES}) -> (Tensor, Tensor)",
    f"attend_backward(int heads, Tensor dh, Tensor dout, Tensor q, Tensor k, Tensor g, Tensor v, Tensor x, Tensor sl, Tensor f, Tensor y, {_EDGES})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"perpendicular(Tensor q, Tensor p, Tensor y, {_EDGES}) -> Tensor",
    f"perpendicular_backward(Tensor gradient, Tensor q, Tensor p, Tensor y, {_EDGES}) -> (Tensor, Tensor, Tensor)",
    "map_by_species(Tensor x, Tensor species, Tensor maps) -> Tensor",
):
    _library.define(_schema)

_convolutions: dict[str, tuple[Convolution, Any, Any]] = {}
"""by key: the products, the built kernel, and where everything lies (on GPUs that is part of the kernel)"""


def register(convolution: Convolution, dtype: torch.dtype, device: str = "cpu", edge_weights: bool = False) -> str:
    """Build the kernel of a layer, and return the key by which operators know it.

    With ``edge_weights``, for the operator ``convolve_weighted``, which takes the radial functions of every edge, instead of ``convolve``.

    Raises:
        Missing: it cannot be built on this machine.
    """
    channels = "-".join(str(m) for _, m in (*convolution.blocks_in, *convolution.blocks_out))
    structure = structure_key(convolution)
    key = f"{structure}-{channels}-{cpu.REAL[dtype]}-{device}{'-weights' if edge_weights else ''}"
    if key in _convolutions:
        return key
    if device == "cuda":
        _convolutions[key] = convolution, gpu.kernels(convolution, structure, edge_weights), None
    else:
        cpu.sorting()
        _convolutions[key] = (
            convolution,
            cpu.convolution_library(convolution, dtype, edge_weights),
            torch.tensor(cpu.layout(convolution)),
        )
    return key


# --- on the CPU ------------------------------------------------------------------------------------------------------


def _sort_edges(edge_index: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Raises:
        ValueError: edges that are not sorted by receiver, whose sums would be those of other atoms.
        IndexError: edges of atoms that are not there, whose memory is another's.
    """
    receiver = edge_index[1]
    if bool((receiver[1:] < receiver[:-1]).any()):
        raise ValueError("a kernel was given edges that are not sorted by receiver, as gossamer.neighbors and Graph have them: sort them")
    if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < nodes.shape[0]:
        raise IndexError(
            f"a kernel was given edges of atoms {int(edge_index.min())} to {int(edge_index.max())}, and there are {nodes.shape[0]}"
        )
    receiver_starts, sender_starts, by_sender = _fake_sort(edge_index, nodes)
    cpu.sorting().sort_edges(nodes.shape[0], edge_index.shape[1], *cpu.pointers(edge_index, receiver_starts, sender_starts, by_sender))
    return receiver_starts, sender_starts, by_sender


def _forward(
    key: str, features: Tensor, harmonics: Tensor, values: Tensor, table: Tensor | None, size: int, edge_index: Tensor, receiver_starts: Tensor,
    first_row: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``values``: distances, with a table of ``size`` intervals; or ``size`` radial functions of every edge, and no table."""
    convolution, kernel, layout = _convolutions[key]
    features, harmonics, values = features.contiguous(), harmonics.contiguous(), values.contiguous()
    n_receivers = receiver_starts.shape[0] - 1  # fewer than there are features where other processes have the last of them
    out = features.new_empty(n_receivers, convolution.width_out)
    kernel.forward(
        n_receivers, features.shape[0], convolution.width_in, convolution.width_out, size, 0 if table is None else table.shape[1],
        torch.get_num_threads(),
        *cpu.pointers(layout, features, harmonics, values, first_row, table, edge_index, receiver_starts, out),
    )  # fmt: skip
    return out


def _backward(key: str, gradient: Tensor, features: Tensor, harmonics: Tensor, values: Tensor, table: Tensor | None, size: int,
              edge_index: Tensor, sender_starts: Tensor, by_sender: Tensor, first_row: Tensor | None = None) -> tuple[Tensor, ...]:  # fmt: skip
    convolution, kernel, layout = _convolutions[key]
    gradient, features, harmonics, values = (t.contiguous() for t in (gradient, features, harmonics, values))
    results = _alike(features, harmonics, values)
    kernel.backward(
        features.shape[0], gradient.shape[0], convolution.width_in, convolution.width_out, size, 0 if table is None else table.shape[1],
        torch.get_num_threads(),
        *cpu.pointers(layout, features, harmonics, values, first_row, table, edge_index[1], sender_starts, by_sender, gradient, *results),
    )  # fmt: skip
    return results


def _intervals(table: Tensor, intervals: int) -> int:
    """How many; by default all of the table.

    Raises:
        ValueError: the table is of another kind of processor, or of an older gossamer.
    """
    form = 6, cpu.lanes(table.dtype)
    if table.shape[2:] != form:
        raise ValueError(
            f"a kernel got a table of {tuple(table.shape[2:])} numbers an interval, here they are {form}: make the program again"
        )
    return intervals or table.shape[1] - 1


def _convolve(
    key: str, features: Tensor, harmonics: Tensor, x: Tensor, table: Tensor, edge_index: Tensor, receiver_starts: Tensor, sender_starts: Tensor,
    by_sender: Tensor, first_row: Tensor | None = None, intervals: int = 0,
) -> Tensor:  # fmt: skip
    return _forward(key, features, harmonics, x, table, _intervals(table, intervals), edge_index, receiver_starts, first_row)


def _convolve_backward(
    key: str, gradient: Tensor, features: Tensor, harmonics: Tensor, x: Tensor, table: Tensor, edge_index: Tensor, receiver_starts: Tensor,
    sender_starts: Tensor, by_sender: Tensor, first_row: Tensor | None = None, intervals: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _backward(
        key, gradient, features, harmonics, x, table, _intervals(table, intervals), edge_index, sender_starts, by_sender, first_row
    )


def _weighted(key: str, *tensors: Tensor) -> Tensor:
    features, harmonics, weights, edge_index, receiver_starts, _, _ = tensors
    return _forward(key, features, harmonics, weights, None, weights.shape[1], edge_index, receiver_starts)


def _weighted_backward(key: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    gradient, features, harmonics, weights, edge_index, _, sender_starts, by_sender = tensors
    return _backward(key, gradient, features, harmonics, weights, None, weights.shape[1], edge_index, sender_starts, by_sender)


def _degrees(y: Tensor) -> int:
    return round((y.shape[1] + 1) ** 0.5) - 1


def _attend(heads: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    *values, edge_index, receiver_starts, _, _ = tensors
    q, k, g, v, x, sl, f, y = (t.contiguous() for t in values)
    n, c = q.shape
    h, out = q.new_empty(n, c), q.new_empty(n, y.shape[1], c)
    cpu.attention_library(_degrees(y), q.dtype).attend(
        n, c, f.shape[1] // c, heads, torch.get_num_threads(), *cpu.pointers(q, k, g, v, x, sl, f, y, edge_index, receiver_starts, h, out)
    )
    return h, out


def _attend_backward(heads: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    *values, edge_index, receiver_starts, sender_starts, by_sender = tensors
    dh, dout, q, k, g, v, x, sl, f, y = (t.contiguous() for t in values)
    n, c = q.shape
    results = _alike(q, k, g, v, x, sl, f, y)
    scratch = q.new_empty(edge_index.shape[1], heads)
    cpu.attention_library(_degrees(y), q.dtype).attend_backward(
        n, c, f.shape[1] // c, heads, torch.get_num_threads(),
        *cpu.pointers(q, k, g, v, x, sl, f, y, edge_index, edge_index[1], receiver_starts, sender_starts, by_sender, dh, dout, *results, scratch),
    )  # fmt: skip
    return results


def _perpendicular(*tensors: Tensor) -> Tensor:
    *values, edge_index, receiver_starts, _, _ = tensors
    q, p, y = (t.contiguous() for t in values)
    omega = q.new_empty(edge_index.shape[1], q.shape[2])
    cpu.attention_library(_degrees(y), q.dtype).perpendicular(
        q.shape[0], q.shape[2], torch.get_num_threads(), *cpu.pointers(q, p, y, edge_index, receiver_starts, omega)
    )
    return omega


def _perpendicular_backward(*tensors: Tensor) -> tuple[Tensor, ...]:
    *values, edge_index, receiver_starts, sender_starts, by_sender = tensors
    gradient, q, p, y = (t.contiguous() for t in values)
    results = _alike(q, p, y)
    cpu.attention_library(_degrees(y), q.dtype).perpendicular_backward(
        q.shape[0], q.shape[2], torch.get_num_threads(),
        *cpu.pointers(q, p, y, edge_index, edge_index[1], receiver_starts, sender_starts, by_sender, gradient, *results),
    )  # fmt: skip
    return results


def _map_by_species(x: Tensor, species: Tensor, maps: Tensor) -> Tensor:
    present = torch.bincount(species, minlength=maps.shape[0]).nonzero()[:, 0].tolist()
    if len(present) == 1:
        return x @ maps[present[0]]
    out = x.new_zeros(x.shape[0], x.shape[1], maps.shape[2])
    for element in present:
        rows = (species == element).nonzero()[:, 0]
        out.index_copy_(0, rows, x.index_select(0, rows) @ maps[element])
    return out


_library.impl("sort_edges", _sort_edges, "CPU")
_library.impl("convolve", _convolve, "CPU")
_library.impl("convolve_backward", _convolve_backward, "CPU")
_library.impl("convolve_weighted", _weighted, "CPU")
_library.impl("convolve_weighted_backward", _weighted_backward, "CPU")
_library.impl("attend", _attend, "CPU")
_library.impl("attend_backward", _attend_backward, "CPU")
_library.impl("perpendicular", _perpendicular, "CPU")
_library.impl("perpendicular_backward", _perpendicular_backward, "CPU")
_library.impl("map_by_species", _map_by_species, "CPU")


# --- on a GPU --------------------------------------------------------------------------------------------------------


def _convolve_gpu(
    key: str, features: Tensor, harmonics: Tensor, x: Tensor, table: Tensor, edge_index: Tensor, receiver_starts: Tensor, sender_starts: Tensor,
    by_sender: Tensor, first_row: Tensor | None = None, intervals: int = 0,
) -> Tensor:  # fmt: skip
    size = intervals or table.shape[1] - 1
    return gpu.forward(*_convolutions[key][:2], features, harmonics, x, table, size, edge_index, receiver_starts, first_row)


def _convolve_backward_gpu(
    key: str, gradient: Tensor, features: Tensor, harmonics: Tensor, x: Tensor, table: Tensor, edge_index: Tensor, receiver_starts: Tensor,
    sender_starts: Tensor, by_sender: Tensor, first_row: Tensor | None = None, intervals: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    convolution, built, _ = _convolutions[key]
    size = intervals or table.shape[1] - 1
    return gpu.backward(convolution, built, gradient, features, harmonics, x, table, size, edge_index, sender_starts, by_sender, first_row)


def _weighted_gpu(key: str, *tensors: Tensor) -> Tensor:
    features, harmonics, weights, edge_index, receiver_starts, _, _ = tensors
    return gpu.forward(*_convolutions[key][:2], features, harmonics, weights, weights, weights.shape[1], edge_index, receiver_starts)


def _weighted_backward_gpu(key: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    gradient, features, harmonics, weights, edge_index, _, sender_starts, by_sender = tensors
    convolution, built, _ = _convolutions[key]
    return gpu.backward(
        convolution, built, gradient, features, harmonics, weights, weights, weights.shape[1], edge_index, sender_starts, by_sender
    )


def _attention_gpu(name: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        from gossamer.engine.kernels import attention_gpu  # needs triton

        return getattr(attention_gpu, name)(*arguments)

    return run


def on_its_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current GPU: make that the one where the tensors are."""

    def run(*arguments: Any) -> Any:
        with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
            return function(*arguments)

    return run


_library.impl("sort_edges", gpu.sort_edges, "CUDA")
_library.impl("map_by_species", gpu.map_by_species, "CUDA")
ON_GPUS: dict[str, Callable[..., Any]] = {
    "convolve": _convolve_gpu, "convolve_backward": _convolve_backward_gpu, "convolve_weighted": _weighted_gpu, "convolve_weighted_backward": _weighted_backward_gpu,
    **{name: _attention_gpu(name) for name in ("attend", "attend_backward", "perpendicular", "perpendicular_backward")},
}  # fmt: skip
"""what operators that launch kernels in Triton do"""
for _name, _function in ON_GPUS.items():
    _library.impl(_name, on_its_gpu(_function), "CUDA")


# --- shapes, for compilers -------------------------------------------------------------------------------------------


def _fake_sort(edge_index: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = nodes.shape[0]
    return edge_index.new_empty(n + 1), edge_index.new_empty(n + 1), edge_index.new_empty(edge_index.shape[1])


def _fake_convolve(key: str, features: Tensor, *others: Tensor) -> Tensor:
    return features.new_empty(features.shape[0], _convolutions[key][0].width_out)


def _fake_table_convolve(key: str, features: Tensor, harmonics: Tensor, x: Tensor, table: Tensor, edge_index: Tensor,
                         receiver_starts: Tensor, *others: Any) -> Tensor:  # fmt: skip
    return features.new_empty(receiver_starts.shape[0] - 1, _convolutions[key][0].width_out)


def _fake_attend(heads: int, q: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[0], others[6].shape[1], q.shape[1])


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in tensors)


torch.library.register_fake("gossamer::sort_edges", _fake_sort)
torch.library.register_fake("gossamer::convolve", _fake_table_convolve)
torch.library.register_fake("gossamer::convolve_backward", lambda key, gradient, *t: _alike(*t[:3]))
torch.library.register_fake("gossamer::convolve_weighted", _fake_convolve)
torch.library.register_fake("gossamer::convolve_weighted_backward", lambda key, gradient, *t: _alike(*t[:3]))
torch.library.register_fake("gossamer::attend", _fake_attend)
torch.library.register_fake("gossamer::attend_backward", lambda heads, *t: _alike(*t[2:10]))
torch.library.register_fake("gossamer::perpendicular", lambda q, p, y, edge_index, *o: q.new_empty(edge_index.shape[1], q.shape[2]))
torch.library.register_fake("gossamer::perpendicular_backward", lambda gradient, q, p, y, *o: _alike(q, p, y))
torch.library.register_fake("gossamer::map_by_species", lambda x, species, maps: x.new_empty(x.shape[0], x.shape[1], maps.shape[2]))


# --- derivatives -----------------------------------------------------------------------------------------------------


def _save_after_first(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.first = inputs[0]
    ctx.save_for_backward(*inputs[1:])


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _save_convolve(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.key, ctx.intervals = inputs[0], inputs[10]
    ctx.save_for_backward(*inputs[1:10])


def _convolve_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    found = torch.ops.gossamer.convolve_backward(ctx.key, gradient, *ctx.saved_tensors, ctx.intervals)
    return None, *found, None, None, None, None, None, None, None


def _weighted_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    found = torch.ops.gossamer.convolve_weighted_backward(ctx.first, gradient, *ctx.saved_tensors)
    return None, *found, None, None, None, None


def _weighted_second_gradient(ctx: Any, *h: Tensor) -> tuple[Any, ...]:
    """Q(g, f, y, w) is linear in each argument, and the backward pass gives its slopes in f, y, w. Their slopes are again the forward
    and the backward pass with one argument replaced by its cotangent; so the two operators are differentiable any number of times."""
    gradient, f, y, w, *edges = ctx.saved_tensors
    hf, hy, hw = (torch.zeros_like(t) if h_t is None else h_t for t, h_t in zip((f, y, w), h, strict=True))
    forward, backward, key = torch.ops.gossamer.convolve_weighted, torch.ops.gossamer.convolve_weighted_backward, ctx.first
    to_gradient = forward(key, hf, y, w, *edges) + forward(key, f, hy, w, *edges) + forward(key, f, y, hw, *edges)
    _, y1, w1 = backward(key, gradient, hf, y, w, *edges)
    f1, _, w2 = backward(key, gradient, f, hy, w, *edges)
    f2, y2, _ = backward(key, gradient, f, y, hw, *edges)
    return None, to_gradient, f1 + f2, y1 + y2, w1 + w2, None, None, None, None


def _attend_gradient(ctx: Any, dh: Tensor, dout: Tensor) -> tuple[Any, ...]:
    found = torch.ops.gossamer.attend_backward(ctx.first, dh, dout, *ctx.saved_tensors)
    return None, *found, None, None, None, None


def _perpendicular_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return *torch.ops.gossamer.perpendicular_backward(gradient, *ctx.saved_tensors), None, None, None, None


def _map_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    _, species, maps = ctx.saved_tensors
    return torch.ops.gossamer.map_by_species(gradient.contiguous(), species, maps.transpose(1, 2)), None, None


def only_once(ctx: Any, *gradients: Tensor) -> Any:
    """
    Raises:
        RuntimeError: always; without it PyTorch leaves this part of a second derivative out, with a warning.
    """
    raise RuntimeError(
        "Kernels for inference can be differentiated once. For second derivatives take the potential itself, or attach_kernels(potential, 'training')."
    )


torch.library.register_autograd("gossamer::convolve", _convolve_gradient, setup_context=_save_convolve)
torch.library.register_autograd("gossamer::convolve_weighted", _weighted_gradient, setup_context=_save_after_first)
torch.library.register_autograd("gossamer::convolve_weighted_backward", _weighted_second_gradient, setup_context=_save_after_first)
torch.library.register_autograd("gossamer::attend", _attend_gradient, setup_context=_save_after_first)
torch.library.register_autograd("gossamer::perpendicular", _perpendicular_gradient, setup_context=_save_all)
torch.library.register_autograd("gossamer::map_by_species", _map_gradient, setup_context=_save_all)
for _name in ("convolve_backward", "attend_backward", "perpendicular_backward"):
    torch.library.register_autograd(f"gossamer::{_name}", only_once)
