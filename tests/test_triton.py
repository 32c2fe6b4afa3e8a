"""The Triton kernels, without a GPU: run by Triton's interpreter, and compiled down to machine code for an H100."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import often

pytest.importorskip("triton", reason="needs triton")

from test_kernels import nequip_convolution, vector_convolution
from test_polynomial import some

from gossamer.engine.kernels import gpu, ops, polynomial
from gossamer.engine.kernels.cpu import Missing
from gossamer.engine.kernels.inline import INLINED, inline
from gossamer.simulation.lammps import OPERATORS

INTERPRETED = """
import torch
from test_kernels import CONVOLUTIONS, definition, summed
from gossamer.engine.kernels import gpu, ops
from gossamer.engine.kernels.table import interpolate, pack, passed, tabulate
for name, dtypes in (("odd channels", [torch.float32]), ("l 1, both parities", [torch.float64])):
    convolution = CONVOLUTIONS[name]()
    generator = torch.Generator().manual_seed(0)
    sender, receiver = (torch.randint(0, 3, (12,), generator=generator) for _ in range(2))
    edge_index = torch.stack([sender, receiver.sort()[0]])
    for dtype in dtypes:
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        random = dict(dtype=dtype, generator=generator)
        variables = [torch.randn(4, convolution.width_in, **random), torch.randn(12, convolution.n_harmonics, **random), torch.rand(12, **random)]
        variables[2][0] = 1.2  # beyond the cutoff
        width = sum(convolution.channels)
        def radial(x):
            return torch.sin(x[:, None] * torch.arange(1, width + 1) / width * 9) * (1 - x[:, None]) ** 3
        knots = tabulate(radial, dtype)
        table = pack(convolution, knots, gpu.LANES).to(dtype)
        receiver_starts, sender_starts, by_sender = gpu.sort_edges(edge_index, variables[0])
        leaves = [v.clone().requires_grad_() for v in variables]
        plain = definition(convolution, *leaves, knots.to(dtype), edge_index)
        gradient = torch.randn(plain.shape, **random)
        wanted = [plain.detach(), *torch.autograd.grad(plain, leaves, gradient)]
        edges = edge_index, receiver_starts, sender_starts, by_sender
        key = ops.register(convolution, dtype, "cuda")
        found = [ops._convolve_gpu(key, *variables, table, *edges), *ops._convolve_backward_gpu(key, gradient, *variables, table, *edges)]
        assert float(found[0][3].abs().max()) == 0  # no edges
        # fewer receivers than there are features, where other processes have the last of them
        few = edge_index, receiver_starts[:4], sender_starts, by_sender
        assert torch.equal(ops._convolve_gpu(key, *variables, table, *few), found[0][:3])
        assert all(torch.equal(a, b) for a, b in zip(ops._convolve_backward_gpu(key, gradient[:3], *variables, table, *few), found[1:]))
        # two kinds of pairs, each with a kink: 77 rows each, twice
        def kinked(x):
            return radial(x) * torch.where(x < 0.5, 1.0, 1 + (x - 0.5) ** 2)[:, None]
        tables = [tabulate(f, dtype, (0.5,), 128) for f in (radial, kinked)]
        assert len(tables[0]) == len(tables[1])
        joined = torch.cat([pack(convolution, t, gpu.LANES) for t in tables], dim=1).to(dtype)
        pair = torch.arange(12) % 2
        first = pair * len(tables[0]) + passed(variables[2], (0.5,))
        rows = torch.stack([interpolate(t.to(dtype), leaves[2], (0.5,)) for t in tables])[pair, torch.arange(12)]
        plain = summed(convolution, leaves[0], leaves[1], rows, edge_index)
        wanted += [plain.detach(), *torch.autograd.grad(plain, leaves, gradient)]
        last, size = (*edges, first), len(tables[0]) - 2
        found += [ops._convolve_gpu(key, *variables, joined, *last, size), *ops._convolve_backward_gpu(key, gradient, *variables, joined, *last, size)]
        # the radial functions of every edge as an input
        leaves[2] = torch.randn(12, width, **random).requires_grad_()
        plain = summed(convolution, *leaves, edge_index)
        wanted += [plain.detach(), *torch.autograd.grad(plain, leaves, gradient)]
        key, values = ops.register(convolution, dtype, "cuda", edge_weights=True), [v.detach() for v in leaves]
        found += [ops._weighted_gpu(key, *values, *edges), *ops._weighted_backward_gpu(key, gradient, *values, *edges)]
        assert len(found) == len(wanted) == 12
        for number, (a, b) in enumerate(zip(found, wanted)):
            assert float((a - b).abs().max()) < tolerance * float(b.abs().max()), (name, dtype, number)
print("equal")
"""

ATTENTION = """
import math, torch
from torch.nn.functional import silu
from gossamer.engine.kernels import attention_gpu, gpu

def attend(heads, q, k, g, v, x, sl, f, y, sender, receiver):
    n, c = q.shape
    parts = f.shape[1] // c
    alpha = silu((q[receiver] * k[sender] * sl).reshape(-1, heads, c // heads).sum(2)) / math.sqrt(c)
    share = alpha.repeat_interleave(3 * c // heads, dim=1)[:, : parts * c]
    m = (f * g[sender] + share * v[sender]).split(c, dim=1)
    vectors = m[1][:, None] * y[:, :, None]
    if parts == 3:
        vectors = vectors + m[2][:, None] * x[sender]
    return q.new_zeros(n, c).index_add(0, receiver, m[0]), q.new_zeros(n, y.shape[1], c).index_add(0, receiver, vectors)

def perpendicular(q, p, y, sender, receiver):
    total = (q[receiver] * p[sender]).sum(1)
    degrees = [2 * l + 1 for l in range(1, math.isqrt(y.shape[1] + 1))]
    for a, b, z in zip(q[receiver].split(degrees, 1), p[sender].split(degrees, 1), y.split(degrees, 1)):
        total = total - (a * z[:, :, None]).sum(1) * (b * z[:, :, None]).sum(1)
    return total

generator = torch.Generator().manual_seed(0)
for c, heads, l_max, parts, dtype in ((40, 4, 2, 3, torch.float64), (24, 8, 1, 2, torch.float64), (32, 8, 3, 3, torch.float32)):
    n, e, s = 4, 13, (l_max + 1) ** 2 - 1
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    sender, receiver = torch.randint(0, 3, (2, e), generator=generator)
    receiver = receiver.sort()[0]
    edge_index = torch.stack([sender, receiver])
    def random(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator, requires_grad=True)
    edges = edge_index, *gpu.sort_edges(edge_index, torch.zeros(n, 1))
    values = [random(n, c), random(n, c), random(n, parts * c), random(n, parts * c), random(n if parts == 3 else 0, s, c),
              random(e, c), random(e, parts * c), random(e, s)]
    gradients = [torch.randn(n, c, dtype=dtype, generator=generator), torch.randn(n, s, c, dtype=dtype, generator=generator)]
    plain = attend(heads, *values, sender, receiver)
    wanted = [*plain, *torch.autograd.grad(plain, values, gradients, materialize_grads=True, allow_unused=True)]
    held = [t.detach() for t in values]
    found = [*attention_gpu.attend(heads, *held, *edges), *attention_gpu.attend_backward(heads, *gradients, *held, *edges)]
    values = [random(n, s, c), random(n, s, c), random(e, s)]
    gradient = torch.randn(e, c, dtype=dtype, generator=generator)
    plain = perpendicular(*values, sender, receiver)
    wanted += [plain, *torch.autograd.grad(plain, values, gradient)]
    held = [t.detach() for t in values]
    found += [attention_gpu.perpendicular(*held, *edges), *attention_gpu.perpendicular_backward(gradient, *held, *edges)]
    assert len(found) == len(wanted) == 14
    for number, (a, b) in enumerate(zip(found, wanted)):
        assert a.shape == b.shape, number
        assert b.numel() == 0 or float((a - b.detach()).abs().max()) < tolerance * float(b.detach().abs().max()), (number, c, dtype)
print("equal")
"""

POLYNOMIAL = """
import torch
from test_polynomial import inputs_of, some
from gossamer.engine.kernels import polynomial
from gossamer.nn.polynomial import Polynomial
polynomial.PIECE = 7
for degree, channels in ((3, 33),):
    monomials = some(4, 2, degree)
    x, species, k = inputs_of(monomials, n=3, channels=channels)
    generator = torch.Generator().manual_seed(1)
    g, h = (torch.randn(3, n, channels, dtype=torch.float64, generator=generator) for n in (2, 4))
    leaves = [t.clone().requires_grad_() for t in (g, x, k)]
    y = Polynomial(monomials)(leaves[1], species, leaves[2])
    d, dk = torch.autograd.grad(y, leaves[1:], leaves[0], create_graph=True)
    second = torch.autograd.grad(d, leaves, h, allow_unused=True, materialize_grads=True)
    wanted = [y, d, dk, *second]
    key = polynomial.register(monomials, torch.float64, "cuda", training=True)
    launch, found = polynomial._launch, [t.new_empty(t.shape) for t in wanted]
    launch("value", key, {"y": found[0]}, x, species, k)
    launch("to_x", key, {"d": found[1]}, x, species, k, g=g)
    launch("to_coefficients", key, {"dk": found[2]}, x, species, k, g=g)
    launch("second", key, {"y": found[3], "d": found[4], "dk": found[5]}, x, species, k, g=g, h=h)
    for number, (a, b) in enumerate(zip(found, wanted)):
        assert float((a - b).detach().abs().max()) <= 1e-13 * float(b.detach().abs().max()), (degree, number)
    launch("value", key, {"y": found[0][:0]}, x[:0], species[:0], k)
print("equal")
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    "script", often([INTERPRETED, ATTENTION, POLYNOMIAL], [POLYNOMIAL]), ids=["convolution", "attention", "polynomial"]
)
def test_interpreted_kernels_are_their_definition(script: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=environment, check=False, timeout=500
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "equal" in result.stdout


@pytest.mark.parametrize("edge_weights", [False, True])
def test_kernels_compile_for_a_gpu(edge_weights: bool) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = gpu.module(gpu.generate(nequip_convolution(1, False, [16, 40]), edge_weights))
    for name in ("forward_0", "forward_1", "backward_0", "backward_1"):
        function = getattr(kernels, name)
        names = function.arg_names
        constants = {**({"SIZE": 64} if edge_weights else {}), "HARMONICS": 4, "TILE": 8}
        indices = ("first_row", "sender", "receiver", "receiver_starts", "sender_starts", "by_sender")
        signature = {
            n: "constexpr" if n in constants else "*i64" if n in indices else "i32" if n in ("edges", "SIZE", "ROWS") else "*fp32"
            for n in names
        }
        source = ASTSource(fn=function, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()})
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1, "enable_fp_fusion": True})
        assert len(built.asm["cubin"]) > 1000


@pytest.mark.parametrize(("l_max", "parts", "real"), [(2, 3, "fp32"), (3, 2, "fp64")])
def test_attention_compiles_for_a_gpu(l_max: int, parts: int, real: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gossamer.engine.kernels import attention_gpu

    s = (l_max + 1) ** 2 - 1
    constants = {"C": 192, "H": 8, "S": s, "SP": triton.next_power_of_2(s), "PARTS": parts, "LANES": 32, "EDGES": 16, "WIDTH": 32,
                 "DEGREES": l_max, "RECEIVERS": True}  # fmt: skip
    indices = ("first_row", "sender", "receiver", "receiver_starts", "sender_starts", "by_sender", "far", "first")
    for name in ("logits", "collect", "distribute", "to_keys", "to_queries", "align", "align_gradient"):
        function = getattr(attention_gpu, name)
        names = function.arg_names
        signature = {
            n: "constexpr" if n in constants else "i32" if n == "n_edges" else "*i64" if n in indices else f"*{real}" for n in names
        }
        source = ASTSource(fn=function, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items() if n in names})
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=attention_gpu.OPTIONS)
        assert len(built.asm["cubin"]) > 1000


@pytest.mark.parametrize("real", ["fp32", "fp64"])
def test_polynomials_compile_for_a_gpu(real: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = gpu.module(polynomial.generate_triton(some(4, 2, 3), training=True), "polynomial")
    for name in polynomial.WANTED:
        function = getattr(kernels, f"{name}_0")
        signature = {n: "i32" if n == "C" else "*i64" if n == "species" else f"*{real}" for n in function.arg_names}
        built = triton.compile(
            ASTSource(fn=function, signature=signature),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": 1, "enable_fp_fusion": True},
        )
        assert len(built.asm["cubin"]) > 1000


def test_operators_of_lammps_are_brought_for_gpus_or_inside_the_program() -> None:
    """Those that its plugin has for the CPU are made of PyTorch's on a GPU, or Triton's, which programs hold."""
    source = OPERATORS.read_text()
    on_cpus, on_gpus = (set(re.findall(pattern, source)) for pattern in (r' add\("(\w+)\(', r'on_gpus\("(\w+)"'))
    assert on_gpus | set(INLINED) >= on_cpus > on_gpus
    assert {"exchange", "exchange_backward", "map_by_species", "sort_own_edges"} <= on_gpus


@pytest.mark.parametrize("name", ["convolve", "attend", "perpendicular", "polynomial"])
def test_a_compiler_looks_into_inlined_operators(name: str) -> None:
    """Values and gradients: the launches are nodes of the graph, sizes stay open, and shapes are those of the operators."""
    from torch._subclasses.functional_tensor import dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    n, e, c = 4, 12, 32
    inputs: tuple[torch.Tensor, ...]
    edges = torch.zeros(2, e, dtype=torch.int64), *(torch.zeros(k, dtype=torch.int64) for k in (n + 1, n + 1, e))
    if name == "polynomial":
        first: tuple[Any, ...] = (polynomial.register(some(4, 2, 3), torch.float32, "cuda"),)
        inputs = torch.randn(n, 4, c), torch.zeros(n, dtype=torch.int64), torch.randn(3, some(4, 2, 3).total, c)
    elif name == "convolve":
        convolution = vector_convolution(8, True)
        first = (ops.register(convolution, torch.float32, "cuda"),)
        table = torch.zeros(3, 65, 3 * gpu.LANES)
        inputs = torch.randn(n, convolution.width_in), torch.randn(e, convolution.n_harmonics), torch.rand(e), table, *edges
    else:
        many = name == "attend"
        first = (4,) if many else ()
        nodes = [torch.randn(n, c), torch.randn(n, c), torch.randn(n, 3 * c), torch.randn(n, 3 * c), torch.randn(n, 8, c)]
        inputs = (*nodes, torch.randn(e, c), torch.randn(e, 3 * c)) if many else (torch.randn(n, 8, c), torch.randn(n, 8, c))
        inputs = *inputs, torch.randn(e, 8), *edges

    def values_and_gradient(*tensors: torch.Tensor) -> list[torch.Tensor]:
        leaf = tensors[0].detach().requires_grad_()
        found = getattr(torch.ops.gossamer, name)(*first, leaf, *tensors[1:])
        found = list(found) if isinstance(found, tuple) else [found]
        return [*found, *torch.autograd.grad([f.sum() for f in found], leaf)]

    module = make_fx(values_and_gradient, tracing_mode="symbolic")(*inputs)
    inline(module)
    opened = make_fx(dispatch_functionalize(module), tracing_mode="symbolic")(*inputs)
    targets = [str(node.target) for node in opened.graph.nodes]
    assert sum("triton_kernel_wrapper_functional" in t for t in targets) >= 2
    assert not any("gossamer" in t for t in targets)
    shapes, wanted = ([tuple(a.meta["val"].shape) for a in m.graph.output_node().args[0]] for m in (opened, module))
    assert [len(s) for s in shapes] == [len(s) for s in wanted]


def test_registered_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution = vector_convolution(8, True)
    assert ops.register(convolution, torch.float32, "cuda") == ops.register(convolution, torch.float32, "cuda")
    assert ops.register(convolution, torch.float32, "cuda").endswith("-cuda")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Missing, match="Triton is not installed"):
        gpu.module("another source")
