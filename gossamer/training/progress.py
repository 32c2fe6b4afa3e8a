"""What a run tells while it trains: log.csv, other trackers, and a progress bar with the error to expect at the end."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gossamer.files import naming, write_text
from gossamer.quantities import QUANTITIES

log = logging.getLogger(__name__)


def columns() -> list[str]:
    """Names of the log's columns."""
    errors = [f"valid_{name}_{kind}" for name in QUANTITIES for kind in ("mae", "rmse")]
    return ["step", "epoch", "learning_rate", "seconds", "train_loss", "valid_loss", *errors]


class Log:
    """A CSV file always; TensorBoard and Weights & Biases if asked for."""

    def __init__(self, folder: Path, step: int, tensorboard: bool, wandb: bool) -> None:
        """
        Args:
            folder: Of the run.
            step: Where the run goes on; rows of later steps, about to be repeated, are dropped.
            tensorboard: Also log to TensorBoard.
            wandb: Also log to Weights & Biases.
        """
        self.path = folder / "log.csv"
        self.writers: list[Callable[[dict[str, Any]], None]] = []
        self.closers: list[Callable[[], None]] = []
        self.rows: list[dict[str, Any]] = []
        if step > 0 and self.path.exists():
            with open(self.path, encoding="utf-8", newline="") as file:
                whole = [row for row in csv.DictReader(file) if None not in row.values()]  # the last one may have been cut
                self.rows = [row for row in whole if row["step"].isdecimal() and int(row["step"]) <= step]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns())
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ImportError("training.tensorboard needs the package tensorboard: pip install tensorboard") from None
            board = SummaryWriter(str(folder / "tensorboard"))

            def to_board(row: dict[str, Any]) -> None:
                for key, value in row.items():
                    if value != "":
                        board.add_scalar(key, value, row["step"])

            self.writers.append(to_board)
            self.closers.append(board.close)
        if wandb:
            try:
                import wandb as weights_and_biases
            except ImportError:
                raise ImportError("training.wandb needs the package wandb: pip install wandb") from None
            run = weights_and_biases.init(project="gossamer", dir=str(folder))
            self.writers.append(lambda row: run.log(row, step=row["step"]))
            self.closers.append(run.finish)

    def write(self, row: dict[str, Any]) -> None:
        """Add a row of ``columns``."""
        self.rows.append(row)
        with naming(self.path), open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, columns()).writerow(row)
        for writer in self.writers:
            writer(row)

    def close(self) -> None:
        """Hand over what TensorBoard and Weights & Biases still hold back."""
        for closer in self.closers:
            closer()


LEAST_ROWS, LEAST_SHARE = 4, 0.25
"""validations and share of a run from which on its end is foretold"""
SATURATION = 0.75
"""of the power law that the errors followed so far, as the falling learning rate ends it: of ten runs of 0.5 to 5 minutes (five networks;
ethanol, silicon, copper) this foretold the last force error to 25 % from 0.4 of the run on, to 12 % from 0.7 on"""


def expected_error(shares: Sequence[float], errors: Sequence[float]) -> float | None:
    """The error at the end of a run, from those of its validations: a power law through the later half of them.

    Args:
        shares: Of the run's steps or time, at each validation (0 to 1, rising).
        errors: Found there.

    Returns:
        None where there are too few, or where the run is over.
    """
    if len(shares) < LEAST_ROWS or not LEAST_SHARE <= shares[-1] < 1 or min(errors) <= 0:
        return None
    later = slice(-max(3, len(shares) // 2), None)
    exponent, _ = np.polyfit(np.log(shares[later]), np.log(errors[later]), 1)
    return float(errors[-1] * shares[-1] ** (-SATURATION * min(exponent, 0.0)))


class Bar:
    """The progress bar: steps, or seconds where time decides; without a terminal, a line at every validation."""

    LABELS = (("E", "valid_energy_mae", "meV/atom"), ("F", "valid_forces_mae", "meV/Å"), ("S", "valid_stress_mae", "meV/Å³"))

    def __init__(self, steps: int, minutes: float | None, rows: Sequence[Mapping[str, Any]], done: float, visible: bool) -> None:
        """
        Args:
            steps: Of the whole run, where no time is given.
            minutes: Of the whole run.
            rows: The log's, which grow.
            done: Steps, or seconds of a run of a given time, that an earlier process did.
            visible: Whether this process shows anything.
        """
        self.timed, self.rows = minutes is not None, rows
        self.total: float
        self.total, unit = (60 * minutes, "s") if minutes is not None else (steps, "step")
        # None shows the bar on a terminal only
        self.bar = tqdm(total=round(self.total), initial=int(done), unit=unit, disable=None if visible else True, dynamic_ncols=True)

    def show(self, step: int, seconds: float) -> None:
        """Move to where the run is."""
        self.bar.update((int(seconds) if self.timed else step) - self.bar.n)

    def report(self) -> None:
        """Show the errors of the last validation, and the one to expect at the end."""
        row = self.rows[-1]
        shown = [f"{s} {float(row[k]):.2f} {unit}" for s, k, unit in self.LABELS if row.get(k, "") != ""]
        end = self.expected()
        text = "  ".join(shown) + (f"  ({end} at the end)" if end else "")
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            left = float(row["seconds"]) / int(row["step"]) * (self.total - int(row["step"])) / 60
            place = f" ({row['seconds']:.0f} of {self.total:.0f} s)" if self.timed else f" of {self.total} ({left:.1f} minutes left)"
            log.info("step %d%s: %s", row["step"], place, text)

    def expected(self) -> str | None:
        """Force error (or energy error, of a run without forces) to expect at the end; None while too little is known."""
        for symbol, key, _ in (self.LABELS[1], self.LABELS[0]):
            rows = [r for r in self.rows if r.get(key, "") != ""]
            if rows:
                shares = [float(r["seconds" if self.timed else "step"]) / self.total for r in rows]
                error = expected_error(shares, [float(r[key]) for r in rows])
                return None if error is None else f"{symbol} about {float(f'{error:.2g}'):g}"
        return None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
