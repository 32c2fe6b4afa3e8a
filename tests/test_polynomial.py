"""Polynomials in the features of a node: plain, and kernels against plain."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from conftest import make_potential, often

from gossamer.data.from_atoms import from_atoms
from gossamer.data.labels import LabelConfig
from gossamer.engine.kernels import polynomial
from gossamer.engine.kernels.attach import PolynomialKernel, attach_kernels
from gossamer.nn.polynomial import Monomial, Monomials, Polynomial

needs_compiler = pytest.mark.skipif(not any(shutil.which(c) for c in ("g++", "clang++", "c++")), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def cache(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polynomial, "PIECE", 7)  # several functions


def some(n_in: int, n_out: int, degree: int, seed: int = 0) -> Monomials:
    """Random monomials of every length up to ``degree``; some components end early, the last has one monomial only."""
    generator = np.random.default_rng(seed)
    components: list[tuple[Monomial, ...]] = []
    for o in range(n_out):
        sizes = [1] if o == n_out - 1 and o else list(range(1, degree + 1))
        found = {tuple(sorted(generator.integers(0, n_in, n).tolist())) for n in sizes for _ in range(3)}
        components.append(tuple(sorted(found, key=lambda m: (len(m), m))))
    return Monomials(n_in, tuple(components))


def inputs_of(monomials: Monomials, n: int = 7, channels: int = 5, elements: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, monomials.n_in, channels, dtype=torch.float64, generator=generator)
    coefficients = torch.randn(elements, monomials.total, channels, dtype=torch.float64, generator=generator)
    return [x, torch.randint(0, elements, (n,), generator=generator), coefficients]


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_polynomial_is_its_definition(degree: int) -> None:
    monomials = some(4, 3, degree)
    x, species, k = inputs_of(monomials)
    found, number = Polynomial(monomials)(x, species, k), 0
    for o, component in enumerate(monomials.components):
        wanted = torch.zeros_like(found[:, 0])
        for m in component:
            wanted += k[species, number] * math.prod(x[:, i] for i in m)
            number += 1
        torch.testing.assert_close(found[:, o], wanted)
    assert number == monomials.total
    leaves = [x[:2, :, :2].clone().requires_grad_(), k[:, :, :2].clone().requires_grad_()]
    assert torch.autograd.gradgradcheck(lambda x, k: Polynomial(monomials)(x, species[:2], k), leaves)


@pytest.mark.parametrize("bad", [(), (2, 1), (0, 4), (-1,)])
def test_monomials_must_be_sorted_and_in_range(bad: Monomial) -> None:
    with pytest.raises(ValueError, match="sorted tuple of one or more factors from 0 to 3"):
        Monomials(4, (((0,), bad),))


def test_wrong_sizes_are_refused() -> None:
    monomials = some(4, 2, 2)
    x, species, k = inputs_of(monomials)
    with pytest.raises(ValueError, match="occurs twice"):
        Monomials(4, (((0, 1), (0, 1)),))
    for wrong in ((x[:, :3], species, k), (x, species, k[:, 1:])):
        with pytest.raises(ValueError, match="of a polynomial must have shape"):
            Polynomial(monomials)(*wrong)
    assert Polynomial(monomials)(x[:0], species[:0], k).shape == (0, 2, 5)


# --- kernels ---------------------------------------------------------------------------------------------------------


def derivatives(function: Callable[..., torch.Tensor], x: torch.Tensor, species: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    """Value, gradients in x and k, and the gradients of each of these along a random direction."""
    generator = torch.Generator().manual_seed(1)

    def random(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, dtype=like.dtype, generator=generator)

    x, k = x.clone().requires_grad_(), k.clone().requires_grad_()
    y = function(x, species, k)
    g = random(y).requires_grad_()
    first = torch.autograd.grad(y, [x, k], g, create_graph=True)
    second = [torch.autograd.grad(d, [g, x, k], random(d), retain_graph=True, allow_unused=True, materialize_grads=True) for d in first]
    return [y, *first, *second[0], *second[1]]


@needs_compiler
@pytest.mark.parametrize(("degree", "channels"), often([(1, 1), (2, 37), (3, 16), (4, 13)], [(3, 16)]))
def test_kernel_is_the_plain_polynomial(degree: int, channels: int) -> None:
    monomials = some(5, 3, degree)
    x, species, k = inputs_of(monomials, n=150, channels=channels, elements=4)
    species[species == 2] = 1  # an element that is not there
    key = polynomial.register(monomials, torch.float64, training=True)
    found = derivatives(lambda *t: torch.ops.gossamer.polynomial(key, *t), x, species, k)
    wanted = derivatives(Polynomial(monomials), x, species, k)
    assert float(found[2][2].detach().abs().max()) == 0
    for mine, theirs in zip(found, wanted, strict=True):
        assert float((mine - theirs).detach().abs().max()) <= 1e-13 * float(theirs.detach().abs().max())


def test_operations_are_counted() -> None:
    """x_0 (k + x_0 k'): a leaf inside a node; forward 1 each, backward 2 and 3."""
    assert polynomial.operations(Monomials(1, (((0,), (0, 0)),))) == (1 + 2) + (1 + 3)


@needs_compiler
def test_kernel_for_inference_in_float32() -> None:
    monomials = some(5, 3, 3)
    x, species, k = (t.float() if t.is_floating_point() else t for t in inputs_of(monomials, n=70, channels=40))
    key = polynomial.register(monomials, torch.float32)
    results = []
    for function in (lambda *t: torch.ops.gossamer.polynomial(key, *t), Polynomial(monomials)):
        leaf = x.clone().requires_grad_()
        y = function(leaf, species, k)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaf)])
    for mine, theirs in zip(*results, strict=True):
        assert float((mine - theirs).detach().abs().max()) < 1e-5 * float(theirs.detach().abs().max())


@needs_compiler
def test_kernel_refuses_what_does_not_fit() -> None:
    monomials = some(5, 3, 3)
    x, species, k = inputs_of(monomials)
    key = polynomial.register(monomials, torch.float64, training=True)
    call = torch.ops.gossamer.polynomial
    assert call(key, x[:0], species[:0], k).shape == (0, 3, 5)
    assert call(key, x[:, :, :0], species, k[:, :, :0]).shape == (7, 3, 0)
    for wrong in ((x[:, :3], species, k), (x, species[:3], k), (x, species, k[:, 1:]), (x, species, k[:, :, :2])):
        with pytest.raises(ValueError, match="of a polynomial must have shape"):
            call(key, *wrong)
    with pytest.raises(IndexError, match="species of a polynomial must be from 0 to 2"):
        call(key, x, species + 1, k)
    with pytest.raises(TypeError, match="polynomial was built for torch.float64, found torch.float32"):
        call(key, x.float(), species, k)


@needs_compiler
def test_threads_change_nothing() -> None:
    monomials = some(5, 3, 3)
    x, species, k = inputs_of(monomials, n=3000, channels=64)
    key = polynomial.register(monomials, torch.float64, training=True)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(derivatives(lambda *t: torch.ops.gossamer.polynomial(key, *t), x, species, k))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_compiler
@pytest.mark.thorough
def test_training_step_of_mace(ethanol: Atoms) -> None:
    """Gradients of a loss with forces: those of the plain network."""
    potential = make_potential(["H", "C", "O"], name="mace", l_max=1, correlation=2).train()
    graph = potential.collate([from_atoms(ethanol, LabelConfig(), "")])
    gradients = []
    for used in (potential, attach_kernels(potential, "training")):
        potential.zero_grad()
        prediction = used(graph)
        ((prediction.forces**2).sum() + prediction.energy.sum()).backward()
        gradients.append([p.grad.clone() for p in potential.parameters() if p.grad is not None])
    assert any(isinstance(m, PolynomialKernel) for m in used.modules())
    for mine, plain in zip(*gradients, strict=True):
        assert float((mine - plain).abs().max()) <= 1e-12 * float(plain.abs().max())
