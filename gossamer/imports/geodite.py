"""Geodite: the authors' checkpoints (IBM/materials, models/pos_egnn/mlip, commit dc01519), such as Geodite-MP.ckpt.

A checkpoint of PyTorch Lightning: settings, weights, and for each fidelity (--modal) the energies of lone atoms and the scale, as a second file
of torch's inside a tensor of bytes. The weights are those of its state dictionary, as the authors' calculator takes them; of a training with
averaged weights these are in the file that ends in -EMA.ckpt.
"""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols, covalent_radii
from torch import Tensor

from gossamer.imports.contract import ImportOptions, Known, Weights, choose, chosen_elements, foreign_statistics, tensors_by_name
from gossamer.imports.inert import Tree, open_tree
from gossamer.models import GeoditeConfig
from gossamer.potential import Potential, PotentialConfig

PACKAGE = "geodite"
LAYER = {
    "gamma_s.0": "W_s1", "gamma_s.1": "W_s2", "gamma_v.0": "W_v1", "gamma_v.1": "W_v2", "gamma_t.dense_layers.0": "W_t1",
    "gamma_t.dense_layers.1": "W_t2", "gamma_w.0": "LN_omega", "W_edp": "W_ed", "density_fn": "density.w_rho",
}  # fmt: skip
NAMES = (
    (r"^encoder\.A_na\.", "node_start.A_na."),
    (r"^encoder\.node_init\.W_ndp\.dense_layers\.0\.", "node_start.W_ndp."),
    (r"^encoder\.node_init\.W_nrd_nru\.dense_layers\.0\.", "node_start.W_d."),
    (r"^encoder\.node_init\.W_nrd_nru\.dense_layers\.1\.", "node_start.W_u."),
    (r"^encoder\.node_init\.density_fn\.", "node_start.density.w_rho."),
    (r"^encoder\.node_init\.A_nbr\.", "node_start.A_nbr."),
    (r"^encoder\.edge_init\.W_erp\.", "W_erp."),
    (r"^encoder\.distance_weighting_fn\.([qp])$", r"radial.\g<1>0"),
    *((rf"^encoder\.interaction_list\.(\d+)\.{re.escape(theirs)}\.", rf"layers.\1.{ours}.") for theirs, ours in LAYER.items()),
    (r"^encoder\.interaction_list\.(\d+)\.tensor_layernorm\.affine_weights\.", r"layers.\1.gamma."),
    (r"^encoder\.interaction_list\.(\d+)\.(W_\w+)\.", r"layers.\1.\2."),
    (r"^encoder\.ec_list\.(\d+)\.gamma_m\.0\.", r"layers.\1.W_m1."),
    (r"^encoder\.ec_list\.(\d+)\.gamma_m\.1\.", r"layers.\1.W_m2."),
    (r"^encoder\.ec_list\.(\d+)\.W_vu\.", r"layers.\1.W_vu."),
    (r"^SnapshotDecoder\.readout\.linears\.", "readouts."),
    (r"^SnapshotDecoder\.repulsion_term\.a_factor$", "repulsion.a_0"),
    (r"^SnapshotDecoder\.repulsion_term\.Z_power$", "repulsion.beta"),
    (r"^SnapshotDecoder\.repulsion_term\.screen_coefs$", "repulsion.c"),
    (r"^SnapshotDecoder\.repulsion_term\.screen_exps$", "repulsion.d"),
)
"""weights there and here, the first that fits"""
TWICE = (
    (r"\.layers\.", ".dense_layers."),
    (r"\.gamma_w\.1\.", ".W_edp."),
)
"""modules that have two names there"""


def recognises(tree: Tree) -> bool:
    root = tree.root if tree.form == "torch" and "data.pkl" in tree.members and b"SnapshotDecoder" in tree.read("data.pkl") else None
    return isinstance(root, dict) and "state_dict" in root and "encoder.A_na.weight" in root["state_dict"]


def potential(tree: Tree, options: ImportOptions) -> Potential:
    """The potential of a checkpoint.

    Raises:
        ValueError: settings or tensors that are not known, or a fidelity that the file lacks.
    """
    where = f"'{tree.path}'"
    choose("head", options.head, [], where)
    hyper = tree.root["hyper_parameters"]
    encoder = hyper["encoder"]
    Known({"arch": encoder["arch"]}, where).expect("arch", "Geodite")
    config = _config(Known(dict(encoder["args"]), where))
    weights = Weights(tensors_by_name(tree.root["state_dict"], where), where)
    modal, constants = _constants(weights, options, where)
    energies = _values(constants["e0"]) + float(_values(constants["e_shift"]).ravel()[0])
    known = [chemical_symbols[z] for z in range(1, min(len(energies), 119)) if _values(constants["e0"])[z] != 0]
    elements = chosen_elements(known, options, where)
    rows = [chemical_symbols.index(e) for e in elements]
    statistics = foreign_statistics(
        elements, {e: float(energies[z]) for e, z in zip(elements, rows, strict=True)},
        energy_scale=float(_values(constants["e_scale"]).ravel()[0]),
    )  # fmt: skip
    made = Potential(config, statistics, PotentialConfig(zbl=False)).eval()
    dtype = weights.found["encoder.A_na.weight"].dtype
    made.network.to(dtype)
    made.network.load_state_dict(_weights(weights, config, rows))
    weights.done()
    made.imported = {"version": None, "modal": modal}
    return made


def _config(known: Known) -> Any:
    """Settings of our network; one that the authors' code has and ours has not is refused."""
    channels, cutoff = int(known.take("hidden_channels")), float(known.take("cutoff"))
    config = GeoditeConfig(
        variant="published",
        cutoff=cutoff,
        num_features=channels,
        num_layers=int(known.take("num_layers")),
        num_heads=int(known.take("num_heads")),
        l_max=int(known.take("lmax")),
        num_basis=int(known.take("n_rbf")),
    )
    if config.l_max > 2:
        raise ValueError(f"{known.where}: lmax is {config.l_max}; the released harmonics above 2 are not equivariant, and ours are others.")
    for name, *allowed in (("radial_basis", "besselbasis"), ("trainable_radial", False), ("activation", "silu"), ("epsilon", 1e-6),
                           ("edge_updates", "linw_mlpa_ln"), ("aggr", "add"), ("evec_dim", channels, None), ("emlp_dim", channels, None),
                           ("distance_weighting", True), ("edge_ln", "")):  # fmt: skip
        if name in known or name in ("edge_updates", "distance_weighting", "radial_basis"):
            known.expect(name, *allowed)
    known.drop("max_z", "weight_init", "attn_dropout", "distance_weighting_trainable")
    known.done()
    return config


def _constants(weights: Weights, options: ImportOptions, where: str) -> tuple[str, dict[str, Any]]:
    """The fidelity, and energies of lone atoms, shift and scale of it: a file of torch's in a tensor of bytes, read without running it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "constants"
        path.write_bytes(weights.take("SnapshotDecoder.constants").numpy().tobytes())
        found = open_tree(path).root
    weights.drop("SnapshotDecoder.context")  # names of the training sets
    names = [str(k).removesuffix("_") for k in found] if isinstance(found, dict) else []
    modal = choose("modal", options.modal, names, where)
    if modal is None:
        raise ValueError(f"{where} holds no energies of lone atoms (SnapshotDecoder.constants).")
    constants: dict[str, Any] = found.get(f"{modal}_", found.get(modal))
    return modal, constants


def _values(value: Any) -> np.ndarray:
    return np.asarray(value.double().numpy() if isinstance(value, Tensor) else value, dtype=np.float64)


def _weights(weights: Weights, config: GeoditeConfig, rows: list[int]) -> dict[str, Tensor]:
    """The authors' weights by our names."""
    for name in list(weights.left):
        for second, first in TWICE:
            if re.search(second, name) and re.sub(second, first, name) in weights:
                if not torch.equal(weights.take(name), weights.found[re.sub(second, first, name)]):
                    raise ValueError(f"{weights.where}: '{name}' is another tensor than '{re.sub(second, first, name)}'.")
                break
    n = np.arange(1, config.num_basis + 1)
    weights.constant("encoder.radial_basis.freqs", math.pi * n / config.cutoff)
    weights.constant("encoder.radial_basis.prefactor", math.sqrt(2 / config.cutoff))
    weights.constant("encoder.distance_weighting_fn.covalent_radii", covalent_radii)
    weights.constant("SnapshotDecoder.repulsion_term.covalent_radii", covalent_radii)
    weights.drop("*.balance_degree_weight")
    found: dict[str, Tensor] = {}
    for name in list(weights.left):
        for theirs, ours in NAMES:
            if re.search(theirs, name):
                key = re.sub(theirs, ours, name)
                value = weights.take(name)
                found[key] = value[rows] if key in ("node_start.A_na.weight", "node_start.A_nbr.weight") else value
                break
    return found
