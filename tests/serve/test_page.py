"""The page at /: its files and headers, what it offers, and the page itself in headless Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.browser import start_browser
from support.serving import Gate, Running, ask, chat, running, tiny_app, tiny_engine, wait_until, with_client, words
from winnowkv.policies import names
from winnowkv.serve import kept
from winnowkv.serve.page import FILES, Choices, content

KEY = "key-of-this-test"
TAB, ENTER = "\ue004", "\ue007"  # as WebDriver names them
QUESTION = "w1 w2 w3"
CONTRAST = """
const light = (color) => {
  const [r, g, b] = color.map((x) => (x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const over = (colors) => {
  canvas.clearRect(0, 0, 1, 1);
  for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!(own || element.matches("input, textarea, select")) || !element.checkVisibility()) continue;
  if (element.matches("option, [disabled], [type=range], [type=radio]") || element.closest(".hidden, noscript")) continue;
  const behind = [];
  for (let at = element; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
  const ground = over(["white", ...behind]), ink = over(["white", ...behind, getComputedStyle(element).color]);
  const [low, high] = [light(ground), light(ink)].sort((a, b) => a - b);
  if ((high + 0.05) / (low + 0.05) < 4.5) found.push(`${element.tagName} ${element.className}: ${element.textContent}`);
}
return found;
"""


def get(path: str, app: Any = None, **options: Any) -> httpx.Response:
    return with_client(app or tiny_app(), lambda client: client.get(path, **options))


def test_the_page_and_its_files_may_load_nothing_from_elsewhere() -> None:
    app = tiny_app()

    async def each(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get(path) for path in ("/", *(f"/static/{name}" for name in FILES), "/static/example.json")]

    for answer in with_client(app, each):
        assert answer.status_code == 200
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert {policy[name] for name in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-type"].split(";")[0] in (
            "text/html", "text/css", "text/javascript", "image/svg+xml", "application/json",
        )  # fmt: skip


def test_the_files_name_no_other_place_and_set_no_markup() -> None:
    sources = {name: content(name, folder).decode() for name, (folder, _) in FILES.items()}
    sources["page.html"] = content("page.html", "serve/static").decode()
    for name, text in sources.items():
        links = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+", text)) - {"http://www.w3.org"}
        assert not links, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|localStorage|cookie", text), name
    assert not re.search(r"<script>|<style>| style=| on\w+=", sources["page.html"])


@pytest.mark.parametrize(
    "name", ["page.py", "../page.py", "..%2fpage.py", "%2e%2e/keys.py", "page.html", "", "PAGE.JS", "a/page.js"]
)
def test_nothing_but_the_files_of_the_page_is_served(name: str) -> None:
    answer = get(f"/static/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_route"


def test_the_example_holds_the_answer_to_its_question() -> None:
    example = get("/static/example.json").json()
    assert "password for the harbor office computer is silver pelican." in example["text"]
    assert example["question"].startswith("What is the password for the harbor office")
    assert 10_000 < len(example["text"]) < 20_000


def test_every_choice_that_is_offered_is_served() -> None:
    app = tiny_app(max_new_tokens=50)

    async def each(client: httpx.AsyncClient) -> None:
        offered = Choices.model_validate((await client.get("/v1/winnow/policies")).json())
        assert (offered.model, offered.budget, offered.max_new_tokens) == ("tiny", 20, 50)
        found = [one.name for one in offered.policies]
        assert offered.policy == found[0] == "snapkv:observe=8:kernel=3"
        assert set(found[1:]) <= set(names())
        assert {"winnow", "snapkv", "full", "windowkv"} <= set(found)
        assert "kvzip" not in found  # it has to read the text again, which no request can ask for
        for one in offered.policies:
            assert one.levels or not one.evicts or one.name.startswith(("snapkv:", "random", "streaming"))
            for level in one.levels[-1:]:
                winnow = {"policy": one.name, "budget": 0.5, "quality": level, "explain": True}
                answer = await client.post("/v1/chat/completions", json=chat(words(60), max_tokens=1, winnow=winnow))
                assert answer.status_code == 200, answer.text

    with_client(app, each)


def test_a_level_that_contradicts_the_policy_is_not_offered() -> None:
    engine = tiny_engine(policy="snapkv:observe=8:kernel=3:lookahead=4")
    offered = get("/v1/winnow/policies", tiny_app(engine)).json()
    assert offered["policies"][0]["levels"] == []


def test_with_a_key_the_page_is_open_and_what_it_asks_for_is_not() -> None:
    app = tiny_app(api_keys=(KEY,))

    async def each(client: httpx.AsyncClient) -> list[int]:
        open_paths = [(await client.get(path)).status_code for path in ("/", "/static/page.js", "/static/example.json")]
        closed = (await client.get("/v1/winnow/policies")).status_code
        known = (await client.get("/v1/winnow/policies", headers={"authorization": f"Bearer {KEY}"})).status_code
        return [*open_paths, closed, known]

    assert with_client(app, each) == [200, 200, 200, 401, 200]


class Page:
    """The page of a running server in a browser."""

    def __init__(self, browser: Any, server: Running) -> None:
        self.browser, self.server = browser, server

    def open(self, width: int = 1280, scheme: str = "light") -> None:
        """Load it at a window's width, and wait until it may be asked."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        look = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", look)
        self.browser.get(self.server.url)

    def js(self, script: str, *values: Any) -> Any:
        return self.browser.execute_script(script, *values)

    def part(self, css: str) -> Any:
        return self.browser.find_element("css selector", css)

    def text(self, css: str) -> str:
        return self.js("return document.querySelector(arguments[0]).innerText", css)

    def until(self, condition: str, *values: Any) -> None:
        wait_until(lambda: bool(self.js(f"return {condition}", *values)))

    def ready(self) -> None:
        self.until("document.querySelector('#policy').options.length > 0")

    def fill(self, text: str, **values: Any) -> None:
        """Write the text and the other fields as a script would paste them."""
        for name, value in {"text": text, "question": QUESTION, **values}.items():
            self.js(
                "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
                "field.dispatchEvent(new Event('input', { bubbles: true }));", name, value,
            )  # fmt: skip

    def ask(self) -> None:
        self.part("#go").click()

    def answered(self) -> None:
        self.until("document.querySelector('#stop').hidden && !document.querySelector('#verdict').hidden")

    def complaints(self) -> list[str]:
        """What the browser has logged: errors, and requests that the page's policy forbids."""
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    started = start_browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def server(browser: Any) -> Iterator[Running]:
    with running(tiny_app(max_prompt_tokens=200)) as one:
        yield one


@pytest.fixture
def page(browser: Any, server: Running) -> Page:
    opened = Page(browser, server)
    opened.open()
    opened.ready()
    opened.complaints()
    return opened


@pytest.mark.slow
def test_a_text_is_asked_and_both_answers_and_the_kept_tokens_are_shown(page: Page) -> None:
    text = words(90)
    page.fill(text, length="8", budget="25", policy="snapkv:observe=8:kernel=3")
    page.ask()
    page.answered()
    body = chat(f"{text}\n\n{QUESTION}", max_tokens=8)
    sides = {"compressed": {"policy": "snapkv:observe=8:kernel=3", "budget": 0.25, "explain": True}, "full": {"policy": "full"}}
    for side, winnow in sides.items():
        truth = ask(tiny_app(), {**body, "winnow": winnow}).json()
        assert page.text(f"#{side} .answer") == truth["choices"][0]["message"]["content"]
        used = truth["usage"]["winnow"]
        share = 100 * used["kept_bytes"] / used["full_bytes"]
        assert float(page.part(f"#{side} .bar").get_attribute("aria-valuenow")) == pytest.approx(share, abs=0.06)
        assert page.text(f"#{side} .count") == "8 tokens"
        assert re.fullmatch(r"[\d.]+ s", page.text(f"#{side} .first"))
        assert float(page.text(f"#{side} .speed")) > 0
        if side == "compressed":
            told = truth["winnow_kept"]
    assert re.match(r"[\d.]+. less memory", page.text("#verdict"))
    spans = page.js(
        "return [...document.querySelectorAll('#kept-view [data-at]')].map(s => [s.textContent.trim(), s.className])"
    )
    layers = [{at for row in rows for at in row} for rows in told["positions"]]
    counts = [sum(at in layer for layer in layers) for at in range(told["tokens"])]
    assert [text for text, _ in spans] == [text.strip() for text in told["texts"]]
    assert [name == "k0" for _, name in spans] == [count == 0 for count in counts]
    assert [name == "k8" for _, name in spans] == [count == told["layers"] for count in counts]
    page.part("#passages button").click()
    chosen = page.js("return document.activeElement.textContent.trim()")
    assert page.text("#passages button").startswith(chosen)
    assert page.complaints() == []


@pytest.mark.slow
@pytest.mark.parametrize(("order", "full"), [("together", True), ("compressed", False)])
def test_both_are_asked_at_once_or_one_alone(page: Page, order: str, full: bool) -> None:
    page.fill(words(90), length="5", order=order)
    page.ask()
    page.until("document.querySelector('#stop').hidden && document.querySelector('#compressed .answer').innerText")
    assert page.text("#compressed .count") == "5 tokens"
    assert page.js("return document.querySelector('#full').checkVisibility()") == full
    assert not full or page.text("#full .count") == "5 tokens"
    assert page.text("#kept h3").startswith("snapkv")


@pytest.mark.slow
def test_errors_of_the_server_are_shown_in_words(page: Page) -> None:
    page.fill(words(300))
    page.ask()
    page.until("!document.querySelector('#problem').hidden")
    assert "The prompt has 305 tokens, this server's limit for prompts is 200: shorten it" in page.text("#problem")
    assert page.part("#problem").get_attribute("role") == "alert"
    assert page.text("#full .state") == "was not asked"
    page.fill("")
    page.ask()
    assert page.text("#problem") == "There is no text yet: paste one, open a file, or use the example."
    assert page.js("return document.activeElement.id") == "text"


@pytest.mark.slow
def test_a_text_that_is_too_long_to_be_explained_is_asked_all_the_same(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_EXPLAINED", 50)
    page.fill(words(90), length="4")
    page.ask()
    page.answered()
    assert page.text("#compressed .count") == "4 tokens"
    assert page.text("#kept-about").startswith("The text is too long to show what became of each token")


@pytest.mark.slow
def test_an_answer_can_be_stopped_with_the_keyboard(page: Page, server: Running) -> None:
    gate, step = Gate(server.engine, passing=3), server.engine.step
    page.fill(words(90), length="60")
    page.part("#question").send_keys(ENTER)
    page.until("document.querySelector('#compressed .answer').innerText.length > 0")
    page.part("#stop").send_keys(" ")
    page.until("document.querySelector('#stop').hidden")
    assert (page.text("#compressed .state"), page.text("#full .state")) == ("stopped", "was not asked")
    assert page.js("return document.activeElement.id") == "go"
    gate.open()
    wait_until(lambda: server.engine.active == 0)
    assert step == server.engine.step
    page.fill(words(90), length="4")  # and it can be asked again
    page.ask()
    page.answered()


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_and_reached_at_every_width_in_light_and_dark(page: Page, width: int, scheme: str) -> None:
    page.open(width, scheme)
    page.ready()
    page.fill(words(90), length="4")
    page.ask()
    page.answered()
    page.js("document.querySelector('#problem').hidden = false; document.querySelector('#problem').textContent = 'An error.'")
    assert page.js("return document.documentElement.scrollWidth") <= width
    assert page.js(CONTRAST) == []
    names = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    for node in names:
        focusable = any(each["name"] == "focusable" and each["value"]["value"] for each in node.get("properties", []))
        if focusable and node["role"]["value"] != "RootWebArea":
            assert node["name"]["value"], node
    order = page.js(
        "return [...document.querySelectorAll('a, button, input, select, textarea, [tabindex=\"0\"]')]"
        ".filter(e => e.checkVisibility() && !e.disabled && e.tabIndex >= 0).map(e => e.id || e.className || e.name)"
    )
    places = [order.index(name) for name in ("text", "pick", "policy", "budget", "length", "question", "go")]
    assert places == sorted(places)
    page.part("#question").send_keys(TAB)
    assert page.js("const at = document.activeElement; return [at.id, getComputedStyle(at).outlineStyle]") == ["go", "solid"]


@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_nowhere(browser: Any) -> None:
    with running(tiny_app(api_keys=(KEY,))) as one:
        page = Page(browser, one)
        page.open()
        page.until("!document.querySelector('#key-form').hidden")
        assert page.js("return document.activeElement.id") == "key"
        page.part("#key").send_keys("wrong-key-here")
        page.part("#key-form button").click()
        page.until("!document.querySelector('#problem').hidden")
        assert "The API key is not one of this server's" in page.text("#problem")
        page.js("document.getElementById('key').value = arguments[0]", KEY)
        page.part("#key-form button").click()
        page.ready()
        assert page.part("#key-form").get_attribute("hidden") is not None
        page.fill(words(60), length="4")
        page.ask()
        page.answered()
        assert page.js("return document.cookie + JSON.stringify([{...localStorage}, {...sessionStorage}])") == "[{},{}]"
    page.ask()
    page.until("!document.querySelector('#problem').hidden")
    assert page.text("#problem") == page.text("#compressed .state") == "The server cannot be reached. Is it still running?"


@pytest.mark.slow
def test_a_file_is_opened_if_it_is_text(page: Page, tmp_path: Path) -> None:
    text, other = tmp_path / "notes.txt", tmp_path / "picture.txt"
    text.write_text("w5 w6 <b>w7</b>\n", encoding="utf-8")
    other.write_bytes(b"\xff\xfe\x00\x81")
    field = page.part("#file")
    field.send_keys(str(text))
    page.until("document.querySelector('#text').value === arguments[0]", "w5 w6 <b>w7</b>\n")
    assert page.text("#text-size") == "16 characters, about 4 tokens"
    field.send_keys(str(other))
    page.until("!document.querySelector('#problem').hidden")
    assert page.text("#problem").startswith("picture.txt is not plain text in UTF-8")
    page.part("#example").click()
    page.until("document.querySelector('#question').value.includes('harbor')")
    assert page.js("return document.activeElement.id") == "question"
