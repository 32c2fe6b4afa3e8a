"""Dynamics of many small crystals: TorchSim on our model against a loop over our ASE calculator, in one run.

    python benchmarks/speed/torchsim.py [--structures 20 100] [--steps 40] [--out torchsim.md]

Triclinic cells of two to four water molecules, NequIP in its default size with random weights, float32, Langevin dynamics at
300 K; one thread, CPU time, structure-steps per second. Needs torch-sim-atomistic. Programs are made before the clock starts.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch_sim
from ase import Atoms, units
from ase.md.langevin import Langevin
from structures import ice

from gossamer.config import make_config
from gossamer.data.statistics import Statistics
from gossamer.potential import Potential
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.torchsim import TorchSimModel


def potential() -> Potential:
    torch.manual_seed(0)
    config = make_config({"data": {"train": "-"}, "model": {"name": "nequip"}}).model
    return Potential(config, Statistics(elements=["H", "O"], reference_energies={"H": 0.0, "O": 0.0}, mean_neighbors=50.0))


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


def with_torchsim(way: str, structures: list[Atoms], steps: int) -> float:
    model = TorchSimModel(potential(), way=way)
    state = torch_sim.io.atoms_to_state(structures, torch.device("cpu"), torch.float64)
    integrator = torch_sim.Integrator.nvt_langevin if "Integrator" in dir(torch_sim) else torch_sim.nvt_langevin

    def run(n: int) -> None:
        torch_sim.integrate(system=state, model=model, integrator=integrator, n_steps=n, temperature=300, timestep=0.0005)

    run(1)
    return len(structures) * steps / (seconds(lambda: run(steps + 1)) - seconds(lambda: run(1)))


def with_ase(way: str, structures: list[Atoms], steps: int) -> float:
    calculator, total = Calculator(potential(), way=way), 0.0
    for atoms in structures:
        work = atoms.copy()
        work.calc = calculator
        work.get_forces()
        dynamics = Langevin(work, 0.5 * units.fs, temperature_K=300, friction=0.01 / units.fs, rng=np.random.default_rng(1))
        total += seconds(lambda run=dynamics.run: run(steps), 1)
    return len(structures) * steps / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"{datetime.date.today().isoformat()}, torch {torch.__version__}, torch-sim-atomistic {version('torch-sim-atomistic')}, one thread; structure-steps per second.",
        "",
        "| structures, atoms | TorchSim, program | TorchSim, kernels | TorchSim, plain | ASE, program | ASE, kernels | TorchSim over ASE, programs |",
        "|---|---|---|---|---|---|---|",
    ]
    for n in arguments.structures:
        structures = [ice(k) for k in range(n)]
        rates = [with_torchsim(way, structures, arguments.steps) for way in ("program", "kernels", "plain")]
        rates += [with_ase(way, structures[:6], arguments.steps) for way in ("program", "kernels")]
        cells = [f"{n}, {sum(map(len, structures)):,}", *(f"{r:,.0f}" for r in rates), f"{rates[0] / rates[3]:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
