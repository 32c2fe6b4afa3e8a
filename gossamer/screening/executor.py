"""Workers by Parsl, on this machine or in jobs of Slurm; what a killed submitter left of them is found and ended."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Collection
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
    from parsl.jobs.error_handlers import windowed_error_handler
    from parsl.launchers import SrunLauncher
    from parsl.providers import LocalProvider, SlurmProvider
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
POOL = "gossamer.screening.pool"
INTERCHANGE = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "  # Ctrl-C is the submitter's business
    "runpy.run_module('parsl.executors.high_throughput.interchange', run_name='__main__', alter_sys=True)"
)

__all__ = ["BadStateException", "ManagerLost", "WorkerLost", "Workers", "end_processes", "parsl_config"]


def parsl_config(machine: MachineConfig, folder: Path, mark: str) -> Config:
    """What Parsl needs to know.

    Args:
        machine: Where to run.
        folder: Of Parsl's own files; nodes of Slurm must see it.
        mark: Of the processes.
    """
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
        interchange_launch_cmd=[sys.executable, "-c", INTERCHANGE], block_error_handler=windowed_error_handler,
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
    return SlurmProvider(
        partition=machine.partition, account=machine.account, qos=machine.qos, constraint=machine.constraint, nodes_per_block=machine.nodes,
        cores_per_node=machine.cores, mem_per_node=machine.memory, gpus_per_node=machine.gpus or None, init_blocks=machine.jobs, min_blocks=0,
        max_blocks=machine.jobs, walltime=machine.walltime, scheduler_options=options.rstrip(), worker_init=_environment(machine, mark),
        exclusive=machine.cores is None, launcher=SrunLauncher(overrides="--cpus-per-task=$SLURM_CPUS_ON_NODE"),
    )  # fmt: skip


class Workers:
    """Processes that run functions; started anew when what holds them together dies."""

    def __init__(self, machine: MachineConfig, folder: Path, mark: str) -> None:
        """Args: as of ``parsl_config``."""
        self.machine, self.folder, self.mark = machine, folder, mark
        self.slots = machine.workers_per_node() * (1 if machine.scheduler == "none" else machine.nodes * machine.jobs)
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

    def close(self) -> None:
        """End all processes, and remove Parsl's files."""
        if self._kernel is not None:
            thread = threading.Thread(target=self._clean_up, args=(self._kernel, self.alive()), daemon=True)
            thread.start()
            thread.join(CLEANUP)
            self._kernel = None
        end_processes([self.mark])
        shutil.rmtree(self.folder, ignore_errors=True)

    def _clean_up(self, kernel: DataFlowKernel, alive: bool) -> None:
        """Parsl's own end; what died is not asked for anything, which would wait for ever."""
        executor: Any = kernel.executors["screening"]
        try:
            if not alive:
                executor.set_bad_state_and_fail_all(RuntimeError("the interchange died"))
                if self.machine.scheduler == "slurm":
                    executor.provider.cancel(list(executor.job_ids_to_block))
            kernel.cleanup()
        except Exception as error:  # of a Parsl whose parts were killed
            log.debug("Parsl: %s", error)


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
