"""Options of dynamics and relaxation: flags of the command line, docs and validation come from these classes. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from gossamer.settings import settings

Way = Literal["auto", "plain", "kernels", "program", "graph"]
Ensemble = Literal["nve", "langevin", "nose-hoover", "npt", "npt-anisotropic"]
Positive = Annotated[float, Field(gt=0)]
Repeats = Annotated[int, Field(ge=1)]


@settings
class MDConfig:
    """Options of molecular dynamics (`gossamer md`)."""

    temperature: Positive = 300.0
    """K, of the thermostat and of the velocities drawn."""
    temperature_end: Positive | None = None
    """K that the thermostat reaches at the last step, in a straight line from ``temperature``; without it the temperature stays."""
    steps: Annotated[int, Field(gt=0)] = 1000
    """Time steps in all, those before a resume included."""
    timestep: Positive = 0.5
    """fs."""
    ensemble: Ensemble = "langevin"
    """nve (velocity Verlet), langevin (BAOAB), nose-hoover (chains), npt (isotropic MTK: the cell keeps its shape), npt-anisotropic
    (MTK: lengths and angles of the cell change)."""
    engine: Literal["ase", "torchsim"] = "ase"
    """Of several structures: one after the other on ASE, or many at once on TorchSim (nve and langevin;
    `pip install 'gossamer[torchsim]'`)."""
    all_frames: bool = False
    """Run every frame of each structure file; the names of the folders get the frame's number."""
    out: Path = Path("md")
    """Folder of trajectory.traj, log.csv and state.npz; of several structures: folder of their folders."""
    interval: Annotated[int, Field(gt=0)] = 20
    """Steps between frames of the trajectory and rows of the log."""
    pressure: float = 0.0
    """GPa, for npt and npt-anisotropic."""
    thermostat_time: Positive = 100.0
    """fs, relaxation time of the thermostat."""
    barostat_time: Positive = 1000.0
    """fs, relaxation time of the barostat."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the velocities drawn and of the Langevin noise; each of several structures draws its own velocities."""
    frame: int = 0
    """Which frame of the structure file to start from; -1 is the last."""
    supercell: tuple[Repeats, Repeats, Repeats] = (1, 1, 1)
    """How often the structure is repeated along each cell vector; velocities are then drawn anew."""
    new_velocities: bool = False
    """Draw velocities of the temperature even if the structure has some, which are kept otherwise (but for the motion of the centre of mass,
    where the ensemble is not langevin)."""
    resume: bool = False
    """Go on from state.npz, bit by bit as if never stopped (on TorchSim with other Langevin noise)."""
    max_temperature: Positive | None = None
    """K at which the run stops; by default 5 times the temperature + 500."""
    max_bond_stretch: Positive | None = None
    """Å by which a bond of the first frame may change before the run stops; by default not watched."""
    max_uncertainty: Positive | None = None
    """eV/Å: the run stops, its state saved, where a logged frame has a force more uncertain than this (docs/uncertainty.md); by default
    not watched."""
    collect: Path | None = None
    """File (extended XYZ) to which frames beyond max_uncertainty are written, to be labelled, instead of stopping."""
    collect_spacing: Positive = 100.0
    """fs between two collected frames, so that they are not all of one event."""
    device: str = "cpu"
    """Of a potential read from a file."""
    dtype: Literal["float32", "float64"] | None = None
    """Of a potential read from a file; by default as saved."""
    way: Way = "auto"
    """How the potential runs: plain, kernels, a compiled program, or a CUDA graph; by default the fastest that has shown its numbers right
    and pays in a run this long. A resumed run goes on as it began."""
    dispersion: str | None = None
    """Functional whose D3 is added, as simple-dftd3 names it: pbe, r2scan ... (Becke-Johnson damping; pbe/zero: zero damping). Refused where
    the potential's labels held dispersion already."""


@settings
class RelaxConfig:
    """Options of relaxation (`gossamer relax`)."""

    fmax: Positive = 0.01
    """eV/Å that no force may exceed at the end."""
    steps: Annotated[int, Field(gt=0)] = 500
    """Most steps taken, those before a resume included."""
    cell: bool = False
    """Relax the cell too (FrechetCellFilter; needs stress)."""
    optimizer: Literal["fire", "lbfgs"] = "fire"
    """Algorithm."""
    engine: Literal["ase", "torchsim"] = "ase"
    """Of several structures: one after the other on ASE, or many at once on TorchSim (FIRE; `pip install 'gossamer[torchsim]'`)."""
    all_frames: bool = False
    """Relax every frame of each structure file; the names of the relaxed ones get the frame's number."""
    out: Path | None = None
    """File of the relaxed structure, in the format of its name, in place of one of before; the path (.traj) and the optimiser's memory (.state.npz) lie beside it.
    Of several structures: folder of the relaxed ones. The command line writes relaxed.extxyz by default, or the folder relaxed."""
    frame: int = 0
    """Which frame of the structure file; -1 is the last."""
    supercell: tuple[Repeats, Repeats, Repeats] = (1, 1, 1)
    """How often the structure is repeated along each cell vector."""
    resume: bool = False
    """Go on from the files beside ``out``, exactly as if never stopped; give the original structure and the same options again."""
    device: str = "cpu"
    """Of a potential read from a file."""
    dtype: Literal["float32", "float64"] | None = None
    """Of a potential read from a file; by default as saved."""
    way: Way = "auto"
    """How the potential runs: plain, kernels, a compiled program, or a CUDA graph; by default the fastest that has shown its numbers right."""
    dispersion: str | None = None
    """Functional whose D3 is added, as simple-dftd3 names it: pbe, r2scan ... (Becke-Johnson damping; pbe/zero: zero damping). Refused where
    the potential's labels held dispersion already."""


@settings
class LearnConfig:
    """Options of active learning (`gossamer learn`)."""

    out: Path = Path("learn")
    """Folder of everything; the same command goes on with what it holds."""
    rounds: Annotated[int, Field(gt=0)] = 5
    """Most rounds of exploring, labelling and fine-tuning."""
    frames: Annotated[int, Field(gt=0)] = 10
    """Most frames labelled in a round."""
    temperatures: list[Positive] = Field(default_factory=lambda: [300.0, 500.0])
    """K; every structure walks at each."""
    steps: Annotated[int, Field(gt=0)] = 2000
    """Steps of each walk (Langevin)."""
    timestep: Positive = 0.5
    """fs."""
    spacing: Positive = 20.0
    """fs between two uncertain frames of a walk."""
    max_uncertainty: Positive | None = None
    """eV/Å from which a force is uncertain; by default three times the error of forces on the validation frames of the potential at hand, and
    never more than in the round before."""
    minutes: Positive = 2.0
    """How long each fine-tuning lasts."""
    train_steps: Annotated[int, Field(gt=0)] | None = None
    """Steps of each fine-tuning instead of ``minutes``: runs are then equal bit by bit."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the walks, another for each."""
    device: str = "cpu"
    """Of the potential."""
