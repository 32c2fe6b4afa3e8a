"""A potential as a compiled program: energy, forces and stress of one structure in machine code, checked against the potential.

The unrolled graph (`gossamer.engine.unrolled`) goes through `torch.export` and AOTInductor. The file runs without gossamer,
in Python or C++ (`torch._inductor.aoti_load_package`). It is a program: like any other, load only files you trust.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import __version__
from gossamer.engine.agreement import TOLERANCE, compare, part_of
from gossamer.files import atomic_path, cache_folder
from gossamer.graph import FIELDS, Graph
from gossamer.potential import Potential, Prediction, state_of
from gossamer.potential_file import load
from gossamer.timing import fastest

log = logging.getLogger(__name__)
NAMES = ["energy", "node_energies", "forces", "stress"]


class Program:
    """A loaded program; stands in for the potential it was made from, for one structure of at least two atoms and edges."""

    def __init__(self, path: Path, potential: Potential) -> None:
        """
        Raises:
            ValueError: not a program, or of another potential, precision, device or PyTorch.
        """
        self.path, self.names = path, names_of(potential)
        try:
            # what torch._inductor.aoti_load_package wraps; importing that module takes seconds
            self._program = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)  # type: ignore[attr-defined]
            found = json.loads(self._program.get_metadata()["gossamer"])
        except (RuntimeError, KeyError, ValueError, OSError) as error:
            text = " ".join(str(error).split())[:200]
            raise ValueError(f"'{path}' is not a compiled potential ({text}). Make it again with gossamer export.") from None
        expected = identity(potential)
        wrong = [k for k in expected if found.get(k) != expected[k]]
        if wrong:
            listed = ", ".join(f"{k} {found.get(k)} (here {expected[k]})" for k in wrong)
            raise ValueError(f"'{path}' was made for something else: {listed}. Make it again with gossamer export.")

    def __call__(self, graph: Graph) -> Prediction:
        """
        Raises:
            ValueError: more than one structure, or fewer than two atoms or edges.
        """
        if not fits(graph):
            raise ValueError(
                f"A compiled potential takes one structure of at least two atoms and edges, found {graph.n_graphs}, {graph.n_atoms} and {graph.n_edges}."
            )
        out = self._program.run([getattr(graph, f).contiguous() for f in FIELDS])
        values: dict[str, Any] = {"forces": None, "stress": None, **dict(zip(self.names, out, strict=True))}
        return Prediction(**values)


def fits(graph: Graph) -> bool:
    """Whether a program can take this batch: sizes 0 and 1 are left to the potential itself."""
    return graph.n_graphs == 1 and graph.n_atoms > 1 and graph.n_edges > 1


def names_of(potential: Potential) -> list[str]:
    """Parts of the prediction in the order of the program's outputs; no stress of direct forces."""
    return NAMES if potential.conservative else NAMES[:3]


def identity(potential: Potential) -> dict[str, str]:
    """What a program is made for; a program made for something else is refused."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_of(potential).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    device = potential.device
    on = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    return {
        "weights": digest.hexdigest()[:32],
        "dtype": str(potential.dtype),
        "device": on,
        "torch": torch.__version__,
        "gossamer": __version__,
    }


class _Outputs(nn.Module):
    """The unrolled graph with its weights inside."""

    def __init__(self, module: torch.fx.GraphModule, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.module = module
        self.keys = list(state)
        for key in self.keys:
            self.register_buffer(key.replace(".", "__"), state[key].detach().clone())

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.module({k: getattr(self, k.replace(".", "__")) for k in self.keys}, *tensors)


def make_program(potential: Potential, graph: Graph, path: Path | str) -> Program:
    """Compile a potential into a file, load it back and compare it with the potential.

    Args:
        potential: On the device and in the precision that the program is for.
        graph: One structure with at least two atoms and edges, to trace and to compare with.
        path: File to make (.pt2).

    Raises:
        ValueError: the structure is too small.
        RuntimeError: the compiler failed, or its program gives other numbers.
    """
    if not fits(graph):
        raise ValueError(
            f"One structure of at least two atoms and edges is needed to compile, found {graph.n_graphs}, {graph.n_atoms} and {graph.n_edges}."
        )
    from torch.export import Dim  # seconds to import: only who compiles pays for it

    from gossamer.engine.unrolled import unroll

    path = Path(path)
    was_training = potential.training
    potential.eval()
    isolated = potential.isolated_outputs()
    state = state_of(potential)
    module = unroll(potential, state, graph, names_of(potential), opaque=False, isolated=isolated)
    inputs = state if isolated is None else {**state, "isolated": isolated}
    atoms, edges = Dim("n_atoms", min=2), Dim("n_edges", min=2)
    shapes = ({0: atoms}, {0: atoms}, None, {0: atoms}, {1: edges}, {0: edges})
    options = {"aot_inductor.metadata": {"gossamer": json.dumps(identity(potential))}}
    try:
        with torch.no_grad():
            exported = torch.export.export(_Outputs(module, inputs), tuple(getattr(graph, f) for f in FIELDS), dynamic_shapes=(shapes,))
            with atomic_path(path) as temporary:
                torch._inductor.aoti_compile_and_package(exported, package_path=str(temporary), inductor_configs=options)
    except Exception as error:  # whatever the compiler raises
        text = str(error).strip().splitlines()
        raise RuntimeError(f"the potential cannot be compiled: {text[0] if text else type(error).__name__}") from error
    finally:
        potential.train(was_training)
    program = Program(path, potential)
    compare(program, potential, graph, TOLERANCE[potential.dtype])
    return program


def cache_path(potential: Potential) -> Path:
    """Where the program of a potential on this machine is kept."""
    key = hashlib.sha256(json.dumps(identity(potential), sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{key[:24]}.pt2"


def cached_program(potential: Potential, graph: Graph, make: bool = False) -> Program | None:
    """The program of a potential on this machine, kept from an earlier call, or made now if asked; None if there is none.

    Every program is compared with the potential on this very structure (of a large one, a part) before it is returned. What goes wrong is said in
    one line of the log, and the potential itself is used.
    """
    path, graph = cache_path(potential), part_of(graph)
    try:
        if path.exists():
            program = Program(path, potential)
            compare(program, potential, graph, TOLERANCE[potential.dtype])
            return program
        if not make:
            return None
        log.info("compiling the potential for this machine, less than a minute, once")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return make_program(potential, graph, path)
    except (ValueError, RuntimeError, OSError) as error:
        log.warning("the potential runs without compilation: %s", str(error).splitlines()[0])
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return None


def export(model: Path | str, out: Path | str, structure: Any = None, device: str = "cpu", dtype: str | None = None) -> dict[str, Any]:
    """Compile a saved potential into a file that runs without gossamer.

    The program takes ``atomic_numbers`` (n,) int64, ``positions`` (n, 3) float64 in Å, ``cell`` (1, 3, 3) float64 with
    lattice vectors as rows, ``graph_index`` (n,) zeros, ``edge_index`` (2, n_edges) int64 (sender, receiver; sorted by
    receiver) and ``edge_shifts`` (n_edges, 3) float64, and returns energy (1,) in eV, energies of the atoms (n,), forces
    (n, 3) in eV/Å and stress (1, 3, 3) in eV/Å³ (ASE's sign; NaN without a volume; none for direct forces).

    Args:
        model: Saved potential.
        out: File to make (.pt2).
        structure: Atoms or file to trace and compare with; by default a small molecule of the potential's elements.
        device: The program runs on this kind of device only.
        dtype: "float32" or "float64"; by default as saved.

    Returns:
        ``out``, ``seconds``, ``megabytes``, ``plain_ms`` and ``compiled_ms`` of the structure.

    Raises:
        ValueError: the structure is too small, or holds unknown elements.
        RuntimeError: the compiler failed, or its program gives other numbers.
    """
    from ase import Atoms

    from gossamer.data.atoms import as_atoms
    from gossamer.simulation.calculator import Calculator

    out = Path(out)
    if out.suffix != ".pt2":
        raise ValueError(f"'{out}': a compiled potential is a .pt2 file.")
    potential = load(model, device, dtype)
    if structure is None:
        n = 6
        elements = (potential.statistics.elements * n)[:n]
        ring = [
            [1.5 * potential.cutoff / 3 * f for f in p]
            for p in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0.3), (0.2, 0.1, 1), (1, 0.3, 1.1))
        ]
        atoms = Atoms(elements, ring, cell=[10 * potential.cutoff] * 3, pbc=True)
    else:
        atoms = as_atoms(structure)
    calculator = Calculator(potential, compiled=False)
    graph = calculator._graph(atoms)
    began = time.perf_counter()
    program = make_program(potential, graph, out)
    seconds = time.perf_counter() - began
    return {
        "out": str(out), "seconds": round(seconds, 1), "megabytes": round(out.stat().st_size / 1e6, 1),
        "plain_ms": round(1000 * fastest(lambda: potential(graph, stress=potential.conservative, isolated=calculator.isolated), 10), 2),
        "compiled_ms": round(1000 * fastest(lambda: program(graph), 10), 2),
    }  # fmt: skip
