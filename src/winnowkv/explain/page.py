"""A page that shows what policies kept of one prompt: one HTML file that opens without a network.

The component (data/explain.js, data/explain.css) draws; its first comment says what its data must be, which
:func:`component_data` makes. Any other page can use the same two files: :func:`component`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from winnowkv.cache.kept import KeptTokens
from winnowkv.errors import InputError
from winnowkv.files import write_text

START = 'winnowExplain(document.getElementById("explain"), JSON.parse(document.getElementById("data").textContent));\n'


def component() -> tuple[str, str]:
    """The component's script and its style sheet."""
    return _file("explain.js"), _file("explain.css")


def component_data(
    tokens: Sequence[str], selections: Sequence[KeptTokens], notes: Sequence[Sequence[str]] | None = None
) -> dict[str, Any]:
    """What the component draws, as plain data: the tokens' texts, and what each policy kept of them.

    It is :meth:`KeptTokens.to_dict`, but for the scores, which take a quarter of the room: packed (:func:`packed`).
    ``notes``: of each selection, what the reader should know, in sentences.
    Raises InputError for selections of another number of tokens.
    """
    for kept in selections:
        if kept.tokens != len(tokens):
            raise InputError(
                f"{kept.policy} kept some of {kept.tokens} tokens, and {len(tokens)} texts were given: give one each"
            )
    said = notes or [()] * len(selections)
    each = [{**_compact(kept), "notes": list(mine)} for kept, mine in zip(selections, said, strict=True)]
    return {"tokens": list(tokens), "selections": each}


def _compact(kept: KeptTokens) -> dict[str, Any]:
    plain = replace(kept, scores=None).to_dict()
    if kept.scores is not None:
        plain["scores"] = [[packed(row) for row in part] for part in kept.scores]
    return plain


def packed(scores: Tensor) -> str:
    """Scores ``[S]`` as bfloat16, two bytes each, the lower first, in base64."""
    numbers = scores.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    return base64.b64encode(bytes(torch.stack([numbers & 0xFF, numbers >> 8], -1).flatten().tolist())).decode()


def write_page(
    path: Path, data: Mapping[str, Any], *, title: str = "What was kept", facts: Mapping[str, str] | None = None
) -> None:
    """Write the page of :func:`component_data`, whole or not at all. Raises InputError if it cannot be written."""
    write_text(path, render(data, title=title, facts=facts), lambda why: InputError(f"page {path} {why}"))


def render(data: Mapping[str, Any], *, title: str = "What was kept", facts: Mapping[str, str] | None = None) -> str:
    """The page's HTML. No text of a prompt, a model or a policy is markup; only the package's script may run.

    ``facts``: shown at its top, by name. Without JavaScript the page shows these and a table of what each policy kept.
    """
    script, style = component()
    script += START
    return Template(_file("page.html")).substitute(
        title=escape(title),
        script=script,
        style=style,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        facts="".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>\n" for name, value in (facts or {}).items()),
        rows="".join(_row(one) for one in data["selections"]),
        data=inline_json(data),
    )


def inline_json(data: Any) -> str:
    """JSON that can stand inside a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _row(kept: Mapping[str, Any]) -> str:
    """A row of the table that is there without JavaScript."""
    means = [sum(layer) / len(layer) for layer in kept["entries"]]
    cells = (f"{100 * kept['kept_fraction']:.1f}%", f"{min(means):.5g}", f"{max(means):.5g}")
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    return f'<tr><th scope="row">{escape(str(kept["policy"]))}</th><td>{escape(str(kept["budget"]))}</td>{numbers}</tr>\n'


def _file(name: str) -> str:
    return (files("winnowkv.explain") / "data" / name).read_text(encoding="utf-8")
