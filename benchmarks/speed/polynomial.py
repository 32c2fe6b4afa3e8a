"""MACE's products (polynomials in the features of a node) plain and by kernels: milliseconds, and seconds of the processor to build a kernel.

    python benchmarks/speed/polynomial.py [--channels 128] [--atoms 192 512] [--threads 1]

Two elements, float32, random features. Value and gradient, as in dynamics; and a training step's share: the gradient of a sum of squares
of that gradient. CPU time on one thread (wall time on several), fastest of several calls.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch

from gossamer.engine.kernels import cpu, polynomial
from gossamer.machine import machine
from gossamer.models.mace import SymmetricContraction
from gossamer.nn.polynomial import Monomials
from gossamer.timing import fastest

CASES = {"0e": (3, 0, 3), "0e+1o": (3, 1, 3), "0e, four factors": (3, 0, 4), "0e+1o, four factors": (3, 1, 4)}
"""l_max, degree of the result, correlation"""


def built(dtype: torch.dtype, monomials: Monomials, training: bool) -> float:
    """Seconds of the processor that the compiler takes."""
    source = f"typedef {cpu.REAL[dtype]} T;\n// {time.time_ns()}\n{polynomial.generate(monomials, training)}"
    began = os.times().children_user
    cpu.build(source, "polynomial").unlink()
    return os.times().children_user - began


def dynamics(function: Callable[..., torch.Tensor], x: torch.Tensor, species: torch.Tensor, k: torch.Tensor) -> Callable[[], object]:
    x = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(function(x, species, k).sum(), x)


def training(function: Callable[..., torch.Tensor], x: torch.Tensor, species: torch.Tensor, k: torch.Tensor) -> Callable[[], object]:
    x, k = x.clone().requires_grad_(), k.clone().requires_grad_()

    def step() -> object:
        (slope,) = torch.autograd.grad(function(x, species, k).sum(), x, create_graph=True)
        return torch.autograd.grad((slope**2).sum(), [x, k])

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--atoms", type=int, nargs="*", default=[192, 512])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    print(f"{machine()}\n")
    print("| product | monomials | atoms | plain | kernel | training: plain | kernel | built in (for training), s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (l_max, l_out, correlation) in CASES.items():
        contraction = SymmetricContraction(l_max, l_out, correlation, arguments.channels, 2)
        monomials, plain = contraction.monomials, contraction.polynomial
        seconds = [built(torch.float32, monomials, t) for t in (False, True)]
        keys = [polynomial.register(monomials, torch.float32, training=t) for t in (False, True)]
        for n in arguments.atoms:
            x, species = torch.randn(n, (l_max + 1) ** 2, arguments.channels), torch.arange(n) % 2
            cells = []
            for measure, key in zip((dynamics, training), keys, strict=True):
                for function in (plain, lambda *t, key=key: torch.ops.gossamer.polynomial(key, *t)):
                    run = measure(function, x, species, contraction.coefficients().detach())
                    cells.append(f"{1e3 * fastest(run, 5, 20.0, clock):.1f}")
            print(f"| {name} | {monomials.total} | {n} | {' | '.join(cells)} | {seconds[0]:.1f} ({seconds[1]:.1f}) |", flush=True)


if __name__ == "__main__":
    main()
