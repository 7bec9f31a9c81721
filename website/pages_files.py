"""Pages made of files outside ``docs``: changelog, rules for contributors, examples."""

from __future__ import annotations

import ast
from pathlib import Path

from website.records import ROOT

TEXTS = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "examples/README.md": "examples/index.md"}


def sources() -> dict[str, Path]:
    """The file of each page by path below ``docs``."""
    texts = {page: ROOT / file for file, page in TEXTS.items() if (ROOT / file).is_file()}
    return texts | {f"examples/{file.stem}.md": file for file in sorted((ROOT / "examples").glob("*.py"))}


def pages() -> dict[str, str]:
    """Markdown of these pages."""
    return {page: text_of(file) for page, file in sources().items()}


def text_of(file: Path) -> str:
    """A text as it is; of an example its docstring and its code."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return text
    said = ast.get_docstring(ast.parse(text)) or ""
    return f'# {file.stem}\n\n{said.partition(chr(10))[0]}\n\n```python title="{file.relative_to(ROOT)}"\n{text.strip()}\n```\n'
