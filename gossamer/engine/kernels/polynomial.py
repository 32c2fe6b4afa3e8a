"""Polynomials in the features of a node (`gossamer.nn.polynomial`) as generated code, and their PyTorch operators.

The tree of monomials is written out, in C++ and in Triton; elements, channels and precision stay open. Coefficients of the elements
present are gone through element by element, so that they stay in the nearest cache. Gradients are collected on the way through the
same tree; second derivatives are the same source again, on numbers that carry their derivative in one direction with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from itertools import count, takewhile
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gossamer.engine.kernels import cpu, gpu
from gossamer.engine.kernels.ops import on_its_gpu, only_once
from gossamer.nn.polynomial import Monomial, Monomials, check_sizes

PIECE = 400
"""nodes of the tree in one function; compilers take far more than twice the time for twice the length"""

_library = torch.library.Library("gossamer", "FRAGMENT")
for _schema in (
    "polynomial(str key, Tensor x, Tensor species, Tensor k) -> Tensor",
    "polynomial_to_x(str key, Tensor g, Tensor x, Tensor species, Tensor k) -> Tensor",
    "polynomial_to_coefficients(str key, Tensor g, Tensor x, Tensor species, Tensor k) -> Tensor",
    "polynomial_second(str key, Tensor h, Tensor g, Tensor x, Tensor species, Tensor k) -> (Tensor, Tensor, Tensor)",
):
    _library.define(_schema)


# --- what is written out ----------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One step of the way through the tree."""

    kind: Literal["begin", "open", "leaf", "shut", "end"]
    """begin and end of a component, a node before and after its children, a node without children"""
    depth: int
    """factors of the node"""
    last: int
    """its last factor; of begin and end, the component"""
    number: int = -1
    """of the monomial that ends at this node, if any"""


def pieces(monomials: Monomials, nodes: int | None = None) -> list[list[Step]]:
    """The way through all trees, cut into pieces of about so many nodes; by default PIECE."""
    nodes = PIECE if nodes is None else nodes
    names: list[Monomial] = [(o, *m) for o, component in enumerate(monomials.components) for m in component]
    number = {node: k for k, node in enumerate(names)}
    children: dict[Monomial, list[Monomial]] = {}
    for node in sorted({name[:depth] for name in names for depth in range(2, len(name) + 1)}):
        children.setdefault(node[:-1], []).append(node)

    def walk(node: Monomial) -> list[Step]:
        depth, last, own = len(node) - 1, node[-1], number.get(node, -1)
        if node not in children:
            return [Step("leaf", depth, last, own)]
        below = [step for child in children[node] for step in walk(child)]
        return [Step("open", depth, last, own), *below, Step("shut", depth, last)]

    found: list[list[Step]] = []
    room, current = 0, -1
    for branch in (branch for o in range(monomials.n_out) for branch in children.get((o,), ())):
        steps, component = walk(branch), branch[0]
        full = len(steps) > room
        if found and (full or component != current):
            found[-1].append(Step("end", 0, current))
        if full:
            found.append([])
            room = nodes
        if full or component != current:
            found[-1].append(Step("begin", 0, component))
        found[-1] += steps
        room, current = room - len(steps), component
    if found:
        found[-1].append(Step("end", 0, current))
    return found


def operations(monomials: Monomials) -> int:
    """Multiply-adds of a node and channel, forward and backward, as they are written here."""
    steps = [step.kind for piece in pieces(monomials) for step in piece]
    return (1 + 2) * steps.count("leaf") + (1 + 3) * steps.count("shut")


def generate(monomials: Monomials, training: bool = False) -> str:
    """C++ source of value and gradient; with ``training`` the gradients of the coefficients and the second derivatives too."""
    parts = ["#define TRAINING"] if training else []
    parts += [f"#define N_IN {monomials.n_in}\n#define N_OUT {monomials.n_out}\n#define TOTAL {monomials.total}"]
    parts += [cpu.text("vectors"), cpu.text("polynomial")]
    head = "template <class N, bool Y, bool X, bool K> static void"
    arguments = "const N *__restrict x, const V *__restrict k, const V *__restrict g, V *__restrict y, V *__restrict d, V *__restrict dk"
    calls = []
    for number, piece in enumerate(pieces(monomials)):
        body = "\n".join(f"  {_macro(step)}" for step in piece)
        parts.append(f"{head} piece_{number}({arguments}) {{\n{body}\n}}")
        calls.append(f"  piece_{number}<N, Y, X, K>(x, k, g, y, d, dk);")
    body = "\n".join(calls)
    parts.append(f"{head} all({arguments.replace('__restrict ', '')}) {{\n{body}\n}}")
    return "\n".join(parts)


def _macro(step: Step) -> str:
    """The line of polynomial.hpp for a step."""
    kind, depth, last, number = step
    if kind in ("begin", "end"):
        return f"{kind.upper()}({last})"
    if kind == "open":
        own = "V{}" if number < 0 else f"k[{number}]"
        return f"OPEN({depth}, {depth - 1}, {last}, {own})" + ("" if number < 0 else f" MONOMIAL({depth}, {number})")
    return f"LEAF({depth - 1}, {last}, {number})" if kind == "leaf" else f"SHUT({depth}, {depth - 1}, {last})"


# --- the same in Triton ----------------------------------------------------------------------------------------------

WANTED = {"value": "y", "to_x": "d", "to_coefficients": "k", "second": "ydk"}
"""functions, and which of y, d (gradient in x) and k (in the coefficients) each gives; the second derivatives of all three"""


def generate_triton(monomials: Monomials, training: bool = False) -> str:
    """Triton source of the same functions: one warp for each node and 32 channels; nothing is kept between pieces but the results.

    Second derivatives are cut finer, since compilers take longest for them (benchmarks/speed, GPU).
    """
    functions = [
        _triton(f"{name}_{number}", piece, monomials, name == "second", WANTED[name])
        for name in (WANTED if training else list(WANTED)[:2])
        for number, piece in enumerate(pieces(monomials, PIECE // 4 if name == "second" else PIECE))
    ]
    return "\n\n".join([gpu.HEAD, *functions])


def _triton(name: str, piece: list[Step], monomials: Monomials, dual: bool, wanted: str) -> str:
    """One piece of one function. With ``dual``, X, G and T are the derivatives of x, g and t in the direction h."""
    used = sorted({step.last for step in piece if step.kind in ("open", "leaf")})
    lines = [
        "@triton.jit",
        f"def {name}(species, x, k, g, h, y, d, dk, C):",
        "    i = tl.program_id(0).to(tl.int64)",
        f"    u = tl.program_id(1) * {gpu.LANES} + tl.arange(0, {gpu.LANES})",
        "    mask = u < C",
        f"    own = tl.load(species + i) * {monomials.total} * C + u",
        f"    at, out = i * {monomials.n_in} * C + u, i * {monomials.n_out} * C + u",
        *(f"    x{l} = tl.load(x + at + {l} * C, mask=mask, other=0.0)" for l in used),
        *(f"    X{l} = tl.load(h + at + {l} * C, mask=mask, other=0.0)" for l in used if dual),
        f"    zero = tl.zeros([{gpu.LANES}], dtype=x.dtype.element_ty)",
        *(f"    d{l} = zero" for l in used if "d" in wanted),
    ]
    for step in piece:
        lines += [f"    {line}" for line in _triton_lines(step, dual, wanted)]
    if "d" in wanted:
        lines += [f"    tl.store(d + at + {l} * C, tl.load(d + at + {l} * C, mask=mask, other=0.0) + d{l}, mask=mask)" for l in used]
    return "\n".join(lines)


def _triton_lines(step: Step, dual: bool, wanted: str) -> list[str]:
    kind, depth, l, number = step
    n, up = (depth, depth - 1) if kind != "leaf" else (depth - 1, -1)
    gradients = wanted != "y"
    product = f"G{n} * x{l} + g{n} * X{l}" if dual else f"g{n} * x{l}"
    if kind == "begin":
        load = [f"g0 = tl.load(g + out + {l} * C, mask=mask, other=0.0)"] if gradients else []
        return ["t0 = zero", *(["T0 = zero", "G0 = zero"] if dual else []), *load]
    if kind == "open":
        lines = [f"t{n} = " + ("zero" if number < 0 else f"tl.load(k + own + {number} * C, mask=mask, other=0.0)")]
        lines += [f"g{n} = g{up} * x{l}"] if gradients else []
        lines += [f"T{n} = zero", f"G{n} = G{up} * x{l} + g{up} * X{l}"] if dual else []
        return lines + (
            [f"tl.atomic_add(dk + own + {number} * C, {'G' if dual else 'g'}{n}, mask=mask)"] if "k" in wanted and number >= 0 else []
        )
    if kind == "leaf":
        lines = [f"q = tl.load(k + own + {number} * C, mask=mask, other=0.0)", f"t{n} += q * x{l}"]
        lines += [f"T{n} += q * X{l}"] if dual else []
        lines += [f"d{l} += q * {'G' if dual else 'g'}{n}"] if "d" in wanted else []
        return lines + ([f"tl.atomic_add(dk + own + {number} * C, {product}, mask=mask)"] if "k" in wanted else [])
    if kind == "shut":
        lines = [f"t{up} += t{n} * x{l}"]
        lines += [f"T{up} += T{n} * x{l} + t{n} * X{l}"] if dual else []
        return lines + ([f"d{l} += " + (f"G{up} * t{n} + g{up} * T{n}" if dual else f"g{up} * t{n}")] if "d" in wanted else [])
    start = f"y + out + {l} * C"
    return [f"tl.store({start}, tl.load({start}, mask=mask, other=0.0) + {'T' if dual else 't'}0, mask=mask)"] if "y" in wanted else []


# --- operators -------------------------------------------------------------------------------------------------------

FUNCTIONS = {"value": (4, 4), "to_x": (4, 5)}
TRAINING = {"to_coefficients": (4, 5), "second": (4, 8)}
_polynomials: dict[str, tuple[Monomials, torch.dtype, Any]] = {}
"""by key: the monomials, the precision and the built kernel"""


def register(monomials: Monomials, dtype: torch.dtype, device: str = "cpu", training: bool = False) -> str:
    """Build the kernel of some monomials, and return the key by which operators know it.

    With ``training`` it can be differentiated twice, in coefficients too; else once, in x.

    Raises:
        Missing: it cannot be built on this machine.
    """
    structure = hashlib.sha256(repr(monomials).encode()).hexdigest()[:16]
    key = f"polynomial-{structure}-{cpu.REAL[dtype]}-{device}{'-training' if training else ''}"
    if key not in _polynomials:
        if device == "cuda":
            built = gpu.module(generate_triton(monomials, training), "polynomial")
        else:
            functions = {**FUNCTIONS, **(TRAINING if training else {})}
            built = cpu.library(f"typedef {cpu.REAL[dtype]} T;\n{generate(monomials, training)}", "polynomial", tuple(functions.items()))
        _polynomials[key] = monomials, dtype, built
    return key


def _call(name: str, key: str, results: dict[str, Tensor], x: Tensor, species: Tensor, k: Tensor, **others: Tensor) -> None:
    """Run one function of a kernel; results y (N, n_out, C), d (N, n_in, C), dk as k; others g as y, h as x."""
    monomials, dtype, built = _polynomials[key]
    check_sizes(monomials, x, species, k)
    for tensor in (x, k, *others.values()):
        if tensor.dtype != dtype:
            raise TypeError(f"a polynomial was built for {dtype}, found {tensor.dtype}")
    if "-cuda" in key:
        return _launch(name, key, results, x, species, k, **others)
    if species.numel() and not 0 <= int(species.min()) <= int(species.max()) < k.shape[0]:
        raise IndexError(f"species of a polynomial must be from 0 to {k.shape[0] - 1}: coefficients are given for {k.shape[0]} elements")
    tensors = [t.contiguous() for t in (species, x, k, *others.values())]
    getattr(built, name)(x.shape[0], k.shape[0], x.shape[2], torch.get_num_threads(), *cpu.pointers(*tensors, *results.values()))


def _launch(name: str, key: str, results: dict[str, Tensor], x: Tensor, species: Tensor, k: Tensor, **others: Tensor) -> None:
    """Likewise on a GPU: what is not there is never touched, and stands as x."""
    tensors = {"species": species, "x": x, "k": k, "g": x, "h": x, **others}
    contiguous = [t.contiguous() for t in tensors.values()]
    for result in results.values():
        result.zero_()
    written = [results.get(r, x) for r in ("y", "d", "dk")]
    if x.numel():
        grid = (x.shape[0], -(-x.shape[2] // gpu.LANES))
        for kernel in _kernels(key, name):
            gpu.launch(kernel, grid)(*contiguous, *written, x.shape[2], num_warps=1, enable_fp_fusion=True)


@cache
def _kernels(key: str, name: str) -> list[Any]:
    """The pieces of a function."""
    built = _polynomials[key][2]
    return [getattr(built, f"{name}_{number}") for number in takewhile(lambda n: hasattr(built, f"{name}_{n}"), count())]


def _value(key: str, x: Tensor, species: Tensor, k: Tensor) -> Tensor:
    y = _fake_value(key, x, species, k)
    _call("value", key, {"y": y}, x, species, k)
    return y


def _to_x(key: str, g: Tensor, x: Tensor, species: Tensor, k: Tensor) -> Tensor:
    d = x.new_empty(x.shape)
    _call("to_x", key, {"d": d}, x, species, k, g=g)
    return d


def _to_coefficients(key: str, g: Tensor, x: Tensor, species: Tensor, k: Tensor) -> Tensor:
    dk = k.new_empty(k.shape)
    _call("to_coefficients", key, {"dk": dk}, x, species, k, g=g)
    return dk


def _second(key: str, h: Tensor, g: Tensor, x: Tensor, species: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, d, dk = _fake_second(key, h, g, x, species, k)
    _call("second", key, {"y": y, "d": d, "dk": dk}, x, species, k, g=g, h=h)
    return y, d, dk


def _fake_value(key: str, x: Tensor, species: Tensor, k: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], _polynomials[key][0].n_out, x.shape[2])


def _fake_second(key: str, h: Tensor, g: Tensor, x: Tensor, species: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(g.shape), x.new_empty(x.shape), x.new_empty(k.shape)


FUNCTIONS_OF_OPERATORS: dict[str, Callable[..., Any]] = {
    "polynomial": _value, "polynomial_to_x": _to_x, "polynomial_to_coefficients": _to_coefficients, "polynomial_second": _second
}  # fmt: skip
"""what operators do, on either kind of device"""
for _name, _function in FUNCTIONS_OF_OPERATORS.items():
    _library.impl(_name, _function, "CPU")
    _library.impl(_name, on_its_gpu(_function), "CUDA")
torch.library.register_fake("gossamer::polynomial", _fake_value)
torch.library.register_fake("gossamer::polynomial_to_x", lambda key, g, x, species, k: x.new_empty(x.shape))
torch.library.register_fake("gossamer::polynomial_to_coefficients", lambda key, g, x, species, k: k.new_empty(k.shape))
torch.library.register_fake("gossamer::polynomial_second", _fake_second)


# --- derivatives -----------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.key = inputs[0]
    ctx.save_for_backward(*inputs[1:])


def _value_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    ops, needs = torch.ops.gossamer, ctx.needs_input_grad
    to_x = ops.polynomial_to_x(ctx.key, gradient, *ctx.saved_tensors) if needs[1] else None
    to_coefficients = ops.polynomial_to_coefficients(ctx.key, gradient, *ctx.saved_tensors) if needs[3] else None
    return None, to_x, None, to_coefficients


def _to_x_gradient(ctx: Any, direction: Tensor) -> tuple[Any, ...]:
    if not ctx.key.endswith("-training"):
        only_once(ctx)
    to_gradient, to_x, to_coefficients = torch.ops.gossamer.polynomial_second(ctx.key, direction, *ctx.saved_tensors)
    return None, to_gradient, to_x, None, to_coefficients


def _to_coefficients_gradient(ctx: Any, direction: Tensor) -> tuple[Any, ...]:
    """Polynomials are linear in their coefficients: the gradients are those of Σ g y with the direction in the coefficients' place."""
    gradient, x, species, _ = ctx.saved_tensors
    ops = torch.ops.gossamer
    to_gradient = ops.polynomial(ctx.key, x, species, direction)
    return None, to_gradient, ops.polynomial_to_x(ctx.key, gradient, x, species, direction), None, None


torch.library.register_autograd("gossamer::polynomial", _value_gradient, setup_context=_save)
torch.library.register_autograd("gossamer::polynomial_to_x", _to_x_gradient, setup_context=_save)
torch.library.register_autograd("gossamer::polynomial_to_coefficients", _to_coefficients_gradient, setup_context=_save)
