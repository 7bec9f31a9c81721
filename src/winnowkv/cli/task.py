"""``winnow task``: what prompts ask for, one place of the text or the whole of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from winnowkv.cli.options import Json
from winnowkv.errors import InputError


def task(
    text: Annotated[str | None, typer.Argument(help="A prompt. Without it, --file is read.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help='JSONL, a row {"text": ...} for each prompt.')] = None,
    classifier: Annotated[
        str | None, typer.Option(help="A Hugging Face sequence classifier with two labels. Default: the built-in one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell localization (QA, retrieval) from aggregation (summaries, few-shot, code), with a probability for each prompt."""
    if (text is None) == (file is None):
        raise InputError("give one prompt as an argument, or many with --file FILE.jsonl")
    texts = [text] if text is not None else read_texts(file) if file is not None else []
    from winnowkv.classify import load_classifier

    profiles = load_classifier(classifier)([str(text) for text in texts])
    if as_json:
        rows = [{"label": p.task, "probability": round(p.probability or 0.0, 4)} for p in profiles]
        print(json.dumps({"tasks": rows}, indent=2))
        return
    for profile in profiles:
        print(f"{profile.task} {profile.probability:.3f}")


def read_texts(file: Path) -> list[str]:
    """Texts of a JSONL file. Raises InputError with file and line for a row that is not JSON or has no text."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt file {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"prompt file {file}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise InputError(f'prompt file {file}, line {number}: a row is {{"text": "..."}}')
        texts.append(row["text"])
    if not texts:
        raise InputError(f'prompt file {file}: holds no prompt; a row is {{"text": "..."}}')
    return texts


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(task)
