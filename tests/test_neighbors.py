"""Neighbour lists against the definition and against ASE, on awkward cells and seeded random ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list as ase_neighbor_list

from gossamer.neighbors import complete_cell, neighbor_list, neighbor_list_reference
from gossamer.simulation import verlet as verlet_lists
from gossamer.simulation.verlet import DeviceVerletList, VerletList, device_neighbor_list

TRICLINIC = np.array([[4.0, 0.0, 0.0], [1.5, 3.5, 0.0], [-1.0, 0.7, 3.2]])
AWKWARD = {
    "one atom, cell smaller than the cutoff": (np.zeros((1, 3)), bulk("Cu").cell.array, (1, 1, 1), 5.0),
    "triclinic": (np.random.default_rng(0).uniform(0, 4, (6, 3)), TRICLINIC, (1, 1, 1), 4.5),
    "left-handed": (np.random.default_rng(1).uniform(0, 4, (6, 3)), TRICLINIC[[1, 0, 2]], (1, 1, 1), 4.5),
    "negative volume by a mirrored vector": (np.random.default_rng(2).uniform(0, 4, (5, 3)), TRICLINIC * [[-1], [1], [1]], (1, 1, 1), 4.3),
    "very flat": (np.random.default_rng(3).uniform(0, 4, (4, 3)), np.array([[4, 0, 0], [3.6, 0.9, 0], [0, 0, 4.0]]), (1, 1, 1), 4.3),
    "slab": (np.random.default_rng(4).uniform(0, 5, (7, 3)), np.diag([4.0, 4.0, 15.0]), (1, 1, 0), 4.3),
    "slab without a third vector": (np.random.default_rng(5).uniform(0, 5, (7, 3)), np.diag([4.0, 4.0, 0.0]), (1, 1, 0), 4.3),
    "rotated, partly periodic": (
        np.random.default_rng(6).uniform(-3, 3, (8, 3)), np.linalg.qr(np.random.default_rng(7).normal(size=(3, 3)))[0] * 5, (1, 0, 1), 4.0),
    "wire": (np.random.default_rng(8).uniform(0, 4, (5, 3)), np.diag([0.0, 3.0, 0.0]), (0, 1, 0), 5.0),
    "molecule without a cell": (np.random.default_rng(9).uniform(0, 4, (9, 3)), np.zeros((3, 3)), (0, 0, 0), 3.0),
    "molecule with a cell": (np.random.default_rng(10).uniform(-9, 9, (9, 3)), np.eye(3) * 5, (0, 0, 0), 6.0),
    "atoms far outside the cell": (np.random.default_rng(11).uniform(-40, 40, (6, 3)), TRICLINIC, (1, 1, 1), 4.0),
    "no pairs": (np.array([[0.0, 0, 0], [9.0, 0, 0]]), np.zeros((3, 3)), (0, 0, 0), 3.0),
}  # fmt: skip


def assert_equal_edges(a, b) -> None:
    np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_array_equal(a[1], b[1])


@pytest.mark.parametrize("case", AWKWARD)
def test_awkward_cells(case: str) -> None:
    positions, cell, pbc, cutoff = AWKWARD[case]
    pbc = np.array(pbc, dtype=bool)
    found = neighbor_list(positions, cell, pbc, cutoff)
    assert_equal_edges(found, neighbor_list_reference(positions, cell, pbc, cutoff))
    edges, device_shifts = device_neighbor_list(positions, cell, pbc, cutoff, torch.device("cpu"))
    assert_equal_edges(found, (edges.numpy(), device_shifts.numpy().astype(np.int64)))
    # ASE wants full cells; it returns i = centre, j = neighbour, S
    atoms = Atoms("H" * len(positions), positions, cell=complete_cell(positions, cell, pbc, cutoff), pbc=pbc)
    i, j, shifts, vectors = ase_neighbor_list("ijSD", atoms, cutoff)
    order = np.lexsort((*shifts.T[::-1], j, i))
    assert_equal_edges(found, (np.stack([j[order], i[order]]), shifts[order]))
    (sender, receiver), s = found
    np.testing.assert_allclose(positions[sender] + s @ atoms.cell.array - positions[receiver], vectors[order], atol=1e-10)


FAR = {
    "flat and wide": (np.array([[0.0, 0, 0], [2e3, 0, 0], [2e3, 2e3, 0], [2e3, 1998.0, 0], [1.0, 0, 0]]), np.zeros((3, 3)), (0, 0, 0)),
    "a chain along a diagonal": (np.arange(600)[:, None] * np.array([3.4, 3.4, 0.0]), np.zeros((3, 3)), (0, 0, 0)),
    "a pair on a wire": (np.array([[0.0, 0, 0], [9.0, 0, 6e5], [9, 1, 6e5 - 3]]), np.diag([0, 12.0, 0]), (0, 1, 0)),
    "one atom far from a slab": (np.array([[0.0, 0, 0], [11.0, 1, 1], [3, 3, 1e5]]), np.diag([12.0, 12, 20]), (1, 1, 0)),
    "wide slab": (np.array([[0.0, 0, 0], [2499.0, 0, 1], [700, 700, 0], [701, 700, 0]]), np.diag([2500.0, 2500, 0]), (1, 1, 0)),
}  # fmt: skip


@pytest.mark.parametrize("case", FAR)
def test_atoms_far_apart(case: str) -> None:
    """vesin alone ends the process where space along one axis is thousands of times another's, and takes a minute before that."""
    positions, cell, pbc = FAR[case]
    pbc = np.array(pbc, dtype=bool)
    found = neighbor_list(positions, cell, pbc, 5.0)
    (sender, receiver), shifts = found
    lengths = np.linalg.norm(positions[sender] + shifts @ cell - positions[receiver], axis=1)
    assert (lengths < 5).all()
    if len(positions) > 100:
        assert len(sender) == 2 * (len(positions) - 1)
    else:
        assert_equal_edges(found, neighbor_list_reference(positions, cell, pbc, 5.0))
    edges, device_shifts = device_neighbor_list(positions, cell, pbc, 5.0, torch.device("cpu"))
    assert_equal_edges(found, (edges.numpy(), device_shifts.numpy().astype(np.int64)))


def test_a_periodic_cell_too_long_to_be_divided() -> None:
    with pytest.raises(ValueError, match=r"too flat or too long for a list of neighbours within 5.0 Å: its heights are 12, 12, 1e\+07 Å"):
        neighbor_list(np.zeros((1, 3)), np.diag([12.0, 12.0, 1e7]), np.ones(3, dtype=bool), 5.0)


@pytest.mark.parametrize("seed", range(40))
def test_random_cells(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cell = rng.normal(size=(3, 3)) + np.diag(rng.uniform(2.5, 6, 3)) * rng.choice([-1, 1])
    pbc = rng.random(3) < 0.6
    positions = rng.uniform(-1.5, 2.5, (rng.integers(1, 12), 3)) @ cell
    cutoff = rng.uniform(1, 5)
    assert_equal_edges(neighbor_list(positions, cell, pbc, cutoff), neighbor_list_reference(positions, cell, pbc, cutoff))


def test_cap_keeps_the_nearest() -> None:
    rng = np.random.default_rng(0)
    positions, cell, pbc = rng.uniform(0, 6, (20, 3)), np.eye(3) * 6, np.ones(3, dtype=bool)
    (sender, receiver), shifts = neighbor_list(positions, cell, pbc, 5.0, max_neighbors=4)
    full_edges, full_shifts = neighbor_list(positions, cell, pbc, 5.0)
    assert np.bincount(receiver).tolist() == [4] * 20
    for atom in range(20):
        kept = np.linalg.norm(positions[sender] + shifts @ cell - positions[receiver], axis=1)[receiver == atom]
        every = np.linalg.norm(positions[full_edges[0]] + full_shifts @ cell - positions[full_edges[1]], axis=1)[full_edges[1] == atom]
        np.testing.assert_allclose(np.sort(kept), np.sort(every)[:4])


@pytest.mark.parametrize("wrap", [False, True])
def test_verlet_list_equals_a_fresh_one(wrap: bool) -> None:
    """Through a random walk, wrapped or not, the skinned list hands out exactly the edges of a fresh list."""
    rng = np.random.default_rng(1)
    atoms = bulk("SiC", "zincblende", a=4.36, cubic=True).repeat((2, 1, 1))
    verlet = VerletList(cutoff=4.0, skin=0.6)
    for step in range(60):
        atoms.positions += rng.normal(scale=0.03, size=atoms.positions.shape) + 0.02
        if wrap:
            atoms.wrap()
        if step == 40:
            atoms.set_cell(atoms.cell * 1.01, scale_atoms=True)
        assert_equal_edges(
            verlet(atoms.positions, atoms.cell.array, atoms.pbc), neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, 4.0)
        )
    assert 1 < verlet.builds < 60


def test_verlet_list_follows_the_cell() -> None:
    """A cell that breathes and shears a little, as under a barostat, costs no new list; a large change does."""
    rng = np.random.default_rng(2)
    atoms = bulk("SiC", "zincblende", a=4.36, cubic=True).repeat((2, 1, 1))
    atoms.rattle(0.1, seed=1)
    start, verlet, builds = atoms.cell.array.copy(), VerletList(cutoff=4.0, skin=0.6), []
    for size in (0.0, 0.005, 0.02, 0.05, 0.05, 0.1, 0.3):
        for _ in range(4):
            atoms.set_cell(start @ (np.eye(3) + size * rng.uniform(-1, 1, (3, 3))), scale_atoms=True)
            atoms.positions += rng.normal(scale=0.005, size=atoms.positions.shape)
            arguments = atoms.positions, atoms.cell.array, atoms.pbc
            assert_equal_edges(verlet(*arguments), neighbor_list(*arguments, 4.0))
        builds.append(verlet.builds)
    assert builds[1] == 1
    assert builds[-1] > builds[-2] > 1


def test_verlet_list_survives_an_error() -> None:
    """What could not be built is not taken for built."""
    verlet, cell = VerletList(cutoff=3.0, skin=1.0), np.diag([4.0, 4.0, 4.0])
    positions, everywhere = np.zeros((1, 3)), np.ones(3, dtype=bool)
    verlet(positions, cell, everywhere)
    for _ in range(2):
        with pytest.raises(ValueError, match="linearly dependent"):
            verlet(positions, np.diag([4.0, 4.0, 0.0]), everywhere)


@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True), (False, False, False)])
def test_lists_on_a_device(pbc: tuple[bool, bool, bool], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for GPUs, on the CPU's device: a walk with a moving cell, and where vesin cannot build there."""
    rng, device = np.random.default_rng(3), torch.device("cpu")
    atoms = bulk("SiC", "zincblende", a=4.36).repeat((3, 2, 1))
    atoms.pbc = pbc
    on_device = DeviceVerletList(4.0, 0.5, device)
    for step in range(30):
        atoms.positions += rng.normal(scale=0.03, size=atoms.positions.shape) + 0.1
        if step % 10 == 0:
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.01 * rng.normal(size=(3, 3))), scale_atoms=True)
        arguments = atoms.positions, atoms.cell.array, atoms.pbc
        fresh = neighbor_list(*arguments, 4.0)
        there = tuple(torch.from_numpy(a.copy()) for a in arguments[:2])
        found = on_device.on_device(*arguments, *there)
        assert_equal_edges((found[0].numpy(), found[1].numpy().astype(np.int64)), fresh)
        direct = device_neighbor_list(*arguments, 4.0, device)
        assert_equal_edges((direct[0].numpy(), direct[1].numpy().astype(np.int64)), fresh)
    assert 1 < on_device.builds < 30
    with pytest.raises(RuntimeError, match="does not build"):
        device_neighbor_list(*arguments, 4.0, torch.device("meta"))

    def fails(*_: object) -> None:
        raise RuntimeError("no libcuda")

    monkeypatch.setattr(verlet_lists, "device_neighbor_list", fails)
    other = DeviceVerletList(4.0, 0.0, device)
    for _ in range(2):
        found = other.on_device(*arguments, *there)
    assert_equal_edges((found[0].numpy(), found[1].numpy().astype(np.int64)), fresh)
    assert caplog.text.count("neighbour lists are built on the CPU: no libcuda") == 1


def test_verlet_list_notices_other_atoms_and_periodicity() -> None:
    verlet = VerletList(cutoff=3.0, skin=1.0)
    atoms = bulk("Cu", cubic=True)
    verlet(atoms.positions, atoms.cell.array, atoms.pbc)
    for other in (atoms.repeat((2, 1, 1)), atoms):
        other.pbc = [True, False, True]
        assert_equal_edges(
            verlet(other.positions, other.cell.array, other.pbc), neighbor_list(other.positions, other.cell.array, other.pbc, 3.0)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(cutoff=0.0), "cutoff must be positive, found 0.0"),
        (dict(positions=np.array([[0, 0, np.nan]])), "atom 0 is not finite"),
        (dict(cell=np.diag([3.0, 3.0, 0.0])), "zero or linearly dependent"),
        (dict(cell=np.full((3, 3), np.inf)), "cell holds values that are not finite"),
        (dict(cell=np.eye(3) * 0.01), "each atom 1.1e\\+08 neighbours within 3.0 Å"),
        (dict(cell=np.diag([0.001, 0.001, 9.0]), pbc=np.array([True, True, False])), "It is too small"),
        (dict(positions=np.array([[0, 0, 1e12]])), "Positions reach 1.0e\\+12 Å"),
        (dict(cell=np.eye(3) * 1e9), "Cell vectors reach 1.0e\\+09 Å"),
    ],
)
def test_what_cannot_be_mended(change: dict, message: str) -> None:
    arguments = {"positions": np.zeros((1, 3)), "cell": np.eye(3) * 3, "pbc": np.ones(3, dtype=bool), "cutoff": 3.0, **change}
    with pytest.raises(ValueError, match=message):
        neighbor_list(**arguments)
