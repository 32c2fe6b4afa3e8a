"""What a number was measured on: processor or GPU, threads, versions of packages. Imports nothing that is not loaded already."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from gossamer import __version__


def machine(device: Any = None) -> str:
    """Name of the GPU, or of the processor with the number of threads.

    Args:
        device: As PyTorch names it ("cpu", "cuda:1", a torch.device); None is the GPU where PyTorch is loaded and has one.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and (device is None or str(device).startswith("cuda")):
        return str(torch.cuda.get_device_name(device))
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) if torch is None else torch.get_num_threads()
    return f"{names[0] if names else platform.processor() or platform.machine()}, {threads} thread{'s' * (threads > 1)}"


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Versions of gossamer, Python and the packages, as far as installed."""
    found = {"gossamer": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = installed(name)
        except PackageNotFoundError:
            continue
    return found
