"""What the judge once passed by mistake, or failed: broken potentials and questions that it did not see."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from broken_calculators import Defect, by_name, candidate_of, copper

from gossamer.checks import conservation, crystals, diatomics, discovery, dynamics, errors, judge, judge_page, phonons, smoothness, symmetry
from gossamer.checks import thermal_conductivity as heat
from gossamer.checks.config import JudgeConfig
from gossamer.checks.result import Result, at_most, conclude
from gossamer.checks.source import find_sources


class Pair(Calculator):
    """A pair curve (energy and slope of distances), over minimum images only or over all images up to ``reach`` Å."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 - ASE's own convention

    def __init__(self, curve: Any, reach: float | None = None) -> None:
        super().__init__()
        self.curve, self.reach = curve, reach

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        vectors = self.atoms.get_all_distances(mic=self.atoms.pbc.any(), vector=True)
        lengths = np.linalg.norm(vectors, axis=-1) + np.eye(len(self.atoms)) * 1e6
        energies, slopes = self.curve(lengths)
        forces = (slopes / lengths)[..., None] * vectors
        self.results = {"energy": 0.5 * energies.sum(), "forces": forces.sum(axis=1)}


def morse(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Morse's curve, switched off smoothly from 4.5 to 6 Å."""
    x, t = np.exp(-1.5 * (lengths - 2.6)), np.clip((lengths - 4.5) / 1.5, 0, 1)
    switch, slope = 1 - 10 * t**3 + 15 * t**4 - 6 * t**5, (-30 * t**2 + 60 * t**3 - 30 * t**4) / 1.5
    energies, slopes = 0.1 * (x * x - 2 * x), 0.1 * 1.5 * (-2 * x * x + 2 * x)
    return energies * switch, slopes * switch + energies * slope


# --- numbers that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["stress", "forces"])
def test_results_that_are_no_numbers_fail_conservation(what: str, tmp_path: Path) -> None:
    def spoil(atoms: Atoms, results: dict[str, Any]) -> None:
        results[what] = np.full_like(results[what], np.nan) if what in results else None

    result = conservation.check(candidate_of(lambda: Defect(EMT(), spoil), tmp_path, structures=[copper()]))
    assert result.status == "failed"
    assert by_name(result, f"{what} against the energy's gradient").status == "failed"


def test_forces_of_turned_frames_that_are_no_numbers_fail_symmetry(tmp_path: Path) -> None:
    def spoil(atoms: Atoms, results: dict[str, Any]) -> None:
        if atoms.cell.array[0, 1] != 0:
            results["forces"][:] = np.nan

    result = symmetry.check(candidate_of(lambda: Defect(EMT(), spoil), tmp_path, structures=[copper()]))
    assert by_name(result, "rotation, forces").status == "failed"


def test_forces_of_two_atoms_that_are_no_numbers_are_no_answer(tmp_path: Path) -> None:
    def spoil(atoms: Atoms, results: dict[str, Any]) -> None:
        if len(atoms) == 2 and atoms.get_distance(0, 1) < 2.5:
            results["forces"][:] = np.nan

    assert by_name(diatomics.check(candidate_of(lambda: Defect(EMT(), spoil), tmp_path)), "distances without an answer").status == "failed"


def test_energies_that_are_no_numbers_are_no_answer() -> None:
    found = discovery.relax_one(Defect(EMT(), lambda atoms, results: results.update(energy=np.nan)), bulk("Cu"))
    assert found["energy"] is None
    assert "nan" in found["error"]


# --- crystals and phonons -------------------------------------------------------------------------------------------


def test_a_field_that_holds_atoms_breaks_the_sum_rule(tmp_path: Path) -> None:
    pytest.importorskip("phonopy")
    side = bulk("Cu", cubic=True).cell.lengths()[0] / 2  # the field has the crystal's period

    def pin(atoms: Atoms, results: dict[str, Any]) -> None:
        turns = 2 * np.pi * atoms.positions / side
        results["energy"] += float(((side / (2 * np.pi)) ** 2 * (1 - np.cos(turns))).sum())
        results["forces"] = results["forces"] - side / (2 * np.pi) * np.sin(turns)
        results.pop("stress", None)

    constants = phonons.make_phonons(Defect(EMT(), pin), bulk("Cu", cubic=True), [2, 2, 2])
    assert phonons.sum_rule_error(constants) == pytest.approx(1.0, rel=0.05)
    assert phonons.frequencies_at(constants, np.zeros((1, 3)))[0, :3].min() > 1.0


def test_phonons_have_the_masses_of_the_atoms() -> None:
    pytest.importorskip("phonopy")
    heavy = bulk("Cu")
    heavy.set_masses([4 * 63.546])
    light, half = (phonons.mesh_frequencies(phonons.make_phonons(EMT(), a, [2, 2, 2]))[0].max() for a in (bulk("Cu"), heavy))
    assert half == pytest.approx(light / 2, rel=1e-3)


def test_the_softest_eigenvalue_is_the_same_however_a_crystal_lies() -> None:
    copper = bulk("Cu", a=3.59, cubic=True)
    turned = copper.copy()
    turned.rotate(30, (1, 2, 3), rotate_cell=True)
    straight, oblique = (crystals.elastic_constants(EMT(), a, relax_ions=False) for a in (copper, turned))
    assert crystals.softest(straight) == pytest.approx(straight[0, 0] - straight[0, 1], abs=0.01)
    assert crystals.softest(oblique) == pytest.approx(crystals.softest(straight), rel=2e-3)  # of Voigt's matrix: 34 and 57 GPa
    soft = np.diag([100.0, 100.0, 100.0, 20.0, 20.0, 20.0])
    assert crystals.softest(soft) == pytest.approx(40.0)


def test_supercells_keep_images_apart_whatever_the_angles() -> None:
    """Of a rhombohedral cell with small angles the sides say little: 14.5 Å each, and images 2.5 Å from each other."""
    slim = make_supercell(bulk("Cu", a=3.58), np.array([[3, 2, 2], [2, 3, 2], [2, 2, 3]]))
    assert slim.cell.lengths().min() > 14
    assert phonons.supercell_for(slim) == [4, 4, 4]  # before [1, 1, 1], and a highest frequency of 7.0 THz instead of 8.3
    for atoms, expected in ((bulk("Cu"), 4), (bulk("Cu", cubic=True), 3), (bulk("Si"), 3)):
        assert phonons.supercell_for(atoms) == [expected] * 3
    assert phonons.supercell_for(bulk("Zn")) == [4, 4, 2]


def test_what_a_file_holds_fixed_is_no_property_of_the_solid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Atoms of silicon that may not move in a strained cell made its shear modulus 72 instead of 52 GPa."""
    fixed, found = bulk("Cu", cubic=True), []
    fixed.set_constraint(FixAtoms([0, 1, 2, 3]))

    def look(candidate: Any) -> Result:
        found.append(candidate.crystals["Cu"].constraints)
        return Result("passed", "")

    monkeypatch.setitem(judge.CHECKS, "crystals", replace(judge.CHECKS["crystals"], run=look))
    judge.judge(EMT(), crystals=fixed, elements=["Cu"], only=["crystals"], out=tmp_path, progress=False)
    assert found == [[]]
    assert len(fixed.constraints) == 1


def test_a_charged_crystal_is_not_the_potentials_fault(tmp_path: Path) -> None:
    pytest.importorskip("phono3py")
    charged = candidate_of(EMT, tmp_path)
    charged.crystals["Cu"].info["charge"] = 1
    for check in (phonons.check, heat.check):
        result = check(charged)
        assert result.status == "skipped"
        assert "this cell has charge 1" in result.reason


def test_phonons_of_left_handed_cells() -> None:
    """phonopy refuses them; the lattice is that of the opposite vectors."""
    pytest.importorskip("phonopy")
    gold = bulk("Cu", cubic=True)
    gold.symbols[0] = "Au"
    left = gold.copy()
    left.set_cell(gold.cell.array[[1, 0, 2]])
    expected, found = (phonons.mesh_frequencies(phonons.make_phonons(EMT(), a, [2, 2, 2]))[0].max() for a in (gold, left))
    assert found == pytest.approx(expected, rel=1e-6)
    assert conclude([at_most("cBN: width", 2.0, "", 1.0, 3.0, "")]).reason.startswith("cBN: width")


def test_phonons_keep_isotopes_apart() -> None:
    pytest.importorskip("phonopy")
    ordered = bulk("Cu", cubic=True)
    ordered.set_masses([200.0, 200.0, 63.546, 63.546])
    found = phonons.make_phonons(EMT(), ordered, [2, 2, 2])
    assert sorted(found.primitive.masses) == pytest.approx([63.546, 200.0])  # one of them alone: 4.4 or 7.8 THz instead of 6.9
    assert phonons.mesh_frequencies(found)[0].max() == pytest.approx(6.911, abs=1e-3)  # of all four atoms, without symmetry
    with pytest.raises(ValueError, match="several masses"):
        heat.conductivity(EMT(), ordered)


def test_phonons_of_magnets_have_their_moments() -> None:
    pytest.importorskip("phonopy")

    class Magnet(EMT):
        """EMT that asks for the moments of every structure."""

        moments: ClassVar[list[float]] = []

        def calculate(self, atoms: Any = None, *rest: Any) -> None:
            super().calculate(atoms, *rest)
            self.moments += [*np.abs(atoms.get_initial_magnetic_moments()).tolist(), atoms.get_initial_magnetic_moments().sum() + 2.0]

    magnet = bulk("Cu", cubic=True)
    magnet.set_initial_magnetic_moments([2.0, 2.0, -2.0, -2.0])
    found = phonons.make_phonons(Magnet(), magnet, [2, 2, 2])
    assert len(found.primitive) == 2  # up and down are different
    assert set(Magnet.moments) == {2.0}
    magnet.info["charge"] = 1
    with pytest.raises(ValueError, match=r"charge 1 and spin 1\. Give initial magnetic moments"):
        phonons.make_phonons(EMT(), magnet, [2, 2, 2])


def test_moduli_of_stress_and_energy_are_of_the_same_cells() -> None:
    from_energy, from_stress = crystals.two_moduli(EMT(), bulk("Cu", a=3.59))
    assert from_stress == pytest.approx(from_energy, rel=1e-3)
    wrong = Defect(EMT(), lambda atoms, results: results.update(stress=0.7 * results["stress"]))
    from_energy, from_stress = crystals.two_moduli(wrong, bulk("Cu", a=3.59))
    assert from_stress == pytest.approx(0.7 * from_energy, rel=1e-2)


def test_crystals_without_an_answer_count_as_no_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("phono3py")
    reference: dict[str, dict[str, Any]] = {"material_id": {}, "kappa_TOT_ave": {}, "mode_kappa_TOT_ave": {}, "weights": {}}
    found = []
    for k, symbol in enumerate(("Cu", "Ag", "Au")):
        found.append(bulk(symbol))
        found[-1].info.update(material_id=f"mp-{k}")
        for column, value in zip(reference, (f"mp-{k}", [10.0], [[[5.0, 5.0]]], [1.0]), strict=True):
            reference[column][str(k)] = value
    ase.io.write(tmp_path / "crystals.extxyz", found)
    (tmp_path / "reference.json").write_text(json.dumps(reference))

    def perfect_for_copper(calculator: Any, atoms: Atoms, **options: Any) -> dict[str, Any]:
        if "Cu" not in atoms.symbols:
            raise RuntimeError("out of memory")
        return {"kappa": 10.0, "mode_kappa": np.array([[5.0, 5.0]]), "weights": np.ones(1), "imaginary": False, "same_symmetry": True}

    monkeypatch.setattr(heat, "conductivity", perfect_for_copper)
    options = {"conductivity_crystals": str(tmp_path / "crystals.extxyz"), "conductivity_reference": str(tmp_path / "reference.json")}
    result = heat.check(candidate_of(EMT, tmp_path, ("Cu", "Ag", "Au"), **options))
    assert by_name(result, "κ_SRME").value == pytest.approx(4 / 3)


def test_polymorphs_have_a_conductivity_each() -> None:
    first, second = bulk("Cu"), bulk("Cu", "bcc", a=2.87)
    assert heat.identifier(first) != heat.identifier(second)
    first.info["material_id"] = "mp-30"
    assert heat.identifier(first) == "mp-30"


# --- symmetry, smoothness, conservation -----------------------------------------------------------------------------


def test_images_are_missed_along_any_axis(tmp_path: Path) -> None:
    long = bulk("Cu", cubic=True).repeat((4, 1, 1))
    result = symmetry.check(candidate_of(lambda: Pair(morse), tmp_path, structures=[long]))
    assert by_name(result, "supercell").status == "failed"


@pytest.mark.parametrize("cutoff", [None, 9.0])
def test_a_jump_far_out_is_seen(cutoff: float | None, tmp_path: Path) -> None:
    def coulomb(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        near = lengths < 9.0
        wall = 3 * np.exp(-2 * (lengths - 1))
        return near * (2.9 / lengths + wall), near * (-2.9 / lengths**2 - 2 * wall)

    candidate = candidate_of(lambda: Pair(coulomb), tmp_path, ("H", "O"), [molecule("H2O")])
    candidate.cutoff = cutoff
    result = smoothness.check(candidate)
    assert by_name(result, "jump of the energy as an atom leaves").status == "failed"
    assert ("not known" in " ".join(result.notes)) == (cutoff is None)


def test_a_lone_atom_first_is_no_fault_of_dynamics(tmp_path: Path) -> None:
    alone = Atoms("Cu", cell=[15.0] * 3, pbc=True)
    assert conservation.check(candidate_of(EMT, tmp_path, structures=[alone, copper()])).status == "passed"
    only = conservation.check(candidate_of(EMT, tmp_path, structures=[Atoms("Cu")]))
    assert by_name(only, "drift").status == "skipped"
    assert only.status == "passed"


def test_frames_of_several_atoms_are_chosen() -> None:
    assert judge.chosen_frames([1, 1, 9, 9, 1, 9], 1) == [2]
    assert judge.chosen_frames([1, 1], 1) == [0]
    assert judge.chosen_frames([1, 9], None) == [0, 1]


def test_forces_belong_to_the_free_energy_of_smeared_electrons() -> None:
    """Codes give the energy extrapolated to cold electrons, of which the forces are not the gradient."""

    class Smeared(Defect):
        implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces", "stress"]

    def spoil(atoms: Atoms, r: dict[str, Any]) -> None:
        r["free_energy"] = r["energy"]
        r["energy"] += 0.02 * float(np.abs(np.sin(atoms.get_scaled_positions())).sum() * atoms.get_volume())

    assert conservation.force_gradient_error(Defect(EMT(), spoil), copper(), 1e-3, 1) > 0.01
    assert conservation.force_gradient_error(Smeared(EMT(), spoil), copper(), 1e-3, 1) < 1e-5
    assert conservation.stress_gradient_error(Smeared(EMT(), spoil), copper(), 1e-3) < 1e-6
    energies = conservation.nve_energies(Smeared(EMT(), spoil), copper(), 1.0, 20)
    assert np.ptp(energies) < 1e-3
    from_energy, from_stress = crystals.two_moduli(Smeared(EMT(), spoil), bulk("Cu", cubic=True))
    assert from_energy == pytest.approx(from_stress, rel=1e-3)


def test_what_a_calculator_does_not_give_is_not_judged(tmp_path: Path) -> None:
    """Without stress no cell can be relaxed, which does not say that a crystal falls apart."""

    class Stressless(Defect):
        implemented_properties: ClassVar[list[str]] = ["energy", "forces"]

    def candidate() -> Any:
        return candidate_of(lambda: Stressless(EMT(), lambda atoms, r: None), tmp_path, structures=[copper()])

    for check in (crystals.check, phonons.check):
        result = check(candidate())
        assert result.status == "skipped"
        assert "needs what the calculator does not give (stress property not implemented)" in result.reason
    result = conservation.check(candidate())
    assert by_name(result, "stress").status == "skipped"
    assert result.status == "passed", result.reason
    assert result.reason.startswith("Forces are the gradient")


# --- questions ------------------------------------------------------------------------------------------------------


def test_structures_of_one_name_are_all_judged(tmp_path: Path) -> None:
    cold, hot = bulk("Cu"), bulk("Cu")
    assert list(judge.named([cold, hot, bulk("Au")])) == ["Cu", "Cu-2", "Au"]


def test_references_stay_with_their_systems(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gold, cu = bulk("Au"), bulk("Cu")
    (source,) = find_sources([], ["ase.calculators.emt:EMT"], None, None, "auto", None)
    config = JudgeConfig(elements=["Cu"], references=["gold.traj", "copper.traj"])
    both = judge.make_candidate(source, config, tmp_path, judge.Inputs([], [], [gold, cu], []), False)
    assert list(both.systems) == ["Cu"]
    assert both.references == {"Cu": "copper.traj"}
    assert "Au" in caplog.text
    none = judge.make_candidate(source, config, tmp_path, judge.Inputs([], [], [gold], []), False)
    assert none.systems == {}


def test_files_of_one_size_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "data.extxyz"
    keys = []
    for text in ("1", "2"):
        file.write_text(text)
        keys.append(judge.question_key("errors", candidate_of(EMT, tmp_path, data=str(file))))
        candidate = candidate_of(EMT, tmp_path, references=[str(file)])
        keys.append(judge.question_key("dynamics", candidate))
    assert len(set(keys)) == 4


def test_isotopes_spins_and_fixed_atoms_are_other_questions(tmp_path: Path) -> None:
    """Phonons and dynamics of them are others, and no answer of the same positions may stand for them."""

    def key(change: Callable[[Atoms], Any]) -> str:
        candidate = candidate_of(EMT, tmp_path)
        atoms = bulk("Cu", cubic=True)
        change(atoms)
        candidate.systems = {"Cu": atoms}
        return judge.question_key("dynamics", candidate)

    changes: list[Callable[[Atoms], Any]] = [
        lambda a: None, lambda a: a.set_masses([64, 64, 64, 200]), lambda a: a.set_initial_magnetic_moments([1, 1, -1, -1]),
        lambda a: a.info.update(charge=1), lambda a: a.set_constraint(FixAtoms([0])), lambda a: a.set_constraint(FixAtoms([1])),
    ]  # fmt: skip
    assert len({key(change) for change in changes}) == len(changes)
    assert key(lambda a: a.info.update(name="other")) == key(lambda a: None)


def test_a_reference_may_list_its_atoms_otherwise(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    steps = rng.normal(scale=0.15, size=(300, 16, 3))
    steps[:, :8] *= 0.1
    frames = [Atoms(["Cu"] * 8 + ["Au"] * 8, x, cell=[9.0] * 3, pbc=True) for x in rng.uniform(0, 9, (16, 3)) + np.cumsum(steps, axis=0)]
    protocol, candidate = dynamics.Protocol(species="Au"), candidate_of(EMT, tmp_path, reference_interval=0.05)
    for known in ([f[[*range(8, 16), *range(8)]] for f in frames], [f.repeat((2, 1, 1)) for f in frames]):
        metrics = dynamics._bulk("gas", frames, frames, 0.05, protocol, known, [], candidate)
        (off,) = [m for m in metrics if "diffusivity off by" in m.name]
        assert off.value == pytest.approx(0, abs=0.2)
        assert off.status == "passed"


# --- errors ---------------------------------------------------------------------------------------------------------


def labelled(energies: list[float], symbols: list[str]) -> list[Atoms]:
    found = []
    for energy, symbol in zip(energies, symbols, strict=True):
        atoms = molecule("H2O")
        atoms.symbols[0] = symbol
        atoms.calc = SinglePointCalculator(atoms, energy=energy)
        found.append(atoms)
    return found


def test_knowing_nothing_is_no_small_error(tmp_path: Path) -> None:
    """Energies that differ from element to element by far more than within a composition; the potential always says zero."""
    rng = np.random.default_rng(0)
    symbols = ["O", "S", "Se"] * 10
    energies = [{"O": -400.0, "S": -900.0, "Se": -2000.0}[s] + rng.normal() for s in symbols]
    zero = lambda: Pair(lambda lengths: (0 * lengths, 0 * lengths))  # noqa: E731
    result = errors.check(candidate_of(zero, tmp_path, ("H", "O", "S", "Se"), labelled=labelled(energies, symbols)))
    assert by_name(result, "energy error over the spread").status != "passed"
    few = errors.check(candidate_of(zero, tmp_path, ("H", "O", "S", "Se"), labelled=labelled(energies[:3], symbols[:3])))
    assert by_name(few, "energy error over the spread").status == "skipped"


@pytest.mark.parametrize("push", [0.0, 0.03])
def test_structures_at_rest_have_errors_too(push: float, tmp_path: Path) -> None:
    """Of perfect crystals all forces are zero: nothing is divided by that, nor judged by directions; wrong forces are found all the same."""
    frames = []
    for a in (3.5, 3.6, 3.7):
        frame = bulk("Cu", a=a, cubic=True)
        frame.calc = EMT()
        frame.calc = SinglePointCalculator(frame, energy=frame.get_potential_energy(), forces=np.zeros((4, 3)))
        frames.append(frame)
    pushed = Defect(EMT(), lambda atoms, r: r["forces"].__iadd__(push))
    result = errors.check(candidate_of(lambda: pushed, tmp_path, labelled=frames))
    assert by_name(result, "cosine").status == "skipped"
    assert result.status == ("failed" if push else "passed"), result.reason


def test_the_worst_frame_is_named_as_in_the_file(tmp_path: Path) -> None:
    energies = [0.0] * 250
    energies[150] = 9.0
    frames = labelled(energies, ["O"] * 250)
    zero = lambda: Pair(lambda lengths: (0 * lengths, 0 * lengths))  # noqa: E731
    result = errors.check(candidate_of(zero, tmp_path, ("H", "O"), labelled=frames, level="quick"))
    assert "150 (3000 meV/atom)" in " ".join(result.notes)


def test_nothing_judged_is_not_passed() -> None:
    found = judge_page.headline("it", {"phonons": Result("skipped", "no phonopy")}, {"phonons": ("Phonons", "", "")})
    assert found["status"] == "skipped"
    assert found["finding"] == "Nothing was judged."


# --- calculators ----------------------------------------------------------------------------------------------------


def test_a_calculator_whose_file_changed_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_files.py").write_text(
        "from ase.calculators.lj import LennardJones\n\n\ndef read(path):\n    return LennardJones(rc=float(open(path).read()))\n"
    )
    monkeypatch.chdir(tmp_path)
    text, found = "mine_of_files:read(path='rc.txt')", []
    for cutoff in ("5.0", "6.0"):
        Path("rc.txt").write_text(cutoff)
        found.append(find_sources([], [text])[0].fingerprint)
    assert found[0] != found[1]


def test_wrong_use_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_that_fails.py").write_text(
        "from ase.calculators.lj import LennardJones\n\n\ndef make(**options):\n    raise KeyError('licence')\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="'make' cannot be made: KeyError: 'licence'"):
        judge.judge(calculator="mine_that_fails:make", elements=["Cu"], only=["symmetry"], out="out", progress=False)


def test_an_error_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = judge.CHECKS["symmetry"]

    def raises(candidate: Any) -> Result:
        raise MemoryError("no room")

    question = {"calculator": "ase.calculators.emt:EMT", "elements": ["Cu"], "only": ["symmetry"], "out": tmp_path, "progress": False}
    with monkeypatch.context() as patch:
        patch.setitem(judge.CHECKS, "symmetry", replace(whole, run=raises))
        assert judge.judge(**question)["EMT"]["symmetry"].status == "failed"
    assert judge.judge(**question)["EMT"]["symmetry"].status == "passed"


def test_paths_may_hold_the_sign_of_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="lr=0.01/potential"):
        find_sources([str(tmp_path / "lr=0.01" / "potential.safetensors")], [])
