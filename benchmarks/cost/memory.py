"""What keeping freed memory in the process saves: the same 192-atom step with and without, in fresh processes, in turn.

    python benchmarks/cost/memory.py

CPU time per step on one thread, page faults and system time; LEIGNN with 64 channels, 3 layers, 5 Å, random weights.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"


def measure(keep: bool) -> dict[str, float]:
    import gossamer.engine.memory

    if not keep:
        gossamer.engine.memory._done = True  # pretend that it was done
    import numpy as np
    import torch
    from run import structure

    from gossamer.data.statistics import Statistics
    from gossamer.models import LEIGNNConfig
    from gossamer.potential import Potential
    from gossamer.simulation.calculator import Calculator

    torch.set_num_threads(1)
    statistics = Statistics(elements=["H", "O"], reference_energies={"H": 0, "O": 0}, mean_neighbors=54.0)
    atoms, rng = structure("water192"), np.random.default_rng(0)
    atoms.calc = Calculator(Potential(LEIGNNConfig(), statistics))
    atoms.get_forces()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    for _ in range(15):
        atoms.positions += rng.normal(scale=1e-3, size=atoms.positions.shape)
        atoms.get_forces()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "cpu_ms": (time.process_time() - began) / 15 * 1000,
        "system_ms": (after.ru_stime - before.ru_stime) / 15 * 1000,
        "page_faults": (after.ru_minflt - before.ru_minflt) / 15,
        "peak_MB": after.ru_maxrss / 1024,
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1] == "keep")))
    else:
        for _ in range(4):
            for kind in ("return", "keep"):
                result = subprocess.run([sys.executable, "-W", "ignore", __file__, kind], capture_output=True, text=True, check=True)
                print(kind, result.stdout.strip(), flush=True)
