"""The kernels as PyTorch operators with derivatives (first ones: they are for inference), opaque to compilers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.kernels import cpu
from gossamer.kernels.product import Convolution

_library = torch.library.Library("gossamer", "FRAGMENT")
_library.define("sort_edges(str key, Tensor edge_index, Tensor nodes) -> (Tensor, Tensor, Tensor)")
_library.define(
    "convolve(str key, Tensor features, Tensor harmonics, Tensor x, Tensor table, Tensor edge_index, Tensor rows, Tensor columns, Tensor order) -> Tensor"
)
_library.define(
    "convolve_backward(str key, Tensor gradient, Tensor features, Tensor harmonics, Tensor x, Tensor table, Tensor edge_index, "
    "Tensor columns, Tensor order) -> (Tensor, Tensor, Tensor)"
)
_library.define("map_by_species(Tensor x, Tensor species, Tensor maps) -> Tensor")

_convolutions: dict[str, tuple[Convolution, Tensor]] = {}
"""by key, with the layout of the CPU's kernel"""


def register(convolution: Convolution, dtype: torch.dtype) -> str:
    """Build the kernel of a layer, and return the key by which operators know it.

    Raises:
        Missing: it cannot be built on this machine.
    """
    cpu.library(convolution, convolution.key, dtype)
    layout = torch.tensor(convolution.layout(cpu.LANES[dtype]))
    key = f"{convolution.key}-{'-'.join(str(m) for _, m in (*convolution.blocks_in, *convolution.blocks_out))}-{cpu.LANES[dtype]}"
    _convolutions[key] = convolution, layout
    return key


def _sort_edges(key: str, edge_index: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    convolution, _ = _convolutions[key]
    n, edges = nodes.shape[0], edge_index.shape[1]
    rows, columns, order = (edge_index.new_empty(size) for size in (n + 1, n + 1, edges))
    library = cpu.library(convolution, convolution.key, torch.float64 if key.endswith("-8") else torch.float32)
    library.sort_edges(n, edges, *cpu.pointers(edge_index, rows, columns, order))
    return rows, columns, order


def _convolve(
    key: str,
    features: Tensor,
    harmonics: Tensor,
    x: Tensor,
    table: Tensor,
    edge_index: Tensor,
    rows: Tensor,
    columns: Tensor,
    order: Tensor,
) -> Tensor:
    convolution, layout = _convolutions[key]
    n = features.shape[0]
    features, harmonics, x = features.contiguous(), harmonics.contiguous(), x.contiguous()
    out = features.new_empty(n, convolution.width_out)
    cpu.library(convolution, convolution.key, features.dtype).forward(
        n, convolution.width_in, convolution.width_out, table.shape[1] - 1, torch.get_num_threads(),
        *cpu.pointers(layout, features, harmonics, x, table, edge_index, rows, out),
    )  # fmt: skip
    return out


def _convolve_backward(
    key: str,
    gradient: Tensor,
    features: Tensor,
    harmonics: Tensor,
    x: Tensor,
    table: Tensor,
    edge_index: Tensor,
    columns: Tensor,
    order: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    convolution, layout = _convolutions[key]
    features, harmonics, x, gradient = features.contiguous(), harmonics.contiguous(), x.contiguous(), gradient.contiguous()
    results = torch.empty_like(features), torch.empty_like(harmonics), torch.empty_like(x)
    cpu.library(convolution, convolution.key, features.dtype).backward(
        features.shape[0], convolution.width_in, convolution.width_out, table.shape[1] - 1, torch.get_num_threads(),
        *cpu.pointers(layout, features, harmonics, x, table, edge_index[1], columns, order, gradient, *results),
    )  # fmt: skip
    return results


def _map_by_species(x: Tensor, species: Tensor, maps: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], x.shape[1], maps.shape[2])
    present = torch.bincount(species, minlength=maps.shape[0]).nonzero()[:, 0].tolist()
    if len(present) == 1:
        return x @ maps[present[0]]
    for element in present:
        rows = (species == element).nonzero()[:, 0]
        out.index_copy_(0, rows, x.index_select(0, rows) @ maps[element])
    return out


for _name, _function in {"sort_edges": _sort_edges, "convolve": _convolve, "convolve_backward": _convolve_backward}.items():
    _library.impl(_name, _function, "CPU")
_library.impl("map_by_species", _map_by_species, "CompositeExplicitAutograd")


def _fake_sort(key: str, edge_index: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = nodes.shape[0]
    return edge_index.new_empty(n + 1), edge_index.new_empty(n + 1), edge_index.new_empty(edge_index.shape[1])


def _fake_convolve(key: str, features: Tensor, *others: Tensor) -> Tensor:
    return features.new_empty(features.shape[0], _convolutions[key][0].width_out)


def _fake_backward(key: str, gradient: Tensor, features: Tensor, harmonics: Tensor, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    return torch.empty_like(features), torch.empty_like(harmonics), torch.empty_like(x)


def _save_convolve(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.key = inputs[0]
    ctx.save_for_backward(*inputs[1:])


def _convolve_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    features, harmonics, x, table, edge_index, _, columns, order = ctx.saved_tensors
    found = torch.ops.gossamer.convolve_backward(ctx.key, gradient, features, harmonics, x, table, edge_index, columns, order)
    return None, *found, None, None, None, None, None


def _save_map(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _map_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    species, maps = ctx.saved_tensors
    return torch.ops.gossamer.map_by_species(gradient.contiguous(), species, maps.transpose(1, 2)), None, None


torch.library.register_fake("gossamer::sort_edges", _fake_sort)
torch.library.register_fake("gossamer::convolve", _fake_convolve)
torch.library.register_fake("gossamer::convolve_backward", _fake_backward)
torch.library.register_fake("gossamer::map_by_species", lambda x, species, maps: x.new_empty(x.shape[0], x.shape[1], maps.shape[2]))
torch.library.register_autograd("gossamer::convolve", _convolve_gradient, setup_context=_save_convolve)
torch.library.register_autograd("gossamer::map_by_species", _map_gradient, setup_context=_save_map)
