"""Energy and forces of our networks and of other packages on the same structures, each package in an environment of its own.

    python benchmarks/speed/peers.py --python mace=/path/to/venv/bin/python sevenn=... [--only mace ours] [--threads 1]

How each was installed (torch 2.13.0 first, held by a constraints file): nequip: `nequip nequip-allegro`; mace: `mace-torch`;
sevenn: `sevenn`; chgnet: `chgnet`; schnetpack: `schnetpack==2.0.4`, then 2.1.1 without dependencies; matgl: `matgl`; orb:
`orb-models`; deepmd: `deepmd-kit==3.2.0` without dependencies, then what it imports, its operators for torch 2.11 moved away;
gotennet: `gotennet` without dependencies, then `torch_geometric e3nn ase omegaconf lightning rich hydra-core python-dotenv
pyrootutils scikit-learn pandas`; nequix: `nequix` without dependencies (they bring 4.5 GB of CUDA), then `jax equinox e3nn-jax
jraph matscipy ase ase-db-backends optax h5py tqdm pyyaml cloudpickle wandb wandb-osh`; pace: `python-ace numpy==2.2.6`.

Every model runs as its users run it, through its ASE calculator (neighbour list included), in float32. Random weights
unless a package bundles some; SevenNet's and CHGNet's own. One thread: CPU time, fastest of several calls (at least
five seconds of them) with slightly moved atoms. Each candidate is a process of its own; before and after, it times a matrix product, so that a
slower machine shows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
REPEATS = {"molecule21": 20, "water192": 4, "silicon512": 3, "copper864": 2}
ELEMENTS = {1: "H", 6: "C", 8: "O", 14: "Si", 29: "Cu"}
ALL = list(range(1, 90))


def ours(model: dict[str, Any], way: str, numbers: list[int] = [*ELEMENTS]) -> tuple[Any, int]:  # noqa: B006
    from ase.data import chemical_symbols

    from gossamer.config import make_config
    from gossamer.data.statistics import Statistics
    from gossamer.potential import Potential
    from gossamer.simulation.calculator import Calculator

    symbols = [chemical_symbols[z] for z in numbers]
    config = make_config({"data": {"train": "-"}, "model": model}).model
    potential = Potential(config, Statistics(elements=symbols, reference_energies=dict.fromkeys(symbols, 0.0), mean_neighbors=30.0))
    return Calculator(potential, way=way), potential.num_parameters


def nequip(preset: str | None, cutoff: float, allegro: bool = False) -> tuple[Any, int]:
    """Compiled by AOTInductor, the package's fastest mode, as in nequip_package.py."""
    import nequip_package as package

    package.CUTOFF, package.ELEMENTS = cutoff, list(ELEMENTS.values())
    package.OWN["l2 even"] = dict(num_layers=3, l_max=2, num_features=32, parity=False, radial_mlp_depth=1, radial_mlp_width=64)
    if not allegro:
        return package.theirs(preset, True)
    from allegro.model import AllegroModel

    def build(**settings: Any) -> Any:
        keep = {
            k: settings[k]
            for k in ("seed", "model_dtype", "type_names", "r_max", "avg_num_neighbors", "per_type_energy_scales", "per_type_energy_shifts")
        }
        widths = dict.fromkeys(
            ("scalar_embed_mlp_hidden_layers_width", "allegro_mlp_hidden_layers_width", "readout_mlp_hidden_layers_width"), 128
        )
        return AllegroModel(**keep, **widths, l_max=2, parity=True, num_layers=2, num_scalar_features=128, num_tensor_features=32, compile_mode="eager",
                            radial_chemical_embed={"_target_": "allegro.nn.TwoBodyBesselScalarEmbed", "num_bessels": 8})  # fmt: skip

    return package.theirs("M", True, build)


def mace(hidden: str, correlation: int, numbers: list[int], mp: bool = False, compiled: bool = False) -> tuple[Any, int]:
    """Random weights; ``mp``: with the cutoff and the residual first layer of MACE-MP-0; ``compiled``: by the package's ``compile_mode``."""
    import torch
    from mace.calculators import MACECalculator  # isort: skip  (it sets a variable that e3nn 0.4 needs)
    import numpy as np
    from e3nn import o3
    from mace import modules

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    residual = "RealAgnosticResidualInteractionBlock"
    model = modules.ScaleShiftMACE(
        r_max=6.0 if mp else 5.0, num_bessel=10, num_polynomial_cutoff=5, max_ell=3, num_interactions=2, num_elements=len(numbers), hidden_irreps=o3.Irreps(hidden),
        interaction_cls=modules.interaction_classes[residual], correlation=correlation,
        interaction_cls_first=modules.interaction_classes[residual if mp else "RealAgnosticInteractionBlock"], MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.zeros((1, len(numbers))), avg_num_neighbors=30.0, atomic_numbers=numbers, gate=torch.nn.functional.silu,
        radial_MLP=[64, 64, 64], atomic_inter_scale=1.0, atomic_inter_shift=0.0,
    )  # fmt: skip
    options = {"compile_mode": "default"} if compiled else {}
    return MACECalculator(models=model, device="cpu", default_dtype="float32", **options), sum(p.numel() for p in model.parameters())


def imported(pattern: str, way: str) -> tuple[Any, int]:
    """A checkpoint of sevenn's wheel (all of its 89 elements) as our potential."""
    from gossamer.imports import read_potential
    from gossamer.imports.contract import ImportOptions
    from gossamer.imports.inert import open_tree
    from gossamer.simulation.calculator import Calculator

    (file,) = Path(os.environ["SEVENN"]).parents[1].glob(f"lib/python*/site-packages/sevenn/pretrained_potentials/{pattern}/*.pth")
    _, potential = read_potential(open_tree(file), ImportOptions())
    return Calculator(potential, way=way), potential.num_parameters


def sevenn(name: str) -> tuple[Any, int]:
    from sevenn.calculator import SevenNetCalculator

    calculator = SevenNetCalculator(name, device="cpu")
    return calculator, sum(p.numel() for p in calculator.model.parameters())


def chgnet() -> tuple[Any, int]:
    from chgnet.model import CHGNet, CHGNetCalculator

    model = CHGNet.load(verbose=False, use_device="cpu")
    return CHGNetCalculator(model, use_device="cpu", on_isolated_atoms="ignore"), sum(p.numel() for p in model.parameters())


def schnetpack(kind: str, layers: int) -> tuple[Any, int]:
    import typing

    import torch
    import torch.utils.data.dataloader as loader

    if not hasattr(loader, "T_co"):  # torch 2.13 no longer has the name that schnetpack imports
        loader.T_co = typing.TypeVar("T_co", covariant=True)
    import schnetpack as spk
    import schnetpack.transform as transform
    from ase.calculators.calculator import Calculator, all_changes
    from schnetpack.interfaces import AtomsConverter

    radial = spk.nn.GaussianRBF(n_rbf=20, cutoff=5.0)
    representation = {"painn": spk.representation.PaiNN, "schnet": spk.representation.SchNet}[kind](
        n_atom_basis=128, n_interactions=layers, radial_basis=radial, cutoff_fn=spk.nn.CosineCutoff(5.0)
    )
    model = spk.model.NeuralNetworkPotential(
        representation=representation, input_modules=[spk.atomistic.PairwiseDistances()],
        output_modules=[spk.atomistic.Atomwise(n_in=128, output_key="energy"), spk.atomistic.Forces(energy_key="energy", force_key="forces")],
    ).eval()  # fmt: skip
    converter = AtomsConverter(neighbor_list=transform.MatScipyNeighborList(cutoff=5.0), dtype=torch.float32, device="cpu")

    class InMemory(Calculator):
        """What schnetpack's SpkCalculator does with a model from a file."""

        implemented_properties = ["energy", "forces"]  # noqa: RUF012

        def calculate(self, atoms=None, properties=None, system_changes=all_changes):
            super().calculate(atoms)
            out = model(converter(atoms))
            self.results = {"energy": out["energy"].item(), "forces": out["forces"].detach().numpy()}

    calculator = InMemory()
    calculator.model, calculator.converter = model, converter
    return calculator, sum(p.numel() for p in model.parameters())


def tensornet() -> tuple[Any, int]:
    from matgl.apps.pes import Potential
    from matgl.config import DEFAULT_ELEMENTS
    from matgl.ext.ase import PESCalculator
    from matgl.models import TensorNet

    model = TensorNet(cutoff=5.0, element_types=DEFAULT_ELEMENTS, is_intensive=False, units=64, nblocks=2).eval()
    return PESCalculator(Potential(model, calc_stresses=True), stress_unit="eV/A3"), sum(p.numel() for p in model.parameters())


def orb() -> tuple[Any, int]:
    from orb_models.forcefield.atomic_system import SystemConfig
    from orb_models.forcefield.calculator import ORBCalculator
    from orb_models.forcefield.pretrained import orb_v3_conservative_architecture

    model = orb_v3_conservative_architecture(device="cpu", system_config=SystemConfig(radius=6.0, max_num_neighbors=120)).eval()
    model.requires_grad_(False)
    return ORBCalculator(model, device="cpu"), sum(p.numel() for p in model.parameters())


def deeppot() -> tuple[Any, int]:
    import numpy as np
    import torch
    from ase.calculators.calculator import Calculator, all_changes
    from deepmd.pt.model.model import get_model
    from deepmd.pt.utils import env

    types = list(ELEMENTS.values())
    model = get_model({
        "type_map": types,
        "descriptor": {"type": "se_e2_a", "sel": [80, 40, 60, 60, 100], "rcut_smth": 0.5, "rcut": 6.0, "neuron": [25, 50, 100], "axis_neuron": 16,
                       "type_one_side": True, "seed": 1, "precision": "float32"},
        "fitting_net": {"neuron": [240, 240, 240], "resnet_dt": True, "seed": 1, "precision": "float32"},
    }).eval()  # fmt: skip

    class InMemory(Calculator):
        implemented_properties = ["energy", "forces"]  # noqa: RUF012

        def calculate(self, atoms=None, properties=None, system_changes=all_changes):
            super().calculate(atoms)
            kinds = torch.as_tensor([[types.index(s) for s in atoms.get_chemical_symbols()]])
            x = torch.as_tensor(atoms.positions[None], dtype=env.GLOBAL_PT_FLOAT_PRECISION).requires_grad_()
            box = torch.as_tensor(np.asarray(atoms.cell)[None], dtype=x.dtype) if atoms.pbc.all() else None
            out = model(x, kinds, box=box)
            self.results = {"energy": float(out["energy"]), "forces": out["force"][0].detach().numpy()}

    return InMemory(), sum(p.numel() for p in model.parameters())


def gotennet(layers: int) -> tuple[Any, int]:
    """The representation with a two-layer energy head; the package has no calculator and no periodic neighbour list: ASE's."""
    import types
    from importlib.machinery import ModuleSpec

    for name, attribute in (("torch_cluster", "radius_graph"), ("torch_scatter", "scatter")):  # no wheels, and not called here
        module: Any = types.ModuleType(name)
        setattr(module, attribute, None)
        module.__spec__ = ModuleSpec(name, None)
        sys.modules.setdefault(name, module)
    import numpy as np
    import torch
    from ase.calculators.calculator import Calculator, all_changes
    from ase.neighborlist import primitive_neighbor_list
    from gotennet.models.components.layers import CosineCutoff
    from gotennet.models.representation.gotennet import GotenNet

    torch.manual_seed(0)
    body = GotenNet(n_atom_basis=256, n_interactions=layers, n_rbf=32, cutoff_fn=CosineCutoff(5.0), num_heads=8, edge_updates=True, lmax=2,
                    aggr="add", scale_edge=False, sep_htr=True, sep_dir=True, sep_tensor=True)  # fmt: skip
    head = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.SiLU(), torch.nn.Linear(256, 1))
    model = torch.nn.ModuleList([body, head]).eval().requires_grad_(False)

    class InMemory(Calculator):
        implemented_properties = ["energy", "forces"]  # noqa: RUF012

        def calculate(self, atoms=None, properties=None, system_changes=all_changes):
            super().calculate(atoms)
            i, j, vectors = primitive_neighbor_list("ijD", atoms.pbc, atoms.cell, atoms.positions, 5.0)
            index = torch.as_tensor(np.stack([j, i]))
            edges = torch.as_tensor(vectors, dtype=torch.float32).requires_grad_()
            scalars, _ = body(torch.as_tensor(atoms.numbers), index, edges.norm(dim=1), edges.clone())
            energy = head(scalars).sum()
            (slope,) = torch.autograd.grad(energy, edges)
            zeros = torch.zeros(len(atoms), 3)
            forces = zeros.index_add(0, index[1], slope).index_add(0, index[0], -slope)
            self.results = {"energy": energy.item(), "forces": forces.numpy()}

    return InMemory(), sum(p.numel() for p in model.parameters())


def nequix(cutoff: float) -> tuple[Any, int]:
    """The architecture of nequix-mp-1 with random weights, jitted by JAX."""
    import ase.calculators.calculator
    import equinox
    import jax
    from nequix.calculator import NequixCalculator
    from nequix.data import atomic_numbers_to_indices
    from nequix.model import Nequix

    model = Nequix(jax.random.PRNGKey(0), n_species=len(ALL), cutoff=cutoff, lmax=3, hidden_irreps="128x0e + 64x1o + 32x2e + 32x3o", n_layers=4,
                   radial_basis_size=8, radial_mlp_size=64, radial_mlp_layers=2, radial_polynomial_p=6.0, index_weights=False, layer_norm=True,
                   kernel=False, avg_n_neighbors=57.4)  # fmt: skip
    calculator = NequixCalculator.__new__(NequixCalculator)
    ase.calculators.calculator.Calculator.__init__(calculator)
    calculator.model, calculator.backend, calculator.cutoff = model, "jax", cutoff
    calculator.config = {"atomic_numbers": ALL, "cutoff": cutoff}
    calculator.atom_indices = atomic_numbers_to_indices(ALL)
    calculator._capacity, calculator._capacity_multiplier = None, 1.1
    return calculator, sum(x.size for x in jax.tree_util.tree_leaves(equinox.filter(model, equinox.is_inexact_array)))


def pace(functions: int) -> tuple[Any, int]:
    """Linear ACE for silicon, its recursive evaluator (that of LAMMPS), with random coefficients."""
    import tempfile

    import numpy as np
    from pyace import ACEBBasisSet, PyACECalculator

    sys.path.insert(0, str(HERE.parent / "accuracy"))
    from pace import basis

    configuration = basis("Si", functions, 5.0)
    count = len(configuration.get_all_coeffs())
    configuration.set_all_coeffs(1e-3 * np.random.default_rng(0).standard_normal(count))
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/pace.yace"
        ACEBBasisSet(configuration).to_ACECTildeBasisSet().save_yaml(file)
        return PyACECalculator(file, recursive_evaluator=True, recursive=True), configuration.total_number_of_functions


SAME = {"name": "nequip", "variant": "published", "embedding_features": 32, "radial_depth": 1, "radial_width": 128}
PARITY = {**SAME, "num_layers": 4, "l_max": 2, "num_features": 32, "parity": True}
WIDE = {"num_features": 128, "num_layers": 3, "num_basis": 20}
MODELS: dict[str, tuple[str, Callable[[], tuple[Any, int]]]] = {
    **{
        f"{label}{suffix}": ("ours", lambda m=model, w=way: ours(m, w))
        for label, model in {
            "weft (default)": {"name": "weft"}, "weft 16, 4 Å": {"name": "weft", "num_features": 16, "cutoff": 4.0}, "leignn (default)": {"name": "leignn"}, "leignn 128": {"name": "leignn", **WIDE}, "painn 128": {"name": "painn", **WIDE},
            "schnet 128, 6 layers": {"name": "schnet", "num_features": 128, "num_layers": 6, "num_basis": 20},
            "nequip (default)": {"name": "nequip"}, "nequip S": {"name": "nequip", "preset": "S"}, "nequip M": {"name": "nequip", "preset": "M"},
            "nequip l2 32, both parities, 4 layers": PARITY, "nequip S 6 Å": {"name": "nequip", "preset": "S", "cutoff": 6.0},
            "geodite (default)": {"name": "geodite"},
            "geodite 192, 4 layers, 5 Å": {"name": "geodite", "num_features": 192, "num_layers": 4},
            "geodite 192, 4 layers, 6 Å": {"name": "geodite", "num_features": 192, "num_layers": 4, "cutoff": 6.0},
        }.items()
        for suffix, way in {", kernels": "kernels", ", program": "program"}.items()
    },
    "nequip S, AOTInductor": ("nequip", lambda: nequip("S", 5.0)),
    "nequip M, AOTInductor": ("nequip", lambda: nequip("M", 5.0)),
    "nequip l2 32, both parities, 4 layers, AOTInductor": ("nequip", lambda: nequip("l2", 5.0)),
    "nequip l2 32, 3 layers, AOTInductor": ("nequip", lambda: nequip("l2 even", 5.0)),  # as trained in ../accuracy/peers.py
    "nequip S 6 Å, AOTInductor": ("nequip", lambda: nequip("S", 6.0)),
    "allegro l2, 2 layers, AOTInductor": ("nequip", lambda: nequip(None, 5.0, allegro=True)),
    "mace 64x0e+64x1o, correlation 2": ("mace", lambda: mace("64x0e + 64x1o", 2, list(ELEMENTS))),
    "mace 128x0e+128x1o, correlation 3 (not MP-0 medium)": ("mace", lambda: mace("128x0e + 128x1o", 3, ALL)),
    "mace MP-0 small": ("mace", lambda: mace("128x0e", 3, ALL, mp=True)),
    "mace MP-0 medium": ("mace", lambda: mace("128x0e + 128x1o", 3, ALL, mp=True)),
    "mace MP-0 small, torch.compile": ("mace", lambda: mace("128x0e", 3, ALL, mp=True, compiled=True)),
    "mace MP-0 medium, torch.compile": ("mace", lambda: mace("128x0e + 128x1o", 3, ALL, mp=True, compiled=True)),
    **{
        f"our mace MP-0 {size}, {way}": ("ours", lambda m={"name": "mace", "preset": f"MP-{size}"}, w=way: ours(m, w, ALL))
        for size in ("small", "medium")
        for way in ("kernels", "program")
    },
    "sevennet-0": ("sevenn", lambda: sevenn("7net-0")),
    "sevennet-l3i5": ("sevenn", lambda: sevenn("7net-l3i5")),
    **{
        f"{name} imported, {way}": ("ours", lambda f=folder, w=way: imported(f, w))
        for name, folder in {"sevennet-0": "SevenNet_0__11Jul2024", "sevennet-l3i5": "SevenNet_l3i5"}.items()
        for way in ("kernels", "program")
    },
    "chgnet 0.3.0": ("chgnet", chgnet),
    "schnetpack painn 128": ("schnetpack", lambda: schnetpack("painn", 3)),
    "schnetpack schnet 128, 6 layers": ("schnetpack", lambda: schnetpack("schnet", 6)),
    "tensornet 64": ("matgl", tensornet),
    "orb-v3 conservative": ("orb", orb),
    "deeppot-se 6 Å": ("deepmd", deeppot),
    "gotennet S": ("gotennet", lambda: gotennet(4)),
    "nequix-mp-1": ("nequix", lambda: nequix(6.0)),
    "pace linear, 700 functions": ("pace", lambda: pace(700)),  # as trained in ../accuracy/pace.py
}  # fmt: skip


def product_ms() -> float:
    import torch

    a = torch.randn(768, 768)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


def measure(name: str, threads: int, structures: list[str]) -> None:
    """Time one candidate in this process; the answer is the last line of standard output."""
    import numpy as np
    import torch
    from structures import structure

    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(threads)
    if MODELS[name][0] == "nequix":  # JAX takes all cores it sees, whatever it is told
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    clock = time.process_time if threads == 1 else time.perf_counter
    before = product_ms()
    calculator, parameters = MODELS[name][1]()
    torch.set_num_threads(threads)
    rng, found, peak = np.random.default_rng(0), {}, {}
    for which in structures:
        atoms = structure(which)
        if MODELS[name][0] == "pace" and which != "silicon512":
            continue
        if which == "molecule21" and MODELS[name][0] in ("chgnet", "matgl"):  # they want a cell
            atoms.center(vacuum=10.0)
            atoms.pbc = True
        atoms.calc = calculator
        start, times = atoms.positions.copy(), []
        began = time.perf_counter()
        while len(times) < 2 or time.perf_counter() - began < (60 if len(times) < REPEATS[which] + 1 else 5):
            atoms.positions = start + 1e-3 * rng.standard_normal(start.shape)
            first = clock()
            atoms.get_forces()
            times.append(clock() - first)
        found[which] = 1000 * min(times[1:])
        peak[which] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # of the process so far
    from importlib.metadata import version

    packages = {
        "ours": "gossamer",
        "nequip": "nequip",
        "mace": "mace-torch",
        "orb": "orb-models",
        "deepmd": "deepmd-kit",
        "pace": "python-ace",
    }
    kind = MODELS[name][0]
    answer = {"ms": found, "peak_MiB": peak, "parameters": parameters, "version": f"{packages.get(kind, kind)} {version(packages.get(kind, kind))}",
              "product_ms": [before, product_ms()], "torch": torch.__version__, "mode": getattr(calculator, "mode", None)}  # fmt: skip
    print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[], metavar="PACKAGE=PYTHON", help="environments of the packages")
    parser.add_argument("--only", nargs="+", help="packages, or names of rows")
    parser.add_argument("--structures", nargs="+", choices=[*REPEATS], default=[*REPEATS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--again", action="store_true", help="keep what was measured before where it was faster, as a further round turn by turn"
    )
    parser.add_argument("--record", default="peers", help="name of the files of results")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.threads, arguments.structures)
        return
    pythons = {"ours": sys.executable, **dict(text.split("=", 1) for text in arguments.python)}
    target = HERE / f"{arguments.record}-{arguments.threads}thread{'s' if arguments.threads > 1 else ''}.json"
    record = json.loads(target.read_text()) if target.exists() else {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "PYTHONWARNINGS": "ignore", "SEVENN": pythons.get("sevenn", "")}
    for name, (package, _) in MODELS.items():
        if (
            package not in pythons
            or (" imported" in name and "sevenn" not in pythons)
            or (arguments.only and package not in arguments.only and name not in arguments.only)
        ):
            continue
        command = [
            pythons[package],
            __file__,
            "--measure",
            name,
            "--threads",
            str(arguments.threads),
            "--structures",
            *arguments.structures,
        ]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
        if not lines:
            print(f"{name}: failed: {result.stderr.strip().splitlines()[-1:]}", flush=True)
            continue
        found, before = json.loads(lines[-1]), record.get(name, {})
        if arguments.again and before:
            found["ms"] = {k: min(t, before["ms"].get(k, t)) for k, t in found["ms"].items()}
        record[name] = {**found, "date": datetime.date.today().isoformat()}
        target.write_text(json.dumps(record, indent=1) + "\n")
        print(row(name, record[name]), flush=True)
    head = ["model", "package", "parameters", *(f"{n} ms" for n in REPEATS), "768³ product ms"]
    lines = [row(name, record[name]) for name in MODELS if name in record]
    target.with_suffix(".md").write_text("| " + " | ".join(head) + " |\n|" + "---|" * len(head) + "\n" + "\n".join(lines) + "\n")


def row(name: str, r: dict[str, Any]) -> str:
    cells = [name, r["version"], f"{r['parameters']:,}", *(f"{r['ms'][n]:.3g}" if n in r["ms"] else "" for n in REPEATS)]
    return "| " + " | ".join([*cells, "/".join(f"{p:.1f}" for p in r["product_ms"])]) + " |"


if __name__ == "__main__":
    main()
