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
from torch import Tensor

from gossamer.engine import cache
from gossamer.files import cache_folder
from gossamer.nn.products import Convolution, Product

log = logging.getLogger(__name__)
LANES = {torch.float32: 16, torch.float64: 8}
"""channels in a chunk of the table: 64 bytes"""
ACCUMULATORS = 20
"""sums that may be under way at once; a block with more is gone through again"""
HERE = Path(__file__).parent


def text(name: str) -> str:
    return (HERE / f"{name}.hpp").read_text()


def generate(convolution: Convolution, edge_weights: bool = False) -> str:
    """C++ source of the forward and backward pass; channels and precision stay open.

    With ``edge_weights``, the values of the radial functions on every edge are an input, not a table.
    """
    entries: dict[tuple[int, int, int], int] = {}
    lines = []
    for p, product in enumerate(convolution.products):
        c = product.coefficients
        for m, k in np.argwhere(np.abs(c).max(axis=2) > 1e-12).tolist():
            entries[p, m, k] = len(entries)
            terms = [f"T({float(c[m, k, s])!r}) * y[{product.edge + s}][e]" for s in np.flatnonzero(np.abs(c[m, k]) > 1e-12).tolist()]
            lines.append(f"m[{entries[p, m, k]}][e] = {' + '.join(terms)};")
    loops = "\n".join(f"  for (int e = 0; e < n; e++) {line}" for line in lines)
    pieces = ["#define EDGE_WEIGHTS"] if edge_weights else []
    pieces += [f"#define HARMONICS {convolution.n_harmonics}", f"#define ENTRIES {len(entries)}", text("vectors"), text("convolution")]
    pieces.append(f"static void matrices(int n, T (*__restrict y)[STRIDE], T (*__restrict m)[STRIDE]) {{\n{loops}\n}}")
    forward, backward = [], []
    for block, (dim, _) in enumerate(convolution.blocks_in):
        mine = [p for p, product in enumerate(convolution.products) if product.block == block]
        for number, group in enumerate(groups([convolution.products[p].coefficients.shape[0] for p in mine])):
            name = f"{block}_{number}"
            products = {mine[k]: convolution.products[mine[k]] for k in group}
            pieces.append(forward_source(name, dim, products, entries))
            forward.append(f"  SWEEP(forward_{name}, layout[{6 * min(products)}])")
        if mine:
            products = {p: convolution.products[p] for p in mine}
            pieces.append(backward_source(str(block), dim, products, entries))
            backward.append(f"  SWEEP(backward_{block}, layout[{6 * min(products)}])")
    pieces.append("static void forward_all(const Job& job, const int64_t* layout) {\n" + "\n".join(forward) + "\n}")
    pieces.append("static void backward_all(const Job& job, const int64_t* layout) {\n" + "\n".join(backward) + "\n}")
    return "\n".join([*pieces, text("drivers")])


def operations(convolution: Convolution) -> int:
    """Multiply-adds per edge, forward and backward, as they are written here."""
    total = 0
    for p, channels in zip(convolution.products, convolution.channels, strict=True):
        nonzero = np.abs(p.coefficients) > 1e-12
        matrix, harmonics = nonzero.any(axis=2).sum(), nonzero.any(axis=1).sum()  # entries (m, c) and (m, s)
        rows, columns, edges = p.coefficients.shape
        forward = 6 + matrix + rows
        backward = 12 + matrix + 2 * columns + harmonics + edges + 1
        total += channels * int(forward + backward)
    return total


def groups(rows: list[int]) -> list[list[int]]:
    """Split products into groups with at most ACCUMULATORS rows together."""
    found: list[list[int]] = []
    used = ACCUMULATORS
    for k, n in enumerate(rows):
        if used + n > ACCUMULATORS:
            found.append([])
            used = 0
        found[-1].append(k)
        used += n
    return found


def _sum(terms: list[str]) -> str:
    return " + ".join(terms)


def forward_source(name: str, dim: int, products: dict[int, Product], entries: dict[tuple[int, int, int], int]) -> str:
    """Sums of some products of one block for the channels from u on."""
    rows = [(p, m) for p, product in products.items() for m in range(product.coefficients.shape[0])]
    lines = [f"  const int64_t *L = layout + {6 * min(products)};", *(f"  V a{p}_{m} = {{}};" for p, m in rows)]
    lines += ["  for (int e = 0; e < job.n; e++) {", "    const T *f = job.f[e] + L[1] + u;"]
    lines += [f"    V f{k} = load<L_>(f + {k} * L[2]);" for k in range(dim)]
    for p, product in products.items():
        lines.append(f"    V r{p} = radial<L_>(job, layout[{6 * p + 5}], u, e);")
        for m in range(product.coefficients.shape[0]):
            terms = [f"job.m[{entries[p, m, k]}][e] * f{k}" for k in range(dim) if (p, m, k) in entries]
            lines.append(f"    a{p}_{m} += r{p} * ({_sum(terms)});")
    lines.append("  }")
    lines += [f"  add<L_>(job.out + layout[{6 * p + 3}] + {m} * layout[{6 * p + 4}] + u, a{p}_{m});" for p, m in rows]
    body = "\n".join(lines)
    return f"template <int L_> static void forward_{name}(const Job& job, const int64_t* layout, int64_t u) {{\n  typedef vec<L_> V;\n{body}\n}}"


def backward_source(name: str, dim: int, products: dict[int, Product], entries: dict[tuple[int, int, int], int]) -> str:
    """Gradients of one block, of harmonics and of distances, for the channels from u on."""
    lines = [f"  const int64_t *L = layout + {6 * min(products)};", "  const T *f = job.f[0] + L[1] + u;"]
    for k in range(dim):
        lines += [f"  V f{k} = load<L_>(f + {k} * L[2]), d{k} = {{}};"]
    used: set[int] = set()
    for p, product in products.items():
        c = product.coefficients
        for m in range(c.shape[0]):
            for s in range(c.shape[2]):
                terms = [f"T({float(c[m, k, s])!r}) * f{k}" for k in range(dim) if abs(c[m, k, s]) > 1e-12]
                if terms:
                    lines.append(f"  V p{p}_{m}_{s} = {_sum(terms)};")
                    used.add(product.edge + s)
    lines.append("  for (int e = 0; e < job.n; e++) {")
    lines.append("    V slope = {};")
    lines += [f"    V y{s} = {{}};" for s in sorted(used)]
    for p, product in products.items():
        c = product.coefficients
        lines.append("    {")
        lines.append(f"      const T *g = job.g[e] + layout[{6 * p + 3}] + u;")
        lines += [f"      V g{m} = load<L_>(g + {m} * layout[{6 * p + 4}]);" for m in range(c.shape[0])]
        lines.append(f"      V r, q = {{}}; radial_and_slope<L_>(job, layout[{6 * p + 5}], u, e, r, q);")
        lines.append("      V w = {};")
        for k in range(dim):
            terms = [f"job.m[{entries[p, m, k]}][e] * g{m}" for m in range(c.shape[0]) if (p, m, k) in entries]
            if terms:
                lines.append(f"      {{ V t = {_sum(terms)}; d{k} += r * t; w += f{k} * t; }}")
        for s in range(c.shape[2]):
            terms = [f"g{m} * p{p}_{m}_{s}" for m in range(c.shape[0]) if np.abs(c[m, :, s]).max() > 1e-12]
            if terms:
                lines.append(f"      y{product.edge + s} += r * ({_sum(terms)});")
        lines.append(f"      GRADIENT({6 * p + 5})")
        lines.append("    }")
    lines += [f"    add<L_>(job.sums + (e * (HARMONICS + 1) + {s}) * LANES, y{s});" for s in sorted(used)]
    lines.append("    add<L_>(job.sums + (e * (HARMONICS + 1) + HARMONICS) * LANES, slope);")
    lines.append("  }")
    lines += [f"  store<L_>(job.out + L[1] + {k} * L[2] + u, d{k});" for k in range(dim)]
    body = "\n".join(lines)
    return f"template <int L_> static void backward_{name}(const Job& job, const int64_t* layout, int64_t u) {{\n  typedef vec<L_> V;\n{body}\n}}"


# --- building ----------------------------------------------------------------------------------------------------


class Missing(RuntimeError):
    """There is no kernel on this machine, and why."""


def compiler() -> list[str]:
    """The C++ compiler and its options.

    Raises:
        Missing: none is installed.
    """
    found = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    if found is None:
        raise Missing("no C++ compiler was found (g++ or clang++; set CXX)")
    native = "-mcpu=native" if platform.machine().startswith(("arm", "aarch64")) else "-march=native"
    openmp = ["-fopenmp"] if platform.system() == "Linux" else []
    return [
        *found.split(),
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
        if path.exists() and _usable(path):
            return path
        with tempfile.TemporaryDirectory() as folder, cache.keeping(path) as library:
            file = Path(folder) / "kernel.cpp"
            file.write_text(source)
            try:
                result = subprocess.run([*command, str(file), "-o", str(library)], capture_output=True, text=True, check=False)
            except OSError as error:
                raise Missing(f"the C++ compiler '{command[0]}' cannot be run ({error}); set CXX to one that can") from None
            if result.returncode:
                first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip()[:200])
                raise Missing(f"{command[0]} could not build a kernel: {first}")
        cache.check(path)
    except OSError as error:
        raise Missing(
            f"a kernel cannot be kept in '{cache_folder()}' ({error}); set GOSSAMER_CACHE to a folder that can be written"
        ) from None
    except cache.Untrusted as error:
        raise Missing(f"a kernel cannot be kept safely ({error}); set GOSSAMER_CACHE to a folder of your own") from None
    return path


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
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(("flags", "Features"))), "")


REAL = {torch.float32: "float", torch.float64: "double"}
# arguments of the functions: sizes first, then addresses
SORTING = {"sort_edges": (2, 4)}
CONVOLUTION = {"forward": (6, 9), "backward": (6, 13)}
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
    """Addresses, 0 for None; every tensor must be contiguous."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError("a kernel was given a tensor that is not contiguous")
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
