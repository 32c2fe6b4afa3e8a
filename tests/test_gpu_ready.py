"""What a GPU needs, checked without one: steps that never wait for it, and structures padded to fixed sizes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from conftest import DIRECT, MODELS, make_potential
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.engine.cuda_graph import SHARE, first_of, pad
from gossamer.engine.kernels import gpu
from gossamer.engine.kernels import ops as _  # noqa: F401  (registers the operators)
from gossamer.simulation.calculator import Calculator

ELEMENTS = ["H", "C", "O", "Si"]


class _NothingFromTheCPU(TorchDispatchMode):
    """Fails on any operator that brings a tensor from the CPU; numbers that are looked at fail by themselves on this device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dim() > 0:
                raise AssertionError(f"{func} takes a tensor of the CPU")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*MODELS])
def test_steps_do_not_wait_for_the_gpu(name: str, ethanol: Atoms) -> None:
    """On the meta device, which has no values, as on a GPU: no operator may need one, or bring a tensor along."""
    potential = make_potential(ELEMENTS, **MODELS[name])
    graph = Calculator(potential, way="plain").graph(ethanol)
    isolated = potential.isolated_outputs().to("meta")
    there = copy.deepcopy(potential).to("meta").requires_grad_(False)
    far = graph.to("meta")
    with _NothingFromTheCPU():
        out = there(far, stress=potential.conservative, isolated=isolated)
    assert out.forces is not None
    assert out.forces.shape == (len(ethanol), 3)


def test_the_check_notices_waiting(ethanol: Atoms) -> None:
    potential = make_potential(ELEMENTS)
    isolated = potential.isolated_outputs().to("meta")
    there = copy.deepcopy(potential).to("meta").requires_grad_(False)
    graph = Calculator(potential, way="plain").graph(ethanol).to("meta")
    network = there.network.forward
    with _NothingFromTheCPU():
        there(graph, isolated=isolated)

    def waits(species: torch.Tensor, *others: Any) -> Any:
        assert bool((species >= 0).all())
        return network(species, *others)

    def brings(species: torch.Tensor, *others: Any) -> Any:
        return network(species + torch.zeros(1, dtype=torch.int64).to(species.device), *others)

    there.network.forward = waits
    with _NothingFromTheCPU(), pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        there(graph, isolated=isolated)
    there.network.forward = brings
    with _NothingFromTheCPU(), pytest.raises(AssertionError, match="takes a tensor of the CPU"):
        there(graph, isolated=isolated)


@pytest.mark.parametrize("name", [*MODELS])
@pytest.mark.parametrize("system", ["molecule", "crystal"])
def test_padding_changes_nothing(name: str, system: str, ethanol: Atoms) -> None:
    atoms = ethanol if system == "molecule" else bulk("Si", cubic=True)
    atoms.rattle(0.05, seed=1)
    potential = make_potential(ELEMENTS, **MODELS[name]).eval()
    graph = Calculator(potential, way="plain").graph(atoms)
    stress = potential.conservative
    plain = potential(graph, stress=stress)
    for missing, extra in ((0, 1), (1, 3), (200, 1 + 200 // SHARE)):
        batch = pad(graph, graph.n_edges + missing, extra, potential.cutoff)
        assert batch.n_edges == graph.n_edges + missing
        assert batch.n_graphs == 2
        assert bool((batch.edge_index[1].diff() >= 0).all())  # sorted by receiver
        torch.testing.assert_close(batch.edge_vectors()[graph.n_edges :].norm(dim=1), torch.full((missing,), potential.cutoff).double())
        found = first_of(potential(batch, stress=stress), graph.n_atoms)
        torch.testing.assert_close(found.energy, plain.energy, rtol=0, atol=1e-11)
        torch.testing.assert_close(found.node_energies, plain.node_energies, rtol=0, atol=1e-11)
        torch.testing.assert_close(found.forces, plain.forces, rtol=0, atol=1e-11)
        if system == "crystal" and name not in DIRECT:
            torch.testing.assert_close(found.stress, plain.stress, rtol=0, atol=1e-12)


def test_maps_of_elements_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, maps = torch.randn(7, 3, 4, generator=generator).double(), torch.randn(5, 4, 6, generator=generator).double()
    species = torch.tensor([0, 3, 3, 1, 0, 4, 3])
    wanted = torch.stack([a @ maps[s] for a, s in zip(x, species, strict=True)])
    torch.testing.assert_close(torch.ops.gossamer.map_by_species(x, species, maps), wanted)
    torch.testing.assert_close(gpu.map_by_species(x, species, maps), wanted)
    monkeypatch.setattr(gpu, "LARGEST", 1)
    torch.testing.assert_close(gpu.map_by_species(x, species, maps), wanted)


def test_a_cuda_graph_needs_a_gpu() -> None:
    potential = make_potential(ELEMENTS)
    with pytest.raises(ValueError, match="way 'graph' records a CUDA graph and needs a potential on a GPU, found cpu"):
        Calculator(potential, way="graph")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [*MODELS])
def test_recorded_steps_are_the_potential(name: str, ethanol: Atoms) -> None:
    potential = make_potential(ELEMENTS, **MODELS[name]).to("cuda")
    recorded, plain = Calculator(potential, way="graph"), Calculator(potential, way="plain")
    for seed in range(3):
        ethanol.rattle(0.02 * seed, seed=seed)
        wanted = plain.get_forces(ethanol.copy())
        np.testing.assert_allclose(recorded.get_forces(ethanol.copy()), wanted, atol=1e-8)
    assert recorded.engine.way == "graph"
