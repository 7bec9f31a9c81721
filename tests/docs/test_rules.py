"""What runs and checks the blocks of the documentation can fail, and says where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.docs import blocks_of, command_lines, pages, read_blocks
from support.docs_checks import BlockError, parse_winnow, recipe
from support.docs_run import Page, Winnow

NO_MODEL: Any = SimpleNamespace(stand_in=lambda patch: None, short=SimpleNamespace(tokens=0))


@pytest.fixture
def page(tmp_path: Path, winnow: Winnow) -> Iterator[Page]:
    """A page of blocks that need no model."""
    with pytest.MonkeyPatch.context() as patch:
        yield Page(tmp_path, winnow, patch, NO_MODEL)


def follow(page: Page, text: str) -> None:
    for block in blocks_of(text, "page.md"):
        page.follow(block)


def fenced(language: str, body: str, before: str = "") -> str:
    return f"# Title\n\n{before}\n```{language}\n{body}\n```\n"


OUT = "<!-- not run: it takes an hour -->"


@pytest.mark.parametrize(
    ("language", "body", "message"),
    [
        ("python", "wk.nothing()", "page.md:5: winnowkv has no nothing"),
        ("python", "from winnowkv.budget import Budge", "page.md:5: Budge is not there"),
        ("python", "import winnowkv.nowhere", "page.md:5: winnowkv is not there"),
        ("python", "\nwk.compress(model, bugdet=0.1)", "page.md:6: compress takes no bugdet="),
        ("python", "x = (", "page.md:5: '(' was never closed"),
        ("sh", "winnow generate -f report.txt --bugdet 0.1", "page.md:5: No such option: --bugdet"),
        ("sh", "winnow generat", "page.md:5: No such command"),
        ("sh", "winnow plan --batch many", "page.md:5: Invalid value for '--batch'"),
        ("", "winnow needle --policies full,snapvk", "page.md:5: policy 'snapvk' is unknown"),
        ("sh", "winnow eval --budgets 0", "page.md:5: budget 0 keeps nothing"),
        ("sh", "make dmeo", "page.md:5: the Makefile has no target dmeo"),
        ("sh", "pip install '.[dmeo]'", "page.md:5: pyproject.toml has no extra dmeo"),
        ("sh", "uv sync --extra dmeo", "page.md:5: pyproject.toml has no extra dmeo"),
        ("sh", "uv pip install 'winnowkv[serve,dmeo]'", "page.md:5: pyproject.toml has no extra dmeo"),
        ("sh", "uv publish", "page.md:5: no rule for uv publish"),
        ("sh", "python -m winnowkv generat", "page.md:5: No such command"),
        ("sh", "pip install examples/nowhere", "page.md:5: examples/nowhere is not there"),
        ("sh", "python benchmarks/nowhere.py", "page.md:5: benchmarks/nowhere.py is not there"),
        ("sh", "python -m nowhere", "page.md:5: there is no module nowhere"),
        ("sh", "winnow eval --recipe recipes/nowhere.yaml", "page.md:5: recipes/nowhere.yaml is not there"),
        ("sh", "winnow generate 'what", "page.md:5: this command line does not end"),
        ("sh", "winnow policies | head", "page.md:5: this is no single command"),
    ],
)
def test_what_is_not_run_names_nothing_that_is_not_there(page: Page, language: str, body: str, message: str) -> None:
    with pytest.raises(BlockError) as error:
        follow(page, fenced(language, body, OUT))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("language", "body", "message"),
    [
        ("python", "missing", "page.md:4: NameError: name 'missing' is not defined"),
        ("python", "\nraise ValueError('bad')", "page.md:4: ValueError: bad"),
        ("sh", "winnow policies nosuch", "page.md:5: winnow policies nosuch ended with 2"),
        ("", "winnow policies --nosuch", "page.md:5: winnow policies --nosuch ended with 2"),
        ("console", "$ winnow policies nosuch\noutput", "page.md:5: winnow policies nosuch ended with 2"),
        ("sh", "serve run contexts", "page.md:5: no rule for serve"),
        ("", "SOME=1 serve run contexts", "page.md:5: no rule for serve"),
        ("sh", "curl http://127.0.0.1:8000/ready", "page.md:5: nothing on the page has started a server"),
        ("sh", "python -c 'raise SystemExit(3)'", "ended with 3"),
        ("sh", "make dmeo", "page.md:5: the Makefile has no target dmeo"),
        ("json", '{"a": }', "page.md:4: Expecting value"),
        ("jsonl", '{"a": 1}\n{', "page.md:4: Expecting property name"),
        ("yaml", "a: [", "page.md:4: while parsing"),
        ("toml", "a = ", "page.md:4: Invalid value"),
        ("rust", "fn main() {}", "page.md:4: no rule for blocks of rust"),
    ],
)
def test_a_block_without_a_comment_must_run(page: Page, language: str, body: str, message: str) -> None:
    with pytest.raises(BlockError) as error:
        follow(page, fenced(language, body))
    assert message in str(error.value)


@pytest.mark.parametrize("before", ["<!-- not run -->", "<!-- not run: -->", "<!-- not run (serve):  -->", "not run: GPU"])
def test_a_comment_without_a_reason_is_none(page: Page, before: str) -> None:
    with pytest.raises(BlockError, match="no rule for serve"):
        follow(page, fenced("sh", "serve run contexts", before))


def test_a_comment_is_for_the_next_block_alone(page: Page) -> None:
    follow(page, fenced("python", "missing", OUT))
    with pytest.raises(BlockError, match=r"page\.md:8: NameError"):
        follow(page, fenced("python", "missing", OUT) + "\n```python\nmissing\n```\n")


def test_a_comment_may_leave_out_some_lines(page: Page) -> None:
    before = "<!-- not run (winnow demo, winnow bench): minutes -->"
    follow(page, fenced("sh", "winnow demo\nwinnow bench # half an hour\nwinnow policies", before))
    with pytest.raises(BlockError, match=r"page\.md:7: winnow policies nosuch ended with 2"):
        follow(page, fenced("sh", "winnow demo\nwinnow bench\nwinnow policies nosuch", before))
    with pytest.raises(BlockError, match=r"no line of the block begins with 'winnow bench'"):
        follow(page, fenced("sh", "winnow demo", before))


def test_blocks_of_a_page_share_names_and_files(page: Page) -> None:
    follow(page, fenced("python", "a = 1") + fenced("python", "open('a.txt', 'w').write(f'{a + 1} {len(text)}')"))
    assert (page.folder / "a.txt").read_text() == f"2 {len(page.names['text'])}"
    follow(page, fenced("sh", "COLUMNS=80 winnow policies --json > policies.json"))
    assert '"winnow"' in (page.folder / "policies.json").read_text()


def test_an_environment_is_not_made(page: Page) -> None:
    follow(page, fenced("sh", "python3 -m venv .venv && . .venv/bin/activate\nuv pip install '.[demo]'\nwinnowkv --version"))
    assert not (page.folder / ".venv").exists()


def test_a_page_goes_on_from_another_one(page: Page) -> None:
    with pytest.raises(BlockError, match=r"nowhere\.md is not there"):
        follow(page, fenced("python", "1", "<!-- continues: nowhere.md -->"))


def test_what_a_command_printed_is_no_code(page: Page) -> None:
    follow(
        page, fenced("text", "winnow        100%     7.9") + fenced("", "policy  found\nfull    100%") + fenced("mermaid", "x")
    )


def test_blocks_know_where_they_stand() -> None:
    text = "# A\n```python\n# no heading\n```\n## B\n\n<!-- c -->\n\n- item\n  ~~~sh\n  make x \\\n    y\n  ~~~\n"
    first, second = blocks_of(text, "page.md")
    assert (first.line, first.language, first.heading, first.text) == (2, "python", "A", "# no heading")
    assert (second.where, second.heading, second.before, second.text) == ("page.md:10", "B", "- item", "make x \\\n  y")
    assert [line.words for line in command_lines(second)] == [("make", "x", "y")]
    with pytest.raises(ValueError, match=r"page\.md:1: the block is not closed"):
        blocks_of("```sh\nmake x\n", "page.md")


def test_command_lines_are_the_shells() -> None:
    text = "A=1 B=2 curl -d '{\"a\":\n 1}' x # why\npip install a && make b\nwinnow policies > out.txt"
    (block,) = blocks_of(fenced("sh", text), "page.md")
    first, *others = command_lines(block)
    assert (first.words, first.variables) == (("curl", "-d", '{"a":\n 1}', "x"), {"A": "1", "B": "2"})
    assert [line.words for line in others] == [("pip", "install", "a"), ("make", "b"), ("winnow", "policies")]
    assert [line.where for line in others] == ["page.md:7", "page.md:7", "page.md:8"]
    assert others[-1].output == "out.txt"


def test_parsing_runs_nothing() -> None:
    (block,) = blocks_of(fenced("sh", "winnow vllm embedded --store s -- --port 8001\nwinnow --version"), "page.md")
    values, version = (parse_winnow(line) for line in command_lines(block))
    assert (values["model"], values["flags"], values["store"], version) == ("embedded", ["--port", "8001"], "s", {})


def test_the_server_of_make_serve_is_the_makefiles() -> None:
    assert recipe("serve").startswith("winnow serve --model embedded")


def test_the_pages_are_all_that_there_are() -> None:
    found = pages()
    assert {"README.md", "CONTRIBUTING.md", "docs/guide.md", "examples/own_policy/README.md"} <= set(found)
    assert "docs/log.md" not in found
    assert sum(len(read_blocks(page)) for page in found) > 40
