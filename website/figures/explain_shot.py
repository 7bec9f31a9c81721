"""The page of ``winnow explain``, of a recorded selection, as headless Chromium shows it.

    python -m website.figures.explain_shot record --json    the record ``explain``: what the command kept of the text made here

The record holds what the page is made of (:func:`winnowkv.explain.page.component_data`), as JSON in one line, so that no model
runs to draw it.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from website.records import ROOT, Record
from winnowkv.cli.main import one_sentence
from winnowkv.errors import InputError

RECORDS = ("explain",)
POLICIES, BUDGET = "winnow,snapkv,pyramidkv", "0.12"
NEEDLE, SENTENCES, BEFORE = 3, 28, 9  # number of the needle in its file; sentences of the text, and those before the needle
WIDTH, HEIGHT, TOP, COLOURS = 1320, 1060, 168, 128  # of the window in pixels; how far it is scrolled; of the file
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars")
SHOW = """
const boxes = [...document.querySelectorAll(".wx-text")];
for (const box of boxes) {
  const token = box.querySelector(`[data-at="${arguments[0]}"]`);
  if (!token) return false;
  box.scrollTop += token.getBoundingClientRect().top - box.getBoundingClientRect().top - 110;
  if (box === boxes[0]) token.dispatchEvent(new MouseEvent("click", { bubbles: true }));
}
window.scrollTo(0, arguments[1]);
document.activeElement.blur();
return true;
"""


def make(records: Mapping[str, Record], folder: Path) -> list[Path]:
    """Take it. Raises InputError if the record or Chromium is missing."""
    from winnowkv.explain.page import write_page

    record = records["explain"]
    data, token = json.loads(record.get("data")), record.get("token")
    facts = {**record.get("facts"), "measured": f"{record.content['machine']['processor']}, {record.content['date']}"}
    with tempfile.TemporaryDirectory() as held:
        page = Path(held) / "why.html"
        write_page(page, data, title="What was kept", facts=facts)
        picture = taken(page, token, Path(held) / "profile")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "explain.png"
    picture.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(file, optimize=True)
    return [file]


def taken(page: Path, token: int, profile: Path) -> Image.Image:
    """The page in headless Chromium, with one token chosen. Raises InputError if Chromium or the token is missing."""
    from selenium import webdriver

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        raise InputError("Chromium is not installed: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*QUIET, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wished = [{"name": "prefers-color-scheme", "value": "light"}, {"name": "prefers-reduced-motion", "value": "reduce"}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wished})
        browser.get(page.as_uri())
        if not browser.execute_script(SHOW, token, TOP):
            raise InputError(f"record explain: the page has no token {token}")
        shot: dict[str, str] = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        return Image.open(io.BytesIO(base64.b64decode(shot["data"])))
    finally:
        browser.quit()


def prompt() -> tuple[str, str]:
    """A text with a needle in it and a question that asks for it, and the last word of its answer."""
    from winnowkv.evaluate.needle.prompts import SENTENCE_END, read_haystack, read_needles

    needle = read_needles(ROOT / "benchmarks" / "needles_report.jsonl")[NEEDLE]
    text = read_haystack()
    ends = [found.end() for found in SENTENCE_END.finditer(text)]
    before, after = text[: ends[BEFORE]], text[ends[BEFORE] : ends[SENTENCES]].rstrip()
    return f"{before}{needle.needle} {after}\n\n{needle.question}", needle.answer.split()[-1]


def measure() -> dict[str, Any]:
    """Run ``winnow explain`` on the text, and take from its page what it shows."""
    asked, answer = prompt()
    with tempfile.TemporaryDirectory() as held:
        file, page = Path(held) / "prompt.txt", Path(held) / "why.html"
        file.write_text(asked, encoding="utf-8")
        words = ["explain", "-f", str(file), "--policies", POLICIES, "--budget", BUDGET, "--out", str(page), "--json"]
        done = subprocess.run([sys.executable, "-m", "winnowkv", *words], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise InputError(f"winnow {' '.join(words)} ended with exit code {done.returncode}")
        found = re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    if found is None:
        raise InputError("the page of winnow explain holds no data")
    data = json.loads(found[1])
    at, token = "".join(data["tokens"]).index(answer), 0  # where the answer is, and the token that begins there or before
    while len("".join(data["tokens"][: token + 1])) <= at:
        token += 1
    facts = {"model": "embedded", "prompt": f"{len(data['tokens'])} tokens", "budget": BUDGET}
    return {"model": "embedded", "token": token, "facts": facts, "data": found[1]}


def main() -> None:
    """Print the record's JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["record"])
    parser.add_argument("--json", action="store_true", required=True, help="print the record's result, which is JSON alone")
    parser.parse_args()
    json.dump(measure(), sys.stdout, ensure_ascii=False)
    print()


if __name__ == "__main__":
    with one_sentence("website.figures.explain_shot"):
        main()
