"""A potential as a compiled program: energy, forces and stress in machine code, checked against the potential.

The unrolled graph (`gossamer.engine.unrolled`) goes through `torch.export` and AOTInductor. A program takes one structure, or
batches of two and more: sizes 0 and 1 would be frozen into it. The file of one without kernels runs without gossamer, in Python or
C++ (`torch._inductor.aoti_load_package`). It is a program: like any other, load only files you trust.

Weights and whatever else comes from the training data are constants beside the machine code, which PyTorch exchanges in a program that is
loaded; the tables of the kernels, whose lengths differ, are inputs. So the cache holds one program for all potentials of a network.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import __version__
from gossamer.arguments import as_path
from gossamer.data.atoms import as_atoms
from gossamer.data.from_atoms import from_atoms
from gossamer.data.labels import LabelConfig
from gossamer.engine import cache
from gossamer.engine.agreement import TOLERANCE, agree, probe, rattled
from gossamer.engine.kernels.attach import TableKernel
from gossamer.engine.kernels.cpu import processor
from gossamer.files import atomic_path, cache_folder, say_replaced
from gossamer.graph import FIELDS, Graph
from gossamer.potential import Potential, Prediction, state_of
from gossamer.potential_file import load
from gossamer.settings import to_dict
from gossamer.timing import fastest

log = logging.getLogger(__name__)
OPEN = """
import sys
import torch
from gossamer.engine.kernels import ops, polynomial  # operators that a program may name
torch._C._aoti.AOTIModelPackageLoader(sys.argv[1], "model", False, 1, -1)
"""
WHOLE = ("atomic_numbers", "graph_index", "edge_index")
"""tensors of a graph that hold whole numbers"""
NAMES = ["energy", "node_energies", "forces", "stress"]
_sure: set[str] = set()
"""that programs open, of the machine as it is: what was found in this process"""


class Crash(RuntimeError):
    """PyTorch ends the process that opens a program."""


def open_program(path: Path) -> Any:
    """PyTorch's loader of a program, which `torch._inductor.aoti_load_package` wraps; importing that module takes seconds.

    On one machine (NVIDIA H200, torch 2.11) opening any program ended the process. So the first program on a machine is opened by a process
    of its own; a file in the cache says that this went well.

    Raises:
        Crash: it did not.
        RuntimeError: no program.
    """
    version = f"{torch.__version__} {sys.version} {processor()} {torch.cuda.is_available()}"
    sure = f"opens-{hashlib.sha256(version.encode()).hexdigest()[:16]}"
    if sure not in _sure and not (cache_folder() / sure).exists():
        command = [sys.executable, "-W", "ignore", "-c", OPEN, str(path)]
        done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        if done.returncode < 0:
            raise Crash(
                f"PyTorch {torch.__version__} ends by signal {-done.returncode} on this machine when it opens a compiled potential: "
                "run it without (way kernels or auto), or try another version of PyTorch"
            )
        if done.returncode == 0:
            _sure.add(sure)
            with suppress(OSError):
                cache.cached(sure).touch(mode=0o600)
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)  # type: ignore[attr-defined]


class Program:
    """A loaded program; stands in for the potential it was made from."""

    def __init__(self, path: Path, potential: Potential, batch: bool = False, refill: bool = False) -> None:
        """
        Args:
            path: The file.
            potential: What it must have been made from.
            batch: Takes two structures or more, instead of one.
            refill: Or a potential of the same network, whose weights then take the place of those in the program.

        Raises:
            ValueError: not a program, or of another potential, precision, device or PyTorch.
            Crash: this PyTorch opens no program on this machine.
        """
        self.path, self.names, self.batch = path, names_of(potential), batch
        self._process, self._threads = os.getpid(), torch.get_num_threads()
        values = inputs_of(potential)
        self._tables = [values[name].contiguous() for name in tables_of(potential)]
        try:
            _sound(path)
            self._program = open_program(path)
            found = json.loads(self._program.get_metadata()["gossamer"])
        except Crash:
            raise
        except (RuntimeError, KeyError, ValueError, TypeError, OSError) as error:
            text = " ".join(str(error).split())[:200]
            raise ValueError(f"'{path}' is not a compiled potential ({text}). Make it again with gossamer export.") from None
        expected = identity(potential, batch)
        wrong = [k for k in expected if found.get(k) != expected[k] and not (refill and k == "weights")]
        if wrong:
            listed = ", ".join(f"{k} {found.get(k)} (here {expected[k]})" for k in wrong)
            raise ValueError(f"'{path}' was made for something else: {listed}. Make it again with gossamer export.")
        if found.get("weights") != expected["weights"]:
            self._refill({key.replace(".", "__"): value for key, value in values.items()})

    @property
    def has_threads(self) -> bool:
        """Whether the threads for which it was compiled are there: in a forked process there is one."""
        return self._threads == 1 or self._process == os.getpid()

    def _refill(self, values: dict[str, Tensor]) -> None:
        """Put other constants in the place of those that it was made with."""
        wanted = self._program.get_constant_fqns()
        strange = [name for name in wanted if name not in values]
        if strange:
            raise ValueError(f"'{self.path}' holds {strange[0]}, which is no part of the potential.")
        given = {name: values[name].detach().contiguous() for name in wanted}
        try:
            self._program.load_constants(given, False, True)  # not into a spare copy, and an error unless they are all there
        except (AttributeError, TypeError) as error:
            raise ValueError(f"this PyTorch cannot exchange the weights of '{self.path}' ({error}).") from None

    def __call__(self, graph: Graph) -> Prediction:
        """
        Raises:
            ValueError: more or fewer structures than it takes, or fewer than two atoms or edges.
        """
        if not fits(graph) or (graph.n_graphs > 1) != self.batch:
            wanted = "two structures or more" if self.batch else "one structure"
            raise ValueError(
                f"This compiled potential takes {wanted} of at least two atoms and edges, found {graph.n_graphs}, {graph.n_atoms} and {graph.n_edges}."
            )
        out = self._program.run([*self._tables, *tensors_of(graph)])
        values: dict[str, Any] = {"forces": None, "stress": None, **dict(zip(self.names, out, strict=True))}
        return Prediction(**values)


def _sound(path: Path) -> None:
    """Raise ValueError for an archive whose checksums are wrong: PyTorch looks at none, and damaged machine code ends the process."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except Exception as error:  # whatever is damaged first
        raise ValueError(f"no sound archive: {type(error).__name__}: {error}") from None
    if wrong is not None:
        raise ValueError(f"'{wrong}' in it was damaged or altered")


def tensors_of(graph: Graph) -> list[Tensor]:
    """What a program takes of a structure, in the precision for which it was made: it reads any other as if it were that."""
    fields = [getattr(graph, name) for name in FIELDS]
    return [t.to(torch.int64 if name in WHOLE else torch.float64).contiguous() for name, t in zip(FIELDS, fields, strict=True)]


def fits(graph: Graph) -> bool:
    """Whether there can be a program for such a graph: fewer than two atoms or edges are left to the potential itself."""
    return graph.n_atoms > 1 and graph.n_edges > 1


def names_of(potential: Potential) -> list[str]:
    """Parts of the prediction in the order of the program's outputs; no stress of direct forces, features only for uncertainties."""
    return [*(NAMES if potential.conservative else NAMES[:3]), *([] if potential.uncertainty is None else ["features"])]


def identity(potential: Potential, batch: bool = False) -> dict[str, str]:
    """What a program is made for; a program made for something else is refused, but that of the same network can take other weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_of(potential).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    device = potential.device
    on = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} {hashlib.sha256(processor().encode()).hexdigest()[:8]}, {torch.get_num_threads()} threads"
    )
    return {
        "weights": digest.hexdigest()[:32],
        "network": likeness(potential),
        "structures": "many" if batch else "one",
        "dtype": str(potential.dtype),
        "device": on,
        "torch": torch.__version__,
        "gossamer": __version__,
    }


def likeness(potential: Potential) -> str:
    """The same for potentials that are one program but for its constants and tables.

    All that could be part of a graph counts: settings, sizes of tensors, and numbers and words that modules know besides.
    """
    tables = tables_of(potential)
    sizes = {k: [list(v.shape), str(v.dtype)] for k, v in inputs_of(potential).items() if k not in tables}
    usual = vars(nn.Module())
    known = {
        f"{name}.{key}": value
        for name, module in potential.named_modules()
        for key, value in vars(module).items()
        if key not in usual and _is_plain(value)
    }
    everything = [to_dict(potential.model_config), to_dict(potential.potential_config), names_of(potential), tables, sizes, known]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]


def _is_plain(value: Any) -> bool:
    """Whether it is a number or a word, or some of them."""
    return all(_is_plain(v) for v in value) if isinstance(value, (list, tuple)) else isinstance(value, (bool, int, float, str))


def inputs_of(potential: Potential) -> dict[str, Tensor]:
    """What a program computes from, besides the structure: weights and tables, and energies of lone atoms where they are subtracted."""
    isolated = potential.isolated_outputs()
    return state_of(potential) if isolated is None else {**state_of(potential), "isolated": isolated}


def tables_of(potential: Potential) -> list[str]:
    """Names of the tables among them whose length no other number depends on."""
    return [f"{name}.table" for name, m in potential.named_modules() if isinstance(m, TableKernel) and not m.intervals]


class _Outputs(nn.Module):
    """The unrolled graph with its weights inside, but for tables, which are inputs."""

    def __init__(self, module: torch.fx.GraphModule, values: dict[str, Tensor], tables: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.keys, self.tables = list(values), list(tables)
        for key in self.keys:
            if key not in tables:
                self.register_buffer(key.replace(".", "__"), values[key].detach().clone())

    def forward(self, tables: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.tables, tables, strict=True))
        values = {k: given[k] if k in given else getattr(self, k.replace(".", "__")) for k in self.keys}
        return self.module(values, *tensors)


@contextmanager
def compiling() -> Iterator[None]:
    """Without gradients, and without what PyTorch's exporter says of its own insides."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*LeafSpec", FutureWarning)
        yield


def make_program(potential: Potential, graph: Graph, path: Path | str) -> Program:
    """Compile a potential into a file, load it back and compare it with the potential.

    Args:
        potential: On the device and in the precision that the program is for.
        graph: To trace and to compare with, at least two atoms and edges: one structure, or for a program of batches two or more.
        path: File to make (.pt2).

    Raises:
        ValueError: the structure is too small.
        RuntimeError: the compiler failed, or its program gives other numbers.
    """
    if not fits(graph):
        raise ValueError(f"At least two atoms and edges are needed to compile, found {graph.n_atoms} and {graph.n_edges}.")
    from torch.export import Dim  # seconds to import: only who compiles pays for it

    from gossamer.engine.unrolled import unroll

    path, batch = Path(path), graph.n_graphs > 1
    was_training = potential.training
    potential.eval()
    inputs, tables = inputs_of(potential), tables_of(potential)
    module = unroll(potential, state_of(potential), graph, names_of(potential), opaque=False, isolated=inputs.get("isolated"))
    atoms, edges, graphs = Dim("n_atoms", min=2), Dim("n_edges", min=2), Dim("n_graphs", min=2)
    shapes = ({0: atoms}, {0: atoms}, {0: graphs} if batch else None, {0: atoms}, {1: edges}, {0: edges})
    lengths = [{1: Dim(f"rows_{k}", min=2)} for k in range(len(tables))]
    options = {
        "aot_inductor.metadata": {"gossamer": json.dumps(identity(potential, batch))},
        "always_keep_tensor_constants": True,  # else small ones become part of the code
    }
    try:
        with compiling():
            given = [inputs[name] for name in tables], *tensors_of(graph)
            exported = torch.export.export(_Outputs(module, inputs, tables), given, dynamic_shapes=(lengths, shapes))
            with atomic_path(path) as temporary:
                torch._inductor.aoti_compile_and_package(exported, package_path=str(temporary), inductor_configs=options)
    except Exception as error:  # whatever the compiler raises
        text = str(error).strip().splitlines()
        raise RuntimeError(f"the potential cannot be compiled: {text[0] if text else type(error).__name__}") from error
    finally:
        potential.train(was_training)
    program = Program(path, potential, batch)
    compare(program, potential, graph)
    return program


def compare(program: Program, potential: Potential, graph: Graph) -> None:
    """Raise RuntimeError unless a program gives the potential's energy, forces and stress on this graph, atoms displaced a little."""
    graph = rattled(graph)
    agree(potential(graph, stress=potential.conservative), program(graph), potential, graph, TOLERANCE[potential.dtype])


def cache_name(potential: Potential, batch: bool = False) -> str:
    """Name under which the program of a network on this machine is kept, whatever its weights."""
    key = {k: v for k, v in identity(potential, batch).items() if k != "weights"}
    return f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.pt2"


def cached_program(potential: Potential, graph: Graph, make: bool = False) -> Program | None:
    """The program of a potential on this machine, kept from an earlier call with it or another of the same network, or made now if asked;
    None if there is none.

    Every program is compared with the potential on this graph before it is returned; a kept one that differs, or is not as it was
    kept, is made again or thrown away.

    Raises:
        RuntimeError: the compiler failed, or its program gives other numbers.
        OSError: the cache cannot be written.
    """
    batch = graph.n_graphs > 1
    if not make and not cache_folder().is_dir():
        return None
    path = cache.cached(cache_name(potential, batch))
    if not make and not path.exists():
        return None
    with cache.alone(path):
        if path.exists():
            try:
                cache.check(path)
                program = Program(path, potential, batch, refill=True)
                compare(program, potential, graph)
                return program
            except (cache.Untrusted, ValueError, RuntimeError) as error:
                log.warning("a compiled potential is not used: %s", str(error).splitlines()[0])
                cache.forget(path)
        if not make:
            return None
        log.info("compiling the network for this machine: about a minute, once for all its potentials of as many elements")
        with cache.keeping(path) as temporary:
            make_program(potential, graph, temporary)
        return Program(path, potential, batch)


def export(model: Path | str, out: Path | str, structure: Any = None, device: str = "cpu", dtype: str | None = None) -> dict[str, Any]:
    """Compile a saved potential into a file that runs without gossamer.

    The program takes ``atomic_numbers`` (n,) int64, ``positions`` (n, 3) float64 in Å, ``cell`` (1, 3, 3) float64 with
    lattice vectors as rows, ``graph_index`` (n,) zeros, ``edge_index`` (2, n_edges) int64 (sender, receiver; sorted by
    receiver) and ``edge_shifts`` (n_edges, 3) float64, and returns energy (1,) in eV, energies of the atoms (n,), forces
    (n, 3) in eV/Å and stress (1, 3, 3) in eV/Å³ (ASE's sign; NaN without a volume; none for direct forces); of a potential with an uncertainty also the last features of the atoms.

    Args:
        model: Saved potential.
        out: File to make (.pt2); one of before is replaced.
        structure: Atoms or file to trace and compare with; by default a disordered cell of the potential's elements.
        device: The program runs on this kind of device only.
        dtype: "float32" or "float64"; by default as saved.

    Returns:
        ``out``, ``seconds``, ``megabytes``, ``plain_ms`` and ``compiled_ms`` of the structure.

    Raises:
        ValueError: the structure is too small, or holds unknown elements.
        RuntimeError: the compiler failed, or its program gives other numbers.
    """
    out = as_path("out", out, "the name of a file")
    if out.suffix != ".pt2":
        raise ValueError(f"'{out}': a compiled potential is a .pt2 file.")
    say_replaced(out)
    potential = load(model, device, dtype)
    potential.requires_grad_(False)
    graph = probe(potential) if structure is None else potential.collate([from_atoms(as_atoms(structure), LabelConfig(), "structure")])
    isolated = potential.isolated_outputs()
    began = time.perf_counter()
    program = make_program(potential, graph, out)
    seconds = time.perf_counter() - began
    return {
        "out": str(out), "seconds": round(seconds, 1), "megabytes": round(out.stat().st_size / 1e6, 1),
        "plain_ms": round(1000 * fastest(lambda: potential(graph, stress=potential.conservative, isolated=isolated), 10), 2),
        "compiled_ms": round(1000 * fastest(lambda: program(graph), 10), 2),
    }  # fmt: skip
