"""The packages nequip, mace and python-ace, and `gossamer fit`, on a data set for a stated time on one thread, with one split for all.

    python benchmarks/accuracy/peers.py silicon --minutes 8 --nequip /path/to/nequip/venv --mace /path/to/mace/venv --pace ... [--fit]

Each package sits in an environment of its own and trains through its own command line; the errors are those of the official
test frames (of 3BPA, whose are not at hand, every tenth of the training frames), from each package's own ASE calculator. Settings: nequip l 2, 32
features, 3 layers, even parity only, cutoff 5 Å, per-atom MSE of energy, forces and stress, Adam 0.01, EMA 0.999, plateau; mace 64x0e + 64x1o,
correlation 2, 2 layers, cutoff 5 Å, Adam amsgrad 0.01, EMA 0.99, its universal loss where there is stress, else its default. Both get their packages'
recommendations, none of them a search. python-ace: linear, by its regression (pace.py), which takes what it takes, whatever --minutes says; stress
is not fitted. `fit`: what it chooses for the training frames and the minutes, by the clock as the others, steps not compiled.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SETS: dict[str, tuple[str, str, int, int]] = {
    "silicon": ("mlearn_Si_train", "mlearn_Si_test", 20, 2),
    "germanium": ("mlearn_Ge_train", "mlearn_Ge_test", 20, 2),
    "molybdenum": ("mlearn_Mo_train", "mlearn_Mo_test", 20, 2),
    "lithium": ("mlearn_Li_train", "mlearn_Li_test", 20, 2),
    "copper": ("mlearn_Cu_train", "mlearn_Cu_test", 20, 2),
    "alloys": ("hea_monbtaw_train", "hea_monbtaw_test", 260, 2),
    "lips": ("lips_train", "lips_test", 10, 1),
    "water": ("water_pbe0ts_train", "water_pbe0ts_test", 10, 1),
    "aspirin": ("rmd17_aspirin_train", "rmd17_aspirin_test", 50, 5),
    "acac": ("acac_train_300K", "acac_test_MD_300K", 50, 5),
    "3bpa": ("3bpa_train_300K", "", 50, 5),
}
"""files, frames that choose the best weights, and structures in a batch of the packages"""

NEQUIP = """
run: [train]
hydra: {{run: {{dir: {folder}/hydra}}, output_subdir: null}}
cutoff_radius: 5.0
chemical_symbols: [{symbols}]
model_type_names: ${{chemical_symbols}}
data:
  _target_: nequip.data.datamodule.ASEDataModule
  seed: 0
  train_file_path: {folder}/train.extxyz
  val_file_path: {folder}/valid.extxyz
  transforms:
    - {{_target_: nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper, model_type_names: "${{model_type_names}}"}}
    - {{_target_: nequip.data.transforms.NeighborListTransform, r_max: "${{cutoff_radius}}"}}
  train_dataloader: {{_target_: torch.utils.data.DataLoader, batch_size: {batch}, shuffle: true}}
  val_dataloader: {{_target_: torch.utils.data.DataLoader, batch_size: 4}}
  stats_manager:
    _target_: nequip.data.CommonDataStatisticsManager
    dataloader_kwargs: {{batch_size: 10}}
    type_names: ${{model_type_names}}
trainer:
  _target_: lightning.Trainer
  accelerator: cpu
  max_time: "00:00:{minutes:02d}:00"
  max_epochs: 100000
  check_val_every_n_epoch: 1
  enable_progress_bar: false
  logger: {{_target_: lightning.pytorch.loggers.CSVLogger, save_dir: {folder}/logs}}
  callbacks:
    - _target_: lightning.pytorch.callbacks.ModelCheckpoint
      monitor: val0_epoch/weighted_sum
      dirpath: {folder}
      filename: best
training_module:
  _target_: nequip.train.EMALightningModule
  ema_decay: 0.999
  loss:
    _target_: nequip.train.EnergyForce{Stress}Loss
    per_atom_energy: true
    coeffs: {{total_energy: 1.0, forces: 1.0{stress}}}
  val_metrics:
    _target_: nequip.train.EnergyForce{Stress}Metrics
    coeffs: {{per_atom_energy_mae: 1.0, forces_mae: 1.0{stress_mae}}}
  train_metrics: ${{training_module.val_metrics}}
  test_metrics: ${{training_module.val_metrics}}
  optimizer: {{_target_: torch.optim.Adam, lr: 0.01}}
  lr_scheduler:
    scheduler: {{_target_: torch.optim.lr_scheduler.ReduceLROnPlateau, factor: 0.6, patience: 5, threshold: 0.2}}
    monitor: val0_epoch/weighted_sum
    interval: epoch
    frequency: 1
  model:
    _target_: nequip.model.NequIPGNNModel
    seed: 0
    model_dtype: float32
    type_names: ${{model_type_names}}
    r_max: ${{cutoff_radius}}
    num_layers: 3
    l_max: 2
    parity: false
    num_features: 32
    radial_mlp_depth: 1
    radial_mlp_width: 64
    avg_num_neighbors: ${{training_data_stats:num_neighbors_mean}}
    per_type_energy_scales: ${{training_data_stats:per_type_forces_rms}}
    per_type_energy_shifts: ${{training_data_stats:per_atom_energy_mean}}
"""

MACE_STRESS = ["--loss", "universal", "--energy_weight", "1", "--forces_weight", "10", "--stress_weight", "10", "--compute_stress", "True"]

EVALUATE = """
import json, sys, ase.io, numpy as np
shift = 0.0
frames = ase.io.read(sys.argv[2], ":")
if sys.argv[1] == "nequip":
    from nequip.utils.global_state import set_global_state
    set_global_state(allow_tf32=False)
    from nequip.integrations.ase import NequIPCalculator
    from nequip.integrations.utils import basic_transforms, handle_chemical_species_map
    from nequip.model.saved_models.load_utils import load_saved_model
    model = load_saved_model(sys.argv[3]).eval()
    names = sorted({s for a in frames for s in a.get_chemical_symbols()})
    transforms = basic_transforms(model.metadata, 5.0, names, handle_chemical_species_map(None, names), neighborlist_backend="matscipy")
    calc = NequIPCalculator(model=model, device="cpu", transforms=transforms)
    parameters = sum(p.numel() for p in model.parameters())
elif sys.argv[1] == "pace":
    from pyace import PyACECalculator
    calc = PyACECalculator(sys.argv[3], recursive_evaluator=True, recursive=True)
    about = json.load(open(sys.argv[3].replace(".yace", ".json")))
    parameters, shift = about["num_parameters"], about["energy_per_atom_eV"]
else:
    from mace.calculators import MACECalculator
    calc = MACECalculator(model_paths=sys.argv[3], device="cpu", default_dtype="float32")
    parameters = sum(p.numel() for p in calc.models[0].parameters())
e, f, s = [], [], []
for atoms in frames:
    labels = atoms.get_potential_energy(), atoms.get_forces(), atoms.calc.results.get("stress")
    atoms.calc = calc
    e.append((atoms.get_potential_energy() - labels[0]) / len(atoms) + shift)
    f.append((atoms.get_forces() - labels[1]).ravel())
    s += [] if labels[2] is None else [atoms.get_stress() - labels[2]]
mae = lambda x: 1000 * float(np.abs(np.concatenate([np.ravel(v) for v in x])).mean())
print("RESULT " + json.dumps({"energy_mae_meV_per_atom": mae(e), "forces_mae_meV_per_A": mae(f), **({"stress_mae_meV_per_A3": mae(s)} if s else {}),
                              "num_parameters": parameters}))
"""


def split(name: str, data: Path, folder: Path, seed: int = 0) -> tuple[list[str], bool]:
    """The frames to train, validate and test on, as plain files; their elements, and whether they have stress."""
    import ase.io

    from gossamer.config import make_config
    from gossamer.data.dataset import load_data

    train, test, valid_size, _ = SETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    files = {k: next(data.rglob(f"{stem}.extxyz.xz")) for k, stem in (("train", train), ("test", test)) if stem}
    if not test:
        frames: Any = ase.io.read(str(files["train"]), ":")
        ase.io.write(folder / "kept.extxyz", frames[::10])
        ase.io.write(folder / "rest.extxyz", [a for k, a in enumerate(frames) if k % 10])
        files = {"train": folder / "rest.extxyz", "test": folder / "kept.extxyz"}
    parts = load_data(make_config({"data": {**{k: str(v) for k, v in files.items()}, "valid_size": valid_size, "seed": seed}}).data)
    for part, structures in zip(("train", "valid", "test"), parts, strict=True):
        labelled: list[Any] = [s.to_ase() for s in structures or ()]
        ase.io.write(folder / f"{part}.extxyz", labelled)
        for atoms in labelled:  # mace reads its labels under names of its own
            results = atoms.calc.results
            atoms.info |= {f"REF_{k}": results[k] for k in ("energy", "stress") if k in results}
            atoms.arrays["REF_forces"] = results["forces"]
            atoms.calc = None
        ase.io.write(folder / f"{part}_ref.extxyz", labelled)
    return sorted({e for a in labelled for e in a.get_chemical_symbols()}), "REF_stress" in labelled[0].info


def fit(folder: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Errors of what `gossamer fit` chooses."""
    from gossamer.config import make_config
    from gossamer.fitting import choose_settings
    from gossamer.runs import train
    from gossamer.settings import to_dict

    chosen = to_dict(choose_settings(folder / "train.extxyz", out=folder / f"{minutes}min", minutes=minutes))
    parts = {k: str(folder / f"{k}.extxyz") for k in ("train", "valid", "test")}
    results = train(make_config({**chosen, "data": parts}, ["training.compile=false", f"training.seed={seed}"]), progress=False)
    errors = {k: v for k, v in results["test"].items() if re.match("(energy|forces|stress)_mae", k)}
    return {**errors, "num_parameters": results["num_parameters"], "steps": results["steps"], "network": chosen["model"]["name"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=[*SETS])
    parser.add_argument("--minutes", type=int, default=8)
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "peers")
    parser.add_argument("--nequip", type=Path)
    parser.add_argument("--mace", type=Path)
    parser.add_argument("--pace", type=Path, help="sets of one element only")
    parser.add_argument("--fit", action="store_true", help="ours too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of --fit: of split, weights and order; packages have 0")
    arguments = parser.parse_args()
    if arguments.fit:
        for seed in arguments.seeds:
            folder = (arguments.runs / f"fit-{arguments.set}-{seed}").resolve()
            split(arguments.set, arguments.data, folder, seed)
            keep("gossamer fit", f"fit-{seed}" if seed else "fit", arguments, {"seed": seed, **fit(folder, arguments.minutes, seed)})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    for name in ("nequip", "mace", "pace"):
        venv = getattr(arguments, name)
        if venv is None:
            continue
        folder = (arguments.runs / f"{name}-{arguments.set}").resolve()
        elements, stress = split(arguments.set, arguments.data, folder)
        began = time.perf_counter()
        if name == "nequip":
            words = ("Stress", ", stress: 1.0", ", stress_mae: 1.0") if stress else ("", "", "")
            wanted = dict(zip(("Stress", "stress", "stress_mae"), words, strict=True)) | {"symbols": ", ".join(elements)}
            batch = SETS[arguments.set][3]
            (folder / "config.yaml").write_text(NEQUIP.format(folder=folder, minutes=arguments.minutes, batch=batch, **wanted))
            command = [str(venv / "bin" / "nequip-train"), "-cp", str(folder), "-cn", "config"]
            model = folder / "best.ckpt"
        elif name == "pace":
            command = [str(venv / "bin" / "python"), str(HERE / "pace.py"), str(folder), *elements]
            model = folder / "pace.yace"
        else:
            command = [
                str(venv / "bin" / "mace_run_train"), "--name", "m", "--model", "MACE", "--train_file", f"{folder}/train_ref.extxyz",
                "--valid_file", f"{folder}/valid_ref.extxyz", "--E0s", "average", "--hidden_irreps", "64x0e + 64x1o", "--correlation", "2",
                "--r_max", "5.0", "--batch_size", str(SETS[arguments.set][3]), "--valid_batch_size", "4", "--max_num_epochs", "100000", "--ema", "--amsgrad",
                "--ema_decay", "0.99", "--default_dtype", "float32", "--device", "cpu", "--seed", "0", "--work_dir", str(folder),
                "--energy_key", "REF_energy", "--forces_key", "REF_forces", "--stress_key", "REF_stress", "--scheduler_patience", "5",
                "--lr_factor", "0.6", "--eval_interval", "1", *(MACE_STRESS if stress else []),
            ]  # fmt: skip
            model = folder / "best.model"
        with open(folder / "train.log", "w") as log:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
            try:
                process.wait(timeout=60 * arguments.minutes + (120 if name == "nequip" else 0))
            except subprocess.TimeoutExpired:
                process.kill()
        seconds = time.perf_counter() - began
        if name == "mace":  # it was stopped: the best checkpoint, which holds the averaged weights, becomes a model
            restart = [*command, "--restart_latest", "--max_num_epochs", "0"]
            subprocess.run(restart, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, check=False)
            found = sorted(folder.glob("*.model")) + sorted((folder / "checkpoints").glob("*.model"))
            model = found[0] if found else model
        out = subprocess.run(
            [str(venv / "bin" / "python"), "-c", EVALUATE, name, str(folder / "test.extxyz"), str(model)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        lines = [line for line in out.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            sys.exit(f"{name}: no result\n{out.stdout[-2000:]}{out.stderr[-2000:]}")
        keep(f"{name} package", name, arguments, {"wall_seconds": round(seconds), **json.loads(lines[0][7:])})


def keep(name: str, short: str, arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write a row down."""
    record = {"name": name, "set": arguments.set, "minutes": arguments.minutes, **found, "date": datetime.date.today().isoformat()}
    target = HERE / "compare" / f"{arguments.set}-{arguments.minutes}min-{short}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
