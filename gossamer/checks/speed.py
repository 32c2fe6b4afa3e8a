"""How fast and how large: time and memory of energy and forces against the number of atoms; any ASE calculator."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import PicklingError
from typing import Any

import numpy as np
from ase import Atoms

from gossamer.checks.candidate import Candidate, enlarged
from gossamer.checks.result import Metric, Panel, Result, at_most, conclude, curve, measured
from gossamer.machine import machine
from gossamer.neighbors import neighbor_list
from gossamer.processes import without_script
from gossamer.timing import fastest


def time_evaluation(
    calculator: Any, atoms: Atoms, repeats: int = 5, seconds: float = 1.0, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of energy and forces of slightly moved atoms, as molecular dynamics asks for them: the fastest of several.

    One evaluation goes before (it may compile or allocate); at least one is timed, and no new one starts after ``seconds``.
    """
    work = atoms.copy()
    work.calc = calculator
    work.get_forces()
    rng = np.random.default_rng(0)

    def step() -> None:
        work.positions += rng.normal(scale=2e-3, size=work.positions.shape)
        work.get_forces()

    return fastest(step, repeats, seconds, clock)


def memory() -> Callable[[], float]:
    """A function that returns MB used so far: of the GPU where PyTorch is loaded and uses one, else the peak of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() / 1e6
    return _peak


def _peak() -> float:
    """MB. Where Linux says it, not by ``getrusage``: there a process begins with the peak of the one that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if platform.system() == "Darwin" else 1e3)


def memory_by_itself(make: Callable[[], Any], systems: Sequence[Atoms]) -> list[float]:
    """MB that a fresh process has used after energy and forces of each system, one after the other; this one still holds what others used.

    Args:
        make: Makes the calculator.
        systems: From the smallest to the largest.

    Returns:
        NaN for what could not be evaluated there, as where ``make`` cannot be sent to another process.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(make, systems, sender))
    told: list[float] = []
    try:
        with without_script():
            process.start()
    except (PicklingError, AttributeError, TypeError):
        return [math.nan] * len(systems)
    sender.close()
    with contextlib.suppress(EOFError):
        while True:
            told.append(receiver.recv())
    process.join()
    return told + [math.nan] * (len(systems) - len(told))


def _answer(make: Callable[[], Any], systems: Sequence[Atoms], pipe: Any) -> None:
    """What `memory_by_itself` asks of another process; what cannot be evaluated ends it without an answer."""
    with contextlib.closing(pipe), contextlib.suppress(Exception):
        calculator = make()
        for atoms in systems:
            atoms.calc = calculator
            atoms.get_forces()
            pipe.send(_peak())


def growth_exponent(sizes: list[int], seconds: list[float]) -> float:
    """Power n of time ~ atoms^n over the larger half of the sizes; 1 is linear."""
    half = max(2, (len(sizes) + 1) // 2)
    return float(np.polyfit(np.log(sizes[-half:]), np.log(seconds[-half:]), 1)[0]) if len(sizes) > 1 else float("nan")


def check(candidate: Candidate) -> Result:
    """Doubles the system until the effort's limit of atoms or time is reached, or it no longer fits."""
    atoms, effort = candidate.structures[0], candidate.effort
    sizes: list[int] = []
    seconds: list[float] = []
    megabytes: list[float] = []
    systems: list[Atoms] = []
    stopped = f"the limit of {effort.speed_atoms} atoms"
    used = memory()
    wanted = len(atoms) if atoms.pbc.all() else 0
    while wanted <= effort.speed_atoms:
        system = enlarged(atoms, wanted)
        try:
            taken = time_evaluation(candidate.calculator, system, seconds=effort.speed_seconds)
        except Exception as error:  # out of memory has many names
            stopped = f"{len(system)} atoms no longer fit ({type(error).__name__})"
            break
        sizes.append(len(system))
        seconds.append(taken)
        megabytes.append(used())
        systems.append(system)
        if not atoms.pbc.all():
            stopped = "one molecule"
            break
        if taken > effort.speed_seconds:
            stopped = f"an evaluation took more than {effort.speed_seconds:g} s"
            break
        wanted = 2 * len(system)
    if not sizes:
        return conclude([Metric("speed", None, "", "failed", "", "", f"could not be timed: {stopped}", "It cannot be used.")])
    if used is _peak:
        megabytes = memory_by_itself(candidate.make, systems)
    metrics = [
        measured(f"time of {sizes[0]} atoms", 1000 * seconds[0], "ms", "low"),
        measured("time per atom, largest system", 1e6 * seconds[-1] / sizes[-1], "µs/atom", "low"),
        measured("largest system timed", sizes[-1], "atoms", "high"),
        measured("memory with it", megabytes[-1], "MB", "low"),
        measured("molecular dynamics at 0.5 fs, smallest system", 0.0432 / seconds[0], "ns/day", "high"),
    ]
    if len(sizes) > 3 and seconds[-1] > 0.02:
        exponent = growth_exponent(sizes, seconds)
        slow = "Large systems cost more than their share: the neighbour list or the network is not linear."
        metrics.append(at_most("growth of time with the number of atoms", exponent, "(1 is linear)", 1.2, 1.6, slow))
    if candidate.cutoff and atoms.pbc.all():
        (sender, _), _ = neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, candidate.cutoff)
        neighbors = len(sender) / len(atoms)
        metrics += [
            measured("neighbours per atom", neighbors),
            measured("time per neighbour pair, largest system", 1e6 * seconds[-1] / sizes[-1] / neighbors, "µs", "low"),
        ]
    panels = []
    if len(sizes) > 1:
        panels = [
            Panel("Time of energy and forces", "atoms", "ms", [curve(sizes, 1000 * np.array(seconds))], log="xy"),
            Panel("Time per atom", "atoms", "µs/atom", [curve(sizes, 1e6 * np.array(seconds) / np.array(sizes))], log="x"),
            Panel("Memory", "atoms", "MB", [curve(sizes, megabytes)], log="x"),
        ]
    name = atoms.get_chemical_formula(empirical=True)
    return conclude(
        metrics,
        panels,
        [f"{name}, energy and forces through ASE, neighbour list included; ended at {stopped}. {machine()}."],
    )
