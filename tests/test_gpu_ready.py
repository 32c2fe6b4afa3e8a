"""What a GPU needs, checked without one: steps that never wait for it, and structures padded to fixed sizes."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from conftest import MODELS, make_potential
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.data.structure import Structure
from gossamer.engine import engine as engine_module
from gossamer.engine.cuda_graph import SHARE, CudaGraph, first_of, pad
from gossamer.engine.kernels import gpu
from gossamer.engine.kernels import ops as _  # noqa: F401  (registers the operators)
from gossamer.engine.kernels.table import passed
from gossamer.graph import Graph
from gossamer.nn.attention import Attention
from gossamer.potential import Potential
from gossamer.simulation.calculator import Calculator
from gossamer.training import recorded
from gossamer.training.config import TrainingConfig
from gossamer.training.loop import train_step
from gossamer.training.losses import LossConfig, loss_counts
from gossamer.training.process_group import start_process_group
from gossamer.training.recorded import flat
from gossamer.training.state import gradients, make_state

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


def test_rows_of_tables_with_kinks_bring_nothing_from_the_cpu() -> None:
    x = torch.linspace(0, 1, 5)
    assert passed(x, (0.5, 0.8)).tolist() == [0, 0, 1, 1, 2]
    far = x.to("meta")
    with _NothingFromTheCPU():
        assert passed(far, (0.5, 0.8)).shape == (5,)


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
def test_padding_changes_nothing(name: str, ethanol: Atoms) -> None:
    potential = make_potential(ELEMENTS, **MODELS[name]).eval()
    crystal = bulk("Si", cubic=True)
    crystal.rattle(0.05, seed=1)
    for atoms in (ethanol, crystal):
        padding_changes_nothing(potential, atoms)


def padding_changes_nothing(potential: Potential, atoms: Atoms) -> None:
    graph = Calculator(potential, way="plain").graph(atoms)
    stress = potential.conservative
    plain = potential(graph, stress=stress)
    for missing, extra in ((0, 1), (1, 3), (200, 1 + 200 // SHARE)):
        batch = pad(graph, graph.n_atoms + extra, graph.n_edges + missing, potential.cutoff)
        assert batch.n_edges == graph.n_edges + missing
        assert batch.n_graphs == 2
        assert bool((batch.edge_index[1].diff() >= 0).all())  # sorted by receiver
        torch.testing.assert_close(batch.edge_vectors()[graph.n_edges :].norm(dim=1), torch.full((missing,), potential.cutoff).double())
        found = first_of(potential(batch, stress=stress), graph.n_atoms)
        torch.testing.assert_close(found.energy, plain.energy, rtol=0, atol=1e-11)
        torch.testing.assert_close(found.node_energies, plain.node_energies, rtol=0, atol=1e-11)
        torch.testing.assert_close(found.forces, plain.forces, rtol=0, atol=1e-11)
        if stress and atoms.pbc.all():
            torch.testing.assert_close(found.stress, plain.stress, rtol=0, atol=1e-12)


def labelled(ethanol: Atoms, n_structures: int, seed: int = 0) -> list[Structure]:
    """Rattled molecules and parts of them, with invented labels."""
    rng, found = np.random.default_rng(seed), []
    for k in range(n_structures):
        atoms = ethanol[: len(ethanol) - k % 2]
        atoms.rattle(0.05, seed=seed + k)
        forces = rng.normal(size=(len(atoms), 3))
        found.append(Structure(atomic_numbers=atoms.numbers, positions=atoms.positions, energy=rng.normal(), forces=forces))
    return found


def without_dropout(name: str) -> Potential:
    """In training mode."""
    potential = make_potential(ELEMENTS, **MODELS[name]).train()
    for module in potential.modules():
        if isinstance(module, Attention):
            module.dropout = 0.0
    return potential


def step_of(potential: Potential, loss: LossConfig) -> Any:
    parameters = [p for p in potential.parameters() if p.requires_grad]
    return lambda graph, counts: gradients(potential(graph, forces=True), graph, counts, loss, None, parameters)


def counts_of(graph: Graph, loss: LossConfig) -> torch.Tensor:
    return torch.tensor(list(loss_counts(graph, loss).values())).double()


@pytest.mark.parametrize("name", [*MODELS])
def test_padding_changes_no_gradient(name: str, ethanol: Atoms) -> None:
    """Loss and gradients of the weights of a batch are those of the batch with lone atoms; and on the meta device nothing needs a value."""
    potential, loss = without_dropout(name), LossConfig()
    graph = potential.collate(labelled(ethanol, 3))
    run, counts = step_of(potential, loss), counts_of(graph, loss)
    plain = run(graph, counts)
    batch = pad(graph, graph.n_atoms + 3, graph.n_edges + 100, potential.cutoff)
    padded = run(batch, counts)
    torch.testing.assert_close(padded.sums, plain.sums, rtol=1e-10, atol=0)
    torch.testing.assert_close(flat(padded.gradients), flat(plain.gradients), rtol=1e-8, atol=1e-10 * float(flat(plain.gradients).norm()))
    there, far, n = copy.deepcopy(potential).to("meta"), batch.to("meta"), counts.to("meta")
    with _NothingFromTheCPU():
        found = step_of(there, loss)(far, n)
    assert found.loss.shape == ()


class _Replay:
    """A CUDA graph without a GPU: what it gives it writes where its first answer lies."""

    def __init__(self, run: Any) -> None:
        self.run, self.outputs = run, run()

    def replay(self) -> None:
        for a, b in zip(*(torch.utils._pytree.tree_leaves(x) for x in (self.outputs, self.run())), strict=True):
            a.copy_(b)


def test_recorded_gradients_are_those_of_every_batch(ethanol: Atoms, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of changing sizes in turn: recorded from the second of each number of structures, again where one does not fit. In some a
    structure has no energy, or none has; where they do not all count alike nothing is recorded."""
    made: list[int] = []

    def fake(run: Any, warm_ups: int = 3) -> Any:
        replay = _Replay(run)
        made.append(len(replay.outputs.gradients))
        return replay, replay.outputs

    monkeypatch.setattr(recorded, "record", fake)
    potential, loss = make_potential(ELEMENTS).train(), LossConfig()
    run = step_of(potential, loss)
    recorder = recorded.RecordedGradients([run], potential.cutoff, torch.float64)
    for step, (n_structures, n_made) in enumerate([(3, 0), (3, 1), (2, 1), (3, 1), (2, 2), (3, 2), (2, 2)]):
        structures = labelled(ethanol, n_structures, seed=10 * step)
        structures[: step % 4] = [dataclasses.replace(s, energy=None) for s in structures[: step % 4]]
        graph = potential.collate(structures).with_places(loss.needed())
        counts = counts_of(graph, loss)
        found, wanted = recorder(graph, counts), run(graph, counts)
        torch.testing.assert_close(flat(found.gradients), flat(wanted.gradients), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(found.loss, wanted.loss)
        assert len(made) == n_made
    uneven = dataclasses.replace(graph, weights=torch.tensor([2.0, 0.0]).double())
    found, wanted, before = recorder(uneven, counts), run(uneven, counts), run(graph, counts)
    torch.testing.assert_close(flat(found.gradients), flat(wanted.gradients), rtol=1e-8, atol=1e-9)
    assert float((flat(found.gradients) - flat(before.gradients)).norm()) > 1e-3 * float(flat(before.gradients).norm())
    crowd = bulk("Si", cubic=True).repeat(2)
    many = [Structure(atomic_numbers=crowd.numbers, positions=crowd.positions, energy=0.0, forces=0.0 * crowd.positions)] * 3
    graph = potential.collate(many)
    counts = counts_of(graph, loss)
    before = len(made)
    torch.testing.assert_close(flat(recorder(graph, counts).gradients), flat(run(graph, counts).gradients), rtol=1e-8, atol=1e-9)
    assert len(made) == before + 1


def test_a_recording_that_differs_is_not_used(ethanol: Atoms, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def wrong(run: Any, warm_ups: int = 3) -> Any:
        found = run()
        found.gradients[0].mul_(1.01)
        return SimpleNamespace(replay=lambda: None), found

    monkeypatch.setattr(recorded, "record", wrong)
    potential, loss = make_potential(ELEMENTS).train(), LossConfig()
    run = step_of(potential, loss)
    recorder = recorded.RecordedGradients([run], potential.cutoff, torch.float64)
    graph = potential.collate(labelled(ethanol, 3))
    for _step in range(3):
        found = recorder(graph, counts_of(graph, loss))
        torch.testing.assert_close(flat(found.gradients), flat(run(graph, counts_of(graph, loss)).gradients))
    assert (
        len([r for r in caplog.records if "training runs without CUDA graphs: gradients of the recorded step differ" in r.getMessage()])
        == 1
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [*MODELS])
def test_recorded_training_is_plain_training(name: str, ethanol: Atoms) -> None:
    """Some steps in float64 with batches of different sizes, with and without CUDA graphs: the same weights."""
    weights, states = [], []
    for graphs in (False, True):
        potential, loss = without_dropout(name).to("cuda"), LossConfig()
        config = TrainingConfig(cuda_graphs=graphs, kernels=graphs, dtype="float64", device="cuda", batch_size=3, steps=12)
        state, group = make_state(potential, config, loss), start_process_group("cuda")
        for step in range(12):
            graph = potential.collate(labelled(ethanol, 2 + step % 2, seed=step))
            train_step(state, graph, loss, config, group)
        weights.append(flat([p.detach() for p in potential.network.parameters()]))
        states.append(state)
    assert len(states[1].differentiate.recordings) == 2
    assert states[1].update.recording is not None
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n_elements", [5, 2])  # 2: all results are fewer numbers than one matrix
def test_maps_of_elements_are_those_of_the_cpu(n_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, maps = torch.randn(7, 3, 6, generator=generator).double(), torch.randn(n_elements, 6, 4, generator=generator).double()
    species = torch.tensor([0, 3, 3, 1, 0, 4, 3]) % n_elements
    wanted = torch.stack([a @ maps[s] for a, s in zip(x, species, strict=True)])
    torch.testing.assert_close(torch.ops.gossamer.map_by_species(x, species, maps), wanted)
    torch.testing.assert_close(gpu.map_by_species(x, species, maps), wanted)
    monkeypatch.setattr(gpu, "LARGEST", 1)
    torch.testing.assert_close(gpu.map_by_species(x, species, maps), wanted)


def test_a_cuda_graph_needs_a_gpu() -> None:
    potential = make_potential(ELEMENTS)
    with pytest.raises(ValueError, match="way 'graph' records a CUDA graph and needs a potential on a GPU, found cpu"):
        Calculator(potential, way="graph")


def test_auto_records_what_comes_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ethanol: Atoms) -> None:
    """The third structure of one size is recorded, and whatever fits goes by that recording; a recording that fails is given up for good."""
    made: list[int] = []

    class Recording(CudaGraph):
        def __init__(self, run: Any, graph: Graph, cutoff: float) -> None:
            self.n_atoms, self.n_edges, self.run = graph.n_atoms, graph.n_edges + 5, run
            made.append(graph.n_atoms)

        def fits(self, graph: Graph) -> bool:
            return graph.n_atoms == self.n_atoms and graph.n_edges <= self.n_edges

        def __call__(self, graph: Graph) -> Any:
            return self.run(graph)

    calculator = Calculator(make_potential(ELEMENTS), way="auto")
    engine = calculator.engine
    assert engine.way != "graph"  # a CPU
    monkeypatch.setattr(engine_module, "CudaGraph", Recording)
    engine._records = True
    large, small = calculator.graph(ethanol), calculator.graph(ethanol[:4])
    for graph, wanted in (
        (large, 0),
        (small, 0),
        (large, 0),
        (large, 0),
        (large, 1),
        (large, 1),
        (small, 1),
        (large, 1),
        (small, 1),
        (small, 1),
        (small, 2),
    ):
        engine(graph)
        assert len(made) == wanted
    assert engine.way == "graph"
    assert made == [large.n_atoms, small.n_atoms]

    def fails(*arguments: Any) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(engine_module, "CudaGraph", fails)
    caplog.clear()
    with caplog.at_level("WARNING"):
        for _ in range(5):
            engine(large)
    assert [r.getMessage() for r in caplog.records] == ["the potential runs without a CUDA graph: out of memory"]
    assert engine.way != "graph"


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recordings_last_while_edges_come_and_go() -> None:
    potential = make_potential(ELEMENTS).to("cuda")
    quick, plain = Calculator(potential), Calculator(potential, way="plain")
    atoms = bulk("Si", cubic=True).repeat(2)
    recordings = set()
    for seed in range(8):
        moved = atoms.copy()
        moved.rattle(0.2, seed=seed)
        np.testing.assert_allclose(quick.get_forces(moved), plain.get_forces(moved), atol=1e-6)
        recordings.add(id(quick.engine._recording))
    assert quick.engine._recording is not None
    assert len(recordings) <= 3  # none, one, at most one more
