"""Molecular dynamics with the potentials of benchmarks/accuracy, per "Forces are not enough" (Fu et al., TMLR 2023).

    python benchmarks/md/run.py --data ../shared/data water --picoseconds 5
    python benchmarks/md/run.py --table

water: 192 atoms, Nosé-Hoover, 330 K (the temperature of the labelled frames), 0.5 fs; RDF against the labelled frames, 2 ps windows.
lips: 83 atoms, Nosé-Hoover, 520 K, 0.25 fs, thermostat time 20 steps; RDF against the labelled frames (and rdf/lips_rdf.npz), 1 ps windows.
methane: one molecule, Nosé-Hoover, 300 K, 0.5 fs; h(r) against the labelled frames, bonds within 0.5 Å.
Then NVE at 0.5 and 1 fs (LiPS: 0.25 and 0.5). The published protocol runs 50 ps; how long it was run here stands in each row.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import ase.io
import numpy as np
import torch

import gossamer
from gossamer.checks import liquids
from gossamer.checks.conservation import nve_conservation
from gossamer.checks.run_page import Report, plot_curves, plot_traces
from gossamer.data.readers import read_structures
from gossamer.simulation.guard import find_bonds

HERE = Path(__file__).resolve().parent
SYSTEMS: dict[str, dict[str, Any]] = {
    "water": dict(files=["water_pbe0ts_330K/water_pbe0ts_train.extxyz.xz", "water_pbe0ts_330K/water_pbe0ts_test.extxyz.xz"], start=-1,
                  temperature=330.0, timestep=0.5, thermostat_time=50.0, interval=10, window=2.0,
                  pairs=[("O", "O"), ("O", "H"), ("H", "H")], diffusing="O"),
    "lips": dict(files=["lips/lips_train.extxyz.xz", "lips/lips_val.extxyz.xz", "lips/lips_test.extxyz.xz"], start=-1, temperature=520.0,
                 timestep=0.25, thermostat_time=5.0, interval=50, window=1.0,
                 pairs=[("Li", "Li"), ("Li", "S"), ("P", "S")], diffusing="Li"),
    "methane": dict(files=["no_upstream_licence/ch4/ch4_aimd_300K.extxyz.xz"], start=0, temperature=300.0, timestep=0.5,
                    thermostat_time=50.0, interval=10, window=2.0, pairs=[], diffusing=None),
}  # fmt: skip


def cost_of_a_step(potential: Path, atoms: Any) -> float:
    """CPU milliseconds of energy and forces on one thread, after a small move, neighbour list included."""
    atoms, rng = atoms.copy(), np.random.default_rng(0)
    atoms.calc = gossamer.Calculator(potential)
    atoms.get_forces()
    began = time.process_time()
    for _ in range(20):
        atoms.positions += rng.normal(scale=1e-3, size=atoms.positions.shape)
        atoms.get_forces()
    return (time.process_time() - began) / 20 * 1000


def simulate(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    s = SYSTEMS[name]
    frames = [x.to_ase() for file in s["files"] for x in read_structures(arguments.data / file)]
    start = frames[s["start"]].copy()
    potential = arguments.runs / f"{name}-conservative" / "potential.safetensors"
    folder = arguments.runs.parent / "md" / name
    steps = round(arguments.picoseconds * 1000 / s["timestep"])
    stretch = 0.5 if name == "methane" else None
    result = gossamer.md(potential, start, temperature=s["temperature"], steps=steps, timestep=s["timestep"], ensemble="nose-hoover", out=folder,
                         interval=s["interval"], thermostat_time=s["thermostat_time"], max_bond_stretch=stretch, resume=(folder / "state.npz").exists())  # fmt: skip
    trajectory = ase.io.read(folder / "trajectory.traj", ":")
    interval = s["interval"] * s["timestep"] / 1000
    settled = trajectory[len(trajectory) // 10 :]
    record: dict[str, Any] = {"name": name, "run": result, "ms_per_step": cost_of_a_step(potential, start)}
    figures = []
    if name == "methane":
        r, h = liquids.distance_distribution(settled)
        _, reference = liquids.distance_distribution(frames)
        record["h_error"] = float(np.abs(h - reference).sum() * (r[1] - r[0]))
        record["stability_ps"] = liquids.bond_stability_time(trajectory, find_bonds(trajectory[0]), interval)
        shown = r < 3
        figures.append((plot_curves(r[shown], [(h[shown], "potential")], "r, Å", "h(r), 1/Å", (r[shown], reference[shown], "labelled frames")),
                        f"Distances; integrated difference {record['h_error']:.3f}."))  # fmt: skip
    else:
        r, g = liquids.rdf(settled)
        _, reference = liquids.rdf(frames)
        record["rdf_error"] = liquids.rdf_error(g, reference)
        record["stability_ps"] = liquids.stability_time(trajectory, reference, interval, s["window"])
        figures.append((plot_curves(r, [(g, "potential")], "r, Å", "g(r), all pairs", (r, reference, "labelled frames")),
                        f"RDF over all pairs; error {record['rdf_error']:.3f}."))  # fmt: skip
        for a, b in s["pairs"]:
            rp, gp = liquids.rdf(settled, 6.0, 150, (a, b))
            _, gr = liquids.rdf(frames, 6.0, 150, (a, b))
            record[f"overlap_{a}{b}"] = liquids.rdf_overlap(gp, gr)
            figures.append((plot_curves(rp, [(gp, "potential")], "r, Å", f"g(r) {a}-{b}", (rp, gr, "labelled frames")),
                            f"{a}-{b}: overlap {record[f'overlap_{a}{b}']:.3f}."))  # fmt: skip
        selected = np.array(trajectory[0].get_chemical_symbols()) == s["diffusing"]
        unwrapped, masses = liquids.unwrapped_positions(settled), trajectory[0].get_masses()
        msd = liquids.mean_squared_displacement(unwrapped, masses, selected)
        mean, error = liquids.diffusivity_blocks(unwrapped, masses, selected, interval)
        record["diffusivity_1e-9_m2_per_s"], record["diffusivity_error"] = mean, error
        half = len(msd) // 2
        figures.append((plot_curves(np.arange(half) * interval, [(msd[:half], "potential")], "time, ps", f"MSD of {s['diffusing']}, Å²"),
                        f"D = {mean:.2f} ± {error:.2f} 1e-9 m²/s (four blocks of this short run)."))  # fmt: skip
    record["nve"] = nve_conservation(gossamer.Calculator(potential), trajectory[-1], timestep=s["timestep"], picoseconds=arguments.nve)
    record |= {"picoseconds": result["time_ps"], "date": datetime.date.today().isoformat(), "machine": f"{os.cpu_count()} cores, one thread",
               "versions": {"gossamer": gossamer.__version__, "torch": torch.__version__}}  # fmt: skip
    del record["run"]["out"]
    report = Report(f"{name}: molecular dynamics", f"{result['time_ps']:g} ps at {s['temperature']:g} K, gossamer {gossamer.__version__}")
    broken = result["broken"]
    report.verdict("failed" if broken else "passed", broken or f"stable over {result['time_ps']:g} ps")
    flat = {k: v for k, v in {**record, **record["nve"]}.items() if isinstance(v, float)}
    report.table(["quantity", "value"], list(flat.items()))
    report.figures([*figures, *plot_traces(folder / "log.csv")])
    report.write(HERE / "results" / f"{name}.html")
    (HERE / "results" / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def table() -> str:
    lines = [
        "| system | ps run | stable ps | mean T K | RDF error (h(r) for methane) | D 1e-9 m²/s | NVE drift meV/atom/ps | fluctuation ratio | CPU ms/step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted((HERE / "results").glob("*.json")):
        r = json.loads(path.read_text())
        d = f"{r['diffusivity_1e-9_m2_per_s']:.2f} ± {r['diffusivity_error']:.2f}" if "diffusivity_error" in r else "-"
        lines.append(
            f"| {r['name']} | {r['picoseconds']:g} | {r['stability_ps']:g} | {r['run']['mean_temperature_K']:.0f} | "
            f"{r.get('rdf_error', r.get('h_error')):.3f} | {d} | {r['nve']['drift_meV_per_atom_per_ps']:.4f} | "
            f"{r['nve']['fluctuation_ratio']:.2f} | {r['ms_per_step']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"systems: {', '.join(SYSTEMS)}")
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "accuracy")
    parser.add_argument("--picoseconds", type=float, default=5.0)
    parser.add_argument("--nve", type=float, default=1.0, help="ps of each constant-energy run")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    (HERE / "results").mkdir(exist_ok=True)
    for name in arguments.names:
        print(json.dumps(simulate(name, arguments)), flush=True)
    (HERE / "results.md").write_text(table())
    print(table())


if __name__ == "__main__":
    main()
