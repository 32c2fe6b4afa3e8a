"""The command line: the parser of all commands, what errors say, and exit statuses. The commands are in ``commands``."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from gossamer import __version__
from gossamer.commands import data, judge, potential, run, train
from gossamer.commands.common import Command
from gossamer.files import explain
from gossamer.screening import command as screening
from gossamer.signals import STOPPED, Stopped


class UsageError(Exception):
    """The command line cannot be parsed; the message begins with how the command is used."""


class _Parser(argparse.ArgumentParser):
    _mixing = False

    def error(self, message: str) -> NoReturn:
        """Raise where argparse would leave the program, so that ``main`` can answer in JSON."""
        raise UsageError(f"{self.format_usage()}{self.prog}: {message}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse here, where options are known, what argparse would refuse at the top, naming neither command nor options.

        Of a command, arguments of one list may stand before and after its options: ``train config.yaml --resume training.steps=5``.
        """
        if self._mixing:  # argparse's own method for that comes back here
            return super().parse_known_args(args, namespace)
        if self._subparsers is not None:
            found, left = super().parse_known_args(args, namespace)
        else:
            self._mixing = True
            try:
                found, left = super().parse_known_intermixed_args(args, namespace)
            finally:
                self._mixing = False
        if left:
            near = [get_close_matches(word.partition("=")[0], self._option_string_actions, 1) for word in left if word.startswith("-")]
            meant = ", ".join(name for names in near for name in names)
            hint = f". Did you mean {meant}?" if meant else ""
            if all(os.path.exists(word) for word in left):
                hint = ". One file or folder is taken here: put several files into a folder and give that"
            self.error(f"unrecognized arguments: {' '.join(left)}{hint}")
        return found, left


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status.

    0 done; 1 the answer is no (bad data, a broken run, a failed check, not converged); 2 wrong use or a file that cannot be read or
    written; 130 interrupted (SIGINT); 143 training, a simulation or a relaxation was stopped by SIGTERM, its state saved. With --json an
    error is JSON on standard output too: {"error": ..., "command": ..., "status": ...}.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # Å and Γ are no reason to end, where a terminal or a log does not have them
    argv = screening.spelled_out(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    try:
        arguments = parser.parse_args(argv)
    except UsageError as error:
        print(error, file=sys.stderr)
        return _failed(argv, argv[0] if argv else None, str(error).splitlines()[-1], 2)
    if arguments.command is None:
        parser.print_help()
        return 2
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("torch_sim").setLevel(logging.WARNING)  # 0.6 tells of every batch
    try:
        return int(arguments.run(arguments))
    except BrokenPipeError:  # whoever read the output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Stopped as error:
        message, status = str(error), STOPPED
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        message = explain(error) if isinstance(error, OSError) else str(error)
        status = 2
    except KeyboardInterrupt:
        again = " with --resume" if "resume" in vars(arguments) else ""
        message = "interrupted" + (f". The same command{again} goes on." if again or arguments.command == "screen" else "")
        status = 130
    print(f"gossamer {arguments.command}: {message}", file=sys.stderr)
    return _failed(argv, arguments.command, message, status)


def _failed(argv: Sequence[str], command: str | None, message: str, status: int) -> int:
    """Say as JSON what went wrong, if JSON was asked for; returns the status."""
    if "--json" in argv:
        print(json.dumps({"error": message, "command": command, "status": status}))
    return status


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options; importing nothing heavy."""
    parser = _Parser(prog="gossamer", description="Train, judge and run lightweight equivariant interatomic potentials.")
    parser.add_argument("--version", action="version", version=f"gossamer {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        options = commands.add_parser(command.name, help=command.text, description=command.text)
        options.set_defaults(run=command.run)
        command.add_options(options)
    return parser


def _completion_parser(completion: argparse.ArgumentParser) -> None:
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="for example: gossamer completion bash >> ~/.bash_completion")


def _completion(arguments: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise ImportError("Completion is written by the package shtab: pip install 'gossamer[completion]'") from None
    print(shtab.complete(build_parser(), arguments.shell))
    return 0


COMMANDS = [*train.COMMANDS, *judge.COMMANDS, *run.COMMANDS, *potential.COMMANDS, *data.COMMANDS,
            Command("completion", _completion_parser, _completion, "Completion of commands and options for your shell.")]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
