"""The judge is judged: each check passes a sound potential, and says what is wrong with one broken in just that way."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.morse import MorsePotential
from ase.calculators.singlepoint import SinglePointCalculator
from ase.calculators.tersoff import Tersoff, TersoffParameters
from conftest import make_potential, shared_data
from test_checks import Broken, copper

from gossamer.checks import (
    conservation,
    crystals,
    diatomics,
    discovery,
    dynamics,
    errors,
    phonons,
    smoothness,
    speed,
    thermal_conductivity,
)
from gossamer.checks.candidate import (
    LEVELS,
    Candidate,
    builtin_crystals,
    builtin_molecules,
    enlarged,
    parse_calculator,
    read_frames,
    supported_elements,
)
from gossamer.checks.judge import CHECKS, JudgeOptions, judge
from gossamer.checks.page import number
from gossamer.checks.result import Result, at_least, at_most, close_to, conclude, measured

TINY = replace(
    LEVELS["quick"], diatomic_points=40, equilibration_ps=0.02, nve_ps=0.12, md_ps=0.25, md_atoms=32, speed_atoms=32, speed_seconds=0.05
)


def candidate_of(
    make: Any, folder: Path, elements: tuple[str, ...] = ("Cu",), structures: list[Atoms] | None = None, **options: Any
) -> Candidate:
    found = [bulk("Cu", cubic=True)] if structures is None else structures
    return Candidate("it", make, list(elements), found, {"Cu": bulk("Cu", cubic=True)}, {"Cu": bulk("Cu", cubic=True)}, folder, TINY,
                   JudgeOptions(**{"timestep": 2.0, **options}), progress=False)  # fmt: skip


def by_name(result: Result, part: str) -> Any:
    found = [m for m in result.metrics if part in m.name]
    assert found, (part, [m.name for m in result.metrics])
    return found[0]


class Defect(Calculator):
    """A calculator whose results a function spoils."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012 - ASE's own convention

    def __init__(self, inner: Any, spoil: Any) -> None:
        super().__init__()
        self.inner, self.spoil = inner, spoil

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        copy = self.atoms.copy()
        copy.calc = self.inner
        self.results = {"energy": copy.get_potential_energy(), "forces": copy.get_forces().copy()}
        if copy.pbc.all():
            self.results["stress"] = copy.get_stress()
        self.spoil(copy, self.results)


# --- verdicts -------------------------------------------------------------------------------------------------------


def test_metrics_follow_their_limits() -> None:
    assert [at_most("a", v, "eV", 1, 2, "").status for v in (1, 1.5, 3, float("nan"))] == ["passed", "weak", "failed", "failed"]
    assert [at_least("a", v, "", 2, 1, "").status for v in (2, 1.5, 0, float("nan"))] == ["passed", "weak", "failed", "failed"]
    assert [close_to("a", v, "", 4, 0.5, 1, "").status for v in (4.4, 3.1, 9)] == ["passed", "weak", "failed"]
    bad = conclude([at_most("drift", 3, "meV", 1, 2, "it heats up"), at_most("other", 1.5, "", 1, 2, "x"), measured("m", 1.0)])
    assert (bad.status, bad.reason, bad.consequence) == ("failed", "Drift: 3 meV, expected at most 1 meV.", "it heats up")
    assert conclude([measured("m", 1.0)]).status == "measured"
    assert conclude([]).status == "skipped"
    assert Result.from_dict(json.loads(json.dumps(bad.to_dict()))) == bad


@pytest.mark.parametrize("check", ["symmetry", "conservation", "smoothness", "diatomics", "crystals", "speed"])
def test_sound_potential_passes(check: str, tmp_path: Path) -> None:
    make = EMT
    if check == "smoothness":  # EMT itself has steps at its cutoff
        make = lambda: MorsePotential(epsilon=0.34, r0=2.87, rho0=4.0, rcut1=1.2, rcut2=1.9)  # noqa: E731
    result = CHECKS[check].run(candidate_of(make, tmp_path))
    assert result.status in ("passed", "measured"), [m.reason for m in result.metrics if m.status in ("weak", "failed")]
    if check == "conservation":
        assert by_name(result, "ratio").value == pytest.approx(4, abs=0.5)


@pytest.mark.parametrize(
    ("check", "defect", "says"),
    [
        ("symmetry", "rotation", "Rotation"), ("symmetry", "permutation", "Permutation"), ("symmetry", "translation", "Translation"),
        ("symmetry", "extensivity", "Supercell"), ("conservation", "non-conservative", "Forces against"), ("conservation", "stress sign", "Stress against"),
        ("smoothness", "noise", "Noise of the forces"),
    ],
)  # fmt: skip
def test_broken_potential_is_told_why(check: str, defect: str, says: str, tmp_path: Path) -> None:
    result = CHECKS[check].run(candidate_of(lambda: Broken(defect), tmp_path))
    assert result.status == "failed"
    named = [m for m in result.metrics if m.status in ("weak", "failed") and m.name.lower().startswith(says.lower())]
    assert named, [m.name for m in result.metrics if m.status == "failed"]
    assert named[0].consequence
    assert result.reason.endswith(".")


def test_drift_of_forces_that_pump_energy(tmp_path: Path) -> None:
    swirl = Defect(
        EMT(), lambda atoms, r: r["forces"].__iadd__(0.05 * np.cross(atoms.positions - atoms.positions.mean(axis=0), [0, 0, 1.0]))
    )
    result = conservation.check(candidate_of(lambda: swirl, tmp_path))
    assert result.status in ("weak", "failed")
    assert by_name(result, "work around a closed loop").status in ("weak", "failed")


def test_verlet_fluctuation_of_a_harmonic_oscillator() -> None:
    """Velocity Verlet conserves a shadow energy: the energy itself swings by E (omega dt)² / 8 (Leimkuhler and Reich, ch. 2)."""

    class Spring(Calculator):
        implemented_properties = ["energy", "forces"]  # noqa: RUF012

        def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
            super().calculate(atoms, properties, system_changes)
            x = self.atoms.positions
            self.results = {"energy": 5.0 * float((x**2).sum()), "forces": -10.0 * x}

    atoms = Atoms("C", [[0.1, 0, 0]])
    atoms.set_momenta(np.zeros((1, 3)))
    dt = 1.0
    energies = conservation.nve_energies(Spring(), atoms, dt, 2000)
    omega = np.sqrt(10.0 / atoms.get_masses()[0])
    swing = 0.25 * (omega * dt * units.fs) ** 2 * 0.05  # energy 0.05 eV, peak to peak
    assert np.ptp(energies) == pytest.approx(swing, rel=0.02)
    run = conservation.nve_conservation(Spring(), atoms, timestep=dt, picoseconds=2.0)
    assert run["fluctuation_ratio"] == pytest.approx(4, abs=0.1)
    assert abs(run["drift_meV_per_atom_per_ps"]) < 2 * run["drift_error"] + 1e-3


# --- smoothness -----------------------------------------------------------------------------------------------------


def test_jumps_are_measured_not_curvature() -> None:
    x = np.linspace(0, 1, 201)
    smooth = np.sin(9 * x)
    for order, size in ((0, 0.01), (1, 0.3), (2, 8.0)):
        kinked = smooth + size * np.where(x > 0.5025, (x - 0.5025) ** order / (1, 1, 2)[order], 0)
        jump, place = smoothness.largest_jump(kinked, x[1], order)
        assert jump == pytest.approx(size, rel=0.25)
        assert x[place] == pytest.approx(0.5, abs=0.03)
        assert smoothness.largest_jump(smooth, x[1], order)[0] < 0.02 * size


def test_a_kink_at_the_cutoff_fails(tmp_path: Path) -> None:
    cut = lambda: MorsePotential(epsilon=0.34, r0=2.5, rho0=4.0, rcut1=1.9999999, rcut2=2.0)  # noqa: E731
    result = smoothness.check(candidate_of(cut, tmp_path))
    assert result.status == "failed"
    assert by_name(result, "jump of the energy as an atom leaves").status in ("weak", "failed")
    assert by_name(result, "distance of the largest jump").value == pytest.approx(5.0, abs=0.1)


def test_noise_has_its_size() -> None:
    rng = np.random.default_rng(0)
    noisy = Defect(EMT(), lambda atoms, r: r["forces"].__iadd__(rng.normal(scale=0.003, size=r["forces"].shape)))
    assert smoothness.force_noise(noisy, copper(), points=17) == pytest.approx(0.003, rel=0.25)
    assert smoothness.force_noise(EMT(), copper()) < 1e-7
    assert smoothness.tortuosity(np.array([1.0, 0, 1])) == 1
    assert smoothness.tortuosity(np.array([1.0, 0, 0.5, 0, 1])) == 1.5


# --- diatomics ------------------------------------------------------------------------------------------------------


def test_dimer_numbers_of_a_known_curve() -> None:
    r = np.geomspace(0.3, 6, 200)
    inside = 4 * (r**-12 - r**-6)
    forces = 4 * (12 * r**-13 - 6 * r**-7)
    m = diatomics.curve_metrics(r, inside, forces, 1.1)
    assert m["tortuosity"] == pytest.approx(1)
    assert (m["hole"], m["energy_flips"], m["force_flips"]) == (0, 1, 1)
    assert m["well_distance"] == pytest.approx(2 ** (1 / 6), abs=0.02)
    assert m["well_depth"] == pytest.approx(1, abs=0.01)
    holed = inside - 3e5 * np.exp(-(((r - 0.4) / 0.03) ** 2))
    assert diatomics.curve_metrics(r, holed, forces, 1.1)["hole"] > 100


def test_hole_at_short_range_fails(tmp_path: Path) -> None:
    def hole(atoms: Atoms, r: dict[str, Any]) -> None:
        if len(atoms) == 2:
            d = np.linalg.norm(atoms.positions[1] - atoms.positions[0])
            r["energy"] -= 80 * np.exp(-(((d - 0.8) / 0.2) ** 2))

    result = diatomics.check(candidate_of(lambda: Defect(EMT(), hole), tmp_path))
    assert result.status == "failed"
    assert "hole" in result.reason
    assert "Cu-Cu" in result.reason
    assert diatomics.check(candidate_of(EMT, tmp_path, ("Cu", "Al"), all_pairs=True)).notes[0].startswith("3 pairs")


def test_distances_without_an_answer_are_gaps(tmp_path: Path) -> None:
    def refuse(atoms: Atoms, r: dict[str, Any]) -> None:
        if len(atoms) == 2 and atoms.get_distance(0, 1) > 5:
            raise RuntimeError("too far")

    result = diatomics.check(candidate_of(lambda: Defect(EMT(), refuse), tmp_path))
    assert result.status == "weak"
    assert by_name(result, "distances without an answer").value == pytest.approx(5.0)
    drawn = np.array(result.panels[0].curves[0].y)
    assert np.isnan(drawn[-2:]).all()
    assert np.isfinite(drawn[:-2]).all()


def test_dimers_beside_a_reference(tmp_path: Path) -> None:
    file = tmp_path / "curves.json"
    r = np.geomspace(0.1, 6, 40)
    e, _ = diatomics.dimer_curve(EMT(), "Cu", "Cu", r)
    file.write_text(json.dumps({"PBE": {"Cu-Cu": {"distances": list(r), "energies": list(e + 3)}}}))
    result = diatomics.check(candidate_of(EMT, tmp_path, diatomics_reference=str(file)))
    assert by_name(result, "error against the reference").value == pytest.approx(0, abs=1e-9)
    assert any(c.reference for c in result.panels[0].curves)
    file.write_text("{}")
    with pytest.raises(ValueError, match="not a file of dimer curves"):
        diatomics.read_reference(file)


@pytest.mark.reference
def test_reference_curves_of_the_field_are_read() -> None:
    curves = diatomics.read_reference(shared_data("data", "diatomics", "diatomics_dft_pbe_r2scan.json.gz"))
    r, e = curves["N-N"]
    assert r[e.argmin()] == pytest.approx(1.11, abs=0.05)


# --- crystals -------------------------------------------------------------------------------------------------------

T3 = {("Si", "Si", "Si"): TersoffParameters(A=1830.8, B=471.18, lambda1=2.4799, lambda2=1.7322, lambda3=0.0, beta=1.1e-6, gamma=1.0, m=3.0, n=0.78734,
                                            c=1.0039e5, d=16.217, h=-0.59825, R=2.85, D=0.15)}  # fmt: skip
"""Tersoff, Phys. Rev. B 38, 9902 (1988)"""


def test_silicon_of_tersoff_has_its_published_properties() -> None:
    """a, C_ij, B (GPa): Balamane, Halicioglu and Tiller, Phys. Rev. B 46, 2250 (1992), table III, column T3."""
    cell, converged = crystals.relaxed(Tersoff(T3), bulk("Si", cubic=True))
    assert converged
    assert cell.cell.lengths()[0] == pytest.approx(5.432, abs=0.002)
    eos = crystals.equation_of_state(Tersoff(T3), cell, points=7)
    assert eos["bulk_modulus"] == pytest.approx(98, rel=0.01)
    c = crystals.elastic_constants(Tersoff(T3), cell)
    assert c[0, 0] == pytest.approx(143, rel=0.01)
    assert c[0, 1] == pytest.approx(75, rel=0.015)
    assert c[3, 3] == pytest.approx(69, rel=0.01)
    k, _ = crystals.voigt_averages(c)
    assert k == pytest.approx(98, rel=0.01)


def test_equation_of_state_of_lennard_jones() -> None:
    """fcc, ε = σ = 1, long cutoff: E = -8.610 ε, nearest neighbours 1.0902 σ, B = 75.2 ε/σ³ (Ashcroft and Mermin, ch. 20)."""
    atoms = bulk("Ar", "fcc", a=1.09 * np.sqrt(2), cubic=True)
    eos = crystals.equation_of_state(LennardJones(epsilon=1, sigma=1, rc=12.0), atoms)
    assert (eos["v0"] * np.sqrt(2) / 4) ** (1 / 3) == pytest.approx(1.0902, abs=0.001)
    assert eos["e0"] / 4 == pytest.approx(-8.61, abs=0.015)
    assert eos["bulk_modulus"] * units.GPa == pytest.approx(75.2, rel=0.01)


def test_wrong_stress_is_seen_against_the_energy(tmp_path: Path) -> None:
    stiff = Defect(EMT(), lambda atoms, r: r.__setitem__("stress", 1.3 * r["stress"]))
    result = crystals.check(candidate_of(lambda: stiff, tmp_path))
    assert by_name(result, "from stress against that from energy").status == "failed"


# --- phonons --------------------------------------------------------------------------------------------------------


def test_phonons_agree_with_ase() -> None:
    pytest.importorskip("phonopy")
    from ase.phonons import Phonons

    cell = bulk("Cu", a=3.589)
    ours = phonons.make_phonons(EMT(), cell, [4, 4, 4])
    theirs = Phonons(cell, EMT(), supercell=(4, 4, 4), delta=0.01, name="unused")
    # ASE's own finite differences, without its files
    calculator, large = EMT(), cell.repeat((4, 4, 4))
    q = np.array([0.25, 0.5, 0.25])
    mass = cell.get_masses()[0]
    shifts = large.get_scaled_positions() * 4
    dynamical = np.zeros((3, 3), dtype=complex)
    for axis in range(3):
        pair = []
        for sign in (-1, 1):
            moved = large.copy()
            moved.positions[0, axis] += sign * 0.01
            moved.calc = calculator
            pair.append(moved.get_forces())
        constants = (pair[0] - pair[1]) / 0.02
        dynamical[axis] = (np.exp(2j * np.pi * shifts @ q)[:, None] * constants).sum(axis=0) / mass
    expected = (
        np.sqrt(np.linalg.eigvalsh(0.5 * (dynamical + dynamical.conj().T))) * units._e**0.5 / units._amu**0.5 * 1e10 / (2 * np.pi) * 1e-12
    )
    np.testing.assert_allclose(phonons.frequencies_at(ours, q[None])[0], expected, atol=0.02)
    assert theirs is not None
    assert phonons.sum_rule_error(ours) < 1e-9


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


def test_conductivity_of_copper_by_emt(tmp_path: Path) -> None:
    pytest.importorskip("phono3py")
    cu = bulk("Cu", cubic=True)
    cu.info.update(fc2_supercell=[2, 2, 2], fc3_supercell=[2, 2, 2], q_mesh=[5, 5, 5], name="Cu", mp_id="x")
    candidate = candidate_of(EMT, tmp_path)
    candidate.crystals = {"Cu": cu}
    result = thermal_conductivity.check(candidate)
    kappa = by_name(result, "κ at 300 K").value
    assert 5 < kappa < 40
    stored = json.loads((tmp_path / "conductivity" / "x.json").read_text())
    mode, weights = np.array(stored["mode_kappa"]), np.array(stored["weights"])
    assert mode.sum() / weights.sum() == pytest.approx(kappa)
    assert weights.sum() == 125
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


# --- dynamics -------------------------------------------------------------------------------------------------------


def test_dynamics_of_copper_passes_and_goes_on(tmp_path: Path) -> None:
    candidate = candidate_of(EMT, tmp_path, picoseconds=1.0)
    candidate.systems = {"Cu": bulk("Cu", cubic=True).repeat(2)}
    result = dynamics.check(candidate)
    assert result.status in ("passed", "weak"), result.reason
    assert by_name(result, "time before it breaks").value == 1.0
    titles = [p.title for p in result.panels]
    assert "g(r), all pairs, Cu" in titles
    assert "Mean squared displacement, Cu" in titles
    # the run is kept: only its last frame is looked at again
    asked: list[int] = []
    candidate.make = lambda: Defect(EMT(), lambda atoms, r: asked.append(1))
    candidate._calculator = None
    again = dynamics.check(candidate)
    assert len(asked) < 5
    assert by_name(again, "mean temperature").value == by_name(result, "mean temperature").value


def test_dynamics_says_when_it_breaks(tmp_path: Path) -> None:
    def explode(atoms: Atoms, r: dict[str, Any]) -> None:
        r["forces"] *= -3  # uphill

    candidate = candidate_of(lambda: Defect(EMT(), explode), tmp_path, picoseconds=1.0)
    result = dynamics.check(candidate)
    assert result.status == "failed"
    assert "time before it breaks" in result.reason
    assert "K is above" in result.reason or "apart" in result.reason


def test_dynamics_beside_a_reference(tmp_path: Path) -> None:
    candidate = candidate_of(EMT, tmp_path, picoseconds=0.5)
    candidate.systems = {"Cu": bulk("Cu", cubic=True).repeat(2)}
    dynamics.check(candidate)
    frames, _ = dynamics.read_trajectory(tmp_path / "dynamics" / "Cu")
    ase.io.write(tmp_path / "same.extxyz", frames[len(frames) // 2 :])
    candidate.options = replace(candidate.options, references=(str(tmp_path / "same.extxyz"),))
    result = dynamics.check(candidate)
    assert by_name(result, "overlap of g(r), all pairs").value == pytest.approx(1, abs=1e-6)
    molten = [
        Atoms(f.numbers, np.random.default_rng(k).uniform(size=(len(f), 3)) @ f.cell.array, cell=f.cell, pbc=True)
        for k, f in enumerate(frames)
    ]
    ase.io.write(tmp_path / "other.extxyz", molten)
    candidate.options = replace(candidate.options, references=(str(tmp_path / "other.extxyz"),))
    result = dynamics.check(candidate)
    assert result.status == "failed"
    assert by_name(result, "overlap of g(r), all pairs").status == "failed"


def test_ensembles_of_harmonic_atoms_are_right(tmp_path: Path) -> None:
    """Einstein crystals are exact: kinetic energies and the Boltzmann factor between two temperatures."""
    pytest.importorskip("physical_validation")
    rng = np.random.default_rng(0)
    n, temperature = 20, 300.0
    warmer = temperature * (1 + np.sqrt(2 / (3 * n)))

    def log(t: float, width: float = 1.0) -> dict[str, Any]:
        kinetic = rng.gamma(1.5 * n / width, units.kB * t * width, size=400)
        potential = rng.gamma(1.5 * n, units.kB * t, size=400)
        return {"potential_energy_eV": potential, "total_energy_eV": kinetic + potential}

    mean, width = dynamics.kinetic_energy_deviation(log(temperature), 3 * n, temperature)
    assert max(mean, width) < 4
    assert dynamics.kinetic_energy_deviation(log(330), 3 * n, temperature)[0] > 5
    assert dynamics.kinetic_energy_deviation(log(temperature, width=0.3), 3 * n, temperature)[1] > 5
    assert dynamics.ensemble_deviation(log(temperature), log(warmer), (temperature, warmer), n) < 4
    assert dynamics.ensemble_deviation(log(temperature), log(temperature), (temperature, 2 * temperature), n) > 5


def test_a_protocol_gives_way_to_what_was_asked(tmp_path: Path) -> None:
    asked = dict(
        calculator="ase.calculators.emt:EMT", elements=["Cu"], only=["dynamics"], protocol="methane", picoseconds=0.05, progress=False
    )
    own = judge(out=tmp_path, **asked)["EMT"]["dynamics"]
    assert "300 K, 0.5 fs" in own.notes[0]
    other = judge(out=tmp_path, timestep=2.0, temperature=100, **asked)["EMT"]["dynamics"]  # another question: done again
    assert "100 K, 2 fs" in other.notes[0]


@pytest.mark.parametrize("name", ["references", "diatomics_reference"])
def test_wrong_files_stop_the_judge(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    value = [str(tmp_path / "gone.xyz")] if name == "references" else str(tmp_path / "x.json")
    with pytest.raises((ValueError, FileNotFoundError), match="gone|not a file of dimer curves"):
        judge(calculator="ase.calculators.emt:EMT", elements=["Cu"], only=["diatomics"], out=tmp_path, progress=False, **{name: value})


def test_vibrations_have_their_wavenumber() -> None:
    times = np.arange(2000) * 0.5e-3  # ps
    frames = []
    for t in times:
        atoms = Atoms("H", [[0, 0, 0]])
        atoms.set_velocities([[np.cos(2 * np.pi * 2.99792458e10 * 1500 * t * 1e-12), 0, 0]])
        frames.append(atoms)
    wavenumbers, density = dynamics.vibrational_density(frames, 0.5e-3)
    assert wavenumbers[density.argmax()] == pytest.approx(1500, abs=20)
    assert np.trapezoid(density, wavenumbers) == pytest.approx(1)


@pytest.mark.reference
def test_reference_trajectories_of_the_field_are_read() -> None:
    frames = dynamics.read_reference(shared_data("data", "argyrodite_aimd", "li6ps5cl_100p_run1_traj.npz"))
    assert len(frames) == 140
    assert len(frames[0]) == 416


# --- errors ---------------------------------------------------------------------------------------------------------


def labelled(shift: float = 0.0, noise: float = 0.0, n: int = 6) -> list[Atoms]:
    rng = np.random.default_rng(1)
    frames = []
    for k in range(n):
        atoms = bulk("Cu", cubic=True) if k % 2 else bulk("Al", cubic=True)
        atoms.rattle(0.1, seed=k)
        atoms.calc = EMT()
        energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        frame = atoms.copy()
        per_element = {"Cu": 1.0, "Al": 2.0}[atoms.get_chemical_symbols()[0]]
        frame.calc = SinglePointCalculator(
            frame,
            energy=energy + len(atoms) * shift * per_element,
            forces=forces + rng.normal(scale=noise, size=forces.shape) if noise else forces,
            stress=stress,
        )
        frames.append(frame)
    return frames


def test_errors_have_their_size(tmp_path: Path) -> None:
    candidate = candidate_of(EMT, tmp_path, ("Al", "Cu"), labelled=labelled(0.5, 0.02), data="x")
    result = errors.check(candidate)
    assert by_name(result, "energy, mean absolute error").value == pytest.approx(750)
    assert by_name(result, "one constant per element").value == pytest.approx(0, abs=1e-6)
    assert by_name(result, "force, root mean square").value == pytest.approx(20, rel=0.2)
    assert by_name(result, "stress, mean").value == pytest.approx(0, abs=1e-9)
    assert (tmp_path / "worst.extxyz").exists()
    wrong = Defect(EMT(), lambda atoms, r: r.__setitem__("forces", -r["forces"]))
    result = errors.check(candidate_of(lambda: wrong, tmp_path, ("Al", "Cu"), labelled=labelled(), data="x"))
    assert result.status == "failed"
    assert by_name(result, "cosine").value == pytest.approx(-1)


def test_frames_without_an_answer_count(tmp_path: Path) -> None:
    def refuse(atoms: Atoms, r: dict[str, Any]) -> None:
        if "Al" in atoms.symbols:
            raise RuntimeError("no aluminium today")

    result = errors.check(candidate_of(lambda: Defect(EMT(), refuse), tmp_path, ("Al", "Cu"), labelled=labelled(), data="x"))
    assert result.status == "failed"
    assert "50 %" in result.reason
    assert "no aluminium today" in result.reason


def test_uncertainties_are_weighed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def unsure(claimed: float) -> Any:
        def spoil(atoms: Atoms, r: dict[str, Any]) -> None:
            sigma = rng.uniform(0.01, 0.2, size=len(atoms))
            r["forces"] += rng.normal(size=(len(atoms), 3)) * sigma[:, None]
            r["forces_uncertainty"] = claimed * sigma

        return Defect(EMT(), spoil)

    frames = labelled(n=40)
    honest = errors.check(candidate_of(lambda: unsure(1.0), tmp_path, ("Al", "Cu"), labelled=frames, data="x"))
    assert by_name(honest, "error over uncertainty").value == pytest.approx(1, abs=0.15)
    assert by_name(honest, "rank correlation").status == "passed"
    assert by_name(honest, "errors within one").value == pytest.approx(0.68, abs=0.08)
    proud = errors.check(candidate_of(lambda: unsure(0.1), tmp_path, ("Al", "Cu"), labelled=frames, data="x"))
    assert by_name(proud, "error over uncertainty").status == "failed"


# --- discovery ------------------------------------------------------------------------------------------------------


def test_stability_metrics_are_those_of_the_package() -> None:
    """Numbers printed by `matbench_discovery.metrics.stable_metrics` 1.3.1 on the same predictions (made 2026-11-21)."""
    rng = np.random.default_rng(0)
    true = rng.normal(0.05, 0.1, 500)
    predicted = true + rng.normal(0, 0.05, 500)
    predicted[::50] = np.nan
    expected = {"F1": 0.8181818181818182, "DAF": 2.4816176470588234, "Precision": 0.7941176470588235, "Recall": 0.84375, "Accuracy": 0.8979591836734694,
                "TPR": 0.84375, "FPR": 0.10294117647058823, "TNR": 0.8970588235294118, "FNR": 0.15625, "TP": 135.0, "FP": 35.0, "TN": 305.0, "FN": 25.0,
                "MAE": 0.037175415365023, "RMSE": 0.04705602389427713, "R2": 0.7867233410388292}  # fmt: skip
    assert discovery.stability_metrics(true, predicted) == pytest.approx(expected, rel=1e-12)
    expected = {"F1": 0.8745098039215685, "DAF": 1.71601822211278, "Accuracy": 0.872, "MAE": 0.041461754473590885, "R2": 0.6559943852264909}
    found = discovery.stability_metrics(true, np.nan_to_num(predicted, nan=0.3), threshold=0.05)
    assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="two lists of one length"):
        discovery.stability_metrics(true, predicted[:3])


@pytest.mark.reference
def test_combined_score_is_that_of_the_leaderboard() -> None:
    with open(shared_data("data", "leaderboard", "matbench_discovery_2026-07-16.csv"), newline="") as file:
        rows = [
            r
            for r in csv.DictReader(file)
            if r["CPS_recomputed"] and r["kappa_SRME"] and r["geo_opt_rmsd_symprec1e-2"] and r["F1_unique_prototypes"]
        ]
    assert len(rows) > 40
    for r in rows:
        score = discovery.combined_score(float(r["F1_unique_prototypes"]), float(r["kappa_SRME"]), float(r["geo_opt_rmsd_symprec1e-2"]))
        assert score == pytest.approx(float(r["CPS_recomputed"]), abs=2e-4), r["model_key"]


def hull_set(folder: Path, n: int = 6) -> tuple[Path, Path]:
    """Alloys of copper and gold with a made-up hull; EMT is its own reference."""
    frames, rows = [], []
    for k in range(n):
        atoms = bulk("Cu", cubic=True)
        atoms.set_chemical_symbols(["Cu"] * (4 - k % 4) + ["Au"] * (k % 4))
        atoms.rattle(0.02, seed=k)
        result = discovery.relax_one(EMT(), atoms)
        atoms.info["material_id"] = f"m-{k}"
        frames.append(atoms)
        rows.append(
            {
                "material_id": f"m-{k}",
                "n_sites": 4,
                "uncorrected_energy": result["energy"],
                "e_above_hull_mp2020_corrected_ppd_mp": 0.05 * (k - 2.5),
                "unique_prototype": k % 2 == 0,
            }
        )
    ase.io.write(folder / "initial.extxyz", frames)
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "initial.extxyz", folder / "table.csv"


def test_discovery_of_the_reference_itself_is_perfect(tmp_path: Path) -> None:
    initial, table = hull_set(tmp_path)
    candidate = candidate_of(EMT, tmp_path / "a", discovery=str(initial), discovery_table=str(table))
    result = discovery.check(candidate)
    assert result.status == "passed", result.reason
    assert by_name(result, "F1").value == 1
    assert by_name(result, "MAE").value == pytest.approx(0, abs=1e-6)
    # a crash in the middle of a line: that one is done again, the others are not
    path = tmp_path / "a" / "discovery.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:30])
    asked: list[int] = []

    def count() -> Any:
        asked.append(1)
        return EMT()

    candidate.make = count
    assert discovery.check(candidate).status == "passed"
    assert asked == [1]
    assert len(path.read_text().splitlines()) == 6
    # a potential that is 0.2 eV/atom too low calls everything stable
    low = candidate_of(
        lambda: Defect(EMT(), lambda a, r: r.__setitem__("energy", r["energy"] - 0.2 * len(a))),
        tmp_path / "b",
        discovery=str(initial),
        discovery_table=str(table),
    )
    result = discovery.check(low)
    assert result.status == "weak"
    assert by_name(result, "F1").value == pytest.approx(2 / 3)
    assert by_name(result, "MAE").value == pytest.approx(0.2, abs=1e-6)


@pytest.mark.slow
def test_discovery_on_several_processes(tmp_path: Path) -> None:
    initial, _ = hull_set(tmp_path)
    found = discovery.relax_many(EMT, discovery.read_initial(initial), tmp_path / "r.jsonl", processes=2, progress=False)
    alone = discovery.relax_many(EMT, discovery.read_initial(initial), tmp_path / "s.jsonl", processes=1, progress=False)
    assert {k: v["energy"] for k, v in found.items()} == {k: v["energy"] for k, v in alone.items()}


@pytest.mark.parametrize(("worker", "device"), [(1, "4"), (2, "7"), (3, "4")])
def test_workers_take_the_gpus_in_turn(worker: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(discovery.multiprocessing, "current_process", lambda: type("Worker", (), {"_identity": (worker,)}))
    monkeypatch.setattr(discovery, "_CALCULATOR", None)
    seen: list[str] = []
    discovery._start(lambda: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    assert seen == [device]


def test_combined_score_needs_its_three_parts() -> None:
    from gossamer.checks.judge import combined

    parts = {
        "discovery": {"metrics": [{"name": "F1", "value": 0.8}, {"name": "RMSD of relaxed structures", "value": 0.075}]},
        "conductivity": {"metrics": [{"name": "κ_SRME", "value": 0.5}]},
    }
    assert combined(parts) == pytest.approx(0.5 * 0.8 + 0.4 * 0.75 + 0.1 * 0.5)
    assert combined({"discovery": parts["discovery"]}) is None


@pytest.mark.parametrize(("check", "package"), [("phonons", "phonopy"), ("conductivity", "phono3py")])
def test_missing_packages_are_named(check: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = CHECKS[check].run(candidate_of(EMT, tmp_path))
    assert result.status == "skipped"
    assert "pip install 'gossamer[phonons]'" in result.reason


def test_missing_physical_validation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "physical_validation", None)
    result = dynamics.check(candidate_of(EMT, tmp_path, picoseconds=1.2))
    assert any("pip install 'gossamer[judge]'" in note for note in result.notes)


def test_discovery_says_what_is_missing(tmp_path: Path) -> None:
    initial, table = hull_set(tmp_path, 2)
    assert discovery.check(candidate_of(EMT, tmp_path)).status == "skipped"
    with pytest.raises(ValueError, match="needs --discovery-table"):
        discovery.check(candidate_of(EMT, tmp_path, discovery=str(initial)))
    short = tmp_path / "short.csv"
    short.write_text("material_id,n_sites\nm-0,4\n")
    with pytest.raises(ValueError, match="lacks e_above_hull"):
        discovery.read_table(short)
    short.write_text(table.read_text().replace("m-1", "other"))
    with pytest.raises(ValueError, match="1 structures .* not in"):
        discovery.check(candidate_of(EMT, tmp_path, discovery=str(initial), discovery_table=str(short)))
    failing = discovery.relax_one(Defect(EMT(), lambda a, r: 1 / 0), bulk("Cu"))
    assert failing["energy"] is None
    assert "ZeroDivisionError" in failing["error"]


# --- candidates -------------------------------------------------------------------------------------------------------


def test_calculators_are_parsed() -> None:
    name, make = parse_calculator("ase.calculators.emt:EMT")
    assert name == "EMT"
    assert isinstance(make(), EMT)
    name, make = parse_calculator("mine=ase.calculators.morse:MorsePotential(epsilon=0.5, rho0=3)")
    assert name == "mine"
    assert make().parameters["epsilon"] == 0.5
    for text in ("EMT", "ase.calculators.emt:", "x:y z", "ase.calculators.emt:EMT(1)", "os:system('ls')", "a:b(c=open('x'))"):
        with pytest.raises(ValueError, match="is not a calculator"):
            parse_calculator(text)
    with pytest.raises(ImportError, match="cannot be imported"):
        parse_calculator("no_such_module:X")
    with pytest.raises(ValueError, match="has no 'Nothing'"):
        parse_calculator("ase.calculators.emt:Nothing")
    with pytest.raises(ValueError, match="not an ASE calculator"):
        parse_calculator("collections:OrderedDict")[1]()


def test_elements_and_structures_are_found() -> None:
    assert supported_elements(EMT()) == ["H", "C", "N", "O", "Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au"]
    found = builtin_crystals(["Na", "Cl", "Cu", "Xe"], 5)
    assert list(found) == ["Cu", "NaCl", "Na", "Xe"][: len(found)]
    assert builtin_crystals(["O", "H"], 3) == {}
    assert set(builtin_molecules(["O", "H"], 2)) == {"H2O", "H2O2"}
    assert len(enlarged(bulk("Cu", cubic=True), 30)) == 32
    assert len(enlarged(molecule("H2O"), 30)) == 3


# --- the command ----------------------------------------------------------------------------------------------------


def test_checks_import_no_torch() -> None:
    code = "import sys, gossamer.checks.judge; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def judged(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gossamer.cli", "judge", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )


def test_judging_on_the_command_line(tmp_path: Path) -> None:
    from gossamer.potential_file import save

    save(make_potential(["Al", "Cu"]), tmp_path / "ours.safetensors")
    bulk("Cu", cubic=True).write(tmp_path / "cu.extxyz")
    options = ["--only", "symmetry", "diatomics", "discovery", "--out", "verdict", "--structures", "cu.extxyz"]
    first = judged("mine=ours.safetensors", "--calculator", "ase.calculators.emt:EMT", "--elements", "Cu", "Si", *options, folder=tmp_path)
    assert "everything is in 'verdict/report.html'" in first.stdout, first.stderr
    assert first.returncode in (0, 1)
    assert (first.returncode == 1) == ("\n  failed" in first.stdout)
    numbers = json.loads((tmp_path / "verdict" / "judgement.json").read_text())
    assert set(numbers) == {"mine", "EMT"}
    assert numbers["EMT"]["checks"]["symmetry"]["status"] == "passed"
    assert numbers["mine"]["checks"]["symmetry"]["status"] == "passed"
    assert numbers["EMT"]["checks"]["discovery"]["status"] == "skipped"
    page = (tmp_path / "verdict" / "report.html").read_text()
    assert "Symmetry and extensivity" in page
    assert not [w for w in ("http:", "https:") if f'src="{w}' in page]
    # the second time nothing is done; another structure is another question; JSON for programs
    stamp = (tmp_path / "verdict" / "EMT" / "symmetry.json").stat().st_mtime_ns
    again = judged("--calculator", "ase.calculators.emt:EMT", "--elements", "Cu", "Si", *options, "--json", folder=tmp_path)
    assert again.returncode == 0
    assert json.loads(again.stdout)["EMT"]["symmetry"]["status"] == "passed"
    assert (tmp_path / "verdict" / "EMT" / "symmetry.json").stat().st_mtime_ns == stamp
    assert set(json.loads((tmp_path / "verdict" / "judgement.json").read_text())) == {"mine", "EMT"}
    other = judged("--calculator", "EMT=ase.calculators.lj:LennardJones", *options, folder=tmp_path)
    assert other.returncode == 2
    assert "holds the judgement of another potential" in other.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to judge"),
        ({"calculator": "ase.calculators.emt:EMT", "only": ["phonon"]}, "There is no check 'phonon'"),
        ({"calculator": "ase.calculators.emt:EMT", "protocol": "lithium"}, "protocol 'lithium' is unknown"),
        ({"calculator": "ase.calculators.emt:EMT", "level": "huge"}, "level 'huge' is unknown"),
        ({"calculator": "ase.calculators.emt:EMT", "temperature": -3}, "temperature must be positive"),
        ({"calculator": ["ase.calculators.emt:EMT", "ase.calculators.emt:EMT"]}, "Two potentials are called 'EMT'"),
        ({"models": "ase.calculators.emt:EMT"}, "For a calculator write --calculator"),
        ({"calculator": "ase.calculators.emt:EMT", "references": ["a", "b"]}, "2 references for 0 systems"),
        ({"calculator": "ase.calculators.emt:EMT", "elements": ["Si"]}, "could not evaluate any pair"),
        ({"calculator": "ase.calculators.emt:EMT", "only": ["speed"], "skip": ["speed"]}, "No check is left"),
    ],
)
def test_wrong_questions(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        judge(out=tmp_path, progress=False, **options)


@pytest.mark.parametrize(
    "name", ["structures", "data", "crystals", "systems", "discovery", "discovery_table", "conductivity_crystals", "diatomics_reference"]
)
def test_files_that_are_not_there(name: str, tmp_path: Path) -> None:
    value = ["nowhere.extxyz"] if name in ("structures", "crystals", "systems") else "nowhere.extxyz"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        judge(calculator="ase.calculators.emt:EMT", out=tmp_path, progress=False, **{name: value})


def test_a_check_that_raises_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(candidate: Candidate) -> Result:
        raise ValueError("no luck")  # as a judged calculator may

    monkeypatch.setitem(CHECKS, "smoothness", replace(CHECKS["smoothness"], run=broken))
    found = judge(calculator="ase.calculators.emt:EMT", elements=["Cu"], only=["smoothness", "speed"], out=tmp_path, progress=False)["EMT"]
    assert found["smoothness"].status == "failed"
    assert "no luck" in found["smoothness"].reason
    assert found["speed"].status in ("passed", "measured", "weak")


def test_numbers_are_readable() -> None:
    assert [number(v) for v in (None, 0.0, 1.23456, 12345.6, 1e-5, 3e7, float("nan"))] == [
        "–",
        "0",
        "1.235",
        "12,346",
        "1.00e-05",
        "3.00e+07",
        "–",
    ]


def test_growth_is_measured() -> None:
    sizes = [10, 20, 40, 80]
    assert speed.growth_exponent(sizes, [1e-3 * s for s in sizes]) == pytest.approx(1)
    assert speed.growth_exponent(sizes, [1e-5 * s**2 for s in sizes]) == pytest.approx(2)
    quadratic = candidate_of(EMT, Path())
    assert speed.time_evaluation(quadratic.calculator, bulk("Cu"), repeats=2) > 0


# --- the page, in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Any:
    pytest.importorskip("selenium", reason="needs selenium: pip install -e '.[dev]'")
    chromium, driver = (
        (shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")),
        shutil.which("chromedriver"),
    )
    if not chromium or not driver:
        pytest.skip("needs Chromium and ChromeDriver (Debian: chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_page_in_a_browser(browser: Any, width: int, height: int, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    judge(
        calculator=["ase.calculators.emt:EMT", "long_name_of_a_potential=ase.calculators.emt:EMT"],
        elements=["Cu", "Al"],
        only=["symmetry", "diatomics", "errors"],
        out=tmp_path,
        progress=False,
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    )
    browser.get((tmp_path / "report.html").as_uri())
    assert not [m for m in browser.get_log("browser") if m["level"] == "SEVERE"]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert browser.execute_script(
        "return new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size == document.querySelectorAll('[id]').length"
    ), "an id occurs twice"
    chips = [c.text for c in browser.find_elements(By.CSS_SELECTOR, ".chip")]
    assert any("passed" in c for c in chips)
    assert any("skipped" in c for c in chips)
    picture = browser.find_element(By.CSS_SELECTOR, "figure button")
    assert picture.size["width"] > 100
    browser.execute_script("arguments[0].click()", picture)
    stage = browser.find_element(By.CSS_SELECTOR, "dialog .stage svg")
    assert stage.is_displayed()
    before = stage.get_dom_attribute("viewBox")
    browser.execute_script(
        "arguments[0].parentElement.dispatchEvent(new WheelEvent('wheel', {deltaY: -100, clientX: 200, clientY: 300, cancelable: true}))",
        stage,
    )
    after = stage.get_dom_attribute("viewBox")
    assert float(after.split()[2]) < float(before.split()[2])
    browser.find_element(By.CSS_SELECTOR, "dialog .close").click()
    assert not browser.find_element(By.CSS_SELECTOR, "dialog").is_displayed()
