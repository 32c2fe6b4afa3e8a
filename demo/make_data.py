"""Makes the demo data: liquid heavy water and ethanol, labelled by GFN-xTB (tblite).

    python demo/make_data.py water --out demo/data      # about an hour on one core
    python demo/make_data.py ethanol --out demo/data    # about a minute

Water: 32 D2O at the number density of 0.998 g/cm3 of H2O, melted at 450 K, then Langevin dynamics at 350 K on
GFN1-xTB energies with periodic boundary conditions. Deuterium is used so that a time step of 1.25 fs
is accurate; it changes no equilibrium structure in classical dynamics.
Ethanol: Langevin dynamics on GFN2-xTB.

Every number in the files comes out of these runs; nothing is taken from another data set.
"""

from __future__ import annotations

import argparse
import io
import lzma
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ase.io
import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from tblite.ase import TBLite

DEUTERIUM_MASS = 2.014


def write_compressed(path: Path, frames: list[Atoms]) -> None:
    """Write extended XYZ compressed by xz, through a temporary file."""
    text = io.StringIO()
    ase.io.write(text, frames, format="extxyz")
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(lzma.compress(text.getvalue().encode(), preset=9))
    os.replace(temporary, path)
    print(f"{path}: {len(frames)} frames, {path.stat().st_size / 1e6:.2f} MB", flush=True)


def sample(atoms: Atoms, temperature: float, timestep: float, steps: int, interval: int, rng, label: str) -> list[Atoms]:
    """Run Langevin dynamics and keep a labelled copy of every ``interval``-th frame."""
    frames: list[Atoms] = []
    md = Langevin(atoms, timestep * units.fs, temperature_K=temperature, friction=0.02 / units.fs, rng=rng)

    def keep() -> None:
        frame = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        if np.any(atoms.get_masses() != frame.get_masses()):
            frame.set_masses(atoms.get_masses())
        frame.calc = SinglePointCalculator(frame, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
        frame.info["config_type"] = label
        frame.info["time_fs"] = md.nsteps * timestep
        frames.append(frame)
        print(f"{label} step {md.nsteps} T {atoms.get_temperature():.0f} K E {atoms.get_potential_energy():.3f} eV", flush=True)

    md.attach(keep, interval=interval)
    md.run(steps)
    return frames


def water_box(n_molecules: int, rng: np.random.Generator) -> Atoms:
    """Randomly turned molecules on a face-centred lattice; the liquid is made by the equilibration that follows."""
    length = (n_molecules * 18.015 / 0.602214076 / 0.998) ** (1 / 3)
    sites = [(i, j, k) for i in range(4) for j in range(4) for k in range(4) if (i + j + k) % 2 == 0][:n_molecules]
    template = molecule("H2O")
    template.set_angle(1, 0, 2, 104.52)
    for hydrogen in (1, 2):
        template.set_distance(0, hydrogen, 0.9572, fix=0)
    atoms = Atoms(cell=[length] * 3, pbc=True)
    for site in sites:
        q, r = np.linalg.qr(rng.normal(size=(3, 3)))
        copy = template.copy()
        copy.positions = (copy.positions - copy.positions[0]) @ (q * np.sign(np.diag(r))) + np.array(site) * length / 4
        atoms += copy
    return atoms


def make_water(out: Path) -> None:
    rng = np.random.default_rng(20261121)
    atoms = water_box(32, rng)
    masses = atoms.get_masses()
    masses[atoms.numbers == 1] = DEUTERIUM_MASS
    atoms.set_masses(masses)
    atoms.calc = TBLite(method="GFN1-xTB", verbosity=0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=350, rng=rng)
    sample(atoms, 450, 1.25, 400, 20, rng, "melting")
    sample(atoms, 350, 1.25, 240, 20, rng, "equilibration")
    liquid = sample(atoms, 350, 1.25, 1600, 4, rng, "liquid 350 K")
    write_compressed(out / "water_liquid_350K.extxyz.xz", liquid)
    sample(atoms, 600, 1.25, 80, 20, rng, "heating")
    write_compressed(out / "water_hot_600K.extxyz.xz", sample(atoms, 600, 1.25, 240, 8, rng, "hot 600 K"))


def make_ethanol(out: Path) -> None:
    rng = np.random.default_rng(7)
    atoms = molecule("CH3CH2OH")
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=500, rng=rng)
    sample(atoms, 500, 0.5, 1000, 500, rng, "equilibration")
    write_compressed(out / "ethanol_500K.extxyz.xz", sample(atoms, 500, 0.5, 12000, 40, rng, "ethanol 500 K"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=["water", "ethanol"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    {"water": make_water, "ethanol": make_ethanol}[arguments.system](arguments.out)


if __name__ == "__main__":
    main()
