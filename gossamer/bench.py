"""Time and memory of energy and forces against the number of atoms, for our potentials and any ASE calculator.

Every candidate runs in a process of its own, one after the other, so that memory is its own and a crash ends only it.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from ase import Atoms

from gossamer.arguments import FILES, as_path, listed
from gossamer.checks.candidate import (
    builtin_crystals,
    builtin_molecules,
    enlarged,
    rattled,
)
from gossamer.checks.source import named_path, parse_calculator, refuse_options, supported_elements
from gossamer.checks.speed import growth_exponent, memory, time_evaluation
from gossamer.data.atoms import as_atoms
from gossamer.files import atomic_path, say_replaced, write_json, write_text
from gossamer.machine import machine, versions
from gossamer.processes import without_script
from gossamer.timing import cpu_seconds, fastest

log = logging.getLogger(__name__)


def bench(
    models: Sequence[Path | str] | Path | str = (),
    calculator: Sequence[str] | str = (),
    structure: Atoms | Path | str | None = None,
    sizes: Sequence[int] = (100, 300, 1000, 3000, 10_000, 30_000, 100_000),
    seconds: float = 10.0,
    threads: int | None = None,
    way: Literal["auto", "plain", "kernels", "program", "graph"] = "auto",
    device: str = "cpu",
    dtype: str | None = None,
    out: Path | str = "bench",
) -> list[dict[str, Any]]:
    """Time potentials over system sizes; writes bench.json, bench.md and bench.png.

    Args:
        models: Saved potentials, ``PATH`` or ``NAME=PATH``.
        calculator: Any ASE calculators, ``[NAME=]MODULE:FACTORY``, as `gossamer judge` takes them.
        structure: Atoms, or a file whose first frame they are, repeated up to each size (a molecule stays one); by default a structure kept in the first
            potential's file, else a simple crystal or molecule.
        sizes: Numbers of atoms, at least; the next size is left out when an evaluation would take longer than ``seconds``.
        seconds: Longest single evaluation.
        threads: Of PyTorch and OpenMP; by default as they find. With ``threads=1`` on a CPU the CPU time of all candidates is taken, otherwise the wall time
            of all.
        way: How our potentials are evaluated (`gossamer.engine.engine`).
        device: Of our potentials.
        dtype: "float32" or "float64" of our potentials; by default as saved.
        out: Folder; files of a bench before are replaced.

    Returns:
        For each candidate ``name``, ``rows`` (one for each size), ``growth`` (power n of time ~ atoms^n), ``stopped`` (why no larger
        size) and, for our potentials, ``way`` (what ran; of each size in its row, and in the table) and ``parameters``.

    Raises:
        ValueError: nothing to time, two of one name, or settings that cannot be.
    """
    candidates: list[dict[str, Any]] = []
    models = listed("models", models, FILES, "files of potentials, which are read in a process of their own")
    calculator = listed("calculator", calculator, (str,), "module:factory, which makes it in a process of its own")
    for text in models:
        name, path = named_path(str(text))
        candidates.append({"name": name, "model": path})
    for text in calculator:
        candidates.append({"name": parse_calculator(text)[0], "calculator": text})
    names = [c["name"] for c in candidates]
    if not candidates or len(set(names)) < len(names):
        raise ValueError(
            "There is nothing to time: give a potential or a calculator."
            if not candidates
            else f"Two candidates have one name: {names}. Write NAME=..."
        )
    if not models:
        refuse_options(device, dtype, way)
    for c in candidates:
        if "model" in c and not Path(c["model"]).exists():
            raise FileNotFoundError(f"There is no potential '{c['model']}'.")
    if not (list(sizes) and min(sizes) > 0 and seconds > 0 and (threads is None or threads > 0)):
        raise ValueError(f"sizes, seconds and threads must be positive, found {list(sizes)}, {seconds} and {threads}.")
    atoms = as_atoms(structure) if structure is not None else None
    if atoms is not None:
        atoms.calc = None
    folder = as_path("out", out, "the name of a folder")
    say_replaced(*(folder / name for name in ("bench.json", "bench.md", "bench.png")))
    records = []
    for c in candidates:
        job = {
            **c,
            "sizes": sorted(set(sizes)),
            "seconds": seconds,
            "threads": threads,
            "cpu_time": threads == 1 and (device == "cpu" or not models),
            "way": way,
            "device": device,
            "dtype": dtype,
            "atoms": atoms,
        }
        record = _in_own_process(job)
        if atoms is None and record.get("atoms") is not None:
            atoms = record["atoms"]  # the same for all that follow
        records.append({k: v for k, v in record.items() if k != "atoms"})
        write_summary(records, folder)
    return records


# --- one candidate ---------------------------------------------------------------------------------------------------


def _in_own_process(job: dict[str, Any]) -> dict[str, Any]:
    """Run ``measure`` in a fresh process; what it had measured survives its death."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    before = os.environ.get("OMP_NUM_THREADS")
    if job["threads"]:
        os.environ["OMP_NUM_THREADS"] = str(job["threads"])
    process = context.Process(target=_child, args=(job, sender))
    with without_script():
        process.start()
    if job["threads"]:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
    sender.close()
    record: dict[str, Any] = {"name": job["name"], "rows": [], "stopped": "", "growth": None}
    error: BaseException | None = None
    try:
        while True:
            kind, value = receiver.recv()
            if kind == "row":
                record["rows"].append(value)
                log.info("%s: %d atoms, %.3g ms", job["name"], value["atoms"], value["ms"])
            elif kind == "error":
                error = value
            else:
                record.update(value)
    except EOFError:
        pass
    process.join()
    if error is not None:
        record["stopped"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    elif process.exitcode:
        record["stopped"] = f"the process died at the next size (exit {process.exitcode}; out of memory?)"
    rows = record["rows"]
    for row in rows if "ceilings" in record else []:
        row["floor_ms"] = floor(row, record["ceilings"])
        row["times_floor"] = row["network_ms"] / row["floor_ms"]
    slow = [r for r in rows if r["ms"] > 20]
    if len(slow) > 2:
        record["growth"] = growth_exponent([r["atoms"] for r in slow], [r["ms"] for r in slow])
    return record


def _child(job: dict[str, Any], pipe: Any) -> None:
    try:
        measure(job, lambda kind, value: pipe.send((kind, value)))
    except Exception as error:
        try:
            pipe.send(("error", error))
        except Exception:  # an error that cannot be sent as it is
            pipe.send(("error", RuntimeError(str(error))))
    finally:
        pipe.close()


def measure(job: dict[str, Any], report: Callable[[str, dict[str, Any]], None]) -> None:
    """Time one candidate over the sizes; facts and every row are reported as soon as they are known, as an error or a crash may follow."""
    own = "model" in job
    potential: Any = None
    if own:
        import torch

        from gossamer.potential_file import load, stored_structures

        if job["threads"]:
            torch.set_num_threads(job["threads"])
        potential = load(job["model"], job["device"], job["dtype"])
        elements = list(potential.statistics.elements)
        stored = stored_structures(job["model"])
    else:
        _, make = parse_calculator(job["calculator"])
        foreign, stored = make(), []
        elements = [] if job["atoms"] is not None else supported_elements(foreign)
    atoms = job["atoms"]
    if atoms is None:
        atoms = stored[0].to_ase() if stored else default_structure(elements)
        atoms.calc = None
    clock = cpu_seconds if job["cpu_time"] else time.perf_counter
    facts = {
        "atoms": atoms, "system": atoms.get_chemical_formula(empirical=True), "clock": "CPU time, one thread" if job["cpu_time"] else "wall time",
        "machine": machine(potential.device if own else None), "date": datetime.date.today().isoformat(), "versions": versions(_packages(job)),
    }  # fmt: skip
    report("facts", {**facts, "parameters": potential.num_parameters} if own else facts)
    try:
        stopped = _over_sizes(job, atoms, potential if own else foreign, clock, report)
    finally:
        if own:  # last, as their arrays would count as memory of the potential
            with contextlib.suppress(RuntimeError, MemoryError):  # where memory is full there are no floors
                report("facts", {"ceilings": ceilings(potential)})
    report("facts", {"stopped": stopped})


def _over_sizes(
    job: dict[str, Any], atoms: Atoms, candidate: Any, clock: Callable[[], float], report: Callable[[str, dict[str, Any]], None]
) -> str:
    """Report a row for each size; returns why there is no larger one. The candidate is a potential of ours, or a calculator."""
    last = 0
    previous: dict[str, Any] | None = None
    for size in job["sizes"]:
        system = rattled(enlarged(atoms, size), 0.02)
        if len(system) == last and not atoms.pbc.all():
            return "one molecule"
        if len(system) == last:  # a large cell serves several of the sizes asked for
            continue
        if previous is not None and previous["ms"] / 1000 * len(system) / last > job["seconds"]:
            return f"{len(system)} atoms would take more than {job['seconds']:g} s"
        last = len(system)
        calculator = candidate
        if "model" in job:
            from gossamer.simulation.calculator import Calculator

            calculator = Calculator(candidate, way=job["way"])
        row = time_one(calculator, system, clock, job["seconds"])
        if "model" in job:
            row.update(details(calculator, system, clock), way=calculator.engine.way)
            report("facts", {"way": row["way"]})
        report("row", row)
        previous = row
    return "the largest size asked for"


def default_structure(elements: Sequence[str]) -> Atoms:
    """A simple crystal of these elements, or a molecule."""
    found = {**builtin_crystals(elements, 1), **builtin_molecules(elements, 1)}
    if not found:
        raise ValueError(f"No simple crystal or molecule of {', '.join(elements)} is known here: give --structure.")
    return next(iter(found.values()))


def time_one(calculator: Any, atoms: Atoms, clock: Callable[[], float], seconds: float) -> dict[str, Any]:
    """Energy and forces as molecular dynamics asks for them, neighbour list as the calculator keeps it."""
    used = memory()
    before = used()
    taken = time_evaluation(calculator, atoms, 7, seconds, clock)
    return {
        "atoms": len(atoms),
        "ms": 1000 * taken,
        "us_per_atom": 1e6 * taken / len(atoms),
        "memory_MB": used(),
        "grown_MB": used() - before,
    }


def details(calculator: Any, atoms: Atoms, clock: Callable[[], float]) -> dict[str, Any]:
    """What only our own calculators tell: pairs, the network and the neighbour list alone, the least work."""
    from gossamer.neighbors import neighbor_list

    graph = calculator.graph(atoms)
    network = fastest(lambda: calculator.engine(graph, bool(atoms.pbc.all())), 7, 2.0, clock)
    whole = fastest(lambda: neighbor_list(atoms.positions, atoms.cell.array, atoms.pbc, calculator.potential.cutoff), 3, 2.0, clock)
    return {
        "edges": graph.n_edges,
        "network_ms": 1000 * network,
        "new_list_ms": 1000 * whole,
        **least_work(calculator.engine, graph),
    }


# --- the floor -------------------------------------------------------------------------------------------------------


def ceilings(potential: Any) -> dict[str, float]:
    """What this machine reaches here and now: multiply-adds per second of a matrix product, bytes per second of a copy."""
    import torch

    device, dtype = potential.device, potential.dtype
    n, length = (2048, 2**28) if device.type == "cuda" else (768, 2**25)
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    source = torch.empty(length, dtype=torch.float32, device=device).fill_(1.0)
    target = torch.empty_like(source)

    return {"macs": n**3 / fastest(lambda: torch.mm(a, b), 8), "bytes": 8 * length / fastest(lambda: target.copy_(source), 8)}


def floor(work: dict[str, Any], ceiling: dict[str, float]) -> float:
    """Least time of energy and forces in ms: the larger of arithmetic over its ceiling and bytes over theirs."""
    return 1000 * max(work["multiply_adds"] / ceiling["macs"], work["bytes"] / ceiling["bytes"])


class _Everywhere(contextlib.nullcontext[None]):
    """In the place of PyTorch's account of which module is at work: only the sum is asked for."""

    parents = ("Global",)


def least_work(engine: Any, graph: Any) -> dict[str, float]:
    """Multiply-adds and bytes of energy and forces that no program is without.

    Arithmetic: matrix products as PyTorch counts them, and the kernels' own. Where a network has kernels, radial networks
    are tables and do not count. Bytes: weights once; features and sums of each kernel, and their gradients, once; of each edge
    its indices, harmonics and distance with their gradients. What lies between two matrix products is taken to stay in the cache, so
    that no program can be faster; for a network without kernels only the edges' own values count (channels in and out of each layer).
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from gossamer.engine.kernels import polynomial
    from gossamer.engine.kernels.attach import AttentionKernel, FixedPolynomial, TableKernel, attach_kernels
    from gossamer.engine.kernels.cpu import Missing, operations
    from gossamer.nn.attention import Attention

    potential = engine.quick
    if potential is None:
        potential = engine.potential
        with contextlib.suppress(Missing):
            potential = attach_kernels(potential)
    counter: Any = FlopCounterMode(display=False)
    counter.mod_tracker = _Everywhere()  # PyTorch's own puts hooks on modules, with which the forces of plain networks are refused
    with counter:
        potential(graph, stress=False, isolated=potential.isolated_outputs())
    macs = counter.get_total_flops() / 2
    size = torch.finfo(potential.dtype).bits // 8
    layers = [m for m in potential.modules() if isinstance(m, TableKernel)]
    moved = size * potential.num_parameters
    for layer in layers:
        c = layer.convolution
        macs += operations(c) * graph.n_edges
        moved += 2 * size * graph.n_atoms * (c.width_in + c.width_out) + graph.n_edges * (2 * 16 + 4 * size * (c.n_harmonics + 1))
    for contraction in (m for m in potential.modules() if isinstance(m, FixedPolynomial)):
        monomials, channels = contraction.monomials, contraction.kept.shape[2]
        macs += polynomial.operations(monomials) * graph.n_atoms * channels
        moved += 2 * size * graph.n_atoms * (monomials.n_in + monomials.n_out) * channels
    moved += 4 * size * graph.n_edges * sum(m.channels for m in potential.modules() if isinstance(m, Attention | AttentionKernel))
    return {"multiply_adds": float(macs), "bytes": float(moved)}


# --- what came of it --------------------------------------------------------------------------------------------------


def _packages(job: dict[str, Any]) -> list[str]:
    """Packages whose versions matter: PyTorch, ASE and that of a foreign calculator."""
    return ["torch", "ase", *([job["calculator"].partition(":")[0].rpartition("=")[2].split(".")[0]] if "calculator" in job else [])]


def table(records: Sequence[dict[str, Any]]) -> str:
    """All candidates and sizes as a Markdown table."""
    head = [
        "candidate",
        "atoms",
        "pairs",
        "ms/step",
        "µs/atom/step",
        "network, ms",
        "new list, ms",
        "floor, ms",
        "times floor",
        "memory, MB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]

    def cell(row: dict[str, Any], key: str, form: str = ".3g") -> str:
        value = row.get(key)
        return "" if value is None else format(value, form)

    for record in records:
        for row in record["rows"]:
            cells = [
                f"{record['name']}{' (' + row['way'] + ')' if 'way' in row else ''}", f"{row['atoms']:,}", cell(row, "edges", ","), cell(row, "ms"),
                cell(row, "us_per_atom"), cell(row, "network_ms"), cell(row, "new_list_ms"), cell(row, "floor_ms"), cell(row, "times_floor", ".1f"),
                cell(row, "memory_MB", ".0f"),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_summary(records: Sequence[dict[str, Any]], folder: Path) -> None:
    write_json(folder / "bench.json", list(records))
    notes = []
    for r in records:
        growth = "" if r["growth"] is None else f"; time grows as atoms^{r['growth']:.2f}"
        versions = ", ".join(f"{k} {v}" for k, v in r.get("versions", {}).items())
        notes.append(
            f"- {r['name']}: {r.get('system', '')}, {r.get('clock', '')}, {r.get('machine', '')}, {r.get('date', '')}, {versions}. Ended: {r['stopped']}{growth}."
        )
    write_text(folder / "bench.md", table(records) + "\n" + "\n".join(notes) + "\n")
    if any(r["rows"] for r in records):
        plot(records, folder / "bench.png")
    else:
        (folder / "bench.png").unlink(missing_ok=True)  # of a bench before


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Time per atom and memory against the number of atoms; the floor of our potentials dotted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    drawn: list[Any] = []
    for k, record in enumerate(records):
        rows = record["rows"]
        if not rows:
            continue
        atoms = [r["atoms"] for r in rows]
        style: dict[str, Any] = {"color": f"C{k % 10}", "marker": "o", "markersize": 4, "linewidth": 1.4}
        drawn += axes[0].plot(atoms, [r["us_per_atom"] for r in rows], **style)
        axes[1].plot(atoms, [r["memory_MB"] for r in rows], **style)
        if all("floor_ms" in r for r in rows):
            floors = [1000 * r["floor_ms"] / r["atoms"] for r in rows]
            axes[0].plot(atoms, floors, color=f"C{k % 10}", linestyle=":", linewidth=1.2)
    for axis, label in zip(axes, ("energy and forces (µs/atom), dotted: floor", "memory of the process (MB)"), strict=True):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        low, high = axis.dataLim.intervaly
        if high > 8 * low:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_ylim(0, 1.1 * high)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_xlabel("atoms")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    # told which is which: from labels it would leave out those that begin with "_"
    axes[0].legend(drawn, [r["name"] for r in records if r["rows"]], frameon=False, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
