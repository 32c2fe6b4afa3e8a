"""Polynomials in the features of a node: what MACE and Weft multiply the sums over neighbours with.

    y_o[c] = Σ_m k[z, m, c] Π_{i in m} x_i[c]        for each monomial m of component o; z: element of the node, c: channel

The monomials of a component form a tree: (i, j, l) hangs below (i, j), and that below (i). Evaluated from the leaves to the root,
as Horner does, t(m) = k(m) + Σ_{children} x_{last(child)} t(child), so that nothing is multiplied twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Monomial = tuple[int, ...]
"""the factors, sorted: (0, 0, 3) is x_0² x_3"""


@dataclass(frozen=True)
class Level:
    """All nodes of the trees at one depth: beginnings of monomials of so many factors."""

    last: tuple[int, ...]
    """last factor of each node"""
    parent: tuple[int, ...]
    """node of the level above that it hangs below; at the first level the component"""
    monomial: tuple[int, ...]
    """number of the monomial that ends here, -1 if none does"""


@dataclass(frozen=True)
class Monomials:
    """Which monomials there are; how much of each is for coefficients to say."""

    n_in: int
    """components of x"""
    components: tuple[tuple[Monomial, ...], ...]
    """of each component of the result"""

    def __post_init__(self) -> None:
        for component in self.components:
            if len(set(component)) < len(component):
                twice = next(m for k, m in enumerate(component) if m in component[:k])
                raise ValueError(f"monomial {twice} occurs twice in one component: add its coefficients")
            for m in component:
                if not m or list(m) != sorted(m) or m[0] < 0 or m[-1] >= self.n_in:
                    raise ValueError(f"monomial {m} must be a sorted tuple of one or more factors from 0 to {self.n_in - 1}")

    @property
    def n_out(self) -> int:
        return len(self.components)

    @cached_property
    def total(self) -> int:
        """Monomials of all components, which is how many coefficients there are."""
        return sum(len(c) for c in self.components)

    @cached_property
    def levels(self) -> list[Level]:
        """The trees of all components, level by level; a node's children lie one after another."""
        named: list[Monomial] = [(o, *m) for o, component in enumerate(self.components) for m in component]
        numbers = {node: k for k, node in enumerate(named)}
        degree = max((len(n) - 1 for n in numbers), default=0)
        above: list[Monomial] = [(o,) for o in range(self.n_out)]
        levels = []
        for depth in range(1, degree + 1):
            nodes = sorted({n[: depth + 1] for n in numbers if len(n) > depth})
            place = {node: k for k, node in enumerate(above)}
            parent = tuple(place[n[:-1]] for n in nodes)
            levels.append(Level(tuple(n[-1] for n in nodes), parent, tuple(numbers.get(n, -1) for n in nodes)))
            above = nodes
        return levels


class Polynomial(nn.Module):
    """Evaluates polynomials whose coefficients are given; kernels take its place."""

    def __init__(self, monomials: Monomials) -> None:
        super().__init__()
        self.monomials = monomials
        for depth, level in enumerate(monomials.levels):
            ends = [k for k, m in enumerate(level.monomial) if m >= 0]
            for name, values in {
                "last": level.last,
                "parent": level.parent,
                "ends": ends,
                "numbers": [level.monomial[k] for k in ends],
            }.items():
                self.register_buffer(f"{name}_{depth}", torch.tensor(values, dtype=torch.int64), persistent=False)

    def forward(
        self, x: Float[Tensor, "N n_in C"], species: Int[Tensor, " N"], coefficients: Float[Tensor, "elements monomials C"]
    ) -> Float[Tensor, "N n_out C"]:
        """Components go first inside, so that sums over them run through memory in order.

        Raises:
            ValueError: sizes that do not fit the monomials.
        """
        check_sizes(self.monomials, x, species, coefficients)
        factors = x.transpose(0, 1)  # (n_in, N, C)
        own = coefficients.transpose(0, 1).index_select(1, species)  # (monomials, N, C)
        below: Tensor | None = None  # t of the children, times their last factor
        for depth in reversed(range(len(self.monomials.levels))):
            ends, numbers = self.get_buffer(f"ends_{depth}"), self.get_buffer(f"numbers_{depth}")
            n_nodes = len(self.monomials.levels[depth].last)
            values = own.index_select(0, numbers)
            if len(ends) < n_nodes:
                values = values.new_zeros(n_nodes, *values.shape[1:]).index_add(0, ends, values)
            if below is not None:
                values = values.index_add(0, self.get_buffer(f"parent_{depth + 1}"), below)
            below = values * factors.index_select(0, self.get_buffer(f"last_{depth}"))
        result = x.new_zeros(self.monomials.n_out, x.shape[0], x.shape[2])
        return (result if below is None else result.index_add(0, self.get_buffer("parent_0"), below)).transpose(0, 1)


class ElementPolynomial(nn.Module):
    """Polynomials with coefficients of its own for every element; abstract.

    A network derives its products from it; with weights that no longer change, kernels keep its coefficients.
    """

    polynomial: nn.Module
    """a `Polynomial`, or the kernel in its place"""

    def __init__(self, monomials: Monomials) -> None:
        super().__init__()
        self.monomials, self.polynomial = monomials, Polynomial(monomials)

    def coefficients(self) -> Float[Tensor, "elements monomials C"]:
        """Made from the weights."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "N n_in C"], species: Int[Tensor, " N"]) -> Float[Tensor, "N n_out C"]:
        out: Tensor = self.polynomial(x, species, self.coefficients())
        return out


def check_sizes(monomials: Monomials, x: Tensor, species: Tensor, coefficients: Tensor) -> None:
    """
    Raises:
        ValueError: sizes that do not fit each other or the monomials.
    """
    expected: Sequence[tuple[str, Tensor, tuple[int, ...]]] = (
        ("x", x, (species.shape[0], monomials.n_in, x.shape[-1])),
        ("coefficients", coefficients, (coefficients.shape[0], monomials.total, x.shape[-1])),
    )
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} of a polynomial must have shape {shape}, found {tuple(tensor.shape)}")
