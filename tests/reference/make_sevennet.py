"""Writes sevennet.npz: small SevenNets with random weights, and what sevenn computes from them in float64.

python make_sevennet.py OUT        in an environment with sevenn 0.13 (torch 2.13.0)
"""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import torch
from ase import Atoms

torch.set_default_dtype(torch.float64)
torch.Tensor.float = lambda self: self.to(torch.get_default_dtype())  # type: ignore[method-assign]  # elements as unit vectors in float64
import sevenn  # noqa: E402
import sevenn._const as const  # noqa: E402
import sevenn.train.dataload as dataload  # noqa: E402
import sevenn.util as util  # noqa: E402
from sevenn.atom_graph_data import AtomGraphData  # noqa: E402
from sevenn.model_build import build_E3_equivariant_model  # noqa: E402

util.dtype_correct.__defaults__ = (torch.float64, torch.int64)
NUMBERS = [1, 6, 8, 14]
VARIANTS = {
    "both parities": {
        "is_parity": True, "channel": 4, "lmax": 1, "num_convolution_layer": 3, "self_connection_type": "nequip", "use_bias_in_linear": True,
        "readout_as_fcn": True, "readout_fcn_hidden_neurons": [6], "readout_fcn_activation": "silu", "conv_denominator": 3.0,
        "shift": [0.1, -0.2, 0.3, 0.5], "scale": [1.0, 1.5, 0.7, 0.9], "cutoff_function": {"cutoff_function_name": "poly_cut", "poly_cut_p_value": 5},
    },
    "two modals": {
        "is_parity": False, "irreps_manual": ["6x0e", "6x0e+4x1e+2x2e", "5x0e+3x1e+2x2e", "6x0e"], "channel": 6, "lmax": 2,
        "num_convolution_layer": 3, "self_connection_type": "linear", "conv_denominator": [3.0, 4.0, 5.0], "_normalize_sph": False,
        "cutoff_function": {"cutoff_function_name": "XPLOR", "cutoff_on": 3.2}, "shift": [[1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4]],
        "scale": [1.7, 1.7, 1.7, 1.7], "use_modality": True, "use_modal_wise_shift": True, "use_modal_wise_scale": False, "_number_of_modalities": 2,
        "_modal_map": {"R2SCAN": 0, "PBE": 1}, **{f"use_modal_{name}": True for name in ("node_embedding", "self_inter_intro", "self_inter_outro", "output_block")},
    },
}  # fmt: skip


def atoms() -> Atoms:
    rng = np.random.default_rng(0)
    cell = np.array([[4.5, 0.0, 0.3], [0.2, 4.8, 0.0], [0.0, -0.3, 5.1]])
    grid = np.array([[x, y, z] for x in (0, 0.5) for y in (0, 0.5) for z in (0, 0.5)]) + rng.uniform(-0.06, 0.06, (8, 3))
    return Atoms(rng.choice(NUMBERS, 8), grid @ cell, cell=cell, pbc=True)


def main() -> None:
    out: dict[str, np.ndarray] = {}
    structure = atoms()
    out.update(numbers=structure.numbers, positions=structure.positions, cell=structure.cell.array)
    for name, settings in VARIANTS.items():
        torch.manual_seed(0)
        config = {
            **copy.deepcopy(const.DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG), "version": sevenn.__version__, "_model_type": "E3_equivariant_model",
            "cutoff": 4.0, "radial_basis": {"radial_basis_name": "bessel", "bessel_basis_num": 5}, "weight_nn_hidden_neurons": [7, 6],
            "_number_of_species": 4, "_type_map": {z: k for k, z in enumerate(NUMBERS)}, "epoch": 3, **settings,
        }  # fmt: skip
        model = build_E3_equivariant_model(config)
        for key, value in model.named_parameters():
            if key.endswith(("bias", "coeffs")):
                value.data += 0.1 * torch.randn_like(value)
        model.to(torch.float64).set_is_batch_data(False)
        model.eval()
        out[f"{name}/config"] = np.array(json.dumps({k: list(v.items()) if k == "_type_map" else v for k, v in config.items()}))
        out.update({f"{name}/state/{k}": v.detach().numpy() for k, v in model.state_dict().items()})
        for modal in config.get("_modal_map", {"": 0}):
            graph = AtomGraphData.from_numpy_dict(dataload.unlabeled_atoms_to_graph(structure, config["cutoff"]))
            graph["x"] = torch.tensor([config["_type_map"][z] for z in structure.numbers])
            if modal:
                graph["data_modality"] = modal
            graph["pos"].requires_grad_()
            graph["edge_vec"] = graph["edge_vec"].detach().to(torch.float64).requires_grad_()
            answer = model(graph)
            volume_stress = -answer["inferred_stress"].detach().numpy()
            out[f"{name}/energy/{modal}"] = answer["inferred_total_energy"].detach().numpy()
            out[f"{name}/forces/{modal}"] = answer["inferred_force"].detach().numpy()
            out[f"{name}/stress/{modal}"] = volume_stress[[0, 1, 2, 4, 5, 3]]  # Voigt order, sign of ASE
            print(name, modal, float(out[f"{name}/energy/{modal}"]), np.abs(out[f"{name}/forces/{modal}"]).max())
    np.savez_compressed(sys.argv[1], **out)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
