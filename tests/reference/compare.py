"""Compare our networks with stored outputs of the authors' code.

    python tests/reference/compare.py ../shared/reference/leignn.npz

Prints the largest relative deviation of every stored output; exit status 1 if any is above 1e-10.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from gossamer.models import LEIGNN, LEIGNNConfig
from gossamer.nn.layers import sum_by_index

TOLERANCE = 1e-10
VARIANTS = {
    "leignn": dict(update="nmu", global_context=True),
    "vanilla_nmu": dict(update="nmu", global_context=False),
    "vanilla": dict(update="painn", global_context=False),
}


def relative_deviation(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest absolute difference over the largest reference magnitude."""
    if ours.shape != theirs.shape:
        raise ValueError(f"Our output has shape {ours.shape}, the stored one {theirs.shape}.")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def leignn_weights(data: np.lib.npyio.NpzFile, variant: str) -> dict[str, torch.Tensor]:
    """Names of the specification -> names in our modules (the linear layers of an MLP sit at 0 and 2)."""
    weights = {}
    prefix = f"{variant}/weights/"
    for key in data.files:
        if not key.startswith(prefix):
            continue
        name = key[len(prefix) :].replace("/", ".")
        for mlp in ("P", "MLP_u", "MLP_E", "MLP_a", "MLP_b"):
            name = name.replace(f"{mlp}.1.", f"{mlp}.2.")
        for theirs, mine in (("MLP_a", "MLP"), ("W_a", "W"), ("MLP_b", "MLP"), ("W_b", "W")):
            name = name.replace(f".{theirs}.", f".{mine}.")
        name = name.replace("layer", "layers.", 1) if name.startswith("layer") else name
        name = name.removeprefix("head.").replace("global_scalar_init.weight", "global_scalar")
        weights[name] = torch.from_numpy(data[key])
    return weights


def compare_leignn(data: np.lib.npyio.NpzFile) -> dict[str, float]:
    """Largest relative deviation of every stored output of every variant in the file."""
    h, layers, basis, cutoff = (float(value) for value in data["settings_H_L_B_cutoff"])
    tensor = {k: torch.from_numpy(data[k]) for k in ("positions", "atomic_numbers", "graph_index", "cell", "edge_shifts")}
    edge_index = torch.from_numpy(data["edge_sender_receiver"])
    sender, receiver = edge_index
    n_graphs = len(tensor["cell"])
    deviations = {}
    for variant, options in VARIANTS.items():
        if f"{variant}/energy" not in data.files:
            continue
        config = LEIGNNConfig(
            variant="published", num_features=int(h), num_layers=int(layers), num_basis=int(basis), cutoff=cutoff,
            direct_forces=True, **options,
        )  # fmt: skip
        weights = leignn_weights(data, variant)
        model = LEIGNN(config, num_species=len(weights["embedding.weight"])).double()
        model.load_state_dict(weights)
        outputs: dict[str, torch.Tensor] = {}

        def keep(layer: int, outputs: dict[str, torch.Tensor] = outputs):
            def hook(_module, _inputs, after) -> None:
                outputs[f"layer{layer}/x_after_update"], outputs[f"layer{layer}/v_after_update"] = after

            return hook

        for index, layer in enumerate(model.layers):
            layer.update.register_forward_hook(keep(index))
        positions = tensor["positions"].clone().requires_grad_()
        cells = tensor["cell"][tensor["graph_index"][receiver]]
        shifts = torch.einsum("ex,exy->ey", tensor["edge_shifts"].double(), cells)
        result = model(
            tensor["atomic_numbers"], edge_index, positions[sender] + shifts - positions[receiver],
            tensor["graph_index"], n_graphs,
        )  # fmt: skip
        outputs["energy"] = sum_by_index(result.node_energies, tensor["graph_index"], n_graphs)
        outputs["direct_forces"] = result.direct_forces
        outputs["minus_energy_gradient"] = -torch.autograd.grad(outputs["energy"].sum(), positions)[0]
        for name, value in outputs.items():
            deviations[f"{variant}/{name}"] = relative_deviation(value.detach().numpy(), data[f"{variant}/{name}"])
    return deviations


def compare(path: Path) -> dict[str, float]:
    """Deviations of every output stored in a reference file of a known layout."""
    data = np.load(path, allow_pickle=False)
    if "settings_H_L_B_cutoff" in data.files:
        return compare_leignn(data)
    raise ValueError(f"'{path}' has a layout this script does not know (no settings_H_L_B_cutoff).")


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    deviations = compare(Path(sys.argv[1]))
    for name, value in deviations.items():
        print(f"{name:45s} {value:9.2e}  {'ok' if value <= TOLERANCE else 'DEVIATES'}")
    # an empty comparison is not an agreement; NaN fails too
    return 0 if deviations and all(value <= TOLERANCE for value in deviations.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
