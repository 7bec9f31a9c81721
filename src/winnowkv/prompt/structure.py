"""Where things stand in a prompt: its question, the chat template's tail after it, and the ends of its sentences.

Found from the token ids and the tokenizer alone, so that policies can look from the question and keep whole sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from winnowkv.prompt.chat import template_tail

SHORTEST_QUESTION, LONGEST_QUESTION = 8, 128  # tokens
DEFAULT_QUESTION = 32  # tokens, if there is no line break within the longest
QUOTES = "\"')]\u201d\u2019"


@dataclass(frozen=True)
class Structure:
    """Where question and sentences stand in a prompt of ``tokens`` tokens.

    Attributes
    ----------
    question: tokens from the start of the question (or instruction) to the end of the prompt.
    tail: how many of these belong to the chat template after the question.
    ends: ascending positions just past each sentence and each line, the prompt's own end left out.
    """

    tokens: int
    question: int
    tail: int
    ends: tuple[int, ...]


def read_structure(tokenizer: Any, ids: Sequence[int]) -> Structure:
    """The structure of one prompt. The question is the last lines of at least :data:`SHORTEST_QUESTION` tokens."""
    pieces = {token: tokenizer.decode([token]) for token in set(ids)}
    texts = [pieces[token] for token in ids]
    tail = template_tail(tokenizer, ids)
    end = len(ids) - tail
    last = range(end - 1 - SHORTEST_QUESTION, max(end - LONGEST_QUESTION, 0) - 1, -1)
    begin = next((at + 1 for at in last if "\n" in texts[at]), max(end - DEFAULT_QUESTION, 0))
    ends = tuple(at + 1 for at, (text, after) in enumerate(pairwise(texts)) if ends_here(text, after))
    return Structure(len(ids), len(ids) - begin, tail, ends)


def ends_here(text: str, after: str) -> bool:
    """Whether a sentence or a line ends with this token's text; empty lines belong to the line before them."""
    if after.startswith("\n"):
        return False
    return "\n" in text or (text.rstrip(QUOTES).endswith((".", "!", "?")) and after[:1].isspace())


def remaining(structure: Structure, held: Tensor, tokens: int | None = None) -> Structure | None:
    """The structure of the ascending positions ``held`` of a prompt, as if they were one; None if it is another prompt's.

    ``tokens`` of the prompt; None if its last one is held.
    """
    if structure.tokens != (int(held[-1]) + 1 if tokens is None else tokens):
        return None
    ends = torch.searchsorted(held, torch.tensor(structure.ends, dtype=held.dtype)).unique().tolist()
    question, tail = (int((held >= structure.tokens - count).sum()) for count in (structure.question, structure.tail))
    return Structure(len(held), question, tail, tuple(end for end in ends if 0 < end < len(held)))
