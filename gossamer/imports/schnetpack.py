"""schnetpack: SchNet and PaiNN of schnetpack 2, saved as a whole model (`best_inference_model`, torch.save).

The modules say all of the network, but neither the unit of energies nor which elements were trained: these must be given. Both become our
published variants, which equal schnetpack's (tests/reference).
"""

from __future__ import annotations

from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor

from gossamer.data.units import ENERGY_UNITS
from gossamer.imports.contract import ImportOptions, Known, Weights, choose, foreign_statistics, given, text_or_none
from gossamer.imports.inert import Tree, module_state, modules_of, tensors_of
from gossamer.imports.pickle_machine import Inert
from gossamer.models import PaiNNConfig, SchNetConfig
from gossamer.potential import Potential, PotentialConfig

PACKAGE = "schnetpack"
NETWORKS = {"SchNet": ("schnet", SchNetConfig), "PaiNN": ("painn", PaiNNConfig)}
CLASSES = {
    "NeuralNetworkPotential", "ModuleList", "Sequential", "Identity", "Embedding", "Dense", "Linear", "SchNet", "PaiNN", "SchNetInteraction",
    "PaiNNInteraction", "PaiNNMixing", "GaussianRBF", "CosineCutoff", "Atomwise", "Forces", "PairwiseDistances", "Strain", "CastTo64", "CastTo32",
    "AddOffsets", "SiLU",
}  # fmt: skip
NAMES = {
    "painn": (("interatomic_context_net", "context"), ("intraatomic_context_net", "update_net"), ("mu_channel_mix", "mix")),
    "schnet": (("filter_network", "convolution.radial"), ("in2f", "to_filters"), ("f2out", "out")),
}
"""parts of a layer there and here"""


def recognises(tree: Tree) -> bool:
    root = tree.root if tree.form == "torch" and "data.pkl" in tree.members and b"schnetpack" in tree.read("data.pkl") else None
    return isinstance(root, Inert) and root.name.startswith("schnetpack.")


def potential(tree: Tree, options: ImportOptions) -> Potential:
    """The potential of a saved model.

    Raises:
        ValueError: another network, parts or tensors that are not known, or no unit of energies or elements given.
    """
    where = f"'{tree.path}'"
    choose("modal", options.modal, [], where)
    choose("head", options.head, [], where)
    modules = modules_of(tree.root)
    strange = sorted({m.name for m in modules.values() if m.name.rpartition(".")[2] not in CLASSES})
    if strange:
        raise ValueError(f"{where} has parts that this gossamer does not know: {', '.join(strange[:10])}. It was refused.")
    kind = modules["representation."].name.rpartition(".")[2]
    if kind not in NETWORKS:
        raise ValueError(f"{where} has the representation {kind}; SchNet and PaiNN are known.")
    name, settings = NETWORKS[kind]
    weights = Weights({k: v for k, v in tensors_of(tree.root).items() if v.numel()}, where)
    _check(modules, name, where)
    scale = given(options, where, "energy_unit", ENERGY_UNITS, "the unit of energies (lengths are taken as Å)")
    table = weights.take("representation.embedding.weight")
    references = _references(modules, weights, len(table))
    elements = _elements(options, references, where)
    rows = [chemical_symbols.index(e) for e in elements]
    cutoff = float(weights.take("representation.cutoff_fn.cutoff").double().flatten()[0])
    layers = len(module_state(modules["representation.interactions."])["_modules"])
    basis = int(module_state(modules["representation.radial_basis."])["n_rbf"])
    config: Any = settings(variant="published", num_features=table.shape[1], num_layers=layers, num_basis=basis, cutoff=cutoff)
    weights.constant("representation.radial_basis.offsets", torch.linspace(0, cutoff, basis))
    weights.constant("representation.radial_basis.widths", torch.full((basis,), cutoff / (basis - 1)))
    statistics = foreign_statistics(
        elements, {e: float(references[z]) * scale for e, z in zip(elements, rows, strict=True)}, energy_scale=scale
    )  # fmt: skip
    made = Potential(config, statistics, PotentialConfig(zbl=False)).eval()
    made.network.to(table.dtype)
    made.network.load_state_dict({"embedding.weight": table[rows], **_weights(weights, name, layers)})
    weights.done()
    made.imported = {"version": text_or_none(module_state(tree.root).get("spk_version")), "given": options.given}
    return made


def _check(modules: dict[str, Inert], name: str, where: str) -> None:
    """Refuse what our networks do not have: other activations, sums and offsets."""
    outputs = [p for p in modules if p.startswith("output_modules.") and p.count(".") == 2]
    readouts = [module_state(modules[p]) for p in outputs if modules[p].name.endswith(".Atomwise")]
    forces = [module_state(modules[p]) for p in outputs if modules[p].name.endswith(".Forces")]
    activations = {
        _function(module_state(m).get("activation"))
        for p, m in modules.items()
        if p.startswith("representation.") and m.name.endswith(".Dense")
    }
    found = Known(
        {
            "energies": len(readouts),
            "aggregation": readouts[0]["aggregation_mode"] if readouts else None,
            "outputs per atom": readouts[0]["n_out"] if readouts else 0,
            "activations": sorted(activations - {"Identity"}),
            "extra embeddings": bool(module_state(modules.get("representation.electronic_embeddings.")).get("_modules")),
            "forces": all(f.get("calc_forces", True) for f in forces),
            "epsilon": {module_state(m).get("epsilon") for m in modules.values() if m.name.endswith(".PaiNNMixing")} <= {1e-8},
            "postprocessing": bool(module_state(modules[""]).get("do_postprocessing", True)) or not _offsets(modules),
        },
        where,
    )
    found.expect("energies", 1)
    found.expect("aggregation", "sum")
    found.expect("outputs per atom", 1)
    found.expect("activations", ["silu"] if name == "painn" else ["shifted_softplus"])
    found.expect("extra embeddings", False)
    found.expect("forces", True)
    found.expect("epsilon", True)
    found.expect("postprocessing", True)
    found.done()


def _function(value: Any) -> str:
    return value.name.rpartition(".")[2] if isinstance(value, Inert) else "Identity"


def _offsets(modules: dict[str, Inert]) -> list[str]:
    return [p for p, m in modules.items() if m.name.endswith(".AddOffsets")]


def _references(modules: dict[str, Inert], weights: Weights, n: int) -> Tensor:
    """What is added for an atom of each atomic number, in the file's unit."""
    total = torch.zeros(n, dtype=torch.float64)
    for prefix in _offsets(modules):
        state = Known(
            {k: v for k, v in module_state(modules[prefix]).items() if k in ("add_mean", "add_atomrefs", "is_extensive")}, weights.where
        )
        mean, references = weights.take(f"{prefix}mean").double().flatten(), weights.take(f"{prefix}atomref").double().flatten()
        state.expect("is_extensive", True)
        if state.take("add_mean"):
            total += mean[0]
        if state.take("add_atomrefs"):
            total[: len(references)] += references[:n]
    return total


def _elements(options: ImportOptions, references: Tensor, where: str) -> list[str]:
    """The elements asked for, or those with energies of their own."""
    known = [chemical_symbols[z] for z in range(1, len(references))]
    if options.elements is not None:
        missing = [e for e in options.elements if e not in known]
        if missing:
            raise ValueError(f"{where} has no row for {', '.join(missing)} (--elements).")
        return list(options.elements)
    common = references[references != 0].unique()
    if len(common) < 2:
        raise ValueError(f"{where} does not say which elements it was trained on: name them with --elements, for example --elements C,H,O.")
    most = float(references[1:].mode().values)  # rows without an energy of their own
    return [e for e, value in zip(known, references[1:].tolist(), strict=True) if value != most]


def _weights(weights: Weights, name: str, layers: int) -> dict[str, Tensor]:
    """schnetpack's weights by our names: activations count in our networks, so that a second linear map is number 2."""
    found: dict[str, Tensor] = {}
    parts = {"interactions": [n for n, _ in NAMES[name]][:1] if name == "painn" else [n for n, _ in NAMES[name]],
             "mixing": [n for n, _ in NAMES[name]][1:] if name == "painn" else []}  # fmt: skip
    ours = dict(NAMES[name])
    for k in range(layers):
        for group, members in parts.items():
            for member in members:
                prefix = f"representation.{group}.{k}.{member}."
                for key in [x for x in weights.left if x.startswith(prefix)]:
                    found[f"layers.{k}.{ours[member]}.{_second(key.removeprefix(prefix))}"] = weights.take(key)
    if name == "painn":
        for kind in ("weight", "bias"):
            rows = weights.take(f"representation.filter_net.{kind}")
            if len(rows) % layers:
                raise ValueError(f"{weights.where}: filters of {len(rows)} rows for {layers} layers; shared ones are not known.")
            for k, part in enumerate(rows.chunk(layers)):
                found[f"layers.{k}.convolution.radial.{kind}"] = part
    (readout,) = {k.split(".outnet.")[0] for k in weights.left if ".outnet." in k}
    for key in [x for x in weights.left if x.startswith(f"{readout}.outnet.")]:
        found[f"readout.{_second(key.removeprefix(f'{readout}.outnet.'))}"] = weights.take(key)
    return found


def _second(name: str) -> str:
    return f"2.{name[2:]}" if name.startswith("1.") else name
