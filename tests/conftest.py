"""Shared fixtures: tiny potentials with random weights, awkward structures, data beside the checkout if it is there."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

# shapes in signatures are checked while testing; compiled code is tested in a process of its own, without the check
_hook = install_import_hook(["gossamer.graph", "gossamer.potential", "gossamer.nn", "gossamer.models"], "beartype.beartype")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from ase import Atoms  # noqa: E402
from ase.build import bulk, molecule  # noqa: E402

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"
DEMO = Path(__file__).resolve().parents[1] / "demo" / "data"

MODELS = {
    "sound": dict(),
    "sound-gaussian-painn": dict(update="painn", radial_basis="gaussian"),
    "sound-global": dict(global_context=True),
    "published": dict(variant="published", global_context=True),
    "published-vanilla": dict(variant="published", update="painn"),
    "direct": dict(direct_forces=True),
}


def make_potential(elements: list[str], seed: int = 0, dtype: torch.dtype = torch.float64, zbl: bool = True, **options):
    """A tiny LEIGNN potential with random weights."""
    from gossamer.data.statistics import Statistics
    from gossamer.models import LEIGNNConfig
    from gossamer.potential import Potential, PotentialConfig

    torch.manual_seed(seed)
    config = LEIGNNConfig(**{"num_features": 8, "num_layers": 2, "num_basis": 5, "cutoff": 4.0, **options})
    references = {e: -1.5 * (k + 1) for k, e in enumerate(elements)}
    statistics = Statistics(elements=elements, reference_energies=references, energy_scale=0.7, mean_neighbors=12.0)
    potential = Potential(config, statistics, PotentialConfig(zbl=zbl)).eval()
    potential.network.to(dtype)
    for name, parameter in potential.network.named_parameters():  # biases and the global scalar start at zero
        if name.endswith("bias") or name == "global_scalar":
            torch.nn.init.normal_(parameter, std=0.3)
    return potential


@pytest.fixture
def ethanol() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    return atoms


@pytest.fixture
def crystal() -> Atoms:
    """A rattled, sheared, primitive SiC cell, smaller than the cutoff."""
    atoms = bulk("SiC", "zincblende", a=4.36)
    atoms.rattle(0.08, seed=2)
    strain = np.random.default_rng(3).normal(scale=0.02, size=(3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return atoms


@pytest.fixture
def slab() -> Atoms:
    """Periodic along two axes."""
    atoms = bulk("SiC", "rocksalt", a=4.3).repeat((2, 1, 1))
    atoms.rattle(0.05, seed=4)
    atoms.pbc = [True, True, False]
    return atoms


def shared_data(*parts: str) -> Path:
    """A file of the data folder beside the checkout; the test skips, saying so, where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} in the data folder beside the checkout")
    return path
