"""Writing without loss: locks, what killed processes leave, and the operating system's errors."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gossamer.files import atomic_folder, atomic_path, explain, locked, remove_parts
from gossamer.training.checkpoint import read_checkpoint

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


def test_threads_wait_for_a_lock_and_write_one_file(tmp_path: Path) -> None:
    """Each has a temporary file of its own, and one at a time the lock."""
    within: list[int] = []

    def write(number: int) -> None:
        with atomic_path(tmp_path / "x") as temporary:
            temporary.write_text(str(number))
            with locked(tmp_path, "x", wait=True):
                within.append(number)
                time.sleep(0.01)
                assert within.pop() == number
            assert temporary.read_text() == str(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(16)))
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


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


def test_errors_of_a_full_disk_name_the_file(tmp_path: Path) -> None:
    """Writing to an open file fails without a name, opening a temporary one with that."""
    for given in ((), (str(tmp_path / "a.json"),)):
        with pytest.raises(OSError) as raised, atomic_path(tmp_path / "a.json") as temporary:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *(str(temporary) for _ in given))
        assert explain(raised.value).startswith(f"'{tmp_path / 'a.json'}': No space left on device. Free some space")
    with pytest.raises(FileNotFoundError, match="other"), atomic_path(tmp_path / "a.json"):
        (tmp_path / "other").read_text()


def test_errors_of_the_system_say_what_to_do(tmp_path: Path) -> None:
    assert explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.npz")).startswith(
        "'a.npz': No space left on device. Free some space"
    )
    assert explain(FileNotFoundError("There is no potential 'x'.")) == "There is no potential 'x'."
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught, atomic_path(tmp_path / "file" / "a"):
        pass
    assert "expected there, not a file" in explain(caught.value) or "in the way" in explain(caught.value)


KILLED = """
import os, signal, sys
from pathlib import Path
import gossamer.files
from gossamer.files import atomic_folder

kill, rename, renames = lambda: os.kill(os.getpid(), signal.SIGKILL), Path.rename, []

def counted(path, target):
    renames.append(target)
    moment == f"rename {len(renames)}" and kill()
    return rename(path, target)

moment, Path.rename = sys.argv[2], counted
with atomic_folder(sys.argv[1]) as folder:
    (folder / "a").write_text("new")
    moment == "writing" and kill()
    (folder / "b").write_text("new")
    gossamer.files.shutil.rmtree = lambda *_, **__: kill()
"""


@pytest.mark.parametrize(
    ("moment", "there"),
    [
        ("writing", False),
        ("rename 1", False),
        ("cleaning up", False),
        *((m, True) for m in ("writing", "rename 1", "rename 2", "cleaning up")),
    ],
)
def test_a_killed_process_leaves_a_folder_whole(moment: str, there: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The old one or the new one, under its name or put back by the next call, which says so and leaves nothing else."""
    out = tmp_path / "package"
    if there:
        with atomic_folder(out) as folder:
            [(folder / name).write_text("old") for name in "ab"]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), moment], check=False)
    assert killed.returncode == -signal.SIGKILL
    between = moment == "rename 2"
    assert out.exists() == ((there and not between) or moment == "cleaning up")
    with pytest.raises(ZeroDivisionError), atomic_folder(out):
        _ = 1 / 0
    content = "new" if moment == "cleaning up" else "old"
    assert out.exists() == (there or moment == "cleaning up")
    if out.exists():
        assert {path.name: path.read_text() for path in out.iterdir()} == {"a": content, "b": content}
    assert ("is back" in caplog.text) == between
    assert list(tmp_path.iterdir()) == ([out] if out.exists() else [])
    with atomic_folder(out) as folder:
        (folder / "c").write_text("newest")
    assert [path.name for path in out.iterdir()] == ["c"]


WRITER = """
import itertools, sys, torch
from pathlib import Path
from gossamer.training.checkpoint import save_checkpoint
for step in itertools.count(1):
    save_checkpoint(Path(sys.argv[1]), {f"t{k}": torch.full((2000,), float(step)) for k in range(20)}, {"step": step})
"""


@pytest.mark.thorough
def test_files_of_tensors_are_read_whole_while_others_are_written(tmp_path: Path) -> None:
    """A checkpoint that a run replaces again and again is at any moment one of them."""
    path, found = tmp_path / "checkpoint.safetensors", set()
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) as writer:
        try:
            while not path.exists():
                assert writer.poll() is None
                time.sleep(0.05)
            for _ in range(1500):
                tensors, state = read_checkpoint(path)
                assert all((value == state["step"]).all() for value in tensors.values())
                found.add(state["step"])
        finally:
            writer.kill()
    assert len(found) > 10
