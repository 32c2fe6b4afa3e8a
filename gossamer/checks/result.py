"""What a check says: numbers with units and limits, curves, and the verdict that follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from ase.calculators.calculator import PropertyNotImplementedError

from gossamer.files import InputError

Status = Literal["passed", "weak", "failed", "skipped", "measured"]
Best = Literal["low", "high", ""]
ORDER: dict[str, int] = {"measured": 0, "skipped": 1, "passed": 2, "weak": 3, "failed": 4}
"""the verdict of a check is the worst one of its numbers"""


@dataclass
class Metric:
    """One number of a check, with what was expected of it."""

    name: str
    value: float | None
    unit: str = ""
    status: Status = "measured"
    limit: str = ""
    """what would have passed, in words"""
    best: Best = ""
    """which end is better, for tables of several potentials"""
    reason: str = ""
    consequence: str = ""
    """what a user has to expect where it did not pass"""


@dataclass
class Curve:
    """One line (or set of points) of a panel."""

    x: list[float]
    y: list[float]
    label: str = ""
    reference: bool = False
    """a reference, drawn the same for every potential"""
    points: bool = False
    """points instead of a line"""


@dataclass
class Panel:
    """One picture. Panels of several potentials with the same title are drawn as one."""

    title: str
    x_label: str
    y_label: str
    curves: list[Curve]
    group: str = ""
    """panels of one group stand in a grid of small pictures"""
    x_limits: tuple[float, float] | None = None
    y_limits: tuple[float, float] | None = None
    log: str = ""
    """axes with a logarithmic scale: "", "x", "y" or "xy" """
    ticks: list[tuple[float, str]] = field(default_factory=list)
    """named places on the x axis"""
    points: bool = False
    """points instead of lines"""


@dataclass
class Result:
    """Verdict, numbers and pictures of one check of one potential."""

    status: Status
    reason: str
    consequence: str = ""
    metrics: list[Metric] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """what was judged on, and how"""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite become None."""
        return plain(asdict(self))

    def numbers(self) -> dict[str, Any]:
        """For JSON, without the pictures."""
        return {k: v for k, v in self.to_dict().items() if k != "panels"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Result:
        panels = [
            Panel(**{**p, "curves": [Curve(**c) for c in p["curves"]], "ticks": [tuple(t) for t in p["ticks"]]}) for p in values["panels"]
        ]
        for panel in panels:
            for curve in panel.curves:
                curve.x, curve.y = ([math.nan if v is None else v for v in values] for values in (curve.x, curve.y))
        return cls(**{**values, "metrics": [Metric(**m) for m in values["metrics"]], "panels": panels})


def plain(value: Any) -> Any:
    """Numbers, lists and dictionaries that JSON knows; numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def curve(x: Iterable[Any], y: Iterable[Any], label: str = "", reference: bool = False, points: bool = False) -> Curve:
    """A curve from arrays."""
    return Curve([float(v) for v in x], [float(v) for v in y], label, reference, points)


def at_most(name: str, value: float, unit: str, good: float, poor: float, consequence: str, best: Best = "low") -> Metric:
    """A number that passes up to ``good``, is weak up to ``poor`` and fails beyond, or if it is not a number."""
    status: Status = "passed" if value <= good else "weak" if value <= poor else "failed"
    return _metric(name, value, unit, status, f"at most {good:.3g}", [good], best, consequence)


def at_least(name: str, value: float, unit: str, good: float, poor: float, consequence: str, best: Best = "high") -> Metric:
    """A number that passes from ``good``, is weak from ``poor`` and fails below, or if it is not a number."""
    status: Status = "passed" if value >= good else "weak" if value >= poor else "failed"
    return _metric(name, value, unit, status, f"at least {good:.3g}", [good], best, consequence)


def close_to(name: str, value: float, unit: str, target: float, good: float, poor: float, consequence: str) -> Metric:
    """A number that passes within ``good`` of the target and is weak within ``poor``."""
    status: Status = "passed" if abs(value - target) <= good else "weak" if abs(value - target) <= poor else "failed"
    return _metric(name, value, unit, status, f"{target:g} ± {good:.3g}", [target - good, target + good], "", consequence)


def largest(values: Iterable[float]) -> float:
    """The largest of some numbers; NaN if one of them is no number, which `max` may pass over."""
    return float(np.max([float(v) for v in values]))


def measured(name: str, value: float, unit: str = "", best: Best = "") -> Metric:
    """A number nobody judges."""
    return Metric(name, float(value) if math.isfinite(value) else None, unit, best=best)


def rounded(value: float, edges: Sequence[float] = ()) -> str:
    """A number in three digits, or in as many as it takes to stand on its side of the edges: 2.004 is not 2 where at most 2 is allowed."""
    digits = range(3, 17) if math.isfinite(value) else range(3, 4)
    texts = [f"{value:.{n}g}" for n in digits]
    return next((t for t in texts if all(np.sign(float(t) - edge) == np.sign(value - edge) for edge in edges)), texts[-1])


def _metric(name: str, value: float, unit: str, status: Status, limit: str, edges: Sequence[float], best: Best, consequence: str) -> Metric:
    shown = f"{rounded(value, edges)} {unit}".strip() if math.isfinite(value) else "not a finite number"
    reason = f"{name}: {shown}, expected {limit}{' ' + unit if unit else ''}"
    return Metric(name, float(value) if math.isfinite(value) else None, unit, status, limit, best, reason, consequence)


class NoQuestionError(ValueError):
    """Something that no potential could be asked, which says nothing of this one."""


NO_ANSWER = "Whatever rests on it cannot be computed with this calculator."


def attempt(name: str, measure: Callable[..., Metric | Sequence[Metric]], status: Status = "weak") -> list[Metric]:
    """Metrics of a measurement, or one that says why the potential could not be asked; what a calculator does not give at all is not judged."""
    try:
        found = measure()
    except (KeyboardInterrupt, InputError):
        raise
    except PropertyNotImplementedError as error:
        return [Metric(name, None, "", "skipped", reason=f"needs what the calculator does not give ({error})")]
    except NoQuestionError as error:
        return [Metric(name, None, "", "skipped", reason=str(error))]
    except Exception as error:  # a judged calculator may raise anything
        text = " ".join(str(error).split())[:200]
        return [
            Metric(name, None, "", status, "an answer", "", f"{name}: could not be evaluated ({type(error).__name__}: {text})", NO_ANSWER)
        ]
    return [found] if isinstance(found, Metric) else list(found)


def conclude(
    metrics: Sequence[Metric], panels: Sequence[Panel] = (), notes: Sequence[str] = (), passed: str = "Everything within its limit."
) -> Result:
    """The result of a check: as bad as the worst of its numbers, with that number as the reason."""
    judged = [m for m in metrics if m.status in ("passed", "weak", "failed")]
    unasked = [f"{m.name}: {m.reason}" for m in metrics if m.status == "skipped"]
    notes = [*notes, *(f"Not judged: {text}" for text in unasked)]
    if unasked and len(unasked) == len(metrics):
        return Result("skipped", f"Nothing could be judged: {unasked[0]}.", "", list(metrics), list(panels), list(notes))
    if not judged:
        status: Status = "measured" if metrics else "skipped"
        return Result(
            status,
            "Measured; nothing to pass or fail." if metrics else "Nothing could be measured.",
            "",
            list(metrics),
            list(panels),
            list(notes),
        )
    worst = max(judged, key=lambda m: ORDER[m.status])
    bad = [m for m in judged if m.status == worst.status]
    if worst.status == "passed":
        return Result("passed", passed, "", list(metrics), list(panels), list(notes))
    more = f" ({len(bad) - 1} more)" if len(bad) > 1 else ""
    first = worst.reason[:1] if ": " in worst.name else worst.reason[:1].upper()  # names stay as they are
    return Result(worst.status, first + worst.reason[1:] + more + ".", worst.consequence, list(metrics), list(panels), list(notes))


def skipped(reason: str) -> Result:
    """A check that was not done."""
    return Result("skipped", reason)
