"""The judge's page: what stands where, and in a browser."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import often

from gossamer.checks.judge import judge
from gossamer.checks.judge_page import write_page
from gossamer.checks.page import spark
from gossamer.checks.result import Panel, Result, at_most, conclude, curve, measured, skipped
from gossamer.checks.run_page import plot_traces

# --- the page, in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Any:
    pytest.importorskip("selenium", reason="needs selenium: pip install -e '.[dev]'")
    chromium, driver = (
        (shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")),
        shutil.which("chromedriver"),
    )
    if not chromium or not driver:
        pytest.skip("needs Chromium and ChromeDriver (Debian: chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


@pytest.mark.parametrize(("width", "height"), often([(390, 844), (1280, 900)], [(390, 844)]))
def test_page_in_a_browser(browser: Any, width: int, height: int, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    judge(
        calculator=["ase.calculators.emt:EMT", "long_name_of_a_potential=ase.calculators.emt:EMT", "third=ase.calculators.emt:EMT"],
        elements=["Cu", "Al"],
        only=["symmetry", "diatomics", "errors"],
        out=tmp_path,
        progress=False,
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    )
    browser.get((tmp_path / "report.html").as_uri())
    assert not [m for m in browser.get_log("browser") if m["level"] == "SEVERE"]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert browser.execute_script("const e = document.querySelector('.overview'); return e.scrollWidth <= e.clientWidth"), (
        "three do not fit"
    )
    assert browser.execute_script(
        "return new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size == document.querySelectorAll('[id]').length"
    ), "an id occurs twice"
    chips = [c.text for c in browser.find_elements(By.CSS_SELECTOR, ".chip")]
    assert any("passed" in c for c in chips)
    assert not any("skipped" in c for c in chips), "skipped checks are folded"
    (folded,) = browser.find_elements(By.CSS_SELECTOR, "details.skipped")
    assert folded.text == "1 skipped"
    browser.execute_script("arguments[0].open = true", folded)
    assert "Errors on labelled data: No labelled data" in folded.text
    beyond = (
        "return [...document.querySelectorAll('td, th, p, figure')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert browser.execute_script(beyond) == 0, "something is cut off at the right"
    picture = browser.find_element(By.CSS_SELECTOR, "figure button")
    assert picture.size["width"] > 100
    browser.execute_script("arguments[0].click()", picture)
    stage = browser.find_element(By.CSS_SELECTOR, "dialog .stage svg")
    assert stage.is_displayed()
    before = stage.get_dom_attribute("viewBox")
    browser.execute_script(
        "arguments[0].parentElement.dispatchEvent(new WheelEvent('wheel', {deltaY: -100, clientX: 200, clientY: 300, cancelable: true}))",
        stage,
    )
    after = stage.get_dom_attribute("viewBox")
    assert float(after.split()[2]) < float(before.split()[2])
    browser.find_element(By.CSS_SELECTOR, "dialog .close").click()
    assert not browser.find_element(By.CSS_SELECTOR, "dialog").is_displayed()


def stored(*found: tuple[str, Result], **about: Any) -> dict[str, Any]:
    return {
        "about": {"date": "2026-11-25", "machine": "a machine", **about},
        "levels": ["quick"],
        "checks": {n: r.to_dict() for n, r in found},
    }


def test_failures_come_first_and_skipped_checks_are_folded(tmp_path: Path) -> None:
    good = conclude([at_most("drift", 0.1, "meV", 1, 2, "")], [Panel("E", "ps", "meV", [curve([0, 1, 2], [0, 1, 0])])])
    bad = conclude(
        [measured("size", 1.0), at_most("jump", 30, "meV/Å", 1, 2, "It breaks.")], [Panel("F", "Å", "eV", [curve([0, 1], [0, 5])])]
    )
    everyone = {"mine": stored(("one", good), ("two", skipped("No data <given>.")), ("three", bad), ("four", good), n_train=1234)}
    checks = {name: (name.title(), f"Is {name}?", "drift") for name in ("one", "two", "three", "four")}
    write_page(tmp_path / "p.html", everyone, checks)
    text = (tmp_path / "p.html").read_text()
    body = text[text.index("<main>") :]
    assert re.findall(r'<section id="(\w+)"', body) == ["three", "one", "four"]
    overview = body[body.index("overview") : body.index("</table>")]
    assert re.findall(r'href="#(\w+)"', overview) == ["three", "one", "four"]
    assert overview.count('class="spark"') == 3
    assert re.findall(r'class="key">([^<]+) <span class="unit">([^<]+)<', overview) == [("30", "meV/Å"), ("0.1", "meV"), ("0.1", "meV")]
    headline = body[: body.index("overview")]
    assert "Jump: 30 meV/Å, expected at most 1 meV/Å" in headline  # the worst finding stands above the table
    assert "It breaks." in headline
    assert "2 passed; 1 skipped" in headline
    assert re.search(r"<details class=.skipped.>.*No data &lt;given&gt;", body, re.S)
    assert "trained on 1,234 frames" in body


def test_notes_say_whose_they_are(tmp_path: Path) -> None:
    """Of two potentials judged on different structures nothing said which was judged on what."""
    first, second = (conclude([measured("size", 1.0)], [], ["Common.", f"Structures: {own}."]) for own in ("frame 0", "built-in"))
    write_page(tmp_path / "p.html", {"a": stored(("one", first)), "b": stored(("one", second))}, {"one": ("One", "Is it?", "size")})
    notes = re.findall(r'<p class="note">([^<]+)</p>', (tmp_path / "p.html").read_text())
    assert notes == ["Common.", "a: Structures: frame 0.", "b: Structures: built-in."]


def test_names_and_errors_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    result = conclude([at_most(evil, 3, evil, 1, 2, evil)], [Panel(evil, evil, "y", [curve([0, 1], [0, 1], evil)])], [evil])
    write_page(tmp_path / "p.html", {evil: stored(("one", result)), "other": stored(("one", result))}, {"one": (evil, evil, "x")})
    text = (tmp_path / "p.html").read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_small_plots_stay_in_their_place() -> None:
    drawn = str(spark([([0, 1, 2], [0, 1e9, float("nan")], "#123456", False), ([0, 2], [1, 1], "#654321", True)], (-1.0, 4.0)))
    numbers = [float(v) for points in re.findall(r'points="([^"]+)"', drawn) for pair in points.split() for v in pair.split(",")]
    assert len(numbers) == 8
    assert min(numbers) >= 2
    assert max(numbers[::2]) <= 94
    assert max(numbers[1::2]) <= 28
    assert spark([]) == ""


def test_the_log_of_a_simulation_that_broke_at_once_has_no_traces(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,time_fs,temperature_K,conserved_energy_eV\n")
    assert plot_traces(tmp_path / "log.csv") == []
