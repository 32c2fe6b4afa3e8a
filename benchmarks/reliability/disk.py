"""Full disks, read-only folders, two processes on one folder: a clear error, nothing damaged, and the work goes on where there is room again.

    python benchmarks/reliability/campaign.py disk --count 100

Disks are tmpfs file systems of some hundred kilobytes, mounted by root (else those cases fall to the next kind); files are limited by
RLIMIT_FSIZE, which every user may, and fail with EFBIG where a full disk says ENOSPC.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from common import FINDING, Case, campaign, random_of
from work import Work, begin, wait, works

KINDS = ("full", "limited", "read-only", "two")
CLEAR = {
    "full": ("No space left on device",),
    "limited": ("File too large",),
    "read-only": ("Read-only file system", "Permission denied"),
    "two": ("is in use by",),
}
"""what an error must say"""
TWICE = ("train", "md", "relax", "store")
"""work that keeps others out of its folder"""


class Disk:
    """A tmpfs of a size that can be changed; without root there is none."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        self.there = self._mount("size=64m", "-t", "tmpfs", "tmpfs")

    def _mount(self, options: str, *kind: str) -> bool:
        return subprocess.run(["mount", "-o", options, *kind, str(self.place)], capture_output=True, check=False).returncode == 0

    def change(self, options: str) -> None:
        if not self._mount(f"remount,{options}"):
            raise RuntimeError(f"'{self.place}' cannot be mounted again with {options}")

    def free(self) -> None:
        if self.there:
            subprocess.run(["umount", str(self.place)], check=False)


def make_case(seed: int, folder: Path, disk: Disk) -> Case:
    """Case k: one kind of work, disturbed in one way, then left to end."""
    every = works(folder / "inputs")
    calm: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    largest: dict[str, int] = {}
    for work in every:
        place = folder / f"calm-{work.name}"
        place.mkdir()
        assert wait(begin(work, place, folder / "calm.log")) == 0, (folder / "calm.log").read_text()[-2000:]
        files = [p.stat().st_size for p in place.rglob("*") if p.is_file()]
        calm[work.name], sizes[work.name], largest[work.name] = work.result(place), sum(files), max(files)

    def disturbed(work: Work, kind: str, place: Path, log: Path, rng: Any) -> int:
        """Status of the work that met the disturbance."""
        if kind == "full":
            disk.change(f"size={max(4096, int(1.5 * sizes[work.name] * rng.random()))}")
            status = wait(begin(work, place, log))
            disk.change("size=64m")
        elif kind == "limited":
            status = wait(begin(work, place, log, largest_file=int(1.1 * largest[work.name] * rng.random())))
        elif kind == "read-only":
            if rng.random() < 0.5:  # begun before
                child = begin(work, place, folder / "first.log")
                time.sleep(float(rng.uniform(0, 1)))
                os.kill(child, 9)
                wait(child)
            disk.change("ro")
            status = wait(begin(work, place, log))
            disk.change("rw")
        else:
            first = begin(work, place, folder / "first.log")
            _until_locked(place, first)
            status = wait(begin(work, place, log))
            if wait(first) != 0:
                raise AssertionError(f"the first one failed: {(folder / 'first.log').read_text()[-300:]}")
        return status

    def case(k: int) -> str:
        rng = random_of(seed, k)
        kind = KINDS[k % len(KINDS)]
        chosen = every if kind != "two" else [w for w in every if w.name in TWICE]
        work = chosen[rng.integers(len(chosen))]
        if not disk.there and kind in ("full", "read-only"):
            kind = "limited"
        place, log = (disk.place if disk.there else folder) / "run", folder / "disturbed.log"
        for path in (place,):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(mode=0o700)
        log.unlink(missing_ok=True)
        name = f"{kind}, {work.name}"
        status = disturbed(work, kind, place, log, rng)
        said = log.read_text(errors="replace") if log.exists() else ""
        if "Traceback" in said or status == 4 or status < 0:
            return f"{name}: {FINDING} status {status}: {said[-500:]}"
        if status not in (0, 2, 3) or (status and not any(text in said for text in CLEAR[kind])):
            return f"{name}: {FINDING} status {status}, unclear: {said[-300:]}"
        work.check(place)
        again = wait(begin(work, place, log))
        if again != 0 or work.result(place) != calm[work.name]:
            return f"{name}: {FINDING} does not end as undisturbed (status {again}): {log.read_text()[-300:]}"
        return f"{name}: {'a clear error' if status else 'not met'}, the same end"

    return case


def _until_locked(place: Path, child: int) -> None:
    """Wait until another process holds a lock somewhere in the folder."""
    for _ in range(3000):
        if any(p.name.endswith(".lock") for p in place.rglob(".*")):
            return
        time.sleep(0.003)


def run(count: int, seed: int, minutes: float, out: Path, only: str = "") -> dict[str, Any]:
    """Disturb so often; see the module."""
    os.environ["GOSSAMER_CACHE"] = os.devnull + "/no-cache"
    folder = out / "disk"
    subprocess.run(["umount", str(folder / "full")], capture_output=True, check=False)  # of a campaign that was killed
    shutil.rmtree(folder, ignore_errors=True)
    disk = Disk(folder / "full")
    try:
        return campaign("disk", make_case(seed, folder, disk), count, seed, minutes, out, {"tmpfs": disk.there}, alone=False)
    finally:
        disk.free()
