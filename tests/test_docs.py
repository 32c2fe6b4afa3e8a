"""README and examples are executed; the demo's pieces work; the report is a page a browser can show."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONWARNINGS": "ignore"}


def run(command: list[str], folder: Path, good: tuple[int, ...] = (0,)) -> str:
    result = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode in good, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


SHORT = {
    "minutes=5": "minutes=0.1",
    "--steps 500": "--steps 60",
    "--fmax 0.05": "--fmax 0.5",
    'out="verdict")': 'out="verdict", only=["symmetry", "errors"])',
}
"""README's numbers, cut to seconds"""
IN_ONE_PROCESS = """
import json, sys
from gossamer.cli import main
for language, text in json.load(sys.stdin):
    if language == "python":
        exec(text, {"__name__": "__main__"})
    else:
        status = main(text.split())
        assert status in ((0, 1) if text.startswith(("judge", "md")) else (0,)), (text, status)  # trained for seconds, it may fail
"""


@pytest.mark.thorough
def test_readme_runs(tmp_path: Path) -> None:
    """Every Python block and gossamer command, in order, in a fresh folder, in one process: PyTorch is loaded once."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    readme = (ROOT / "README.md").read_text()
    for long, short in SHORT.items():
        assert long in readme
        readme = readme.replace(long, short)
    steps: list[tuple[str, str]] = []
    for language, text in re.findall(r"```(sh|python)\n(.*?)```", readme, flags=re.S):
        if language == "python":
            steps.append((language, text))
        commands = [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("gossamer ")]
        steps += [
            ("sh", c.removeprefix("gossamer ") + (" --only symmetry" if c.startswith("gossamer judge") else ""))
            for c in commands
            if language == "sh"
        ]
    assert len(steps) >= 7
    result = subprocess.run([sys.executable, "-c", IN_ONE_PROCESS], cwd=tmp_path, env=ENVIRONMENT, input=json.dumps(steps), capture_output=True,
                            text=True, timeout=300, check=False)  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "symmetry" in (tmp_path / "verdict" / "report.html").read_text()
    for made in (
        "judgement/judgement.json",
        "md/trajectory.traj",
        "dynamics/trajectory.traj",
        "relaxed.extxyz",
        "second/potential.safetensors",
    ):
        assert (tmp_path / made).exists(), made


@pytest.mark.parametrize("name", ["your_own_loop.py", "check_any_calculator.py"])
@pytest.mark.thorough
def test_examples_run(name: str, tmp_path: Path) -> None:
    out = run([sys.executable, str(ROOT / "examples" / name), str(ROOT / "demo" / "data" / "ethanol_500K.extxyz.xz")], tmp_path)
    assert out.strip()


# --- tutorials and pages that are made ------------------------------------------------------------------------------


@pytest.fixture
def makers() -> Iterator[Any]:
    """docs/make_settings.py and docs/make_tutorials.py as modules."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import make_settings
        import make_tutorials

        yield make_settings, make_tutorials
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("name", ["frames_to_dynamics", "fit_for_use"])
def test_tutorial_pages_show_their_scripts(name: str, makers: Any) -> None:
    """Every cell of the script stands in the page, in order; outputs are from a run, and say from which."""
    page, place = (ROOT / "docs" / "tutorials" / f"{name}.md").read_text(), 0
    for kind, text in makers[1].cells((ROOT / "examples" / f"{name}.py").read_text()):
        place = page.find(makers[1].shown(text) if kind == "code" else text, place)
        assert place >= 0, f"run python docs/make_tutorials.py {name}: the page lacks\n{text}"
    assert re.search(r"run as it stands on \d{4}-\d\d-\d\d", page)
    for picture in re.findall(r"!\[\w+\]\(([\w.-]+)\)", page):
        assert (ROOT / "docs" / "tutorials" / picture).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frames_to_dynamics", "fit_for_use"])
def test_tutorials_run(name: str, tmp_path: Path) -> None:
    """As written, in a fresh folder: minutes each."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "runs").mkdir()
    out = subprocess.run([sys.executable, str(ROOT / "examples" / f"{name}.py")], cwd=tmp_path, env=ENVIRONMENT, capture_output=True,
                         text=True, timeout=3000, check=False)  # fmt: skip
    assert out.returncode == 0, out.stderr
    numbers = re.findall(r"forces +([\d.]+) meV/Å", out.stdout)
    assert numbers
    assert float(numbers[-1]) < 150, "a potential comes out"


def test_made_pages_are_current(makers: Any) -> None:
    for name, write in makers[0].PAGES.items():
        page = write()
        assert (ROOT / "docs" / name).read_text() == page, "run python docs/make_settings.py"
        rows = [line for line in page.splitlines() if line.startswith("| `")]
        assert len(rows) > 50
        assert not [row for row in rows if row.endswith("|  |")], "an entry without an explanation"


def test_links_in_the_documentation_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page, target)


def test_report_is_self_contained_and_escaped(tmp_path: Path) -> None:
    from gossamer.checks.run_page import Report, plot_curves, plot_parity

    report = Report("A <title>", "sub")
    report.verdict("weak", "a < b & c")
    report.table(["quantity", "value"], [["energy, <meV>", 1.23456789], ["none", "-"]])
    x = np.linspace(0, 1, 50)
    report.figures(
        [(plot_curves(x, [(x, "a")], "x", "y", (x, 1 - x, "reference")), "Curve."), (plot_parity(x, x + 0.01, "eV"), 'Par"ity.')]
    )
    report.write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert "A &lt;title&gt;" in page
    assert "energy, &lt;meV&gt;" in page
    assert page.count("<figure>") == 2
    assert "Par&#34;ity." in page
    with pytest.raises(ValueError, match="status must be passed, weak or failed"):
        report.verdict("fine", "")


@pytest.mark.slow
def test_report_in_a_browser_at_two_widths(tmp_path: Path) -> None:
    """In headless Chromium nothing is wider than the window, on a desktop and on a phone."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a Chromium browser")
    test_report_is_self_contained_and_escaped(tmp_path)
    page = tmp_path / "report.html"
    probe = "<script>addEventListener('load',()=>{document.title=document.documentElement.scrollWidth<=innerWidth?'FITS':'WIDE'})</script></body>"
    page.write_text(page.read_text().replace("</body>", probe))
    for width in (1280, 500):
        out = subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             f"--user-data-dir={tmp_path / str(width)}", f"--window-size={width},900", "--dump-dom", page.as_uri()],
            capture_output=True, text=True, timeout=60, check=False,
        ).stdout  # fmt: skip
        assert "<title>FITS</title>" in out, width


@pytest.mark.slow
def test_demo_in_miniature(tmp_path: Path) -> None:
    arguments = ["--steps", "60", "--md-steps", "40", "--folder", str(tmp_path / "run"), "--report", str(tmp_path / "report.html")]
    result = subprocess.run(
        [sys.executable, str(ROOT / "demo" / "run.py"), *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert result.returncode in (0, 1), result.stderr  # sixty steps train no potential worth a verdict
    assert "verdict" in result.stdout
    assert (tmp_path / "report.html").stat().st_size > 100_000


def test_no_page_holds_the_marks_of_a_merge() -> None:
    for page in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
        *(ROOT / "recipes").rglob("*.md"),
    ]:
        assert not [line for line in page.read_text().splitlines() if line.startswith(("<<<<<<< ", ">>>>>>> "))], page
