"""``winnow task``: classify prompts as localization or aggregation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from winnowkv.cli.options import Json
from winnowkv.errors import InputError


def task(
    text: Annotated[str | None, typer.Argument(help="A prompt; without it, give --file.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help='JSONL with a row {"text": ...} for each prompt.')] = None,
    classifier: Annotated[
        str | None, typer.Option(help="A Hugging Face sequence classifier with two labels. Default: the built-in one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Classify prompts as localization (QA, retrieval) or aggregation (summaries, few-shot, code), with a probability."""
    if (text is None) == (file is None):
        raise InputError("give one prompt as an argument, or many with --file FILE.jsonl")
    from winnowkv.evaluate.needle.prompts import read_rows
    from winnowkv.prompt.classifier import load_classifier

    if text is not None and not text.strip():
        raise InputError("the prompt is empty: give at least one word")
    texts = [text] if text is not None else [row["text"] for row in read_rows(file, "prompt", ("text",))]
    profiles = load_classifier(classifier)([str(text) for text in texts])
    if as_json:
        rows = [{"label": p.task, "probability": round(p.probability or 0.0, 4)} for p in profiles]
        print(json.dumps({"tasks": rows}, indent=2))
        return
    for profile in profiles:
        print(f"{profile.task} {profile.probability:.3f}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(task)
