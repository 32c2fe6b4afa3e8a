"""Frames whose labels are missing or broken: left out of a data set, counted by reason, and written apart."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import ase.io

from gossamer.data.from_atoms import WEIGHTLESS
from gossamer.data.inspection import has_zeroed_forces
from gossamer.data.structure import Structure
from gossamer.files import atomic_path

log = logging.getLogger(__name__)


@dataclass
class LeftOut:
    """Which frames were left out, and why; a frame may have several reasons."""

    n_frames: int = 0
    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)
    """reason -> how many frames, and what is said of the first"""

    def add(self, reasons: dict[str, str]) -> None:
        """Count a frame that has these reasons, each with a sentence on it."""
        self.n_frames += 1
        for reason, said in reasons.items():
            n, first = self.reasons.get(reason, (0, said))
            self.reasons[reason] = (n + 1, first)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"frames": self.n_frames, "reasons": {r: {"frames": n, "first": first} for r, (n, first) in self.reasons.items()}}


def faults_of(structure: Structure, required: Sequence[str]) -> dict[str, str]:
    """Why a frame should not be trained on, and a sentence for each reason; nothing where all required labels are sound.

    A label is not sound if it is missing or broken (not finite, no numbers, of another size), weighs zero (files for MACE mark a label that is
    none so), or is made of forces that are all zero though symmetry does not ask for it. No label is where VASP's electrons did not converge.
    """
    found = {}
    for label in required:
        if label in structure.faults:
            fault = structure.faults[label]
            found[fault.reason] = f"{structure.name}: {fault.text}"
        elif structure.lacks(label):
            found[f"no {label}"] = f"{structure.name} has no {label}"
        if f"{WEIGHTLESS}{label}" in structure.remarks:
            found[f"{label} of weight 0"] = f"{structure.name} gives its {label} a weight of 0"
    if "forces" in required and has_zeroed_forces(structure):
        found["forces all zero"] = f"{structure.name} has forces that are all zero though symmetry does not ask for it"
    if "not converged" in structure.remarks:
        found["not converged"] = f"the electrons of {structure.name} did not converge"
    return found


def with_sound_labels(
    structures: Iterable[Structure], required: Sequence[str], left_out: LeftOut, apart: Path | str | None = None
) -> Iterator[Structure]:
    """The frames whose required labels are all sound (`faults_of`). Other labels that are broken are taken off, which the log says.

    Args:
        structures: As `read_structures` gives them with ``keep_broken``.
        required: Labels: energy, forces, stress ...
        left_out: Counts the others.
        apart: Extended XYZ to write the others to, with ``left_out`` (the reasons) and ``source`` (file and frame) of each; whole or not at all,
            and only if there are some.

    Raises:
        FileExistsError: ``apart`` exists.
        ValueError: no frame is sound.
    """
    if apart is not None and Path(apart).exists():
        raise FileExistsError(f"'{apart}' exists. Choose another name, or remove it first.")
    kept, taken_off = 0, LeftOut()
    with ExitStack() as stack:
        file: IO[str] | None = None
        for s in structures:
            if reasons := faults_of(s, required):
                left_out.add(reasons)
                if apart is not None:
                    file = file or stack.enter_context(open(stack.enter_context(atomic_path(apart)), "w", encoding="utf-8"))
                    atoms = s.to_ase()
                    atoms.info |= {"left_out": ", ".join(reasons), "source": s.name.replace("'", "")}
                    ase.io.write(file, atoms, format="extxyz")
                continue
            if s.faults:
                taken_off.add({fault.reason: fault.text for fault in s.faults.values()})
            kept += 1
            yield s
        if not kept and left_out.n_frames:
            first = next(iter(left_out.reasons.values()))[1]
            raise ValueError(f"No frame has sound labels of {', '.join(required)}; of the first, {first.rstrip('.')}.")
    for reason, (n, _) in taken_off.reasons.items():
        log.warning("%s in %d of the frames that are kept: they are kept without, as --require does not name it", reason, n)
