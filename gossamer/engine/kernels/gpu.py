"""The kernels in Triton for GPUs: written for one layer, one to four warps for each atom and up to 128 channels of a block.

As on the CPU, an atom collects from its neighbours forward, and a neighbour collects from the atoms it sent to backward.
A program works on tiles of several edges times channels, so that a warp computes once what all channels of an edge share.
Nothing is added atomically: the blocks of a layer follow one another, and chunks of channels are summed afterwards.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.engine.kernels import table
from gossamer.engine.kernels.cpu import Missing
from gossamer.files import cache_folder, write_text
from gossamer.nn.products import Convolution, Product

LANES = 32
"""channels of a chunk of the table"""
FEW = 1024
"""programs up to which four warps share the edges of an atom, or most of a GPU would have nothing to do"""
SUMS = (12, 24)
"""sums over edges or channels up to which a thread holds 4, or 2, numbers of each"""
LARGEST = 1 << 28
"""numbers in the matrices of atoms that are copied at once"""

HEAD = '''"""Written by gossamer.engine.kernels.gpu; not to be changed."""

import triton
import triton.language as tl


@triton.jit
def interval(x, SIZE):
    scaled = tl.minimum(tl.maximum(x, 0.0), 1.0) * SIZE
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    k = tl.minimum(scaled.to(tl.int32), SIZE - 1)
    return k, scaled - k
'''
SPLINE = """        x = tl.load(values + edge, mask=here, other=0.0)[:, None]
        k, t = interval(x, SIZE)
        if first_row is not None:
            k = k + tl.load(first_row + edge, mask=here, other=0)[:, None]
        at = table + k * KNOT + lane
        t2 = t * t
        t3 = t2 * t
        late = t3 * (10 - 15 * t + 6 * t2)
        h0 = 1 - late
        h1 = t - t3 * (6 - 8 * t + 3 * t2)
        h2 = 0.5 * t2 - t3 * (1.5 - 1.5 * t + 0.5 * t2)
        h3 = late
        h4 = t3 * (-4 + 7 * t - 3 * t2)
        h5 = t3 * (0.5 - t + 0.5 * t2)""".replace("KNOT", str(3 * LANES))
SLOPES = """        inside = tl.where((x >= 0) & (x <= 1), 1.0, 0.0) * SIZE
        rise = inside * (30 * t2 * (1 - t) * (1 - t))
        s1 = inside * (1 - t2 * (18 - 32 * t + 15 * t2))
        s2 = inside * (t - t2 * (4.5 - 6 * t + 2.5 * t2))
        s4 = inside * (t2 * (-12 + 28 * t - 15 * t2))
        s5 = inside * (t2 * (1.5 - 4 * t + 2.5 * t2))
        slope = zero"""


def generate(convolution: Convolution, edge_weights: bool = False) -> str:
    """Triton source of the forward and backward pass of one layer.

    With ``edge_weights``, the values of the radial functions on every edge are an input, SIZE of them, not a table of SIZE intervals in
    ROWS rows, where those of an edge begin at its ``first_row``.
    """
    layout = np.array(table.layout(convolution, 1 if edge_weights else LANES)).reshape(-1, 6).tolist()
    pieces = [HEAD]
    for block in used_blocks(convolution):
        mine = {p: product for p, product in enumerate(convolution.products) if product.block == block}
        pieces.append(_forward(block, mine, layout, convolution, edge_weights))
        pieces.append(_backward(block, mine, layout, convolution, edge_weights))
    return "\n\n".join(pieces)


def used_blocks(convolution: Convolution) -> list[int]:
    return sorted({p.block for p in convolution.products})


def tile(convolution: Convolution, block: int, backward: bool) -> tuple[int, int]:
    """Edges and channels that a warp works on at once: as many numbers per thread as the sums leave registers for."""
    products = [p for p in convolution.products if p.block == block]
    harmonics = {p.edge + s for p in products for s in range(p.coefficients.shape[2])}
    sums = convolution.blocks_in[block][0] + len(harmonics) if backward else sum(p.coefficients.shape[0] for p in products)
    each = 4 if sums <= SUMS[0] else 2 if sums <= SUMS[1] else 1
    width = min(32 * each, max(each, 1 << (convolution.blocks_in[block][1] - 1).bit_length()))
    return 32 * each // width, width


def chunks(convolution: Convolution, block: int, backward: bool) -> int:
    """Programs that share the channels of a block."""
    return -(-convolution.blocks_in[block][1] // tile(convolution, block, backward)[1])


def warps(n_atoms: int, n_chunks: int) -> int:
    """Warps of a program: each goes through a part of the edges of its atom. (One on an H200 is 1.3 times as fast as four at 10,125 atoms,
    four are twice as fast as one at 192.) A compiled program, which takes any number of atoms, has one."""
    if isinstance(n_atoms, torch.SymInt):
        return 1
    return 4 if n_atoms * n_chunks <= FEW else 1


def _head(name: str, arguments: str, block: int, convolution: Convolution, loop: str, first: list[str], edge_weights: bool) -> list[str]:
    """Lines up to the loop over the edges of an atom, and in it those that say which edges these are."""
    width = tile(convolution, block, name == "backward")[1]
    changing = ["edges", "ROWS", *([] if edge_weights else ["SIZE"])]  # or it is compiled again and again
    return [
        f'@triton.jit(do_not_specialize={changing}, do_not_specialize_on_alignment=["receiver"])',
        f"def {name}_{block}({arguments}, {'SIZE: tl.constexpr' if edge_weights else 'SIZE'}, ROWS, HARMONICS: tl.constexpr, TILE: tl.constexpr):",
        "    atom = tl.program_id(0).to(tl.int64)",
        f"    u = (tl.program_id(1) * {width} + tl.arange(0, {width}))[None, :]",
        f"    mask = u < {convolution.blocks_in[block][1]}",
        f"    lane = u // {LANES} * (ROWS * {3 * LANES}) + u % {LANES}",
        f"    zero = tl.zeros([TILE, {width}], dtype=features.dtype.element_ty)",
        *first,
        f"    end = tl.load({loop} + atom + 1)",
        f"    for start in range(tl.load({loop} + atom), end, TILE):",
        "        place = start + tl.arange(0, TILE)",
        "        here = place < end",
        "        both = here[:, None] & mask",
    ]


def _harmonics(products: dict[int, Product]) -> list[str]:
    """Lines that load the harmonics of the edges."""
    used = sorted({p.edge + s for p in products.values() for s in range(p.coefficients.shape[2])})
    return [f"        y{s} = tl.load(harmonics + edge * HARMONICS + {s}, mask=here, other=0.0)[:, None]" for s in used]


def _matrix(product: Product) -> tuple[list[str], set[tuple[int, int]]]:
    """Lines that form the matrix of a product from the harmonics, and its entries that are not zero."""
    c, lines, entries = product.coefficients, [], set()
    for m, k in np.argwhere(np.abs(c).max(axis=2) > 1e-12).tolist():
        entries.add((m, k))
        terms = [f"{float(c[m, k, s])!r} * y{product.edge + s}" for s in np.flatnonzero(np.abs(c[m, k]) > 1e-12).tolist()]
        lines.append(f"        m{m}_{k} = {' + '.join(terms)}")
    return lines, entries


def _radial(first: int, edge_weights: bool, slopes: bool = False) -> list[str]:
    """Lines that give the radial functions r of a product, and with ``slopes`` their derivatives q."""
    if edge_weights:
        return [f"        r = tl.load(values + edge[:, None] * SIZE + {first} + u, mask=both, other=0.0)"]
    start = f"at + {first} * (ROWS * {3 * LANES})"
    lines = [f"        t{n} = tl.load({start} + {n * LANES}, mask=mask, other=0.0)" for n in range(6)]
    lines.append("        r = " + " + ".join(f"h{n} * t{n}" for n in range(6)))
    return [*lines, "        q = rise * (t3 - t0) + s1 * t1 + s2 * t2 + s4 * t4 + s5 * t5"] if slopes else lines


def _forward(block: int, products: dict[int, Product], layout: list[list[int]], convolution: Convolution, edge_weights: bool) -> str:
    _, offset, stride = layout[min(products)][:3]
    rows = [(p, m) for p, product in products.items() for m in range(product.coefficients.shape[0])]
    sums = [f"    a{p}_{m} = zero" for p, m in rows]
    arguments = "features, harmonics, values, first_row, table, sender, receiver_starts, out"
    dim = convolution.blocks_in[block][0]
    lines = [
        *_head("forward", arguments, block, convolution, "receiver_starts", sums, edge_weights),
        "        edge = place",
        f"        f = features + tl.load(sender + edge, mask=here, other=0)[:, None] * {convolution.width_in} + {offset} + u",
        *(f"        f{k} = tl.load(f + {k * stride}, mask=both, other=0.0)" for k in range(dim)),
        *([] if edge_weights else [SPLINE]),
        *_harmonics(products),
    ]
    for p, product in products.items():
        matrix, entries = _matrix(product)
        lines += [*matrix, *_radial(layout[p][5], edge_weights)]
        for m in range(product.coefficients.shape[0]):
            terms = [f"m{m}_{k} * f{k}" for k in range(dim) if (m, k) in entries]
            if terms:
                lines.append(f"        a{p}_{m} += r * ({' + '.join(terms)})")
    for p, m in rows:
        start = f"out + atom * {convolution.width_out} + {layout[p][3] + m * layout[p][4]} + u"
        lines.append(f"    tl.store({start}, tl.load({start}, mask=mask, other=0.0) + tl.sum(a{p}_{m}, axis=0)[None, :], mask=mask)")
    return "\n".join(lines)


def _backward(block: int, products: dict[int, Product], layout: list[list[int]], convolution: Convolution, edge_weights: bool) -> str:
    _, offset, stride = layout[min(products)][:3]
    dim = convolution.blocks_in[block][0]
    own = [f"    f = features + atom * {convolution.width_in} + {offset} + u"]
    for k in range(dim):
        own += [f"    f{k} = tl.load(f + {k * stride}, mask=mask, other=0.0)", f"    d{k} = zero"]
    arguments = "features, harmonics, values, first_row, table, receiver, sender_starts, by_sender, gradient, to_features, to_harmonics, to_values, edges"
    lines = [
        *_head("backward", arguments, block, convolution, "sender_starts", own, edge_weights),
        "        edge = tl.load(by_sender + place, mask=here, other=0)",
        f"        g = gradient + tl.load(receiver + edge, mask=here, other=0)[:, None] * {convolution.width_out} + u",
        *([] if edge_weights else [SPLINE, SLOPES]),
        *_harmonics(products),
    ]
    touched: list[int] = []
    for p, product in products.items():
        c = product.coefficients
        matrix, entries = _matrix(product)
        lines += [f"        g{m} = tl.load(g + {layout[p][3] + m * layout[p][4]}, mask=both, other=0.0)" for m in range(c.shape[0])]
        lines += [*matrix, *_radial(layout[p][5], edge_weights, slopes=not edge_weights), "        w = zero"]
        for k in range(dim):
            terms = [f"m{m}_{k} * g{m}" for m in range(c.shape[0]) if (m, k) in entries]
            if terms:
                lines += [f"        b = {' + '.join(terms)}", f"        d{k} += r * b", f"        w += f{k} * b"]
        for s in range(c.shape[2]):
            terms = []
            for k in range(dim):
                inner = [f"{float(c[m, k, s])!r} * g{m}" for m in range(c.shape[0]) if abs(c[m, k, s]) > 1e-12]
                terms += [f"f{k} * ({' + '.join(inner)})"] if inner else []
            if terms:
                name = product.edge + s
                lines.append(f"        z{name} = {f'z{name} + ' if name in touched else ''}r * ({' + '.join(terms)})")
                touched += [] if name in touched else [name]
        if edge_weights:
            lines.append(f"        tl.store(to_values + edge[:, None] * SIZE + {layout[p][5]} + u, w, mask=both)")
        else:
            lines.append("        slope += q * w")
    later = block > used_blocks(convolution)[0]  # what earlier blocks gave is there
    results = [(f"to_harmonics + (tl.program_id(1) * edges + edge) * HARMONICS + {s}", f"z{s}") for s in touched]
    results += [] if edge_weights else [("to_values + tl.program_id(1) * edges + edge", "slope")]
    before = [f"n{number} + " if later else "" for number in range(len(results))]
    lines += [f"        n{number} = tl.load({start}, mask=here, other=0.0)" for number, (start, _) in enumerate(results) if later]
    lines += [f"        tl.store({start}, {n}tl.sum({name}, axis=1), mask=here)" for (start, name), n in zip(results, before, strict=True)]
    lines += [
        f"    tl.store(to_features + atom * {convolution.width_in} + {offset + k * stride} + u, tl.sum(d{k}, axis=0)[None, :], mask=mask)"
        for k in range(dim)
    ]
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
        if not path.exists() or path.read_text("utf-8") != source:
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


_inlining: ContextVar[bool] = ContextVar("inlining", default=False)


@contextmanager
def inlining() -> Iterator[None]:
    """While the block runs, launches become parts of the program that is traced (`gossamer.engine.kernels.inline`)."""
    before = _inlining.set(True)
    try:
        yield
    finally:
        _inlining.reset(before)


def launch(kernel: Any, grid: tuple[Any, ...]) -> Callable[..., None]:
    """What launches a kernel, or puts its launch into the program that is traced."""
    if not _inlining.get():
        found: Callable[..., None] = kernel[grid]
        return found
    traced: Any = torch.library.wrap_triton(kernel)[grid]  # type: ignore[index]

    def put(*arguments: Any, enable_fp_fusion: bool, **options: Any) -> None:
        assert enable_fp_fusion  # as it is where nothing is said; the compiler can be told of warps only
        traced(*arguments, **options)

    return put


def _options(
    convolution: Convolution, block: int, backward: bool, n_atoms: int, harmonics: Tensor, size: int, rows: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Programs, and what is fixed when a kernel is compiled."""
    n_chunks = chunks(convolution, block, backward)
    n_warps = warps(n_atoms, n_chunks)
    tiled = n_warps * tile(convolution, block, backward)[0]
    options = {"SIZE": size, "ROWS": rows, "HARMONICS": harmonics.shape[1], "TILE": tiled, "num_warps": n_warps, "enable_fp_fusion": True}
    return (n_atoms, n_chunks), options


def forward(
    convolution: Convolution, built: Any, features: Tensor, harmonics: Tensor, values: Tensor, table: Tensor, size: int,
    edge_index: Tensor, receiver_starts: Tensor, first_row: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``values``: distances, with a table of ``size`` intervals, which begin at ``first_row``; or ``size`` radial functions of every edge, and any table."""
    features, harmonics, values = features.contiguous(), harmonics.contiguous(), values.contiguous()
    n_receivers = receiver_starts.shape[0] - 1  # fewer than there are features where other processes have the last of them
    out = features.new_zeros(n_receivers, convolution.width_out)
    for block in used_blocks(convolution):
        grid, options = _options(convolution, block, False, n_receivers, harmonics, size, table.shape[1])
        kernel = getattr(built, f"forward_{block}")
        launch(kernel, grid)(features, harmonics, values, first_row, table, edge_index[0], receiver_starts, out, **options)
    return out


def backward(
    convolution: Convolution, built: Any, gradient: Tensor, features: Tensor, harmonics: Tensor, values: Tensor, table: Tensor, size: int,
    edge_index: Tensor, sender_starts: Tensor, by_sender: Tensor, first_row: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of features, harmonics and values; arguments as forward."""
    gradient, features, harmonics, values = (t.contiguous() for t in (gradient, features, harmonics, values))
    blocks, n_edges = used_blocks(convolution), edge_index.shape[1]
    parts = max(chunks(convolution, b, True) for b in blocks)
    to_features, to_harmonics = torch.zeros_like(features), harmonics.new_zeros(parts, *harmonics.shape)
    to_values = values.new_zeros(parts, n_edges) if values.dim() == 1 else torch.empty_like(values)
    for block in blocks:
        grid, options = _options(convolution, block, True, features.shape[0], harmonics, size, table.shape[1])
        launch(getattr(built, f"backward_{block}"), grid)(
            features, harmonics, values, first_row, table, edge_index[1], sender_starts, by_sender, gradient, to_features, to_harmonics, to_values,
            n_edges, **options,
        )  # fmt: skip
    return to_features, _summed(to_harmonics), _summed(to_values) if values.dim() == 1 else to_values


def _summed(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(dim=0)


def sort_edges(edge_index: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First edge of each receiver; first edge of each sender in ``by_sender``; edges sorted by sender. Does not wait for the GPU."""
    sender, receiver = edge_index.contiguous()
    atoms = torch.arange(nodes.shape[0] + 1, device=edge_index.device)
    by_sender = torch.argsort(sender, stable=True)
    return torch.searchsorted(receiver, atoms), torch.searchsorted(sender.index_select(0, by_sender), atoms), by_sender


def map_by_species(x: Tensor, species: Tensor, maps: Tensor) -> Tensor:
    """Every atom (N, dim, in) with the matrix (in, out) of its element. Does not wait for the GPU."""
    n_atoms, dim, n_in = x.shape
    n_elements, _, n_out = maps.shape
    if n_elements * dim <= n_in:  # all elements' results are fewer numbers than one matrix
        results = (x @ maps.transpose(0, 1).reshape(n_in, -1)).reshape(n_atoms, dim, n_elements, n_out)
        return results.gather(2, species[:, None, None, None].expand(-1, dim, 1, n_out)).squeeze(2)
    step = max(1, LARGEST // (n_in * n_out))
    parts = zip(x.split(step), species.split(step), strict=True)
    return torch.cat([torch.bmm(part, maps.index_select(0, s)) for part, s in parts]) if n_atoms else x.new_zeros(0, dim, n_out)
