"""Where the training data ends: nothing changes on it; beyond, two atoms repel each other and nothing jumps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from conftest import DIRECT, ETHANOL, MODELS, make_potential, often
from safetensors.torch import load_file

from gossamer.checks.conservation import force_gradient_error
from gossamer.checks.smoothness import refined_jump
from gossamer.config import make_config
from gossamer.data.dataset import load_data
from gossamer.data.statistics import find_limits, widened
from gossamer.data.structure import Structure, as_structure
from gossamer.engine.engine import Engine
from gossamer.neighbors import company, neighbor_list_reference
from gossamer.nn.limits import ENOUGH, Limits, stretch
from gossamer.potential import Potential, PotentialConfig
from gossamer.potential_file import load, save
from gossamer.runs import limits_of, train
from gossamer.simulation.calculator import Calculator

ELEMENTS = ["H", "C", "O"]
GUARDED = [name for name in MODELS if name != "geodite-published"]
"""networks that the potential's repulsion goes with"""
FEW = ["sound", "nequip", "nequip-l3-pairs", "geodite"]


def rattled(atoms: Atoms, seed: int = 0) -> Structure:
    copy = atoms.copy()
    copy.rattle(0.05, seed=seed)
    return as_structure(copy)


def limited(name: str, ethanol: Atoms) -> tuple[Potential, list[Structure]]:
    """A potential that takes some frames of ethanol for its training data, and these."""
    frames = [rattled(ethanol, seed) for seed in range(4)]
    potential = make_potential(ELEMENTS, **MODELS[name])
    potential.set_statistics(widened(potential.statistics, *limits_of(potential, frames)))
    return potential, frames


# --- the functions ----------------------------------------------------------------------------------------------------


def test_distances_are_held_smoothly_and_only_below_the_shortest() -> None:
    r = torch.linspace(0.02, 3.0, 600, dtype=torch.float64)
    one = torch.ones_like(r)
    shown = r * (1 + stretch(r, one))
    assert torch.equal(shown[r >= 1], r[r >= 1])
    assert bool((shown.diff() >= 0).all())
    assert float(shown.min()) == pytest.approx(0.9, abs=1e-3)

    def along(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        length = torch.from_numpy(x).requires_grad_()
        value = length * (1 + stretch(length, torch.ones_like(length)))
        return value.detach().numpy(), torch.autograd.grad(value.sum(), length)[0].numpy()

    for order in (-1, 0, 1, 2):
        assert refined_jump(along, np.linspace(0.8, 1.2, 201), order)[0] < 1e-2, order


def test_an_atom_counts_from_one_neighbour_to_enough() -> None:
    numbers = torch.tensor([1, 1, 1, 6, 6])
    limits = Limits({"C": 0.7})
    trust = limits.trust(torch.tensor([1.0, 1.4, ENOUGH, 0.4, 0.7], dtype=torch.float64), numbers).tolist()
    assert trust[0] == 0.0
    assert 0 < trust[1] < 1
    assert trust[2] == 1.0
    assert trust[3] == pytest.approx(0.0, abs=1e-12)
    assert trust[4] == 1.0


@pytest.mark.parametrize("pair_cutoffs", [None, {(1, 6): 1.5}])
def test_limits_of_data(crystal: Atoms, pair_cutoffs: dict | None) -> None:
    """Against the definition; lone atoms do not count, nor does the order of elements."""
    rng = np.random.default_rng(0)
    frames = [as_structure(Atoms("CHOHC", rng.uniform(0, 4, (5, 3)), cell=[5, 5, 5], pbc=True)) for _ in range(6)]
    shortest, fewest = find_limits([*frames, as_structure(Atoms("H"))], 3.0, pair_cutoffs=pair_cutoffs)
    distances, counts = {}, {}
    for frame in frames:
        (sender, receiver), shifts = neighbor_list_reference(frame.positions, frame.cell, frame.pbc, 3.0)
        lengths = np.linalg.norm(frame.positions[sender] + shifts @ frame.cell - frame.positions[receiver], axis=1)
        z = frame.atomic_numbers
        for i, j, length in zip(receiver, sender, lengths, strict=True):
            key = tuple(sorted((int(z[i]), int(z[j]))))
            distances[key] = min(distances.get(key, 9.0), length)
        for atom in range(len(z)):
            reach = np.array([(pair_cutoffs or {}).get((z[atom], z[j]), 3.0) for j in sender[receiver == atom]])
            counts[z[atom]] = min(counts.get(z[atom], 99.0), float(company(lengths[receiver == atom] / reach).sum()))
    symbols = {1: "H", 6: "C", 8: "O"}
    assert shortest == pytest.approx({f"{symbols[a]}-{symbols[b]}": d for (a, b), d in distances.items()})
    assert fewest == pytest.approx({symbols[int(z)]: n for z, n in counts.items()})


def test_more_data_widens_the_limits() -> None:
    before = replace(make_potential(["H", "O"]).statistics, shortest_distances={"H-O": 0.9}, fewest_neighbors={"H": 2.0, "O": 1.0})
    after = widened(before, {"H-O": 1.0, "C-H": 1.1}, {"H": 0.5})
    assert after.shortest_distances == {"C-H": 1.1, "H-O": 0.9}
    assert after.fewest_neighbors == {"H": 0.5, "O": 1.0}


# --- potentials -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GUARDED)
def test_nothing_changes_on_the_data(name: str, ethanol: Atoms) -> None:
    potential, frames = limited(name, ethanol)
    plain = make_potential(ELEMENTS, **MODELS[name])
    plain.zbl = None
    for ours, theirs in zip(potential.predict(frames), plain.predict(frames), strict=True):
        assert ours["energy"] == theirs["energy"]
        assert np.array_equal(ours["forces"], theirs["forces"])


@pytest.mark.parametrize(
    "name", [n for n in GUARDED if n != "nequip-l3-pairs"]
)  # within its 2.5 Å, atoms of H have few neighbours in the data, too
def test_two_atoms_repel_each_other_and_nothing_else(name: str, ethanol: Atoms) -> None:
    potential, _ = limited(name, ethanol)
    references = potential.statistics.reference_energies
    shortest = potential.statistics.shortest_distances
    assert shortest is not None
    distances = np.geomspace(0.1, 5.0, 60)
    for first, second in ("HH", "CO", "OO"):
        answers = potential.predict([as_structure(Atoms(first + second, [[0, 0, 0], [r, 0, 0]])) for r in distances])
        energies = np.array([a["energy"] for a in answers]) - references[first] - references[second]
        assert np.all(np.diff(energies) <= 1e-9), first + second
        assert energies[0] > 50, first + second
        beyond = distances >= shortest.get("-".join(sorted(first + second, key=ELEMENTS.index)), 3.0)
        assert np.abs(energies[beyond]).max() < 1e-9
        forces = np.array([a["forces"] for a in answers])
        if name not in DIRECT:
            assert forces[:, 1, 0].min() >= -1e-9
        assert np.abs(forces[beyond]).max() < 1e-9


@pytest.mark.parametrize("name", often([n for n in GUARDED if n not in DIRECT], ["sound"]))
def test_forces_are_the_gradient_beyond_the_data(name: str, ethanol: Atoms) -> None:
    """A pair nearer than any, and atoms with few neighbours."""
    calc = Calculator(limited(name, ethanol)[0], way="plain", skin=0.0)
    close = ethanol.copy()
    close.positions[1] += 0.35 * (close.positions[0] - close.positions[1])
    few = Atoms("HOC", [[1.0, 0, 0], [0, 0, 0], [0.2, 2.6, 0.3]])
    for atoms in (close, few):
        atoms.calc = calc
        assert force_gradient_error(calc, atoms, step=1e-3, n_atoms=3) < 1e-6 * max(1.0, float(np.abs(atoms.get_forces()).max()))


@pytest.mark.parametrize("name", often(FEW, ["sound"]))
def test_an_atom_leaves_without_a_jump(name: str, ethanol: Atoms) -> None:
    potential, _ = limited(name, ethanol)

    def along(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        answers = potential.predict([as_structure(Atoms("HCO", [[-0.3, 1.0, 0], [0, 0, 0], [r, 0, 0]])) for r in x])
        return np.array([a["energy"] for a in answers]), -np.array([a["forces"][2, 0] for a in answers])

    places = np.linspace(0.9, 4.4, 351)
    assert float(np.abs(np.diff(along(places)[1])).max()) < 30.0
    for order in (-1, 0, 1):
        assert refined_jump(along, places, order)[0] < 5e-2, order


@pytest.mark.parametrize("name", often(FEW, ["sound"]))
def test_all_ways_agree_beyond_the_data(name: str, ethanol: Atoms, kernels: Path) -> None:
    """Kernels, and what is traced for compilers, where every edge is computed."""
    potential, frames = limited(name, ethanol)
    close = ethanol.copy()
    close.positions[1] += 0.35 * (close.positions[0] - close.positions[1])
    graph = potential.collate(
        [as_structure(close), frames[0], as_structure(Atoms("CO", [[0, 0, 0], [0.8, 0, 0]])), as_structure(Atoms("H"))]
    )
    plain = potential(graph, stress=False)
    quick = Engine(potential, "kernels")(graph, stress=False)
    potential.fixed_sizes = True
    traced = potential(graph)
    assert plain.forces is not None
    scale = float(plain.forces.abs().max())
    assert scale > 10
    for other, tolerance in ((quick, 1e-7), (traced, 1e-12)):
        assert other.forces is not None
        assert float((other.energy - plain.energy).abs().max()) < tolerance * scale
        assert float((other.forces - plain.forces).abs().max()) < tolerance * scale


# --- training and files -----------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_training_is_as_before_and_the_file_keeps_the_limits(tmp_path: Path) -> None:
    results = {}
    for radius in ("data", 0.8):
        out = tmp_path / str(radius)
        settings = {
            "data": {"train": ETHANOL, "valid_size": 10, "train_size": 30},
            "model": {"name": "leignn", "num_features": 8, "num_layers": 2, "cutoff": 4.0}, "potential": {"zbl_radius": radius},
            "training": {"steps": 6, "batch_size": 8, "valid_every": 3}, "out": str(out),
        }  # fmt: skip
        train(settings, progress=False)
        results[radius] = load_file(out / "checkpoint.safetensors")
    assert all(torch.equal(value, results[0.8][name]) for name, value in results["data"].items())
    guarded, plain = (load(tmp_path / name / "potential.safetensors") for name in ("data", "0.8"))
    assert guarded.limits is not None
    assert plain.limits is None
    assert plain.statistics.shortest_distances is None
    train_set, _, _ = load_data(make_config(settings).data)
    assert limits_of(guarded, train_set) == (guarded.statistics.shortest_distances, guarded.statistics.fewest_neighbors)


@pytest.mark.parametrize("pair_cutoffs", [None, {"Cs": 2.0}])
@pytest.mark.parametrize("radius", ["data", 0.8, 2.0, "cutoff"])
@pytest.mark.parametrize("limited", [True, False])
def test_nothing_jumps_where_the_neighbours_end(radius: str | float, pair_cutoffs: dict | None, limited: bool) -> None:
    """Two atoms whose bond is longer than the cutoff."""
    potential = make_potential(["Cs", "Br"], name="nequip", cutoff=3.0, pair_cutoffs=pair_cutoffs)
    statistics = replace(potential.statistics, shortest_distances={"Cs-Br": 2.8}, fewest_neighbors={"Cs": 0.1, "Br": 0.1})
    potential = Potential(
        potential.model_config, statistics if limited else potential.statistics, PotentialConfig(zbl_radius=radius)  # type: ignore[arg-type]
    ).eval()  # fmt: skip
    potential.network.double()
    for end in (2.0, 3.0):
        inside, beyond = potential.predict([Atoms("Cs2", [[0, 0, 0], [end + side, 0, 0]]) for side in (-1e-7, 1e-7)])
        assert inside["energy"] == pytest.approx(beyond["energy"], abs=1e-5)
        np.testing.assert_allclose(inside["forces"], beyond["forces"], atol=1e-4)


def test_files_from_before_have_no_limits(tmp_path: Path) -> None:
    """Their settings say 0.8, or nothing, and their statistics nothing."""
    potential = make_potential(ELEMENTS)
    assert potential.potential_config.zbl_radius == "data"
    assert potential.limits is None
    named = Potential(potential.model_config, potential.statistics, PotentialConfig(zbl_radius=0.8)).eval()
    named.network.double().load_state_dict(potential.network.state_dict())
    pair = Atoms("CO", [[0, 0, 0], [0.5, 0, 0]])
    assert potential.predict(pair)[0]["energy"] == named.predict(pair)[0]["energy"]
    save(potential, tmp_path / "p.safetensors")
    assert load(tmp_path / "p.safetensors").limits is None
