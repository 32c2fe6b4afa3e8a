"""Every variant of the network passes the same physics, with random weights in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.data import atomic_numbers, covalent_radii
from conftest import DIRECT, GLOBAL, MODELS, OWN_ZERO, SMOOTH, make_potential, often

from gossamer.checks.conservation import force_gradient_error, loop_work, nve_conservation, stress_gradient_error
from gossamer.checks.smoothness import cutoff_exponent, energy_jump
from gossamer.checks.symmetry import net_force, separation_error, supercell_error, symmetry_errors
from gossamer.data.batch import collate
from gossamer.data.structure import Structure
from gossamer.graph import Graph
from gossamer.nn.layers import polynomial_envelope
from gossamer.nn.zbl import zbl_energy
from gossamer.potential import Potential, PotentialConfig
from gossamer.simulation.calculator import Calculator

CONSERVATIVE = [name for name in MODELS if name not in DIRECT]
LOCAL = [name for name in MODELS if name not in GLOBAL]
ELEMENTS = ["H", "C", "O", "Si"]


def calculator(name: str) -> Calculator:
    return Calculator(make_potential(ELEMENTS, **MODELS[name]), way="plain", skin=0.0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("system", ["ethanol", "crystal", "slab"])
def test_symmetry(name: str, system: str, request: pytest.FixtureRequest) -> None:
    errors = symmetry_errors(calculator(name), request.getfixturevalue(system))
    assert set(errors) >= {"rotation", "reflection", "translation", "permutation"}
    for change, error in errors.items():
        assert error["relative"] < 1e-10, change


@pytest.mark.parametrize("name", CONSERVATIVE)
@pytest.mark.parametrize("system", often(["ethanol", "crystal", "slab"], ["crystal"]))
def test_forces_are_the_gradient(name: str, system: str, request: pytest.FixtureRequest) -> None:
    atoms = request.getfixturevalue(system)
    assert force_gradient_error(calculator(name), atoms, step=1e-3, n_atoms=3) < 1e-6
    assert net_force(calculator(name), atoms) < 1e-10


@pytest.mark.parametrize("name", CONSERVATIVE)
def test_stress_is_the_strain_derivative(name: str, crystal: Atoms) -> None:
    assert stress_gradient_error(calculator(name), crystal, step=1e-4) < 1e-7


@pytest.mark.parametrize("name", CONSERVATIVE)
def test_no_work_around_a_loop(name: str, ethanol: Atoms) -> None:
    kinked = name == "sevennet-published"  # its second derivative jumps, and a sum over points sees that
    assert loop_work(calculator(name), ethanol, radius=0.01) < (1e-7 if kinked else 1e-8)


@pytest.mark.parametrize("name", DIRECT)
def test_direct_forces_do_work_around_a_loop(name: str, ethanol: Atoms) -> None:
    """The check sees forces that are no gradient."""
    assert loop_work(calculator(name), ethanol, radius=0.1) > 1e-7
    assert force_gradient_error(calculator(name), ethanol, step=1e-3, n_atoms=2) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_extensive(name: str, crystal: Atoms) -> None:
    calc = calculator(name)
    assert supercell_error(calc, crystal) < 1e-10
    single, double = crystal.copy(), crystal.repeat((2, 1, 1))
    single.calc = double.calc = calc
    forces = single.get_forces()
    assert np.abs(double.get_forces() - np.concatenate([forces, forces])).max() < 1e-10


@pytest.mark.parametrize("name", LOCAL)
def test_far_fragments_do_not_see_each_other(name: str, ethanol: Atoms) -> None:
    assert separation_error(calculator(name), ethanol) < 1e-10


@pytest.mark.parametrize("name", ["sound-global", "published"])
def test_global_context_couples_far_fragments(name: str, ethanol: Atoms) -> None:
    """The coupling that keeps global_context off by default."""
    assert separation_error(calculator(name), ethanol) > 1e-4


@pytest.mark.parametrize("name", OWN_ZERO)
def test_isolated_atoms_have_their_reference_energies(name: str) -> None:
    calc = calculator(name)
    for element in ELEMENTS:
        atoms = Atoms(element, positions=[[0.3, 0.1, -2.0]])
        atoms.calc = calc
        assert atoms.get_potential_energy() == pytest.approx(calc.potential.statistics.reference_energies[element], abs=1e-12), element
        assert np.abs(atoms.get_forces()).max() == 0.0


def test_without_parity_the_mirror_image_has_another_energy(ethanol: Atoms) -> None:
    """SevenNet's published weights; all else holds."""
    potential = make_potential(ELEMENTS, name="sevennet", parity="none", num_layers=3)
    errors = symmetry_errors(Calculator(potential, way="plain", skin=0.0), ethanol)
    assert errors.pop("reflection")["relative"] > 1e-6
    assert all(error["relative"] < 1e-10 for error in errors.values())


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_through_the_third_derivative_at_the_cutoff(name: str) -> None:
    water = molecule("H2O")[[1, 0, 2]]
    exact = name in ("nequip", "nequip-published", "geodite", "geodite-published", "nequip-trained-bessel", "weft", "weft-l3")
    exponent = cutoff_exponent(calculator(name), water, 4.0, (0.04, 0.02, 0.01) if exact else (0.1, 0.05, 0.025))
    assert exponent > 3.8
    if exact:  # what their specifications say
        assert exponent == pytest.approx(4.0, abs=0.2)
    assert energy_jump(calculator(name), water, 4.0) < 1e-12


def test_pair_cutoffs_end_as_smoothly() -> None:
    """O-H interacts within 3 Å only, where the global cutoff is 4."""
    potential = make_potential(ELEMENTS, name="nequip", pair_cutoffs={"O": {"H": 3.0}, "H": {"O": 3.0}}, num_layers=1)
    calc = Calculator(potential, skin=0.0)
    pair = Atoms("OH", positions=[[0, 0, 0], [1, 0, 0]])
    assert cutoff_exponent(calc, pair, 3.0) == pytest.approx(4.0, abs=0.2)
    pair.calc = calc
    pair.positions[1, 0] = 3.2
    assert np.abs(pair.get_forces()).max() == 0.0


def test_edges_beyond_their_pair_cutoff_are_left_out(ethanol: Atoms) -> None:
    """Their messages are zero: same energies and forces without them, less work; a repulsion that reaches farther keeps its pairs."""
    structure = Structure(
        atomic_numbers=ethanol.numbers.astype(np.int64), positions=ethanol.positions, cell=np.zeros((3, 3)), pbc=np.zeros(3, bool)
    )
    for cutoff in (2.0, 0.3):
        potential = make_potential(ELEMENTS, name="nequip", pair_cutoffs={"H": cutoff})
        whole, graph = collate([structure], potential.cutoff), potential.collate([structure])
        assert graph.n_edges < whole.n_edges
        a, b = potential(whole), potential(graph)
        assert float(a.energy) == pytest.approx(float(b.energy), abs=1e-12)
        np.testing.assert_allclose(a.forces.numpy(), b.forces.numpy(), atol=1e-12)


def test_repulsion_to_the_cutoff_ends_at_that_of_the_pair() -> None:
    """As nequip's package has it: x = r / r_pair in the envelope of each directed edge."""
    options = PotentialConfig(zbl_radius="cutoff", zbl_power=6, zbl_order=2)
    plain = make_potential(["H", "C"], name="nequip", pair_cutoffs={"H": 2.5, "C": {"H": 1.5}})
    potential = Potential(plain.model_config, plain.statistics, options).double().eval()
    pair = Structure(
        atomic_numbers=np.array([1, 6]), positions=np.array([[0.0, 0, 0], [1.2, 0, 0]]), cell=np.zeros((3, 3)), pbc=np.zeros(3, bool)
    )
    without = Potential(plain.model_config, plain.statistics, PotentialConfig(zbl=False)).double().eval()
    without.network.load_state_dict(potential.network.state_dict())
    found = float(potential(potential.collate([pair])).energy - without(without.collate([pair])).energy)
    x = torch.tensor([1.2 / 2.5, 1.2 / 1.5], dtype=torch.float64)
    one = torch.tensor([1.2], dtype=torch.float64)
    wanted = 0.5 * float(zbl_energy(one, one * 0 + 1, one * 0 + 6)) * float(polynomial_envelope(x, 6, 2).sum())
    assert found == pytest.approx(wanted, rel=1e-10)


class Harmonic(torch.nn.Module):
    """½ k |r_a - r_b|² of the first two atoms of each structure, plus their cell's volume: an energy that edges do not show."""

    def forward(self, graph: Graph, positions: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
        first = torch.stack([(graph.graph_index == k).nonzero()[0, 0] for k in range(graph.n_graphs)])
        spring = 0.5 * 0.7 * ((positions[first] - positions[first + 1]) ** 2).sum(dim=1)
        return torch.zeros_like(positions[:, 0]).index_add(0, first, spring + 0.01 * torch.linalg.det(cell))


def test_terms_that_see_positions_and_cells_get_forces_and_stress(crystal: Atoms) -> None:
    potential = make_potential(ELEMENTS)
    potential.terms.append(Harmonic())
    calculator = Calculator(potential, way="plain")
    assert force_gradient_error(calculator, crystal) < 1e-6
    assert stress_gradient_error(calculator, crystal) < 1e-7
    with_term = calculator.get_potential_energy(crystal)
    potential.terms = torch.nn.ModuleList()
    assert abs(with_term - Calculator(potential, way="plain").get_potential_energy(crystal.copy())) > 0.01


def test_trained_frequencies_cost_a_derivative() -> None:
    """The sine loses its zero at the cutoff: O(δ³), only C². The reason why they are not the default."""
    potential = make_potential(ELEMENTS, name="nequip", train_bessel=True)
    assert cutoff_exponent(Calculator(potential, skin=0.0), molecule("H2O")[[1, 0, 2]], 4.0, (0.02, 0.01, 0.005)) == pytest.approx(
        3.0, abs=0.2
    )


@pytest.mark.parametrize("name", ["geodite", "nequip", "painn", "sound"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_wall_of_a_dimer(name: str, element: str) -> None:
    """From 0.3 bond lengths inwards the energy only rises, and stays finite."""
    calc = calculator(name)
    bond = 2 * covalent_radii[atomic_numbers[element]]
    atoms = Atoms(element + element, positions=[[0, 0, 0], [1, 0, 0]])
    atoms.calc = calc
    energies, forces = [], []
    for distance in np.linspace(0.3 * bond, 0.05, 12):
        atoms.positions[1, 0] = distance
        energies.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces()[1, 0])
    assert np.all(np.diff(energies) > 0)
    assert np.all(np.array(forces) > 0)
    assert np.isfinite(energies).all()


def test_geodite_switches_off_at_short_range() -> None:
    """Without repulsion the energy of a dimer falls as r^4.58, the power of the distance weight."""
    potential = make_potential(["C"], name="geodite", zbl=False)
    atoms = Atoms("C2", positions=[[0, 0, 0], [1, 0, 0]])
    atoms.calc = Calculator(potential, skin=0.0)
    energies = []
    distances = np.array([0.02, 0.01, 0.005])
    for distance in distances:
        atoms.positions[1, 0] = distance
        energies.append(abs(atoms.get_potential_energy() - 2 * potential.statistics.reference_energies["C"]))
    assert np.polyfit(np.log(distances), np.log(energies), 1)[0] == pytest.approx(4.579, abs=0.1)


def test_published_leignn_jumps_at_the_cutoff() -> None:
    """The bias of the radial map is why: messages do not vanish at the cutoff."""
    assert energy_jump(calculator("published-vanilla"), molecule("H2O")[[1, 0, 2]], 4.0) > 1e-6


@pytest.mark.parametrize("name", SMOOTH)
def test_third_derivative_is_bounded_at_the_cutoff(name: str) -> None:
    """Finite differences of the force through the cutoff: value, slope and curvature are continuous."""
    calc = calculator(name)
    atoms = Atoms("OH", positions=[[0, 0, 0], [4.0, 0, 0]])
    atoms.calc = calc
    step = 0.01
    forces = []
    for k in range(-4, 5):
        atoms.positions[1, 0] = 4.0 + k * step
        forces.append(atoms.get_forces()[1, 0])
    curvature = np.diff(forces, 2) / step**2
    assert np.abs(np.diff(curvature)).max() < 0.5 * np.abs(curvature).max() + 1e-12


@pytest.mark.thorough
def test_dynamics_conserve_energy_to_second_order() -> None:
    atoms = molecule("H2O")
    atoms.rattle(0.02, seed=0)
    results = nve_conservation(calculator("sound"), atoms, temperature=100, timestep=0.1, picoseconds=0.05)
    assert results["fluctuation_ratio"] == pytest.approx(4.0, abs=0.5)
    assert abs(results["drift_meV_per_atom_per_ps"]) < 1.0


def test_vectors_are_smooth_at_symmetric_sites() -> None:
    """At a perfect crystal all vectors vanish; the energy must still have finite third differences."""
    calc = calculator("sound")
    atoms = bulk("SiC", "zincblende", a=4.4, cubic=True)
    energies = []
    for offset in np.linspace(-0.02, 0.02, 9):
        moved = atoms.copy()
        moved.positions[0, 0] += offset
        moved.calc = calc
        energies.append(moved.get_potential_energy())
    second = np.diff(energies, 2) / 0.005**2
    assert np.ptp(second) < 0.05 * np.abs(second).max()


def test_zbl_wall() -> None:
    """Two atoms pushed together are repelled, ever more strongly."""
    atoms = Atoms("OH", positions=[[0, 0, 0], [1, 0, 0]])
    atoms.calc = calculator("sound")
    energies = []
    for distance in (0.4, 0.3, 0.2, 0.1, 0.05):
        atoms.positions[1, 0] = distance
        energies.append(atoms.get_potential_energy())
    assert np.all(np.diff(energies) > 0)
    assert energies[-1] > 100
