"""Solid electrolytes: batch dynamics with our potentials on TorchSim (`gossamer md --engine torchsim`), beside ab initio frames.

    python benchmarks/md/electrolytes.py label --sevennet checkpoint_sevennet_0.pth
    python benchmarks/md/electrolytes.py train lips leignn --minutes 7
    python benchmarks/md/electrolytes.py train argyrodite leignn --minutes 10
    python benchmarks/md/electrolytes.py run lips leignn --picoseconds 20
    python benchmarks/md/electrolytes.py run argyrodite leignn --picoseconds 20

lips: Li6.75P3S11, 83 atoms, 120 labelled frames; replicas start from test frames; 520 K, 1 fs. The reference are the 200 labelled frames,
which are no trajectory: RDFs, no diffusivity.
argyrodite: Li6PS5Cl with all Cl and S exchanged, 416 atoms; replicas start from the first and the middle frame; 500 K, 2 fs. The reference
is an ab initio trajectory of 14 ps without energies or forces, so `label` has imported SevenNet-0 (without `--reference`, so not compared
with the package in that run) label its frames, and the network learns those: structure is compared with ab initio, forces are not.

Langevin with a time of 1 ps, which hardly slows diffusion. RDF overlap and diffusivity are the judge's (`gossamer.checks.liquids`).
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import lzma
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

import gossamer
from gossamer.checks import liquids
from gossamer.simulation.options import MDConfig

HERE = Path(__file__).resolve().parent
SYSTEMS: dict[str, dict[str, Any]] = {
    "lips": dict(temperature=520.0, timestep=1.0, copies=8, pairs=[("Li", "Li"), ("Li", "S"), ("P", "S"), ("S", "S")]),
    "argyrodite": dict(temperature=500.0, timestep=2.0, copies=2, pairs=[("Li", "Li"), ("Li", "S"), ("Li", "Cl"), ("P", "S")]),
}
SKIPPED = 0.1
"""part of each walk before anything is counted"""


def lips(data: Path, *parts: str) -> list[Atoms]:
    """Labelled frames of Li6.75P3S11."""
    found: list[Atoms] = []
    for part in parts:
        text = lzma.decompress((data / "lips" / f"lips_{part}.extxyz.xz").read_bytes()).decode()
        found += ase.io.read(io.StringIO(text), ":", format="extxyz")
    return found


def argyrodite(data: Path) -> tuple[list[Atoms], float]:
    """Frames of the ab initio trajectory, and ps between them (50 steps of 2 fs)."""
    arrays = np.load(data / "argyrodite_aimd" / "li6ps5cl_100p_run1_traj.npz")
    return [Atoms(arrays["numbers"], cell=arrays["cell_A"], pbc=True, scaled_positions=f) for f in arrays["frac"]], 0.1


def label(arguments: argparse.Namespace) -> None:
    """Frames of the argyrodite with SevenNet-0's energies, forces and stresses."""
    potential = arguments.runs / "sevennet0.safetensors"
    if not potential.exists():
        gossamer.import_potential(arguments.sevennet, potential, elements="Li,P,S,Cl")
    calculator = gossamer.Calculator(potential)
    labelled = []
    for atoms in argyrodite(arguments.data)[0]:
        atoms.calc = calculator
        atoms.get_stress()
        frame = atoms.copy()
        frame.calc = SinglePointCalculator(frame, **{k: calculator.results[k] for k in ("energy", "forces", "stress")})
        labelled.append(frame)
    ase.io.write(arguments.runs / "argyrodite.extxyz", labelled)


def train(arguments: argparse.Namespace) -> None:
    """`gossamer fit` for so many minutes, and for lips the errors on test frames."""
    file = arguments.runs / f"{arguments.system}.extxyz"
    if arguments.system == "lips":
        ase.io.write(file, lips(arguments.data, "train", "val"))
        ase.io.write(arguments.runs / "lips_test.extxyz", lips(arguments.data, "test"))
    folder = arguments.runs / f"{arguments.system}_{arguments.network}"
    gossamer.fit(file, arguments.network, folder, arguments.minutes)
    if arguments.system == "lips":
        gossamer.evaluate(folder / "potential.safetensors", arguments.runs / "lips_test.extxyz")


def run(arguments: argparse.Namespace) -> None:
    """Walk all replicas at once, then compare; going on where the folder's walks are."""
    torch.set_num_threads(1)
    name, system = f"{arguments.system}_{arguments.network}", SYSTEMS[arguments.system]
    if arguments.system == "lips":
        reference, spacing = lips(arguments.data, "train", "val", "test"), None
        starts = lips(arguments.data, "test")[:: 80 // system["copies"]][: system["copies"]]
    else:
        reference, spacing = argyrodite(arguments.data)
        starts = [reference[0], reference[len(reference) // 2]]
    for atoms in starts:
        atoms.calc = None
    folder = arguments.runs / "md" / name
    folder.mkdir(parents=True, exist_ok=True)
    ase.io.write(folder.parent / f"{name}.extxyz", starts)
    steps = round(1000 * arguments.picoseconds / system["timestep"])
    config = MDConfig(
        engine="torchsim", all_frames=True, out=folder, steps=steps, timestep=system["timestep"], temperature=system["temperature"],
        thermostat_time=1000.0, interval=50, resume=True,
    )  # fmt: skip
    taken = sum(steps - _done(folder / f"{name}-{k}" / "state.npz") for k in range(len(starts)))
    cpu = time.process_time()
    answers = gossamer.md_files(arguments.runs / name / "potential.safetensors", [folder.parent / f"{name}.extxyz"], config)
    spent = time.process_time() - cpu
    record = compared(answers, system, reference, spacing, config)
    record |= {
        "system": arguments.system, "network": arguments.network, "atoms": len(starts[0]),
        "cpu_ms_per_step_of_a_structure": 1000 * spent / max(taken, 1), "steps": steps, "date": datetime.date.today().isoformat(),
        "versions": {"gossamer": gossamer.__version__, "torch": torch.__version__},
    }  # fmt: skip
    (HERE / "electrolytes").mkdir(exist_ok=True)
    (HERE / "electrolytes" / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def _done(state: Path) -> int:
    """Steps of a walk that is resumed."""
    if not state.exists():
        return 0
    with np.load(state, allow_pickle=False) as stored:
        return int(stored["integrator.nsteps"])


def compared(
    answers: list[dict[str, Any]], system: dict[str, Any], reference: list[Atoms], spacing: float | None, config: MDConfig
) -> dict[str, Any]:
    """Overlaps of RDFs over all replicas, and diffusivities of Li: means over replicas and their standard errors."""
    interval = config.interval * config.timestep / 1000
    walks = [ase.io.read(Path(a["out"]) / "trajectory.traj", ":") for a in answers]
    settled = [walk[int(SKIPPED * len(walk)) :] for walk in walks]
    frames = [frame for walk in settled for frame in walk[:: max(1, round(0.5 / interval))]]  # every half ps: others are alike
    record: dict[str, Any] = {
        "temperature_K": [a["mean_temperature_K"] for a in answers], "picoseconds": [a["time_ps"] for a in answers],
        "broken": [a["broken"] for a in answers], "frames": len(frames),
        "rdf_error": liquids.rdf_error(liquids.rdf(frames)[1], liquids.rdf(reference)[1]),
    }  # fmt: skip
    for pair in system["pairs"]:
        ours, theirs = (liquids.rdf(part, 6.0, 150, pair)[1] for part in (frames, reference))
        halves = [liquids.rdf(part, 6.0, 150, pair)[1] for part in (reference[: len(reference) // 2], reference[len(reference) // 2 :])]
        record[f"overlap_{'-'.join(pair)}"] = liquids.rdf_overlap(ours, theirs)
        record[f"overlap_{'-'.join(pair)}_of_the_reference_with_itself"] = liquids.rdf_overlap(*halves)

    def diffusivity(walk: list[Atoms], step: float) -> tuple[float, float]:
        lithium = np.array(walk[0].get_chemical_symbols()) == "Li"
        return liquids.diffusivity_blocks(liquids.unwrapped_positions(walk), walk[0].get_masses(), lithium, step)

    each = [diffusivity(walk, interval)[0] for walk in settled]
    record["diffusivity_1e-9_m2_per_s"] = float(np.mean(each))
    record["diffusivity_error"] = float(np.std(each, ddof=1) / np.sqrt(len(each)))
    record["diffusivity_each"] = each
    if spacing is not None:
        record["diffusivity_reference"], record["diffusivity_reference_error"] = diffusivity(reference, spacing)
        n = round(len(settled[0]) * interval / spacing)  # the same function of pieces as long as our walks: short ones see more
        pieces = [reference[k : k + n] for k in range(0, len(reference) - n + 1, max(1, n // 2))]
        if n >= 20 and len(pieces) > 1:
            record["diffusivity_reference_of_this_length"] = float(np.mean([diffusivity(piece, spacing)[0] for piece in pieces]))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["label", "train", "run"])
    parser.add_argument("system", nargs="?", choices=list(SYSTEMS), default="argyrodite")
    parser.add_argument("network", nargs="?", default="leignn")
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "electrolytes")
    parser.add_argument("--sevennet", type=Path, help="checkpoint_sevennet_0.pth, as the package sevenn brings it")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--picoseconds", type=float, default=20.0, help="of each replica")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    {"label": label, "train": train, "run": run}[arguments.action](arguments)


if __name__ == "__main__":
    main()
