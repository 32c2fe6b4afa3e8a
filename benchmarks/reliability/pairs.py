"""Do our own potentials pass our own judge? Short trainings, then curves of two atoms, atoms pushed together, smoothness and the rest.

    python benchmarks/reliability/pairs.py --data ../shared/data --out runs/pairs leignn:ethanol nequip:silicon ...
    python benchmarks/reliability/pairs.py --table runs/pairs > benchmarks/reliability/pairs.md

Each NETWORK:SYSTEM is trained for the CPU time given, with the settings that `gossamer fit` would choose (which counts the clock on the
wall; CPU time leaves other jobs out), then judged at the quick level on frames that it did not train on: as it is ("data"), and the
same weights with the repulsion ending at 0.8 of the bond length and the network asked everywhere ("0.8", the default before). On the
training data the two are equal bit by bit (tests/test_limits.py), so training, too, would have been the same.

"pushed" takes the closest pair of each two elements in a test frame, puts it ever closer, and tells the largest fall of the energy on
the way below the shortest distance in the training data: a hole that atoms fall into. "spike" is the largest change of the force
within 0.05 Å as an atom leaves a bonded pair, 2.5 Å away or farther.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list

import gossamer
from gossamer.checks.candidate import bond_length
from gossamer.config import make_config
from gossamer.data.dataset import open_dataset
from gossamer.engine.engine import Engine
from gossamer.evaluation import evaluate_potential
from gossamer.fitting import choose_settings
from gossamer.potential import Potential, PotentialConfig
from gossamer.runs import train
from gossamer.settings import to_dict

HERE = Path(__file__).resolve().parent
SYSTEMS = {
    "ethanol": ("rmd17/rmd17_ethanol_train.extxyz.xz", "rmd17/rmd17_ethanol_test.extxyz.xz"),
    "water": ("water_pbe0ts_330K/water_pbe0ts_train.extxyz.xz", "water_pbe0ts_330K/water_pbe0ts_test.extxyz.xz"),
    "silicon": ("mlearn/mlearn_Si_train.extxyz.xz", "mlearn/mlearn_Si_test.extxyz.xz"),
    "copper": ("mlearn/mlearn_Cu_train.extxyz.xz", "mlearn/mlearn_Cu_test.extxyz.xz"),
}
CHECKS = ("symmetry", "conservation", "smoothness", "diatomics")


def shortest_distances(frames: list[Atoms]) -> dict[str, float]:
    """Å, by pair of elements."""
    found: dict[str, float] = {}
    for atoms in frames:
        i, j, d = neighbor_list("ijd", atoms, 4.0)
        symbols = np.array(atoms.get_chemical_symbols())
        for a, b in itertools.combinations_with_replacement(sorted(set(symbols)), 2):
            of = d[(symbols[i] == a) & (symbols[j] == b)]
            if len(of):
                found[f"{a}-{b}"] = min(found.get(f"{a}-{b}", 9.0), float(of.min()))
    return found


def pushed_together(calculator: object, frame: Atoms, pair: str, shortest: float) -> float:
    """Largest fall of the energy (eV) as the closest pair of two elements is put closer than ``shortest`` (Å), down to 0.3 Å."""
    a, b = pair.split("-")
    symbols = np.array(frame.get_chemical_symbols())
    distances = frame.get_all_distances(mic=bool(frame.pbc.any()))
    np.fill_diagonal(distances, np.inf)
    distances[np.ix_(symbols != a, range(len(frame)))] = np.inf
    distances[np.ix_(range(len(frame)), symbols != b)] = np.inf
    i, j = np.unravel_index(int(distances.argmin()), distances.shape)
    vector = frame.get_distance(i, j, mic=bool(frame.pbc.any()), vector=True)
    length = float(np.linalg.norm(vector))
    energies = []
    for distance in np.linspace(shortest, 0.3, 80):
        work = frame.copy()
        shift = 0.5 * (length - distance) * vector / length
        work.positions[i] += shift
        work.positions[j] -= shift
        work.calc = calculator
        energies.append(work.get_potential_energy())
    e = np.array(energies)
    return float((np.maximum.accumulate(e) - e).max())


def spike_of_leaving(calculator: object, elements: list[str], cutoff: float) -> float:
    """Largest change of the force (eV/Å) within 0.05 Å as an atom leaves a bonded pair, from 1.5 bond lengths (or 2.5 Å) on."""
    worst = 0.0
    for a, b in itertools.product(elements, repeat=2):
        bond = bond_length(a, b)
        forces = []
        for x in np.arange(max(2.5, 1.5 * bond), cutoff + 0.2, 0.025):
            atoms = Atoms([a, b, a], [[-0.3 * bond, 0.9 * bond, 0], [0, 0, 0], [x, 0, 0]], calculator=calculator)
            forces.append(atoms.get_forces()[2, 0])
        f = np.array(forces)
        worst = max(worst, float(np.abs(f[2:] - f[:-2]).max()))
    return worst


def run(network: str, system: str, data: Path, minutes: float, out: Path, changes: list[str]) -> dict:
    """Train; judge the potential as it is and as it would have been before; returns the record."""
    train_file, test_file = (data / name for name in SYSTEMS[system])
    folder = out / f"{network}-{system}"
    if not (folder / "results.json").exists():
        config = choose_settings(train_file, model=network, out=folder, minutes=minutes)
        settings = make_config(to_dict(config), ["training.clock=cpu", "training.compile=false", *changes])
        train(settings, resume=(folder / "checkpoint.safetensors").exists(), progress=False)
    results = json.loads((folder / "results.json").read_text())
    potential = gossamer.load(folder / "potential.safetensors")
    earlier = Potential(potential.model_config, potential.statistics, PotentialConfig(zbl_radius=0.8)).eval()
    earlier.network.to(potential.dtype).load_state_dict(potential.network.state_dict())
    gossamer.save(earlier, folder / "earlier.safetensors")
    record = {
        "network": network, "system": system, "minutes": minutes, "steps": results["steps"], "step_ms": results["step_ms"], "changes": changes,
        "gossamer": gossamer.__version__, "before": judged(earlier, folder / "earlier.safetensors", train_file, test_file, CHECKS[2:]),
        "after": judged(potential, folder / "potential.safetensors", train_file, test_file, CHECKS),
    }  # fmt: skip
    (out / f"{network}-{system}.json").write_text(json.dumps(record, indent=1, default=float) + "\n")
    return record


def judged(potential: Potential, file: Path, train_file: Path, test_file: Path, checks: Sequence[str]) -> dict:
    """Errors, verdicts, holes and spikes of one potential."""
    test = evaluate_potential(potential, open_dataset(test_file)[:60], run=Engine(potential)).summary()
    verdicts = gossamer.judge(str(file), out=file.with_suffix(""), only=checks, structures=[str(test_file)], all_pairs=True, progress=False)
    (found,) = verdicts.values()
    calculator = gossamer.Calculator(potential)
    frames = ase.io.read(train_file, ":")
    shortest = shortest_distances(frames[:: max(1, len(frames) // 100)])
    frame = ase.io.read(test_file, "0")
    return {
        "test": test,
        "verdicts": {name: {"status": r.status, "reason": r.reason, "metrics": {m.name: m.value for m in r.metrics}} for name, r in found.items()},
        "pushed_eV": {pair: pushed_together(calculator, frame, pair, d) for pair, d in shortest.items()},
        "spike_eV_per_A": spike_of_leaving(calculator, potential.statistics.elements, potential.cutoff),
    }  # fmt: skip


def row(record: dict) -> str:
    """One line of the table from one of the two."""
    metrics = record["verdicts"]["diatomics"]["metrics"]
    words = " | ".join(record["verdicts"][name]["status"] if name in record["verdicts"] else "" for name in CHECKS)
    errors = record["test"]
    return (
        f"{errors['forces_mae_meV_per_A']:.2f} | {errors['energy_mae_meV_per_atom']:.2f} | {words} | {metrics['deepest hole']:.2g} | "
        f"{max(record['pushed_eV'].values()):.2g} | {record['spike_eV_per_A']:.2g} |"
    )


def table(folder: Path) -> str:
    """All records."""
    lines = [
        "| network, system, steps | zbl_radius | force MAE meV/Å | energy MAE meV/atom | symmetry | conservation | smoothness | two atoms | deepest hole eV | pushed eV | spike eV/Å |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for path in sorted(folder.glob("*.json"), key=lambda p: (p.stem.split("-")[1], p.stem)):
        record = json.loads(path.read_text())
        lines.append(f"| {record['network']}, {record['system']}, {record['steps']:,} | 0.8 | {row(record['before'])}")
        lines.append(f"| | data | {row(record['after'])}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="NETWORK:SYSTEM, or with --table the folder")
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--minutes", type=float, default=2.0, help="CPU time of each training")
    parser.add_argument("--out", type=Path, default=Path("runs") / "pairs")
    parser.add_argument("--set", nargs="*", default=[], help="settings to change, as for gossamer train")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(Path(arguments.names[0])), end="")
        return
    for name in arguments.names:
        network, system = name.split(":")
        record = run(network, system, arguments.data, arguments.minutes, arguments.out, arguments.set)
        print(name, row(record["before"]), row(record["after"]), sep="\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
