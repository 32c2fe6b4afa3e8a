"""Small data sets in the layouts of the public ones, labelled with ASE's effective medium theory.

python tests/small_formats.py FOLDER     # writes s2ef/ (OC20), mptrj.json, reference.db (ISO17), crystals.extxyz
"""

from __future__ import annotations

import io
import json
import lzma
import sys
from pathlib import Path

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms


def label(atoms: Atoms) -> Atoms:
    """Keep energy, forces (also of fixed atoms) and stress of EMT as labels."""
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(apply_constraint=False)}
    if atoms.pbc.all():
        results["stress"] = atoms.get_stress(apply_constraint=False)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def crystals(n: int = 8) -> list[Atoms]:
    """Rattled and strained cells of Cu, Au and Cu3Au."""
    rng = np.random.default_rng(0)
    frames = []
    for k in range(n):
        atoms = bulk("Cu" if k % 2 else "Au", "fcc", a=3.6 if k % 2 else 4.1, cubic=True)
        if k % 3 == 0:
            atoms.numbers[0] = 29
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.normal(scale=0.02, size=(3, 3))), scale_atoms=True)
        atoms.rattle(0.08, seed=k)
        frames.append(label(atoms))
    return frames


def slabs(n: int = 6) -> list[Atoms]:
    """Oxygen on copper, the lower layer fixed."""
    frames = []
    for k in range(n):
        slab = fcc111("Cu", (2, 2, 2), vacuum=6.0, periodic=True)
        add_adsorbate(slab, "O", 1.3 + 0.1 * k, "fcc")
        slab.rattle(0.05, seed=k)
        slab.info.clear()
        slab.set_constraint(FixAtoms([a.index for a in slab if a.tag == 2]))
        frames.append(label(slab))
    return frames


def write_oc20(folder: Path) -> Path:
    """N.extxyz.xz with N.txt.xz, as in the S2EF downloads."""
    folder.mkdir(parents=True, exist_ok=True)
    frames = slabs()
    for k, part in enumerate((frames[:3], frames[3:])):
        text = io.StringIO()
        ase.io.write(text, part, format="extxyz")
        (folder / f"{k}.extxyz.xz").write_bytes(lzma.compress(text.getvalue().encode()))
        lines = "".join(f"random{k},frame{i},{a.get_potential_energy() + 1.0}\n" for i, a in enumerate(part))
        (folder / f"{k}.txt.xz").write_bytes(lzma.compress(lines.encode()))
    return folder


def write_mptrj(path: Path, n: int = 8) -> Path:
    """Materials -> frames -> structure and labels, stress in kbar with the sign of VASP."""
    materials: dict[str, dict] = {}
    for k, atoms in enumerate(crystals(n)):
        scaled = atoms.get_scaled_positions()
        sites = [
            {"species": [{"element": s, "occu": 1}], "abc": x.tolist(), "xyz": p.tolist()}
            for s, x, p in zip(atoms.get_chemical_symbols(), scaled, atoms.positions, strict=True)
        ]
        energy = atoms.get_potential_energy()
        materials.setdefault(f"mp-{k // 2}", {})[f"mp-{k // 2}-0-{k}"] = {
            "structure": {"lattice": {"matrix": atoms.cell.array.tolist()}, "sites": sites}, "uncorrected_total_energy": energy,
            "corrected_total_energy": energy - 1.0, "force": atoms.get_forces().tolist(),
            "stress": (-atoms.get_stress(voigt=False) / 6.2415091e-4).tolist(),
        }  # fmt: skip
    path.write_text(json.dumps(materials))
    return path


def write_iso17(path: Path, n: int = 6) -> Path:
    """A database as schnetpack writes it."""
    with ase.db.connect(str(path)) as database:
        for k in range(n):
            atoms = molecule("CH3CH2OH")
            atoms.rattle(0.05, seed=k)
            label(atoms)
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
            atoms.calc = None
            database.write(atoms, total_energy=energy, data={"atomic_forces": forces})
    return path


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    write_oc20(out / "s2ef")
    write_mptrj(out / "mptrj.json")
    write_iso17(out / "reference.db")
    ase.io.write(out / "crystals.extxyz", crystals())
