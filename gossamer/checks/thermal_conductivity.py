"""Lattice thermal conductivity through phono3py, and the errors of Matbench Discovery; any ASE calculator.

Protocol: Póta et al., arXiv:2408.00755 (phononDB, 103 binary crystals, 300 K); Wigner transport in the relaxation-time
approximation with isotope scattering.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixSymmetry
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from numpy.typing import NDArray

from gossamer.checks.candidate import Candidate
from gossamer.checks.phonons import forces_of, quiet, supercell_for, to_phonopy
from gossamer.checks.result import (
    InputError,
    Metric,
    NoQuestionError,
    Panel,
    Result,
    at_most,
    attempt,
    conclude,
    curve,
    measured,
    plain,
    skipped,
)
from gossamer.checks.scattering import isotope_linewidths, linewidths
from gossamer.data.atoms import read_frames
from gossamer.files import open_text, write_json

Array = NDArray[np.float64]
INSTALL = "This check needs phono3py and spglib: pip install 'gossamer[phonons]'."
DISPLACEMENT = 0.03
"""Å"""


def relax_symmetric(calculator: Any, atoms: Atoms, fmax: float = 1e-4, steps: int = 300) -> tuple[Atoms, bool, bool]:
    """Relaxed copy with its symmetry kept, whether it converged, and whether the space group is still the same (spglib, 1e-5)."""
    import spglib

    work = atoms.copy()
    work.calc = calculator
    work.set_constraint(FixSymmetry(work, symprec=1e-5, verbose=False))
    converged = FIRE(FrechetCellFilter(work), logfile=None).run(fmax=fmax, steps=steps)
    out = work.copy()
    out.set_constraint()
    out.calc = None

    def group(a: Atoms) -> int:
        found = spglib.get_symmetry_dataset((a.cell.array, a.get_scaled_positions(), a.numbers), symprec=1e-5)
        return 1 if found is None else int(found.number)

    return out, bool(converged), group(out) == group(atoms)


def conductivity(
    calculator: Any, atoms: Atoms, temperature: float = 300.0, displacement: float = DISPLACEMENT, bar: Any = iter, relax: bool = True
) -> dict[str, Any]:
    """Thermal conductivity of a crystal by phono3py.

    Args:
        calculator: ASE calculator.
        atoms: Conventional cell. ``atoms.info`` may hold "fc2_supercell", "fc3_supercell" (repeats or matrices),
            "primitive_matrix" and "q_mesh" (or "q_point_mesh"), as the phononDB set does; otherwise they are chosen (fc3 at least 9.5 Å, fc2 13 Å,
            a mesh of 9 points along the shortest axis).
        temperature: K.
        displacement: Å.
        bar: Wraps the list of supercells in a progress bar.
        relax: Relax first, with the symmetry kept.

    Returns:
        ``kappa`` (W/m/K, mean of the three directions; NaN if a frequency is imaginary or symmetry was lost), ``mode_kappa``
        (n_q, n_bands; weighted, sums to kappa times the sum of weights), ``weights``, ``frequencies`` (THz), ``converged``,
        ``same_symmetry``, ``imaginary``.

    Raises:
        NoQuestionError: several isotopes of one element, or what ``to_phonopy`` refuses.
    """
    from phono3py import Phono3py

    info = atoms.info
    if any(symbol[-1].isdigit() for symbol in to_phonopy(atoms).symbols):
        raise NoQuestionError(
            "Atoms of one element have several masses, which phono3py's symmetry would exchange. Give each element one mass."
        )
    cell, converged, same = relax_symmetric(calculator, atoms) if relax else (atoms.copy(), True, True)
    with quiet():
        solver = Phono3py(
            to_phonopy(cell),
            supercell_matrix=_matrix(info.get("fc3_supercell"), cell, 9.5),
            phonon_supercell_matrix=_matrix(info.get("fc2_supercell"), cell, 13.0),
            primitive_matrix=np.array(info["primitive_matrix"], dtype=float) if "primitive_matrix" in info else "auto",
            symprec=1e-5,
        )
    solver.mesh_numbers = np.array(info.get("q_mesh", info.get("q_point_mesh", [9, 9, 9])))
    solver.generate_fc2_displacements(distance=displacement)
    solver.phonon_forces = forces_of(calculator, solver.phonon_supercells_with_displacements, bar)
    solver.produce_fc2()
    solver.symmetrize_fc2()
    solver.init_phph_interaction(symmetrize_fc3q=False)
    solver.run_phonon_solver()
    frequencies = np.array(solver.get_phonon_data()[0])
    # the three acoustic modes at Γ are zero up to rounding
    lowest = float(min(frequencies[1:].min(), frequencies[0, 3:].min() if frequencies.shape[1] > 3 else 0.0, frequencies[0].min() + 1e-2))
    imaginary = lowest < 0
    out: dict[str, Any] = {
        "kappa": float("nan"),
        "converged": converged,
        "same_symmetry": same,
        "imaginary": imaginary,
        "lowest_frequency": lowest,
    }
    if imaginary or not same:
        return out
    solver.generate_displacements(distance=displacement)
    solver.forces = forces_of(calculator, solver.supercells_with_displacements, bar)
    solver.produce_fc3()
    solver.symmetrize_fc3()
    solver.symmetrize_fc2()
    solver.init_phph_interaction(symmetrize_fc3q=False)
    return {**out, **_read(transport(solver.phph_interaction, temperature))}


def transport(interaction: Any, temperature: float) -> Any:
    """phono3py's conductivity (Wigner, relaxation-time approximation, isotopes of natural abundance) with linewidths of `scattering`.

    Args:
        interaction: phono3py's, with force constants.
        temperature: K.
    """
    from phono3py.conductivity.factory import conductivity_calculator

    found = conductivity_calculator(interaction, np.array([temperature]), [None], method="SMM19-rta", is_isotope=True, boundary_mfp=1e6)
    found.gamma = linewidths(interaction, found.grid_points, temperature)[None, None]
    found.gamma_isotope = isotope_linewidths(interaction, found.grid_points)[None]
    found.run()
    return found


def _matrix(given: Any, cell: Atoms, length: float) -> Any:
    return np.diag(supercell_for(cell, length)) if given is None else (np.diag(given) if np.ndim(given) == 1 else np.array(given))


def _read(result: Any) -> dict[str, Any]:
    """Conductivity by mode: its own, plus its share (by heat capacity) of the coherences between it and other modes."""
    pairs = np.array(result.mode_kappa_matrix)[0, 0].real[..., :3].mean(axis=-1)  # (q, band, band): mean over xx, yy, zz
    capacity = np.array(result.mode_heat_capacities)[0]  # (q, band)
    total = capacity[:, :, None] + capacity[:, None, :]
    share = np.divide(2 * capacity[:, :, None], total, out=np.ones_like(total), where=total > 0)  # 1 on the diagonal
    mode = (pairs * share).sum(axis=2)
    weights = np.array(result.grid_weights, dtype=float)
    return {"kappa": float(mode.sum() / weights.sum()), "mode_kappa": mode, "weights": weights, "frequencies": np.array(result.frequencies)}


def relative_errors(predicted: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Errors of one crystal (Póta et al., Eq. 6-9): both lie between 0 and 2, and are 2 where there is no prediction.

        SRE  = 2 |κ - κ_ref| / (κ + κ_ref)
        SRME = 2 Σ_modes |κ_mode - κ_ref,mode| / Σ weights / (κ + κ_ref)

    Args:
        predicted: As from `conductivity`.
        reference: "kappa", "mode_kappa" and "weights" on the same q points.
    """
    kappa, true = predicted["kappa"], reference["kappa"]
    if not np.isfinite(kappa):
        return {"sre": 2.0, "srme": 2.0}
    sre = 2 * abs(kappa - true) / (kappa + true)
    mode, true_mode = np.asarray(predicted["mode_kappa"]), np.asarray(reference["mode_kappa"])
    if mode.shape != true_mode.shape:
        return {"sre": float(sre), "srme": 2.0}
    return {"sre": float(sre), "srme": float(2 * np.abs(mode - true_mode).sum() / np.sum(reference["weights"]) / (kappa + true))}


def read_references(path: Path | str) -> dict[str, dict[str, Any]]:
    """References by material id, from a JSON table of columns (mp_id or material_id, kappa_TOT_ave, mode_kappa_TOT_ave, weights), may be compressed."""
    with open_text(Path(path)) as file:
        table = json.load(file)
    try:
        return {
            identifier: {"kappa": float(np.ravel(table["kappa_TOT_ave"][row])[0]), "mode_kappa": _squeeze(table["mode_kappa_TOT_ave"][row]),
                         "weights": np.ravel(table["weights"][row])}
            for row, identifier in table["mp_id" if "mp_id" in table else "material_id"].items()
        }  # fmt: skip
    except (KeyError, TypeError) as error:
        raise InputError(
            f"'{path}' is not a table of conductivities: expected columns mp_id (or material_id), kappa_TOT_ave, mode_kappa_TOT_ave and weights ({error!r})."
        ) from None


def _squeeze(values: Any) -> Array:
    array = np.array(values, dtype=float)
    return array[0] if array.ndim == 3 else array


# --- verdict --------------------------------------------------------------------------------------------------------

HEAT = "Heat transport, and the anharmonic forces behind thermal expansion and phonon lifetimes, are off."


def check(candidate: Candidate) -> Result:
    """Every crystal of --conductivity-crystals, or the first crystal of the candidate; finished crystals are kept."""
    try:
        import phono3py  # noqa: F401
        import spglib  # noqa: F401
    except ImportError:
        return skipped(INSTALL)
    config = candidate.config
    crystals = (
        read_frames(config.conductivity_crystals)
        if config.conductivity_crystals
        else list(candidate.crystals.values())[: max(1, candidate.effort.n_crystals // 3)]
    )
    references = read_references(config.conductivity_reference) if config.conductivity_reference else {}
    if references:
        crystals = [c for c in crystals if identifier(c) in references]
    crystals = [c for c in crystals if set(c.symbols) <= set(candidate.elements)]
    if config.conductivity_count is not None:
        crystals = crystals[: config.conductivity_count]
    if not crystals:
        return skipped("None of the crystals is made of the potential's elements (and has a reference).")
    folder = candidate.folder / "conductivity"
    metrics: list[Metric] = []
    results: dict[str, dict[str, Any]] = {}
    for atoms in candidate.bar(crystals, "thermal conductivity"):
        name = str(atoms.info.get("name") or atoms.get_chemical_formula(empirical=True))
        key = identifier(atoms)
        path = folder / f"{key}.json"
        if not path.exists():
            found = attempt(f"{name}: κ", lambda a=atoms, p=path: _store(candidate, a, p), "failed")
            if not path.exists():
                metrics += found
                if found[0].status != "skipped":
                    results[key] = {"kappa": np.nan}  # it counts as no prediction
                continue
        result = {k: np.nan if v is None else v for k, v in json.loads(path.read_text("utf-8")).items()}
        results[key] = {**result, "name": name}
        if result["imaginary"] or not result["same_symmetry"]:
            why = (
                f"a frequency of {result['lowest_frequency']:.2g} THz is imaginary"
                if result["imaginary"]
                else "it lost its symmetry in relaxation"
            )
            metrics.append(Metric(f"{name}: κ at 300 K", None, "W/m/K", "failed", "a stable crystal", "", f"{name} has no κ: {why}", HEAT))
        else:
            metrics.append(measured(f"{name}: κ at 300 K", result["kappa"], "W/m/K"))
    panels = []
    scored = {k: relative_errors(r, references[k]) for k, r in results.items() if k in references}
    if scored:
        srme, sre = (float(np.mean([e[k] for e in scored.values()])) for k in ("srme", "sre"))
        metrics += [
            at_most("κ_SRME", srme, f"over {len(scored)} crystal{'s' * (len(scored) > 1)}", 0.5, 1.0, HEAT),
            at_most("κ_SRE", sre, f"over {len(scored)} crystal{'s' * (len(scored) > 1)}", 0.5, 1.0, HEAT),
        ]
        true = [references[k]["kappa"] for k in scored]
        span = [min(true), max(true)]
        panels.append(Panel("Thermal conductivity at 300 K", "reference, W/m/K", "predicted, W/m/K",
                            [curve(true, [results[k]["kappa"] for k in scored]), curve(span, span, "equal", reference=True)], log="xy", points=True))  # fmt: skip
    notes = [
        f"{len(results)} crystal{'s' * (len(results) != 1)}; displacements of {DISPLACEMENT} Å; without the non-analytical term of polar crystals."
    ]
    if unrelaxed := [str(r["name"]) for r in results.values() if r.get("converged") is False]:
        notes.append(f"Relaxed for 300 steps and still above 1e-4 eV/Å: {', '.join(unrelaxed)}.")
    return conclude(metrics, panels, notes,
                    "Thermal conductivities agree with the reference." if scored else "Conductivities are defined; there is no reference to compare with.")  # fmt: skip


def identifier(atoms: Atoms) -> str:
    """Its mp_id or material_id; else its name or formula with eight letters of its structure, so that polymorphs differ."""
    given = atoms.info.get("mp_id", atoms.info.get("material_id"))
    if given is not None:
        return str(given)
    digest = hashlib.sha256(
        b"".join(np.ascontiguousarray(a).tobytes() for a in (atoms.numbers, atoms.positions.round(6), atoms.cell.array.round(6)))
    )
    return f"{atoms.info.get('name') or atoms.get_chemical_formula(empirical=True)}-{digest.hexdigest()[:8]}"


def _store(candidate: Candidate, atoms: Atoms, path: Path) -> list[Metric]:
    result = conductivity(
        candidate.calculator, atoms, bar=lambda items: candidate.bar(items, f"supercells of {atoms.get_chemical_formula(empirical=True)}")
    )
    write_json(path, plain(result))
    return []
