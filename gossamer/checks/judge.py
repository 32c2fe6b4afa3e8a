"""Judge potentials, ours or anyone's: every check, one page, one JSON file; finished work is kept and not done again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms

from gossamer import __version__
from gossamer.checks import (
    candidate,
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
from gossamer.checks.candidate import LEVELS, Candidate
from gossamer.checks.page import write_page
from gossamer.checks.result import ORDER, InputError, Result, skipped
from gossamer.files import write_json

log = logging.getLogger(__name__)
Level = Literal["quick", "standard", "full"]


@dataclass(frozen=True)
class Check:
    """One entry of the judge's list."""

    title: str
    run: Callable[[Candidate], Result]
    question: str
    """what it answers, for the page"""
    uses: tuple[str, ...] = ()
    """options that its answer depends on; when one changes, the check is done again"""
    needs: str = "structures"
    """part of the candidate without which there is nothing to judge"""


CHECKS = {
    "symmetry": Check("Symmetry and extensivity", symmetry.check, "Does the answer depend on how the system lies in space or is written down?", ("structures",)),
    "conservation": Check("Conservation", conservation.check, "Are forces and stress the gradient of the energy, and does dynamics conserve it?", ("structures", "temperature", "timestep")),
    "smoothness": Check("Smoothness", smoothness.check, "Does the energy jump or wave as atoms move, come and go?", ("structures",)),
    "diatomics": Check("Curves of two atoms", diatomics.check, "Do atoms repel when pushed together, with one minimum?", ("all_pairs", "diatomics_reference"), "elements"),
    "crystals": Check("Crystals", crystals.check, "Equation of state, elasticity, vacancies and surfaces: does the solid hold and respond?", ("crystals", "builtin_crystals"), "crystals"),
    "phonons": Check("Phonons", phonons.check, "Does the crystal vibrate as a stable crystal does?", ("crystals",), "crystals"),
    "conductivity": Check("Thermal conductivity", thermal_conductivity.check, "Are the anharmonic forces right?", ("crystals", "conductivity_crystals", "conductivity_reference", "conductivity_count"), "crystals"),
    "dynamics": Check("Molecular dynamics", dynamics.check, "Is a simulation stable, in its ensemble, and like the reference?",
                      ("systems", "builtin_systems", "temperature", "temperature_given", "timestep", "timestep_given", "protocol", "picoseconds", "references", "reference_interval", "two_temperatures"), "systems"),
    "errors": Check("Errors on labelled data", errors.check, "How far from the reference method?", ("data", "same_zero"), "elements"),
    "discovery": Check("Matbench Discovery", discovery.check, "Does it find the stable materials?", ("discovery", "discovery_table", "discovery_relaxed", "discovery_count"), "elements"),
    "speed": Check("Speed and size", speed.check, "How fast, and how large?", ("structures",)),
}  # fmt: skip


@dataclass(frozen=True)
class JudgeOptions:
    """What `judge` was asked, as the checks see it."""

    level: Level = "quick"
    temperature: float = 300.0
    temperature_given: bool = False
    timestep: float = 0.5
    timestep_given: bool = False
    all_pairs: bool = False
    diatomics_reference: str | None = None
    builtin_crystals: bool = True
    builtin_systems: bool = True
    conductivity_crystals: str | None = None
    conductivity_reference: str | None = None
    conductivity_count: int | None = None
    protocol: str | None = None
    picoseconds: float | None = None
    references: tuple[str, ...] = ()
    reference_interval: float | None = None
    two_temperatures: bool = False
    data: str | None = None
    labelled: list[Atoms] = field(default_factory=list)
    same_zero: bool = False
    discovery: str | None = None
    discovery_table: str | None = None
    discovery_relaxed: str | None = None
    discovery_count: int | None = None
    processes: int = 1


# --- who is judged --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedPotential:
    """Makes the calculator of one of our potentials; can be sent to other processes."""

    path: str
    device: str = "cpu"
    dtype: str | None = None

    def __call__(self) -> Any:
        from gossamer.simulation.calculator import Calculator

        return Calculator(self.path, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class AnyCalculator:
    """Makes a calculator from module:factory; can be sent to other processes."""

    text: str

    def __call__(self) -> Any:
        return candidate.parse_calculator(self.text)[1]()


@dataclass
class Source:
    """A potential and what is known of it before it is asked."""

    name: str
    make: Callable[[], Any]
    fingerprint: str
    elements: list[str] | None = None
    cutoff: float | None = None
    conservative: bool | None = None
    trained_on: Path | None = None
    ours: bool = False


def find_sources(models: Sequence[Path | str], calculators: Sequence[str], device: str, dtype: str | None) -> list[Source]:
    """Saved potentials ("[name=]FILE") and calculators ("[name=]module:factory").

    Raises:
        ValueError: nothing to judge, two of one name, or a calculator that is not one.
        FileNotFoundError: no such potential.
    """
    found = []
    for entry in models:
        name, equals, path = str(entry).partition("=")
        path = path if equals else str(entry)
        if ":" in path and not Path(path).exists():
            raise ValueError(f"'{path}' is not a file. For a calculator write --calculator {path}.")
        from gossamer.potential_file import read_manifest

        manifest = read_manifest(path)
        file = Path(path)
        stem = file.parent.resolve().name if file.stem == "potential" else file.stem
        config = file.parent / "config.yaml"
        found.append(
            Source(
                name if equals else stem, SavedPotential(path, device, dtype), f"{manifest['checksum']}-{dtype}", list(manifest["statistics"]["elements"]),
                manifest["model"].get("cutoff"), bool(manifest["conservative"]), config if config.exists() else None, True,
            )
        )  # fmt: skip
    for text in calculators:
        name, _ = candidate.parse_calculator(text)
        found.append(Source(name, AnyCalculator(text), text.rpartition("=")[2] if "(" not in text else text))
    if not found:
        raise ValueError("There is nothing to judge: give a saved potential, or --calculator module:factory.")
    for source in found:
        source.name = re.sub(r"[^\w.+-]+", "_", source.name)
        if sum(c.name == source.name for c in found) > 1:
            raise ValueError(f"Two potentials are called '{source.name}'. Give them names: other={source.name} ...")
    return found


# --- what they are judged on ----------------------------------------------------------------------------------------


def read_all(paths: Sequence[Path | str], n: int | None = None) -> list[Atoms]:
    """Frames of structure files, spread evenly if only ``n`` of each are wanted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without atoms.
    """
    out: list[Atoms] = []
    for path in paths:
        frames = dynamics.read_reference(path)
        chosen = range(len(frames)) if n is None else np.unique(np.linspace(0, len(frames) - 1, min(n, len(frames))).astype(int))
        for k in chosen:
            frames[int(k)].info.setdefault("name", Path(path).name.split(".")[0] + (f"-{int(k)}" if len(frames) > 1 else ""))
            out.append(frames[int(k)])
    return out


def training_structures(config: Path, n: int) -> list[Atoms]:
    """Some of the structures a potential of ours was tested or trained on, if its run's settings and data are still there."""
    from gossamer.config import load_config
    from gossamer.data.dataset import open_dataset

    try:
        data = load_config(config).data
        structures = open_dataset(data.test or data.train, data.labels)
    except (OSError, ValueError) as error:
        log.info("the training data of '%s' cannot be read (%s)", config.parent, error)
        return []
    picks = np.unique(np.linspace(0, len(structures) - 1, n).astype(int))
    return [structures[int(k)].to_ase() for k in picks]


def make_candidate(
    source: Source,
    options: JudgeOptions,
    folder: Path,
    structures: Sequence[Atoms],
    crystal_list: Sequence[Atoms],
    systems: Sequence[Atoms],
    elements: Sequence[str] | None,
    progress: bool,
) -> Candidate:
    """One potential with the structures that its elements allow; built-in ones where none were given."""
    effort = LEVELS[options.level]
    own = Candidate(source.name, source.make, [], [], {}, {}, folder, effort, options, source.conservative, source.cutoff, progress)
    if source.elements is None:
        if not elements:
            log.info("%s: finding out which elements it knows (give --elements to save this time)", source.name)
        known = candidate.supported_elements(own.calculator, elements or candidate.chemical_symbols[1:95])
    else:
        known = [e for e in source.elements if not elements or e in elements]
    if not known:
        raise ValueError(f"'{source.name}' could not evaluate any pair of atoms. Is it an ASE calculator with its weights in place?")
    own.elements = sorted(known, key=lambda e: (e not in {s for a in structures for s in a.symbols}, candidate.atomic_numbers[e]))
    allowed = set(known)

    def fitting(found: Sequence[Atoms]) -> list[Atoms]:
        return [a for a in found if set(a.symbols) <= allowed]

    given = fitting(structures)
    if not given and source.trained_on is not None:
        given = training_structures(source.trained_on, effort.n_structures)
    builtin = candidate.builtin_crystals(own.elements, effort.n_crystals)
    if crystal_list:
        own.crystals = {_name(a, k): a for k, a in enumerate(fitting(crystal_list))}
    elif not given or any(a.pbc.all() for a in given):  # a potential of molecules is not asked about crystals
        own.crystals = builtin
    molecules = candidate.builtin_molecules(own.elements, 1)
    own.structures = given[: effort.n_structures] if given else [*builtin.values(), *molecules.values()][: max(1, effort.n_structures)]
    if not own.structures:
        own.structures = [Atoms([own.elements[0]] * 2, [[0, 0, 0], [candidate.bond_length(own.elements[0], own.elements[0]), 0, 0]])]
    moving = fitting(systems) or own.structures[:1]
    own.systems = {_name(a, k): a for k, a in enumerate(moving)}
    return own


def _name(atoms: Atoms, k: int) -> str:
    name = str(atoms.info.get("name") or atoms.get_chemical_formula(empirical=True))
    return re.sub(r"[^\w.+-]+", "_", name) or f"system{k}"


# --- the judge ------------------------------------------------------------------------------------------------------


def judge(
    models: Sequence[Path | str] | Path | str = (),
    calculator: Sequence[str] | str = (),
    out: Path | str = "judgement",
    level: Level = "quick",
    only: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    structures: Sequence[Path | str | Atoms] = (),
    elements: Sequence[str] | None = None,
    data: Path | str | None = None,
    crystals: Sequence[Path | str | Atoms] = (),
    systems: Sequence[Path | str | Atoms] = (),
    references: Sequence[Path | str] = (),
    reference_interval: float | None = None,
    protocol: str | None = None,
    picoseconds: float | None = None,
    temperature: float | None = None,
    timestep: float | None = None,
    two_temperatures: bool = False,
    all_pairs: bool = False,
    diatomics_reference: Path | str | None = None,
    conductivity_crystals: Path | str | None = None,
    conductivity_reference: Path | str | None = None,
    conductivity_count: int | None = None,
    discovery: Path | str | None = None,
    discovery_table: Path | str | None = None,
    discovery_relaxed: Path | str | None = None,
    discovery_count: int | None = None,
    same_zero: bool = False,
    processes: int = 1,
    device: str = "cpu",
    dtype: str | None = None,
    progress: bool = True,
) -> dict[str, dict[str, Result]]:
    """Judge potentials and write report.html and judgement.json.

    Each finished check is kept in ``out``; a second call does only what is missing or was asked differently, and potentials
    judged into the same folder before (from another environment, say) stand beside on the page.

    Args:
        models: Saved potentials, "FILE" or "name=FILE".
        calculator: ASE calculators, "module:factory" or "name=module:factory(key=value)".
        out: Folder of the report.
        level: "quick" (minutes), "standard" (up to an hour on a laptop), "full" (published protocols).
        only: Names of the checks to do; None does all of them.
        skip: Names of checks to leave out.
        structures: Files or atoms for symmetry, conservation, smoothness, speed and dynamics. By default those the potential
            was tested on, if its run is still there, else simple crystals and molecules of its elements.
        elements: Symbols, for calculators whose elements would have to be found out.
        data: Labelled file for the errors.
        crystals: Files or atoms for equation of state, elasticity, phonons and thermal conductivity.
        systems: Files or atoms for molecular dynamics; ``info["temperature_K"]`` sets the temperature of each.
        references: Reference trajectories of the systems, in their order.
        reference_interval: ps between frames of the references; without it their diffusion is not compared.
        protocol: "lips", "water", "methane", "molecule" or "electrolyte" (`gossamer.checks.dynamics.PROTOCOLS`).
        picoseconds: Length of the dynamics; by default by level or protocol.
        temperature: K (default 300, or that of the protocol).
        timestep: fs (default 0.5, or that of the protocol).
        two_temperatures: Also run slightly warmer, and compare the two ensembles.
        all_pairs: Curves of all pairs of elements, not only of each with itself.
        diatomics_reference: JSON file of reference curves.
        conductivity_crystals: Extended XYZ file of crystals, as of the phononDB-103 set.
        conductivity_reference: JSON table of reference conductivities.
        conductivity_count: Do only the first of them.
        discovery: Extended XYZ file of initial structures with material_id.
        discovery_table: CSV table with the columns of wbm-summary.csv.
        discovery_relaxed: Extended XYZ file of structures relaxed by DFT, for the RMSD.
        discovery_count: Do only the first of them.
        same_zero: The labels count energies from the same zero as the potentials; otherwise one constant per element is
            fitted before errors of the energy are judged.
        processes: Worker processes of the discovery check.
        device: For saved potentials.
        dtype: "float32" or "float64" for saved potentials; by default as saved.
        progress: Show progress bars.

    Returns:
        Results by potential and check.

    Raises:
        ValueError: unknown checks, level or protocol, nothing to judge, or unreadable input.
        FileNotFoundError: a file is not there.
    """
    models = [models] if isinstance(models, str | Path) else list(models)
    calculators = [calculator] if isinstance(calculator, str) else list(calculator)
    chosen = _choose(only, skip, level, protocol)
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be positive, found {temperature} K.")
    if timestep is not None and not timestep > 0:
        raise ValueError(f"timestep must be positive, found {timestep} fs.")
    if len(references) > max(1, len(systems), len(structures)):
        raise ValueError(
            f"{len(references)} references for {len(systems) or len(structures)} systems: give one for each, in the same order."
        )
    sources = find_sources(models, calculators, device, dtype)
    options = JudgeOptions(
        level=level, temperature=300.0 if temperature is None else temperature, temperature_given=temperature is not None, timestep=timestep or 0.5, timestep_given=timestep is not None, all_pairs=all_pairs,
        diatomics_reference=_text(diatomics_reference), builtin_crystals=not crystals, builtin_systems=not (systems or structures),
        conductivity_crystals=_text(conductivity_crystals), conductivity_reference=_text(conductivity_reference), conductivity_count=conductivity_count,
        protocol=protocol, picoseconds=picoseconds, references=tuple(str(_text(r)) for r in references), reference_interval=reference_interval,
        two_temperatures=two_temperatures, data=_text(data), labelled=errors.read_labelled(data) if data else [], same_zero=same_zero,
        discovery=_text(discovery), discovery_table=_text(discovery_table), discovery_relaxed=_text(discovery_relaxed), discovery_count=discovery_count, processes=processes,
    )  # fmt: skip
    effort = LEVELS[level]
    given = _atoms(structures, effort.n_structures)
    crystal_list, moving = _atoms(crystals), _atoms(systems, 1)
    folder = Path(out)
    results: dict[str, dict[str, Result]] = {}
    for source in sources:
        own = folder / source.name
        _claim(own, source)
        candidate = make_candidate(source, options, own, given, crystal_list, moving, elements, progress)
        results[source.name] = {name: _run(name, candidate, options, own) for name in chosen}
        write_summary(folder)
    return results


def _choose(only: Sequence[str] | None, skip: Sequence[str], level: str, protocol: str | None) -> list[str]:
    unknown = [name for name in (*(only or ()), *skip) if name not in CHECKS]
    if unknown:
        raise ValueError(f"There is no check '{unknown[0]}'. Choose from {', '.join(CHECKS)}.")
    if level not in LEVELS:
        raise ValueError(f"level '{level}' is unknown. Choose {', '.join(LEVELS)}.")
    if protocol is not None and protocol not in dynamics.PROTOCOLS:
        raise ValueError(f"protocol '{protocol}' is unknown. Choose {', '.join(dynamics.PROTOCOLS)}.")
    chosen = [name for name in CHECKS if (only is None or name in only) and name not in skip]
    if not chosen:
        raise ValueError("No check is left to do.")
    return chosen


def _text(path: Path | str | None) -> str | None:
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(f"There is no file '{path}'.")
    return None if path is None else str(path)


def _atoms(entries: Sequence[Path | str | Atoms], n: int | None = None) -> list[Atoms]:
    if isinstance(entries, str | Path | Atoms):
        entries = [entries]
    return [a for entry in entries for a in ([entry.copy()] if isinstance(entry, Atoms) else read_all([entry], n))]


def _claim(folder: Path, source: Source) -> None:
    """A folder belongs to one potential."""
    about = folder / "about.json"
    facts = {"name": source.name, "fingerprint": source.fingerprint, "ours": source.ours}
    if about.exists():
        before = json.loads(about.read_text())
        if before.get("fingerprint") != source.fingerprint:
            raise ValueError(
                f"'{folder}' holds the judgement of another potential called '{source.name}'. Give this one a name (name=...), or use another --out."
            )
        return
    write_json(about, {**facts, "machine": machine(), "versions": versions(), "date": date.today().isoformat()})


def _run(name: str, candidate: Candidate, options: JudgeOptions, folder: Path) -> Result:
    """The result of one check, from its file if it was asked in the same way before."""
    check = CHECKS[name]
    key = _key(name, candidate, options)
    path = folder / f"{name}.json"
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["key"] == key and stored["result"]["status"] != "skipped":
            return Result.from_dict(stored["result"])
    candidate.folder = folder / f"{name}-{key}"
    log.info("%s: %s", candidate.name, check.title)
    began = time.perf_counter()
    if not getattr(candidate, check.needs):
        result = skipped(f"Nothing to judge it on: no {check.needs} that fit the potential's elements. Give --{check.needs} FILE.")
    else:
        try:
            result = check.run(candidate)
        except (KeyboardInterrupt, InputError, FileNotFoundError):
            raise
        except Exception as error:  # a judged calculator may raise anything; the others still count
            log.exception("%s: %s", candidate.name, name)
            result = Result(
                "failed", f"The check ended with an error: {type(error).__name__}: {str(error)[:300]}", "It cannot be used for this."
            )
    result.seconds = round(time.perf_counter() - began, 2)
    write_json(path, {"key": key, "level": options.level, "result": result.to_dict(), "date": date.today().isoformat()})
    return result


def _key(name: str, candidate: Candidate, options: JudgeOptions) -> str:
    """What the answer of a check depends on, in eight letters."""
    digest = hashlib.sha256(f"{__version__} {options.level} {candidate.elements}".encode())
    for used in CHECKS[name].uses:
        if used in ("structures", "crystals", "systems"):
            found = getattr(candidate, used)
            for atoms in found.values() if isinstance(found, dict) else found:
                digest.update(str(atoms.info.get("temperature_K")).encode())
                for array in (atoms.numbers, atoms.positions.round(6), atoms.cell.array.round(6), atoms.pbc):
                    digest.update(np.ascontiguousarray(array).tobytes())
        elif used in (
            "data",
            "discovery",
            "discovery_table",
            "discovery_relaxed",
            "conductivity_crystals",
            "conductivity_reference",
            "diatomics_reference",
        ):
            file = getattr(options, used)
            digest.update(str(file and (Path(file).name, os.stat(file).st_size)).encode())
        else:
            digest.update(f"{used}={getattr(options, used)}".encode())
    return digest.hexdigest()[:8]


def write_summary(folder: Path) -> None:
    """judgement.json and report.html of every potential judged into a folder."""
    everyone = {}
    for about in sorted(folder.glob("*/about.json"), key=lambda p: p.stat().st_mtime):
        stored = {n: json.loads(p.read_text()) for n in CHECKS if (p := about.parent / f"{n}.json").exists()}
        everyone[about.parent.name] = {
            "about": json.loads(about.read_text()),
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
    write_page(folder / "report.html", everyone, {n: (c.title, c.question) for n, c in CHECKS.items()})


def combined(checks: dict[str, Any]) -> float | None:
    """CPS of Matbench Discovery, where F1, κ_SRME and RMSD were all measured."""
    values = {m["name"]: m["value"] for n in ("discovery", "conductivity") for m in checks.get(n, {}).get("metrics", [])}
    f1, srme, rmsd = values.get("F1, unique prototypes", values.get("F1")), values.get("κ_SRME"), values.get("RMSD of relaxed structures")
    return None if f1 is None or srme is None or rmsd is None else discovery.combined_score(f1, srme, rmsd)


def worst(statuses: Any) -> str:
    """The worst of several verdicts; "measured" if none was given."""
    return max(statuses, key=lambda s: ORDER[s], default="measured")


def machine() -> str:
    """Processor and cores, or the GPU where PyTorch is loaded and has one."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor() or platform.machine()}, {os.environ.get('OMP_NUM_THREADS', os.cpu_count())} threads"
    )


def versions() -> dict[str, str]:
    """Versions of what took part, as far as installed."""
    found = {"gossamer": __version__, "python": platform.python_version()}
    for name in ("ase", "numpy", "torch", "phonopy", "phono3py", "chgnet", "sevenn", "mace-torch", "orb-models", "tblite"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
