"""mace-torch and SevenNet on a GPU, through their ASE calculators, on the structures of gpu.py; each in an environment of its own.

    python benchmarks/speed/gpu_peers.py {mace-small,mace-medium,sevennet-0} [--device cuda] [--waters 4 8 15]

MACE of MP-0's size with random weights (the package has no weights in its wheel), SevenNet-0 as its wheel brings it; float32,
eager, as their calculators run by default. Needs nothing of gossamer.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))


def mace(hidden: str, device: str) -> Any:
    from mace.calculators import MACECalculator  # isort: skip  (it sets a variable that e3nn 0.4 needs)
    import numpy as np
    import torch
    from e3nn import o3
    from mace import modules

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    residual = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    model = modules.ScaleShiftMACE(
        r_max=6.0, num_bessel=10, num_polynomial_cutoff=5, max_ell=3, num_interactions=2, num_elements=3, hidden_irreps=o3.Irreps(hidden),
        interaction_cls=residual, correlation=3, interaction_cls_first=residual, MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.zeros((1, 3)), avg_num_neighbors=50.0, atomic_numbers=[1, 6, 8], gate=torch.nn.functional.silu,
        radial_MLP=[64, 64, 64], atomic_inter_scale=1.0, atomic_inter_shift=0.0,
    )  # fmt: skip
    return MACECalculator(models=model.to(device), device=device, default_dtype="float32")


def sevennet(device: str) -> Any:
    from sevenn.calculator import SevenNetCalculator

    return SevenNetCalculator("7net-0", device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["mace-small", "mace-medium", "sevennet-0"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--waters", type=int, nargs="+", default=[4, 8, 15])
    parser.add_argument("--repeats", type=int, default=8)
    arguments = parser.parse_args()
    made = {
        "mace-small": lambda: mace("128x0e", arguments.device),
        "mace-medium": lambda: mace("128x0e + 128x1o", arguments.device),
        "sevennet-0": lambda: sevennet(arguments.device),
    }[arguments.model]()
    import numpy as np
    import torch
    from structures import water

    for n in arguments.waters:
        atoms = water(n)
        atoms.calc = made
        start, rng, times = atoms.positions.copy(), np.random.default_rng(0), []
        try:
            for _ in range(arguments.repeats):
                atoms.positions = start + 1e-3 * rng.normal(size=start.shape)
                began = time.perf_counter()
                atoms.get_forces()
                times.append(1000 * (time.perf_counter() - began))
        except RuntimeError as error:
            print(f"| {arguments.model}, its package | {len(atoms):,} | {str(error).splitlines()[0][:80]} | | |", flush=True)
            continue
        memory = torch.cuda.max_memory_allocated() / 1e6 if arguments.device == "cuda" else 0.0
        row = [
            f"{arguments.model}, its package",
            f"{len(atoms):,}",
            f"{min(times):.3g}",
            f"{1000 * min(times) / len(atoms):.3g}",
            f"{memory:.0f}",
        ]
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
