"""The Triton kernels, without a GPU: run by Triton's interpreter, and compiled down to machine code for an H100."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from test_kernels import nequip_convolution

from gossamer.kernels import gpu, ops
from gossamer.kernels.cpu import Missing
from gossamer.kernels.product import vector_convolution

INTERPRETED = """
import torch
from test_kernels import CONVOLUTIONS
from gossamer.kernels import gpu
from gossamer.kernels.table import tabulate
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
        table = convolution.pack(tabulate(radial, dtype), gpu.LANES).to(dtype)
        rows, columns, order = gpu.sort_edges(edge_index, variables[0])
        leaves = [v.clone().requires_grad_() for v in variables]
        definition = convolution.plain(*leaves, table, edge_index)
        gradient = torch.randn(definition.shape, **random)
        wanted = [definition.detach(), *torch.autograd.grad(definition, leaves, gradient)]
        found = [gpu.convolve(convolution, *variables, table, edge_index, rows),
                 *gpu.convolve_backward(convolution, gradient, *variables, table, edge_index, columns, order)]
        assert float(found[0][3].abs().max()) == 0  # no edges
        for a, b in zip(found, wanted):
            assert float((a - b).abs().max()) < tolerance * float(b.abs().max()), (name, dtype)
print("equal")
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))


def test_interpreted_kernels_are_their_definition() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED], capture_output=True, text=True, env=environment, check=False, timeout=500
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "equal" in result.stdout


def test_kernels_compile_for_a_gpu() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = gpu.module(gpu.generate(nequip_convolution(1, False, [16, 40])))
    for name in ("forward_0", "forward_1", "backward_0", "backward_1"):
        function = getattr(kernels, name)
        names = function.arg_names
        constants = {"INTERVALS": 64, "HARMONICS": 4}
        indices = ("sender", "receiver", "rows", "columns", "order")
        signature = {n: "constexpr" if n in constants else "*i64" if n in indices else "*fp32" for n in names}
        source = ASTSource(fn=function, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()})
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1, "enable_fp_fusion": True})
        assert len(built.asm["cubin"]) > 1000


def test_registered_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution = vector_convolution(8, True)
    assert ops.register(convolution, torch.float32, "cuda") == ops.register(convolution, torch.float32, "cuda")
    assert ops.register(convolution, torch.float32, "cuda").endswith("-cuda")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Missing, match="Triton is not installed"):
        gpu.module("another source")
