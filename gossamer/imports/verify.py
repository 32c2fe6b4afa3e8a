"""Is an imported potential the one of its file? Compared with the package that made it, in that package's own environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, covalent_radii

from gossamer.data.structure import Structure, as_structure
from gossamer.engine.engine import Engine
from gossamer.imports.contract import ImportOptions
from gossamer.imports.reference import SOURCES as REFERENCES
from gossamer.potential import DTYPES, Potential

TOLERANCES = {"float32": (1e-6, 2e-5), "kernels": (1e-6, 3e-5), "float64": (1e-10, 1e-10)}
"""of energies (eV/atom) and of forces (eV/Å) where energies are below 10 eV/atom and forces below 10 eV/Å, beyond that in proportion;
of stresses as of forces, times atoms over volume and one Å. In float32 they may be off by `NOISE` times what rounding is on the structure: of
ours the distance of float32 from float64, of the package's likewise or, where it has no float64, the largest from what it says of the
structure in other orientations"""
NOISE = 3.0
SCALE = 10.0
LARGEST = 100.0
"""eV/Å; where the package itself finds larger forces in float32, rounding has grown beyond any proportion: such a structure is left out"""
FEWEST = 4
"""structures that must remain"""
CALM = 20.0
"""eV/Å; structures with larger forces are made larger, at most `CALMING` times"""
CALMING = 12
LATTICES = (("sc", 2.0), ("bcc", 2.0), ("fcc", 2.0), ("diamond", 2.0))
STRESS = "stress_eV_per_A3"
SCRIPT = Path(__file__).with_name("reference.py")


def structures(elements: Sequence[str], cutoff: float, seed: int = 0) -> list[Structure]:
    """A dozen rattled structures in which every element occurs: four molecules in vacuum, eight strained crystals. Always the same.

    Args:
        elements: Chemical symbols.
        cutoff: Å; molecules are smaller, crystals need images beyond their cell.
        seed: Of the rattling.
    """
    rng = np.random.default_rng(seed)
    numbers = np.array([atomic_numbers[e] for e in elements])
    dealt = iter(np.resize(rng.permutation(numbers), 12 * max(16, len(numbers))).tolist())
    found = []
    for k in range(12):
        if k < 4:
            atoms = Atoms("H" * (3 + 2 * k), rng.normal(size=(3 + 2 * k, 3)))
        else:
            lattice, edge = LATTICES[k % 4]
            atoms = bulk("Cu", lattice, a=edge, cubic=True).repeat(1 if lattice in ("fcc", "diamond") else 2)
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.03 * rng.normal(size=(3, 3))), scale_atoms=True)
        atoms.numbers = np.array([next(dealt) for _ in atoms])
        atoms = spaced(atoms, 1.15)
        atoms.rattle(0.05, rng=rng)
        found.append(as_structure(spaced(atoms, 0.95 + 0.05 * (k % 4)), f"{'molecule' if k < 4 else lattice} {k + 1}"))
    return found


def spaced(atoms: Atoms, closest: float) -> Atoms:
    """The structure scaled so that the closest pair is at so many times the sum of its covalent radii."""
    wide = atoms.repeat(3) if atoms.pbc.all() else atoms
    radii = covalent_radii[wide.numbers]
    inside = slice(len(wide) // 2, len(wide) // 2 + len(atoms)) if atoms.pbc.all() else slice(None)  # the middle copy
    lengths = np.linalg.norm(wide.positions[inside, None] - wide.positions[None], axis=2)
    ratios = lengths / (radii[inside, None] + radii[None])
    factor = closest / ratios[lengths > 1e-6].min()
    scaled = atoms.copy()
    if atoms.pbc.all():
        scaled.set_cell(atoms.cell.array * factor, scale_atoms=True)
    else:
        scaled.positions *= factor
    return scaled


def calmed(potential: Potential, check: Sequence[Structure]) -> list[Structure]:
    """The structures with violent ones made larger, 4 % at a time, until no force exceeds ``CALM``.

    Atoms at distances that a potential never saw may feel anything (1e9 eV/Å for H and O in a published one), where float32 proves nothing.

    Args:
        potential: The imported one. Where the import is wrong, its package still finds other energies for the structures chosen here.
        check: Structures to begin from.
    """
    found, violent = list(check), list(range(len(check)))
    for _ in range(CALMING):
        predicted = potential.predict([found[k] for k in violent], stress=False)
        violent = [k for k, p in zip(violent, predicted, strict=True) if float(np.abs(p["forces"]).max()) > CALM]
        if not violent:
            break
        for k in violent:
            found[k] = replace(found[k], positions=1.04 * found[k].positions, cell=1.04 * found[k].cell)
    return found


def ask_reference(
    python: Path | str, source: str, path: Path, options: ImportOptions, check: Sequence[Structure], seconds: float
) -> dict[str, np.ndarray]:
    """What the package itself says of these structures, in its own environment.

    The script `reference.py` is given to the interpreter on standard input: the environment needs ASE, numpy and the package, and nothing of
    ours. There the package loads the file in its own way, which for most packages RUNS what is in it.

    Args:
        python: Interpreter.
        source: Name of the source.
        path: Its file.
        options: Modal, head, elements.
        check: Structures.
        seconds: After which it is given up.

    Raises:
        FileNotFoundError: no such interpreter.
        ValueError: the package has no calculator, the script failed, or its answer is not one.
    """
    if source not in REFERENCES:
        raise ValueError(f"'{path}' cannot be compared: its package ({source}) has no ASE calculator. Leave --reference out.")
    command = shutil.which(os.fspath(python))
    if command is None:
        raise FileNotFoundError(f"There is no program '{python}'. --reference takes the Python of the other package's environment.")
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.npz", Path(folder) / "answer.npz"
        what = {"source": source, "path": str(path.resolve()), "modal": options.modal, "head": options.head, "given": options.given}
        np.savez(
            request,
            what=np.array(json.dumps(what)),
            sizes=np.array([s.n_atoms for s in check]),
            numbers=np.concatenate([s.atomic_numbers for s in check]),
            positions=np.concatenate([s.positions for s in check]),
            cells=np.array([s.cell for s in check]),
            pbc=np.array([s.pbc for s in check]),
        )
        try:
            done = subprocess.run(
                [os.path.abspath(command), "-", str(request), str(answer)],  # not its target: that of an environment is a link
                input=SCRIPT.read_text(encoding="utf-8"), text=True, cwd=folder, capture_output=True, timeout=seconds, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ValueError(f"the reference took more than {seconds:.0f} s on {len(check)} small structures and was ended.") from None
        if done.returncode or not answer.exists():
            said = "\n".join(done.stderr.strip().splitlines()[-12:])
            raise ValueError(f"'{python}' could not evaluate '{path}' with its own package:\n{said}")
        with np.load(answer, allow_pickle=False) as data:
            return {k: data[k] for k in data.files}


def predictions(answer: Mapping[str, np.ndarray], check: Sequence[Structure], precision: str = "native") -> list[dict[str, Any]]:
    """The reference's answer by structure, in our shapes: energy (eV), forces (eV/Å), stress (eV/Å³; where it has one)."""
    ends = np.cumsum([s.n_atoms for s in check])
    found = []
    for k, structure in enumerate(check):
        xx, yy, zz, yz, xz, xy = answer[f"{precision}.stress"][k]
        stress = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
        found.append(
            {
                "energy": float(answer[f"{precision}.energy"][k]),
                "forces": answer[f"{precision}.forces"][ends[k] - structure.n_atoms : ends[k]],
                "stress": None if np.isnan(stress).any() else stress,
            }
        )
    return found


def compare(potential: Potential, check: Sequence[Structure], answer: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The largest differences from the reference, by precision: of the file, with kernels, and in float64 where the package has it.

    Of what was not compared (stress, where no structure has one of both; kernels that cannot be built) the report says so in words.

    Raises:
        ValueError: they are larger than rounding; with a table of what differs.
    """
    native = str(potential.dtype).removeprefix("torch.")
    report: dict[str, Any] = {"package": str(answer["package"]), "version": str(answer["version"]), "structures": len(check)}
    problems = []
    runs: list[tuple[str, str, Any]] = [(native, "native", None)]
    own = [[0.0] * 3] * len(check)  # rounding of ours
    if native == "float32":
        rounded = potential.predict(check, batch_atoms=1)
        potential.network.to(torch.float64)
        exact = potential.predict(check, batch_atoms=1)
        potential.network.to(torch.float32)
        own = [list(_differences(s, a, b).values()) for s, a, b in zip(check, rounded, exact, strict=True)]
    try:
        runs.append(("kernels" if native == "float32" else "float64 kernels", "native", Engine(potential, "kernels")))
    except (RuntimeError, NotImplementedError) as error:
        report["kernels"] = f"not compared: {str(error).splitlines()[0][:120]}"
    if native != "float64" and "float64.energy" in answer:
        runs.append(("float64", "float64", None))
    for label, precision, run in runs:
        potential.network.to(torch.float64 if "float64" in (label, native) else torch.float32)
        ours = potential.predict(check, run=run, batch_atoms=1)
        theirs = predictions(answer, check, precision)
        energy, force = TOLERANCES.get(label, (1e-7, 1e-7))  # a table of radial functions in float64
        same = [name.removesuffix(".energy") for name in answer if name.endswith(".energy") and name != "native.energy"]
        others = [predictions(answer, check, name) for name in same] if precision == "native" else []
        calm = [native != "float32" or float(np.abs(b["forces"]).max()) <= LARGEST for b in theirs]
        report["structures"] = sum(calm) if sum(calm) >= FEWEST else len(check)
        worst: dict[str, float] = {}
        for k, (structure, a, b) in enumerate(zip(check, ours, theirs, strict=True)):
            if not calm[k] and sum(calm) >= FEWEST:
                continue
            differences = _differences(structure, a, b)
            noise = [max(d) for d in zip(*(_differences(structure, b, o[k]).values() for o in others), strict=True)] or [0.0] * 3
            if precision == "native":
                noise = [r + o for r, o in zip(noise, own[k], strict=True)]
            worst |= {name: max(worst.get(name, 0.0), d) for name, d in differences.items() if name != STRESS or _both(a, b)}
            scale = max(1.0, float(np.abs(b["forces"]).max()) / SCALE)
            n, volume = structure.n_atoms, structure.volume or 1.0
            limits = (energy * max(1.0, abs(b["energy"]) / n / SCALE, scale), force * scale, force * scale * max(n / volume, 0.1))
            if any(not d <= max(limit, NOISE * r) for d, limit, r in zip(differences.values(), limits, noise, strict=True)):
                problems.append((label, structure, differences, float(np.abs(b["forces"]).max())))
        report[label] = worst
    if any(isinstance(found, dict) and STRESS not in found for found in report.values()):
        report["stress"] = "not compared: there is no structure of which both gave one"
    potential.network.to(DTYPES[native])
    if problems:
        raise ValueError(_table(problems, report))
    return report


def _differences(structure: Structure, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, float]:
    return {
        "energy_eV_per_atom": abs(a["energy"] - b["energy"]) / structure.n_atoms,
        "forces_eV_per_A": float(np.abs(a["forces"] - b["forces"]).max()),
        STRESS: float(np.abs(a["stress"] - b["stress"]).max()) if _both(a, b) else 0.0,  # of a molecule there is none
    }


def _both(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether both gave a stress."""
    return a["stress"] is not None and b["stress"] is not None


def _table(problems: Sequence[tuple[str, Structure, Mapping[str, float], float]], report: Mapping[str, Any]) -> str:
    lines = [
        f"The imported potential is not the one that {report['package']} {report['version']} computes; nothing was written.",
        f"{'precision':16s}{'structure':14s}{'energy eV/atom':>16s}{'forces eV/Å':>14s}{'stress eV/Å³':>14s}{'largest force':>15s}",
    ]
    for label, structure, found, largest in problems[:20]:
        e, f, s = found.values()
        lines.append(f"{label:16s}{structure.name:14s}{e:16.1e}{f:14.1e}{s:14.1e}{largest:15.3g}")
    return "\n".join(lines)
