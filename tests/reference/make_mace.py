"""Outputs of mace-torch for random weights, stored for our tests.

    python tests/reference/make_mace.py tests/reference/mace.npz      # in an environment with mace-torch 0.3.16

The same batch as make_nequip.py, float64. Every VARIANT has its kinds of layers as JSON (what `gossamer.imports.mace.describe` finds in a
file), its tensors under the package's own names, energy (eV), forces (eV/Å) and stress (eV/Å³) of each head. Weights and structures are made by
this script, and tensors of couplings, which follow from them, are facts.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # e3nn 0.4.4 reads a file of its own in the old way

import ase.build
import numpy as np
import torch
from ase.neighborlist import neighbor_list
from e3nn import o3
from mace import data, modules, tools
from mace.tools import torch_geometric

torch.set_default_dtype(torch.float64)
NUMBERS = [1, 6, 8, 14]
CUTOFF, NEIGHBORS = 4.0, 9.0
PLAIN, RESIDUAL = "RealAgnosticInteractionBlock", "RealAgnosticResidualInteractionBlock"
DENSITY, DENSITY_RESIDUAL = "RealAgnosticDensityInteractionBlock", "RealAgnosticDensityResidualInteractionBlock"
VARIANTS = {
    "MP-0": dict(hidden="4x0e+4x1o", first=RESIDUAL),
    "MP-0 small": dict(hidden="4x0e", first=RESIDUAL, max_ell=3),
    "OFF": dict(hidden="3x0e+3x1o+3x2e", first=PLAIN),
    "MPA": dict(hidden="4x0e+4x1o", first=DENSITY, block=DENSITY_RESIDUAL, distance_transform="Agnesi", pair_repulsion=True),
    "soft": dict(hidden="3x0e+3x1o", first=DENSITY_RESIDUAL, block=DENSITY_RESIDUAL, max_ell=1, distance_transform="Soft", radial_MLP=[5, 7]),
    "heads": dict(hidden="3x0e+3x1o", first=RESIDUAL, max_ell=1, heads=["old", "new"], scale=[0.8, 1.3], shift=[0.1, -0.2]),
    "four factors": dict(hidden="3x0e", first=PLAIN, max_ell=1, correlation=4, num_interactions=1),
    "one factor": dict(hidden="3x0e+3x1o", first=PLAIN, block=PLAIN, max_ell=1, correlation=1, num_interactions=3),
    "gaussian, no scale": dict(hidden="3x0e", first=PLAIN, max_ell=1, correlation=2, radial_type="gaussian", scale=None),
    "one table": dict(hidden="3x0e+3x1o", first=PLAIN, max_ell=1, use_agnostic_product=True, use_last_readout_only=True),
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


def make(hidden, first, block=RESIDUAL, scale=0.8, shift=0.16, num_interactions=2, heads=None, **options):
    """A model, and the kinds of its layers."""
    generator = np.random.default_rng(7)
    energies = generator.normal(size=(len(heads), len(NUMBERS)) if heads else len(NUMBERS))
    arguments = dict(
        r_max=CUTOFF, num_bessel=4, num_polynomial_cutoff=5, interaction_cls=modules.interaction_classes[block], heads=heads,
        interaction_cls_first=modules.interaction_classes[first], num_interactions=num_interactions, num_elements=len(NUMBERS),
        hidden_irreps=o3.Irreps(hidden), MLP_irreps=o3.Irreps("5x0e"), gate=torch.nn.functional.silu, atomic_energies=energies,
        avg_num_neighbors=NEIGHBORS, atomic_numbers=NUMBERS, use_reduced_cg=False,
        **{"max_ell": 2, "correlation": 3, "radial_MLP": [6], **options},
    )  # fmt: skip
    if scale is None:
        model = modules.MACE(**arguments)
    else:
        model = modules.ScaleShiftMACE(**arguments, atomic_inter_scale=scale, atomic_inter_shift=shift)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.from_numpy(generator.normal(size=tuple(parameter.shape)))
    last_only = options.get("use_last_readout_only", False)
    kinds = {
        "interactions": [first] + [block] * (num_interactions - 1), "neighbors": [NEIGHBORS] * num_interactions,
        "readouts": [type(r).__name__ for r in model.readouts], "basis": type(model.radial_embedding.bessel_fn).__name__,
        "transform": f"{options['distance_transform']}Transform" if "distance_transform" in options else None,
        "repulsion": "pair_repulsion" in options, "heads": heads or ["Default"], "agnostic": options.get("use_agnostic_product", False),
        "last_readout_only": last_only,
    }  # fmt: skip
    return model, kinds


def main() -> None:
    import e3nn
    import mace

    stored: dict[str, np.ndarray] = {"mace_variants": np.array(list(VARIANTS)), **graph()}
    stored["versions"] = np.array([f"mace-torch {mace.__version__}", f"e3nn {e3nn.__version__}", f"torch {torch.__version__}"])
    table = tools.AtomicNumberTable(NUMBERS)
    for name, options in VARIANTS.items():
        model, kinds = make(**options)
        stored[f"{name}/kinds"] = np.array(json.dumps(kinds))
        for key, value in model.state_dict().items():
            if "_compiled_main" in key:  # 3j symbols inside generated code, which files do not hold as tensors
                continue
            stored[f"{name}/weights/{key}"] = value.numpy()
        for head in kinds["heads"]:
            frames = [data.AtomicData.from_config(data.config_from_atoms(a, head_name=head), z_table=table, cutoff=CUTOFF, heads=kinds["heads"])
                      for a in structures()]  # fmt: skip
            batch = next(iter(torch_geometric.dataloader.DataLoader(dataset=frames, batch_size=2, shuffle=False)))
            out = model(batch.to_dict(), compute_stress=True)
            for quantity in ("energy", "forces", "stress"):
                stored[f"{name}/{head}/{quantity}"] = out[quantity].detach().numpy()
            print(name, head, sum(p.numel() for p in model.parameters()), out["energy"].tolist())
    np.savez_compressed(sys.argv[1], **stored)


if __name__ == "__main__":
    main()
