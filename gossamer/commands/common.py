"""What commands share: options, labels, how answers are printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple


class Command(NamedTuple):
    """One command of the command line."""

    name: str
    add_options: Callable[[argparse.ArgumentParser], None]
    """adds its options to its parser, importing nothing heavy"""
    run: Callable[[argparse.Namespace], int]
    """does it; returns the exit status"""
    text: str
    """what it does, in a sentence"""


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that every command has."""
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def add_way(parser: argparse.ArgumentParser) -> None:
    """The option --way, of commands that evaluate."""
    parser.add_argument("--way", choices=["auto", "plain", "kernels", "program", "graph"], default="auto",
                        help="how our potentials are evaluated (default: auto)")  # fmt: skip


def add_labels(parser: argparse.ArgumentParser) -> None:
    """Options that say what labels are called in the data, and their units; ``label_config`` reads them."""
    from gossamer.data.labels import LabelConfig
    from gossamer.flags import add_flags

    add_flags(parser.add_argument_group("labels", "names and units in the data"), LabelConfig, without=["extras"])


def label_config(arguments: argparse.Namespace) -> Any:
    """The LabelConfig of the options that ``add_labels`` added."""
    from gossamer.data.labels import LabelConfig
    from gossamer.flags import from_flags

    return from_flags(LabelConfig, arguments)


def show(arguments: argparse.Namespace, answer: dict[str, Any]) -> None:
    """Print an answer: as JSON if asked for, else a line for each key."""
    if arguments.json:
        print(json.dumps(answer))
        return
    for key, value in answer.items():
        shown = value if not isinstance(value, float) else f"{value:.6f}" if key.endswith("energy_eV") else f"{value:.6g}"
        print(f"{key:36s} {shown}")


def print_errors(summary: dict[str, Any]) -> None:
    """Errors as a table for people."""
    from gossamer.quantities import QUANTITIES

    print(f"  {summary['n_frames']} frames{'' if summary['conservative_forces'] else '; forces are NOT the gradient of the energy'}")
    print(f"  {'':16s}{'MAE':>10s}{'RMSE':>10s}")
    for label, quantity in QUANTITIES.items():
        mae, rmse = (summary.get(f"{label}_{kind}_{quantity.error_key}") for kind in ("mae", "rmse"))
        if mae is not None:
            print(f"  {label:16s} {mae:9.3f} {rmse:9.3f}  {quantity.error_unit}")
    for label, worth in summary.get("uncertainty", {}).items():
        if worth["ratio"] is not None:
            rank = "" if worth["rank"] is None else f", rank correlation {worth['rank']:.2f}"
            print(f"  {label + ' uncertainty':22s}errors are {worth['ratio']:.2f} times what was expected{rank}")
    if "energy_offset" in summary:
        offset = summary["energy_offset"]
        print(
            f"  energies lie {offset['mean_meV_per_atom']:+.6g} meV/atom from the labels on average: another functional, code or zero of energy?"
        )
        print(f"  without a constant per element the MAE is {offset['mae_without_meV_per_atom']:.4g} meV/atom")
    of_elements = summary["forces_per_element_meV_per_A"]
    worst = sorted(of_elements, key=lambda element: -of_elements[element]["mae"])[:8]  # the rest is in the JSON
    for element, errors in of_elements.items():
        if element in worst:
            print(f"  {'forces on ' + element:16s}{errors['mae']:10.3f}{errors['rmse']:10.3f}  meV/Å")
    if len(of_elements) > len(worst):
        print(f"  (the {len(worst)} elements with the largest errors of forces, of {len(of_elements)})")


def show_help(arguments: argparse.Namespace) -> int:
    """What a command says that was given no action."""
    arguments.parser.print_help()
    return 2
