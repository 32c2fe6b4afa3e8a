"""A potential as a model of TorchSim (0.3 and later), which moves many structures at once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from gossamer.engine.engine import Engine, Way
from gossamer.graph import Graph
from gossamer.potential import Potential
from gossamer.potential_file import as_potential, precision
from gossamer.simulation.graphs import BatchGraphs

try:
    import torch_sim
    from torch_sim.models.interface import ModelInterface
except ImportError:
    raise ImportError("TorchSimModel needs the package torch-sim-atomistic: pip install 'gossamer[torchsim]'") from None

log = logging.getLogger(__name__)


def check_axes(atoms: Atoms) -> None:
    """Raise ValueError if this TorchSim does not know the periodicity of a structure: until 0.3 it knows all axes or none."""
    plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    state = torch_sim.initialize_state([plain], torch.device("cpu"), torch.float64)
    if not np.array_equal(np.broadcast_to(np.asarray(state.pbc), 3), atoms.pbc):
        raise ValueError(
            f"pbc is {atoms.pbc.tolist()}, and this version of TorchSim knows all axes or none. Choose engine ase, or a newer TorchSim."
        )


def check_atoms(potential: Potential, atoms: Atoms) -> None:
    """Raise ValueError for a structure that the potential or TorchSim's steps do not know."""
    potential.check_elements(atoms.numbers)
    if not np.isfinite(atoms.positions).all():
        raise ValueError("Positions are not finite.")
    if atoms.constraints:
        raise ValueError("Constraints are not known to TorchSim. Choose engine ase, or remove them.")
    check_axes(atoms)
    if potential.network.charges is not None:
        potential.predict(atoms, stress=False)  # what is refused is refused alone, not amid a batch


class TorchSimModel(ModelInterface):
    """Energy, forces and stress of TorchSim's states, in eV, eV/Å and eV/Å³ (tension positive).

    A structure whose forces are not finite gets NaN, and the others of its batch what they would get alone.
    Of a potential whose errors were measured, `Potential.uncertainties` are among the answers.
    """

    def __init__(
        self,
        potential: Potential | Path | str,
        way: Way = "auto",
        device: str = "cpu",
        dtype: torch.dtype | str = torch.float64,
        compute_forces: bool = True,
        compute_stress: bool = True,
        skin: float = 0.5,
        dispersion: str | None = None,
    ) -> None:
        """
        Args:
            potential: A potential, or the file of one.
            way: How to evaluate (`gossamer.engine.engine`): "auto", "plain", "kernels", or "program", which is compiled once per
                machine and potential, in about half a minute.
            device: Where to compute, if a file is given.
            dtype: Of states and results; positions enter the potential in float64 in any case.
            compute_forces: Give forces.
            compute_stress: Give stress.
            skin: Å beyond the cutoff that neighbour lists reach, so that they are rebuilt rarely.
            dispersion: D3 of this functional is added (`gossamer.dispersion.D3`).

        Raises:
            ValueError: stress of a potential with direct forces, an unknown way or dtype, or a negative skin.
            RuntimeError: a way asked for by name that cannot be had here.
        """
        super().__init__()
        if way == "graph":
            raise ValueError("way 'graph' records one structure. For batches choose auto, kernels, program or plain.")
        self.engine = Engine(as_potential(potential, device), way, dispersion=dispersion)
        self.graphs = BatchGraphs(self.potential, skin)
        self._device, self._dtype = self.potential.device, precision(dtype)
        self._memory_scales_with = "n_atoms_x_density"
        self.compute_forces, self.compute_stress = compute_forces, compute_stress
        self._expected = way != "program"
        self.n_evaluations = 0
        """of batches, so far"""
        self.instead: float | None = None
        """what a structure gets that is refused, or whose forces are not finite, so that the others of its batch go on: NaN, or 0, with which
        FIRE leaves it where it is. None raises errors, and gives NaN for what is not finite"""
        self.refused: dict[int, str] = {}
        """why, by their places in the last batch, some got that instead"""
        self._doubt: Tensor | None = None

    @property
    def potential(self) -> Potential:
        """The engine's: one that is given keeps its training mode and its gradients. No submodule: ``train`` and ``to`` of this one, which is
        PyTorch's, do not reach it."""
        return self.engine.potential

    @ModelInterface.compute_forces.setter  # type: ignore[attr-defined, misc]
    def compute_forces(self, compute_forces: bool) -> None:
        self._compute_forces = compute_forces

    @ModelInterface.compute_stress.setter  # type: ignore[attr-defined, misc]
    def compute_stress(self, compute_stress: bool) -> None:
        if compute_stress and not self.potential.conservative:
            raise ValueError("This potential predicts forces directly: it has no stress. Pass compute_stress=False.")
        self._compute_stress = compute_stress

    def forward(self, state: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Energy (G,), forces (N, 3) and stress (G, 3, 3), detached; where the potential has an uncertainty, also "energy_uncertainty" (G,)
        in eV and "forces_uncertainty" (N,) in eV/Å.

        Args:
            state: TorchSim's SimState, or a dictionary of its fields. Cells hold their vectors in columns.
            **kwargs: None are known; the interface asks for them.

        Raises:
            TypeError: an unknown keyword.
            ValueError: an unknown element, positions that are not finite, or a crystal that is refused (`Potential.refuse_charged`); says in
                which structure. Unless there is something that it gets ``instead``.
        """
        if kwargs:
            raise TypeError(f"TorchSimModel.forward takes the state alone, found {', '.join(sorted(kwargs))}.")
        self.n_evaluations += 1
        fields = state if isinstance(state, dict) else vars(state) | {"system_idx": state.system_idx}
        self.refused = {}
        try:
            found = self._answers(self.graph(fields))
        except ValueError as error:
            if self.instead is None or fields.get("system_idx") is None:
                raise
            log.debug("one structure after the other, as one of them is refused: %s", error)
            found = self._one_by_one(fields)
        self._doubt = found.get("forces_uncertainty")
        if self.instead is None:
            self._warn(found["energy"])
        else:
            self._put_instead(found, fields)
        return {name: value.to(self._dtype) for name, value in found.items()}

    def _answers(self, graph: Graph) -> dict[str, Tensor]:
        if not self._expected and graph.n_graphs > 1:
            self.engine.expect(1, graph)  # the program of batches, made or read now
            self._expected = True
        out = self.engine(graph, stress=self._compute_stress)
        self.potential.refuse_charged(out, graph)
        found = {"energy": out.energy}
        if self._compute_forces:
            assert out.forces is not None
            found["forces"] = out.forces
        if self._compute_stress:
            assert out.stress is not None
            found["stress"] = out.stress
        if self.potential.uncertainty is not None:
            found |= self.potential.uncertainties(out, graph)
        return {name: value.detach() for name, value in found.items()}

    def _one_by_one(self, fields: Mapping[str, Any]) -> dict[str, Tensor]:
        """Answers of a batch: NaN for those that are refused, and for the others what they get alone."""
        doubts = () if self.potential.uncertainty is None else self.potential.uncertainty.known
        asked = [
            "energy",
            *["forces"] * self._compute_forces,
            *["stress"] * self._compute_stress,
            *(f"{name}_uncertainty" for name in doubts),
        ]
        parts, pbc = [], torch.as_tensor(fields["pbc"])
        for k, cell in enumerate(fields["cell"]):
            own = fields["system_idx"] == k
            one = {
                "positions": fields["positions"][own], "atomic_numbers": fields["atomic_numbers"][own], "cell": cell[None],
                "pbc": pbc[k] if pbc.ndim > 1 else pbc,
            }  # fmt: skip
            try:
                parts.append(self._answers(self.graph(one, BatchGraphs(self.potential, 0.0))))
            except ValueError as error:
                self.refused[k] = str(error).removeprefix("Structure 0: ")
                n = int(own.sum())
                shapes = {"forces": (n, 3), "stress": (1, 3, 3), "forces_uncertainty": (n,)}
                nothing = torch.full((), torch.nan, dtype=torch.float64, device=self._device)
                parts.append({name: nothing.expand(shapes.get(name, (1,))) for name in asked})
        return {name: torch.cat([part[name] for part in parts]) for name in asked}

    def _put_instead(self, found: dict[str, Tensor], fields: Mapping[str, Any]) -> None:
        """Replace the answers of those that are refused, and of those whose forces are not finite."""
        assert self.instead is not None
        n_structures, index = len(fields["cell"]), fields.get("system_idx")
        index = torch.zeros(len(fields["positions"]), dtype=torch.int64) if index is None else index.cpu()
        silent = torch.zeros(n_structures, dtype=torch.bool)
        for name, value in found.items():
            if name in ("energy", "forces"):  # what has no volume has no stress
                where = (~value.isfinite()).reshape(len(value), -1).any(dim=1).cpu()
                silent[index[where] if name == "forces" else where] = True
        for k in silent.nonzero()[:, 0].tolist():
            self.refused.setdefault(k, "its forces are not finite: atoms lie on one another")
        for name, value in found.items():
            which = silent[index] if name.startswith("forces") else silent
            found[name] = torch.where(which.to(value.device).reshape(-1, *[1] * (value.ndim - 1)), self.instead, value)

    def uncertainties(self) -> np.ndarray | None:
        """(N,) eV/Å, what the components of the last forces may be wrong by; None where the potential does not say (`Potential.uncertainties`)."""
        return None if self._doubt is None else self._doubt.cpu().numpy()

    def _warn(self, energy: Tensor) -> None:
        bad = (~torch.isfinite(energy)).nonzero()[:, 0].tolist()
        if bad:
            log.warning("energies of structures %s of the batch are not finite: atoms lie on one another", bad)

    def graph(self, fields: Mapping[str, Any], graphs: BatchGraphs | None = None) -> Graph:
        """The batch as the potential sees it, on its device; all atoms are one structure where no system_idx says otherwise, as TorchSim has it.

        Args:
            fields: Of TorchSim's state, by name.
            graphs: Keeps the neighbour lists, in the place of the model's own.

        Raises:
            ValueError: a field that is missing, an element that the potential does not know, or positions that are not finite; says in which structure.
        """
        missing = [name for name in ("positions", "cell", "atomic_numbers", "pbc") if name not in fields]
        if missing:
            raise ValueError(
                f"The state lacks {', '.join(missing)}. It needs positions, cell, atomic_numbers, pbc, and system_idx of many structures."
            )

        def on_cpu(name: str, kind: Any) -> Any:
            return np.ascontiguousarray(torch.as_tensor(fields[name]).detach().cpu().numpy(), dtype=kind)

        cells = np.ascontiguousarray(on_cpu("cell", np.float64).transpose(0, 2, 1))
        pbc = np.broadcast_to(on_cpu("pbc", bool), (len(cells), 3))
        numbers = on_cpu("atomic_numbers", np.int64)
        index = np.zeros(len(numbers), dtype=np.int64) if fields.get("system_idx") is None else on_cpu("system_idx", np.int64)
        return (graphs or self.graphs)(numbers, on_cpu("positions", np.float64), cells, pbc, index)
