"""Energy curves of two atoms: the wall, holes at short range, spurious minima; any ASE calculator."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from gossamer.checks.candidate import Candidate, bond_length
from gossamer.checks.result import Curve, InputError, Metric, Panel, Result, at_most, conclude, curve, measured
from gossamer.checks.smoothness import tortuosity
from gossamer.files import open_text

Array = NDArray[np.float64]
SHORTEST, LONGEST = 0.1, 6.0
"""Å, as in Matbench Discovery (119 points spaced evenly in log r)"""
CLOSEST_BOND = 0.55
"""sums of covalent radii, below which no two atoms are bound: Ce2 0.58, V2 0.59, W2 0.64 (PBE)"""
STRONGEST_BOND = 15.0
"""eV, above which a minimum at short range is no bond: CO has 11"""


def dimer_curve(calculator: Any, first: str, second: str, distances: Array) -> tuple[Array, Array]:
    """Energies (eV) and forces on the second atom along the bond (eV/Å, positive repels); NaN where evaluation fails.

    Without a cell, or in a box of 30 Å for calculators that need one.
    """
    atoms = Atoms([first, second], np.zeros((2, 3)))
    atoms.calc = calculator
    energies, forces = np.full(len(distances), np.nan), np.full(len(distances), np.nan)
    for k, r in enumerate(distances):
        atoms.positions[1, 0] = r
        for attempt in range(2):
            try:
                energies[k] = atoms.get_potential_energy()
                forces[k] = atoms.get_forces(apply_constraint=False)[1, 0]
                break
            except Exception:
                if attempt or atoms.pbc.any():
                    break
                atoms.set_cell([30.0] * 3)
                atoms.pbc = True
    return energies, forces


def curve_metrics(distances: Array, energies: Array, forces: Array, bond: float) -> dict[str, float]:
    """What is wrong with a curve.

    ``tortuosity``, ``energy_jump`` (eV), ``energy_flips``, ``force_flips`` and ``conservation_deviation`` (mean
    |F + dE/dr|, eV/Å) as in MLIP Arena (differences below 1 meV and forces below 10 meV/Å count as zero). ``hole`` is the
    largest rise of the energy with distance within 0.8 bond lengths and before the bond, in eV, zero for a wall that only falls;
    ``wall`` the energy at the shortest distance over that at the longest; ``well_distance`` and ``well_depth`` the minimum
    beyond 0.55 bond lengths.

    Args:
        distances: (n,) Å, rising.
        energies, forces: (n,) as from `dimer_curve`.
        bond: Å, the sum of the covalent radii.
    """
    valid = np.isfinite(energies) & np.isfinite(forces)
    if valid.sum() < 8:
        return dict.fromkeys(
            (
                "tortuosity",
                "energy_jump",
                "energy_flips",
                "force_flips",
                "conservation_deviation",
                "hole",
                "wall",
                "well_distance",
                "well_depth",
            ),
            np.nan,
        )
    r, e, f = distances[valid], energies[valid], forces[valid]
    steps = np.diff(e)
    steps = steps[np.abs(steps) >= 1e-3]
    turn = np.diff(np.sign(steps)) != 0
    signs = np.sign(np.where(np.abs(f) < 1e-2, 0.0, f))
    signs = signs[signs != 0]
    well = int(np.argmin(np.where(r >= CLOSEST_BOND * bond, e, np.inf)))
    inner = e[r <= min(0.8 * bond, r[well] if e[-1] - e[well] < STRONGEST_BOND else np.inf)]
    return {
        "tortuosity": tortuosity(e),
        "energy_jump": float(np.abs(steps[:-1][turn]).sum() + np.abs(steps[1:][turn]).sum()),
        "energy_flips": float(turn.sum()),
        "force_flips": float((np.diff(signs) != 0).sum()),
        "conservation_deviation": float(np.mean(np.abs(f + np.gradient(e, r)))),
        "hole": float((e_ahead(inner) - inner).max()) if len(inner) else 0.0,
        "wall": float(e[0] - e[-1]),
        "well_distance": float(r[well]),
        "well_depth": float(e[-1] - e[well]),
    }


def e_ahead(energies: Array) -> Array:
    """For each distance the largest energy at it or farther out."""
    return np.maximum.accumulate(energies[::-1])[::-1]


def read_reference(path: Path | str, functional: str = "PBE") -> dict[str, tuple[Array, Array]]:
    """Curves (Å, eV) by pair ("H-H") from a JSON file: {functional: {pair: {"distances", "energies"}}}, may be compressed.

    Raises:
        ValueError: not such a file, or without that functional.
    """
    with open_text(Path(path)) as file:
        text = file.read()
    try:
        curves = json.loads(text)[functional]
        return {pair: (np.array(c["distances"]), np.array(c["energies"])) for pair, c in curves.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"'{path}' is not a file of dimer curves: expected {{'{functional}': {{'H-H': {{'distances': ..., 'energies': ...}}}}}} ({error!r})."
        ) from None


# --- verdict --------------------------------------------------------------------------------------------------------

HOLE = "At high temperature or pressure, or from a bad start, atoms fall into each other and the run is lost."
WAVES = "Spurious minima and waves: bonds form and break at distances where nature has none."


def check(candidate: Candidate) -> Result:
    """Curves of every element with itself (or of all pairs), their metrics and the grid of pictures."""
    pairs = [(e, e) for e in candidate.elements]
    if candidate.config.all_pairs:
        pairs = list(itertools.combinations_with_replacement(candidate.elements, 2))
    reference = read_reference(candidate.config.diatomics_reference) if candidate.config.diatomics_reference else {}
    distances = np.geomspace(SHORTEST, LONGEST, candidate.effort.diatomic_points)
    found: dict[str, dict[str, float]] = {}
    missing: dict[str, float] = {}
    panels = []
    for first, second in candidate.bar(pairs, "diatomics"):
        name = f"{first}-{second}"
        energies, forces = dimer_curve(candidate.calculator, first, second, distances)
        found[name] = curve_metrics(distances, energies, forces, bond_length(first, second))
        answered = np.isfinite(energies) & np.isfinite(forces)
        energies = energies - (energies[answered][-1] if answered.any() else 0.0)  # counted from the farthest distance with an answer
        missing[name] = float((~answered).mean())
        curves: list[Curve] = [curve(distances, energies)]
        if known := [pair for pair in (name, f"{second}-{first}") if pair in reference]:
            r, e = reference[known[0]]
            curves.append(curve(r, e - e[-1], "DFT", reference=True))
            far = (r >= 0.8 * bond_length(first, second)) & (r <= LONGEST)
            if far.any() and answered.any():
                found[name]["reference_mae"] = float(
                    np.abs(np.interp(r[far], distances[answered], energies[answered]) - (e - e[-1])[far]).mean()
                )
        depth = found[name]["well_depth"]
        floor = -1.6 * max(depth, 0.5) if np.isfinite(depth) else -5.0
        panels.append(
            Panel(
                name, "Å", "eV", curves, group="Curves of two atoms", x_limits=(0.0, LONGEST), y_limits=(floor, 4 * max(-floor / 1.6, 0.5))
            )
        )
    return conclude([*verdicts(found), _gaps(missing)], panels, [f"{len(pairs)} pair{'s' * (len(pairs) > 1)}, {len(distances)} distances of {SHORTEST} to {LONGEST} Å spaced evenly in log r."],
                    "Every pair repels at short range, with one minimum.")  # fmt: skip


def verdicts(found: dict[str, dict[str, float]]) -> list[Metric]:
    """The worst and the mean of each number over the pairs, and who is worst."""

    def values(key: str) -> Array:
        return np.array([v[key] for v in found.values()])

    n = len(found)
    broken = [pair for pair, v in found.items() if not np.isfinite(v["tortuosity"])]
    holes = [pair for pair, v in found.items() if v["hole"] > 0.05]
    soft = [pair for pair, v in found.items() if not v["wall"] > 5.0]
    waves = [pair for pair, v in found.items() if v["energy_flips"] > 2]
    metrics = [
        _count("pairs without an answer", broken, n, HOLE),
        _count("pairs with a hole at short range", holes, n, HOLE),
        _count("pairs without a wall (5 eV at 0.1 Å)", soft, n, HOLE),
        _count("pairs with more than two turns of the energy", waves, n, WAVES),
    ]
    kept = np.isfinite(values("tortuosity"))
    if kept.any():
        metrics += [
            at_most("mean tortuosity", float(values("tortuosity")[kept].mean()), "", 1.2, 3.0, WAVES),
            at_most("mean sign changes of the force", float(values("force_flips")[kept].mean()), "", 2.0, 6.0, WAVES),
            measured("mean energy jump", float(values("energy_jump")[kept].mean()), "eV", "low"),
            measured("deepest hole", float(values("hole")[kept].max()), "eV", "low"),
            measured("mean deviation of force and slope", float(values("conservation_deviation")[kept].mean()), "eV/Å"),
        ]
    errors = [v["reference_mae"] for v in found.values() if "reference_mae" in v]
    if errors:
        metrics.append(measured("mean error against the reference beyond 0.8 bond lengths", float(np.mean(errors)), "eV", "low"))
    return metrics


def _gaps(missing: dict[str, float]) -> Metric:
    """Share of the distances that the calculator could not evaluate."""
    worst = max(missing, key=lambda pair: missing[pair])
    metric = at_most("distances without an answer, worst pair", 100 * missing[worst], "%", 0.0, 20.0, HOLE)
    metric.reason += f" ({worst})"
    return metric


def _count(name: str, pairs: list[str], n: int, consequence: str) -> Metric:
    metric = at_most(name, float(len(pairs)), f"of {n}", 0.0, 0.1 * n, consequence)
    if pairs:
        metric.reason = f"{name}: {len(pairs)} of {n} ({', '.join(pairs[:6])}{' ...' if len(pairs) > 6 else ''})"
    return metric
