"""The page and its component: self-contained, safe against texts, and used with pointer and keyboard in Chromium."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from support.browser import open_page, start_browser
from winnowkv.cache.kept import REASONS, KeptTokens
from winnowkv.errors import InputError
from winnowkv.explain.page import component, component_data, packed, render, write_page

ATTACK = "</script><script>alert(1)</script><!--<script><img src=x onerror=alert(2)>\"'><b>&amp;\u2028]]>"
TOKENS, LAYERS, HEADS = 240, 4, 2
NUMBER = {name: at for at, name in enumerate(REASONS)}


def texts() -> list[str]:
    return ["\n" if at % 40 == 39 else f" w{at}" for at in range(TOKENS)]


def kept_tokens(policy: str = "tested", *, scores: bool = True) -> KeptTokens:
    """Layer 0 keeps all; layer 1 the first 60 in both heads; layers 2 and 3 the tokens from 200 on, and head 1 token 5, too."""
    late = list(range(200, TOKENS))
    held = (None, torch.arange(60)[None], *2 * [torch.tensor([[-1, *late], [5, *late]])])
    reasons = [torch.full((1, TOKENS), NUMBER["everything kept"]), torch.full((1, TOKENS), NUMBER["evicted"])]
    reasons += [torch.full((2, TOKENS), NUMBER["evicted"]) for _ in range(2)]
    reasons[1][0, :60] = NUMBER["sink"]
    for layer in reasons[2:]:
        layer[:, 200:] = NUMBER["recent window"]
        layer[1, 5] = NUMBER["score"]
    numbers = [torch.full((1, TOKENS), math.nan), torch.arange(TOKENS)[None] / 1000]
    numbers += [torch.full((2, TOKENS), 0.25), torch.full((2, TOKENS), 0.5)]
    numbers[2][1, 5] = 0.75
    least = [torch.tensor([math.nan]), torch.tensor([math.nan]), torch.tensor([math.nan, 0.75]), torch.tensor([math.nan, 0.5])]
    made = [tuple(one.to(torch.uint8) for one in reasons), tuple(one.float() for one in numbers), tuple(least)]
    positions = tuple(None if one is None else one.int() for one in held)
    return KeptTokens(policy, 0.5, TOKENS, HEADS, positions, None, *(made if scores else (None, None, None)))


class Reader(HTMLParser):
    """Elements with their attributes, and all text, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def inlined(page: str) -> Any:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


# The file


def test_the_page_loads_nothing_from_elsewhere() -> None:
    text = render(component_data(texts(), [kept_tokens()]))
    for tag, attributes in Reader(text).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes)
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttp|WebSocket|innerHTML|eval\(", text)


def test_texts_cannot_break_out_of_the_page() -> None:
    hostile = [ATTACK, *texts()[1:]]
    data = component_data(hostile, [kept_tokens(ATTACK)], [[ATTACK]])
    text = render(data, title=ATTACK, facts={ATTACK: ATTACK})
    tags = Reader(text).tags
    assert [tag for tag, _ in tags].count("script") == 2
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in tags)
    assert inlined(text) == data
    assert inlined(text)["tokens"][0] == ATTACK


def test_scores_are_packed_to_two_bytes_each() -> None:
    row = torch.tensor([0.0, 1.0, math.nan, 3.14159, 1e-30, 12345.0])
    found = [struct.unpack("<f", b"\0\0" + pair)[0] for pair in zip_pairs(base64.b64decode(packed(row)))]
    torch.testing.assert_close(torch.tensor(found), row, rtol=0.004, atol=0.0, equal_nan=True)


def zip_pairs(data: bytes) -> list[bytes]:
    return [data[at : at + 2] for at in range(0, len(data), 2)]


def test_the_data_are_those_of_the_json_file_but_for_the_scores() -> None:
    kept = kept_tokens()
    (found,) = component_data(texts(), [kept], [["a note"]])["selections"]
    plain = kept.to_dict()
    assert {name: value for name, value in found.items() if name not in ("scores", "notes")} == {
        name: value for name, value in plain.items() if name != "scores"
    }
    assert found["notes"] == ["a note"]
    assert [len(part) for part in found["scores"]] == [len(part) for part in plain["scores"]]
    with pytest.raises(InputError, match="tested kept some of 240 tokens, and 1 texts were given"):
        component_data(["x"], [kept])


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"page .* cannot be written"):
        write_page(tmp_path / "no" / "why.html", component_data(texts(), [kept_tokens()]))


def test_the_component_is_two_files_that_say_what_they_take() -> None:
    script, style = component()
    assert "winnowExplain(element, data)" in script
    assert "prefers-color-scheme: dark" in style


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    opened = start_browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "why.html"
    found = component_data(texts(), [kept_tokens("first"), kept_tokens("second", scores=False)], [["a note"], []])
    write_page(file, found, facts={"model": "tiny"})
    return file


def token(browser: Any, at: int, panel: int = 0) -> Any:
    return browser.find_elements("css selector", ".wx-text")[panel].find_elements("css selector", "span")[at]


def details(browser: Any, at: int) -> list[list[str]]:
    """The cells of the table below, once it is about this token; the first row first."""
    from selenium.webdriver.support.ui import WebDriverWait

    found = browser.find_element("id", "explain")
    WebDriverWait(browser, 20).until(lambda _: found.get_attribute("data-token") == str(at))
    rows = browser.find_elements("css selector", ".wx-details > .wx-scroll tbody tr")
    return [[cell.text for cell in row.find_elements("css selector", "th, td")] for row in rows]


def opened_rows(browser: Any, summary: str, rows: str) -> list[str]:
    """Rows of a table that is filled when its summary is clicked."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.find_element("css selector", summary).click()
    found = WebDriverWait(browser, 20).until(lambda _: browser.find_elements("css selector", rows))
    return [row.text for row in found]


def said(browser: Any) -> str:
    """What a screen reader says of the token that has the focus."""
    return browser.switch_to.active_element.get_attribute("aria-label")


def test_a_token_is_as_dark_as_its_layers_are_many(browser: Any, page: Path) -> None:
    open_page(browser, page)
    shades = [int(token(browser, at).get_attribute("class")[1:]) for at in (5, 6, 100, 220)]
    assert shades == [8, 4, 2, 6]  # of 4, 2, 1 and 3 layers
    darkness = [
        browser.execute_script("return getComputedStyle(arguments[0]).backgroundColor", token(browser, at)) for at in (5, 6)
    ]
    assert darkness[0] != darkness[1]
    assert browser.get_log("browser") == []


def test_pointing_at_a_token_shows_what_decided(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    open_page(browser, page)
    ActionChains(browser).move_to_element(token(browser, 5)).perform()
    first, second = details(browser, 5)
    assert first == [
        "first", "4 of 4", "6 of 8", "everything kept 2, sink 2, score 2, evicted 2", "0.75 (layer 2, head 1)", "0.75",
    ]  # fmt: skip
    assert second[:4] == ["second", "4 of 4", "6 of 8", "scores were not kept"]
    assert "w5" in browser.find_element("css selector", ".wx-title").text
    rows = opened_rows(browser, ".wx-details summary", ".wx-tall tbody tr")
    assert rows[2].startswith("2 1 of 2 heads · evicted, score · score 0.75 (enough: 0.75) 1 of 2 heads")
    assert len(rows) == LAYERS
    assert browser.get_log("browser") == []


def test_the_keyboard_reaches_every_token(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    open_page(browser, page)
    browser.find_element("css selector", ".wx-panel summary").send_keys(Keys.TAB)
    focused = browser.switch_to.active_element
    assert focused == token(browser, 0)
    assert details(browser, 0)[0][1] == "2 of 4"
    focused.send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element == token(browser, 1)
    assert said(browser) == "w1: kept by 2 of 4 layers; everything kept in 2 heads, sink in 2 heads, evicted in 4 heads"
    browser.switch_to.active_element.send_keys(Keys.END)
    assert details(browser, TOKENS - 1)[0][1] == "3 of 4"
    browser.switch_to.active_element.send_keys(Keys.PAGE_UP)
    assert browser.switch_to.active_element == token(browser, TOKENS - 101)
    browser.switch_to.active_element.send_keys(Keys.HOME)
    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    below, above = browser.switch_to.active_element, token(browser, 0)
    spots = [browser.execute_script("return [...arguments[0].getClientRects()].at(-1)", one) for one in (above, below)]
    assert spots[1]["y"] > spots[0]["y"]
    assert abs(spots[1]["x"] - spots[0]["x"]) < 60
    below.send_keys(Keys.ARROW_UP)
    assert browser.switch_to.active_element == above
    above.send_keys(Keys.ARROW_LEFT)  # there is none before it
    assert browser.switch_to.active_element == above
    assert [one.get_attribute("tabindex") for one in browser.find_elements("css selector", ".wx-text [tabindex]")] == ["0", "0"]


def test_the_map_and_the_budgets_are_there_as_text(browser: Any, page: Path) -> None:
    open_page(browser, page)
    canvas = browser.find_element("css selector", "canvas[role=img]")
    assert "Map of 4 layers by 240 positions" in canvas.get_attribute("aria-label")
    assert browser.find_element("css selector", ".wx-bars").text.split() == ["240", "60", "41", "41"]
    rows = opened_rows(browser, ".wx-panel summary", ".wx-panel table tbody tr")
    assert rows[0] == " ".join(["0", "240", *["100%"] * 10])
    assert rows[1] == " ".join(["1", "60", "100%", "100%", "50%", *["0%"] * 7])
    assert rows[2].startswith("2 40.5 2% 0%")
    assert "a note" in browser.find_element("css selector", ".wx-panel").text


def test_the_map_is_painted_and_leads_to_its_token(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    open_page(browser, page)
    canvas = browser.find_element("css selector", "canvas[role=img]")
    wait = WebDriverWait(browser, 20)
    wait.until(lambda _: canvas.get_property("height") == LAYERS)  # painted once its size is known
    pixels = browser.execute_script(
        """const canvas = arguments[0], context = canvas.getContext("2d");
        return [[0.1, 0], [0.1, 1], [0.5, 1], [0.9, 3], [0.5, 3]].map(([x, layer]) =>
            [...context.getImageData(Math.floor(x * canvas.width), layer, 1, 1).data].join());""",
        canvas,
    )
    kept, gone = pixels[0], pixels[2]
    assert kept != gone
    assert pixels == [kept, kept, gone, kept, gone]
    size = canvas.size
    there = ActionChains(browser).move_to_element_with_offset(canvas, int(0.4 * size["width"]), int(0.4 * size["height"]))
    there.perform()
    title = browser.find_element("css selector", ".wx-title")
    wait.until(lambda _: "layer 3: first 2 of 2 heads" in title.text)
    there.click().perform()
    near = range(int(0.9 * TOKENS) - 3, int(0.9 * TOKENS) + 4)
    assert said(browser).startswith(tuple(f"w{at}: kept by 3 of 4 layers" for at in near))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(browser: Any, page: Path, scheme: str) -> None:
    """At least 4.5 to 1, as WCAG asks, for every shade and all text."""
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    try:
        open_page(browser, page)
        token(browser, 3).click()
        details(browser, 3)
        worst = browser.execute_script(CONTRAST)
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert worst[0] >= 4.5, worst


# The least contrast of an element with text of its own to the nearest background, and the element.
CONTRAST = """
const probe = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const rgb = (colour) => { probe.clearRect(0, 0, 1, 1); probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1);
  return [...probe.getImageData(0, 0, 1, 1).data]; };
const linear = (c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const behind = (one) => { for (; one; one = one.parentElement) {
  const colour = rgb(getComputedStyle(one).backgroundColor); if (colour[3] === 255) return colour; } return [255, 255, 255]; };
let worst = [99, ""];
for (const one of document.querySelectorAll("body *:not(script):not(noscript *)")) {
  if (![...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) || !one.checkVisibility()) continue;
  const [a, b] = [light(rgb(getComputedStyle(one).color)), light(behind(one))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < worst[0]) worst = [ratio, one.outerHTML.slice(0, 200)];
}
return worst;
"""


def test_hostile_texts_run_nothing(browser: Any, tmp_path: Path) -> None:
    hostile = [ATTACK, *texts()[1:]]
    write_page(tmp_path / "why.html", component_data(hostile, [kept_tokens(ATTACK)], [[ATTACK]]), title=ATTACK)
    open_page(browser, tmp_path / "why.html")
    token(browser, 0).click()
    details(browser, 0)
    assert browser.get_log("browser") == []  # an alert would have thrown before, an image would be refused here
    assert token(browser, 0).get_property("textContent") == ATTACK


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(browser: Any, page: Path, width: int) -> None:
    open_page(browser, page, width=width)
    token(browser, 3).click()
    details(browser, 3)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_component_can_be_driven_and_taken_away(browser: Any, page: Path) -> None:
    open_page(browser, page)
    browser.execute_script(
        """const data = JSON.parse(document.getElementById("data").textContent), place = document.createElement("div");
        for (const one of data.selections) one.scores = null, one.reasons = null, one.thresholds = null, one.label = "plain";
        document.getElementById("explain").replaceWith(place); place.id = "explain";
        window.made = winnowExplain(place, data); window.made.select(7); window.made.redraw();"""
    )
    assert details(browser, 7)[0][:4] == ["plain", "2 of 4", "4 of 8", "scores were not kept"]
    browser.execute_script("window.made.remove()")
    assert browser.find_element("id", "explain").text == ""
    assert browser.get_log("browser") == []


def test_it_says_what_was_kept_without_javascript(browser: Any, page: Path) -> None:
    open_page(browser, page, script=False)
    try:
        text = browser.find_element("css selector", "body").text
        assert "tiny" in text
        assert "first 0.5 39.7% 40.5 240" in text
    finally:
        open_page(browser, page)
