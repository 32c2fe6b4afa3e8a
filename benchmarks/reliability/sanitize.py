"""The kernels in C++ under AddressSanitizer and UndefinedBehaviorSanitizer, on random structures, in a process of their own.

    python benchmarks/reliability/campaign.py sanitize --count 300

`CXX` with -fsanitize=address,undefined builds every kernel, in a cache of its own, and libasan goes into the process first: so every read and
write of a kernel beyond a tensor, and whatever C++ leaves undefined, ends it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

from common import FINDING, campaign, random_of  # noqa: E402

from gossamer.files import write_json  # noqa: E402

FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
NETWORKS = ("sound", "nequip", "geodite", "mace", "weft", "painn", "schnet", "sevennet")


def run(count: int, seed: int, minutes: float, out: Path, only: str = "") -> dict[str, Any]:
    """Start the process that evaluates so many structures, and read what it says; see the module."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    library = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False).stdout.strip()
    if not os.path.isabs(library):
        raise RuntimeError(f"{compiler} has no libasan.so")
    log = out / "sanitize.log"
    environment = {
        **os.environ, "CXX": f"{compiler} {FLAGS}", "GOSSAMER_CACHE": str(out / "sanitized"), "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }  # fmt: skip
    probe = subprocess.run([sys.executable, __file__, "probe"], env=environment, capture_output=True, text=True, check=False)
    if "heap-buffer-overflow" not in probe.stderr:
        raise RuntimeError(f"the sanitizer does not see a write beyond a tensor: status {probe.returncode}, {probe.stderr[-500:]}")
    command = [sys.executable, __file__, str(count), str(seed), str(minutes), str(out), only]
    with open(log, "w") as file:
        status = subprocess.run(command, env=environment, stderr=file, check=False).returncode
    said = log.read_text(errors="replace")
    found = [line for line in said.splitlines() if "ERROR: AddressSanitizer" in line or "runtime error:" in line]

    result: dict[str, Any] = (
        json.loads((out / "sanitize.json").read_text()) if (out / "sanitize.json").exists() else {"findings": [], "done": 0}
    )
    if found or status:
        what = f"process: {FINDING} {found[:3]}, status {status}, see {log}"
        result["findings"].append({"case": result["done"], "what": what})
        write_json(out / "sanitize.json", result)
        print(what)
    return result


def child(count: int, seed: int, minutes: float, out: Path, only: str) -> None:
    """In the process with the sanitizers: energies and forces by kernels, with and without tables, and the gradients that training asks for."""
    import samples
    import torch
    from ase import Atoms
    from cells import KINDS, brute

    from gossamer.data.structure import as_structure
    from gossamer.engine.engine import Engine
    from gossamer.engine.kernels.attach import attach_kernels
    from gossamer.engine.kernels.cpu import Missing

    torch.set_num_threads(1)
    made: dict[tuple[str, Any], Any] = {}

    def ways(name: str, dtype: Any) -> Any:
        if (name, dtype) not in made:
            potential = samples.make_potential(["H", "C", "O"], dtype=dtype, **samples.conftest.MODELS[name])
            try:
                training = attach_kernels(potential, "training").train()
            except Missing:  # not for every network
                training = None
            made[name, dtype] = potential, [Engine(potential, "kernels"), Engine(potential, "kernels", weights_change=True)], training
        return made[name, dtype]

    names = [n for n in NETWORKS if only in n]
    combinations = [(n, d) for n in names for d in (torch.float32, torch.float64)]

    def case(k: int) -> str:
        rng = random_of(seed, k)
        name, dtype = combinations[k % len(combinations)]
        potential, engines, training = ways(name, dtype)
        frames = []
        while len(frames) < 1 + k % 3:
            kind = KINDS[rng.integers(len(KINDS))]
            positions, cell, pbc, _ = kind(rng)
            table, lengths = brute(positions, cell, pbc, 4.0)
            if len(table) < 2000 and lengths.min(initial=9.0) > 0.3:
                frames.append(Atoms(rng.choice([1, 6, 8], len(positions)), positions, cell=cell, pbc=pbc))
        graph = potential.collate([as_structure(a) for a in frames])
        exact = potential(graph)
        for engine in engines:
            out = engine(graph)
            if not torch.allclose(out.energy.double(), exact.energy.double(), rtol=1e-3, atol=1e-2):
                return f"{name}: {FINDING} energies {out.energy.tolist()}, {exact.energy.tolist()}"
        if training is None:
            return f"{name}: no error (no kernels for training)"
        out = training(graph)
        (out.energy.sum() + out.forces.square().sum()).backward()
        return f"{name}: no error"

    campaign("sanitize", case, count, seed, minutes, out, {"flags": FLAGS, **({"only": only} if only else {})}, alone=False)


def probe() -> None:
    """A kernel's function with room for one byte, where it writes eight: the sanitizer must end this."""
    import torch

    from gossamer.engine.kernels.cpu import sorting

    room = torch.zeros(1, dtype=torch.uint8)
    sorting().vector_bytes(room.data_ptr())


if __name__ == "__main__":
    if sys.argv[1] == "probe":
        probe()
        sys.exit()
    child(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
