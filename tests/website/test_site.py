"""The site's pages that are made from the code: nothing public is left out, and links lead somewhere."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest
import typer

import winnowkv
from website import diagrams, hooks, pages_api, pages_commands, pages_policies
from website.docstrings import items, numpydoc, sections
from website.links import rewrite
from website.records import ROOT, Record
from winnowkv.cli.main import command_line
from winnowkv.policies.registry import BUILT_IN, option_names, policy_class

HEADINGS = ("For whom", "Formula", "Options", "Source", "Where we differ", "Measured", "The parts that it is made of")
GROUP = {
    "policy": "snapkv", "budget": "0.12", "prompts": 24, "agreement": {"mean": 0.876, "low": 0.85, "high": 0.9},
    "kl_mean": {"mean": 0.1234}, "exact_match": {"mean": 0.25}, "kept_bytes": 6 << 20, "full_bytes": 50 << 20,
    "held_bytes": 6 << 20,
}  # fmt: skip

PADDED = {**GROUP, "policy": "adakv:of=snapkv", "budget": "64", "held_bytes": 9 << 20}


class Audit(Record):
    """A record of an audit, with content that is given."""

    path = ROOT / "README.md"  # it is there

    @property
    def content(self):
        return {"date": "2026-11-29", "result": {"groups": [GROUP, PADDED]}}


def section(page: str, heading: str) -> str:
    """What a page says below a heading of the second level."""
    return page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].strip()


@pytest.fixture(scope="module")
def policies() -> dict[str, str]:
    return pages_policies.pages()


def test_every_policy_has_a_page_with_all_sections(policies: dict[str, str]) -> None:
    assert set(policies) == {f"policies/{name}.md" for name in BUILT_IN}
    for name, page in policies.items():
        assert all(section(page, heading) for heading in HEADINGS), name


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_policy_says_its_idea_its_source_and_its_departures(name: str, policies: dict[str, str]) -> None:
    said, page = sections(policy_class(name).__doc__), policies[f"policies/{name}.md"]
    assert said[""].split("\n")[0].endswith(".")
    assert said["Departures"].startswith(("From ", "None: "))
    paper = "arxiv.org/abs/" in section(page, "Source")
    assert paper == ("arXiv" in policy_class(name).source)
    assert paper or said["Departures"].startswith("None: ")


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_policy_page_explains_every_option(name: str, policies: dict[str, str]) -> None:
    table = section(policies[f"policies/{name}.md"], "Options").split("\n")
    rows = {line.split("`")[1]: line for line in table if line.startswith("| `")}
    assert sorted(rows) == sorted(option_names(policy_class(name)))
    assert all(len(row.rstrip("| ").rpartition(" | ")[2]) > 5 for row in rows.values())


def test_docstrings_explain_no_option_that_is_not_there() -> None:
    for name in BUILT_IN:
        kind = policy_class(name)
        assert set(items(sections(kind.__doc__).get("Parameters", ""))) - {""} <= set(option_names(kind)), name


def test_every_part_is_documented_where_its_links_lead(policies: dict[str, str]) -> None:
    shared = {f"winnowkv.policies.{name}" for name in pages_api.PARTS}
    for name in BUILT_IN:
        for part in pages_policies.parts_of(name).values():
            place = f"{part.__module__}.{part.__qualname__}"
            shown = sum(f"::: {place}\n" in page for page in policies.values())
            assert shown == (place not in shared) or not policy_class(name)().evicts, place


def test_what_was_measured_is_on_the_page() -> None:
    record = Audit("policies-summaries", "24 summaries", "winnow audit", ())
    said = pages_policies.measured("snapkv", {"policies-summaries": record})
    assert "| summaries | `snapkv` | 0.12 | 6.0 of 50.0 MiB | 87.6% (85.0% to 90.0%) | 0.123 | 25% | 24 |" in said
    assert "2026-11-29" in said
    assert "`adakv:of=snapkv` | 64 | 6.0 of 50.0 MiB, holds 9.0 |" in pages_policies.measured(
        "adakv", {"policies-summaries": record}
    )
    assert pages_policies.measured("cake", {"policies-summaries": record}) == "Not measured yet."


def test_the_overview_links_to_policies() -> None:
    said = pages_policies.with_links("| `int8`, `int4` | `full` |\nas `full`")
    assert said == "| [`int8`](policies/int8.md), [`int4`](policies/int4.md) | `full` |\nas `full`"


def test_every_command_and_option_is_in_the_reference() -> None:
    pages = pages_commands.pages()

    def check(command, page: str, name: str) -> int:
        below = getattr(command, "commands", {}).values()
        assert f"# winnow {name}\n" in page
        own = page.partition(f"# winnow {name}\n")[2].partition("\n## winnow ")[0]
        names = [word for each in command.params for word in [*each.opts, *each.secondary_opts] if word.startswith("-")]
        assert all(word in own for word in names), (name, names)
        assert inspect.cleandoc(command.help).split()[0] in own
        return len(names) + sum(check(each, page, f"{name} {each.name}") for each in below)

    commands = typer.main.get_command(command_line()).commands
    assert set(pages) == {"cli/index.md", *(f"cli/{name}.md" for name in commands)}
    assert sum(check(command, pages[f"cli/{name}.md"], name) for name, command in commands.items()) > 150
    assert all(pages["cli/index.md"].count(f"({name}.md)") == 1 for name in commands)


def test_every_public_name_is_documented_once() -> None:
    documented = [name for area in pages_api.AREAS.values() for name in area.names]
    assert sorted(documented) == sorted(winnowkv.__all__)
    pages = "\n".join(pages_api.pages().values())
    assert all(pages.count(f"::: winnowkv.{name}\n") == 1 for name in winnowkv.__all__)
    for part in pages_api.PARTS:
        module, _, name = part.rpartition(".")
        assert getattr(import_module(f"winnowkv.policies.{module}"), name).__doc__


@pytest.mark.parametrize(
    ("source", "page", "text", "said"),
    [
        ("docs/guide.md", "guide.md", "[a](serving.md#b) [c](https://x.y)", "[a](serving.md#b) [c](https://x.y)"),
        ("docs/guide.md", "guide.md", "see [`f`](../src/f.py)", "see `f` (`src/f.py`)"),
        ("docs/guide.md", "guide.md", "see [`src/f.py`](../src/f.py)", "see `src/f.py`"),
        ("docs/guide.md", "guide.md", "[rules](../CONTRIBUTING.md#tests)", "[rules](contributing.md#tests)"),
        ("CONTRIBUTING.md", "contributing.md", "[a](docs/guide.md)", "[a](guide.md)"),
        (
            "examples/README.md",
            "examples/index.md",
            "[a](../docs/guide.md) [b](x.ipynb)",
            "[a](../guide.md) b (`examples/x.ipynb`)",
        ),
        ("docs/a.md", "a.md", "![picture](../p.png)", "![picture](../p.png)"),
        ("docs/a.md", "a.md", "```\n[a](../b)\n```", "```\n[a](../b)\n```"),
        ("docs/a.md", "a.md", "It takes <!-- n r p -->6<!-- /n --> s.", "It takes 6 s."),
        ("docs/a.md", "a.md", "Text:\n- one\n- two", "Text:\n\n- one\n- two"),
        ("docs/a.md", "a.md", "Text:\n| a |\n|---|\n## Next\n- one", "Text:\n\n| a |\n|---|\n## Next\n- one"),
    ],
)
def test_links_and_lists_are_those_of_the_site(source: str, page: str, text: str, said: str) -> None:
    assert rewrite(text, source, page, {"CONTRIBUTING.md": "contributing.md"}) == said


def test_links_out_of_docs_lead_into_the_repository_if_it_has_an_address() -> None:
    said = rewrite("[`f`](../src/f.py)", "docs/a.md", "a.md", {}, "https://host.example/project/")
    assert said == "[`f`](https://host.example/project/blob/main/src/f.py)"


def test_docstrings_become_numpydoc() -> None:
    house = """What it is: :class:`CompactCache`.

    Parameters
    ----------
    a, b: first
        line. cache: the second.

    Raises InputError for no a.

    Class attributes
    ----------------
    name: of it.

    Raises
    ------
    InputError
        For no b.
    """
    said = numpydoc(house)
    assert "Parameters\n----------\na\n    first line.\nb\n    first line.\ncache\n    the second." in said
    assert said.startswith("What it is: [`CompactCache`][winnowkv.CompactCache].\n\nRaises InputError for no a.")
    assert said.index("- `name`: of it.") < said.index("Parameters\n---")
    assert said.endswith("Raises\n------\nInputError\n    For no b.")


def test_the_navigation_names_the_made_pages() -> None:
    nav = hooks.expanded([{"Policies": ["policies.md", {"Each": ["policies/*.md"]}]}, "cli/*.md"])
    assert len(nav[0]["Policies"][1]["Each"]) == len(BUILT_IN)
    assert "cli/serve.md" in nav
    assert "cli/index.md" not in nav


def test_every_diagram_is_drawn() -> None:
    wanted = {diagrams.file_of(text) for text in diagrams.texts()}
    assert wanted == set(diagrams.FOLDER.glob("*.svg")), "run python -m website.diagrams"
    said = diagrams.drawn("# A\n```mermaid\n" + diagrams.texts()[0] + "```\n", "architecture.md")
    assert "mermaid" not in said
    assert f"](diagrams/{diagrams.file_of(diagrams.texts()[0]).name})" in said
