"""Our TorchSim model beside those that mace-torch and sevenn bring themselves, on the same small structures.

    python benchmarks/speed/torchsim_peers.py --python mace=/path/to/python sevenn=/path/to/python [--structures 100]

Each environment needs TorchSim (0.4 or newer: both packages' models ask for its neighbour list). Triclinic cells of two to four water
molecules; energy, forces and stress of all at once after small moves, as dynamics asks for them; float32, one thread, CPU ms of the
fastest call. Each runs in a process of its own, one after the other. MACE: random weights of MP-0 small's sizes, 89 elements, by both
packages; SevenNet-0: the checkpoint of sevenn's wheel, by theirs and imported.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).resolve().parent
ALL = list(range(1, 90))


def mace_theirs() -> Any:
    import peers
    import torch
    from mace.calculators.mace_torchsim import MaceTorchSimModel

    calculator, _ = peers.mace("128x0e", 3, ALL, mp=True)
    return MaceTorchSimModel(calculator.models[0], device=torch.device("cpu"), dtype=torch.float32)


def mace_ours(way: str) -> Any:
    import peers

    from gossamer import TorchSimModel

    calculator, _ = peers.ours({"name": "mace", "preset": "MP-small"}, "kernels", ALL)
    return TorchSimModel(calculator.potential, way=way)


def sevenn_theirs() -> Any:
    from sevenn.torchsim import SevenNetModel

    return SevenNetModel("7net-0", device="cpu")


def sevenn_ours(way: str) -> Any:
    import peers

    from gossamer import TorchSimModel

    calculator, _ = peers.imported("SevenNet_0__11Jul2024", "kernels")
    return TorchSimModel(calculator.potential, way=way)


CANDIDATES: dict[str, tuple[str, Any]] = {
    "MACE MP-0 small, mace-torch's model": ("mace", mace_theirs),
    "MACE MP-0 small, ours, kernels": ("ours", lambda: mace_ours("kernels")),
    "SevenNet-0, sevenn's model": ("sevenn", sevenn_theirs),
    "SevenNet-0, ours, kernels": ("ours", lambda: sevenn_ours("kernels")),
}


def measure(name: str, n: int, calls: int) -> dict[str, Any]:
    """CPU ms of all structures at once; the energies for a look."""
    import torch
    import torch_sim
    from structures import ice

    torch.set_num_threads(1)
    model = CANDIDATES[name][1]()
    structures = [ice(k) for k in range(n)]
    state = torch_sim.initialize_state(structures, torch.device("cpu"), model.dtype)
    times, energy = [], None
    for call in range(calls + 1):
        began = time.process_time()
        out = model(state)
        times.append(time.process_time() - began)
        energy = out["energy"].detach().tolist() if call == 0 else energy
        state.positions = state.positions + 1e-3 * torch.randn(state.positions.shape, generator=torch.Generator().manual_seed(call)).to(
            state.dtype
        )
    return {"ms": 1000 * min(times[1:]), "atoms": sum(map(len, structures)), "energy": energy, "torch_sim": torch_sim.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="*", default=[], metavar="PACKAGE=PYTHON")
    parser.add_argument("--structures", type=int, default=100)
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--only", help="measure this one, in this process")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.structures, arguments.calls)))
        return
    pythons = {"ours": sys.executable, **dict(entry.split("=", 1) for entry in arguments.python)}
    found: dict[str, Any] = {}
    for name, (package, _) in CANDIDATES.items():
        if package not in pythons:
            continue
        command = [pythons[package], __file__, "--only", name, "--structures", str(arguments.structures), "--calls", str(arguments.calls)]
        environment = {**{p.upper(): pythons[p] for p in pythons}, **os.environ}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        found[name] = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{name}: {found[name]['ms']:.0f} ms, first energy {found[name]['energy'][0]:.5f} eV", flush=True)
    one = next(iter(found.values()))
    lines = [f"{datetime.date.today().isoformat()}, TorchSim {one['torch_sim']}, {arguments.structures} structures, {one['atoms']} atoms, one thread, CPU ms of an "
             "evaluation of all.", "", "| model | ms | structures per second |", "|---|---|---|"]  # fmt: skip
    lines += [f"| {name} | {r['ms']:,.0f} | {1000 * arguments.structures / r['ms']:.1f} |" for name, r in found.items()]
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
