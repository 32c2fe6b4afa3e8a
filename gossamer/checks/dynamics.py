"""Molecular dynamics under judgement: ensemble, stability, structure and diffusion beside a reference; any ASE calculator.

Protocols and definitions of "Forces are not enough" (Fu et al., TMLR 2023, arXiv:2210.07237); overlap of the radial
distribution as reported for Geodite (arXiv:2601.15492).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from ase import Atoms, units
from numpy.typing import NDArray

from gossamer.checks import liquids
from gossamer.checks.candidate import UNBOXED, Candidate, enlarged, molecule_in
from gossamer.checks.result import Curve, Metric, NoQuestionError, Panel, Result, at_least, at_most, attempt, conclude, curve, measured
from gossamer.checks.walks import PROTOCOLS, TEMPERATURE, Protocol, bonds_last, read_reference, read_trajectory, simulate, whole
from gossamer.files import InputError
from gossamer.simulation.guard import check_constraints, degrees_of_freedom, find_bonds

logging.getLogger("pymbar").setLevel(logging.ERROR)  # what physical_validation is built on advertises on import

Array = NDArray[np.float64]
BINS, R_MAX = 500, 6.0
SHORTEST_DISTRIBUTION = 20.0
"""thermostat times of kept trajectory below which the distribution of the kinetic energy is not judged: ten independent samples"""
SHORTEST_DIFFUSION = 2.0
"""ps of trajectory below which no diffusivity is given"""
FEWEST_FRAMES = 20
"""below which nothing but stability is judged, and no diffusivity of a reference given"""
ONE_FRAME = "a reference of one frame has no averages"


def kinetic_energy_deviation(log: dict[str, Array], n_freedom: int, temperature: float) -> tuple[float, float]:
    """How many standard errors mean and width of the kinetic energy are from the canonical ones, over the second half of the log.

    By the `physical_validation` package (Merz and Shirts, PLoS ONE 13, e0202764 (2018)), Eq. 7: a gamma distribution. Its errors, from
    resampling, are by chance far too small where samples are few: none counts as smaller than that of so many independent samples of the
    canonical ensemble.

    Args:
        log: Columns of log.csv, rows so far apart that they are independent.
        n_freedom: Degrees of freedom that share the heat.
        temperature: K.
    """
    import physical_validation
    from physical_validation.data import EnsembleData, ObservableData, SimulationData, SystemData, UnitData

    kinetic = (log["total_energy_eV"] - log["potential_energy_eV"]) / (units.kJ / units.mol)
    n = len(kinetic)
    run = SimulationData(
        units=UnitData.units("GROMACS"), ensemble=EnsembleData("NVT", natoms=n_freedom, volume=1.0, temperature=temperature),
        system=SystemData(natoms=n_freedom // 3 + 1, nconstraints=3 * (n_freedom // 3 + 1) - n_freedom, ndof_reduction_tra=0, ndof_reduction_rot=0),
        observables=ObservableData(kinetic_energy=kinetic[n // 2 :], potential_energy=log["potential_energy_eV"][n // 2 :], total_energy=log["total_energy_eV"][n // 2 :]),
    )  # fmt: skip
    mean, width = physical_validation.kinetic_energy.distribution(run, strict=False, verbosity=0, bootstrap_seed=1)  # type: ignore[misc]
    late = kinetic[n // 2 :] * units.kJ / units.mol / (units.kB * temperature)
    shape, m = n_freedom / 2, len(late)  # of the gamma distribution
    spread = np.sqrt(shape)
    error_of_width = spread / 2 * np.sqrt(2 / (m - 1) + 6 / (shape * m))
    expected = abs(late.mean() - shape) / (spread / np.sqrt(m)), abs(late.std(ddof=1) - spread) / error_of_width
    return min(float(mean), float(expected[0])), min(float(width), float(expected[1]))


def ensemble_deviation(first: dict[str, Array], second: dict[str, Array], temperatures: tuple[float, float], n_atoms: int) -> float:
    """Standard errors between the ratio of two canonical energy distributions and its Boltzmann factor (`physical_validation`, Eq. 4).

    Raises:
        NoQuestionError: they hardly overlap, as of too few independent energies.
    """
    import physical_validation
    from physical_validation.data import EnsembleData, ObservableData, SimulationData, UnitData
    from physical_validation.util.error import InputError as TooFew

    runs = []
    for log, temperature in zip((first, second), temperatures, strict=True):
        energy = log["potential_energy_eV"] / (units.kJ / units.mol)
        runs.append(
            SimulationData(
                units=UnitData.units("GROMACS"), ensemble=EnsembleData("NVT", natoms=n_atoms, volume=1.0, temperature=temperature),
                observables=ObservableData(potential_energy=energy[len(energy) // 2 :]),
            )
        )  # fmt: skip
    try:
        return float(np.max(physical_validation.ensemble.check(*runs, verbosity=0)))
    except TooFew as error:
        raise NoQuestionError(f"needs a longer run: {error.message.partition(chr(10))[0]}") from None


def vibrational_density(frames: Sequence[Atoms], interval: float) -> tuple[Array, Array]:
    """Spectrum of the mass-weighted velocities: wavenumbers (1/cm), and density normalised to 1. Args: interval in ps."""
    velocities = np.array([f.get_velocities() * np.sqrt(f.get_masses())[:, None] for f in frames])
    velocities -= velocities.mean(axis=0)
    window = np.hanning(len(velocities))[:, None, None]
    power = (np.abs(np.fft.rfft(velocities * window, axis=0)) ** 2).sum(axis=(1, 2))
    wavenumbers = np.fft.rfftfreq(len(velocities), interval * 1e-12) / 2.99792458e10
    return np.asarray(wavenumbers, dtype=np.float64), power / max(float(np.trapezoid(power, wavenumbers)), 1e-300)


# --- verdict --------------------------------------------------------------------------------------------------------

BROKE = "Simulations of this system end in nonsense; nothing after the break can be used."
WRONG_T = "Averages are not those of the ensemble that was asked for."
STRUCTURE = "The structure of the material in simulations is not that of the reference."
KINETICS = "Diffusion, conductivity and reaction rates come out wrong."


def check(candidate: Candidate) -> Result:
    """Each system at constant temperature; beside its reference trajectory where there is one."""
    metrics: list[Metric] = []
    panels: list[Panel] = []
    notes: list[str] = []
    for name, atoms in candidate.systems.items():
        reference = candidate.references.get(name)
        system = enlarged(atoms, candidate.effort.md_atoms) if candidate.builtin_systems else atoms
        protocol, picoseconds, why = asked(candidate, name, atoms)
        metrics += attempt(
            f"{name}: molecular dynamics",
            lambda n=name, a=system, p=protocol, t=picoseconds, w=why, r=reference: _system(candidate, n, a, p, t, w, r, panels, notes), "failed",
        )  # fmt: skip
    if candidate.builtin_systems and candidate.origin:
        notes.append(f"Structures: {candidate.origin}.")
    compared = any(m.consequence == STRUCTURE for m in metrics)
    return conclude(
        metrics,
        panels,
        notes,
        "Stable, at the temperature asked for" + (", with the structure of the reference." if compared else "."),
    )


def asked(candidate: Candidate, name: str, atoms: Atoms) -> tuple[Protocol, float, str]:
    """Protocol and length in ps of a system, and who says its temperature: the user, else the protocol that they named, else the structure.

    Raises:
        InputError: the structure's temperature_K is none.
    """
    config = candidate.config
    protocol = PROTOCOLS[config.protocol] if config.protocol else Protocol(yields=True)
    try:
        own = float(atoms.info.get(TEMPERATURE) or 0.0)
        if not 0 <= own < np.inf:
            raise ValueError
    except (TypeError, ValueError):
        raise InputError(f"{name}: {TEMPERATURE} is {atoms.info[TEMPERATURE]!r}, where K are expected. Correct or remove it.") from None
    if config.temperature:
        temperature, why = config.temperature, "as asked"
    elif own and protocol.yields:
        temperature, why = own, f"as its {TEMPERATURE} says"
    else:
        temperature, why = protocol.temperature, f"of the protocol {config.protocol}" if config.protocol else "by default"
    if own and own != temperature:
        why += f", not the {own:g} K of its {TEMPERATURE}"
    published = protocol.picoseconds if candidate.effort.md_ps >= 50 else None
    length = float(config.picoseconds or published or candidate.effort.md_ps)
    return replace(protocol, temperature=temperature, timestep=config.timestep or protocol.timestep), length, why


def _system(
    candidate: Candidate, name: str, atoms: Atoms, protocol: Protocol, picoseconds: float, why: str, reference: str | None,
    panels: list[Panel], notes: list[str],
) -> list[Metric]:  # fmt: skip
    try:
        check_constraints(atoms, protocol.ensemble)
    except ValueError as error:  # which says nothing of the potential
        raise InputError(f"{name}: {error}") from None
    known = read_reference(reference, atoms) if reference else None
    run = simulate(candidate, name, atoms, protocol, picoseconds)
    notes.append(
        f"{name}: {atoms.get_chemical_formula()}{' without its box' if atoms.info.get(UNBOXED) else ''}, {protocol.ensemble}, "
        f"{protocol.temperature:g} K ({why}), {protocol.timestep:g} fs, {picoseconds:g} ps. "
        f"Start: {run['prepared']}."
    )
    stable = run["time_ps"] if run["broken"] else picoseconds
    metrics = [at_least(f"{name}: time before it breaks", stable, "ps", picoseconds * (1 - 1e-9), picoseconds * (1 - 1e-9), BROKE)]
    if run["broken"]:
        metrics[0].status = "failed"  # at the very end, too
        metrics[0].reason += f" ({run['broken']})"
        if not (Path(run["folder"]) / "log.csv").exists():  # before its first frame
            return metrics
    frames, log = read_trajectory(run["folder"])
    times = log["time_fs"] / 1000
    if run["new_steps"]:  # those of a judgement that was cut took their time then
        metrics.append(measured(f"{name}: speed", run["seconds"] / run["new_steps"] * 1000, "ms/step", "low"))
    target = curve([times[0], times[-1]], [protocol.temperature] * 2, "target", reference=True)
    panels.append(Panel(f"Temperature, {name}", "time, ps", "K", [curve(times, log["temperature_K"]), target]))
    if run["broken"] or len(frames) < FEWEST_FRAMES:
        return metrics
    metrics += _ensemble(candidate, name, atoms, protocol, picoseconds, frames, log)
    kept = frames[len(frames) // 2 if protocol.skip <= 0 else min(int(protocol.skip / run["interval_ps"]), len(frames) // 2) :]
    alone = molecule_in(atoms) is not None  # in the box of a calculator that needs one
    compare, shown = (_molecule, whole) if alone else (_bulk if atoms.pbc.all() else _molecule, list)
    metrics += compare(name, shown(frames), shown(kept), run["interval_ps"], protocol, known and shown(known), panels, candidate)
    wavenumbers, density = vibrational_density(kept, run["interval_ps"])
    if wavenumbers[-1] > 800:  # frames too far apart fold the spectrum
        panels.append(
            Panel(
                f"Vibrational density of states, {name}",
                "1/cm",
                "density",
                [curve(wavenumbers, density)],
                x_limits=(0, min(4200.0, wavenumbers[-1])),
            )
        )
    grid = np.linspace(0, float(np.percentile([np.linalg.norm(f.get_forces(), axis=1) for f in kept], 99.5)) + 1e-6, 80)
    magnitudes = np.concatenate([np.linalg.norm(f.get_forces(), axis=1) for f in kept])
    symbols = np.concatenate([np.array(f.get_chemical_symbols()) for f in kept])
    middle = 0.5 * (grid[1:] + grid[:-1])
    panels.append(Panel(f"Force magnitudes, {name}", "eV/Å", "density",
                        [curve(middle, np.histogram(magnitudes[symbols == e], grid, density=True)[0], e) for e in sorted(set(symbols))]))  # fmt: skip
    return metrics


def _ensemble(
    candidate: Candidate, name: str, atoms: Atoms, protocol: Protocol, picoseconds: float, frames: list[Atoms], log: dict[str, Array]
) -> list[Metric]:
    if protocol.ensemble == "nve":
        return []
    freedom = degrees_of_freedom(frames[0], protocol.ensemble)  # which has the velocities that decide
    kinetic = 2 * (log["total_energy_eV"] - log["potential_energy_eV"]) / (freedom * units.kB)
    late = kinetic[len(kinetic) // 2 :]
    spacing = log["time_fs"][1] - log["time_fs"][0]
    independent = max(1.0, len(late) * spacing / (2 * protocol.thermostat_time))
    blocks = [b.mean() for b in np.array_split(late, 5)]
    # blocks of a short run are correlated: no error is smaller than that of a canonical ensemble of so many independent samples
    error = max(float(np.std(blocks, ddof=1) / np.sqrt(5)), protocol.temperature * np.sqrt(2 / freedom / min(independent, len(late))))
    off = abs(float(late.mean()) - protocol.temperature) / error
    metrics = [
        measured(f"{name}: mean temperature", float(late.mean()), "K"),
        at_most(f"{name}: temperature off by", off, "standard errors", 4.0, 8.0, WRONG_T),
    ]
    every = max(1, round(2 * protocol.thermostat_time / spacing))
    thin = {key: column[::-every][::-1] for key, column in log.items()}
    title = f"{name}: distribution of the kinetic energy"
    try:
        import physical_validation  # noqa: F401
    except ImportError:
        return [*metrics, Metric(title, None, "", "skipped", reason="needs physical_validation: pip install 'gossamer[judge]'")]
    if independent < SHORTEST_DISTRIBUTION / 2:
        metrics.append(
            Metric(title, None, "", "skipped", reason=f"needs {2 * SHORTEST_DISTRIBUTION * protocol.thermostat_time / 1000:g} ps")
        )
    else:
        mean, width = kinetic_energy_deviation(thin, freedom, protocol.temperature)
        metrics.append(at_most(f"{name}: kinetic energy, mean and width off by", max(mean, width), "standard errors", 4.0, 8.0, WRONG_T))
    if candidate.config.two_temperatures:
        warmer = replace(protocol, temperature=protocol.temperature * (1 + np.sqrt(2 / freedom)))
        second = simulate(candidate, name, atoms, warmer, picoseconds, "-warmer")
        temperatures, title = (protocol.temperature, warmer.temperature), f"{name}: Boltzmann factor between two temperatures off by"
        metrics += attempt(
            title,
            lambda: at_most(title, ensemble_deviation(log, read_trajectory(second["folder"])[1], temperatures, len(atoms)),
                            "standard errors", 4.0, 8.0, WRONG_T),
        )  # fmt: skip
    return metrics


def _bulk(
    name: str,
    frames: list[Atoms],
    kept: list[Atoms],
    interval: float,
    protocol: Protocol,
    known: list[Atoms] | None,
    panels: list[Panel],
    candidate: Candidate,
) -> list[Metric]:
    metrics: list[Metric] = []
    elements = sorted(set(frames[0].get_chemical_symbols()))
    pairs = [None, *itertools.combinations_with_replacement(elements, 2)] if len(elements) > 1 else [None]
    thin = kept[:: max(1, len(kept) // 200)]
    for pair in pairs:
        label = "all pairs" if pair is None else "-".join(pair)
        bins = BINS if pair is None else 200
        r, g = liquids.rdf(thin, R_MAX, bins, pair)
        curves: list[Curve] = [curve(r, g)]
        if known:
            theirs_thin = known[:: max(1, len(known) // 200)]
            _, true = liquids.rdf(theirs_thin, R_MAX, bins, pair)
            curves.append(curve(r, true, "reference", reference=True))
        if known and len(known) > 1:
            overlap = liquids.rdf_overlap(g, true)
            chance = sum(liquids.rdf_noise(part, R_MAX, bins, pair) for part in (thin, theirs_thin))
            metrics.append(at_least(f"{name}: overlap of g(r), {label}", overlap, "", 0.93 - chance, 0.8 - chance, STRUCTURE))
            if pair is None:
                ours, theirs_noise = (_by_chance(part, lambda f: liquids.rdf(f, R_MAX, BINS)[1], R_MAX) for part in (thin, theirs_thin))
                noise = ours + theirs_noise
                metrics.append(
                    at_most(f"{name}: error of g(r), {label}", liquids.rdf_error(g, true, R_MAX), "Å", 0.3 + noise, 1.0 + noise, STRUCTURE)
                )
                window, threshold = min(protocol.window, len(frames) * interval / 2), 1.0 + min(theirs_noise, 1.0)
                broke = liquids.stability_time(frames, true, interval, window, threshold, R_MAX, most_noise=1.0)
                total = len(frames) * interval
                metrics.append(
                    at_least(f"{name}: time before g(r) leaves the reference", broke, "ps", 0.999 * total, 0.999 * total, STRUCTURE)
                )
        elif known and pair is None:
            metrics.append(Metric(f"{name}: error of g(r), {label}", None, "Å", "skipped", reason=ONE_FRAME))
        panels.append(Panel(f"g(r), {label}, {name}", "r, Å", "g(r)", curves))
    positions, masses = liquids.unwrapped_positions(kept), kept[0].get_masses()
    chosen = _diffusing(kept[0], protocol)
    msd = liquids.mean_squared_displacement(positions, masses, chosen)
    displacements = [_thinned(msd, interval)]
    theirs_interval = candidate.config.reference_interval
    if known and theirs_interval:  # whose atoms may be more, and in another order
        theirs = liquids.unwrapped_positions(known), known[0].get_masses(), _diffusing(known[0], protocol)
        true = liquids.mean_squared_displacement(*theirs)
        displacements.append(_thinned(true, theirs_interval, len(msd) * interval, "reference"))
    panels.append(Panel(f"Mean squared displacement, {name}", "time, ps", "Å²", displacements))
    if len(kept) * interval < SHORTEST_DIFFUSION:
        return metrics
    mean, error = liquids.diffusivity_blocks(positions, masses, chosen, interval)
    who = protocol.species or "all atoms"
    metrics += [measured(f"{name}: diffusivity of {who}", mean, "1e-9 m²/s"), measured(f"{name}: its standard error", error, "1e-9 m²/s"),
                measured(f"{name}: diffusivity by the end of the window", liquids.diffusivity(msd, interval), "1e-9 m²/s")]  # fmt: skip
    if known and theirs_interval and len(known) >= FEWEST_FRAMES and len(known) * theirs_interval >= SHORTEST_DIFFUSION:
        target, target_error = liquids.diffusivity_blocks(*theirs, theirs_interval)
        allowed = 2 * float(np.hypot(error, target_error))
        metrics.append(
            at_most(
                f"{name}: diffusivity off by",
                abs(mean - target),
                "1e-9 m²/s",
                0.25 * abs(target) + allowed,
                abs(target) + allowed,
                KINETICS,
            )
        )
    return metrics


def _by_chance(frames: Sequence[Atoms], distribution: Callable[[Sequence[Atoms]], Array], length: float) -> float:
    """How far a distribution over frames is from the true one by chance: half as far as those of their halves are from each other."""
    first, second = (distribution(part) for part in (frames[: len(frames) // 2], frames[len(frames) // 2 :]))
    return float(np.abs(first - second).mean() * length) / 2


def _diffusing(atoms: Atoms, protocol: Protocol) -> NDArray[np.bool_]:
    """Which atoms are of the protocol's species; all, if none is."""
    chosen = np.array([protocol.species in (None, s) for s in atoms.get_chemical_symbols()])
    return chosen if chosen.any() else np.ones_like(chosen)


def _thinned(msd: Array, interval: float, longest: float = np.inf, label: str = "") -> Curve:
    """A curve of at most about 300 points, up to ``longest`` ps."""
    times = np.arange(len(msd)) * interval
    every = max(1, len(msd) // 300)
    kept = times <= longest
    return curve(times[kept][::every], msd[kept][::every], label, reference=bool(label))


def _molecule(
    name: str,
    frames: list[Atoms],
    kept: list[Atoms],
    interval: float,
    protocol: Protocol,
    known: list[Atoms] | None,
    panels: list[Panel],
    candidate: Candidate,
) -> list[Metric]:
    r, h = liquids.distance_distribution(kept)
    curves = [curve(r, h)]
    metrics = []
    if bonds_last(frames[0]):
        total = len(frames) * interval
        intact = liquids.bond_stability_time(frames, find_bonds(frames[0]), interval)
        metrics.append(at_least(f"{name}: time before a bond changes by 0.5 Å", intact, "ps", 0.999 * total, 0.999 * total, BROKE))
    if known:
        _, true = liquids.distance_distribution(known)
        curves.append(curve(r, true, "reference", reference=True))
        title = f"{name}: error of h(r)"
        if len(known) > 1:
            noise = sum(_by_chance(part, lambda f: liquids.distance_distribution(f)[1], 10.0) for part in (kept, known))
            metrics.append(at_most(title, float(np.abs(h - true).mean() * 10.0), "", 0.15 + noise, 0.6 + noise, STRUCTURE))
        else:
            metrics.append(Metric(title, None, "", "skipped", reason=ONE_FRAME))
    panels.append(Panel(f"Interatomic distances h(r), {name}", "r, Å", "1/Å", curves))
    return metrics
