"""A calculator that crashes its process on gold, for workers to import."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from ase.calculators.emt import EMT


class Fragile(EMT):
    """EMT; a structure with gold ends the process as a segmentation fault does."""

    def calculate(self, atoms: Any = None, *arguments: Any, **options: Any) -> None:
        if "Au" in atoms.get_chemical_symbols():
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(0.01)
        super().calculate(atoms, *arguments, **options)
