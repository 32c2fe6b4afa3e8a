"""A calculator that crashes its process on gold and never answers on platinum, for workers to import."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from typing import Any

from ase.calculators.emt import EMT


class Fragile(EMT):
    """EMT; a structure with gold ends the process as a segmentation fault does, one with platinum starts a program and hangs in native code."""

    def calculate(self, atoms: Any = None, *arguments: Any, **options: Any) -> None:
        if "Au" in atoms.get_chemical_symbols():
            os.kill(os.getpid(), signal.SIGSEGV)
        if "Pt" in atoms.get_chemical_symbols():
            subprocess.Popen(["sleep", "1000"])
            ctypes.PyDLL(None).sleep(1000)  # with Python's lock: no thread and no handler of a signal gets its turn
        time.sleep(0.01)
        super().calculate(atoms, *arguments, **options)
