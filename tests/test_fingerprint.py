"""Frames that were trained on are recognised, and only these."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from conftest import ETHANOL, make_potential

from gossamer.checks.source import find_sources
from gossamer.data import fingerprint
from gossamer.data.fingerprint import SeenFrames, leave_out_training_frames, read_seen_frames
from gossamer.data.readers import read_structures
from gossamer.data.store import Store, write_store
from gossamer.data.structure import Structure
from gossamer.potential_file import load, save


def structure(atoms: Atoms) -> Structure:
    return Structure(atomic_numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc)


@pytest.fixture(scope="module")
def frames() -> list[Structure]:
    return list(read_structures(ETHANOL))[:40]


def test_files_of_other_formats_hold_the_same_frames(frames: list[Structure], tmp_path: Path) -> None:
    seen = SeenFrames.of(frames[:20], frames[20:30])
    expected = ["train"] * 20 + ["valid"] * 10 + ["new"] * 10
    assert [seen.where(f) for f in frames] == expected
    ase.io.write(tmp_path / "again.extxyz", [f.to_ase() for f in frames])
    assert [seen.where(a) for a in ase.io.read(tmp_path / "again.extxyz", ":")] == expected
    write_store(frames, tmp_path / "store")
    assert [seen.where(f) for f in Store(tmp_path / "store")] == expected
    single = [Atoms(f.atomic_numbers, (f.positions.astype(np.float32) + np.float32(20)) - np.float32(20)) for f in frames]
    assert [seen.where(a) for a in single] == expected


def test_rounding_is_met_on_both_sides() -> None:
    """A large structure with a last digit lost everywhere, many times."""
    atoms = bulk("Cu", cubic=True).repeat(5)
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        atoms.positions += rng.normal(scale=0.1, size=atoms.positions.shape)
        seen = SeenFrames.of([structure(atoms)], ())
        hits += seen.where(Atoms(atoms.numbers, np.round(atoms.positions, 6), cell=atoms.cell, pbc=True)) == "train"
    assert hits == 200


def test_near_frames_are_others() -> None:
    """A displaced atom of a large crystal (phonons), a strained cell with atoms at the origin (equation of state), other elements."""
    crystal = bulk("Cu", cubic=True).repeat(6)
    moved = crystal.copy()
    moved.positions[500, 1] += 0.01
    lone, strained = bulk("Cu"), bulk("Cu", a=3.7)
    other = crystal.copy()
    other.numbers[7] = 47
    open_box = crystal.copy()
    open_box.pbc = False
    seen = SeenFrames.of([structure(crystal), structure(lone)], ())
    assert [seen.where(a) for a in (crystal, lone)] == ["train", "train"]
    assert [seen.where(a) for a in (moved, strained, other, open_box)] == ["new"] * 4


def test_molecules_may_lie_in_any_box(frames: list[Structure]) -> None:
    atoms = frames[0].to_ase()
    atoms.cell = [20.0] * 3
    assert SeenFrames.of(frames[:1], ()).where(atoms) == "train"


def test_a_potential_remembers(frames: list[Structure], tmp_path: Path) -> None:
    """In its file, for the judge too; a file of an older version knows nothing and says nothing."""
    potential = make_potential(["H", "C", "O"])
    save(potential, tmp_path / "old.safetensors")
    assert load(tmp_path / "old.safetensors").seen is None
    assert read_seen_frames(tmp_path / "old.safetensors") is None
    assert leave_out_training_frames(None, frames).used == list(range(40))
    assert leave_out_training_frames(None, frames).notes == []
    potential.seen = SeenFrames.of(frames[:20], frames[20:30])
    save(potential, tmp_path / "new.safetensors")
    for found in (load(tmp_path / "new.safetensors").seen, find_sources([tmp_path / "new.safetensors"], [])[0].seen):
        assert found is not None
        assert [found.where(f) for f in frames[18:32]] == ["train"] * 2 + ["valid"] * 10 + ["new"] * 2


def test_what_is_left_and_what_is_said(frames: list[Structure]) -> None:
    seen = SeenFrames.of(frames[:20], frames[20:30])
    some = leave_out_training_frames(seen, frames)
    assert some.used == list(range(20, 40))
    assert not some.training_error
    assert some.notes[0] == "20 of 40 frames were trained on; they are left out."
    assert "10 chose the best weights" in some.notes[1]
    everything = leave_out_training_frames(seen, frames, include=True)
    assert everything.used == list(range(40))
    assert not everything.training_error
    assert "included: the errors are too small" in everything.notes[0]
    alone = leave_out_training_frames(seen, frames[:20])
    assert alone.used == list(range(20))
    assert alone.training_error
    assert alone.notes[0].startswith("TRAINING ERROR: all 20 frames")


def test_large_sets_are_sampled(frames: list[Structure], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sample in any order, a fair one, and said to be one; trainings after one another add up."""
    monkeypatch.setattr(fingerprint, "MOST", 10)
    seen, reverse = SeenFrames.of(frames, ()), SeenFrames.of(frames[::-1], ())
    assert len(seen.train) == 10
    np.testing.assert_array_equal(seen.train, reverse.train)
    assert not seen.complete
    assert [seen.where(f) for f in frames].count("train") == 10
    assert "remembers 10 of its 40 training frames: most others cannot be recognised" in leave_out_training_frames(seen, frames).notes[-1]
    halves = SeenFrames.of(frames[:20], ()) | SeenFrames.of(frames[20:], ())
    np.testing.assert_array_equal(halves.train, seen.train)
    assert halves.n_train == 40


def test_no_torch() -> None:
    code = "import sys, gossamer.data.fingerprint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
