"""A potential as an ASE calculator, with a Verlet skin around its neighbour list."""

from __future__ import annotations

import hashlib
import inspect
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator as ASECalculator
from ase.calculators.calculator import PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

from gossamer.engine.engine import Engine, Way
from gossamer.engine.memory import keep_freed_memory
from gossamer.graph import Graph
from gossamer.potential import NO_UNCERTAINTY, Potential, Prediction
from gossamer.potential_file import as_potential
from gossamer.simulation.verlet import DeviceVerletList, VerletList

log = logging.getLogger(__name__)
UNCERTAINTIES = ("energy_uncertainty", "forces_uncertainty")


class Calculator(ASECalculator):
    """ASE calculator of a potential: energy, free_energy, energies, forces, and stress and stresses where they are defined.

    Of a potential whose errors were measured (`Potential.uncertainties`), ``get_property("energy_uncertainty", atoms)`` in eV and
    ``get_property("forces_uncertainty", atoms)`` (n_atoms,) in eV/Å cost next to nothing after an evaluation. Of one with latent charges
    (`potential.long_range`) "charges" (n_atoms,) in e are among the results.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress", "stresses"]  # noqa: RUF012 - ASE's own convention

    def __init__(
        self,
        potential: Potential | Path | str,
        device: str = "cpu",
        dtype: str | None = None,
        skin: float = 0.5,
        way: Way = "auto",
        reuse_memory: bool = True,
        uncertainty: bool = False,
        dispersion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            potential: A potential, whose weights must not change later (make another calculator then), or the file of one.
            device: Where to compute, if a file is given.
            dtype: "float32" or "float64", if a file is given; by default as saved.
            skin: Å beyond the cutoff that the neighbour list reaches, so that it is rebuilt rarely.
            way: How to evaluate (`gossamer.engine.engine`): "auto", "plain", "kernels", "program" or "graph".
            reuse_memory: Let this process keep large blocks of memory that it frees, which saves up to a third of the time on
                Linux; concerns the whole process (`gossamer.engine.memory`).
            uncertainty: Put "energy_uncertainty" and "forces_uncertainty" into the results of every evaluation, not only when asked for.
            dispersion: D3 of this functional is added (`gossamer.dispersion.D3`); energies and stresses of atoms are then not given.
            kwargs: ASE's own (``atoms``, ``label``, ``directory``).

        Raises:
            TypeError: an argument that is none of these.
            ValueError: an unknown way, a CUDA graph without a GPU, dispersion that the labels held already, or no uncertainty where it is
                asked for.
            RuntimeError: a way asked for by name that cannot be had here.
            ImportError: dispersion without its package.
        """
        super().__init__(**kwargs)  # hands what it does not know to `set`
        if reuse_memory:
            keep_freed_memory()
        self.engine = Engine(as_potential(potential, device, dtype), way, dispersion=dispersion)
        self.potential = self.engine.potential
        """the engine's: whose training goes on, or who differentiates by weights, finds theirs as it was"""
        there = self.potential.device.type != "cpu" and self.potential.max_neighbors is None
        self.neighbors: VerletList = (
            DeviceVerletList(self.potential.cutoff, skin, self.potential.device)
            if there
            else VerletList(self.potential.cutoff, skin, self.potential.max_neighbors)
        )
        self.conservative = self.potential.conservative
        if self.potential.max_neighbors is not None:
            log.warning("this potential keeps %d neighbours: energy and forces jump when ranks change", self.potential.max_neighbors)
        if uncertainty and self.potential.uncertainty is None:
            raise ValueError(NO_UNCERTAINTY)
        further = [] if self.potential.network.charges is None else ["charges"]
        if self.potential.uncertainty is not None:
            further += [f"{name}_uncertainty" for name in self.potential.uncertainty.known]
        self.implemented_properties = [*type(self).implemented_properties, *further]
        self.uncertainty = uncertainty
        self._last: tuple[Prediction, Graph] | None = None
        self._checked: bytes = b""
        self._numbers = torch.zeros(0, dtype=torch.int64, device=self.potential.device)
        self._lock = threading.RLock()

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """ASE's, one thread after the other: each gets the answer to its own question.

        Raises:
            PropertyNotImplementedError: what this potential does not give, uncertainties included.
        """
        if name in UNCERTAINTIES and self.potential.uncertainty is None:
            raise PropertyNotImplementedError(NO_UNCERTAINTY)
        with self._lock:
            return super().get_property(name, atoms, allow_calculation)

    def set(self, **kwargs: Any) -> dict[str, Any]:
        """ASE's way to set parameters, of which there are none: what a potential computes is fixed when its calculator is made.

        Raises:
            TypeError: a parameter.
        """
        if kwargs:
            known = [name for name in inspect.signature(Calculator).parameters if name != "kwargs"]
            raise TypeError(f"A calculator has no argument {', '.join(map(repr, kwargs))}. When it is made it takes {', '.join(known)}.")
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_lock", "_last")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock, self._last = threading.RLock(), None

    def calculate(self, atoms: Atoms | None = None, properties: list[str] | None = None, system_changes: list[str] = all_changes) -> None:
        """Compute everything the potential gives (energy and forces come together); stresses only if asked for.

        The stresses of atoms (`Potential.virials` over the volume of the cell, as ASE's own calculators have them) take a second, plain
        evaluation; they sum to the stress.

        Raises:
            ValueError: no atoms, unknown element, positions that are not finite, two atoms on one spot, or a crystal that is refused
                (`Potential.refuse_charged`).
            PropertyNotImplementedError: stress or stresses of direct forces, or of a structure without a volume.
        """
        super().calculate(atoms, properties, system_changes)
        if self.atoms is None:
            raise ValueError(
                "There are no atoms to compute. Write atoms.calc = calculator and ask the atoms, or give them: get_potential_energy(atoms)."
            )
        wanted = properties or ["energy"]
        uncertain = self.uncertainty or any(name in UNCERTAINTIES for name in wanted)
        if all(name in UNCERTAINTIES for name in wanted) and not system_changes and self._last is not None:
            self._add_uncertainties(*self._last)
            return
        if system_changes:  # nothing of another structure is left where this one fails
            self.results, self._last = {}, None
        periodic = bool(self.atoms.pbc.all())
        stress_wanted = "stress" in wanted or "stresses" in wanted
        if self.engine.dispersion is not None and {"energies", "stresses"} & set(wanted):
            raise PropertyNotImplementedError("Energies and stresses of atoms are not known with dispersion, which belongs to pairs.")
        if stress_wanted and not self.conservative:
            raise PropertyNotImplementedError(
                "This potential predicts forces directly: it has no stress. Train one with direct_forces: false."
            )
        if stress_wanted and not periodic:
            raise PropertyNotImplementedError(f"Stress needs periodicity along all three axes, found pbc {self.atoms.pbc.tolist()}.")
        graph = self.graph(self.atoms)
        # stress costs next to nothing beside the forces, so it always comes along
        out = self.engine(graph, stress=periodic)
        stress = out.stress if periodic else None
        assert out.forces is not None
        energy, energies, forces, *found = _on_the_cpu(out.energy, out.node_energies, out.forces, *([] if stress is None else [stress]))
        if not np.isfinite(forces).all():
            self._explain_not_finite(graph)
        charges = None if out.charges is None else out.charges.cpu().numpy()
        self.potential.refuse_charged(out, graph)  # before there are results, which ASE would give to the next who asks
        self._last = out, graph
        self.results = {"energy": float(energy[0]), "free_energy": float(energy[0]), "energies": energies, "forces": forces}
        if self.engine.dispersion is not None:
            del self.results["energies"]
        if found:
            self.results["stress"] = full_3x3_to_voigt_6_stress(found[0][0])
        if charges is not None:
            self.results["charges"] = charges
        if "stresses" in wanted:
            try:
                virials = self.potential.virials(graph).cpu().numpy()
            except ValueError as error:
                raise PropertyNotImplementedError(str(error)) from None
            self.results["stresses"] = full_3x3_to_voigt_6_stress(virials / self.atoms.get_volume())
        if uncertain:
            self._add_uncertainties(out, graph)

    def _add_uncertainties(self, out: Prediction, graph: Graph) -> None:
        """Put what the errors of this prediction may be into the results."""
        expected = {name: value.cpu().numpy() for name, value in self.potential.uncertainties(out, graph).items()}
        self.results |= {name: float(value[0]) if name == "energy_uncertainty" else value for name, value in expected.items()}

    def expect(self, n_evaluations: int, atoms: Atoms) -> str:
        """Say that about so many evaluations of such atoms will come (`Engine.expect`); returns the way that they will go."""
        return self.engine.expect(n_evaluations, self.graph(atoms))

    def graph(self, atoms: Atoms) -> Graph:
        """The structure as the potential sees it, on the potential's device.

        Raises:
            ValueError: an element that the potential does not know, or positions that are not finite.
        """
        numbers, device = atoms.numbers, self.potential.device
        if len(numbers) == 0:
            raise ValueError("The structure has no atoms, so it has no energy.")
        if self._checked != numbers.tobytes():
            self.potential.check_elements(numbers)
            self._checked = numbers.tobytes()
            self._numbers = torch.from_numpy(numbers.astype(np.int64)).to(device)
        positions, cell = (torch.from_numpy(a.astype(np.float64)).to(device) for a in (atoms.positions, atoms.cell.array))
        if isinstance(self.neighbors, DeviceVerletList):
            edge_index, edge_shifts = self.neighbors.on_device(atoms.positions, atoms.cell.array, atoms.pbc, positions, cell)
        else:
            edges, shifts = self.neighbors(atoms.positions, atoms.cell.array, atoms.pbc)
            edge_index, edge_shifts = torch.from_numpy(edges).to(device), torch.from_numpy(shifts.astype(np.float64)).to(device)
        graph = Graph(
            atomic_numbers=self._numbers,
            positions=positions,
            cell=cell[None],
            graph_index=torch.zeros(len(atoms), dtype=torch.int64, device=device),
            edge_index=edge_index,
            edge_shifts=edge_shifts,
            pbc=torch.from_numpy(atoms.pbc[None]).to(device),
            names=("this structure",),
        )
        return self.potential.prune(graph)

    def _explain_not_finite(self, graph: Graph) -> None:
        lengths = graph.edge_vectors().norm(dim=1)
        if len(lengths):
            edge = int(lengths.argmin())
            sender, receiver = graph.edge_index[:, edge].tolist()
            close = f" Atoms {receiver} and {sender} are {float(lengths[edge]):.3f} Å apart."
        else:
            close = ""
        raise ValueError(f"The potential's forces are not finite.{close} Separate overlapping atoms.")


def digest_of(potential: Potential, dispersion: Any = None) -> str:
    """Short, and another for other weights or another D3; the same in any precision, on any device and in later versions."""
    tensors = [t.detach().cpu().to(torch.float32 if t.is_floating_point() else t.dtype) for t in potential.state_dict().values()]
    weights = sorted(hashlib.sha256(t.contiguous().numpy().tobytes()).digest() for t in tensors)
    name = hashlib.sha256(b"".join(weights)).hexdigest()[:12]
    return name if dispersion is None else f"{name} with D3 of {dispersion}"


def _on_the_cpu(*tensors: torch.Tensor) -> list[NDArray[Any]]:
    """Tensors as arrays, in one transfer from a GPU: each waits for it."""
    if tensors[0].device.type == "cpu":
        return [t.detach().numpy() for t in tensors]
    flat = torch.cat([t.detach().to(torch.float64).flatten() for t in tensors]).cpu().numpy()
    parts = np.split(flat, np.cumsum([t.numel() for t in tensors])[:-1])
    return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]
