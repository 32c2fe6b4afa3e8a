"""The library as scripts and notebooks use it: what functions take, and what they say to what they cannot take."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
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
from gossamer.config import make_config
from gossamer.data.labels import LabelConfig
from gossamer.screening.structures import read_items


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


class Shifted(EMT):
    """EMT with another zero of energy."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def calculate(self, *arguments: Any, **options: Any) -> None:
        super().calculate(*arguments, **options)
        self.results["energy"] += self.shift


def test_potentials_and_calculators_in_memory_are_judged(potential: gossamer.Potential, frames: list[Atoms], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"only": "symmetry", "progress": False, "out": tmp_path}
    assert list(gossamer.judge({"mine": potential}, structures=frames[0], **asked)) == ["mine"]
    about = json.loads((tmp_path / "mine" / "about.json").read_text())
    assert about["ours"]
    assert list(gossamer.judge(potential, EMT(), structures=frames[0], **asked)) == ["leignn", "EMT"]
    other = make_potential(["H", "C", "O"], seed=1)
    with pytest.raises(ValueError, match="holds the judgement of another potential called 'mine'"):
        gossamer.judge({"mine": other}, **asked)
    given = {"elements": ["Cu"], **asked, "only": ("symmetry",)}
    for _ in range(2):
        assert gossamer.judge(Shifted(0.0), **given)["Shifted"]["symmetry"].status == "passed"
    with pytest.raises(ValueError, match="holds the judgement of another potential called 'Shifted'"):
        gossamer.judge(calculator=[Shifted(0.1)], **given)
    for wrong in (EMT, None, [7]):
        with pytest.raises(TypeError, match="models: expected a saved potential or ASE calculator, or one in memory, found"):
            gossamer.judge(wrong, **asked)
    with pytest.raises(TypeError, match="structures: expected files or ASE's Atoms, found int"):
        gossamer.judge(potential, structures=[7], **asked)
    with pytest.raises(ValueError, match="data: Input should be a valid string"):
        gossamer.judge(potential, data=frames, **asked)


def test_parity_of_what_is_in_memory(potential: gossamer.Potential, frames: list[Atoms]) -> None:
    for structures, ways in ((frames[0], "plain"), (iter(frames), (way for way in ["plain"]))):
        (row,) = gossamer.parity(potential, structures, ways=ways, count=np.int64(2))
        assert row["agrees"]
        assert row["relative"] < 1e-10
    with pytest.raises(ValueError, match="A potential in memory keeps no structures"):
        gossamer.parity(potential, ways="plain")
    with pytest.raises(ValueError, match="ways: none is given. Choose among plain"):
        gossamer.parity(potential, frames, ways=[])
    with pytest.raises(TypeError, match="structures: expected files or ASE's Atoms, found int"):
        gossamer.parity(potential, [3])


def test_several_structures_are_one_file_or_more(potential: gossamer.Potential, frames: list[Atoms], tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.extxyz", frames[0])
    for structures in (tmp_path / "a.extxyz", str(tmp_path / "a.extxyz"), iter([tmp_path / "a.extxyz"])):
        (answer,) = gossamer.relax_files(potential, structures, out=tmp_path / "relaxed", steps=1, way="plain")
        assert answer["steps"] == 1
    (answer,) = gossamer.md_files(potential, tmp_path / "a.extxyz", out=tmp_path / "md", steps=1, way="plain", progress=False)
    assert answer["steps"] == 1
    with pytest.raises(TypeError, match="structures: expected files, whose names the relaxed ones get .*gossamer.relax.* found Atoms"):
        gossamer.relax_files(potential, frames, out=tmp_path / "relaxed")
    with pytest.raises(TypeError, match="structures: expected files, whose names the folders get .*gossamer.md.* found Atoms"):
        gossamer.md_files(potential, frames[0])


def test_atoms_are_screened_by_their_places(frames: list[Atoms], tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.extxyz", frames[:1])
    strange = frames[1].copy()
    strange.info["occupancy"] = {"0": {"C": 0.5, "N": 0.5}}
    items = list(read_items([frames[0], tmp_path / "a.extxyz", strange, Atoms()]))
    assert [(i.source.rpartition("/")[2], i.frame) for i in items] == [("memory", 0), ("memory", 1), ("memory", 2), ("a.extxyz", 0)]
    assert items[0].digest == items[3].digest
    assert [bool(i.problem) for i in items] == [False, True, True, False]


def test_what_is_given_instead_of_files_and_settings_is_said(potential: gossamer.Potential, frames: list[Atoms], tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    gossamer.save(potential, file, check=frames[0])
    out = tmp_path / "out"
    for what, message, call in (
        ("a potential to screen", "model: expected the file of a potential, which every worker reads", lambda: gossamer.screen(frames, potential)),
        ("a calculator to screen", "calculator: expected module:factory", lambda: gossamer.screen(frames, calculator=EMT())),
        ("no structures", "structures: expected files or ASE's Atoms, found int", lambda: gossamer.screen(3, file)),
        ("a start", "start: expected the file of a potential", lambda: gossamer.learn(potential, frames, "ase.calculators.emt:EMT")),
        ("a label", "label: expected module:factory or an ASE calculator, found the class EMT", lambda: gossamer.learn(file, frames, EMT)),
        ("walks", "structures: expected files or ASE's Atoms, found int", lambda: gossamer.learn(file, 3, EMT())),
        ("settings", "configs: expected YAML files or settings, found int", lambda: gossamer.compare([3], out=out)),
        ("a configuration", "config: expected settings, or a YAML file of them, found list", lambda: gossamer.train([])),
        ("frames", "data: expected a file, which the settings of the run name", lambda: gossamer.fit(frames, out=out)),
        ("a saved start", "start: expected a file", lambda: gossamer.fit(file, start=potential, out=out)),
        ("files", "path: expected files or folders, found Atoms", lambda: list(gossamer.read_structures(frames))),
        ("a file", "path: expected the file of a potential, found Potential", lambda: gossamer.load(potential)),
        ("no file", "path: expected the file of a potential, found NoneType", lambda: gossamer.load(None)),
        ("swapped", "potential: expected a potential, found PosixPath", lambda: gossamer.save(file, potential)),
        ("no calculator", "model: expected a saved potential, a potential or an ASE calculator, found NoneType", lambda: gossamer.md(None, frames[0])),
        ("a class", "model: expected .*, found the class EMT", lambda: gossamer.relax(EMT, frames[0])),
        ("frames to relax", "structure: expected a file or ASE's Atoms, found list", lambda: gossamer.relax(potential, frames)),
        ("no functional", "expected the name of a functional, such as pbe, found None", lambda: gossamer.with_dispersion(EMT(), None)),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=message):
            raise AssertionError(f"{what}: {call()}")
    with pytest.raises(ValueError, match="This potential has no uncertainty"):
        gossamer.learn(file, frames[0], EMT(), out=tmp_path / "learned")
    assert not (tmp_path / "learned").exists()
    with pytest.raises(ValueError, match="There are no structures to screen"):
        gossamer.screen([], file)


@pytest.mark.parametrize(
    ("number", "message"), [(0, "at least 1, found 0"), (-3, "at least 1, found -3"), (2.5, "a whole number, found 2.5"), (None, "a whole")]
)
def test_numbers_that_make_no_sense(number: Any, message: str, potential: gossamer.Potential, frames: list[Atoms], tmp_path: Path) -> None:
    if isinstance(number, int):  # while testing, types in signatures of potentials are checked
        with pytest.raises(ValueError, match=f"batch_atoms must be {message}"):
            potential.predict(frames, batch_atoms=number)
    with pytest.raises(ValueError, match=f"batch_atoms must be {message}"):
        gossamer.predict(potential, tmp_path / "none.extxyz", batch_atoms=number)
    with pytest.raises(ValueError, match=f"count must be {message}"):
        gossamer.parity(potential, frames, count=number)


def test_names_of_labels_and_options_may_be_dictionaries(potential: gossamer.Potential, frames: list[Atoms], tmp_path: Path) -> None:
    path = tmp_path / "frames.extxyz"
    renamed = [a.copy() for a in frames]
    for new, old in zip(renamed, frames, strict=True):
        new.info["E"] = old.get_potential_energy()
    ase.io.write(path, renamed)
    wanted = gossamer.evaluate(potential, frames, way="plain").energy.mae
    for data in (path, renamed):
        assert gossamer.evaluate(potential, data, {"energy": "E"}, way="plain").energy.mae == pytest.approx(wanted, rel=1e-6)
    assert all(s.energy is not None for s in gossamer.read_structures(path, {"energy": "E"}))
    with pytest.raises(ValueError, match=r"labels.enrgy: unknown setting. Did you mean labels.energy\?"):
        gossamer.inspect(path, {"enrgy": "E"})
    with pytest.raises(TypeError, match="labels: expected a LabelConfig or a dictionary of its names, found str"):
        gossamer.fit(path, labels="E")
    assert gossamer.relax(potential, frames[0], {"steps": 1, "way": "plain"})["steps"] == 1
    config = make_config({"data": {"train": (path,), "valid": path}, "out": tmp_path})
    assert (config.data.train, config.data.valid, config.out) == ([str(path)], str(path), str(tmp_path))
    with pytest.raises(ValueError, match="minutes must be positive, found '1'"):
        gossamer.fit(path, minutes="1")
    with pytest.raises(TypeError, match="out: expected the name of a file, found NoneType"):
        gossamer.predict(potential, path, out=None)


def test_results_of_before_are_replaced_with_a_word(
    potential: gossamer.Potential, frames: list[Atoms], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ase.io.write(tmp_path / "a.extxyz", frames)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "uncertainty.png").touch()  # of another potential, which had one
    calls: dict[str, Any] = {
        "relaxed.extxyz": lambda out: gossamer.relax(potential, frames[0], out=out, steps=1, way="plain"),
        "predicted.extxyz": lambda out: gossamer.predict(potential, tmp_path / "a.extxyz", out=out, progress=False),
        "evaluation": lambda out: gossamer.evaluate(potential, frames, out=out, way="plain"),
        "parity.json": lambda out: gossamer.parity(potential, frames, ways="plain", out=out),
    }
    for name, call in calls.items():
        for there in (False, True):
            caplog.clear()
            call(tmp_path / name)
            assert (f"{name}" in caplog.text and "will be replaced: results of before" in caplog.text) is (there or name == "evaluation")
    assert not (tmp_path / "evaluation" / "uncertainty.png").exists()


SCRIPT = """
print("begins")
from dataclasses import replace
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


@pytest.mark.thorough
def test_processes_do_not_run_a_script_again(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.split() == ["begins", "3", "6"]


def test_the_home_folder_is_meant_by_its_sign(potential: gossamer.Potential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions that were given ``~/run`` made a folder named ~ where they were called, and found no files there."""
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "frames.extxyz").write_text(Path(ETHANOL).read_text())
    small = {"name": "leignn", "num_features": 8, "num_layers": 1, "cutoff": 3.0}
    config = make_config({"data": {"train": "x", "train_size": 8, "valid_size": 4}, "model": small, "training": {"steps": 1}})
    config = replace(config, data=replace(config.data, train="~/frames.extxyz"), out="~/run")
    gossamer.train(config, progress=False)
    gossamer.save(potential, "~/saved.safetensors")
    gossamer.load(Path("~/saved.safetensors"))
    gossamer.evaluate("~/saved.safetensors", ["~/frames.extxyz"], out="~/errors", way="plain")
    gossamer.predict("~/saved.safetensors", "~/frames.extxyz", out="~/predicted.extxyz", way="plain", progress=False)
    gossamer.md(potential, "~/frames.extxyz", steps=1, out="~/md", way="plain", progress=False)
    with pytest.raises(FileExistsError, match=f"'{home / 'run'}' holds a run"):
        gossamer.fit("~/frames.extxyz", out="~/run")
    with pytest.raises(FileNotFoundError, match=str(home / "no.extxyz")):
        gossamer.fit("~/no.extxyz", out="~/fit")
    assert not list(here.iterdir())
    assert {p.name for p in home.iterdir()} == {"frames.extxyz", "run", "saved.safetensors", "errors", "predicted.extxyz", "md"}


def test_loading_leaves_random_numbers_alone(potential: gossamer.Potential, tmp_path: Path) -> None:
    """The network of a potential is made with random weights, which came from the caller's generator."""
    gossamer.save(potential, tmp_path / "a.safetensors")
    torch.manual_seed(7)
    gossamer.load(tmp_path / "a.safetensors")
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(7)))
