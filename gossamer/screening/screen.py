"""A screening: what is not in the results yet goes out in blocks, what comes back is written; whatever dies is done again.

Structures are read when it is their turn: in memory are those that workers have, not those of the files.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ase import Atoms
from tqdm import tqdm

from gossamer.arguments import FILES, listed
from gossamer.data.atoms import count_frames
from gossamer.files import locked
from gossamer.screening.config import BLOCK, MachineConfig, ScreenConfig, load_machine
from gossamer.screening.database import Results, Row
from gossamer.screening.executor import BadStateException, ManagerLost, WorkerLost, Workers, cancel_jobs, end_processes
from gossamer.screening.limited import Died
from gossamer.screening.structures import MEMORY, Item, read_items, sources_of
from gossamer.screening.tasks import Asked, make_question, run_block, stored_question
from gossamer.settings import build, configured
from gossamer.signals import StopRequested

log = logging.getLogger(__name__)
AHEAD = 3
"""blocks for each worker that are handed out before they are needed"""
TRIES = 3
"""deaths of workers over one structure alone after which it is said to kill them"""
NODES_LOST = 5
"""nodes lost (their job's time was over, or it was cancelled) over one structure alone after which it is said to take too long"""
SETBACKS = 30
"""deaths of workers in a row, without an answer in between, that end the screening; or as many as there are workers, if that is more"""
REPEATED = ("failed", "timed out", "not converged")
"""what --again does once more, and what makes the exit status 1"""
REPORT = 20.0
"""s between lines of the log, where there is no terminal for a bar"""


def screen(
    structures: Sequence[Path | str | Atoms] | Path | str | Atoms,
    model: Path | str | None = None,
    calculator: str | None = None,
    machine: MachineConfig | Mapping[str, Any] | Path | str | None = None,
    workers: int | None = None,
    progress: bool = True,
    config: ScreenConfig | None = None,
    **options: Any,
) -> dict[str, Any]:
    """One task on every frame of structure files, into one SQLite file; the same call goes on where an earlier one ended, however it ended.

        screen("crystals.extxyz", "potential.safetensors", task="relax", cell=True, out="relaxed.sqlite")

    Args:
        structures: Files; what cannot be read of one is one failed row. Or Atoms, whose source is "memory" and whose frame says their place
            among these Atoms: give them in the same order to go on.
        model: Saved potential.
        calculator: In its place any ASE calculator, "module:factory" as `gossamer judge` takes them.
        machine: YAML file of `MachineConfig`, or one, or a dictionary; by default this machine.
        workers: Processes on each node, in place of the machine's.
        progress: Show a bar, or lines in the log.
        config: What is asked, as an object.
        options: Fields of `ScreenConfig` that replace those of ``config``.

    Returns:
        "structures", "done_before", "done", "seconds", "per_second" (of this call), "statuses" (of all rows), "out", and "stopped": the
        name of the signal that ended it early, or None.

    Raises:
        TypeError: something else than files or atoms; a potential or a calculator in memory, where workers make theirs by themselves.
        ValueError: unknown options, nothing to ask, results of another question, or a potential that the workers cannot load.
        FileNotFoundError: no such file.
        RuntimeError: another process writes the results, or workers die without ever giving an answer.
        ImportError: Parsl is not installed.
    """
    config = configured(ScreenConfig, config, options)
    if isinstance(machine, Mapping):
        machine = build(MachineConfig, machine)
    if not isinstance(machine, MachineConfig):
        machine = load_machine(machine, workers)
    elif workers is not None:
        machine = replace(machine, workers=workers)
    asked = make_question(model, calculator, config)
    given = listed("structures", structures, (*FILES, Atoms), "files or ASE's Atoms")
    if not given:
        raise ValueError("There are no structures to screen: give at least one file.")
    paths = [one for one in given if not isinstance(one, Atoms)]
    counts = {source: count_frames(source) for source in sources_of(paths)} | {MEMORY: len(given) - len(paths)}
    out = config.out
    with locked(out.parent, out.name), Results(out, stored_question(asked)) as results:
        there = {} if config.again else results.n_of_sources()
        n_new = sum(max(0, n - there.get(source, 0)) for source, n in counts.items())
        screening = Screening(
            results,
            sum(counts.values()),
            replace(asked, n_expected=max(1, -(-n_new // machine.slots()))),
            config.block or BLOCK.get(config.task, 1),
            REPEATED if config.again else (),
            progress,
        )
        mark, left = results.begin()
        ended = end_processes(left)
        if ended:
            log.warning("ended %d processes that an earlier screening, killed, had left", len(ended))
        folder = out.with_name(f".{out.name}.parsl").resolve()
        cancelled = cancel_jobs(folder) if left or machine.scheduler == "slurm" else []
        if cancelled:
            log.warning("cancelled jobs that an earlier screening, killed, had left in Slurm: %s", ", ".join(cancelled))
        workers_ = Workers(machine, folder, mark)
        try:
            stopped = screening.run(read_items(given), workers_)
        finally:
            workers_.close()
            results.end([mark, *left])
        return screening.summary(stopped)


def pace(per_second: float) -> str:
    """A rate in the unit in which it is at least one: "3.2 per second", "2.4 per minute", "1.5 per hour"."""
    for unit, seconds in (("second", 1), ("minute", 60)):
        if per_second * seconds >= 1 or not per_second:
            return f"{per_second * seconds:.3g} per {unit}"
    return f"{per_second * 3600:.3g} per hour"


class Screening:
    """The submitter's loop: it alone writes."""

    def __init__(self, results: Results, n_structures: int, asked: Asked, block: int, repeated: Sequence[str], progress: bool) -> None:
        """
        Args:
            results: What was done before is in there.
            n_structures: That there are, as far as is known before they are read.
            asked: What is asked of each.
            block: Structures for a worker at once, at most.
            repeated: Statuses that are done once more.
            progress: As of ``screen``.
        """
        self.results, self.n_structures, self.asked, self.block, self.repeated = results, n_structures, asked, block, repeated
        self.items: dict[str, Item] = {}
        """in hand, by id"""
        self.n_read = self.n_before = self.n_done = 0
        self.deaths: Counter[str] = Counter()
        """of workers, by the structure that was alone with them"""
        self.nodes_lost: Counter[str] = Counter()
        """likewise of nodes"""
        self.seen_lost: set[bytes] = set()
        """nodes that are known to be lost: each is one setback, however much it had in hand"""
        self.setbacks, self.most_setbacks = 0, SETBACKS
        self.waiting: deque[list[str]] = deque()
        """blocks of ids that are to be done again"""
        self.running: dict[Future[list[Row]], list[str]] = {}
        self.began = time.monotonic()
        self.said = self.began
        self.first: tuple[float, int] | None = None
        """when the first answer came, and of how many: throughput counts from there, not from the start of the workers"""
        self.counts: Counter[str] = Counter()
        self.progress = progress

    def run(self, items: Iterator[Item], workers: Workers) -> str | None:
        """Until all is done; returns the signal that ended it early.

        Args:
            items: All structures.
            workers: Started if there is anything to do.

        Raises:
            RuntimeError: workers die again and again without an answer.
            ValueError, OSError, ImportError: the workers cannot load the potential.
        """
        bar = tqdm(total=self.n_structures, unit="structure", disable=None if self.progress else True, smoothing=0.2, dynamic_ncols=True)
        with StopRequested() as stop, bar:
            todo = self._todo(items, stop, bar)
            first = list(islice(todo, self.block * workers.slots))
            size = max(1, min(self.block, -(-len(first) // workers.slots)))  # every worker gets a share
            blocks = self._blocks(chain(first, todo), size)
            if first:
                if self.progress:
                    log.info("%s (%s) of %d structures, %d at once, %d worker%s", self.asked.task, self.asked.engine, self.n_structures, size,
                             workers.slots, "" if workers.slots == 1 else "s")  # fmt: skip
                self.most_setbacks = max(SETBACKS, workers.slots)
                workers.start()
            while not stop.requested:
                while len(self.running) < AHEAD * workers.slots and (names := next(blocks, [])):
                    self._submit(workers, names)
                if not self.running:
                    break
                finished, _ = wait(self.running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in finished:
                    self._settle(future)
                self._tell(bar)
                if not stop.requested and not workers.alive():
                    self._start_again(workers)
        return stop.signal.name if stop.signal else None

    def _todo(self, items: Iterator[Item], stop: StopRequested, bar: Any) -> Iterator[Item]:
        """Structures that have no answer yet, and are in hand from here on; those that cannot be read get theirs at once."""
        for item in items:
            if stop.requested:
                return
            self.n_read += 1
            status = self.results.status(item.id)
            if status is not None and status not in self.repeated:
                self.n_before += 1
                self._tell(bar)
                continue
            self.items[item.id] = item
            if item.atoms is None:
                self._write([Row(item.id, "failed", item.problem)])
            else:
                yield item
        self.n_structures = bar.total = self.n_read

    def _blocks(self, todo: Iterator[Item], size: int) -> Iterator[list[str]]:
        """Ids for a worker at once; nothing, now and then, where all is handed out."""
        while True:
            yield self.waiting.popleft() if self.waiting else [item.id for item in islice(todo, size)]

    def _submit(self, workers: Workers, names: list[str]) -> None:
        block = [(name, self.items[name].atoms) for name in names]
        self.running[workers.submit(run_block, self.asked, block)] = names

    def _settle(self, future: Future[list[Row]]) -> None:
        """Write what came back; what died waits again."""
        names = self.running.pop(future)
        try:
            rows = future.result()
        except (WorkerLost, Died):
            self._worker_died(names)
        except BadStateException:  # Parsl has given up, and is started again: nothing to do with these structures
            self.waiting.appendleft(names)
        except ManagerLost as error:  # the node has gone, or its time is over
            self._node_lost(names, error)
        else:
            self.setbacks = 0
            self._write(rows)
            self.first = self.first or (time.monotonic(), self.n_done)

    def _worker_died(self, names: list[str]) -> None:
        """A block whose worker died is done again one by one; a structure that kills workers when it is alone has failed."""
        if len(names) > 1:
            self.waiting.extendleft([name] for name in reversed(names))
        else:
            (name,) = names
            self.deaths[name] += 1
            if self.deaths[name] < TRIES:
                self.waiting.append(names)
            else:
                reason = f"the worker's process died {TRIES} times while it had this structure alone (a crash of the calculator, or too little memory)"
                self._write([Row(name, "failed", reason, *self._facts(name))])
        self._setback(RuntimeError("a worker's process died"))

    def _node_lost(self, names: list[str], error: ManagerLost) -> None:
        """A block whose job ended is done again in quarters, as it may take longer than a job; a structure alone that meets this again and again
        has failed."""
        if error.manager_id not in self.seen_lost:
            self.seen_lost.add(error.manager_id)
            self._setback(error)
        if len(names) > 1:
            size = -(-len(names) // 4)
            self.waiting.extendleft(reversed([names[k : k + size] for k in range(0, len(names), size)]))
            return
        (name,) = names
        self.nodes_lost[name] += 1
        if self.nodes_lost[name] < NODES_LOST:
            self.waiting.append(names)
        else:
            reason = f"its job ended {NODES_LOST} times while it was computed (walltime too short for it, or jobs cancelled)"
            self._write([Row(name, "failed", reason, *self._facts(name))])

    def _facts(self, name: str) -> tuple[str | None, int | None]:
        atoms = self.items[name].atoms
        return (None, None) if atoms is None else (atoms.get_chemical_formula(), len(atoms))

    def _setback(self, error: Exception) -> None:
        self.setbacks += 1
        log.debug("%s", error)
        if self.setbacks >= self.most_setbacks:
            raise RuntimeError(
                f"Workers died {self.setbacks} times in a row without an answer; the last time: {error}. Try fewer workers (memory), "
                "the potential on one structure (gossamer relax), and the lines of setup."
            )

    def _start_again(self, workers: Workers) -> None:
        """Parsl's own processes died, or no job can be had: all that was handed out waits again.

        Raises:
            RuntimeError: no job can be had, and there was no answer yet; or this happens again and again.
        """
        why = workers.why()
        for future in [f for f in self.running if f.done()]:
            self._settle(future)
        if why and self.first is None:
            lines = "partition, account, walltime, options and setup" if workers.machine.scheduler == "slurm" else "setup"
            raise RuntimeError(f"{why}\nSee {lines} in the machine's file (docs/screening.md).")
        self.setbacks += self.most_setbacks // 3 - 1  # three in a row are a machine on which nothing starts
        self._setback(RuntimeError(why or "Parsl's processes ended by themselves"))
        log.warning("the workers were lost%s; starting them again", f" ({why})" if why else "")
        self.waiting.extendleft(reversed(list(self.running.values())))
        self.running.clear()
        workers.close()
        workers.start()

    def _write(self, rows: Sequence[Row]) -> None:
        if rows:
            items = [self.items.pop(row.id) for row in rows]
            self.results.write([r.columns(i.source, i.frame, self.asked.fingerprint) for r, i in zip(rows, items, strict=True)])
            self.counts.update(row.status for row in rows)
            self.n_done += len(rows)

    def _tell(self, bar: Any) -> None:
        """Throughput and time left: a bar on a terminal, else now and then a line."""
        bar.update(self.n_before + self.n_done - bar.n)
        bar.set_postfix({k: n for k, n in self.counts.items() if k in REPEATED}, refresh=False)
        now = time.monotonic()
        if self.progress and bar.disable and now - self.said > REPORT and self.n_done:
            self.said = now
            done = self.n_before + self.n_done
            if self.first is None or self.n_done == self.first[1]:
                log.info("%d of %d structures", done, self.n_structures)
                return
            rate = (self.n_done - self.first[1]) / (now - self.first[0])
            left = tqdm.format_interval(max(0, self.n_structures - done) / rate)
            log.info("%d of %d structures, %s, %s left", done, self.n_structures, pace(rate), left)

    def summary(self, stopped: str | None) -> dict[str, Any]:
        """What this call did."""
        seconds, statuses = time.monotonic() - self.began, self.results.counts()
        others = sum(statuses.values()) - self.n_read
        if others > 0 and not stopped:
            log.info("'%s' also holds %d structures that are not among these; they stay", self.results.path, others)
        return {
            "structures": self.n_structures, "done_before": self.n_before, "done": self.n_done, "seconds": round(seconds, 2),
            "per_second": float(f"{self.n_done / seconds:.4g}"), "statuses": statuses, "out": str(self.results.path), "stopped": stopped,
        }  # fmt: skip
