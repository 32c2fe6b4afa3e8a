"""How smooth an energy is: at the cutoff, along paths, and down to the noise of its arithmetic; any ASE calculator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from gossamer.checks.candidate import Candidate, bond_length, enlarged, rattled
from gossamer.checks.result import Metric, Panel, Result, at_least, at_most, attempt, conclude, curve, measured
from gossamer.checks.symmetry import unconstrained

Array = NDArray[np.float64]


def energies_along(
    calculator: Any, atoms: Atoms, atom: int, direction: NDArray[np.float64], offsets: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Energy in eV with one atom moved by each offset (Å) along a unit direction."""
    work = unconstrained(atoms)
    work.calc = calculator
    out = []
    for offset in offsets:
        work.positions = atoms.positions
        work.positions[atom] += offset * direction
        out.append(work.get_potential_energy())
    return np.array(out)


def cutoff_exponent(calculator: Any, atoms: Atoms, cutoff: float, deltas: tuple[float, ...] = (0.1, 0.05, 0.025)) -> float:
    """Power n of |E(cutoff - δ) - E(outside)| ~ δ^n as the last atom leaves everything else behind.

    n - 1 derivatives are continuous at the cutoff; 4 means continuous through the third, as third-order force constants
    want. The last atom is put on a line from the one before it, so that only this pair is within reach: give a molecule
    (or fragment) whose last two atoms can be separated, such as a dimer or a bent trimer. Needs float64 models. A model
    without any interaction there returns infinity.
    """
    line = atoms.copy()
    direction = np.array([1.0, 0.0, 0.0])
    others = line.positions[:-1] @ direction
    line.positions[-2] += direction * (others.max() - others[-1])
    line.positions[-1] = line.positions[-2] + cutoff * direction
    outside = energies_along(calculator, line, len(line) - 1, direction, np.array([0.5]))[0]
    near = np.abs(energies_along(calculator, line, len(line) - 1, direction, -np.array(deltas)) - outside)
    if np.all(near < 1e-13):
        return float("inf")
    return float(np.polyfit(np.log(deltas), np.log(np.maximum(near, 1e-300)), 1)[0])


def energy_jump(calculator: Any, atoms: Atoms, cutoff: float, delta: float = 1e-6) -> float:
    """|E(cutoff - δ) - E(cutoff + δ)| in eV of the last atom against the one before it; zero for a continuous energy."""
    line = atoms.copy()
    line.positions[-1] = line.positions[-2] + np.array([cutoff, 0.0, 0.0])
    inside, outside = energies_along(calculator, line, len(line) - 1, np.array([1.0, 0.0, 0.0]), np.array([-delta, delta]))
    return float(abs(inside - outside))


def along(
    calculator: Any, atoms: Atoms, direction: NDArray[np.float64], offsets: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Energies (eV) and slopes -F·direction (eV/Å) with the atoms moved by ``offsets`` (Å) along a (n_atoms, 3) direction."""
    work = unconstrained(atoms)
    work.calc = calculator
    energies, slopes = [], []
    for offset in offsets:
        work.positions = atoms.positions + offset * direction
        energies.append(work.get_potential_energy())
        slopes.append(-float((work.get_forces() * direction).sum()))
    return np.array(energies), np.array(slopes)


def largest_jump(values: Array, spacing: float, order: int = 0) -> tuple[float, int]:
    """Largest jump of the ``order``-th derivative along equally spaced samples, and the sample it lies at.

    Cubics through four samples left and right of a place are extrapolated to it. Where the function is smooth the two
    agree to the fourth power of the spacing, so of the spacing and twice the spacing the smaller difference is taken:
    noise shrinks with the larger one, curvature with the smaller, a jump with neither. A stencil with a jump inside it
    answers with a multiple of the jump, which is divided out.
    """
    differences = _differences(values, spacing, order)
    place = int(differences.argmax())
    return float(differences[place]) / _response(order), place


def _differences(values: Array, spacing: float, order: int) -> Array:
    found = []
    for stride in (1, 2):
        nodes = np.arange(1, 5) * stride * spacing
        # derivative at 0 of the cubic through four nodes to the right; to the left odd derivatives change sign
        weights = np.linalg.inv(np.vander(nodes, 4, increasing=True))[order] * (1.0, 1.0, 2.0, 6.0)[order]
        reach = 4 * stride
        difference = np.zeros(len(values))
        for k in range(reach, len(values) - reach):
            right = weights @ values[k + stride : k + reach + 1 : stride]
            left = (-1) ** order * (weights @ values[k - stride : k - reach - 1 if k > reach else None : -stride])
            difference[k] = abs(right - left)
        found.append(difference)
    # what the narrow stencil sees may lie a few samples beside what the wide one sees
    wide = np.array([found[1][max(0, k - 2) : k + 3].max() for k in range(len(values))])
    both = np.minimum(found[0], wide)
    both[:8] = both[len(values) - 8 :] = 0.0
    return both


@cache
def _response(order: int) -> float:
    """The answer to a jump of one, between two samples."""
    x = np.arange(-20.0, 21.0) - 0.5
    return float(_differences(np.where(x > 0, x**order / (1.0, 1.0, 2.0)[order], 0.0), 1.0, order).max())


def leaving_atom(first: str, second: str, cutoff: float | None) -> tuple[Atoms, NDArray[np.float64], Array]:
    """A bonded pair with another atom of the first element 1 Å from the second; the direction that takes it away; distances, Å, to 1.15 cutoffs.

    Where the cutoff is not known, they go to `FAR`.
    """
    bond = bond_length(first, second)
    start = Atoms([first, second, first], [[-0.3 * bond, 0.9 * bond, 0], [0, 0, 0], [1.0, 0, 0]])
    pull = np.zeros((3, 3))
    pull[2, 0] = 1.0
    return start, pull, np.linspace(max(2.2, 1.3 * bond), 1.15 * cutoff if cutoff else FAR, 300 if cutoff else 780)


def refined_jump(
    measure: Callable[[Array], tuple[Array, Array]], places: Array, order: int, closer: Sequence[int] = (2, 4, 8)
) -> tuple[float, float]:
    """Largest jump along ``places``, looked at again ``closer`` (so many times), and where it is.

    ``order`` -1 looks at the energy, 0 at its slope, 1 and 2 at the derivatives of the slope. A steep but smooth feature
    shrinks on closer look; a jump does not. Rounding grows, so the smallest counts.
    """
    spacing = float(places[1] - places[0])

    def jump(x: Array) -> tuple[float, int]:
        energies, slopes = measure(x)
        return largest_jump(energies if order < 0 else slopes, float(x[1] - x[0]), max(order, 0))

    coarse, k = jump(places)
    smallest, centre = coarse, float(places[k])
    for factor in closer:  # each looks where the one before found it
        nearer = centre + np.arange(-24, 25) * spacing / factor
        found, at = jump(nearer)
        smallest, centre = min(smallest, found), float(nearer[at])
    return smallest, float(places[k])


def force_noise(calculator: Any, atoms: Atoms, step: float = 2e-4, points: int = 9, seed: int = 0) -> float:
    """Root mean square noise of the force components in eV/Å: what a parabola through a few tiny moves leaves over.

    All atoms move together along a random direction; over ``points`` steps of ``step`` Å a smooth force is a parabola to
    far below any arithmetic.
    """
    direction = np.random.default_rng(seed).normal(size=atoms.positions.shape)
    offsets = step * (np.arange(points) - points // 2)
    work = atoms.copy()
    work.calc = calculator
    forces = []
    for offset in offsets:
        work.positions = atoms.positions + offset * direction / np.abs(direction).max()
        forces.append(work.get_forces(apply_constraint=False).ravel())
    left_over = np.polynomial.polynomial.polyfit(offsets / step, np.array(forces), 2, full=True)[1][0]
    return float(np.sqrt(np.mean(left_over) / (points - 3)))


def tortuosity(energies: NDArray[np.float64]) -> float:
    """Total variation of an energy curve over that of its single well: 1 for one minimum and nothing else.

        sum |E_(i+1) - E_i| / (|E_first - E_min| + |E_last - E_min|)

    As in MLIP Arena and Matbench Discovery.
    """
    down = abs(energies[0] - energies.min()) + abs(energies[-1] - energies.min())
    return float(np.abs(np.diff(energies)).sum() / max(down, 1e-300))


# --- verdict --------------------------------------------------------------------------------------------------------

FLAT = 1e-6
"""eV/atom, below which what an energy varies by is rounding"""
FAR = 15.0
"""Å, to which an atom is followed where the cutoff is not known"""
KINK = "Energy is not conserved whenever a neighbour comes or goes, and third-order force constants (thermal conductivity) are wrong."
NOISE = "Relaxations stop short of tight convergence, and finite differences (phonons) are noisy."


def check(candidate: Candidate) -> Result:
    """An atom pulled out of reach of a bonded pair, structures moved along a line, and the noise of the forces."""
    calculator = candidate.calculator
    metrics: list[Metric] = []
    panels: list[Panel] = []
    a, b = (candidate.elements * 2)[:2]
    start, pull, lengths = leaving_atom(a, b, candidate.cutoff)
    exact = candidate.exact()  # the rounding of the forces is judged below, by their noise
    double = _is_double(exact, candidate.free(start))

    def leaving() -> list[Metric]:
        atoms = candidate.free(start)

        @cache
        def values(key: bytes) -> tuple[Array, Array]:
            return along(exact, atoms, pull, np.frombuffer(key) - 1.0)

        panels.append(Panel(f"{a} leaving {a}-{b}: force", "distance, Å", "eV/Å", [curve(lengths, -values(lengths.tobytes())[1])]))
        limits = [("energy", 1000.0, "meV", 0.05, 1.0), ("force", 1000.0, "meV/Å", 0.5, 10.0), ("stiffness", 1.0, "eV/Å²", 0.02, 0.5), ("third derivative", 1.0, "eV/Å³", 2.0, 20.0)]  # fmt: skip
        closer = (2, 4, 8, 16, 32, 64, 128) if double else (2, 4, 8)
        jumps = [refined_jump(lambda x: values(x.tobytes()), lengths, order, closer) for order in (-1, 0, 1, 2)]
        found = [at_most(f"jump of the {name} as an atom leaves", scale * jump, unit, good, poor, KINK)
                 for (jump, _), (name, scale, unit, good, poor) in zip(jumps, limits, strict=True)]  # fmt: skip
        if not double:  # rounding of float32 alone gives a few eV/Å³
            found[3] = measured(found[3].name, jumps[3][0], "eV/Å³", "low")
        worst = int(np.argmax([j / limit[3] * limit[1] for (j, _), limit in zip(jumps, limits, strict=True)]))
        return [*found, measured("distance of the largest jump", jumps[worst][1], "Å")]

    metrics += attempt("an atom leaving", leaving)
    cutoff = candidate.cutoff
    if cutoff is not None and double:
        pair = Atoms([a, b], [[0, 0, 0], [2.0, 0, 0]])

        def order() -> Metric:
            title, power = "power with which the energy vanishes at the cutoff", cutoff_exponent(exact, pair, cutoff)
            if np.isinf(power):
                return Metric(title, None, "", "skipped", reason="two atoms do not feel each other that far apart")
            return at_least(title, power, "", 2.8, 1.8, KINK)

        metrics += attempt("order at the cutoff", order)
    for k, atoms in enumerate(candidate.bar(candidate.structures, "smoothness")):
        probe = rattled(enlarged(atoms, 2), 0.03, seed=k)  # a line through one atom is a shift of the crystal
        direction = np.random.default_rng(k).normal(size=probe.positions.shape)
        direction /= np.abs(direction).max()
        offsets = np.linspace(-0.3, 0.3, 121)

        def path(probe: Atoms = probe, direction: NDArray[np.float64] = direction, offsets: NDArray[np.float64] = offsets) -> list[Metric]:
            energies, slopes = along(calculator, probe, direction, offsets)
            spacing = offsets[1] - offsets[0]
            name = probe.get_chemical_formula()
            panels.append(
                Panel(f"Energy along a line, {name}", "largest displacement, Å", "eV", [curve(offsets, energies - energies.min())])
            )
            found = []
            for what, order, scale, unit, good, poor in (
                ("energy", -1, 1000 / len(probe), "meV/atom", 0.05, 1.0), ("force", 0, 1000 / float(np.linalg.norm(direction)), "meV/Å", 5.0, 50.0),
            ):  # fmt: skip
                jump = largest_jump(energies if order < 0 else slopes, spacing)[0]
                if scale * jump > good and double:  # or only steep?
                    jump = refined_jump(
                        lambda x: (energies, slopes) if x is offsets else along(exact, probe, direction, x), offsets, order, (2, 4)
                    )[0]
                found.append(at_most(f"jump of the {what} within 0.01 Å, {name}", scale * jump, unit, good, poor, KINK))
            title = f"tortuosity along a line, {name}"
            if np.ptp(energies) < FLAT * len(probe):
                return [*found, Metric(title, None, "", "skipped", reason="the energy does not change along it")]
            return [*found, at_most(title, tortuosity(energies), "", 1.05, 1.5, "Spurious minima trap atoms.")]

        metrics += attempt(f"a line through {atoms.get_chemical_formula()}", path, "failed")
        metrics += attempt(
            "noise",
            lambda p=probe: at_most(
                f"noise of the forces, {p.get_chemical_formula()}", 1000 * force_noise(calculator, p), "meV/Å", 0.1, 2.0, NOISE
            ),
            "failed",
        )
    notes = [
        f"An atom leaves {a}-{b} to {lengths[-1]:.1f} Å{'' if cutoff else '; the cutoff is not known, so what lies beyond is not judged'}."
    ]
    return conclude(metrics, panels, notes, "Smooth where atoms come and go, along lines, and quiet.")


def _is_double(calculator: Any, atoms: Atoms) -> bool:
    """Whether displacements of 1e-7 Å still change the force smoothly, as only float64 arithmetic does.

    The way is longer than the rounding of 2.2 Å in float32, which a pair curve in float64 beside a network in float32 would hide.
    """
    work = atoms.copy()
    work.positions[2] = work.positions[1] + [2.2, 0, 0]
    pull = np.zeros((3, 3))
    pull[2, 0] = 1.0
    try:
        _, slopes = along(calculator, work, pull, np.linspace(0.0, 1e-6, 12))
    except Exception:
        return False
    change = np.diff(slopes)
    return bool(np.abs(change).max() > 0 and np.abs(np.diff(change)).max() < 0.2 * np.abs(change).max())
