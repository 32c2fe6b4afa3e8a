"""Runs the tutorials and writes their pages, with what they printed and drew: python docs/make_tutorials.py [NAME ...]

A tutorial is a script in examples/ in cells (``# %%`` code, ``# %% [markdown]`` text), which editors and Jupyter open as a notebook too.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import io
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGES = HERE / "tutorials"
NAMES = ("frames_to_dynamics", "fit_for_use")


def cells(script: str) -> list[tuple[str, str]]:
    """Kind ("markdown" or "code") and text of each cell of a script."""
    found = []
    for head, body in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", script, flags=re.M):
        kind = "markdown" if "[markdown]" in head else "code"
        if kind == "markdown":
            body = re.sub(r"^# ?", "", body, flags=re.M)
        found.append((kind, body.strip()))
    return found


def shown(code: str) -> str:
    """Code as the page shows it: without marks for the linters."""
    return re.sub(r"  # noqa: \w+$", "", code, flags=re.M)


def execute(name: str) -> str:
    """The page of one tutorial, run in a fresh folder; its pictures are saved beside the page."""

    from gossamer.machine import machine, versions

    parts: list[str] = []
    scope: dict[str, Any] = {"__name__": "__main__"}
    began, here = time.perf_counter(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "demo").symlink_to(ROOT / "demo")
        os.chdir(folder)
        try:
            for kind, text in cells((ROOT / "examples" / f"{name}.py").read_text()):
                if kind == "markdown":
                    parts.append(text)
                    continue
                parts.append(f"```python\n{shown(text)}\n```")
                start, before, out = time.perf_counter(), set(Path().glob("*.png")), io.StringIO()
                with contextlib.redirect_stdout(out):
                    exec(compile(ast.parse(text), name, "exec"), scope)
                seconds = time.perf_counter() - start
                if printed := out.getvalue().rstrip():
                    parts.append(f"```text\n{printed}\n```")
                for picture in sorted(set(Path().glob("*.png")) - before):
                    shutil.copy(picture, PAGES / f"{name}-{picture.name}")
                    parts.append(f"![{picture.stem}]({name}-{picture.name})")
                if seconds > 5:
                    parts.append(f"*{seconds:.0f} s*")
                print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        finally:
            os.chdir(here)
    minutes, made = (time.perf_counter() - began) / 60, versions(["torch", "ase"])
    where = f"{machine()}; " + ", ".join(f"{k} {v}" for k, v in made.items())
    parts.append(
        f"---\n\nEvery number and picture is the output of [examples/{name}.py](../../examples/{name}.py), run as it stands on {datetime.date.today()} "
        f"in {minutes:.0f} minutes ({where}). `python docs/make_tutorials.py` runs it and writes this page."
    )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for chosen in sys.argv[1:] or NAMES:
        (PAGES / f"{chosen}.md").write_text(execute(chosen))
