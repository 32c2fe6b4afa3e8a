"""LEIGNN: what the authors' training scripts save (`model.pt`, commit c23aa14): averaged weights by name, and nothing else.

The file holds the numbers of channels, layers and Gaussians in its shapes, but neither the cutoff, nor how many neighbours were kept, nor which
update and elements: these must be given. The mean energy of a frame, which training subtracted from the labels, is not in it either: energies are
relative to that. Forces are the direct ones of the published network.
"""

from __future__ import annotations

import re
from typing import Any

from ase.data import chemical_symbols

from gossamer.imports.contract import ImportOptions, Weights, choose, foreign_statistics, given, tensors_by_name
from gossamer.imports.inert import Tree
from gossamer.models import LEIGNNConfig
from gossamer.potential import Potential, PotentialConfig

PACKAGE = "LEIGNN"
NAMES = (
    (r"^atom_emb\.embeddings\.weight$", "embedding.weight"),
    (r"^vn_emb\.weight$", "global_scalar"),
    (r"^message_layers\.(\d+)\.x_proj\.", r"layers.\1.message.P."),
    (r"^message_layers\.(\d+)\.rbf_proj\.", r"layers.\1.message.convolution.radial."),
    (r"^update_layers\.(\d+)\.vec_proj\.", r"layers.\1.update.W_v."),
    (r"^update_layers\.(\d+)\.xvec_proj\.", r"layers.\1.update.MLP_u."),
    (r"^global_scalar_layers\.(\d+)\.mlp_node\.", r"layers.\1.distribute.MLP."),
    (r"^global_scalar_layers\.(\d+)\.mlp_vn\.", r"layers.\1.aggregate.MLP."),
    (r"^global_vector_layers\.(\d+)\.mlp_node\.", r"layers.\1.distribute.W."),
    (r"^global_vector_layers\.(\d+)\.mlp_vn\.", r"layers.\1.aggregate.W."),
    (r"^out_energy\.", "MLP_E."),
    (r"^out_forces\.", "W_F."),
)
"""weights there and here"""


def recognises(tree: Tree) -> bool:
    root = (
        tree.root if tree.form == "torch" and "data.pkl" in tree.members and b"message_layers.0.x_proj" in tree.read("data.pkl") else None
    )
    return isinstance(root, dict) and "atom_emb.embeddings.weight" in root


def potential(tree: Tree, options: ImportOptions) -> Potential:
    """The potential of a file of weights.

    Raises:
        ValueError: tensors that are not known, or facts that the file does not hold and nobody gave.
    """
    where = f"'{tree.path}'"
    choose("modal", options.modal, [], where)
    choose("head", options.head, [], where)
    weights = Weights(tensors_by_name(tree.root, where), where)
    weights.drop("radial_basis.*")  # Gaussians on [0, 1], without weights
    table = weights.take("atom_emb.embeddings.weight")
    if options.elements is None:
        raise ValueError(f"{where} does not say which elements it was trained on: name them with --elements, for example --elements C,H,O.")
    cutoff = given(options, where, "cutoff", float, "the cutoff in Å (published: 6 for OC20 and ISO17, 5 for LiPS, H2O, CH4)")
    neighbors = given(options, where, "max_neighbors", int, "how many neighbours were kept (published: 20 or 50)")
    layers = len({k.split(".")[1] for k in weights.found if k.startswith("message_layers.")})
    h = table.shape[1]
    update = given(options, where, "update", {"nmu": "nmu", "painn": "painn"}, "the update: nmu (LEIGNN, Vanilla + NMU) or painn (Vanilla)")
    config: Any = LEIGNNConfig(
        variant="published", num_features=h, num_layers=layers, num_basis=weights.found["message_layers.0.rbf_proj.weight"].shape[1],
        cutoff=cutoff, max_neighbors=neighbors, direct_forces=True, global_context="vn_emb.weight" in weights, update=update,
    )  # fmt: skip
    rows = [chemical_symbols.index(e) for e in options.elements]
    made = Potential(config, foreign_statistics(options.elements, dict.fromkeys(options.elements, 0.0)), PotentialConfig(zbl=False)).eval()
    made.network.to(table.dtype)
    found = {"embedding.weight": table[rows]}
    for name in list(weights.left):
        for theirs, ours in NAMES:
            if re.search(theirs, name):
                found[re.sub(theirs, ours, name)] = weights.take(name)
    weights.done()
    made.network.load_state_dict(found)
    made.imported = {"version": None, "given": options.given}
    return made
