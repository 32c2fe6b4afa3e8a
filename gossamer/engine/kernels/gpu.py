"""The kernels in Triton for GPUs: written for one layer, one warp for each atom and 32 channels of a block.

As on the CPU, an atom collects from its neighbours forward, and a neighbour collects from the atoms it sent to backward.
Gradients of harmonics and distances, which all channels share, are added atomically.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.engine.kernels import table
from gossamer.engine.kernels.cpu import Missing
from gossamer.files import cache_folder, write_text
from gossamer.nn.products import Convolution, Product

LANES = 32
"""channels of one program, and of a chunk of the table"""
LARGEST = 1 << 28
"""numbers in the matrices of all atoms, up to which each atom gets its own copy"""

HEAD = '''"""Written by gossamer.engine.kernels.gpu; not to be changed."""

import triton
import triton.language as tl


@triton.jit
def interval(x, SIZE: tl.constexpr):
    scaled = tl.minimum(tl.maximum(x, 0.0), 1.0) * SIZE
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    k = tl.minimum(scaled.to(tl.int32), SIZE - 1)
    return k, scaled - k
'''
WEIGHTS = """        t2 = t * t
        t3 = t2 * t
        late = t3 * (10 - 15 * t + 6 * t2)
        h0 = 1 - late
        h1 = t - t3 * (6 - 8 * t + 3 * t2)
        h2 = 0.5 * t2 - t3 * (1.5 - 1.5 * t + 0.5 * t2)
        h3 = late
        h4 = t3 * (-4 + 7 * t - 3 * t2)
        h5 = t3 * (0.5 - t + 0.5 * t2)
"""
SLOPES = """        inside = tl.where((distance >= 0) & (distance <= 1), 1.0, 0.0) * SIZE
        rise = 30 * t2 * (1 - t) * (1 - t)
        s0 = -rise
        s1 = 1 - t2 * (18 - 32 * t + 15 * t2)
        s2 = t - t2 * (4.5 - 6 * t + 2.5 * t2)
        s3 = rise
        s4 = t2 * (-12 + 28 * t - 15 * t2)
        s5 = t2 * (1.5 - 4 * t + 2.5 * t2)
"""
SLOPE_LINES = [
    "        distance = tl.load(values + edge)",
    "        k, t = interval(distance, SIZE)",
    WEIGHTS.rstrip("\n"),
    SLOPES.rstrip("\n"),
    "        slope = zero",
]


def generate(convolution: Convolution, edge_weights: bool = False) -> str:
    """Triton source of the forward and backward pass of one layer.

    With ``edge_weights``, the values of the radial functions on every edge are an input, SIZE of them, not a table of SIZE intervals.
    """
    layout = np.array(table.layout(convolution, 1 if edge_weights else LANES)).reshape(-1, 6).tolist()
    pieces = [HEAD]
    for block, (dim, _) in enumerate(convolution.blocks_in):
        mine = {p: product for p, product in enumerate(convolution.products) if product.block == block}
        if mine:
            pieces.append(_forward(block, dim, mine, layout, convolution, edge_weights))
            pieces.append(_backward(block, dim, mine, layout, convolution, edge_weights))
    return "\n\n".join(pieces)


def _matrices(products: dict[int, Product]) -> tuple[list[str], set[tuple[int, int, int]]]:
    """Lines that load the harmonics and form the matrix of each product, and its entries that are not zero."""
    used = sorted({p.edge + s for p in products.values() for s in range(p.coefficients.shape[2])})
    lines = [f"        y{s} = tl.load(harmonics + edge * HARMONICS + {s})" for s in used]
    entries = set()
    for p, product in products.items():
        c = product.coefficients
        for m, k in np.argwhere(np.abs(c).max(axis=2) > 1e-12).tolist():
            entries.add((p, m, k))
            terms = [f"{float(c[m, k, s])!r} * y{product.edge + s}" for s in np.flatnonzero(np.abs(c[m, k]) > 1e-12).tolist()]
            lines.append(f"        m{p}_{m}_{k} = {' + '.join(terms)}")
    return lines, entries


def _radial(name: str, weights: str, first: int, edge_weights: bool = False) -> str:
    if edge_weights:
        return f"        {name} = tl.load(values + edge * SIZE + {first} + u, mask=mask, other=0.0)"
    start = f"table + ({first} + chunk) * ((SIZE + 1) * {3 * LANES}) + k * {3 * LANES} + lane"
    return f"        {name} = " + " + ".join(f"{weights}{n} * tl.load({start} + {n * LANES})" for n in range(6))


def _forward(
    block: int, dim: int, products: dict[int, Product], layout: list[list[int]], convolution: Convolution, edge_weights: bool
) -> str:
    channels, offset, stride = layout[min(products)][:3]
    rows = [(p, m) for p, product in products.items() for m in range(product.coefficients.shape[0])]
    matrices, entries = _matrices(products)
    lines = [
        "@triton.jit",
        f"def forward_{block}(features, harmonics, values, table, sender, receiver_starts, out, SIZE: tl.constexpr, HARMONICS: tl.constexpr):",
        "    i = tl.program_id(0).to(tl.int64)",
        "    chunk = tl.program_id(1)",
        f"    lane = tl.arange(0, {LANES})",
        f"    u = chunk * {LANES} + lane",
        f"    mask = u < {channels}",
        f"    zero = tl.zeros([{LANES}], dtype=features.dtype.element_ty)",
        *(f"    a{p}_{m} = zero" for p, m in rows),
        "    for edge in range(tl.load(receiver_starts + i), tl.load(receiver_starts + i + 1)):",
        f"        f = features + tl.load(sender + edge) * {convolution.width_in} + {offset} + u",
        *(f"        f{k} = tl.load(f + {k * stride}, mask=mask, other=0.0)" for k in range(dim)),
        *([] if edge_weights else ["        k, t = interval(tl.load(values + edge), SIZE)", WEIGHTS.rstrip("\n")]),
        *matrices,
    ]
    for p, product in products.items():
        lines.append(_radial("r", "h", layout[p][5], edge_weights))
        for m in range(product.coefficients.shape[0]):
            terms = [f"m{p}_{m}_{k} * f{k}" for k in range(dim) if (p, m, k) in entries]
            if terms:
                lines.append(f"        a{p}_{m} += r * ({' + '.join(terms)})")
    for p, m in rows:
        start = f"out + i * {convolution.width_out} + {layout[p][3] + m * layout[p][4]} + u"
        lines.append(f"    tl.store({start}, tl.load({start}, mask=mask, other=0.0) + a{p}_{m}, mask=mask)")
    return "\n".join(lines)


def _backward(
    block: int, dim: int, products: dict[int, Product], layout: list[list[int]], convolution: Convolution, edge_weights: bool
) -> str:
    channels, offset, stride = layout[min(products)][:3]
    matrices, entries = _matrices(products)
    lines = [
        "@triton.jit",
        f"def backward_{block}(features, harmonics, values, table, receiver, sender_starts, by_sender, gradient, to_features, to_harmonics, to_values, SIZE: tl.constexpr, HARMONICS: tl.constexpr):",
        "    j = tl.program_id(0).to(tl.int64)",
        "    chunk = tl.program_id(1)",
        f"    lane = tl.arange(0, {LANES})",
        f"    u = chunk * {LANES} + lane",
        f"    mask = u < {channels}",
        f"    zero = tl.zeros([{LANES}], dtype=features.dtype.element_ty)",
        f"    f = features + j * {convolution.width_in} + {offset} + u",
    ]
    for k in range(dim):
        lines += [f"    f{k} = tl.load(f + {k * stride}, mask=mask, other=0.0)", f"    d{k} = zero"]
    lines += [
        "    for place in range(tl.load(sender_starts + j), tl.load(sender_starts + j + 1)):",
        "        edge = tl.load(by_sender + place)",
        f"        g = gradient + tl.load(receiver + edge) * {convolution.width_out} + u",
        *([] if edge_weights else SLOPE_LINES),
        *matrices,
    ]
    touched: list[int] = []
    for p, product in products.items():
        c = product.coefficients
        lines += [f"        g{m} = tl.load(g + {layout[p][3] + m * layout[p][4]}, mask=mask, other=0.0)" for m in range(c.shape[0])]
        lines += [_radial("r", "h", layout[p][5], edge_weights), "        w = zero"]
        for k in range(dim):
            terms = [f"m{p}_{m}_{k} * g{m}" for m in range(c.shape[0]) if (p, m, k) in entries]
            if terms:
                lines.append(f"        d{k} += r * ({' + '.join(terms)})")
        for s in range(c.shape[2]):
            terms = []
            for m in range(c.shape[0]):
                inner = [f"{float(c[m, k, s])!r} * f{k}" for k in range(dim) if abs(c[m, k, s]) > 1e-12]
                if inner:
                    terms.append(f"g{m} * ({' + '.join(inner)})")
            if not terms:
                continue
            name = product.edge + s
            lines.append(f"        v = {' + '.join(terms)}")
            lines.append(f"        z{name} = {f'z{name} + ' if name in touched else ''}r * v")
            lines.append(f"        w += y{name} * v")
            touched += [] if name in touched else [name]
        if edge_weights:
            lines.append(f"        tl.store(to_values + edge * SIZE + {layout[p][5]} + u, w, mask=mask)")
        else:
            lines += [_radial("q", "s", layout[p][5]), "        slope += q * w"]
    lines += [f"        tl.atomic_add(to_harmonics + edge * HARMONICS + {s}, tl.sum(z{s}, axis=0))" for s in touched]
    if not edge_weights:
        lines.append("        tl.atomic_add(to_values + edge, tl.sum(slope, axis=0) * inside)")
    lines += [f"    tl.store(to_features + j * {convolution.width_in} + {offset + k * stride} + u, d{k}, mask=mask)" for k in range(dim)]
    return "\n".join(lines)


def need_triton() -> None:
    """
    Raises:
        Missing: Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise Missing("Triton is not installed")


@functools.cache
def module(source: str, name: str = "convolution") -> Any:
    """The kernels in some source; Triton wants it in a file.

    Raises:
        Missing: Triton is not installed, or the cache cannot be written.
    """
    need_triton()
    name = f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    path = cache_folder() / f"{name}.py"
    try:
        if not path.exists() or path.read_text() != source:
            write_text(path, source)
    except OSError as error:
        raise Missing(f"a kernel cannot be kept in '{path.parent}' ({error}); set GOSSAMER_CACHE to a folder that can be written") from None
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@functools.cache
def kernels(convolution: Convolution, key: str, edge_weights: bool = False) -> Any:
    """The kernels of a layer; ``key`` is the convolution's own, since convolutions compare without their coefficients."""
    del key
    return module(generate(convolution, edge_weights))


def _launches(convolution: Convolution) -> list[tuple[int, int]]:
    """(block, chunks of channels) of each launch."""
    used = sorted({p.block for p in convolution.products})
    return [(b, -(-convolution.blocks_in[b][1] // LANES)) for b in used]


def forward(
    convolution: Convolution, built: Any, features: Tensor, harmonics: Tensor, values: Tensor, table: Tensor, size: int,
    edge_index: Tensor, receiver_starts: Tensor,
) -> Tensor:  # fmt: skip
    """``values``: distances, with a table of ``size`` intervals; or ``size`` radial functions of every edge, and any table."""
    features, harmonics, values = features.contiguous(), harmonics.contiguous(), values.contiguous()
    out = features.new_zeros(features.shape[0], convolution.width_out)
    options: dict[str, Any] = {"SIZE": size, "HARMONICS": harmonics.shape[1], "num_warps": 1, "enable_fp_fusion": True}
    for block, chunks in _launches(convolution):
        getattr(built, f"forward_{block}")[(features.shape[0], chunks)](
            features, harmonics, values, table, edge_index[0], receiver_starts, out, **options
        )
    return out


def backward(
    convolution: Convolution, built: Any, gradient: Tensor, features: Tensor, harmonics: Tensor, values: Tensor, table: Tensor, size: int,
    edge_index: Tensor, sender_starts: Tensor, by_sender: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of features, harmonics and values; arguments as forward."""
    gradient, features, harmonics, values = (t.contiguous() for t in (gradient, features, harmonics, values))
    results = torch.zeros_like(features), torch.zeros_like(harmonics), torch.zeros_like(values)
    options: dict[str, Any] = {"SIZE": size, "HARMONICS": harmonics.shape[1], "num_warps": 1, "enable_fp_fusion": True}
    for block, chunks in _launches(convolution):
        getattr(built, f"backward_{block}")[(features.shape[0], chunks)](
            features, harmonics, values, table, edge_index[1], sender_starts, by_sender, gradient, *results, **options
        )
    return results


def sort_edges(edge_index: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First edge of each receiver; first edge of each sender in ``by_sender``; edges sorted by sender. Does not wait for the GPU."""
    sender, receiver = edge_index.contiguous()
    atoms = torch.arange(nodes.shape[0] + 1, device=edge_index.device)
    by_sender = torch.argsort(sender, stable=True)
    return torch.searchsorted(receiver, atoms), torch.searchsorted(sender.index_select(0, by_sender), atoms), by_sender


def map_by_species(x: Tensor, species: Tensor, maps: Tensor) -> Tensor:
    """Every atom (N, dim, in) with the matrix (in, out) of its element. Does not wait for the GPU while these matrices fit easily."""
    n_atoms, _, n_in = x.shape
    if n_atoms * n_in * maps.shape[2] <= LARGEST:
        return torch.bmm(x, maps.index_select(0, species))
    out = x.new_zeros(n_atoms, x.shape[1], maps.shape[2])
    for element, matrix in enumerate(maps):
        rows = (species == element).nonzero()[:, 0]
        out.index_copy_(0, rows, x.index_select(0, rows) @ matrix)
    return out
