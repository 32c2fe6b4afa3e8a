"""Whether the labels of a data set agree with each other: energies with forces and stress, by pairs of frames that are near each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from ase.units import GPa

from gossamer.data.structure import Structure
from gossamer.data.units import ENERGY_UNITS, STRESS_UNITS

if TYPE_CHECKING:
    from gossamer.data.inspection import Inspection

OPPOSITE_SIGN = "stress has the opposite sign, that of VASP (compression positive): set --stress-sign vasp (data.labels.stress_sign)"
BOHR = 0.529177
"""Å"""
STILL = 0.02
"""Å that atoms may move besides the strain where two frames are to show it"""
NEAR, STEEP = 0.3, 5.0
"""Å that no atom may move from one frame to the other, and how many times their work the change of forces between them may be worth, where a pair
is to show by which factor a label is off: then half the sum of both ends is the integral, to a few per cent"""
SURE = 0.05
"""of a factor, its error where it is to be told"""


def compare_pairs(structures: Sequence[Structure], report: Inspection, limit: int = 1500) -> None:
    """Energy differences of near frames against -F·dx: the slope is 1 if the units and signs of both labels agree."""
    groups: dict[bytes, list[Structure]] = defaultdict(list)
    stride = max(1, len(structures) // limit)
    for k in range(0, len(structures), stride):
        s = structures[k]
        if s.energy is not None and s.forces is not None and s.n_atoms > 1:
            groups[s.atomic_numbers.tobytes() + np.round(s.cell, 6).tobytes()].append(s)
    works, differences, moves, near = [], [], [], []
    for members in groups.values():
        flat = np.array([s.positions.ravel() for s in members])
        if len(members) < 2 or flat.size > 3e7:
            continue
        periodic = members[0].pbc.any()
        squares = (flat**2).sum(axis=1)
        distance = squares[:, None] + squares[None] - 2 * flat @ flat.T
        np.fill_diagonal(distance, np.inf)
        for i, j in enumerate(distance.argmin(axis=1)):
            if j < i and distance[j].argmin() == i:
                continue
            a, b = members[i], members[int(j)]
            step = b.positions - a.positions
            if not periodic:
                step, forces_b = _aligned(a, b)
            else:
                if a.pbc.all():  # the same atom may have been wrapped into the cell in one frame only
                    step = step - np.round(step @ np.linalg.inv(a.cell)) @ a.cell
                forces_b = b.forces
            works.append(-0.5 * float(((a.forces + forces_b) * step).sum()))
            differences.append(b.energy - a.energy)
            moves.append(float(np.linalg.norm(step)))
            change = 0.5 * abs(float(((a.forces - forces_b) * step).sum()))
            near.append(bool(np.linalg.norm(step, axis=1).max() < NEAR and change < STEEP * abs(works[-1])))
    slope = _slope("energy against forces", works, differences, moves, report)
    factor, error = _factor("energy against forces", works, differences, near, report) or (slope, None)
    if factor is None:
        return
    found = report.numbers["energy_against_forces"]
    if factor < 0:
        report.errors.append(f"forces have the wrong sign: energy rises along them (slope {factor:.3g})")
    elif not _near_one(factor, error, found["error"]):
        report.errors.append(
            f"energies and forces disagree by a factor of {factor:.3g}{_plus_minus(error)}: {_unit_guess(factor)}. Set --energy-unit, --force-unit "
            "or --length-unit (data.labels)"
        )
    elif error is None and found["correlation"] > 0.9 and not BOHR**0.5 < factor < BOHR**-0.5:
        report.warnings.append(
            f"energies and forces agree only to a factor of {factor:.3g} ({found['pairs']} pairs of frames): chance, or lengths or forces in Bohr? Look at "
            "--length-unit and --force-unit, or give more frames"
        )


def _near_one(factor: float, error: float | None, scatter: float) -> bool:
    """Whether a factor of forces may be 1. Without an error of its own it is a slope over frames far apart with a relative error of ``scatter``,
    and may be far off where it is right (lithium thiophosphate, 0.3 Å apart: 0.62 ± 0.15)."""
    if error is not None:
        return abs(factor - 1) < 0.1 + 3 * error
    return bool(abs(np.log(factor)) - scatter < np.log(1.6))


def _slope(title: str, works: Sequence[float], differences: Sequence[float], moves: Sequence[float], report: Inspection) -> float | None:
    """Slope of energy differences against the work of a label over the nearest quarter of the pairs; None where it says nothing.

    Both scatter (the work is that of a straight line), and a regression of one on the other would come out too flat: it is the geometric
    mean of that and of the inverse one, the ratio of both sizes. "error" in the numbers is the relative standard error.
    """
    if len(works) < 8:
        report.facts[title] = f"not tested ({len(works)} pairs of near frames; 8 are needed)"
        return None
    order = np.argsort(moves)[: max(8, len(moves) // 4)]
    work, difference = np.array(works)[order], np.array(differences)[order]
    far = float(np.median(np.array(moves)[order]))
    varied = np.ptp(work) > 0 and np.ptp(difference) > 0
    correlation = float(np.corrcoef(work, difference)[0, 1]) if varied else 0.0
    others = np.arange(len(work)) != np.abs(work).argmax()  # one pair alone shows nothing
    varied = varied and np.ptp(work[others]) > 0 and np.ptp(difference[others]) > 0
    conclusive = bool(
        varied and abs(correlation) >= 0.8 and np.corrcoef(work[others], difference[others])[0, 1] * np.sign(correlation) >= 0.6
    )
    slope = float(np.sign(work @ difference) * np.linalg.norm(difference) / np.linalg.norm(work)) if varied else 0.0
    report.numbers[title.replace(" ", "_")] = {
        "slope": slope, "correlation": correlation, "pairs": len(order), "distance": far, "conclusive": conclusive,
        "error": float(np.sqrt((1 - correlation**2) / (len(order) - 2))),
    }  # fmt: skip
    if conclusive:
        report.facts[title] = f"slope {slope:.3g}, correlation {correlation:.3f} over {len(order)} near pairs (1 expected)"
        return slope
    report.facts[title] = (
        f"not conclusive: correlation {correlation:.2f} over the {len(order)} nearest pairs of frames, which differ by {far:.2g} Å"
    )
    return None


def _factor(
    title: str, works: Sequence[float], differences: Sequence[float], near: Sequence[bool], report: Inspection
) -> tuple[float, float] | None:
    """The factor between energy differences and the work of a label, and its error, from pairs near enough to show it: the median of
    their ratios, weighted by the works, so that a pair of another kind does not decide. None where it is not sure."""
    chosen = np.array(near, dtype=bool)
    work, difference = np.array(works)[chosen], np.array(differences)[chosen]
    if len(work) < 8:
        return None

    def median(values: np.ndarray) -> float:
        order = np.argsort(values)
        below = np.cumsum(np.abs(work)[order])
        return float(values[order][np.searchsorted(below, below[-1] / 2)])

    ratios = difference / work
    factor = median(ratios)
    error = 1.86 * median(np.abs(ratios - factor)) / len(work) ** 0.5  # of a median, from normal scatter
    if not error < SURE * abs(factor):
        return None
    numbers = report.numbers[title.replace(" ", "_")]
    numbers |= {"factor": factor, "factor_error": error, "near_pairs": len(work), "conclusive": True}
    report.facts[title] = f"slope {factor:.3f}{_plus_minus(error)} over {len(work)} pairs of frames next to each other (1 expected)"
    return factor, error


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {max(error, 0.001):.3f}"


def _unit_guess(slope: float) -> str:
    factors = {f"one label is in {u}": f for u, f in ENERGY_UNITS.items() if f != 1} | {
        "lengths or forces are in Bohr": BOHR, "forces are in Hartree/Bohr, energies in eV": 1 / 51.422}  # fmt: skip
    name, factor = min(factors.items(), key=lambda item: min(abs(np.log(slope / item[1])), abs(np.log(slope * item[1]))))
    near = min(abs(np.log(slope / factor)), abs(np.log(slope * factor)))
    return name if near < 0.3 else "units or labels do not belong together"


def _aligned(a: Structure, b: Structure) -> tuple[np.ndarray, np.ndarray]:
    """Step from a to b after the best rigid motion of b (Kabsch), and b's forces turned along."""
    from scipy.spatial.transform import Rotation

    centre_a, centre_b = a.positions.mean(axis=0), b.positions.mean(axis=0)
    if a.n_atoms < 3:
        return b.positions - a.positions, b.forces
    turn = Rotation.align_vectors(a.positions - centre_a, b.positions - centre_b)[0].as_matrix()
    return (b.positions - centre_b) @ turn.T - (a.positions - centre_a), b.forces @ turn.T


def compare_strained_pairs(structures: Sequence[Structure], report: Inspection, limit: int = 300) -> None:
    """Energy differences of frames of two cells, less the work of the forces, against volume · stress : strain."""
    groups: dict[bytes, list[Structure]] = defaultdict(list)
    for s in structures:
        if s.pbc.all() and {"energy", "forces", "stress"} <= s.labels.keys():
            groups[s.atomic_numbers.tobytes()].append(s)
    works, differences, moves, still, near = [], [], [], [], []
    for members in groups.values():
        n_most = int(min(limit, max(2, np.sqrt(1e8 / members[0].n_atoms))))
        chosen = members[:: -(-len(members) // n_most)]
        cells = np.array([s.cell for s in chosen])
        inverse = np.linalg.inv(cells)
        fractions = np.array([s.positions for s in chosen]) @ inverse
        for i, a in enumerate(chosen):
            strains = inverse[i] @ cells - np.eye(3)
            largest = np.abs(strains).max(axis=(1, 2))
            steps = fractions - fractions[i]
            steps -= np.round(steps)
            steps -= steps.mean(axis=1, keepdims=True)
            distance = np.linalg.norm(steps @ a.cell, axis=2).max(axis=1)
            distance = np.where((largest > 2e-3) & (largest < 0.1), distance + 3 * largest, np.inf)  # 3 Å: about a bond
            j = int(distance.argmin())
            if not np.isfinite(distance[j]):
                continue
            b = chosen[j]
            step = steps[j] @ (a.cell + b.cell) / 2
            force_work = -0.5 * float(((a.forces + b.forces) * step).sum())
            strain = (strains[j] + strains[j].T) / 2
            works.append(0.25 * (a.volume + b.volume) * float(((a.stress + b.stress) * strain).sum()))
            differences.append(b.energy - a.energy - force_work)
            moves.append(float(distance[j]))
            volume = 0.5 * (a.volume + b.volume)
            change = 0.5 * abs(float(((a.forces - b.forces) * step).sum())) + 0.5 * volume * abs(
                float(((a.stress - b.stress) * strain).sum())
            )
            near.append(bool(distance[j] < NEAR and change + 2 * abs(force_work) < abs(works[-1])))
            swelling = 0.5 * (a.volume + b.volume) * float(np.trace(strain))
            if distance[j] - 3 * largest[j] < STILL and abs(swelling) > 1e-3 * a.volume:
                still.append((works[-1], differences[-1], swelling))
    if not works:
        if groups:
            report.facts["energy against stress"] = "not tested (no frames of the same atoms in cells that differ by 0.2 to 10 %)"
        return
    slope = _slope("energy against stress", works, differences, moves, report)
    factor, error = _factor("energy against stress", works, differences, near, report) or (slope, None)
    _stress_offset(np.array(still), report, factor or 1.0)
    if report.stress_offset is not None:
        return
    if factor is not None and factor < 0:
        report.errors.append(OPPOSITE_SIGN + f" (energy falls along it, slope {factor:.3g})")
    elif factor is not None and (not 0.3 < factor < 3 or (error is not None and abs(factor - 1) > 0.25 + 3 * error)):
        unit = min(STRESS_UNITS, key=lambda unit: abs(np.log(factor / STRESS_UNITS[unit])))
        guess = (
            f"set --stress-unit {unit}" if abs(np.log(factor / STRESS_UNITS[unit])) < 0.5 and unit != "eV/Angstrom^3" else "check its unit"
        )
        report.errors.append(
            f"energies and stress disagree by a factor of {factor:.3g}{_plus_minus(error)}: {guess} (data.labels.stress_unit)"
        )


def _stress_offset(pairs: np.ndarray, report: Inspection, factor: float) -> None:
    """A constant pressure in the stress that the energies do not have: δ of ΔE = V (σ - δ) : ε, from each pair of strained cells.

    So a basis of plane waves too small for the stress (Pulay stress) shows, or a stress that lacks a part of the energy.

    Args:
        pairs: (n, 3) V σ : ε, ΔE less the work of the forces, V tr ε.
        report: Where it goes.
        factor: By which ΔE less the work of the forces differs from V σ : ε, which may explain them better.
    """
    if len(pairs) < 8:
        return
    works, differences, swellings = pairs.T
    offsets = (works - differences) / swellings
    offset = float(np.median(offsets))
    error = 1.86 * float(np.median(np.abs(offsets - offset))) / np.sqrt(len(offsets))  # of a median, from normal scatter
    rest = works - offset * swellings
    slope = float(rest @ differences) / max(float(rest @ rest), 1e-30)
    left, left_by_factor = (float(np.median(np.abs(differences - explained))) for explained in (rest, factor * works))
    if not 0.8 < slope < 1.25 or (abs(factor - 1) > 0.25 and left_by_factor < left):
        return  # something else is wrong: a unit, a sign
    report.numbers["stress_offset"] = {"offset": offset, "error": error, "pairs": len(offsets)}
    if report.stress_offset is not None:
        report.facts["stress offset"] = f"{offset:+.3g} ± {error:.1g} eV/Å³ ({offset / GPa:+.2g} GPa)"
        report.offset_warning = (
            f"the stress labels hold a constant {offset:+.3g} ± {error:.1g} eV/Å³ ({offset / GPa:+.2g} GPa) that the energies lack (Pulay stress "
            "of a small basis set?): trained on, it makes pressures and volumes wrong. Set loss.stress: 0, or compute the labels anew"
        )
        report.warnings.append(report.offset_warning)


def compare_stress_with_volume(structures: Sequence[Structure], report: Inspection) -> None:
    """Stress must rise with volume (positive bulk modulus) among frames of one composition, within 15 % of its median volume."""
    groups: dict[tuple[int, ...], list[tuple[float, float]]] = defaultdict(list)
    for s in structures:
        if s.stress is not None and s.pbc.all():
            counts = np.bincount(s.atomic_numbers, minlength=119)
            key = tuple((counts // np.gcd.reduce(counts[counts > 0])).tolist())
            groups[key].append((np.log(s.volume / s.n_atoms), float(np.trace(s.stress)) / 3))
    found = []
    for points in groups.values():
        x, y = np.array(points).T
        near = np.abs(x - np.median(x)) < 0.15
        x, y = x[near], y[near]
        if len(x) >= 5 and np.ptp(x) > 0.02 and np.ptp(y) > 0:
            found.append((len(x), float(np.corrcoef(x, y)[0, 1])))
    if not found:
        return
    n, correlation = max(found)
    report.numbers["stress_against_volume"] = {"correlation": correlation, "frames": n}
    report.facts["stress against volume"] = f"correlation {correlation:+.2f} over {n} frames of one composition (positive expected)"
    clear = abs(correlation) * np.sqrt(n) > 2.5 or abs(correlation) > 0.7  # beyond what chance gives so few frames
    if correlation < 0 and clear and not any(OPPOSITE_SIGN in e for e in report.errors):
        report.errors.append(OPPOSITE_SIGN + f" (it falls as the volume grows, correlation {correlation:+.2f})")
    elif correlation < 0 and not clear:
        report.warnings.append(f"stress does not rise with the volume (correlation {correlation:+.2f} over {n} frames): is its sign right?")
