"""The judge is judged: against independent implementations, and against calculators broken in just one way."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.morse import MorsePotential
from ase.constraints import FixSymmetry, Hookean
from ase.geometry.rdf import get_rdf
from broken_calculators import Broken, copper
from conftest import shared_data

from gossamer.checks import liquids
from gossamer.checks.conservation import force_gradient_error, loop_work, nve_conservation, stress_gradient_error
from gossamer.checks.smoothness import cutoff_exponent, energy_jump
from gossamer.checks.symmetry import left_handed_error, net_force, separation_error, supercell_error, symmetry_errors


def test_sound_calculator_passes() -> None:
    atoms, calculator = copper(), EMT()
    assert max(e["relative"] for e in symmetry_errors(calculator, atoms).values()) < 1e-10
    assert force_gradient_error(calculator, atoms) < 1e-6
    assert stress_gradient_error(calculator, atoms) < 1e-7
    assert supercell_error(calculator, atoms) < 1e-10
    assert net_force(calculator, atoms) < 1e-10
    assert loop_work(calculator, atoms, radius=0.02) < 1e-8
    assert separation_error(calculator, molecule("C2H6")) < 1e-10
    assert left_handed_error(calculator, atoms) < 1e-10
    result = nve_conservation(calculator, atoms, temperature=300, timestep=2.0, picoseconds=0.4)
    assert result["fluctuation_ratio"] == pytest.approx(4, abs=0.6)


@pytest.mark.parametrize("defect", ["rotation", "permutation", "translation"])
def test_broken_symmetry_is_seen(defect: str) -> None:
    errors = symmetry_errors(Broken(defect), copper())
    assert errors[defect]["relative"] > 1e-4


def test_each_defect_is_seen_by_its_check() -> None:
    atoms = copper()
    assert force_gradient_error(Broken("non-conservative"), atoms) > 1e-2
    assert loop_work(Broken("non-conservative"), atoms, radius=0.1) > 1e-4
    assert force_gradient_error(Broken("noise"), atoms) == pytest.approx(0.02, abs=0.015)  # noise of known size
    assert stress_gradient_error(Broken("stress sign"), atoms) > 1e-3
    assert supercell_error(Broken("extensivity"), atoms) > 1e-2
    assert separation_error(Broken("extensivity"), molecule("C2H6")) > 0.1
    assert left_handed_error(Broken("handedness"), atoms) == pytest.approx(0.02)
    # rigid-rotation forces pump energy into the system
    drift = nve_conservation(Broken("non-conservative"), atoms, temperature=300, timestep=2.0, picoseconds=0.4)["drift_meV_per_atom_per_ps"]
    assert abs(drift) > 10


def test_a_kink_at_the_cutoff_is_seen() -> None:
    """A truncated Morse pair jumps; ASE's default has a smooth cutoff polynomial."""
    pair = Atoms("Cu2", positions=[[0, 0, 0], [2, 0, 0]])
    smooth = MorsePotential(epsilon=1.0, r0=2.5, rho0=3.0, rcut1=1.5, rcut2=2.0)
    cut = MorsePotential(epsilon=1.0, r0=2.5, rho0=3.0, rcut1=1.9999999, rcut2=2.0)
    cutoff = 2.0 * 2.5
    assert energy_jump(smooth, pair, cutoff, 1e-5) < 1e-9
    assert energy_jump(cut, pair, cutoff, 1e-5) > 1e-3
    assert cutoff_exponent(smooth, pair, cutoff) == pytest.approx(3, abs=0.2)
    assert cutoff_exponent(cut, pair, cutoff) < 1


# --- liquids ------------------------------------------------------------------------------------------------------


def gas(n: int = 60, length: float = 14.0, frames: int = 20) -> list[Atoms]:
    rng = np.random.default_rng(0)
    return [Atoms("OH" * (n // 2), rng.uniform(0, length, (n, 3)), cell=[length] * 3, pbc=True) for _ in range(frames)]


def test_rdf_of_an_ideal_gas_is_one() -> None:
    _, g = liquids.rdf(gas(frames=200), 6.0, 30)
    assert np.abs(g[5:] - 59 / 60).max() < 0.05


@pytest.mark.parametrize("pair", [None, ("O", "O"), ("O", "H")])
def test_rdf_agrees_with_ase(pair: tuple[str, str] | None) -> None:
    frames = gas(frames=5)
    _, g = liquids.rdf(frames, 6.0, 60, pair)
    elements = None if pair is None else tuple({"O": 8, "H": 1}[e] for e in pair)
    theirs = np.mean([get_rdf(f, 6.0, 60, elements=elements)[0] for f in frames], axis=0)
    np.testing.assert_allclose(g, theirs, rtol=0.05, atol=0.02)  # ASE divides by the shell at its middle radius


@pytest.mark.reference
def test_rdf_of_lips_agrees_with_the_stored_one() -> None:
    from gossamer.data.readers import read_structures

    stored = np.load(shared_data("data", "rdf", "lips_rdf.npz"))
    frames = [
        s.to_ase() for part in ("train", "val", "test") for s in read_structures(shared_data("data", "lips", f"lips_{part}.extxyz.xz"))
    ]
    r = stored["r_A"]
    width = r[1] - r[0]
    n_bins = len(r)
    for key, pair in (("LiLi", ("Li", "Li")), ("PS", ("P", "S"))):
        _, g = liquids.rdf(frames, width * n_bins, n_bins, pair)
        assert np.abs(g - stored[f"g_{key}"]).max() < 0.05 * g.max()


def test_rdf_counts_images_of_a_small_cell() -> None:
    """fcc copper from its one-atom cell: the shells hold 12, 6 and 24 atoms."""
    atoms = bulk("Cu", a=3.6)
    r, g = liquids.rdf([atoms], 5.0, 500)
    density = 1 / atoms.get_volume()
    for distance, count in ((3.6 / np.sqrt(2), 12), (3.6, 6), (3.6 * np.sqrt(1.5), 24)):
        near = np.abs(r - distance) < 0.05
        assert (g[near] * 4 * np.pi * r[near] ** 2 * density * 0.01).sum() == pytest.approx(count, rel=1e-2)


def random_walk(n_frames: int = 4000, n_atoms: int = 40, step: float = 0.1) -> np.ndarray:
    return np.cumsum(np.random.default_rng(0).normal(scale=step, size=(n_frames, n_atoms, 3)), axis=0)


def test_msd_is_its_definition() -> None:
    x = random_walk(50, 4)
    masses = np.array([1.0, 2.0, 3.0, 4.0])
    centred = x - np.einsum("tnx,n->tx", x, masses)[:, None] / masses.sum()
    direct = [np.mean([((centred[t + lag] - centred[t]) ** 2).sum(axis=1).mean() for t in range(50 - lag)]) for lag in range(50)]
    np.testing.assert_allclose(liquids.mean_squared_displacement(x, masses), direct, atol=1e-10)


def test_diffusivity_of_a_random_walk() -> None:
    """D = step² / (2 dt): 0.01 Å² per 0.1 ps is 0.05 Å²/ps = 0.5e-9 m²/s."""
    x = random_walk()
    x = x - x.mean(axis=1, keepdims=True) + 0.0
    masses = np.ones(40)
    mean, error = liquids.diffusivity_blocks(x, masses, np.ones(40, dtype=bool), 0.1)
    assert mean == pytest.approx(0.5 * 39 / 40, abs=4 * error)
    assert 0 < error < 0.1
    msd = liquids.mean_squared_displacement(x[:200], masses)
    assert liquids.diffusivity(msd, 0.1) == pytest.approx(0.5, rel=0.5)


def test_unwrapping() -> None:
    cell = np.array([[5.0, 0, 0], [1.0, 5.0, 0], [0, 0, 5.0]])
    path = random_walk(100, 3, 0.3)
    frames = [Atoms("H3", p, cell=cell, pbc=True) for p in path]
    for f in frames:
        f.wrap()
    unwrapped = liquids.unwrapped_positions(frames)
    np.testing.assert_allclose(unwrapped - unwrapped[0], path - path[0], atol=1e-9)


def test_stability_finds_when_a_liquid_breaks() -> None:
    frames = gas(n=200, frames=60)
    _, reference = liquids.rdf(frames, 6.0, 30)
    assert liquids.stability_time(frames, reference, 0.1) == pytest.approx(6.0)
    collapsed = [Atoms(f.numbers, f.positions * 0.2, cell=f.cell, pbc=True) for f in frames]
    assert liquids.stability_time(frames[:30] + collapsed[30:], reference, 0.1) == pytest.approx(3.0)


def test_noise_breaks_no_small_crystal() -> None:
    """Eight atoms, windows of ten frames: each is farther from the mean of all than the threshold, by chance."""
    frames = [bulk("Si", cubic=True) for _ in range(200)]
    for k, atoms in enumerate(frames):
        atoms.rattle(0.1, seed=k)
    _, reference = liquids.rdf(frames[::2], 6.0, 500)
    assert liquids.stability_time(frames, reference, 0.05, 0.5) == 0.0
    assert liquids.stability_time(frames, reference, 0.05, 0.5, most_noise=1.0) == pytest.approx(10.0)
    for k, atoms in enumerate(frames[100:]):
        atoms.rattle(1.0, seed=k)
    assert liquids.stability_time(frames, reference, 0.05, 0.5, most_noise=1.0) == pytest.approx(5.0)


def test_distances_in_a_slab_do_not_depend_on_wrapping() -> None:
    """A trajectory that is wrapped and one that is not have the same h(r)."""
    slab = fcc111("Cu", (3, 3, 2), vacuum=5.0, periodic=False)
    moved = slab.copy()
    moved.positions[::2] += slab.cell[0] - 2 * slab.cell[1]
    _, one = liquids.distance_distribution([slab])
    _, other = liquids.distance_distribution([moved])
    np.testing.assert_allclose(one, other)


def test_bond_stability() -> None:
    frames = [Atoms("H2", positions=[[0, 0, 0], [0.74 + 0.1 * k, 0, 0]]) for k in range(10)]
    assert liquids.bond_stability_time(frames, np.array([[0, 1]]), 0.5) == pytest.approx(3.0)
    assert liquids.bond_stability_time(frames[:4], np.array([[0, 1]]), 0.5) == pytest.approx(2.0)


@pytest.mark.parametrize(("n_atoms", "frames"), [(4, 40), (12, 100), (60, 100)])
def test_noise_of_an_rdf_is_known(n_atoms: int, frames: int) -> None:
    """Two samples of one gas: their overlap lacks no more than is expected, however few the pairs."""

    def sample(seed: int) -> list[Atoms]:
        rng = np.random.default_rng(seed)
        return [Atoms(["Ar"] * n_atoms, rng.uniform(0, 14, (n_atoms, 3)), cell=[14.0] * 3, pbc=True) for _ in range(frames)]

    lacking, expected = [], []
    for seed in range(0, 10, 2):
        one, two = sample(seed), sample(seed + 1)
        lacking.append(1 - liquids.rdf_overlap(*(liquids.rdf(part, 6.0, 200)[1] for part in (one, two))))
        expected.append(sum(liquids.rdf_noise(part, 6.0, 200) for part in (one, two)))
    assert 0.7 * np.mean(expected) < np.mean(lacking) < np.mean(expected)


def test_a_drift_is_not_taken_for_noise() -> None:
    crystal = bulk("Ar", "fcc", a=5.3, cubic=True).repeat(2)
    frames = [crystal.copy() for _ in range(100)]
    for k, atoms in enumerate(frames):
        atoms.rattle(0.2 if k < 50 else 1.5, seed=k)
    halves = [liquids.rdf(part, 6.0, 100)[1] for part in (frames[:50], frames[50:])]
    assert liquids.rdf_noise(frames, 6.0, 100) < 0.25 * (1 - liquids.rdf_overlap(*halves)) / 2
    assert liquids.rdf_noise(frames[:1]) == 0.0


def test_curves_compare() -> None:
    g = np.ones(100)
    assert liquids.rdf_error(g, g * 1.1) == pytest.approx(0.6)
    assert liquids.rdf_overlap(g, g) == 1.0
    assert liquids.rdf_overlap(0 * g, 0 * g) == 1.0  # a single ion in a large box
    r, h = liquids.distance_distribution([Atoms("H2", positions=[[0, 0, 0], [1.0, 0, 0]])], 10, 100)
    assert h.sum() * 0.1 == pytest.approx(1.0)
    assert r[h.argmax()] == pytest.approx(1.0, abs=0.1)
    with pytest.raises(ValueError, match="different bins"):
        liquids.rdf_error(g, g[:50])
    with pytest.raises(ValueError, match="periodicity along all axes"):
        liquids.rdf([molecule("H2O")])
    with pytest.raises(ValueError, match="at least one frame"):
        liquids.rdf([])


def test_constraints_are_no_part_of_what_is_measured() -> None:
    ethanol = molecule("CH3CH2OH")
    ethanol.set_constraint(Hookean(0, 1, 5.0, 0.5))  # ASE adds its spring to the energy
    assert force_gradient_error(EMT(), ethanol) < 1e-6
    assert symmetry_errors(EMT(), ethanol)["rotation"]["relative"] < 1e-9
    crystal = bulk("Cu", cubic=True)
    crystal.set_constraint(FixSymmetry(crystal))  # and lets this one change stress and cells
    plain = bulk("Cu", cubic=True)
    assert stress_gradient_error(EMT(), crystal) == pytest.approx(stress_gradient_error(EMT(), plain), abs=1e-9)
    assert symmetry_errors(EMT(), crystal)["rotation"]["relative"] < 1e-9
    with pytest.raises(ValueError, match="periodic along no axis"):
        supercell_error(EMT(), ethanol)
