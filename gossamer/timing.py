"""How long something takes, on machines that do other things too."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any


def fastest(run: Callable[[], Any], repeats: int = 5, seconds: float = math.inf, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the fastest of several calls, since other jobs only add; waits for the GPU where PyTorch has one.

    Args:
        run: What is timed.
        repeats: Most calls.
        seconds: After these no further call is begun; one is made in any case.
        clock: ``time.process_time`` counts the processor's time.
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
