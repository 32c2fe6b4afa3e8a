"""Shared fixtures: tiny potentials with random weights, awkward structures, data beside the checkout if it is there."""

from __future__ import annotations

import atexit
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxtyping
import pytest

if TYPE_CHECKING:  # what takes seconds to import is imported by those who use it: with workers, this process does not
    import torch
    from ase import Atoms

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["OMP_NUM_THREADS"] = "1"

# shapes in signatures are checked while testing; compiled code is tested in a process of its own, without the check
_hook = jaxtyping.install_import_hook(["gossamer.graph", "gossamer.potential", "gossamer.nn", "gossamer.models"], "beartype.beartype")


class _First(type(jaxtyping.config)):
    """Shapes are checked in the first calls of each test: finite differences and training repeat the same ones hundreds of times."""

    CALLS = 500
    left = CALLS

    @property
    def jaxtyping_disable(self) -> bool:
        self.left -= 1
        return self.left < 0


del jaxtyping.config.jaxtyping_disable
jaxtyping.config.__class__ = _First


KERNELS = "GOSSAMER_TEST_KERNELS"
"""names the folder in which tests of kernels keep them; set beforehand, it outlives the run"""


def pytest_configure(config: pytest.Config) -> None:
    """Kernels and programs of the user stay out of the tests; processes that tests start keep the cache they are given.

    Tests of kernels share a folder, which the controller makes for all its workers: each kernel is built once.
    """
    os.environ["GOSSAMER_CACHE"] = os.devnull + "/no-cache"
    if KERNELS not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="gossamer-kernels-")
        os.environ[KERNELS] = folder.name
        config.add_cleanup(lambda: (os.environ.pop(KERNELS), folder.cleanup()))


SHARED = Path(__file__).resolve().parents[2] / "shared"
DEMO = Path(__file__).resolve().parents[1] / "demo" / "data"


def _first_frames(path: Path, count: int) -> Path:
    """The first frames of a file, in a folder of this process: most tests need no more, and reading takes time."""
    folder = Path(tempfile.mkdtemp(prefix="gossamer-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with lzma.open(path, "rt") as file:
        lines = file.readlines()
    target = folder / path.stem
    target.write_text("".join(lines[: count * (int(lines[0]) + 2)]))
    return target


ETHANOL = str(_first_frames(DEMO / "ethanol_500K.extxyz.xz", 100))
"""labelled frames of ethanol"""

MODELS = {
    "sound": dict(),
    "sound-gaussian-painn": dict(update="painn", radial_basis="gaussian"),
    "sound-global": dict(global_context=True),
    "published": dict(variant="published", global_context=True),
    "published-vanilla": dict(variant="published", update="painn"),
    "direct": dict(direct_forces=True, basis_decay=1.0),
    "nequip": dict(name="nequip"),
    "nequip-l3-pairs": dict(
        name="nequip",
        l_max=3,
        num_features=[4, 3, 3, 2],
        pair_cutoffs={"H": 2.5, "C": {"O": 3.0}},
        element_neighbors={"H": 5.0},
        basis_decay=1.0,
        normalize="features",
    ),
    "nequip-parity": dict(name="nequip", l_max=1, parity=True, num_layers=3, scales="per_element", train_scales=True),
    "nequip-trained-bessel": dict(name="nequip", train_bessel=True, envelope_order=3, layer_norm=False, self_connection="linear"),
    "nequip-published": dict(name="nequip", variant="published"),
    "nequip-direct": dict(name="nequip", direct_forces=True),
    "geodite": dict(name="geodite"),
    "geodite-l4": dict(name="geodite", l_max=4, num_layers=1),
    "geodite-published": dict(name="geodite", variant="published"),
    "geodite-direct": dict(name="geodite", direct_forces=True),
    "mace": dict(name="mace"),
    "mace-agnesi": dict(name="mace", transform="agnesi", density=True, self_connections="all", num_features=2),
    "mace-published": dict(name="mace", variant="published", self_connections="all"),
    "painn": dict(name="painn"),
    "painn-published": dict(name="painn", variant="published"),
    "painn-direct": dict(name="painn", direct_forces=True),
    "schnet": dict(name="schnet"),
    "schnet-published": dict(name="schnet", variant="published"),
    "sevennet": dict(name="sevennet"),
    "sevennet-published": dict(
        name="sevennet",
        variant="published",
        parity="both",
        cutoff_on=3.6,
        bias=True,
        self_connection="element",
        train_bessel=True,
        unit_harmonics=False,
        scales="per_element",
    ),
    "sevennet-nequix": dict(name="sevennet", variant="published", layer_norm=True, train_embedding=False, embedding_features=6),
    "weft": dict(name="weft"),
    "weft-l3": dict(name="weft", l_max=3, num_features=3, num_layers=3, basis_decay=1.0),
}
"""every network that must pass the physics tests: settings on top of those in `make_potential`"""
CORE = ["sound", "sound-global", "published", "direct", "nequip", "geodite", "mace", "painn", "schnet", "sevennet", "weft"]
"""of these, what `make test` takes in tests/physics; the other variants come with `make thorough`"""
FEW = ["sound", "nequip", "mace", "geodite"]
"""and elsewhere: one network for each way of passing messages (vectors, irreps, their powers, attention)"""
DIRECT = [name for name in MODELS if name.endswith("direct")]
GLOBAL = ["sound-global", "published"]
"""networks whose energy is not a sum of local terms"""
SMOOTH = ["sound", "sound-gaussian-painn", "nequip", "nequip-l3-pairs", "nequip-parity", "nequip-trained-bessel", "nequip-published", "geodite", "geodite-l4",
          "geodite-published", "mace", "mace-agnesi", "mace-published", "painn", "schnet", "sevennet", "sevennet-nequix", "weft", "weft-l3"]  # fmt: skip
"""networks with three continuous derivatives at the cutoff"""
OWN_ZERO = [name for name in MODELS if name not in ("published", "published-vanilla", "mace-published", "painn-published", "schnet-published", "sevennet-published",
                                                    "sevennet-nequix")]  # fmt: skip
"""networks that give a lone atom its reference energy"""


def make_potential(
    elements: list[str], seed: int = 0, dtype: torch.dtype | None = None, zbl: bool = True, name: str = "leignn",
    energy_scale: float = 0.7, mean_neighbors: float = 12.0, **options,
):  # fmt: skip
    """A tiny potential with random weights, in float64 unless told otherwise."""
    import torch

    from gossamer.data.statistics import Statistics
    from gossamer.models import MODELS as NETWORKS
    from gossamer.potential import Potential, PotentialConfig

    torch.manual_seed(seed)
    settings, network = NETWORKS[name]
    config = settings(**{"cutoff": 4.0, **network.presets["tiny"], **options})
    references = {e: -1.5 * (k + 1) for k, e in enumerate(elements)}
    statistics = Statistics(
        elements=elements, reference_energies=references, energy_scale=energy_scale, mean_neighbors=mean_neighbors,
        element_scales={e: 1 + 0.2 * k for k, e in enumerate(elements)},
    )  # fmt: skip
    own_repulsion = name == "geodite" and options.get("variant") == "published"
    potential = Potential(config, statistics, PotentialConfig(zbl=zbl and not own_repulsion)).eval()
    potential.network.to(dtype or torch.float64)
    for key, parameter in potential.network.named_parameters():  # biases and the global scalar start at zero
        if key.endswith("bias") or key == "global_scalar":
            torch.nn.init.normal_(parameter, std=0.3)
        if key == "frequencies":  # at whole numbers the sine still vanishes at the cutoff
            torch.nn.init.uniform_(parameter, 0.5, 3.5)
    return potential


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of further networks are thorough ones."""
    for item in items:
        further = MODELS.keys() - set(CORE if "physics" in item.path.parts else FEW)
        values = item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value in further for value in values):
            item.add_marker(pytest.mark.thorough)


@pytest.fixture(autouse=True)
def _shapes_are_checked_anew() -> None:
    jaxtyping.config.left = _First.CALLS


@pytest.fixture(autouse=True)
def _kernels_end_with_their_test():
    """Most tests have no cache and so no kernels; what another test built in this process must not change their last bits."""
    yield
    ops, cpu = (sys.modules.get(f"gossamer.engine.kernels.{name}") for name in ("ops", "cpu"))
    if ops is not None and ops._convolutions:
        ops._convolutions.clear()
    for cached in (cpu.library, cpu.sorting, cpu.attention_library) if cpu is not None else ():
        cached.cache_clear()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the kernels built by tests, as the cache."""
    monkeypatch.setenv("GOSSAMER_CACHE", os.environ[KERNELS])
    return Path(os.environ[KERNELS])


@pytest.fixture
def ethanol() -> Atoms:
    from ase.build import molecule

    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    return atoms


@pytest.fixture
def crystal() -> Atoms:
    """A rattled, sheared, primitive SiC cell, smaller than the cutoff."""
    import numpy as np
    from ase.build import bulk

    atoms = bulk("SiC", "zincblende", a=4.36)
    atoms.rattle(0.08, seed=2)
    strain = np.random.default_rng(3).normal(scale=0.02, size=(3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return atoms


@pytest.fixture
def slab() -> Atoms:
    """Periodic along two axes."""
    from ase.build import bulk

    atoms = bulk("SiC", "rocksalt", a=4.3).repeat((2, 1, 1))
    atoms.rattle(0.05, seed=4)
    atoms.pbc = [True, True, False]
    return atoms


def often(values: Iterable[Any], few: Collection[Any]) -> list[Any]:
    """Parameters of a test, of which `make test` takes a few."""
    return [value if value in few else pytest.param(*_arguments(value), marks=pytest.mark.thorough) for value in values]


def _arguments(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def forked(source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What comes of Python code in a copy of this process, which it may crash; its packages are imported already."""
    with tempfile.TemporaryFile("w+") as output:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer Pythons warn of threads, which the copy does not have
            child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                sys.argv, sys.stdout, sys.stderr = ["-c", *arguments], open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                exec(compile(source, "<forked>", "exec"), {"__name__": "__main__"})
                status = 0
            except SystemExit as error:
                status = int(error.code or 0)
            except BaseException:
                traceback.print_exc(file=sys.stdout)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return subprocess.CompletedProcess(source, status, output.read())


def shared_data(*parts: str) -> Path:
    """A file of the data folder beside the checkout; the test skips, saying so, where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} in the data folder beside the checkout")
    return path
