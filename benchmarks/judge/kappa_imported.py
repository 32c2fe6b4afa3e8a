"""κ_SRME of an imported potential on the crystals of the phononDB set that have a reference; goes on where it was stopped.

    python benchmarks/judge/kappa_imported.py FILE ../shared/data/phonondb103 --minutes 120 [--modal PBE]

FILE is what `gossamer import` reads, ../shared/data/phonondb103 the folder of phonondb103_structures.extxyz.xz and
phonondb103_kappa_pbe_ref82.json.xz. Rocksalt and zincblende crystals take turns, with a wurtzite (which takes five times as long) after every third pair,
so that as many as time allows stand for all; results go to kappa_imported.json. Beside the plain mean, "weighted" is that of the three
structures, each by its share of the 82.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from gossamer.checks.thermal_conductivity import conductivity, read_references, relative_errors
from gossamer.data.atoms import read_frames
from gossamer.imports import read_potential
from gossamer.imports.contract import ImportOptions
from gossamer.imports.inert import open_tree
from gossamer.simulation.calculator import Calculator

OUT = Path(__file__).with_suffix(".json")


WURTZITE = 186
ROUNDS = 3
"""of rocksalt and zincblende, for one wurtzite"""


def alternated(crystals: list[Atoms]) -> list[Atoms]:
    """The crystals with those of each space group in turn."""
    groups: dict[int, list[Atoms]] = {}
    for atoms in crystals:
        groups.setdefault(int(atoms.info["symm.no"]), []).append(atoms)
    turn = {
        id(a): (ROUNDS * (k + 1) if group == WURTZITE else k, -group) for group, members in groups.items() for k, a in enumerate(members)
    }
    return sorted(crystals, key=lambda a: turn[id(a)])


def weighted(found: dict[str, Any], crystals: list[Atoms]) -> float:
    """Mean κ_SRME of each structure, weighted by how many of the crystals have it."""
    counts = Counter(int(a.info["symm.no"]) for a in crystals)
    means = {
        group: np.mean([c["srme"] for c in found.values() if c["space_group"] == group])
        for group in {c["space_group"] for c in found.values()}
    }
    return float(sum(counts[g] * m for g, m in means.items()) / sum(counts[g] for g in means))


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
            "name": str(atoms.info.get("name")), "space_group": int(atoms.info["symm.no"]), "kappa": float(result["kappa"]) if np.isfinite(result["kappa"]) else None,
            "lowest_THz": round(float(result["lowest_frequency"]), 3), "same_symmetry": bool(result["same_symmetry"]), "reference": references[key]["kappa"], **{k: round(v, 4) for k, v in errors.items()}, "cpu_seconds": round(time.process_time() - start, 1),
        }  # fmt: skip
        values = [c["srme"] for c in found["crystals"].values()]
        found["mean_srme"], found["n"] = round(float(np.mean(values)), 4), len(values)
        found["weighted"] = round(weighted(found["crystals"], crystals), 4)
        OUT.write_text(json.dumps(found, indent=1) + "\n")
        print(found["crystals"][key], "mean", found["mean_srme"], "weighted", found["weighted"], "of", found["n"], flush=True)


if __name__ == "__main__":
    main()
