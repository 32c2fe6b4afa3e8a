"""A potential as one safetensors file: weights, a JSON manifest, and stored structures whose predictions are recomputed on loading.

The manifest holds the format version, the complete settings, elements, units, statistics, versions and a checksum.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from ase import Atoms
from ase.data import atomic_numbers as number_of
from torch import Tensor

from gossamer import __version__
from gossamer.arguments import as_path, said
from gossamer.data.fingerprint import SeenFrames
from gossamer.data.statistics import Statistics
from gossamer.data.structure import Structure, as_structure
from gossamer.files import write_bytes
from gossamer.models import MODELS, Network, NetworkConfig
from gossamer.nn.uncertainty import Uncertainty
from gossamer.potential import DTYPES, Potential, PotentialConfig
from gossamer.quantities import QUANTITIES
from gossamer.settings import build, to_dict
from gossamer.tensor_files import read_tensors

log = logging.getLogger(__name__)
FORMAT = 2
"""1: radial networks lay beside the convolutions that own them now (`Network.renamed`)"""
UNITS = {"energy": "eV", "length": "Angstrom", "stress": "eV/Angstrom^3 (ASE sign)"}
# allowed deviation of recomputed predictions: energy in eV/atom, forces and stress relative to their largest value
UNCERTAINTY = 1
"""version of the tables of `gossamer.nn.uncertainty`"""
TOLERANCES = {torch.float32: (2e-5, 2e-3), torch.float64: (1e-9, 1e-7)}


def save(
    potential: Potential,
    path: Path | str,
    check: Sequence[Structure | Atoms] | Structure | Atoms = (),
    training: Mapping[str, Any] | None = None,
    stored: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write a potential as one safetensors file, atomically.

    Args:
        potential: What to save.
        path: Target, usually ``*.safetensors``.
        check: Structures whose predictions are stored and recomputed on loading.
        training: The complete configuration of the run, kept for the record.
        stored: What to store as predictions of ``check``: those of the package that a potential comes from; None: its own.

    Raises:
        TypeError: something else than a potential, or no path.
        ValueError: a potential that ``load`` would refuse (`check_sizes`).
    """
    if not isinstance(potential, Potential):
        raise TypeError(f"potential: expected a potential, found {said(potential)}. Write save(potential, path).")
    path = as_path("path", path, "the name of a file")
    check_sizes(potential)
    given = [check] if isinstance(check, Structure | Atoms) else check
    structures = [as_structure(s, f"check[{k}]") for k, s in enumerate(given)]
    tensors = {f"network.{k}": v.detach().cpu().contiguous() for k, v in potential.network.state_dict().items()}
    if stored is None:
        stored = potential.predict(structures, refuse=False)
    for k, (structure, predicted) in enumerate(zip(structures, stored, strict=True)):
        parts = {
            "atomic_numbers": structure.atomic_numbers,
            "positions": structure.positions,
            "cell": structure.cell,
            "pbc": structure.pbc,
            **{name: value for name, value in predicted.items() if value is not None},
        }
        for name, value in parts.items():
            tensors[f"check.{k}.{name}"] = torch.from_numpy(np.array(value)).contiguous()
    if potential.seen is not None:
        tensors |= {k: torch.from_numpy(v.copy()) for k, v in potential.seen.to_arrays().items()}
    manifest = {
        "format": FORMAT,
        "gossamer": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": to_dict(potential.model_config),
        "potential": to_dict(potential.potential_config),
        "statistics": to_dict(potential.statistics),
        "dtype": str(potential.dtype).removeprefix("torch."),
        "units": UNITS,
        "conservative": potential.conservative,
        "num_parameters": potential.num_parameters,
        "n_check": len(structures),
        "training": dict(training or {}),
    }
    if potential.uncertainty is not None:
        tensors |= {f"uncertainty.{k}": v.detach().cpu().contiguous() for k, v in potential.uncertainty.state_dict().items()}
        manifest["uncertainty"] = {"version": UNCERTAINTY, "known": list(potential.uncertainty.known), **potential.uncertainty.record}
    if potential.imported is not None:
        manifest["imported"] = potential.imported
    manifest["kinds"] = _kinds(tensors)
    manifest["checksum"] = _checksum(tensors, manifest)
    write_bytes(path, safetensors.torch.save(tensors, {"gossamer": json.dumps(manifest)}))


def save_again(potential: Potential, source: Path | str, path: Path | str) -> None:
    """Write what was loaded from ``source``, with the stored structures, predictions and record of training that lie there."""
    manifest, tensors = _open(source)
    numbers = range(manifest["n_check"])
    save(potential, path, [_stored(tensors, k) for k in numbers], manifest["training"], [_stored_prediction(tensors, k) for k in numbers])


def read_manifest(path: Path | str) -> dict[str, Any]:
    """The manifest of a saved potential, without building it.

    Raises:
        ValueError: not a potential of ours, truncated, or of a newer format.
    """
    manifest, _ = _open(path)
    return {**manifest, "model": model_settings(manifest)}


def model_settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the network of a potential, or of a checkpoint, with those that came after it was written, without those of no effect."""
    settings = manifest["model"]
    network = MODELS[settings["name"]][1]
    unused = network.unused(settings)
    return {**network.earlier, **{name: value for name, value in settings.items() if name not in unused}}


def unverified(manifest: Mapping[str, Any]) -> str | None:
    """One line about a potential of another package that nobody compared with that package; None for all others."""
    origin = manifest.get("imported")
    if not isinstance(origin, dict) or origin.get("verified"):
        return None
    what = "fine-tuned from an unverified import" if origin.get("fine_tuned") else "unverified import"
    return f"{what} from {origin.get('package')} (gossamer import --reference compares it with its own package)"


def weight_shapes(path: Path | str) -> dict[str, list[int]]:
    """Names and shapes of the weights in a saved potential, layer 2 before layer 10."""
    manifest, tensors = _open(path)
    found = weights_of(tensors, manifest)
    return {
        k: list(found[k].shape)
        for k in sorted(found, key=lambda name: [part.zfill(4) if part.isdigit() else part for part in name.split(".")])
    }


def weights_of(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """The network's weights among the tensors of a file, by the names they have today."""
    found = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
    return current_names(MODELS[manifest["model"]["name"]][1], found) if manifest["format"] == 1 else found


def current_names(network: type[Network], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of format 1, by the names they have today."""
    found = dict(weights)
    for old, new in network.renamed.items():
        found = {re.sub(old, new, k): v for k, v in found.items()}
    return found


def as_potential(
    potential: Potential | Path | str, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
) -> Potential:
    """A potential as it is, or read from its file.

    Args:
        potential: A potential, or the file of one.
        device: Where one that is read goes.
        dtype: Of one that is read; by default as saved.

    Raises:
        TypeError: neither.
        ValueError: a device or dtype asked for that a potential in memory does not have; and as ``load``.
    """
    if isinstance(potential, str | Path):
        return load(potential, device, dtype)
    if not isinstance(potential, Potential):
        raise TypeError(f"Expected a potential (gossamer.load) or the file of one, found {type(potential).__name__}.")
    asked = None if dtype is None else precision(dtype)
    if asked not in (None, potential.dtype) or torch.device(device).type not in ("cpu", potential.device.type):
        raise ValueError(
            f"This potential is in memory, on {potential.device} in {potential.dtype}; {device}"
            f"{'' if asked is None else f' and {asked}'} asked for. device and dtype are for files: give the file, or potential.to(...)."
        )
    return potential


def precision(dtype: str | torch.dtype) -> torch.dtype:
    """PyTorch's name of a precision.

    Raises:
        ValueError: neither "float32" nor "float64".
    """
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype '{dtype}' is unknown. Choose {' or '.join(DTYPES)}.")
    return found


def check_device(device: str | torch.device) -> None:
    """Raise ValueError if PyTorch cannot put a tensor there: no such device, or a PyTorch without support for it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a PyTorch built without CUDA
        reason = (str(error).splitlines() or [""])[0].rstrip(".")[:160]
        there = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
        raise ValueError(f"device '{device}' cannot be used here ({reason}). PyTorch {torch.__version__} has {', '.join(there)}.") from None


@torch.random.fork_rng(devices=[])  # the network is made with random weights first: the caller's numbers are not drawn
@torch.inference_mode(False)  # tensors made there could not be differentiated later
def load(path: Path | str, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None) -> Potential:
    """Read a saved potential, and recompute its stored predictions on this device and dtype.

    Args:
        path: File written by ``save``.
        device: Where the potential goes.
        dtype: "float32" or "float64"; by default as saved.

    Raises:
        TypeError: something else than a path.
        ValueError: truncated or altered file, newer format, predictions that do not come out as stored, an unknown dtype, or a device that is
            not there.
    """
    path = as_path("path", path, "the file of a potential")
    check_device(device)
    asked = None if dtype is None else precision(dtype)
    manifest, tensors = _open(path)
    altered = "kinds" in manifest and manifest["kinds"] != _kinds(tensors)  # files of older versions do not say
    if altered or _checksum(tensors, manifest) != manifest.get("checksum"):
        raise ValueError(f"'{path}' was altered after it was saved (its checksum does not match). Use another copy.")
    model = _built(MODELS[manifest["model"]["name"]][0], model_settings(manifest), "model", path)
    weights = weights_of(tensors, manifest)
    problem = _oversized(model, weights)
    if problem is not None:
        raise ValueError(f"'{path}' has {problem} can be meant. It was altered: use another copy.")
    statistics = _built(Statistics, manifest["statistics"], "statistics", path)
    problem = _unusable(statistics)
    if problem is not None:
        raise ValueError(f"'{path}' has statistics.{problem}. It was altered: use another copy.")
    strange = [name for name, values in weights.items() if not values.is_floating_point()]
    if strange:
        raise ValueError(
            f"'{path}' holds weights that are no real numbers ({strange[0]} is {weights[strange[0]].dtype}). Use another copy."
        )
    with torch.device("cpu"):  # whatever the default is
        potential = Potential(model, statistics, _built(PotentialConfig, manifest["potential"], "potential", path))
        potential.uncertainty = _uncertainty(manifest, tensors, len(statistics.elements), path)
    potential.seen = SeenFrames.from_arrays({k: v.numpy() for k, v in tensors.items() if k.startswith("seen.")})
    potential.imported = manifest.get("imported")
    if unverified(manifest):
        log.warning("'%s': %s", path, unverified(manifest))
    saved = DTYPES[manifest["dtype"]]
    try:
        potential.network.to(saved).load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"'{path}' holds weights that are not those of its network ({error}). Use another copy.") from None
    wanted = asked or saved
    potential.network.to(wanted)
    potential.to(device).eval()
    _verify(potential, tensors, manifest["n_check"], min((saved, wanted), key=lambda t: t.itemsize), path)
    return potential


def _open(path: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = as_path("path", path, "the file of a potential")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    try:
        tensors, metadata = read_tensors(path)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"'{path}' is not a readable safetensors file ({error}). It may be truncated: copy it again; or no potential: give the .safetensors file that training wrote."
        ) from None
    if "gossamer" not in metadata:
        raise ValueError(f"'{path}' is a safetensors file, but not a potential saved by gossamer (no manifest).")
    manifest = _manifest(metadata["gossamer"], path)
    if manifest["format"] > FORMAT:
        raise ValueError(
            f"'{path}' has format {manifest['format']}; this gossamer {__version__} reads up to {FORMAT}. "
            f"Update gossamer (the file was written by {manifest.get('gossamer')})."
        )
    stored = sum(name.startswith("check.") and name.endswith(".energy") for name in tensors)
    if manifest["n_check"] != stored:
        raise ValueError(
            f"'{path}' holds {stored} stored predictions, but its manifest has n_check = {manifest['n_check']}. Use another copy."
        )
    return manifest, tensors


def _manifest(text: str, path: Path) -> dict[str, Any]:
    """The manifest, if it has the parts that every potential's has.

    Raises:
        ValueError: no JSON, no dictionary, or parts missing or of another kind.
    """
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' has a manifest that is not JSON ({error}). Use another copy.") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int) or manifest["format"] < 1:
        raise ValueError(f"'{path}' has a manifest without a format: it was not written by gossamer, or altered. Use another copy.")
    kinds = {"model": dict, "potential": dict, "statistics": dict, "dtype": str, "n_check": int}
    wrong = [name for name, kind in kinds.items() if not isinstance(manifest.get(name), kind)]
    wrong += [name for name in ("imported", "uncertainty") if not isinstance(manifest.get(name), dict | None)]
    if isinstance(manifest.get("uncertainty"), dict) and not isinstance(manifest["uncertainty"].get("version"), int):
        wrong.append("uncertainty.version")
    if manifest["format"] <= FORMAT and (wrong or manifest["dtype"] not in DTYPES or manifest["model"].get("name") not in tuple(MODELS)):
        listed = ", ".join(wrong) or f"network {manifest['model'].get('name')!r}, dtype {manifest['dtype']!r}"
        raise ValueError(f"'{path}' has a manifest that this gossamer {__version__} cannot use ({listed}). Use another copy.")
    return manifest


def _uncertainty(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], n_elements: int, path: Path) -> Uncertainty | None:
    """The uncertainty in a file; None if it has none, or one of a newer version.

    Raises:
        ValueError: tables that do not belong to it.
    """
    record = manifest.get("uncertainty")
    if record is None:
        return None
    if record["version"] > UNCERTAINTY:
        log.warning(
            "'%s' has an uncertainty of version %d, this gossamer %s knows %d: it goes without",
            path,
            record["version"],
            __version__,
            UNCERTAINTY,
        )
        return None
    tables = {k.removeprefix("uncertainty."): v for k, v in tensors.items() if k.startswith("uncertainty.")}
    try:
        uncertainty = Uncertainty(n_elements, tables["centres"].shape[1])
        uncertainty.load_state_dict(tables)
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"'{path}' holds tables that are not those of its uncertainty ({error}). Use another copy.") from None
    uncertainty.record = {k: v for k, v in record.items() if k not in ("version", "known")}
    return uncertainty


def _built(settings: type[Any], values: Mapping[str, Any], where: str, path: Path) -> Any:
    """A part of the manifest as settings.

    Raises:
        ValueError: values that these settings cannot have.
    """
    try:
        return build(settings, values, where)
    except ValueError as error:
        raise ValueError(f"'{path}' has a manifest that this gossamer {__version__} cannot use ({error}). Use another copy.") from None


def _unusable(statistics: Statistics) -> str | None:
    """An entry of the statistics that no potential can have, in words; None: none."""
    elements = statistics.elements
    if not elements or len(set(elements)) < len(elements) or not all(number_of.get(e, 0) > 0 for e in elements):
        return f"elements = {elements}, expected chemical symbols, each once"
    for name in ("reference_energies", "element_scales"):
        values = getattr(statistics, name)
        absent = [e for e in elements if values is not None and not math.isfinite(values.get(e, math.nan))]
        if absent:
            return f"{name} without a finite number for {', '.join(absent)}"
    if not 0 < abs(statistics.energy_scale) < math.inf:  # an imported network's may be negative
        return f"energy_scale = {statistics.energy_scale}, expected a finite number other than zero"
    if not 0 <= statistics.mean_neighbors < math.inf:
        return f"mean_neighbors = {statistics.mean_neighbors}, expected a finite number, zero or more"
    for name, symbols in (("shortest_distances", 2), ("fewest_neighbors", 1)):
        for key, value in (getattr(statistics, name) or {}).items():
            if [number_of.get(symbol, 0) > 0 for symbol in key.split("-")] != [True] * symbols or not 0 < value < math.inf:
                return (
                    f"{name} with {key}: {value}, expected {'a pair of elements' if symbols == 2 else 'an element'} and a number above zero"
                )
    return None


def _oversized(model: NetworkConfig, weights: Mapping[str, Tensor]) -> str | None:
    """A setting of a network that is larger than its weights bear out, in words; None: none. Asked before the network is made."""
    largest = max(512, len(weights), *(max(t.shape, default=1) for t in weights.values())) if weights else 512
    limits = {"num_layers": max(1, len(weights)), "max_neighbors": 10**6}  # numbers that are not whole size nothing
    unused = MODELS[model.name][1].unused(to_dict(model))
    for name, value in to_dict(model).items():
        for number in value if isinstance(value, list) else [value]:
            limit = limits.get(name, largest)
            if isinstance(number, int) and number > limit and name not in unused:
                return f"model.{name} = {number}, but {len(weights)} tensors of weights of at most {largest} rows: at most {limit}"
    return None


def check_sizes(potential: Potential) -> None:
    """Raise ValueError for settings that ``load`` would refuse: larger than any weight, so that nothing of the network has that size."""
    problem = _oversized(potential.model_config, potential.network.state_dict())
    if problem is not None:
        raise ValueError(f"This network has {problem} has an effect. Choose a smaller one, or leave it out.")


def stored_structures(path: Path | str) -> list[Structure]:
    """The structures whose predictions are stored in a saved potential."""
    manifest, tensors = _open(path)
    return [_stored(tensors, k) for k in range(manifest["n_check"])]


def _stored(tensors: Mapping[str, Tensor], k: int) -> Structure:
    values: dict[str, Any] = {name: tensors[f"check.{k}.{name}"].numpy() for name in ("atomic_numbers", "positions", "cell", "pbc")}
    return Structure(**values, name=f"stored structure {k}")


def _stored_prediction(tensors: Mapping[str, Tensor], k: int) -> dict[str, Any]:
    return {name: tensors[f"check.{k}.{name}"].numpy() for name in QUANTITIES if f"check.{k}.{name}" in tensors}


def _kinds(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, kinds and shapes of the tensors: the header of the file says them, and other ones would read the same bytes."""
    return hashlib.sha256(repr([(name, str(t.dtype), list(t.shape)) for name, t in sorted(tensors.items())]).encode()).hexdigest()


def _checksum(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps({k: v for k, v in manifest.items() if k != "checksum"}, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def deviates(predicted: Mapping[str, Any], stored: Mapping[str, Any], n_atoms: int, precision: torch.dtype) -> str | None:
    """What of a prediction is not as it was stored, beyond what machines differ by in this precision; None if nothing."""
    energy_tolerance, relative = TOLERANCES[precision]
    error = abs(predicted["energy"] - float(stored["energy"])) / n_atoms
    if not error <= energy_tolerance:
        return f"another energy here than when it was saved ({error:.1e} eV/atom, {energy_tolerance:.0e} allowed)"
    for name in set(stored) - {"energy"}:
        reference = stored[name]
        error = float(np.abs(predicted[name] - reference).max()) if reference.size else 0.0
        if not error <= relative * max(float(np.abs(reference).max(initial=0.0)), 1e-2):
            return f"other {name} here than when it was saved (up to {error:.1e})"
    return None


def _verify(potential: Potential, tensors: Mapping[str, Tensor], n_check: int, precision: torch.dtype, path: Path) -> None:
    """Refuse a potential that does not reproduce its stored predictions here."""
    for k in range(n_check):
        structure = _stored(tensors, k)
        stored = _stored_prediction(tensors, k)
        problem = deviates(potential.predict([structure], refuse=False)[0], stored, structure.n_atoms, precision)
        if problem is not None:
            raise ValueError(
                f"'{path}' gives {problem} on {structure.name}, on {potential.device} in {potential.dtype}. Do not use it on this machine."
            )
