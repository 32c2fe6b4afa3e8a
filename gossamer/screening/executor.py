"""Workers by Parsl, on this machine or in jobs of Slurm; what a killed submitter left of them is found and ended."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from gossamer.screening.config import MachineConfig

try:
    import parsl
    import psutil
    from parsl.config import Config
    from parsl.dataflow.dflow import DataFlowKernel
    from parsl.executors import HighThroughputExecutor
    from parsl.executors.high_throughput import executor as htex
    from parsl.executors.high_throughput.errors import ManagerLost, WorkerLost
    from parsl.executors.status_handling import BadStateException
    from parsl.jobs.states import JobState, JobStatus
    from parsl.launchers import SrunLauncher
    from parsl.providers import LocalProvider, SlurmProvider
    from parsl.providers.errors import SubmitException
except ImportError as error:
    raise ImportError(f"Screening needs the package parsl ({error}): pip install 'gossamer[screen]'") from None

log = logging.getLogger(__name__)
logging.getLogger("parsl").setLevel(logging.CRITICAL)  # what concerns the user is said here
MARK = "GOSSAMER_SCREENING"
"""environment variable by which every process of a screening is known"""
HEARTBEAT, LOST = {"none": 2, "slurm": 15}, {"none": 20, "slurm": 120}
"""s between signs of life, and without one until a node is given up"""
CLEANUP = 20.0
"""s that Parsl may take to end; its processes are ended then in any case"""
POLL, YOUNG, ASK_AGAIN, OUTAGE = 20, 15.0, 60.0, 1800.0
"""s between questions to Slurm about jobs; until a job is asked about, as sacct knows it seconds late, and what it does not know has ended for
Parsl; from a job that was refused to the next try; of refusals without a job until they are final"""
LATE = 30
"""s that a command of Slurm may take"""
ENDED_AT_ONCE = 3
"""jobs in a row whose workers never came, after which no other is submitted"""
UNQUOTED = " \t'\"$&;()<>|*?`"
"""signs in a path that Parsl's shell commands, which do not quote it, would take for their own"""
POOL, INTERCHANGE = "gossamer.screening.pool", "gossamer.screening.interchange"

__all__ = ["BadStateException", "ManagerLost", "WorkerLost", "Workers", "cancel_jobs", "end_processes", "parsl_config"]


def parsl_config(machine: MachineConfig, folder: Path, mark: str) -> Config:
    """What Parsl needs to know.

    Args:
        machine: Where to run.
        folder: Of Parsl's own files; nodes of Slurm must see it.
        mark: Of the processes.

    Raises:
        ValueError: a folder whose name Parsl, which does not quote it, would take apart: its workers would never come.
    """
    if any(sign in str(folder.resolve()) for sign in UNQUOTED):
        raise ValueError(
            f"'{folder.resolve()}': Parsl cannot start workers beside results whose path has spaces or other signs of the shell. Choose another --out."
        )
    n_workers = machine.workers_per_node()
    here = machine.scheduler == "none"
    executor = HighThroughputExecutor(
        label="screening", provider=_local(machine, mark) if here else _slurm(machine, mark), max_workers_per_node=n_workers,
        cores_per_worker=1e-6,  # how many there are is said by max_workers_per_node
        available_accelerators=machine.gpus if machine.gpus <= n_workers else n_workers, address="127.0.0.1" if here else machine.address,
        heartbeat_period=HEARTBEAT[machine.scheduler], heartbeat_threshold=LOST[machine.scheduler], encrypted=True,
        # no new block goes to a job that ends soon
        drain_period=None if here else max(machine.seconds - max(120, machine.seconds // 10), machine.seconds // 2),
        launch_cmd=htex.DEFAULT_LAUNCH_CMD.replace("process_worker_pool.py", f"{sys.executable} -m {POOL}"),
        interchange_launch_cmd=[sys.executable, "-m", INTERCHANGE], block_error_handler=_look_at_jobs,
    )  # fmt: skip
    return Config(
        executors=[executor], run_dir=str(folder), strategy="simple", strategy_period=1 if here else 5, initialize_logging=False,
        usage_tracking=0, retries=0,
    )  # fmt: skip


def _environment(machine: MachineConfig, mark: str) -> str:
    """Shell lines before the workers start."""
    lines = [machine.setup.strip(), f"export {MARK}={mark} SPT_NOENV=1 OMP_NUM_THREADS={machine.threads} OMP_WAIT_POLICY=passive"]
    return "\n".join(line for line in lines if line)


def _local(machine: MachineConfig, mark: str) -> LocalProvider:
    return LocalProvider(init_blocks=1, min_blocks=0, max_blocks=1, worker_init=_environment(machine, mark))


def _slurm(machine: MachineConfig, mark: str) -> SlurmProvider:
    # without cpus-per-task, srun (from 22.05 on) would bind all workers of a node to one core
    options = "".join(f"#SBATCH {option}\n" for option in machine.options)
    return Slurm(
        partition=machine.partition, account=machine.account, qos=machine.qos, constraint=machine.constraint, nodes_per_block=machine.nodes,
        cores_per_node=machine.cores, mem_per_node=machine.memory, gpus_per_node=machine.gpus or None, init_blocks=machine.jobs, min_blocks=0,
        max_blocks=machine.jobs, walltime=f"0:{-(-machine.seconds // 60)}:00", scheduler_options=options.rstrip(), worker_init=_environment(machine, mark),
        exclusive=machine.cores is None, launcher=SrunLauncher(overrides="--cpus-per-task=$SLURM_CPUS_ON_NODE"),
    )  # fmt: skip


class Slurm(SlurmProvider):
    """Parsl's, that knows why a job was refused, does not ask again at once, and believes that a job is there when it was just taken."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, cmd_timeout=LATE)
        self.refusal = ""
        """what sbatch said of the last job; nothing if it took it"""
        self.refused_at: list[float] = []
        """times of refusals since a job was taken"""
        self.ever_taken = False
        self._taken_at: dict[str, float] = {}

    def submit(self, command: str, tasks_per_node: int, job_name: str = "gossamer") -> str:
        """As Parsl's; a job that is refused is offered again after a minute."""
        if self.refused_at and time.monotonic() - self.refused_at[-1] < ASK_AGAIN:
            raise SubmitException(job_name, "refused a moment ago")
        try:
            job = super().submit(command, tasks_per_node, job_name)
        except Exception as error:  # of sbatch, or none in time
            said = " ".join(f"{getattr(error, 'stderr', None) or ''} {getattr(error, 'stdout', None) or ''}".split()) or str(error)
            if self.ever_taken and said != self.refusal:
                log.warning("sbatch takes no further job now (it is asked again): %s", said)
            self.refusal = said
            self.refused_at.append(time.monotonic())
            raise
        self.refusal, self.refused_at, self.ever_taken = "", [], True
        self._taken_at[job] = time.monotonic()
        return job

    def _status(self) -> None:
        now = time.monotonic()
        young = {job: self.resources.pop(job) for job, at in self._taken_at.items() if now - at < YOUNG and job in self.resources}
        try:
            super()._status()
        finally:
            self.resources.update(young)

    @property
    def status_polling_interval(self) -> int:
        return POLL


def _look_at_jobs(executor: Any, status: Mapping[str, JobStatus], threshold: int = ENDED_AT_ONCE) -> None:
    """Give up, with the reason, if no job can be had: sbatch refuses, or workers of the last ones never came. Those at work go on in any case."""
    if any(job.state in (JobState.PENDING, JobState.RUNNING) for job in status.values()):
        return
    provider = executor.provider
    refused = getattr(provider, "refused_at", [])
    if refused:
        if not provider.ever_taken or refused[-1] - refused[0] > OUTAGE:
            executor.set_bad_state_and_fail_all(RuntimeError(f"sbatch refuses the job: {provider.refusal}"))
        return
    newest = [status[block] for block in sorted(executor.blocks_to_job_id, key=int)[-threshold:] if block in status]
    if len(newest) == threshold and all(job.state in (JobState.FAILED, JobState.MISSING) for job in newest):
        how = "failed" if any(job.state == JobState.FAILED for job in newest) else "ended before their workers came"
        executor.set_bad_state_and_fail_all(RuntimeError(f"{threshold} jobs in a row {how}.{_said(newest[-1])}"))


def _said(job: JobStatus) -> str:
    """The last lines of what a job wrote."""
    try:
        lines = Path(job.stderr_path or os.devnull).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
    except OSError:
        return ""
    return " The last one said:" + "".join(f"\n    {line}" for line in lines) if lines else " The last one said nothing."


class Workers:
    """Processes that run functions; started anew when what holds them together dies."""

    def __init__(self, machine: MachineConfig, folder: Path, mark: str) -> None:
        """Args: as of ``parsl_config``."""
        self.machine, self.folder, self.mark = machine, folder, mark
        self.slots = machine.slots()
        """workers that there are at most"""
        self._kernel: DataFlowKernel | None = None

    def start(self) -> None:
        """Start Parsl; workers come when they can.

        Raises:
            RuntimeError: no sbatch here.
        """
        if self.machine.scheduler == "slurm" and shutil.which("sbatch") is None:
            raise RuntimeError("scheduler slurm: there is no sbatch on this machine. Start the screening where jobs can be submitted.")
        os.environ |= {
            MARK: self.mark,
            "SPT_NOENV": "1",
        }  # of the interchange, which renames itself, and is not to write over its environment
        try:
            self._kernel = DataFlowKernel(parsl_config(self.machine, self.folder, self.mark))
        finally:
            del os.environ[MARK]

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """The answer of a function in some worker; `WorkerLost`, `ManagerLost` or `BadStateException` where it died."""
        assert self._kernel is not None
        return parsl.python_app(function, data_flow_kernel=self._kernel)(*arguments)  # type: ignore[no-any-return]

    def alive(self) -> bool:
        """Whether the process between here and the workers runs, and jobs do not fail one after the other."""
        assert self._kernel is not None
        executor: Any = self._kernel.executors["screening"]
        process = executor.interchange_proc
        return process is not None and process.poll() is None and not executor.bad_state_is_set

    def why(self) -> str:
        """What Slurm or its jobs said where there are no workers because of it, else nothing."""
        assert self._kernel is not None
        executor: Any = self._kernel.executors["screening"]
        return str(executor.executor_exception) if executor.bad_state_is_set else ""

    def close(self) -> None:
        """End all processes and jobs, and remove Parsl's files."""
        if self._kernel is not None:
            thread = threading.Thread(target=self._clean_up, args=(self._kernel, self.alive()), daemon=True)
            thread.start()
            thread.join(CLEANUP)
            self._kernel = None
            if self.machine.scheduler == "slurm":  # whatever Parsl has overlooked
                cancel_jobs(self.folder)
        end_processes([self.mark])
        shutil.rmtree(self.folder, ignore_errors=True)

    def _clean_up(self, kernel: DataFlowKernel, alive: bool) -> None:
        """Parsl's own end; what died is not asked for anything, which would wait for ever."""
        executor: Any = kernel.executors["screening"]
        try:
            if not alive:
                executor.set_bad_state_and_fail_all(RuntimeError("the interchange died"))
            kernel.cleanup()
        except Exception as error:  # of a Parsl whose parts were killed
            log.debug("Parsl: %s", error)


def cancel_jobs(folder: Path) -> list[str]:
    """Cancel the jobs whose script lies in this folder, those that wait too; returns their ids.

    Args:
        folder: Of one screening, as an absolute path; whoever calls this owns it.
    """
    try:
        listed = _call("squeue", f"--user={os.getuid()}", "--states=PD,CF,R,S", "--noheader", "--format=%i|%o")
        found = [job for job, _, script in (line.partition("|") for line in listed.splitlines()) if folder in Path(script.strip()).parents]
        if found:
            _call("scancel", *found)
    except (OSError, subprocess.SubprocessError) as error:  # no Slurm here, or one that does not answer
        log.debug("Slurm: %s", error)
        return []
    return found


def _call(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=LATE).stdout


def end_processes(marks: Collection[str]) -> list[int]:
    """End processes of this machine that carry one of these marks in their environment; returns their ids.

    A mark is a random number made for one run, so that no other process has it, whatever happened to process ids since.
    """
    wanted = set(marks)
    if not wanted:
        return []
    found = [p for p in psutil.process_iter() if p.pid != os.getpid() and _mark_of(p) in wanted]
    for process in found:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(found, timeout=10)
    return [p.pid for p in found]


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return str(process.environ().get(MARK, "")) or None
    except (psutil.Error, OSError):  # ended meanwhile, or of another user
        return None
