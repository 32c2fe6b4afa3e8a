"""Parsl's process between submitter and workers, which ends when the submitter has died: Parsl's own would keep workers, and jobs, waiting for it."""

from __future__ import annotations

import os
import runpy
import signal
import threading
import time

MODULE = "parsl.executors.high_throughput.interchange"
PERIOD = 2.0
"""s between looks"""


def _watch(parent: int) -> None:
    """End this process when it has another parent; pools end by themselves when they hear nothing of it, and their jobs with them."""
    while os.getppid() == parent:
        time.sleep(PERIOD)
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the submitter's business
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
