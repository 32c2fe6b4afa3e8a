"""The kernels in C++ for CPUs: written for one structure of products, built once by the machine's compiler, kept in the cache.

Forward, an atom collects from its neighbours; backward, a neighbour collects from the atoms it sent to. So nothing is
written twice, no thread waits for another, results do not depend on the number of threads, and no tensor of the size of
edges times channels exists. Vectors run along channels.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gossamer.engine import cache
from gossamer.engine.kernels.table import powers
from gossamer.files import cache_folder
from gossamer.nn.products import Convolution, Product

log = logging.getLogger(__name__)
ROWS = 32
"""components of results that are summed at once; a block with more is gone through again"""
HERE = Path(__file__).parent


def text(name: str) -> str:
    return (HERE / f"{name}.hpp").read_text("utf-8")


def generate(convolution: Convolution, edge_weights: bool = False) -> str:
    """C++ source of the forward and backward pass; channels and precision stay open.

    With ``edge_weights``, the values of the radial functions on every edge are an input, not a table.
    """
    entries: dict[tuple[int, int, int], int] = {}
    matrices = []
    for p, product in enumerate(convolution.products):
        c = product.coefficients
        for m, k in np.argwhere(np.abs(c).max(axis=2) > 1e-12).tolist():
            entries[p, m, k] = len(entries)
            terms = [
                f"T({float(c[m, k, s])!r}) * load<LANES>(y + {product.edge + s} * LANES)"
                for s in np.flatnonzero(np.abs(c[m, k]) > 1e-12).tolist()
            ]
            matrices.append(f"  store<LANES>(m + {entries[p, m, k]} * LANES, {_sum(terms)});")
    pieces = ["#define EDGE_WEIGHTS"] if edge_weights else []
    few = all(sum(convolution.products[p].coefficients.shape[2] for p in part) <= 8 for part in parts(convolution))
    pieces.append(f"#define WIDTH {'LANES' if few else 1}  // few sums of an edge are kept as vectors until the end")
    pieces += [f"#define HARMONICS {convolution.n_harmonics}", f"#define ENTRIES {len(entries)}", text("vectors"), text("convolution")]
    pieces.append("static void matrices(const T *y, T *m) {\n" + "\n".join(matrices) + "\n}")
    names, most = [], [0, 0]
    for number, part in enumerate(parts(convolution)):
        products = [convolution.products[p] for p in part]
        dim, rows = products[0].coefficients.shape[1], sum(product.coefficients.shape[0] for product in products)
        mine = {(n, m, k): entry for (p, m, k), entry in entries.items() for n in range(len(part)) if part[n] == p}
        pieces += [forward_source(number, products, mine), backward_source(number, products, mine)]
        functions = ", ".join(f"{way}_{number}<{whole}>" for way in ("forward", "backward") for whole in ("true", "WHOLE_ONLY"))
        names.append(f"  {{{dim}, {rows}, {len(part)}, {functions}}},")
        most = [max(most[0], dim), max(most[1], rows)]
    pieces.append(f"#define MOST_DIM {most[0]}\n#define MOST_ROWS {most[1]}")
    pieces.append("static const Part PARTS[] = {\n" + "\n".join(names) + "\n};")
    return "\n".join([*pieces, text("drivers")])


def operations(convolution: Convolution) -> int:
    """Multiply-adds per edge, forward and backward, as they are written here."""
    total = 0
    for p, channels in zip(convolution.products, convolution.channels, strict=True):
        nonzero = np.abs(p.coefficients) > 1e-12
        matrix, harmonics = nonzero.any(axis=2).sum(), nonzero.any(axis=1).sum()  # entries (m, c) and (m, s)
        rows, columns, edges = p.coefficients.shape
        forward = 5 + matrix + rows
        backward = 9 + matrix + 2 * columns + harmonics + edges + 1
        total += channels * int(forward + backward)
    return total


def parts(convolution: Convolution) -> list[list[int]]:
    """Successive products of one block with at most ROWS components of results together: what is gone through at once."""
    found: list[list[int]] = []
    used, block = 0, -1
    for number, product in enumerate(convolution.products):
        rows = product.coefficients.shape[0]
        if product.block != block or used + rows > ROWS:
            found.append([])
            used, block = 0, product.block
        found[-1].append(number)
        used += rows
    return found


def _sum(terms: list[str]) -> str:
    return " + ".join(terms)


def forward_source(name: int, products: list[Product], entries: dict[tuple[int, int, int], int]) -> str:
    """Sums over the edges of an atom."""
    dim = products[0].coefficients.shape[1]
    rows = [(p, m) for p, product in enumerate(products) for m in range(product.coefficients.shape[0])]
    lines = [
        *(f"  V a{p}_{m} = {{}};" for p, m in rows),
        f"  EDGES({dim}, {_ahead(products)})",
        *(f"    OTHER(f{k}, {k})" for k in range(dim)),
    ]
    for p, product in enumerate(products):
        lines.append(f"    RADIAL(r{p}, {p})")
        for m in range(product.coefficients.shape[0]):
            terms = [f"m[{entries[p, m, k]} * LANES] * f{k}" for k in range(dim) if (p, m, k) in entries]
            if terms:
                lines.append(f"    a{p}_{m} += r{p} * ({_sum(terms)});")
    lines += ["  }", *(f"  out[{row}] = a{p}_{m};" for row, (p, m) in enumerate(rows))]
    return _function(f"forward_{name}", "V *out", lines)


def backward_source(name: int, products: list[Product], entries: dict[tuple[int, int, int], int]) -> str:
    """Gradients of an atom's features, and of harmonics and distances of the edges on which it sends them."""
    dim, rows = products[0].coefficients.shape[1], sum(product.coefficients.shape[0] for product in products)
    lines = [f"  V f{k} = f[{k}], d{k} = {{}};" for k in range(dim)]
    used: set[int] = set()
    for p, product in enumerate(products):
        c = product.coefficients
        for m, s in np.argwhere(np.abs(c).max(axis=1) > 1e-12).tolist():
            terms = [f"T({float(c[m, k, s])!r}) * f{k}" for k in range(dim) if abs(c[m, k, s]) > 1e-12]
            lines.append(f"  V p{p}_{m}_{s} = {_sum(terms)};")
            used.add(product.edge + s)
    lines += [f"  EDGES({rows}, {_ahead(products)})", "    V slope = {};", *(f"    V y{s} = {{}};" for s in sorted(used))]
    row = 0
    for p, product in enumerate(products):
        c = product.coefficients
        lines += ["    {", *(f"      OTHER(g{m}, {row + m})" for m in range(c.shape[0]))]
        row += c.shape[0]
        lines += [f"      RADIAL_AND_SLOPE(r, q, {p})", "      V w = {};"]
        for k in range(dim):
            terms = [f"m[{entries[p, m, k]} * LANES] * g{m}" for m in range(c.shape[0]) if (p, m, k) in entries]
            if terms:
                lines.append(f"      {{ V t = {_sum(terms)}; d{k} += r * t; w += f{k} * t; }}")
        for s in range(c.shape[2]):
            terms = [f"g{m} * p{p}_{m}_{s}" for m in range(c.shape[0]) if np.abs(c[m, :, s]).max() > 1e-12]
            if terms:
                lines.append(f"      y{product.edge + s} += r * ({_sum(terms)});")
        lines += [f"      GRADIENT(w, q, {p})", "    }"]
    low, n = min(used), max(used) + 1 - min(used)
    lines.append(f"    SUMS({low}, {n}, {', '.join(f'y{s}' if s in used else 'V{}' for s in range(low, low + n))})")
    lines += ["  }", *(f"  d[{k}] = d{k};" for k in range(dim))]
    return _function(f"backward_{name}", "const V *f, V *d", lines)


def _ahead(products: list[Product]) -> str:
    """Whether to fetch what the next edge needs: the processor itself looks no further than past one product."""
    return str(len(products) > 1).lower()


def _function(name: str, arguments: str, lines: list[str]) -> str:
    head = f"template <bool WHOLE> static void {name}(const Tile &tile, int64_t first, int64_t last, const Place &place, {arguments})"
    return "\n".join([head + " {", *lines, "}"])


@functools.cache
def lanes(dtype: torch.dtype) -> int:
    """Numbers of a vector on this machine."""
    size = torch.zeros(1, dtype=torch.int64)
    sorting().vector_bytes(*pointers(size))
    return int(size) // dtype.itemsize


def layout(convolution: Convolution) -> list[int]:
    """For each part its channels, and where the rows of its block and of its results begin."""
    starts = np.cumsum([0, *(d * m for d, m in convolution.blocks_in)]).tolist()
    outs = np.cumsum([0, *(d * m for d, m in convolution.blocks_out)]).tolist()
    numbers = []
    for part in parts(convolution):
        products = [convolution.products[p] for p in part]
        dim, channels = convolution.blocks_in[products[0].block]
        numbers += [channels, *(starts[products[0].block] + k * channels for k in range(dim))]
        for p in products:
            numbers += [outs[p.out] + p.channel + m * convolution.blocks_out[p.out][1] for m in range(p.coefficients.shape[0])]
    return numbers


def pack(convolution: Convolution, table: Float[Tensor, "rows 3 values"], lanes: int) -> Float[Tensor, "chunks rows 6 lanes"]:
    """Polynomials of the intervals from every row to the next: for each part and chunk of its channels those of its products.

    The last chunk of channels is filled up with zeros, and so is the last row, where no interval begins.
    """
    filled = powers(table)
    packed = []
    for part in parts(convolution):
        channels = convolution.channels[part[0]]
        own, filled = filled[:, :, : len(part) * channels], filled[:, :, len(part) * channels :]
        own = torch.nn.functional.pad(own.unflatten(2, (len(part), channels)), (0, -channels % lanes))
        packed.append(own.unflatten(3, (-1, lanes)).permute(3, 2, 0, 1, 4).flatten(0, 1))
    return torch.cat(packed)


# --- building ----------------------------------------------------------------------------------------------------


class Missing(RuntimeError):
    """There is no kernel on this machine, and why."""


def installed_compiler() -> list[str]:
    """The C++ compiler, in words: CXX may be "ccache g++".

    Raises:
        Missing: none is installed.
    """
    found = os.environ.get("CXX", "").split() or [c for c in ("g++", "clang++", "c++") if shutil.which(c)][:1]
    if not found:
        raise Missing("no C++ compiler was found (g++ or clang++; set CXX)")
    return found


def complaint(stderr: str) -> str:
    """The line of a compiler's output that says what is wrong; not that of its driver, which says that the linker failed."""
    lines = stderr.splitlines()
    return next((line for line in lines if "error" in line and not line.startswith("collect2")), stderr.strip()[:200])


def compiler() -> list[str]:
    """The C++ compiler and its options.

    Raises:
        Missing: none is installed.
    """
    native = "-mcpu=native" if platform.machine().startswith(("arm", "aarch64")) else "-march=native"
    openmp = ["-fopenmp"] if platform.system() == "Linux" else []
    return [
        *installed_compiler(),
        "-std=c++17",
        "-O2",
        "-ftree-vectorize",
        native,
        "-fno-math-errno",
        "-ffp-contract=fast",
        "-fPIC",
        "-shared",
        *openmp,
    ]


def build(source: str, name: str) -> Path:
    """A shared library from source, from the cache if it was built before and is as it was kept.

    Raises:
        Missing: no compiler, or it failed, or the cache cannot be used.
    """
    command = compiler()
    on = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {processor()}"
    digest = hashlib.sha256("\0".join([source, *command, on]).encode()).hexdigest()[:16]
    try:
        path = cache.cached(f"{name}-{digest}.so")
        with cache.alone(path):
            if path.exists() and _usable(path):
                return path
            _compile(command, source, path)
            cache.check(path)
    except OSError as error:
        raise Missing(
            f"a kernel cannot be kept in '{cache_folder()}' ({error}); set GOSSAMER_CACHE to a folder that can be written"
        ) from None
    except cache.Untrusted as error:
        raise Missing(f"a kernel cannot be kept safely ({error}); set GOSSAMER_CACHE to a folder of your own") from None
    return path


def _compile(command: list[str], source: str, path: Path) -> None:
    """
    Raises:
        Missing: the compiler cannot be run, or failed.
        OSError: the result cannot be kept.
    """
    with tempfile.TemporaryDirectory() as folder, cache.keeping(path) as library:
        file = Path(folder) / "kernel.cpp"
        file.write_text(source, "utf-8")
        try:
            result = subprocess.run([*command, str(file), "-o", str(library)], capture_output=True, text=True, check=False)
        except OSError as error:
            raise Missing(f"the C++ compiler '{command[0]}' cannot be run ({error}); set CXX to one that can") from None
        if result.returncode:
            raise Missing(f"{command[0]} could not build a kernel: {complaint(result.stderr)}")


def _usable(path: Path) -> bool:
    """Whether a kept library is as it was kept; removed if not."""
    try:
        cache.check(path)
    except cache.Untrusted as error:
        log.warning("%s: it is built again", error)
        if path.is_dir():
            raise Missing(f"'{path}' is a folder where a kernel should be; remove it") from None
        cache.forget(path)
        return False
    return True


def processor() -> str:
    """What -march=native depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(("flags", "Features"))), "")


REAL = {torch.float32: "float", torch.float64: "double"}
# arguments of the functions: sizes first, then addresses
SORTING = {"sort_edges": (2, 4), "vector_bytes": (0, 1)}
CONVOLUTION = {"forward": (7, 9), "backward": (7, 13)}
ATTENTION = {"attend": (5, 12), "attend_backward": (5, 24), "perpendicular": (3, 6), "perpendicular_backward": (3, 12)}


@functools.cache
def library(source: str, name: str, functions: tuple[tuple[str, tuple[int, int]], ...]) -> Any:
    """A built and loaded library with the argument types of its functions.

    Raises:
        Missing: it cannot be built on this machine.
    """
    path = build(source, name)
    try:
        loaded = ctypes.CDLL(str(path))
        for function, (sizes, addresses) in functions:
            getattr(loaded, function).argtypes = [ctypes.c_int64] * sizes + [ctypes.c_void_p] * addresses
            getattr(loaded, function).restype = None
    except (OSError, AttributeError) as error:
        raise Missing(f"a kernel built in '{path.parent}' cannot be loaded ({error}); set GOSSAMER_CACHE to another folder") from None
    return loaded


@functools.cache
def sorting() -> Any:
    return library(f"typedef float T;\n{text('vectors')}", "sorting", tuple(SORTING.items()))


def convolution_library(convolution: Convolution, dtype: torch.dtype, edge_weights: bool = False) -> Any:
    """Forward and backward of one structure of products."""
    return library(f"typedef {REAL[dtype]} T;\n{generate(convolution, edge_weights)}", "convolution", tuple(CONVOLUTION.items()))


@functools.cache
def attention_library(degrees: int, dtype: torch.dtype) -> Any:
    """Geodite's attention and alignment for harmonics of degrees 1 … ``degrees``."""
    head = f"typedef {REAL[dtype]} T;\n#define DEGREES {degrees}\n#define HARMONICS {(degrees + 1) ** 2 - 1}\n"
    return library(head + text("vectors") + text("attention"), "attention", tuple(ATTENTION.items()))


def pointers(*tensors: Tensor | None) -> list[int]:
    """Addresses, 0 for None; every tensor must be contiguous, real numbers all of one precision, and whole numbers of 64 bits."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError("a kernel was given a tensor that is not contiguous")
    kinds = {t.dtype for t in tensors if t is not None} - {torch.int64}
    if len(kinds) > 1 or not all(kind.is_floating_point for kind in kinds):
        raise TypeError(f"a kernel was given numbers of different precision: {', '.join(sorted(map(str, kinds)))}")
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
