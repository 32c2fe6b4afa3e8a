"""Does PyTorch open compiled programs on this machine, and if not, where does it crash?

    python benchmarks/compile/opens.py [--out FOLDER]

A program that adds one to a tensor, for the CPU and for a GPU if there is one, opened in every way there is, each in a process of its own:
by PyTorch's function for it, by the loader beneath that, by the runner beneath that from the library inside the archive, and that library
by itself; then the loader with nothing of this environment's site-packages but PyTorch, and with the system's C++ library loaded first.
Where one dies, gdb or cuda-gdb says where, if there is one. (On one machine, H200 with torch 2.11.0+cu130, every process that opened a
program died; the same PyTorch opens them elsewhere.)
"""

from __future__ import annotations

import argparse
import ctypes.util
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

MAKE = """
import sys, torch
device, path = sys.argv[1:]
class Plus(torch.nn.Module):
    def forward(self, x):
        return x + 1
exported = torch.export.export(Plus().to(device), (torch.ones(4, device=device),))
torch._inductor.aoti_compile_and_package(exported, package_path=path)
"""
RUN = "assert run([torch.ones(4, device=device)])[0].tolist() == [2.0] * 4"
WAYS = {
    "function": f"run = lambda x: [torch._inductor.aoti_load_package(archive)(*x)]; {RUN}",
    "loader": f"run = torch._C._aoti.AOTIModelPackageLoader(archive, 'model', False, 1, -1).run; {RUN}",
    "runner": "aoti = torch._C._aoti; run = (aoti.AOTIModelContainerRunnerCpu(library, 1).run if device == 'cpu' else "
    f"aoti.AOTIModelContainerRunnerCuda(library, 1, device, folder).run); {RUN}",
    "library": "import ctypes; ctypes.CDLL(library)",
}
HEAD = "import sys, torch; device, archive, library, folder = sys.argv[1:]; "


def attempt(words: list[str], environment: dict[str, str], debugger: str | None) -> str:
    """ "opens", the last line of an error, or the signal and the innermost frames."""
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return "opens"
    if done.returncode > 0:
        return (done.stderr.strip().splitlines() or ["an error without words"])[-1]
    frames = []
    if debugger is not None:
        command = [
            debugger,
            "-batch",
            "-ex",
            "set breakpoint pending on",
            "-ex",
            "run",
            "-ex",
            "bt 30",
            "-ex",
            "info sharedlibrary",
            "--args",
            *words,
        ]
        try:
            told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240).stdout
            frames = [line for line in told.splitlines() if line.startswith("#") or "libstdc++" in line or "received signal" in line]
        except subprocess.TimeoutExpired:
            frames = ["the debugger took too long"]
    return "\n    ".join([f"ends by signal {-done.returncode}", *frames])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / "opens")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    debugger = shutil.which("gdb") or shutil.which("cuda-gdb")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}, {debugger or 'no debugger'}", flush=True)
    system = ctypes.util.find_library("stdc++")
    alone = {**os.environ, "PYTHONPATH": str(Path(torch.__file__).parents[1]), "PYTHONNOUSERSITE": "1"}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        archive = (arguments.out / f"{device}.pt2").resolve()
        subprocess.run([sys.executable, "-c", MAKE, device, str(archive)], check=True)
        folder = arguments.out.resolve() / device
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
        (library,) = folder.rglob("*.so")
        names = [device, str(archive), str(library), str(library.parent)]
        for way, code in WAYS.items():
            print(f"{device}, {way}: {attempt([sys.executable, '-c', HEAD + code, *names], dict(os.environ), debugger)}", flush=True)
        loader = HEAD + WAYS["loader"]
        print(
            f"{device}, loader, PyTorch's packages alone: {attempt([sys.executable, '-S', '-c', loader, *names], alone, debugger)}",
            flush=True,
        )
        if system is not None:
            first = {**os.environ, "LD_PRELOAD": system}
            print(
                f"{device}, loader, the system's {system} first: {attempt([sys.executable, '-c', loader, *names], first, None)}", flush=True
            )


if __name__ == "__main__":
    main()
