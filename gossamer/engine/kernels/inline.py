"""The Triton kernels as parts of compiled programs, for processes without Python (LAMMPS on GPUs).

An operator of `ops` is opaque: a program calls it, and who runs the program must bring it. Here the same launches are operators that
PyTorch's compiler looks into (`torch.library.triton_op`), so that machine code of the kernels is inside.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from gossamer.engine.kernels import gpu, ops, polynomial

_TYPES: dict[str, Any] = {"Tensor": Tensor, "Optional[Tensor]": Tensor | None, "str": str, "int": int}

INLINED: dict[str, Any] = {**ops.ON_GPUS, **polynomial.FUNCTIONS_OF_OPERATORS}
"""what the operators do that launch kernels in Triton"""


@functools.cache
def _inlined(name: str) -> Any:
    """The operator that a compiler looks into, in the place of that of ``gossamer::name``."""
    schema = getattr(torch.ops.gossamer, name).default._schema
    function = INLINED[name]

    def run(*arguments: Any) -> Any:
        with gpu.inlining():
            return function(*arguments)

    parameters = [
        inspect.Parameter(
            a.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=_TYPES[str(a.type)],
            default=a.default_value if a.has_default_value() else inspect.Parameter.empty,
        )
        for a in schema.arguments
    ]
    results = [Tensor for _ in schema.returns]
    returned = Tensor if len(results) == 1 else tuple[tuple(results)]  # type: ignore[misc]
    run.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    torch.library.triton_op(f"gossamer_inline::{name}", run, mutates_args=())
    return getattr(torch.ops.gossamer_inline, name).default


def inline(module: torch.fx.GraphModule) -> None:
    """Put operators that a compiler looks into in the place of those kernels that are written in Triton.

    Raises:
        Missing: Triton is not installed.
    """
    gpu.need_triton()
    names = {getattr(torch.ops.gossamer, name).default: name for name in INLINED}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in names:
            node.target = _inlined(names[node.target])
    module.recompile()
