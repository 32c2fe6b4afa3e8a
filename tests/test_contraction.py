"""Polynomials in the features of a node: plain, and kernels against plain."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gossamer.nn.contraction import Monomial, Monomials, Polynomial


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
    leaves = [x[:2].requires_grad_(), k.requires_grad_()]
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
