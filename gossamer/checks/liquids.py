"""Structure and dynamics of trajectories: RDF, distances, MSD, diffusivity, stability; plain frames, no calculator.

Definitions of "Forces are not enough" (Fu et al., TMLR 2023, arXiv:2210.07237), so that numbers compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from ase.geometry import find_mic
from numpy.typing import NDArray

from gossamer.neighbors import neighbor_list

Array = NDArray[np.float64]


def rdf(frames: Sequence[Atoms], r_max: float = 6.0, n_bins: int = 500, pair: tuple[str, str] | None = None) -> tuple[Array, Array]:
    """Radial distribution function over all pairs, or those of two elements; periodic images included at any distance.

        g(r) = (pairs in the shell) / (pairs of an ideal gas of the same density)

    Args:
        frames: Frames with a volume (pbc along all axes).
        r_max: Å.
        n_bins: Bins between 0 and ``r_max``.
        pair: Symbols of centre and neighbour; None takes every atom.

    Returns:
        r (n_bins,) middle of the bins in Å, g (n_bins,).
    """
    if len(frames) == 0:
        raise ValueError("An RDF needs at least one frame.")
    edges = np.linspace(0.0, r_max, n_bins + 1)
    shell = 4 / 3 * np.pi * np.diff(edges**3)
    total = np.zeros(n_bins)
    for frame in frames:
        if not frame.pbc.all():
            raise ValueError(f"An RDF needs periodicity along all axes, found pbc {frame.pbc.tolist()}. Use distance_distribution.")
        (sender, receiver), shifts = neighbor_list(frame.positions, frame.cell.array, frame.pbc, r_max)
        numbers = frame.numbers
        if pair is None:
            n_centres = n_neighbours = len(frame)
            keep = slice(None)
        else:
            za, zb = (atomic_numbers[s] for s in pair)
            n_centres, n_neighbours = int((numbers == za).sum()), int((numbers == zb).sum())
            keep = (numbers[receiver] == za) & (numbers[sender] == zb)
        vectors = frame.positions[sender[keep]] + shifts[keep] @ frame.cell.array - frame.positions[receiver[keep]]
        counts, _ = np.histogram(np.linalg.norm(vectors, axis=1), bins=edges)
        ideal = n_centres * n_neighbours / frame.get_volume() * shell
        total += counts / np.maximum(ideal, 1e-300) if ideal.any() else 0.0
    return 0.5 * (edges[1:] + edges[:-1]), total / len(frames)


def rdf_error(g: Array, reference: Array, r_max: float = 6.0) -> float:
    """mean |g - g_ref| * r_max, an integral over r in Å (6.0 in the benchmark's definition)."""
    if g.shape != reference.shape:
        raise ValueError(f"RDFs on different bins: {g.shape} and {reference.shape}.")
    return float(np.abs(g - reference).mean() * r_max)


def rdf_overlap(g: Array, reference: Array) -> float:
    """1 - 0.5 * integral |g - g_ref| / integral of their mean: 1 for equal curves, also where neither has a pair."""
    both = (0.5 * (g + reference)).sum()
    return float(1 - 0.5 * np.abs(g - reference).sum() / both) if both > 0 else 1.0


def rdf_noise(frames: Sequence[Atoms], r_max: float = 6.0, n_bins: int = 500, pair: tuple[str, str] | None = None) -> float:
    """What the overlap of an RDF with the true one lacks by chance: half of what the overlap of two halves of the frames lacks.

    An average over half as many frames varies √2 times as much, and a difference of two √2 times as much again; the sum of two such noises is
    then an upper bound for two runs, also where bins have hardly a pair. Each half has every other twentieth of the frames, so that what drifts is
    not taken for chance. Zero for a single frame.
    """
    if len(frames) < 2:
        return 0.0
    half = np.arange(len(frames)) * min(20, len(frames)) // len(frames) % 2
    first, second = (rdf([frames[k] for k in np.flatnonzero(half == part).tolist()], r_max, n_bins, pair)[1] for part in (0, 1))
    return (1 - rdf_overlap(first, second)) / 2


def distance_distribution(frames: Sequence[Atoms], r_max: float = 10.0, n_bins: int = 500) -> tuple[Array, Array]:
    """h(r): density of all interatomic distances of a molecule, or a slab with its images, per Å and normalised to 1 over 0 … ``r_max``."""
    edges = np.linspace(0.0, r_max, n_bins + 1)
    counts = np.zeros(n_bins)
    for frame in frames:
        if frame.pbc.any():  # among which images an atom lies says nothing
            (sender, receiver), shifts = neighbor_list(frame.positions, frame.cell.array, frame.pbc, r_max)
            distances = np.linalg.norm(frame.positions[sender] + shifts @ frame.cell.array - frame.positions[receiver], axis=1)
        else:
            first, second = np.triu_indices(len(frame), 1)
            distances = np.linalg.norm(frame.positions[first] - frame.positions[second], axis=1)
        counts += np.histogram(distances, bins=edges)[0]
    return 0.5 * (edges[1:] + edges[:-1]), counts / max(counts.sum(), 1) / (r_max / n_bins)


def unwrapped_positions(frames: Sequence[Atoms]) -> Array:
    """(n_frames, n_atoms, 3) positions in Å made continuous by the nearest image; moves beyond half a cell are lost."""
    positions = [frames[0].positions.copy()]
    for before, frame in zip(frames[:-1], frames[1:], strict=True):
        step = frame.positions - before.positions
        if frame.pbc.any():
            step = find_mic(step, frame.cell, frame.pbc)[0]
        positions.append(positions[-1] + step)
    return np.array(positions)


def mean_squared_displacement(positions: Array, masses: Array, selected: NDArray[np.bool_] | None = None) -> Array:
    """MSD (n_frames,) in Å² of the selected atoms over all time origins, the centre of mass removed.

    By the autocorrelation theorem (n log n), Calandrini et al., Collection SFN 12, 201 (2011), Eq. 16-18.
    """
    centred = positions - np.einsum("tnx,n->tx", positions, masses)[:, None] / masses.sum()
    x = centred if selected is None else centred[:, selected]
    n = len(x)
    squared = (x**2).sum(axis=(1, 2)) / x.shape[1]
    spectrum = np.fft.rfft(x, n=2 * n, axis=0)
    correlation = np.fft.irfft(spectrum * spectrum.conj(), n=2 * n, axis=0)[:n].sum(axis=2).mean(axis=1)
    lags = np.arange(n)
    head = np.concatenate([[0.0], np.cumsum(squared)])
    # sum over origins of r(t)² + r(t + lag)²
    sums = head[n - lags] + (head[n] - head[lags])
    return np.maximum((sums - 2 * correlation) / (n - lags), 0.0)


def diffusivity(msd: Array, interval: float) -> float:
    """MSD(t) / (6 t) at the end of the window, in 1e-9 m²/s (Fu et al.). Args: msd in Å², interval between frames in ps."""
    return float(msd[-1] / (6 * (len(msd) - 1) * interval) * 10)


def diffusivity_blocks(
    positions: Array, masses: Array, selected: NDArray[np.bool_], interval: float, n_blocks: int = 4
) -> tuple[float, float]:
    """Mean and standard error over blocks of the slope of MSD over 6, between 20 and 70 % of each block, in 1e-9 m²/s.

    Args:
        positions: (n_frames, n_atoms, 3) unwrapped, Å.
        masses: (n_atoms,)
        selected: (n_atoms,) atoms counted.
        interval: ps between frames.
        n_blocks: At least 2.
    """
    values = []
    for block in np.array_split(positions, n_blocks):
        msd = mean_squared_displacement(block, masses, selected)
        part = slice(max(1, len(msd) // 5), max(3, int(0.7 * len(msd))))
        times = np.arange(len(msd)) * interval
        values.append(np.polyfit(times[part], msd[part], 1)[0] / 6 * 10)
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(n_blocks))


def stability_time(
    frames: Sequence[Atoms],
    reference: Array,
    interval: float,
    window: float = 1.0,
    threshold: float = 1.0,
    r_max: float = 6.0,
    most_noise: float = 0.0,
) -> float:
    """First time in ps at which the RDF of a window leaves the reference by more than the threshold; the length if never.

    Args:
        frames: Trajectory.
        reference: g(r) on as many bins of 0 … ``r_max``.
        interval: ps between frames.
        window: ps per window (1 for LiPS, 2 for water and methane).
        threshold: Of ``rdf_error``.
        r_max: Å.
        most_noise: Å; up to so much is allowed on top of the threshold where windows next to each other differ: of few atoms or frames they
            do by chance. The published definition allows none.
    """
    size = max(1, round(window / interval))
    starts = range(0, len(frames) - size + 1, size)
    found = [rdf(frames[start : start + size], r_max, len(reference))[1] for start in starts]
    differences = [rdf_error(a, b, r_max) for a, b in pairwise(found)]
    noise = min(float(np.median(differences)) / np.sqrt(2), most_noise) if differences else 0.0
    for start, g in zip(starts, found, strict=True):
        if rdf_error(g, reference, r_max) > threshold + noise:
            return start * interval
    return len(frames) * interval


def bond_stability_time(frames: Sequence[Atoms], bonds: NDArray[np.int64], interval: float, tolerance: float = 0.5) -> float:
    """First time in ps at which a bond is more than ``tolerance`` Å from its length in the first frame; the length if never."""
    if len(bonds) == 0:
        return len(frames) * interval
    lengths = np.array([find_mic(f.positions[bonds[:, 1]] - f.positions[bonds[:, 0]], f.cell, f.pbc)[1] for f in frames])
    broken = np.flatnonzero((np.abs(lengths - lengths[0]) > tolerance).any(axis=1))
    return float(broken[0] * interval) if len(broken) else len(frames) * interval
