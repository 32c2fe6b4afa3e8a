"""NequIP: packages (`.nequip.zip`, by nequip-package) and checkpoints (`.ckpt`, by nequip-train) of nequip 0.7 and later.

A package holds the model as pickled modules, which say all of it; a checkpoint holds the settings that the model was built from, and of
a training with averaged weights both the raw and the averaged ones: the averaged are the potential. Of schedule-free training it holds the
weights at which gradients are taken, and what the potential's are computed from. Both files become our published NequIP, which equals the
package (tests/reference). Flat vectors of weights hold one matrix (inputs, outputs) per degree, one after another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ase.data import atomic_numbers
from torch import Tensor

from gossamer.imports.contract import (
    ImportOptions,
    Known,
    Weights,
    choose,
    chosen_elements,
    foreign_statistics,
    keep_elements,
    short,
    tensors_by_name,
    text_or_none,
    texts,
    whole_numbers,
)
from gossamer.imports.inert import Tree, module_state, modules_of, tensors_of
from gossamer.imports.pickle_machine import Inert
from gossamer.models import NequIP, NequIPConfig
from gossamer.nn.zbl import COULOMB
from gossamer.potential import Potential, PotentialConfig

PACKAGE = "nequip"
MODEL, FUNCTION = "sole_model.", "sole_model.model.func."
PRESETS = {
    name: {"parity": False, "type_embed_num_features": 32, "radial_mlp_depth": 1, "radial_mlp_width": 128, **sizes}
    for name, sizes in {
        "S": {"num_layers": 2, "l_max": 1, "num_features": [128, 64]},
        "M": {"num_layers": 4, "l_max": 2, "num_features": [128, 64, 32]},
        "L": {"num_layers": 6, "l_max": 3, "num_features": [128, 64, 32, 32]},
        "XL": {"num_layers": 6, "l_max": 4, "num_features": [320, 96, 64, 32, 32]},
    }.items()
}
ACCELERATORS = ("enable_OpenEquivariance", "enable_CuEquivariance")
"""changes of a model that compute the same faster"""
CLASSES = {
    "ModuleDict", "ModuleList", "Sequential", "GraphModel", "ForceStressOutput", "SequentialGraphNetwork", "NodeTypeEmbed", "Embedding",
    "SphericalHarmonicEdgeAttrs", "SphericalHarmonics", "EdgeLengthNormalizer", "BesselEdgeLengthEncoding", "PolynomialCutoff", "ApplyFactor",
    "ConvNetLayer", "Gate", "_Sortcut", "Extract", "Activation", "normalize2mom", "ElementwiseTensorProduct", "InteractionBlock",
    "AvgNumNeighborsNorm", "Linear", "TensorProductScatter", "TensorProduct", "ScalarMLPFunction", "ScalarLinearLayer", "SiLU", "ScalarMLP",
    "FullyConnectedTensorProduct", "NoOpGhostExchangeModule", "PerTypeScaleShift", "AtomwiseReduce", "ZBL", "_ZBL", "reduce_package_graph_module",
    "RecursiveScriptModule",
}  # fmt: skip
"""of the modules inside a package; another one would be another potential"""
ACTIVATIONS = ("silu of even scalars", "tanh of odd scalars", "silu of even gates")


@dataclass
class _Found:
    """What a file says, before it becomes a network."""

    names: list[str]
    settings: dict[str, Any]
    """of `NequIPConfig`"""
    tensors: dict[str, Tensor]
    """by names below FUNCTION"""
    neighbors: list[float]
    """mean numbers of neighbours: one, or one for each name"""
    zbl_power: int | None
    """of the envelope; None: no repulsion"""
    dtype: torch.dtype
    version: str | None


def recognises(tree: Tree) -> bool:
    if tree.form == "package":
        return "model/package_metadata.txt" in tree.members or "model/eager_model.pkl" in tree.members
    if tree.form != "torch" or "data.pkl" not in tree.members or b"nequip" not in tree.read("data.pkl"):
        return False
    root = tree.root
    return isinstance(root, dict) and "state_dict" in root and "hyper_parameters" in root


def potential(tree: Tree, options: ImportOptions) -> Potential:
    """The potential of a package or a checkpoint.

    Raises:
        ValueError: a model that is not NequIP's, or with a part, a setting or a tensor that is not known.
    """
    where = f"'{tree.path}'"
    choose("modal", options.modal, [], where)
    choose("head", options.head, [], where)
    found = _package(tree, where) if tree.form == "package" else _checkpoint(tree, where)
    kept = chosen_elements(found.names, options, where)
    return keep_elements(_build(found, where), kept)


# --- packages -----------------------------------------------------------------------------------------------------


def _package(tree: Tree, where: str) -> _Found:
    """What the modules of a package say."""
    import yaml

    root = tree.pickle("model/eager_model.pkl")
    modules = modules_of(root)
    models = list(module_state(root).get("_modules", {}))
    if models != ["sole_model"] or FUNCTION not in modules:
        raise ValueError(f"{where} holds {', '.join(map(str, models[:5])) or root!r}; one model (sole_model) with forces is known.")
    strange = sorted({m.name for m in modules.values() if m.name.rpartition(".")[2] not in CLASSES})
    if strange:
        raise ValueError(f"{where} has parts that this gossamer does not know: {', '.join(strange[:10])}. It was refused.")
    metadata = yaml.safe_load(tree.text("model/package_metadata.txt")) if "model/package_metadata.txt" in tree.members else {}
    of = {prefix.removeprefix(FUNCTION): dict(module_state(m)) for prefix, m in modules.items() if prefix.startswith(FUNCTION)}
    tensors = {k.removeprefix(FUNCTION): v for k, v in tensors_of(root).items() if v.numel() and k.startswith(FUNCTION)}
    settings = _module_settings(of, tensors, where)
    norms = {tuple(v.double().flatten().tolist()) for k, v in tensors.items() if k.endswith("avg_num_neighbors_norm.norm_const")}
    if len(norms) != 1:
        raise ValueError(f"{where} divides the messages of its layers by different numbers of neighbours; the same for all are known.")
    zbl = of.get("pair_potential.cutoff.", {}).get("p")
    dtype = module_state(modules[MODEL]).get("model_dtype")
    return _Found(
        names=texts(module_state(modules[MODEL])["type_names"], where, "type_names"),
        settings=settings,
        tensors=tensors,
        neighbors=[1 / c**2 for c in norms.pop()],
        zbl_power=_power(zbl, where) if "pair_potential." in of else None,
        dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32,
        version=text_or_none((metadata.get("versions") or {}).get("nequip")),
    )


def _module_settings(of: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """Settings of our network from the attributes of the modules."""
    layers = [of[f"layer{k}_convnet."] for k in range(len(of)) if f"layer{k}_convnet." in of]
    hidden = [irreps(layer["feature_irreps_hidden"]) for layer in layers]
    harmonics = irreps(of["spharm."]["irreps_edge_sh"])
    l_max = len(harmonics) - 1
    facts = Known(
        {
            "categorical fields": of["type_embed."].get("do_categorical_graph_field_embed", False),
            "harmonics": harmonics == [(1, l, (-1) ** l) for l in range(l_max + 1)],
            "normalization": of["spharm.sh."]["normalization"],
            "factor": math.isclose(of["factor."]["factor"], 2 * math.pi / of["edge_norm."]["r_max"] ** 2, rel_tol=1e-9),
            "equal layers": len({tuple(h) for h in hidden[:-1]}) <= 1 and {(l, p) for _, l, p in hidden[-1]} == {(0, 1)},
            "residual": any(layer["resnet"] for layer in layers),
            "self-connections": [of[f"layer{k}_convnet.conv."].get("use_sc") for k in range(len(layers))],
            "bias": any(state["bias"] for state in of.values() if "bias" in state and "dims" in state),
        },
        where,
    )
    facts.expect("categorical fields", False)
    facts.expect("harmonics", True)
    facts.expect("normalization", "component")
    facts.expect("factor", True)
    facts.expect("equal layers", True)
    facts.expect("residual", False)
    facts.expect("self-connections", [False] + [True] * (len(layers) - 1))
    facts.expect("bias", False)
    facts.done()
    strange = sorted({a for k in range(len(layers)) for a in _activations(of, f"layer{k}_convnet.equivariant_nonlin.")} - {*ACTIVATIONS})
    if strange:
        raise ValueError(f"{where} has {', '.join(strange)}; this gossamer knows {', '.join(ACTIVATIONS)} only. It was refused.")
    dims = [of[f"layer{k}_convnet.conv.edge_mlp."]["dims"] for k in range(len(layers))]
    radial = {tuple(whole_numbers(d, where, "sizes of a radial network")[:-1]) for d in dims}
    if len(radial) != 1:
        raise ValueError(f"{where} has radial networks of several sizes ({radial}); one for all layers is known.")
    sizes = radial.pop()
    readout = whole_numbers(of["per_atom_energy_readout.mlp_module."]["dims"], where, "sizes of the readout")
    scale = of["per_type_energy_scale_shift."]
    return {
        **_features(hidden, l_max, where),
        "cutoff": float(of["edge_norm."]["r_max"]),
        "l_max": l_max,
        "num_layers": len(layers),
        "num_basis": int(of["bessel_encode."]["num_bessels"]),
        "train_bessel": bool(of["bessel_encode."]["trainable"]),
        "envelope_power": _power(of["bessel_encode.cutoff."]["p"], where),
        "embedding_features": tensors["type_embed.embed_module.weight"].shape[1],
        "radial_depth": len(sizes) - 1,
        **_width("radial_width", sizes[1:], where),
        "readout_depth": len(readout) - 2,
        **_width("readout_width", readout[1:-1], where),
        "train_scales": bool(scale["scales_trainable"]),
    }


def irreps(value: Any) -> list[tuple[int, int, int]]:
    """(channels, degree, parity) of e3nn's Irreps, which are tuples of (channels, (degree, parity))."""
    if not isinstance(value, Inert) or not value.name.endswith("Irreps"):
        raise ValueError(f"irreps that are {short(value)}")
    found = []
    for entry in value.args[0]:
        mul, irrep = entry.args[0] if len(entry.args) == 1 else entry.args
        l, p = irrep.args[0] if len(irrep.args) == 1 else irrep.args
        found.append((int(mul), int(l), int(p)))
    return found


def _features(hidden: Sequence[Sequence[tuple[int, int, int]]], l_max: int, where: str) -> dict[str, Any]:
    """num_features and parity: each degree has one number of channels, in its natural parity or in both."""
    channels = {l: mul for mul, l, _ in reversed(hidden[0])}
    numbers = [channels.get(l, channels[0]) for l in range(l_max + 1)]
    numbers[0] = hidden[-1][0][0]
    parity = any(p != (-1) ** l for _, l, p in hidden[0])
    if len(hidden) > 1:
        parities = (1, -1) if parity else (0,)
        expected = [(numbers[l], l, p or (-1) ** l) for l in range(l_max + 1) for p in parities]
        if list(hidden[0]) != expected:
            raise ValueError(f"{where} has features {list(hidden[0])}; known are those of one number of channels for each degree.")
    return {"num_features": numbers, "parity": parity}


def _width(name: str, sizes: Sequence[int], where: str) -> dict[str, Any]:
    if len(set(sizes)) > 1:
        raise ValueError(f"{where} has hidden layers of {sizes} channels; equal ones are known ({name}).")
    return {name: int(sizes[0])} if sizes else {}


def _activations(of: Mapping[str, Mapping[str, Any]], gate: str) -> Iterator[str]:
    """What is done to the even and odd scalars of a gate and to its gates, as in `ACTIVATIONS`."""
    for kind in ("scalars", "gates"):
        state = of[f"{gate}act_{kind}."]
        functions = list(module_state(state["_modules"]["acts"])["_modules"].values())
        for (_, _, parity), function in itertools.zip_longest(irreps(state["irreps_in"]), functions):
            yield f"{_activation(module_state(function))} of {'even' if parity == 1 else 'odd'} {kind}"


def _activation(state: Mapping[str, Any]) -> str:
    """The name of a function; torch.tanh is pickled as an attribute of a class."""
    function = state.get("f")
    if not isinstance(function, Inert):
        return short(function)
    of_class = function.name.endswith(".getattr") and len(function.args) == 2
    return short(function.args[1]) if of_class else function.name.rpartition(".")[2]


def _power(value: Any, where: str) -> int:
    if not isinstance(value, int | float) or value != int(value) or value < 2:
        raise ValueError(f"{where} has an envelope of power {short(value)}; whole numbers from 2 are known.")
    return int(value)


# --- checkpoints --------------------------------------------------------------------------------------------------


def _checkpoint(tree: Tree, where: str) -> _Found:
    """What the settings in a checkpoint say, and the averaged weights where there are any."""
    hyper = tree.root["hyper_parameters"]
    info = hyper.get("info_dict") or {}
    version = text_or_none((info.get("versions") or {}).get("nequip"))
    model = dict(hyper["model"])
    while short(model.get("_target_", "")).endswith(".modify"):
        modifiers = [short(m.get("modifier")) for m in model.get("modifiers", [])]
        if any(m not in ACCELERATORS for m in modifiers):
            raise ValueError(
                f"{where} was built with modifiers {modifiers}; known are {', '.join(ACCELERATORS)}. Package it with nequip-package build."
            )
        model = dict(model["model"])
    target = short(model.pop("_target_", "")).rpartition(".")[2]
    if target == "PresetNequIPGNNModel":
        preset = short(model.pop("preset")).upper()
        if preset not in PRESETS:
            raise ValueError(f"{where} has preset {preset}; known are {', '.join(PRESETS)}.")
        model = {**PRESETS[preset], **model}
    elif target != "NequIPGNNModel":
        raise ValueError(
            f"{where} was built by {target or 'nothing'}; of checkpoints only NequIPGNNModel's are known. Package it with nequip-package "
            "build, which stores the model itself, and import that."
        )
    known = Known(model, where)
    names = texts(known.take("type_names"), where, "type_names")
    cutoff = float(known.take("r_max"))
    settings = _checkpoint_settings(known)
    pair = known.take("pair_potential", None)
    neighbors = known.take("avg_num_neighbors", None)
    if isinstance(neighbors, Mapping):
        each = Known(neighbors, where)
        neighbors = [float(each.take(name)) for name in names]
        each.done()
    else:
        neighbors = [1.0 if neighbors is None else float(neighbors)]
    dtype = {"float32": torch.float32, "float64": torch.float64}[known.expect("model_dtype", "float32", "float64")]
    known.drop("seed", "compile_mode", "per_type_energy_scales", "per_type_energy_shifts", "per_type_energy_shifts_trainable")
    known.drop("per_edge_type_cutoff")  # each is a tensor of the state dictionary too
    known.done()
    tensors = _averaged(tree.root, settings, where)
    return _Found(
        names=names,
        settings={**settings, "cutoff": cutoff, "embedding_features": tensors["type_embed.embed_module.weight"].shape[1]},
        tensors=tensors,
        neighbors=neighbors,
        zbl_power=None if pair is None else _zbl(Known(dict(pair), where), where),
        dtype=dtype,
        version=version,
    )


def _checkpoint_settings(known: Known) -> dict[str, Any]:
    """Settings of our network from those of the package, with its defaults (nequip 0.7 to 0.19)."""
    features, l_max = known.take("num_features", 32), int(known.take("l_max", 1))
    width = known.take("readout_mlp_hidden_layers_width", None)
    depth = int(known.take("readout_mlp_hidden_layers_depth", 0))
    known.expect("readout_mlp_nonlinearity", "silu", *([None] if depth == 0 else []), default="silu")
    for name, value in (("convnet_sc", True), ("learnable_shift", False), ("convnet_resnet", False), ("convnet_nonlinearity_type", "gate"),
                        ("categorical_graph_field_embed", None), ("do_derivatives", True)):  # fmt: skip
        known.expect(name, value, default=value)
    for name in ("convnet_nonlinearity_scalars", "convnet_nonlinearity_gates"):
        known.expect(name, {"e": "silu", "o": "tanh"}, default={"e": "silu", "o": "tanh"})
    known.drop("type_embed_num_features")
    return {
        "num_layers": int(known.take("num_layers", 4)),
        "l_max": l_max,
        "parity": bool(known.take("parity", True)),
        "num_features": whole_numbers(features, known.where, "num_features") if isinstance(features, list | tuple) else int(features),
        "radial_depth": int(known.take("radial_mlp_depth", 1)),
        "radial_width": int(known.take("radial_mlp_width", 128)),
        "num_basis": int(known.take("num_bessels", 8)),
        "train_bessel": bool(known.take("bessel_trainable", False)),
        "envelope_power": _power(known.take("polynomial_cutoff_p", 6), known.where),
        "readout_depth": depth,
        **({} if width is None else {"readout_width": int(width)}),
        "train_scales": bool(known.take("per_type_energy_scales_trainable", False)),
    }


def _zbl(known: Known, where: str) -> int:
    known.expect("_target_", "nequip.nn.pair_potential.ZBL", "nequip.nn.ZBL")
    known.expect("units", "metal")
    known.drop("chemical_species")  # a tensor too
    power = _power(known.take("polynomial_cutoff_p", 6), where)
    known.done()
    return power


def _averaged(root: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Tensors of the model by their names below FUNCTION; with the averaged weights in the place of the raw ones."""
    state: Mapping[str, Any] = root["state_dict"]
    others = sorted({k.split(".")[1] for k in state if k.startswith("model.")} - {"sole_model"})
    if others:
        raise ValueError(f"{where} holds the models {', '.join(others)} beside or instead of sole_model; one is known.")
    found = tensors_by_name({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}, where)
    model = {k: v for k, v in found.items() if v.numel()}
    averages = {k: v for k, v in state.items() if k.startswith("ema.")}
    if averages:
        extra = averages.pop("ema._extra_state", None)
        if not isinstance(extra, dict) or extra.get("is_holding_ema_weights") is not True:
            raise ValueError(f"{where} does not say that its averaged weights are such: it was saved in the middle of something.")
        values = [averages[f"ema.ema_weight_{k}"] for k in range(len(averages))]
        model.update(zip(_parameters(model, values, settings, where), values, strict=True))
    model.update(_schedule_free(root, model, settings, where))
    return {k.removeprefix(FUNCTION): v for k, v in model.items()}


def _parameters(model: Mapping[str, Tensor], values: Sequence[Tensor], settings: Mapping[str, Any], where: str) -> list[str]:
    """Names of the parameters that these values belong to: they have numbers instead of names, in the order of the parameters."""
    # frequencies, scales and shifts are parameters only where they were trained
    kinds = [
        "weight",
        *(["bessel_weights"] if settings["train_bessel"] else []),
        *(["scales"] if settings["train_scales"] else []),
        "shifts",
    ]
    trained = [k for k in model if k.endswith(tuple(kinds))]
    if len(trained) == len(values) + 1:
        trained = [k for k in trained if not k.endswith("shifts")]
    if [tuple(model[k].shape) for k in trained] != [tuple(v.shape) for v in values]:
        raise ValueError(f"{where} has {len(values)} averaged weights that do not fit its {len(trained)} parameters. Package it instead.")
    return trained


def _schedule_free(root: Mapping[str, Any], model: Mapping[str, Tensor], settings: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The potential's weights of a schedule-free training that was saved between validations: Defazio et al. 2024 (arXiv:2405.15682).

    Gradients are taken at y = (1 - beta) z + beta x, which is what the file has as weights. The potential's are x.
    """
    optimizer = root.get("schedulefree_optimizer_state_dict")
    target = short((root["hyper_parameters"].get("optimizer") or {}).get("_target_"))
    if optimizer is None and not target.endswith("ScheduleFree"):
        return {}
    groups = (optimizer or {}).get("param_groups", [])
    if optimizer is None or len(groups) != 1 or type(groups[0]["train_mode"]) is not bool:
        raise ValueError(
            f"{where} is of schedule-free training ({target}), but not with one group of parameters and the state of its optimizer: its "
            "weights may not be those of the potential. Package it with nequip-package build, and import that."
        )
    (group,), state = groups, optimizer["state"]
    if not group["train_mode"] or not state:
        return {}
    beta = float(group["betas"][0] if "betas" in group else group["momentum"])
    z = [state[k]["z"] for k in group["params"]]
    return {k: model[k].lerp(v, 1 - 1 / beta) for k, v in zip(_parameters(model, z, settings, where), z, strict=True)}


# --- both ---------------------------------------------------------------------------------------------------------


def _build(found: _Found, where: str) -> Potential:
    """Our potential with these weights; every tensor is used, or has the value that it must have."""
    weights = Weights(found.tensors, where)
    weights.drop("*.output_mask", "*_w3j_*", "*.norm_const")
    names, cutoff = found.names, found.settings["cutoff"]
    if min(found.neighbors) < 1 or len(found.neighbors) not in (1, len(names)):
        raise ValueError(
            f"{where} has avg_num_neighbors {found.neighbors[:6]}; 1 or more is known, one number or one for each kind of atoms."
        )
    config: Any = NequIPConfig(
        variant="published", pair_cutoffs=_pair_cutoffs(weights, names, cutoff), scales="per_element",
        element_neighbors=dict(zip(names, found.neighbors, strict=True)) if len(found.neighbors) > 1 else None, **found.settings,
    )  # fmt: skip
    scales = _per_type(weights, "scales", names, 1.0)
    shifts = _per_type(weights, "shifts", names, 0.0)
    equal = len(set(scales)) == 1 and not config.train_scales
    surroundings = PotentialConfig(zbl=found.zbl_power is not None, zbl_radius="cutoff", zbl_power=found.zbl_power or 6, zbl_order=2)
    if found.zbl_power is not None:
        weights.constant("pair_potential.atomic_numbers", [atomic_numbers.get(n, 0) for n in names])
        weights.constant("pair_potential._qqr2exesquare", COULOMB / 2, 1e-9)
    statistics = foreign_statistics(
        names, dict(zip(names, shifts, strict=True)), found.neighbors[0],
        None if equal else dict(zip(names, scales, strict=True)), energy_scale=scales[0] if equal else 1.0,
    )  # fmt: skip
    made = Potential(config, statistics, surroundings).eval()
    made.network.to(found.dtype)
    network: Any = made.network
    network.load_state_dict(_weights(weights, network, scales, equal))
    weights.done()
    made.imported = {"version": found.version}
    return made


def _pair_cutoffs(weights: Weights, names: Sequence[str], cutoff: float) -> dict[str, Any] | None:
    """Cutoffs (centre, neighbour) from their reciprocals; those of the network itself are left out."""
    reciprocals = weights.take("edge_norm._rmax_recip").double().flatten()
    if reciprocals.numel() == 1:
        if not math.isclose(1 / float(reciprocals[0]), cutoff, rel_tol=1e-6):
            raise ValueError(f"{weights.where}: lengths are divided by {1 / float(reciprocals[0]):g} Å, but r_max is {cutoff:g} Å.")
        return None
    if reciprocals.numel() != len(names) ** 2:
        raise ValueError(f"{weights.where}: {reciprocals.numel()} cutoffs of pairs for {len(names)} kinds of atoms.")
    table: dict[str, Any] = {}
    for k, centre in enumerate(names):
        for n, neighbour in enumerate(names):
            value = round(1 / float(reciprocals[k * len(names) + n]), 10)
            if value < cutoff - 1e-9:
                table.setdefault(centre, {})[neighbour] = value
    return table or None


def _per_type(weights: Weights, kind: str, names: Sequence[str], default: float) -> list[float]:
    name = f"per_type_energy_scale_shift.{kind}"
    if name not in weights:
        return [default] * len(names)
    values = weights.take(name).double().flatten().tolist()
    if len(values) not in (1, len(names)):
        raise ValueError(f"{weights.where}: {len(values)} {kind} for {len(names)} kinds of atoms.")
    return values * len(names) if len(values) == 1 else values


def _weights(weights: Weights, network: NequIP, scales: Sequence[float], equal: bool) -> dict[str, Tensor]:
    """The package's weights by the names of ours."""
    found = {"embedding.weight": weights.take("type_embed.embed_module.weight")}
    frequencies = torch.arange(1.0, network.config.num_basis + 1)
    if network.config.train_bessel:
        found["frequencies"] = weights.take("bessel_encode.bessel_weights").flatten()
    else:
        weights.constant("bessel_encode.bessel_weights", frequencies)
    for k, layer in enumerate(network.layers):
        theirs = f"layer{k}_convnet.conv"
        # linear_2 is sorted by degree, odd parity first
        by_kind = sorted(range(len(layer.irreps_out)), key=lambda n: layer.irreps_out[n].kind)
        for name, ours, order in (
            ("linear_1", "linear_in", range(len(layer.linear_in))),
            ("linear_2", "linear_out", by_kind),
            ("sc", "self_connection", range(len(layer.self_connection))),
        ):
            parts = getattr(layer, ours)
            if not len(parts):
                continue
            flat = weights.take(f"{theirs}.{name}.weight", (sum(p.weight.numel() for p in parts),))
            pieces = flat.split([parts[n].weight.numel() for n in order])
            for n, piece in zip(order, pieces, strict=True):
                shape = parts[n].weight.shape
                found[f"layers.{k}.{ours}.{n}.weight"] = piece.reshape(shape) if name == "sc" else piece.reshape(shape[1], shape[0]).T
        found |= _mlp(weights, f"{theirs}.edge_mlp.mlp", layer.convolution.radial, f"layers.{k}.convolution.radial")
    found |= _mlp(weights, "per_atom_energy_readout.mlp_module.mlp", network.readout, "readout")
    if network.scales is not None:
        found["scales.weight"] = torch.tensor([1.0] * len(scales) if equal else scales, dtype=torch.float64)[:, None]
    return found


def _mlp(weights: Weights, theirs: str, network: Any, ours: str) -> dict[str, Tensor]:
    """A network of scalars: matrices (inputs, outputs), and in packages the factor each is multiplied by."""
    found = {}
    for number, layer in enumerate(network):
        if isinstance(layer, torch.nn.Linear):
            found[f"{ours}.{number}.weight"] = weights.take(f"{theirs}.{number}.weight", (layer.in_features, layer.out_features)).T
            if f"{theirs}.{number}.alpha" in weights:
                weights.constant(f"{theirs}.{number}.alpha", layer.scale)
    return found
