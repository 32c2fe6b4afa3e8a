"""Command-line flags from settings classes: name, kind, choices and help of each come from the field."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gossamer.settings import build, describe

T = TypeVar("T")


def add_flags(parser: Any, cls: type, without: Sequence[str] = ()) -> None:
    """One command-line flag for each field of a settings class; name, kind, choices and help come from the field.

    Args:
        parser: argparse's parser or group.
        cls: Settings class whose fields are numbers, text, paths, switches, one of several words, or lists and tuples of these.
        without: Fields that get no flag.

    Raises:
        TypeError: a field that no flag can say.
    """
    hints = get_type_hints(cls)
    for name, default, text in describe(cls):
        if name in without:
            continue
        kind = next(t for t in _alternatives(hints[name]) if t is not type(None))
        options: dict[str, Any] = {"default": None, "help": _flag_help(text, default), **_flag_kind(cls, name, kind, default)}
        parser.add_argument("--" + name.replace("_", "-"), dest=name, **options)


def _flag_kind(cls: type, name: str, kind: Any, default: Any) -> dict[str, Any]:
    """What argparse needs to know of the kind of a field."""
    if kind is bool:  # a switch that is off needs no flag to switch it off
        return {"action": argparse.BooleanOptionalAction if default is not False else "store_true"}
    if get_origin(kind) in (list, tuple):
        members = get_args(kind)
        fixed = get_origin(kind) is tuple and Ellipsis not in members
        return {**_flag_kind(cls, name.removesuffix("s"), members[0], ...), "nargs": len(members) if fixed else "+"}
    if get_origin(kind) is Literal:
        return {"choices": list(get_args(kind)), "type": type(get_args(kind)[0])}
    if kind not in (int, float, str, Path):
        raise TypeError(f"{cls.__name__}.{name} is a {kind}: there is no flag for it. Leave it out (without), or make it simpler.")
    return {"type": kind, "metavar": name.upper() if kind is str else kind.__name__.upper()}


def from_flags(cls: type[T], arguments: Any, **others: Any) -> T:
    """Settings from parsed flags; what was not given keeps its default.

    Args:
        cls: Settings class.
        arguments: Namespace of argparse.
        others: Fields that got no flag.

    Raises:
        ValueError: as ``build``.
    """
    given = vars(arguments)
    values = {f.name: given.get(f.name) for f in fields(cls)}  # type: ignore[arg-type]
    return build(cls, {**{k: v for k, v in values.items() if v is not None}, **others})


def _alternatives(hint: Any) -> list[Any]:
    """Members of a union, without what Annotated adds."""
    if get_origin(hint) in (Union, UnionType):
        return [k for option in get_args(hint) for k in _alternatives(option)]
    return [hint]


def _flag_help(text: str, default: Any) -> str:
    text = " ".join(text.replace("``", "").split()).replace("%", "%%")
    if default is False or default in (..., None, []) or "by default" in text:
        return text
    shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
    return f"{text.rstrip('.')} (default: {shown})"
