"""The one diagram of docs/concepts.md: from a prompt to its compact cache. It shows no measurement.

    python -m website.figures.way        writes docs/pictures/way.svg

The picture has a light ground of its own, so that it can be read on dark pages. What stays is told by a letter and by a colour
of Okabe and Ito's palette, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from website.records import ROOT

FILE = ROOT / "docs" / "pictures" / "way.svg"
WIDTH, HEIGHT = 960, 640
CELL, GAP, LEFT = 19, 3, 188
TOKENS, SINKS, QUESTION = 33, 4, 5
INK, PALE, EMPTY = "#1b1f24", "#dfe3e8", "#ffffff"
SENTENCE = range(14, 19)
KINDS = {  # letter: colour, colour of the letter, what it is
    "S": ("#E69F00", INK, "sinks: the first 4 tokens"),
    "W": ("#0072B2", "#ffffff", "a whole sentence, the same in all layers"),
    "T": ("#009E73", "#ffffff", "tokens that each layer and head chooses"),
    "Q": ("#CC79A7", INK, "the question, from which the prompt is looked at"),
}
OWN = ((6, 11, 21, 22, 25), (7, 12, 24), (9, 22, 23, 26), (5, 21))  # of each of the four layers that are drawn


def kind(layer: int, token: int) -> str:
    """Why a token stays in a layer: a letter of ``KINDS``, empty if it goes."""
    if token < SINKS:
        return "S"
    if token >= TOKENS - QUESTION:
        return "Q"
    if token in SENTENCE:
        return "W"
    return "T" if token in OWN[layer] else ""


def text(x: float, y: float, words: str, size: int = 14, *, anchor: str = "start", bold: bool = False, fill: str = INK) -> str:
    """A line of text."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}"{weight} fill="{fill}">{escape(words)}</text>'


def cell(x: float, y: float, letter: str = "", *, fill: str = PALE) -> str:
    """One entry: pale if nothing was decided, coloured with its letter if it stays."""
    ground, ink, _ = KINDS.get(letter, (fill, INK, ""))
    dashes = ' stroke-dasharray="2 2"' if fill == EMPTY and not letter else ""
    box = f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="2" fill="{ground}" stroke="#8a929b"{dashes}/>'
    return box + (text(x + CELL / 2, y + 14, letter, 12, anchor="middle", fill=ink) if letter else "")


def arrow(x: float, y: float, length: int) -> str:
    """An arrow downwards."""
    return f'<path d="M{x} {y} v{length} m-5 -7 l5 7 l5 -7" fill="none" stroke="{INK}" stroke-width="1.6"/>'


def at(column: int) -> int:
    """Where a column begins."""
    return LEFT + column * (CELL + GAP)


def row_label(y: int, number: str, title: str, *lines: str) -> Iterable[str]:
    """What a part of the picture is, on its left."""
    yield text(20, y, f"{number}  {title}", 15, bold=True)
    for n, line in enumerate(lines):
        yield text(20, y + 20 + 17 * n, line, 13)


def draw() -> str:
    """The picture, as SVG."""
    parts: list[str] = []
    parts += row_label(34, "1", "Read", "the prompt becomes", "tokens")
    spans = (0, "sinks"), (14, "the text"), (TOKENS - QUESTION, "the question")
    parts += [text(at(column), 24, words, 12) for column, words in spans]
    parts += [cell(at(n), 32, kind(0, n) if kind(0, n) in "SQ" else "") for n in range(TOKENS)]
    parts += [arrow(at(16) + CELL / 2, 57, 26)]
    parts += row_label(104, "2", "The full cache", "a key and a value of", "each token, in each", "layer and KV head")
    parts += [cell(at(n), 90 + 22 * layer) for layer in range(4) for n in range(TOKENS)]
    parts += [arrow(at(16) + CELL / 2, 181, 26)]

    parts += row_label(232, "3", "The policy", "three parts, each can", "be exchanged")
    boxes = [("Scorer", "how important is", "each token?"), ("Allocator", "how many entries may", "each layer hold?"),
             ("Selector", "which tokens stay?", "the budget is met exactly")]  # fmt: skip
    for n, (name, first, second) in enumerate(boxes):
        x = LEFT + n * 248
        parts += [f'<rect x="{x}" y="212" width="226" height="68" rx="6" fill="#f4f6f8" stroke="{INK}"/>']
        parts += [text(x + 113, 233, name, 14, anchor="middle", bold=True)]
        parts += [text(x + 113, 252, first, 13, anchor="middle"), text(x + 113, 269, second, 13, anchor="middle")]
        if n:
            parts += [f'<path d="M{x - 20} 246 h16 m-6 -5 l6 5 l-6 5" fill="none" stroke="{INK}" stroke-width="1.6"/>']
    parts += [text(LEFT, 302, "lean chooses by the prompt alone; balanced and best also by the answer's first 64 tokens.", 13)]
    parts += [arrow(at(16) + CELL / 2, 311, 22)]

    parts += row_label(352, "4", "What stays", "all else is evicted")
    parts += [cell(at(n), 340 + 22 * layer, kind(layer, n), fill=EMPTY) for layer in range(4) for n in range(TOKENS)]
    for n, (letter, (_, _, meaning)) in enumerate(KINDS.items()):
        x, y = LEFT + 380 * (n % 2), 438 + 24 * (n // 2)
        parts += [cell(x, y, letter), text(x + 27, y + 14, meaning, 13)]
    parts += [arrow(at(16) + CELL / 2, 492, 22)]

    parts += row_label(536, "5", "Compact cache", "the bytes of the rest", "are free; the answer's", "tokens are appended")
    for layer in range(4):
        kept = [letter for n in range(TOKENS) if (letter := kind(layer, n))]
        parts += [cell(at(n), 522 + 22 * layer, letter) for n, letter in enumerate(kept)]
        parts += [cell(at(len(kept) + n), 522 + 22 * layer) for n in range(3)]
    parts += [text(at(24), 536, "answer tokens: pale", 13)]
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff"/>'
    about = "A prompt is read into the full cache; scorer, allocator and selector decide what stays; the rest is freed."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="sans-serif">\n'
        f"<title>The way of a prompt</title><desc>{about}</desc>\n" + "\n".join([ground, *parts]) + "\n</svg>\n"
    )


def main() -> None:
    """Write the picture's file."""
    FILE.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
