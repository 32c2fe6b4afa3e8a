"""`gossamer parity`: every way of running beside the plain network in float64, and what it says when one differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from conftest import KERNELS, make_potential
from test_kernels import needs_compiler
from test_lammps import needs_lammps

import gossamer
from gossamer import ways as module
from gossamer.cli import main
from gossamer.data.structure import as_structure
from gossamer.potential_file import save


@pytest.fixture
def model(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A small potential (PaiNN, or what the test asks for), its stored structures, and a file of others."""
    frames = [bulk("Si", cubic=True), molecule("CH3CH2OH")]
    for k, atoms in enumerate(frames):
        atoms.rattle(0.1, seed=k)
    potential = make_potential(["H", "C", "O", "Si"], dtype=torch.float32, **getattr(request, "param", {"name": "painn"}))
    save(potential, tmp_path / "p.safetensors", check=[as_structure(a) for a in frames])
    ase.io.write(tmp_path / "crystals.extxyz", [frames[0].repeat((k, 1, 1)) for k in (1, 2, 3)])
    return tmp_path / "p.safetensors"


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchSim's imports
def test_all_ways_say_the_same(model: Path, kernels: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asked = [
        "plain",
        "kernels",
        "batch",
        *(["torchsim"] if find_spec("torch_sim") else []),
        *(["openmm"] if find_spec("openmmml") else []),
        *(["ipi"] if find_spec("ipi") else []),
    ]
    assert main(["parity", str(model), "--ways", *asked, "--out", str(tmp_path / "parity.json")]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()] == ["way", *asked]
    told = json.loads((tmp_path / "parity.json").read_text())
    assert (told["structures"], told["tolerance"]) == (2, 1e-4)
    for row in told["ways"]:
        assert row["agrees"]
        assert 0 < row["forces_eV_per_A"] < 1e-4  # float32 beside float64: not nothing
        assert row["stress_GPa"] is None if row["way"] == "openmm" else row["stress_GPa"] > 0
    rows = gossamer.parity(model, [tmp_path / "crystals.extxyz"], ways=["kernels"], count=2, dtype="float64")
    assert rows[0]["relative"] < 1e-7


def test_a_way_that_differs_is_told(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    right = module._ase("plain")

    def wrong(potential, frames, work):
        run = right(potential, frames, work)
        return lambda: [{**a, "stress": None if a["stress"] is None else -a["stress"]} for a in run()]

    def broken(potential, frames, work):
        return lambda: [{**a, "forces": np.full_like(a["forces"], np.nan)} for a in right(potential, frames, work)()]

    def lost(potential, frames, work):
        return lambda: [{**a, "energy": float("nan")} for a in right(potential, frames, work)()]

    monkeypatch.setitem(module.WAYS, "kernels", wrong)
    monkeypatch.setitem(module.WAYS, "batch", broken)
    monkeypatch.setitem(module.WAYS, "torchsim", lost)
    assert main(["parity", str(model), "--ways", "plain", "kernels", "batch", "torchsim"]) == 1
    plain, *others = capsys.readouterr().out.splitlines()[1:]
    assert not plain.endswith("DIFFERS")
    assert len(others) == 3
    assert all(line.endswith("DIFFERS") for line in others)


def test_stress_without_forces_is_measured_by_itself(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A squeezed crystal, whose forces vanish by symmetry: a hundred-thousandth of its stress is what float32 leaves, a thousandth is not."""
    ase.io.write(tmp_path / "squeezed.extxyz", bulk("Si", a=4.0))
    right = module._ase("plain")

    def off(by: float):
        def way(potential, frames, work):
            return lambda: [{**a, "stress": (1 + by) * a["stress"]} for a in right(potential, frames, work)()]

        return way

    monkeypatch.setitem(module.WAYS, "kernels", off(1e-5))
    monkeypatch.setitem(module.WAYS, "batch", off(1e-3))
    rows = gossamer.parity(model, [tmp_path / "squeezed.extxyz"], ways=["kernels", "batch"])
    assert [row["agrees"] for row in rows] == [True, False]


def test_what_cannot_be_had(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = {r["way"]: r for r in gossamer.parity(model, ways=["graph"], exported=tmp_path / "none.pt2")}
    assert {r["agrees"] for r in rows.values()} == {False}  # asked for by name
    assert "needs a potential on a GPU" in rows["graph"]["reason"]
    assert "There is no program" in rows["exported"]["reason"]
    for change, message in (
        ({"ways": ["fast"]}, "fast are unknown"),
        ({"count": 0}, "count must be at least 1"),
        ({"tolerance": -1.0}, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            gossamer.parity(model, **change)
    ase.io.write(tmp_path / "gold.xyz", Atoms("Au"))
    with pytest.raises(ValueError, match="Au"):
        gossamer.parity(model, [tmp_path / "gold.xyz"])
    ase.io.write(tmp_path / "two.xyz", [molecule("H2"), Atoms("H2")])
    with pytest.raises(ValueError, match=r"Structures \[1\]: the plain potential's own forces are not finite"):
        gossamer.parity(model, [tmp_path / "two.xyz"])  # OpenMM's exception ended the comparison


AS_IMPORTED = {"name": "mace", "variant": "published", "density": True, "transform": "agnesi", "repulsion": True, "zbl": False}
"""what `gossamer import` makes of a file of MACE-MP-0b's kind"""


@pytest.mark.slow
@needs_compiler
@needs_lammps
@pytest.mark.parametrize("model", [{"name": "painn"}, AS_IMPORTED], ids=lambda options: options["name"], indirect=True)
def test_lammps_on_skewed_crystals_and_molecules(model: Path, tmp_path: Path) -> None:
    """In a process of its own: the shape checks of the tests do not compile."""
    crystal = bulk("Si").repeat((2, 1, 1))  # a cell that LAMMPS turns
    crystal.rattle(0.1, seed=3)
    slab = bulk("Si", cubic=True).repeat((1, 1, 2))
    slab.pbc = (True, True, False)
    slab.rattle(0.1, seed=4)
    ase.io.write(tmp_path / "all.extxyz", [crystal, molecule("CH3OH"), slab])
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "gossamer.cli",
        "parity",
        str(model),
        str(tmp_path / "all.extxyz"),
        "--ways",
        "lammps",
        "lammps-2",
        "--dtype",
        "float64",
    ]
    done = subprocess.run(command, env={**os.environ, "GOSSAMER_CACHE": os.environ[KERNELS]}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["way", "lammps", "lammps-2"]
