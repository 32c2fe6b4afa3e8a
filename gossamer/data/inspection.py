"""What is in a data file, and what is wrong with it, before any training."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase.data import atomic_numbers as number_of
from ase.data import chemical_symbols, covalent_radii

from gossamer.data.consistency import compare_pairs, compare_strained_pairs, compare_stress_with_volume
from gossamer.data.dataset import Data, Subset, as_dataset
from gossamer.data.duplicates import find_duplicates
from gossamer.data.from_atoms import CHARGE, HEAD, SPIN, suggestion
from gossamer.data.labels import LabelConfig, leaving_out
from gossamer.data.store import Store
from gossamer.data.structure import Structure
from gossamer.data.units import ENERGY_UNITS
from gossamer.neighbors import neighbor_list
from gossamer.quantities import QUANTITIES

log = logging.getLogger(__name__)

REMARKS = {
    "stress without volume": "have a stress but are not periodic along all axes, so that there is no volume it belongs to: it is not read",
    "not converged": "of VASP took all iterations that NELM allows and their electrons did not converge: their labels may be far off. Leave them out: "
    f"{leaving_out(['energy', 'forces'])}",
    "a weight of its own": "have a weight of their own (config_weight and the like, of MACE), which is not read: all count alike, also where a weight "
    "of 0 says that a label is none. Read that of frames with --weight NAME (data.labels.weight); gossamer data convert --require takes a weight of 0 "
    "for a missing label",
    "another label": "have an energy, forces or a stress under a second name (REF_energy, dft_forces, virial ...) that says otherwise than the one read. Which is "
    "the reference's? Say its name (--energy REF_energy)",
    "a stress that is not symmetric": "have a stress that is not symmetric, as a stress is: its nine numbers may be in another order",
    "a cell under another name": "are read without a cell, though an entry looks like one (cell, box ...): ASE knows Lattice. They are molecules here",
    "isolated in name": "are called isolated atoms (config_type), but their cell is so small that they see their own images: their energies are no "
    "reference. Put them into a larger box",
    "another free energy": "have a free_energy more than 1 meV/atom from the energy. With smeared electrons forces are the gradient of the free energy "
    "(VASP and others): train on that with --energy free_energy (data.labels.energy)",
}
"""what is said of frames that a reader has remarked on"""
OFFSET = 3e-3
"""eV/Å³ (0.5 GPa): a smaller constant in the stress is left alone"""
NOBLE = (2, 10, 18, 36, 54, 86)
"""atomic numbers of those whose atoms keep apart"""
FAR = 1.45
"""sums of covalent radii beyond which nearest neighbours are too far: tungsten in Bohr has 1.55"""


@dataclass
class Inspection:
    """Facts about a data set, warnings (look at it), and errors (training on it would be wrong)."""

    facts: dict[str, str] = field(default_factory=dict)
    """for people"""
    numbers: dict[str, Any] = field(default_factory=dict)
    """the same as numbers, for programs: eV, Å, eV/Å, eV/Å³"""
    warnings: list[str] = field(default_factory=list)
    offset_warning: str | None = None
    """that of the warnings which is about `stress_offset`"""
    errors: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.errors

    @property
    def stress_offset(self) -> float | None:
        """The constant in the stress labels that the energies lack, eV/Å³, where there clearly is one."""
        found = self.numbers.get("stress_offset")
        return found["offset"] if found and abs(found["offset"]) > max(5 * found["error"], OFFSET) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"ok": self.ok, "numbers": self.numbers, "warnings": self.warnings, "errors": self.errors}


def inspect(data: Data, labels: LabelConfig | Mapping[str, Any] | None = None) -> Inspection:
    """Look through a data set for what makes trained potentials wrong.

    Args:
        data: File, folder or store, or several; or frames in memory: structures, or Atoms with the labels they were read with.
        labels: Names and units of the labels; structures have their own.
    """
    structures = as_dataset(data, labels, keep_broken=True)
    report = Inspection()
    if len(structures) == 0:
        report.errors.append("there are no frames")
        return report
    _basics(structures, report)
    _labels(structures, report)
    different = find_duplicates(structures, report)
    _energies(structures, report)
    _distances(structures, report)
    _length_unit(structures, report)
    _small_steps(structures, report)
    compare_pairs(different, report)
    compare_strained_pairs(different, report)
    compare_stress_with_volume(different, report)
    _energy_unit([s for s in structures if s.energy is not None], report)
    return report


def _basics(structures: Sequence[Structure], report: Inspection) -> None:
    elements: Counter[str] = Counter()
    sizes = []
    periodic: Counter[str] = Counter()
    for s in structures:
        elements.update(chemical_symbols[z] for z in s.atomic_numbers)
        sizes.append(s.n_atoms)
        periodic["".join("T" if p else "F" for p in s.pbc)] += 1
    report.facts |= {
        "frames": str(len(structures)),
        "atoms": f"{min(sizes)} to {max(sizes)} per frame, {sum(sizes)} in all",
        "elements": _shortened([f"{e} {n}" for e, n in sorted(elements.items(), key=lambda item: number_of[item[0]])]),
        "periodicity": ", ".join(f"{p}: {n} frame{'s' * (n > 1)}" for p, n in periodic.items()),
    }
    report.numbers |= {
        "frames": len(structures),
        "atoms": {"fewest": min(sizes), "most": max(sizes), "total": sum(sizes)},
        "elements": dict(sorted(elements.items(), key=lambda item: number_of[item[0]])),
        "periodicity": dict(periodic),
    }
    if len(structures) == 1:
        report.errors.append("there is one frame: training needs at least one more, to validate on")
    alone: dict[str, list[float | None]] = defaultdict(list)
    for s in structures:
        if s.is_isolated():
            alone[chemical_symbols[s.atomic_numbers[0]]].append(s.energy)
    isolated = sorted(alone)
    for element, found in alone.items():
        energies = [e for e in found if e is not None]
        if energies and max(energies) - min(energies) > 1e-3:
            report.warnings.append(
                f"isolated atoms of {element} have energies of {min(energies):.6g} to {max(energies):.6g} eV (spin states, levels of theory?); the "
                f"first, {energies[0]:.6g} eV, would be the reference. Leave in the one of the lowest state"
            )
    if isolated:
        report.facts["isolated atoms"] = ", ".join(isolated)
        if len(isolated) < len(elements):
            report.warnings.append(
                f"isolated atoms of {', '.join(isolated)} are in the data, but not of every element: their energies cannot be "
                "met unless data.reference_energies gives them"
            )
    weights = {s.weight for s in structures}
    if weights != {1.0}:
        report.facts["weights"] = f"{min(weights):.6g} to {max(weights):.6g}, of {sum(s.weight == 0 for s in structures)} frames zero"
    fixed = sum(s.fixed is not None for s in structures)
    if fixed:
        report.facts["fixed atoms"] = f"in {fixed} frames (loss.free_atoms_only leaves their forces out)"


def _shortened(listed: Sequence[str], most: int = 12) -> str:
    return ", ".join(listed) if len(listed) <= most else f"{', '.join(listed[: most - 1])} ... {listed[-1]} ({len(listed)} in all)"


def _labels(structures: Sequence[Structure], report: Inspection) -> None:
    for remark, text in REMARKS.items():
        marked = [s.name for s in structures if remark in s.remarks]
        if marked:
            report.warnings.append(f"{len(marked)} of {len(structures)} frames {text}. The first is {marked[0]}")
    _mixtures(Counter(remark for s in structures for remark in s.remarks), len(structures), report.warnings.append)
    for label, quantity in QUANTITIES.items():
        labelled = [s for s in structures if label in s.labels]
        missing = [s for s in structures if s.lacks(label)]
        unread = [f"{s.name}: {s.faults[label].text}" for s in missing if label in s.faults]
        hint = (
            f"it cannot be read of {len(unread)} frames ({unread[0]})"
            if unread
            else suggestion(label, sorted({entry for s in missing for entry in s.entries}))
        )
        if not labelled:
            report.facts[label] = "none"
            if label in ("energy", "forces"):
                report.errors.append(f"no frame has {label}: " + (hint or f"if it is stored under another name, say --{label} NAME"))
            elif hint:
                report.warnings.append(f"no frame has {label}: {hint}")
            continue
        if label == "stress" and (idle := [s.name for s in structures if s.stress is None and not s.pbc.all() and not s.is_isolated()]):
            report.warnings.append(
                f"{len(idle)} of {len(structures)} frames have no stress, the first is {idle[0]}: they are not periodic along all axes, and it is "
                "learned from the others"
            )
        if missing:
            message = f"{len(missing)} of {len(structures)} frames have no {label}, the first is {missing[0].name}" + f"; {hint}" * bool(
                hint
            )
            report.errors.append(f"{message}. Leave such frames out: {leaving_out(['energy', 'forces', label])}")
        values = np.concatenate([np.ravel(s.labels[label]) for s in labelled])
        rms = float(np.sqrt((values**2).mean()))
        numbers = {"median": np.median(values), "rms": rms, "lowest": values.min(), "highest": values.max()}
        report.numbers[label] = {key: float(value) for key, value in numbers.items()} | {"frames": len(labelled)}
        report.facts[label] = (
            f"median {np.median(values):.6g}, RMS {rms:.4g}, range {values.min() + 0.0:.6g} to {values.max() + 0.0:.6g} {quantity.unit}"
        )
        if label == "forces" and len(structures) > 1:
            _forces(structures, rms, report)
        if label == "stress" and np.median(np.abs(values)) > 0.5:
            report.warnings.append(
                f"stress has median magnitude {np.median(np.abs(values)):.3g}; eV/Å³ values are rarely above 0.5. If they are GPa, set "
                "data.labels.stress_unit: GPa"
            )


def _forces(structures: Sequence[Structure], rms: float, report: Inspection) -> None:
    """Forces that are zero, large, or do not sum to zero."""
    zeroed: list[str] = []
    partly: list[str] = []
    for s in structures:
        silent = _silent(s)
        if silent.any():
            (zeroed if silent.all() else partly).append(s.name)
    if zeroed:
        report.errors.append(
            f"{len(zeroed)} frames have forces that are all zero though symmetry does not ask for it (a missing label?), the first is "
            f"{zeroed[0]}. Leave such frames out: {leaving_out(['energy', 'forces'])}"
        )
    if partly:
        report.warnings.append(
            f"{len(partly)} frames have atoms with exactly zero force that are neither fixed nor at a symmetric site (constraints "
            f"applied before writing?), the first is {partly[0]}"
        )
    largest = max((float(np.abs(s.forces).max()), s.name) for s in structures if s.forces is not None)
    if largest[0] > 100:
        report.warnings.append(f"forces up to {largest[0]:.0f} eV/Å, in {largest[1]}")
    if rms > 30 or (rms < 1e-3 and any(s.n_atoms > 1 for s in structures)):  # cells of one atom have no forces
        report.warnings.append(f"RMS force of {rms:.3g} eV/Å is unusual (0.01 to 10): check --energy-unit, --force-unit and --length-unit")
    nets = [float(np.linalg.norm(s.forces.sum(axis=0))) for s in structures if s.forces is not None and s.n_atoms > 1]
    if nets and np.median(nets) > 0.1 * rms * np.sqrt(np.median([s.n_atoms for s in structures])):
        report.warnings.append(f"the forces of a frame do not sum to zero (median {np.median(nets):.2g} eV/Å): fixed atoms or noisy labels")


def has_zeroed_forces(s: Structure) -> bool:
    """Whether the forces of a frame are all zero though symmetry does not ask for it."""
    return bool(_silent(s).all())


def _silent(s: Structure) -> np.ndarray:
    """(n_atoms,) which free atoms have exactly zero force, where symmetry does not account for all of these; none without forces, or of an only atom."""
    none = np.zeros(s.n_atoms, dtype=bool)
    if s.forces is None or s.n_atoms < 2:
        return none
    silent = ~np.any(s.forces, axis=1) & s.free
    return silent if silent.any() and not _symmetric(s)[silent].all() else none


def _symmetric(s: Structure) -> np.ndarray:
    """(n_atoms,) whether the surroundings single out no direction, so that the force must vanish."""
    reach = 5.0
    (sender, receiver), shifts = neighbor_list(s.positions, s.cell, s.pbc, reach)
    vectors = s.positions[sender] + shifts @ s.cell - s.positions[receiver]
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    weights = np.sqrt(s.atomic_numbers[sender])[:, None] * (1 - lengths / reach) ** 2 / lengths
    pull, total = np.zeros((s.n_atoms, 3)), np.zeros(s.n_atoms)
    np.add.at(pull, receiver, weights * vectors)
    np.add.at(total, receiver, weights[:, 0] * lengths[:, 0])
    return np.linalg.norm(pull, axis=1) <= 1e-4 * np.maximum(total, 1e-12)


def with_remarks_told(structures: Iterable[Structure]) -> Iterator[Structure]:
    """The same structures; what reading remarked on their labels, and what they lack and may have under other names, none of which a store
    keeps, goes to the log at the end."""
    n, found, lacking = 0, Counter[str](), Counter[str]()
    entries: dict[str, set[str]] = defaultdict(set)
    for s in structures:
        n += 1
        found.update(s.remarks)
        for label in QUANTITIES:
            if s.lacks(label):
                lacking[label] += 1
                entries[label].update(s.entries)
        yield s
    for label, count in lacking.items():
        hint = suggestion(label, sorted(entries[label]))
        if hint or label in ("energy", "forces") or count < n:
            log.warning("%d of %d frames have no %s%s", count, n, label, f": {hint}" * bool(hint))
    say_remarks(found, n)


def tell_remarks(structures: Sequence[Structure]) -> None:
    """Say in the log what reading remarked on these; a store remembers none of it, and is not read for it."""
    data = structures
    while isinstance(data, Subset):
        data = data.parent
    if not isinstance(data, Store):
        say_remarks(Counter(remark for s in structures for remark in s.remarks), len(structures))


def say_remarks(found: Counter[str], n: int) -> None:
    """Say in the log what reading remarked on n frames."""
    for remark, text in REMARKS.items():
        if found[remark]:
            log.warning("%d of %d frames %s", found[remark], n, text)
    _mixtures(found, n, log.warning)


def _mixtures(found: Counter[str], n: int, say: Callable[[str], None]) -> None:
    """Say so if remarks on n frames are of several heads of MACE, charges or spins: no potential tells them apart."""
    charges = {remark.removeprefix(CHARGE): count for remark, count in found.items() if remark.startswith(CHARGE)}
    charges |= {"0": n - sum(charges.values())} if charges and sum(charges.values()) < n else {}
    if len(charges) > 1:
        say(
            f"structures have several charges ({_shortened([f'{charge}: {count}' for charge, count in charges.items()])}), which a potential does not "
            "see: where ions and neutral structures look alike, it learns their mean. Train on those of one charge"
        )
    spins = {remark.removeprefix(SPIN): count for remark, count in found.items() if remark.startswith(SPIN)}
    if len(spins) > 1:
        say(
            f"structures have several spins ({_shortened([f'{spin}: {count}' for spin, count in spins.items()])}), which a potential does not see: it "
            "learns their mean. Train on those of one"
        )
    heads = {remark.removeprefix(HEAD): n for remark, n in found.items() if remark.startswith(HEAD)}
    if len(heads) > 1:
        say(
            f"frames belong to several heads ({_shortened([f'{head}: {n}' for head, n in heads.items()])}), which in files for MACE are levels of "
            "theory: their energies do not go together, and no head is told from another. Train on the frames of one"
        )


def _energies(structures: Sequence[Structure], report: Inspection) -> None:
    """Outliers of energy per atom after removing the best reference energies; isolated atoms, which are not bound, lie far from all others."""
    chosen = [s for s in structures if s.energy is not None and not s.is_isolated()]
    if len(chosen) < 10:
        return
    rows = np.array([np.bincount(s.atomic_numbers, minlength=119) for s in chosen], dtype=float)
    energies = np.array([s.energy for s in chosen])
    used = rows.any(axis=0)
    sizes = rows.sum(axis=1)
    matrix = rows[:, used] / sizes[:, None]
    solution, *_ = np.linalg.lstsq(matrix, energies / sizes, rcond=1e-10)
    rest = energies / sizes - matrix @ solution
    centred = rest - np.median(rest)
    spread = 1.4826 * float(np.median(np.abs(centred)))
    far = np.flatnonzero(np.abs(centred) > np.maximum(30 * spread, 0.05))
    report.numbers["energy_spread_per_atom"] = float(rest.std())
    report.facts["energy spread"] = f"{1000 * rest.std():.3g} meV/atom about the best reference energies"
    if 0 < len(far) <= 0.02 * len(chosen):
        worst = far[np.argmax(np.abs(centred[far]))]
        report.warnings.append(f"{len(far)} energy outliers, the worst {centred[worst]:+.2f} eV/atom from the rest: {chosen[worst].name}")


def _energy_unit(structures: Sequence[Structure], report: Inspection) -> None:
    """Total energies of all electrons are known to a few per cent from the atomic numbers: they show a unit other than eV.

    Energy of a free atom in Hartree (Thomas and Fermi, Scott, Schwinger): -0.7687 Z^(7/3) + Z²/2 - 0.2699 Z^(5/3). Energies of
    pseudopotentials are smaller, so that one above eV's cannot be chance; one below it can, and is if forces agree with energies.
    """
    if not structures:
        return
    agree = report.numbers.get("energy_against_forces", {}).get("conclusive", False)
    z = np.arange(119.0)
    atoms = 27.2114 * (-0.768745 * z ** (7 / 3) + 0.5 * z**2 - 0.2699 * z ** (5 / 3))
    ratio = float(np.median([s.energy / atoms[s.atomic_numbers].sum() for s in structures]))
    for unit, factor in ENERGY_UNITS.items():
        if unit != "eV" and ratio > 0 and abs(np.log(ratio * factor)) < 0.06:
            message = f"energies are {ratio:.3g} times those of all electrons in eV, as if they were in {unit}: set --energy-unit {unit}"
            if ratio > 1:
                report.errors.append(message + " (data.labels.energy_unit)")
            elif not agree:
                report.warnings.append(message + " if they hold all electrons")


def _distances(structures: Sequence[Structure], report: Inspection, limit: int = 2000) -> None:
    stride = max(1, len(structures) // limit)
    closest, count, first = (np.inf, ""), 0, ""
    for k in range(0, len(structures), stride):
        s = structures[k]
        radii = covalent_radii[s.atomic_numbers]
        (sender, receiver), shifts = neighbor_list(s.positions, s.cell, s.pbc, max(1.0, float(radii.max())))
        if len(sender) == 0:
            continue
        lengths = np.linalg.norm(s.positions[sender] + shifts @ s.cell - s.positions[receiver], axis=1)
        ratio = float((lengths / (radii[sender] + radii[receiver])).min())
        closest = min(closest, (float(lengths.min()), s.name))
        if ratio < 0.4:
            count, first = count + 1, first or s.name
    if np.isfinite(closest[0]):
        report.numbers["shortest_distance"] = closest[0]
        report.facts["shortest distance"] = f"{closest[0]:.3f} Å in {closest[1]}"
    if count:
        extreme = closest[0] < 0.2
        message = f"{count} frames have atoms closer than 0.4 of their covalent radii, the first is {first}"
        (report.errors if extreme else report.warnings).append(message + (" (overlapping, or a length unit?)" if extreme else ""))


def _length_unit(structures: Sequence[Structure], report: Inspection, limit: int = 50) -> None:
    """How far the nearest neighbours of atoms are, in sums of covalent radii: 0.7 to 1.2 in molecules and crystals, in Bohr 1.9 times that.

    Where everything is in atomic units, labels agree with each other, and nothing else shows it. Noble gases are left out, and pairs of
    atoms, which are pulled apart on purpose.
    """
    chosen = [k for k in range(len(structures)) if structures[k].n_atoms > 2 or structures[k].pbc.any()]
    found = []
    for k in chosen[:: max(1, len(chosen) // limit)]:
        s = structures[k]
        if np.isin(s.atomic_numbers, NOBLE).any():
            continue
        radii = covalent_radii[s.atomic_numbers]
        (sender, receiver), shifts = neighbor_list(s.positions, s.cell, s.pbc, 4.5 * float(radii.max()))
        lengths = np.linalg.norm(s.positions[sender] + shifts @ s.cell - s.positions[receiver], axis=1)
        nearest = np.full(s.n_atoms, np.inf)
        np.minimum.at(nearest, receiver, lengths / (radii[sender] + radii[receiver]))
        if np.isfinite(nearest).any():
            found.append(float(np.median(nearest[np.isfinite(nearest)])))
    if found and np.median(found) > FAR:
        report.warnings.append(
            f"the nearest neighbours of atoms are typically {np.median(found):.2g} times as far as a bond is long (sum of covalent radii): are "
            "lengths in Bohr? Then say --length-unit Bohr (data.labels.length_unit), and in which units energies and forces are"
        )


def _small_steps(structures: Sequence[Structure], report: Inspection, limit: int = 200) -> None:
    """Frames of a trajectory that follow each other in small steps: validation frames that a random split takes have near twins in training."""
    n = len(structures)
    if n < 20 or all(s.group is not None for s in structures):
        return
    starts = range(0, n - 1, max(1, n // limit))
    steps, apart = [], []
    for k in starts:
        step, far = _moved(structures[k], structures[k + 1]), _moved(structures[k], structures[(k + n // 2) % n])
        steps += [] if step is None else [step]
        apart += [] if far is None else [far]
    if len(steps) < 0.5 * len(starts) or not apart:
        return
    step, far = float(np.median(steps)), float(np.median(apart))
    report.numbers["steps"] = {"between_neighbours": step, "between_others": far}
    if step < 0.1 and step < 0.2 * far:
        report.warnings.append(
            f"frames follow each other in steps of {step:.2g} Å, where others differ by {far:.2g} Å: split at random, nearly the same frames are in "
            "training and validation, whose errors then say little of new ones. Keep a part of the time, or another trajectory, for data.valid "
            "and data.test, or name an entry that groups frames (--group)"
        )


def _moved(a: Structure, b: Structure) -> float | None:
    """Å, the root mean square of how far the atoms of a are from those of b, less the common part; None for other atoms."""
    if a.n_atoms < 2 or not np.array_equal(a.atomic_numbers, b.atomic_numbers):
        return None
    step = b.positions - a.positions
    if a.pbc.all():
        step = step - np.round(step @ np.linalg.inv(a.cell)) @ a.cell
    step = step - step.mean(axis=0)
    return float(np.sqrt((step**2).sum(axis=1).mean()))
