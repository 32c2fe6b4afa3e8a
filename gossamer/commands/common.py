"""What commands share: options, labels, how answers are printed."""

from __future__ import annotations

import argparse
import json
import textwrap
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


def add_labels(parser: argparse.ArgumentParser, weighed: bool = False) -> None:
    """Options that say what labels are called in the data, and their units; ``label_config`` reads them.

    Args:
        parser: Of the command.
        weighed: It has a use for the weights of frames.
    """
    from gossamer.data.labels import LabelConfig
    from gossamer.flags import add_flags

    add_flags(
        parser.add_argument_group("labels", "names and units in the data"),
        LabelConfig,
        without=["extras", *([] if weighed else ["weight"])],
    )


def label_config(arguments: argparse.Namespace) -> Any:
    """The LabelConfig of the options that ``add_labels`` added."""
    from gossamer.data.labels import LabelConfig
    from gossamer.flags import from_flags

    return from_flags(LabelConfig, arguments)


def show(arguments: argparse.Namespace, answer: dict[str, Any]) -> None:
    """Print an answer: as JSON if asked for, else a line for each key, a dash where there is nothing."""
    if arguments.json:
        print(json.dumps(answer))
        return
    for key, value in answer.items():
        shown = value if not isinstance(value, float) else f"{value:.6f}" if key.endswith("energy_eV") else f"{value:.6g}"
        print(f"{key:36s} {'-' if value is None else shown}")


def print_errors(summary: dict[str, Any]) -> None:
    """Errors as a table for people."""
    from gossamer.evaluation import described

    print(textwrap.indent(described(summary), "  "))


def show_help(arguments: argparse.Namespace) -> int:
    """What a command says that was given no action."""
    arguments.parser.print_help()
    return 2
