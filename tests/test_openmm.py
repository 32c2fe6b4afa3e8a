"""OpenMM on our potentials: the ASE calculator's energies and forces, in its units, boxes, mixed systems and files."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from conftest import make_potential

from gossamer.potential import Potential, PotentialConfig
from gossamer.potential_file import save
from gossamer.simulation.calculator import Calculator

openmm = pytest.importorskip("openmm", reason="needs pip install 'gossamer[openmm]'")
openmmml = pytest.importorskip("openmmml", reason="needs pip install 'gossamer[openmm]'")
from openmm import app, unit  # noqa: E402

KJ_PER_MOL = units.kJ / units.mol
PLATFORM = openmm.Platform.getPlatformByName("Reference")


@pytest.fixture(scope="module", autouse=True)
def entry_point() -> None:
    """The factory as pyproject.toml names it, also where an older installation of ours is the one that openmmml found."""
    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["openmmml.potentials"]["gossamer"].split(":")
    openmmml.MLPotential.registerImplFactory("gossamer", getattr(__import__(module, fromlist=[name]), name)())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save(make_potential(["H", "C", "O"]), tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


def waters(count: int = 3, box: float | None = 12.0) -> Atoms:
    """Some distorted molecules of water in a row, in a skewed box or none."""
    atoms = Atoms()
    for k in range(count):
        atoms += molecule("H2O", positions=molecule("H2O").positions + np.array([2.9 * k, 0.3 * k, 0.1]))
    atoms.rattle(0.05, seed=2)
    if box is not None:
        atoms.set_cell([[box, 0, 0], [1.5, box, 0], [-2.0, 1.0, box + 1]])
        atoms.pbc = True
    return atoms


def topology(atoms: Atoms) -> Any:
    """Molecules of water as OpenMM has them."""
    found = app.Topology()
    chain = found.addChain()
    for _ in range(len(atoms) // 3):
        residue = found.addResidue("HOH", chain)
        o, *hydrogens = (found.addAtom(n, app.Element.getBySymbol(n[0]), residue) for n in ("O", "H1", "H2"))
        for h in hydrogens:
            found.addBond(o, h)
    if atoms.pbc.all():
        found.setPeriodicBoxVectors(atoms.cell.array * unit.angstrom)
    return found


def evaluate(system: Any, atoms: Atoms, **parameters: float) -> tuple[float, np.ndarray]:
    """Energy in eV, forces in eV/Å."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), PLATFORM)
    for name, value in parameters.items():
        context.setParameter(name, value)
    context.setPositions(atoms.positions * unit.angstrom)
    state = context.getState(getEnergy=True, getForces=True)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.angstrom)
    return energy * KJ_PER_MOL, forces * KJ_PER_MOL


def expected(model: Path, atoms: Atoms) -> tuple[float, np.ndarray]:
    atoms = atoms.copy()
    atoms.calc = Calculator(model)
    return atoms.get_potential_energy(), atoms.get_forces()


@pytest.mark.parametrize("box", [None, 12.0], ids=["free", "skewed box"])
def test_energy_and_forces_are_those_of_the_calculator(model: Path, box: float | None) -> None:
    atoms = waters(box=box)
    energy, forces = evaluate(openmmml.MLPotential("gossamer", modelPath=model).createSystem(topology(atoms)), atoms)
    wanted, pull = expected(model, atoms)
    assert energy == pytest.approx(wanted, abs=1e-9)
    np.testing.assert_allclose(forces, pull, atol=1e-10)
    assert np.abs(pull).max() > 0.1


@pytest.mark.parametrize("handed", [1, -1], ids=["right-handed", "left-handed"])
def test_crystals_of_ase_are_turned(handed: int) -> None:
    from gossamer.simulation.openmm import from_ase

    atoms = bulk("Si").repeat((1, 2, 1))
    atoms.rattle(0.1, seed=1)
    atoms.set_cell(handed * atoms.cell.array, scale_atoms=True)
    potential = make_potential(["Si"], name="painn")
    shape, positions, rotation = from_ase(atoms)
    system = openmmml.MLPotential("gossamer", modelPath=potential).createSystem(shape)
    turned = Atoms(atoms.numbers, positions.value_in_unit(unit.angstrom))
    energy, forces = evaluate(system, turned)
    atoms.calc = Calculator(potential)
    assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
    np.testing.assert_allclose(forces @ rotation, atoms.get_forces(), atol=1e-8)
    atoms.pbc = [True, True, False]
    with pytest.raises(ValueError, match="OpenMM has all axes or none"):
        from_ase(atoms)


def test_a_saved_system_is_the_same(model: Path) -> None:
    atoms = waters()
    system = openmmml.MLPotential("gossamer", modelPath=model, dtype="float32").createSystem(topology(atoms))
    text = openmm.XmlSerializer.serialize(system)
    assert len(text) < 5000  # the file's name, not its weights
    again = openmm.XmlSerializer.deserialize(text)
    assert evaluate(again, atoms)[0] == evaluate(system, atoms)[0]


@pytest.mark.parametrize("box", [None, 12.0], ids=["free", "box"])
def test_a_molecule_of_the_potential_among_those_of_a_force_field(model: Path, box: float | None) -> None:
    """The energy changes by that of the molecule alone, ours instead of the force field's, and so do its forces."""
    atoms, chosen = waters(box=box), [3, 4, 5]
    if box is not None:  # a force field's cutoff needs a box that is reduced
        atoms.set_cell([box, box, box + 1])
    field = app.ForceField("tip3p.xml")
    options = dict(rigidWater=False, nonbondedMethod=app.NoCutoff if box is None else app.PME, nonbondedCutoff=0.5 * unit.nanometer)
    classical = field.createSystem(topology(atoms), **options)
    potential = openmmml.MLPotential("gossamer", modelPath=model)
    mixed = potential.createMixedSystem(topology(atoms), classical, chosen)
    part = atoms[chosen]
    alone = field.createSystem(topology(waters(1, None)), **{**options, "nonbondedMethod": app.NoCutoff})
    (before, push), (after, pull) = evaluate(classical, atoms), evaluate(mixed, atoms)
    (own, own_forces), (bonded, bonded_forces) = expected(model, part), evaluate(alone, part)
    assert after - before == pytest.approx(own - bonded, abs=1e-6)
    change = np.zeros_like(push)
    change[chosen] = own_forces - bonded_forces
    np.testing.assert_allclose(pull - push, change, atol=1e-5)
    between = potential.createMixedSystem(topology(atoms), classical, chosen, interpolate=True)
    for weight, energy in ((0.0, before), (1.0, after), (0.25, 0.75 * before + 0.25 * after)):
        assert evaluate(between, atoms, lambda_interpolate=weight)[0] == pytest.approx(energy, abs=1e-6)


def test_energy_is_conserved_and_a_thermostat_holds() -> None:
    atoms = waters(2, box=None)
    potential = make_potential(["H", "O"], name="painn")
    system = openmmml.MLPotential("gossamer", modelPath=potential).createSystem(topology(atoms))

    def run(integrator: Any, steps: int) -> np.ndarray:
        context = openmm.Context(system, integrator, PLATFORM)
        context.setPositions(atoms.positions * unit.angstrom)
        context.setVelocitiesToTemperature(150, 1)
        totals = []
        for _ in range(steps):
            integrator.step(1)
            state = context.getState(getEnergy=True)
            totals.append([state.getKineticEnergy()._value, state.getPotentialEnergy()._value])
        return np.array(totals) * KJ_PER_MOL

    spread = [np.ptp(run(openmm.VerletIntegrator(step * unit.femtosecond), round(6 / step)).sum(axis=1)) for step in (0.4, 0.2)]
    assert spread[1] < spread[0] / 2.5  # second order
    held = run(openmm.LangevinMiddleIntegrator(300, 400 / unit.picosecond, 0.4 * unit.femtosecond), 80)
    assert np.isfinite(held).all()
    assert 100 < held[30:, 0].mean() / (1.5 * len(atoms) * units.kB) < 600


def test_what_cannot_be_is_refused(model: Path) -> None:
    atoms = waters(1, None)
    potential = openmmml.MLPotential("gossamer", modelPath=model)
    with pytest.raises(ValueError, match="take no total charge"):
        potential.createSystem(topology(atoms), charge=1)
    with pytest.raises(TypeError, match="precision unknown"):
        potential.createSystem(topology(atoms), precision="double")
    with pytest.raises(TypeError, match="modelpath"):
        openmmml.MLPotential("gossamer", modelpath=model)
    strange = topology(atoms)
    residue = next(strange.residues())
    strange.addAtom("S", app.Element.getBySymbol("S"), residue)
    with pytest.raises(ValueError, match=r"The topology: S \(16\) not among the potential's elements"):
        potential.createSystem(strange)
    site = topology(atoms)
    site.addAtom("M", None, next(site.residues()))
    with pytest.raises(ValueError, match=r"Atom 3 \(M\) has no element"):
        potential.createSystem(site)
    with pytest.raises(openmm.OpenMMException, match="not finite"):
        evaluate(potential.createSystem(topology(atoms)), Atoms("OH2", np.zeros((3, 3))))


def test_formal_charges_are_told(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    ion = topology(waters(1, None))
    next(ion.atoms()).formalCharge = -1
    openmmml.MLPotential("gossamer", modelPath=model).createSystem(ion, charge=0)
    assert "formal charges of these atoms sum to -1 e" in caplog.text


@pytest.mark.parametrize("long_range", [None, "latent_charges"])
def test_embeddings_know_whether_atoms_interact_beyond_the_cutoff(long_range: Literal["latent_charges"] | None) -> None:
    bare = make_potential(["H", "O"])
    potential = Potential(bare.model_config, bare.statistics, PotentialConfig(long_range=long_range)).eval()
    assert openmmml.MLPotential("gossamer", modelPath=potential)._impl.getMLLongRange() is (long_range is not None)
