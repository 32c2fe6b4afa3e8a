"""Every network trained shortly on four data sets, judged, and simulated for 50 ps.

    python benchmarks/reliability/own.py --data ../shared/data --out runs/own leignn:silicon weft:ethanol ...
    python benchmarks/reliability/own.py --keep runs/own            # the finished rows, into own.json and own.md here

Each NETWORK:SYSTEM is a row: trained with the settings that `gossamer fit` chooses for so many minutes of CPU time (those count, not the
clock on the wall, so that other jobs do not), then judged at the quick level, with all pairs of elements and dynamics of the length given.
The same command again does what is missing: a training or simulation that was cut goes on, finished rows are kept, and where longer dynamics
are asked for than a row has, they go on from their end. One JSON file for each row holds every number of the judge; own.json here keeps its
verdicts, and the table says of each row what did not pass, and why.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule

import gossamer
from gossamer.config import make_config
from gossamer.data.atoms import read_frames
from gossamer.data.dataset import open_dataset
from gossamer.engine.engine import Engine
from gossamer.evaluation import evaluate_potential
from gossamer.files import write_json, write_text
from gossamer.fitting import choose_settings
from gossamer.runs import train
from gossamer.settings import to_dict

HERE = Path(__file__).resolve().parent
CHECKS = ("symmetry", "conservation", "smoothness", "diatomics", "dynamics")
NETWORKS = ("leignn", "weft", "nequip", "geodite", "mace", "painn", "schnet", "sevennet")
N_TEST = 60
"""test frames for the errors"""


def crystal(symbol: str, temperature: float) -> Atoms:
    """64 or 32 atoms at their experimental lattice constant."""
    atoms = bulk(symbol, cubic=True).repeat(2)
    atoms.info |= {"name": symbol, "temperature_K": temperature}
    return atoms


def sides(stem: str) -> tuple[str, str]:
    """The files to train on and to test on."""
    return f"{stem}_train", f"{stem}_test"


SYSTEMS: dict[str, dict[str, Any]] = {
    "silicon": {"files": sides("mlearn/mlearn_Si"), "dynamics": {"timestep": 1.0}, "start": lambda: crystal("Si", 1000.0)},
    "copper": {"files": sides("mlearn/mlearn_Cu"), "dynamics": {"timestep": 2.0}, "start": lambda: crystal("Cu", 1000.0)},
    "ethanol": {"files": sides("rmd17/rmd17_ethanol"), "dynamics": {"protocol": "molecule"}, "start": None},
    "water": {"files": sides("water_pbe0ts_330K/water_pbe0ts"), "dynamics": {"protocol": "water", "temperature": 330.0}, "start": None},
    "lips": {"files": sides("lips/lips"), "dynamics": {"protocol": "lips", "temperature": 520.0}, "start": None},
    "methane": {
        "files": tuple(f"no_upstream_licence/ch4/ch4_aimd_{t}K" for t in (1000, 300)),
        "dynamics": {"protocol": "methane", "temperature": 300.0},
        "start": lambda: molecule("CH4"),
    },
}
"""data; how dynamics are asked for; where they start, if not from the first test frame. Without a start of their own the test frames are the reference
(methane's are one picosecond of one molecule, with the energy in each vibration that it happened to start with)"""


def run(network: str, system: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, judge, write the record of one row and return it."""
    how = SYSTEMS[system]
    train_file, test_file = (arguments.data / f"{name}.extxyz.xz" for name in how["files"])
    folder = arguments.out / f"{network}-{system}"
    file = folder / "potential.safetensors"
    if not (folder / "results.json").exists():
        config = choose_settings(train_file, model=network, out=folder, minutes=arguments.minutes)
        changes = ["training.clock=cpu", "training.compile=false", *arguments.set]
        train(make_config(to_dict(config), changes), resume=(folder / "checkpoint.safetensors").exists(), progress=False)
    trained = json.loads((folder / "results.json").read_text())
    potential = gossamer.load(file)
    errors = evaluate_potential(potential, open_dataset(test_file)[:N_TEST], run=Engine(potential)).summary()
    picoseconds = arguments.picoseconds.get(system, arguments.picoseconds[""])
    reference = {} if how["start"] else {"references": [str(test_file)]}
    start = how["start"]() if how["start"] else read_frames(test_file)[0]
    began = time.process_time()
    (verdicts,) = gossamer.judge(
        f"{network}={file}", out=arguments.out / f"judge-{system}", only=CHECKS, structures=[str(test_file)], systems=[start], all_pairs=True,
        picoseconds=picoseconds, progress=False, **how["dynamics"], **reference,
    ).values()  # fmt: skip
    record = {
        "network": network, "system": system, "minutes": arguments.minutes, "steps": trained["steps"], "changes": arguments.set,
        "picoseconds": picoseconds, "test": errors, "judge_seconds": round(time.process_time() - began, 1),
        "verdicts": {name: verdict_of(result) for name, result in verdicts.items()},
        "gossamer": gossamer.__version__, "torch": torch.__version__,
    }  # fmt: skip
    write_json(arguments.out / f"{network}-{system}.json", record)
    return record


def finished(file: Path, picoseconds: float) -> bool:
    """Whether a row is there, with dynamics as long as asked."""
    return file.exists() and json.loads(file.read_text())["picoseconds"] >= picoseconds


def verdict_of(result: Any) -> dict[str, Any]:
    """The verdict of a check, its numbers, and all that did not pass."""
    return {
        "status": result.status, "reason": result.reason,
        "not_passed": [{"name": m.name, "value": m.value, "unit": m.unit, "status": m.status, "limit": m.limit, "reason": m.reason}
                       for m in result.metrics if m.status in ("weak", "failed")],
        "metrics": {m.name: m.value for m in result.metrics}, "notes": result.notes,
    }  # fmt: skip


def keep(folder: Path) -> list[dict[str, Any]]:
    """All rows that own.json holds, with those of a folder, which replace older ones of the same network, system, time and settings."""
    file = HERE / "own.json"
    old = json.loads(file.read_text()) if file.exists() else []
    new = [json.loads(path.read_text()) for path in folder.glob("*-*.json")]
    for record in new:
        record["verdicts"] = {name: {key: v[key] for key in ("status", "not_passed")} for name, v in record["verdicts"].items()}
    rows = {(r["network"], r["system"], r["minutes"], *r["changes"]): r for r in (*old, *new)}
    kept = sorted(rows.values(), key=lambda r: (list(SYSTEMS).index(r["system"]), NETWORKS.index(r["network"]), r["changes"]))
    write_json(file, kept)
    return kept


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each row, and a list of what did not pass."""
    lines = [
        "| system | network | CPU minutes, steps | force MAE meV/Å | energy MAE meV/atom | " + " | ".join(CHECKS) + " |",
        "|---" * (5 + len(CHECKS)) + "|",
    ]
    causes = []
    for r in rows:
        words = [r["verdicts"][name]["status"] for name in CHECKS]
        words[-1] += f", {r['picoseconds']:g} ps"
        changed = f" ({', '.join(r['changes'])})" if r["changes"] else ""
        lines.append(
            f"| {r['system']} | {r['network']}{changed} | {r['minutes']:g}, {r['steps']:,} | {r['test']['forces_mae_meV_per_A']:.1f} | "
            f"{r['test']['energy_mae_meV_per_atom']:.2f} | {' | '.join(words)} |"
        )
        for name in CHECKS:
            for metric in r["verdicts"][name]["not_passed"]:
                value = (
                    "no number"
                    if metric["value"] is None
                    else f"{np.format_float_positional(metric['value'], 3, fractional=False, trim='-')} {metric['unit']}"
                )
                causes.append(
                    f"- {r['network']}, {r['system']}, {name}: {metric['name']} {value.strip()} ({metric['status']}; {metric['limit']})."
                )
    counted = {word: sum(r["verdicts"][name]["status"] == word for r in rows for name in CHECKS) for word in ("passed", "weak", "failed")}
    head = f"{len(rows)} potentials, {', '.join(f'{n} checks {word}' for word, n in counted.items())}."
    return "\n".join([head, "", *lines, "", *(["Not passed:", "", *causes] if causes else ["Everything passed."])]) + "\n"


def lengths(text: str) -> tuple[str, float]:
    """SYSTEM=PICOSECONDS, or PICOSECONDS for all others."""
    system, _, value = text.rpartition("=")
    if system and system not in SYSTEMS:
        raise argparse.ArgumentTypeError(f"'{system}' is no system: choose from {', '.join(SYSTEMS)}")
    return system, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="NETWORK:SYSTEM; none: every network on every system")
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--minutes", type=float, default=6.0, help="CPU time of each training")
    parser.add_argument(
        "--picoseconds", type=lengths, action="append", default=[], metavar="[SYSTEM=]PS", help="length of the dynamics; 50"
    )
    parser.add_argument("--out", type=Path, default=Path("runs") / "own")
    parser.add_argument("--set", nargs="*", default=[], help="settings to change, as for gossamer train")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="only put the finished rows of a folder into own.json and own.md")
    arguments = parser.parse_args()
    arguments.picoseconds = {"": 50.0, **dict(arguments.picoseconds)}
    if arguments.keep is not None:
        write_text(HERE / "own.md", table(keep(arguments.keep)))
        return
    names = arguments.names or [f"{network}:{system}" for network in NETWORKS for system in SYSTEMS]
    for name in names:
        network, _, system = name.partition(":")
        if system not in SYSTEMS or network not in NETWORKS:
            parser.error(f"'{name}' is not NETWORK:SYSTEM with a network of {', '.join(NETWORKS)} and a system of {', '.join(SYSTEMS)}")
        if finished(arguments.out / f"{network}-{system}.json", arguments.picoseconds.get(system, arguments.picoseconds[""])):
            continue
        began = time.monotonic()
        record = run(network, system, arguments)
        words = ", ".join(f"{check} {record['verdicts'][check]['status']}" for check in CHECKS)
        print(f"{name}: {words} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
