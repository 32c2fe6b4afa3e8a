"""Compare our networks with stored outputs of the authors' code.

    python tests/reference/compare.py ../shared/reference/leignn.npz
    python tests/reference/compare.py ../shared/reference/geodite.npz
    python tests/reference/compare.py tests/reference/nequip.npz            # made by make_nequip.py
    python tests/reference/compare.py tests/reference/mace.npz              # made by make_mace.py
    python tests/reference/compare.py tests/reference/schnetpack.npz        # made by make_schnetpack.py
    python tests/reference/compare.py tests/reference/weft.npz              # made by make_weft.py, from the equations of our own network

Prints the largest relative deviation of every stored output; exit status 1 if any is above 1e-10.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from ase.data import chemical_symbols

from gossamer.data.statistics import Statistics
from gossamer.data.structure import Structure
from gossamer.engine.kernels.attach import FixedMaps
from gossamer.graph import Graph
from gossamer.imports import mace
from gossamer.imports.contract import ImportOptions
from gossamer.models import (
    LEIGNN,
    DataFacts,
    Geodite,
    GeoditeConfig,
    LEIGNNConfig,
    NequIP,
    NequIPConfig,
    PaiNN,
    PaiNNConfig,
    SchNet,
    SchNetConfig,
    Weft,
    WeftConfig,
)
from gossamer.nn.layers import sum_by_index
from gossamer.potential import Potential, PotentialConfig
from gossamer.potential_file import current_names

TOLERANCE = 1e-10
VARIANTS = {
    "leignn": dict(update="nmu", global_context=True),
    "vanilla_nmu": dict(update="nmu", global_context=False),
    "vanilla": dict(update="painn", global_context=False),
}


def relative_deviation(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest absolute difference over the largest reference magnitude."""
    if ours.shape != theirs.shape:
        raise ValueError(f"Our output has shape {ours.shape}, the stored one {theirs.shape}.")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def leignn_weights(data: np.lib.npyio.NpzFile, variant: str) -> dict[str, torch.Tensor]:
    """Names of the specification -> names in our modules (the linear layers of an MLP sit at 0 and 2)."""
    weights = {}
    prefix = f"{variant}/weights/"
    for key in data.files:
        if not key.startswith(prefix):
            continue
        name = key[len(prefix) :].replace("/", ".")
        for mlp in ("P", "MLP_u", "MLP_E", "MLP_a", "MLP_b"):
            name = name.replace(f"{mlp}.1.", f"{mlp}.2.")
        for theirs, mine in (("MLP_a", "MLP"), ("W_a", "W"), ("MLP_b", "MLP"), ("W_b", "W")):
            name = name.replace(f".{theirs}.", f".{mine}.")
        name = name.replace("layer", "layers.", 1) if name.startswith("layer") else name
        name = name.removeprefix("head.").replace("global_scalar_init.weight", "global_scalar")
        weights[name] = torch.from_numpy(data[key])
    return weights


def compare_leignn(data: np.lib.npyio.NpzFile) -> dict[str, float]:
    """Largest relative deviation of every stored output of every variant in the file."""
    h, layers, basis, cutoff = (float(value) for value in data["settings_H_L_B_cutoff"])
    tensor = {k: torch.from_numpy(data[k]) for k in ("positions", "atomic_numbers", "graph_index", "cell", "edge_shifts")}
    edge_index = torch.from_numpy(data["edge_sender_receiver"])
    sender, receiver = edge_index
    n_graphs = len(tensor["cell"])
    deviations = {}
    for variant, options in VARIANTS.items():
        if f"{variant}/energy" not in data.files:
            continue
        config = LEIGNNConfig(
            variant="published", num_features=int(h), num_layers=int(layers), num_basis=int(basis), cutoff=cutoff,
            direct_forces=True, **options,
        )  # fmt: skip
        weights = leignn_weights(data, variant)
        model = LEIGNN(config, DataFacts(atomic_numbers=tuple(range(len(weights["embedding.weight"]))))).double()
        model.load_state_dict(current_names(LEIGNN, weights))
        outputs: dict[str, torch.Tensor] = {}

        def keep(layer: int, outputs: dict[str, torch.Tensor] = outputs):
            def hook(_module, _inputs, after) -> None:
                outputs[f"layer{layer}/x_after_update"], outputs[f"layer{layer}/v_after_update"] = after

            return hook

        for index, layer in enumerate(model.layers):
            layer.update.register_forward_hook(keep(index))
        positions = tensor["positions"].clone().requires_grad_()
        cells = tensor["cell"][tensor["graph_index"][receiver]]
        shifts = torch.einsum("ex,exy->ey", tensor["edge_shifts"].double(), cells)
        result = model(
            tensor["atomic_numbers"], edge_index, positions[sender] + shifts - positions[receiver],
            tensor["graph_index"], n_graphs,
        )  # fmt: skip
        outputs["energy"] = sum_by_index(result.node_energies, tensor["graph_index"], n_graphs)
        outputs["direct_forces"] = result.direct_forces
        outputs["minus_energy_gradient"] = -torch.autograd.grad(outputs["energy"].sum(), positions)[0]
        for name, value in outputs.items():
            deviations[f"{variant}/{name}"] = relative_deviation(value.detach().numpy(), data[f"{variant}/{name}"])
    return deviations


# --- Geodite ------------------------------------------------------------------------------------------------------

GEODITE_NAMES = {
    "node_start/w_rho": "node_start.density.w_rho.weight", "edge_start/W_erp": "W_erp.weight", "w_rho": "density.w_rho.weight",
    "W_vk_l1": "W_vk.0.weight", "W_vk_l2": "W_vk.1.weight", "gamma_0": "gamma.0", "gamma_1": "gamma.1", "gamma_2": "gamma.2",
    "LN_omega/weight": "LN_omega.weight", "LN_omega/bias": "LN_omega.bias",
}  # fmt: skip


def geodite_weights(data: np.lib.npyio.NpzFile) -> dict[str, torch.Tensor]:
    """Names of the specification -> names in our modules."""
    weights = {}
    for key in data.files:
        if not key.startswith("weights/"):
            continue
        group, name = key.removeprefix("weights/").split("/", 1)
        value = torch.from_numpy(data[key])
        if group == "readout":
            weights[f"readouts.{int(name.removeprefix('w_')) - 1}.weight"] = value[None]
        elif group == "radial":
            weights[f"radial.{name}"] = value
        else:
            prefix = f"layers.{int(group.removeprefix('layer')) - 1}." if group.startswith("layer") else f"{group}."
            full = GEODITE_NAMES.get(f"{group}/{name}") or prefix + GEODITE_NAMES.get(name, f"{name}.weight")
            weights[full] = value
    return weights


def compare_geodite(data: np.lib.npyio.NpzFile) -> dict[str, float]:
    """Network, vacuum states and repulsion, separately."""
    channels, heads, layers, basis, cutoff = (float(value) for value in data["settings_C_H_K_B_cutoff"])
    config = GeoditeConfig(
        variant="published", num_features=int(channels), num_heads=int(heads), num_layers=int(layers), num_basis=int(basis), cutoff=cutoff
    )  # fmt: skip
    weights = geodite_weights(data)
    model = Geodite(config, DataFacts(atomic_numbers=tuple(range(len(weights["node_start.A_na.weight"]))))).double().eval()
    start = {k: v for k, v in model.state_dict().items() if k.startswith("repulsion.")}  # the published start values are ours
    for name, value in {"a_0": 0.4546, "beta": 0.0842, "c": 0.1663, "d": 0.0354}.items():
        start[f"repulsion.{name}"] = torch.full_like(start[f"repulsion.{name}"], value)
    model.load_state_dict(weights | start)
    repulsion, model.repulsion = model.repulsion, None
    edge_index, graph_index = torch.from_numpy(data["edge_sender_receiver"]), torch.from_numpy(data["graph_index"])
    numbers, cell = torch.from_numpy(data["atomic_numbers"]), torch.from_numpy(data["cell"])
    sender, receiver = edge_index
    positions = torch.from_numpy(data["positions"]).clone().requires_grad_()
    shifts = torch.einsum("ex,exy->ey", torch.from_numpy(data["edge_shifts"]).double(), cell[graph_index[receiver]])
    vectors = positions[sender] + shifts - positions[receiver]
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    vacuum = torch.from_numpy(data["vacuum_elements"]).long()
    none, no_vectors = torch.zeros((2, 0), dtype=torch.long), torch.zeros((0, 3), dtype=torch.float64)
    states, _ = model.embed(numbers, edge_index, vectors, lengths)
    table, _ = model.embed(torch.arange(len(model.node_start.A_na.weight)), none, no_vectors, no_vectors[:, 0])
    # the stored states have the vacuum states subtracted already, so the stored vacuum states are zero to rounding
    outputs = {f"layer{k + 1}/h": h - lone[numbers] for k, (h, lone) in enumerate(zip(states, table, strict=True))}
    lone, _ = model.embed(vacuum, none, no_vectors, no_vectors[:, 0])
    vacuum_deviation = {
        f"layer{k + 1}/h_vacuum": float((h.detach() - t[vacuum].detach() - torch.from_numpy(data[f"layer{k + 1}/h_vacuum"])).abs().max())
        for k, (h, t) in enumerate(zip(lone, table, strict=True))
    }
    energies = model(numbers, edge_index, vectors, graph_index, len(cell)).node_energies
    everyone = torch.arange(len(table[0]))
    isolated = model(everyone, none, no_vectors, everyone, len(everyone)).node_energies
    outputs["eps"] = energies - isolated[numbers]
    outputs["energy_network"] = sum_by_index(outputs["eps"], graph_index, len(cell))
    outputs["repulsion_published_start"] = repulsion(numbers, edge_index, lengths)
    outputs["energy_repulsion"] = sum_by_index(outputs["repulsion_published_start"], graph_index, len(cell))
    for name in ("network", "repulsion"):
        total = outputs[f"energy_{name}"].sum()
        outputs[f"forces_{name}"] = -torch.autograd.grad(total, positions, retain_graph=True)[0]
    return vacuum_deviation | {name: relative_deviation(value.detach().numpy(), data[name]) for name, value in outputs.items()}


# --- NequIP -------------------------------------------------------------------------------------------------------

NEQUIP_OPTIONS = {
    "l_max": "l_max", "num_features": "num_features", "num_layers": "num_layers", "parity": "parity", "cutoff": "cutoff",
    "type_embed_num_features": "embedding_features", "radial_mlp_depth": "radial_depth", "radial_mlp_width": "radial_width",
    "bessel_trainable": "train_bessel", "polynomial_cutoff_p": "envelope_power", "per_edge_type_cutoff": "pair_cutoffs",
    "num_bessels": "num_basis", "readout_mlp_hidden_layers_depth": "readout_depth", "readout_mlp_hidden_layers_width": "readout_width",
}  # fmt: skip


def nequip_weights(data: np.lib.npyio.NpzFile, variant: str, model: NequIP) -> dict[str, torch.Tensor]:
    """The package's weights -> ours: its flat vectors hold one matrix (in, out) per degree, one after another."""
    prefix = f"{variant}/weights/"
    stored = {k.removeprefix(prefix): torch.from_numpy(data[k]) for k in data.files if k.startswith(prefix)}
    weights = {"embedding.weight": stored.pop("type_embed.embed_module.weight")}
    if "bessel_encode.bessel_weights" in stored:
        weights["frequencies"] = stored.pop("bessel_encode.bessel_weights")[0]
    for k, layer in enumerate(model.layers):
        for theirs, ours in (("linear_1", "linear_in"), ("linear_2", "linear_out"), ("sc", "self_connection")):
            flat = stored.pop(f"layer{k}_convnet.conv.{theirs}.weight", None)
            first = 0
            parts = list(enumerate(getattr(layer, ours)))
            if ours == "linear_out":  # theirs are sorted by degree, odd parity first
                parts.sort(key=lambda p: layer.irreps_out[p[0]].kind)
            for n, part in parts:
                size = part.weight.numel()
                piece = flat[first : first + size]
                shape = part.weight.shape
                weights[f"layers.{k}.{ours}.{n}.weight"] = piece.reshape(shape) if theirs == "sc" else piece.reshape(shape[1], shape[0]).T
                first += size
            assert flat is None or first == len(flat), (k, theirs)
    for key in list(stored):  # radial and readout networks: (in, out), activations in between
        value = stored.pop(key)
        number = int(key.split(".mlp.")[1].split(".")[0])
        group = "readout" if key.startswith("per_atom") else f"layers.{key.removeprefix('layer').split('_')[0]}.radial"
        weights[f"{group}.{number}.weight"] = value.T
    return weights


def graph_of(data: np.lib.npyio.NpzFile) -> Graph:
    """The stored batch."""
    return Graph(
        atomic_numbers=torch.from_numpy(data["atomic_numbers"]).long(),
        positions=torch.from_numpy(data["positions"]),
        cell=torch.from_numpy(data["cell"]),
        graph_index=torch.from_numpy(data["graph_index"]),
        edge_index=torch.from_numpy(data["edge_sender_receiver"]),
        edge_shifts=torch.from_numpy(data["edge_shifts"]),
    )


def compare_nequip(data: np.lib.npyio.NpzFile) -> dict[str, float]:
    """Energy, forces and stress of every variant, through the whole potential (scales, shifts, ZBL)."""
    deviations = {}
    elements = data["elements"].tolist()
    graph = graph_of(data)
    for variant in data["nequip_variants"].tolist():
        settings = json.loads(str(data[f"{variant}/settings"]))
        config = NequIPConfig(
            variant="published", scales="per_element", **{ours: settings[k] for k, ours in NEQUIP_OPTIONS.items() if k in settings}
        )
        statistics = Statistics(
            elements=elements,
            reference_energies=settings["shifts"],
            element_scales=settings["scales"],
            mean_neighbors=settings["mean_neighbors"],
        )
        surroundings = PotentialConfig(zbl=settings["zbl"], zbl_radius="cutoff", zbl_power=6, zbl_order=2)
        potential = Potential(config, statistics, surroundings).eval()
        potential.network.double()
        weights = nequip_weights(data, variant, potential.network)
        weights["scales.weight"] = torch.tensor([[settings["scales"][e]] for e in elements], dtype=torch.float64)
        potential.network.load_state_dict(current_names(NequIP, weights))
        out = potential(graph, stress=True)
        for name in ("energy", "forces", "stress"):
            ours, theirs = getattr(out, name).detach().numpy(), data[f"{variant}/{name}"]
            periodic = data["pbc"].all(axis=1)
            if name == "stress":  # without a cell there is none
                ours, theirs = ours[periodic], theirs[periodic]
            deviations[f"{variant}/{name}"] = relative_deviation(ours, theirs)
        table = potential.network.embedding.weight
        for layer in potential.network.layers[1:]:
            for connection in layer.self_connection:
                x = torch.randn(len(graph.atomic_numbers), 3, connection.weight.shape[0], dtype=torch.float64)
                species = potential.species_of[graph.atomic_numbers]
                folded = FixedMaps(connection.maps(table))(x, species, table).detach().numpy()
                plain = connection(x, species, table).detach().numpy()
                key = f"{variant}/folded self-connection"
                deviations[key] = max(deviations.get(key, 0.0), relative_deviation(folded, plain))
    return deviations


# --- MACE ---------------------------------------------------------------------------------------------------------


def compare_mace(data: np.lib.npyio.NpzFile) -> dict[str, float]:
    """Energy, forces and stress of every variant and head, mapped as files of mace-torch are."""
    deviations = {}
    graph = graph_of(data)
    for variant in data["mace_variants"].tolist():
        prefix = f"{variant}/weights/"
        tensors = {k.removeprefix(prefix): torch.from_numpy(data[k]) for k in data.files if k.startswith(prefix)}
        kinds = json.loads(str(data[f"{variant}/kinds"]))
        for head in kinds["heads"]:
            potential = mace.assemble(tensors, kinds, ImportOptions(head=head), variant)
            out = potential(graph, stress=True)
            for name in ("energy", "forces", "stress"):
                ours, theirs = getattr(out, name).detach().numpy(), data[f"{variant}/{head}/{name}"]
                if name == "stress":
                    ours, theirs = ours[1:], theirs[1:]  # the molecule has none
                deviations[f"{variant}/{head}/{name}"] = relative_deviation(ours, theirs)
    return deviations


# --- PaiNN and SchNet ---------------------------------------------------------------------------------------------

SCHNETPACK_NAMES = (
    ("filter_network", "filters"), ("readout.outnet", "readout"), ("head.", "force_blocks."), ("interatomic_context_net", "context"), ("mixing.", "layers."),
    ("interactions.", "layers."), ("intraatomic_context_net", "update_net"), ("mu_channel_mix", "mix"), ("mix_vectors", "mix"),
    ("scalar_net", "net"), ("in2f", "to_filters"), ("f2out", "out"),
)  # fmt: skip


def schnetpack_weights(data: np.lib.npyio.NpzFile, variant: str, num_layers: int) -> dict[str, torch.Tensor]:
    """schnetpack's names -> ours: activations count in our networks; the filters of all layers are one matrix there."""
    weights = {}
    prefix = f"{variant}/weights/"
    for key in [k for k in data.files if k.startswith(prefix)]:
        name, value = key.removeprefix(prefix).removeprefix("network."), torch.from_numpy(data[key])
        if "filter_net." in name:
            for k, part in enumerate(value.chunk(num_layers)):
                weights[f"layers.{k}.filters.{name.split('.')[-1]}"] = part
            continue
        for theirs, ours in SCHNETPACK_NAMES:
            name = name.replace(theirs, ours)
        *rest, last, kind = name.split(".")
        weights[".".join([*rest, "2" if last == "1" else last, kind])] = value
    return weights


def compare_schnetpack(data: np.lib.npyio.NpzFile) -> dict[str, float]:
    """Energy and forces of PaiNN and SchNet, and the direct forces of PaiNN's gated blocks."""
    features, layers, basis, cutoff = data["settings_F_L_B_cutoff"].tolist()
    sizes = dict(variant="published", num_features=int(features), num_layers=int(layers), num_basis=int(basis), cutoff=cutoff)
    facts = DataFacts(atomic_numbers=tuple(range(100)))
    models = {
        "painn": PaiNN(PaiNNConfig(**sizes), facts),
        "painn_direct": PaiNN(PaiNNConfig(direct_forces=True, **sizes), facts),
        "schnet": SchNet(SchNetConfig(**sizes), facts),
    }
    index, numbers = torch.from_numpy(data["graph_index"]), torch.from_numpy(data["atomic_numbers"])
    edge_index = torch.from_numpy(data["edge_sender_receiver"])
    sender, receiver = edge_index
    shifts = torch.einsum("ex,exy->ey", torch.from_numpy(data["edge_shifts"]), torch.from_numpy(data["cell"])[index[receiver]])
    deviations = {}
    for variant, model in models.items():
        model.double().load_state_dict(current_names(type(model), schnetpack_weights(data, variant, int(layers))))
        positions = torch.from_numpy(data["positions"]).clone().requires_grad_()
        out = model(numbers, edge_index, positions[sender] + shifts - positions[receiver], index, 2)
        outputs = {"energy": sum_by_index(out.node_energies, index, 2)}
        outputs["forces"] = -torch.autograd.grad(outputs["energy"].sum(), positions, retain_graph=True)[0]
        if out.direct_forces is not None:
            outputs["direct_forces"] = out.direct_forces
        for name, value in outputs.items():
            deviations[f"{variant}/{name}"] = relative_deviation(value.detach().numpy(), data[f"{variant}/{name}"])
    return deviations


# --- Weft ---------------------------------------------------------------------------------------------------------


def compare_weft(data: np.lib.npyio.NpzFile) -> dict[str, float]:
    """Energy, forces and stress of our own network against its equations written out path by path."""
    config, elements = WeftConfig(**{**Weft.earlier, **json.loads(str(data["settings"]))}), [chemical_symbols[z] for z in data["elements"]]
    statistics = Statistics(
        elements=elements, reference_energies=dict.fromkeys(elements, 0.0), mean_neighbors=float(data["mean_neighbors"])
    )
    potential = Potential(config, statistics, PotentialConfig(zbl=False)).double().eval()
    potential.network.load_state_dict(
        {k.removeprefix("weights/"): torch.from_numpy(data[k]) for k in data.files if k.startswith("weights/")}
    )
    structure = Structure(atomic_numbers=data["numbers"], positions=data["positions"], cell=data["cell"], pbc=np.ones(3, bool))
    out = potential(potential.collate([structure]), stress=True)
    found = {"energy": out.energy[0], "forces": out.forces, "stress": out.stress[0]}
    return {f"weft/{name}": relative_deviation(value.detach().numpy(), data[name]) for name, value in found.items()}


def compare(path: Path) -> dict[str, float]:
    """Deviations of every output stored in a reference file of a known layout."""
    data = np.load(path, allow_pickle=False)
    if "settings_H_L_B_cutoff" in data.files:
        return compare_leignn(data)
    if "settings_C_H_K_B_cutoff" in data.files:
        return compare_geodite(data)
    if "nequip_variants" in data.files:
        return compare_nequip(data)
    if "mace_variants" in data.files:
        return compare_mace(data)
    if "settings_F_L_B_cutoff" in data.files:
        return compare_schnetpack(data)
    if "mean_neighbors" in data.files:
        return compare_weft(data)
    raise ValueError(
        f"'{path}' has a layout this script does not know (none of LEIGNN's, Geodite's, NequIP's, MACE's, schnetpack's, Weft's)."
    )


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    deviations = compare(Path(sys.argv[1]))
    for name, value in deviations.items():
        print(f"{name:45s} {value:9.2e}  {'ok' if value <= TOLERANCE else 'DEVIATES'}")
    # an empty comparison is not an agreement; NaN fails too
    return 0 if deviations and all(value <= TOLERANCE for value in deviations.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
