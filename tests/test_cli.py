"""The command line, used as a user would; and what it answers to wrong input (at least thirty kinds of it)."""

from __future__ import annotations

import argparse
import inspect as python_inspect
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from conftest import ETHANOL, make_potential

from gossamer.cli import UsageError, build_parser, main
from gossamer.data.readers import read_structures
from gossamer.models import MODELS
from gossamer.potential_file import save
from gossamer.signals import Stopped


def run(*arguments: str, capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def config(tmp_path: Path, **changes) -> Path:
    values = {
        "data": {"train": ETHANOL, "valid_size": 20, "train_size": 40},
        "model": {"name": "leignn", "num_features": 8, "num_layers": 1, "cutoff": 3.5},
        "training": {"steps": 10, "batch_size": 8, "valid_every": 10},
        "out": str(tmp_path / "run"),
    }
    for path, value in changes.items():
        target = values
        *parents, last = path.split("__")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "config.yaml"


def test_help_answers_at_once() -> None:
    result = subprocess.run([sys.executable, "-m", "gossamer.cli", "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "Molecular dynamics" in result.stdout
    # what takes time is importing torch, ase and matplotlib: none of them for --help
    code = "import sys, gossamer.cli; gossamer.cli.build_parser(); sys.exit(any(m in sys.modules for m in ('torch', 'ase', 'numpy', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_answers_for_people(capsys: pytest.CaptureFixture) -> None:
    """What does not exist is a dash, and one frame is no frames."""
    from gossamer.commands.common import print_errors, show

    show(argparse.Namespace(json=False), {"mean_pressure_GPa": None, "broken": None, "steps": 1})
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["mean_pressure_GPa", "-"], ["broken", "-"], ["steps", "1"]]
    for n, said in ((1, "  1 frame\n"), (2, "  2 frames\n")):
        print_errors({"n_frames": n, "conservative_forces": True, "forces_per_element_meV_per_A": {}})
        assert capsys.readouterr().out.startswith(said)


def test_a_terminal_without_our_letters_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written := io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as ended:
        main(["judge", "--help"])
    assert ended.value.code == 0
    sys.stdout.flush()
    assert b"?-X" in written.getvalue()


def test_flags_share_the_names_of_the_parameters() -> None:
    import gossamer

    commands = build_parser()._subparsers._group_actions[0].choices
    for name, function, other in (
        ("train", gossamer.train, {"progress"}),
        ("fit", gossamer.fit, {"labels", "progress"}),
        ("evaluate", gossamer.evaluate, {"labels"}),
        ("compare", gossamer.compare, {"progress"}),
        ("md", gossamer.md, {"progress", "config", "options"}),
        ("relax", gossamer.relax, {"config", "options"}),
        ("judge", gossamer.judge, {"progress", "config", "options"}),
        ("export", gossamer.export, set()),
        ("import", gossamer.import_potential, set()),
    ):
        flags = {a.dest for a in commands[name]._actions}
        parameters = set(python_inspect.signature(function).parameters)
        assert parameters - other <= flags, name
        defaults = {k: p.default for k, p in python_inspect.signature(function).parameters.items() if p.default is not p.empty}
        for action in commands[name]._actions:
            if action.dest in defaults and action.dest not in ("out", "overrides", "worst"):
                found = tuple(action.default) if isinstance(action.default, list) else action.default
                assert found == defaults[action.dest] or str(found) == str(defaults[action.dest]), (name, action.dest)


def test_arguments_may_follow_options() -> None:
    """argparse alone gives a list of arguments the first stretch of them and refuses the rest."""
    parse = build_parser().parse_args
    assert parse(["train", "c.yaml", "--resume", "training.steps=5", "--json", "out=x"]).overrides == ["training.steps=5", "out=x"]
    assert parse(["data", "convert", "a.xyz", "--out", "store", "b.xyz"]).data == ["a.xyz", "b.xyz"]
    with pytest.raises(UsageError, match="gossamer train: the following arguments are required: config$"):
        parse(["train", "--resume"])
    with pytest.raises(UsageError, match="gossamer fit: unrecognized arguments: second.xyz"):
        parse(["fit", "first.xyz", "--minutes", "1", "second.xyz"])


def test_every_command_that_evaluates_asks_which_way(tmp_path: Path) -> None:
    commands = build_parser()._subparsers._group_actions[0].choices
    for name in ("evaluate", "bench", "judge", "md", "relax"):
        (way,) = (a for a in commands[name]._actions if a.dest == "way")
        assert list(way.choices) == ["auto", "plain", "kernels", "program", "graph"], name
    from gossamer.checks.source import find_sources

    save(make_potential(["H"]), tmp_path / "p.safetensors")
    (auto,), (plain,) = (find_sources([tmp_path / "p.safetensors"], [], way=way) for way in ("auto", "plain"))
    assert plain.make().engine.asked == "plain"
    assert plain.fingerprint != auto.fingerprint  # what one way answered is not taken for the other


@pytest.mark.thorough
def test_the_whole_path(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """inspect, train, evaluate, info, relax, md in a fresh folder."""
    monkeypatch.chdir(tmp_path)
    status, out, _ = run("data", "inspect", ETHANOL, capsys=capsys)
    assert (status, "fit for training" in out) == (0, True)
    status, out, _ = run(
        "train", config(tmp_path), "training.steps=60", "model.num_features=16", "training.learning_rate=5e-3", capsys=capsys
    )
    assert status == 0
    assert "forces on O" in out
    model = "run/potential.safetensors"
    status, out, _ = run("evaluate", model, ETHANOL, "--json", capsys=capsys)
    answer = json.loads(out)
    assert status == 0
    assert (answer["n_frames"], answer["n_training_frames"]) == (60, 40)  # those trained on do not count
    assert (tmp_path / "run" / "evaluation" / "worst.extxyz").exists()
    status, out, _ = run("info", model, "--json", capsys=capsys)
    assert json.loads(out)["model"]["num_features"] == 16
    status, out, _ = run("info", model, capsys=capsys)
    assert "elements" in out
    status, out, _ = run("info", model, "--weights", capsys=capsys)
    listed = [line.strip() for line in out.split("\nweights:\n")[1].splitlines()]
    assert "MLP_E.0.weight: [8, 16]" in listed
    assert listed == sorted(listed)
    ase.io.write("ethanol.xyz", molecule("CH3CH2OH"))
    status, out, _ = run("relax", model, "ethanol.xyz", "--fmax", "0.2", "--steps", "20", "--json", capsys=capsys)
    assert json.loads(out)["steps"] > 0
    assert (tmp_path / "relaxed.extxyz").exists()
    status, out, _ = run("md", model, "ethanol.xyz", "--steps", "20", "--interval", "10", "--temperature", "100", "--json", capsys=capsys)
    assert json.loads(out)["steps"] == 20
    assert len(ase.io.read("md/trajectory.traj", ":")) == 3
    status, out, _ = run("data", "convert", ETHANOL, "--out", "ethanol.store", "--json", capsys=capsys)
    assert json.loads(out)["structures"] == 100
    status, out, _ = run("evaluate", model, "ethanol.store", "--json", capsys=capsys)
    assert json.loads(out)["forces_mae_meV_per_A"] == pytest.approx(answer["forces_mae_meV_per_A"], rel=1e-6)


# --- wrong input: each case with the message that says what to do ------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        (dict(model__cutof=4.0), [], "model.cutof: unknown setting. Did you mean model.cutoff?"),
        (dict(learning_rate=1e-3), [], "learning_rate: unknown setting."),
        (dict(), ["trainin.steps=3"], "trainin: unknown setting. Did you mean training?"),
        (dict(), ["training.lerning_rate=0.1"], "training.lerning_rate: unknown setting. Did you mean training.learning_rate?"),
        (dict(), ["training.steps"], "'training.steps' is not an override. Write path.to.key=value"),
        (dict(), ["training.steps=many"], "training.steps: Input should be a valid integer"),
        (dict(), ["training.steps=-5"], "training.steps: Input should be greater than 0 (found -5)"),
        (dict(), ["model.cutoff=0"], "model.cutoff: Input should be greater than 0"),
        (dict(), ["model.name=leinn"], "model.name: found 'leinn', expected one of leignn, nequip, geodite, mace, painn, schnet, sevennet, weft. Did you mean leignn"),
        (dict(), ["model.variant=published", "model.radial_basis=bessel"], "model: the published variant has Gaussians"),
        (dict(), ["model.radial_basis=gaussian", "model.basis_decay=1"], "model: basis_decay is for Bessel functions"),
        (dict(), ["loss.kind=l2"], "loss.kind: Input should be 'l1', 'mse', 'huber' or 'conditional_huber'"),
        (dict(), ["loss.forces=-1"], "loss.forces: Input should be greater than or equal to 0"),
        (dict(), ["loss.energy=0", "loss.forces=0"], "there is nothing to learn from"),
        (dict(), ["loss.stress=1"], "None of the 40 training frames has stress, but loss.stress is above 0"),
        (dict(), ["model.direct_forces=true", "loss.forces=0"], "model.direct_forces needs loss.forces above 0"),
        (dict(), ["model.direct_forces=true", "loss.stress=1"], "model.direct_forces predicts no stress"),
        (dict(), ["data.train=nowhere.xyz"], "There is no data file 'nowhere.xyz'"),
        (dict(), ["data.labels.energy=dft_energy"], "no entry 'dft_energy' (data.labels.energy). Found: config_type, energy, forces"),
        (dict(), ["data.labels.energy_unit=hartree"], "data.labels.energy_unit: Input should be 'eV'"),
        (dict(), ["data.train_size=5000"], "data.train_size is 5000, but only"),
        (dict(), ["data.elements=[H, C]"], "The data holds O, which the list of elements (H, C) lacks"),
        (dict(), ["data.reference_energies={H: -13.6}"], "data.reference_energies has no value for C, O"),
        (dict(), ["data.reference_energies=isolated"], "no frame holds a single atom of H, C, O"),
        (dict(), ["data.split=group"], "data.labels.group does not say which entry names it"),
        (dict(), ["data.valid=" + ETHANOL], "is the same structure as"),
        (dict(), ["training.device=cuda"], "PyTorch sees no GPU here"),
        (dict(), ["training.device=gpu"], "training.device is 'gpu', which PyTorch does not have here"),
        (dict(), ["data.valid=[]"], "data.valid ([]) holds no structures"),
        (dict(), ["data.test=[]"], "data.test ([]) holds no structures"),
        (dict(), ["training.dtype=float16"], "training.dtype: Input should be 'float32' or 'float64'"),
        (dict(data__train=None), [], "data.train: Input should be a valid string"),
    ],
)  # fmt: skip
def test_wrong_settings(changes: dict, overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import torch

    if "training.device=cuda" in overrides and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    status, _, err = run("train", config(tmp_path, **changes), *overrides, capsys=capsys)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "potential.safetensors").exists()


def test_wrong_configuration_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for text, message in (("a: [1", "is not valid YAML"), ("- 1\n- 2", "must hold settings"), ("model: {}", "data: ")):
        (tmp_path / "c.yaml").write_text(text)
        status, _, err = run("train", tmp_path / "c.yaml", capsys=capsys)
        assert status == 2
        assert message in err
    status, _, err = run("train", tmp_path / "none.yaml", capsys=capsys)
    assert "There is no configuration file" in err


def ethanol_frame(**changes) -> str:
    """One frame of extended XYZ with something wrong in it."""
    atoms = molecule("CH3CH2OH")
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((9, 3)) + 0.1)
    import io

    text = io.StringIO()
    ase.io.write(text, atoms, format="extxyz")
    out = text.getvalue()
    for old, new in changes.get("replace", []):
        assert old in out
        out = out.replace(old, new, 1)
    return out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no frames"),
        ("0\nProperties=species:S:1:pos:R:3 energy=1.0\n", "no atoms"),
        (ethanol_frame(replace=[("energy=-1.0", "energy=nan")]), "energy is not finite"),
        (ethanol_frame(replace=[("0.10000000", "nan")]), "forces[0, 0] is not finite"),
        (ethanol_frame(replace=[('pbc="F F F"', 'pbc="T T T"')]), "has no volume there"),
        (ethanol_frame()[:200], "frame 0 cannot be read"),
        (ethanol_frame() + "9\nProperties=species:S:1:pos:R:3\nC 0 0 0\n", "frame 1 cannot be read"),
        (ethanol_frame(replace=[("\nC ", "\nQq ")]), "'Qq' is not the symbol of an element"),
        (ethanol_frame(replace=[("energy=-1.0", 'energy="1.0 2.0 3.0"')]), "holds 3 numbers, expected one total energy"),
        ("this is not a structure\n", "cannot be read"),
    ],
)  # fmt: skip
def test_wrong_data_files(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "bad.extxyz").write_text(text)
    status, out, err = run("data", "inspect", tmp_path / "bad.extxyz", capsys=capsys)
    assert status == (1 if "ERROR" in out else 2)
    assert message in out + err
    assert "bad.extxyz" in out + err
    assert "Traceback" not in err
    with pytest.raises(ValueError, match=re.escape(message)):
        list(read_structures(tmp_path / "bad.extxyz"))


def test_other_wrong_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    np.savez(tmp_path / "b.npz", z=[1, 1], R=np.zeros((3, 2, 3)), E=np.zeros(2), F=np.zeros((3, 2, 3)))
    (tmp_path / "c.npz").write_bytes(b"not an archive")
    (tmp_path / "d.extxyz.xz").write_bytes(b"not compressed")
    (tmp_path / "e.json").write_text('{"mp-1": {"mp-1-0": {"structure": 3}}}')
    (tmp_path / "f.json").write_text('{"mp-1": {"mp-1-0"')
    (tmp_path / "g.unknown").write_text("?")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("a.npz", "neither layout known"), ("b.npz", "3 frames of positions, but 2 of energy"), ("c.npz", "not a readable npz"),
        ("d.extxyz.xz", "cannot be decompressed"), ("e.json", "not in the layout of MPtrj"), ("f.json", "not complete JSON"),
        ("g.unknown", "does not know this file type"), ("empty", "holds no data files"),
    ):  # fmt: skip
        status, _, err = run("data", "inspect", tmp_path / name, capsys=capsys)
        assert (status, message in err) == (2, True), (name, err)


def test_inspection_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    frames = ase.io.read(ETHANOL, ":60")
    for atoms in frames:
        atoms.calc.results["energy"] /= 27.2114
    ase.io.write(tmp_path / "wrong.extxyz", frames)
    status, out, _ = run("data", "inspect", tmp_path / "wrong.extxyz", capsys=capsys)
    assert status == 1
    assert "Hartree" in out
    assert "training on this data would be wrong" in out
    status, out, err = run("data", "inspect", tmp_path / "absent.extxyz", "--json", capsys=capsys)
    assert (status, list(json.loads(out))) == (2, ["error", "command", "status"])
    assert json.loads(out)["error"] in err
    status, out, _ = run("data", "inspect", tmp_path / "wrong.extxyz", "--json", capsys=capsys)
    assert json.loads(out)["ok"] is False


def test_wrong_use_of_a_potential(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tmp_path / "p.safetensors"
    save(make_potential(["H", "C"]), model)
    ase.io.write(tmp_path / "ethanol.xyz", molecule("CH3CH2OH"))
    ase.io.write(tmp_path / "twins.xyz", Atoms("CC", positions=[[0, 0, 0], [0, 0, 0]]))
    ase.io.write(tmp_path / "bare.extxyz", molecule("CH4"))
    named = molecule("CH4")
    named.info["REF_energy"] = -1.0
    ase.io.write(tmp_path / "named.extxyz", named)
    out = tmp_path / "md"
    for arguments, message in (
        (["evaluate", model, ETHANOL], "O (8) not among the potential's elements (H, C)"),
        (["evaluate", model, tmp_path / "bare.extxyz"], "there is nothing to compare with"),
        (["evaluate", model, tmp_path / "named.extxyz"], "found REF_energy: if REF_energy is it, say --energy REF_energy"),
        (["evaluate", tmp_path / "nothing", ETHANOL], "There is no file"),
        (["evaluate", model, ETHANOL, "--worst", "-1"], "worst must be at least 0, found -1"),
        (["md", model, tmp_path / "ethanol.xyz", "--out", out], "O (8) not among the potential's elements"),
        (["md", model, tmp_path / "none.xyz", "--out", out], "There is no structure file"),
        (["relax", model, tmp_path / "twins.xyz", "--out", tmp_path / "r.xyz"], "Separate overlapping atoms"),
        (["relax", model, tmp_path / "bare.extxyz", "--cell"], "needs periodicity along all axes"),
        (["info", tmp_path / "ethanol.xyz"], "not a readable safetensors file"),
        (["fit", ETHANOL, "--model", "leinn"], "model 'leinn' is unknown. Choose one of leignn"),
    ):
        status, _, err = run(*arguments, capsys=capsys)
        assert status == 2
        assert message in err, (arguments, err)
        assert "Traceback" not in err
    ase.io.write(tmp_path / "cell.extxyz", bulk("C"))
    status, out, err = run("md", model, tmp_path / "cell.extxyz", "--ensemble", "nvt", "--json", capsys=capsys)
    assert (status, "usage: gossamer md" in err) == (2, True)
    answer = json.loads(out)
    assert answer["error"].startswith("gossamer md: argument --ensemble: invalid choice: 'nvt'")
    assert (answer["command"], answer["status"]) == ("md", 2)


def test_a_broken_simulation_has_exit_status_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save(make_potential(["H", "C"]), tmp_path / "p.safetensors")
    ase.io.write(tmp_path / "m.xyz", molecule("CH4"))
    status, out, _ = run(
        "md", tmp_path / "p.safetensors", tmp_path / "m.xyz", "--max-temperature", "1", "--out", tmp_path / "md", capsys=capsys
    )
    assert status == 1
    assert "temperature" in out
    assert os.path.exists(tmp_path / "md" / "broken.extxyz")


def test_errors_of_the_system_are_one_line_and_json(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    save(make_potential(["H", "C"]), model := tmp_path / "p.safetensors")
    ase.io.write(tmp_path / "m.xyz", molecule("CH4"))
    (tmp_path / "file").touch()
    for arguments, message in (
        (["md", model, tmp_path, "--out", tmp_path / "a"], "is a folder; a structure file is expected"),
        (["md", model, tmp_path / "m.xyz", "--out", tmp_path / "file"], "in the way"),
        (["md", model, tmp_path / "m.xyz", "--out", tmp_path / "file" / "x"], "A folder is expected there, not a file"),
        (["relax", model, tmp_path / "m.xyz", "--out", tmp_path], "is a folder; the relaxed structure is one file"),
        (["md", tmp_path, tmp_path / "m.xyz", "--out", tmp_path / "a"], str(tmp_path)),
    ):
        status, out, err = run(*arguments, "--json", capsys=capsys)
        assert (status, message in err, "Traceback" in err) == (2, True, False), (arguments, err)
        assert message in json.loads(out)["error"]
    assert not (tmp_path / "a").exists()

    def full(*arguments, **arrays) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        status, out, err = run("md", model, tmp_path / "m.xyz", "--out", tmp_path / "b", "--json", capsys=capsys)
    assert status == 2
    assert "No space left on device. Free some space" in err
    assert "state.npz': No space left on device" in json.loads(out)["error"]


def test_interrupts_say_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    import gossamer.simulation.md

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gossamer.simulation.md, "md", interrupted)
    status, out, err = run("md", "p", "m", "--json", capsys=capsys)
    assert status == 130
    assert "interrupted. The same command with --resume goes on." in err
    assert json.loads(out)["status"] == 130
    monkeypatch.setattr(gossamer.simulation.md, "md", lambda *a: {"stopped": "SIGTERM", "broken": None, "steps": 3})
    status, out, _ = run("md", "p", "m", "--json", capsys=capsys)
    assert (status, json.loads(out)["stopped"]) == (143, "SIGTERM")
    import gossamer.comparison
    import gossamer.simulation.relax

    answer = {"stopped": "SIGTERM", "converged": False, "steps": 3, "atoms": None}
    monkeypatch.setattr(gossamer.simulation.relax, "relax", lambda *a: dict(answer))
    assert run("relax", "p", "m", "--json", capsys=capsys)[0] == 143
    monkeypatch.setattr(gossamer.simulation.relax, "relax_files", lambda *a: [dict(answer)])
    assert run("relax", "p", "m", "n", "--json", capsys=capsys)[0] == 143

    def stopped(*_: object) -> None:
        raise Stopped("SIGTERM: --resume goes on")

    monkeypatch.setattr(gossamer.comparison, "compare", stopped)
    status, out, _ = run("compare", "a.yaml", "--json", capsys=capsys)
    assert (status, json.loads(out)["status"]) == (143, 143)


def test_a_pipe_that_closes_early_is_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    save(make_potential(["H", "C"]), tmp_path / "p.safetensors")
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["info", str(tmp_path / "p.safetensors")]) == 141
    assert capfd.readouterr().err == ""


def test_several_structures_are_relaxed_by_one_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save(make_potential(["H", "C"]), model := tmp_path / "p.safetensors")
    for name in ("a.xyz", "b.xyz"):
        ase.io.write(tmp_path / name, molecule("CH4"))
    files = [tmp_path / "a.xyz", tmp_path / "b.xyz", tmp_path / "none.xyz"]
    status, out, _ = run("relax", model, *files, "--out", tmp_path / "r", "--fmax", "0.5", "--steps", "3", "--json", capsys=capsys)
    answers = json.loads(out)
    assert status == 1
    assert [Path(a["structure"]).name for a in answers] == ["a.xyz", "b.xyz", "none.xyz"]
    assert "There is no structure file" in answers[2]["error"]
    assert (tmp_path / "r" / "a.extxyz").exists()
    status, out, _ = run("relax", model, *files[:2], "--out", tmp_path / "r", "--fmax", "100", "--way", "plain", capsys=capsys)
    assert (status, out.count("converged in 0 steps")) == (0, 2)


def test_packages_that_are_extras_are_named(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ijson", None)
    (tmp_path / "mptrj.json").write_text('{"mp-1": {"mp-1-0": {"structure": 3}}}')
    status, _, err = run("data", "inspect", tmp_path / "mptrj.json", capsys=capsys)
    assert (status, "needs ijson: pip install 'gossamer[mptrj]'" in err) == (2, True)


def test_completion(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    status, _, err = run("completion", "bash", capsys=capsys)
    assert (status, "pip install 'gossamer[completion]'" in err) == (2, True)
    monkeypatch.undo()
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh", "tcsh"):
        status, out, _ = run("completion", shell, capsys=capsys)
        assert status == 0
        assert "temperature-end" in out, shell


def test_fit_names_every_network() -> None:
    """Its help imports no network, so the names stand there by hand."""
    done = subprocess.run([sys.executable, "-m", "gossamer.cli", "fit", "--help"], capture_output=True, text=True, check=True)
    listed = " ".join(done.stdout.split()).split("--model MODEL network: ")[1].split(", or a preset")[0]
    assert sorted(listed.split(", ")) == sorted(MODELS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "a.xyz", "--minuts", "5"], "gossamer fit: unrecognized arguments: --minuts 5. Did you mean --minutes?"),
        (["import", "a.pth", "b"], "gossamer import: unrecognized arguments: b"),
        (
            ["fit", "a.xyz", os.sep],
            f"gossamer fit: unrecognized arguments: {os.sep}. One file or folder is taken here: put several files into a folder and give that",
        ),
        (
            ["screen", "a.cif", "--model", "m", "--timelimit=3"],
            "gossamer screen run: unrecognized arguments: --timelimit=3. Did you mean --time-limit?",
        ),
    ],
)
def test_unknown_arguments_are_said_by_their_command(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    usage, *_, message = capsys.readouterr().err.splitlines()
    assert message == said
    assert usage.startswith(f"usage: gossamer {words[0]}")
