"""The edges of a batch as the operations of all layers see them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor


class Edges:
    """Indices, directions and distances of the edges; what several layers need of them is made once, by the first that asks."""

    def __init__(
        self,
        index: Int[Tensor, "2 E"],
        x: Float[Tensor, " E"],
        harmonics: Float[Tensor, "E S"],
        basis: Callable[[], Float[Tensor, "E B"]],
    ) -> None:
        """
        Args:
            index: (sender, receiver), sorted by receiver.
            x: Distance over cutoff.
            harmonics: Functions of the direction from receiver to sender.
            basis: Makes what radial functions are made from; called at most once, and not at all where kernels read tables.
        """
        self.index, self.x, self.harmonics = index, x, harmonics
        self.sender, self.receiver = index
        self._basis = basis
        self._made: dict[Hashable, Any] = {}

    @property
    def basis(self) -> Float[Tensor, "E B"]:
        """Radial basis on every edge."""
        return self.once("basis", self._basis)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, made by the first that asks for ``key``."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]
