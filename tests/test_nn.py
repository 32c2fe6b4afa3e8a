"""Building blocks: values, derivatives, limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import shared_data

from gossamer.nn.layers import mean_by_index, sum_by_index
from gossamer.nn.radial import bessel_basis, gaussian_basis, polynomial_envelope
from gossamer.nn.zbl import ZBL, zbl_energy


def test_envelope_values() -> None:
    x = torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=torch.float64)
    assert polynomial_envelope(x, 6).tolist() == pytest.approx([1, 0.85546875, 0, 0], abs=1e-15)  # value from the Geodite specification
    p = 5
    explicit = 1 - (p + 1) * (p + 2) / 2 * x**p + p * (p + 2) * x ** (p + 1) - p * (p + 1) / 2 * x ** (p + 2)
    assert torch.allclose(polynomial_envelope(x, p)[:3], explicit[:3], atol=1e-14)


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
    numbers, edges = torch.tensor([6, 6]), torch.tensor([[0, 1], [1, 0]])
    near = torch.full((2,), 0.5, dtype=torch.float64)
    inside = zbl(numbers, edges, near).sum()
    envelope = polynomial_envelope(near[:1] / (0.8 * 1.52), 5, 4)
    assert float(inside) == pytest.approx(float((zbl_energy(near, *[torch.full((2,), 6.0).double()] * 2)[:1] * envelope).sum()))
    assert float(zbl(numbers, edges, torch.full((2,), 1.3, dtype=torch.float64)).sum()) == 0.0
