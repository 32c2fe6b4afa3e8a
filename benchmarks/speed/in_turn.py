"""Two or more of our rows of peers.py in one process, one call of each in turn, so that a busy machine is as busy for all of them.

    python benchmarks/speed/in_turn.py "weft (default)" "nequip (default)" [--structures silicon512 water192] [--rounds 40]

CPU time of energies and forces through the ASE calculator, by kernels and as a program, lower quartile; written to in_turn.json, as peers.py does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from peers import MODELS, REPEATS
from structures import structure

from gossamer.machine import machine, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", help="without the way")
    parser.add_argument("--structures", nargs="+", choices=[*REPEATS], default=["silicon512"])
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    names = [f"{row}, {way}" for row in arguments.rows for way in ("kernels", "program")]
    calculators = {name: MODELS[name][1]() for name in names}
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for which in arguments.structures:
        atoms = structure(which)
        start, times = atoms.positions.copy(), {name: [] for name in names}  # type: ignore[var-annotated]
        for number in range(arguments.rounds + 1):
            atoms.positions = start + 1e-3 * rng.standard_normal(start.shape)
            for name in names:
                atoms.calc = calculators[name][0]
                began = time.process_time()
                atoms.get_forces()
                if number:
                    times[name].append(1000 * (time.process_time() - began))
        for name in names:
            found[name][which] = round(statistics.quantiles(times[name], n=4)[0], 2)
    record = {name: {"ms": ms, "parameters": calculators[name][1]} for name, ms in found.items()}
    about = {"date": datetime.date.today().isoformat(), "machine": str(machine()), **versions(("gossamer", "torch"))}
    Path(__file__).with_suffix(".json").write_text(json.dumps({**record, "about": about}, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
