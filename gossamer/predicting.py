"""Energies, forces, stresses and features of structures in files: predict."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from tqdm import tqdm

from gossamer.arguments import as_path, at_home, whole
from gossamer.data.atoms import count_frames, disorder, iterate_frames
from gossamer.data.readers import is_own_format, read_structures
from gossamer.data.structure import Structure, as_structure
from gossamer.engine.engine import Engine, Way
from gossamer.files import InputError, atomic_path, say_replaced
from gossamer.graph import Graph
from gossamer.potential import Potential, Prediction
from gossamer.potential_file import as_potential

log = logging.getLogger(__name__)


def predict(
    model: Potential | Path | str,
    structures: Path | str | Sequence[Path | str],
    out: Path | str = "predicted.extxyz",
    device: str = "cpu",
    dtype: str | None = None,
    way: Way = "auto",
    dispersion: str | None = None,
    features: bool = False,
    batch_atoms: int = 2048,
    progress: bool = True,
) -> dict[str, Any]:
    """Write every frame of some files with what a potential says of it, in their order, many at once.

        predict("potential.safetensors", ["a.cif", "frames.extxyz"], out="predicted.extxyz")

    Energy (eV), forces (eV/Å) and stress (eV/Å³; of what is periodic along all axes, by conservative forces) are those of the frame for ASE
    and for ``gossamer fit``. What a frame said of itself before, labels say, is kept as reference_energy, reference_forces ...; if it has a
    reference_energy already, that one is kept. Files are read and written frame by frame, so there may be more than memory holds.

    Args:
        model: Potential, or file of one.
        structures: One file or several, of any format that ASE reads; or a folder, a store and other formats of ``read_structures``, whose
            labels become references in our units. All frames.
        out: Extended XYZ file to write, whole or not at all; one of before is replaced.
        device: Where to compute, if ``model`` is a file.
        dtype: Precision, if ``model`` is a file; by default as saved.
        way: How to evaluate (`gossamer.engine.engine`).
        dispersion: Functional whose D3 is added (`gossamer.dispersion.D3`).
        features: Also write the last features of every atom, (n_atoms, M): numbers that do not change with rotation, of which energies
            are a linear function. They tell environments apart (clusters, outliers, choice of frames to label).
        batch_atoms: Atoms evaluated at once.
        progress: Show a progress bar.

    Returns:
        out, frames, atoms, seconds, way; and, of a potential with an uncertainty, most_uncertain_frame (counted from 0 in ``out``) and
        forces_uncertainty_eV_per_A, that of its most uncertain atom.

    Raises:
        TypeError: frames in memory, for which there is `Potential.predict`.
        FileExistsError: ``out`` is one of the files that are read.
        ValueError: no structures, an ``out`` of another format, a frame that cannot be read, is disordered or holds an element that the
            potential does not know, or features of a compiled program that has none.
    """
    paths = _paths(structures)
    out = as_path("out", out, "the name of a file")
    _check(paths, out, batch_atoms)
    say_replaced(out)
    potential = as_potential(model, device, dtype)
    if not potential.conservative:
        log.warning("this potential predicts forces directly: they are not the gradient of the energy, and there is no stress")
    engine = Engine(potential, way, dispersion=dispersion)
    began = time.perf_counter()
    n_frames = n_atoms = 0
    worst: tuple[float, int | None] = (-1.0, None)
    total = None if any(is_own_format(path) for path in paths) else sum(count_frames(path) for path in paths)
    bar = tqdm(total=total, unit="frame", disable=None if progress else True, dynamic_ncols=True)
    with bar, atomic_path(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for batch in _batches(paths, batch_atoms):
            for name, atoms, answer in _answers(engine, batch, features):
                if not np.isfinite(answer["energy"]) or not np.isfinite(answer["forces"]).all():
                    raise ValueError(
                        f"{name}: the potential's energy or forces are not finite. Are atoms on one another, or numbers in it NaN?"
                    )
                ase.io.write(file, _written(atoms, answer), format="extxyz")
                if "forces_uncertainty" in answer:
                    worst = max(worst, (float(answer["forces_uncertainty"].max()), n_frames), key=lambda pair: pair[0])
                n_frames, n_atoms = n_frames + 1, n_atoms + len(atoms)
                bar.update()
    seconds = round(time.perf_counter() - began, 2)
    found: dict[str, Any] = {"out": str(out), "frames": n_frames, "atoms": n_atoms, "seconds": seconds, "way": engine.way}
    if worst[1] is not None:
        found |= {"most_uncertain_frame": worst[1], "forces_uncertainty_eV_per_A": worst[0]}
    return found


def _paths(structures: Any) -> list[Path]:
    """The files; raises TypeError for frames in memory."""
    found: list[Any] = [structures] if isinstance(structures, str | Path | Atoms | Structure) else list(structures)
    for item in found:
        if not isinstance(item, str | Path):
            raise TypeError(
                f"structures: expected files, found {type(item).__name__}. Of frames in memory gossamer.load(model).predict(frames) gives all this."
            )
    return [Path(at_home(item)) for item in found]


def _check(paths: Sequence[Path], out: Path, batch_atoms: int) -> None:
    """Refuse what cannot be done before a potential is loaded."""
    if not paths:
        raise ValueError("There are no structures to predict: give at least one file.")
    whole("batch_atoms", batch_atoms, 1)
    if out.suffix not in (".xyz", ".extxyz"):  # ASE's other formats would leave out uncertainties, features and references
        raise ValueError(f"'{out}': predictions are written as extended XYZ. Choose an --out that ends with .extxyz or .xyz.")
    for path in paths:
        if out.exists() and path.exists() and out.samefile(path):
            raise FileExistsError(f"'{out}' is read, and would be written over. Choose another --out.")


def _batches(paths: Sequence[Path], batch_atoms: int) -> Iterator[list[tuple[str, Atoms]]]:
    """Successive frames with names for messages, at most ``batch_atoms`` atoms of them (or one larger one) at once."""
    batch: list[tuple[str, Atoms]] = []
    size = 0
    for path in paths:
        own = (s.to_ase() for s in read_structures(path, keep_broken=True)) if is_own_format(path) else iterate_frames(path)
        for k, atoms in enumerate(own):
            if disordered := disorder(atoms):
                raise InputError(f"'{path}', frame {k}: {disordered}")
            if batch and size + len(atoms) > batch_atoms:
                yield batch
                batch, size = [], 0
            batch.append((f"'{path}', frame {k}", atoms))
            size += len(atoms)
    if batch:
        yield batch


def _answers(engine: Engine, batch: Sequence[tuple[str, Atoms]], features: bool) -> Iterator[tuple[str, Atoms, dict[str, Any]]]:
    """Each frame with what the potential says of it."""
    seen: list[Prediction] = []

    def run(graph: Graph, stress: bool) -> Prediction:
        seen.append(engine(graph, stress))
        return seen[-1]

    potential = engine.potential
    chosen = [as_structure(atoms, name) for name, atoms in batch]
    sizes = [s.n_atoms for s in chosen]
    answers = potential.predict(chosen, run=run, batch_atoms=sum(sizes), uncertainty=potential.uncertainty is not None)
    (out,) = seen
    for name, values in (("charges", out.charges), ("features", out.features if features else None)):
        if values is not None:
            parts = np.split(values.detach().cpu().numpy(), np.cumsum(sizes)[:-1])
            answers = [{**answer, name: part} for answer, part in zip(answers, parts, strict=True)]
    if features and out.features is None:
        raise ValueError(f"The {engine.way} of this potential gives no features. Choose --way kernels.")
    for (name, atoms), answer in zip(batch, answers, strict=True):
        yield name, atoms, answer


def _written(atoms: Atoms, answer: dict[str, Any]) -> Atoms:
    """The frame with the prediction as its results, and what it said of itself as references."""
    frame = atoms.copy()
    for name, value in (atoms.calc.results if atoms.calc is not None else {}).items():
        of_atoms = np.ndim(value) > 0 and len(value) == len(atoms) and name not in ("stress", "dipole")
        table = frame.arrays if of_atoms else frame.info
        table.setdefault(f"reference_{name}", np.array(value) if np.ndim(value) else value)
    frame.info.pop("energy_uncertainty", None)  # of another potential
    for name in ("forces_uncertainty", "features"):
        frame.arrays.pop(name, None)
        if name in answer:
            frame.set_array(name, answer[name])
    if "energy_uncertainty" in answer:
        frame.info["energy_uncertainty"] = float(answer["energy_uncertainty"])
    results: dict[str, Any] = {name: answer[name] for name in ("energy", "forces", "charges") if name in answer}
    if answer["stress"] is not None:
        results["stress"] = full_3x3_to_voigt_6_stress(answer["stress"])
    for table in (frame.info, frame.arrays):  # what the frame says under the same names is a reference, too
        for name in results.keys() & table.keys():
            table.setdefault(f"reference_{name}", table.pop(name))
    frame.calc = SinglePointCalculator(frame, **results)
    return frame
