"""SIGKILL at random moments: nothing is lost, every file is whole, and the end is the undisturbed one, bit by bit.

    python benchmarks/reliability/campaign.py kills --count 200

Training, dynamics and relaxation by their commands, each gone on with after a kill; potentials, stores and kernels while they are written.
(Screenings: benchmarks/screening/kills.py.)
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from common import FINDING, Case, campaign, random_of
from work import begin, wait, works

KILLS = 5
"""of each case"""


def make_case(seed: int, folder: Path, only: str) -> Case:
    """Case k: one kind of work, killed so often, then left to end."""
    shutil.rmtree(folder, ignore_errors=True)
    every = [w for w in works(folder / "inputs") if only in w.name]
    if not every:
        raise SystemExit(f"--only {only}: no work has this in its name.")
    calm: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for work in every:
        place = folder / f"calm-{work.name}"
        place.mkdir()
        began = time.monotonic()
        status = wait(begin(work, place, folder / f"calm-{work.name}.log"))
        assert status == 0, f"{work.name} ends with {status}: {(folder / f'calm-{work.name}.log').read_text()[-2000:]}"
        seconds[work.name] = time.monotonic() - began
        calm[work.name] = work.result(place)

    def case(k: int) -> str:
        rng = random_of(seed, k)
        work = every[k % len(every)]
        place, log = folder / f"disturbed-{work.name}", folder / f"disturbed-{work.name}.log"
        shutil.rmtree(place, ignore_errors=True)
        log.unlink(missing_ok=True)
        place.mkdir()
        for n in range(KILLS):
            child = begin(work, place, log)
            time.sleep(float(rng.uniform(0, 0.8 * seconds[work.name])))
            os.kill(child, signal.SIGKILL)
            status = wait(child)
            if status not in (-signal.SIGKILL, 0):
                return f"{work.name}: {FINDING} status {status} before kill {n}: {log.read_text()[-300:]}"
            try:
                work.check(place)
            except Exception as error:
                return f"{work.name}: {FINDING} after kill {n}: {type(error).__name__}: {error}"
        status = wait(begin(work, place, log))
        if status != 0:
            return f"{work.name}: {FINDING} cannot go on, status {status}: {log.read_text()[-300:]}"
        if work.result(place) != calm[work.name]:
            return f"{work.name}: {FINDING} another end than undisturbed"
        left = [p.name for p in place.rglob(".*") if p.is_file() and ".part" in p.name]
        return (
            f"{work.name}: {FINDING} left behind {left}" if left and work.name in ("train", "md", "relax") else f"{work.name}: the same end"
        )

    return case


def run(count: int, seed: int, minutes: float, out: Path, only: str = "") -> dict[str, Any]:
    """Kill so often; see the module."""
    os.environ["GOSSAMER_CACHE"] = os.devnull + "/no-cache"  # plain networks: a compiler that is killed is none of ours
    return campaign(
        "kills",
        make_case(seed, out / "kills", only),
        math.ceil(count / KILLS),
        seed,
        minutes,
        out,
        {"kills_of_a_case": KILLS, "only": only},
        alone=False,
    )
