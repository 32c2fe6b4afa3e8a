"""Linear ACE of python-ace (PACE) on the frames that peers.py wrote; peers.py runs it in that package's environment.

    /path/to/pace/bin/python benchmarks/accuracy/pace.py FOLDER SYMBOL [--functions 700] [--cutoff 5] [--energy-weight 30]

Its own basis (that of `pacemaker -t`: 700 functions of each element, simplified spherical Bessel functions), its design matrix and its regression
(ridge, 1e-5), with energies weighted. pacemaker's non-linear form (two densities, TensorFlow) takes hours: six CPU minutes are thirty steps
of its BFGS. Written: FOLDER/pace.yace, and FOLDER/pace.json with the energy per atom that was taken off, parameters and CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path

import ase.io
import numpy as np
import pandas as pd
from pyace import create_multispecies_basis_config
from pyace.linearacefit import LinearACEDataset, LinearACEFit
from sklearn.linear_model import Ridge


def basis(symbol: str, functions: int, cutoff: float):
    """The linear basis."""
    return create_multispecies_basis_config(
        {
            "deltaSplineBins": 0.001,
            "elements": [symbol],
            "embeddings": {"ALL": {"npot": "FinnisSinclairShiftedScaled", "fs_parameters": [1, 1], "ndensity": 1}},
            "bonds": {"ALL": {"radbase": "SBessel", "radparameters": [5.25], "rcut": cutoff, "dcut": 0.01, "NameOfCutoffFunction": "cos"}},
            "functions": {
                "number_of_functions_per_element": functions,
                "UNARY": {"nradmax_by_orders": [15, 6, 4, 3, 2, 2], "lmax_by_orders": [0, 3, 3, 2, 2, 1]},
            },
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("symbol")
    parser.add_argument("--functions", type=int, default=700)
    parser.add_argument("--cutoff", type=float, default=5.0)
    parser.add_argument("--energy-weight", type=float, default=30.0)
    arguments = parser.parse_args()
    frames = ase.io.read(arguments.folder / "train.extxyz", ":")
    energies, atoms = np.array([a.get_potential_energy() for a in frames]), np.array([len(a) for a in frames])
    shift = float(energies.sum() / atoms.sum())
    table = pd.DataFrame({
        "energy_corrected": energies - shift * atoms,
        "forces": [a.get_forces() for a in frames],
        "ase_atoms": [type(a)(a.symbols, positions=a.positions, cell=a.cell, pbc=a.pbc) for a in frames],
        "NUMBER_OF_ATOMS": atoms,
    })  # fmt: skip
    data = LinearACEDataset(basis(arguments.symbol, arguments.functions, arguments.cutoff), table)
    data.construct_design_matrix(max_workers=1, verbose=False)
    matrix, target = data.get_design_matrix(), data.get_target_vector()  # energies per atom first, then forces
    weights = np.ones(len(target))
    weights[: len(frames)] = arguments.energy_weight
    model = Ridge(alpha=1e-5, fit_intercept=False).fit(matrix * weights[:, None], target * weights)
    LinearACEFit(model=model, train_dataset=data).get_bbasis().to_ACECTildeBasisSet().save_yaml(str(arguments.folder / "pace.yace"))
    used = sum(r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    record = {"energy_per_atom_eV": shift, "num_parameters": matrix.shape[1], "cpu_seconds": round(used)}
    (arguments.folder / "pace.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
