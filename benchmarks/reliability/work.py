"""Work that writes files, for the parts that disturb it: it begins or goes on, says what must hold at any moment, and how it ends.

Each runs in a forked process: what a new interpreter would need seconds to import is there, and a kill hits the work itself.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import resource
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import samples
import torch
from ase.build import bulk
from damage import digest

from gossamer.cli import main
from gossamer.data.from_atoms import from_atoms
from gossamer.data.readers import read_structures
from gossamer.data.store import Store, write_store
from gossamer.engine import cache
from gossamer.potential_file import load, save
from gossamer.training.checkpoint import read_checkpoint


@dataclass(frozen=True)
class Work:
    """What is done in a folder."""

    name: str
    run: Callable[[Path], Any]
    """from the beginning, or from where it was; returns the exit status of a command, or None"""
    check: Callable[[Path], None]
    """raises if what lies in the folder at any moment is not sound"""
    result: Callable[[Path], Any]
    """what the end must have in common with an undisturbed one"""


def works(inputs: Path) -> list[Work]:
    """All of them; their inputs are written into the folder."""
    inputs.mkdir(parents=True, exist_ok=True)
    demo = samples.ROOT / "demo" / "data" / "ethanol_500K.extxyz.xz"
    frames = list(read_structures(demo))[:60]
    ase.io.write(inputs / "ethanol.extxyz", [s.to_ase() for s in frames], format="extxyz")
    model = samples.potential_file(inputs / "model.safetensors", "sound", uncertainty=False)
    other = samples.potential_file(inputs / "other.safetensors", "painn", uncertainty=False)
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=0)
    ase.io.write(inputs / "molecule.extxyz", samples.labelled_molecules(1)[0].copy())
    return [
        Work("train", lambda folder: _train(folder, inputs), check_training, trained),
        Work("md", lambda folder: _md(folder, inputs, model), check_files, simulated),
        Work("relax", lambda folder: _relax(folder, inputs, model), check_files, relaxed),
        Work("potential", lambda folder: _save(folder, (model, other)), check_files, lambda folder: digest(load(folder / "p.safetensors").state_dict())),
        Work("store", lambda folder: _store(folder, frames), check_files, lambda folder: digest([s.positions for s in Store(folder / "a.store")])),
        Work("cache", _keep, check_files, lambda folder: (folder / "kernel.so").read_bytes()),
    ]  # fmt: skip


# --- the work ---------------------------------------------------------------------------------------------------------


def _train(folder: Path, inputs: Path) -> int:
    settings = {
        "data": {"train": str(inputs / "ethanol.extxyz"), "valid_size": 10, "train_size": 40},
        "model": {"name": "leignn", "num_features": 16, "num_layers": 1, "cutoff": 4.0},
        "training": {"steps": 40, "batch_size": 4, "valid_every": 10, "checkpoint_every": 2, "seed": 1},
        "out": str(folder / "run"),
    }
    (inputs / f"{folder.name}.yaml").write_text(json.dumps(settings))
    return main(["train", str(inputs / f"{folder.name}.yaml"), "--resume"])


def _md(folder: Path, inputs: Path, model: Path) -> int:
    return main(["md", str(model), str(inputs / "molecule.extxyz"), "--out", str(folder / "md"), "--steps", "150", "--interval", "5", "--ensemble", "langevin",
                 "--temperature", "50", "--timestep", "0.1", "--max-temperature", "1e9", "--way", "plain", "--resume"])  # fmt: skip


def _relax(folder: Path, inputs: Path, model: Path) -> int:
    out = folder / "relaxed.extxyz"
    command = ["relax", str(model), str(inputs / "molecule.extxyz"), "--out", str(out), "--steps", "60", "--fmax", "1e-9", "--way", "plain"]
    status = main([*command, *(["--resume"] if out.with_suffix(".state.npz").exists() else [])])
    return 0 if status == 1 else status  # not converged, as it is meant to be


def _save(folder: Path, sources: tuple[Path, Path]) -> None:
    loaded = [load(path) for path in sources]
    structure = from_atoms(samples.labelled_molecules(1)[0], samples.LabelConfig(), "water")
    for k in range(20):
        save(loaded[k % 2], folder / "p.safetensors", check=[structure])


def _store(folder: Path, frames: list[Any]) -> None:
    if not (folder / "a.store").exists():
        write_store((s for _ in range(40) for s in frames), folder / "a.store")


def _keep(folder: Path) -> None:
    for k in range(60):
        with cache.keeping(folder / "kernel.so") as temporary:
            temporary.write_bytes(bytes([k % 2]) * 2_000_000)


# --- what must hold at any moment -------------------------------------------------------------------------------------


def check_training(folder: Path) -> None:
    file = folder / "run" / "checkpoint.safetensors"
    if file.exists():
        read_checkpoint(file)
    check_files(folder)


def check_files(folder: Path) -> None:
    """Every file that has its name is whole."""
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(".") or any(p.startswith(".") for p in path.relative_to(folder).parts):
            continue
        if path.name in ("p.safetensors", "potential.safetensors"):
            load(path)
        elif path.suffix == ".npz":
            with np.load(path) as data:
                dict(data)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name == "relaxed.extxyz":
            ase.io.read(path)
        elif path.suffix == ".store":
            list(Store(path))
        elif path.name == "kernel.so":
            with contextlib.suppress(cache.Untrusted):
                path.parent.chmod(0o700)
                cache.check(path)
                data = path.read_bytes()
                if len(data) != 2_000_000 or len(set(data)) != 1:
                    raise AssertionError("a kernel that is trusted is neither of the two")


# --- how it ends ------------------------------------------------------------------------------------------------------


def trained(folder: Path) -> Any:
    tensors, _ = read_checkpoint(folder / "run" / "checkpoint.safetensors")
    with open(folder / "run" / "log.csv") as file:
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    weights = load(folder / "run" / "potential.safetensors").state_dict()
    return digest([tensors, rows, weights])


def simulated(folder: Path) -> Any:
    with np.load(folder / "md" / "state.npz") as data:
        state = dict(data)
    frames = ase.io.read(folder / "md" / "trajectory.traj", ":")
    return digest(
        [state, (folder / "md" / "log.csv").read_text(), [[f.positions, f.get_momenta(), f.get_potential_energy()] for f in frames]]
    )


def relaxed(folder: Path) -> Any:
    frames = ase.io.read(folder / "relaxed.traj", ":")
    final = ase.io.read(folder / "relaxed.extxyz")
    return digest([[f.positions for f in frames], final.positions, final.get_potential_energy()])


# --- processes --------------------------------------------------------------------------------------------------------


def begin(work: Work, folder: Path, log: Path, largest_file: int | None = None) -> int:
    """Fork a process that does the work; what it says goes to the log. Its status: that of the command; 3 for an error of ours, 4 for another."""
    child = os.fork()
    if child:
        return child
    status = 4
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        logging.getLogger().handlers.clear()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        torch.manual_seed(0)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        try:
            status = work.run(folder) or 0
        except (ValueError, OSError, RuntimeError) as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            status = 3
    except BaseException:
        text = io.StringIO()
        traceback.print_exc(file=text)
        os.write(2, text.getvalue().encode())
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """Exit status of a forked process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
