"""Checks of the judge on crystals: elasticity, defects, phonons, thermal conductivity."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.morse import MorsePotential
from ase.calculators.tersoff import Tersoff, TersoffParameters
from ase.neighborlist import neighbor_list
from broken_calculators import Defect, by_name, candidate_of
from conftest import often, shared_data

from gossamer.checks import (
    crystals,
    phonons,
    thermal_conductivity,
)
from gossamer.checks.judge import CHECKS
from gossamer.data.atoms import read_frames

# --- crystals -------------------------------------------------------------------------------------------------------

T3 = {("Si", "Si", "Si"): TersoffParameters(A=1830.8, B=471.18, lambda1=2.4799, lambda2=1.7322, lambda3=0.0, beta=1.1e-6, gamma=1.0, m=3.0, n=0.78734,
                                            c=1.0039e5, d=16.217, h=-0.59825, R=2.85, D=0.15)}  # fmt: skip
"""Tersoff, Phys. Rev. B 38, 9902 (1988)"""


def test_silicon_of_tersoff_has_its_published_properties() -> None:
    """a, C_ij, B (GPa): Balamane, Halicioglu and Tiller, Phys. Rev. B 46, 2250 (1992), table III, column T3."""
    cell, converged = crystals.relaxed(Tersoff(T3), bulk("Si"))
    assert converged
    assert cell.cell.lengths()[0] * np.sqrt(2) == pytest.approx(5.432, abs=0.002)
    eos = crystals.equation_of_state(Tersoff(T3), cell, points=7)
    assert eos["bulk_modulus"] == pytest.approx(98, rel=0.01)
    c = crystals.elastic_constants(Tersoff(T3), cell)
    assert c[0, 0] == pytest.approx(143, rel=0.01)
    assert c[0, 1] == pytest.approx(75, rel=0.015)
    assert c[3, 3] == pytest.approx(69, rel=0.01)
    k, _ = crystals.voigt_averages(c)
    assert k == pytest.approx(98, rel=0.01)


@pytest.mark.parametrize(("case", "named"), [("cubic", True), ("primitive", True), ("turned", False), ("hexagonal", False)])
def test_elastic_constants_have_their_names_where_they_are_three(case: str, named: bool) -> None:
    """Of nearest neighbours with springs K: C11 = 2 K / a, C12 = C44 = K / a. Means over the axes of another crystal are none of them."""
    depth, distance, steep = 0.5, 2.556, 4.0
    pairs = MorsePotential(epsilon=depth, r0=distance, rho0=steep, rcut1=1.2, rcut2=1.3)
    a = distance * np.sqrt(2)
    cell = bulk("Cu", "hcp", a=distance, c=distance * np.sqrt(8 / 3)) if case == "hexagonal" else bulk("Cu", a=a, cubic=case != "primitive")
    if case == "turned":
        cell.rotate(30, (1, 1, 1), rotate_cell=True)
    found = {m.name.removeprefix("it: "): m.value for m in crystals._elastic(pairs, "it", cell)}
    assert ("C11" in found) == ("C44" in found) == named
    stiff = 2 * depth * (steep / distance) ** 2 / a / units.GPa
    if named:
        assert [found["C11"], found["C12"], found["C44"]] == pytest.approx([2 * stiff, stiff, stiff], rel=1e-3)
    assert found["bulk modulus, ions relaxed"] == pytest.approx(4 / 3 * stiff, rel=1e-3)


@pytest.fixture
def restless() -> Defect:
    """Copper with an atom that feels another 20 meV/Å in every step, as forces do that are not those of the energy."""
    signs = itertools.cycle((-1, 1))

    def pull(atoms: Atoms, r: dict[str, Any]) -> None:
        r["forces"][0] += 0.02 * next(signs)

    return Defect(EMT(), pull)


def test_numbers_of_atoms_that_did_not_relax_are_not_given(restless: Defect) -> None:
    with pytest.raises(crystals.Unrelaxed, match="strained by -0.005 along xx still feel more than 0.0002 eV/Å after 500 steps"):
        crystals.elastic_constants(restless, bulk("Cu", a=3.59))
    with pytest.raises(ValueError, match="costs no stress"):
        crystals.voigt_averages(np.diag([100.0, 100.0, 100.0, 20.0, 20.0, 0.0]))


@pytest.mark.thorough
def test_phonons_of_a_crystal_that_did_not_relax_are_weak(restless: Defect, tmp_path: Path) -> None:
    found = by_name(phonons.check(candidate_of(lambda: restless, tmp_path)), "relaxation")
    assert (found.status, found.limit) == ("weak", "forces below 0.001 eV/Å")


@pytest.mark.slow
def test_equation_of_state_of_lennard_jones() -> None:
    """fcc, ε = σ = 1, long cutoff: E = -8.610 ε, nearest neighbours 1.0902 σ, B = 75.2 ε/σ³ (Ashcroft and Mermin, ch. 20)."""
    atoms = bulk("Ar", "fcc", a=1.09 * np.sqrt(2))
    eos = crystals.equation_of_state(LennardJones(epsilon=1, sigma=1, rc=12.0), atoms, points=7)
    assert (eos["v0"] * np.sqrt(2)) ** (1 / 3) == pytest.approx(1.0902, abs=0.001)
    assert eos["e0"] == pytest.approx(-8.61, abs=0.015)
    assert eos["bulk_modulus"] * units.GPa == pytest.approx(75.2, rel=0.01)


def test_defects_cost_the_bonds_they_break() -> None:
    """A pair potential of nearest neighbours, fcc, ideal sites: a vacancy costs the cohesive energy, and (100) breaks four bonds per atom."""
    depth, distance = 0.1, 2.6
    pairs = MorsePotential(epsilon=depth, r0=distance, rho0=40.0, rcut1=1.2, rcut2=1.3)  # steep: second neighbours lie outside
    cell = bulk("Cu", a=distance * np.sqrt(2), cubic=True)
    assert crystals.energy_of(pairs, cell) / 4 == pytest.approx(-6 * depth, abs=1e-3)
    assert crystals.vacancy_energy(pairs, cell) == pytest.approx(6 * depth, rel=0.01)
    area = distance**2  # of one surface atom
    assert crystals.surface_energy(pairs, cell) == pytest.approx(2 * depth / area * 16.02177, rel=0.01)


def test_soft_defects_are_seen(tmp_path: Path) -> None:
    """Atoms with few neighbours are given extra energy below zero: vacancies and surfaces come for free."""

    def loosen(atoms: Atoms, r: dict[str, Any]) -> None:
        receiver = neighbor_list("i", atoms, 3.0)
        r["energy"] -= 0.5 * float((12 - np.bincount(receiver, minlength=len(atoms))).clip(0).sum())

    sound = crystals.check(candidate_of(EMT, tmp_path))
    assert by_name(sound, "vacancy energy").status == "passed"
    assert by_name(sound, "energy of the (100) surface").status == "passed"
    loose = crystals.check(candidate_of(lambda: Defect(EMT(), loosen), tmp_path))
    assert by_name(loose, "vacancy energy").status == "failed"
    assert by_name(loose, "energy of the (100) surface").status == "failed"


def test_wrong_stress_is_seen_against_the_energy(tmp_path: Path) -> None:
    stiff = Defect(EMT(), lambda atoms, r: r.__setitem__("stress", 1.3 * r["stress"]))
    result = crystals.check(candidate_of(lambda: stiff, tmp_path))
    assert by_name(result, "from stress against that from energy").status == "failed"


# --- phonons --------------------------------------------------------------------------------------------------------


def test_phonons_agree_with_ase(tmp_path: Path) -> None:
    pytest.importorskip("phonopy")
    from ase.phonons import Phonons

    cell = bulk("Cu", a=3.589)
    ours = phonons.make_phonons(EMT(), cell, [4, 4, 4])
    theirs = Phonons(cell, EMT(), supercell=(4, 4, 4), delta=0.01, name=str(tmp_path / "cache"))
    theirs.run()
    theirs.read(acoustic=True)
    q = np.array([[0.25, 0.5, 0.25], [0.5, 0.5, 0.5]])
    expected = theirs.band_structure(q) / (units._hplanck * 1e12 / units._e)  # eV to THz
    np.testing.assert_allclose(phonons.frequencies_at(ours, q), expected, atol=0.02)
    assert expected.min() > 1
    assert phonons.sum_rule_error(ours) < 1e-9


@pytest.mark.thorough
def test_bands_of_unlike_lattices_lie_over_each_other() -> None:
    """A potential with a larger lattice constant has a smaller zone: its X must stand where that of the other stands."""
    ticks = [phonons.band_path(bulk("Cu", a=a))[2] for a in (3.6, 3.8)]
    assert [label for _, label in ticks[0]] == [label for _, label in ticks[1]]
    np.testing.assert_allclose(*([place for place, _ in one] for one in ticks), atol=1e-9)


def test_phonons_beside_a_reference(tmp_path: Path) -> None:
    pytest.importorskip("phonopy")
    cell = phonons.make_phonons(EMT(), bulk("Cu", a=3.589), [3, 3, 3])
    at_x = phonons.frequencies_at(cell, np.array([[0.5, 0.0, 0.5]]))[0]
    file = tmp_path / "frequencies.json"
    line = phonons.frequencies_at(cell, np.linspace([0.5, 0.0, 0.5], [0.0, 0.0, 0.0], 5)) + 0.5
    file.write_text(json.dumps({"Cu": {"X": list(at_x + 0.5), "Γ": [0.5, 0.5, 0.5], "X-Γ": line.tolist()}}))
    result = phonons.check(candidate_of(EMT, tmp_path, phonons_reference=str(file)))
    assert by_name(result, "mean error against the reference at X, Γ, X-Γ").value == pytest.approx(0.5, abs=0.05)
    drawn = [c for c in result.panels[0].curves if c.reference]
    assert sum(c.points for c in drawn) >= 2
    lines = [c for c in drawn if not c.points]
    assert len(lines) == 3, "one for each band, on the part of the path from Γ to X"
    (first, second) = result.panels[0].ticks[:2]
    assert (first[1], second[1]) == ("Γ", "X")
    for c in lines:
        assert (c.x[0], c.x[-1]) == pytest.approx((first[0], second[0]))
        assert c.y[0] == pytest.approx(0.5, abs=0.05), "the line was given from X to Γ, the path goes from Γ to X"
    assert "U|K" in dict(map(reversed, result.panels[0].ticks)) or "K|U" in dict(map(reversed, result.panels[0].ticks))
    for wrong, message in (({"Q": [[1.0]]}, "no point 'Q'"), ({"X": [[1.0]]}, "has 1 frequencies at X; its primitive cell has 3 bands")):
        with pytest.raises(ValueError, match=message):
            phonons.beside_reference(cell, bulk("Cu", a=3.589), [], {k: np.array(v) for k, v in wrong.items()}, "Cu")
    for text in ("[1]", '{"Cu": {"X": [[1], [2]]}}', '{"Cu": {"Γ-X": [1]}}', '{"Cu": {"Γ-X": [[1], [2, 3]]}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="not a file of phonon frequencies"):
            phonons.read_reference(file)


@pytest.mark.thorough
def test_unstable_crystal_has_imaginary_modes(tmp_path: Path) -> None:
    pytest.importorskip("phonopy")
    candidate = candidate_of(lambda: MorsePotential(epsilon=0.34, r0=2.87, rho0=4.0, rcut1=1.2, rcut2=1.9), tmp_path)
    candidate.crystals = {"sc": bulk("Cu", "sc", a=2.9)}  # a simple cubic crystal of a pair potential shears by itself
    result = phonons.check(candidate)
    assert result.status == "failed"
    assert "lowest frequency" in result.reason
    assert phonons.check(candidate_of(EMT, tmp_path)).status == "passed"


def test_conductivity_errors_by_their_definition() -> None:
    mode = np.array([[1.0, 2.0], [3.0, 4.0]])
    reference = {"kappa": mode.sum() / 4, "mode_kappa": mode, "weights": np.array([1.0, 3.0])}
    assert thermal_conductivity.relative_errors(reference, reference) == {"sre": 0, "srme": 0}
    other = {"kappa": 2 * mode.sum() / 4, "mode_kappa": 2 * mode, "weights": reference["weights"]}
    assert thermal_conductivity.relative_errors(other, reference)["sre"] == pytest.approx(2 / 3)
    assert thermal_conductivity.relative_errors(other, reference)["srme"] == pytest.approx(2 / 3)
    moved = {**reference, "mode_kappa": mode[::-1]}  # the total is right, the modes are not
    assert thermal_conductivity.relative_errors(moved, reference) == {"sre": 0, "srme": pytest.approx(2 * 8 / 4 / 5)}
    assert thermal_conductivity.relative_errors({"kappa": float("nan")}, reference) == {"sre": 2, "srme": 2}


@pytest.mark.reference
def test_conductivity_references_are_read() -> None:
    table = thermal_conductivity.read_references(shared_data("data", "phonondb103", "phonondb103_kappa_pbe_ref82.json.xz"))
    frames = read_frames(shared_data("data", "phonondb103", "phonondb103_structures.extxyz.xz"))
    assert len(frames) == 103
    assert len(table) == 82
    for entry in table.values():
        assert entry["mode_kappa"].sum() / entry["weights"].sum() == pytest.approx(entry["kappa"], rel=1e-3)
    mgo = next(f for f in frames if f.info["name"] == "MgO" and f.info["symm.no"] == 225)
    assert table[mgo.info["mp_id"]]["kappa"] == pytest.approx(47.9, abs=0.1)


@pytest.mark.parametrize("compact", often([True, False], [True]))
def test_transport_is_that_of_phono3py(compact: bool) -> None:
    """Third-order force constants of no symmetry between two unlike atoms, in a supercell with several images at equal distance.

    The cell is triclinic: where symmetry makes frequencies equal, rounding decides whether a tetrahedron encloses them.
    """
    phono3py = pytest.importorskip("phono3py")
    cell = bulk("Cu", "hcp", a=2.6, c=4.2)
    cell.symbols = "CuAu"
    cell.set_cell(cell.cell.array @ [[1.02, 0.05, 0.03], [0, 0.97, 0.04], [0, 0, 1.01]], scale_atoms=True)
    doubled = {"supercell_matrix": [2, 2, 1], "phonon_supercell_matrix": [2, 2, 1], "primitive_matrix": np.eye(3)}
    solver = phono3py.Phono3py(phonons.to_phonopy(cell), **doubled)
    solver.mesh_numbers = [5, 5, 4]
    solver.generate_fc2_displacements(distance=0.03)
    solver.phonon_forces = phonons.forces_of(EMT(), solver.phonon_supercells_with_displacements)
    solver.produce_fc2()
    solver.fc3 = np.random.default_rng(0).normal(scale=10, size=(2 if compact else 8, 8, 8, 3, 3, 3))
    solver.init_phph_interaction(symmetrize_fc3q=False)
    ours = thermal_conductivity.transport(solver.phph_interaction, 300.0)
    solver.run_thermal_conductivity(temperatures=[300.0], is_isotope=True, transport_type="SMM19", boundary_mfp=1e6)
    theirs = solver.thermal_conductivity
    assert ours.gamma.max() > ours.gamma_isotope.max() > 0
    for name in ("gamma", "gamma_isotope", "mode_kappa_matrix"):
        expected = getattr(theirs, name)
        np.testing.assert_allclose(getattr(ours, name), expected, rtol=1e-8, atol=1e-10 * np.abs(expected).max(), err_msg=name)


@pytest.mark.thorough
def test_conductivity_of_copper_by_emt(tmp_path: Path) -> None:
    pytest.importorskip("phono3py")
    cu = bulk("Cu", cubic=True)
    cu.info.update(fc2_supercell=[2, 2, 2], fc3_supercell=[2, 2, 2], q_mesh=[4, 4, 4], name="Cu", mp_id="x")
    candidate = candidate_of(EMT, tmp_path)
    candidate.crystals = {"Cu": cu}
    result = thermal_conductivity.check(candidate)
    kappa = by_name(result, "κ at 300 K").value
    assert 5 < kappa < 40
    stored = json.loads((tmp_path / "conductivity" / "x.json").read_text())
    mode, weights = np.array(stored["mode_kappa"]), np.array(stored["weights"])
    assert mode.sum() / weights.sum() == pytest.approx(kappa)
    assert weights.sum() == 64
    # finished crystals are not done again: a calculator that raises is never asked
    candidate.make = lambda: Defect(EMT(), lambda atoms, r: 1 / 0)
    candidate._calculator = None
    assert by_name(thermal_conductivity.check(candidate), "κ at 300 K").value == pytest.approx(kappa)
    # an unstable crystal has no conductivity
    sc = bulk("Cu", "sc", a=2.9)
    sc.info.update(fc2_supercell=[3, 3, 3], fc3_supercell=[2, 2, 2], q_mesh=[3, 3, 3], name="sc")
    candidate = candidate_of(lambda: MorsePotential(epsilon=0.34, r0=2.87, rho0=4.0, rcut1=1.2, rcut2=1.9), tmp_path / "b")
    candidate.crystals = {"sc": sc}
    result = thermal_conductivity.check(candidate)
    assert result.status == "failed"
    assert "imaginary" in result.reason


@pytest.mark.parametrize(("check", "package"), [("phonons", "phonopy"), ("conductivity", "phono3py")])
def test_missing_packages_are_named(check: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = CHECKS[check].run(candidate_of(EMT, tmp_path))
    assert result.status == "skipped"
    assert "pip install 'gossamer[phonons]'" in result.reason
