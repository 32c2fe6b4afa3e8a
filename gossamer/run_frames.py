"""What a run trains, validates and tests on: read, looked at, and kept beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ase.io

from gossamer.config import Config
from gossamer.data.dataset import load_data, open_dataset, require_labels, without
from gossamer.data.from_atoms import suggestion
from gossamer.data.inspection import tell_remarks
from gossamer.data.structure import Structure, spread
from gossamer.files import keeping_before
from gossamer.quantities import QUANTITIES

log = logging.getLogger(__name__)
MOST_VALID = 10_000
"""validation frames written to a run's folder"""
SOME = 100
"""training frames that are looked at for labels which the loss does not need"""


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The structures of a run."""

    train: Sequence[Structure]
    valid: Sequence[Structure]
    test: Sequence[Structure] | None = None
    old: Sequence[Structure] | None = None
    """of the data that the start of fine-tuning was trained on, to see what is forgotten"""


def read_frames(config: Config) -> Frames:
    """Training, validation and test structures with the labels that the loss needs.

    Raises:
        ValueError: a label is missing, or a frame is on two sides.
    """
    train_set, valid_set, test_set = load_data(config.data, config.model.cutoff)
    loss = config.loss
    for name, part in (("training", train_set), ("validation", valid_set)):
        having = require_labels(part, loss.needed(), "loss.{label} is above 0", config.model.cutoff, loss.missing)
        for label, n in having.items():
            if 0 < n < len(part):
                log.info("%s: in %d of %d %s frames, %d have none", label, n, len(part), name, len(part) - n)
            elif n == 0 and part is train_set:
                hint = suggestion(label, part[0].entries)
                raise ValueError(
                    f"None of the {len(part)} training frames has {label}, but loss.{label} is above 0. Set that weight to 0, or say under which name it is "
                    f"stored (data.labels.{label})." + (f" In the file: {hint}." if hint else "")
                )
            elif n == 0:
                log.warning("no validation frame has %s: the best weights are chosen without it", label)
    return Frames(train=train_set, valid=valid_set, test=test_set)


def say_unused(frames: Frames, config: Config) -> None:
    """Say which labels are there and not learned from, and what reading remarked on the frames (a store remembers none of it)."""
    some = [frames.train[k].labels for k in spread(len(frames.train), SOME)]  # the first may be an isolated atom, with an energy alone
    for label in QUANTITIES:
        if any(label in labels for labels in some) and label not in config.loss.needed():
            log.warning("%s labels are in the data but not in the loss (loss.%s is 0)", label, label)
    tell_remarks(frames.train)


def old_frames(config: Config, frames: Frames) -> Sequence[Structure]:
    """Frames of finetune.replay that are not to validate or to test on.

    Raises:
        ValueError: there are no others.
    """
    tune = config.finetune
    assert tune is not None
    assert tune.replay is not None
    everything = open_dataset(tune.replay, tune.replay_labels or config.data.labels)
    old = without(everything, frames.valid, frames.test or ())
    if len(old) == 0:
        raise ValueError(
            f"All {len(everything)} frames of finetune.replay ('{tune.replay}') are validation or test frames. Give data that the start "
            "was trained on."
        )
    if len(old) < len(everything):
        log.warning(
            "%d of %d frames of finetune.replay are validation or test frames: left out", len(everything) - len(old), len(everything)
        )
    return old


def reads(config: Config, path: Path) -> bool:
    """Whether a file is among the data of the settings."""
    data = [config.data.train, config.data.valid, config.data.test, config.finetune and config.finetune.replay]
    paths = [p for part in data if part for p in ([part] if isinstance(part, str) else part)]
    return path.resolve() in (Path(p).resolve() for p in paths)


def write_frames(structures: Sequence[Structure], path: Path) -> None:
    """Structures with their labels in eV and Å as extended XYZ, at most ``MOST_VALID`` of them, spread evenly."""
    n = len(structures)
    chosen = spread(n, MOST_VALID)
    if n > MOST_VALID:
        log.info("'%s' holds %d of the %d validation frames", path, len(chosen), n)
    with keeping_before(path) as temporary:
        ase.io.write(temporary, [structures[k].to_ase() for k in chosen], format="extxyz")
