"""The results of a screening: one SQLite file, written by the submitter alone, in transactions."""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gossamer.files import InputError, atomic_path, say_replaced, write_text

VERSION = 2
"""of the tables below; those of version 1 refuse the status "timed out" and are made anew when a screening goes on"""
APPLICATION = 0x676F7373
""" "goss", in the file's header"""
STATUSES = ("done", "converged", "not converged", "timed out", "failed")
ENDINGS = (".parquet", ".csv", ".json", ".extxyz", ".xyz")
"""of files that results are exported to"""
TABLES = f"""
create table about (name text primary key, value text not null);
create table run (mark text primary key, host text not null, process integer not null, began text not null, ended text);
create table result (
  id text primary key, source text not null, frame integer not null, formula text, n_atoms integer,
  status text not null check (status in {STATUSES}), reason text,
  energy real, energy_per_atom real, max_force real, stress text, volume real, steps integer, seconds real,
  energy_above_hull real, numbers text, structure text, potential text not null, finished text not null
) without rowid;
"""
COLUMNS = ("id", "source", "frame", "formula", "n_atoms", "status", "reason", "energy", "energy_per_atom", "max_force", "stress", "volume",
           "steps", "seconds", "energy_above_hull", "numbers", "structure", "potential", "finished")  # fmt: skip
UNITS = {"energy": "eV", "energy_per_atom": "eV", "max_force": "eV/Å", "stress": "eV/Å³", "volume": "Å³", "seconds": "s",
         "energy_above_hull": "eV per atom", "bulk_modulus": "GPa", "shear_modulus": "GPa", "softest": "GPa", "stiffness": "GPa",
         "lowest_frequency": "THz", "highest_frequency": "THz", "heat_capacity": "J/K/mol"}  # fmt: skip


@dataclass
class Row:
    """What became of one structure."""

    id: str
    status: str
    """one of ``STATUSES``"""
    reason: str = ""
    formula: str | None = None
    n_atoms: int | None = None
    energy: float | None = None
    """eV"""
    max_force: float | None = None
    """eV/Å"""
    stress: list[float] | None = None
    """eV/Å³, Voigt order, tension positive"""
    volume: float | None = None
    """Å³"""
    steps: int | None = None
    seconds: float | None = None
    structure: str | None = None
    """extended XYZ"""
    numbers: dict[str, Any] = field(default_factory=dict)
    """what the task measured"""

    def columns(self, source: str, frame: int, potential: str) -> dict[str, Any]:
        """Values by column of the table."""
        values = {**vars(self), "source": source, "frame": frame, "potential": potential, "energy_above_hull": None,
                  "finished": datetime.now().isoformat(timespec="seconds")}  # fmt: skip
        values["energy_per_atom"] = None if self.energy is None or not self.n_atoms else self.energy / self.n_atoms
        values["stress"] = None if self.stress is None else json.dumps(self.stress)
        values["numbers"] = json.dumps(self.numbers) if self.numbers else None
        return values


class Results:
    """The file of a screening, open."""

    def __init__(self, path: Path | str, question: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            path: Made if it is not there and a question is given.
            question: What is asked; the file must have been made by the same.

        Raises:
            FileNotFoundError: no such file, and no question.
            InputError: not a file of results, of a newer gossamer, or of another question (says of which, and what to do).
        """
        self.path = Path(path)
        there = self.path.exists() and self.path.stat().st_size > 0
        if not there and question is None:
            raise FileNotFoundError(f"There are no results '{path}'. gossamer screen STRUCTURES --model MODEL --out {path} makes them.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.connection = sqlite3.connect(self.path, isolation_level=None, timeout=30)
        self.connection.row_factory = sqlite3.Row
        try:
            if there:
                self._check(question)
            self.connection.execute("pragma journal_mode=wal")
            self.connection.execute("pragma synchronous=full")
            if not there and question is not None:
                self._make(question)
        except sqlite3.DatabaseError as error:
            self.close()
            raise InputError(f"'{path}' is not a file of results ({error}). Choose another --out.") from None
        except BaseException:
            self.close()
            raise

    def _make(self, question: Mapping[str, Any]) -> None:
        """Tables and question, in one transaction: a file that was killed while being made is empty."""
        facts = {"question": json.dumps(dict(question)), "began": datetime.now().isoformat(timespec="seconds")}
        with _Transaction(self.connection):
            for statement in TABLES.split(";\n"):
                self.connection.execute(statement)
            self.connection.executemany("insert into about values (?, ?)", facts.items())
            self.connection.execute(f"pragma user_version={VERSION}")
            self.connection.execute(f"pragma application_id={APPLICATION}")

    def _check(self, question: Mapping[str, Any] | None) -> None:
        (application,) = self.connection.execute("pragma application_id").fetchone()
        (version,) = self.connection.execute("pragma user_version").fetchone()
        if (
            application == version == 0
            and not self.connection.execute("select name from sqlite_master").fetchall()
            and question is not None
        ):
            self._make(question)
            return
        if application != APPLICATION:
            raise InputError(f"'{self.path}' is an SQLite file, but not of gossamer's results. Choose another --out.")
        if version > VERSION:
            raise InputError(f"'{self.path}' has tables of version {version}, this gossamer knows {VERSION}. Use a newer gossamer.")
        if question is None:
            return
        if version < VERSION:
            self._renew()
        before = self.question
        differ = [k for k in {**before, **question} if before.get(k) != question.get(k)]
        if differ:
            said = ", ".join(f"{k} {before.get(k)} (now {question.get(k)})" for k in differ)
            raise InputError(
                f"'{self.path}' holds results of another question: {said}. Ask the same to go on, or choose another --out for this one."
            )

    def _renew(self) -> None:
        """Put the rows of an older version into tables of this one, all or none."""
        made = next(s for s in TABLES.split(";\n") if "create table result" in s)
        with _Transaction(self.connection):
            self.connection.execute("alter table result rename to result_before")
            self.connection.execute(made)
            self.connection.execute(f"insert into result select {', '.join(COLUMNS)} from result_before")
            self.connection.execute("drop table result_before")
            self.connection.execute(f"pragma user_version={VERSION}")

    @property
    def question(self) -> dict[str, Any]:
        """What was asked."""
        (text,) = self.connection.execute("select value from about where name='question'").fetchone()
        return dict(json.loads(text))

    def close(self) -> None:
        """All is written; the files beside it (-wal, -shm) go."""
        self.connection.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the submitter's ---------------------------------------------------------------------------------------------

    def status(self, name: str) -> str | None:
        """Of the structure with this id; None where it is not in the file."""
        found = self.connection.execute("select status from result where id=?", (name,)).fetchone()
        return None if found is None else str(found[0])

    def n_of_sources(self) -> dict[str, int]:
        """How many structures of each source are in the file."""
        return dict(tuple(r) for r in self.connection.execute("select source, count(*) from result group by source"))

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Values of ``COLUMNS`` for some structures, all or none; those of a structure that is there already are replaced."""
        places = ", ".join(f":{name}" for name in COLUMNS)
        with _Transaction(self.connection):
            self.connection.executemany(f"insert or replace into result ({', '.join(COLUMNS)}) values ({places})", list(rows))

    def begin(self) -> tuple[str, list[str]]:
        """Record this process; returns its mark, and those of processes of this machine that did not end as they should."""
        host = platform.node()
        left = [m for (m,) in self.connection.execute("select mark from run where ended is null and host=?", (host,))]
        mark = uuid.uuid4().hex
        now = datetime.now().isoformat(timespec="seconds")
        self.connection.execute("insert into run values (?, ?, ?, ?, null)", (mark, host, os.getpid(), now))
        return mark, left

    def end(self, marks: Iterable[str]) -> None:
        """These processes and their workers have ended."""
        now = datetime.now().isoformat(timespec="seconds")
        self.connection.executemany("update run set ended=? where mark=?", [(now, m) for m in marks])

    def set_hull(self, energies: Mapping[str, float | None], reference: str) -> None:
        """Energies above the hull in eV per atom by id, and what the hull was made of; all or none."""
        with _Transaction(self.connection):
            self.connection.execute("update result set energy_above_hull=null")
            self.connection.executemany("update result set energy_above_hull=? where id=?", [(e, k) for k, e in energies.items()])
            self.connection.execute("insert or replace into about values ('hull', ?)", (reference,))

    # --- readers ----------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Structures by status."""
        return dict(tuple(r) for r in self.connection.execute("select status, count(*) from result group by status order by status"))

    def rows(
        self, sort: str | None = None, top: int | None = None, descending: bool = False, status: str | None = None
    ) -> list[dict[str, Any]]:
        """Rows with what the task measured as columns of their own.

        Args:
            sort: Column or measured number; rows without it come last, equal ones by id. By default by source and frame.
            top: Only the first so many.
            descending: Largest first.
            status: Only rows with it.

        Raises:
            ValueError: no such column or number, or a negative ``top``.
        """
        if top is not None and top < 0:
            raise ValueError(f"top must not be negative, found {top}.")
        found = [
            {**dict(r), **json.loads(r["numbers"] or "{}")}
            for r in self.connection.execute("select * from result order by source, frame, id")
        ]
        for row in found:
            del row["numbers"]
            row["stress"] = json.loads(row["stress"]) if row["stress"] else None
        if sort is not None:
            names = list(dict.fromkeys(k for row in found for k, v in row.items() if not isinstance(v, list | dict)))
            if found and sort not in names:
                raise ValueError(f"There is no '{sort}' to sort by. There are: {', '.join(names)}.")
            having = [r for r in found if r.get(sort) is not None]
            having.sort(key=lambda r: r["id"])
            having.sort(key=lambda r: r[sort], reverse=descending)
            found = having + [r for r in found if r.get(sort) is None]
        return [r for r in found if status in (None, r["status"])][:top]


class _Transaction:
    """All or nothing; begun at once, so that nobody else writes in between."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def __enter__(self) -> None:
        self.connection.execute("begin immediate")

    def __exit__(self, kind: object, *_: object) -> None:
        self.connection.execute("commit" if kind is None else "rollback")


def check_export(out: Path | str, sources: Iterable[Path | str] = ()) -> None:
    """Whether results can be written under this name.

    Args:
        out: File.
        sources: Files of the structures that are screened, not to be written over.

    Raises:
        ValueError: its ending is none of `ENDINGS`, or it is one of the sources.
        ImportError: pyarrow is not installed.
    """
    ending = Path(out).suffix
    if ending not in ENDINGS:
        raise ValueError(f"'{out}': results are written as .parquet, .csv, .json or .extxyz. Choose one of these endings.")
    if Path(out).resolve() in {Path(source).resolve() for source in sources}:
        raise ValueError(f"'{out}' holds structures that were screened, and would be written over. Choose another name.")
    if ending == ".parquet" and find_spec("pyarrow") is None:
        raise ImportError("Parquet is written by the package pyarrow: pip install pyarrow, or choose a name that ends in .csv.")


def export(path: Path | str, out: Path | str) -> int:
    """Write all rows as .parquet (needs pyarrow), .csv, .json or .extxyz (structures with energies); returns how many.

    Raises:
        ValueError, ImportError: as `check_export`.
    """
    out = Path(out)
    with closing(Results(path)) as results:
        rows = results.rows()
    check_export(out, {r["source"] for r in rows})
    say_replaced(out)
    if out.suffix == ".parquet":
        _parquet(rows, out)
    elif out.suffix == ".json":
        write_text(out, json.dumps(rows, indent=1) + "\n")
    elif out.suffix == ".csv":
        write_text(out, _csv(rows))
    else:
        rows = [r for r in rows if r["structure"]]
        write_text(out, "".join(r["structure"] for r in rows))
    return len(rows)


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(k for row in rows for k in row))


def _parquet(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({name: [r.get(name) for r in rows] for name in _names(rows)})
    with atomic_path(out) as temporary:
        parquet.write_table(table, temporary)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    import csv
    import io

    text = io.StringIO()
    names = [n for n in _names(rows) if n != "structure"]
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()} for row in rows)
    return text.getvalue()
