"""The contract of a network: what it is made from, what it is given, what it returns, and what others may ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from gossamer.nn.electrostatics import LatentCharges


class NetworkConfig(Protocol):
    """Settings that every network has; each has a settings class of its own with these and more."""

    name: str
    variant: str  # "sound" or "published"
    cutoff: float  # Å
    max_neighbors: int | None
    direct_forces: bool  # predicted beside the energy, instead of being its gradient


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What a network may know of its training data when it is made."""

    atomic_numbers: tuple[int, ...]
    """element table; ``species`` counts along it"""
    mean_neighbors: float = 1.0
    """mean number of atoms within the cutoff"""
    scales: tuple[float, ...] | None = None
    """for each element, RMS force over that of all elements; None stands for ones"""


class ModelOutput(NamedTuple):
    """Per-atom output of a network, in its own units (the potential scales it)."""

    node_energies: Tensor
    """(n_atoms,)"""
    direct_forces: Tensor | None
    """(n_atoms, 3), not the gradient of the energy; None for a network without that head"""
    features: Tensor
    """(n_atoms, M), what the last linear map of the readout takes: node energies are linear in it, up to a constant of the element
    and a repulsion"""


@dataclass(frozen=True, kw_only=True)
class FitDefaults:
    """What `gossamer fit` and `compare` start from."""

    learning_rate: float
    """of Muon, best of short trials (docs/training.md)"""
    soap_rate: float | None = None
    """of SOAP, where that ends lower than Muon (benchmarks/accuracy)"""
    compiled_share: float = 0.7
    """time of a compiled training step over that of a plain one, one CPU thread (benchmarks/compile)"""
    compile_seconds: float = 80.0
    """time that compiling takes there"""


class Network(nn.Module):
    """Per-atom energies from species and edge vectors; abstract. One file, one settings class and one row of `MODELS` make a network.

    It passes messages by the operations of `gossamer.nn`, so that the engine can put kernels in their place; it never sees positions,
    cells, files or devices.
    """

    fit_defaults: ClassVar[FitDefaults]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """named sizes: ``model: {name: nequip, preset: M}``; "tiny" is what the tests use"""
    renamed: ClassVar[Mapping[str, str]] = {}
    """patterns of weights' names in files of format 1, and what they are called now"""
    earlier: ClassVar[Mapping[str, Any]] = {}
    """settings that came later, as they were when files and checkpoints had none of them"""

    config: Any
    """its settings, a `NetworkConfig`"""
    embedding: nn.Embedding
    """table of the elements; every element table of a network is an Embedding: fine-tuning copies its rows, the optimiser does not decay it"""
    subtract_isolated: bool = True
    """whether the potential subtracts what the network gives for a lone atom"""
    radial_kinks: tuple[float, ...] = ()
    """distances over cutoff where a second derivative of ``radial_basis`` jumps: tables have a knot there, twice"""
    radial_pairs: int = 0
    """kinds of pairs of elements whose radial bases differ, each with tables of its own; 0: ``radial_basis`` is that of all"""
    local: bool = True
    """whether an atom's energy depends on nothing beyond ``num_hops`` edges from it"""
    charges: LatentCharges | None
    """charges of atoms from the last features, if the potential has them (`Potential.add_charges`): its weights, like all others, are the
    network's"""
    own_repulsion: bool = False
    """whether the potential must not add a repulsion of its own"""

    def __init__(self) -> None:
        super().__init__()
        self.charges = None

    @property
    def num_hops(self) -> int:
        """Edges from an atom to the farthest that its energy depends on; the receptive field is num_hops * cutoff."""
        return int(self.config.num_layers)

    def radial_basis(self, x: Float[Tensor, " E"]) -> Float[Tensor, "E B"]:
        """What radial functions are made from, at distance over cutoff; only if the network has `EdgeConvolution`s."""
        raise NotImplementedError

    def pair_basis(self, x: Float[Tensor, " E"], pair: int) -> Float[Tensor, "E B"]:
        """``radial_basis`` for one kind of pair; a network with ``radial_pairs`` says so, and gives its `Edges` the kind of each."""
        return self.radial_basis(x)

    def pair_cutoffs(self) -> Float[Tensor, "elements elements"] | None:
        """Å, by centre and neighbour: edges beyond carry nothing and may be left out; None: all reach the cutoff."""
        return None

    @staticmethod
    def unused(settings: Mapping[str, Any]) -> dict[str, str]:
        """Settings without effect, each with the other setting that takes it away."""
        return {}

    def energy_rows(self) -> dict[str, tuple[int, Tensor]]:
        """Weights that also serve direct forces: name -> (axis, indices along it that serve the energy).

        They are larger with ``direct_forces``; fine-tuning copies the part that both networks have.
        """
        return {}

    def forward(
        self,
        species: Int[Tensor, " N"],
        edge_index: Int[Tensor, "2 E"],
        edge_vectors: Float[Tensor, "E 3"],
        graph_index: Int[Tensor, " N"],
        n_graphs: int,
    ) -> ModelOutput:
        """
        Args:
            species: Index of each atom in the table of elements.
            edge_index: (sender, receiver), sorted by receiver.
            edge_vectors: Å, from centre (receiver) to neighbour (sender), in the dtype of the weights.
            graph_index: Structure of each atom.
            n_graphs: Number of structures.
        """
        raise NotImplementedError


def read_out(readout: nn.Sequential, x: Float[Tensor, "N C"]) -> tuple[Float[Tensor, " N"], Float[Tensor, "N M"]]:
    """What a readout gives, and what its last layer, a linear map, takes."""
    features = readout[:-1](x)
    return readout[-1](features)[:, 0], features


def distances(edge_vectors: Float[Tensor, "E 3"], cutoff: float) -> tuple[Float[Tensor, "E 3"], Float[Tensor, " E"]]:
    """Unit vectors, and distance over cutoff."""
    lengths = torch.linalg.vector_norm(edge_vectors, dim=-1)
    return edge_vectors / lengths[:, None], lengths / cutoff
