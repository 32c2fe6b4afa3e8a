"""What the parts of the campaign share: numbered cases in a process of their own, results on disk as they come, mutations of bytes.

Case k of a part is defined by the seed and k alone. So a part that was stopped goes on where it was, and a finding can be had again.
"""

from __future__ import annotations

import collections
import json
import os
import re
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.files import write_json
from gossamer.machine import machine, versions

FINDING = "FINDING"
Case = Callable[[int], str]
"""number of a case -> "target: what came of it"; with FINDING in it where that is a fault"""
SECONDS, MEMORY, RESIDENT = 60.0, 3 << 30, 1 << 30
"""of a case, at most: CPU time (and 30 times that by the clock), bytes of address space on top of what the process has when it begins, and
bytes really used"""


@dataclass(frozen=True)
class Target:
    """A reader and the sound files it is tried on."""

    name: str
    path: Path
    """file, or folder of files"""
    read: Callable[[Path], Any]
    """what lies there; or a word for a refusal that is none of an error's"""
    weight: int = 2
    """how often, beside the others"""
    files: str = "*"
    """which of a folder's are damaged"""


def drawn(targets: Sequence[Target], rng: np.random.Generator) -> Target:
    """One of them, as often as its weight says."""
    weights = np.cumsum([t.weight for t in targets])
    return targets[np.searchsorted(weights, rng.integers(weights[-1]), side="right")]


def random_of(seed: int, k: int) -> np.random.Generator:
    return np.random.default_rng([seed, k])


def campaign(
    name: str, case: Case, count: int, seed: int, minutes: float, out: Path, settings: dict[str, Any] | None = None, alone: bool = True
) -> dict[str, Any]:
    """Run cases 0 … count - 1 of a part, or as many as the minutes allow, and keep what came of them in ``out``/NAME.json.

    Args:
        case: What to do.
        settings: Kept with the results; others than before begin anew.
        alone: Run the cases in a forked process, whose death is a finding.
    """
    file = out / f"{name}.json"
    about = {"part": name, "seed": seed, **(settings or {})}
    result = {**about, "done": 0, "seconds": 0.0, "outcomes": {}, "findings": []}
    if file.exists():
        before = json.loads(file.read_text())
        if all(before.get(k) == v for k, v in about.items()):
            result = before
    result |= {
        "count": count, "date": date.today().isoformat(), "machine": machine("cpu"),
        "versions": versions(["torch", "numpy", "ase", "vesin", "safetensors"]),
    }  # fmt: skip
    outcomes = collections.Counter(result["outcomes"])
    began, saved, before = time.monotonic(), 0.0, result["seconds"]
    numbers = range(result["done"], count)
    for k, what in isolated(case, numbers) if alone else ((k, attempt(case, k)) for k in numbers):
        result["done"] = k + 1
        outcomes[what.split(FINDING)[0] + FINDING if FINDING in what else what] += 1
        if FINDING in what:
            result["findings"].append({"case": k, "what": what})
            print(f"{name} {k}: {what}", flush=True)
        result["seconds"] = round(before + time.monotonic() - began, 1)
        result["outcomes"] = dict(sorted(outcomes.items()))
        if time.monotonic() - saved > 5:
            saved = time.monotonic()
            write_json(file, result)
        if time.monotonic() - began > 60 * minutes:
            break
    write_json(file, result)
    print(f"{name}: {result['done']} of {count} cases in {result['seconds']} s, {len(result['findings'])} findings", flush=True)
    return result


def attempt(case: Case, k: int) -> str:
    """A case whose own fault is a finding too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return case(k)
    except Exception as error:
        return f"{FINDING} {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def isolated(case: Case, numbers: range) -> Iterator[tuple[int, str]]:
    """Cases in a forked process; one that dies, hangs or takes too much memory is a finding, and another process goes on."""
    k = numbers.start
    while k < numbers.stop:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _child(case, range(k, numbers.stop), write)
        os.close(write)
        try:
            buffer = b""
            while k < numbers.stop:
                clock, used = time.monotonic(), _cpu_seconds(child)
                while b"\n" not in buffer:
                    while not select.select([read], [], [], 5)[0]:
                        if _cpu_seconds(child) - used > SECONDS or time.monotonic() - clock > 30 * SECONDS:
                            raise TimeoutError
                    more = os.read(read, 1 << 16)
                    if not more:
                        raise EOFError
                    buffer += more
                line, buffer = buffer.split(b"\n", 1)
                yield k, json.loads(line)
                k += 1
        except TimeoutError:
            yield k, f"{FINDING} no answer in {SECONDS:.0f} s of CPU time"
            k += 1
        except EOFError:
            status = os.waitpid(child, 0)[1]
            yield k, f"{FINDING} the process ended with status {os.waitstatus_to_exitcode(status)}"
            k += 1
            child = 0
        finally:
            os.close(read)
            if child:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _cpu_seconds(process: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _child(case: Case, numbers: range, write: int) -> None:
    """Run the cases, say what came of each, and end without tidying."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where libraries tell of what they could not close
        largest = _resident()
        for k in numbers:
            before, found = largest, attempt(case, k)
            largest = max(largest, _resident())
            if largest - before > RESIDENT and FINDING not in found:
                found = f"{found.split(':')[0]}: {FINDING} {(largest - before) / 1e9:.1f} GB were used"
            os.write(write, json.dumps(found).encode() + b"\n")
        status = 0
    finally:
        os._exit(status)


def _resident() -> int:
    """Bytes of memory that the process had at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- mutations --------------------------------------------------------------------------------------------------------

WORDS = [b"nan", b"inf", b"-inf", b"1e999", b"-1", b"0", b"1e-320", b"99999999999999999999", b"2147483648", b"-9223372036854775808", b"",
         b"None", b"[]", b"{}", b"null", b"true", b"\x00", b"\xff\xfe", b'"', b"'", b"\n", b"=", b":", b" ", b"0x1", b"1_000", b"\xc2\xb2", b"*a"]  # fmt: skip


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """One fault of a disk or a copy: bits or bytes changed, a range zeroed or filled, the end cut, two blocks exchanged, one doubled."""
    if not data:
        return b"\x00"
    found = bytearray(data)
    where = int(rng.integers(len(data)))
    size = min(int(2 ** rng.uniform(0, 12)), len(data))
    kind = rng.integers(8)
    if kind == 0:
        found[where] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        found[where] = int(rng.integers(256))
    elif kind == 2:
        found[where : where + size] = bytes(len(found[where : where + size]))
    elif kind == 3:
        found[where : where + size] = rng.bytes(len(found[where : where + size]))
    elif kind == 4:
        del found[where:]
    elif kind == 5:
        other = int(rng.integers(len(data)))
        first, second = sorted((where, other))
        size = min(size, second - first, len(data) - second)
        found[first : first + size], found[second : second + size] = found[second : second + size], found[first : first + size]
    elif kind == 6:
        found[where:where] = found[where : where + size]
    else:
        del found[where : where + size]
    return bytes(found)


def mutated(data: bytes, rng: np.random.Generator, others: Sequence[bytes] = ()) -> bytes:
    """One to four changes, as a fuzzer makes them: damage, words in the place of numbers and names, lines moved, parts of other inputs."""
    for _ in range(int(rng.choice([1, 1, 1, 2, 4]))):
        kind = rng.integers(6)
        if kind < 2:
            data = damaged(data, rng)
        elif kind == 2:
            tokens = [m.span() for m in re.finditer(rb"[-+.\w]+", data[: 1 << 20])]
            if tokens:
                first, last = tokens[rng.integers(len(tokens))]
                data = data[:first] + WORDS[rng.integers(len(WORDS))] + data[last:]
        elif kind == 3:
            where = int(rng.integers(len(data) + 1))
            data = data[:where] + WORDS[rng.integers(len(WORDS))] * int(rng.choice([1, 1, 1, 100])) + data[where:]
        elif kind == 4:
            lines = data.split(b"\n")
            a, b = (int(rng.integers(len(lines))) for _ in range(2))
            if rng.random() < 0.5:
                lines[a], lines[b] = lines[b], lines[a]
            else:
                lines.insert(a, lines[b])
            data = b"\n".join(lines)
        elif others:
            other = others[rng.integers(len(others))]
            where, there = int(rng.integers(len(data) + 1)), int(rng.integers(len(other) + 1))
            data = data[:where] + other[there : there + int(2 ** rng.uniform(0, 10))] + data[where:]
    return data
