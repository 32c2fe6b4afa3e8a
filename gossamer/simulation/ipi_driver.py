"""A potential as i-PI's driver (i-PI 3.3 and later): all beads of a path integral, or all replicas, evaluated as one batch.

i-PI reads a driver from a file, given as ``pes_path`` in its input or to i-pi-driver-py:

    from gossamer.simulation.ipi_driver import Driver

    __DRIVER_NAME__, __DRIVER_CLASS__ = "gossamer", "Driver"

i-PI computes in atomic units; cells hold their vectors in columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import units
from numpy.typing import NDArray

from gossamer.data.atoms import as_atoms
from gossamer.engine.engine import Engine, Way
from gossamer.engine.memory import keep_freed_memory
from gossamer.potential import Potential
from gossamer.potential_file import as_potential
from gossamer.simulation.graphs import BatchGraphs

try:
    from ipi.pes.dummy import Dummy_driver
except ImportError:
    raise ImportError("i-PI's driver needs the package ipi: pip install 'gossamer[ipi]'") from None

Array = NDArray[np.float64]
Answer = tuple[float, Array, Array, str]
"""energy in Hartree, forces (n_atoms, 3) in Hartree/Bohr, virial (3, 3) in Hartree, and what else i-PI may write: nothing"""


class Driver(Dummy_driver):
    """Energy, forces and virial of one structure, or of a list of them at once."""

    def __init__(
        self,
        model: Potential | Path | str,
        template: Path | str,
        device: str = "cpu",
        dtype: str | None = None,
        way: Way = "auto",
        dispersion: str | None = None,
        verbosity: Any = None,
        verbose: bool = False,
    ) -> None:
        """
        Args:
            model: Saved potential, or a potential.
            template: File whose first frame has the elements, in i-PI's order, and the periodicity. Without periodicity i-PI's cell is
                not looked at, and the virial is zero.
            device: Where the potential runs; concerns files.
            dtype: "float32" or "float64" of a file; by default as saved.
            way: How it runs (`gossamer.engine.engine`); "program" is compiled once per machine and potential.
            dispersion: Functional whose D3 is added (`gossamer.dispersion.D3`).
            verbosity: i-PI's, which it always gives; not used.
            verbose: i-pi-driver-py's, likewise.

        Raises:
            ValueError: an element that the potential does not know, periodicity along some axes only, or a periodic template with a
                potential that predicts forces directly, which has no virial.
            OSError, RuntimeError: as `gossamer.load` and `gossamer.Engine`.
        """
        if way == "graph":
            raise ValueError("way 'graph' records one structure. For batches choose auto, kernels, program or plain.")
        keep_freed_memory()
        atoms = as_atoms(template, 0)
        self.engine = Engine(as_potential(model, device, dtype), way, dispersion=dispersion)
        self.potential = self.engine.potential
        """the engine's: one that is given keeps its training mode and its gradients"""
        self.potential.check_elements(atoms.numbers, f"'{template}'")
        self.periodic = bool(atoms.pbc.any())
        if self.periodic and not atoms.pbc.all():
            raise ValueError(f"'{template}' has pbc {atoms.pbc.tolist()}: i-PI's structures are periodic along all axes, or none.")
        if self.periodic and not self.potential.conservative:
            raise ValueError(
                "This potential predicts forces directly: it has no virial, which i-PI asks for with every periodic structure."
            )
        self.numbers = atoms.numbers.astype(np.int64)
        self.graphs = BatchGraphs(self.potential)
        self._expected = way != "program"
        super().__init__(verbose)

    def compute(self, cell: Array | Sequence[Array], pos: Array | Sequence[Array]) -> Answer | list[Answer]:
        """Of one structure, or of lists of equal length.

        Args:
            cell: (3, 3) Bohr, vectors in columns.
            pos: (n_atoms, 3) Bohr.

        Raises:
            ValueError: a number of atoms that the template does not have, forces that are not finite, or a crystal that is refused
                (`Potential.refuse_charged`).
        """
        if isinstance(cell, list):
            return self.batch(np.array(cell), np.array(pos))
        return self.batch(np.asarray(cell)[None], np.asarray(pos)[None])[0]

    def batch(self, cells: Array, positions: Array) -> list[Answer]:
        """As ``compute``, of arrays with one more dimension in front."""
        n_graphs, n_atoms = positions.shape[:2]
        if n_atoms != len(self.numbers):
            raise ValueError(f"i-PI sent {n_atoms} atoms, and the template has {len(self.numbers)}: they must be the same, in one order.")
        rows = np.ascontiguousarray(cells.transpose(0, 2, 1) * units.Bohr) if self.periodic else np.zeros((n_graphs, 3, 3))
        graph = self.graphs(
            np.tile(self.numbers, n_graphs), positions.reshape(-1, 3) * units.Bohr, rows, np.full((n_graphs, 3), self.periodic),
            np.repeat(np.arange(n_graphs), n_atoms),
        )  # fmt: skip
        if not self._expected and n_graphs > 1:
            self.engine.expect(1, graph)  # the program of batches, made or read now
            self._expected = True
        out = self.engine(graph, stress=self.periodic)
        self.potential.refuse_charged(out, graph)
        assert out.forces is not None
        energies, forces = out.energy.detach().cpu().numpy().astype(np.float64), out.forces.detach().cpu().numpy().astype(np.float64)
        if not np.isfinite(forces).all():
            raise ValueError(
                "The potential's forces are not finite: atoms lie on one another. Start from separate atoms, or take a smaller time step."
            )
        virials = np.zeros((n_graphs, 3, 3))
        if out.stress is not None and self.periodic:
            virials = -out.stress.detach().cpu().numpy() * np.abs(np.linalg.det(rows))[:, None, None]
        pull = forces.reshape(n_graphs, n_atoms, 3) / (units.Hartree / units.Bohr)
        return [(float(e) / units.Hartree, f, v / units.Hartree, "") for e, f, v in zip(energies, pull, virials, strict=True)]
