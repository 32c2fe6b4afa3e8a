"""Measuring how wrong a potential may be: distances of last features, calibrated on frames that it was not trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from numpy.typing import NDArray
from torch import Tensor

from gossamer.data.batch import batches_by_atoms
from gossamer.data.dataset import Subset, isolated_atoms
from gossamer.data.structure import Structure
from gossamer.files import atomic_path
from gossamer.graph import Graph
from gossamer.nn.uncertainty import Uncertainty
from gossamer.potential import Potential, Prediction

log = logging.getLogger(__name__)
Run = Callable[[Graph, bool], Prediction]
TRAINING_ATOMS, VALIDATION_ATOMS = 10_000, 3_000
"""of how many the features are looked at; more where an element would be rare"""
ENOUGH = 100
"""atoms of an element, as far as there are"""
DRAWN = 10
"""atoms' worth by which the scale of an element is drawn to that of all"""


def measure_uncertainty(
    potential: Potential,
    train: Sequence[Structure],
    valid: Sequence[Structure],
    run: Run | None = None,
    free_atoms_only: bool = False,
) -> None:
    """Give a potential its uncertainty: features of training frames, errors on validation frames.

    Isolated atoms do not validate: they are far from all others, and their energies are known, so that nothing would look uncertain.

    Args:
        potential: Gets `Potential.uncertainty`.
        train: Frames that it was trained on.
        valid: Labelled frames that it was not trained on.
        run: An engine of the potential that evaluates in its place.
        free_atoms_only: Leave out errors of forces of atoms that were held fixed: it was not trained on them.

    Raises:
        ValueError: no training frames, or no labels in the validation frames.
    """
    bound = Subset(valid, np.flatnonzero(~isolated_atoms(valid, potential.cutoff)).tolist())
    training, validation = sample(train, TRAINING_ATOMS), sample(bound, VALIDATION_ATOMS)
    if not training or not any(s.energy is not None or s.forces is not None for s in validation):
        raise ValueError(
            f"An uncertainty needs training frames and labelled frames that were not trained on, found {len(training)} and "
            f"{sum(bool(s.labels) for s in validation)}."
        )
    parts = [
        (p.features, potential.species_of[g.atomic_numbers], g.graph_index) for g, p, _ in _predictions(potential, training, run, False)
    ]
    ends = np.cumsum([0, *(int(index.max()) + 1 for _, _, index in parts)])
    features, species = torch.cat([x for x, _, _ in parts]), torch.cat([s for _, s, _ in parts])  # type: ignore[misc]
    graph_index = torch.cat([index + int(end) for (_, _, index), end in zip(parts, ends, strict=False)])
    uncertainty = Uncertainty(len(potential.table), features.shape[1]).to(potential.device)
    uncertainty.fit(features, species, graph_index)
    record = _calibrate(potential, uncertainty, validation, run, free_atoms_only)
    uncertainty.record = {"n_training_frames": len(training), "n_validation_frames": len(validation), **record}
    potential.uncertainty = uncertainty


def sample(structures: Sequence[Structure], most_atoms: int) -> list[Structure]:
    """Frames of at most about so many atoms, drawn at random, always alike, and as many more as rare elements need."""
    counts: NDArray[np.int64] = np.zeros(119, dtype=np.int64)
    chosen = []
    for k in np.random.default_rng(0).permutation(len(structures)).tolist():
        structure = structures[k]
        if counts.sum() < most_atoms or (counts[structure.atomic_numbers] < ENOUGH).any():
            chosen.append(structure)
            counts += np.bincount(structure.atomic_numbers, minlength=len(counts))
    return chosen


def _predictions(
    potential: Potential, structures: Sequence[Structure], run: Run | None, forces: bool
) -> Iterator[tuple[Graph, Prediction, Sequence[Structure]]]:
    was_training = potential.training
    potential.eval()
    try:
        for _, batch in batches_by_atoms(structures, 2048):
            graph = potential.collate(batch)
            with torch.no_grad():
                yield graph, potential(graph, forces=forces) if run is None else run(graph, False), batch
    finally:
        potential.train(was_training)


def _calibrate(
    potential: Potential, uncertainty: Uncertainty, structures: Sequence[Structure], run: Run | None, free_atoms_only: bool
) -> dict[str, Any]:
    """Set the scales to measured errors over distances; says of how many."""
    n_elements = len(potential.table)
    errors, squares, counts = (torch.zeros(n_elements, dtype=torch.float64) for _ in range(3))
    energies: list[tuple[float, float]] = []
    for graph, prediction, batch in _predictions(potential, structures, run, True):
        species = potential.species_of[graph.atomic_numbers]
        assert prediction.features is not None
        wholes, _ = uncertainty(prediction.features, species, graph.graph_index, graph.n_graphs)
        distances = uncertainty.distances(prediction.features, species)[1]  # without infinities of elements that were not trained on
        energies += [
            (float(energy) - s.energy, float(d))
            for energy, s, d in zip(prediction.energy, batch, wholes, strict=True)
            if s.energy is not None
        ]
        if prediction.forces is None:
            continue
        sizes = [s.n_atoms for s in batch]
        for s, f, z, d in zip(batch, *(x.split(sizes) for x in (prediction.forces, species, distances)), strict=True):
            if s.forces is not None:
                square = (f.cpu() - torch.from_numpy(s.forces)).pow(2).mean(dim=1)
                counted = torch.from_numpy(s.free) if free_atoms_only else torch.ones(s.n_atoms, dtype=torch.bool)
                for total, values in ((errors, square), (squares, d.cpu() ** 2), (counts, torch.ones_like(square))):
                    total.index_add_(0, z.cpu()[counted], values[counted])
    uncertainty.force_scales.mul_(_force_scales(errors, squares, counts).to(potential.device))
    known = np.array([pair for pair in energies if np.isfinite(pair).all()]).reshape(-1, 2)
    uncertainty.energy_scale.fill_(float(np.sqrt((known[:, 0] ** 2).mean() / (known[:, 1] ** 2).mean())) if len(known) else np.nan)
    elements = [chemical_symbols[z] for z in potential.table.tolist()]
    rms = float(torch.sqrt(errors.sum() / counts.sum())) if counts.any() else None
    return {
        "forces_rmse_eV_per_A": rms,
        "n_energies": len(known),
        "n_forces": {e: int(n) for e, n in zip(elements, counts.tolist(), strict=True) if n},
    }


def _force_scales(errors: Tensor, squares: Tensor, counts: Tensor) -> Tensor:
    """a_z of each element: root of summed squared errors over summed squared distances, drawn to that of all elements."""
    if not counts.any():
        return torch.full_like(counts, torch.nan)
    of_all = errors.sum() / squares.sum().clamp(min=1e-300)
    usual = squares / counts.clamp(min=1)
    usual = DRAWN * torch.where(counts > 0, usual, squares.sum() / counts.sum())
    return torch.sqrt((errors + of_all * usual) / (squares + usual).clamp(min=1e-300))


# --- is an uncertainty honest? ---------------------------------------------------------------------------------------


def honesty(errors: NDArray[np.float64], expected: NDArray[np.float64]) -> dict[str, Any]:
    """Numbers that say what uncertainties are worth.

    Args:
        errors: Root mean square errors: of the components of each force, of each energy.
        expected: What was expected of each.

    Returns:
        "rank": Spearman's correlation of both (1: the most uncertain are the most wrong). "ratio": root mean square error over root mean
        square expectation (1: calibrated; above, the potential is too sure of itself). "curve": expected and found root mean
        square of tenths of the data, sorted by what was expected. Of fewer than two numbers None, None and [].
    """
    from scipy.stats import spearmanr  # a second

    finite = np.isfinite(expected)
    errors, expected = np.abs(errors[finite]), expected[finite]
    if len(errors) < 2:
        return {"rank": None, "ratio": None, "curve": []}

    def rms(x: NDArray[np.float64]) -> float:
        return float(np.sqrt((x**2).mean()))

    order = np.argsort(expected, kind="stable")
    tenths = [part for part in np.array_split(order, 10) if len(part)]
    varied = np.ptp(errors) > 0 and np.ptp(expected) > 0
    return {
        "rank": float(spearmanr(expected, errors).statistic) if varied else None,
        "ratio": rms(errors) / max(rms(expected), 1e-300),
        "curve": [(rms(expected[part]), rms(errors[part])) for part in tenths],
    }


def plot_honesty(worth: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Calibration curves as PNG: errors found against errors expected, tenths of the data, beside the diagonal.

    Args:
        worth: By quantity, what `honesty` says of it.
        path: File to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    units = {"energy": "meV/atom", "forces": "meV/Å"}
    drawn = {name: 1000 * np.array(numbers["curve"]) for name, numbers in worth.items() if numbers["curve"]}
    figure = Figure(figsize=(3.6 * max(1, len(drawn)), 3.4), layout="constrained")
    for axes, (name, curve) in zip(np.atleast_1d(figure.subplots(1, max(1, len(drawn)))), drawn.items(), strict=True):
        positive = curve[curve > 0]
        ends = (positive.min() / 1.5, positive.max() * 1.5) if len(positive) else (0.1, 10.0)
        axes.plot(ends, ends, "--", color="0.6", lw=1)
        axes.plot(curve[:, 0], curve[:, 1], "o-", ms=4)
        axes.set(
            xscale="log",
            yscale="log",
            xlim=ends,
            ylim=ends,
            aspect="equal",
            xlabel=f"expected error, {units[name]}",
            ylabel=f"error found, {units[name]}",
            title=name,
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
