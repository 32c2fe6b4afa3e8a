"""A potential: a network, reference energies and repulsion; the one place where energies become forces and stress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers as number_of
from ase.data import chemical_symbols
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from gossamer.arguments import whole
from gossamer.data.batch import batches_by_atoms, collate
from gossamer.data.fingerprint import SeenFrames
from gossamer.data.statistics import Statistics
from gossamer.data.structure import Structure, as_structure
from gossamer.graph import Graph
from gossamer.models import MODELS, DataFacts, ModelConfig
from gossamer.nn.electrostatics import LatentCharges, coulomb_energies, neutralised
from gossamer.nn.float64 import Float64
from gossamer.nn.layers import sum_by_index
from gossamer.nn.limits import Limits, stretch
from gossamer.nn.products import Ends
from gossamer.nn.uncertainty import Uncertainty
from gossamer.nn.zbl import ZBL
from gossamer.quantities import QUANTITIES
from gossamer.settings import settings

NO_UNCERTAINTY = (
    "This potential has no uncertainty: it was trained without (training.uncertainty), or by an older gossamer. "
    "Measure it with gossamer calibrate POTENTIAL FRAMES."
)
BONDED = 0.8
"""of the sum of the covalent radii: where the repulsion ends for pairs that the training data lacks"""
MOST_CHARGE = 0.1
"""e of a crystal, beyond which ``net_charge: refuse`` refuses it"""
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@settings
class PotentialConfig:
    """What surrounds the network."""

    zbl: bool = True
    """Add screened nuclear repulsion (universal ZBL), so that atoms cannot collapse where there is no data."""
    zbl_radius: Annotated[float, Field(gt=0, le=10)] | Literal["data", "cutoff"] = "data"
    """End of the repulsion. "data": for each pair of elements its shortest distance in the training data; nearer than that, and of atoms
    with fewer neighbours than any in the data, the network is not asked (docs/models.md). A number: a fraction of the sum of the covalent
    radii (0.8 for pairs that the data lacks), and at most the cutoff. "cutoff": that of the network (as nequip's package)."""
    zbl_power: Annotated[int, Field(ge=2, le=100)] = 5
    """Power p of its envelope (nequip: 6)."""
    zbl_order: Literal[2, 3, 4] = 4
    """Derivatives of its envelope that vanish at its end (nequip: 2)."""
    long_range: Literal["latent_charges"] | None = None
    """Electrostatics beyond the cutoff: charges that the network predicts, summed by Ewald in crystals and liquids, pair by pair in molecules
    (docs/long_range.md)."""
    charge_smearing: Annotated[float, Field(gt=0, le=5)] = 1.0
    """Å, σ in erf(r / (sqrt 2 σ)) / r: nearer than this two charges hardly see one another."""
    net_charge: Literal["neutralise", "keep", "refuse"] = "neutralise"
    """What becomes of charges that do not sum to zero. "neutralise": the rest is taken off all atoms alike. "keep": as they are; a crystal
    then has a uniform background. "refuse": likewise, but a crystal of more than 0.1 e is refused, however the potential is run."""


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
    charges: Float[Tensor, " n_atoms"] | None = None
    """latent charges in e, where the potential has them"""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """further quantities (gossamer/quantities.py), where the network has heads for them"""
    features: Float[Tensor, "n_atoms M"] | None = None
    """last features of the atoms, from which `Potential.uncertainties` follow; None in training, and of a compiled potential without them"""

    @property
    def values(self) -> dict[str, Tensor]:
        """What is predicted, by the names of the quantities."""
        named = {"energy": self.energy, "forces": self.forces, "stress": self.stress, **self.extras}
        return {name: value for name, value in named.items() if value is not None}


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Without modes of the caller that make numbers wrong or impossible: autocast rounds them, and inference mode knows no gradients."""
    with ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            modes.enter_context(torch.autocast(device.type, enabled=False))
        yield


def make_zbl(config: PotentialConfig, cutoff: float, shortest: Mapping[str, float] | None = None) -> ZBL:
    """The repulsion that the settings describe; ``shortest``: Å at which it ends for pairs of elements that the data holds."""
    radius = None if config.zbl_radius == "cutoff" else BONDED if config.zbl_radius == "data" else config.zbl_radius
    return ZBL(radius, cutoff, config.zbl_power, config.zbl_order, shortest)


class Potential(Float64):
    """Energies, forces and stress of a batch of structures. ``to(dtype)`` is about the network; energies are summed in float64."""

    species_of: Tensor
    reference_energies: Tensor
    table: Tensor
    scale: Tensor

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
        self.seen: SeenFrames | None = None
        """fingerprints of the frames it was trained on; None if it does not know"""
        self.uncertainty: Uncertainty | None = None
        """how wrong it may be; None: nobody measured"""
        self.fixed_sizes = False
        """whether it is being traced: then the size of no tensor may depend on values"""
        self.imported: dict[str, Any] | None = None
        """where it comes from if another package trained it: package, version, file, sha256, what it was verified with, and
        ``fine_tuned`` if its weights were trained further here"""
        table = torch.tensor([number_of[e] for e in statistics.elements])
        species_of = torch.full((119,), -1)
        species_of[table] = torch.arange(len(table))
        references = torch.tensor([statistics.reference_energies[e] for e in statistics.elements], dtype=torch.float64)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("species_of", species_of, persistent=False)
        self.register_buffer("reference_energies", references, persistent=False)
        self.register_buffer("scale", torch.tensor([statistics.energy_scale], dtype=torch.float64), persistent=False)
        scales = statistics.element_scales
        facts = DataFacts(
            atomic_numbers=tuple(table.tolist()),
            mean_neighbors=statistics.mean_neighbors,
            scales=None if scales is None else tuple(scales[e] for e in statistics.elements),
        )
        network: Any = MODELS[model.name][1]
        self.network = network(model, facts)
        if self.potential_config.long_range is not None:
            self.add_charges()
        self.ends = Ends()
        self.zbl: ZBL | None = None
        self.limits: Limits | None = None
        """where the network is not asked; None: it is asked everywhere"""
        self.set_statistics(statistics)
        self.terms: Any = nn.ModuleList()
        """further energies of atoms, (graph, positions, cell) -> (n_atoms,) in eV, from positions and cells: long range, say"""
        if self.zbl is not None and self.network.own_repulsion:
            raise ValueError(
                f"The published {model.name} has a repulsion of its own: set potential.zbl to false, or model.variant to sound."
            )

    def add_charges(self) -> None:
        """Give the network a head for latent charges.

        Raises:
            ValueError: a network that predicts forces directly.
        """
        if not self.conservative:
            raise ValueError("potential.long_range needs forces that are the gradient of the energy: set model.direct_forces to false.")
        with torch.no_grad():  # how many features does it have?
            species, none = self.table.new_zeros(1), self.table.new_zeros((2, 0))
            features = self.network(species, none, torch.zeros((0, 3), dtype=self.dtype), species, 1).features
        self.network.charges = LatentCharges(features.shape[1], len(self.table)).to(self.dtype)

    @property
    def long_ranged(self) -> bool:
        """Whether its energies see positions and cells, and not the edges alone: then some ways of running it are closed."""
        return self.network.charges is not None or len(self.terms) > 0

    @property
    def needs_limits(self) -> bool:
        """Whether the settings ask for repulsion and network to know where the training data ends."""
        return self.potential_config.zbl and self.potential_config.zbl_radius == "data"

    def set_statistics(self, statistics: Statistics) -> None:
        """Take over what is known of the data, and with it where the repulsion ends and the network begins."""
        self.statistics = statistics
        if self.potential_config.zbl:
            known = self.needs_limits and statistics.fewest_neighbors is not None
            device = self.reference_energies.device
            shortest = statistics.shortest_distances if known else None
            self.zbl = make_zbl(self.potential_config, self.model_config.cutoff, shortest).to(device)
            self.limits = Limits(statistics.fewest_neighbors or {}).to(device) if known else None

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
    def energy_scale(self) -> float:
        """What the network's energies are multiplied with, eV."""
        return float(self.scale)

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
            names = dict(enumerate(chemical_symbols))
            listed = ", ".join(f"{names.get(z, 'no element')} ({z})" for z in unknown[:10]) + (" ..." if len(unknown) > 10 else "")
            own = [chemical_symbols[z] for z in sorted(known)]
            has = ", ".join(own) if len(own) <= 20 else f"{', '.join(own[:8])} ... {own[-1]}, {len(own)} in all"
            raise ValueError(
                f"{name}: {listed} not among the potential's elements ({has}). "
                "Train with data that holds them, or choose another potential."
            )

    def collate(self, structures: Sequence[Structure], lists: Sequence[tuple[np.ndarray, np.ndarray]] | None = None) -> Graph:
        """A graph of these structures with this potential's neighbour lists (made now if not given), on its device."""
        for structure in structures:
            self.check_elements(structure.atomic_numbers, structure.name)
        return self.adopt(collate(structures, self.cutoff, self.max_neighbors, lists))

    def adopt(self, graph: Graph) -> Graph:
        """A graph with this potential's neighbour lists on its device, without edges that it does not need; elements are not checked."""
        return self.prune(graph.to(self.device))

    def prune(self, graph: Graph) -> Graph:
        """The graph without edges that carry nothing, being longer than the cutoff of their pair and than the repulsion reaches."""
        ends = self._pair_cutoffs(graph)
        if ends is None:
            return graph
        if self.zbl is not None:
            centre, neighbour = graph.atomic_numbers[graph.edge_index[1]], graph.atomic_numbers[graph.edge_index[0]]
            ends = torch.maximum(ends, self.zbl.ends(centre, neighbour, ends))
        kept = (graph.edge_vectors().norm(dim=1) < ends).nonzero()[:, 0]
        return replace(graph, edge_index=graph.edge_index.index_select(1, kept), edge_shifts=graph.edge_shifts.index_select(0, kept))

    def _pair_cutoffs(self, graph: Graph) -> Float[Tensor, " n_edges"] | None:
        """Å of each edge, where pairs have cutoffs of their own."""
        table = self.network.pair_cutoffs()
        if table is None:
            return None
        neighbour, centre = self.ends(self.species_of[graph.atomic_numbers], graph.edge_index)
        return table.to(torch.float64)[centre, neighbour]

    def isolated_outputs(self) -> Float[Tensor, " n_elements"]:
        """Output of the network for a lone atom of each element in the table."""
        n = len(self.table)
        none = self.table.new_zeros((2, 0))
        vectors = torch.zeros((0, 3), dtype=self.dtype, device=self.device)
        species = torch.arange(n, device=self.device)
        with undisturbed(self.device):
            return self.network(species, none, vectors, species, n).node_energies

    def forward(self, graph: Graph, *, forces: bool = True, stress: bool = False, isolated: Tensor | None = None) -> Prediction:
        """In the precision of the weights, whatever autocast says, and under inference mode too.

        Args:
            graph: Batch; its elements must be in the table (``collate`` checks).
            forces: Return forces.
            stress: Return stress where it is defined (not for direct forces).
            isolated: ``isolated_outputs()`` of these very weights, to save computing them again.

        Returns:
            float64 predictions, differentiable with respect to the weights in training mode.
        """
        need_gradient = self.conservative and (forces or stress)
        with undisturbed(self.device), torch.set_grad_enabled(torch.is_grad_enabled() or need_gradient):
            graph = graph.differentiable()
            leaves = self._leaves(graph, need_gradient)
            node_energies, direct, features, charges = self._node_energies(graph, leaves, isolated)
            energy = sum_by_index(node_energies, graph.graph_index, graph.n_graphs)
            force_values = stress_values = None
            if need_gradient:
                slopes = torch.autograd.grad(energy.sum(), list(leaves), create_graph=self.training)
                force_values = self._forces(graph, slopes)
                if stress:
                    stress_values = self._stress(graph, leaves[0].detach(), slopes)
            elif forces:
                force_values = direct if direct is None or self.training else direct.detach()
        if not self.training:
            energy, node_energies = energy.detach(), node_energies.detach()
        return Prediction(
            energy=energy,
            node_energies=node_energies,
            forces=force_values if forces else None,
            stress=stress_values,
            features=None if self.training else features.detach(),
            charges=None if charges is None else charges.detach(),
        )

    def uncertainties(self, prediction: Prediction, graph: Graph) -> dict[str, Tensor]:
        """Expected errors of a prediction, as far as they were measured: "energy_uncertainty" (n_graphs,) in eV, the standard deviation of
        the energy's error, and "forces_uncertainty" (n_atoms,) in eV/Å, that of each component of the force.

        Args:
            prediction: Of this potential in evaluation mode, by any engine.
            graph: What was predicted.

        Raises:
            ValueError: the potential has no uncertainty.
        """
        if self.uncertainty is None or prediction.features is None:
            raise ValueError(NO_UNCERTAINTY)
        energy, forces = self.uncertainty(prediction.features, self.species_of[graph.atomic_numbers], graph.graph_index, graph.n_graphs)
        found = {"energy": energy, "forces": forces}
        return {f"{name}_uncertainty": found[name] for name in self.uncertainty.known}

    def refuse_charged(self, prediction: Prediction, graph: Graph) -> None:
        """Raise ValueError for a crystal whose latent charges do not sum to zero, if the settings ask for it (`PotentialConfig.net_charge`)."""
        if prediction.charges is None or self.potential_config.net_charge != "refuse":
            return
        sums = sum_by_index(prediction.charges, graph.graph_index, graph.n_graphs)
        charged = (graph.periodic.all(dim=1) & (sums.abs() > MOST_CHARGE)).nonzero()[:, 0].tolist()
        if charged:
            k = charged[0]
            raise ValueError(
                f"{graph.name(k)}: its latent charges sum to {float(sums[k]):+.2f} e, and the potential refuses crystals of more than {MOST_CHARGE} "
                "(potential.net_charge): it is unlike the training data, or charged. Train with net_charge neutralise or keep to have it all the same."
            )

    def _leaves(self, graph: Graph, need_gradient: bool) -> tuple[Tensor, ...]:
        """What energies are differentiated by: edge vectors; for terms that see positions and cells, also positions and strains.

        dE/d(edge vector) holds both forces and stress: each edge pulls its two atoms, and its outer product is the virial.
        """
        leaves = [graph.edge_vectors()]
        if self.long_ranged:
            leaves += [graph.positions, torch.zeros_like(graph.cell)]
        return tuple(x.detach().requires_grad_() for x in leaves) if need_gradient else tuple(leaves)

    def _forces(self, graph: Graph, slopes: Sequence[Tensor]) -> Tensor:
        """Minus the gradient with respect to positions."""
        sender, receiver = graph.edge_index
        slope = slopes[0]
        forces = sum_by_index(slope, receiver, graph.n_atoms) - sum_by_index(slope, sender, graph.n_atoms)
        return forces - slopes[1] if len(slopes) > 1 else forces

    def _node_energies(
        self, graph: Graph, leaves: Sequence[Tensor], isolated: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Energies of the atoms in eV (float64), direct forces in eV/Å if the network has them, last features, and charges in e if it has them."""
        vectors = leaves[0]
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
        pair_cutoffs = self._pair_cutoffs(graph)
        repulsion, shown = self._repulsion(graph, vectors, pair_cutoffs)
        output = self.network(nodes, graph.edge_index, shown.to(self.dtype), graphs, total)
        energies, direct = output.node_energies, output.direct_forces
        if subtract:
            lone = energies[n:] if isolated is None else isolated
            energies = energies[:n] - lone[species]
        energies = energies.to(torch.float64) * self.scale
        direct = None if direct is None else direct[:n].to(torch.float64) * self.scale
        trust = self._trust(graph, vectors, pair_cutoffs)
        if trust is not None:
            energies = energies * trust
            direct = None if direct is None else direct * trust[:, None]
        result = energies + self.reference_energies[species]
        if repulsion is not None:
            result = result + repulsion
        charges = None
        if self.long_ranged:
            _, positions, strain = leaves
            moved = positions + torch.einsum("nx,nxy->ny", positions, strain[graph.graph_index])
            cell = graph.cell + graph.cell @ strain
            for term in self.terms:
                result = result + term(graph, moved, cell)
            if self.network.charges is not None:
                charges = self._charges(output.features[:n], species, graph)
                smearing = self.potential_config.charge_smearing
                where = graph.periodic, graph.graph_index
                result = result + coulomb_energies(charges, moved, cell, *where, smearing, names=graph.names)
        return result, direct, output.features[:n], charges

    def _charges(self, features: Tensor, species: Tensor, graph: Graph) -> Float[Tensor, " n_atoms"]:
        """Latent charges in e (float64)."""
        assert self.network.charges is not None
        charges = self.network.charges(features, species).to(torch.float64)
        neutralise = self.potential_config.net_charge == "neutralise"
        return neutralised(charges, graph.graph_index, graph.n_graphs) if neutralise else charges

    def _repulsion(
        self, graph: Graph, vectors: Tensor, pair_cutoffs: Float[Tensor, " n_edges"] | None
    ) -> tuple[Float[Tensor, " n_atoms"] | None, Float[Tensor, "n_edges 3"]]:
        """Repulsion of each atom in eV, and the vectors that the network is shown: no pair nearer than any in the training data."""
        if self.zbl is None:
            return None, vectors
        receiver = graph.edge_index[1]
        z_j, z_i = self.ends(graph.atomic_numbers, graph.edge_index)
        ends = self.zbl.ends(z_i, z_j, pair_cutoffs)
        near = self._where(torch.linalg.vector_norm(vectors.detach(), dim=-1) < ends)
        close = vectors
        if near is not None:
            receiver, z_i, z_j, ends, close = (x.index_select(0, near) for x in (receiver, z_i, z_j, ends, close))
        lengths = torch.linalg.vector_norm(close, dim=-1)
        energies = sum_by_index(self.zbl(z_i, z_j, lengths, ends), receiver, graph.n_atoms)
        if self.limits is None:
            return energies, vectors
        moves = close * stretch(lengths, ends)[:, None]
        return energies, vectors + moves if near is None else vectors.index_add(0, near, moves)

    def _trust(self, graph: Graph, vectors: Tensor, pair_cutoffs: Float[Tensor, " n_edges"] | None) -> Float[Tensor, " n_atoms"] | None:
        """Factor of each atom's energy: less than one with fewer neighbours than any in the training data; None: all are one."""
        if self.limits is None:
            return None
        receiver = graph.edge_index[1]
        reaches = vectors.new_full((1,), self.cutoff).expand(graph.n_edges) if pair_cutoffs is None else pair_cutoffs
        lonely = self._trust_by(graph, vectors.detach(), receiver, reaches) < 1
        edges = self._where(lonely[receiver])
        if edges is not None:
            if not bool(lonely.any()):
                return None
            receiver, reaches, vectors = (x.index_select(0, edges) for x in (receiver, reaches, vectors))
        return torch.where(lonely, self._trust_by(graph, vectors, receiver, reaches), 1.0)

    def _trust_by(self, graph: Graph, vectors: Tensor, receiver: Tensor, reaches: Tensor) -> Float[Tensor, " n_atoms"]:
        """The factors by these edges alone, in the precision of the network, whose energies they multiply."""
        assert self.limits is not None
        x = (torch.linalg.vector_norm(vectors, dim=-1) / reaches).to(self.dtype)
        return self.limits.trust(self.limits.count(x, receiver, graph.n_atoms), graph.atomic_numbers)

    def _where(self, chosen: Bool[Tensor, " n_edges"]) -> Int[Tensor, " k"] | None:
        """Which edges are chosen, mostly few; None (take them all) where sizes must not depend on values."""
        return None if self.fixed_sizes or chosen.device.type != "cpu" else chosen.nonzero()[:, 0]

    def _stress(self, graph: Graph, vectors: Tensor, slopes: Sequence[Tensor]) -> Tensor:
        """(1/V) sum over edges of dE/d(vector) ⊗ vector, symmetrised: ASE sign, NaN without a volume."""
        outer = slopes[0][:, :, None] * vectors[:, None, :]
        virial = sum_by_index(outer, graph.graph_index[graph.edge_index[1]], graph.n_graphs)
        if len(slopes) > 1:
            virial = virial + slopes[2]
        a, b, c = graph.cell.unbind(dim=1)
        volume = (a * torch.linalg.cross(b, c)).sum(dim=-1).abs()
        there = (volume > 1e-9)[:, None, None]
        # NaN is put in last: divided by, it would reach the weights through gradients of zero
        stress = 0.5 * (virial + virial.transpose(1, 2)) / torch.where(there, volume[:, None, None], 1.0)
        return torch.where(there, stress, torch.nan)

    def virials(self, graph: Graph) -> Float[Tensor, "n_atoms 3 3"]:
        """Each atom's share of the virial in eV, dE/d(strain): half of dE/d(vector) ⊗ vector of its edges, symmetrised.

        They sum to stress times volume. How a virial is shared out is a convention (the forces of a network are not sums of pairs).

        Raises:
            ValueError: forces that are no gradient, or terms whose virial belongs to no edge.
        """
        if not self.conservative or self.long_ranged:
            what = "has terms of positions and cells" if self.conservative else "predicts forces directly"
            raise ValueError(f"A potential that {what} has no virials of atoms.")
        with undisturbed(self.device), torch.enable_grad():
            graph = graph.differentiable()
            (vectors,) = self._leaves(graph, need_gradient=True)
            node_energies, *_ = self._node_energies(graph, (vectors,), None)
            (slopes,) = torch.autograd.grad(node_energies.sum(), (vectors,))
        outer = 0.25 * slopes[:, :, None] * vectors.detach()[:, None, :]
        outer = outer + outer.transpose(1, 2)
        sender, receiver = graph.edge_index
        return sum_by_index(outer, receiver, graph.n_atoms) + sum_by_index(outer, sender, graph.n_atoms)

    def predict(
        self,
        structures: Structure | Atoms | Sequence[Structure | Atoms],
        stress: bool = True,
        run: Callable[[Graph, bool], Prediction] | None = None,
        batch_atoms: int = 2048,
        uncertainty: bool = False,
        refuse: bool = True,
    ) -> list[dict[str, Any]]:
        """Energy (eV), forces (eV/Å) and stress (eV/Å³; None without a volume) of each structure as numpy arrays, in evaluation mode.

        Args:
            structures: ASE Atoms or our structures, many or one. The answer is a list in any case.
            stress: Whether to compute it.
            run: An engine of this potential that evaluates in its place.
            batch_atoms: Atoms evaluated at once.
            uncertainty: Also `uncertainties`.
            refuse: Refuse what the settings ask to refuse (`refuse_charged`); without, errors on frames with labels can be told.

        Raises:
            TypeError: something else than structures, such as the name of a file.
            ValueError: no ``batch_atoms``, an element that is not in the table, a periodic structure without a cell, a charged one that is refused, or no
                uncertainty where it is asked for.
        """
        batch_atoms = whole("batch_atoms", batch_atoms, 1)
        given = [structures] if isinstance(structures, Structure | Atoms | str) else structures
        chosen = [as_structure(s, f"structure {k}") for k, s in enumerate(given)]
        was_training = self.training
        self.eval()
        try:
            return [
                answer
                for _, batch in batches_by_atoms(chosen, batch_atoms)
                for answer in self._predict(batch, stress, run, uncertainty, refuse)
            ]
        finally:
            self.train(was_training)

    def _predict(
        self,
        structures: Sequence[Structure],
        stress: bool,
        run: Callable[[Graph, bool], Prediction] | None,
        uncertainty: bool,
        refuse: bool,
    ) -> list[dict[str, Any]]:
        """The same for one batch."""
        graph = self.collate(structures)
        wanted = stress and self.conservative
        out = self(graph, stress=wanted) if run is None else run(graph, wanted)
        if refuse:
            self.refuse_charged(out, graph)
        sizes = [s.n_atoms for s in structures]
        values = {name: value.detach().cpu() for name, value in out.values.items()}
        parts = {name: torch.split(v, sizes) if QUANTITIES[name].per == "atom" else v for name, v in values.items()}
        if uncertainty:
            expected = self.uncertainties(out, graph)
            parts |= {name: torch.split(v.cpu(), sizes) if name.startswith("forces") else v.cpu() for name, v in expected.items()}
        answers: list[dict[str, Any]] = [{name: part[k].numpy() for name, part in parts.items()} for k in range(len(structures))]
        for structure, answer in zip(structures, answers, strict=True):
            answer["energy"] = float(answer["energy"])
            answer["stress"] = answer.get("stress") if structure.pbc.all() else None
        return answers


def state_of(potential: Potential) -> dict[str, Tensor]:
    """Weights and tables by name."""
    return {**dict(potential.named_parameters()), **dict(potential.named_buffers())}
