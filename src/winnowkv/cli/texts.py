"""Texts that a user gives a command: from standard input, and checked."""

from __future__ import annotations

import sys

from winnowkv.errors import InputError
from winnowkv.files import check_plain


def standard_input(what: str) -> str:
    """All of standard input; ``what`` it is, for the InputError if it is not UTF-8 text."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise InputError(f"standard input is not UTF-8 text: give the {what} as UTF-8") from None


def checked_text(text: str, what: str) -> str:
    """The text. Raises InputError if it is blank, or holds half a character."""
    check_plain(text, lambda why: InputError(f"the {what} is not UTF-8 text: {why}"))
    if not text.strip():
        raise InputError(f"the {what} is empty: give at least one word")
    return text
