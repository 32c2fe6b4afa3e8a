"""Dynamics of several structures: batches on TorchSim walk as one after the other on ASE, each with its own files and failures."""

from __future__ import annotations

import csv
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from conftest import make_potential
from test_uncertainty import measured, walk

from gossamer.cli import main
from gossamer.potential import Potential
from gossamer.potential_file import save
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.md_files import md_files
from gossamer.simulation.options import MDConfig

torch_sim = pytest.importorskip("torch_sim", reason="needs pip install 'gossamer[torchsim]'")


@pytest.fixture(scope="module")
def potential() -> Potential:
    return make_potential(["H", "O", "Si"], name="painn")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A file of three crystals, of two sizes, and one of a molecule."""
    crystals = [bulk("Si", cubic=True), bulk("Si"), bulk("Si", cubic=True)]
    for k, atoms in enumerate(crystals):
        atoms.rattle(0.1, seed=k)
    ase.io.write(tmp_path / "si.extxyz", crystals)
    ase.io.write(tmp_path / "water.extxyz", molecule("H2O"))
    return [str(tmp_path / "si.extxyz"), str(tmp_path / "water.extxyz")]


def run(potential: Potential, files: list[str], **options: Any) -> list[dict[str, Any]]:
    return md_files(potential, files, MDConfig(**{"all_frames": True, "engine": "torchsim", "interval": 5, **options}), progress=False)


def table(folder: Path) -> np.ndarray:
    """Step, temperature, potential energy of the log."""
    rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    return np.array([[float(row[k]) for k in ("step", "temperature_K", "potential_energy_eV", "pressure_GPa")] for row in rows])


def test_one_calculator_is_told_of_all_steps_that_come(
    potential: Potential, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that compiling may pay; a run that is resumed goes on in the way it began."""
    told: list[tuple[int, int]] = []
    calculators = []

    def expect(calculator: Calculator, n_evaluations: int, atoms: Atoms) -> None:
        told.append((n_evaluations, len(atoms)))
        calculators.append(calculator)

    monkeypatch.setattr(Calculator, "expect", expect)
    run(potential, files, engine="ase", steps=5, out=tmp_path / "out", way="plain")
    assert told == [(20, 8), (15, 2), (10, 8), (5, 3)]
    run(potential, files, engine="ase", steps=6, out=tmp_path / "out", resume=True)
    assert len(set(map(id, calculators[:4]))) == len(set(map(id, calculators[4:]))) == 1
    assert calculators[-1].engine.asked == "plain"


def test_a_batch_walks_as_one_after_the_other(potential: Potential, files: list[str], tmp_path: Path) -> None:
    """Constant energy is deterministic: the same walks, logs and trajectories, also where atoms cross boundaries."""
    common = dict(ensemble="nve", steps=20, temperature=2000.0, timestep=1.0)
    batch = run(potential, files, out=tmp_path / "batch", **common)
    single = run(potential, files, out=tmp_path / "single", engine="ase", **common)
    assert [a["steps"] for a in batch] == [20] * 4
    assert sorted(p.name for p in (tmp_path / "batch").iterdir()) == ["si-0", "si-1", "si-2", "water-0"]
    told = {a["structure"]: a for a in batch}
    for answer in single:
        name = Path(answer["out"]).name
        assert told[answer["structure"]]["mean_temperature_K"] == pytest.approx(answer["mean_temperature_K"], abs=0.01)
        np.testing.assert_allclose(table(tmp_path / "batch" / name), table(tmp_path / "single" / name), rtol=1e-6, atol=1e-6)
        one, other = (ase.io.read(tmp_path / kind / name / "trajectory.traj", ":") for kind in ("batch", "single"))
        assert len(one) == len(other) == 5
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a.positions, b.positions, atol=1e-7)  # continuous, as ASE has them
            np.testing.assert_allclose(a.get_momenta(), b.get_momenta(), atol=1e-6)
            np.testing.assert_allclose(a.get_forces(), b.get_forces(), atol=1e-6)
    assert not np.allclose(table(tmp_path / "batch" / "si-0")[0], table(tmp_path / "batch" / "si-2")[0])


def test_atoms_that_cross_half_a_cell_between_frames_are_followed(tmp_path: Path) -> None:
    """As on ASE: displacements are those that were walked, and diffusion comes out the same."""
    fast = Atoms("H2", [[0, 0, 0], [2, 2, 2]], cell=[4, 4, 4], pbc=True)
    fast.set_velocities([[0.6, 0, 0], [-0.6, 0, 0]])
    ase.io.write(tmp_path / "h.traj", fast)
    found = []
    for engine in ("torchsim", "ase"):
        settings: dict[str, Any] = {"ensemble": "nve", "steps": 100, "interval": 100, "max_temperature": 1e6, "way": "plain"}
        run(make_potential(["H"], name="painn"), [str(tmp_path / "h.traj")], engine=engine, out=tmp_path / engine, **settings)
        found.append(ase.io.read(tmp_path / engine / "h-0" / "trajectory.traj", -1).positions)
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert np.abs(found[0] - fast.positions).max() > 2.0


@pytest.mark.thorough
def test_a_thermostat_holds_and_follows_a_ramp(potential: Potential, tmp_path: Path) -> None:
    ase.io.write(tmp_path / "si.extxyz", [bulk("Si")] * 20)
    ramp = dict(temperature=1200.0, temperature_end=200.0, thermostat_time=4.0, steps=120, timestep=1.0, interval=10)
    answers = run(potential, [str(tmp_path / "si.extxyz")], out=tmp_path / "md", **ramp)
    seen = np.mean([table(Path(a["out"]))[:, 1] for a in answers], axis=0)
    assert seen[2:6].mean() == pytest.approx(1200 - 1000 * 35 / 120, rel=0.25)
    assert seen[-3:].mean() == pytest.approx(200 + 1000 * 10 / 120, rel=0.35)


@pytest.mark.thorough
def test_a_resumed_batch_is_the_same(potential: Potential, files: list[str], tmp_path: Path) -> None:
    common = dict(ensemble="nve", out=tmp_path / "md", max_temperature=10_000)  # an untrained potential heats its water
    run(potential, files, steps=10, **common)
    (refused, *_) = run(potential, files, steps=20, **common)
    assert "holds a simulation already" in refused["error"]
    answers = run(potential, files, steps=20, resume=True, **common)
    assert [a["steps"] for a in answers] == [20] * 4
    written = (tmp_path / "md" / "si-0" / "state.npz").read_bytes()
    assert [a["steps"] for a in run(potential, files, steps=20, resume=True, **common)] == [20] * 4, "nothing is left to do"
    assert (tmp_path / "md" / "si-0" / "state.npz").read_bytes() == written
    whole = run(potential, files, steps=20, **common | {"out": tmp_path / "whole"})
    for name in (Path(a["out"]).name for a in whole):
        np.testing.assert_allclose(table(tmp_path / "md" / name), table(tmp_path / "whole" / name), rtol=1e-9, atol=1e-7)
    (other, *_) = run(potential, files, steps=30, resume=True, engine="ase", **common)
    assert "engine torchsim (now ase)" in other["error"]


def test_failures_are_their_own(potential: Potential, files: list[str], tmp_path: Path) -> None:
    """What cannot be read, is not known, or breaks on its way leaves the others what they are alone."""
    (tmp_path / "torn.extxyz").write_text("nothing")
    ase.io.write(tmp_path / "gold.extxyz", bulk("Au"))
    ase.io.write(tmp_path / "spot.extxyz", Atoms("Si2", [[0, 0, 0], [0, 0, 0]], cell=[9, 9, 9], pbc=True))
    ase.io.write(tmp_path / "close.extxyz", Atoms("Si2", [[0, 0, 0], [0, 0, 0.3]], cell=[9, 9, 9], pbc=True))
    bad = [str(tmp_path / f"{name}.extxyz") for name in ("torn", "gold", "spot", "close")]
    answers = run(potential, [*bad, *files], out=tmp_path / "md", steps=10, ensemble="nve")
    told = {Path(a["structure"].split(",")[0]).stem: a for a in answers if "si" not in a["structure"]}
    assert "cannot be read" in told["torn"]["error"] or "torn" in told["torn"]["error"]
    assert "Au (79) not among" in told["gold"]["error"]
    assert "not finite" in told["spot"]["broken"]
    assert "atoms 1 and 0 are 0.30 Å apart" in told["close"]["broken"] or "atoms 0 and 1 are 0.30 Å apart" in told["close"]["broken"]
    assert (tmp_path / "md" / "close-0" / "broken.extxyz").exists()
    alone = run(potential, files, out=tmp_path / "alone", steps=10, ensemble="nve", seed=3)  # one seed per structure that could be read
    assert len(alone) == 4
    for k in range(3):
        np.testing.assert_allclose(table(tmp_path / "md" / f"si-{k}"), table(tmp_path / "alone" / f"si-{k}"), rtol=1e-8, atol=1e-7)


def test_what_is_refused_on_its_way_leaves_the_others(
    potential: Potential, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a crystal whose latent charges no longer sum to zero: before, that ended the command."""
    asked = [0]

    def refuse(self: Potential, prediction: Any, graph: Any) -> None:
        odd = (graph.atoms_per_graph() == 16).nonzero()[:, 0].tolist()
        asked[0] += len(odd)
        if asked[0] > 4 and odd:
            raise ValueError(f"{graph.name(odd[0])}: it has become charged")

    ase.io.write(tmp_path / "odd.extxyz", bulk("Si", cubic=True).repeat((2, 1, 1)))
    common = dict(steps=10, interval=5, ensemble="nve")
    alone = run(potential, files, out=tmp_path / "alone", seed=1, **common)
    monkeypatch.setattr(Potential, "refuse_charged", refuse)
    odd, *others = run(potential, [str(tmp_path / "odd.extxyz"), *files], out=tmp_path / "md", **common)
    assert re.fullmatch(r"step [1-9] \(.*\): it has become charged", odd["broken"])
    assert odd["mean_temperature_K"] is not None
    assert (tmp_path / "md" / "odd-0" / "broken.extxyz").exists()
    for one, other in zip(alone, others, strict=True):
        assert other["broken"] is None
        np.testing.assert_allclose(table(Path(one["out"])), table(Path(other["out"])), rtol=1e-8, atol=1e-7)


def test_the_last_step_is_guarded_without_a_frame(potential: Potential, tmp_path: Path) -> None:
    """As on ASE: too hot after 35 steps, where the next frame was due at 50."""
    hot = bulk("Si", cubic=True)
    hot.rattle(0.3, seed=1)
    hot.set_momenta(np.full((8, 3), 1e-6))
    ase.io.write(tmp_path / "hot.traj", hot)
    (answer,) = run(
        potential,
        [str(tmp_path / "hot.traj")],
        out=tmp_path / "md",
        steps=35,
        interval=50,
        ensemble="nve",
        timestep=4.0,
        max_temperature=30.0,
    )
    assert answer["broken"].startswith("step 35 ")


def test_where_one_becomes_uncertain_the_others_go_on(tmp_path: Path) -> None:
    known = measured("painn")
    frames = walk(2, 0.02) + walk(1, 0.15, seed=2)  # the last is far from what it was measured on
    ase.io.write(tmp_path / "ethanol.extxyz", frames)
    common = dict(steps=4, interval=2, ensemble="nve", temperature=10.0)
    looked = run(known, [str(tmp_path / "ethanol.extxyz")], out=tmp_path / "look", **common)
    first = [(Path(a["out"]) / "log.csv").read_text().splitlines()[1] for a in looked]
    column = [float(row.split(",")[-1]) for row in first]
    single = Calculator(known)
    expected = [np.max(single.get_property("forces_uncertainty", atoms)) for atoms in frames]
    np.testing.assert_allclose(column, expected, rtol=1e-5)
    assert column[2] > 1.2 * max(column[:2])
    limit = (max(column[:2]) + column[2]) / 2
    told = run(known, [str(tmp_path / "ethanol.extxyz")], out=tmp_path / "md", max_uncertainty=limit, **common)
    assert [a["uncertain"] is None for a in told] == [True, True, False]
    assert [a["steps"] for a in told] == [4, 4, 0]


def test_a_signal_stops_all_and_loses_nothing(
    potential: Potential, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gossamer.simulation import md_batched as module

    temperatures: Callable[..., Any] = module._temperatures

    def at_step_7(walkers: list[Any], state: Any) -> Any:
        if walkers[0].clock.nsteps == 7:
            signal.raise_signal(signal.SIGTERM)
        return temperatures(walkers, state)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_temperatures", at_step_7)
        answers = run(potential, files[:1], out=tmp_path / "md", steps=15, ensemble="nve")
    assert [(a["stopped"], a["steps"]) for a in answers] == [("SIGTERM", 8)] * 3
    answers = run(potential, files[:1], out=tmp_path / "md", steps=15, ensemble="nve", resume=True)
    assert [a["steps"] for a in answers] == [15] * 3
    run(potential, files[:1], out=tmp_path / "whole", steps=15, ensemble="nve")
    np.testing.assert_allclose(table(tmp_path / "md" / "si-1"), table(tmp_path / "whole" / "si-1"), rtol=1e-9, atol=1e-7)


def test_the_command(potential: Potential, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save(potential, tmp_path / "p.safetensors")
    command = ["md", str(tmp_path / "p.safetensors"), *files, "--engine", "torchsim", "--steps", "4", "--interval", "2"]
    assert main([*command, "--out", str(tmp_path / "md"), "--json"]) == 0
    assert [Path(a["out"]).name for a in json.loads(capsys.readouterr().out)] == ["si", "water"]
    assert main([*command, "--out", str(tmp_path / "md")]) == 1
    assert "holds a simulation already" in capsys.readouterr().out
    assert main([*command, "--ensemble", "npt"]) == 2
    assert "Engine torchsim runs nve and langevin, not npt" in capsys.readouterr().err


def test_what_is_not_for_several(potential: Potential, files: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="collect writes the frames of one run"):
        run(potential, files, out=tmp_path / "md", collect=tmp_path / "c.xyz", max_uncertainty=1.0)
    with pytest.raises(ValueError, match="TorchSim runs potentials, found a calculator"):
        md_files(EMT(), files, MDConfig(engine="torchsim", out=tmp_path / "md"))
    slab = bulk("Si", cubic=True)
    slab.pbc = [True, True, False]
    ase.io.write(tmp_path / "slab.extxyz", slab)
    answers = run(potential, [str(tmp_path / "slab.extxyz")], out=tmp_path / "md", steps=2)
    assert "error" not in answers[0] or "knows all axes or none" in answers[0]["error"]
