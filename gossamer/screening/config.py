"""Settings of a screening and of the machine it runs on: flags, YAML, docs and validation come from here. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from gossamer.files import parse_yaml
from gossamer.settings import build, settings

Count = Annotated[int, Field(gt=0)]
Task = Literal["relax", "elastic", "phonons", "judge", "single-point"]
FMAX = {"relax": 0.05, "elastic": 0.01, "phonons": 0.001}
"""eV/Å to which a task relaxes, where the user does not say"""
BLOCK = {"relax": 32, "single-point": 32}
"""structures that a worker takes at once, likewise; one for tasks that take long"""


@settings
class ScreenConfig:
    """What is asked of each structure (`gossamer screen`)."""

    task: Task = "relax"
    """relax; elastic (relaxed with the cell, then elastic constants); phonons (likewise); judge (symmetry, conservation and smoothness of the
    potential on the structure); single-point (energy, forces and stress)."""
    out: Path = Path("results.sqlite")
    """File of the results. The same command goes on where it was stopped."""
    fmax: Annotated[float, Field(gt=0)] | None = None
    """eV/Å that no force may exceed after relaxation; by default 0.05, for elastic constants 0.01, for phonons 0.001."""
    steps: Count = 500
    """Most steps of relaxation; beyond them a structure is "not converged"."""
    cell: bool = False
    """Task relax: the cell too."""
    engine: Literal["auto", "ase", "torchsim"] = "auto"
    """Of relaxation: one structure after the other on ASE, or a block at once on TorchSim; by default TorchSim, where it is installed, the
    task is relax and the potential is one of ours."""
    block: Count | None = None
    """Structures that a worker takes at once; by default 32, for elastic constants, phonons and the judge one. It changes no result; what a
    killed worker had in hand is done again."""
    time_limit: Annotated[float, Field(gt=0)] | None = None
    """Seconds that one structure may take; then its process is ended, it is "timed out", and its block goes on. By default without limit.
    Loading and compiling the potential do not count."""
    again: bool = False
    """Do structures that failed, timed out or did not converge once more."""
    device: str = "cpu"
    """Of a saved potential."""
    dtype: Literal["float32", "float64"] | None = None
    """Of a saved potential; by default as saved."""
    way: Literal["auto", "plain", "kernels", "program", "graph"] = "auto"
    """How a saved potential is evaluated."""
    dispersion: str | None = None
    """Functional whose D3 is added, as simple-dftd3 names it: pbe, r2scan ... Refused where the potential's labels held dispersion already."""

    def question(self) -> dict[str, Any]:
        """What the answers depend on beside potential and structure; not on how they are got (block, time limit)."""
        relaxes = self.task in FMAX
        return {
            "task": self.task,
            "fmax": (self.fmax or FMAX[self.task]) if relaxes else None,
            "steps": self.steps if relaxes else None,
            "cell": self.cell if self.task == "relax" else relaxes,
            "engine": self.engine,
            "device": self.device,
            "dtype": self.dtype,
            "way": self.way,
            "dispersion": self.dispersion,
        }


@settings
class MachineConfig:
    """Where a screening runs (`gossamer screen --machine FILE`): this machine, or jobs of Slurm."""

    scheduler: Literal["none", "slurm"] = "none"
    """none: processes of this machine; slurm: jobs, submitted from here."""
    workers: Count | None = None
    """Processes on each node, each with a potential of its own; by default one for each ``threads`` cores, or each GPU."""
    threads: Count = 1
    """Threads of each process. Small structures are fastest with one."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs on each node; each worker gets one. The screening needs --device cuda too."""
    jobs: Count = 1
    """Slurm: jobs at once."""
    nodes: Count = 1
    """Slurm: nodes of each job."""
    cores: Count | None = None
    """Slurm: cores asked for on each node; by default whole nodes."""
    memory: Count | None = None
    """Slurm: GB asked for on each node."""
    partition: str | None = None
    """Slurm."""
    account: str | None = None
    """Slurm: whom the time is charged to."""
    qos: str | None = None
    """Slurm: quality of service."""
    constraint: str | None = None
    """Slurm: kind of node."""
    walltime: Annotated[str, Field(pattern=r"^\d{1,3}:[0-5]\d:[0-5]\d$")] = "01:00:00"
    """Slurm: HH:MM:SS of each job. When a job ends and work is left, another is submitted."""
    options: tuple[Annotated[str, Field(pattern="^--")], ...] = ()
    """Slurm: further options of sbatch, such as --mail-type=END."""
    setup: str = ""
    """Shell lines run before the workers start, such as "module load gcc; source ~/env/bin/activate"."""
    address: str | None = None
    """Address of this machine as the nodes see it; by default all its addresses are tried."""

    @property
    def seconds(self) -> int:
        """Of the walltime."""
        hours, minutes, seconds = map(int, self.walltime.split(":"))
        return 3600 * hours + 60 * minutes + seconds

    def workers_per_node(self) -> int:
        """Processes on each node.

        Raises:
            ValueError: nothing says how many, as the nodes are not this machine.
        """
        if self.workers is not None:
            return self.workers
        if self.gpus:
            return self.gpus
        cores = self.cores if self.scheduler == "slurm" else len(os.sched_getaffinity(0))
        if cores is None:
            raise ValueError("workers: say how many processes run on each node (or cores: how many there are), for scheduler slurm.")
        return max(1, cores // self.threads)

    def slots(self) -> int:
        """Processes at most, of all jobs and nodes.

        Raises:
            ValueError: as ``workers_per_node``.
        """
        return self.workers_per_node() * (1 if self.scheduler == "none" else self.nodes * self.jobs)


def load_machine(path: Path | str | None, workers: int | None = None) -> MachineConfig:
    """The machine that a YAML file describes; without one, this machine.

    Args:
        path: YAML file of `MachineConfig`.
        workers: In place of the file's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown setting (with the nearest known name), or a wrong value.
    """
    values: Any = {}
    if path is not None:
        try:
            values = parse_yaml(Path(path).read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ValueError(f"'{path}' holds a {type(values).__name__}; expected lines such as 'workers: 4' (docs/screening.md).")
    try:
        return build(MachineConfig, values if workers is None else {**values, "workers": workers})
    except ValueError as error:
        raise ValueError(f"'{path}': {error}" if path is not None else str(error)) from None
