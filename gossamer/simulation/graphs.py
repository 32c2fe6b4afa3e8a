"""Many structures as a potential sees them, step after step: their neighbour lists are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.graph import Graph
from gossamer.potential import Potential
from gossamer.simulation.verlet import BatchVerletList


class BatchGraphs:
    """Makes the graph of a batch, of which only structures that moved too far are listed anew."""

    def __init__(self, potential: Potential, skin: float = 0.5) -> None:
        """
        Args:
            potential: Whose cutoff and elements count.
            skin: Å beyond the cutoff that neighbour lists reach.
        """
        self.potential = potential
        self.neighbors = BatchVerletList(potential.cutoff, skin, potential.max_neighbors)
        self._checked: bytes = b""

    def __call__(
        self,
        numbers: NDArray[np.int64],
        positions: NDArray[np.float64],
        cells: NDArray[np.float64],
        pbc: NDArray[np.bool_],
        index: NDArray[np.int64],
    ) -> Graph:
        """The batch on the potential's device.

        Args:
            numbers: (N,) atomic numbers, structure after structure.
            positions: (N, 3) Å.
            cells: (G, 3, 3) Å, vectors in rows.
            pbc: (G, 3).
            index: (N,) the structure of each atom.

        Raises:
            ValueError: an element that the potential does not know, or positions that are not finite; says in which structure. Or atoms that
                do not stand structure after structure.
        """
        if (np.diff(index) < 0).any():
            raise ValueError("The atoms do not stand structure after structure (system_idx is not ascending): sort them by structure.")
        counts = np.bincount(index, minlength=len(cells))
        if self._checked != numbers.tobytes():
            for k, part in enumerate(np.split(numbers, np.cumsum(counts)[:-1])):
                self.potential.check_elements(part, f"Structure {k}")
            self._checked = numbers.tobytes()
        edges, shifts = self.neighbors(positions, cells, pbc, counts)

        def there(array: Any) -> Tensor:
            return torch.from_numpy(array).to(self.potential.device)

        graph = Graph(
            atomic_numbers=there(numbers),
            positions=there(positions),
            cell=there(cells),
            graph_index=there(index),
            edge_index=there(edges),
            edge_shifts=there(shifts.astype(np.float64)),
            pbc=there(pbc.copy()),
        )
        return self.potential.prune(graph)
