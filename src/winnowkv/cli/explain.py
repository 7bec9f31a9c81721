"""``winnow generate --explain``: which layers and KV heads kept one token of the prompt, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from winnowkv.errors import InputError

if TYPE_CHECKING:
    from winnowkv.cache.explain import Explanation

HEADS_WIDTH = 20
COLUMNS = "{:>5} {:<20} {:<20} {:>8} {:>13} {:>9}"  # 80 columns in all


def find_token(tokenizer: Any, ids: Sequence[int], asked: str) -> int:
    """The position of a prompt's token: a number, from the end if negative, or a text, whose last occurrence ends with it.

    Raises InputError for a position that the prompt does not have and a text that does not occur in it.
    """
    try:
        position = int(asked)
    except ValueError:
        return last_occurrence(tokenizer, ids, asked)
    if not -len(ids) <= position < len(ids):
        raise InputError(f"--explain {position}: the prompt has tokens 0 to {len(ids) - 1}, or -{len(ids)} to -1 from its end")
    return position % len(ids)


def last_occurrence(tokenizer: Any, ids: Sequence[int], text: str) -> int:
    """The position of the token in which the last occurrence of a text in the prompt ends."""
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    begin = whole.rfind(text)
    if not text or begin < 0:
        raise InputError(f"--explain {text!r}: this text does not occur in the prompt; give a part of it, or a position")
    beginning = whole[: begin + len(text)]
    # The least number of tokens that hold the text up to there; a prefix that ends within a character does not hold it yet.
    few, enough = 0, len(ids)
    while enough - few > 1:
        middle = (few + enough) // 2
        if tokenizer.decode(ids[:middle], clean_up_tokenization_spaces=False).startswith(beginning):
            enough = middle
        else:
            few = middle
    return enough - 1


def as_dicts(layers: Sequence[Sequence[Explanation]], text: str) -> list[dict[str, Any]]:
    """An explanation for each layer and KV head as plain data; ``text`` is the token's own."""
    return [{**asdict(one), "text": text} for layer in layers for one in layer]


def lines(layers: Sequence[Sequence[Explanation]], text: str) -> Iterator[str]:
    """What ``winnow generate`` prints: the token, a line for each layer, and how many layers and heads kept it."""
    yield f"-- token {layers[0][0].token}: {text!r}"
    yield "-- score, rank and threshold: best-ranked KV head, of those that kept it if any"
    yield COLUMNS.format("layer", "KV heads", "kept by", "score", "rank", "threshold").rstrip()
    yield from (layer_line(layer) for layer in layers)
    every = [one.kept for layer in layers for one in layer]
    kept = sum(any(one.kept for one in layer) for layer in layers)
    yield f"-- kept in {kept} of {len(layers)} layers, {sum(every)} of {len(every)} heads"


def layer_line(heads: Sequence[Explanation]) -> str:
    """One layer in at most 80 columns."""
    reasons = dict.fromkeys(one.reason for one in heads if one.kept)
    best = min(heads, key=lambda one: (not one.kept, one.competing if one.rank is None else one.rank))
    rank = "-" if best.rank is None else f"{best.rank}/{best.competing}"
    return COLUMNS.format(
        heads[0].layer, fates(heads), ", ".join(reasons) or "-", number(best.score), rank, number(best.threshold)
    )


def fates(heads: Sequence[Explanation]) -> str:
    """``heads 0,2 kept, 1 went``; only their numbers if there are too many heads to list."""
    sides = {"kept": [one.head for one in heads if one.kept], "went": [one.head for one in heads if not one.kept]}
    for fate, members in sides.items():
        if len(members) == len(heads):
            return f"all {len(heads)} {fate}"
    listed = ", ".join(f"{ranges(members)} {fate}" for fate, members in sides.items())
    if len(listed) <= HEADS_WIDTH:
        return listed
    return ", ".join(f"{len(members)} {fate}" for fate, members in sides.items())


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, three or more in a row folded: ``0,2,4-7``."""
    parts = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        row = [str(number) for _, number in run]
        parts.append(f"{row[0]}-{row[-1]}" if len(row) > 2 else ",".join(row))
    return ",".join(parts)


def number(value: float | None) -> str:
    """Three digits, a dash for None."""
    return "-" if value is None else f"{value:.3g}"
