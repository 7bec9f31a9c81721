"""Hooks of MkDocs: pages that are made from the code, and links that lead out of ``docs``."""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # MkDocs loads this file by its path, not as website.hooks

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from website import diagrams, pages_api, pages_commands, pages_files, pages_policies
from website.links import rewrite
from website.records import ROOT


@cache
def made() -> dict[str, str]:
    """Markdown of every page that is made at build time, by its path below ``docs``."""
    return {**pages_policies.pages(), **pages_commands.pages(), **pages_api.pages(), **pages_files.pages()}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Names of made pages take the place of patterns such as ``policies/*.md`` in the navigation."""
    config.nav = expanded(config.nav or [])
    return config


def expanded(nav: list[Any]) -> list[Any]:
    """The navigation with all patterns replaced, at any depth."""
    found: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            found += [{title: expanded(below) if isinstance(below, list) else below} for title, below in entry.items()]
        elif "*" in entry:
            found += [page for page in made() if fnmatch(page, entry) and not page.endswith("/index.md")]
        else:
            found.append(entry)
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages. They are not written into ``docs``."""
    for page, text in made().items():
        files.append(File.generated(config, page, content=text))
    style = Path(__file__).with_name("site.css")
    files.append(File.generated(config, f"assets/{style.name}", abs_src_path=str(style)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links, markers and lists of a page that is a file of the repository, and its diagrams."""
    name = page.file.src_uri
    files_of = pages_files.sources()
    if name in files_of or name not in made():
        source = files_of[name].relative_to(ROOT).as_posix() if name in files_of else f"docs/{name}"
        page_of = {file.relative_to(ROOT).as_posix(): its for its, file in files_of.items()}
        markdown = rewrite(markdown, source, name, {"README.md": "index.md", **page_of}, config.repo_url)
    if name == "policies.md":
        markdown = pages_policies.with_links(markdown)
    return diagrams.drawn(markdown, name)
