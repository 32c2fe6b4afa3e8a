"""A universal potential in small: both stages of recipes/mptrj-weft-*.yaml on the crystals at hand, and the errors on others, kept aside.

    python benchmarks/accuracy/universal.py --data ../shared/data --out runs/universal --minutes 48 12
    python benchmarks/accuracy/universal.py --data ../shared/data --out runs/universal --beside SevenNet-0=sevennet-0.safetensors
    python benchmarks/accuracy/universal.py --table > benchmarks/accuracy/universal.md

The data are 850 frames of MPtrj and 1,069 of crystals at high temperature and pressure, with 85 elements, written to a store as the whole of MPtrj
would be. A tenth of either set, by a hash of what names the material, is never trained on. Minutes are CPU time of stage 1 and of stage 2;
with one number there is but stage 1. ``--set`` changes settings of both stages. Each call adds rows, or makes them anew; a training that was cut goes on.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.io
from ase import Atoms
from ase.data import atomic_numbers

import gossamer
from gossamer.config import load_config
from gossamer.data.dataset import open_dataset
from gossamer.data.from_atoms import from_atoms
from gossamer.data.labels import LabelConfig
from gossamer.data.store import write_store
from gossamer.engine.engine import Engine
from gossamer.evaluation import evaluate_potential
from gossamer.files import write_json
from gossamer.machine import machine, versions
from gossamer.runs import train

HERE = Path(__file__).resolve().parent
FILES = {
    "MPtrj": ("mptrj/mptrj_random_train.extxyz.xz", "mptrj_traj_id"),
    "hot and pressed": ("mattersim_tp/mattersim_mpf_TP.extxyz.xz", "internal_id"),
}
"""data, and what names the material"""
EXTREME = "mptrj/mptrj_highest_stress.extxyz.xz"
"""frames of MPtrj at hundreds of GPa, of materials that are not trained on: how far does it reach?"""
BATCH = 16
"""frames of a step"""
TESTED, EXTREMES = 10, 5
"""one material of so many is kept aside; every so many extreme frames are tested"""
RECORD = HERE / "universal.json"


def kept_aside(material: str) -> bool:
    return int(hashlib.sha256(material.encode()).hexdigest(), 16) % TESTED == 0


def prepare(data: Path, out: Path) -> None:
    """The store of what is trained on, and files of what is tested on."""
    if (out / "train").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    trained: list[Atoms] = []
    for name, (file, key) in FILES.items():
        tested = []
        for atoms in ase.io.read(data / file, ":"):
            atoms.info["material"] = str(atoms.info[key])
            (tested if kept_aside(atoms.info["material"]) else trained).append(atoms)
        ase.io.write(out / f"{name}.extxyz", tested)
    seen = {atoms.info["material"] for atoms in trained}
    ase.io.write(out / "extreme.extxyz", [a for a in ase.io.read(data / EXTREME, f"::{EXTREMES}") if a.info[FILES["MPtrj"][1]] not in seen])

    def structures() -> Iterator[Any]:
        for number, atoms in enumerate(trained):
            yield from_atoms(atoms, LabelConfig(group="material"), f"crystal {number}")

    print(f"{write_store(structures(), out / 'train')} frames to train on", file=sys.stderr)


def run(minutes: list[float], changes: list[str], out: Path) -> list[Path]:
    """Train all stages that are not there yet; their folders."""
    name = "-".join([*(f"{m:g}" for m in minutes), *(c.replace("/", "_") for c in changes)])
    folders: list[Path] = []
    for stage, time in enumerate(minutes, 1):
        folder = out / name / f"stage-{stage}"
        if not (folder / "results.json").exists():
            own = [
                f"data.train={out / 'train'}",
                f"training.minutes={time}",
                "training.clock=cpu",
                f"training.batch_size={BATCH}",
                f"out={folder}",
            ]
            if folders:
                own.append(f"finetune.start={folders[-1] / 'potential.safetensors'}")
            own += [c for c in changes if not folders or not c.startswith("model.")]
            config = load_config(HERE.parents[1] / "recipes" / f"mptrj-weft-{stage}.yaml", own)
            train(config, resume=(folder / "checkpoint.safetensors").exists(), progress=False)
        folders.append(folder)
    return folders


def errors(potential: Path, out: Path) -> dict[str, Any]:
    """On each set that was kept aside: those of the frames whose elements the potential knows."""
    loaded = gossamer.load(potential)
    engine, found = Engine(loaded), {}
    for name in (*FILES, "extreme"):
        known = {atomic_numbers[e] for e in loaded.statistics.elements}
        frames = [s for s in open_dataset(out / f"{name}.extxyz") if set(s.atomic_numbers.tolist()) <= known]
        summary = evaluate_potential(loaded, frames, run=engine).summary()
        found[name] = {"frames": len(frames), **{k: v for k, v in summary.items() if "mae" in k or "rmse" in k}}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    said = next((f"{r['date']}, {r['machine']}, {r['versions']}." for r in rows if "machine" in r), "")
    lines = [
        f"Mean absolute errors in meV/atom, meV/Å and meV/Å³, on frames and materials kept aside. {said}",
        "",
        "| | parameters | minutes | epochs | " + " | ".join(f"{n}: energy, forces, stress" for n in (*FILES, "extreme")) + " |",
        "|---" * 7 + "|",
    ]
    for r in rows:
        cells = [
            f"{e['energy_mae_meV_per_atom']:.0f}, {e['forces_mae_meV_per_A']:.0f}, {e['stress_mae_meV_per_A3']:.1f}"
            for e in r["errors"].values()
        ]
        lines.append(f"| {r['name']} | {r['parameters']:,} | {r['minutes']} | {r['epochs']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path, default=Path("runs") / "universal")
    parser.add_argument("--minutes", type=float, nargs="+", default=[])
    parser.add_argument("--set", nargs="*", default=[], help="settings to change, as for gossamer train")
    parser.add_argument("--beside", nargs="*", default=[], metavar="NAME=POTENTIAL", help="saved potentials to test on the same frames")
    parser.add_argument("--table", action="store_true", help="only print the table of what was recorded")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(RECORD.read_text())), end="")
        return
    prepare(arguments.data, arguments.out)
    found = []
    for name, _, file in (text.partition("=") for text in arguments.beside):
        found.append({"name": name, "parameters": gossamer.load(file).num_parameters, "minutes": "", "epochs": ""})
        found[-1]["errors"] = errors(Path(file), arguments.out)
    if arguments.minutes:
        folders = run(arguments.minutes, arguments.set, arguments.out)
        results = [json.loads((folder / "results.json").read_text()) for folder in folders]
        frames = len(open_dataset(arguments.out / "train"))
        for k, folder in enumerate(folders, 1):
            steps = [r["steps"] for r in results[:k]]
            found.append({
                "name": ", ".join(["Weft", *arguments.set, f"stage {' and '.join(map(str, range(1, k + 1)))}"]),
                "parameters": results[k - 1]["num_parameters"], "minutes": " + ".join(f"{m:g}" for m in arguments.minutes[:k]),
                "epochs": round(BATCH * sum(steps) / frames), "steps": steps, "step_ms": [r["step_ms"] for r in results[:k]],
                "errors": errors(folder / "potential.safetensors", arguments.out),
                "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(),
            })  # fmt: skip
    rows = json.loads(RECORD.read_text()) if RECORD.exists() else []  # now: another call may have added to them
    rows = [r for r in rows if r["name"] not in {f["name"] for f in found}] + found
    write_json(RECORD, rows)
    print(table(found), end="")


if __name__ == "__main__":
    main()
