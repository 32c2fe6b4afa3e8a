"""SevenNet's checkpoints (`.pth`), sevenn 0.9 to 0.13: one dictionary of settings and tensors.

What the package computes from such a file: its `model_build.py` and, for files before 0.11, `scripts/backward_compatibility.py` (names
with blanks; radial functions in the order of the paths instead of that of their results; 3j symbols of another sign, which lie in the
file). The weights of an e3nn Linear lie block after block, a modal's after those of all degrees.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ase.data import chemical_symbols
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
    texts,
    whole_numbers,
)
from gossamer.imports.inert import Tree
from gossamer.models.sevennet import BlockLinear, Interaction, SevenNet, SevenNetConfig
from gossamer.nn.coupling import Irrep, Path, paths_between, reachable
from gossamer.nn.layers import ElementMaps
from gossamer.nn.spherical import wigner_3j
from gossamer.potential import Potential, PotentialConfig
from gossamer.settings import build

PACKAGE = "sevenn"
RENAMED = {
    "denumerator": "denominator", "EdgeEmbedding": "edge_embedding", "reducing nn input to hidden": "reduce_input_to_hidden",
    "reducing nn hidden to energy": "reduce_hidden_to_energy", "rescale atomic energy": "rescale_atomic_energy", " ": "_",
}  # fmt: skip
"""names before 0.10"""
TRAINING = (
    "*_cp", "_chemical_species_by_atomic_number", "_is_trace_stress", "_num_workers", "_number_of_modalities", "_number_of_species",
    "avg_num_neigh", "batch_size", "best_metric", "chemical_species", "compute_statistics", "continue", "csv_log", "data_*",
    "dataset_type", "ddp_backend", "default_modal", "device", "dtype", "epoch", "error_record", "ewc_lambda", "fisher_information",
    "force_loss_weight", "format_outputs_for_ase", "is_ddp", "is_train_stress", "load_*", "local_rank", "loss", "loss_param", "mem_*", "modal_list",
    "num_workers", "optim_param", "optimizer", "per_epoch", "preprocess_num_cores", "random_seed", "rank", "rehearsal", "save_*", "scale",
    "scheduler", "scheduler_param", "shift", "stress_loss_weight", "train_avg_num_neigh", "train_denominator", "train_shift_scale",
    "train_shuffle", "use_modal_wise_scale", "use_modal_wise_shift", "use_species_wise_shift_scale", "use_testset", "use_weight", "world_size",
    "cuequivariance_config", "use_flash_tp", "use_oeq", "conv_denominator",
)  # fmt: skip
"""settings of data, training and kernels, and those whose values are tensors of the file: they change nothing here"""
USES_MODAL = ("node_embedding", "self_inter_intro", "self_inter_outro", "output_block")


def recognises(tree: Tree) -> bool:
    """A torch file of a dictionary with sevenn's settings."""
    with contextlib.suppress(ValueError):
        root = tree.root
        return isinstance(root, dict) and "model_state_dict" in root and "_type_map" in (root.get("config") or {})
    return False


def potential(tree: Tree, options: ImportOptions) -> Potential:
    """The potential of a checkpoint.

    Raises:
        ValueError: settings or tensors that are not known, or a modal or an element that the file lacks.
    """
    return from_dictionary(tree.root["config"], tree.root["model_state_dict"], options, f"'{tree.path}'")


def from_dictionary(config: Mapping[str, Any], state: Mapping[str, Tensor], options: ImportOptions, where: str) -> Potential:
    """The same from the two dictionaries in it."""
    known = Known(config, where)
    weights = Weights({renamed(name): value.double() for name, value in state.items() if value.numel()}, where)
    weights.drop("*.output_mask", "*gate.*_w3j_*", "*_self_connection_intro.*_w3j_*", "*_self_interaction_*._w3j_*")
    (version,) = texts([known.take("version")], where, "versions")
    modals = dict(known.take("_modal_map", {})) if known.take("use_modality", False) else {}
    modal = choose("modal", options.modal, list(modals), where)
    uses = {name for name in USES_MODAL if known.take(f"use_modal_{name}", False) and modals}
    settings = network_settings(known, weights, bool(uses))
    types = known.take("_type_map")
    known.drop(*TRAINING, "_modal_map")
    known.done()
    elements = [chemical_symbols[int(z)] for z in sorted(types, key=lambda z: types[z])]
    keep = chosen_elements(elements, options, where)
    row = None if modal is None else int(modals[modal])

    def of_element(name: str) -> list[float]:
        values = weights.take(f"rescale_atomic_energy.{name}")
        values = values[row] if values.dim() == 2 and row is not None else values
        return [float(v) for v in values.expand(len(elements))]

    shifts, scales = of_element("shift"), of_element("scale")
    same = len(set(scales)) == 1
    statistics = foreign_statistics(
        elements, dict(zip(elements, shifts, strict=True)), energy_scale=scales[0] if same else 1.0,
        scales=None if same else dict(zip(elements, scales, strict=True)),
    )  # fmt: skip
    network_config: Any = build(SevenNetConfig, {**settings, "scales": "global" if same else "per_element"}, "model")
    found = Potential(network_config, statistics, PotentialConfig(zbl=False)).eval()
    found.network.double()
    _fill(found.network, weights, tuple(int(v) for v in version.split(".")[:2]) >= (0, 11), len(modals), row, uses)
    weights.done()
    found.network.to(next(iter(state.values())).dtype if state else torch.float32)
    found.imported = {"version": version}
    return keep_elements(found, keep)


def renamed(name: str) -> str:
    """A tensor's name as it is called since 0.10."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def network_settings(known: Known, weights: Weights, biased: bool) -> dict[str, Any]:
    """Our settings from sevenn's. ``biased``: a modal gives constants."""
    known.expect("_model_type", "E3_equivariant_model", default="E3_equivariant_model")
    known.expect("interaction_type", "nequip", default="nequip")
    known.expect("optimize_by_reduce", True, default=True)
    known.expect("act_radial", "silu")
    for gate in ("act_scalar", "act_gate"):
        known.expect(gate, {"e": "silu", "o": "tanh"})
    old = tuple(int(v) for v in known.found["version"].split(".")[:2]) < (0, 10)
    l_max, l_node = known.take("lmax"), known.take("lmax_node", -1)
    known.expect("lmax_edge", -1, l_max, default=-1)
    parity = -1 if known.take("is_parity") else 1
    cutoff, n_layers, channel = float(known.take("cutoff")), known.take("num_convolution_layer"), known.take("channel")
    irreps = known.take("irreps_manual", False) or automatic(channel, l_max, l_node if l_node > 0 else l_max, n_layers, parity)
    connection = known.take("self_connection_type")
    connections = set(texts([connection] if isinstance(connection, str) else connection, known.where, "kinds of self_connection_type"))
    if len(connections) != 1 or not connections <= {"linear", "nequip"}:
        raise ValueError(
            f"{known.where}: self_connection_type is {short(connection)}; this gossamer knows linear and nequip, the same in every layer."
        )
    radial, envelope = (Known(known.take(name), f"{known.where}: {name}") for name in ("radial_basis", "cutoff_function"))
    radial.expect("radial_basis_name", "bessel")
    radial.drop("trainable_coeff")
    kind = envelope.expect("cutoff_function_name", "poly_cut", "XPLOR")
    on = float(envelope.take("cutoff_on")) if kind == "XPLOR" else None
    power = envelope.take("poly_cut_p_value", 6)
    hidden = known.take("readout_fcn_hidden_neurons", None)
    if known.take("readout_as_fcn", False):
        known.expect("readout_fcn_activation", "silu")
    else:
        known.drop("readout_fcn_activation")
        hidden = []
    settings = {
        "variant": "published", "train_bessel": True, "cutoff": cutoff, "cutoff_on": on, "envelope_power": 6 if on else int(power), "l_max": l_max,
        "parity": "none" if parity == 1 else "both", "irreps": texts(irreps, known.where, "irreps_manual"),
        "num_basis": int(radial.take("bessel_basis_num", 8)), "radial_widths": whole_numbers(known.take("weight_nn_hidden_neurons"), known.where, "weight_nn_hidden_neurons"),
        "unit_harmonics": bool(known.take("_normalize_sph", not old)),
        "denominators": [abs(float(weights.take(f"{k}_convolution.denominator"))) for k in range(n_layers)],
        "self_connection": "linear" if "linear" in connections else "element", "bias": bool(known.take("use_bias_in_linear", False)) or biased,
        "readout_widths": whole_numbers(hidden or [], known.where, "readout_fcn_hidden_neurons"),
    }  # fmt: skip
    radial.done()
    envelope.done()
    return settings


def automatic(channel: int, l_max: int, l_node: int, n_layers: int, parity: int) -> list[str]:
    """Features of every layer where the file does not list them: all that can be reached, each with the same channels."""
    layers = [[Irrep(channel, 0, 1)]]
    kinds = [Irrep(channel, l, p) for l in range(l_node + 1) for p in ((-1, 1) if parity == -1 else (1,))]
    for _ in range(n_layers - 1):
        layers.append([i for i in kinds if reachable(layers[-1], l_max, i, parity)])
    layers.append([Irrep(channel, 0, 1)])
    return ["+".join(f"{i.mul}x{i.l}{'e' if i.p == 1 else 'o'}" for i in layer) for layer in layers]


# --- tensors -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _fill(network: SevenNet, weights: Weights, sorted_paths: bool, n_modals: int, modal: int | None, uses: set[str]) -> None:
    """Copy the tensors of the file into the network."""
    config = network.config
    network.frequencies.copy_(weights.take("edge_embedding.basis_function.coeffs") * config.cutoff / math.pi)
    n_elements = len(network.embedding.weight)
    with_modal = {name: n_modals if name in uses else 0 for name in USES_MODAL}
    one_hot, width = [Irrep(n_elements, 0, 1)], network.embedding.weight.shape[1]
    maps, constant = _linear(weights, "onehot_to_feature_x.linear", one_hot, [Irrep(width, 0, 1)], with_modal["node_embedding"], modal)
    network.embedding.weight.copy_(maps[0, 1] + constant)
    for k, layer in enumerate(network.layers):
        _copy(layer.linear_in, layer.irreps_in, weights, f"{k}_self_interaction_1.linear", with_modal["self_inter_intro"], modal)
        _copy(layer.linear_out, layer.irreps_summed, weights, f"{k}_self_interaction_2.linear", with_modal["self_inter_outro"], modal)
        if layer.self_connection.per_element:
            _copy_per_element(
                layer.self_connection, layer.irreps_in, weights, f"{k}_self_connection_intro.fc_tensor_product.weight", n_elements
            )
        else:
            _copy(layer.self_connection, layer.irreps_in, weights, f"{k}_self_connection_intro.linear", 0, None)
        _copy_radial(layer, weights, f"{k}_convolution", config, k == len(network.layers) - 1, sorted_paths)
    scalars = [Irrep(network.readout[0].in_features, 0, 1)]
    if config.readout_widths:
        for j, linear in enumerate(network.readout[::2]):
            linear.weight.copy_(weights.take(f"readout_FCN.fcn.layer{j}.weight").T)
        return
    hidden = [Irrep(scalars[0].mul // 2, 0, 1)]
    first, constant = _linear(weights, "reduce_input_to_hidden.linear", scalars, hidden, with_modal["output_block"], modal)
    second, last = _linear(weights, "reduce_hidden_to_energy.linear", hidden, [Irrep(1, 0, 1)], 0, None)
    network.readout[0].weight.copy_((first[0, 1] @ second[0, 1]).T / network.readout[0].scale)
    if network.readout_bias is not None:
        network.readout_bias.copy_(constant @ second[0, 1] + last)


def _linear(
    weights: Weights, name: str, irreps_in: Sequence[Irrep], irreps_out: Sequence[Irrep], n_modals: int, modal: int | None
) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
    """Matrix (in, out) of each kind, and what is added to even scalars: the weights of an e3nn Linear with its factors 1 / sqrt(inputs)."""
    flat = weights.take(f"{name}.weight").flatten()
    out = {i.kind: i.mul for i in irreps_out}
    sizes = [(i.kind, i.mul, out[i.kind]) for i in irreps_in if i.kind in out]
    expected = sum(n * m for _, n, m in sizes) + n_modals * out[0, 1]
    if len(flat) != expected:
        raise ValueError(f"{weights.where}: '{name}.weight' has {len(flat)} numbers, expected {expected}.")
    maps, first, constant = {}, 0, torch.zeros(out[0, 1], dtype=flat.dtype)
    for kind, n, m in sizes:
        fan_in = n + (n_modals if kind == (0, 1) else 0)
        maps[kind] = flat[first : first + n * m].reshape(n, m) / math.sqrt(fan_in)
        first += n * m
    if n_modals and modal is not None:
        inputs = sum(i.mul for i in irreps_in if i.kind == (0, 1)) + n_modals
        constant = flat[first:].reshape(n_modals, -1)[modal] / math.sqrt(inputs)
    if f"{name}.bias" in weights:
        constant = constant + weights.take(f"{name}.bias", constant.shape)
    return maps, constant


def _copy(target: BlockLinear, irreps_in: Sequence[Irrep], weights: Weights, name: str, n_modals: int, modal: int | None) -> None:
    """Copy an e3nn Linear."""
    used = [source for source in target.sources if source is not None]
    outputs = [Irrep(m.out_features, *irreps_in[source].kind) for m, source in zip(target.maps, used, strict=True)]
    maps, constant = _linear(weights, name, irreps_in, outputs, n_modals, modal)
    for linear, source in zip(target.maps, used, strict=True):
        linear.weight.copy_(maps[irreps_in[source].kind].T / linear.scale)
    if target.bias is not None:
        target.bias.copy_(constant)


def _copy_per_element(target: BlockLinear, irreps_in: Sequence[Irrep], weights: Weights, name: str, n_elements: int) -> None:
    """Copy an e3nn FullyConnectedTensorProduct with one-hot elements: weights (inputs, elements, outputs) of each kind."""
    flat, first = weights.take(name).flatten(), 0
    used = [source for source in target.sources if source is not None]
    order = sorted(range(len(used)), key=lambda k: used[k])
    for maps in (target.maps[k] for k in order):
        assert isinstance(maps, ElementMaps)
        n, m = maps.shape
        part = flat[first : first + n * n_elements * m].reshape(n, n_elements, m) / math.sqrt(n_elements)
        maps.table.weight.copy_(part.transpose(0, 1).reshape(n_elements, -1))
        first += n * n_elements * m
    if first != len(flat):
        raise ValueError(f"{weights.where}: '{name}' has {len(flat)} numbers, expected {first}.")


def _copy_radial(layer: Interaction, weights: Weights, name: str, config: SevenNetConfig, last: bool, sorted_paths: bool) -> None:
    """Copy a radial network; of its last layer the columns of the paths that are read, with the sign of the file's own 3j symbols."""
    parity = config.harmonics_parity
    radial: Any = layer.convolution.radial
    linears = radial[::2]
    for j, linear in enumerate(linears[:-1]):
        linear.weight.copy_(weights.take(f"{name}.weight_nn.layer{j}.weight", linear.weight.T.shape).T)
    highest = max(i.l for i in layer.irreps_out)
    kinds = [(l, p) for l in range(highest + 1) for p in (-1, 1) if not (last and p == -1)]
    kinds = [kind for kind in kinds if reachable(layer.irreps_in, config.l_max, Irrep(1, *kind), parity)]
    theirs = paths_between(layer.irreps_in, config.l_max, kinds, parity)
    if sorted_paths:
        theirs = sorted(theirs, key=lambda path: path.out)
    widths = [layer.irreps_in[path.block].mul for path in theirs]
    columns = weights.take(f"{name}.weight_nn.layer{len(linears) - 1}.weight", (linears[-1].in_features, sum(widths)))
    parts = dict(zip(theirs, columns.split(widths, 1), strict=True))
    wanted = paths_between(layer.irreps_in, config.l_max, [i.kind for i in layer.irreps_out], parity)
    linears[-1].weight.copy_(torch.cat([parts[path] * _sign(weights, name, layer, path) for path in wanted], 1).T)
    weights.drop(f"{name}.convolution.*_w3j_*")


def _sign(weights: Weights, name: str, layer: Interaction, path: Path) -> float:
    """Of the file's 3j symbols relative to ours.

    Raises:
        ValueError: they differ in more than the sign.
    """
    degrees = layer.irreps_in[path.block].l, path.l_edge, path.out[0]
    name = f"{name}.convolution._compiled_main_left_right._w3j_{'_'.join(map(str, degrees))}"
    if name not in weights:
        return 1.0
    ours, found = torch.from_numpy(wigner_3j(*degrees)), weights.take(name)
    sign = 1.0 if float((ours * found).sum()) > 0 else -1.0
    weights.constant(name, sign * ours.numpy())
    return sign
