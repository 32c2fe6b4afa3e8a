"""Files in today's formats, small enough to keep: later versions must read them for ever (tests/test_potential.py, tests/test_data.py).

python tests/data/make_format1.py FOLDER     # those in tests/data/format1 were written at commit 804ccb1; do not write them again

Each potential has random weights, and stores two structures with its predictions, which loading recomputes. `store` is a folder
as `gossamer data convert` writes it, with and without labels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from ase.build import bulk, molecule

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import make_potential

from gossamer.config import make_config
from gossamer.data.store import write_store
from gossamer.data.structure import Structure
from gossamer.potential_file import save
from gossamer.settings import to_dict

NETWORKS = {
    "leignn": {},
    "leignn-direct": {"name": "leignn", "direct_forces": True},
    "nequip": {"name": "nequip", "num_features": 3},
    "geodite": {"name": "geodite", "num_features": 4},
    "painn": {"name": "painn", "num_features": 6},
    "schnet": {"name": "schnet"},
}


def structures() -> list[Structure]:
    """A rattled molecule, and a rattled, sheared crystal smaller than the cutoff."""
    ethanol, crystal = molecule("CH3CH2OH"), bulk("SiC", "zincblende", a=4.36)
    crystal.set_cell(crystal.cell.array @ (np.eye(3) + 0.02 * np.tri(3)), scale_atoms=True)
    made = []
    for k, atoms in enumerate((ethanol, crystal)):
        atoms.rattle(0.05, seed=k)
        made.append(Structure(atomic_numbers=atoms.numbers.astype(np.int64), positions=atoms.positions, cell=atoms.cell.array,
                              pbc=np.array(atoms.pbc), name=f"structure {k}"))  # fmt: skip
    return made


if __name__ == "__main__":
    out = Path(sys.argv[1])
    molecule_, crystal_ = structures()
    training = to_dict(make_config({"data": {"train": "train.extxyz"}, "model": {"name": "leignn"}}))
    predictions = {}
    for name, options in NETWORKS.items():
        potential = make_potential(["H", "C", "O", "Si"], dtype=torch.float32, **options)
        save(potential, out / f"{name}.safetensors", [molecule_, crystal_], training)
        predictions[name] = [p["energy"] for p in potential.predict([molecule_, crystal_])]
    (out / "energies.json").write_text(json.dumps(predictions, indent=1) + "\n")
    labelled = Structure(**{**vars(crystal_), "energy": -3.5, "forces": np.arange(6.0).reshape(2, 3), "stress": np.diag([0.1, 0.2, 0.3]),
                            "fixed": np.array([True, False]), "group": "first"})  # fmt: skip
    write_store([labelled, molecule_], out / "store")
