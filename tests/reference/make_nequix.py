"""Writes nequix.npz: small Nequix networks with random weights, and what nequix computes from them in float32.

JAX_PLATFORMS=cpu python make_nequix.py OUT        in an environment with nequix 0.4.5
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from ase.build import bulk
from nequix.calculator import NequixCalculator
from nequix.model import Nequix, save_model

NUMBERS, ENERGIES = [1, 6, 8, 14], [1.0, 2.0, 3.0, -1.0]
COMMON = {"lmax": 2, "cutoff": 4.0, "radial_basis_size": 5, "radial_mlp_size": 6, "radial_polynomial_p": 6.0, "mlp_init_scale": 4.0}
VARIANTS = {
    "norm": {**COMMON, "hidden_irreps": "6x0e + 3x1o + 2x2e", "n_layers": 3, "radial_mlp_layers": 2, "index_weights": False, "layer_norm": True,
             "shift": 0.1, "scale": 0.8, "avg_n_neighbors": 30.0},
    "elements": {**COMMON, "hidden_irreps": "5x0e + 3x1o + 2x2e", "n_layers": 2, "radial_mlp_layers": 1, "index_weights": True, "layer_norm": False,
                 "shift": 0.0, "scale": 1.3, "avg_n_neighbors": 12.0},
}  # fmt: skip


def main() -> None:
    atoms = bulk("SiC", "zincblende", a=4.36, cubic=True)
    atoms.numbers[:2] = [8, 1]
    atoms.rattle(0.08, seed=1)
    out = {"numbers": atoms.numbers, "positions": atoms.positions, "cell": atoms.cell.array}
    rng = np.random.default_rng(0)
    for name, settings in VARIANTS.items():
        model = Nequix(jax.random.key(3), n_species=4, atom_energies=ENERGIES, **settings)
        leaves, tree = jax.tree_util.tree_flatten(model)
        leaves = [jax.numpy.asarray(x + 0.3 * rng.normal(size=x.shape)) if x.ndim == 1 and bool((x == 1).all()) else x for x in leaves]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.nqx"
            save_model(
                str(path), jax.tree_util.tree_unflatten(tree, leaves), {**settings, "atomic_numbers": NUMBERS, "atom_energies": ENERGIES}
            )
            atoms.calc = NequixCalculator(model_path=str(path), use_kernel=False)
            out[f"{name}/energy"] = np.array(atoms.get_potential_energy())
            out[f"{name}/forces"], out[f"{name}/stress"] = atoms.get_forces(), atoms.get_stress()
            stream = io.BytesIO(path.read_bytes())
        out[f"{name}/config"] = np.array(json.dumps(json.loads(stream.readline())))
        out.update({f"{name}/tensor/{k:03d}": np.load(stream) for k in range(len(leaves))})
    np.savez_compressed(sys.argv[1], **out)


if __name__ == "__main__":
    main()
