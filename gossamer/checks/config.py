"""Settings of the judge: flags, documentation and validation come from this class. Imports nothing heavy."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from gossamer.settings import settings

NAMES = ("symmetry", "conservation", "smoothness", "diatomics", "crystals", "phonons", "conductivity", "dynamics", "errors", "discovery", "speed")  # fmt: skip
"""the checks, in the order in which they are done"""
TEMPERATURE, TIMESTEP = 300.0, 0.5
"""K and fs, where neither the user nor a protocol or a structure says otherwise"""


@settings
class JudgeConfig:
    """What the judge is asked to do."""

    level: Literal["quick", "standard", "full"] = "quick"
    """quick takes minutes, standard up to an hour on a laptop, full follows the published protocols."""
    only: tuple[str, ...] | None = None
    """Checks to do: symmetry, conservation, smoothness, diatomics, crystals, phonons, conductivity, dynamics, errors, discovery, speed."""
    skip: tuple[str, ...] = ()
    """Checks to leave out."""
    elements: tuple[str, ...] | None = None
    """Symbols, for calculators whose elements would have to be found out; a potential of ours is judged on these only."""
    data: str | None = None
    """Labelled structures for the errors."""
    same_zero: bool = False
    """The labels count energies from the potential's zero: judge energies as they are, without one fitted constant per element."""
    all_pairs: bool = False
    """Curves of all pairs of elements, not only of each with itself."""
    diatomics_reference: str | None = None
    """JSON file of reference curves of two atoms."""
    phonons_reference: str | None = None
    """JSON file of reference frequencies in THz at named points and along lines: {"Si": {"X": [4.49, ...], "Γ-X": [[0, ...], ...]}}."""
    references: tuple[str, ...] = ()
    """Reference trajectories of the simulated systems, in their order."""
    reference_interval: Annotated[float, Field(gt=0)] | None = None
    """ps between frames of the references; without it their diffusion is not compared."""
    protocol: Literal["lips", "water", "methane", "molecule", "electrolyte"] | None = None
    """Ensemble, temperature, step and windows of a published benchmark."""
    picoseconds: Annotated[float, Field(gt=0)] | None = None
    """Length of the dynamics in ps (by default 1, 5 or 50 by level, or that of the protocol)."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """K (by default that of the protocol, else the structure's temperature_K, else 300; of the protocol electrolyte the structure's first)."""
    timestep: Annotated[float, Field(gt=0)] | None = None
    """fs (by default that of the protocol, else 0.5)."""
    two_temperatures: bool = False
    """Also run slightly warmer, and compare the two ensembles."""
    conductivity_crystals: str | None = None
    """Extended XYZ file of crystals with supercells and meshes, as of phononDB-103."""
    conductivity_reference: str | None = None
    """JSON table of reference conductivities, for κ_SRME."""
    conductivity_count: Annotated[int, Field(gt=0)] | None = None
    """Only the first so many crystals."""
    discovery: str | None = None
    """Extended XYZ file of initial structures with material_id (Matbench Discovery)."""
    discovery_table: str | None = None
    """CSV table with the columns of wbm-summary.csv."""
    discovery_relaxed: str | None = None
    """Extended XYZ file of structures relaxed by DFT, for the RMSD."""
    discovery_count: Annotated[int, Field(gt=0)] | None = None
    """Only the first so many structures."""
    processes: Annotated[int, Field(gt=0)] = 1
    """Worker processes of the discovery check."""
    device: str = "cpu"
    """Of saved potentials."""
    dtype: Literal["float32", "float64"] | None = None
    """Of saved potentials; by default as saved."""
    way: Literal["auto", "plain", "kernels", "program", "graph"] = "auto"
    """How saved potentials are evaluated."""
    dispersion: str | None = None
    """Functional whose D3 is added to all that are judged, as simple-dftd3 names it: pbe, r2scan ... (pbe/zero: zero damping)."""

    @field_validator("data", "diatomics_reference", "phonons_reference", "conductivity_crystals", "conductivity_reference", "discovery",
                     "discovery_table", "discovery_relaxed", mode="before")  # fmt: skip
    @classmethod
    def _text(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @field_validator("only", "skip", "elements", "references", mode="before")
    @classmethod
    def _texts(cls, value: object) -> object:
        """One needs no list."""
        found = (value,) if isinstance(value, str | Path) else value
        return tuple(str(v) if isinstance(v, Path) else v for v in found) if isinstance(found, list | tuple) else found

    @field_validator("only", "skip")
    @classmethod
    def _known(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        unknown = [name for name in value or () if name not in NAMES]
        if unknown:
            near = get_close_matches(unknown[0], NAMES, 1)
            meant = f"Did you mean {near[0]}?" if near else f"Choose from {', '.join(NAMES)}"
            raise ValueError(f"There is no check '{unknown[0]}'. {meant}")
        return value

    def chosen(self) -> list[str]:
        """The checks to do, in their order.

        Raises:
            ValueError: none is left.
        """
        names = [n for n in NAMES if (self.only is None or n in self.only) and n not in self.skip]
        if not names:
            raise ValueError("No check is left to do: only and skip together leave none.")
        return names


FILES = ("data", "diatomics_reference", "phonons_reference", "conductivity_crystals", "conductivity_reference", "discovery", "discovery_table",
         "discovery_relaxed")  # fmt: skip
"""settings that name one file"""
GROUPS = {
    "molecular dynamics": ("references", "reference_interval", "protocol", "picoseconds", "temperature", "timestep", "two_temperatures"),
    "many crystals (restartable; finished ones are kept)": ("conductivity_crystals", "conductivity_reference", "conductivity_count",
                                                            "discovery", "discovery_table", "discovery_relaxed", "discovery_count", "processes"),
}  # fmt: skip
"""settings that stand together in the help"""
