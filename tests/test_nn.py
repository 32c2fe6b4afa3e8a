"""Building blocks: values, derivatives, limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from conftest import make_potential, shared_data
from test_kernels import summed
from torch import Tensor

from gossamer.config import make_config
from gossamer.data.batch import collate
from gossamer.data.structure import Structure, as_structure
from gossamer.models import DataFacts, Geodite, GeoditeConfig, NequIP, NequIPConfig
from gossamer.models.leignn import mean_by_index
from gossamer.nn.coupling import Coupling, Irrep, blocks, paths_between
from gossamer.nn.filters import bessel_basis, gaussian_basis
from gossamer.nn.layers import Constant, cat, polynomial_envelope, split, sum_by_index
from gossamer.nn.products import Edges
from gossamer.nn.spherical import SphericalHarmonics, wigner_3j
from gossamer.nn.zbl import ZBL, zbl_energy


def test_envelope_values() -> None:
    x = torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=torch.float64)
    assert polynomial_envelope(x, 6).tolist() == pytest.approx([1, 0.85546875, 0, 0], abs=1e-15)  # value from the Geodite specification
    p = 5
    explicit = 1 - (p + 1) * (p + 2) / 2 * x**p + p * (p + 2) * x ** (p + 1) - p * (p + 1) / 2 * x ** (p + 2)
    assert torch.allclose(polynomial_envelope(x, p)[:3], explicit[:3], atol=1e-14)


@pytest.mark.parametrize("name", ["weft", "nequip"])
def test_gates_see_numbers_near_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of weights, which training changes at will: far from one a gate's SiLU has a kink instead of a bend."""
    potential = make_potential(["H", "C"], name=name, num_layers=3)
    seen: list[float] = []
    silu = torch.nn.functional.silu
    with torch.no_grad():
        for layer in potential.network.layers:
            for linear in [*layer.linear_out, *layer.linear_in]:
                linear.weight.mul_(30.0)

    def watched(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if x.dim() == 3:  # gates, not radial functions
            seen.append(float(x.detach().abs().max()))
        return silu(x, *arguments, **keywords)

    monkeypatch.setattr(torch.nn.functional, "silu", watched)
    potential(potential.collate([as_structure(molecule("C2H6"))]))
    assert len(seen) == 3
    assert max(seen[:-1]) < 20  # the last layer's energies are not normalised
    assert seen[-1] > 100


@pytest.mark.parametrize("k", [2, 3, 4])
def test_envelope_vanishes_with_k_derivatives(k: int) -> None:
    x = torch.tensor([1.0 - 1e-9], dtype=torch.float64, requires_grad=True)
    value = polynomial_envelope(x, 5, k).sum()
    for order in range(k + 1):
        assert abs(value.item()) < 1e-4, order
        (value,) = torch.autograd.grad(value, x, create_graph=True)
        value = value.sum()
    assert abs(value.item()) > 1.0  # the next derivative jumps


def test_bessel_basis_vanishes_at_the_cutoff() -> None:
    x = torch.tensor([0.25, 1.0], dtype=torch.float64)
    basis = bessel_basis(x, 4)
    assert basis[1].abs().max() < 1e-14
    assert float(basis[0, 0]) == pytest.approx(np.sqrt(2) * np.sin(np.pi / 4) / 0.25)


def test_gaussian_basis_peaks_at_its_centres() -> None:
    centres = torch.linspace(0, 1, 6, dtype=torch.float64)
    assert torch.allclose(gaussian_basis(centres, 6).diagonal(), torch.ones(6, dtype=torch.float64))


def test_sums_and_means_by_index() -> None:
    values = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    index = torch.tensor([2, 0, 2])
    assert sum_by_index(values, index, 4).tolist() == [[2, 3], [0, 0], [4, 6], [0, 0]]
    assert mean_by_index(values, index, 4).tolist() == [[2, 3], [0, 0], [2, 3], [0, 0]]


@pytest.mark.reference
def test_zbl_agrees_with_lammps() -> None:
    data = np.load(shared_data("data", "zbl", "zbl_pairs_lammps.npz"))
    assert data["columns"][:4].tolist() == ["r_A", "Zi", "Zj", "energy_eV"]
    rows = data["data"][data["data"][:, 0] < 2.0]
    r, zi, zj = (torch.from_numpy(np.ascontiguousarray(rows[:, k])).double() for k in range(3))
    ours = zbl_energy(r, zi, zj).numpy()
    assert np.abs(ours / rows[:, 3] - 1).max() < 5e-4  # the constants differ in their last digits
    assert len(rows) > 100


def test_zbl_ends_below_bond_length_and_counts_pairs_once() -> None:
    zbl = ZBL()
    carbon = torch.tensor([6, 6])
    near = torch.full((2,), 0.5, dtype=torch.float64)
    inside = zbl(carbon, carbon, near).sum()
    envelope = polynomial_envelope(near[:1] / (0.8 * 1.52), 5, 4)
    assert float(inside) == pytest.approx(float((zbl_energy(near, *[torch.full((2,), 6.0).double()] * 2)[:1] * envelope).sum()))
    assert float(zbl(carbon, carbon, torch.full((2,), 1.3, dtype=torch.float64)).sum()) == 0.0


@pytest.mark.parametrize(("radius", "cutoff"), [(0.8, 3.0), (2.0, 4.0), (10.0, 3.0), (None, 3.0)])
def test_zbl_reaches_no_farther_than_the_neighbours(radius: float | None, cutoff: float) -> None:
    """Four derivatives vanish where the list of neighbours ends, if no earlier; pairs that end before are as they were."""
    gold, hydrogen = torch.tensor([79]), torch.tensor([1])
    zbl, far = ZBL(radius, cutoff, shortest={"H-Au": 1.3}), ZBL(radius, 100.0, shortest={"H-Au": 1.3})
    near, end = (torch.tensor([x], dtype=torch.float64) for x in (1.2, cutoff - 1e-3))
    assert float(zbl(gold, gold, near)) > 0
    assert float(zbl(gold, gold, end)) < 1e-10
    if radius is not None:
        assert float(zbl(gold, hydrogen, near)) == float(far(gold, hydrogen, near)) > 0


# --- harmonics, 3j symbols, products ------------------------------------------------------------------------------


def random_rotation(seed: int) -> torch.Tensor:
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return torch.from_numpy(q if np.linalg.det(q) > 0 else -q)


def unit_vectors(n: int, seed: int = 0) -> torch.Tensor:
    v = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, 3)))
    return v / v.norm(dim=1, keepdim=True)


def harmonics(l_max: int, normalization: str = "norm") -> SphericalHarmonics:
    return SphericalHarmonics(l_max, normalization).double()


def representation(rotation: torch.Tensor, l: int) -> torch.Tensor:
    """D with Y_l(R u) = D Y_l(u), from values at many directions."""
    u = unit_vectors(60, seed=5)
    block = slice(l * l, (l + 1) ** 2)
    before, after = harmonics(l)(u)[:, block], harmonics(l)(u @ rotation.T)[:, block]
    return torch.linalg.lstsq(before, after).solution.T


def test_harmonics_are_those_written_down() -> None:
    """Geodite's specification: order and sign of e3nn, y the polar axis."""
    u = unit_vectors(20)
    x, y, z = u.unbind(1)
    s = 3**0.5
    expected = torch.stack(
        [torch.ones_like(x), x, y, z, s * x * z, s * x * y, y**2 - (x**2 + z**2) / 2, s * y * z, s / 2 * (z**2 - x**2)], 1
    )
    assert torch.allclose(harmonics(2)(u), expected, atol=1e-14)
    # l = 3, m = 0 and m = 3 along the same axes
    assert torch.allclose(harmonics(3)(u)[:, 12], (5 * y**3 - 3 * y) / 2, atol=1e-14)
    assert torch.allclose(harmonics(3)(u)[:, 15].abs(), ((5 / 8) ** 0.5 * (z**3 - 3 * z * x**2)).abs(), atol=1e-14)


@pytest.mark.parametrize("l", range(5))
def test_every_degree_has_constant_length_and_turns(l: int) -> None:
    """The published recursions of Geodite and GotenNet fail this from l = 3 on: lengths between 1.59 and 2.60."""
    u, block = unit_vectors(50), slice(l * l, (l + 1) ** 2)
    for normalization, length in (("norm", 1.0), ("component", (2 * l + 1) ** 0.5)):
        assert torch.allclose(harmonics(l, normalization)(u)[:, block].norm(dim=1), torch.full((50,), length).double(), atol=1e-13)
    d = representation(random_rotation(1), l)
    assert torch.allclose(d @ d.T, torch.eye(2 * l + 1).double(), atol=1e-12)
    assert torch.allclose(harmonics(l)(-u)[:, block], (-1) ** l * harmonics(l)(u)[:, block], atol=1e-13)


@pytest.mark.parametrize("degrees", [(1, 1, 0), (1, 1, 1), (1, 2, 3), (2, 2, 2), (2, 3, 1), (3, 3, 4), (4, 4, 4), (2, 1, 2)])
def test_3j_symbols_are_invariant(degrees: tuple[int, int, int]) -> None:
    """Their defining property: turned on all three sides, they stay the same."""
    symbols = torch.from_numpy(wigner_3j(*degrees))
    d1, d2, d3 = (representation(random_rotation(7), l) for l in degrees)
    assert torch.allclose(torch.einsum("abc,ia,jb,kc->ijk", symbols, d1, d2, d3), symbols, atol=1e-12)
    assert float(symbols.norm()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="do not couple"):
        wigner_3j(1, 1, 3)


def test_3j_symbols_have_the_signs_of_e3nn() -> None:
    data = np.load(Path(__file__).parent / "reference" / "nequip.npz")
    names = [k for k in data.files if k.startswith("wigner_3j/")]
    assert len(names) == 12
    for name in names:
        np.testing.assert_allclose(wigner_3j(*map(int, name[-3:])), data[name], atol=1e-14)


def test_products_turn_with_their_factors() -> None:
    irreps = [Irrep(3, 0, 1), Irrep(2, 1, -1), Irrep(2, 1, 1), Irrep(1, 2, 1)]
    wanted = [(0, 1), (0, -1), (1, -1), (1, 1), (2, 1), (2, -1)]
    coupling = Coupling(irreps, 2, paths_between(irreps, 2, wanted), torch.nn.Identity()).double()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, sum(i.width for i in irreps), generator=generator, dtype=torch.float64)
    weights = torch.randn(5, sum(coupling.convolution.channels), generator=generator, dtype=torch.float64)
    u, rotation = unit_vectors(5), random_rotation(3)

    def turned(blocks_: list[torch.Tensor], kinds: list[Irrep], inversion: bool) -> list[torch.Tensor]:
        return [
            torch.einsum("ab,nbu->nau", representation(rotation, i.l), b) * (i.p if inversion else 1)
            for b, i in zip(blocks_, kinds, strict=True)
        ]

    def product(x: torch.Tensor, directions: torch.Tensor) -> list[torch.Tensor]:
        index = torch.arange(5).repeat(2, 1)  # each atom its own neighbour
        edges = Edges(index, torch.ones(5), harmonics(2, "component")(directions), lambda: weights)
        found = coupling(x, edges)
        torch.testing.assert_close(found, summed(coupling.convolution, x, edges.harmonics, weights, index), rtol=0, atol=1e-12)
        return blocks(found, coupling.irreps_out)

    for inversion in (False, True):
        moved = torch.cat([b.flatten(1) for b in turned(list(blocks(features, irreps)), irreps, inversion)], dim=1)
        ours = product(moved, (-1 if inversion else 1) * u @ rotation.T)
        for a, b in zip(ours, turned(product(features, u), coupling.irreps_out, inversion), strict=True):
            assert torch.allclose(a, b, atol=1e-11)
    with pytest.raises(ValueError, match="No product"):
        paths_between([Irrep(1, 0, 1)], 1, [(1, 1)])


def test_derivatives_of_join_and_divide() -> None:
    """Values, first and second derivatives are those of cat and split."""
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def ours(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = split(cat([x, y], 1) ** 3, [3, 4], 1)
        return (a.sum() * b**2).sum()

    def plain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = (torch.cat([x, y], 1) ** 3).split([3, 4], 1)
        return (a.sum() * b**2).sum()

    assert torch.allclose(ours(x, y), plain(x, y))
    for f in (ours, plain):
        assert torch.autograd.gradcheck(f, (x, y))
        assert torch.autograd.gradgradcheck(f, (x, y))


def test_tables_stay_exact_through_changes_of_precision() -> None:
    table = Constant(np.array([1 / 3]))
    assert float(table.float().double()()) == 1 / 3
    assert table.float()().dtype == torch.float32


# --- numbers of the specifications --------------------------------------------------------------------------------


def test_published_numbers_of_geodite() -> None:
    config = GeoditeConfig(variant="published", num_features=192, num_layers=4, cutoff=6.0)
    network = Geodite(config, DataFacts(atomic_numbers=tuple(range(100))))
    assert sum(p.numel() for p in network.parameters()) == 3_623_112
    radial = network.radial.double()
    weight = radial.distance_weight(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    assert weight.tolist() == pytest.approx([0.00995106, 0.11520446, 0.32474384], abs=5e-9)
    length, carbon = torch.tensor([2.0], dtype=torch.float64), torch.tensor([6])
    factors = radial.distance_weight(length / (2 * 0.76)) * polynomial_envelope(length / 6.0, 6)
    assert float((radial(length, carbon, carbon)[0, 0] / factors).detach()) == pytest.approx(0.2499999, abs=5e-8)


@pytest.mark.parametrize(("preset", "total"), [("S", 616_352), ("M", 3_189_664), ("L", 6_836_128), ("XL", 32_136_288), ("MP-L", 9_605_777)])
def test_published_sizes_of_nequip(preset: str, total: int) -> None:
    config = make_config({"data": {"train": "x"}, "model": {"name": "nequip", "preset": preset}}).model
    network = NequIP(config, DataFacts(atomic_numbers=tuple(range(1, 90))))
    assert sum(p.numel() for p in network.parameters()) == total


def test_dead_weights_of_geodite_and_no_others() -> None:
    """Section 5 of its specification: the third of layer 1 that would read X = 0, and the last m2."""
    potential = make_potential(["C", "O"], name="geodite", zbl=False)
    atoms = Atoms("CO2C", positions=[[0, 0, 0], [1.2, 0.1, 0], [-1.1, 0.3, 0.2], [0.5, 1.4, 0.8]])
    structure = Structure(
        atomic_numbers=atoms.numbers.astype(np.int64), positions=atoms.positions, cell=np.zeros((3, 3)), pbc=np.zeros(3, bool)
    )
    potential.train()
    potential(potential.collate([structure])).energy.sum().backward()
    c = potential.model_config.num_features
    dead = {}
    for name, p in potential.network.named_parameters():
        rows = torch.zeros_like(p) if p.grad is None else p.grad
        dead[name] = rows.flatten(1).abs().sum(dim=1) == 0 if p.dim() > 1 else rows.abs() == 0
    for name in ("layers.0.W_s2.weight", "layers.0.W_v2.weight", "layers.0.W_rs.weight"):
        assert dead.pop(name).tolist() == [False] * 2 * c + [True] * c
    assert dead.pop("layers.1.W_m2.weight").tolist() == [False] * c + [True] * c
    assert all(dead.pop(f"layers.0.gamma.{l}").all() for l in (1, 2))
    assert not any(v.any() for v in dead.values()), [k for k, v in dead.items() if v.any()]


def test_sound_nequip_starts_with_unit_variance() -> None:
    """Second moments of every degree stay near one through the layers; the package's fall by orders of magnitude."""
    rng = np.random.default_rng(0)
    positions = []
    while len(positions) < 60:  # a dense liquid without overlaps
        p = rng.uniform(0, 11, 3)
        if all(np.linalg.norm((p - q + 5.5) % 11 - 5.5) > 1.8 for q in positions):
            positions.append(p)
    structure = Structure(atomic_numbers=rng.choice([14, 32], 60), positions=np.array(positions), cell=11 * np.eye(3), pbc=np.ones(3, bool))
    graph = collate([structure], 5.0)
    moments: dict[str, list[float]] = {}
    for variant in ("sound", "published"):
        torch.manual_seed(0)
        config = NequIPConfig(variant=variant, l_max=2, num_layers=3)
        network = NequIP(config, DataFacts(atomic_numbers=(14, 32), mean_neighbors=graph.n_edges / 60))
        seen = moments.setdefault(variant, [])
        for layer in network.layers:
            layer.register_forward_hook(
                lambda m, _, out, seen=seen: seen.extend(float((b.detach() ** 2).mean()) for b in blocks(out, m.irreps_out))
            )
        species = (graph.atomic_numbers == 32).long()
        network(species, graph.edge_index, graph.edge_vectors().float(), graph.graph_index, 1)
    assert all(0.2 < m < 5 for m in moments["sound"]), moments["sound"]
    assert min(moments["published"]) < 1e-3
