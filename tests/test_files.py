"""Writing without loss: locks, what killed processes leave, and the operating system's errors."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.files import atomic_path, explain, locked, remove_parts

HOLD = """
import sys, time
from gossamer.files import locked
with locked(sys.argv[1], sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("name", ["", "relaxed.extxyz"])
def test_a_lock_names_its_holder_and_ends_with_its_process(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), name], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(RuntimeError, match=rf"{folder / name}' is in use by process {holder.pid} on .*choose another --out"),
        locked(folder, name),
    ):
        pass
    with locked(folder, "other.extxyz"):  # other files, and the folder as a whole, have locks of their own
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with locked(folder, name):
        assert list(folder.glob(".*lock"))
        with pytest.raises(RuntimeError, match=f"in use by process {os.getpid()}"), locked(folder, name):
            pass
    assert not folder.exists() or not list(folder.iterdir())


def test_a_lock_leaves_no_trace(tmp_path: Path) -> None:
    with locked(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with locked(tmp_path / "used"):
        (tmp_path / "used" / "a").touch()
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["a"]


def test_parts_of_dead_processes_are_removed(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    names = [f".log.{child.pid}.part.csv", f".run.state.{child.pid}.part.npz", f".CONTCAR.{child.pid}.part"]
    kept = [f".log.{os.getpid()}.part.csv", ".hidden.part.csv", "log.csv"]
    for name in names + kept:
        (tmp_path / name).touch()
    remove_parts(tmp_path, ["CONTCAR"])
    assert {p.name for p in tmp_path.iterdir()} == {*names[:2], *kept}
    with locked(tmp_path):
        assert {p.name for p in tmp_path.iterdir()} == {*kept, ".lock"}
    with atomic_path(tmp_path / "x.y.csv") as temporary:  # the pattern is that of atomic_path
        Path(temporary).touch()
        (tmp_path / temporary.name.replace(str(os.getpid()), str(child.pid))).touch()
        remove_parts(tmp_path, ["x.y"])
        assert [p.name for p in tmp_path.glob(".x*")] == [temporary.name]


def test_errors_of_the_system_say_what_to_do(tmp_path: Path) -> None:
    assert explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.npz")).startswith(
        "'a.npz': No space left on device. Free some space"
    )
    assert explain(FileNotFoundError("There is no potential 'x'.")) == "There is no potential 'x'."
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught, atomic_path(tmp_path / "file" / "a"):
        pass
    assert "expected there, not a file" in explain(caught.value) or "in the way" in explain(caught.value)
