"""Diagrams of the docs as SVG files, drawn once from their Mermaid text, so that the site loads no script to show them.

GitHub draws the text by itself. Material for MkDocs would load Mermaid (2.7 MB) from another host for each reader. Here the
text of each diagram is drawn by Mermaid in a headless Chromium when it was changed, and the file is named after the text, so
that a build notices a diagram that was not drawn::

    npm pack mermaid@11.9.0 && tar xzf mermaid-11.9.0.tgz package/dist/mermaid.min.js
    python -m website.diagrams package/dist/mermaid.min.js
"""

from __future__ import annotations

import hashlib
import html
import json
import logging
import posixpath
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from website.records import ROOT
from winnowkv.errors import InputError

FOLDER = ROOT / "docs" / "diagrams"
FENCE = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LOOK = {
    "theme": "neutral",
    "htmlLabels": False,
    "flowchart": {"htmlLabels": False, "useMaxWidth": False},
    "fontFamily": "sans-serif",
}
WAIT_MS = 20_000  # of Chromium's own clock, which does not wait for what is done
log = logging.getLogger("mkdocs.diagrams")


def file_of(text: str) -> Path:
    """The file of a diagram."""
    return FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.svg"


def texts() -> list[str]:
    """The text of every diagram in docs."""
    return [
        found[1] for page in sorted((ROOT / "docs").glob("*.md")) for found in FENCE.finditer(page.read_text(encoding="utf-8"))
    ]


def drawn(markdown: str, page: str) -> str:
    """A page with pictures in place of the diagrams' texts. Warns of a diagram that was not drawn, and leaves its text."""

    def picture(found: re.Match[str]) -> str:
        file = file_of(found[1])
        if not file.is_file():
            log.warning("%s has a diagram that was not drawn: python -m website.diagrams MERMAID_JS (see its docstring)", page)
            return found[0]
        address = posixpath.relpath(f"diagrams/{file.name}", posixpath.dirname(page) or ".")
        return f"[![diagram: {said(found[1])}]({address}){{.diagram}}]({address})"

    return FENCE.sub(picture, markdown)


def said(text: str) -> str:
    """The words in a diagram's boxes, for who does not see it."""
    words = [re.sub(r"<br>|[\[\]{}()]", " ", label) for label in re.findall(r'"([^"]+)"', text)]
    return " | ".join(" ".join(word.split()) for word in words)


def draw(text: str, mermaid: Path) -> str:
    """The SVG of a diagram. Raises InputError if Mermaid or Chromium draw none."""
    page = (
        f"<!doctype html><meta charset=utf-8><body><script src={html.escape(mermaid.resolve().as_uri())!r}></script><script>"
        f"mermaid.initialize({json.dumps({'startOnLoad': False, **LOOK})});"
        f"mermaid.render('diagram', {json.dumps(text).replace('</', '<' + chr(92) + '/')})"
        ".then(done => { document.body.innerHTML = done.svg }, no => { document.body.textContent = no })</script>"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        command = ["chromium", "--headless", "--no-sandbox", "--allow-file-access-from-files", "--dump-dom"]
        shown = subprocess.run(
            [*command, f"--virtual-time-budget={WAIT_MS}", file.as_uri()], capture_output=True, text=True, check=False
        ).stdout
    found = re.search(r"<svg.*</svg>", shown, re.DOTALL)
    if found is None or 'aria-roledescription="error"' in shown:
        raise InputError(f"Chromium and {mermaid} drew no SVG of the diagram that begins {text[:40]!r}: {shown[-200:]!r}")
    return found[0].replace("<br>", "<br/>") + "\n"


def main() -> None:
    """Draw what is not drawn, and remove what no page has any more."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"{__doc__}\ngive the file mermaid.min.js")
    FOLDER.mkdir(exist_ok=True)
    wanted = {file_of(text): text for text in texts()}
    for file in set(FOLDER.glob("*.svg")) - set(wanted):
        file.unlink()
    for file, text in wanted.items():
        if not file.is_file():
            file.write_text(draw(text, Path(sys.argv[1])), encoding="utf-8")
            print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
