"""A potential: a network, reference energies and repulsion; the one place where energies become forces and stress.

Saved as one safetensors file. Its metadata holds a JSON manifest (format version, complete settings, elements, units,
statistics, versions, checksum), and a few stored structures with their predictions, which are recomputed on loading.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from ase.data import atomic_numbers as number_of
from ase.data import chemical_symbols
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from gossamer import __version__
from gossamer.data.statistics import Statistics
from gossamer.data.structure import Structure
from gossamer.files import write_bytes
from gossamer.graph import Graph, collate
from gossamer.models import MODELS, DataFacts, ModelConfig
from gossamer.nn.layers import sum_by_index
from gossamer.nn.zbl import ZBL
from gossamer.settings import build, settings, to_dict

FORMAT = 1
UNITS = {"energy": "eV", "length": "Angstrom", "stress": "eV/Angstrom^3 (ASE sign)"}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
# allowed deviation of recomputed predictions: energy in eV/atom, forces and stress relative to their largest value
TOLERANCES = {torch.float32: (2e-5, 2e-3), torch.float64: (1e-9, 1e-7)}


@settings
class PotentialConfig:
    """What surrounds the network."""

    zbl: bool = True
    """Add screened nuclear repulsion (universal ZBL), so that atoms cannot collapse where there is no data."""
    zbl_radius: Annotated[float, Field(gt=0)] | Literal["cutoff"] = 0.8
    """End of the repulsion as a fraction of the sum of the covalent radii, or "cutoff": that of the network (as nequip's package)."""
    zbl_power: Annotated[int, Field(ge=2)] = 5
    """Power p of its envelope (nequip: 6)."""
    zbl_order: Literal[2, 3, 4] = 4
    """Derivatives of its envelope that vanish at its end (nequip: 2)."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a potential says of a batch; float64."""

    energy: Float[Tensor, " n_graphs"]
    """eV, reference energies included"""
    node_energies: Float[Tensor, " n_atoms"]
    """eV, reference energies included"""
    forces: Float[Tensor, "n_atoms 3"] | None
    """eV/Å"""
    stress: Float[Tensor, "n_graphs 3 3"] | None
    """eV/Å³, tension positive; None if not asked for or not defined; NaN for structures without a volume"""


def make_zbl(config: PotentialConfig, cutoff: float) -> ZBL:
    """The repulsion that the settings describe."""
    radius = None if config.zbl_radius == "cutoff" else config.zbl_radius
    return ZBL(radius, cutoff, config.zbl_power, config.zbl_order)


class Potential(nn.Module):
    """Energies, forces and stress of a batch of structures."""

    species_of: Tensor
    reference_energies: Tensor
    table: Tensor

    def __init__(self, model: ModelConfig, statistics: Statistics, potential: PotentialConfig | None = None) -> None:
        """
        Args:
            model: Settings of the network; a fresh one with random weights is made.
            statistics: Elements, reference energies and scales.
            potential: What surrounds the network.
        """
        super().__init__()
        self.model_config = model
        self.potential_config = potential or PotentialConfig()
        self.statistics = statistics
        table = torch.tensor([number_of[e] for e in statistics.elements])
        species_of = torch.full((119,), -1)
        species_of[table] = torch.arange(len(table))
        references = torch.tensor([statistics.reference_energies[e] for e in statistics.elements], dtype=torch.float64)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("species_of", species_of, persistent=False)
        self.register_buffer("reference_energies", references, persistent=False)
        self.energy_scale = statistics.energy_scale
        scales = statistics.element_scales
        facts = DataFacts(
            atomic_numbers=tuple(table.tolist()),
            mean_neighbors=statistics.mean_neighbors,
            scales=None if scales is None else tuple(scales[e] for e in statistics.elements),
        )
        network: Any = MODELS[model.name][1]
        self.network = network(model, facts)
        self.zbl = make_zbl(self.potential_config, model.cutoff) if self.potential_config.zbl else None
        if self.zbl is not None and self.network.own_repulsion:
            raise ValueError(
                f"The published {model.name} has a repulsion of its own: set potential.zbl to false, or model.variant to sound."
            )

    @property
    def cutoff(self) -> float:
        """Å"""
        return self.model_config.cutoff

    @property
    def max_neighbors(self) -> int | None:
        return self.model_config.max_neighbors

    @property
    def conservative(self) -> bool:
        """Whether the forces are the gradient of the energy."""
        return not self.model_config.direct_forces

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters())

    def check_elements(self, atomic_numbers: np.ndarray, name: str = "The structure") -> None:
        """Raise ValueError if an element is not in the table."""
        known = set(self.table.tolist())
        unknown = sorted(set(np.unique(atomic_numbers).tolist()) - known)
        if unknown:
            listed = ", ".join(f"{chemical_symbols[z]} ({z})" for z in unknown)
            raise ValueError(
                f"{name}: {listed} not among the potential's elements ({', '.join(self.statistics.elements)}). "
                "Train with data that holds them, or choose another potential."
            )

    def collate(self, structures: Sequence[Structure]) -> Graph:
        """A graph of these structures with this potential's neighbour lists, on its device."""
        for structure in structures:
            self.check_elements(structure.atomic_numbers, structure.name)
        return collate(structures, self.cutoff, self.max_neighbors).to(self.device)

    def isolated_outputs(self) -> Float[Tensor, " n_elements"]:
        """Output of the network for a lone atom of each element in the table."""
        n = len(self.table)
        none = self.table.new_zeros((2, 0))
        vectors = torch.zeros((0, 3), dtype=self.dtype, device=self.device)
        species = torch.arange(n, device=self.device)
        return self.network(species, none, vectors, species, n).node_energies

    def forward(self, graph: Graph, *, forces: bool = True, stress: bool = False, isolated: Tensor | None = None) -> Prediction:
        """
        Args:
            graph: Batch; its elements must be in the table (``collate`` checks).
            forces: Return forces.
            stress: Return stress where it is defined (not for direct forces).
            isolated: ``isolated_outputs()`` of these very weights, to save computing them again.

        Returns:
            float64 predictions, differentiable with respect to the weights in training mode.
        """
        need_gradient = self.conservative and (forces or stress)
        sender, receiver = graph.edge_index
        with torch.set_grad_enabled(torch.is_grad_enabled() or need_gradient):
            vectors = graph.edge_vectors()
            if need_gradient:
                vectors = vectors.detach().requires_grad_()
            node_energies, direct = self._node_energies(graph, vectors, isolated)
            energy = sum_by_index(node_energies, graph.graph_index, graph.n_graphs)
            force_values = stress_values = None
            if need_gradient:
                # dE/d(edge vector) holds both: each edge pulls its two atoms, and its outer product is the virial
                (slope,) = torch.autograd.grad(energy.sum(), vectors, create_graph=self.training)
                force_values = sum_by_index(slope, receiver, graph.n_atoms) - sum_by_index(slope, sender, graph.n_atoms)
                if stress:
                    stress_values = self._stress(graph, vectors.detach(), slope)
            elif forces:
                force_values = direct
        if not self.training:
            energy, node_energies = energy.detach(), node_energies.detach()
        return Prediction(energy=energy, node_energies=node_energies, forces=force_values if forces else None, stress=stress_values)

    def _node_energies(self, graph: Graph, vectors: Tensor, isolated: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Energies of the atoms in eV (float64), and direct forces in eV/Å if the network has them."""
        species = self.species_of[graph.atomic_numbers]
        n, n_graphs = graph.n_atoms, graph.n_graphs
        nodes, graphs, total = species, graph.graph_index, n_graphs
        subtract = self.network.subtract_isolated
        if subtract and isolated is None:
            # one lone atom of each element rides along as a structure of its own
            extra = torch.arange(len(self.table), device=species.device)
            nodes = torch.cat([species, extra])
            graphs = torch.cat([graph.graph_index, extra + n_graphs])
            total = n_graphs + len(self.table)
        output = self.network(nodes, graph.edge_index, vectors.to(self.dtype), graphs, total)
        energies = output.node_energies
        if subtract:
            lone = energies[n:] if isolated is None else isolated
            energies = energies[:n] - lone[species]
        result = energies.to(torch.float64) * self.energy_scale + self.reference_energies[species]
        if self.zbl is not None:
            lengths = torch.linalg.vector_norm(vectors, dim=-1)
            pairs = self.zbl(graph.atomic_numbers, graph.edge_index, lengths)
            result = result + sum_by_index(pairs, graph.edge_index[1], n)
        direct = output.direct_forces
        return result, None if direct is None else direct[:n].to(torch.float64) * self.energy_scale

    def _stress(self, graph: Graph, vectors: Tensor, slope: Tensor) -> Tensor:
        """(1/V) sum over edges of dE/d(vector) ⊗ vector, symmetrised: ASE sign, NaN without a volume."""
        outer = slope[:, :, None] * vectors[:, None, :]
        virial = sum_by_index(outer, graph.graph_index[graph.edge_index[1]], graph.n_graphs)
        a, b, c = graph.cell.unbind(dim=1)
        volume = (a * torch.linalg.cross(b, c)).sum(dim=-1).abs()
        volume = torch.where(volume > 1e-9, volume, torch.full_like(volume, torch.nan))
        return 0.5 * (virial + virial.transpose(1, 2)) / volume[:, None, None]

    def predict(self, structures: Sequence[Structure], stress: bool = True) -> list[dict[str, Any]]:
        """Energy, forces and stress of each structure as numpy arrays, in evaluation mode."""
        was_training = self.training
        self.eval()
        try:
            graph = self.collate(structures)
            out = self(graph, stress=stress and self.conservative)
        finally:
            self.train(was_training)
        sizes = [s.n_atoms for s in structures]
        split = torch.split(out.forces.detach().cpu(), sizes)
        return [
            {
                "energy": float(out.energy[k]),
                "forces": split[k].numpy(),
                "stress": None if out.stress is None or not s.pbc.all() else out.stress[k].detach().cpu().numpy(),
            }
            for k, s in enumerate(structures)
        ]


# --- saving and loading ------------------------------------------------------------------------------------------


def save(potential: Potential, path: Path | str, check: Sequence[Structure] = (), training: Mapping[str, Any] | None = None) -> None:
    """Write a potential as one safetensors file, atomically.

    Args:
        potential: What to save.
        path: Target, usually ``*.safetensors``.
        check: Structures whose predictions are stored and recomputed on loading.
        training: The complete configuration of the run, kept for the record.
    """
    tensors = {f"network.{k}": v.detach().cpu().contiguous() for k, v in potential.network.state_dict().items()}
    for k, (structure, predicted) in enumerate(zip(check, potential.predict(check) if check else [], strict=True)):
        parts = {
            "atomic_numbers": structure.atomic_numbers,
            "positions": structure.positions,
            "cell": structure.cell,
            "pbc": structure.pbc,
            **{name: value for name, value in predicted.items() if value is not None},
        }
        for name, value in parts.items():
            tensors[f"check.{k}.{name}"] = torch.from_numpy(np.array(value)).contiguous()
    manifest = {
        "format": FORMAT,
        "gossamer": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": to_dict(potential.model_config),
        "potential": to_dict(potential.potential_config),
        "statistics": to_dict(potential.statistics),
        "dtype": str(potential.dtype).removeprefix("torch."),
        "units": UNITS,
        "conservative": potential.conservative,
        "num_parameters": potential.num_parameters,
        "n_check": len(check),
        "training": dict(training or {}),
    }
    manifest["checksum"] = _checksum(tensors, manifest)
    write_bytes(path, safetensors.torch.save(tensors, {"gossamer": json.dumps(manifest)}))


def state_of(potential: Potential) -> dict[str, Tensor]:
    """Weights and tables by name."""
    return {**dict(potential.named_parameters()), **dict(potential.named_buffers())}


def read_manifest(path: Path | str) -> dict[str, Any]:
    """The manifest of a saved potential, without building it.

    Raises:
        ValueError: not a potential of ours, truncated, or of a newer format.
    """
    return _open(Path(path))[0]


def weight_shapes(path: Path | str) -> dict[str, list[int]]:
    """Names and shapes of the weights in a saved potential."""
    return {k.removeprefix("network."): list(v.shape) for k, v in _open(Path(path))[1].items() if k.startswith("network.")}


def load(path: Path | str, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None) -> Potential:
    """Read a saved potential, and recompute its stored predictions on this device and dtype.

    Args:
        path: File written by ``save``.
        device: Where the potential goes.
        dtype: "float32" or "float64"; by default as saved.

    Raises:
        ValueError: truncated or altered file, newer format, or predictions that do not come out as stored.
    """
    path = Path(path)
    manifest, tensors = _open(path)
    if _checksum(tensors, manifest) != manifest.get("checksum"):
        raise ValueError(f"'{path}' was altered after it was saved (its checksum does not match). Use another copy.")
    model: Any = build(MODELS[manifest["model"]["name"]][0], manifest["model"], "model")
    statistics = build(Statistics, manifest["statistics"], "statistics")
    potential = Potential(model, statistics, build(PotentialConfig, manifest["potential"], "potential"))
    saved = DTYPES[manifest["dtype"]]
    weights = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
    potential.network.to(saved).load_state_dict(weights)
    wanted = saved if dtype is None else DTYPES[dtype] if isinstance(dtype, str) else dtype
    potential.network.to(wanted)
    potential.to(device).eval()
    _verify(potential, tensors, manifest["n_check"], min((saved, wanted), key=lambda t: t.itemsize), path)
    return potential


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"'{path}' is not a readable safetensors file ({error}). It may be truncated: copy it again.") from None
    if "gossamer" not in metadata:
        raise ValueError(f"'{path}' is a safetensors file, but not a potential saved by gossamer (no manifest).")
    manifest = json.loads(metadata["gossamer"])
    if manifest["format"] > FORMAT:
        raise ValueError(
            f"'{path}' has format {manifest['format']}; this gossamer {__version__} reads up to {FORMAT}. "
            f"Update gossamer (the file was written by {manifest['gossamer']})."
        )
    return manifest, tensors


def stored_structures(path: Path | str) -> list[Structure]:
    """The structures whose predictions are stored in a saved potential."""
    manifest, tensors = _open(Path(path))
    return [_stored(tensors, k) for k in range(manifest["n_check"])]


def _stored(tensors: Mapping[str, Tensor], k: int) -> Structure:
    values: dict[str, Any] = {name: tensors[f"check.{k}.{name}"].numpy() for name in ("atomic_numbers", "positions", "cell", "pbc")}
    return Structure(**values, name=f"stored structure {k}")


def _checksum(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps({k: v for k, v in manifest.items() if k != "checksum"}, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _verify(potential: Potential, tensors: Mapping[str, Tensor], n_check: int, precision: torch.dtype, path: Path) -> None:
    """Refuse a potential that does not reproduce its stored predictions here."""
    energy_tolerance, relative = TOLERANCES[precision]
    for k in range(n_check):
        structure = _stored(tensors, k)
        predicted = potential.predict([structure])[0]
        deviation = abs(predicted["energy"] - float(tensors[f"check.{k}.energy"])) / structure.n_atoms
        if not deviation <= energy_tolerance:
            raise ValueError(
                f"'{path}' gives another energy here than when it was saved ({deviation:.1e} eV/atom on {structure.name}, "
                f"{energy_tolerance:.0e} allowed on {potential.device} in {potential.dtype}). Do not use it on this machine."
            )
        for name in ("forces", "stress"):
            if f"check.{k}.{name}" not in tensors:
                continue
            reference = tensors[f"check.{k}.{name}"].numpy()
            error = float(np.abs(predicted[name] - reference).max()) if reference.size else 0.0
            if not error <= relative * max(float(np.abs(reference).max()), 1e-2):
                raise ValueError(
                    f"'{path}' gives other {name} here than when it was saved (up to {error:.1e} on {structure.name}, "
                    f"on {potential.device} in {potential.dtype}). Do not use it on this machine."
                )
