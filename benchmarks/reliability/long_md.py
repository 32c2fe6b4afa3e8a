"""A very long simulation: does memory stay, does a step's time stay, does energy drift in float64?

    python benchmarks/reliability/campaign.py long_md --steps 1000000

Ethanol by `gossamer md` in the microcanonical ensemble and as a compiled program, as long runs go, with a PaiNN that is trained first, for half
a minute or, for more than 100,000 steps, six (or with the potential that the variable GOSSAMER_LONG_MD names).
"""

from __future__ import annotations

import csv
import os
import resource
import shutil
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import samples
from common import FINDING

from gossamer.data.atoms import read_frames
from gossamer.files import write_json
from gossamer.fitting import fit
from gossamer.machine import machine, versions
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.md import md

SAMPLES = 40
"""of memory and time"""
LIMITS = {"memory_MB": 20.0, "step_time_ratio": 1.25, "drift_meV_per_atom_per_ns": 5.0}
"""more is a finding: growth of memory over the second nine tenths, late steps beside early ones in CPU time, drift of the
total energy (of runs of 20 ps at least: before that it is the energy's own swing)"""


class Watched(Calculator):
    """A calculator that keeps memory and CPU time as it goes."""

    every = 1000

    def calculate(self, *arguments: Any, **options: Any) -> None:
        super().calculate(*arguments, **options)
        self.count = getattr(self, "count", 0) + 1
        if self.count % self.every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.seen = [*getattr(self, "seen", []), (self.count, time.process_time(), pages * resource.getpagesize() / 1e6)]


def run(count: int, seed: int, minutes: float, out: Path, only: str = "") -> dict[str, Any]:
    """Take so many steps, or as many as the minutes allow by the time of the first thousand; see the module."""
    os.environ.setdefault("GOSSAMER_CACHE", str(out / "cache"))
    folder = out / "long_md"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data = samples.ROOT / "demo" / "data" / "ethanol_500K.extxyz.xz"
    model = Path(os.environ.get("GOSSAMER_LONG_MD", folder / "fit" / "potential.safetensors"))
    if not model.exists():
        fit(
            data, "painn", folder / "fit", minutes=0.5 if count <= 100_000 else 6
        )  # what is trained shortly leaves sanity after some 100 ps
    calculator = Watched(model, dtype="float64", way="program")
    atoms = read_frames(data, 0)[0]
    atoms.calc = None
    options: dict[str, Any] = dict(ensemble="nve", temperature=300, timestep=0.5, seed=seed, progress=False)
    began = time.monotonic()
    md(calculator, atoms, out=folder / "first", steps=1000, interval=100, **options)
    each = (time.monotonic() - began) / 1000
    steps = int(min(count, max(2000, 60 * minutes / each)))
    calculator.count, calculator.seen, calculator.every = 0, [], max(1, steps // SAMPLES)
    interval = max(10, steps // 2000)
    answer = md(calculator, atoms, out=folder / "md", steps=steps, interval=interval, **options)
    with open(folder / "md" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    energy = np.array([float(row["total_energy_eV"]) for row in rows]) * 1000 / len(atoms)
    picoseconds = np.array([float(row["time_fs"]) for row in rows]) / 1000
    slope, _ = np.polyfit(picoseconds, energy, 1)
    counts, times, memory = np.array(calculator.seen).T
    step_ms = 1000 * np.diff(times) / np.diff(counts)
    tenth, half = max(1, len(step_ms) // 10), len(step_ms) // 2
    found = {
        "steps": answer["steps"], "broken": answer["broken"], "picoseconds": round(float(picoseconds[-1]), 2),
        "memory_MB": round(float(memory[-1] - memory[tenth]), 2),
        "step_ms": [round(float(x), 3) for x in (np.median(step_ms[:half]), np.median(step_ms[half:]))],
        "step_time_ratio": round(float(np.median(step_ms[half:]) / np.median(step_ms[:half])), 3),
        "drift_meV_per_atom_per_ns": round(float(1000 * slope), 4),
        "spread_meV_per_atom": round(float(np.std(energy - slope * picoseconds)), 5),
        "mean_temperature_K": answer["mean_temperature_K"],
    }  # fmt: skip
    findings = [{"case": 0, "what": f"{FINDING} {name} is {found[name]}, {limit} allowed"} for name, limit in LIMITS.items()
                if not abs(found[name]) <= limit and (name != "drift_meV_per_atom_per_ns" or picoseconds[-1] >= 20)]  # fmt: skip
    if answer["broken"]:
        findings.append({"case": 0, "what": f"{FINDING} broken: {answer['broken']}"})
    result = {
        "part": "long_md", "seed": seed, "count": count, "done": answer["steps"], "seconds": answer["seconds"], **found,
        "outcomes": {f"{found['memory_MB']} MB, {found['step_time_ratio']} times the time, {found['drift_meV_per_atom_per_ns']} meV/atom/ns": 1},
        "findings": findings, "date": date.today().isoformat(), "machine": machine("cpu"), "versions": versions(["torch", "numpy", "ase"]),
    }  # fmt: skip
    write_json(out / "long_md.json", result)
    print(f"long_md: {found}, {len(findings)} findings", flush=True)
    return result
