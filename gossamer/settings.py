"""Settings as frozen dataclasses: unknown keys are refused, and the string under a field is its documentation."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from gossamer.arguments import at_home

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only pydantic dataclass that refuses unknown keys, bad types, and numbers that are not finite."""
    config = pydantic.ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, strict=False, allow_inf_nan=False
    )  # fmt: skip
    return pydantic_dataclass(cls, frozen=True, kw_only=True, config=config)  # type: ignore[call-overload,no-any-return,return-value]


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Make a settings object from nested dictionaries, with errors a person can act on.

    Texts such as 1e5, which YAML reads as such, are numbers where only numbers will do, and ~/ is the home folder.

    Raises:
        ValueError: an unknown setting (with the nearest known name), or a value of the wrong type or range.
    """
    try:
        return pydantic.TypeAdapter(cls).validate_python(_read([cls], dict(values), where))
    except pydantic.ValidationError as error:
        lines: dict[str, str] = {}
        for item in error.errors():
            path, message = _explain(cls, where, item)
            lines[path] = f"{lines[path][:-1]}; or {message}" if path in lines else f"{path}: {message}"
        raise ValueError("\n".join(lines.values())) from None


NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
"""as people write numbers, which YAML takes for texts"""


def _read(kinds: Sequence[Any], value: Any, path: str) -> Any:
    """A value with numbers where it has texts such as 1e5 and only numbers will do, and with the home folder where it has ~/.

    Args:
        kinds: What it may be: types, of which nested settings and containers say what is in them.
        value: As given.
        path: Of the setting.

    Raises:
        ValueError: true or false where a number is expected, for which Python would take them.
    """
    kinds = [k for kind in kinds for k in (get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind])]
    numbers = any(k in (int, float) for k in kinds)
    if isinstance(value, str):
        return float(value) if numbers and NUMBER.fullmatch(value) and not any(k in (str, Path, Any) for k in kinds) else at_home(value)
    if str in kinds and type(value).__name__ == "device":  # PyTorch's, which is not imported here
        return str(value)
    if isinstance(value, bool) and numbers and not any(k in (bool, Any) for k in kinds):
        raise ValueError(f"{path}: found {str(value).lower()}, expected a number.")
    if isinstance(value, Mapping):
        tables = [k for k in kinds if get_origin(k) in (dict, Mapping)]
        if tables:
            return {key: _read([get_args(k)[1] for k in tables], v, f"{path}.{key}") for key, v in value.items()}
        classes = {k: get_type_hints(k) for k in kinds if is_dataclass(k)}
        named = {k: hints for k, hints in classes.items() if value.get("name") in get_args(hints.get("name"))}
        hints = named or classes
        return {key: _read([h[key] for h in hints.values() if key in h], v, f"{path}.{key}".strip(".")) for key, v in value.items()}
    if isinstance(value, list | tuple):
        several = [get_args(k) for k in kinds if get_origin(k) in (list, tuple, Sequence)]
        members = [k for arguments in several for k in arguments if k is not Ellipsis]
        return type(value)(_read(members, v, f"{path}.{n}") for n, v in enumerate(value)) if members else value
    return at_home(value)


def _explain(cls: type, where: str, item: Any) -> tuple[str, str]:
    """Path of a setting, and what is wrong with it."""
    known = dict(leaves(cls))
    names = {part for path in known for part in path.split(".")}
    unknown = item["type"] in ("unexpected_keyword_argument", "extra_forbidden")
    # pydantic puts the tags of unions into the path; only names and list positions are the user's
    parts = [str(p) for p in item["loc"] if isinstance(p, int) or p in names or (unknown and p == item["loc"][-1])]
    path = ".".join([where, *parts]).strip(".")
    if unknown:
        prefix = ".".join([where, *parts[:-1]]).strip(".")
        siblings = sorted({f"{where}.{k}".strip(".") for k in known if f"{where}.{k}".strip(".").startswith(prefix)})
        near = difflib.get_close_matches(path, {*siblings, *(s.partition(".")[0] for s in siblings if "." not in path)}, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else f" Known settings: {', '.join(siblings)}."
        return path, f"unknown setting.{hint}"
    if item["type"] == "union_tag_invalid":  # which of several settings classes
        key, tag = item["ctx"]["discriminator"].strip("'"), item["ctx"]["tag"]
        expected = [t.strip(" '") for t in item["ctx"]["expected_tags"].split(",")]
        near = difflib.get_close_matches(tag, expected, n=1, cutoff=0.5)
        return f"{path}.{key}", f"found {tag!r}, expected one of {', '.join(expected)}." + (f" Did you mean {near[0]}?" if near else "")
    if item["type"] == "value_error":  # a sentence of ours
        text = str(item["ctx"]["error"])
        return path, text if text.endswith((".", "?")) else f"{text}."
    found = item.get("input")
    hint = (
        f" A text that looks like a number stands in quotes: '{found}'."
        if item["type"] == "string_type" and isinstance(found, int | float)
        else ""
    )
    return path, f"{item['msg']} (found {shortened(found)}).{hint}"


def shortened(value: Any, most: int = 120) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]} ..."


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, field) of every setting below a settings class."""
    hints = get_type_hints(cls)
    for field in fields(cls):  # type: ignore[arg-type]
        path = f"{prefix}{field.name}"
        nested = [t for t in (hints[field.name], *get_args(hints[field.name])) if isinstance(t, type) and is_dataclass(t)]
        if nested:
            for option in nested:
                yield from leaves(option, path + ".")
        else:
            yield path, field


def to_dict(value: Any) -> Any:
    """Settings as plain dictionaries, lists, strings and numbers (what YAML and JSON can hold)."""
    return pydantic.TypeAdapter(type(value)).dump_python(value, mode="json")


def describe(cls: type) -> list[tuple[str, Any, str]]:
    """(name, default, explanation) of each field of one settings class; the default of a required one is ``...``."""
    schema = pydantic.TypeAdapter(cls).json_schema()
    properties = schema.get("properties", {})
    return [(name, entry.get("default", ...), entry.get("description", "")) for name, entry in properties.items()]


def configured(cls: type[T], config: T | Mapping[str, Any] | None, options: Mapping[str, Any]) -> T:
    """Settings of a function that takes a settings object (or a dictionary of them), keywords, or both; keywords replace what the object says.

    Raises:
        TypeError: ``config`` is something else.
        ValueError: as ``build``.
    """
    if config is None or isinstance(config, Mapping):
        return build(cls, {**(config or {}), **options})
    if not isinstance(config, cls):
        first = fields(cls)[0].name  # type: ignore[arg-type]
        raise TypeError(f"Expected {cls.__name__}, found {config!r}. Options are given by name: {first}={config!r}.")
    return build(cls, {**{f.name: getattr(config, f.name) for f in fields(config)}, **options})  # type: ignore[arg-type]
