"""`gossamer screen`: run (which may be left out), show, export, hull."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

ACTIONS = ("run", "show", "export", "hull")


def spelled_out(argv: Sequence[str]) -> list[str]:
    """`gossamer screen FILES ...` is `gossamer screen run FILES ...`."""
    if len(argv) > 1 and argv[0] == "screen" and argv[1] not in (*ACTIONS, "-h", "--help"):
        return ["screen", "run", *argv[1:]]
    return list(argv)


def add_options(screen: argparse.ArgumentParser) -> None:
    """Options of all actions."""
    actions = screen.add_subparsers(dest="action", metavar="ACTION")
    screen.set_defaults(parser=screen)
    for name, add, run, text in (
        (
            "run",
            _run_options,
            _run,
            "One task on every frame of structure files. The word run may be left out: gossamer screen FILES --model MODEL.",
        ),
        ("show", _show_options, _show, "Results as a table."),
        ("export", _export_options, _export, "Results as parquet, CSV, JSON or extended XYZ."),
        ("hull", _hull_options, _hull, "Energies above the convex hull of reference structures, into the results."),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.set_defaults(run=run)
        add(action)
        action.add_argument("--json", action="store_true", help="print the answer as JSON")


def _run_options(run: argparse.ArgumentParser) -> None:
    from gossamer.flags import add_flags
    from gossamer.screening.config import ScreenConfig

    run.add_argument("structures", nargs="+", help="structure files; every frame is screened")
    run.add_argument("--model", metavar="POTENTIAL", help="saved potential")
    run.add_argument("--calculator", metavar="MODULE:FACTORY", help="in its place any ASE calculator, as gossamer judge takes them")
    run.add_argument(
        "--machine", metavar="FILE", help="YAML file that says where to run: this machine or Slurm (docs/screening.md; default: here)"
    )
    run.add_argument("--workers", type=int, help="processes on each node (default: as the machine's file says, or one for each core)")
    run.add_argument("--export", metavar="FILE", help="at the end also write the results as .parquet, .csv, .json or .extxyz")
    add_flags(run, ScreenConfig)


def _show_options(show: argparse.ArgumentParser) -> None:
    from gossamer.screening.database import STATUSES

    show.add_argument("results", help="file of results")
    show.add_argument("--sort", metavar="COLUMN", help="such as energy_per_atom, energy_above_hull, max_force, bulk_modulus, seconds")
    show.add_argument("--descending", action="store_true", help="largest first")
    show.add_argument("--top", type=int, help="only the first so many")
    show.add_argument("--status", choices=STATUSES, help="only these")


def _export_options(export: argparse.ArgumentParser) -> None:
    export.add_argument("results", help="file of results")
    export.add_argument("out", help="file to write: .parquet (needs pyarrow), .csv, .json or .extxyz (structures with energies)")


def _hull_options(hull: argparse.ArgumentParser) -> None:
    hull.add_argument("results", help="file of results")
    hull.add_argument("reference", help="structures with energies of the same method, or results of a screening by the same potential")


def _run(arguments: argparse.Namespace) -> int:
    from gossamer.flags import from_flags
    from gossamer.screening.config import ScreenConfig
    from gossamer.screening.database import check_export, export
    from gossamer.screening.screen import REPEATED, pace, screen
    from gossamer.signals import STOPPED

    if arguments.export:
        check_export(arguments.export, arguments.structures)
    answer = screen(arguments.structures, arguments.model, arguments.calculator, arguments.machine, arguments.workers,
                    config=from_flags(ScreenConfig, arguments))  # fmt: skip
    if arguments.export and not answer["stopped"]:
        export(answer["out"], arguments.export)
    if arguments.json:
        print(json.dumps(answer))
    else:
        statuses = ", ".join(f"{n} {status}" for status, n in answer["statuses"].items())
        print(f"{_structures(answer['done'])} in {answer['seconds']:.3g} s, {pace(answer['per_second'])}"
              + (f"; {answer['done_before']} were there before" if answer["done_before"] else ""))  # fmt: skip
        print(f"'{answer['out']}': {statuses or 'nothing yet'}")
        if answer["stopped"]:
            print(f"stopped by {answer['stopped']}; the same command goes on")
    return STOPPED if answer["stopped"] else int(any(answer["statuses"].get(status) for status in REPEATED))


def _show(arguments: argparse.Namespace) -> int:
    from gossamer.screening.database import Results

    with Results(arguments.results) as results:
        rows = results.rows(arguments.sort, arguments.top, arguments.descending, arguments.status)
        counts = results.counts()
    if arguments.json:
        print(json.dumps(rows))
        return 0
    print(table(rows, arguments.sort))
    print(", ".join(f"{n} {status}" for status, n in counts.items()) or "nothing yet")
    return 0


def table(rows: Sequence[dict[str, Any]], sort: str | None = None) -> str:
    """Rows for people: the columns that say something, with units; reasons at the end."""
    from gossamer.screening.database import UNITS

    shown = ["source", "frame", "formula", "status", "energy_per_atom", "energy_above_hull", "max_force", "steps"]
    hidden = {*shown, "id", "n_atoms", "energy", "volume", "seconds", "structure", "potential", "finished", "reason", "stress"}
    further = dict.fromkeys(k for r in rows for k, v in r.items() if k not in hidden and not isinstance(v, list | dict))
    names = [
        n for n in dict.fromkeys([*shown, *([sort] if sort else []), *further, "reason"]) if any(r.get(n) not in (None, "") for r in rows)
    ]
    lines = [names, [UNITS.get(n, "") for n in names], *([_cell(r.get(n)) for n in names] for r in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(names))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _structures(n: int) -> str:
    return f"{n} structure{'s' * (n != 1)}"


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _export(arguments: argparse.Namespace) -> int:
    from gossamer.screening.database import export

    answer = {"structures": export(arguments.results, arguments.out), "out": arguments.out}
    print(json.dumps(answer) if arguments.json else f"{_structures(answer['structures'])} in '{answer['out']}'")
    return 0


def _hull(arguments: argparse.Namespace) -> int:
    from gossamer.screening.hull import add_hull

    answer = add_hull(arguments.results, arguments.reference)
    print(json.dumps(answer) if arguments.json else f"{_structures(answer['placed'])} placed above a hull of {answer['references']} reference{'s' * (answer['references'] != 1)}; "
          f"not placed, as elements of theirs are in none of these, or without an energy: {answer['not_placed']}")  # fmt: skip
    return 0
