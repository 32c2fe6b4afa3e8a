"""Checks of the judge on few atoms: smoothness and the curves of two."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.morse import MorsePotential
from broken_calculators import Defect, by_name, candidate_of, copper
from conftest import make_potential, shared_data

from gossamer.checks import (
    diatomics,
    smoothness,
)
from gossamer.checks.candidate import bond_length
from gossamer.checks.source import SavedPotential
from gossamer.potential import PotentialConfig, make_zbl
from gossamer.potential_file import save
from gossamer.simulation.calculator import Calculator

# --- smoothness -----------------------------------------------------------------------------------------------------


def test_jumps_are_measured_not_curvature() -> None:
    x = np.linspace(0, 1, 201)
    smooth = np.sin(9 * x)
    for order, size in ((0, 0.01), (1, 0.3), (2, 8.0)):
        kinked = smooth + size * np.where(x > 0.5025, (x - 0.5025) ** order / (1, 1, 2)[order], 0)
        jump, place = smoothness.largest_jump(kinked, x[1], order)
        assert jump == pytest.approx(size, rel=0.25)
        assert x[place] == pytest.approx(0.5, abs=0.03)
        assert smoothness.largest_jump(smooth, x[1], order)[0] < 0.02 * size


@pytest.mark.parametrize("atoms", [bulk("Cu"), Atoms("Cu")])
def test_lines_through_one_atom(atoms: Atoms, tmp_path: Path) -> None:
    """Moving it moves all there is: what rounding leaves of the energy has no minima."""

    def round_off(atoms: Atoms, r: dict[str, Any]) -> None:
        r["energy"] += 1e-9 * np.sin(1e9 * atoms.positions.sum())

    result = smoothness.check(candidate_of(lambda: Defect(EMT(), round_off), tmp_path, structures=[atoms]))
    assert by_name(result, "tortuosity along a line").status == ("passed" if atoms.pbc.all() else "skipped")


def test_a_kink_at_the_cutoff_fails(tmp_path: Path) -> None:
    cut = lambda: MorsePotential(epsilon=0.34, r0=2.5, rho0=4.0, rcut1=1.9999999, rcut2=2.0)  # noqa: E731
    result = smoothness.check(candidate_of(cut, tmp_path))
    assert result.status == "failed"
    assert by_name(result, "jump of the energy as an atom leaves").status in ("weak", "failed")
    place = by_name(result, "distance of the largest jump").value
    assert min(abs(place - 5.0), abs(place - 3.62)) < 0.1  # where it is 5 Å from the second atom, or from the first


@pytest.mark.parametrize(("width", "status"), [(7e-4, "passed"), (1e-6, "failed")])
def test_a_steep_force_along_a_line_is_no_jump(tmp_path: Path, width: float, status: str) -> None:
    """Samples of 0.005 Å cannot tell the two, closer ones can: a LEIGNN on water was weak for a force that changes within 0.03 Å."""
    start = bulk("Cu", cubic=True)

    def step(atoms: Atoms, r: dict[str, Any]) -> None:
        if len(atoms) == len(start):
            u = (atoms.positions[0, 0] - start.positions[0, 0]) / width
            r["energy"] += width * (np.logaddexp(u, -u) - np.log(2))
            r["forces"][0, 0] -= np.tanh(u)

    candidate = candidate_of(lambda: Defect(EMT(), step), tmp_path)
    assert by_name(smoothness.check(candidate), "jump of the force within 0.01 Å").status == status


def test_two_atoms_without_any_force_at_the_cutoff_have_no_power_there(tmp_path: Path) -> None:
    """Such are potentials whose energy fades where two atoms are alone: nothing was measured, so nothing passes."""
    silent = lambda: MorsePotential(epsilon=0.34, r0=2.5, rho0=4.0, rcut1=1.2, rcut2=1.3)  # noqa: E731
    power = by_name(smoothness.check(replace(candidate_of(silent, tmp_path), cutoff=4.0)), "power with which")
    assert (power.status, power.value) == ("skipped", None)
    assert "do not feel each other" in power.reason


def test_noise_has_its_size() -> None:
    rng = np.random.default_rng(0)
    noisy = Defect(EMT(), lambda atoms, r: r["forces"].__iadd__(rng.normal(scale=0.003, size=r["forces"].shape)))
    assert smoothness.force_noise(noisy, copper(), points=17) == pytest.approx(0.003, rel=0.25)
    assert smoothness.force_noise(EMT(), copper()) < 1e-7
    assert smoothness.tortuosity(np.array([1.0, 0, 1])) == 1
    assert smoothness.tortuosity(np.array([1.0, 0, 0.5, 0, 1])) == 1.5


def test_potentials_of_ours_leave_a_pair_in_double(tmp_path: Path) -> None:
    """Whether the function jumps is not a question to the rounding of float32; anyone's calculator is taken as it is."""
    save(make_potential(["Si"], dtype=torch.float32), tmp_path / "single.safetensors")
    candidate = replace(candidate_of(EMT, tmp_path), make=SavedPotential(str(tmp_path / "single.safetensors")), ours=True)
    assert (candidate.calculator.potential.dtype, candidate.exact().potential.dtype) == (torch.float32, torch.float64)
    anyone = candidate_of(EMT, tmp_path)
    assert anyone.exact() is anyone.calculator


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_precision_of_a_network_shows_through_a_pair_curve(dtype: str) -> None:
    """A smooth pair curve in float64 on top of a network in float32 was taken for float64, and rounding for a jump."""
    potential = make_potential(["Si"], dtype=getattr(torch, dtype), name="nequip")
    potential.zbl = make_zbl(PotentialConfig(zbl_radius="cutoff"), potential.cutoff)
    start = Atoms("Si3", [[-0.7, 2.0, 0], [0, 0, 0], [1.0, 0, 0]])
    assert smoothness._is_double(Calculator(potential), start) is (dtype == "float64")


# --- diatomics ------------------------------------------------------------------------------------------------------


def test_dimer_numbers_of_a_known_curve() -> None:
    r = np.geomspace(0.3, 6, 200)
    inside = 4 * (r**-12 - r**-6)
    forces = 4 * (12 * r**-13 - 6 * r**-7)
    m = diatomics.curve_metrics(r, inside, forces, 1.1)
    assert m["tortuosity"] == pytest.approx(1)
    assert (m["hole"], m["energy_flips"], m["force_flips"]) == (0, 1, 1)
    assert m["well_distance"] == pytest.approx(2 ** (1 / 6), abs=0.02)
    assert m["well_depth"] == pytest.approx(1, abs=0.01)
    holed = inside - 3e5 * np.exp(-(((r - 0.4) / 0.03) ** 2))
    assert diatomics.curve_metrics(r, holed, forces, 1.1)["hole"] > 100


@pytest.mark.parametrize(("depth", "place", "hole"), [(2.0, 0.64, False), (20.0, 0.64, True), (2.0, 0.5, True)])
def test_a_multiple_bond_is_no_hole(depth: float, place: float, hole: bool) -> None:
    """W2, Mo2 and V2 are bound at 0.6 to 0.65 sums of covalent radii, which their exact curves were failed for."""
    r = np.geomspace(0.1, 6, 119)
    swing = np.exp(-2.0 * (r - place * 3.24))
    energies = depth * (swing**2 - 2 * swing)
    assert (diatomics.curve_metrics(r, energies, -np.gradient(energies, r), 3.24)["hole"] > 0.05) is hole


def test_curves_of_dft_have_no_holes() -> None:
    for pair, (r, energies) in diatomics.read_reference(shared_data("diatomics", "diatomics_dft_pbe_r2scan.json.gz")).items():
        element = pair.split("-")[0]
        if element in {"H", "C", "N", "O", "F", "Ti", "V", "Cr", "Fe", "Nb", "Mo", "Ta", "W", "U"}:  # others jump between spins
            metrics = diatomics.curve_metrics(r, energies, -np.gradient(energies, r), bond_length(element, element))
            assert metrics["hole"] < 0.05, pair


def test_hole_at_short_range_fails(tmp_path: Path) -> None:
    def hole(atoms: Atoms, r: dict[str, Any]) -> None:
        if len(atoms) == 2:
            d = np.linalg.norm(atoms.positions[1] - atoms.positions[0])
            r["energy"] -= 80 * np.exp(-(((d - 0.8) / 0.2) ** 2))

    result = diatomics.check(candidate_of(lambda: Defect(EMT(), hole), tmp_path))
    assert result.status == "failed"
    assert "hole" in result.reason
    assert "Cu-Cu" in result.reason
    assert diatomics.check(candidate_of(EMT, tmp_path, ("Cu", "Al"), all_pairs=True)).notes[0].startswith("3 pairs")


def test_distances_without_an_answer_are_gaps(tmp_path: Path) -> None:
    def refuse(atoms: Atoms, r: dict[str, Any]) -> None:
        if len(atoms) == 2 and atoms.get_distance(0, 1) > 5:
            raise RuntimeError("too far")

    result = diatomics.check(candidate_of(lambda: Defect(EMT(), refuse), tmp_path))
    assert result.status == "weak"
    assert by_name(result, "distances without an answer").value == pytest.approx(5.0)
    drawn = np.array(result.panels[0].curves[0].y)
    assert np.isnan(drawn[-2:]).all()
    assert np.isfinite(drawn[:-2]).all()


def test_dimers_beside_a_reference(tmp_path: Path) -> None:
    file = tmp_path / "curves.json"
    r = np.geomspace(0.1, 6, 40)
    e, _ = diatomics.dimer_curve(EMT(), "Cu", "Cu", r)
    file.write_text(json.dumps({"PBE": {"Cu-Cu": {"distances": list(r), "energies": list(e + 3)}}}))
    result = diatomics.check(candidate_of(EMT, tmp_path, diatomics_reference=str(file)))
    assert by_name(result, "error against the reference").value == pytest.approx(0, abs=1e-9)
    assert any(c.reference for c in result.panels[0].curves)
    file.write_text("{}")
    with pytest.raises(ValueError, match="not a file of dimer curves"):
        diatomics.read_reference(file)


@pytest.mark.reference
def test_reference_curves_of_the_field_are_read() -> None:
    curves = diatomics.read_reference(shared_data("data", "diatomics", "diatomics_dft_pbe_r2scan.json.gz"))
    r, e = curves["N-N"]
    assert r[e.argmin()] == pytest.approx(1.11, abs=0.05)
