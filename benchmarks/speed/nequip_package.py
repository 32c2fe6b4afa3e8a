"""Our NequIP beside the nequip package at the same settings: energy, forces and stress through each ASE calculator, in turn.

    python benchmarks/speed/nequip_package.py --nequip /path/to/venv/bin/python --presets S M

Presets S to XL are those of the authors' foundation potentials (l2: below), which ours equals to 1e-14 (tests/reference); random weights,
float32, 5 Å, one thread, CPU time. The package runs eagerly and compiled by AOTInductor, as `nequip-compile` does it; ours
plain, with kernels (the default), and as a compiled program with them. Structures: structures.py. Memory: growth of the
process from the molecule to the largest structure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
CUTOFF, NEIGHBORS, ELEMENTS = 5.0, 30.0, ["H", "C", "O", "Si"]
REPEATS = {"molecule21": 10, "water192": 3, "silicon512": 2}
HOW = ("plain", "kernels", "compiled")
OWN = {"l2": {"num_layers": 4, "l_max": 2, "num_features": 32, "parity": True}}
"""settings besides the presets: the size of the 2022 paper, with features of both parities"""


def theirs(preset: str, compiled: bool, build=None):
    import torch

    torch.set_num_threads(1)
    from nequip.utils.global_state import set_global_state

    set_global_state(allow_tf32=False)
    from nequip.data import from_ase
    from nequip.integrations.ase import NequIPCalculator
    from nequip.integrations.utils import basic_transforms, handle_chemical_species_map
    from nequip.model import NequIPGNNModel
    from nequip.model.nequip_models import _NEQUIP_GNN_PRESETS, _NEQUIP_GNN_STANDARD_PRESET
    from structures import structure

    model = (build or NequIPGNNModel)(
        seed=1, model_dtype="float32", type_names=ELEMENTS, r_max=CUTOFF, avg_num_neighbors=NEIGHBORS, per_type_energy_scales=1.0,
        per_type_energy_shifts=dict.fromkeys(ELEMENTS, 0.0), compile_mode="eager", **{**_NEQUIP_GNN_STANDARD_PRESET, **(OWN[preset] if preset in OWN else _NEQUIP_GNN_PRESETS[preset])},
    ).eval()  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    steps = basic_transforms(model.metadata, CUTOFF, ELEMENTS, handle_chemical_species_map(None, ELEMENTS), neighborlist_backend="matscipy")
    if compiled:
        from nequip.model.inference_models import load_compiled_model
        from nequip.scripts._compile_utils import COMPILE_TARGET_DICT
        from nequip.scripts.compile import _parse_bounds_to_Dim
        from nequip.utils.aot import aot_export_model
        from nequip.utils.aoti_metadata import NEQUIP_AOTI_INPUTS_KEY, NEQUIP_AOTI_OUTPUTS_KEY, serialize_aoti_keys
        from nequip.utils.global_state import get_latest_global_state

        target = COMPILE_TARGET_DICT["ase"]
        data = from_ase(structure("water192"))
        for step in steps:
            data = step(data)
        sizes = {k: _parse_bounds_to_Dim(n, "2,inf") for k, n in (("graph", "num_frames"), ("node", "num_nodes"), ("edge", "num_edges"))}
        facts = {**model.metadata, **get_latest_global_state(only_metadata_related=True)}
        facts = {k: str(int(v)) if isinstance(v, bool) else str(v) for k, v in facts.items()}
        facts[NEQUIP_AOTI_INPUTS_KEY] = serialize_aoti_keys(target["input"])
        facts[NEQUIP_AOTI_OUTPUTS_KEY] = serialize_aoti_keys(target["output"])
        path = os.path.join(tempfile.mkdtemp(), "model.nequip.pt2")
        aot_export_model(
            model=model, device=torch.device("cpu"), input_fields=target["input"], output_fields=target["output"], data=target["data_settings"](data),
            batch_map=target["batch_map_settings"](sizes), output_path=path, inductor_configs={"aot_inductor.metadata": facts}, constant_fold=False, seed=1,
        )  # fmt: skip
        model, _ = load_compiled_model(path, "cpu", list(target["input"]), list(target["output"]))
    return NequIPCalculator(model=model, device="cpu", transforms=steps), parameters


def ours(preset: str, how: str):
    import torch

    torch.set_num_threads(1)
    from gossamer.config import make_config
    from gossamer.data.statistics import Statistics
    from gossamer.potential import Potential
    from gossamer.simulation.calculator import Calculator

    same = {"variant": "published", "embedding_features": 32, "radial_depth": 1, "radial_width": 128}
    values = {**same, **OWN[preset]} if preset in OWN else {"preset": preset}
    model = make_config({"data": {"train": "-"}, "model": {"name": "nequip", "cutoff": CUTOFF, **values}}).model
    potential = Potential(model, Statistics(elements=ELEMENTS, reference_energies=dict.fromkeys(ELEMENTS, 0.0), mean_neighbors=NEIGHBORS))
    return Calculator(potential, way="program" if how == "compiled" else how), potential.num_parameters


def serve(kind: str) -> None:
    """Answer timing requests on standard input, one line each: milliseconds of CPU time per call."""
    who, preset, how = kind.split("/")
    import numpy as np
    from structures import structure

    answers = sys.stdout
    sys.stdout = sys.stderr
    import resource

    calculator, parameters = theirs(preset, how == "compiled") if who == "nequip" else ours(preset, how)
    print(json.dumps({"parameters": parameters}), file=answers, flush=True)
    before = 0
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        name, repeats = line.split()
        atoms = structure(name)
        atoms.calc = calculator
        start, times = atoms.positions.copy(), []
        for _ in range(int(repeats) + 2):
            atoms.positions = start + 1e-3 * rng.standard_normal(start.shape)
            began = time.process_time()
            atoms.get_forces()
            times.append(time.process_time() - began)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        before = before or peak  # after the small molecule: libraries, weights, compilation
        print(json.dumps([1000 * sorted(times[2:])[len(times[2:]) // 2], peak - before]), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nequip", help="Python of an environment with nequip 0.19")
    parser.add_argument("--presets", nargs="+", default=["S", "M"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    rows, record = [], {}
    for preset in arguments.presets:
        kinds = [f"{k}" for k in (f"nequip/{preset}/plain", f"nequip/{preset}/compiled", *(f"ours/{preset}/{h}" for h in HOW))]
        servers = {}
        for kind in kinds:
            python = arguments.nequip if kind.startswith("nequip") else sys.executable
            servers[kind] = subprocess.Popen(
                [python, "-W", "ignore", __file__, "--serve", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            sizes = servers[kind].stdout.readline()
            record[kind] = {**json.loads(sizes), **{name: [] for name in REPEATS}}
        for _ in range(arguments.rounds):
            for name, repeats in REPEATS.items():
                for kind, process in servers.items():
                    process.stdin.write(f"{name} {repeats}\n")
                    process.stdin.flush()
                    record[kind][name].append(json.loads(process.stdout.readline()))
        for kind, process in servers.items():
            process.stdin.close()
            process.wait()
            medians = [sorted(t for t, _ in record[kind][n])[len(record[kind][n]) // 2] for n in REPEATS]
            memory = record[kind]["silicon512"][-1][1]
            rows.append(f"| {kind} | {record[kind]['parameters']:,} | {' | '.join(f'{m:.3g}' for m in medians)} | {memory:.0f} |")
            print(rows[-1], flush=True)
    head = f"| who/preset/how | parameters | {' | '.join(f'{n} ms' for n in REPEATS)} | memory, MB |\n|{'---|' * (3 + len(REPEATS))}\n"
    (HERE / "nequip_package.md").write_text(head + "\n".join(rows) + "\n")
    (HERE / "nequip_package.json").write_text(
        json.dumps({"cpu_ms_and_MB": record, "date": datetime.date.today().isoformat()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
