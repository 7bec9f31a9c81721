"""Calibration prompts: generated facts hidden in prose written for this package, each with its question.

They share nothing with the needles and the haystack of the evaluation, nor with any benchmark.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from winnowkv.errors import InputError
from winnowkv.evaluate.needle.prompts import read_needles
from winnowkv.prompt.chat import encode, render

SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+")
LENGTH_TOLERANCE = 3  # tokens that a prompt may lack: at the end of the text, tokens may merge
PLACES = (
    "east stable", "glass pavilion", "upper granary", "weaving mill", "stone aquarium", "copper foundry", "summer archive",
    "cedar gymnasium", "island clinic", "puppet theatre", "salt warehouse", "river observatory", "moss nursery", "clock museum",
    "lower dairy", "velvet factory", "quarry canteen", "paper studio", "hilltop bakery", "willow academy", "fog station",
    "marble arcade", "rope works", "tannery yard",
)  # fmt: skip
FIRST_NAMES = (
    "Oriel", "Tamsin", "Corvin", "Maribel", "Anselm", "Petra", "Lucan", "Isolde", "Fenwick", "Delphine", "Rufus", "Saskia",
    "Ambrose", "Ginevra", "Tobias", "Wilhelmina", "Casimir", "Odette", "Leopold", "Philippa",
)  # fmt: skip
LAST_NAMES = (
    "Harrowgate", "Pennyfeather", "Castellan", "Brightwater", "Vandermeer", "Oakhurst", "Silverthorne", "Winterbourne",
    "Kestrel", "Lockridge", "Marchbanks", "Thistlewood", "Underhill", "Ashgrove", "Copperfield", "Drummond",
)  # fmt: skip
TOWNS = (
    "Eldermoor", "Quillhaven", "Sandrigg", "Ferncastle", "Wexbridge", "Thornmere", "Lapwing Cross", "Ostermouth", "Pinehollow",
    "Greyfen", "Marrowdale", "Corbury", "Tillingham", "Vale Orchard", "Hobbs Landing", "Skerryvale",
)  # fmt: skip
COLOURS = (
    "pale turquoise",
    "dark crimson",
    "mustard yellow",
    "olive green",
    "deep violet",
    "salmon pink",
    "cobalt blue",
    "ivory white",
)
OBJECTS = (
    "grand piano",
    "iron gate",
    "water tower",
    "rowing boat",
    "weather vane",
    "marble fountain",
    "delivery van",
    "spiral stair",
)
FLAVOURS = (
    "smoked paprika",
    "pickled ginger",
    "toasted fennel",
    "black cardamom",
    "dried lavender",
    "orange peel",
    "wild thyme",
)
DISHES = ("soup", "rice", "bread", "stew", "pudding", "pie")
EVENTS = ("lantern parade", "barrel race", "plum fair", "choir contest", "sheep auction", "puppet week", "rowing regatta")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "November", "December")
DUTIES = (
    "feed the goldfish every morning", "keep the green shutters closed at noon", "water the ferns twice a week",
    "wind the hallway clock on Sundays", "leave the cellar key under the mat", "carry the firewood in before dark",
    "never move the brass lamp", "sweep the north staircase", "polish the silver spoons", "lock the garden door at nine",
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """Sentences to hide, the question about them, and the answer, which they contain once, word for word."""

    kind: str
    needle: str
    question: str
    answer: str


@dataclass(frozen=True)
class CalibrationPrompt:
    """Token ids of a prompt, and the half-open range of them that is the answer."""

    ids: list[int]
    span: tuple[int, int]
    fact: Fact
    length: int
    depth: float


def _fact(draw: random.Random) -> Fact:
    place, flavour = draw.choice(PLACES), draw.choice(FLAVOURS)
    if draw.random() < 0.5:
        dish = f"{flavour} {draw.choice(DISHES)}"
        return Fact(
            "fact", f"The favourite dish at the {place} is {dish}.", f"What is the favourite dish at the {place}?", dish
        )
    prize = f"a {draw.choice(COLOURS)} {draw.choice(OBJECTS)}"
    return Fact("fact", f"The first prize at the {place} is {prize}.", f"What is the first prize at the {place}?", prize)


def _code(draw: random.Random) -> Fact:
    place, digits = draw.choice(PLACES), "".join(draw.choice("0123456789") for _ in range(5))
    return Fact("code", f"The locker code of the {place} is {digits}.", f"What is the locker code of the {place}?", digits)


def _name(draw: random.Random) -> Fact:
    place, name = draw.choice(PLACES), f"{draw.choice(FIRST_NAMES)} {draw.choice(LAST_NAMES)}"
    role = draw.choice(("manager", "caretaker", "founder", "inspector"))
    return Fact("name", f"The {role} of the {place} is {name}.", f"Who is the {role} of the {place}?", name)


def _date(draw: random.Random) -> Fact:
    event, town, day = draw.choice(EVENTS), draw.choice(TOWNS), f"{draw.choice(MONTHS)} {draw.randint(2, 28)}"
    return Fact("date", f"The {event} of {town} begins on {day}.", f"On what day does the {event} of {town} begin?", day)


def _multi(draw: random.Random) -> Fact:
    place, first, second, third = draw.choice(PLACES), *draw.sample(DUTIES, 3)
    answer = f"to {first} and to {second}. After that it is time to {third}."
    return Fact("multi", f"The daily duties at the {place} are {answer}", f"What are the daily duties at the {place}?", answer)


FACT_MAKERS: tuple[Callable[[random.Random], Fact], ...] = (_fact, _code, _name, _date, _multi)


def generate_facts(count: int, seed: int) -> list[Fact]:
    """``count`` different facts, equally many of every kind; they depend only on the seed."""
    draw, facts = random.Random(seed), dict[str, Fact]()
    while len(facts) < count:
        fact = FACT_MAKERS[len(facts) % len(FACT_MAKERS)](draw)
        facts.setdefault(fact.question, fact)
    return list(facts.values())


def read_prompts(path: Path) -> list[Fact]:
    """The user's own facts, JSONL rows ``{"needle", "question", "answer"}``.

    Raises InputError with file and line for a row that is not JSON, lacks a field, or whose
    needle does not contain its answer word for word, and for a file without rows.
    """
    facts = []
    for row, needle in enumerate(read_needles(path), 1):
        if needle.needle.count(needle.answer) != 1:
            raise InputError(
                f"calibration file {path}, row {row}: the answer {needle.answer!r} must be in the needle once, word for word"
            )
        facts.append(Fact("own", needle.needle, needle.question, needle.answer))
    return facts


def read_filler() -> str:
    """The prose in which facts are hidden."""
    return (files("winnowkv.calibrate") / "data" / "filler.txt").read_text(encoding="utf-8")


def schedule(
    count: int, lengths: Sequence[int], depths: Sequence[float], seed: int, own: Sequence[Fact] = ()
) -> list[tuple[Fact, int, float, float]]:
    """Facts, each with a length, a depth, and the place in the filler (0 to 1) at which its prompt's text begins.

    All pairs of length and depth are used once, in random order, before any is used again.
    """
    draw, grid = random.Random(seed + 1), list[tuple[int, float]]()
    cases = []
    for fact in [*generate_facts(count, seed), *own]:
        if not grid:
            grid = [(length, depth) for length in lengths for depth in depths]
            draw.shuffle(grid)
        cases.append((fact, *grid.pop(), draw.random()))
    return cases


def build(
    tokenizer: Any, filler: str, fact: Fact, length: int, depth: float, offset: float, *, chat: bool
) -> CalibrationPrompt:
    """A prompt of ``length`` tokens, at most three fewer, with the fact after the last sentence that ends before ``depth``.

    The text is tokenized once, as a whole: there is no special token inside the context, and the span
    comes from the tokenizer's own offsets. Raises InputError for a length that is too short,
    and for a tokenizer without offsets.
    """
    sentences = SENTENCE_BREAK.split(filler.strip())
    begin = int(offset * len(sentences)) % len(sentences)
    turned = sentences[begin:] + sentences[:begin]
    sizes = [len(tokenizer(" " + sentence, add_special_tokens=False).input_ids) for sentence in turned]
    take = (
        length
        - len(_ids(tokenizer, _text("", fact), chat))
        - len(tokenizer(" " + fact.needle, add_special_tokens=False).input_ids)
    )
    if take < 16:
        raise InputError(
            f"length {length} is too short for a fact, its question and the template: they take {length - take} tokens"
        )
    best: list[int] = []
    text = ""
    for _ in range(8):
        hidden = _hide(fact.needle, turned, sizes, take, depth, tokenizer)
        ids = _ids(tokenizer, _text(hidden, fact), chat)
        if len(best) < len(ids) <= length:
            best, text = ids, _text(hidden, fact)
        if length - LENGTH_TOLERANCE <= len(ids) <= length:
            break
        take += length - len(ids)
    return CalibrationPrompt(best, _span(tokenizer, text, fact, best, chat), fact, length, depth)


def _hide(needle: str, sentences: Sequence[str], sizes: Sequence[int], take: int, depth: float, tokenizer: Any) -> str:
    """Sentences of ``take`` tokens, the last one cut, with the needle between two of them."""
    parts, used, at = list[str](), 0, 0
    while used < take:
        sentence, size = sentences[len(parts) % len(sentences)], sizes[len(parts) % len(sentences)]
        if used + size > take:
            ids = tokenizer(" " + sentence, add_special_tokens=False).input_ids
            sentence = tokenizer.decode(ids[: take - used]).strip()
        parts.append(sentence)
        used += size
        if used <= depth * take:
            at = len(parts)
    return " ".join([*parts[:at], needle, *parts[at:]])


def _text(context: str, fact: Fact) -> str:
    return f"Read this text.\n\n{context}\n\nAnswer in the words of the text. {fact.question}"


def _ids(tokenizer: Any, text: str, chat: bool) -> list[int]:
    return list(encode(tokenizer, text, chat=chat))


def _span(tokenizer: Any, text: str, fact: Fact, ids: list[int], chat: bool) -> tuple[int, int]:
    """Tokens of the answer: every token whose characters overlap it."""
    rendered = text
    if chat:
        rendered = render(tokenizer, text)
    try:
        encoded = tokenizer(rendered, add_special_tokens=not chat, return_offsets_mapping=True)
    except NotImplementedError:
        raise InputError(f"{type(tokenizer).__name__} gives no character offsets: calibration needs a fast tokenizer") from None
    if list(encoded["input_ids"]) != ids:
        raise InputError("the tokenizer gives other tokens for the rendered chat template than for its text: try --no-chat")
    first = rendered.index(fact.needle) + fact.needle.index(fact.answer)
    last = first + len(fact.answer)
    inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < last and b > first and b > a]
    return inside[0], inside[-1] + 1
