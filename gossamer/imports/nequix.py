"""Nequix' potentials (`.nqx`): a line of JSON with the settings, then the tensors one after another as `.npy`, in the order of the module's fields.

Its network is SevenNet's with a norm before the gate, elements as unit vectors and fixed frequencies. e3nn-jax scales activations by a
constant that differs from e3nn's in the third digit (gate: computed, not sampled); it goes into the weights behind them. The radial
networks of nequix have no such constants and no 1 / sqrt(inputs): these, too, go into the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from gossamer.imports.contract import ImportOptions, Known, Weights, chosen_elements, foreign_statistics, keep_elements
from gossamer.imports.inert import Tree
from gossamer.models.sevennet import BlockLinear, Interaction, SevenNet, SevenNetConfig, parse_irreps
from gossamer.nn.coupling import paths_between
from gossamer.nn.layers import UNIT_SILU
from gossamer.potential import Potential, PotentialConfig
from gossamer.settings import build

PACKAGE = "nequix"
GAIN = 1.676564715
"""1 / sqrt(<SiLU(z)²>) for normal z, as e3nn-jax computes it"""
TRAINING = (
    "*_path", "*_weight", "avg_n_edges", "avg_n_nodes", "batch_size", "cache_dir", "checkpoint_grad_energy", "displacement", "ema_decay", "extra_*",
    "finetune_from", "grad_clip_norm", "kernel", "learning_rate", "log_every", "loss_type", "max_n_edges", "max_n_nodes", "mlp_init_scale",
    "n_epochs", "n_graph", "optimizer", "resume_from", "val_every", "valid_frac", "warmup_epochs", "warmup_factor", "weight_decay",
    "atom_energies", "wandb*", "seed", "num_workers",
)  # fmt: skip
"""settings of data and training, and those whose values are tensors of the file"""


def recognises(tree: Tree) -> bool:
    """No archive, and a first line of JSON with nequix' settings."""
    if tree.form != "bytes" or not tree.head.startswith(b"{"):
        return False
    first = tree.head.split(b"\n", 1)[0]
    return b'"hidden_irreps"' in first and b'"radial_polynomial_p"' in first


def potential(tree: Tree, options: ImportOptions) -> Potential:
    """The potential of a file.

    Raises:
        ValueError: settings or tensors that are not known, an element that the file lacks, or a damaged file.
    """
    where = f"'{tree.path}'"
    with open(tree.path, "rb") as file:
        try:
            config = json.loads(file.readline(1 << 24))
            arrays = []
            while file.peek(1):
                arrays.append(np.load(file, allow_pickle=False))
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{where} is damaged: {str(error)[:200]}. Copy it again.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{where} begins with no settings.")
    return from_arrays(config, arrays, options, where)


def from_arrays(config: Mapping[str, Any], arrays: list[np.ndarray], options: ImportOptions, where: str) -> Potential:
    """The same from its two parts."""
    known = Known(config, where)
    numbers = sorted(int(z) for z in known.take("atomic_numbers"))
    settings = network_settings(known, len(numbers))
    shift, scale = float(known.take("shift")), float(known.take("scale"))
    known.drop(*TRAINING)
    known.done()
    elements = [chemical_symbols[z] for z in numbers]
    keep = chosen_elements(elements, options, where)
    names = tensor_names(settings)
    if len(names) != len(arrays):
        raise ValueError(f"{where} holds {len(arrays)} tensors, but its settings make {len(names)}: another version of nequix?")
    weights = Weights({name: torch.from_numpy(a).double() for name, a in zip(names, arrays, strict=True)}, where)
    energies = weights.take("atom_energies", (len(numbers),)).tolist()
    statistics = foreign_statistics(elements, {e: energies[k] + shift for k, e in enumerate(elements)}, energy_scale=scale)
    network_config: Any = build(SevenNetConfig, settings, "model")
    found = Potential(network_config, statistics, PotentialConfig(zbl=False)).eval()
    found.network.double()
    _fill(found.network, weights)
    weights.done()
    found.network.to(torch.from_numpy(arrays[-1]).dtype)
    return keep_elements(found, keep)


def network_settings(known: Known, n_elements: int) -> dict[str, Any]:
    """Our settings from nequix'."""
    n_layers, power = known.take("n_layers"), float(known.take("radial_polynomial_p"))
    if power != int(power):
        raise ValueError(f"{known.where}: radial_polynomial_p is {power}; this gossamer knows whole numbers only.")
    hidden = parse_irreps(str(known.take("hidden_irreps")))
    scalars = [i for i in hidden if i.kind == (0, 1)]
    if any(i.p != (-1) ** i.l for i in hidden):
        raise ValueError(f"{known.where}: hidden_irreps are {known.found['hidden_irreps']}; this gossamer knows natural parity only.")
    layers = [
        f"{n_elements}x0e",
        *["+".join(f"{i.mul}x{i.l}{'e' if i.p == 1 else 'o'}" for i in hidden)] * (n_layers - 1),
        f"{scalars[0].mul}x0e",
    ]
    return {
        "variant": "published", "cutoff": float(known.take("cutoff")), "l_max": known.take("lmax"), "irreps": layers, "train_embedding": False,
        "num_basis": known.take("radial_basis_size"), "envelope_power": int(power), "layer_norm": bool(known.take("layer_norm")),
        "radial_widths": [known.take("radial_mlp_size")] * known.take("radial_mlp_layers"),
        "denominators": [math.sqrt(known.take("avg_n_neighbors"))] * n_layers,
        "self_connection": "element" if known.take("index_weights") else "linear",
    }  # fmt: skip


def tensor_names(settings: Mapping[str, Any]) -> list[str]:
    """Names for the tensors of a file, in their order."""
    layers = [parse_irreps(text) for text in settings["irreps"]]
    names = ["atom_energies"]
    for k, (before, after) in enumerate(zip(layers, layers[1:], strict=False)):
        summed = sorted({p.out for p in paths_between(before, settings["l_max"], [i.kind for i in after])})
        both = [i.l for i in before if i.kind in {j.kind for j in after}]
        names += [f"{k}.radial.{j}" for j in range(len(settings["radial_widths"]) + 1)]
        names += [f"{k}.linear_in.{i.l}" for i in before] + [f"{k}.linear_out.{l}" for l, _ in summed] + [f"{k}.skip.{l}" for l in both]
        names += [f"{k}.norm.{i.l}" for i in after] if settings["layer_norm"] else []
    return [*names, "readout"]


@torch.no_grad()
def _fill(network: SevenNet, weights: Weights) -> None:
    """Copy the tensors; features behind a gate are larger here by UNIT_SILU / GAIN."""
    gain = 1.0
    for k, layer in enumerate(network.layers):
        _copy_radial(layer, weights, k, network.config)
        _copy(layer.linear_in, [i.l for i in layer.irreps_in], weights, f"{k}.linear_in", gain)
        _copy(layer.linear_out, [i.l for i in layer.irreps_summed], weights, f"{k}.linear_out", 1.0)
        _copy(layer.self_connection, [i.l for i in layer.irreps_in], weights, f"{k}.skip", gain)
        if layer.norm is not None:
            for irrep, gamma in zip(layer.irreps_out, layer.norm.gamma, strict=True):
                gamma.copy_(weights.take(f"{k}.norm.{irrep.l}", gamma.shape))
        gain = GAIN / UNIT_SILU
    network.readout[0].weight.copy_(weights.take("readout", network.readout[0].weight.T.shape).T * gain)


def _copy(target: BlockLinear, degrees: list[int], weights: Weights, name: str, gain: float) -> None:
    """Copy an e3nn-jax Linear, or one for each element; both are divided by sqrt(inputs) when used, as ours."""
    sources = [source for source in target.sources if source is not None]
    for module, source in zip(target.maps, sources, strict=True):
        found: Tensor = weights.take(f"{name}.{degrees[source]}") * gain
        if target.per_element:
            module.table.weight.copy_(found.reshape(module.table.weight.shape))
        else:
            module.weight.copy_(found.T)


def _copy_radial(layer: Interaction, weights: Weights, k: int, config: SevenNetConfig) -> None:
    """Copy a radial network; the columns of its last layer are ordered by the results of the paths."""
    radial: Any = layer.convolution.radial
    linears = radial[::2]
    paths = paths_between(layer.irreps_in, config.l_max, [i.kind for i in layer.irreps_out])
    theirs = sorted(paths, key=lambda path: path.out)
    for j, linear in enumerate(linears):
        found = weights.take(f"{k}.radial.{j}", linear.weight.T.shape)
        if j == len(linears) - 1:
            parts = dict(zip(theirs, found.split([layer.irreps_in[p.block].mul for p in theirs], 1), strict=True))
            found = torch.cat([parts[path] for path in paths], 1)
        linear.weight.copy_(found.T / linear.scale)
