"""κ_SRME of an imported potential on the crystals of the phononDB set that have a reference; goes on where it was stopped.

    python benchmarks/judge/kappa_imported.py FILE ../shared/data/phonondb103 --minutes 120 [--modal PBE]

FILE is what `gossamer import` reads, ../shared/data/phonondb103 the folder of phonondb103_structures.extxyz.xz and
phonondb103_kappa_pbe_ref82.json.xz. Rocksalt, zincblende and wurtzite crystals take turns, so that as many as time allows stand for all;
results go to kappa_imported.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from ase import Atoms

from gossamer.checks.thermal_conductivity import conductivity, read_references, relative_errors
from gossamer.data.atoms import read_frames
from gossamer.imports import read_potential
from gossamer.imports.contract import ImportOptions
from gossamer.imports.inert import open_tree
from gossamer.simulation.calculator import Calculator

OUT = Path(__file__).with_suffix(".json")


def alternated(crystals: list[Atoms]) -> list[Atoms]:
    """The crystals with those of each space group in turn."""
    groups: dict[int, list[Atoms]] = {}
    for atoms in crystals:
        groups.setdefault(int(atoms.info["symm.no"]), []).append(atoms)
    longest = max(map(len, groups.values()))
    return [group[k] for k in range(longest) for _, group in sorted(groups.items(), reverse=True) if k < len(group)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--modal")
    arguments = parser.parse_args()
    began = time.perf_counter()
    _, potential = read_potential(open_tree(arguments.file), ImportOptions(modal=arguments.modal))
    references = read_references(arguments.data / "phonondb103_kappa_pbe_ref82.json.xz")
    crystals = [c for c in read_frames(arguments.data / "phonondb103_structures.extxyz.xz") if c.info["mp_id"] in references]
    crystals = alternated(crystals)
    found = json.loads(OUT.read_text()) if OUT.exists() else {"file": Path(arguments.file).name, "crystals": {}}
    calculator = Calculator(potential, way="kernels")
    for atoms in crystals:
        key = atoms.info["mp_id"]
        if key in found["crystals"]:
            continue
        if time.perf_counter() - began > 60 * arguments.minutes:
            break
        start = time.process_time()
        result = conductivity(calculator, atoms)
        errors = relative_errors(result, references[key])
        found["crystals"][key] = {
            "name": str(atoms.info.get("name")), "space_group": int(atoms.info["symm.no"]), "kappa": float(result["kappa"]),
            "lowest_THz": round(float(result["lowest_frequency"]), 3), "same_symmetry": bool(result["same_symmetry"]), "reference": references[key]["kappa"], **{k: round(v, 4) for k, v in errors.items()}, "cpu_seconds": round(time.process_time() - start, 1),
        }  # fmt: skip
        values = [c["srme"] for c in found["crystals"].values()]
        found["mean_srme"], found["n"] = round(float(np.mean(values)), 4), len(values)
        OUT.write_text(json.dumps(found, indent=1) + "\n")
        print(found["crystals"][key], "mean", found["mean_srme"], "of", found["n"], flush=True)


if __name__ == "__main__":
    main()
