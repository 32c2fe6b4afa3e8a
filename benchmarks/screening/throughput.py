"""Structures per second of a screening, and what Parsl adds: python benchmarks/screening/throughput.py POTENTIAL STRUCTURES

CPU time of relaxing the same structures in this process in blocks of several sizes, one after the other on ASE and together on TorchSim; then a
screening with one worker: time to the first row, of an empty block, and of the whole beside the work in it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gossamer.machine import machine, versions
from gossamer.screening.config import MachineConfig, ScreenConfig
from gossamer.screening.database import Results
from gossamer.screening.executor import Workers
from gossamer.screening.screen import screen
from gossamer.screening.structures import read_items
from gossamer.screening.tasks import make_question, run_block


def in_process(model: str, named: list[Any], engine: str, block: int, steps: int) -> dict[str, Any]:
    """CPU seconds per structure, after the potential was loaded and made ready on the first block."""
    asked = make_question(model, None, ScreenConfig(engine=engine, steps=steps))
    run_block(asked, named[:1])
    began = time.process_time()
    for k in range(0, len(named), block):
        run_block(asked, named[k : k + block])
    return {"engine": engine, "block": block, "per_cpu_second": round(len(named) / (time.process_time() - began), 3)}


def empty_blocks(count: int = 200) -> dict[str, float]:
    """Seconds to the first answer of a worker that does nothing, and of each further one."""
    with tempfile.TemporaryDirectory() as folder:
        workers = Workers(MachineConfig(workers=1), Path(folder) / "parsl", "0" * 32)
        began = time.perf_counter()
        try:
            workers.start()
            workers.submit(os.getpid).result()
            first = time.perf_counter()
            for answer in [workers.submit(os.getpid) for _ in range(count)]:
                answer.result()
            return {"first_s": round(first - began, 2), "each_ms": round(1000 * (time.perf_counter() - first) / count, 2)}
        finally:
            workers.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("potential")
    parser.add_argument("structures")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 8, 32])
    given = parser.parse_args()
    named = [(item.id, item.atoms) for item in read_items([given.structures])][: given.count]
    print(json.dumps({"machine": machine(), "versions": versions(("torch", "ase", "parsl", "torch-sim-atomistic")),
                      "structures": len(named), "atoms": sum(len(a) for _, a in named), "steps": given.steps}))  # fmt: skip
    for engine in ("ase", "torchsim"):
        for block in given.blocks if engine == "torchsim" else given.blocks[-1:]:
            print(json.dumps(in_process(given.potential, named, engine, block, given.steps)), flush=True)
    print(json.dumps({"empty_blocks": empty_blocks()}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.sqlite"
        began = time.time()
        answer = screen(given.structures, given.potential, workers=1, out=out, steps=given.steps, progress=False)
        with Results(out) as results:
            work = sum(r["seconds"] for r in results.rows())
        print(json.dumps({"screening": answer, "wall_s": round(time.time() - began, 1), "work_s": round(work, 1)}))


if __name__ == "__main__":
    sys.exit(main())
