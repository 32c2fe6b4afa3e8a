"""Checks of the judge that simulate: conservation of energy, ensembles, structure beside a reference."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.cluster import Octahedron
from ase.constraints import FixAtoms
from broken_calculators import Defect, by_name, candidate_of
from conftest import shared_data

from gossamer.checks import (
    conservation,
    dynamics,
    walks,
)
from gossamer.checks.judge import judge
from gossamer.checks.result import NoQuestionError
from gossamer.data.atoms import read_frames
from gossamer.files import InputError


@pytest.mark.thorough
def test_drift_of_forces_that_pump_energy(tmp_path: Path) -> None:
    swirl = Defect(
        EMT(), lambda atoms, r: r["forces"].__iadd__(0.05 * np.cross(atoms.positions - atoms.positions.mean(axis=0), [0, 0, 1.0]))
    )
    result = conservation.check(candidate_of(lambda: swirl, tmp_path))
    assert result.status in ("weak", "failed")
    assert by_name(result, "work around a closed loop").status in ("weak", "failed")


@pytest.mark.thorough
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
    energies = conservation.nve_energies(Spring(), atoms, dt, 1000)
    omega = np.sqrt(10.0 / atoms.get_masses()[0])
    swing = 0.25 * (omega * dt * units.fs) ** 2 * 0.05  # energy 0.05 eV, peak to peak
    assert np.ptp(energies) == pytest.approx(swing, rel=0.02)
    run = conservation.nve_conservation(Spring(), atoms, timestep=dt, picoseconds=1.0)
    assert run["fluctuation_ratio"] == pytest.approx(4, abs=0.1)
    assert abs(run["drift_meV_per_atom_per_ps"]) < 2 * run["drift_error"] + 1e-3


# --- dynamics -------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_dynamics_of_copper_passes_and_goes_on(tmp_path: Path) -> None:
    candidate = candidate_of(EMT, tmp_path, picoseconds=1.0)
    candidate.systems, candidate.builtin_systems = {"Cu": bulk("Cu", cubic=True).repeat((2, 2, 1))}, False
    result = dynamics.check(candidate)
    assert result.status == "passed", result.reason
    assert by_name(result, "time before it breaks").value == 1.0
    titles = [p.title for p in result.panels]
    assert "g(r), all pairs, Cu" in titles
    assert "Mean squared displacement, Cu" in titles
    temperature = next(p for p in result.panels if p.title == "Temperature, Cu")
    assert [c.y for c in temperature.curves if c.reference] == [[300.0, 300.0]]  # the target
    # the run is kept: only its last frame is looked at again
    asked: list[int] = []
    candidate.make = lambda: Defect(EMT(), lambda atoms, r: asked.append(1))
    candidate._calculator = None
    again = dynamics.check(candidate)
    assert len(asked) < 5
    assert by_name(again, "mean temperature").value == by_name(result, "mean temperature").value


def test_a_potential_of_ours_is_told_how_long_it_will_run(tmp_path: Path) -> None:
    """It compiles itself where that pays; other calculators are not asked for what they do not have."""
    told: list[tuple[int, int]] = []

    class Ours(EMT):
        def expect(self, n_evaluations: int, atoms: Atoms) -> None:
            told.append((n_evaluations, len(atoms)))

    for make, ours in ((Ours, True), (EMT, False)):
        candidate = candidate_of(make, tmp_path / str(ours), picoseconds=0.1)
        candidate.systems, candidate.builtin_systems, candidate.ours = {"Cu": bulk("Cu", cubic=True).repeat((2, 2, 1))}, False, ours
        dynamics.check(candidate)
    assert told == [(50, 16)]


@pytest.mark.thorough
def test_a_hot_frame_is_not_the_potentials_fault(tmp_path: Path) -> None:
    """A frame with 0.6 eV/atom of strain would heat the run far above its target: it is relaxed and equilibrated first, and the report says so."""
    hot = bulk("Cu", cubic=True).repeat((2, 2, 1))
    hot.rattle(0.3, seed=0)
    hot.set_velocities(np.random.default_rng(0).normal(scale=0.2, size=(16, 3)))
    candidate = candidate_of(EMT, tmp_path, picoseconds=0.8)
    candidate.systems, candidate.builtin_systems = {"Cu": hot}, False
    result = dynamics.check(candidate)
    assert result.status == "passed", result.reason
    assert by_name(result, "mean temperature").value == pytest.approx(300, rel=0.2)
    (note,) = [n for n in result.notes if n.startswith("Cu: Cu16")]
    assert re.search(r"Start: relaxed by \d+ steps \(largest force [1-9].* to 0.\d+ eV/Å\), then 0.02 ps with a thermostat at 300 K", note)
    start, _ = walks.prepare(EMT(), hot, 300.0, 2.0, 0.1)
    assert start.get_temperature() < 600
    assert hot.get_temperature() > 1000  # the user's atoms are left as they are


def test_metals_have_no_bonds_that_last(tmp_path: Path) -> None:
    """Neighbours in a cluster or a slab of metal move by 0.5 Å when it is warm, and by more when an atom hops, which is no fault of a potential."""
    candidate = candidate_of(EMT, tmp_path, picoseconds=0.1, temperature=2000.0)
    atoms = Octahedron("Cu", 2)
    candidate.systems, candidate.builtin_systems = {"Cu": atoms}, False
    names = [m.name for m in dynamics.check(candidate).metrics]
    assert "Cu: mean temperature" in names
    assert not any("bond" in name for name in names)
    assert dynamics.bonds_last(molecule("CH3CH2OH"))
    assert not any(map(dynamics.bonds_last, (atoms, molecule("NaCl"), fcc111("Cu", (1, 1, 3), vacuum=5.0, periodic=False))))


def test_one_atom_is_no_nonsense() -> None:
    start, sentence = walks.prepare(EMT(), bulk("Cu"), 300.0, 2.0, 0.02)
    assert "then 0.02 ps with a thermostat at 300 K" in sentence
    assert np.isfinite(start.get_momenta()).all()


def test_a_start_that_cannot_be_prepared_is_said(tmp_path: Path) -> None:
    uphill = Defect(EMT(), lambda atoms, r: r["forces"].__imul__(-3))
    _, sentence = walks.prepare(uphill, bulk("Cu", cubic=True), 300.0, 2.0, 0.2)
    assert "as given" in sentence


def test_a_run_that_breaks_at_its_last_step_is_no_stable_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"broken": "step 100 (1.000 ps): atoms lie on one another", "time_ps": 1.0, "folder": tmp_path, "prepared": "", "steps": 100}
    monkeypatch.setattr(dynamics, "simulate", lambda *args: broken)
    candidate = candidate_of(EMT, tmp_path, picoseconds=1.0)
    candidate.systems = {"Cu": bulk("Cu", cubic=True)}
    result = dynamics.check(candidate)
    assert result.status == "failed"
    assert "lie on one another" in result.reason


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
    candidate.systems, candidate.builtin_systems = {"Cu": bulk("Cu", cubic=True).repeat((2, 2, 1))}, False
    dynamics.check(candidate)
    frames, _ = dynamics.read_trajectory(tmp_path / "dynamics" / "Cu")
    ase.io.write(tmp_path / "same.extxyz", frames[len(frames) // 2 :])
    candidate.references = {"Cu": str(tmp_path / "same.extxyz")}
    result = dynamics.check(candidate)
    assert by_name(result, "overlap of g(r), all pairs").value == pytest.approx(1, abs=1e-6)
    assert by_name(result, "overlap of g(r), all pairs").limit.startswith("at least 0.8")  # 0.93 less the noise of 0.25 ps of 16 atoms
    molten = [
        Atoms(f.numbers, np.random.default_rng(k).uniform(size=(len(f), 3)) @ f.cell.array, cell=f.cell, pbc=True)
        for k, f in enumerate(frames)
    ]
    ase.io.write(tmp_path / "other.extxyz", molten)
    candidate.references = {"Cu": str(tmp_path / "other.extxyz")}
    result = dynamics.check(candidate)
    assert result.status == "failed"
    assert by_name(result, "overlap of g(r), all pairs").status == "failed"


def test_references_of_another_system_and_short_ones(tmp_path: Path) -> None:
    """They say nothing against the potential, nor do constraints: refused before anything is simulated; of short ones no diffusivity is compared."""
    cu = bulk("Cu", cubic=True).repeat((2, 1, 1))
    for change, message in (
        (Atoms("Au8", cu.positions, cell=cu.cell, pbc=True), "is Au8 with"),
        (Atoms("Cu8", cu.positions), "is Cu8 with"),
    ):
        ase.io.write(tmp_path / "other.extxyz", [change] * 2)
        candidate = candidate_of(EMT, tmp_path / "none")
        candidate.systems, candidate.references = {"Cu": cu}, {"Cu": str(tmp_path / "other.extxyz")}
        with pytest.raises(ValueError, match=message):
            dynamics.check(candidate)
    cu.set_constraint(FixAtoms([0]))
    candidate = candidate_of(EMT, tmp_path / "none", protocol="lips")
    candidate.systems, candidate.builtin_systems = {"Cu": cu}, False
    with pytest.raises(ValueError, match="Cu: nose-hoover does not hold constraints, found FixAtoms"):
        dynamics.check(candidate)
    assert not (tmp_path / "none").exists()
    cu.set_constraint()
    frames = []
    for k in range(50):
        frames.append(cu.copy())
        frames[-1].rattle(0.1, seed=k)
    candidate = candidate_of(EMT, tmp_path, reference_interval=0.05)
    metrics = dynamics._bulk("Cu", frames, frames, 0.05, dynamics.Protocol(), frames[:5], [], candidate)
    assert [m.name for m in metrics if "diffusivity" in m.name] == [
        "Cu: diffusivity of all atoms",
        "Cu: diffusivity by the end of the window",
    ]


@pytest.mark.parametrize(("n", "statuses"), [(1, {"skipped"}), (3, {"passed"})])
def test_a_short_reference_fails_nobody(n: int, statuses: set[str], tmp_path: Path) -> None:
    """Frames of one ensemble: what a few of them lack of its average was taken for an error of g(r) and of h(r)."""
    frames = []
    for k in range(43):
        frames.append(bulk("Cu", cubic=True).repeat((2, 2, 1)))
        frames[-1].rattle(0.1, seed=k)
    ours, known, candidate = frames[:40], frames[40 : 40 + n], candidate_of(EMT, tmp_path)
    found = dynamics._bulk("Cu", ours, ours, 0.05, dynamics.Protocol(), known, [], candidate)
    for frame in frames:
        frame.pbc = False
    found += dynamics._molecule("Cu", ours, ours, 0.05, dynamics.Protocol(), known, [], candidate)
    assert {m.status for m in found if "(r)" in m.name} == statuses, [m.reason for m in found]


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
    few, others = ({k: v[:20] for k, v in log(t).items()} for t in (temperature, warmer))
    with pytest.raises(NoQuestionError, match="needs a longer run"):  # which is not judged: ten energies hardly overlap with ten others
        dynamics.ensemble_deviation(few, others, (temperature, warmer), n)


@pytest.mark.thorough
def test_a_protocol_gives_way_to_what_was_asked(tmp_path: Path) -> None:
    asked = dict(
        calculator="ase.calculators.emt:EMT",
        elements=["Cu"],
        systems=bulk("Cu", cubic=True),
        only=["dynamics"],
        protocol="methane",
        picoseconds=0.05,
        progress=False,
    )
    own = judge(out=tmp_path, **asked)["EMT"]["dynamics"]
    assert "300 K (of the protocol methane), 0.5 fs" in own.notes[0]
    other = judge(out=tmp_path, timestep=2.0, temperature=100, **asked)["EMT"]["dynamics"]  # another question: done again
    assert "100 K (as asked), 2 fs" in other.notes[0]


def test_who_says_the_temperature(tmp_path: Path) -> None:
    """A frame of AIMD says the temperature of its moment: it does not go before one that was asked for, or that a protocol names."""
    frame = bulk("Cu", cubic=True)
    frame.info["temperature_K"] = 1745.2

    def said(**options: Any) -> tuple[float, str]:
        protocol, _, why = dynamics.asked(candidate_of(EMT, tmp_path, **options), "Cu", frame)
        return protocol.temperature, why

    assert said(temperature=250.0) == (250.0, "as asked, not the 1745.2 K of its temperature_K")
    assert said(temperature=250.0, protocol="lips")[0] == 250.0
    assert said(protocol="lips") == (520.0, "of the protocol lips, not the 1745.2 K of its temperature_K")
    assert said(protocol="electrolyte") == said() == (1745.2, "as its temperature_K says")  # many systems, each at its own
    frame.info["temperature_K"] = "hot"
    with pytest.raises(InputError, match="Cu: temperature_K is 'hot', where K are expected"):
        said()
    del frame.info["temperature_K"]
    assert said() == (300.0, "by default")


@pytest.mark.parametrize("needs_box", [False, True])
def test_a_molecule_alone_in_a_box_is_no_liquid(needs_box: bool, tmp_path: Path) -> None:
    """Plane-wave codes know molecules in boxes only: it has bonds and distances, no g(r), no diffusivity, and no crystals are asked about."""

    def refuse(atoms: Atoms, r: dict[str, Any]) -> None:
        if needs_box and not atoms.pbc.all():
            raise ValueError("there is no cell")

    frames = []
    for k in range(30):
        atoms = molecule("CH4", cell=[10.0, 10.0, 10.0], pbc=True)
        atoms.rattle(0.03, seed=k)
        atoms.wrap()  # it lies across the border
        frames.append(atoms)
    ase.io.write(tmp_path / "reference.extxyz", frames)
    found = judge(
        Defect(EMT(), refuse), out=tmp_path / "out", elements=["C", "H"], structures=frames[0], references=tmp_path / "reference.extxyz",
        only=["crystals", "dynamics", "symmetry"], picoseconds=0.05, progress=False,
    )["Defect"]  # fmt: skip
    assert found["crystals"].status == "skipped"
    names = [m.name for m in found["dynamics"].metrics]
    assert "CH4: time before a bond changes by 0.5 Å" in names
    assert "CH4: error of h(r)" in names
    assert not any("g(r)" in name for name in names)
    assert ("CH4: CH4 without its box, langevin" in found["dynamics"].notes[0]) is not needs_box
    assert any("are judged without these" in note for note in found["symmetry"].notes) is not needs_box


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
    frames = read_frames(shared_data("data", "argyrodite_aimd", "li6ps5cl_100p_run1_traj.npz"))
    assert len(frames) == 140
    assert len(frames[0]) == 416


def test_missing_physical_validation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "physical_validation", None)
    candidate = candidate_of(EMT, tmp_path, picoseconds=0.3)
    candidate.builtin_systems = False  # four atoms are enough
    result = dynamics.check(candidate)
    assert any("pip install 'gossamer[judge]'" in note for note in result.notes)
