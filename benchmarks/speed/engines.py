"""Our potentials in other engines against the ASE calculator: OpenMM, i-PI, and `gossamer md` on many structures; in one run.

    python benchmarks/speed/engines.py [openmm] [ipi] [md] [--way kernels] [--out engines.md]

LEIGNN in its default size with random weights, float32, one thread, CPU time (smaller of two). openmm: 192 atoms of water, Langevin, ms
per step, OpenMM's platform CPU with one thread. ipi: path integrals of hexanol (21 atoms), ms per step of all beads, by i-PI itself, beads as
one batch and one after the other. md: small crystals of water as in torchsim.py, ms per step of a structure, logs and trajectories included.
Needs gossamer[openmm,ipi,torchsim].
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.md.langevinbaoab import LangevinBAOAB
from structures import hexanol, ice, water

import gossamer
from gossamer.config import make_config
from gossamer.data.statistics import Statistics
from gossamer.potential import Potential
from gossamer.simulation.options import MDConfig

HERE = Path(__file__).resolve().parent


def potential(elements: list[str]) -> Potential:
    torch.manual_seed(0)
    config = make_config({"data": {"train": "-"}, "model": {"name": "leignn"}}).model
    return Potential(config, Statistics(elements=elements, reference_energies=dict.fromkeys(elements, 0.0), mean_neighbors=40.0))


def per_step(run: Callable[[int], object], few: int, many: int) -> float:
    """CPU ms of a step: what more steps cost, so that starts do not count; the smaller of two."""
    found = []
    run(few)
    for _ in range(2):
        marks = [time.process_time()]
        for n in (few, many):
            run(n)
            marks.append(time.process_time())
        found.append(((marks[2] - marks[1]) - (marks[1] - marks[0])) / (many - few))
    return 1000 * min(found)


def openmm(way: str) -> list[str]:
    import openmm
    from openmm import unit
    from openmmml import MLPotential

    from gossamer.simulation.openmm import from_ase

    atoms, model = water(), potential(["H", "O"])
    topology, positions, _ = from_ase(atoms)
    system = MLPotential("gossamer", modelPath=model, way=way).createSystem(topology)
    integrator = openmm.LangevinMiddleIntegrator(300, 1 / unit.picosecond, 0.5 * unit.femtosecond)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("CPU"), {"Threads": "1"})
    context.setPositions(positions)
    theirs = per_step(integrator.step, 1, 31)
    atoms.calc = gossamer.Calculator(model, way=way)
    dynamics = LangevinBAOAB(atoms, 0.5 * units.fs, temperature_K=300, T_tau=1000 * units.fs, rng=np.random.default_rng(0))
    ours = per_step(dynamics.run, 1, 31)
    return [f"| OpenMM {version('openmm')}, 192 atoms, Langevin | {theirs:.2f} | ASE {ours:.2f} | {ours / theirs:.2f} |"]


def ipi(way: str, beads: int = 16) -> list[str]:
    from ipi.scripting import InteractiveSimulation

    text = (HERE.parents[1] / "examples" / "ipi" / "input.xml").read_text()
    found = {}
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):  # i-PI leaves restart files where it runs
        folder = Path(work)
        start = hexanol()
        start.center(vacuum=6)
        ase.io.write(folder / "start.xyz", start, format="extxyz")
        gossamer.save(potential(["H", "C", "O"]), folder / "potential.safetensors")
        for name in ("start.xyz", "potential.safetensors"):
            text = text.replace(f" {name}", f" {folder / name}")
        text = text.replace("gossamer_driver.py", str(HERE.parents[1] / "examples" / "ipi" / "gossamer_driver.py"))
        text = text.replace("template:", f"way: {way}, template:").replace("nbeads='16'", f"nbeads='{beads}'")
        for batch in (beads, 1):
            simulation = InteractiveSimulation(
                text.replace("<batch_size>16<", f"<batch_size>{batch}<").replace("prefix='run'", f"prefix='{folder}/{batch}'")
            )
            found[batch] = per_step(lambda n, run=simulation.run: run(n, write_outputs=False), 1, 11)
    return [
        f"| i-PI {version('ipi')}, 21 atoms, {beads} beads as one batch | {found[beads]:.2f} | one after the other {found[1]:.2f} | {found[1] / found[beads]:.1f} |"
    ]


def md(way: str) -> list[str]:
    lines, model = [], potential(["H", "O"])
    for n in (20, 100):
        structures = [ice(k) for k in range(n)]
        spent = {}
        for engine, few in (("torchsim", structures), ("ase", structures[:6])):

            def run(steps: int, engine: str = engine, chosen: list[Atoms] = few) -> None:
                with tempfile.TemporaryDirectory() as work:
                    ase.io.write(Path(work) / "many.extxyz", chosen)
                    options = MDConfig(engine=engine, all_frames=True, out=Path(work) / "md", steps=steps, way=way)
                    gossamer.md_files(model, [Path(work) / "many.extxyz"], options, progress=False)

            spent[engine] = per_step(run, 20, 60) / len(few)
        lines.append(
            f"| gossamer md, {n} structures, {sum(map(len, structures))} atoms | {spent['torchsim']:.2f} | one after the other {spent['ase']:.2f} | {spent['ase'] / spent['torchsim']:.1f} |"
        )
    return lines


PARTS = {"openmm": openmm, "ipi": ipi, "md": md}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"among {', '.join(PARTS)} (default: all)")
    parser.add_argument("--way", default="kernels")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [f"{datetime.date.today().isoformat()}, torch {torch.__version__}, LEIGNN, way {arguments.way}, one thread, CPU ms.", "",
             "| engine | ms | beside | ratio |", "|---|---|---|---|"]  # fmt: skip
    for part in arguments.parts or PARTS:
        lines += PARTS[part](arguments.way)
        print(lines[-1], flush=True)
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
