"""What workers do: a block of structures in, a row for each out. Whatever happens to one structure stays with it."""

from __future__ import annotations

import io
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.singlepoint import SinglePointCalculator
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE

from gossamer.arguments import as_path, said
from gossamer.checks.source import Source, find_sources
from gossamer.screening.config import FMAX, ScreenConfig
from gossamer.screening.database import Row
from gossamer.screening.limited import answer_in_time
from gossamer.screening.structures import check_structure

log = logging.getLogger(__name__)
Block = Sequence[tuple[str, Atoms]]
"""ids and structures"""
CHECKS = ("symmetry", "conservation", "smoothness")
"""of the judge, on each structure (task judge)"""
EVALUATIONS = {"relax": 60, "elastic": 200, "phonons": 150, "judge": 1500, "single-point": 1}
"""of a typical structure: decides whether compiling the potential pays"""


@dataclass(frozen=True)
class Asked:
    """A question in full, as it travels to the workers."""

    model: str | None
    """file of a saved potential"""
    calculator: str | None
    """module:factory, in its place"""
    fingerprint: str
    task: str
    engine: str
    """ase or torchsim"""
    fmax: float | None
    steps: int | None
    cell: bool
    device: str
    dtype: str | None
    way: str
    dispersion: str | None = None
    n_expected: int = 1
    """structures that a worker will see, about"""
    time_limit: float | None = None
    """s that one structure may take"""

    @property
    def together(self) -> bool:
        """Whether a block is computed at once."""
        return self.engine == "torchsim" or (self.task == "single-point" and self.model is not None)

    @property
    def source(self) -> Source:
        """The potential.

        Raises:
            ValueError: the file is not the potential that was asked for.
        """
        models, calculators = [self.model] if self.model else [], [self.calculator] if self.calculator else []
        (found,) = find_sources(models, calculators, self.device, self.dtype, self.way, self.dispersion)
        if found.fingerprint != self.fingerprint:
            raise ValueError(
                f"'{self.model or self.calculator}' is not the potential that the screening began with: it has changed meanwhile."
            )
        return found


def make_question(model: Path | str | None, calculator: str | None, config: ScreenConfig) -> Asked:
    """What is asked, with the potential's fingerprint, and "auto" replaced by the engine that it is.

    Raises:
        TypeError: something in memory, which workers do not have.
        ValueError: no potential or two, an engine that cannot do the task, or options without effect.
        FileNotFoundError: no such potential.
    """
    if (model is None) == (calculator is None):
        raise ValueError("Give a saved potential (--model FILE), or --calculator module:factory; one of them.")
    if model is not None:
        model = as_path("model", model, "the file of a potential, which every worker reads (gossamer.save writes one)").resolve()
    elif not isinstance(calculator, str):
        raise TypeError(f"calculator: expected module:factory, by which every worker makes its own, found {said(calculator)}.")
    _check_options(config, calculator is not None)
    model = None if model is None else str(model)
    models, calculators = [f"model={model}"] if model else [], [calculator] if calculator else []
    (source,) = find_sources(models, calculators, config.device, config.dtype, config.way, config.dispersion)
    fits = config.task == "relax" and model is not None
    if config.engine == "torchsim" and not fits:
        raise ValueError("engine torchsim relaxes (--task relax), with a saved potential (--model). Choose --engine ase.")
    question = config.question()
    if config.engine == "auto":
        question["engine"] = "torchsim" if fits and config.way != "graph" and find_spec("torch_sim") is not None else "ase"
    if source.unverified:
        log.warning("%s", source.unverified)
    if question["cell"] and source.conservative is False:
        raise ValueError("Relaxing the cell needs stress, which a potential with direct forces does not have.")
    return Asked(model, calculator, source.fingerprint, **question, time_limit=config.time_limit)


def _check_options(config: ScreenConfig, foreign: bool) -> None:
    """Refuse options that the task would ignore, or a calculator that is not of a saved potential."""
    usual = ScreenConfig()
    still = () if config.task in FMAX else ("fmax", "steps", "cell")
    for names, why in (
        (still, f"task {config.task} relaxes nothing"),
        (("device", "dtype", "way") if foreign else (), "a calculator runs as it was made (module:factory(key=value))"),
    ):
        for name in names:
            if getattr(config, name) != getattr(usual, name):
                raise ValueError(f"{name} {getattr(config, name)} has no effect: {why}. Leave it out.")


def stored_question(asked: Asked) -> dict[str, Any]:
    """What must be the same when a screening goes on: all but where the potential lies, and how answers are got."""
    return {k: v for k, v in asdict(asked).items() if k not in ("model", "n_expected", "time_limit")}


def run_block(asked: Asked, block: Block) -> list[Row]:
    """Rows of a block, in its order; the potential is loaded once in a process.

    Raises:
        Died: a process with a time limit ended by itself.
        Exception: the potential cannot be had. Nothing else that concerns one structure is raised.
    """
    if asked.time_limit is not None:
        return answer_in_time(asked, [block] if asked.together else [[one] for one in block], asked.time_limit)
    get_ready(asked, block)
    return answer(asked, block)


def answer(asked: Asked, block: Block) -> list[Row]:
    """Rows of a block, in its order."""
    rows: dict[str, Row] = {}
    sound: list[tuple[str, Atoms]] = []
    for name, atoms in block:
        try:
            check_structure(atoms)
            _can_be_asked(asked, atoms)
            sound.append((name, atoms))
        except Exception as error:
            rows[name] = _failed(name, atoms, error)
    if asked.together:
        rows |= _together(asked, sound)
    else:
        for name, atoms in sound:
            rows[name] = _alone(name, atoms, lambda a: TASKS[asked.task](_calculator(asked), a, asked))
    return [rows[name] for name, _ in block]


def _can_be_asked(asked: Asked, atoms: Atoms) -> None:
    if asked.cell and not atoms.pbc.all():
        raise ValueError(f"Relaxing the cell needs periodicity along all axes, found pbc {atoms.pbc.tolist()}.")
    if atoms.constraints and (asked.engine == "torchsim" or asked.task in ("elastic", "phonons")):
        raise ValueError("Constraints are known to task relax on ASE only: --engine ase, or remove them.")


@lru_cache(maxsize=1)
def _calculator(asked: Asked) -> Any:
    return asked.source.make()


@lru_cache(maxsize=1)
def _torchsim_model(asked: Asked) -> Any:
    from gossamer.simulation.torchsim import TorchSimModel

    return TorchSimModel(
        _calculator(asked).potential,
        asked.way,  # type: ignore[arg-type]
        compute_stress=asked.cell,
        dispersion=asked.dispersion,
    )


_told: Asked | None = None
"""the question for which this process has said how much comes: once, or a moment in which the machine is busy would make compiling look worth it"""


def get_ready(asked: Asked, block: Block) -> None:
    """Compile a potential of ours where that pays; load any, so that one that cannot be had ends the screening and not every structure."""
    global _told
    calculator = _calculator(asked)
    if asked.engine == "torchsim":
        _torchsim_model(asked)
    elif asked.model and not asked.together and _told != asked:
        each = EVALUATIONS[asked.task]
        for _, atoms in block:
            try:
                check_structure(atoms)
                calculator.expect(asked.n_expected * (min(each, asked.steps) if asked.task == "relax" and asked.steps else each), atoms)
                _told = asked
                return
            except ValueError:  # unsound, or of unknown elements: another one, then
                continue


# --- rows -----------------------------------------------------------------------------------------------------------


def _failed(name: str, atoms: Atoms, error: BaseException | str, seconds: float | None = None) -> Row:
    text = error if isinstance(error, str) else " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, str | ValueError | ArithmeticError):
        text = f"{type(error).__name__}: {text}"
    return Row(name, "failed", text[:500], atoms.get_chemical_formula(), len(atoms), seconds=seconds)


def timed_out(name: str, atoms: Atoms, seconds: float) -> Row:
    """The row of a structure whose process was ended."""
    return replace(_failed(name, atoms, f"took longer than {seconds:g} s (--time-limit)", seconds), status="timed out")


def _alone(name: str, atoms: Atoms, work: Callable[[Atoms], Row]) -> Row:
    """One structure; an error is a row."""
    began = time.perf_counter()
    try:
        row = work(atoms)
        row.id = name
    except Exception as error:  # a calculator may raise anything; the others still count
        row = _failed(name, atoms, error)
    row.seconds = time.perf_counter() - began
    return row


def _row(atoms: Atoms, status: str, reason: str = "", steps: int | None = None, **numbers: Any) -> Row:
    """Of atoms with a calculator; the largest force is of those that may move, and fixed ones keep theirs in the structure."""
    energy, forces, free = float(atoms.get_potential_energy()), atoms.get_forces(apply_constraint=False), atoms.get_forces()
    if not (np.isfinite(energy) and np.isfinite(forces).all()):
        raise ValueError("Energy or forces are not finite.")
    try:
        stress = atoms.get_stress(voigt=True).tolist() if atoms.pbc.all() else None
    except (PropertyNotImplementedError, NotImplementedError):
        stress = None
    return Row(
        "", status, reason, atoms.get_chemical_formula(), len(atoms), energy, float(np.linalg.norm(free, axis=1).max()), stress,
        float(atoms.get_volume()) if atoms.pbc.all() else None, steps, structure=_text(atoms, energy, forces, stress), numbers=numbers,
    )  # fmt: skip


def _text(atoms: Atoms, energy: float, forces: Any, stress: Any) -> str:
    """Extended XYZ."""
    copy = atoms.copy()
    copy.calc = SinglePointCalculator(copy, energy=energy, forces=forces, **({} if stress is None else {"stress": np.array(stress)}))
    text = io.StringIO()
    ase.io.write(text, copy, format="extxyz")
    return text.getvalue()


# --- one after the other ----------------------------------------------------------------------------------------------


def _with(calculator: Any, atoms: Atoms, asked: Asked) -> Atoms:
    """A copy with the calculator; ours keeps nothing of the structure before, not even the order of neighbours: no answer hangs on it."""
    if asked.model:
        calculator.reset()
        calculator.neighbors.builds = 0
    work = atoms.copy()
    work.calc = calculator
    return work


def _minimised(calculator: Any, atoms: Atoms, asked: Asked) -> tuple[Atoms, bool, int]:
    """Relaxed copy with the calculator, whether it converged, and steps."""
    work = _with(calculator, atoms, asked)
    algorithm = FIRE(FrechetCellFilter(work) if asked.cell else work, logfile=None)
    converged = algorithm.run(fmax=asked.fmax, steps=asked.steps)
    return work, bool(converged), algorithm.nsteps


def _single_point(calculator: Any, atoms: Atoms, asked: Asked) -> Row:
    return _row(_with(calculator, atoms, asked), "done")


def _relax(calculator: Any, atoms: Atoms, asked: Asked) -> Row:
    work, converged, steps = _minimised(calculator, atoms, asked)
    return _row(work, *_said(converged, asked), steps)


def _said(converged: bool, asked: Asked) -> tuple[str, str]:
    """Status and reason."""
    return ("converged", "") if converged else ("not converged", f"forces above {asked.fmax} eV/Å after {asked.steps} steps")


def _elastic(calculator: Any, atoms: Atoms, asked: Asked) -> Row:
    """Elastic constants by the judge's check; of a structure that relaxed."""
    from gossamer.checks.crystals import Unrelaxed, elastic_constants, softest, voigt_averages

    work, converged, steps = _minimised(calculator, atoms, asked)
    row = _row(work, *_said(converged, asked), steps)
    if converged:
        try:
            stiffness = elastic_constants(calculator, work)
            row.numbers = {"softest": softest(stiffness), "stiffness": stiffness.tolist()}
            bulk, shear = voigt_averages(stiffness)
            row.numbers |= {"bulk_modulus": bulk, "shear_modulus": shear}
        except Unrelaxed as error:
            row.status, row.reason = "not converged", str(error)
        except ValueError as error:  # no averages
            row.reason = str(error)
    return row


def _phonons(calculator: Any, atoms: Atoms, asked: Asked) -> Row:
    """Lowest and highest frequency and heat capacity by the judge's check; of a structure that relaxed."""
    from gossamer.checks.phonons import make_phonons, mesh_frequencies, quiet

    work, converged, steps = _minimised(calculator, atoms, asked)
    row = _row(work, *_said(converged, asked), steps)
    if converged:
        phonons = make_phonons(calculator, work)
        phonons.symmetrize_force_constants()
        frequencies, _ = mesh_frequencies(phonons)
        with quiet():
            phonons.run_thermal_properties(t_min=300, t_max=300, t_step=1)
        heat = float(phonons.thermal_properties.heat_capacity[0]) / len(phonons.primitive)
        row.numbers = {"lowest_frequency": float(frequencies.min()), "highest_frequency": float(frequencies.max()), "heat_capacity": heat}
    return row


def _judge(calculator: Any, atoms: Atoms, asked: Asked) -> Row:
    """The potential on this structure: verdicts and reasons of the judge's checks."""
    from gossamer.checks.candidate import Candidate
    from gossamer.checks.judge import CHECKS as JUDGE
    from gossamer.checks.judge import worst

    source = asked.source
    row = _single_point(calculator, atoms, asked)
    with tempfile.TemporaryDirectory() as folder:
        candidate = Candidate(source.name, source.make, sorted(set(atoms.get_chemical_symbols())), [atoms], {}, {}, Path(folder),
                              conservative=source.conservative, cutoff=source.cutoff, progress=False, ours=source.ours, _calculator=calculator)  # fmt: skip
        results = {name: JUDGE[name].run(candidate) for name in CHECKS}
    row.numbers = {"verdict": worst(r.status for r in results.values()), **{name: r.status for name, r in results.items()}}
    row.reason = " ".join(r.reason for r in results.values() if r.status in ("failed", "weak"))[:500]
    return row


TASKS: dict[str, Callable[[Any, Atoms, Asked], Row]] = {
    "single-point": _single_point, "relax": _relax, "elastic": _elastic, "phonons": _phonons, "judge": _judge,
}  # fmt: skip


# --- a block at once --------------------------------------------------------------------------------------------------


def _together(asked: Asked, block: Block) -> dict[str, Row]:
    """Structures of a block at once, and each alone where that fails."""
    calculator = _calculator(asked)
    rows: dict[str, Row] = {}
    known: list[tuple[str, Atoms]] = []
    for name, atoms in block:
        try:
            calculator.potential.check_elements(atoms.numbers)
        except ValueError as error:
            rows[name] = _failed(name, atoms, error)
            continue
        if asked.task == "relax" and not _torchsim_knows(atoms):
            rows[name] = _alone(name, atoms, lambda a: _relax(calculator, a, asked))
            continue
        known.append((name, atoms))
    work = _relax_batch if asked.task == "relax" else _evaluate_batch
    began = time.perf_counter()
    try:
        found = work(asked, [atoms for _, atoms in known])
        each = (time.perf_counter() - began) / max(1, len(known))
        for (name, _), row in zip(known, found, strict=True):
            row.id, row.seconds = name, each
            rows[name] = row
    except Exception:
        for name, atoms in known:
            rows[name] = _alone(name, atoms, lambda a: work(asked, [a])[0])
    return rows


def _torchsim_knows(atoms: Atoms) -> bool:
    """Whether this TorchSim has structures that are periodic as this one is."""
    from gossamer.simulation.torchsim import check_axes

    try:
        check_axes(atoms)
    except ValueError:
        return False
    return True


def _relax_batch(asked: Asked, structures: Sequence[Atoms]) -> list[Row]:
    from gossamer.simulation.batched import relax_together
    from gossamer.simulation.options import RelaxConfig

    config = RelaxConfig(fmax=asked.fmax, steps=asked.steps, cell=asked.cell)  # type: ignore[arg-type]
    rows = []
    for given, (atoms, answer) in zip(structures, relax_together(_torchsim_model(asked), structures, config), strict=True):
        error = answer.get("error")
        rows.append(_failed("", given, error) if error else _row(atoms, *_said(answer["converged"], asked), answer["steps"]))
    return rows


def _evaluate_batch(asked: Asked, structures: Sequence[Atoms]) -> list[Row]:
    """Energies and forces of many at once; a structure whose answer is not finite fails alone."""
    from ase.stress import full_3x3_to_voigt_6_stress

    calculator = _calculator(asked)
    rows = []
    for given, found in zip(structures, calculator.potential.predict(list(structures), run=calculator.engine), strict=True):
        atoms = given.copy()
        stress = {} if found["stress"] is None else {"stress": full_3x3_to_voigt_6_stress(found["stress"])}
        atoms.calc = SinglePointCalculator(atoms, energy=found["energy"], forces=found["forces"], **stress)
        rows.append(_alone("", atoms, lambda a: _row(a, "done")))
    return rows
