"""Outputs of the nequip package for random weights, stored for our tests.

    python tests/reference/make_nequip.py tests/reference/nequip.npz      # in an environment with nequip 0.19

A batch of rattled ethanol (no cell) and a rattled 2-atom SiC cell (periodic), float64. Every VARIANT has its settings as
JSON, its weights under the package's own names, energy (eV), forces (eV/Å) and stress (eV/Å³). Weights, structures and
numbers are made by this script; nothing of the package is in the file.
"""

from __future__ import annotations

import json
import sys

import ase.build
import numpy as np
import torch
from ase.neighborlist import neighbor_list
from nequip.utils.global_state import set_global_state

set_global_state(allow_tf32=False)
from nequip.data import AtomicDataDict as Keys  # noqa: E402
from nequip.model import NequIPGNNModel  # noqa: E402

ELEMENTS = ["H", "C", "O", "Si"]
CUTOFF, NEIGHBORS = 4.0, 9.0
SCALES = {"H": 0.7, "C": 1.3, "O": 0.9, "Si": 2.0}
SHIFTS = {"H": -1.3, "C": -0.5, "O": -2.25, "Si": 0.75}
PAIRS = {"H": {"H": 2.5, "O": 3.0}, "C": 3.5}
VARIANTS = {
    "l1": dict(l_max=1, num_features=6, num_layers=2, parity=False),
    "l2": dict(l_max=2, num_features=[6, 4, 3], num_layers=3, parity=False, type_embed_num_features=5),
    "l3": dict(l_max=3, num_features=[5, 4, 3, 2], num_layers=3, parity=False),
    "l1-parity": dict(l_max=1, num_features=6, num_layers=3, parity=True),
    "l1-parity-4": dict(l_max=1, num_features=[5, 4], num_layers=4, parity=True),
    "l2-parity": dict(l_max=2, num_features=[6, 4, 3], num_layers=3, parity=True, radial_mlp_depth=2),
    "l3-parity": dict(l_max=3, num_features=3, num_layers=3, parity=True, bessel_trainable=True, polynomial_cutoff_p=5),
    "l2-pairs": dict(l_max=2, num_features=4, num_layers=2, parity=False, per_edge_type_cutoff=PAIRS),
    "l2-zbl": dict(l_max=2, num_features=4, num_layers=2, parity=False, zbl=True),
    "l2-readout": dict(l_max=2, num_features=4, num_layers=2, parity=False, readout_mlp_hidden_layers_depth=2, readout_mlp_hidden_layers_width=7),
}  # fmt: skip


def structures() -> list[ase.Atoms]:
    ethanol = ase.build.molecule("CH3CH2OH")
    ethanol.rattle(0.05, seed=1)
    ethanol.cell, ethanol.pbc = np.zeros((3, 3)), False
    crystal = ase.build.bulk("SiC", "zincblende", a=4.36)
    crystal.rattle(0.08, seed=2)
    return [ethanol, crystal]


def graph() -> dict[str, np.ndarray]:
    edges, shifts, sizes = [], [], [0]
    frames = structures()
    for atoms in frames:
        i, j, s = neighbor_list("ijS", atoms, CUTOFF)
        edges.append(np.stack([j, i]) + sum(sizes))
        shifts.append(s)
        sizes.append(len(atoms))
    return {
        "atomic_numbers": np.concatenate([a.numbers for a in frames]),
        "positions": np.concatenate([a.positions for a in frames]),
        "cell": np.stack([a.cell.array for a in frames]),
        "pbc": np.stack([a.pbc for a in frames]),
        "graph_index": np.repeat(np.arange(len(frames)), sizes[1:]),
        "edge_sender_receiver": np.concatenate(edges, axis=1),
        "edge_shifts": np.concatenate(shifts).astype(np.float64),
    }


def main() -> None:
    import e3nn
    import nequip
    from e3nn.o3 import wigner_3j

    stored: dict[str, np.ndarray] = {"nequip_variants": np.array(list(VARIANTS)), "elements": np.array(ELEMENTS)}
    stored["versions"] = np.array([f"nequip {nequip.__version__}", f"e3nn {e3nn.__version__}", f"torch {torch.__version__}"])
    stored |= graph()
    for l1, l2, l3 in [
        (1, 1, 1),
        (1, 1, 2),
        (1, 2, 2),
        (2, 1, 2),
        (2, 2, 1),
        (3, 2, 2),
        (2, 3, 4),
        (4, 2, 3),
        (4, 3, 2),
        (3, 4, 2),
        (4, 4, 4),
        (0, 3, 3),
    ]:
        stored[f"wigner_3j/{l1}{l2}{l3}"] = wigner_3j(l1, l2, l3, dtype=torch.float64).numpy()
    types = torch.tensor([ELEMENTS.index(ase.data.chemical_symbols[z]) for z in stored["atomic_numbers"]])
    sender, receiver = torch.from_numpy(stored["edge_sender_receiver"])
    data = {
        Keys.POSITIONS_KEY: torch.from_numpy(stored["positions"]),
        Keys.ATOM_TYPE_KEY: types,
        Keys.CELL_KEY: torch.from_numpy(stored["cell"]),
        Keys.PBC_KEY: torch.from_numpy(stored["pbc"]),
        Keys.BATCH_KEY: torch.from_numpy(stored["graph_index"]),
        Keys.NUM_NODES_KEY: torch.bincount(torch.from_numpy(stored["graph_index"])),
        Keys.EDGE_INDEX_KEY: torch.stack([receiver, sender]),
        Keys.EDGE_CELL_SHIFT_KEY: torch.from_numpy(stored["edge_shifts"]),
    }
    for name, options in VARIANTS.items():
        options = {"radial_mlp_width": 10, **options}
        zbl = options.pop("zbl", False)
        pair = {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal", "chemical_species": ELEMENTS} if zbl else None
        model = NequIPGNNModel(
            seed=1, model_dtype="float64", type_names=ELEMENTS, r_max=CUTOFF, avg_num_neighbors=NEIGHBORS, per_type_energy_scales=SCALES,
            per_type_energy_shifts=SHIFTS, compile_mode="eager", pair_potential=pair, **options,
        ).eval()  # fmt: skip
        out = model(dict(data))
        stored[f"{name}/settings"] = np.array(json.dumps({**options, "zbl": zbl, "cutoff": CUTOFF, "mean_neighbors": NEIGHBORS,
                                                          "scales": SCALES, "shifts": SHIFTS}))  # fmt: skip
        for key, value in model.named_parameters():
            stored[f"{name}/weights/{key.split('model.func.')[-1]}"] = value.detach().numpy()
        stored[f"{name}/energy"] = out[Keys.TOTAL_ENERGY_KEY].detach().numpy()[:, 0]
        stored[f"{name}/forces"] = out[Keys.FORCE_KEY].detach().numpy()
        stored[f"{name}/stress"] = out[Keys.STRESS_KEY].detach().numpy()
        print(name, sum(p.numel() for p in model.parameters()), stored[f"{name}/energy"], stored[f"{name}/stress"][1, 0])
    np.savez_compressed(sys.argv[1], **stored)


if __name__ == "__main__":
    main()
