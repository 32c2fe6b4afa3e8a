"""A potential as an ASE calculator, with a Verlet skin around its neighbour list."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator as ASECalculator
from ase.calculators.calculator import PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from gossamer.engine.agreement import TOLERANCE, agree, fixed_sizes, verified_kernels
from gossamer.engine.cuda_graph import Captured
from gossamer.engine.memory import keep_freed_memory
from gossamer.engine.program import Program, cached_program, fits
from gossamer.graph import Graph
from gossamer.potential import Potential, Prediction
from gossamer.potential_file import load
from gossamer.simulation.verlet import DeviceVerletList, VerletList

log = logging.getLogger(__name__)
COMPILATION, SAVED = 60.0, 0.4
"""seconds that compiling may take, and the share of an evaluation that it saves at least"""


class Calculator(ASECalculator):
    """ASE calculator of a potential: energy, free_energy, energies, forces, and stress where it is defined."""

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012 - ASE's own convention

    def __init__(
        self,
        potential: Potential | Path | str,
        device: str = "cpu",
        dtype: str | None = None,
        skin: float = 0.5,
        compiled: bool | None = None,
        cuda_graph: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            potential: A potential, or the file of one.
            device: Where to compute, if a file is given.
            dtype: "float32" or "float64", if a file is given; by default as saved.
            skin: Å beyond the cutoff that the neighbour list reaches, so that it is rebuilt rarely.
            compiled: False runs the potential as it is. None (default) passes messages by kernels (`gossamer.engine.agreement`, built in
                seconds, once) where there is a C++ compiler, and runs a compiled program (`gossamer.engine.program`) if one is in the
                cache; True makes that program if there is none (half a minute, once). Both are compared with the potential on
                the first structure, and not used if they differ.
            cuda_graph: On a GPU, record potential and kernels as a CUDA graph (`gossamer.engine.cuda_graph`): faster for small structures;
                recorded again when the number of atoms changes or edges no longer fit. Compared before use.

        Raises:
            ValueError: a CUDA graph without a GPU, or of a compiled program.
        """
        super().__init__(**kwargs)
        keep_freed_memory()
        self.potential = potential if isinstance(potential, Potential) else load(potential, device, dtype)
        self.potential.eval().requires_grad_(False)
        there = self.potential.device.type != "cpu" and self.potential.max_neighbors is None
        self.neighbors: VerletList = (
            DeviceVerletList(self.potential.cutoff, skin, self.potential.device)
            if there
            else VerletList(self.potential.cutoff, skin, self.potential.max_neighbors)
        )
        self.conservative = self.potential.conservative
        if self.potential.max_neighbors is not None:
            log.warning("this potential keeps %d neighbours: energy and forces jump when ranks change", self.potential.max_neighbors)
        with torch.no_grad():
            self.isolated = self.potential.isolated_outputs()
        if cuda_graph and compiled:
            raise ValueError(
                "cuda_graph records the potential and its kernels, not a compiled program: choose one of cuda_graph and compiled."
            )
        if cuda_graph and self.potential.device.type != "cuda":
            raise ValueError(f"cuda_graph needs a potential on a GPU, found {self.potential.device}. Give device='cuda', or leave it out.")
        self.cuda_graph = cuda_graph
        self.captured: Captured | None = None
        """the recording in use"""
        self.compiled = compiled
        self.program: Program | None = None
        """the compiled program in use"""
        self.fast: Potential | None = None
        """the potential with kernels"""
        self._looked = self._fixed = False
        self._checked: bytes = b""

    def calculate(self, atoms: Atoms | None = None, properties: list[str] | None = None, system_changes: list[str] = all_changes) -> None:
        """Compute everything the potential gives (energy and forces come together).

        Raises:
            ValueError: unknown element, positions that are not finite, or two atoms on one spot.
            PropertyNotImplementedError: stress of direct forces, or of a structure without a volume.
        """
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        wanted = properties or ["energy"]
        periodic = bool(self.atoms.pbc.all())
        if "stress" in wanted and not self.conservative:
            raise PropertyNotImplementedError(
                "This potential predicts forces directly: it has no stress. Train one with direct_forces: false."
            )
        if "stress" in wanted and not periodic:
            raise PropertyNotImplementedError(f"Stress needs periodicity along all three axes, found pbc {self.atoms.pbc.tolist()}.")
        graph = self._graph(self.atoms)
        # stress costs next to nothing beside the forces, so it always comes along
        out = self._predict(graph, stress=self.conservative and periodic)
        forces = out.forces.detach().cpu().numpy()
        if not np.isfinite(forces).all():
            self._explain_not_finite(graph)
        self.results = {
            "energy": float(out.energy[0]),
            "free_energy": float(out.energy[0]),
            "energies": out.node_energies.detach().cpu().numpy(),
            "forces": forces,
        }
        if out.stress is not None and periodic:
            self.results["stress"] = full_3x3_to_voigt_6_stress(out.stress[0].detach().cpu().numpy())

    def _predict(self, graph: Graph, stress: bool) -> Prediction:
        if not self._looked and self.compiled is not False and fits(graph):
            self._looked = True
            self.fast = verified_kernels(self.potential, graph)
            if not self.cuda_graph and (self.compiled or not self._fixed):
                self.program = cached_program(self.fast or self.potential, graph, make=self.compiled is True)
        if self.cuda_graph and fits(graph) and (self.captured is None or not self.captured.fits(graph)):
            self._capture(graph)
        if self.captured is not None and self.captured.fits(graph):
            return self.captured(graph)
        if self.program is not None and fits(graph):
            return self.program(graph)
        return (self.fast or self.potential)(graph, stress=stress, isolated=self.isolated)

    def _capture(self, graph: Graph) -> None:
        """Record what runs; if that is not possible, say so once and go on without."""
        self.captured = None
        steady = fixed_sizes(self.fast or self.potential)

        def run(graph: Graph) -> Prediction:
            return steady(graph, stress=self.conservative, isolated=self.isolated)

        try:
            recording = Captured(run, graph, self.potential.cutoff)
            agree(run(graph), recording(graph), self.potential, graph, TOLERANCE[self.potential.dtype])
            self.captured = recording
        except RuntimeError as error:
            self.cuda_graph = False
            log.warning("the potential runs without a CUDA graph: %s", str(error).splitlines()[0])

    @property
    def mode(self) -> str:
        """What runs: "plain" (the potential as it is), "kernels" or "program"."""
        return "program" if self.program is not None else "kernels" if self.fast is not None else "plain"

    def use_mode(self, mode: str) -> None:
        """From now on run just this (a program is made if there is none); rounding differs between the three."""
        self.compiled = {"plain": False, "kernels": None, "program": True}[mode]
        self.program, self.fast, self.captured, self._looked = None, None, None, False
        self._fixed = True

    def compile_if_worth(self, atoms: Atoms, evaluations: int) -> None:
        """Compile, unless told otherwise, if that many evaluations of these atoms would save more time than it takes."""
        graph = self._graph(atoms)
        self._predict(graph, self.conservative)
        if self.program is not None or self.compiled is not None or self._fixed or self.cuda_graph or not fits(graph):
            return
        began = time.perf_counter()
        self._predict(graph, self.conservative)
        if SAVED * (time.perf_counter() - began) * evaluations > COMPILATION:
            self.program = cached_program(self.fast or self.potential, graph, make=True)

    def _graph(self, atoms: Atoms) -> Graph:
        numbers = atoms.numbers
        if self._checked != numbers.tobytes():
            self.potential.check_elements(numbers)
            self._checked = numbers.tobytes()
        device = self.potential.device
        positions, cell = (torch.from_numpy(a.astype(np.float64)).to(device) for a in (atoms.positions, atoms.cell.array))
        if isinstance(self.neighbors, DeviceVerletList):
            edge_index, edge_shifts = self.neighbors.on_device(atoms.positions, atoms.cell.array, atoms.pbc, positions, cell)
        else:
            edges, shifts = self.neighbors(atoms.positions, atoms.cell.array, atoms.pbc)
            edge_index, edge_shifts = torch.from_numpy(edges).to(device), torch.from_numpy(shifts.astype(np.float64)).to(device)
        return Graph(
            atomic_numbers=torch.from_numpy(numbers.astype(np.int64)).to(device),
            positions=positions,
            cell=cell[None],
            graph_index=torch.zeros(len(atoms), dtype=torch.int64, device=device),
            edge_index=edge_index,
            edge_shifts=edge_shifts,
        )

    def _explain_not_finite(self, graph: Graph) -> None:
        lengths = graph.edge_vectors().norm(dim=1)
        if len(lengths):
            edge = int(lengths.argmin())
            sender, receiver = graph.edge_index[:, edge].tolist()
            close = f" Atoms {receiver} and {sender} are {float(lengths[edge]):.3f} Å apart."
        else:
            close = ""
        raise ValueError(f"The potential's forces are not finite.{close} Separate overlapping atoms.")
