"""Latent charges: the sum itself against known numbers, its derivatives, and potentials that have it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from conftest import make_potential, often
from test_training import interrupt

from gossamer.accuracy import evaluate
from gossamer.checks.conservation import force_gradient_error, stress_gradient_error
from gossamer.checks.symmetry import net_force, symmetry_errors
from gossamer.data.batch import collate
from gossamer.data.structure import as_structure
from gossamer.engine.engine import Engine
from gossamer.nn.electrostatics import COULOMB, coulomb_energies
from gossamer.potential import Potential, PotentialConfig
from gossamer.potential_file import load, save
from gossamer.runs import train
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.lammps import export_lammps
from gossamer.simulation.options import RelaxConfig
from gossamer.simulation.relax import relax_files
from gossamer.training.compiled import CompiledForward

LONG = {"long_range": "latent_charges"}


def energy(atoms: Atoms, charges: list[float], smearing: float = 0.0, split: float | None = None) -> float:
    """eV of one structure with given charges."""
    tensors = (
        torch.tensor(charges, dtype=torch.float64),
        torch.tensor(atoms.positions),
        torch.tensor(atoms.cell.array)[None],
        torch.tensor(atoms.pbc)[None],
    )
    return float(coulomb_energies(*tensors, torch.zeros(len(atoms), dtype=torch.int64), smearing, split).sum())


def with_charges(name: str = "leignn", seed: int = 0, elements: tuple[str, ...] = ("H", "C", "O", "Si"), **options: str) -> Potential:
    """A tiny potential with random weights, in float64."""
    bare = make_potential(list(elements), seed, name=name)
    potential = Potential(bare.model_config, bare.statistics, PotentialConfig(**{**LONG, **options}))
    potential.network.double()
    potential.network.load_state_dict(bare.network.state_dict(), strict=False)
    with torch.no_grad():
        potential.network.charges.table.weight.copy_(0.4 * torch.linspace(-1, 1, len(elements))[:, None])
    return potential.eval()


# --- the sum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [None, 0.7, 1.5, 2.2])
@pytest.mark.parametrize(
    ("crystal", "nearest", "madelung"),
    [("rocksalt", 1 / 2, 1.7475645946331822), ("cesiumchloride", 3**0.5 / 2, 1.7626746730710), ("zincblende", 3**0.5 / 4, 1.6380550533888)],
)
@pytest.mark.parametrize("cubic", [False, True])
def test_madelung_constants(crystal: str, nearest: float, madelung: float, cubic: bool, split: float | None) -> None:
    """E = -k M / nearest distance for each pair of ions (Borwein, Glasser et al., Lattice Sums Then and Now, 2013)."""
    atoms = bulk("NaCl", crystal, a=5.0, **({"cubic": True} if cubic and crystal != "cesiumchloride" else {}))
    charges = [1.0 if s == "Na" else -1.0 for s in atoms.symbols]
    found = -2 * energy(atoms, charges, split=split) / len(atoms) * 5.0 * nearest / COULOMB
    assert found == pytest.approx(madelung, rel=1e-6)


@pytest.mark.parametrize("net", [0.0, 0.8])
@pytest.mark.parametrize("smearing", [0.0, 1.0])
def test_the_split_means_nothing(smearing: float, net: float, crystal: Atoms) -> None:
    """Nor does it with a background, nor in a skewed cell."""
    rng = np.random.default_rng(0)
    charges = rng.normal(size=len(crystal))
    charges += (net - charges.sum()) / len(charges)
    energies = [energy(crystal, list(charges), smearing, split) for split in (None, 1.0, 1.3, 1.9, 2.6)]
    assert np.ptp(energies) < 2e-6 * np.abs(charges).sum()
    assert energy(crystal.repeat((2, 1, 1)), [*charges, *charges], smearing) == pytest.approx(2 * energies[0], rel=1e-6)


def test_a_large_cell_holds_a_molecule() -> None:
    """The periodic sum tends to the sum over pairs, its images being dipoles in a conducting surrounding."""
    water = molecule("H2O")
    charges = [-0.8, 0.4, 0.4]
    alone = energy(water, charges, 1.0)
    lengths = water.get_all_distances()[np.triu_indices(3, 1)]
    products = [-0.32, -0.32, 0.16]
    from scipy.special import erf

    assert alone == pytest.approx(COULOMB * float(np.sum(products * erf(lengths / 2**0.5) / lengths)), rel=1e-12)
    water.set_cell([60.0] * 3)
    water.pbc = True
    dipole = 0.4 * np.linalg.norm(2 * water.positions[0] - water.positions[1] - water.positions[2])
    background = -2 * np.pi * COULOMB * dipole**2 / (3 * 60.0**3)  # of a cubic array of dipoles (Makov and Payne, PRB 51, 4014, Eq. 15)
    assert energy(water, charges, 1.0) - alone == pytest.approx(background, rel=5e-3)


def test_first_and_second_derivatives(crystal: Atoms) -> None:
    """By charges, positions and cell, of a batch that holds a crystal, a molecule, a lone atom and another crystal."""
    structures = [crystal, molecule("H2O"), Atoms("H", [[1.0, 2.0, 3.0]]), bulk("NaCl", "rocksalt", a=5.6)]
    graph = collate([as_structure(a) for a in structures], 3.0)
    generator = torch.Generator().manual_seed(0)
    charges = torch.randn(graph.n_atoms, generator=generator, dtype=torch.float64)

    def total(q: torch.Tensor, x: torch.Tensor, strain: torch.Tensor) -> torch.Tensor:
        moved = x + torch.einsum("nx,nxy->ny", x, strain[graph.graph_index])
        return coulomb_energies(q, moved, graph.cell + graph.cell @ strain, graph.periodic, graph.graph_index, 1.0, 1.3).sum()

    inputs = (
        charges.requires_grad_(),
        graph.positions.clone().requires_grad_(),
        torch.zeros(4, 3, 3, dtype=torch.float64).requires_grad_(),
    )
    assert torch.autograd.gradcheck(total, inputs, eps=1e-5, atol=1e-6, rtol=1e-5)
    assert torch.autograd.gradgradcheck(total, inputs, eps=1e-5, atol=1e-5, rtol=1e-4, fast_mode=True)


def test_structures_of_a_batch_do_not_see_one_another(crystal: Atoms) -> None:
    potential = with_charges()
    structures = [crystal, molecule("CH3CH2OH"), molecule("H2O"), crystal]
    together, alone = potential.predict(structures), [potential.predict(s)[0] for s in structures]
    for a, b in zip(together, alone, strict=True):
        assert a["energy"] == pytest.approx(b["energy"], abs=1e-10)
        np.testing.assert_allclose(a["forces"], b["forces"], atol=1e-10)
    boxed = molecule("H2O", cell=[9.0] * 3)  # a cell does not make a crystal
    assert potential.predict(boxed)[0]["energy"] == pytest.approx(alone[2]["energy"], abs=1e-12)
    assert Calculator(potential, way="plain").get_potential_energy(boxed) == pytest.approx(alone[2]["energy"], abs=1e-12)


def test_a_slab_is_refused(slab: Atoms) -> None:
    with pytest.raises(ValueError, match="periodic along all axes or along none; structure 0 has pbc .*vacuum"):
        with_charges().predict(slab)


# --- potentials -----------------------------------------------------------------------------------------------------

NETWORKS = ["leignn", "nequip", "geodite", "mace", "painn", "schnet", "sevennet", "weft"]


@pytest.mark.parametrize("name", NETWORKS)
def test_off_changes_nothing(name: str, crystal: Atoms) -> None:
    """Same weights from one seed, and the same numbers bit by bit, as of a potential without the setting."""
    bare = make_potential(["H", "C", "O", "Si"], name=name)
    assert bare.network.charges is None
    potential = with_charges(name)
    plain, charged = bare.predict(crystal)[0], potential.predict(crystal)[0]
    assert abs(plain["energy"] - charged["energy"]) > 1e-4
    potential.network.charges = None
    off = potential.predict(crystal)[0]
    assert off["energy"] == plain["energy"]
    assert (off["forces"] == plain["forces"]).all()


@pytest.mark.parametrize("name", often(NETWORKS, ["leignn"]))
def test_forces_and_stress_are_gradients(name: str, crystal: Atoms, ethanol: Atoms) -> None:
    calculator = Calculator(with_charges(name), way="plain", skin=0.0)
    for atoms in (crystal, ethanol) if name in ("leignn", "nequip", "geodite") else (crystal,):
        assert force_gradient_error(calculator, atoms, step=1e-3, n_atoms=1) < 1e-6
        assert net_force(calculator, atoms) < 1e-10
    assert stress_gradient_error(calculator, crystal, step=1e-4) < 1e-6


@pytest.mark.parametrize("system", ["ethanol", "crystal"])
def test_symmetry_and_extensivity(system: str, request: pytest.FixtureRequest) -> None:
    atoms = request.getfixturevalue(system)
    calculator = Calculator(with_charges(), way="plain", skin=0.0)
    for change, error in symmetry_errors(calculator, atoms).items():
        assert error["relative"] < 1e-7, change
    if atoms.pbc.all():
        double = atoms.repeat((2, 1, 1))
        assert calculator.get_potential_energy(double) == pytest.approx(2 * calculator.get_potential_energy(atoms), rel=1e-7)
        np.testing.assert_allclose(calculator.get_charges(double)[: len(atoms)], calculator.get_charges(atoms), atol=1e-10)


@pytest.mark.parametrize(
    ("net_charge", "message"), [("neutralise", None), ("keep", None), ("refuse", "charges sum to .* e, and the potential refuses")]
)
def test_net_charge(net_charge: str, message: str | None, crystal: Atoms) -> None:
    calculator = Calculator(with_charges(net_charge=net_charge), way="plain")
    if message is not None:
        for _ in range(2):  # asked again, it refuses again
            with pytest.raises(ValueError, match=message):
                calculator.get_potential_energy(bulk("Si"))
        calculator.get_potential_energy(molecule("SiH4"))
        return
    assert force_gradient_error(calculator, crystal, step=1e-3, n_atoms=2) < 1e-6
    assert (abs(calculator.get_charges(crystal).sum()) < 1e-10) == (net_charge == "neutralise")
    lone = Atoms("O", calculator=calculator)
    assert lone.get_potential_energy() == pytest.approx(calculator.potential.statistics.reference_energies["O"])


REFUSED = r"charges sum to [+-].* e, and the potential refuses"


@pytest.mark.parametrize("way", ["predict", "torchsim", "relax", "ipi", "openmm"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
def test_charged_crystals_are_refused_wherever_forces_are_asked_for(way: str, tmp_path: Path) -> None:
    potential = with_charges(net_charge="refuse")
    neutral, charged = molecule("SiH4"), bulk("Si", cubic=True).repeat(2)
    if way == "predict":
        for run in (None, Engine(potential, "plain")):
            with pytest.raises(ValueError, match=f"structure 1: its latent {REFUSED}"):
                potential.predict([neutral, charged], run=run)
    elif way == "torchsim":
        torch_sim = pytest.importorskip("torch_sim")
        from gossamer.simulation.torchsim import TorchSimModel

        state = torch_sim.initialize_state([charged, charged], torch.device("cpu"), torch.float64)
        with pytest.raises(ValueError, match=f"Structure 0: its latent {REFUSED}"):
            TorchSimModel(potential, way="plain")(state)
    elif way == "relax":  # the others are relaxed
        pytest.importorskip("torch_sim")
        for name, atoms in (("charged", charged), ("neutral", neutral)):
            ase.io.write(tmp_path / f"{name}.xyz", atoms)
        files = [tmp_path / "charged.xyz", tmp_path / "neutral.xyz"]
        refused, relaxed = relax_files(potential, files, RelaxConfig(engine="torchsim", steps=2, out=tmp_path / "out", way="plain"))
        assert re.search(REFUSED, refused["error"])
        assert "error" not in relaxed
    elif way == "ipi":
        pytest.importorskip("ipi")
        from gossamer.simulation.ipi_driver import Driver

        ase.io.write(tmp_path / "si.xyz", charged)
        with pytest.raises(ValueError, match=REFUSED):
            Driver(potential, tmp_path / "si.xyz", way="plain")(charged.cell.array.T, charged.positions)
    else:
        openmm = pytest.importorskip("openmm")
        from gossamer.simulation.openmm import PotentialImpl, from_ase

        topology, positions, _ = from_ase(charged)
        system = openmm.System()
        for _ in charged:
            system.addParticle(28.0)
        system.setDefaultPeriodicBoxVectors(*topology.getPeriodicBoxVectors())
        PotentialImpl(potential, way="plain").addForces(topology, system, None, 0)
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
        context.setPositions(positions)
        with pytest.raises(openmm.OpenMMException, match=REFUSED):
            context.getState(energy=True)


def test_a_slab_is_named() -> None:
    slab = bulk("Si", cubic=True)
    slab.pbc = [True, True, False]
    with pytest.raises(ValueError, match="structure 1 has pbc"):
        with_charges().predict([bulk("Si"), slab], batch_atoms=2)


def test_errors_of_charged_crystals_are_told(tmp_path: Path) -> None:
    """Validation, evaluation and the structures that a file holds are not refused: what a potential says of labelled frames is to be known."""
    potential, crystal = with_charges(net_charge="refuse"), as_structure(bulk("Si"))
    save(potential, tmp_path / "p.safetensors", [crystal])
    assert evaluate(tmp_path / "p.safetensors", [replace(crystal, energy=-5.0)], out=tmp_path).energy.count == 1


def test_two_charges_far_apart_see_one_another() -> None:
    """Beyond all edges, at 20 Å: k q² / r², with the charges that the calculator tells."""
    calculator = Calculator(with_charges(), way="plain")
    atoms = Atoms("HSi", [[0, 0, 0], [20.0, 0, 0]], calculator=calculator)
    q = calculator.get_charges(atoms)
    assert atoms.get_forces()[1, 0] == pytest.approx(COULOMB * q[0] * q[1] / 20.0**2)
    assert abs(q[0]) > 0.1


@pytest.mark.parametrize("name", often(["leignn", "nequip", "geodite"], ["nequip"]))
def test_ways_of_running(name: str, crystal: Atoms, kernels: Path, tmp_path: Path) -> None:
    """Kernels agree; a file holds the charges; what cannot be had says why."""
    potential = with_charges(name)
    save(potential, tmp_path / "p.safetensors", [as_structure(crystal)])
    again = load(tmp_path / "p.safetensors")
    plain, quick = Calculator(again, way="plain"), Calculator(again, way="kernels")
    assert Calculator(again).engine.way == "kernels"
    np.testing.assert_allclose(quick.get_forces(crystal), plain.get_forces(crystal), atol=1e-7)
    np.testing.assert_allclose(plain.get_charges(crystal), Calculator(potential, way="plain").get_charges(crystal), atol=1e-12)
    with pytest.raises(RuntimeError, match="way 'program' cannot be had.*long_range"):
        Engine(again, "program")
    with pytest.raises(ValueError, match="cannot be shared among processes.*long_range"):
        export_lammps(tmp_path / "p.safetensors", tmp_path / "package")
    with pytest.raises(NotImplementedError, match="no virials of atoms"):
        plain.get_property("stresses", crystal)


def test_direct_forces_are_refused() -> None:
    bare = make_potential(["H"], direct_forces=True)
    with pytest.raises(ValueError, match="long_range needs forces that are the gradient"):
        Potential(bare.model_config, bare.statistics, PotentialConfig(**LONG))


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ions(tmp_path: Path) -> Path:
    """Molecules and crystals of +1 and -1, with the energies and forces of point charges held apart by a wall."""
    rng = np.random.default_rng(0)
    frames = []
    for k in range(12):
        if k % 2:
            atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
            atoms.rattle(0.1, seed=k)
        else:
            atoms = Atoms("NaCl", [[0, 0, 0], rng.normal(size=3)])
            atoms.positions[1] *= rng.uniform(6, 12) / np.linalg.norm(atoms.positions[1])
        q = torch.where(torch.tensor(atoms.numbers) == 11, 1.0, -1.0).double()
        x = torch.tensor(atoms.positions, requires_grad=True)
        total = coulomb_energies(
            q, x, torch.tensor(atoms.cell.array)[None], torch.tensor(atoms.pbc)[None], torch.zeros(len(atoms), dtype=torch.int64), 1.0
        )
        (slope,) = torch.autograd.grad(total.sum(), x)
        atoms.calc = SinglePointCalculator(atoms, energy=float(total.detach().sum()), forces=-slope.numpy())
        frames.append(atoms)
    ase.io.write(tmp_path / "ions.extxyz", frames)
    return tmp_path / "ions.extxyz"


@pytest.mark.parametrize(
    "name", ["leignn", pytest.param("nequip", marks=pytest.mark.slow), pytest.param("geodite", marks=pytest.mark.slow)]
)
@pytest.mark.thorough
def test_training_finds_the_charges_and_resumes(name: str, ions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From labels of point charges of 1 e; a run that was cut ends with the same weights."""
    weights = []
    for folder in (tmp_path / "whole", tmp_path / "cut"):
        config = {
            "data": {"train": str(ions), "reference_energies": {"Na": 0.0, "Cl": 0.0}},
            "model": {"name": name, "preset": "tiny", "cutoff": 4.0},
            "potential": {**LONG, "zbl": False},
            "loss": {"energy": 1.0, "forces": 10.0},
            "training": {
                "steps": 80, "batch_size": 4, "valid_every": 40, "checkpoint_every": 10, "dtype": "float64",
                "learning_rate": 0.06 if name == "nequip" else 0.01,
            },
            "out": str(folder),
        }  # fmt: skip
        if folder.name == "cut":
            interrupt(monkeypatch, config, 25)
        results = train(config, resume=folder.name == "cut", progress=False)
        weights.append(load(folder / "potential.safetensors"))
    for (key, a), b in zip(weights[0].network.state_dict().items(), weights[1].network.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert results["valid"]["forces_mae_meV_per_A"] < (60 if name == "nequip" else 20)
    charges = Calculator(weights[0], way="plain").get_charges(Atoms("NaCl", [[0, 0, 0], [0, 0, 11.0]]))
    assert np.abs(charges) == pytest.approx(1.0, abs=0.5 if name == "nequip" else 0.05)


@pytest.mark.thorough
def test_training_with_kernels_and_without(crystal: Atoms, kernels: Path) -> None:
    """Second derivatives through the sum: the same gradients of the weights; what is not compiled says so."""
    potential = with_charges().train()
    graph = potential.collate([as_structure(crystal), as_structure(molecule("H2O"))])
    gradients = []
    for options in ({}, {"kernels": True}):
        forward = CompiledForward(potential, True, True, compile=False, **options)
        out = forward(graph)
        assert (forward.quick is potential) == (not options)
        loss = out.energy.sum() + (out.forces**3).sum() + out.stress[0].sum()
        gradients.append(torch.autograd.grad(loss, list(potential.network.charges.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
        assert float(a.abs().max()) > 1e-3
    with pytest.raises(RuntimeError, match="no compiled graph can know"):
        CompiledForward(potential, True, True)._compile(graph)
