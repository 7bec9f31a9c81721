"""The report as a page: complete as text, safe against what models write, and opened and clicked in Chromium."""

import re
from html.parser import HTMLParser

import pytest

from support.browser import open_page, start_browser
from support.results import CONFIG, MACHINE, broken, evaluation, line
from winnowkv.errors import InputError
from winnowkv.evaluate.report import charts
from winnowkv.evaluate.report.page import MAX_FAILURES_LISTED, render, write_page
from winnowkv.evaluate.report.summary import OVER_TASKS, summarize

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'><b>&amp;"


def page_of(lines, file, **config):
    about = {**CONFIG, "machine": MACHINE, **config}
    write_page(summarize(lines, about), lines, about, file)
    return file


@pytest.fixture
def page(tmp_path):
    return page_of(evaluation(), tmp_path / "report.html")


class Reader(HTMLParser):
    """Elements with their attributes, and all text, as a browser would see them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_contains_scores_settings_and_answers(page):
    text = " ".join(Reader(page.read_text(encoding="utf-8")).text.split())
    for expected in ("tiny in float32", "AMD EPYC, 2 threads", "torch 2.13.0", "0123456789ab", "official", "context-only",
                     "2 protocols (official, context-only): shown side by side", "only 3 rows: the interval is a rough guide",
                     "Question: who? Answer:", "what full said", "what streaming said", "right", "0 / 0 / 6"):  # fmt: skip
        assert expected in text


def test_the_page_loads_nothing_from_elsewhere(page):
    text = page.read_text(encoding="utf-8")
    for tag, attributes in Reader(text).tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action", "data"} & set(attributes)
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|https?:", text)


@pytest.mark.parametrize("field", ["prediction", "prompt_tail", "policy", "task", "row", "metric", "failed", "answers", "git"])
def test_texts_of_models_and_prompts_are_escaped(field):
    hostile = [ATTACK] if field == "answers" else ATTACK
    lines = [line("full", 0.9), line("snapkv", None if field == "failed" else 0.1)]
    for one in lines[1:] if field in ("policy", "failed") else lines:
        one[field] = hostile
    text = render(summarize(lines, CONFIG), lines, CONFIG)
    reader = Reader(text)
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in reader.tags)
    assert ATTACK in reader.text or any(ATTACK in attributes.values() for _, attributes in reader.tags)


def test_settings_are_escaped_too():
    lines = [line()]
    for about in ({**CONFIG, "model": ATTACK}, {**CONFIG, "asked": {"data": ATTACK}}):
        tags = [tag for tag, _ in Reader(render(summarize(lines, about), lines, about)).tags]
        assert tags.count("script") == 1
        assert "img" not in tags


@pytest.mark.parametrize(
    "lines",
    [[], [broken("too long")], [line()], [line("snapkv", 0.0)], [line("full", 0.0), line("snapkv", 1.0)]],
    ids=["nothing", "all failed", "one row", "no baseline, score 0", "nothing lost"],
)
def test_unusual_results_have_a_page(lines, tmp_path):
    text = page_of(lines, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "All results" in text
    assert "nan" not in Reader(text).text.lower().split()


def test_failed_measurements_are_listed_with_their_reason(tmp_path):
    lines = [line(), *(broken(f"reason {r} <i>", row=f"row-{r}") for r in range(MAX_FAILURES_LISTED + 2))]
    text = Reader(page_of(lines, tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "on qa, row row-0 (official): reason 0 <i>" in " ".join(text.split())
    assert "2 more are in results.jsonl." in text


def test_a_page_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match=r"report .* cannot be written"):
        page_of([line()], tmp_path / "no" / "such" / "report.html")


def test_points_of_one_place_stand_side_by_side_and_others_where_they_are():
    assert charts.spread([100.0, 300.0, 100.0, 101.0]) == [92.0, 300.0, 100.0, 109.0]
    many = charts.spread([50.0] * 40)
    assert max(many) - min(many) <= charts.MAX_GROUP_WIDTH


@pytest.mark.parametrize(("low", "high"), [(0.05, 1.25), (0.096, 0.15), (3.0, 4.7), (2.0, 9000.0), (0.8, 1.25)])
def test_axes_have_some_round_ticks_inside(low, high):
    ticks = charts.log_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)
    assert low <= ticks[0] < ticks[-1] <= high


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = start_browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.quit()


def shown_rows(browser):
    """Cell texts of the table's rows that are seen, with the columns' names."""
    names, rows = browser.execute_script("""
        const text = (row) => [...row.cells].map((cell) => cell.innerText.trim());
        const rows = [...document.querySelectorAll("#table tbody tr")].filter((row) => row.checkVisibility());
        return [text(document.querySelector("#table thead tr")), rows.map(text)];
    """)
    return [dict(zip(names, row, strict=True)) for row in rows]


def choose(browser, name, text):
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", f"by-{name}")).select_by_visible_text(text)


def click_head(browser, name):
    heads = browser.find_elements("css selector", "#table thead button")
    next(head for head in heads if head.text.startswith(name)).click()


def points(text):
    return float(text.split("\n")[0].replace("\N{MINUS SIGN}", "-"))


def test_it_starts_with_the_means_over_tasks(browser, page):
    open_page(browser, page)
    rows = shown_rows(browser)
    assert {row["task"] for row in rows} == {OVER_TASKS}
    assert len(rows) == 12
    assert browser.find_element("id", "shown").text == "12 of 42 rows"
    assert browser.get_log("browser") == []


def test_filters_work_together(browser, page):
    open_page(browser, page)
    choose(browser, "task", "qasper")
    assert [row["protocol"] for row in shown_rows(browser)] == ["official"] * 6 + ["context-only"] * 6
    choose(browser, "protocol", "context-only")
    choose(browser, "policy", "streaming")
    rows = shown_rows(browser)
    assert [(row["task"], row["protocol"], row["policy"], row["budget"]) for row in rows] == [
        ("qasper", "context-only", "streaming", "12%"), ("qasper", "context-only", "streaming", "256")]  # fmt: skip
    choose(browser, "task", "trec")
    assert shown_rows(browser) == []
    browser.find_element("id", "everything").click()
    assert len(shown_rows(browser)) == 42
    assert browser.get_log("browser") == []


def test_a_click_on_a_head_sorts_and_another_turns_the_order(browser, page):
    open_page(browser, page)
    choose(browser, "task", "qasper")
    choose(browser, "protocol", "official")
    click_head(browser, "score")
    scores = [points(row["score"]) for row in shown_rows(browser)]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 3
    click_head(browser, "score")
    assert [points(row["score"]) for row in shown_rows(browser)] == scores[::-1]
    click_head(browser, "against full")
    against = [row["against full"] for row in shown_rows(browser)]
    assert against[-1] == "\N{EN DASH}"  # full itself has none, and stays last in either order
    losses = [points(text) for text in against[:-1]]
    assert losses == sorted(losses, reverse=True)
    click_head(browser, "policy")
    names = [row["policy"] for row in shown_rows(browser)]
    assert names == sorted(names)
    sorted_by = browser.find_elements("css selector", "#table th[aria-sort]")
    assert [(head.text[:6], head.get_attribute("aria-sort")) for head in sorted_by] == [("policy", "ascending")]
    assert browser.get_log("browser") == []


def test_the_keyboard_sorts_too(browser, page):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, page)
    browser.find_element("id", "everything").send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("class") == "scroll"  # arrow keys move a wide table
    browser.switch_to.active_element.send_keys(Keys.TAB)
    head = browser.switch_to.active_element
    assert head.text.startswith("policy")
    head.send_keys(Keys.ENTER)
    assert [row["policy"] for row in shown_rows(browser)][:2] == ["full", "full"]
    head.send_keys(Keys.SPACE)
    assert [row["policy"] for row in shown_rows(browser)][-2:] == ["full", "full"]


def test_regressions_open_on_a_click(browser, page):
    open_page(browser, page)
    closed = browser.find_elements("css selector", "details.regression")[1]
    answers = closed.find_element("css selector", ".answers")
    assert not answers.is_displayed()
    closed.find_element("css selector", "summary").click()
    assert "what full said" in answers.text
    assert "what streaming said" in answers.text
    assert "right" in answers.text


def test_hostile_answers_run_nothing(browser, tmp_path):
    lines = [line("full", 0.9, prediction=ATTACK), line(ATTACK, 0.1, prediction=ATTACK, prompt_tail=ATTACK, answers=[ATTACK])]
    lines[0]["prompt_tail"] = ATTACK
    open_page(browser, page_of(lines, tmp_path / "report.html"))
    assert browser.get_log("browser") == []  # an alert would have thrown before, an image would be refused here
    assert ATTACK in browser.find_element("css selector", ".answers").text
    assert ATTACK in [row["policy"] for row in shown_rows(browser)]


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(browser, page, width):
    open_page(browser, page, width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_it_reads_without_javascript(browser, page):
    open_page(browser, page, script=False)
    try:
        text = browser.find_element("css selector", "body").text
        assert len(shown_rows(browser)) == 42
        assert not browser.find_element("css selector", ".controls").is_displayed()
        assert "what full said" in text
    finally:
        open_page(browser, page)
