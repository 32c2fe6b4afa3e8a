"""κ of Stillinger-Weber silicon by the judge (phono3py) and by kaldo (its own force constants, scattering and solver), same cells and mesh.

pip install kaldo matscipy phono3py spglib ase vesin pydantic tqdm     # in an environment of its own; kaldo brings tensorflow
PYTHONPATH=.:benchmarks/judge python benchmarks/judge/kappa_silicon.py [mesh ...]
"""

from __future__ import annotations

import sys
import tempfile

import numpy as np
from ase.build import bulk
from kaldo.conductivity import Conductivity
from kaldo.forceconstants import ForceConstants
from kaldo.phonons import Phonons
from potentials import stillinger_weber

from gossamer.checks.crystals import relaxed
from gossamer.checks.thermal_conductivity import conductivity

SUPERCELL = 3
SILICON = 2.007e-4
"""mass variance of natural silicon (isotopes of NIST)"""


def main() -> None:
    cell, _ = relaxed(stillinger_weber(), bulk("Si"), fmax=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        constants = ForceConstants(atoms=cell, supercell=[SUPERCELL] * 3, third_supercell=[SUPERCELL] * 3, folder=folder)
        constants.second.calculate(stillinger_weber(), delta_shift=0.01)
        constants.third.calculate(stillinger_weber(), delta_shift=0.01)
        for mesh in [int(m) for m in sys.argv[1:]] or [5, 7]:
            phonons = Phonons(
                forceconstants=constants,
                kpts=[mesh] * 3,
                is_classic=False,
                temperature=300,
                folder=folder,
                storage="memory",
                include_isotopes=True,
                g_factor=np.full(2, SILICON),
            )
            theirs = np.trace(Conductivity(phonons=phonons, method="rta", storage="memory").conductivity.sum(axis=0)) / 3
            work = cell.copy()
            work.info.update(
                fc2_supercell=[SUPERCELL] * 3, fc3_supercell=[SUPERCELL] * 3, q_mesh=[mesh] * 3, primitive_matrix=np.eye(3).tolist()
            )
            ours = conductivity(stillinger_weber(), work, displacement=0.01, relax=False)
            top = phonons.frequency.max()
            print(
                f"mesh {mesh}: judge {ours['kappa']:.1f} W/m/K, kaldo {abs(theirs):.1f} W/m/K; highest frequency {ours['frequencies'].max():.3f} and {top:.3f} THz",
                flush=True,
            )


if __name__ == "__main__":
    main()
