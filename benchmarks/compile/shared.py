"""Seconds until a potential runs as a compiled program: the first of a network on a machine, and others after it.

    python benchmarks/compile/shared.py weft nequip leignn > shared.md

Potentials of default size with random weights, made for ethanol; each row in a process of its own, and for each network with a cache of its own:
empty; the same potential again; one with other weights and other data (scale of the energy, number of neighbours); one with as many other
elements, and one with a fourth, which is another network. Imports are not counted, kernels are built before. Largest difference of a force
from the plain potential, in units of the RMS force.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

POTENTIALS: list[tuple[str, list[str], dict[str, Any]]] = [
    ("the first", ["C", "H", "O"], {"seed": 0}),
    ("the same again", ["C", "H", "O"], {"seed": 0}),
    ("other weights, other data", ["C", "H", "O"], {"seed": 1, "energy_scale": 0.3, "mean_neighbors": 30.0}),
    ("other elements, as many", ["Cl", "N", "S"], {"seed": 2, "energy_scale": 2.0, "mean_neighbors": 9.0}),
    ("one element more", ["C", "H", "N", "O"], {"seed": 3}),
]


def measure(network: str, elements: list[str], seed: int, energy_scale: float = 1.0, mean_neighbors: float = 15.0) -> dict[str, float]:
    """One row, in a process of its own."""
    import torch

    from gossamer.config import make_config
    from gossamer.data.statistics import Statistics
    from gossamer.engine.agreement import probe
    from gossamer.engine.engine import Engine
    from gossamer.engine.program import cached_program
    from gossamer.potential import Potential

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = make_config({"data": {"train": "-"}, "model": {"name": network}})
    statistics = Statistics(
        elements=elements, reference_energies=dict.fromkeys(elements, -1.0), energy_scale=energy_scale, mean_neighbors=mean_neighbors
    )
    potential = Potential(config.model, statistics).eval().requires_grad_(False)
    quick = Engine(potential, "kernels").quick
    graph = probe(potential)
    began = time.perf_counter()
    program = cached_program(quick or potential, graph, make=True)
    seconds = time.perf_counter() - began
    if program is None:
        raise SystemExit(f"{network}: no program")
    exact, found = potential(graph, stress=True).forces, program(graph).forces
    return {"seconds": seconds, "deviation": float((exact - found).abs().max() / exact.pow(2).mean().sqrt())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["weft", "nequip", "leignn"])
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is not None:
        network, elements, options = arguments.row
        print(json.dumps(measure(network, elements, **options)))
        return
    print("| network | potential | seconds until it runs | largest difference of a force |\n|---|---|---|---|")
    for network in arguments.networks:
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "GOSSAMER_CACHE": folder, "OMP_NUM_THREADS": "1"}
            for name, elements, options in POTENTIALS:
                run = [sys.executable, "-W", "ignore", __file__, "--row", json.dumps([network, elements, options])]
                row = json.loads(subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout)
                print(f"| {network} | {name} | {row['seconds']:.2f} | {row['deviation']:.1e} |", flush=True)


if __name__ == "__main__":
    main()
