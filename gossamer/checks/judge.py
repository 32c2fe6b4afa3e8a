"""Judge potentials, ours or anyone's: every check, one page, one JSON file; finished work is kept and not done again."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.abc import GetPropertiesMixin
from ase.data import atomic_numbers, chemical_symbols

from gossamer import __version__
from gossamer.arguments import FILES as PATHS
from gossamer.arguments import as_path, listed
from gossamer.checks import (
    conservation,
    crystals,
    diatomics,
    discovery,
    dynamics,
    errors,
    phonons,
    smoothness,
    speed,
    symmetry,
    thermal_conductivity,
)
from gossamer.checks.candidate import LEVELS, UNBOXED, Candidate, bond_length, builtin_crystals, builtin_molecules, molecule_in
from gossamer.checks.config import FILES, JudgeConfig
from gossamer.checks.judge_page import write_page
from gossamer.checks.result import ORDER, Result, skipped
from gossamer.checks.source import CalculatorInMemory, Source, find_sources, supported_elements
from gossamer.data.atoms import read_frames
from gossamer.data.structure import spread
from gossamer.files import InputError, checksum, write_json
from gossamer.machine import machine, versions
from gossamer.settings import build, to_dict
from gossamer.simulation.state import CHARGED, belonging

log = logging.getLogger(__name__)
ENDED = "The check ended with an error"
"""how the reason of such a result begins; the same question is asked again"""
SAID = ("masses", "initial_charges", "initial_magmoms")
"""arrays that structures may have, on which phonons, dynamics or what calculators say depend"""
PACKAGES = ("ase", "numpy", "torch", "phonopy", "phono3py", "chgnet", "sevenn", "mace-torch", "orb-models", "tblite")


@dataclass(frozen=True)
class Check:
    """One entry of the judge's list."""

    title: str
    run: Callable[[Candidate], Result]
    question: str
    """what it answers, for the page"""
    number: str
    """how the name of the metric begins (or ends, after a colon) that stands for the check in the overview"""
    uses: tuple[str, ...] = ()
    """settings and structures that its answer depends on; when one changes, the check is done again"""
    needs: str = "structures"
    """part of the candidate without which there is nothing to judge"""


CHECKS = {
    "symmetry": Check("Symmetry and extensivity", symmetry.check, "Does the answer depend on how the system lies in space or is written down?", "rotation, forces", ("structures",)),
    "conservation": Check("Conservation", conservation.check, "Are forces and stress the gradient of the energy, and does dynamics conserve it?", "drift of the total energy", ("structures", "temperature", "timestep")),
    "smoothness": Check("Smoothness", smoothness.check, "Does the energy jump or wave as atoms move, come and go?", "jump of the force as an atom leaves", ("structures",)),
    "diatomics": Check("Curves of two atoms", diatomics.check, "Do atoms repel when pushed together, with one minimum?", "mean tortuosity", ("all_pairs", "diatomics_reference"), "elements"),
    "crystals": Check("Crystals", crystals.check, "Equation of state, elasticity, vacancies and surfaces: does the solid hold and respond?", "bulk modulus", ("crystals", "builtin_crystals"), "crystals"),
    "phonons": Check("Phonons", phonons.check, "Does the crystal vibrate as a stable crystal does?", "highest frequency", ("crystals", "phonons_reference"), "crystals"),
    "conductivity": Check("Thermal conductivity", thermal_conductivity.check, "Are the anharmonic forces right?", "κ", ("crystals", "conductivity_crystals", "conductivity_reference", "conductivity_count"), "crystals"),
    "dynamics": Check("Molecular dynamics", dynamics.check, "Is a simulation stable, in its ensemble, and like the reference?", "mean temperature",
                      ("systems", "builtin_systems", "temperature", "timestep", "protocol", "picoseconds", "references", "reference_interval", "two_temperatures"), "systems"),
    "errors": Check("Errors on labelled data", errors.check, "How far from the reference method?", "force, mean absolute error", ("data", "same_zero"), "elements"),
    "discovery": Check("Matbench Discovery", discovery.check, "Does it find the stable materials?", "F1", ("discovery", "discovery_table", "discovery_relaxed", "discovery_count"), "elements"),
    "speed": Check("Speed and size", speed.check, "How fast, and how large?", "time per atom, largest system", ("structures",)),
}  # fmt: skip


# --- the judge ------------------------------------------------------------------------------------------------------


def judge(
    models: Any = (),
    calculator: Any = (),
    out: Path | str = "judgement",
    structures: Sequence[Path | str | Atoms] | Path | str | Atoms = (),
    crystals: Sequence[Path | str | Atoms] | Path | str | Atoms = (),
    systems: Sequence[Path | str | Atoms] | Path | str | Atoms = (),
    config: JudgeConfig | None = None,
    progress: bool = True,
    **options: Any,
) -> dict[str, dict[str, Result]]:
    """Judge potentials and write report.html and judgement.json.

    Each finished check is kept in ``out``; a second call does only what is missing or was asked differently, and potentials
    judged into the same folder before (from another environment, say) stand beside on the page.

    Args:
        models: Saved potentials, "FILE" or "name=FILE"; or potentials and ASE calculators in memory, {"name": potential} for names of one's
            own. One, or several. Each check of a calculator in memory asks the same object, whose energies of a few clusters tell it from
            others of its class in a second call.
        calculator: ASE calculators, "module:factory" or "name=module:factory(key=value)", or in memory likewise.
        out: Folder of the report.
        structures: Files or atoms for symmetry, conservation, smoothness, speed and dynamics; a molecule alone in a periodic box is
            taken out of it. By default those the potential was tested on, if its run is still there, else simple crystals and molecules of
            its elements.
        crystals: Files or atoms for equation of state, elasticity, phonons and thermal conductivity.
        systems: Files or atoms for molecular dynamics; ``info["temperature_K"]`` sets the temperature of each, unless ``temperature`` or
            ``protocol`` does.
        config: What is asked, as a `JudgeConfig`.
        progress: Show progress bars.
        **options: Fields of `JudgeConfig` that replace those of ``config``: ``level="quick"``, ``only=["phonons"]`` ...

    Returns:
        Results by potential and check.

    Raises:
        TypeError: something else than potentials, calculators, files or atoms.
        ValueError: unknown or wrong options (with the nearest known name), nothing to judge, or unreadable input.
        FileNotFoundError: a file is not there.
    """
    config = build(JudgeConfig, {**(to_dict(config) if config is not None else {}), **options})
    chosen = config.chosen()
    for name in FILES:
        _need_file(getattr(config, name))
    for path in config.references:
        _need_file(path)
    inputs = Inputs(
        read_all(structures, LEVELS[config.level].n_structures), read_all(crystals, what="crystals"), read_all(systems, 1, "systems"),
        errors.read_labelled(config.data) if config.data else [],
    )  # fmt: skip
    for atoms in inputs.crystals:  # what is held fixed in a file is no property of the solid
        atoms.set_constraint()
    for name, atoms in named(inputs.crystals).items():
        if not atoms.pbc.all():
            raise ValueError(f"'{name}' is no crystal: it is periodic along {atoms.pbc.tolist()}. Give crystals that are along all axes.")
    n_systems = len(inputs.systems) or 1
    if len(config.references) > n_systems:
        raise ValueError(
            f"{len(config.references)} references for {n_systems} {'systems' if inputs.systems else 'system (the first structure)'}: "
            "give systems, and one reference for each, in the same order."
        )
    sources = find_sources(
        entries("models", models), entries("calculator", calculator), config.device, config.dtype, config.way, config.dispersion
    )
    if config.device != "cpu" and any(source.device == config.device for source in sources):  # else every check would fail
        from gossamer.potential_file import check_device

        check_device(config.device)
    folder = as_path("out", out, "the name of a folder")
    results: dict[str, dict[str, Result]] = {}
    for source in sources:
        own = folder / source.name
        claim(own, source, config)
        candidate = make_candidate(source, config, own, inputs, progress)
        results[source.name] = {name: run_check(name, candidate, own) for name in chosen}
        write_summary(folder)
    return results


def entries(what: str, given: Any) -> list[Any]:
    """What is to be judged, as `find_sources` takes it: texts and paths, and of what is in memory (name, it).

    Raises:
        TypeError: something else, such as the class of a calculator.
    """
    if isinstance(given, Mapping):
        return [f"{name}={thing}" if isinstance(thing, PATHS) else (str(name), thing) for name, thing in given.items()]
    potential = getattr(sys.modules.get("gossamer.potential"), "Potential", GetPropertiesMixin)  # not loaded: there is none
    expected = "a saved potential or ASE calculator, or one in memory"
    found = listed(what, given, (*PATHS, GetPropertiesMixin, potential), expected)
    return [e if isinstance(e, PATHS) else (getattr(getattr(e, "model_config", None), "name", type(e).__name__), e) for e in found]


def _need_file(path: str | None) -> None:
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(f"There is no file '{path}'.")


# --- what they are judged on ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What the user gave to judge on."""

    structures: list[Atoms]
    crystals: list[Atoms]
    systems: list[Atoms]
    labelled: list[Atoms]


def read_all(given: Any, n: int | None = None, what: str = "structures") -> list[Atoms]:
    """Atoms (copied) and frames of structure files, chosen as by `chosen_frames` if only ``n`` of each file are wanted.

    Raises:
        TypeError: something else among them.
        FileNotFoundError: no such file.
        ValueError: a file without atoms.
    """
    out: list[Atoms] = []
    for entry in listed(what, given, (*PATHS, Atoms), "files or ASE's Atoms"):
        if isinstance(entry, Atoms):
            out.append(entry.copy())
            continue
        frames = read_frames(entry)
        for k in chosen_frames([len(f) for f in frames], n):
            frames[k].info.setdefault("name", Path(entry).name.split(".")[0] + (f"-{k}" if len(frames) > 1 else ""))
            frames[k].info["origin"] = f"frame {k} of '{Path(entry).name}'"
            out.append(frames[k])
    return out


def chosen_frames(sizes: Sequence[int], n: int | None) -> list[int]:
    """``n`` frames spread evenly over those of several atoms, or over all where there are none; None: all frames."""
    several = [k for k, size in enumerate(sizes) if size > 1 or n is None] or list(range(len(sizes)))
    return [several[k] for k in spread(len(several), n)]


def tested_structures(run: Path, n: int) -> tuple[list[Atoms], str]:
    """Some of the structures a potential of ours was tested or else trained on, and which, if its run's settings and data are still there."""
    from gossamer.config import load_config
    from gossamer.data.dataset import open_dataset

    try:
        data = load_config(run / "config.yaml").data
        found = open_dataset(data.test or data.train, data.labels)
    except (OSError, ValueError) as error:
        log.info("the training data of '%s' cannot be read (%s)", run, error)
        return [], ""
    picks = chosen_frames([found[k].n_atoms for k in range(len(found))], n)
    what = "test data" if data.test else "training data"
    return [found[k].to_ase() for k in picks], f"frame{'s' * (len(picks) > 1)} {', '.join(map(str, picks))} of its run's {what}"


def make_candidate(source: Source, config: JudgeConfig, folder: Path, inputs: Inputs, progress: bool) -> Candidate:
    """One potential with the structures that its elements allow; built-in ones where none were given."""
    effort = LEVELS[config.level]
    own = Candidate(
        source.name, source.make, [], [], {}, {}, folder, effort, config, labelled=inputs.labelled, builtin_crystals=not inputs.crystals,
        builtin_systems=not (inputs.systems or inputs.structures), conservative=source.conservative, cutoff=source.cutoff, progress=progress, seen=source.seen,
        ours=source.ours,
    )  # fmt: skip
    known = known_elements(source, own, config.elements)
    own.elements = list(known)
    inputs = replace(inputs, structures=own.unboxed(inputs.structures), systems=own.unboxed(inputs.systems))
    own.elements = sorted(known, key=lambda e: (e not in {s for a in inputs.structures for s in a.symbols}, atomic_numbers[e]))
    allowed = set(known)
    given = list(known_ones(own, "judgement on the structures", inputs.structures, allowed).values())
    own.origin = ", ".join(dict.fromkeys(str(a.info.get("origin", a.get_chemical_formula())) for a in given[: effort.n_structures]))
    if not given and source.run is not None:
        given, own.origin = tested_structures(source.run, effort.n_structures)
        given = own.unboxed(given)
    builtin = builtin_crystals(own.elements, effort.n_crystals)
    if inputs.crystals:
        own.crystals = known_ones(own, "judgement on the crystals", inputs.crystals, allowed)
    elif not given or any(a.pbc.all() and molecule_in(a) is None for a in given):  # a potential of molecules is not asked about crystals
        own.crystals = builtin
    molecules = builtin_molecules(own.elements, 1)
    own.structures = given[: effort.n_structures] or [*builtin.values(), *molecules.values()][: max(1, effort.n_structures)]
    if not own.structures:
        apart = bond_length(own.elements[0], own.elements[0])
        own.structures = [Atoms([own.elements[0]] * 2, [[0, 0, 0], [apart, 0, 0]])]
    own.origin = own.origin or "built-in crystals and molecules"
    if any(a.info.get(UNBOXED) for a in own.structures):
        own.origin += "; molecules that are alone in their periodic boxes are judged without these"
    add_systems(own, inputs, allowed)
    return own


def add_systems(own: Candidate, inputs: Inputs, allowed: set[str]) -> None:
    """What dynamics is judged on, and the reference of each: those systems whose elements the potential knows, or its first structure."""
    systems, references = inputs.systems or own.structures[:1], own.config.references
    if references and inputs.structures and not inputs.systems and systems[0] is not inputs.structures[0]:
        log.warning("%s: no reference, as it does not know the elements of the first structure, to which that belongs", own.name)
        references = ()
    own.systems = known_ones(own, "dynamics of", systems, allowed)
    own.references = {n: r for n, r in zip(named(systems), references, strict=False) if n in own.systems}


def known_ones(own: Candidate, what: str, found: Sequence[Atoms], allowed: set[str]) -> dict[str, Atoms]:
    """By name those whose elements the potential knows; of the others the log says that there is no ``what``."""
    everything = named(found)
    fitting = {name: atoms for name, atoms in everything.items() if set(atoms.symbols) <= allowed}
    if lacking := [name for name in everything if name not in fitting]:
        log.warning("%s: no %s %s, whose elements it does not know", own.name, what, ", ".join(lacking))
    return fitting


def known_elements(source: Source, own: Candidate, wanted: Sequence[str] | None) -> list[str]:
    """Elements that the potential knows and the user wants.

    Raises:
        ValueError: a wanted symbol is none, or no element can be evaluated.
    """
    wrong = [e for e in wanted or () if e not in atomic_numbers or e == "X"]
    if wrong:
        raise ValueError(f"'{wrong[0]}' is not the symbol of an element (elements={list(wanted or ())}). Write them like Si O.")
    if source.elements is not None:
        known = [e for e in source.elements if not wanted or e in wanted]
    else:
        if not wanted:
            log.info("%s: finding out which elements it knows (give --elements to save this time)", source.name)
        make_calculator(own)
        refused: dict[str, str] = {}
        known = supported_elements(own.calculator, wanted or chemical_symbols[1:95], refused)
        if not known:
            element, said = next(iter(refused.items()))
            raise ValueError(
                f"'{source.name}' could not evaluate any pair of atoms ({element}: {said}). Is it an ASE calculator with its weights in place?"
            )
    if not known:
        raise ValueError(f"'{source.name}' knows none of {', '.join(wanted or ())}: it knows {', '.join(source.elements or ())}.")
    return known


def named(found: Sequence[Atoms]) -> dict[str, Atoms]:
    """Structures by their names, or else their formulas; where two have the same, they are numbered."""
    out: dict[str, Atoms] = {}
    for atoms in found:
        name = str(atoms.info.get("name") or atoms.get_chemical_formula(empirical=True))
        name = re.sub(r"[^\w.+-]+", "_", name) or "system"
        k = 1
        while (unique := name if k == 1 else f"{name}-{k}") in out:
            k += 1
        out[unique] = atoms
    return out


# --- one check ------------------------------------------------------------------------------------------------------


def claim(folder: Path, source: Source, config: JudgeConfig) -> None:
    """A folder belongs to one potential; what is known of it is written into about.json.

    Raises:
        ValueError: the folder holds the results of another potential.
    """
    about = folder / "about.json"
    if about.exists():
        before = json.loads(about.read_text("utf-8"))
        make = source.make
        answers_alike = not isinstance(make, CalculatorInMemory) or make.alike(before.get("energies"))
        if before.get("fingerprint") != source.fingerprint or not answers_alike:
            raise ValueError(
                f"'{folder}' holds the judgement of another potential called '{source.name}', or of files or a package that have changed since. "
                "Give this one a name (name=...), or use another --out."
            )
        return
    energies = (
        {"energies": source.make.probed(config.elements or chemical_symbols[1:95])} if isinstance(source.make, CalculatorInMemory) else {}
    )
    facts = {"name": source.name, "fingerprint": source.fingerprint, "ours": source.ours, "n_train": source.n_train, "unverified": source.unverified,
             "machine": machine(source.device), "versions": versions(PACKAGES), "date": date.today().isoformat(), **energies}  # fmt: skip
    write_json(about, facts)


def run_check(name: str, candidate: Candidate, folder: Path) -> Result:
    """The result of one check by a fresh calculator, or from its file if it was asked in the same way before."""
    check = CHECKS[name]
    key = question_key(name, candidate)
    path = folder / f"{name}.json"
    stored = _stored(path)
    if stored and stored["key"] == key and stored["result"]["status"] != "skipped" and not stored["result"]["reason"].startswith(ENDED):
        return Result.from_dict(stored["result"])
    candidate.folder = folder / f"{name}-{key}"
    candidate.renew()
    log.info("%s: %s", candidate.name, check.title)
    began = time.perf_counter()
    make_calculator(candidate)
    if not getattr(candidate, check.needs):
        result = skipped(f"Nothing to judge it on: no {check.needs} that fit the potential's elements. Give --{check.needs} FILE.")
    else:
        try:
            result = check.run(candidate)
        except (KeyboardInterrupt, InputError, FileNotFoundError):
            raise
        except Exception as error:  # a judged calculator may raise anything; the others still count
            log.exception("%s: %s", candidate.name, name)
            result = Result("failed", f"{ENDED}: {type(error).__name__}: {str(error)[:300]}", "It cannot be used for this.")
    if "structures" in check.uses:
        result.notes.append(f"Structures: {candidate.origin}.")
    result.seconds = round(time.perf_counter() - began, 2)
    record = {"key": key, "level": candidate.config.level, "result": result.to_dict(), "date": date.today().isoformat()}
    write_json(path, record)
    return result


def make_calculator(candidate: Candidate) -> None:
    """Make the calculator: what fails here is wrong use, or a package that is missing, and no verdict on the potential.

    Raises:
        RuntimeError: it cannot be made, with what its factory said; errors that the command line knows pass as they are.
    """
    try:
        candidate.calculator  # noqa: B018
    except (ValueError, RuntimeError, ImportError, OSError):
        raise
    except Exception as error:
        raise RuntimeError(f"'{candidate.name}' cannot be made: {type(error).__name__}: {error}") from error


def _stored(path: Path) -> dict[str, Any] | None:
    """A finished check; None if there is none."""
    if not path.exists():
        return None
    stored = dict(json.loads(path.read_text(encoding="utf-8")))
    return {**stored, "result": stored["outcome"]} if "outcome" in stored else stored  # its name in earlier files


def question_key(name: str, candidate: Candidate) -> str:
    """What the answer of a check depends on, in eight letters."""
    digest = hashlib.sha256(f"{__version__} {candidate.config.level} {candidate.elements}".encode())
    for used in CHECKS[name].uses:
        if used in ("structures", "crystals", "systems"):
            found = getattr(candidate, used)
            for atoms in found.values() if isinstance(found, dict) else found:
                digest.update(str(atoms.info.get("temperature_K")).encode())
                for array in (atoms.numbers, atoms.positions.round(6), atoms.cell.array.round(6), atoms.pbc):
                    digest.update(np.ascontiguousarray(array).tobytes())
                said = [(name, atoms.arrays[name].tolist()) for name in SAID if name in atoms.arrays]
                said += [(name, atoms.info[name]) for name in CHARGED if name in atoms.info]
                if said or atoms.constraints:
                    digest.update(f"{said} {belonging(atoms, None)['constraints']}".encode())
        elif used == "references":
            for system, path in candidate.references.items():
                digest.update(f"{system} {checksum(path)}".encode())
        elif used in FILES:
            path = getattr(candidate.config, used)
            digest.update(str(path and checksum(path)).encode())
        else:
            owner = candidate if used.startswith("builtin_") else candidate.config
            digest.update(f"{used}={getattr(owner, used)}".encode())
    return digest.hexdigest()[:8]


# --- all of them ----------------------------------------------------------------------------------------------------


def write_summary(folder: Path) -> None:
    """judgement.json and report.html of every potential judged into a folder."""
    everyone = {}
    for about in sorted(folder.glob("*/about.json"), key=lambda p: p.stat().st_mtime):
        stored = {n: s for n in CHECKS if (s := _stored(about.parent / f"{n}.json"))}
        everyone[about.parent.name] = {
            "about": json.loads(about.read_text("utf-8")),
            "checks": {n: s["result"] for n, s in stored.items()},
            "levels": sorted({s["level"] for s in stored.values()}),
        }
    numbers = {
        name: {**entry["about"], "verdict": worst(c["status"] for c in entry["checks"].values()),
               "checks": {n: {k: v for k, v in c.items() if k != "panels"} for n, c in entry["checks"].items()}}
        for name, entry in everyone.items()
    }  # fmt: skip
    for name, entry in everyone.items():
        score = combined(entry["checks"])
        if score is not None:
            numbers[name]["CPS"] = entry["CPS"] = score
    write_json(folder / "judgement.json", numbers)
    write_page(folder / "report.html", everyone, {n: (c.title, c.question, c.number) for n, c in CHECKS.items()})


def combined(checks: dict[str, Any]) -> float | None:
    """CPS of Matbench Discovery, where F1, κ_SRME and RMSD were all measured."""
    values = {m["name"]: m["value"] for n in ("discovery", "conductivity") for m in checks.get(n, {}).get("metrics", [])}
    f1, srme, rmsd = values.get("F1, unique prototypes", values.get("F1")), values.get("κ_SRME"), values.get("RMSD of relaxed structures")
    return None if f1 is None or srme is None or rmsd is None else discovery.combined_score(f1, srme, rmsd)


def worst(statuses: Iterable[str]) -> str:
    """The worst of several verdicts; "measured" if none was given."""
    return max(statuses, key=lambda s: ORDER[s], default="measured")
