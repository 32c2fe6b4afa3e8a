"""Polynomials in the features of a node: what MACE multiplies the sums over its neighbours with.

    y_o[c] = Σ_m k[z, m, c] Π_{i in m} x_i[c]        for each monomial m of component o; z: element of the node, c: channel

The monomials of a component form a tree: (i, j, l) hangs below (i, j), and that below (i). Evaluated from the leaves to the root,
as Horner does, t(m) = k(m) + Σ_{children} x_{last(child)} t(child), so that nothing is multiplied twice.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from gossamer.nn.layers import Constant
from gossamer.nn.spherical import wigner_3j

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


# --- the products of MACE -----------------------------------------------------------------------------------------------


@functools.cache
def monomials(n_in: int, degree: int) -> tuple[Monomial, ...]:
    """All monomials of one degree."""
    return tuple(itertools.combinations_with_replacement(range(n_in), degree))


@functools.cache
def _raised(n_in: int, degree: int) -> NDArray[np.int64]:
    """(monomials of this degree, n_in): which monomial of the next degree each becomes when a factor joins it."""
    number = {m: k for k, m in enumerate(monomials(n_in, degree + 1))}
    return np.array([[number[tuple(sorted((*m, i)))] for i in range(n_in)] for m in monomials(n_in, degree)])


@functools.cache
def couplings(l_max: int, l_out: int, correlation: int) -> NDArray[np.float64]:
    """All ways to couple so many copies of one feature, of degrees 0 … l_max and natural parity, to degree l_out.

    Factors join one after another, each by 3j symbols times sqrt(2 l + 1) of the degree that results (Batatia et al.,
    arXiv:2206.07697, Eq. 10 and 11); degrees between may have either parity, for four factors natural parity only. Order and length
    are those of mace-torch, so that its weights are ours, but for the sign of couplings by way of unnatural parity, which e3nn 0.4.4
    has otherwise. As the factors are copies, some couplings depend on others.

    Returns:
        (couplings, 2 l_out + 1, monomials of this degree)
    """
    n_in = (l_max + 1) ** 2
    partial = [((l, (-1) ** l), np.eye(n_in)[l * l : (l + 1) ** 2]) for l in range(l_max + 1)]
    for degree in range(1, correlation):
        raised, joined = _raised(n_in, degree), []
        last = degree == correlation - 1
        reach = l_out + l_max * (correlation - degree - 1)
        for (l_left, p_left), left in partial:
            for l in range(l_max + 1):
                for l_new in range(abs(l_left - l), min(l_left + l, reach) + 1):
                    kind = l_new, p_left * (-1) ** l
                    wanted = kind == (l_out, (-1) ** l_out) if last else correlation < 4 or kind[1] == (-1) ** l_new
                    if wanted:
                        symbols = wigner_3j(l_new, l_left, l) * math.sqrt(2 * l_new + 1)
                        result = np.zeros((2 * l_new + 1, len(monomials(n_in, degree + 1))))
                        for m in range(2 * l + 1):
                            result[:, raised[:, l * l + m]] += symbols[:, :, m] @ left
                        joined.append((kind, result))
        partial = sorted(joined, key=lambda item: item[0])  # stable: within a kind as they came
    found = [values for kind, values in partial if kind == (l_out, (-1) ** l_out)]
    return np.stack(found) if found else np.zeros((0, 2 * l_out + 1, len(monomials(n_in, correlation))))


class SymmetricContraction(ElementPolynomial):
    """B = Σ over ν ≤ correlation and over couplings of w[z, coupling] times the coupled product of ν factors A, for each degree of the result.

    Batatia et al., arXiv:2206.07697, Eq. 10 and 11, as a polynomial in the components of A: its coefficients are linear in the weights.
    """

    def __init__(self, l_max: int, hidden_l_max: int, correlation: int, channels: int, n_elements: int) -> None:
        """
        Args:
            l_max: Highest degree of A.
            hidden_l_max: Highest degree of the result.
            correlation: Most factors.
            channels: Each has its own weights, and channels do not mix.
            n_elements: Each has its own weights.
        """
        n_in = (l_max + 1) ** 2
        parts = [(l, n, couplings(l_max, l, n)) for l in range(hidden_l_max + 1) for n in range(1, correlation + 1)]
        components: list[list[Monomial]] = [[] for _ in range((hidden_l_max + 1) ** 2)]
        rows: list[list[NDArray[np.float64]]] = [[] for _ in components]
        n_paths, first = sum(len(values) for *_, values in parts), 0
        for l, n, values in parts:
            for m, component in enumerate(values.transpose(1, 2, 0)):  # (monomials, couplings)
                for number in np.flatnonzero(np.abs(component).max(axis=1, initial=0) > 1e-12):
                    row = np.zeros(n_paths)
                    row[first : first + len(values)] = component[number]
                    components[l * l + m].append(monomials(n_in, n)[number])
                    rows[l * l + m].append(row)
            first += len(values)
        super().__init__(Monomials(n_in, tuple(tuple(c) for c in components)))
        self.sizes = [len(values) for *_, values in parts]
        """couplings of each degree of the result and number of factors, in the order of the weights"""
        self.channels = channels
        self.basis = Constant(np.stack([row for component in rows for row in component]))
        self.weights = nn.Embedding(n_elements, n_paths * channels)
        spread = torch.cat([torch.full((size * channels,), 1.0 / size) for size in self.sizes if size])
        self.weights.weight = nn.Parameter(torch.randn(n_elements, n_paths * channels) * spread)

    def coefficients(self) -> Float[Tensor, "elements monomials C"]:
        weights = self.weights.weight.reshape(self.weights.num_embeddings, -1, self.channels)
        return torch.matmul(self.basis(), weights)
