"""D3 on top of potentials and calculators: units, gradients, what is refused, labels without it."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import Bohr, Hartree
from conftest import make_potential

from gossamer.accuracy import evaluate
from gossamer.checks.conservation import force_gradient_error, stress_gradient_error
from gossamer.checks.source import find_sources
from gossamer.cli import main
from gossamer.data.dataset import open_dataset
from gossamer.data.structure import as_structure
from gossamer.dispersion import D3
from gossamer.engine.engine import Engine
from gossamer.potential_file import load, read_manifest, save
from gossamer.runs import train
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.dispersion import D3Calculator, with_dispersion
from gossamer.simulation.md import md
from gossamer.simulation.relax import relax

pytest.importorskip("dftd3", reason="needs the extra dispersion")
GRAPHITE = Atoms("C4", scaled_positions=[[0, 0, 0.25], [0, 0, 0.75], [1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]], cell=[2.46, 2.46, 6.71, 90, 90, 120], pbc=True)  # fmt: skip


def rattled(atoms: Atoms) -> Atoms:
    atoms = atoms.copy()
    atoms.rattle(0.05, seed=1)
    return atoms


def test_the_tail_of_two_argon_atoms() -> None:
    """-C6/R⁶ with D3's C6 of argon, 64.65 Hartree Bohr⁶ (J. Chem. Phys. 132, 154104); C8 adds a percent at 20 Å."""
    atoms = Atoms("Ar2", [[0, 0, 0], [0, 0, 20.0]], calculator=D3Calculator("PBE"))
    assert atoms.get_potential_energy() == pytest.approx(-64.6462 * Hartree / (20 / Bohr) ** 6, rel=0.02)


@pytest.mark.parametrize("functional", ["pbe", "r2scan", "b3lyp/zero"])
@pytest.mark.parametrize("system", [molecule("CH3CH2OH"), GRAPHITE])
def test_forces_and_stress_are_gradients(functional: str, system: Atoms) -> None:
    atoms = rattled(system)
    periodic = atoms.pbc.all()  # then atoms come and go where neighbours end being counted, each of them 1e-7 of one
    assert force_gradient_error(D3Calculator(functional), atoms, step=1e-3) < (2e-4 if periodic else 1e-6)
    if periodic:
        assert stress_gradient_error(D3Calculator(functional), atoms, step=1e-4) < 2e-4


def test_axes_without_periodicity_have_no_images() -> None:
    """A slab in a cell without a third vector, in one with much vacuum, and periodic with still more: the first two are the same."""
    sheet = rattled(GRAPHITE)[[0, 2]]
    energies = []
    for cell, pbc in (
        ([*sheet.cell[:2], [0, 0, 0]], [1, 1, 0]),
        ([*sheet.cell[:2], [0, 0, 9.0]], [1, 1, 0]),
        ([*sheet.cell[:2], [0, 0, 9.0]], True),
    ):
        atoms = Atoms(sheet, cell=cell, pbc=pbc, calculator=D3Calculator("pbe"))
        energies.append(atoms.get_potential_energy())
    assert energies[0] == energies[1]
    assert energies[2] < energies[1] - 1e-3


COPPER = fcc111("Cu", (1, 1, 3), vacuum=8.0)


def roomy(atoms: Atoms, periodic: int) -> Atoms:
    """In much vacuum, and periodic along all axes."""
    cell = atoms.cell.array.copy()
    cell[periodic:] = 60.0 * np.linalg.svd(cell[:periodic])[2][periodic:]
    apart = Atoms(atoms.numbers, atoms.positions, cell=cell, pbc=True)
    apart.center(axis=range(periodic, 3))
    return apart


@pytest.mark.parametrize("periodic", [2, 1])
def test_open_axes_may_lie_anywhere(periodic: int) -> None:
    """A slab and a wire beside their cell, in cells of any open vectors, turned, their axes in any order: always as in much vacuum."""
    atoms = rattled(COPPER)
    d3, pbc = D3("pbe"), np.arange(3) < periodic
    free = roomy(atoms, periodic)
    expected = d3(free.numbers, free.positions, free.cell.array, free.pbc)
    rng = np.random.default_rng(0)
    for shift in (0.0, -7.9, -8.1, -9.0, -11.0, 20.0):
        moved = atoms.positions + shift * np.array([0.3, -0.2, 1.0])
        for open_vectors in (atoms.cell.array, np.zeros((3, 3)), rng.normal(size=(3, 3))):
            cell = np.where(pbc[:, None], atoms.cell.array, open_vectors)
            turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
            order = rng.permutation(3)
            found = d3(atoms.numbers, moved @ turn, (cell @ turn)[order], pbc[order])
            assert found.energy == pytest.approx(expected.energy, abs=1e-10)
            np.testing.assert_allclose(found.forces @ turn.T, expected.forces, atol=1e-10)
            np.testing.assert_allclose(turn @ found.virial @ turn.T, expected.virial, atol=1e-10)
    if periodic == 2:
        assert d3(COPPER.numbers, COPPER.positions, COPPER.cell.array, pbc).energy == pytest.approx(-1.1457, abs=1e-4)
    with pytest.raises(ValueError, match=r"Axes \[0\] are periodic, but their lattice vectors \[\[0.0, 0.0, 0.0\]\] are zero"):
        d3(atoms.numbers, atoms.positions, np.zeros((3, 3)), np.arange(3) < 1)


@pytest.mark.parametrize("system", [molecule("CH3CH2OH"), GRAPHITE])
def test_a_potential_and_any_calculator_take_it_alike(system: Atoms) -> None:
    """In one structure, in a batch, as a parameter or as a sum."""
    potential = make_potential(["H", "C", "O"])
    atoms = rattled(system)
    sums = {}
    for name, calculator in (
        ("inside", Calculator(potential, way="plain", dispersion="pbe")),
        ("sum", with_dispersion(Calculator(potential, way="plain"), "pbe")),
    ):
        atoms.calc = calculator
        sums[name] = [atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress() if atoms.pbc.all() else 0.0]
    for a, b in zip(*sums.values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    with pytest.raises(NotImplementedError):
        Calculator(potential, way="plain", dispersion="pbe").get_property("energies", atoms)
    both = potential.predict([atoms, molecule("H2O"), atoms], run=Engine(potential, "plain", dispersion="pbe"))
    for found in (both[0], both[2]):
        np.testing.assert_allclose(found["forces"], sums["sum"][1], atol=1e-12)
        assert found["energy"] == pytest.approx(sums["sum"][0])
    assert both[1]["stress"] is None


@pytest.mark.parametrize(
    ("functional", "element", "message"),
    [
        ("pbesl", "H", "Did you mean pbesol"),
        ("pbe/mbd", "H", "the damping 'mbd' is unknown. Write pbe or pbe/zero"),
        ("pbe", "Og", "no parameters for Og: it ends with Lr"),
    ],
)
def test_what_has_no_parameters(functional: str, element: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Atoms([element, "H"], [[0, 0, 0], [0, 0, 2.0]], calculator=D3Calculator(functional)).get_potential_energy()


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Copper with EMT's labels and D3 on top."""
    frames = []
    for seed in range(8):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.05, seed=seed)
        atoms.calc = with_dispersion(EMT(), "pbe")
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    ase.io.write(tmp_path / "copper.extxyz", frames)
    return tmp_path / "copper.extxyz"


def test_labels_without_dispersion(labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "convert", str(labelled), "--out", str(tmp_path / "free"), "--subtract-dispersion", "pbe"]) == 0
    assert "data.dispersion=none data.functional=pbe" in capsys.readouterr().out
    for structure in open_dataset(tmp_path / "free"):
        atoms = Atoms(structure.atomic_numbers, structure.positions, cell=structure.cell, pbc=True, calculator=EMT())
        assert structure.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(structure.forces, atoms.get_forces(), atol=1e-6)
        np.testing.assert_allclose(structure.stress, atoms.get_stress(voigt=False), atol=1e-6)


@pytest.mark.parametrize(("said", "message"), [("none", None), ("included", "hold dispersion already"), (None, "added on trust")])
def test_a_potential_knows_whether_its_labels_held_it(
    said: str | None, message: str | None, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    data = {"train": str(labelled), "dispersion": said, "functional": "PBE"}
    model = {"name": "leignn", "preset": "tiny", "cutoff": 3.0}
    train({"data": data, "model": model, "training": {"steps": 2, "batch_size": 2}, "out": str(tmp_path / "run")}, progress=False)
    path = tmp_path / "run" / "potential.safetensors"
    assert read_manifest(path)["statistics"]["dispersion"] == said
    assert main(["info", str(path)]) == 0
    assert ("# trained with dispersion" in capsys.readouterr().out) == (said == "included")
    with pytest.raises(ValueError, match="labels of this potential are of the functional PBE" if said != "included" else "hold dispersion"):
        Calculator(path, dispersion="b3lyp")
    if said == "included":
        with pytest.raises(ValueError, match=message):
            Calculator(path, way="plain", dispersion="pbe")
        with pytest.raises(ValueError, match=message):
            with_dispersion(Calculator(path, way="plain"), "pbe")
        return
    caplog.clear()
    calculator = Calculator(path, way="plain", dispersion="pbe")
    assert ("added on trust" in caplog.text) == (message is not None)
    with pytest.raises(ValueError, match="added already"):
        with_dispersion(calculator, "pbe")
    with pytest.raises(ValueError, match="labels of this potential are of the functional PBE"):
        with_dispersion(Calculator(path, way="plain"), "b3lyp")
    atoms = open_dataset(labelled)[0].to_ase()
    plain = load(path).predict(atoms)[0]
    expected = D3Calculator("pbe").get_potential_energy(atoms)
    assert calculator.get_potential_energy(atoms) - plain["energy"] == pytest.approx(expected)


def test_every_command_takes_it(labelled: Path, tmp_path: Path) -> None:
    potential = make_potential(["Cu"])
    path = tmp_path / "p.safetensors"
    save(potential, path)
    structure = as_structure(ase.io.read(labelled, 0))
    expected = D3Calculator("pbe").get_potential_energy(structure.to_ase())
    with_it, without = (evaluate(path, labelled, way="plain", dispersion=d) for d in ("pbe", None))
    shift = with_it.frames[0]["energy_error"] - without.frames[0]["energy_error"]
    assert shift == pytest.approx(1000 * expected / 4)
    frame = tmp_path / "one.xyz"
    ase.io.write(frame, structure.to_ase(), format="extxyz")
    for d in ("pbe", None):
        answer = relax(path, frame, steps=1, way="plain", dispersion=d, fmax=1e3)
        assert answer["energy_eV"] == pytest.approx(potential.predict(structure)[0]["energy"] + (expected if d else 0.0))
    assert main(["md", str(path), str(frame), "--steps", "4", "--interval", "2", "--way", "plain", "--dispersion", "pbe", "--out", str(tmp_path / "md")]) == 0  # fmt: skip
    with pytest.raises(ValueError, match="dispersion pbe .now None"):
        md(path, frame, steps=8, interval=2, way="plain", out=tmp_path / "md", resume=True)
    md(path, frame, steps=8, interval=2, way="plain", out=tmp_path / "md", resume=True, dispersion="pbe")
    md(path, frame, steps=8, interval=2, way="plain", out=tmp_path / "whole", dispersion="pbe")
    assert (tmp_path / "md" / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()
    given = [path], ["ase.calculators.emt:EMT"], "cpu", None, "plain"
    for bare, judged in zip(find_sources(*given), find_sources(*given, "pbe"), strict=True):
        assert bare.fingerprint != judged.fingerprint  # what the judge found of one is not taken for the other
        energies = [source.make().get_potential_energy(structure.to_ase()) for source in (bare, judged)]
        assert energies[1] - energies[0] == pytest.approx(expected)
