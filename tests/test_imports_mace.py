"""Files of mace-torch: what is not known is refused by name, other bases are mapped. That the numbers are equal, `test_reference.py` shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import molecule

from gossamer.imports import mace
from gossamer.imports.contract import ImportOptions
from gossamer.imports.inert import Tree
from gossamer.imports.pickle_machine import Inert
from gossamer.models.base import DataFacts
from gossamer.models.mace import MACE, MACEConfig, couplings, monomials


def stand_in(name: str, children: dict | None = None, **state: object) -> Inert:
    """A module as the reader gives it."""
    made = Inert(name)
    made.state = {"_modules": children or {}, **state}
    return made


def irreps(*parts: tuple[int, int, int]) -> Inert:
    return Inert(
        "e3nn.o3._irreps.Irreps", (tuple(Inert("e3nn.o3._irreps._MulIr", ((n, Inert("Irrep", ((l, p),))),)) for n, l, p in parts),)
    )


def mace_module(
    block: str = "RealAgnosticInteractionBlock", sums: tuple = ((4, 0, 1), (4, 1, -1)), cst: float = 1.6791768,
    radial_functions: tuple = (True, True, False), readout_function: bool = True, heads: object = ("Default",), **settings: object,
) -> Inert:  # fmt: skip
    """A ScaleShiftMACE of one layer; which layers of its radial network have an activation (all the same), and whether its readout has."""
    silu = stand_in("e3nn.math._normalize_activation.normalize2mom", f=Inert("torch.nn.functional.silu"), cst=cst)
    radial = stand_in(
        "e3nn.nn._fc.FullyConnectedNet",
        {f"layer{k}": stand_in("e3nn.nn._fc._Layer", {"act": silu} if has else {}) for k, has in enumerate(radial_functions)},
    )
    acts = stand_in("torch.nn.modules.container.ModuleList", {"0": silu} if readout_function else {})
    readout = stand_in(
        "mace.modules.blocks.NonLinearReadoutBlock", {"non_linearity": stand_in("e3nn.nn._activation.Activation", {"acts": acts})}
    )
    up, down = (stand_in("e3nn.o3._linear.Linear", irreps_out=irreps((4, 0, 1))) for _ in range(2))
    layer = stand_in(
        f"mace.modules.blocks.{block}", {"linear_up": up, "conv_tp_weights": radial}, target_irreps=irreps(*sums), avg_num_neighbors=9.0
    )
    product = stand_in("mace.modules.blocks.EquivariantProductBasisBlock", {"linear": down})
    parts = {
        "radial_embedding": stand_in("mace.modules.blocks.RadialEmbeddingBlock", {"bessel_fn": stand_in("mace.modules.radial.BesselBasis")}),
        **{name: stand_in("torch.nn.modules.container.ModuleList", {"0": part}) for name, part in
           {"interactions": layer, "products": product, "readouts": readout}.items()},
    }  # fmt: skip
    return stand_in("mace.modules.models.ScaleShiftMACE", parts, training=False, heads=heads, **settings)


ENDLESS: tuple = (1, 1)
"""its text would have 2^60 numbers"""
for _ in range(60):
    ENDLESS = (ENDLESS, ENDLESS)


def test_a_module_without_its_parts_is_refused(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "file.model", "torch", ())
    tree.__dict__["root"] = stand_in("mace.modules.models.ScaleShiftMACE", {})
    assert mace.recognises(tree)
    with pytest.raises(ValueError, match="is not built as mace-torch builds its models"):
        mace.potential(tree, ImportOptions())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": "RealAgnosticResidualNonLinearInteractionBlock"}, "interactions.0 is a RealAgnosticResidualNonLinearInteractionBlock, which"),
        ({"sums": ((4, 0, 1), (4, 1, 1))}, "layer 0 has sums"),
        ({"cst": 1.5}, "conv_tp_weights has the activations torch.nn.functional.silu times 1.5, torch"),
        ({"readout_function": False}, "readouts.0 has the activations none, where SiLU of unit variance is known"),
        ({"radial_functions": (True, False, False)}, "conv_tp_weights has the activations SiLU of unit variance, none, none, where"),
        ({"radial_functions": (True, True, True)}, "conv_tp_weights has the activations SiLU"),
        ({"heads": [ENDLESS]}, "heads are a list, expected a list of names"),
        ({"apply_cutoff": False}, "apply_cutoff is False"),
        ({"embedding_specs": {"charge": 1}}, "settings that this gossamer does not know: embedding_specs"),
    ],
)  # fmt: skip
def test_kinds_of_mace_that_are_not_known_are_refused(change: dict, message: str) -> None:
    found = mace.describe(mace_module(), "FILE")
    assert found["interactions"] == ["RealAgnosticInteractionBlock"]
    assert found["heads"] == ["Default"]
    with pytest.raises(ValueError, match=message):
        mace.describe(mace_module(**change), "FILE")


def mace_tensors(variant: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Of the stored outputs."""
    data = np.load(Path(__file__).parent / "reference" / "mace.npz")
    prefix = f"{variant}/weights/"
    tensors = {k.removeprefix(prefix): torch.from_numpy(data[k]) for k in data.files if k.startswith(prefix)}
    return tensors, json.loads(str(data[f"{variant}/kinds"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"les.weight": torch.ones(3)}, "holds tensors that this gossamer does not know: les.weight"),
        (lambda t: {k: v for k, v in t.items() if k != "readouts.1.linear_2.weight"}, "has no tensor 'readouts.1.linear_2.weight'"),
        (lambda t: t | {"pair_repulsion_fn.a_exp": torch.tensor(0.31)}, "'pair_repulsion_fn.a_exp' is"),
        (
            lambda t: {k: v + 0.1 if k.endswith("contractions.0.U_matrix_2") else v for k, v in t.items()},
            "U_matrix_2 couples features in a way",
        ),
    ],
)
def test_tensors_of_mace_that_are_not_known_are_refused(change, message: str) -> None:
    tensors, kinds = mace_tensors("MPA")
    with pytest.raises(ValueError, match=message):
        mace.assemble(change(tensors), kinds, ImportOptions(), "FILE")


def test_couplings_in_another_basis_are_mapped() -> None:
    """As cuEquivariance makes them: fewer, mixed."""
    ours = couplings(2, 1, 2)
    mix = np.random.default_rng(0).normal(size=(len(ours), 2))
    number = {m: k for k, m in enumerate(monomials(9, 2))}
    theirs = np.zeros((3, 9, 9, 2))
    for i, j in np.ndindex(9, 9):
        theirs[:, i, j] = np.einsum("po,pq->oq", ours[:, :, number[min(i, j), max(i, j)]], mix) / (1 if i == j else 2)
    change = mace.basis_change(torch.from_numpy(theirs), 2, 1, 2, "U")
    np.testing.assert_allclose(np.einsum("pq,pom->qom", change, ours), np.einsum("pq,pom->qom", mix, ours), atol=1e-12)


def test_degrees_that_no_coupling_reaches_have_no_weights() -> None:
    """One factor of degree 1 makes none of degree 2; mace-torch has one coupling there, which is zero."""
    assert mace.basis_change(torch.zeros(5, 4, 1), 1, 2, 1, "U").shape == (0, 1)


def test_functions_that_were_trained_by_little_are_kept() -> None:
    tensors, kinds = mace_tensors("OFF")
    name = "radial_embedding.bessel_fn.bessel_weights"
    potentials = [mace.assemble(tensors | {name: tensors[name] * factor}, kinds, ImportOptions(), "FILE") for factor in (1, 1 + 8e-6)]
    assert [p.model_config.train_bessel for p in potentials] == [False, True]
    plain, trained = (p.predict(molecule("H2O"))[0]["energy"] for p in potentials)
    assert abs(plain - trained) > 1e-9


def test_densities_stand_in_the_place_of_numbers_of_neighbours() -> None:
    tensors, kinds = mace_tensors("MPA")
    one, other = (mace.assemble(tensors, {**kinds, "neighbors": n}, ImportOptions(), "FILE") for n in ([9.0, 9.0], [9.0, 13.0]))
    water = molecule("H2O")
    assert one.predict(water)[0]["energy"] == other.predict(water)[0]["energy"]


def test_some_elements_and_one_head_of_mace() -> None:
    tensors, kinds = mace_tensors("heads")
    with pytest.raises(ValueError, match="holds several: choose one with --head"):
        mace.assemble(tensors, kinds, ImportOptions(), "FILE")
    whole, part = (mace.assemble(tensors, kinds, ImportOptions(head="new", elements=e), "FILE") for e in (None, ["O", "H"]))
    assert part.statistics.elements == ["H", "O"]
    water = molecule("H2O")
    assert part.predict(water)[0]["energy"] == pytest.approx(whole.predict(water)[0]["energy"], abs=1e-12)


@pytest.mark.parametrize("preset, parameters", [("MP-small", 3_847_696), ("MP-medium", 4_688_656), ("MP-large", 5_725_072)])
def test_presets_have_the_published_sizes(preset: str, parameters: int) -> None:
    """Of 89 elements, as mace-torch counts them for the settings of MACE-MP-0."""
    config = MACEConfig(**MACE.presets[preset])
    network = MACE(config, DataFacts(atomic_numbers=tuple(range(1, 90))))
    assert sum(p.numel() for p in network.parameters()) == parameters
