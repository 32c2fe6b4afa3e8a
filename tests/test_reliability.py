"""Small, seeded pieces of the reliability campaign (benchmarks/reliability), and what it found once."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io.trajectory import Trajectory
from conftest import make_potential

from gossamer.data.atoms import read_frames
from gossamer.data.npz_file import read_npz
from gossamer.data.readers import read_structures
from gossamer.data.store import Store, write_store
from gossamer.data.structure import Structure
from gossamer.potential_file import load, save
from gossamer.simulation.md import md
from gossamer.simulation.relax import relax
from gossamer.training.checkpoint import read_checkpoint, save_checkpoint

CAMPAIGN = str(Path(__file__).resolve().parents[1] / "benchmarks" / "reliability")


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A module of the campaign."""
    import importlib

    monkeypatch.syspath_prepend(CAMPAIGN)
    return importlib.import_module


def findings(case: Callable[[int], str], count: int, attempt: Any) -> list[str]:
    return [f"{k}: {what}" for k in range(count) if "FINDING" in (what := attempt(case, k))]


@pytest.mark.thorough
def test_nonsense_for_readers(part: Callable[[str], Any], tmp_path: Path) -> None:
    case = part("fuzz").make_case(11, tmp_path)
    assert not findings(case, 250, part("common").attempt)


def test_damaged_files(part: Callable[[str], Any], tmp_path: Path) -> None:
    case = part("damage").make_case(11, tmp_path, machine=False)
    assert not findings(case, 150, part("common").attempt)


@pytest.mark.thorough
def test_random_cells(part: Callable[[str], Any], kernels: Path) -> None:
    assert not findings(part("cells").make_case(11, ()), 330, part("common").attempt)
    assert not findings(part("cells").make_case(12, ("painn",)), 33, part("common").attempt)


# --- what was found ---------------------------------------------------------------------------------------------------


def structure(k: int, group: str | None = None) -> Structure:
    rng = np.random.default_rng(k)
    return Structure(atomic_numbers=np.array([8, 1, 1]), positions=rng.normal(size=(3, 3)), energy=float(k), forces=rng.normal(size=(3, 3)), group=group)  # fmt: skip


@pytest.mark.parametrize("name", ["positions", "n_atoms", "energy", "forces", "atomic_numbers", "checksums", "group"])
def test_a_bit_in_a_store_is_not_read_as_another_number(name: str, tmp_path: Path) -> None:
    write_store((structure(k) for k in range(4)), tmp_path / "a.store")
    file = tmp_path / "a.store" / f"{name}.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"store '.*' is damaged"):
        list(Store(tmp_path / "a.store"))


def test_stores_without_their_list_of_checksums_are_refused(tmp_path: Path) -> None:
    write_store([structure(0, group="Å" * 40)], tmp_path / "a.store")
    group = Store(tmp_path / "a.store")[0].group
    assert (group[:16], len(group.encode())) == ("Å" * 15 + "~", 47)  # of 48 bytes, no half of a letter
    (tmp_path / "a.store" / "checksums.bin").unlink()
    with pytest.raises(ValueError, match=r"'checksums\.bin' has 0 bytes, expected 4"):
        Store(tmp_path / "a.store")
    for content in ({"format": 4, "n_structures": 1}, {"format": 2, "n_structures": -1}, {"format": 2, "n_structures": "1"}, [1]):
        (tmp_path / "a.store" / "store.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="not a complete store"):
            Store(tmp_path / "a.store")


def test_one_store_is_written_once(tmp_path: Path) -> None:
    """A second writer is refused at once, and does not remove what the first has written."""
    begun, go_on = threading.Event(), threading.Event()

    def slowly() -> Any:
        yield structure(0)
        begun.set()
        go_on.wait(30)
        yield structure(1)

    first = threading.Thread(target=write_store, args=(slowly(), tmp_path / "a.store"))
    first.start()
    begun.wait(30)
    with pytest.raises(RuntimeError, match="in use by process"):
        write_store([structure(2)], tmp_path / "a.store")
    go_on.set()
    first.join()
    assert [s.energy for s in Store(tmp_path / "a.store")] == [0.0, 1.0]
    assert [p.name for p in tmp_path.iterdir()] == ["a.store"]


def test_a_store_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield structure(0)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_store(broken(), tmp_path / "a.store")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["S:1:pos:R:477873264", "S:1:pos:R:3:forces:R:2147483648", "S:99999999999999:pos:R:3"])
def test_columns_that_are_not_there_cost_nothing(text: str, tmp_path: Path) -> None:
    """ASE makes room for the columns that a frame announces: gigabytes, and minutes."""
    (tmp_path / "a.extxyz").write_text(f"1\nProperties=species:{text} energy=1.0\nH 0 0 0 1 2 3\n")
    for read in (lambda path: list(read_structures(path)), read_frames):
        with pytest.raises(ValueError, match=r"a\.extxyz.*Properties announces \d+ columns, but the first atom has 7"):
            read(tmp_path / "a.extxyz")


@pytest.mark.parametrize(("name", "content"), [("a.npz", b"PK\x03\x04 no archive"), ("vasprun.xml", b"<?xml version='1.0'?><modeling>"), ("a.db", b"SQLite format 3\0" + bytes(99))])  # fmt: skip
def test_structure_files_that_are_none(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read_frames(tmp_path / name)


def test_tensors_of_another_kind_are_refused(tmp_path: Path) -> None:
    """The same bytes as other numbers: the checksum of weights did not see kinds and shapes."""
    path = tmp_path / "p.safetensors"
    save(make_potential(["H", "O"]), path, [structure(0)])
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    for change in ({"dtype": "I64"}, {"shape": [9]}):
        forged = json.dumps({**header, "check.0.positions": {**header["check.0.positions"], **change}}).encode()
        path.write_bytes(struct.pack("<Q", len(forged)) + forged + data[8 + size :])
        with pytest.raises(ValueError, match="was altered after it was saved"):
            load(path)


def test_a_checkpoint_whose_checksum_lost_its_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {}, {"step": 1})
    path.write_bytes(path.read_bytes().replace(b"checksum", b"chccksum"))
    with pytest.raises(ValueError, match="holds chccksum, state, expected state and checksum"):
        read_checkpoint(path)


def copper(folder: Path) -> Path:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=0)
    ase.io.write(folder / "copper.extxyz", atoms)
    return folder / "copper.extxyz"


def test_a_relaxation_killed_between_frame_and_state_has_each_frame_once(tmp_path: Path) -> None:
    start, out = copper(tmp_path), tmp_path / "relaxed.extxyz"
    relax(EMT(), start, out=tmp_path / "calm.extxyz", steps=6, fmax=1e-9)
    relax(EMT(), start, out=out, steps=3, fmax=1e-9)
    with Trajectory(out.with_suffix(".traj"), "a") as trajectory:  # a frame whose state did not come
        trajectory.write(ase.io.read(tmp_path / "calm.traj", 4))
    relax(EMT(), start, out=out, steps=6, fmax=1e-9, resume=True)
    frames, calm = (ase.io.read(path, ":") for path in (out.with_suffix(".traj"), tmp_path / "calm.traj"))
    assert len(frames) == len(calm) == 7
    for a, b in zip(frames, calm, strict=True):
        np.testing.assert_allclose(a.positions, b.positions, atol=1e-12)  # EMT's own lists depend on where it began


class Cut(EMT):
    """EMT that is interrupted at its second evaluation."""

    evaluations = 0

    def calculate(self, *arguments: Any, **options: Any) -> None:
        self.evaluations += 1
        if self.evaluations == 2:
            raise RuntimeError("killed")
        super().calculate(*arguments, **options)


def test_a_simulation_killed_after_its_first_frame_has_it_once(tmp_path: Path) -> None:
    start, options = copper(tmp_path), dict(steps=10, interval=5, progress=False)
    md(EMT(), start, out=tmp_path / "calm", **options)
    with pytest.raises(RuntimeError, match="killed"):
        md(Cut(), start, out=tmp_path / "cut", **options)
    assert int(read_npz(tmp_path / "cut" / "state.npz")["integrator.nsteps"]) == 0
    md(EMT(), start, out=tmp_path / "cut", resume=True, **options)
    logs = [[row.split(",")[0] for row in (tmp_path / name / "log.csv").read_text().splitlines()] for name in ("calm", "cut")]
    assert logs[0] == logs[1] == ["step", "0", "5", "10"]
    with Trajectory(tmp_path / "cut" / "trajectory.traj") as trajectory:
        assert len(trajectory) == 3


@pytest.mark.parametrize("name", ["state.npz", "log.csv", "trajectory.traj"])
def test_a_simulation_with_a_damaged_file_says_which(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(out=tmp_path / "md", interval=5, progress=False)
    md(EMT(), copper(tmp_path), steps=10, **options)
    file = tmp_path / "md" / name
    data = file.read_bytes()
    for content in (b"\xff" * 30, data[: len(data) // 2].replace(b"0", b"\xfe")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            md(EMT(), tmp_path / "copper.extxyz", steps=20, resume=True, **options)


def test_states_of_other_things_are_refused(tmp_path: Path) -> None:
    """A state whose arrays are none of this simulation, or of this relaxation."""
    start = copper(tmp_path)
    md(EMT(), start, out=tmp_path / "md", steps=5, interval=5, progress=False)
    relax(EMT(), start, out=tmp_path / "r.extxyz", steps=2, fmax=1e-9)
    for path, change, run in (
        (tmp_path / "md" / "state.npz", {"momenta": np.zeros((2, 3))}, lambda: md(EMT(), start, out=tmp_path / "md", steps=9, interval=5, resume=True)),
        (tmp_path / "r.state.npz", {"optimizer.nonsense": np.zeros(3)}, lambda: relax(EMT(), start, out=tmp_path / "r.extxyz", resume=True)),
    ):  # fmt: skip
        with np.load(path) as data:
            stored = dict(data)
        np.savez(path, **{**stored, **change})
        with pytest.raises(ValueError, match=r"state\.npz' does not hold the state of this"):
            run()
