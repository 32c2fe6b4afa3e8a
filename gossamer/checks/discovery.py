"""The Matbench Discovery protocol: relax many crystals, compare their energies with the hull; any ASE calculator.

Riebesell et al., Nat. Mach. Intell. 7, 836 (2025), arXiv:2308.14920. Relaxation: FIRE, FrechetCellFilter, fmax 0.05 eV/Å,
500 steps. Metrics as in the `matbench-discovery` package (`stable_metrics`), which a test compares with.
"""

from __future__ import annotations

import csv
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from pickle import PicklingError
from typing import Any

import numpy as np
from ase import Atoms
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from numpy.typing import NDArray
from tqdm import tqdm

from gossamer.checks.candidate import Candidate
from gossamer.checks.result import InputError, Metric, Panel, Result, at_least, at_most, conclude, curve, measured, plain, skipped
from gossamer.data.atoms import read_frames
from gossamer.files import open_text
from gossamer.processes import without_script

log = logging.getLogger(__name__)
Array = NDArray[np.float64]
FMAX, STEPS = 0.05, 500
LARGEST_ERROR = 5.0
"""eV/atom; predictions farther off count as missing, as in the package"""
COLUMNS = {
    "material_id": "identifier of the material",
    "n_sites": "atoms in the cell",
    "uncorrected_energy": "DFT energy of the cell, eV, without corrections",
    "e_above_hull_mp2020_corrected_ppd_mp": "DFT distance to the hull, eV/atom",
}
"""columns of the package's table wbm-summary.csv that are needed; unique_prototype is used if there"""
NUMBERS = tuple(COLUMNS)[1:]
"""those that hold numbers"""


# --- metrics --------------------------------------------------------------------------------------------------------


def stability_metrics(true: Array, predicted: Array, threshold: float = 0.0) -> dict[str, float]:
    """Whether a potential finds the stable materials.

    A material counts as stable up to ``threshold`` above the hull. Missing predictions (NaN) count as unstable in the
    classification and are left out of MAE, RMSE and R2.

    Args:
        true: (n,) distance to the hull by DFT, eV/atom.
        predicted: (n,) by the potential.
        threshold: eV/atom.

    Returns:
        F1, DAF (precision over the share of stable materials), Precision, Recall, Accuracy, TPR, FPR, TNR, FNR, TP, FP,
        TN, FN, MAE, RMSE (eV/atom), R2.
    """
    true, predicted = np.asarray(true, dtype=float), np.asarray(predicted, dtype=float)
    if true.shape != predicted.shape or true.ndim != 1:
        raise InputError(f"Distances to the hull must be two lists of one length, found {true.shape} and {predicted.shape}.")
    stable, called = true <= threshold, predicted <= threshold  # NaN is not called stable
    tp, fn = float((stable & called).sum()), float((stable & ~called).sum())
    fp, tn = float((~stable & called).sum()), float((~stable & ~called).sum())

    def ratio(a: float, b: float) -> float:
        return a / b if b else float("nan")

    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    known = np.isfinite(true) & np.isfinite(predicted)
    difference = predicted[known] - true[known]
    variance = ((true[known] - true[known].mean()) ** 2).sum() if known.any() else 0.0
    n_known = int(known.sum())  # the package divides the accuracy by the materials with a prediction
    return {
        "F1": ratio(2 * precision * recall, precision + recall), "DAF": ratio(precision, (tp + fn) / len(true)), "Precision": precision, "Recall": recall,
        "Accuracy": ratio(tp + tn, n_known), "TPR": recall, "FPR": ratio(fp, fp + tn), "TNR": ratio(tn, fp + tn), "FNR": ratio(fn, tp + fn),
        "TP": tp, "FP": fp, "TN": tn, "FN": fn,
        "MAE": float(np.abs(difference).mean()) if known.any() else float("nan"),
        "RMSE": float(np.sqrt((difference**2).mean())) if known.any() else float("nan"),
        "R2": 1 - float((difference**2).sum()) / float(variance) if variance else float("nan"),
    }  # fmt: skip


def combined_score(f1: float, srme: float, rmsd: float) -> float:
    """CPS = 0.5 F1 + 0.4 (1 - κ_SRME / 2) + 0.1 (1 - RMSD / 0.15), each part between 0 and 1."""
    return 0.5 * f1 + 0.4 * min(max(1 - srme / 2, 0.0), 1.0) + 0.1 * min(max(1 - rmsd / 0.15, 0.0), 1.0)


def structure_distance(first: Atoms, second: Atoms) -> float:
    """Normalised root mean square displacement between two crystals, 1.0 if they do not match (pymatgen, stol 1, no scaling)."""
    from pymatgen.analysis.structure_matcher import StructureMatcher
    from pymatgen.io.ase import AseAtomsAdaptor

    adaptor = AseAtomsAdaptor()
    found = StructureMatcher(stol=1.0, scale=False).get_rms_dist(adaptor.get_structure(first), adaptor.get_structure(second))
    return 1.0 if found is None else float(found[0])


# --- relaxing many --------------------------------------------------------------------------------------------------


def relax_one(calculator: Any, atoms: Atoms, fmax: float = FMAX, steps: int = STEPS) -> dict[str, Any]:
    """Energy (eV), relaxed structure, steps and convergence, or the error, as a dictionary for JSON."""
    work = atoms.copy()
    work.calc = calculator
    try:
        optimizer = FIRE(FrechetCellFilter(work), logfile=None)
        converged = optimizer.run(fmax=fmax, steps=steps)
        energy = float(work.get_potential_energy())
        if not np.isfinite(energy):
            raise ValueError(f"the energy is {energy}")
        return {"energy": energy, "converged": bool(converged), "steps": int(optimizer.nsteps), "numbers": work.numbers.tolist(),
                "positions": work.positions.tolist(), "cell": work.cell.array.tolist()}  # fmt: skip
    except Exception as error:
        return {"energy": None, "converged": False, "error": f"{type(error).__name__}: {error}"[:300]}


def relax_many(
    make: Callable[[], Any],
    structures: Sequence[tuple[str, Atoms]],
    path: Path,
    processes: int = 1,
    progress: bool = True,
    text: str = "discovery",
) -> dict[str, dict[str, Any]]:
    """Relax structures and keep each result as soon as it is there, one JSON line each; what is in the file already is not done again.

    Args:
        make: Makes the calculator, once in each process (must be picklable for more than one process).
        structures: (identifier, atoms).
        path: File of results, made or continued. A last line cut short by a crash is dropped.
        processes: Worker processes; each uses one thread, and one of the GPUs listed in CUDA_VISIBLE_DEVICES in turn.
        progress: Show a bar.
        text: Beside the bar.

    Returns:
        Results by identifier.
    """
    done = read_results(path)
    todo = [(name, atoms) for name, atoms in structures if name not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(
        total=len(structures),
        initial=len(structures) - len(todo),
        desc=text,
        disable=None if progress else True,
        dynamic_ncols=True,
        leave=False,
    )
    with open(path, "a", encoding="utf-8") as file, bar:

        def keep(name: str, result: dict[str, Any]) -> None:
            done[name] = result
            file.write(json.dumps(plain({"id": name, **result})) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update()

        if processes == 1 or len(todo) < 2:
            calculator = make() if todo else None
            for name, atoms in todo:
                keep(name, relax_one(calculator, atoms))
        else:
            for name, result in _by_processes(make, todo, min(processes, len(todo))):
                keep(name, result)
    return done


def _by_processes(make: Callable[[], Any], todo: Sequence[tuple[str, Atoms]], n: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results of structures as processes have them, by identifier.

    Raises:
        RuntimeError: a process ended by itself.
    """
    with ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), _start, (make,)) as executor:
        try:
            with without_script():  # the processes start with the first task
                answers = [executor.submit(_work, task) for task in todo]
            for answer in as_completed(answers):
                yield answer.result()
        except (PicklingError, AttributeError, TypeError) as error:
            raise InputError(f"The calculator cannot be sent to other processes ({error}). Take processes 1.") from None
        except BrokenProcessPool:
            raise RuntimeError(
                f"One of {n} processes ended by itself: is there too little memory for so many? What is done is kept; the same call goes on. "
                "Take fewer --processes."
            ) from None
        finally:
            executor.shutdown(cancel_futures=True)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Results by identifier; an unfinished last line is cut off the file."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    entries = [json.loads(line) for line in whole.splitlines()]
    return {e.pop("id"): e for e in entries}


_CALCULATOR: Any = None


def _start(make: Callable[[], Any]) -> None:
    global _CALCULATOR
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(visible) > 1:  # a GPU for each worker, in turn
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[(multiprocessing.current_process()._identity[0] - 1) % len(visible)]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    _CALCULATOR = make()
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _work(task: tuple[str, Atoms]) -> tuple[str, dict[str, Any]]:
    return task[0], relax_one(_CALCULATOR, task[1])


# --- files ----------------------------------------------------------------------------------------------------------


def read_initial(path: Path | str) -> list[tuple[str, Atoms]]:
    """(identifier, atoms) of an extended XYZ file, may be compressed; the identifier is ``info["material_id"]``.

    Raises:
        ValueError: a frame without an identifier, or one that occurs twice.
    """
    out: list[tuple[str, Atoms]] = []
    seen = set()
    for k, atoms in enumerate(read_frames(path)):
        if "material_id" not in atoms.info:
            raise InputError(f"'{path}' frame {k} has no material_id in its header, so it cannot be found in the table.")
        name = str(atoms.info["material_id"])
        if name in seen:
            raise InputError(f"'{path}': material_id '{name}' occurs twice.")
        seen.add(name)
        out.append((name, atoms))
    return out


def read_table(path: Path | str) -> dict[str, dict[str, Any]]:
    """Rows by material_id of a CSV table (may be compressed) with the columns of the package's wbm-summary.csv.

    Raises:
        ValueError: columns are missing.
    """
    with open_text(Path(path)) as file:
        reader = csv.DictReader(file)
        missing = set(COLUMNS) - set(reader.fieldnames or [])
        if missing:
            raise InputError(f"'{path}' lacks {', '.join(f'{c} ({COLUMNS[c]})' for c in sorted(missing))}.")
        return {row["material_id"]: row for row in reader}


def _is_number(text: Any) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except (TypeError, ValueError):
        return False


def hull_distances(results: dict[str, dict[str, Any]], table: dict[str, dict[str, Any]], identifiers: Sequence[str]) -> tuple[Array, Array]:
    """Distances to the hull by DFT and by the potential, eV/atom.

    The potential shifts the DFT distance by its error of the energy,

        d_pred = d_DFT + (E_pred - E_DFT) / n,

    which is what the package computes from formation energies: elemental references and corrections are the same on both
    sides and cancel.
    """
    true, predicted = [], []
    for name in identifiers:
        row = table[name]
        distance = float(row["e_above_hull_mp2020_corrected_ppd_mp"])
        energy = results.get(name, {}).get("energy")
        error = np.nan if energy is None else (energy - float(row["uncorrected_energy"])) / int(float(row["n_sites"]))
        true.append(distance)
        predicted.append(distance + error if abs(error) <= LARGEST_ERROR else np.nan)
    return np.array(true), np.array(predicted)


# --- verdict --------------------------------------------------------------------------------------------------------

MISSED = "Screening with this potential misses stable materials or wastes calculations on unstable ones."


def check(candidate: Candidate) -> Result:
    """Relaxes the structures of --discovery and compares with the table."""
    config = candidate.config
    if not config.discovery:
        return skipped("No set of crystals: give --discovery STRUCTURES and --discovery-table CSV.")
    if not config.discovery_table:
        raise InputError("--discovery needs --discovery-table: a CSV file with the columns of wbm-summary.csv.")
    structures, table = read_initial(config.discovery), read_table(config.discovery_table)
    unknown = [name for name, _ in structures if name not in table]
    if unknown:
        raise InputError(f"{len(unknown)} structures of '{config.discovery}' are not in '{config.discovery_table}' (first: {unknown[0]}).")
    for name, atoms in structures:
        for column in NUMBERS:
            if not _is_number(table[name][column]):
                raise InputError(
                    f"'{config.discovery_table}' has '{table[name][column]}' as {column} of '{name}', where a number is expected. "
                    f"Complete the table, or leave '{name}' out of '{config.discovery}'."
                )
        if len(atoms) != int(float(table[name]["n_sites"])):
            raise InputError(
                f"'{name}' has {len(atoms)} atoms in '{config.discovery}' and n_sites {table[name]['n_sites']} in '{config.discovery_table}': their "
                "energies are of cells of unlike size. Give the cells that the table is of."
            )
    if config.discovery_count is not None:
        structures = structures[: config.discovery_count]
    results = relax_many(
        candidate.make,
        structures,
        candidate.folder / "discovery.jsonl",
        config.processes,
        candidate.progress,
        f"{candidate.name}: discovery",
    )
    names = [name for name, _ in structures]
    true, predicted = hull_distances(results, table, names)
    every = stability_metrics(true, predicted)
    metrics: list[Metric] = []
    unique = np.array([str(table[n].get("unique_prototype", "")).lower() in ("true", "1") for n in names])
    sets = [("", every)] + ([(", unique prototypes", stability_metrics(true[unique], predicted[unique]))] if unique.any() else [])
    for label, m in sets:
        metrics += [
            at_least(f"F1{label}", m["F1"], "", 0.75, 0.5, MISSED), measured(f"DAF{label}", m["DAF"], "", "high"),
            measured(f"precision{label}", m["Precision"], "", "high"), measured(f"accuracy{label}", m["Accuracy"], "", "high"),
            measured(f"MAE{label}", m["MAE"], "eV/atom", "low"), measured(f"R2{label}", m["R2"], "", "high"),
        ]  # fmt: skip
    failed = sum(r.get("energy") is None for r in (results[n] for n in names))
    metrics.append(at_most("structures without an answer", 100 * failed / len(names), "%", 0.5, 5.0, MISSED))
    metrics.append(
        measured("relaxations that did not converge", 100 * sum(not results[n].get("converged") for n in names) / len(names), "%", "low")
    )
    rmsd = _rmsd(config, results, names)
    if rmsd is not None:
        metrics.append(at_most("RMSD of relaxed structures", rmsd, "", 0.1, 0.3, "Relaxed structures are not those of DFT."))
    panels = [
        Panel(
            "Distance to the hull",
            "DFT, eV/atom",
            "potential, eV/atom",
            [curve(true, predicted), curve([true.min(), true.max()], [true.min(), true.max()], "equal", reference=True)],
            points=True,
        )
    ]
    return conclude(
        metrics,
        panels,
        [f"{len(names)} structure{'s' * (len(names) != 1)}; FIRE, FrechetCellFilter, fmax {FMAX} eV/Å, {STEPS} steps."],
        "Finds the stable materials.",
    )


def _rmsd(config: Any, results: dict[str, dict[str, Any]], names: Sequence[str]) -> float | None:
    """Mean distance to the DFT-relaxed structures (1 where there is none or no match); None without references or pymatgen."""
    if not config.discovery_relaxed:
        return None
    try:
        import pymatgen  # noqa: F401
    except ImportError:
        log.warning("the RMSD of relaxed structures needs pymatgen: pip install 'gossamer[discovery]'")
        return None
    references = dict(read_initial(config.discovery_relaxed))
    distances = []
    for name in names:
        result = results[name]
        if name in references:
            relaxed = None if result.get("energy") is None else Atoms(result["numbers"], result["positions"], cell=result["cell"], pbc=True)
            distances.append(1.0 if relaxed is None else structure_distance(relaxed, references[name]))
    return float(np.mean(distances)) if distances else None
