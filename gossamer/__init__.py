"""gossamer: train, judge and run lightweight equivariant interatomic potentials.

The public names resolve on first use, so that `import gossamer` and `gossamer --help` do not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "gossamer.potential_file",
    "save": "gossamer.potential_file",
    "Potential": "gossamer.potential",
    "Structure": "gossamer.data.structure",
    "read_structures": "gossamer.data.readers",
    "Calculator": "gossamer.simulation.calculator",
    "Engine": "gossamer.engine.engine",
    "TorchSimModel": "gossamer.simulation.torchsim",
    "train": "gossamer.runs",
    "fit": "gossamer.fitting",
    "evaluate": "gossamer.accuracy",
    "calibrate": "gossamer.accuracy",
    "predict": "gossamer.predicting",
    "with_dispersion": "gossamer.simulation.dispersion",
    "compare": "gossamer.comparison",
    "learn": "gossamer.learning",
    "import_potential": "gossamer.imports",
    "judge": "gossamer.checks.judge",
    "export": "gossamer.engine.program",
    "md": "gossamer.simulation.md",
    "md_files": "gossamer.simulation.md_files",
    "parity": "gossamer.ways",
    "relax": "gossamer.simulation.relax",
    "relax_files": "gossamer.simulation.relax",
    "inspect": "gossamer.data.inspection",
    "screen": "gossamer.screening.screen",
}
__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'gossamer' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
