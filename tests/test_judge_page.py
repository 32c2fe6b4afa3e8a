"""The judge's page, in a browser."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from gossamer.checks.judge import judge

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


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_page_in_a_browser(browser: Any, width: int, height: int, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    judge(
        calculator=["ase.calculators.emt:EMT", "long_name_of_a_potential=ase.calculators.emt:EMT"],
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
    assert browser.execute_script(
        "return new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size == document.querySelectorAll('[id]').length"
    ), "an id occurs twice"
    chips = [c.text for c in browser.find_elements(By.CSS_SELECTOR, ".chip")]
    assert any("passed" in c for c in chips)
    assert any("skipped" in c for c in chips)
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
