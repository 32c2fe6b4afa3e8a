"""Kernels: equal to their definition in PyTorch, to the networks they speed up, and refused where they are not."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.data import chemical_symbols, covalent_radii
from conftest import DIRECT, ETHANOL, GLOBAL, MODELS, SMOOTH, make_potential, often
from test_training import settings, weights

from gossamer.accuracy import evaluate
from gossamer.checks.conservation import force_gradient_error, nve_conservation, stress_gradient_error
from gossamer.checks.smoothness import cutoff_exponent, energy_jump
from gossamer.checks.symmetry import net_force, separation_error, supercell_error, symmetry_errors
from gossamer.config import make_config
from gossamer.data.from_atoms import from_atoms
from gossamer.data.labels import LabelConfig
from gossamer.data.readers import read_structures
from gossamer.data.statistics import compute_statistics
from gossamer.data.structure import as_structure
from gossamer.engine import cache as engine_cache
from gossamer.engine import engine as engine_module
from gossamer.engine.agreement import TABLE_TOLERANCE, agree, part_of, probe, rattled
from gossamer.engine.agreement import TOLERANCE as TOLERANCES
from gossamer.engine.engine import Engine
from gossamer.engine.kernels import attach as attach_module
from gossamer.engine.kernels import cpu, gpu, ops
from gossamer.engine.kernels.attach import EdgeKernel, FixedMaps, TableKernel, attach_kernels, sort_edges
from gossamer.engine.kernels.cpu import Missing
from gossamer.engine.kernels.table import TOLERANCE, derivatives, interpolate, tabulate
from gossamer.graph import Graph
from gossamer.models import MODELS as NETWORKS
from gossamer.models.sevennet import xplor_envelope
from gossamer.nn.coupling import Coupling, Irrep, paths_between
from gossamer.nn.filters import VectorConvolution
from gossamer.nn.products import Convolution, Edges, Product, ScalarConvolution
from gossamer.potential import Potential, Prediction
from gossamer.potential_file import save
from gossamer.runs import train
from gossamer.simulation.calculator import Calculator
from gossamer.simulation.md import md
from gossamer.training.compiled import CompiledForward

NAMES = list(MODELS)
ELEMENTS = ["H", "C", "O", "Si"]
needs_compiler = pytest.mark.skipif(not any(shutil.which(c) for c in ("g++", "clang++", "c++")), reason="needs a C++ compiler")
pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def cache(kernels: Path) -> Path:
    return kernels


# --- the spline ------------------------------------------------------------------------------------------------------


def bessel(x: torch.Tensor) -> torch.Tensor:
    n = torch.arange(1, 9, dtype=x.dtype)
    return torch.sin(torch.pi * n * x[:, None]) / x[:, None] * ((1 - x) ** 4)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_table_holds_its_tolerance_and_differentiates_exactly(dtype: torch.dtype) -> None:
    table = tabulate(bessel, dtype)
    x = torch.linspace(0.08, 1, 3001, dtype=torch.float64, requires_grad=True)
    values = interpolate(table, x)
    assert float((values - bessel(x)).detach().abs().max()) < 2 * TOLERANCE[dtype] * float(table[:, 0].abs().max())
    (slope,) = torch.autograd.grad(values.sum(), x)
    (exact,) = torch.autograd.grad(bessel(x).sum(), x)
    assert float((slope - exact).abs().max() / exact.abs().max()) < 100 * TOLERANCE[dtype]
    a = interpolate(table, torch.tensor([0.5 - 1e-6, 0.5 + 1e-6], dtype=torch.float64))
    assert float((a[1] - a[0]).abs().max()) < 1e-3  # and no step at a knot
    assert float(interpolate(table, torch.tensor([1.0, 1.7], dtype=torch.float64)).abs().max()) < 1e-12


def test_derivatives_are_right() -> None:
    x = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    f = torch.stack([torch.sin(3 * x), x**4], dim=1)
    value, slope, curvature = derivatives(lambda x: torch.stack([torch.sin(3 * x), x**4], dim=1), x)
    torch.testing.assert_close(value, f)
    torch.testing.assert_close(slope, torch.stack([3 * torch.cos(3 * x), 4 * x**3], dim=1))
    torch.testing.assert_close(curvature, torch.stack([-9 * torch.sin(3 * x), 12 * x**2], dim=1))


@pytest.mark.parametrize(("dtype", "values", "slopes"), [(torch.float32, 2e-6, 2e-5), (torch.float64, 3e-11, 1e-8)])
def test_a_kink_is_met_exactly(dtype: torch.dtype, values: float, slopes: float) -> None:
    """XPLOR's second derivative jumps: a knot of its own for either side. Without it 4,096 intervals would not do in float64."""
    table = tabulate(xplor, dtype, (0.9,))
    x = torch.cat([torch.linspace(0.1, 1, 3001), torch.tensor([0.9, 0.9 - 1e-9, 0.9 + 1e-9])]).double().requires_grad_()
    found, exact = interpolate(table, x, (0.9,)), xplor(x)
    assert float((found - exact).detach().abs().max() / exact.detach().abs().max()) < values
    (a,), (b,) = torch.autograd.grad(found.sum(), x), torch.autograd.grad(exact.sum(), x)
    assert float((a - b).abs().max() / b.abs().max()) < slopes
    if dtype == torch.float64:
        with pytest.raises(ValueError, match="4096 intervals leave an error"):
            tabulate(xplor, dtype)


def test_what_cannot_be_tabulated_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no even knots meet its kinks, at 0.707106781 of the cutoff"):
        tabulate(xplor, torch.float32, (0.5**0.5,))
    with pytest.raises(ValueError, match="cannot be tabulated"):
        tabulate(lambda x: torch.sin(3e4 * x)[:, None], torch.float64)
    with pytest.raises(ValueError, match="not finite"):
        tabulate(lambda x: torch.log(x - 0.5)[:, None], torch.float32)


# --- the kernel ------------------------------------------------------------------------------------------------------


def nequip_convolution(l_max: int, parity: bool, channels: list[int]) -> Convolution:
    irreps = [Irrep(channels[l], l, p or (-1) ** l) for l in range(l_max + 1) for p in ((1, -1) if parity else (0,))]
    return Coupling(irreps, l_max, paths_between(irreps, l_max, [i.kind for i in irreps]), torch.nn.Identity()).convolution


def vector_convolution(channels: int, relay: bool) -> Convolution:
    return VectorConvolution(channels, relay, torch.nn.Identity()).convolution


def scalar_convolution(channels: int) -> Convolution:
    return ScalarConvolution(channels, torch.nn.Identity()).convolution


def summed(
    convolution: Convolution,
    features: torch.Tensor,
    harmonics: torch.Tensor,
    weights: torch.Tensor,
    edge_index: torch.Tensor,
) -> torch.Tensor:
    """What `gossamer.nn.products` writes above everything, with the radial functions of every edge."""
    sender, receiver = edge_index
    radial = torch.split(weights, convolution.channels, dim=1)
    parts = [
        b.reshape(-1, *s) for b, s in zip(features.split([d * m for d, m in convolution.blocks_in], 1), convolution.blocks_in, strict=True)
    ]
    out = [features.new_zeros(features.shape[0], d, m) for d, m in convolution.blocks_out]
    for p, own in zip(convolution.products, radial, strict=True):
        c = torch.from_numpy(p.coefficients).to(features)
        y = harmonics[:, p.edge : p.edge + c.shape[2]]
        messages = torch.einsum("mcs,es,ecu,eu->emu", c, y, parts[p.block].index_select(0, sender), own)
        channels = torch.arange(p.channel, p.channel + own.shape[1], device=features.device)
        sums = torch.zeros_like(out[p.out]).index_select(2, channels).index_add(0, receiver, messages)
        out[p.out] = out[p.out].index_add(2, channels, sums)
    return torch.cat([o.flatten(1) for o in out], dim=1)


def xplor(x: torch.Tensor, width: int = 8) -> torch.Tensor:
    n = torch.arange(1, width + 1, dtype=x.dtype) / width * 8
    return torch.sin(torch.pi * n * x[:, None]) / x[:, None] * xplor_envelope(x, 0.9)[:, None]


def definition(convolution: Convolution, features, harmonics, x, table, edge_index) -> torch.Tensor:
    """What a kernel with a table computes, in PyTorch."""
    return summed(convolution, features, harmonics, interpolate(table, x), edge_index)


MANY = [Product(0, 0, 0, 3 * k, np.random.default_rng(k).normal(size=(5, 5, 3))) for k in range(4)] + [
    Product(0, 1, 0, 0, np.ones((5, 5, 2)))  # adds to channels of the first
]
CONVOLUTIONS: dict[str, Callable[[], Convolution]] = {
    "vectors": lambda: vector_convolution(16, True),
    "odd channels": lambda: vector_convolution(13, True),
    "first layer": lambda: vector_convolution(32, False),
    "scalars": lambda: scalar_convolution(31),
    "l 2": lambda: nequip_convolution(2, False, [19, 8, 3]),
    "l 1, both parities": lambda: nequip_convolution(1, True, [16, 5]),
    "many rows": lambda: Convolution(((5, 3),), ((5, 12),), tuple(MANY), 3),
}  # fmt: skip


def inputs_of(convolution: Convolution, dtype: torch.dtype, n: int = 9, edges: int = 300) -> tuple[torch.Tensor, ...]:
    """Random features, harmonics, distances, a table and edges; atom 3 has none, atom 5 has more than 64."""
    generator = torch.Generator().manual_seed(1)
    receiver = torch.randint(0, n, (edges,), generator=generator)
    sender = torch.randint(0, n, (edges,), generator=generator)
    receiver[:100], sender[100:200] = 5, 5
    receiver[receiver == 3], sender[sender == 3] = 4, 4
    receiver = receiver.sort()[0]
    width = sum(convolution.channels)

    def radial(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x[:, None] * torch.arange(1, width + 1, dtype=x.dtype) / width * 20) * (1 - x[:, None]) ** 3

    table = tabulate(radial, dtype).to(dtype)
    random = {"dtype": dtype, "generator": generator}
    features = torch.randn(n, convolution.width_in, **random)  # type: ignore[call-overload]
    harmonics = torch.randn(edges, convolution.n_harmonics, **random)  # type: ignore[call-overload]
    x = torch.rand(edges, **random)  # type: ignore[call-overload]
    return features, harmonics, x, table, torch.stack([sender, receiver])


def run(convolution: Convolution, features, harmonics, x, table, edge_index) -> torch.Tensor:
    key = ops.register(convolution, features.dtype)
    packed = cpu.pack(convolution, table.double(), cpu.lanes(table.dtype)).to(table)
    return torch.ops.gossamer.convolve(key, features, harmonics, x, packed, *sort_edges(edge_index, features))


@pytest.mark.parametrize(
    ("name", "dtype"),
    often([*((n, torch.float64) for n in CONVOLUTIONS), ("odd channels", torch.float32), ("l 1, both parities", torch.float32)],
          [("vectors", torch.float64), ("scalars", torch.float64), ("l 1, both parities", torch.float64), ("odd channels", torch.float32)]),
)  # fmt: skip
def test_kernel_is_its_definition(name: str, dtype: torch.dtype) -> None:
    convolution = CONVOLUTIONS[name]()
    features, harmonics, x, table, edge_index = inputs_of(convolution, dtype)
    results = []
    for function in (run, definition):
        variables = [t.clone().requires_grad_() for t in (features, harmonics, x)]
        out = function(convolution, *variables, table, edge_index)
        weights = torch.randn(out.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
        results.append([out.detach(), *torch.autograd.grad(out, variables, weights, allow_unused=True)])
    assert float(results[0][0][3].abs().max()) == 0  # the atom without edges
    for mine, wanted in zip(*results, strict=True):
        wanted = torch.zeros_like(mine) if wanted is None else wanted
        scale = float(wanted.abs().max())
        assert float((mine - wanted).abs().max()) < (1e-5 if dtype == torch.float32 else 1e-12) * scale


def test_gradients_of_the_kernel() -> None:
    convolution = nequip_convolution(1, False, [3, 2])
    features, harmonics, x, table, edge_index = inputs_of(convolution, torch.float64, n=6, edges=210)
    assert torch.autograd.gradcheck(
        lambda f, y, d: run(convolution, f, y, d, table, edge_index)[4],
        [t.requires_grad_() for t in (features, harmonics, x)],
        fast_mode=True,
    )


@pytest.mark.parametrize("bytes_for_pairs", [1 << 28, 1])
def test_tables_of_pairs_with_kinks(bytes_for_pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, gradients, and tables made when a pair is met for the first time, where there is no room for all."""
    monkeypatch.setattr(attach_module, "PAIR_BYTES", bytes_for_pairs)
    convolution = nequip_convolution(1, False, [9, 5])
    features, harmonics, x, _, edge_index = inputs_of(convolution, torch.float64)
    width, scales = sum(convolution.channels), 1 + torch.arange(4) / 4
    kinks = tuple(sorted({0.9, *(0.9 * float(s) for s in scales if 0.9 * s < 1)}))
    kernel = TableKernel(convolution, lambda x, pair: xplor(x / float(scales[pair]), width), features, kinks, pairs=4)
    assert (kernel.slots >= 0).sum() == (4 if bytes_for_pairs > 1 else 1)
    for kinds in ([0, 2], [0, 2, 3]):
        pair = torch.tensor(kinds)[torch.randint(0, len(kinds), x.shape, generator=torch.Generator().manual_seed(0))]
        results = []
        for quick in (True, False):
            f, y, d = (t.clone().requires_grad_() for t in (features, harmonics, x))
            if quick:
                out = kernel(f, Edges(edge_index, d, y, lambda: None, pair))
            else:
                radial = torch.stack([xplor(d / float(s), width) for s in scales])[pair, torch.arange(len(d))]
                out = summed(convolution, f, y, radial, edge_index)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), (f, y, d))])
        for mine, wanted in zip(*results, strict=True):
            assert float((mine - wanted).abs().max()) < 1e-8 * float(wanted.abs().max())
    assert (kernel.slots >= 0).sum() == (4 if bytes_for_pairs > 1 else 3)


def test_threads_change_nothing() -> None:
    convolution = nequip_convolution(1, False, [16, 8])
    arguments = inputs_of(convolution, torch.float64)
    one = run(convolution, *arguments)
    torch.set_num_threads(2)
    try:
        assert torch.equal(run(convolution, *arguments), one)
    finally:
        torch.set_num_threads(1)


def test_distances_beyond_the_cutoff_and_without_value() -> None:
    """Beyond the cutoff radial functions are what they are there; NaN reaches the result through the harmonics, and never an address."""
    convolution = scalar_convolution(4)
    features, harmonics, x, table, edge_index = inputs_of(convolution, torch.float64)
    x[:] = 1.5
    assert float(run(convolution, features, harmonics, x, table, edge_index).abs().max()) < 1e-9
    x[0] = torch.nan
    harmonics[0] = torch.nan
    out = run(convolution, features, harmonics, x, table, edge_index)
    assert out.isnan().any()
    assert not out.isnan().all()


def test_a_table_of_another_processor_is_refused() -> None:
    features, harmonics, x, _, edge_index = inputs_of(scalar_convolution(4), torch.float32)
    key = ops.register(scalar_convolution(4), torch.float32)
    with pytest.raises(ValueError, match="make the program again"):
        torch.ops.gossamer.convolve(key, features, harmonics, x, torch.zeros(1, 9, 6, 2), *sort_edges(edge_index, features))


def test_memory_layout_is_checked() -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        cpu.pointers(torch.zeros(4, 4).T)


# --- networks with kernels -------------------------------------------------------------------------------------------


def test_edges_out_of_order_are_refused(crystal: Atoms) -> None:
    """The network itself takes them in any order."""
    potential = make_potential(ELEMENTS)
    graph = potential.collate([as_structure(crystal)])
    turned = replace(graph, edge_index=graph.edge_index.flip(1), edge_shifts=graph.edge_shifts.flip(0))
    torch.testing.assert_close(potential(turned).energy, potential(graph).energy)
    with pytest.raises(ValueError, match="not sorted by receiver"):
        Engine(potential, "kernels")(turned)


@pytest.mark.parametrize("atom", [-1, 10**6])
def test_edges_of_atoms_that_are_not_there_are_refused(atom: int) -> None:
    """They end the process, or worse; programs sort edges before anything looks at their ends."""
    edges = torch.tensor([[1, 0], [0, 1]])
    edges[0, 0] = atom
    with pytest.raises(IndexError, match="and there are 2"):
        sort_edges(edges, torch.zeros(2))
    assert len(sort_edges(torch.zeros((2, 0), dtype=torch.int64), torch.zeros(0)).by_sender) == 0


def test_precision_is_checked() -> None:
    with pytest.raises(TypeError, match="different precision: torch.bfloat16, torch.float32"):
        cpu.pointers(torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="different precision: torch.int32"):
        cpu.pointers(torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int64))


def test_edges_of_32_bits(crystal: Atoms) -> None:
    potential = make_potential(ELEMENTS)
    graph = potential.collate([as_structure(crystal)])
    short = replace(graph, edge_index=graph.edge_index.to(torch.int32))
    torch.testing.assert_close(Engine(potential, "kernels")(short).forces, potential(graph).forces, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", often(NETWORKS, ["leignn"]))
def test_autocast_of_others_changes_nothing(name: str, ethanol: Atoms) -> None:
    """Kernels go through memory by the precision of the weights."""
    potential = make_potential(ELEMENTS, dtype=torch.float32, name=name)
    expected = [Calculator(potential, way=way).get_forces(ethanol) for way in ("plain", "kernels")]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [Calculator(potential, way=way).get_forces(ethanol) for way in ("plain", "kernels")]
    np.testing.assert_array_equal(found, expected)


def test_the_default_device_changes_nothing(ethanol: Atoms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of PyTorch, which many set to a GPU; here "meta", where no numbers are."""
    potential = make_potential(ELEMENTS, name="mace", transform="agnesi")
    save(potential, tmp_path / "p.safetensors", [as_structure(ethanol)])
    monkeypatch.setattr(attach_module, "PAIR_BYTES", 0)  # tables of pairs are made when they are met
    expected = Calculator(potential, way="kernels").get_forces(ethanol)
    torch.set_default_device("meta")
    try:
        found = Calculator(tmp_path / "p.safetensors", way="kernels").get_forces(ethanol)
    finally:
        torch.set_default_device(None)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[Calculator, Calculator]:
    """A calculator without and one with kernels."""
    potential = make_potential(ELEMENTS, dtype=dtype, **MODELS[name])
    return Calculator(potential, way="plain", skin=0.0), Calculator(attach_kernels(potential), way="plain", skin=0.0)


@pytest.mark.parametrize("name", ["sound", "geodite", "mace"])
def test_second_derivatives_of_kernels_for_inference_are_refused(name: str) -> None:
    """A part of them would be missing, with a warning."""
    quick = attach_kernels(potential := make_potential(ELEMENTS, **MODELS[name]))
    graph = probe(potential, 5)
    vectors = graph.edge_vectors().requires_grad_()
    (slopes,) = torch.autograd.grad(quick._node_energies(graph, (vectors,), None)[0].sum(), vectors, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(slopes.square().sum(), vectors)


@pytest.mark.parametrize("name", NAMES)
def test_potential_with_kernels(name: str, ethanol: Atoms, crystal: Atoms, slab: Atoms) -> None:
    plain, quick = pair(name)
    assert not any(type(m).__name__.endswith("Kernel") for m in plain.potential.modules())
    for atoms in (ethanol, crystal, slab):
        found = []
        for calculator in (plain, quick):
            atoms.calc = calculator
            stress = atoms.get_stress() if atoms.pbc.all() and plain.conservative else np.zeros(6)
            found.append((atoms.get_potential_energy(), atoms.get_potential_energies(), atoms.get_forces(), stress))
        for a, b in zip(*found, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-8 * max(1.0, np.abs(a).max()))


OFTEN = ["sound", "sound-global", "direct", "nequip", "nequip-l3-pairs", "nequip-parity", "geodite", "painn", "schnet"]
"""networks whose kernels are built in seconds"""


@pytest.mark.parametrize("name", [*often(OFTEN, ["sound"]), *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n not in OFTEN)])
def test_physics_with_kernels(name: str, ethanol: Atoms, crystal: Atoms) -> None:
    _, quick = pair(name)
    for atoms in (ethanol, crystal):
        for change, error in symmetry_errors(quick, atoms).items():
            assert error["relative"] < 1e-10, change
    if name not in DIRECT:
        assert force_gradient_error(quick, ethanol, step=1e-3, n_atoms=3) < 1e-6
        assert net_force(quick, ethanol) < 1e-10
        assert stress_gradient_error(quick, crystal, step=1e-4) < 1e-7
    if name in SMOOTH and name != "nequip-l3-pairs":
        steps = (0.04, 0.02, 0.01) if name.startswith(("nequip", "weft")) else (0.1, 0.05, 0.025)
        assert cutoff_exponent(quick, molecule("H2O")[[1, 0, 2]], 4.0, steps) > 3.8
        assert energy_jump(quick, molecule("H2O")[[1, 0, 2]], 4.0) < 1e-11
    assert supercell_error(quick, crystal) < 1e-10
    if name not in GLOBAL:
        assert separation_error(quick, ethanol) < 1e-10


@pytest.mark.thorough
def test_dynamics_with_kernels_conserves_energy(ethanol: Atoms) -> None:
    plain, quick = pair("nequip")
    results = []
    for calculator in (plain, quick):
        results.append(nve_conservation(calculator, ethanol.copy(), 100.0, 0.25, 0.02))
    assert set(results[0]) == set(results[1])
    for key, value in results[0].items():
        assert results[1][key] == pytest.approx(value, rel=1e-3, abs=1e-7), key


def test_float32_and_batches() -> None:
    potential = make_potential(ELEMENTS, dtype=torch.float32, **MODELS["nequip"])
    quick = attach_kernels(potential)
    structures = [
        from_atoms(a, LabelConfig(), "frame") for a in (molecule("CH3OH"), molecule("H2O"), bulk("SiC", "zincblende", a=4.4), Atoms("O"))
    ]
    graph = potential.collate(structures)
    a, b = potential(graph, stress=True), quick(graph, stress=True)
    scale = float(a.forces.pow(2).mean().sqrt())
    torch.testing.assert_close(a.forces, b.forces, atol=1e-4 * scale, rtol=0)
    torch.testing.assert_close(a.energy, b.energy, atol=1e-4, rtol=0)


# --- what a user meets -----------------------------------------------------------------------------------------------


def test_calculator_uses_kernels_by_default(ethanol: Atoms, caplog: pytest.LogCaptureFixture) -> None:
    potential = make_potential(ELEMENTS)
    ethanol.calc = calculator = Calculator(potential)
    forces = ethanol.get_forces()
    assert calculator.engine.way == "kernels"
    ethanol.calc = plain = Calculator(potential, way="plain")
    np.testing.assert_allclose(ethanol.get_forces(), forces, atol=1e-8)
    assert plain.engine.way == "plain"
    assert not caplog.records


def test_no_structure_decides_what_runs() -> None:
    """Perfect crystals, relaxed or lone atoms first: kernels are compared on structures of the potential's own elements."""
    potential = make_potential(ELEMENTS, dtype=torch.float32, **MODELS["nequip"])
    for first in (bulk("Si", cubic=True).repeat(3), Atoms("O"), molecule("H2")):
        calculator = Calculator(potential)
        first.calc = calculator
        first.get_potential_energy()
        assert calculator.engine.way == "kernels"


def test_a_way_that_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    potential = make_potential(ELEMENTS)

    def missing(*_: object) -> None:
        raise Missing("none for this network")

    monkeypatch.setattr(engine_module, "attach_kernels", missing)
    with pytest.raises(RuntimeError, match="way 'kernels' cannot be had: none for this network"):
        Engine(potential, "kernels")
    assert Engine(potential).way == "plain"
    with pytest.raises(ValueError, match="way 'fast' is unknown. Choose one of auto, plain"):
        Engine(potential, "fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="way 'program' holds the weights"):
        Engine(potential, "program", weights_change=True)


def test_without_compiler(ethanol: Atoms, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    potential = make_potential(ELEMENTS)
    monkeypatch.setattr(cpu, "library", cpu.library.__wrapped__)  # nothing from earlier tests
    monkeypatch.setattr(ops, "_convolutions", {})
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    for setting, found in {
        "": "no C++ compiler was found",
        "/bin/false": "could not build a kernel",
        "env /bin/false": "could not build a kernel",
        "/no/such/compiler": "set CXX to one that can",
    }.items():
        caplog.clear()
        monkeypatch.setattr(shutil, "which", lambda name: None)
        monkeypatch.setenv("CXX", setting) if setting else monkeypatch.delenv("CXX", raising=False)
        ethanol.calc = calculator = Calculator(potential)
        assert np.isfinite(ethanol.get_forces()).all()
        assert calculator.engine.way == "plain"
        assert found in caplog.text
        assert caplog.text.count("runs without kernels") == 1
    monkeypatch.undo()
    monkeypatch.setenv("GOSSAMER_CACHE", "/dev/null/nowhere")
    monkeypatch.setattr(cpu, "library", cpu.library.__wrapped__)
    monkeypatch.setattr(ops, "_convolutions", {})
    with pytest.raises(Missing, match="set GOSSAMER_CACHE"):
        attach_kernels(potential)


def test_kept_libraries_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Truncated, overwritten, or writable by others: built again; the process lives on."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    path = cpu.build("int answer() { return 42; }", "answer")
    whole = path.read_bytes()
    damages: dict[str, Callable[[], object]] = {
        "damaged or altered": lambda: path.write_bytes(whole[: len(whole) // 2]),
        "was damaged": lambda: path.write_bytes(bytes(len(whole))),
        "written by other users": lambda: path.chmod(0o777),
        "cannot be checked": lambda: path.with_name(path.name + ".sha256").unlink(),
    }
    for message, damage in damages.items():
        caplog.clear()
        damage()
        with pytest.raises(engine_cache.Untrusted, match=message):
            engine_cache.check(path)
        assert cpu.build("int answer() { return 42; }", "answer") == path
        assert "it is built again" in caplog.text
        engine_cache.check(path)
    engine_cache.forget(path)
    path.mkdir()
    with pytest.raises(Missing, match="is a folder where a kernel should be"):
        cpu.build("int answer() { return 42; }", "answer")
    path.rmdir()
    tmp_path.chmod(0o777)
    with pytest.raises(Missing, match="can be written by other users"):
        cpu.build("int answer() { return 42; }", "answer")
    tmp_path.chmod(0o700)


def test_the_cache_may_be_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a library's path would be its name, which the loader looks for elsewhere; and the compiler more than one word."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOSSAMER_CACHE", ".")
    monkeypatch.setenv("CXX", f"env {' '.join(cpu.installed_compiler())}")
    loaded = cpu.library('extern "C" int answer() { return 42; }', "answer", ())
    assert loaded.answer() == 42
    assert cpu.complaint("ld: final close failed: No space left on device\ncollect2: error: ld returned 1 exit status").startswith(
        "ld: final"
    )


def test_threads_build_a_kernel_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same moment, into an empty cache: one builds, the others wait for it."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    built, compile_ = [], cpu._compile
    monkeypatch.setattr(cpu, "_compile", lambda *arguments: (built.append(1), compile_(*arguments)))
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: cpu.build("int answer() { return 42; }", "answer"), range(4)))
    assert len(paths) == len(built) == 1
    name = paths.pop().name
    assert {p.name for p in tmp_path.iterdir()} == {name, f"{name}.sha256"}


FORKED = """
import os, signal, torch
from conftest import make_potential
from gossamer.engine.agreement import probe
from gossamer.engine.engine import Engine
torch.set_num_threads(2)
potential = make_potential(["Si"], name="schnet")
engine, graph = Engine(potential, "plain"), probe(potential, 1500)  # large enough for PyTorch to take its threads
before = engine(graph)
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends it where it would wait for ever
    os._exit(not torch.equal(engine(graph).forces, before.forces))
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_forked_process_does_not_wait_for_threads() -> None:
    """In a process of its own: tests before this one may have left PyTorch's threads here, for which a copy would wait."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", FORKED], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # the source of high degrees takes the compiler a minute
def test_scratch_fits_on_small_stacks() -> None:
    """High degrees in float64 from a thread with a small stack."""
    convolution = nequip_convolution(3, True, [2, 2, 2, 2])
    arguments = inputs_of(convolution, torch.float64, n=7, edges=210)
    wanted, found = run(convolution, *arguments), []
    size = threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=lambda: found.append(run(convolution, *arguments)))
        thread.start()
        thread.join()
    finally:
        threading.stack_size(size)
    assert torch.equal(found[0], wanted)


def test_wrong_kernels_are_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    potential = make_potential(ELEMENTS)

    def wrong(potential, use):
        broken = attach_kernels(potential, use)
        broken.network.layers[1].message.convolution.table.mul_(1.001)
        return broken

    monkeypatch.setattr(engine_module, "attach_kernels", wrong)
    assert Engine(potential).way == "plain"
    assert "runs without kernels: the fast energy differs from the plain one by" in caplog.text


def test_what_is_not_a_number_does_not_agree() -> None:
    potential = make_potential(ELEMENTS)
    graph = probe(potential)
    out = potential(graph, stress=True)
    agree(out, out, potential, graph, 1e-12)
    for name in ("energy", "forces", "stress"):
        broken = replace(out, **{name: getattr(out, name) * torch.nan})
        with pytest.raises(RuntimeError, match=f"fast {name} differs"):
            agree(out, broken, potential, graph, 1e-4)


@pytest.mark.parametrize("elements", [["H"], ["Si", "C"], ["H", "C", "N", "O", "F", "P", "S", "Cl", "Br", "I", "Cs", "U"]])
def test_probes_are_dense_and_touch_nowhere(elements: list[str]) -> None:
    potential = make_potential(elements, zbl=False)
    graph = probe(potential, n_structures=2)
    assert graph.n_graphs == 2
    assert {chemical_symbols[z] for z in graph.atomic_numbers.tolist()} == set(elements)
    radii = torch.from_numpy(covalent_radii)[graph.atomic_numbers]
    sender, receiver = graph.edge_index
    ratio = graph.edge_vectors().norm(dim=1) / (radii[sender] + radii[receiver])
    assert 0.9 < float(ratio.min()) < 1.3
    assert torch.equal(probe(potential).positions, probe(potential).positions)


def test_part_of_a_large_structure() -> None:
    """What is compared of a large system: a graph of its own, with fewer pairs."""
    potential = make_potential(["Si"])
    graph = Calculator(potential, way="plain").graph(bulk("Si", cubic=True).repeat(3))
    part = part_of(graph, 1000)
    assert 300 < part.n_edges <= 1000
    assert int(part.edge_index.max()) < part.n_atoms < graph.n_atoms
    np.testing.assert_array_equal(part.edge_vectors(), graph.edge_vectors()[((graph.edge_index < part.n_atoms).all(dim=0)).nonzero()[:, 0]])
    part = rattled(part)
    agree(potential(part, stress=True), attach_kernels(potential)(part, stress=True), potential, part, TABLE_TOLERANCE[torch.float64])
    assert part_of(graph, graph.n_edges) is graph


def test_part_of_a_batch() -> None:
    """Some atoms of the first structures; each keeps its own cell and its own pairs."""
    potential = make_potential(["Si", "H", "C", "O"])
    frames = [bulk("Si", cubic=True).repeat(2), molecule("CH3OH"), bulk("Si").repeat(3), molecule("H2O"), molecule("CH4")]
    batch = potential.collate([from_atoms(f, LabelConfig(), "frame") for f in frames])
    assert part_of(batch, batch.n_edges) is batch
    part = part_of(batch, 800)
    assert part.n_graphs == 4
    assert part.n_edges <= 800
    assert bool((part.edge_index[1].diff() >= 0).all())
    assert bool((part.graph_index[part.edge_index[0]] == part.graph_index[part.edge_index[1]]).all())
    # its edges are among those of the batch
    known = {tuple(v) for v in batch.edge_vectors().numpy().round(9)}
    assert {tuple(v) for v in part.edge_vectors().numpy().round(9)} <= known
    # a whole structure that fits stays whole, and predicts what it did
    sizes = torch.bincount(part.graph_index).tolist()
    assert sizes[1] == 6
    assert sizes[3] == 3
    out, whole = potential.eval()(part, stress=False), potential(batch, stress=False)
    torch.testing.assert_close(out.energy[[1, 3]], whole.energy[[1, 3]], rtol=0, atol=1e-10)
    lone = potential.collate([from_atoms(molecule("H"), LabelConfig(), "frame")] * 3)
    assert part_of(lone, 1) is lone


def test_potentials_keep_their_own_weights(ethanol: Atoms) -> None:
    """Adding kernels leaves the potential as it was, and what is saved too."""
    potential = make_potential(ELEMENTS, **MODELS["nequip"])
    before = copy.deepcopy(potential.state_dict())
    quick = attach_kernels(potential)
    assert list(before) == list(potential.state_dict())
    assert all(torch.equal(before[k], v) for k, v in potential.state_dict().items())
    kinds = {type(m) for m in quick.modules()}
    assert {TableKernel, FixedMaps} <= kinds
    assert Coupling not in kinds
    assert any(isinstance(m, Coupling) for m in potential.modules())
    training = attach_kernels(potential, "training")
    ours, theirs = dict(potential.named_parameters()), dict(training.named_parameters())
    assert list(ours) == list(theirs)
    assert all(ours[k] is theirs[k] for k in ours)  # the very same tensors


@pytest.mark.thorough
def test_simulation_resumes_with_kernels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    atoms = molecule("CH3OH")
    potential = make_potential(["H", "C", "O"], dtype=torch.float32)
    options = dict(ensemble="langevin", temperature=100.0, timestep=0.2, interval=5, seed=3, progress=False)
    md(potential, atoms, steps=20, out=tmp_path / "whole", **options)
    md(potential, atoms, steps=10, out=tmp_path / "parts", **options)
    md(potential, atoms, steps=20, out=tmp_path / "parts", resume=True, **options)
    with np.load(tmp_path / "whole" / "state.npz") as a, np.load(tmp_path / "parts" / "state.npz") as b:
        assert json.loads(str(a["settings"]))["way"] == "kernels"
        np.testing.assert_array_equal(a["positions"], b["positions"])
    md(potential, atoms, steps=10, out=tmp_path / "plain", way="plain", **options)
    assert json.loads(str(np.load(tmp_path / "plain" / "state.npz")["settings"]))["way"] == "plain"


def test_registered_layers_survive_in_the_cache(cache: Path) -> None:
    ops.register(scalar_convolution(8), torch.float32)
    before = {p: p.stat().st_mtime_ns for p in cache.glob("convolution-*.so")}
    cpu.convolution_library(scalar_convolution(16), torch.float32)  # other channels, same source
    assert {p: p.stat().st_mtime_ns for p in cache.glob("convolution-*.so")} == before
    assert not any(p.is_dir() for p in cache.iterdir())


def test_edges_are_sorted_as_on_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    sender, receiver = torch.randint(0, 9, (2, 60), generator=generator)
    sender[sender == 4], receiver[receiver == 2] = 5, 3
    edge_index, nodes = torch.stack([sender, receiver.sort()[0]]), torch.zeros(9, 1)
    for a, b in zip(gpu.sort_edges(edge_index, nodes), torch.ops.gossamer.sort_edges(edge_index, nodes), strict=True):
        assert torch.equal(a, b)


def test_damaged_kernels_are_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    source = 'extern "C" void nothing() {}'
    path = cpu.build(source, "part")
    path.write_bytes(b"not a library")
    assert cpu.library.__wrapped__(source, "part", ()).nothing is not None
    assert path.read_bytes()[:4] != b"not "


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.thorough if n in ("leignn", "painn", "schnet") else pytest.mark.slow) for n in NETWORKS]
)
def test_kernels_round_as_the_network_does(name: str) -> None:
    """Against float64, forces by float32 kernels are about as far off as by the network itself: splines add little to rounding."""
    usual = NETWORKS[name][0]()
    sizes = {"num_features": usual.num_features, "num_basis": usual.num_basis, "cutoff": 5.0}
    potential = make_potential(ELEMENTS, name=name, dtype=torch.float32, **sizes)
    exact = copy.deepcopy(potential)
    exact.network.to(torch.float64)
    quick = attach_kernels(potential)
    errors: dict[str, list[float]] = {"plain": [], "kernels": []}
    for n in range(24, 29):
        graph = probe(exact, n)
        forces = exact(graph).forces
        for way, other in (("plain", potential), ("kernels", quick)):
            errors[way].append(float((other(graph).forces - forces).abs().max() / forces.pow(2).mean().sqrt()))
    plain, kernels = (float(np.median(errors[way])) for way in ("plain", "kernels"))
    assert kernels < 1e-5 + 2 * plain, (name, errors)


def test_evaluation_with_kernels(caplog: pytest.LogCaptureFixture) -> None:
    """Frames of lone atoms come first; a potential in training mode stays in it."""
    potential = make_potential(ELEMENTS)
    frames = [molecule("H"), molecule("CH3OH")]
    for frame in frames:
        frame.calc = Calculator(potential, way="plain")
        frame.get_forces()
    errors = evaluate(potential.train(), [from_atoms(f, LabelConfig(), "frame") for f in frames]).summary()
    assert potential.training
    assert errors["forces_mae_meV_per_A"] < 1e-5
    assert not caplog.records


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_kernels_while_weights_change(name: str, ethanol: Atoms, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Validation: equal with the weights of the moment, and nothing of the potential changed; wrong kernels are not used."""
    potential = make_potential(ELEMENTS, **MODELS[name]).train()
    graph = potential.collate([from_atoms(ethanol, LabelConfig(), "frame")])
    engine = Engine(potential, weights_change=True)
    assert engine.way == "kernels"
    for step in range(2):
        with torch.no_grad():
            for parameter in potential.network.parameters():
                parameter.mul_(1.0 + 0.1 * step)
        plain, quick = potential.eval()(graph), engine(graph)
        potential.train()
        torch.testing.assert_close(quick.forces, plain.forces.detach(), rtol=0, atol=1e-11)
        torch.testing.assert_close(quick.energy, plain.energy.detach(), rtol=0, atol=1e-10)
    assert potential.training
    assert any(p.requires_grad for p in potential.network.parameters())
    for operator in ("convolve_weighted", "attend"):
        right = getattr(torch.ops.gossamer, operator)
        wrong = (
            (lambda *a, o=right: o(*a) * 1.001)
            if operator == "convolve_weighted"
            else (lambda *a, o=right: tuple(1.001 * t for t in o(*a)))
        )
        monkeypatch.setattr(torch.ops.gossamer, operator, wrong)
    assert Engine(potential, weights_change=True).way == "plain"
    assert "differs from the plain one" in caplog.text


def test_logging_is_quiet(ethanol: Atoms, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ethanol.calc = Calculator(make_potential(ELEMENTS, **MODELS["schnet"]))
    ethanol.get_forces()
    assert not [r for r in caplog.records if r.name.startswith("gossamer")]


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", often(["odd channels", "first layer", "scalars", "l 1, both parities"], ["odd channels", "scalars"]))
def test_edge_kernel_has_right_second_derivatives(name: str) -> None:
    convolution = CONVOLUTIONS[name]()
    key = ops.register(convolution, torch.float64, edge_weights=True)
    features, harmonics, _, _, edge_index = inputs_of(convolution, torch.float64, n=7, edges=210)
    weights = torch.randn(210, sum(convolution.channels), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    edges = sort_edges(edge_index, features)
    found = []
    for function in (
        lambda f, y, w: torch.ops.gossamer.convolve_weighted(key, f, y, w, *edges),
        lambda f, y, w: summed(convolution, f, y, w, edge_index),
    ):
        variables = [t.clone().requires_grad_() for t in (features, harmonics, weights)]
        out = function(*variables)
        slopes = torch.autograd.grad(out.tanh().sum(), variables, create_graph=True, allow_unused=True)
        kept = [s for s in slopes if s is not None]
        curvatures = torch.autograd.grad(sum((s**3).sum() for s in kept), variables, allow_unused=True)
        found.append([out, *(torch.zeros_like(v) if s is None else s for s, v in zip((*slopes, *curvatures), variables * 2, strict=True))])
    for a, b in zip(*found, strict=True):
        assert float((a - b).detach().abs().max()) < 1e-12 * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize(
    "name",
    [
        *often(["leignn", "nequip", "painn", "schnet"], ["leignn"]),
        pytest.param("mace", marks=pytest.mark.slow),
        pytest.param("sevennet", marks=pytest.mark.slow),
    ],
)
def test_training_with_kernels_is_plain_training(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for kernels in (True, False):
        config = settings(tmp_path / str(kernels), steps=6, valid_every=6, dtype="float64", kernels=kernels)
        config["model"]["name"] = name
        train(config, progress=False)
    assert "without kernels" not in caplog.text
    quick, plain = weights(tmp_path / "True"), weights(tmp_path / "False")
    for key in (k for k in plain if k.startswith("network.")):
        torch.testing.assert_close(quick[key], plain[key], atol=1e-9, rtol=1e-7)


@pytest.mark.thorough
def test_batches_of_one_structure_use_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    right = EdgeKernel.forward
    monkeypatch.setattr(EdgeKernel, "forward", lambda self, features, edges: used.append(self.training) or right(self, features, edges))
    train(settings(tmp_path / "run", steps=2, batch_size=1), progress=False)
    assert any(used)  # in training, not only in validation


def test_wrong_training_kernels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    right = EdgeKernel.forward
    monkeypatch.setattr(EdgeKernel, "forward", lambda self, features, edges: right(self, 1.001 * features, edges))
    train(settings(tmp_path / "run", steps=3), progress=False)
    assert "training runs without kernels: the accelerated" in caplog.text


def test_rounding_is_no_reason_to_refuse_kernels(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Before training SevenNet's float32 by kernels is 1e-4 from the plain one, as either is from float64; a tenth is refused as ever."""
    monkeypatch.setitem(TOLERANCES, torch.float32, 1e-5)
    torch.manual_seed(0)
    structures = list(read_structures(ETHANOL))[:10]
    config = make_config({"data": {"train": "-"}, "model": {"name": "sevennet"}})
    potential = Potential(config.model, compute_statistics(structures, 5.0)).train()
    graph = potential.collate(structures)
    forward = CompiledForward(potential, forces=True, stress=False, compile=False, kernels=True)
    forward(graph)
    assert forward.quick is not potential, caplog.text
    part = rattled(graph)
    plain, fast = forward._results(forward.plain, part)[-1], forward._results(forward.uncompiled, part)[-1]
    deviation = float((plain - fast).norm() / plain.norm())
    assert deviation > 1e-5

    def wrong(graph: Graph) -> Prediction:
        found = forward.uncompiled(graph)
        assert found.forces is not None
        return replace(found, forces=found.forces * 1.1)

    with pytest.raises(RuntimeError, match="the altered forces differs from the plain one"):
        forward._agree(wrong, graph, "altered")
