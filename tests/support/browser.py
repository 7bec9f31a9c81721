"""Headless Chromium for pages that we write; tests that need it skip if it is not installed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def start_browser(profile: Path) -> Any:
    """The system's Chromium with its own driver and an empty profile; it opens no connections. Skips if it is missing."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("Chromium is not installed (Debian: apt install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*QUIET, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    return selenium.Chrome(options=options, service=selenium.ChromeService(driver))


def open_page(browser: Any, file: Path, width: int = 1280, height: int = 900, script: bool = True) -> None:
    """Open a file at a window size, with or without JavaScript."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    )
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
    browser.get_log("browser")  # what an earlier page said is not this one's
    browser.get(file.as_uri())
