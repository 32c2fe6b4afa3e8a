"""Outputs of schnetpack's PaiNN and SchNet for random weights, stored for our tests.

    python tests/reference/make_schnetpack.py tests/reference/schnetpack.npz     # in an environment with schnetpack 2.1

The same batch as make_nequip.py, float64. VARIANT is painn, painn_direct (with schnetpack's gated equivariant network of two
blocks on the vectors) or schnet; weights are stored under schnetpack's names.
"""

from __future__ import annotations

import sys
import typing

import ase.build
import numpy as np
import torch
import torch.utils.data.dataloader as _dataloader
from ase.neighborlist import neighbor_list

if not hasattr(_dataloader, "T_co"):  # schnetpack 2.1.1 imports a name that torch 2.13 no longer has
    _dataloader.T_co = typing.TypeVar("T_co", covariant=True)
import schnetpack
from schnetpack import properties

CUTOFF, FEATURES, LAYERS, BASIS = 4.0, 8, 2, 5


def graph() -> dict[str, np.ndarray]:
    ethanol = ase.build.molecule("CH3CH2OH")
    ethanol.rattle(0.05, seed=1)
    ethanol.cell, ethanol.pbc = np.zeros((3, 3)), False
    crystal = ase.build.bulk("SiC", "zincblende", a=4.36)
    crystal.rattle(0.08, seed=2)
    edges, shifts, sizes = [], [], [0]
    for atoms in (ethanol, crystal):
        i, j, s = neighbor_list("ijS", atoms, CUTOFF)
        edges.append(np.stack([j, i]) + sum(sizes))
        shifts.append(s)
        sizes.append(len(atoms))
    return {
        "atomic_numbers": np.concatenate([ethanol.numbers, crystal.numbers]),
        "positions": np.concatenate([ethanol.positions, crystal.positions]),
        "cell": np.stack([ethanol.cell.array, crystal.cell.array]),
        "graph_index": np.repeat([0, 1], sizes[1:]),
        "edge_sender_receiver": np.concatenate(edges, axis=1),
        "edge_shifts": np.concatenate(shifts).astype(np.float64),
    }


def main() -> None:
    stored = {"settings_F_L_B_cutoff": np.array([FEATURES, LAYERS, BASIS, CUTOFF]), **graph()}
    stored["versions"] = np.array([f"schnetpack {schnetpack.__version__}", f"torch {torch.__version__}"])
    sender, receiver = torch.from_numpy(stored["edge_sender_receiver"])
    index = torch.from_numpy(stored["graph_index"])
    shifts = torch.einsum("ex,exy->ey", torch.from_numpy(stored["edge_shifts"]), torch.from_numpy(stored["cell"])[index[receiver]])
    for name in ("painn", "schnet", "painn_direct"):
        torch.manual_seed(3)
        kind = schnetpack.representation.SchNet if name == "schnet" else schnetpack.representation.PaiNN
        basis, cutoff = schnetpack.nn.GaussianRBF(n_rbf=BASIS, cutoff=CUTOFF), schnetpack.nn.CosineCutoff(CUTOFF)
        network = kind(n_atom_basis=FEATURES, n_interactions=LAYERS, radial_basis=basis, cutoff_fn=cutoff)
        readout = schnetpack.atomistic.Atomwise(n_in=FEATURES, output_key="energy")
        head = schnetpack.nn.build_gated_equivariant_mlp(n_in=FEATURES, n_out=1) if name == "painn_direct" else None
        modules = {"network": network.double(), "readout": readout.double(), **({"head": head.double()} if head is not None else {})}
        for module in modules.values():
            for parameter in module.parameters():
                if parameter.dim() == 1:
                    torch.nn.init.normal_(parameter, std=0.3)
        positions = torch.from_numpy(stored["positions"]).clone().requires_grad_()
        inputs = {
            properties.Z: torch.from_numpy(stored["atomic_numbers"]), properties.Rij: positions[sender] + shifts - positions[receiver],
            properties.idx_i: receiver, properties.idx_j: sender, properties.idx_m: index, properties.n_atoms: torch.bincount(index),
        }  # fmt: skip
        out = readout(network(inputs))
        for part, module in modules.items():
            for key, value in module.named_parameters():
                stored[f"{name}/weights/{part}.{key}"] = value.detach().numpy()
        stored[f"{name}/energy"] = out["energy"].detach().numpy()
        stored[f"{name}/forces"] = -torch.autograd.grad(out["energy"].sum(), positions, retain_graph=True)[0].numpy()
        if head is not None:
            stored[f"{name}/direct_forces"] = (
                head((out["scalar_representation"], out["vector_representation"]))[1][:, :, 0].detach().numpy()
            )
        print(name, stored[f"{name}/energy"])
    np.savez_compressed(sys.argv[1], **stored)


if __name__ == "__main__":
    main()
