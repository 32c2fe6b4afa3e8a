"""How long something takes, on machines that do other things too."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


def cpu_seconds() -> float:
    """CPU time of this process and of programs that it has run to their end: compilers, or what some calculators start for every structure."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def fastest(run: Callable[[], Any], repeats: int = 5, seconds: float = math.inf, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the fastest of several calls, since other jobs only add; waits for the GPU where PyTorch has one.

    Args:
        run: What is timed.
        repeats: Most calls.
        seconds: After these no further call is begun; one is made in any case.
        clock: ``cpu_seconds`` counts the processor's time.
    """
    torch = sys.modules.get("torch")
    wait: Callable[[], None] = torch.cuda.synchronize if torch is not None and torch.cuda.is_available() else lambda: None
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < repeats and (not times or time.perf_counter() - began < seconds):
        wait()
        start = clock()
        run()
        wait()
        times.append(clock() - start)
    return min(times)
