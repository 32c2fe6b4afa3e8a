"""The library as scripts and notebooks use it: what functions take, and what they say to what they cannot take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from conftest import ETHANOL, make_potential

import gossamer
from gossamer.checks.errors import predict
from gossamer.data.labels import LabelConfig


@pytest.fixture(scope="module")
def potential() -> gossamer.Potential:
    return make_potential(["H", "C", "O"])


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return ase.io.read(ETHANOL, ":4")


def test_errors_are_those_of_frames_however_they_are_given(potential: gossamer.Potential, frames: list[Atoms], tmp_path: Path) -> None:
    path = tmp_path / "frames.extxyz"
    ase.io.write(path, frames)
    structures = list(gossamer.read_structures(path))
    wanted = gossamer.evaluate(potential, path, way="plain").forces.mae
    for data in (structures, iter(structures), frames, iter(frames), [path], [str(path)]):
        assert gossamer.evaluate(potential, data, way="plain").forces.mae == pytest.approx(wanted, rel=1e-6)
    for one in (frames[0], structures[0]):
        assert len(gossamer.evaluate(potential, one, way="plain").frames) == 1
    assert gossamer.inspect(frames).facts["frames"] == gossamer.inspect(path).facts["frames"]
    renamed = [a.copy() for a in frames]
    for new, old in zip(renamed, frames, strict=True):
        new.info["E_kcal"] = old.get_potential_energy() / 0.0433641
    labels = LabelConfig(energy="E_kcal", energy_unit="kcal/mol")
    assert gossamer.evaluate(potential, renamed, labels, way="plain").energy.mae == pytest.approx(
        gossamer.evaluate(potential, frames, way="plain").energy.mae, rel=1e-3
    )
    with pytest.raises(ValueError, match="a Structure has names and units of its own: data.labels.energy"):
        gossamer.evaluate(potential, structures, labels)
    with pytest.raises(TypeError, match="frame 1: expected ASE's Atoms or a gossamer.Structure, found int"):
        gossamer.evaluate(potential, [frames[0], 7])


def test_results_of_other_atoms_are_no_labels() -> None:
    shared = EMT()
    frames = [bulk("Cu", cubic=True) for _ in range(3)]
    for k, atoms in enumerate(frames):
        atoms.rattle(0.1, seed=k)
        atoms.calc = shared
        atoms.get_forces()
    with pytest.raises(ValueError, match="frame 0: the results of its calculator are of other atoms"):
        gossamer.evaluate(make_potential(["Cu"]), frames)
    with pytest.raises(ValueError, match="frame 0: the results of its calculator are of other atoms"):
        predict(EMT(), frames)
    for atoms in frames:
        atoms.get_forces()
        atoms.calc = SinglePointCalculator(atoms, **atoms.calc.results)
    assert np.ptp([e["energy"][0] for e in predict(EMT(), frames)]) > 0.1
    assert max(abs(e["energy"][0] - e["energy"][1]) for e in predict(EMT(), frames)) < 1e-9


@pytest.mark.parametrize("parts", [
    dict(positions=np.zeros((2, 3)), message="structure 1: positions has shape"),
    dict(pbc=[True] * 3, message="structure 1: pbc is a list, expected an array"),
])  # fmt: skip
def test_structures_of_ones_own_are_looked_at(parts: dict[str, Any], potential: gossamer.Potential) -> None:
    water = dict(atomic_numbers=np.array([8, 1, 1]), positions=np.array([[0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.2]]))
    message = parts.pop("message")
    with pytest.raises(ValueError, match=message):
        potential.predict([gossamer.Structure(**water), gossamer.Structure(**water | parts)])


def test_what_is_no_potential_and_what_are_no_files(potential: gossamer.Potential, frames: list[Atoms], tmp_path: Path) -> None:
    for wrong in (frames[0], None, EMT()):
        with pytest.raises(TypeError, match="Expected a potential .* or the file of one, found"):
            gossamer.Calculator(wrong)
    for structures in (frames[0], frames, [gossamer.Structure(atomic_numbers=frames[0].numbers, positions=frames[0].positions)]):
        with pytest.raises(TypeError, match="structures: expected files, found .*predict\\(frames\\)"):
            gossamer.predict(potential, structures, out=tmp_path / "out.extxyz")
    with pytest.raises(TypeError, match="made of a potential, found str"):
        gossamer.Engine("p.safetensors")
    with pytest.raises(TypeError, match="Expected an ASE calculator, found Potential"):
        gossamer.with_dispersion(potential, "pbe")
    with pytest.raises(TypeError, match="expected its path, found Potential"):
        gossamer.calibrate(potential, frames)
    gossamer.save(potential, tmp_path / "p.safetensors", check=frames[:2])
    assert gossamer.load(tmp_path / "p.safetensors").predict(frames[0])[0]["energy"] == pytest.approx(
        potential.predict(frames[0])[0]["energy"]
    )


def test_a_calculator_takes_no_argument_that_it_does_not_know(potential: gossamer.Potential, frames: list[Atoms]) -> None:
    with pytest.raises(TypeError, match="no argument 'devcie'. When it is made it takes potential, device"):
        gossamer.Calculator(potential, devcie="cuda")
    calculator = gossamer.Calculator(potential, way="plain", reuse_memory=False, label="mine")
    with pytest.raises(TypeError, match="no argument 'dtype'"):
        calculator.set(dtype="float32")
    with pytest.raises(ValueError, match="There are no atoms to compute"):
        calculator.get_potential_energy()
    assert np.isfinite(calculator.get_potential_energy(frames[0]))


def test_weights_that_change_under_a_calculator_are_noticed(frames: list[Atoms]) -> None:
    changing = make_potential(["H", "C", "O"])
    calculator = gossamer.Calculator(changing, way="plain", reuse_memory=False)
    following = gossamer.Engine(changing, "plain", weights_change=True)
    calculator.get_potential_energy(frames[0])
    with torch.no_grad():
        for weight in changing.parameters():
            weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="weights changed after this engine"):
        calculator.get_potential_energy(frames[1])
    assert changing.predict(frames[1], run=following)[0]["energy"] == pytest.approx(changing.predict(frames[1])[0]["energy"])


def test_one_file_and_one_way_need_no_list(potential: gossamer.Potential, frames: list[Atoms], tmp_path: Path) -> None:
    ase.io.write(tmp_path / "frames.extxyz", frames[:1])
    gossamer.save(potential, tmp_path / "p.safetensors")
    (row,) = gossamer.parity(tmp_path / "p.safetensors", str(tmp_path / "frames.extxyz"), ways="plain")
    assert row["way"] == "plain"


SCRIPT = """
print("begins")
from pathlib import Path
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from gossamer.checks.discovery import relax_many
from gossamer.data.statistics import Statistics
from gossamer.data.structure import as_structure
from gossamer.models import MODELS
from gossamer.potential import Potential
from gossamer.training.loader import Loader
crystals = [(str(k), bulk("Cu", a=3.6 + 0.01 * k)) for k in range(3)]
print(len(relax_many(EMT, crystals, Path("results.jsonl"), processes=2, progress=False)))
settings, network = MODELS["schnet"]
potential = Potential(settings(**network.presets["tiny"]), Statistics(elements=["Cu"], reference_energies={"Cu": 0.0}))
loader = Loader(potential, [as_structure(atoms) for _, atoms in crystals], num_workers=1)
print(sum(graph.n_graphs for _ in range(2) for graph in loader.graphs([[0, 2], [1]])))
loader.close()
"""


def test_processes_do_not_run_a_script_again(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.split() == ["begins", "3", "6"]
