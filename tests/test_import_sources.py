"""Each package's files become our networks with the same numbers; what is unknown in them is refused by name.

Files are written here, from the outputs of packages that tests/reference holds: their weights under their own names, their settings, and
modules of classes that exist only while they are written.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from conftest import ETHANOL, SHARED, make_potential, often

import gossamer
from gossamer.cli import main
from gossamer.graph import Graph
from gossamer.imports import ImportOptions, open_tree, read_potential, reference, verify
from gossamer.potential_file import read_manifest, save

REFERENCE = Path(__file__).parent / "reference"
NEQUIP = np.load(REFERENCE / "nequip.npz", allow_pickle=False)
FUNCTION = "model.sole_model.model.func."
SCHNETPACK = np.load(REFERENCE / "schnetpack.npz", allow_pickle=False)


# --- writing what others write ------------------------------------------------------------------------------------


class Foreign:
    """An object of a class that exists nowhere: written by its name, arguments and state; without arguments the class or function itself."""

    def __init__(self, name: str, args: tuple | None = None, **state: Any) -> None:
        self.name, self.args, self.state = name, args, state


class Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes pickles in torch's manner, with storages by number."""

    def __init__(self, file: io.BytesIO, storages: list[torch.Tensor]) -> None:
        super().__init__(file, 2)
        self.storages = storages

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, torch.Tensor):
            self.storages.append(obj.contiguous())
            kind = {torch.float32: "Float", torch.float64: "Double"}[obj.dtype]
            storage = Stored(("storage", Foreign(f"torch.{kind}Storage"), len(self.storages) - 1, "cpu", obj.numel()))
            tensor = (storage, 0, tuple(obj.shape), tuple(self.storages[-1].stride()), False, {})
            self.save(Foreign("torch._utils._rebuild_tensor_v2", tensor))
        elif isinstance(obj, Foreign):
            name, _, last = obj.name.rpartition(".")
            self.write(pickle.GLOBAL + f"{name}\n{last}\n".encode())
            if obj.args is not None:
                self.save(obj.args)
                self.write(pickle.REDUCE)
            if obj.state:
                self.save(obj.state)
                self.write(pickle.BUILD)
        else:
            super().save(obj, save_persistent_id)

    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, Stored) else None


class Stored:
    """Stands for a storage."""

    def __init__(self, pid: tuple) -> None:
        self.pid = pid


def dumps(value: Any, storages: list[torch.Tensor]) -> bytes:
    out = io.BytesIO()
    Pickler(out, storages).dump(value)
    return out.getvalue()


def module(name: str, children: dict[str, Any] | None = None, parameters: dict[str, torch.Tensor] | None = None, **state: Any) -> Foreign:
    return Foreign(name, (), _parameters={}, _buffers=parameters or {}, _modules=children or {}, **state)


def tree_of(flat: dict[str, torch.Tensor], classes: dict[str, tuple[str, dict]]) -> Foreign:
    """Modules from names of tensors, with a class and attributes for each prefix."""

    def make(prefix: str) -> Foreign:
        inside = {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
        parts = [k.removeprefix(prefix) for k in classes if k.startswith(prefix) and k != prefix]
        children = dict.fromkeys(p.split(".")[0] for p in [*inside, *parts] if "." in p)
        own = {k: v for k, v in inside.items() if "." not in k}
        name, state = classes.get(prefix, ("torch.nn.modules.container.ModuleList", {}))
        return module(name, {c: make(f"{prefix}{c}.") for c in children}, own, **state)

    return make("")


def write_archive(path: Path, members: dict[str, bytes], storages: list[torch.Tensor], package: bool) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"a/{name}", data)
        for k, storage in enumerate(storages):
            archive.writestr(f"a/.data/{k}.storage" if package else f"a/data/{k}", storage.numpy().tobytes())
    return path


def imported(path: Path, **options: Any) -> Any:
    return read_potential(open_tree(path), ImportOptions(**options))[1]


def stored_weights(data: Any, variant: str) -> dict[str, torch.Tensor]:
    prefix = f"{variant}/weights/"
    return {k.removeprefix(prefix): torch.from_numpy(data[k]) for k in data.files if k.startswith(prefix)}


def graph_of(data: Any) -> Graph:
    names = {"atomic_numbers": "atomic_numbers", "positions": "positions", "cell": "cell", "graph_index": "graph_index",
             "edge_index": "edge_sender_receiver", "edge_shifts": "edge_shifts"}  # fmt: skip
    found = {ours: torch.from_numpy(data[theirs]) for ours, theirs in names.items()}
    return Graph(**{**found, "atomic_numbers": found["atomic_numbers"].long(), "edge_shifts": found["edge_shifts"].double()})


def assert_equal(ours: Any, theirs: np.ndarray, tolerance: float = 1e-11) -> None:
    assert np.abs(ours.detach().numpy() - theirs).max() <= tolerance * np.abs(theirs).max()


ENDLESS: tuple = (1, 1)
"""its text would have 2^60 numbers, its pickle has a few hundred bytes"""
for _ in range(60):
    ENDLESS = (ENDLESS, ENDLESS)


# --- NequIP -------------------------------------------------------------------------------------------------------


def nequip_checkpoint(
    path: Path, variant: str, averaged: bool = True, changes: dict[str, Any] | None = None, extra: dict | None = None,
    version: Any = "0.19.0", schedule_free: Any = (),
) -> Path:  # fmt: skip
    """A checkpoint as nequip-train writes it; with averages, its raw weights are others."""
    settings, elements = json.loads(str(NEQUIP[f"{variant}/settings"])), NEQUIP["elements"].tolist()
    weights = stored_weights(NEQUIP, variant)
    model = {
        "_target_": "nequip.model.NequIPGNNModel", "seed": 1, "model_dtype": "float64", "type_names": elements, "r_max": settings["cutoff"],
        "avg_num_neighbors": settings["mean_neighbors"], "per_type_energy_scales": settings["scales"], "per_type_energy_shifts": settings["shifts"],
        **{k: v for k, v in settings.items() if k not in ("zbl", "cutoff", "mean_neighbors", "scales", "shifts")},
    }  # fmt: skip
    if settings["zbl"]:
        model["pair_potential"] = {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal", "chemical_species": elements}
    state = {f"model.sole_model.model.func.{k}": v for k, v in nequip_tensors(weights, settings, elements).items()}
    root = {"hyper_parameters": {"model": model | (changes or {}), "info_dict": {"versions": {"nequip": version}}}, "state_dict": state}
    state |= extra or {}
    if schedule_free != ():
        root["hyper_parameters"]["optimizer"] = {"_target_": "schedulefree.AdamWScheduleFree", "lr": 0.02}
        root |= {} if schedule_free is None else {"schedulefree_optimizer_state_dict": schedule_free}
    if averaged:
        for k, name in enumerate(weights):
            state[f"ema.ema_weight_{k}"] = weights[name]
            state[f"model.sole_model.model.func.{name}"] = torch.zeros_like(weights[name])
        state["ema._extra_state"] = {"decay": 0.99, "num_updates": 3, "is_holding_ema_weights": True}
    torch.save(root, path)
    return path


def nequip_tensors(weights: dict, settings: dict, elements: list[str]) -> dict[str, torch.Tensor]:
    """All tensors of a model, in the order of its modules."""
    cutoff, pairs = settings["cutoff"], settings.get("per_edge_type_cutoff") or {}
    table = torch.full((len(elements), len(elements)), cutoff, dtype=torch.float64)
    for k, centre in enumerate(elements):
        for n, neighbour in enumerate(elements):
            entry = pairs.get(centre, cutoff)
            table[k, n] = entry.get(neighbour, cutoff) if isinstance(entry, dict) else entry
    found = {"type_embed.embed_module.weight": weights["type_embed.embed_module.weight"],
             "edge_norm._rmax_recip": 1 / (table.flatten() if pairs else torch.tensor(cutoff, dtype=torch.float64)),
             "bessel_encode.bessel_weights": torch.arange(1.0, 9.0, dtype=torch.float64)[None]}  # fmt: skip
    found |= {k: v for k, v in weights.items() if k not in found or k.startswith("bessel")}
    for kind in ("scales", "shifts"):
        values = [settings[kind][e] for e in elements]
        found[f"per_type_energy_scale_shift.{kind}"] = torch.tensor(values, dtype=torch.float64)[:, None]
    if settings["zbl"]:
        found["pair_potential.atomic_numbers"] = torch.tensor([1.0, 6.0, 8.0, 14.0], dtype=torch.float64)
        found["pair_potential._qqr2exesquare"] = torch.tensor(14.399645 / 2, dtype=torch.float64)
    found["layer0_convnet.conv.linear_1.output_mask"] = torch.ones(3)
    return found


@pytest.mark.parametrize("variant", NEQUIP["nequip_variants"].tolist())
def test_nequip_checkpoints_have_the_numbers_of_the_package(variant: str, tmp_path: Path) -> None:
    """The averaged weights, not the raw ones."""
    potential = imported(nequip_checkpoint(tmp_path / "a.ckpt", variant))
    out = potential(potential.prune(graph_of(NEQUIP)), stress=True)
    assert_equal(out.energy, NEQUIP[f"{variant}/energy"])
    assert_equal(out.forces, NEQUIP[f"{variant}/forces"])
    assert_equal(out.stress[1], NEQUIP[f"{variant}/stress"][1])
    assert potential.imported == {"version": "0.19.0"}


def test_fewer_elements_are_the_same_potential(tmp_path: Path) -> None:
    path = nequip_checkpoint(tmp_path / "a.ckpt", "l2-pairs", averaged=False)
    whole, part = imported(path), imported(path, elements=["O", "H"])
    assert part.statistics.elements == ["H", "O"]
    assert part.num_parameters < whole.num_parameters
    water = Atoms("OH2", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    (a,), (b,) = whole.predict(water), part.predict(water)
    assert abs(a["energy"] - b["energy"]) < 1e-12
    assert np.abs(a["forces"] - b["forces"]).max() < 1e-12
    with pytest.raises(ValueError, match="does not know Xe"):
        imported(path, elements=["Xe"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_setting": 3}, "new_setting = 3"),
        ({"convnet_resnet": True}, "convnet_resnet is True"),
        ({"convnet_resnet": ENDLESS}, "convnet_resnet is a tuple"),
        ({"type_names": ENDLESS}, "type_names are a tuple"),
        ({"_target_": ENDLESS}, "built by a tuple"),
        ({"categorical_graph_field_embed": [{"charge": 3}]}, "categorical_graph_field_embed"),
        ({"avg_num_neighbors": {"H": 3.0}}, "no setting 'C'"),
        ({"avg_num_neighbors": 0.5}, "avg_num_neighbors"),
        ({"pair_potential": {"_target_": "nequip.nn.pair_potential.LennardJones"}}, "LennardJones"),
        ({"_target_": "nequip.model.ModelFromPackage"}, "built by ModelFromPackage"),
        ({"_target_": "nequip.model.modify", "modifiers": [{"modifier": "soft_adapt"}], "model": {}}, "modifiers"),
        ({"polynomial_cutoff_p": 5.5}, "power 5.5"),
        ({"r_max": 4.5}, "r_max is 4.5"),
        ({"num_layers": 3}, "has shape"),
        ({"type_names": ["H", "C", "O", "Water"]}, "no chemical symbols"),
    ],
)
def test_what_nequip_has_and_ours_has_not_is_refused_by_name(changes: dict, message: str, tmp_path: Path) -> None:
    path = nequip_checkpoint(tmp_path / "a.ckpt", "l1", changes=changes)
    with pytest.raises(ValueError, match=message):
        imported(path)


def test_tensors_left_over_are_refused_by_name(tmp_path: Path) -> None:
    extra = {"model.sole_model.model.func.charges.weight": torch.ones(3)}
    path = nequip_checkpoint(tmp_path / "a.ckpt", "l1", averaged=False, extra=extra)
    with pytest.raises(ValueError, match=r"charges\.weight \[3\]"):
        imported(path)


def irreps(*entries: tuple[int, int, int]) -> Foreign:
    kinds = [Foreign("e3nn.o3._irreps._MulIr", ((mul, Foreign("e3nn.o3._irreps.Irrep", ((l, p),))),)) for mul, l, p in entries]
    return Foreign("e3nn.o3._irreps.Irreps", (tuple(kinds),))


def activation(name: str) -> Foreign:
    """A function of e3nn's unit variance; torch.tanh is pickled as an attribute of a class."""
    tanh = Foreign("builtins.getattr", (Foreign("torch._C._VariableFunctionsClass"), "tanh"))
    function = tanh if name == "tanh" else Foreign(f"torch.nn.functional.{name}")
    return module("e3nn.math._normalize_activation.normalize2mom", f=function, cst=1.0)


def gate(scalars: list[tuple[int, int, int]], n_gates: int, functions: dict[str, str]) -> Foreign:
    parts = {}
    for kind, entries in (("scalars", scalars), ("gates", [(4, 0, 1)] * n_gates)):
        acts = {str(k): activation(functions[f"{kind} {p:+d}"]) for k, (_, _, p) in enumerate(entries)}
        inside = {"acts": module("torch.nn.modules.container.ModuleList", acts)}
        parts[f"act_{kind}"] = module("e3nn.nn._activation.Activation", inside, irreps_in=irreps(*entries))
    return module("e3nn.nn._gate.Gate", parts)


def nequip_package(
    path: Path, variant: str = "l2", factor: str = "nequip.nn.misc.ApplyFactor", functions: dict[str, str] | None = None,
    metadata: str = "versions: {nequip: 0.19.0}",
) -> Path:  # fmt: skip
    """A variant as nequip-package writes it: modules that say all of the model."""
    settings, elements = json.loads(str(NEQUIP[f"{variant}/settings"])), NEQUIP["elements"].tolist()
    flat = nequip_tensors(stored_weights(NEQUIP, variant), settings, elements)
    n_layers, n = settings["num_layers"], settings["num_features"]
    hidden = [(n[l], l, p) for l in range(len(n)) for p in ((1, -1) if settings["parity"] else ((-1) ** l,))]
    classes: dict[str, tuple[str, dict]] = {
        "": ("nequip.nn._graph_mixin.SequentialGraphNetwork", {}),
        "type_embed.": ("nequip.nn.embedding.node.NodeTypeEmbed", {"do_categorical_graph_field_embed": False}),
        "spharm.": ("nequip.nn.embedding._edge.SphericalHarmonicEdgeAttrs", {"irreps_edge_sh": irreps(*((1, l, (-1) ** l) for l in range(len(n))))}),
        "spharm.sh.": ("e3nn.o3._spherical_harmonics.SphericalHarmonics", {"normalization": "component"}),
        "edge_norm.": ("nequip.nn.embedding._edge.EdgeLengthNormalizer", {"r_max": 4.0}),
        "bessel_encode.": ("nequip.nn.embedding._edge.BesselEdgeLengthEncoding", {"num_bessels": 8, "trainable": False}),
        "bessel_encode.cutoff.": ("nequip.nn.embedding.cutoffs.PolynomialCutoff", {"p": 6.0}),
        "factor.": (factor, {"factor": 2 * np.pi / 16}),
        "per_atom_energy_readout.mlp_module.": ("nequip.nn.mlp.ScalarMLPFunction", {"dims": [n[0], 1], "bias": False}),
        "per_type_energy_scale_shift.": ("nequip.nn.atomwise.PerTypeScaleShift", {"scales_trainable": False}),
    }  # fmt: skip
    for k in range(n_layers):
        layer, last = f"layer{k}_convnet.", k == n_layers - 1
        irreps_out = irreps((n[0], 0, 1)) if last else irreps(*hidden)
        classes[layer] = ("nequip.nn.convnetlayer.ConvNetLayer", {"feature_irreps_hidden": irreps_out, "resnet": False})
        classes[f"{layer}conv."] = ("nequip.nn.interaction_block.InteractionBlock", {"use_sc": k > 0})
        dims = [8, 10, flat[f"{layer}conv.edge_mlp.mlp.2.weight"].shape[1]]
        classes[f"{layer}conv.edge_mlp."] = ("nequip.nn.mlp.ScalarMLPFunction", {"dims": dims, "bias": False})
        flat[f"{layer}conv.avg_num_neighbors_norm.norm_const"] = torch.tensor(9.0**-0.5, dtype=torch.float64)
    function = tree_of(flat, classes)
    for k in range(n_layers):  # odd scalars come of three products
        odd = [(n[0], 0, -1)] if settings["parity"] and 2 <= k < n_layers - 1 else []
        made = gate([(n[0], 0, 1), *odd], 0 if k == n_layers - 1 else 2, GATES | (functions or {}))
        function.state["_modules"][f"layer{k}_convnet"].state["_modules"]["equivariant_nonlin"] = made
    graph = module("nequip.nn.graph_model.GraphModel", {"model": module("nequip.nn.grad_output.ForceStressOutput", {"func": function})},
                   type_names=elements, model_dtype=torch.float64)  # fmt: skip
    storages: list[torch.Tensor] = []
    members = {"model/eager_model.pkl": dumps(module("torch.nn.modules.container.ModuleDict", {"sole_model": graph}), storages),
               "model/package_metadata.txt": metadata.encode(), ".data/version": b"6", ".data/python_version": b"3.11"}  # fmt: skip
    return write_archive(path, members, storages, package=True)


GATES = {"scalars +1": "silu", "scalars -1": "tanh", "gates +1": "silu"}


@pytest.mark.parametrize("variant", ["l2", "l1-parity-4"])
def test_nequip_packages_say_all_by_their_modules(variant: str, tmp_path: Path) -> None:
    potential = imported(nequip_package(tmp_path / "a.nequip.zip", variant))
    out = potential(graph_of(NEQUIP), stress=True)
    for name in ("energy", "forces"):
        assert_equal(getattr(out, name), NEQUIP[f"{variant}/{name}"])
    with pytest.raises(ValueError, match=r"parts that this gossamer does not know: nequip\.nn\.misc\.ApplyMore"):
        imported(nequip_package(tmp_path / "b.nequip.zip", variant, "nequip.nn.misc.ApplyMore"))


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"scalars +1": "tanh"}, "has tanh of even scalars"),
        ({"scalars -1": "silu"}, "has silu of odd scalars"),
        ({"gates +1": "tanh"}, "has tanh of even gates"),
        ({"scalars +1": "softplus", "gates +1": "mish"}, "has mish of even gates, softplus of even scalars"),
    ],
)
def test_each_gate_has_the_function_that_is_known(functions: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        imported(nequip_package(tmp_path / "a.nequip.zip", "l1-parity-4", functions=functions))


def test_a_version_is_text_or_left_out(tmp_path: Path) -> None:
    nest = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 60)) + "versions: {nequip: *a59}\n"
    assert imported(nequip_package(tmp_path / "a.nequip.zip", metadata=nest)).imported == {"version": None}
    assert imported(nequip_checkpoint(tmp_path / "a.ckpt", "l1", version=ENDLESS)).imported == {"version": None}


@pytest.mark.parametrize("kind", ["adam", "sgd", "evaluating", "new"])
def test_schedule_free_checkpoints_give_the_smoothed_weights(kind: str, tmp_path: Path) -> None:
    """Saved while training, the file has y = (1 - beta) z + beta x; the potential is x, which is known here."""
    weights, beta = stored_weights(NEQUIP, "l1"), 0.8
    z = {k: v + torch.linspace(-1, 1, v.numel(), dtype=v.dtype).reshape(v.shape) for k, v in weights.items()}
    training = kind in ("adam", "sgd")
    extra = {f"{FUNCTION}{k}": v.lerp(z[k], 1 - beta) for k, v in weights.items()} if training else {}
    group = {
        "train_mode": kind != "evaluating",
        "params": list(range(len(z))),
        **({"momentum": beta} if kind == "sgd" else {"betas": (beta, 0.99)}),
    }
    optimizer = {"state": {} if kind == "new" else {k: {"z": v} for k, v in enumerate(z.values())}, "param_groups": [group]}
    path = nequip_checkpoint(tmp_path / "a.ckpt", "l1", averaged=False, extra=extra, schedule_free=optimizer)
    assert_equal(imported(path)(graph_of(NEQUIP), stress=True).energy, NEQUIP["l1/energy"])
    for wrong in (None, {**optimizer, "param_groups": [group, group]}):
        path = nequip_checkpoint(tmp_path / "b.ckpt", "l1", averaged=False, extra=extra, schedule_free=wrong)
        with pytest.raises(ValueError, match=r"schedule-free training \(schedulefree\.AdamWScheduleFree\).*Package it"):
            imported(path)


SPARSE = torch.eye(2).to_sparse()
"""one of the kinds that the reader does not make anew"""


def test_tensors_that_are_not_read_are_refused(tmp_path: Path) -> None:
    path = nequip_checkpoint(tmp_path / "a.ckpt", "l1", averaged=False, extra={f"{FUNCTION}charges": SPARSE})
    with pytest.raises(ValueError, match=r"charges' is <torch\._utils\._rebuild_sparse_tensor, not run>, expected a plain tensor"):
        imported(path)
    torch.save({"atom_emb.embeddings.weight": torch.ones(3, 2), "message_layers.0.x_proj.0.weight": SPARSE}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"message_layers\.0\.x_proj\.0\.weight' is .* expected a plain tensor"):
        imported(tmp_path / "model.pt")
    arguments = {"hidden_channels": 8, "num_layers": 1, "num_heads": 2, "lmax": 1, "n_rbf": 8, "cutoff": 5.0, "radial_basis": "besselbasis",
                 "edge_updates": "linw_mlpa_ln", "distance_weighting": True}  # fmt: skip
    state = {"encoder.A_na.weight": torch.ones(3, 8), "SnapshotDecoder.readout": SPARSE}
    torch.save({"hyper_parameters": {"encoder": {"arch": "Geodite", "args": arguments}}, "state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"SnapshotDecoder\.readout' is .* expected a plain tensor"):
        imported(tmp_path / "a.ckpt")


# --- schnetpack ---------------------------------------------------------------------------------------------------


def schnetpack_model(path: Path, variant: str, activation: str | None = None) -> Path:
    """A saved model of schnetpack's with the weights of tests/reference."""
    _, layers, basis, cutoff = SCHNETPACK["settings_F_L_B_cutoff"].tolist()
    stored = stored_weights(SCHNETPACK, variant)
    flat = {k.replace("network.", "representation.", 1).replace("readout.", "output_modules.0.", 1): v for k, v in stored.items()}
    offsets = torch.linspace(0, cutoff, int(basis), dtype=torch.float64)
    flat |= {"representation.radial_basis.offsets": offsets, "representation.radial_basis.widths": torch.full_like(offsets, float(offsets[1])),
             "representation.cutoff_fn.cutoff": torch.tensor([cutoff], dtype=torch.float64)}  # fmt: skip
    flat |= {"postprocessors.0.mean": torch.tensor([2.0]), "postprocessors.0.atomref": torch.zeros(100)}
    silu, kind = Foreign("torch.nn.functional.silu"), "PaiNN" if variant == "painn" else "SchNet"
    softplus = Foreign("schnetpack.nn.activations.shifted_softplus")
    function = Foreign(activation) if activation else silu if variant == "painn" else softplus
    classes: dict[str, tuple[str, dict]] = {
        "": ("schnetpack.model.base.NeuralNetworkPotential", {"do_postprocessing": True, "spk_version": "2.1.1"}),
        "representation.": (f"schnetpack.representation.x.{kind}", {}),
        "representation.radial_basis.": ("schnetpack.nn.radial.GaussianRBF", {"n_rbf": int(basis)}),
        "output_modules.0.": ("schnetpack.atomistic.atomwise.Atomwise", {"aggregation_mode": "sum", "n_out": 1}),
        "output_modules.1.": ("schnetpack.atomistic.response.Forces", {"calc_forces": True}),
        "postprocessors.0.": ("schnetpack.transform.atomistic.AddOffsets", {"add_mean": True, "add_atomrefs": False, "is_extensive": True}),
        "representation.interactions.0.dense.": ("schnetpack.nn.base.Dense", {"activation": function}),
    }
    classes |= {
        f"representation.mixing.{k}.": ("schnetpack.representation.painn.PaiNNMixing", {"epsilon": 1e-8}) for k in range(int(layers))
    }
    if variant == "schnet":
        classes = {k: v for k, v in classes.items() if "mixing" not in k}
    storages: list[torch.Tensor] = []
    return write_archive(path, {"data.pkl": dumps(tree_of(flat, classes), storages)}, storages, package=False)


@pytest.mark.parametrize("variant", ["painn", "schnet"])
def test_schnetpack_models_have_the_numbers_of_the_package(variant: str, tmp_path: Path) -> None:
    path = schnetpack_model(tmp_path / "best_model", variant)
    potential = imported(path, elements=["H", "C", "O", "Si"], given={"energy_unit": "meV"})
    out = potential(graph_of(SCHNETPACK))
    sizes = np.bincount(SCHNETPACK["graph_index"])
    assert_equal(out.energy * 1000, SCHNETPACK[f"{variant}/energy"] + 2.0 * sizes)
    assert_equal(out.forces * 1000, SCHNETPACK[f"{variant}/forces"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "does not say the unit of energies"),
        ({"given": {"energy_unit": "eV"}}, "does not say which elements"),
        ({"given": {"energy_unit": "furlong"}}, "expected the unit"),
        ({"given": {"cutoff": "5"}}, "needs energy_unit"),
        ({"modal": "PBE"}, "has no modal 'PBE'"),
        ({"head": "a"}, "has no head 'a'"),
    ],
)
def test_what_schnetpack_files_do_not_say_must_be_given(options: dict, message: str, tmp_path: Path) -> None:
    path = schnetpack_model(tmp_path / "best_model", "painn")
    with pytest.raises(ValueError, match=message):
        imported(path, **options)
    with pytest.raises(ValueError, match=r"activations is \['gelu'\]"):
        imported(schnetpack_model(path, "painn", "torch.nn.functional.gelu"), elements=["H"], given={"energy_unit": "eV"})


# --- the authors' own ---------------------------------------------------------------------------------------------


@pytest.fixture
def leignn_data() -> Any:
    if not (SHARED / "reference" / "leignn.npz").exists():
        pytest.skip(f"there is no {SHARED / 'reference'}")
    return np.load(SHARED / "reference" / "leignn.npz", allow_pickle=False)


@pytest.fixture
def geodite_data() -> Any:
    if not (SHARED / "reference" / "geodite.npz").exists():
        pytest.skip(f"there is no {SHARED / 'reference'}")
    return np.load(SHARED / "reference" / "geodite.npz", allow_pickle=False)


LEIGNN_NAMES = {
    "P": "message_layers.{}.x_proj", "R": "message_layers.{}.rbf_proj", "W_v": "update_layers.{}.vec_proj", "MLP_u": "update_layers.{}.xvec_proj",
    "MLP_a": "global_scalar_layers.{}.mlp_node", "MLP_b": "global_scalar_layers.{}.mlp_vn", "W_a": "global_vector_layers.{}.mlp_node",
    "W_b": "global_vector_layers.{}.mlp_vn", "MLP_E": "out_energy", "W_F": "out_forces",
}  # fmt: skip


def leignn_name(name: str) -> str:
    """The authors' name of a weight that the reference file has under the paper's symbols."""
    parts = name.split("/") if "/" in name else name.split(".")
    if parts[0].startswith("embedding"):
        return "atom_emb.embeddings.weight"
    if parts[0].startswith("global_scalar_init"):
        return "vn_emb.weight"
    layer = parts[0].removeprefix("layer") if parts[0].startswith("layer") else ""
    symbol = next(p for p in parts if p in LEIGNN_NAMES)
    rest = parts[parts.index(symbol) + 1 :]
    rest = [{"1": "2"}.get(p, p) if symbol in ("P", "MLP_u", "MLP_E", "MLP_a", "MLP_b") else p for p in rest]
    return ".".join([LEIGNN_NAMES[symbol].format(layer), *rest])


@pytest.mark.parametrize(("variant", "update"), [("leignn", "nmu"), ("vanilla_nmu", "nmu"), ("vanilla", "painn")])
def test_leignn_weights_have_the_numbers_of_the_authors(variant: str, update: str, leignn_data: Any, tmp_path: Path) -> None:
    weights = {leignn_name(k): v for k, v in stored_weights(leignn_data, variant).items()}
    torch.save(weights, tmp_path / "model.pt")
    cutoff = float(leignn_data["settings_H_L_B_cutoff"][3])
    elements = sorted({int(z) for z in leignn_data["atomic_numbers"]})
    from ase.data import chemical_symbols

    given = {"cutoff": str(cutoff), "max_neighbors": "1000", "update": update}
    potential = imported(tmp_path / "model.pt", elements=[chemical_symbols[z] for z in elements], given=given)
    out = potential(graph_of(leignn_data))
    assert_equal(out.energy, leignn_data[f"{variant}/energy"])
    assert_equal(out.forces, leignn_data[f"{variant}/direct_forces"])
    with pytest.raises(ValueError, match="does not say the cutoff"):
        imported(tmp_path / "model.pt", elements=["H"])


GEODITE_NAMES = {
    "W_s1": "gamma_s.0", "W_s2": "gamma_s.1", "W_v1": "gamma_v.0", "W_v2": "gamma_v.1", "W_t1": "gamma_t.dense_layers.0",
    "W_t2": "gamma_t.dense_layers.1", "W_ed": "W_edp", "w_rho": "density_fn", "W_vk_l1": "W_vk.0", "W_vk_l2": "W_vk.1",
}  # fmt: skip
GEODITE_START = {
    "node_start/w_rho": "node_init.density_fn.weight", "node_start/A_na": "A_na.weight", "node_start/A_nbr": "node_init.A_nbr.weight",
    "node_start/W_ndp": "node_init.W_ndp.dense_layers.0.weight", "node_start/W_d": "node_init.W_nrd_nru.dense_layers.0.weight",
    "node_start/W_u": "node_init.W_nrd_nru.dense_layers.1.weight", "edge_start/W_erp": "edge_init.W_erp.weight",
    "radial/q0": "distance_weighting_fn.q", "radial/p0": "distance_weighting_fn.p",
}  # fmt: skip


def geodite_name(name: str) -> str:
    """The authors' name of a weight that the reference file has under the paper's symbols."""
    if name in GEODITE_START:
        return "encoder." + GEODITE_START[name]
    group, symbol = name.split("/", 1)
    if group == "readout":
        return f"SnapshotDecoder.readout.linears.{int(symbol.removeprefix('w_')) - 1}.weight"
    layer = int(group.removeprefix("layer")) - 1
    if symbol in ("W_m1", "W_m2", "W_vu"):
        return f"encoder.ec_list.{layer}." + {"W_m1": "gamma_m.0", "W_m2": "gamma_m.1", "W_vu": "W_vu"}[symbol] + ".weight"
    if symbol.startswith("gamma_"):
        return f"encoder.interaction_list.{layer}.tensor_layernorm.affine_weights.{symbol[-1]}"
    if symbol.startswith("LN_omega"):
        return f"encoder.interaction_list.{layer}.gamma_w.0.{symbol.split('/')[1]}"
    return f"encoder.interaction_list.{layer}.{GEODITE_NAMES.get(symbol, symbol)}.weight"


def test_geodite_checkpoints_have_the_numbers_of_the_authors(geodite_data: Any, tmp_path: Path) -> None:
    from ase.data import covalent_radii

    channels, heads, layers, basis, cutoff = geodite_data["settings_C_H_K_B_cutoff"].tolist()
    stored = {k.removeprefix("weights/"): torch.from_numpy(geodite_data[k]) for k in geodite_data.files if k.startswith("weights/")}
    state = {geodite_name(k): v[None] if k.startswith("readout") else v for k, v in stored.items()}
    state = {k: v[None] if k.endswith("density_fn.weight") and v.dim() == 1 else v for k, v in state.items()}
    constants = io.BytesIO()
    energies = torch.zeros(119, dtype=torch.float64)
    energies[[1, 6, 8, 14]] = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    torch.save({"MPtrj_": {"e0": energies, "e_shift": torch.tensor(0.5), "e_scale": torch.tensor(2.0)}}, constants)
    radii = torch.from_numpy(covalent_radii)
    state |= {
        "encoder.radial_basis.freqs": torch.arange(1, basis + 1, dtype=torch.float64) * np.pi / cutoff,
        "encoder.radial_basis.prefactor": torch.tensor((2 / cutoff) ** 0.5, dtype=torch.float64),
        "encoder.distance_weighting_fn.covalent_radii": radii, "SnapshotDecoder.repulsion_term.covalent_radii": radii,
        "SnapshotDecoder.repulsion_term.a_factor": torch.tensor(0.4546), "SnapshotDecoder.repulsion_term.Z_power": torch.tensor(0.0842),
        "SnapshotDecoder.repulsion_term.screen_coefs": torch.full((4,), 0.1663), "SnapshotDecoder.repulsion_term.screen_exps": torch.full((4,), 0.0354),
        "SnapshotDecoder.constants": torch.frombuffer(bytearray(constants.getvalue()), dtype=torch.uint8),
    }  # fmt: skip
    arguments = {"hidden_channels": int(channels), "num_layers": int(layers), "radial_basis": "besselbasis", "n_rbf": int(basis), "cutoff": cutoff,
                 "activation": "silu", "epsilon": 1e-6, "num_heads": int(heads), "edge_updates": "linw_mlpa_ln", "lmax": 2,
                 "distance_weighting": True}  # fmt: skip
    root = {"hyper_parameters": {"encoder": {"arch": "Geodite", "args": arguments}}, "state_dict": state}
    torch.save(root, tmp_path / "Geodite-MP.ckpt")
    potential = imported(tmp_path / "Geodite-MP.ckpt", modal="MPtrj")
    assert potential.statistics.elements == ["H", "C", "O", "Si"]
    graph = graph_of(geodite_data)
    alone = np.bincount(geodite_data["graph_index"], (energies + 0.5).numpy()[geodite_data["atomic_numbers"]])
    expected = 2.0 * (geodite_data["energy_network"] + geodite_data["energy_repulsion"]) + alone
    assert_equal(potential(graph).energy, expected, 1e-7)  # the start values of the repulsion are float32 in the file
    with pytest.raises(ValueError, match="has no modal 'PBE'"):
        imported(tmp_path / "Geodite-MP.ckpt", modal="PBE")
    arguments["edge_updates"] = "gated"
    torch.save(root, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="edge_updates is gated"):
        imported(tmp_path / "other.ckpt")


# --- the whole path -----------------------------------------------------------------------------------------------


def test_an_unverified_import_says_so(tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> None:
    path, out = nequip_checkpoint(tmp_path / "a.ckpt", "l1"), tmp_path / "p.safetensors"
    assert main(["import", str(path), "--elements", "C,H", "--out", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["verified"], answer["elements"], answer["version"]) == ("no", "H C", "0.19.0")
    origin = read_manifest(out)["imported"]
    assert (origin["file"], origin["verified"], origin["elements"], len(origin["sha256"])) == ("a.ckpt", None, ["C", "H"], 64)
    assert main(["info", str(out)]) == 0
    assert "# unverified import from nequip" in capsys.readouterr().out
    with caplog.at_level(logging.WARNING):
        potential = gossamer.load(out)
    assert "unverified import from nequip" in caplog.text
    assert potential.dtype == torch.float64


ANSWER = """
import sys, numpy as np
answer = np.load(sys.path_answer, allow_pickle=False)
np.savez(sys.argv[2], **answer)
"""


@pytest.mark.parametrize(("error", "rounding"), often([(0.0, 0.0), (1e-5, 0.0), (1e-5, 2e-6), (1e-5, 5e-6)], [(0.0, 0.0), (1e-5, 2e-6)]))
def test_a_reference_is_compared_and_becomes_the_self_test(
    error: float, rounding: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, out = nequip_checkpoint(tmp_path / "a.ckpt", "l1"), tmp_path / "p.safetensors"
    potential = imported(path, elements=["H", "C"])
    check = verify.structures(["H", "C"], potential.cutoff)
    assert {z for s in check for z in s.atomic_numbers.tolist()} == {1, 6}
    said = potential.predict(check)
    stress = [np.full(6, np.nan) if p["stress"] is None else p["stress"].ravel()[[0, 4, 8, 5, 2, 1]] for p in said]
    np.savez(
        tmp_path / "answer.npz", package="nequip", version="0.19.0", **{
            "native.energy": np.array([p["energy"] for p in said]), "native.forces": np.concatenate([p["forces"] for p in said]) + error,
            "native.stress": np.array(stress), "turned0.energy": np.array([p["energy"] for p in said]), "turned0.stress": np.array(stress),
            "turned0.forces": np.concatenate([p["forces"] for p in said]) + error + rounding},
    )  # fmt: skip
    (tmp_path / "reference.py").write_text(ANSWER.replace("sys.path_answer", repr(str(tmp_path / "answer.npz"))))
    monkeypatch.setattr(verify, "SCRIPT", tmp_path / "reference.py")
    if error > verify.NOISE * rounding:
        with pytest.raises(ValueError, match=r"not the one that nequip 0\.19\.0 computes; nothing was written"):
            gossamer.import_potential(path, out, elements="H,C", reference=sys.executable)
        assert not out.exists()
        return
    answer = gossamer.import_potential(path, out, elements="H,C", reference=sys.executable)
    assert answer["verified"]["float64"]["forces_eV_per_A"] < 1.001 * error + 1e-12
    with caplog.at_level(logging.WARNING):
        gossamer.load(out)
    assert "unverified" not in caplog.text
    assert read_manifest(out)["n_check"] == 12


def test_a_reference_is_asked_about_turned_structures() -> None:
    frames = [bulk("Cu", cubic=True), molecule("N2")]
    for k, atoms in enumerate(frames):
        atoms.rattle(0.1, seed=k)
    frames[0].set_cell(frames[0].cell.array @ [[1.1, 0.1, 0], [0, 0.9, 0.2], [0.05, 0, 1]], scale_atoms=True)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    plain, turned = (reference.evaluate(EMT(), f) for f in (frames, [reference.turned(a, rotation) for a in frames]))
    assert np.abs(plain["stress"][0]).min() > 1e-4
    assert np.abs(turned["forces"] - plain["forces"]).max() > 1e-2
    for name, value in reference.turned_back(turned, rotation).items():
        np.testing.assert_allclose(value, plain[name], atol=1e-10)


@pytest.mark.parametrize("error", often([0.0, 1e-7], [1e-7]))
def test_rounding_in_float32_excuses_nothing_in_float64(error: float) -> None:
    potential = make_potential(["H", "C"], name="painn", dtype=torch.float32)
    check = verify.structures(["H", "C"], potential.cutoff)[:4]
    answer: dict[str, Any] = {"package": "other", "version": "1"}
    for precision, dtype, off in (("native", torch.float32, 0.0), ("float64", torch.float64, error)):
        potential.network.to(dtype)
        said = potential.predict(check)
        answer |= {f"{precision}.energy": np.array([p["energy"] for p in said]), f"{precision}.stress": np.full((4, 6), np.nan),
                   f"{precision}.forces": np.concatenate([p["forces"] for p in said]) + off}  # fmt: skip
    potential.network.to(torch.float32)
    if error:
        with pytest.raises(ValueError, match="nothing was written"):
            verify.compare(potential, check, answer)
    else:
        assert verify.compare(potential, check, answer)["float64"]["forces_eV_per_A"] < 1e-12


def test_a_stress_that_nobody_gave_is_not_verified() -> None:
    potential = make_potential(["H", "C"], name="painn")
    check = verify.structures(["H", "C"], potential.cutoff)[2:6]  # two molecules, two crystals
    said = potential.predict(check)
    stress = np.array([np.full(6, np.nan) if p["stress"] is None else p["stress"].ravel()[[0, 4, 8, 5, 2, 1]] for p in said])
    answer = {"package": "other", "version": "1", "native.energy": np.array([p["energy"] for p in said]),
              "native.forces": np.concatenate([p["forces"] for p in said]), "native.stress": stress}  # fmt: skip
    report = verify.compare(potential, check, answer)
    assert report["float64"]["stress_eV_per_A3"] < 1e-10
    assert "stress" not in report
    report = verify.compare(potential, check, {**answer, "native.stress": np.full((4, 6), np.nan)})
    assert report["float64"].keys() == {"energy_eV_per_atom", "forces_eV_per_A"}
    assert report["stress"] == "not compared: there is no structure of which both gave one"


def test_references_that_cannot_be_had(tmp_path: Path) -> None:
    path = nequip_checkpoint(tmp_path / "a.ckpt", "l1")
    with pytest.raises(FileNotFoundError, match="There is no program"):
        gossamer.import_potential(path, tmp_path / "p.safetensors", reference="no-such-python")
    with pytest.raises(ValueError, match="(?s)could not evaluate.*nequip"):  # not installed here
        gossamer.import_potential(path, tmp_path / "p.safetensors", reference=sys.executable)


def test_files_that_nobody_knows(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    save(make_potential(["H"]), tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match="is a potential of gossamer's already"):
        gossamer.import_potential(tmp_path / "ours.safetensors", tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="of no kind that is known"):
        gossamer.import_potential(tmp_path / "a.pth")
    (tmp_path / "b").write_text("hello")
    with pytest.raises(ValueError, match="It holds b'hello'"):
        gossamer.import_potential(tmp_path / "b")


@pytest.mark.slow
def test_an_import_is_fine_tuned_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With low rank and replay; the reference energies move to those of the labels."""
    start, data = tmp_path / "start.safetensors", tmp_path / "data.xyz"
    ase.io.write(data, ase.io.read(ETHANOL, "::3"), format="extxyz")
    gossamer.import_potential(nequip_checkpoint(tmp_path / "a.ckpt", "l1", changes={"model_dtype": "float32"}), start, elements="H,C,O")
    command = ["fit", str(data), "--start", str(start), "--out", str(tmp_path / "run"), "--minutes", "0.02"]
    assert main([*command, "--low-rank", "2", "--weights", "readout*", "--replay", str(data), "--json"]) == 0
    tuning = json.loads(capsys.readouterr().out)["finetune"]
    assert tuning["adapters"] > 0
    assert tuning["n_frozen"] > 0
    assert tuning["before"]["valid"]["energy_mae_meV_per_atom"] < 1e4  # the start lies 5 eV/atom from the labels and more
    assert tuning["after"]["valid"]["n_frames"] > 0
