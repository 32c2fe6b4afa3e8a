"""MACE: `.model` files of mace-torch, that is MACE and ScaleShiftMACE with agnostic interaction blocks, as `gossamer.models.mace`.

What differs between the two packages: mace-torch's edge vectors point from neighbour to centre, so radial functions of odd harmonics
change sign; its weights are divided by the root of the number of elements; its paths are sorted by the degree of the result; and couplings
by way of unnatural parity have the sign of e3nn 0.4.4, or, where cuEquivariance made them, are another basis of the same space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols, covalent_radii
from numpy.typing import NDArray
from torch import Tensor

from gossamer.imports.contract import ImportOptions, Known, Weights, choose, chosen_elements, foreign_statistics, keep_elements, texts
from gossamer.imports.inert import Tree, module_state, modules_of, tensors_of
from gossamer.imports.pickle_machine import Inert
from gossamer.models.mace import AGNESI, MACE, SOFT_STEEPNESS, MACEConfig, couplings, monomials
from gossamer.nn.layers import UNIT_SILU
from gossamer.potential import Potential, PotentialConfig

PACKAGE = "mace-torch"
MODELS = ("MACE", "ScaleShiftMACE")
BLOCKS = {
    "RealAgnosticInteractionBlock": (False, False),
    "RealAgnosticResidualInteractionBlock": (True, False),
    "RealAgnosticDensityInteractionBlock": (False, True),
    "RealAgnosticDensityResidualInteractionBlock": (True, True),
}
"""(self-connection, density)"""
BASES = {"BesselBasis": "bessel", "GaussianBasis": "gaussian"}
TRANSFORMS = {"AgnesiTransform": "agnesi", "SoftTransform": "soft"}
SILU = "SiLU of unit variance"
READOUTS = ("LinearReadoutBlock", "NonLinearReadoutBlock")
OTHERS = ("LinearNodeEmbeddingBlock", "RadialEmbeddingBlock", "PolynomialCutoff", "ZBLBasis", "AtomicEnergiesBlock", "reshape_irreps",
          "EquivariantProductBasisBlock", "SymmetricContraction", "Contraction", "EmptyParam", "ScaleShiftBlock")  # fmt: skip
"""further classes of the package"""


def recognises(tree: Tree) -> bool:
    """Whether the file holds a module of mace-torch's."""
    try:
        return isinstance(tree.root, Inert) and tree.root.name.startswith("mace.")
    except ValueError:
        return False


def potential(tree: Tree, options: ImportOptions) -> Potential:
    """The potential in a `.model` file.

    Raises:
        ValueError: a class, a setting or a tensor that is not known, a head or an element that the file lacks.
    """
    where = f"'{tree.path}'"
    try:
        return assemble(tensors_of(tree.root), describe(tree.root, where), options, where)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{where} is not built as mace-torch builds its models ({type(error).__name__}: {error}). It was refused."
        ) from error


# --- what kind of model it is ----------------------------------------------------------------------------------------


def describe(root: Any, where: str) -> dict[str, Any]:
    """Kinds and settings of a model: what its tensors alone do not tell.

    Raises:
        ValueError: a class or a setting that is not known.
    """
    modules = modules_of(root)
    kinds = {prefix: module.name.rpartition(".")[2] for prefix, module in modules.items()}
    if kinds[""] not in MODELS:
        raise ValueError(f"{where} holds a {kinds['']} of mace-torch; this gossamer knows {' and '.join(MODELS)} only.")
    known = {*MODELS, *BLOCKS, *BASES, *TRANSFORMS, *READOUTS, *OTHERS}
    for prefix, module in modules.items():
        if module.name.startswith("mace.") and kinds[prefix] not in known:
            raise ValueError(f"{where}: {prefix.rstrip('.')} is a {kinds[prefix]}, which this gossamer does not know. It was refused.")
    _check_activations(modules, where)
    settings = Known({k: v for k, v in module_state(root).items() if k[0] != "_" and k != "training"}, where)
    settings.drop("lammps_mliap", "use_reduced_cg", "pair_repulsion")  # the last is told by its module
    for name, allowed in {"apply_cutoff": True, "use_so3": False, "edge_irreps": None, "use_edge_irreps_first": False}.items():
        settings.expect(name, allowed, default=allowed)
    agnostic = settings.expect("use_agnostic_product", True, False, default=False)
    last_only = settings.expect("use_last_readout_only", True, False, default=False)
    heads = texts(settings.take("heads", ["Default"]), where, "heads")
    settings.done()
    n = sum(f"interactions.{k}." in modules for k in range(len(modules)))
    states = [module_state(modules[f"interactions.{k}."]) for k in range(n)]
    for k, state in enumerate(states):
        irreps = irreps_of(state["target_irreps"])
        hidden = irreps_of(module_state(modules[f"products.{k}.linear."])["irreps_out"])
        up = irreps_of(module_state(modules[f"interactions.{k}.linear_up."])["irreps_out"])
        for name, found in {"sums": irreps, "features": hidden, "mapped features": up}.items():
            if found != [(irreps[0][0], l, (-1) ** l) for l in range(len(found))]:
                raise ValueError(
                    f"{where}: layer {k} has {name} {found} (channels, degree, parity); this gossamer knows equal numbers of 0e, 1o, 2e … only."
                )
    return {
        "interactions": [kinds[f"interactions.{k}."] for k in range(n)],
        "neighbors": [float(state["avg_num_neighbors"]) for state in states],
        "readouts": [kinds[f"readouts.{k}."] for k in range(n) if f"readouts.{k}." in kinds],
        "basis": kinds["radial_embedding.bessel_fn."],
        "transform": kinds.get("radial_embedding.distance_transform."),
        "repulsion": "pair_repulsion_fn." in kinds,
        "heads": heads,
        "agnostic": agnostic,
        "last_readout_only": last_only,
    }


def irreps_of(value: Any) -> list[tuple[int, int, int]]:
    """(channels, degree, parity) of each part of e3nn's Irreps, a stand-in or text such as 8x0e + 8x1o."""
    if isinstance(value, str):
        parts = [part.strip().split("x") for part in value.split("+")]
        return [(int(p[0]) if len(p) > 1 else 1, int(p[-1][:-1]), 1 if p[-1][-1] == "e" else -1) for p in parts]
    return [(int(part.args[0][0]), *part.args[0][1].args[0]) for part in value.args[0]]


def _check_activations(modules: Mapping[str, Inert], where: str) -> None:
    """SiLU of unit variance, the only one that is known, after every hidden layer, and none after the last."""
    for prefix, module in modules.items():
        expected = [SILU]
        if module.name.endswith(".FullyConnectedNet"):
            functions = [_children(layer).get("act") for layer in _children(module).values()]
            expected = [SILU] * (len(functions) - 1) + ["none"]
        elif module.name.endswith(".NonLinearReadoutBlock"):
            functions = list(_children(_children(_children(module)["non_linearity"])["acts"]).values()) or [None]
        elif module.name.endswith(".normalize2mom"):
            functions = [module]
        else:
            continue
        found = [_activation(function) for function in functions]
        if found != expected:
            raise ValueError(
                f"{where}: {prefix.rstrip('.')} has the activations {', '.join(found)}, where {', '.join(expected)} is known. It was refused."
            )


def _children(module: Any) -> dict[str, Any]:
    found: dict[str, Any] = module_state(module).get("_modules", {})
    return found


def _activation(function: Any) -> str:
    """A normalised function in words."""
    if function is None:
        return "none"
    state = module_state(function)
    name, factor = getattr(state["f"], "name", None), float(state["cst"])
    return SILU if name == "torch.nn.functional.silu" and abs(factor - UNIT_SILU) < 1e-5 else f"{name} times {factor}"


# --- its tensors -------------------------------------------------------------------------------------------------------


def assemble(tensors: Mapping[str, Tensor], kind: Mapping[str, Any], options: ImportOptions, where: str) -> Potential:
    """The potential with these tensors, by mace-torch's names, and the kinds that `describe` found.

    Raises:
        ValueError: a tensor left over, of another shape, or missing.
    """
    weights = Weights({k: v for k, v in tensors.items() if v.numel()}, where)
    numbers = weights.take("atomic_numbers").tolist()
    elements = [chemical_symbols[z] for z in numbers]
    head_name = choose("head", options.head, kind["heads"] if len(kind["heads"]) > 1 or options.head else [], where)
    head = 0 if head_name is None else kind["heads"].index(head_name)
    config: Any = _config(weights, kind, len(numbers))
    energies = torch.atleast_2d(weights.take("atomic_energies_fn.atomic_energies").double())[head]
    scale, shift = 1.0, 0.0
    if "scale_shift.scale" in weights:
        scale, shift = (float(torch.atleast_1d(weights.take(f"scale_shift.{k}"))[head]) for k in ("scale", "shift"))
    references = {e: float(energies[k]) + shift for k, e in enumerate(elements)}
    statistics = foreign_statistics(elements, references, mean_neighbors=kind["neighbors"][0], energy_scale=scale)
    made = Potential(config, statistics, PotentialConfig(zbl=False)).eval()
    network: Any = made.network.double()
    found = _layers(weights, kind, network)
    embedding = weights.take("node_embedding.linear.weight")
    found["embedding.weight"] = embedding.double().reshape(len(numbers), -1) / math.sqrt(len(numbers))
    found |= _readouts(weights, kind, network, head)
    if config.train_bessel:
        found["frequencies"] = weights.take("radial_embedding.bessel_fn.bessel_weights").double() * config.cutoff / math.pi
    _constants(weights, config, len(kind["interactions"]))
    weights.drop("*.output_mask", "*_zeroed")
    weights.done()
    network.load_state_dict(found)
    network.to(embedding.dtype)
    return keep_elements(made, chosen_elements(elements, options, where))


def _config(weights: Weights, kind: Mapping[str, Any], n_elements: int) -> MACEConfig:
    """Settings, from kinds and shapes."""
    where = weights.where
    flags = [BLOCKS[name] for name in kind["interactions"]]
    connected, density = [f[0] for f in flags], {f[1] for f in flags}
    if len(density) > 1 or (len(connected) > 1 and len(set(connected[1:])) > 1) or connected == [True, False]:
        raise ValueError(f"{where} mixes the layers {', '.join(kind['interactions'])} in a way that this gossamer does not know.")
    first = "interactions.0.conv_tp_weights.layer{}.weight"
    sizes = [weights.found[first.format(k)].shape for k in range(100) if first.format(k) in weights]
    channels = weights.found["node_embedding.linear.weight"].numel() // n_elements
    contraction = "products.0.symmetric_contractions.contractions.{}.U_matrix_{}"
    cutoff = float(weights.take("r_max"))
    bessel = kind["basis"] == "BesselBasis"
    trained = False
    if bessel:
        found = weights.found["radial_embedding.bessel_fn.bessel_weights"]
        n = torch.arange(1.0, sizes[0][0] + 1, dtype=torch.float64)
        rounding = 1e-12 if found.dtype == torch.float64 else 1e-6
        trained = not torch.allclose(found.double() * cutoff / math.pi, n, rtol=rounding, atol=0)
    hidden = sum(contraction.format(l, 1) in weights for l in range(10)) - 1
    readout = weights.found.get(f"readouts.{len(kind['readouts']) - 1}.linear_2.weight")
    return MACEConfig(
        variant="published",
        cutoff=cutoff,
        l_max=sizes[-1][1] // channels - 1,
        hidden_l_max=hidden if len(flags) > 1 else 0,
        num_features=channels,
        num_layers=len(flags),
        correlation=sum(contraction.format(0, n) in weights for n in range(1, 10)),
        self_connections="all" if all(connected) else "later" if any(connected) else "none",
        density=density == {True},
        basis="bessel" if bessel else "gaussian",
        num_basis=sizes[0][0],
        train_bessel=trained,
        transform=TRANSFORMS[kind["transform"]] if kind["transform"] else "none",  # type: ignore[arg-type]
        envelope_power=int(weights.take("radial_embedding.cutoff_fn.p")),
        radial_sizes=[size[1] for size in sizes[:-1]],
        readout_width=1 if readout is None else readout.numel() // len(kind["heads"]) ** 2,
        repulsion=kind["repulsion"],
    )


def _layers(weights: Weights, kind: Mapping[str, Any], network: MACE) -> dict[str, Tensor]:
    """Weights of the interactions and of the products, by our names."""
    found: dict[str, Tensor] = {}
    c = network.config.num_features
    for k, layer in enumerate(network.layers):
        theirs, ours = f"interactions.{k}.", f"layers.{k}."
        found |= _linears(weights.take(theirs + "linear_up.weight"), layer.linear_in, ours + "linear_in")
        for name, value in _linears(weights.take(theirs + "linear.weight"), layer.linear_sums, ours + "linear_sums").items():
            found[name] = value if network.config.density else value * (kind["neighbors"][0] / kind["neighbors"][k])
        found |= _radial(weights, theirs, ours, layer, network.config)
        if layer.density is not None:
            found[ours + "density.radial.0.weight"] = weights.take(theirs + "density_fn.layer0.weight").double().T
        n_elements = network.embedding.num_embeddings
        maps = weights.take(theirs + "skip_tp.weight", (len(layer.element_maps) * c * n_elements * c,)).double()
        for l, value in enumerate(maps.reshape(-1, c, n_elements, c)):
            found[f"{ours}element_maps.{l}.table.weight"] = value.transpose(0, 1).reshape(n_elements, -1) / math.sqrt(n_elements)
        found[ours + "contraction.weights.weight"] = _contraction(weights, k, network)
        found |= _linears(weights.take(f"products.{k}.linear.weight"), layer.linear_products, ours + "linear_products")
    return found


def _linears(flat: Tensor, linears: Any, name: str) -> dict[str, Tensor]:
    """e3nn's flat weights of a linear map: (in, out) of each degree, one after another."""
    sizes = [linear.weight.numel() for linear in linears.maps]
    if sum(sizes) != flat.numel():
        raise ValueError(f"The weights for {name} are {flat.numel()}, expected {sum(sizes)}.")
    parts = zip(linears.maps, flat.double().split(sizes), strict=True)
    return {f"{name}.maps.{l}.weight": part.reshape(linear.weight.shape[1], -1).T for l, (linear, part) in enumerate(parts)}


def _radial(weights: Weights, theirs: str, ours: str, layer: Any, config: MACEConfig) -> dict[str, Tensor]:
    """Radial networks: (in, out), paths by degree of the result; ours by degree of the features, and odd harmonics the other way."""
    n = len(config.radial_sizes) + 1
    matrices = [weights.take(f"{theirs}conv_tp_weights.layer{k}.weight").double() for k in range(n)]
    products, c = layer.convolution.convolution.products, config.num_features
    order = sorted(range(len(products)), key=lambda k: products[k].out)  # stable
    columns = torch.empty_like(matrices[-1])
    for place, k in enumerate(order):
        sign = (-1) ** math.isqrt(products[k].edge)
        columns[:, k * c : (k + 1) * c] = sign * matrices[-1][:, place * c : (place + 1) * c]
    matrices[-1] = columns
    return {f"{ours}convolution.radial.{2 * k}.weight": matrix.T for k, matrix in enumerate(matrices)}


def _contraction(weights: Weights, k: int, network: MACE) -> Tensor:
    """(elements, paths channels) in the order of `SymmetricContraction`."""
    config, n_elements = network.config, network.embedding.num_embeddings
    parts = []
    for l in range(len(network.layers[k].linear_products.maps)):
        theirs = f"products.{k}.symmetric_contractions.contractions.{l}."
        for n in range(1, config.correlation + 1):
            name = "weights_max" if n == config.correlation else f"weights.{config.correlation - 1 - n}"
            value = weights.take(theirs + name).double()
            change = basis_change(weights.take(theirs + f"U_matrix_{n}"), config.l_max, l, n, f"{weights.where}: {theirs}U_matrix_{n}")
            parts.append(torch.einsum("pq,eqc->epc", torch.from_numpy(change), value).expand(n_elements, -1, -1))
    return torch.cat(parts, 1).reshape(n_elements, -1)


def basis_change(theirs: Tensor, l_max: int, l_out: int, correlation: int, where: str) -> NDArray[np.float64]:
    """(our couplings, theirs): weights of theirs -> weights of ours.

    Args:
        theirs: mace-torch's U: (2 l_out + 1,) unless l_out is 0, once (l_max + 1)² for each factor, couplings.
        l_max: Highest degree of the factors.
        l_out: Degree of the result.
        correlation: Number of factors.
        where: Of messages.

    Raises:
        ValueError: another shape, or couplings that ours do not span.
    """
    n_in, ours = (l_max + 1) ** 2, couplings(l_max, l_out, correlation)
    shape = (*([2 * l_out + 1] if l_out else []), *[n_in] * correlation)
    if n_in == 1:  # mace-torch drops axes of one
        theirs = theirs.reshape(*shape, -1)
    if tuple(theirs.shape[:-1]) != shape:
        raise ValueError(f"{where} has shape {list(theirs.shape)}, expected {list(shape)} and the number of couplings.")
    values = theirs.double().reshape(2 * l_out + 1, -1, theirs.shape[-1]).numpy()
    number = {m: k for k, m in enumerate(monomials(n_in, correlation))}
    summed = np.zeros((theirs.shape[-1], 2 * l_out + 1, len(number)))
    for place in np.flatnonzero(np.abs(values).max(axis=(0, 2))):  # products of the same factors are one monomial
        factors = np.unravel_index(place, (n_in,) * correlation)
        summed[:, :, number[tuple(sorted(int(f) for f in factors))]] += values[:, place].T
    size = (2 * l_out + 1) * len(number)
    a, b = ours.reshape(len(ours), size), summed.reshape(len(summed), size)
    tolerance = (1e-10 if theirs.dtype == torch.float64 else 1e-5) * max(1.0, np.abs(b).max(initial=0))
    if a.shape == b.shape:
        signs = np.where((a * b).sum(axis=1) < 0, -1.0, 1.0)
        if np.abs(signs[:, None] * a - b).max(initial=0) < tolerance:
            return np.diag(signs)
    change = np.zeros((0, len(b)))
    if len(ours):
        change = np.asarray(np.linalg.lstsq(a.T, b.T, rcond=1e-10)[0], dtype=np.float64)
    if np.abs(change.T @ a - b).max(initial=0) > tolerance:
        raise ValueError(f"{where} couples features in a way that this gossamer does not know. It was refused.")
    return change


def _readouts(weights: Weights, kind: Mapping[str, Any], network: MACE, head: int) -> dict[str, Tensor]:
    """Readouts of one head; those that the file lacks are zero."""
    found: dict[str, Tensor] = {}
    kinds: Sequence[str] = kind["readouts"]
    n, n_heads = len(network.layers), len(kind["heads"])
    expected = ["LinearReadoutBlock"] * (n - 1) + ["NonLinearReadoutBlock" if n > 1 else "LinearReadoutBlock"]
    if kind["last_readout_only"] and n > 1:
        expected = expected[-1:]
    if list(kinds) != expected:
        raise ValueError(f"{weights.where} has the readouts {', '.join(kinds)}, expected {', '.join(expected)}.")
    for k, readout in enumerate(network.readouts):
        theirs = k - (n - len(kinds))
        if theirs < 0:
            found[f"readouts.{k}.0.weight"] = torch.zeros_like(readout[0].weight)
        elif kinds[theirs] == "LinearReadoutBlock":
            found[f"readouts.{k}.0.weight"] = (
                weights.take(f"readouts.{theirs}.linear.weight").double().reshape(-1, n_heads).T[head : head + 1]
            )
        else:
            width = network.config.readout_width
            inner, outer = (weights.take(f"readouts.{theirs}.linear_{j}.weight").double() for j in (1, 2))
            rows = slice(head * width, (head + 1) * width)
            found[f"readouts.{k}.0.weight"] = inner.reshape(-1, n_heads * width).T[rows]
            found[f"readouts.{k}.2.weight"] = outer.reshape(n_heads * width, n_heads).T[head : head + 1, rows] / math.sqrt(n_heads)
    return found


def _constants(weights: Weights, config: MACEConfig, n_layers: int) -> None:
    """What must be as it is known."""
    weights.constant("num_interactions", n_layers)
    weights.constant("radial_embedding.cutoff_fn.r_max", config.cutoff)
    radial = "radial_embedding.bessel_fn."
    if config.basis == "bessel":
        weights.drop(radial + "bessel_weights")  # looked at by `_config`
        weights.constant(radial + "prefactor", math.sqrt(2 / config.cutoff))
        weights.constant(radial + "r_max", config.cutoff)
    else:
        weights.constant(radial + "gaussian_weights", np.linspace(0, config.cutoff, config.num_basis))
    transform = "radial_embedding.distance_transform."
    if config.transform != "none":
        weights.constant(transform + "covalent_radii", covalent_radii)
        named: dict[str, Any] = dict(zip("qpa", AGNESI, strict=True)) if config.transform == "agnesi" else {"alpha": SOFT_STEEPNESS}
        for name, value in named.items():
            weights.constant(transform + name, value)
    if config.repulsion:
        named = {"c": [0.1818, 0.5099, 0.2802, 0.02817], "p": config.envelope_power, "a_exp": 0.3, "a_prefactor": 0.4543}
        for name, values in {**named, "covalent_radii": covalent_radii}.items():
            weights.constant(f"pair_repulsion_fn.{name}", values)
