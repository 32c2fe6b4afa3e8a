"""Fine-tuning: start from a saved potential, train all or some of its weights, keep what it knew.

The table of elements may grow; blocks may be frozen; linear maps may get low-rank adapters, merged into plain weights
when the potential is saved; frames of the old data may be replayed. A report says what was frozen and what entered.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from ase.data import atomic_numbers as number_of
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.data.labels import LabelConfig
from gossamer.data.statistics import Statistics
from gossamer.data.structure import Structure, spread
from gossamer.potential import Potential
from gossamer.settings import settings

log = logging.getLogger(__name__)
CHANGEABLE = {"direct_forces", "dropout"}
"""model settings that may differ from those of the potential one starts from"""


@settings
class FineTuneConfig:
    """Where training starts, and which weights it may change."""

    start: str
    """Saved potential. Its settings of ``model`` and ``potential`` are taken over; of ``model`` only direct_forces and dropout may differ,
    of ``potential`` what is given here replaces what it has."""
    train: Literal["all"] | list[str] = "all"
    """Names of the weights to train, with wildcards (``layers.2.*``, ``readout*``); the others stay frozen. `gossamer info --weights`
    lists them. With low_rank, "all" means the adapters alone, and a list means these weights beside the adapters."""
    low_rank: Annotated[int, Field(gt=0, le=10_000)] | None = None
    """Rank of adapters added to every linear map that is larger, whose own weights stay frozen (Hu et al., arXiv:2106.09685). Tables of
    elements, and maps that each element has for itself (NequIP's self-connections), get none: name them in train."""
    replay: str | list[str] | None = None
    """Labelled structures of the old training data to mix in, so that they are not forgotten."""
    replay_fraction: Annotated[float, Field(gt=0)] = 0.2
    """How many of them, as a fraction of the new training frames."""
    replay_labels: LabelConfig | None = None
    """Names and units of their labels; None: as those of the new data."""

    @model_validator(mode="after")
    def _replays(self) -> Self:
        for name, usual in (("replay_fraction", 0.2), ("replay_labels", None)):
            if self.replay is None and getattr(self, name) != usual:
                raise ValueError(f"{name} has no effect without replay: name the old data there, or leave it out")
        return self


def merge_model(start: Mapping[str, Any], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Network settings of a fine-tuning run: those of the start, with what may differ.

    Args:
        start: Settings in the saved potential.
        given: Settings the user wrote.
        path: File of the potential, for messages.

    Raises:
        ValueError: another architecture, or a setting that changes the weights.
    """
    name = given.get("name", start["name"])
    if name != start["name"]:
        raise ValueError(
            f"finetune.start: '{path}' holds a {start['name']} network, but model.name is {name}. Fine-tuning keeps the architecture: "
            f"leave model out (it is taken from the file), or train a {name} from scratch."
        )
    differing = [k for k, v in given.items() if k not in CHANGEABLE and k in start and start[k] != v]
    if differing:
        listed = ", ".join(f"{k} is {given[k]} (the file has {start[k]})" for k in differing)
        raise ValueError(f"model: {listed}. Fine-tuning keeps the network of '{path}': leave these settings out.")
    return {**start, **given}


# --- data ---------------------------------------------------------------------------------------------------------


class Concatenated(Sequence[Structure]):
    """Several data sets one after another."""

    def __init__(self, *parts: Sequence[Structure]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(p) for p in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} structures")
        index = index % len(self)
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][index - (int(self.ends[part - 1]) if part else 0)]


def choose_replay(old: Sequence[Structure], n_new: int, fraction: float, seed: int, n_test: int = 200) -> tuple[list[int], list[int]]:
    """Indices of the old frames to train on, and of others to measure what is forgotten."""
    n = max(1, round(fraction * n_new))
    if n > len(old):
        raise ValueError(
            f"finetune.replay_fraction asks for {n} old frames, but finetune.replay has {len(old)}. "
            f"Lower it to at most {len(old) / n_new:.3g}."
        )
    order = np.random.default_rng([seed, 2]).permutation(len(old)).tolist()
    return sorted(order[:n]), sorted(order[n : n + n_test])


def adapt_statistics(start: Potential, fresh: Statistics, structures: Sequence[Structure], old: Sequence[Structure] = ()) -> Statistics:
    """Statistics of the fine-tuned potential: scales of the start, elements of both, reference energies that fit the labels.

    Labels of another method differ from the old ones mostly by an energy per atom of each element, and reference energies
    that came from few compositions say little about others. The shift of each element is found by least squares on label
    minus prediction of the start, so that training begins near the labels; of all shifts that fit, those that move the elements of the
    start least are taken: what new elements can account for is theirs.

    Args:
        start: Potential to start from.
        fresh: Statistics of the new data alone.
        structures: New training structures (500 at most are used).
        old: Replayed structures of the old data, whose labels must still fit (likewise).
    """
    before = start.statistics
    elements = sorted({*before.elements, *fresh.elements}, key=number_of.__getitem__)
    known = {number_of[e] for e in before.elements}
    # new elements: their RMS force in the units of the start, whose energy scale is kept
    factor = fresh.energy_scale / before.energy_scale
    scales = {e: factor * v for e, v in (fresh.element_scales or {}).items()}
    scales = {**dict.fromkeys(elements, 1.0), **scales, **(before.element_scales or {})}
    base = {e: before.reference_energies.get(e, 0.0) for e in elements}
    adapted = replace(
        before, elements=elements, reference_energies=base, element_scales=scales, spreads=fresh.spreads,
        n_structures=fresh.n_structures, fingerprint=fresh.fingerprint,
    )  # fmt: skip
    chosen = [part[k] for part in (structures, old) for k in spread(len(part), 500)]
    chosen = [s for s in chosen if s.energy is not None]
    if not chosen:
        return adapted
    predicted = [p["energy"] for p in _grown(start, adapted).predict(chosen, stress=False, refuse=False)]
    rows = np.array([[float((s.atomic_numbers == number_of[e]).sum()) for e in elements] for s in chosen])
    shares, sizes = rows / rows.sum(axis=1, keepdims=True), rows.sum(axis=1)
    differences = (np.array([s.energy for s in chosen]) - np.array(predicted)) / sizes
    shifts = _shifts(shares, differences, np.array([number_of[e] in known for e in elements]))
    left = float(np.abs(differences - shares @ shifts).mean())
    if left > 0.5:
        log.warning(
            "after shifting the reference energies, labels and predictions of the start still differ by %.2f eV per atom: are units, "
            "and with replay the methods of old and new labels, the same?",
            left,
        )
    return replace(adapted, reference_energies={e: base[e] + float(d) for e, d in zip(elements, shifts, strict=True)})


def _grown(start: Potential, statistics: Statistics) -> Potential:
    """The start with rows for new elements, those that fine-tuning will begin with: what binds atoms is in its predictions, whoever they are."""
    if statistics.elements == start.statistics.elements:
        return start
    with torch.random.fork_rng(devices=[]):
        potential = Potential(start.model_config, statistics, start.potential_config).to(start.dtype).eval()
        transfer_weights(start, potential)
    return potential


def _shifts(shares: NDArray[np.float64], differences: NDArray[np.float64], known: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Least squares by composition (frames, elements), with the smallest shifts of known elements, and then of the others."""

    def left(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """What shifts of new elements cannot account for."""
        new = shares[:, ~known]
        return np.round(values - new @ np.linalg.lstsq(new, values, rcond=1e-6)[0], 9)

    found = np.zeros(len(known))
    found[known] = np.linalg.lstsq(left(shares[:, known]), left(differences), rcond=1e-6)[0]
    found[~known] = np.linalg.lstsq(shares[:, ~known], differences - shares @ found, rcond=1e-6)[0]
    return found


# --- weights ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def transfer_weights(start: Potential, potential: Potential) -> dict[str, list[str]]:
    """Copy the start's weights by name; rows of element tables by element.

    Returns:
        "fresh": weights that the start does not have, "dropped": weights that the new network does not have,
        "new_elements": elements whose rows begin at the mean of the known ones.

    Raises:
        ValueError: a weight of another shape.
    """
    theirs, ours = start.network.state_dict(), potential.network.state_dict()
    tables = {f"{name}.weight" for name, module in potential.network.named_modules() if isinstance(module, nn.Embedding)}
    fixed = {name for name, parameter in potential.network.named_parameters() if not parameter.requires_grad}
    parts = [network.energy_rows() for network in (start.network, potential.network)]
    old, new = start.statistics.elements, potential.statistics.elements
    known = [e for e in new if e in old]
    for name, value in ours.items():
        if name not in theirs:
            continue
        source = theirs[name].to(value)
        if name in tables and name not in fixed:
            value.copy_(source.mean(dim=0) + 0.1 * source.std(dim=0, correction=0) * torch.randn_like(value))
        if name in tables:
            value[[new.index(e) for e in known]] = source[[old.index(e) for e in known]]
        elif source.shape != value.shape and name in parts[1]:
            (axis, theirs_rows), (_, our_rows) = (p[name] for p in parts)
            value.index_copy_(axis, our_rows.to(value.device), source.index_select(axis, theirs_rows.to(value.device)))
        elif source.shape != value.shape:
            raise ValueError(
                f"The weight {name} has shape {tuple(source.shape)} in the start, but {tuple(value.shape)} here. Fine-tune with the network "
                "settings of the start: leave model out."
            )
        else:
            value.copy_(source)
    return {
        "fresh": sorted(set(ours) - set(theirs)),
        "dropped": sorted(set(theirs) - set(ours)),
        "new_elements": [e for e in new if e not in old],
    }


class LowRank(nn.Module):
    """W + B A, with B starting at zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1], dtype=weight.dtype, device=weight.device) / weight.shape[1] ** 0.5)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def choose_weights(network: nn.Module, config: FineTuneConfig, transferred: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Freeze what the settings say, add adapters, and tell what trains.

    Raises:
        ValueError: no pattern or one that matches nothing, or new elements or heads whose weights would stay at random values.
    """
    # what the network itself keeps fixed (NequIP's scales without train_scales) stays so
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    patterns = [] if config.train == "all" else list(config.train)
    if not config.train and config.low_rank is None:
        raise ValueError("finetune.train is empty, so that no weight would train. Name some, write all, or give low_rank.")
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            tops = sorted({".".join(n.split(".")[:2]) for n in names})
            raise ValueError(f"finetune.train: no weight matches '{pattern}'. The network has {', '.join(tops)} ...")
    everything = config.train == "all" and config.low_rank is None
    chosen = {n for n in names if everything or any(fnmatch.fnmatchcase(n, p) for p in patterns)}
    tables = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Embedding)} & set(names)
    must = set(transferred["fresh"]) & set(names) | (tables if transferred["new_elements"] else set())
    idle = sorted(must - chosen)
    if idle:
        why = f"the new elements {', '.join(transferred['new_elements'])}" if transferred["new_elements"] else "a head that the start lacks"
        raise ValueError(
            f"finetune.train leaves {', '.join(idle)} frozen at untrained values, but {why} needs them. Add them to finetune.train."
        )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in chosen)
    adapters = 0
    if config.low_rank is not None:
        for module in network.modules():
            if isinstance(module, nn.Linear) and min(module.weight.shape) > config.low_rank:
                parametrize.register_parametrization(module, "weight", LowRank(module.weight, config.low_rank))
                adapters += 1
        if adapters == 0:
            raise ValueError(f"finetune.low_rank is {config.low_rank}, but no linear map is that large. Choose a smaller rank.")
    trained = {n: p.numel() for n, p in network.named_parameters() if p.requires_grad}
    frozen = {n: p.numel() for n, p in network.named_parameters() if not p.requires_grad}
    return {
        "trained_weights": sorted(trained), "frozen_weights": sorted(frozen), "n_trained": sum(trained.values()),
        "n_frozen": sum(frozen.values()), "adapters": adapters,
    }  # fmt: skip


def merge_adapters(potential: Potential) -> Potential:
    """A potential with the adapters added to the weights they adapt; the potential itself where there are none."""
    adapted = {name for name, module in potential.network.named_modules() if parametrize.is_parametrized(module)}
    if not adapted:
        return potential
    state = {k: v for k, v in potential.network.state_dict().items() if ".parametrizations." not in k}
    with torch.no_grad():
        state |= {f"{name}.weight": potential.network.get_submodule(name).weight.clone() for name in adapted}
    # a new one: removing parametrizations from a copy would remove them from the original, whose class it shares
    merged = Potential(potential.model_config, potential.statistics, potential.potential_config)
    merged.seen, merged.imported = potential.seen, potential.imported
    merged.network.to(potential.dtype)
    merged.network.load_state_dict(state)
    return merged.to(potential.device).train(potential.training)
