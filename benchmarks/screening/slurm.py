"""Screenings on a real Slurm, disturbed: python benchmarks/screening/slurm.py [--structures 200] [--only NAME ...] [--short]

A Slurm of one node (munged, slurmctld, slurmd of Debian's slurmctld, slurmd, slurm-client and munge; loopback alone, a folder of its own, as
whoever calls this) is started and ended here. On it structures are screened as a user would, and the submitter is killed, a job meets its
walltime, a job is cancelled, the partition or the lines of setup are wrong. Every structure must end with one row, rows written before must
be untouched, answers must be those of a screening without Slurm, and neither jobs nor processes may be left. One line for each check.

"remote" checks run the submitter in process numbers of its own (unshare, needs root): it sees the processes of its jobs as little as a
login node does those of a compute node.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import ase.io
import psutil
from ase.calculators.emt import EMT
from kills import MARK, alloys

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo", "srun")
ACCOUNTS = ("slurmdbd", "sacctmgr", "mariadbd", "mariadb-install-db", "mariadb")
EMT_NAME, SLOW, SLOWER = "ase.calculators.emt:EMT", "slurm:Slow", "slurm:Slower"
CONFIGURATION = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
{accounting}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=5
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=86400
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
DATABASE = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={database_port}
SlurmUser={user}
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={storage_port}
StorageUser=slurm
StoragePass=slurm
"""
STORED = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={database_port}
AccountingStoragePass={folder}/munge.socket"""


class Slow(EMT):
    """EMT that takes its time, asleep: the machine stays free, and answers are EMT's."""

    seconds = 0.03
    """of each evaluation"""

    def calculate(self, *arguments: Any, **options: Any) -> None:
        time.sleep(self.seconds)
        super().calculate(*arguments, **options)


class Slower(Slow):
    seconds = 0.3


def missing(accounting: bool = False) -> list[str]:
    """Programs of a Slurm that are not on this machine."""
    programs = [*PROGRAMS, *(ACCOUNTS if accounting else ())]
    return [name for name in programs if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def one_node(folder: Path, accounting: bool = False) -> Iterator[dict[str, str]]:
    """A Slurm of one node with two cores; yields the environment in which its commands find it.

    Args:
        folder: Empty; of its key, state and logs.
        accounting: With slurmdbd and MariaDB, so that there is sacct.

    Raises:
        RuntimeError: the node does not come up, with the last lines of the logs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o711)
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    ports = {name: _free_port() for name in ("controller_port", "node_port", "database_port", "storage_port")}
    values = {"host": socket.gethostname().split(".")[0], "user": psutil.Process().username(), "folder": folder, **ports}
    stored = STORED.format(**values) if accounting else "AccountingStorageType=accounting_storage/none"
    (folder / "slurm.conf").write_text(CONFIGURATION.format(accounting=stored, **values))
    (folder / "slurmdbd.conf").write_text(DATABASE.format(**values))
    (folder / "slurmdbd.conf").chmod(0o600)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")]
    with ExitStack() as ends:

        def start(*command: str) -> None:
            said = ends.enter_context(open(folder / f"{command[0]}.said", "wb"))
            ends.callback(_end, subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True))
            time.sleep(1.0)

        start("munged", "--foreground", "--force", *munge)
        if accounting:
            _start_accounting(folder, environment, start, values)
        start("slurmctld", "-D")
        start("slurmd", "-D")
        _until(lambda: "idle" in call(environment, "sinfo", "-h", "-o", "%T"), 60, "the node of Slurm does not come up", folder)
        try:
            yield environment
        finally:
            call(environment, "scancel", f"--user={values['user']}")
            with suppress(RuntimeError):
                _until(lambda: not queue(environment), 60, "jobs do not end")


def _start_accounting(folder: Path, environment: dict[str, str], start: Callable[..., None], values: dict[str, Any]) -> None:
    """A MariaDB of its own, and slurmdbd on it, which knows the cluster and the user."""
    data, user = f"--datadir={folder}/database", f"--user={values['user']}"
    call(environment, "mariadb-install-db", "--no-defaults", data, "--auth-root-authentication-method=normal", "--skip-test-db", user)
    at = [f"--socket={folder}/mariadb.socket", f"--port={values['storage_port']}"]
    start("mariadbd", "--no-defaults", user, data, *at, "--bind-address=127.0.0.1", f"--pid-file={folder}/mariadb.pid")
    _until((folder / "mariadb.socket").exists, 60, "MariaDB does not come up", folder)
    allow = "create user slurm@'{0}' identified by 'slurm'; grant all on slurm_acct_db.* to slurm@'{0}';"
    granted = "".join(allow.format(host) for host in ("127.0.0.1", "localhost"))
    call(environment, "mariadb", "--no-defaults", *at[:1], "--user=root", f"--execute={granted}")
    start("slurmdbd", "-D")
    _until(lambda: "DbdAddr" in call(environment, "sacctmgr", "show", "configuration"), 60, "slurmdbd does not come up", folder)
    for entry in (["cluster", "one"], ["account", "chemistry"], ["user", values["user"], "account=chemistry"]):
        call(environment, "sacctmgr", "--immediate", "add", *entry)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _until(true: Callable[[], Any], seconds: float, otherwise: str, logs: Path | None = None) -> float:
    """Wait until something is so; returns how long that took, in s.

    Raises:
        RuntimeError: it does not get so.
    """
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > seconds:
            said = "" if logs is None else "".join(f"\n{p.name}: {p.read_text()[-500:]}" for p in sorted(logs.glob("*.said")))
            raise RuntimeError(f"After {seconds:g} s {otherwise}.{said}")
        time.sleep(0.2)
    return time.monotonic() - began


def call(environment: dict[str, str], *command: str) -> str:
    """What a command says, whatever it thinks of it."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def queue(environment: dict[str, str], ended: bool = False) -> list[str]:
    """Ids of jobs that wait, run or end; or of all that the controller remembers."""
    return call(environment, "squeue", "-h", "-o", "%i", *(["-t", "all"] if ended else [])).split()


def rows(path: Path, columns: str = "id, status, energy, max_force, structure, steps, finished") -> dict[str, tuple[Any, ...]]:
    """Rows by id; none while there is no file."""
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return {row[0]: row for row in connection.execute(f"select {columns} from result")}
    return {}


def left_over(path: Path) -> list[psutil.Process]:
    """Processes of the screenings that wrote a file."""
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        marks = {mark for (mark,) in connection.execute("select mark from run")}
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) in marks and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Check:
    """One disturbed screening, in a folder of its own."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str], n: int) -> None:
        self.name, self.environment, self.n = name, environment, n
        self.folder = folder / name
        self.folder.mkdir(parents=True)
        self.out = self.folder / "results.sqlite"
        self.arguments: list[str] = []
        self.before = len(queue(environment, ended=True))
        self.notes = ""
        self.started: list[subprocess.Popen[bytes]] = []

    def ask(self, *arguments: str, structures: list[Any] | None = None, **machine: Any) -> None:
        """What is screened, and where.

        Args:
            arguments: Of `gossamer screen`, beside structures, machine and results.
            structures: In place of alloys.
            machine: Lines of the machine's file.
        """
        ase.io.write(self.folder / "structures.extxyz", structures or alloys(self.n))
        self.n = len(structures or alloys(self.n))
        lines = {"scheduler": "slurm", "workers": 2, "partition": "main", "walltime": '"00:10:00"', **machine}
        (self.folder / "slurm.yaml").write_text("".join(f"{k}: {v}\n" for k, v in lines.items()))
        self.arguments = ["screen", "structures.extxyz", *arguments]

    def start(self, remote: bool = False, slurm: bool = True) -> subprocess.Popen[bytes]:
        """The user's command.

        Args:
            remote: In process numbers of its own.
            slurm: Else on this machine.
        """
        where = ["--machine", "slurm.yaml"] if slurm else ["--workers", "2", "--out", "local.sqlite"]
        arguments = self.arguments if slurm else [EMT_NAME if a in (SLOW, SLOWER) else a for a in self.arguments]
        command = [sys.executable, "-m", "gossamer.cli", *arguments, *where]
        apart = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"] if remote else []
        with open(self.folder / "said.log", "ab") as said:
            self.started.append(subprocess.Popen([*apart, *command], cwd=self.folder, env=self.environment, stdout=said, stderr=said))
        return self.started[-1]

    def finish(self, process: subprocess.Popen[bytes], seconds: float = 900) -> None:
        """Wait for its end, which must be a good one; structures may have failed (1)."""
        if process.wait(seconds) not in (0, 1):
            raise RuntimeError(f"{self.name}: status {process.returncode}\n{self.said()}")

    def said(self) -> str:
        return (self.folder / "said.log").read_text()[-3000:]

    def reach(self, n: int, process: subprocess.Popen[bytes]) -> dict[str, tuple[Any, ...]]:
        """Wait until so many structures are done."""
        _until(lambda: len(rows(self.out)) >= n or process.poll() is not None, 300, f"{self.name}: no {n} rows")
        if process.poll() is not None:
            raise RuntimeError(f"{self.name}: ended too early\n{self.said()}")
        return rows(self.out)

    def judge(self, before: dict[str, tuple[Any, ...]] | None = None) -> None:
        """Complete, each once, equal to a screening on this machine, nothing left; raises AssertionError with what is not so."""
        there = rows(self.out)
        changed = [k for k, row in (before or {}).items() if there.get(k) != row]
        assert not changed, f"{self.name}: written twice: {changed[:3]}"
        self.quiet()
        self.finish(self.start(slurm=False))
        here = rows(self.folder / "local.sqlite")
        assert len(there) == len(here) == self.n, f"{self.name}: {len(there)} rows on Slurm, {len(here)} without, {self.n} structures"
        differ = [k for k in here if here[k][:-1] != there[k][:-1]]
        assert not differ, f"{self.name}: other answers than without Slurm: {[(here[k], there[k]) for k in differ[:2]]}"

    def quiet(self, seconds: float = 30) -> float:
        """How long it takes until no job and no process is there."""
        took = _until(lambda: not queue(self.environment), seconds, f"{self.name}: jobs are left")
        return took + _until(lambda: not left_over(self.out), 10, f"{self.name}: processes are left: {left_over(self.out)}")

    def jobs(self) -> int:
        return len(queue(self.environment, ended=True)) - self.before


# --- the checks -------------------------------------------------------------------------------------------------------


def undisturbed(check: Check) -> None:
    check.ask("--calculator", EMT_NAME, "--fmax", "0.01", "--block", "8")
    check.finish(check.start())
    check.judge()


def potential(check: Check) -> None:
    """Molecules of demo/data by a potential of half a minute, on kernels."""
    frames = ase.io.read(Path(__file__).parents[2] / "demo" / "data" / "ethanol_500K.extxyz.xz", index=f":{max(300, check.n)}")
    ase.io.write(check.folder / "frames.extxyz", frames)
    command = [sys.executable, "-m", "gossamer.cli", "fit", "frames.extxyz", "--minutes", "0.5", "--out", "fitted"]
    subprocess.run(command, cwd=check.folder, env=check.environment, check=True, capture_output=True)
    check.ask("--model", "fitted/potential.safetensors", "--engine", "ase", "--steps", "10", "--block", "8", structures=frames[: check.n])
    check.finish(check.start())
    check.judge()


def killed(check: Check, remote: bool = False) -> None:
    """SIGKILL to the submitter; the same command goes on."""
    check.ask("--calculator", SLOW, "--block", "2")
    first = check.start(remote)
    check.reach(check.n // 4, first)
    first.kill()
    first.wait()
    before = rows(check.out)
    began = time.monotonic()
    second = check.start(remote)
    _until(lambda: len(rows(check.out)) > len(before) or second.poll() is not None, 400, "nothing goes on")
    check.notes = f"{time.monotonic() - began:.0f} s until the next row"
    check.finish(second)
    check.judge(before)


def killed_remote(check: Check) -> None:
    killed(check, remote=True)


def abandoned(check: Check, remote: bool = False) -> None:
    """SIGKILL to the submitter, and nobody goes on: its jobs must end by themselves."""
    check.ask("--calculator", SLOW, "--block", "2")
    first = check.start(remote)
    check.reach(check.n // 8, first)
    first.kill()
    first.wait()
    check.notes = f"{check.quiet(400):.0f} s until its job had ended"


def abandoned_remote(check: Check) -> None:
    abandoned(check, remote=True)


def stopped(check: Check) -> None:
    """SIGTERM to the submitter ends all; the same command goes on."""
    check.ask("--calculator", SLOW, "--block", "2")
    first = check.start()
    check.reach(check.n // 4, first)
    first.terminate()
    assert first.wait(60) == 143, check.said()
    check.notes = f"{check.quiet():.0f} s until its job had ended"
    before = rows(check.out)
    check.finish(check.start())
    check.judge(before)


def walltime(check: Check) -> None:
    """Jobs of a minute, and more work than that."""
    check.ask("--calculator", SLOW, "--block", "8", "--fmax", "0.01", walltime='"00:01:00"')
    check.finish(check.start())
    check.judge()


def overrun(check: Check) -> None:
    """Blocks that take longer than a job of a minute: Slurm ends it, and they are done in parts."""
    check.ask("--calculator", SLOWER, "--block", "25", walltime='"00:01:00"', structures=alloys(50))
    check.finish(check.start())
    check.judge()


def cancelled(check: Check) -> None:
    """scancel of the job; another is submitted."""
    check.ask("--calculator", SLOW, "--block", "2")
    first = check.start()
    before = check.reach(check.n // 4, first)
    call(check.environment, "scancel", *queue(check.environment))
    began = time.monotonic()
    _until(lambda: len(rows(check.out)) > len(before) + 8 or first.poll() is not None, 400, "nothing goes on")
    check.notes = f"{time.monotonic() - began:.0f} s until further rows"
    check.finish(first)
    check.judge(before)


def refused(check: Check) -> None:
    """A partition that is not there: sbatch's words, soon."""
    check.ask("--calculator", EMT_NAME, partition="nowhere")
    fails(check, "invalid partition specified: nowhere")


def setup(check: Check) -> None:
    """Lines before the workers that fail: their words, soon."""
    check.ask("--calculator", EMT_NAME, setup="source /nowhere/env/bin/activate; exit 3")
    fails(check, "/nowhere/env/bin/activate: No such file")


def fails(check: Check, words: str) -> None:
    began = time.monotonic()
    process = check.start()
    assert process.wait(900) == 2, check.said()
    assert words in check.said(), check.said()
    check.notes = f"said so after {time.monotonic() - began:.0f} s"
    check.quiet()


CHECKS: dict[str, Callable[[Check], None]] = {
    f.__name__.replace("_", "-"): f
    for f in (
        undisturbed,
        potential,
        killed,
        killed_remote,
        abandoned,
        abandoned_remote,
        stopped,
        walltime,
        overrun,
        cancelled,
        refused,
        setup,
    )
}
SHORT = ("killed", "cancelled", "refused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--structures", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}, on 40 structures")
    parser.add_argument(
        "--accounting", action="store_true", help="with slurmdbd and MariaDB (Debian: slurmdbd, mariadb-server), so that there is sacct"
    )
    parser.add_argument("--folder", type=Path, help="kept; by default a temporary one")
    given = parser.parse_args()
    if not_there := missing(given.accounting):
        more = " slurmdbd mariadb-server slurm-wlm-mysql-plugin" if given.accounting else ""
        sys.exit(f"There is no Slurm here ({', '.join(not_there)} not found): apt-get install slurmctld slurmd slurm-client munge{more}")
    names, n = (SHORT, 40) if given.short else (given.only, given.structures)
    with ExitStack() as ends:
        folder = (given.folder or Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="gossamer-slurm-")))).resolve()
        environment = ends.enter_context(one_node(folder / "slurm", given.accounting))
        here, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
        path = [*os.environ.get("PYTHONPATH", str(root)).split(":"), str(here)]
        environment |= {"PYTHONPATH": ":".join(path), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        print(
            f"{call(environment, 'sinfo', '--version').strip()}, one node of 2 cores, {'with' if given.accounting else 'without'} accounting",
            flush=True,
        )
        bad = []
        print("| check | rows | jobs | s | |\n|---|---|---|---|---|")
        for name in names:
            check, began = Check(name, folder, environment, n), time.monotonic()
            try:
                CHECKS[name](check)
            except (AssertionError, RuntimeError, subprocess.SubprocessError) as error:
                bad.append(name)
                check.notes = f"FAILED: {error}"
            finally:
                for process in check.started:
                    _end(process)
                call(environment, "scancel", *queue(environment))
            print(f"| {name} | {len(rows(check.out))} | {check.jobs()} | {time.monotonic() - began:.0f} | {check.notes} |", flush=True)
        print(json.dumps({"checks": len(names), "failed": bad}))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
