"""The picture of the server's page: its example is asked in headless Chromium, twice, and the second run is shown.

    winnow serve --model embedded --port 8000
    python benchmarks/serve_picture.py http://127.0.0.1:8000 --out docs/pictures/serve.png

``--dark`` takes it in dark colours. The first run is not shown, since the first prompts that a process reads take longer.
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

WIDTH, HEIGHT, COLORS = 1280, 2330, 256
LONGEST = 600  # seconds for two answers
LOADED = "return document.querySelector('#policy').options.length > 0"
READ = "return document.querySelector('#question').value !== ''"
ANSWERED = "return document.querySelector('#stop').hidden && !document.querySelector('#verdict').hidden"
DRAWN = """
const box = document.querySelector(".wx-text");
const kept = [...box.querySelectorAll(".k8")].find((one) => one.textContent === " password");
const below = kept.getBoundingClientRect().top - box.getBoundingClientRect().top;
box.scrollTop += below - 110;
return kept.checkVisibility({ contentVisibilityAuto: true }) && Math.abs(below - 110) < 2;
"""


def take(url: str, dark: bool) -> Image.Image:
    """Ask, and take the picture."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory() as profile:
        for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            return shown(browser, url, dark)
        finally:
            browser.quit()


def shown(browser: webdriver.Chrome, url: str, dark: bool) -> Image.Image:
    """The page after its example was asked."""

    def until(script: str) -> None:
        WebDriverWait(browser, LONGEST, 0.2).until(lambda _: browser.execute_script(script))

    size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    wished = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wished.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(url)
    until(LOADED)
    browser.find_element("id", "example").click()
    until(READ)
    for _ in range(2):
        browser.find_element("id", "go").click()
        until(ANSWERED)
    for side in ("compressed", "full"):
        print(side, browser.find_element("id", side).text.split("\n"))
    browser.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    until(DRAWN)
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    return Image.open(io.BytesIO(base64.b64decode(taken["data"])))


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    picture = take(given.url, given.dark).convert("RGB").quantize(COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(given.out, optimize=True)
    print(given.out, given.out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
