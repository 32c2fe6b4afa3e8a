"""Parsl's pool of workers on a node, which ends when the process that keeps its books has died: Parsl's own would wait for ever."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import threading
import time

MODULE = "parsl.executors.high_throughput.process_worker_pool"
PERIOD = 2.0
"""s between looks"""


def _watch() -> None:
    """End this process when its multiprocessing manager, once seen, is gone; Parsl starts another pool then."""
    seen = False
    while True:
        time.sleep(PERIOD)
        there = any(child.name.startswith("SyncManager") for child in multiprocessing.active_children())
        if seen and not there:
            os._exit(1)
        seen = there


if __name__ == "__main__":
    threading.Thread(target=_watch, daemon=True).start()
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
