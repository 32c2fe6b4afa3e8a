"""Several models on the same split within the same time: one table, and a plot of error against cost."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from gossamer import __version__
from gossamer.arguments import FILES, as_path, listed, positive
from gossamer.config import Config, load_config, make_config
from gossamer.data.dataset import isolated_atoms, load_data, open_dataset
from gossamer.data.structure import Structure
from gossamer.evaluation import evaluate_potential
from gossamer.files import atomic_path, checksum, write_json, write_text
from gossamer.machine import machine
from gossamer.models import MODELS
from gossamer.potential import Potential
from gossamer.potential_file import load
from gossamer.runs import POTENTIAL, check_loss, train
from gossamer.settings import to_dict
from gossamer.signals import Stopped
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.several import distinct
from gossamer.training.process_group import start_process_group

log = logging.getLogger(__name__)
RECORD = "comparison.json"
UNUSED = ("out", "training.minutes", "training.steps", "training.valid_every", "training.checkpoint_every", "training.clock")
"""settings that compare chooses, or that a run by the clock does not use"""
RANKED = ("forces_mae_meV_per_A", "energy_mae_meV_per_atom")
"""errors by which the table is sorted"""
COMPILE_BUDGET = 0.25
"""largest share of the time that compiling may take; a run with less time trains without it"""


def compare(
    configs: Sequence[Path | str | Config | Mapping[str, Any]] | Path | str | Config | Mapping[str, Any],
    minutes: float = 10.0,
    out: Path | str = "comparison",
    resume: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train several models for the same time on the same data and write what came of it.

    Each trains by the clock (``training.minutes``), compiled or not as its settings say, so that compilation, training and
    validation fill the time, and the learning rate comes down with it. Of the files, the numbers of steps between validations
    and in all are not used, and the warm-up and the average of the weights are shortened where the run is too short for them;
    everything else is used as it is.

    Args:
        configs: Settings of the models, as objects, dictionaries or YAML files; their data and split must agree.
        minutes: Time for each, compilation and validation included: CPU time on one CPU thread, wall time otherwise. Reading
            the data and the final test come on top.
        out: Folder for the runs, comparison.json, comparison.md and comparison.png.
        resume: Keep finished runs that are already in the folder, and go on with one that was cut.
        progress: Show progress bars.

    Returns:
        One dictionary per model, as in comparison.json.

    Raises:
        TypeError: something else than settings.
        ValueError: no configuration, two of one name, different data, or runs in the folder of another time or other settings.
        RuntimeError: a run failed, as where its loss is NaN; raised at the end, when all others have had their time.
        Stopped: SIGTERM came during a run.
    """
    minutes = positive("minutes", minutes)
    named = name_configs(configs)
    check_same_data(named)
    folder = as_path("out", out, "the name of a folder")
    finished = {name: kept for name, config in named.items() if resume and (kept := finished_run(config, minutes, folder / name))}
    records, failures = [], []
    for name, config in named.items():
        if name in finished:
            records.append(finished[name])
            continue
        log.info("comparing: %s", name)
        try:
            record = {"name": name, **run_one(config, minutes, folder / name, progress, resume)}
        except Stopped:
            raise
        except RuntimeError as error:
            log.error("%s: %s", name, error)
            failures.append(f"{name}: {error}")
            continue
        write_json(folder / name / RECORD, record)
        records.append(record)
        write_summary(records, folder, minutes)
    write_summary(records, folder, minutes)
    if failures:
        raise RuntimeError(
            f"{len(failures)} of {len(named)} runs failed; the others are in '{folder / 'comparison.md'}'. " + " ".join(failures)
        )
    return records


def name_configs(configs: Any) -> dict[str, Config]:
    """Settings by name: that of the file (with its folder's where several share one), or of the network."""
    configs = listed("configs", configs, (*FILES, Config, Mapping), "YAML files or settings")
    if not configs:
        raise ValueError("There is nothing to compare: give at least one configuration.")
    named: dict[str, Config] = {}
    files = iter(distinct([c for c in configs if isinstance(c, FILES)]))
    for entry in configs:
        config = entry if isinstance(entry, Config) else make_config(entry) if isinstance(entry, Mapping) else load_config(entry)
        name = next(files) if isinstance(entry, FILES) else config.model.name
        if name in named:
            raise ValueError(f"Two configurations are called '{name}'. Give their files different names.")
        check_loss(config)
        named[name] = config
    return named


def check_same_data(named: dict[str, Config]) -> None:
    """Raise ValueError if the configurations do not train and test on the same frames, or the same forces of them."""
    first, *others = named

    def asked(config: Config) -> dict[str, Any]:
        return {**flat(to_dict(config.data), "data."), "loss.free_atoms_only": config.loss.free_atoms_only}

    for name in others:
        a, b = asked(named[first]), asked(named[name])
        differing = [k for k in {**a, **b} if a.get(k) != b.get(k)]
        if differing:
            listed = ", ".join(f"{k} ({a.get(k)!r} and {b.get(k)!r})" for k in differing)
            raise ValueError(f"'{first}' and '{name}' differ in {listed}. Errors compare only on the same data.")
    data = named[first].data
    cutoffs = sorted({config.model.cutoff for config in named.values()})
    if len(cutoffs) > 1 and (data.valid is None or data.train_size is not None):
        structures = open_dataset(data.train, data.labels)
        isolated = {tuple(np.flatnonzero(isolated_atoms(structures, cutoff)).tolist()) for cutoff in cutoffs}
        if len(isolated) > 1:
            raise ValueError(
                f"Single atoms in '{data.train}' are isolated within the shortest cutoff of the networks ({cutoffs[0]:g} Å) and not within the longest "
                f"({cutoffs[-1]:g} Å), so that each would have another split. Give files of training and validation frames (data.valid)."
            )


def finished_run(config: Config, minutes: float, folder: Path) -> dict[str, Any] | None:
    """The record of a run that is finished in this folder.

    Raises:
        ValueError: it had another time or other settings.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    check_minutes(record["minutes"], minutes, folder)
    before, now = flat(record["settings"]), flat(to_dict(config))
    if now["training.compile"] and not before["training.compile"]:
        now["training.compile"] = compile_fits(config, minutes)
    differing = [k for k in now if k in before and before[k] != now[k] and k not in UNUSED]
    if differing:
        listed = ", ".join(f"{k} {before[k]!r} (now {now[k]!r})" for k in differing)
        raise ValueError(f"'{folder}' holds a finished run of other settings: {listed}. Ask the same, or choose another folder.")
    contents = contents_of(config)
    changed = [path for path, was in record.get("contents", contents).items() if contents.get(path) != was]
    if changed:
        raise ValueError(f"'{changed[0]}' has changed since the finished run in '{folder}'. Choose another folder for the new data.")
    return record


def contents_of(config: Config) -> dict[str, str]:
    """Checksums of the files and folders that a run reads, by path."""
    parts = [config.data.train, config.data.valid, config.data.test]
    parts += [config.finetune.start, config.finetune.replay] if config.finetune else []
    return {path: checksum(path) for part in parts if part for path in ([part] if isinstance(part, str) else part)}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted path; those of fine-tuning, which may be none, as one."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and key != "finetune" else {f"{prefix}{key}": value}
    return found


def check_minutes(begun: float | None, minutes: float, folder: Path) -> None:
    """Raise ValueError if the folder's run was begun for another time."""
    if begun != minutes:
        found = "a number of steps" if begun is None else f"{begun:g} minutes"
        raise ValueError(f"'{folder}' holds a run of {found}, not of {minutes:g} minutes: choose another folder.")


def run_one(config: Config, minutes: float, folder: Path, progress: bool = True, resume: bool = False) -> dict[str, Any]:
    """Train and test one model; with ``resume``, go on with a run that was cut.

    Raises:
        ValueError: the run was begun for another time.
        Stopped: SIGTERM came.
    """
    before = folder / "config.yaml"
    if resume and before.exists():
        check_minutes(load_config(before).training.minutes, minutes, folder)
    chosen = {"minutes": minutes, "clock": budget_clock(config), "compile": config.training.compile and compile_fits(config, minutes)}
    config = make_config(to_dict(config), [*(f"training.{k}={v}" for k, v in chosen.items()), f"out={folder}"])
    began = time.perf_counter()
    results = train(config, ["data.test=null"], resume=resume, progress=progress)  # tested below, outside the time
    if "stopped" in results:
        raise Stopped(
            f"{results['stopped']}: '{folder}' stopped at step {results['stopped_at_step']}; --resume goes on with the comparison."
        )
    spent = time.perf_counter() - began
    train_set, valid_set, test_set = load_data(config.data, config.model.cutoff)
    potential = load(folder / POTENTIAL, start_process_group(config.training.device).device)
    sample = test_set if test_set is not None else valid_set
    inference_ms, inference_way = time_inference(potential, sample[0])
    wait = results["first_step_seconds"] - results["step_ms"] / 1000
    return {
        "model": to_dict(config.model),
        "num_parameters": potential.num_parameters,
        "minutes": minutes,
        "steps": results["steps"],
        "training_seconds": results["seconds"],
        "wall_seconds": round(spent, 1),
        "budget_seconds": results["seconds"],
        "compiled": results["compiled"],
        "compile_seconds": round(wait, 1) if results["compiled"] else 0.0,
        "train_step_ms": results["step_ms"],
        "frames_seen": round(results["epochs"] * len(train_set)),
        "epochs": round(results["epochs"], 1),
        "n_train": len(train_set),
        "n_valid": len(valid_set),
        "n_test": 0 if test_set is None else len(test_set),
        "inference_ms": inference_ms,
        "inference_way": inference_way,
        "inference_atoms": sample[0].n_atoms,
        "valid": results["valid"],
        "test": None
        if test_set is None
        else evaluate_potential(potential, test_set, keep=0, free_atoms_only=config.loss.free_atoms_only).summary(),
        "settings": to_dict(config),
        "contents": contents_of(config),
        "machine": machine(potential.device),
        "versions": {"gossamer": __version__, "torch": torch.__version__},
        "date": date.today().isoformat(),
    }


def budget_clock(config: Config) -> Literal["cpu", "wall"]:
    """CPU time of this process where it trains on one CPU thread, so that other jobs on the machine do not count; else wall time."""
    on_cpu = start_process_group(config.training.device).device.type == "cpu"
    return "cpu" if on_cpu and torch.get_num_threads() == 1 else "wall"


def compile_fits(config: Config, minutes: float) -> bool:
    """Whether compiling takes a small enough part of the time."""
    fits = MODELS[config.model.name][1].fit_defaults.compile_seconds < COMPILE_BUDGET * 60 * minutes
    if not fits:
        log.info("%g minutes leave no time to compile: this run trains without it", minutes)
    return fits


def time_inference(potential: Potential, structure: Structure, repeats: int = 15) -> tuple[float, str]:
    """Median ms of energy and forces of one structure through the ASE calculator, as molecular dynamics pays it, and what ran: a program
    only where this machine has compiled one of this network before."""
    atoms = structure.to_ase()
    atoms.calc = calculator = Calculator(potential)
    rng = np.random.default_rng(0)
    times = []
    for _ in range(repeats):
        atoms.positions += rng.normal(scale=1e-3, size=atoms.positions.shape)
        began = time.perf_counter()
        atoms.get_forces()
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times[3:])), calculator.engine.way


# --- what came of it ----------------------------------------------------------------------------------------------


def table(records: Sequence[dict[str, Any]]) -> str:
    """The comparison as a Markdown table, best force error first (without forces, best energy error); errors of the test set where there is one."""

    def error(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda r: f"{errors(r)[key]:.3g}" if key in errors(r) else "-"

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "model": lambda r: r["name"],
        "parameters": lambda r: f"{r['num_parameters']:,}",
        "training step ms": lambda r: f"{r['train_step_ms']:.1f}{'' if r['compiled'] else ' (plain)'}",
        "inference ms": lambda r: f"{r['inference_ms']:.1f}{' (' + r['inference_way'] + ')' if 'inference_way' in r else ''}",
        "minutes taken": lambda r: f"{r.get('budget_seconds', r['wall_seconds']) / 60:.1f}",
        "steps": lambda r: f"{r['steps']:,}",
        "epochs": lambda r: f"{r['epochs']:.0f}",
        "energy MAE meV/atom": error("energy_mae_meV_per_atom"),
        "force MAE meV/Å": error("forces_mae_meV_per_A"),
        "force RMSE meV/Å": error("forces_rmse_meV_per_A"),
        "stress MAE meV/Å³": error("stress_mae_meV_per_A3"),
    }
    ordered = sorted(records, key=lambda r: [np.nan_to_num(errors(r).get(k, np.inf), nan=np.inf) for k in RANKED])
    rows = [list(columns), ["---"] * len(columns), *([show(r) for show in columns.values()] for r in ordered)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows).replace("| --- " * len(columns) + "|", "|---" * len(columns) + "|")


def errors(record: dict[str, Any]) -> dict[str, Any]:
    """Test errors, or those of validation."""
    return dict(record["test"] or record["valid"])


def write_summary(records: Sequence[dict[str, Any]], folder: Path, minutes: float) -> None:
    """comparison.json, comparison.md and comparison.png."""
    if not records:
        return
    write_json(folder / "comparison.json", list(records))
    r = records[0]
    which = f"{r['n_test']} test frames" if r["n_test"] else f"{r['n_valid']} validation frames"
    head = (
        f"Meant to take {minutes:g} minutes each (taken: see the table), {r['n_train']} training frames, errors on {which}; "
        f"inference of {r['inference_atoms']} atoms through ASE. "
        f"{r['machine']}, {r['date']}, gossamer {r['versions']['gossamer']}, torch {r['versions']['torch']}.\n\n"
    )
    write_text(folder / "comparison.md", head + table(records))
    plot(records, folder / "comparison.png")


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Force error against time of inference and of a training step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    key = "forces_mae_meV_per_A" if all("forces_mae_meV_per_A" in errors(r) for r in records) else "energy_mae_meV_per_atom"
    for axis, cost, label in zip(axes, ("inference_ms", "train_step_ms"), ("energy and forces (ms)", "training step (ms)"), strict=True):
        for k, r in enumerate(records):
            axis.scatter(r[cost], errors(r)[key], s=45, color=f"C{k % 10}", zorder=3)
            axis.annotate(r["name"], (r[cost], errors(r)[key]), xytext=(5, 5), textcoords="offset points", fontsize=9)
        axis.set_xlabel(label)
        for side, values in ((axis.xaxis, [r[cost] for r in records]), (axis.yaxis, [errors(r)[key] for r in records])):
            if max(values) > 4 * min(values):  # a logarithmic axis with plain numbers, where a linear one would crowd the small ones
                (axis.set_xscale if side is axis.xaxis else axis.set_yscale)("log")
                side.set_major_locator(LogLocator(subs=(1, 2, 5)))
                side.set_minor_formatter(NullFormatter())
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.margins(0.2)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("force MAE (meV/Å)" if key.startswith("forces") else "energy MAE (meV/atom)")
    figure.suptitle("error against cost: lower left is better", fontsize=10, color="0.3")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
