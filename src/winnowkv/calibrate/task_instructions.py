"""Prompts composed from ``data/task_instructions.txt``: many wordings of each kind of instruction, around many kinds of text.

Contexts are drawn without looking at the task, so that nothing but the instruction tells it; the file's head says how
its lines read.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from winnowkv.calibrate.prompts import COLOURS, FIRST_NAMES, LAST_NAMES, OBJECTS, PLACES, TOWNS
from winnowkv.calibrate.task_prompts import TOPICS

CHOICE = re.compile(r"(?<!\\)\(([^()]*)\)")
SLOT = re.compile(r"(?<!\\)\{(\w+)\}")
SECTION = re.compile(r"\[(\w+)/(\w+) (\w+)\]")
SENTENCES = re.compile(r"(?<=[.!?])\s+")
ARTICLES = ("the", "the", "the", "this", "his", "their", "that", "a", "", "Mr", "our")
LANGUAGES = ("French", "German", "Spanish", "Italian", "Dutch", "Polish", "Turkish", "Japanese", "Hindi", "Chinese", "English")
COLUMNS = ("price", "owner", "year", "city", "status", "weight", "code", "capacity", "length", "team", "score", "email", "room")
SHOT_INPUTS = ("Text", "Input", "Message", "Sentence", "Comment", "Example", "Post", "X", "Item", "Note", "Title", "Word", "")
SHOT_OUTPUTS = (
    "Label", "Class", "Output", "Category", "Sentiment", "Type", "Tag", "Y", "Group", "Kind", "Topic", "Mood",
    "=>", "->", "|", "=", ":", "//", "-->", "##",
)  # fmt: skip
SHOT_LABELS = (
    "positive negative neutral", "spam ham", "sports politics science arts", "urgent later never", "yes no", "1 2 3 4 5",
    "bug feature question", "happy sad angry afraid", "A B C", "formal casual", "loan account card transfer", "true false",
    "animal plant mineral", "buy sell hold", "toxic fine", "billing shipping returns", "fact opinion", "north south east west",
)  # fmt: skip
SHOT_ORDERS = (
    "", "", "", "Classify the last one.", "Give each its label, as in the examples.", "Which class does the last one have?",
    "Label these.", "Assign the category.", "Follow the pattern.", "Learn from the examples and label the rest.",
    "What is the right tag?",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Instructions of one kind: its task, the context that they need, and pairs of texts before and after it."""

    task: str
    name: str
    context: str
    lines: tuple[tuple[str, str], ...]


def read_families() -> list[Family]:
    """The families of the packaged file."""
    text = (files("winnowkv.calibrate") / "data" / "task_instructions.txt").read_text(encoding="utf-8")
    families: list[tuple[str, str, str, list[tuple[str, str]]]] = []
    for line in text.splitlines():
        if section := SECTION.fullmatch(line):
            families.append((section[1], section[2], section[3], []))
        elif line and not line.startswith("# "):
            before, _, after = line.partition("||")
            families[-1][3].append((before.strip(" "), after.lstrip(" ")))
    return [Family(task, name, context, tuple(lines)) for task, name, context, lines in families]


@dataclass
class Words:
    """What slots are filled with: questions, and names, nouns and lines of the context at hand."""

    draw: random.Random
    questions: Sequence[str]
    context: str
    rows: Sequence[Sequence[str]] = ()  # of a table, its header first

    def fill(self, text: str) -> str:
        """An instruction with its choices made and its slots filled."""
        while CHOICE.search(text):
            text = CHOICE.sub(lambda match: self.draw.choice(match[1].split("|")), text)
        while SLOT.search(text):
            text = SLOT.sub(lambda match: self.slot(match[1]), text)
        return re.sub(r"\\([{}()])", r"\1", text.replace("\\n", "\n"))

    def found(self, pattern: str) -> list[str]:
        """What a pattern with one group finds in the context."""
        return [match[1] for match in re.finditer(pattern, self.context)]

    def slot(self, name: str) -> str:
        """The filling of one slot, with no slots in it."""
        draw, words = self.draw, self.context.split()
        if name == "q":
            question = draw.choice(self.questions) if draw.random() < 0.7 else self.fill(draw.choice(QUESTION_FORMS))
            return question if draw.random() < 0.85 else question.rstrip("?").lower()
        if name == "options":
            marks = draw.choice(
                (("A)", "B)", "C)", "D)"), ("a.", "b.", "c."), ("(1)", "(2)", "(3)", "(4)"), ("A:", "B:"), ("-",) * 3)
            )
            return draw.choice(("\n", "\n", " ")).join(f"{mark} {self.noun(words)}" for mark in marks)
        if name in ("row", "cell", "column"):
            at = draw.randrange(1, len(self.rows))
            return {"row": self.rows[at][0], "cell": draw.choice(self.rows[at][1:]), "column": draw.choice(self.rows[0][1:])}[
                name
            ]
        if name == "function":
            return draw.choice(self.found(r"def (\w+)") or ["main"])
        if name == "signature":
            return draw.choice(self.found(r"( *def .*:)") or ["def main():"])
        if name == "speaker":
            return draw.choice(self.found(r"(?m)^(?:\[?[\d:]+\]? )?([A-Z]?\w+):") or FIRST_NAMES)
        fixed = {
            "few": ("two", "three", "four", "five", "a few", "3", "5", "10", "100"), "language": LANGUAGES, "topic": TOPICS,
            "number": ("12", "300", "4,500", "1997", "0.5"), "name": (draw.choice(FIRST_NAMES), self.name(words)),
        }  # fmt: skip
        if name in fixed:
            return draw.choice(fixed[name])
        sentence = draw.choice(SENTENCES.split(self.context)).split()
        if name == "line":
            return " ".join(sentence[:12]).replace("{", "").replace("}", "")
        if name == "claim":
            made = draw.random() < 0.5 or not 4 <= len(sentence) <= 25
            claim = (
                self.fill("{noun} (is|was|has|had|will be|never was|cost|came before|belongs to) {noun}")
                if made
                else " ".join(sentence)
            )
            return re.sub(r"[{}()|\\]", "", claim).rstrip(".!?")
        return self.noun(words)

    def name(self, words: Sequence[str]) -> str:
        """A word of the context with a capital, or a made-up surname."""
        names = [word.strip(".,;:!?\"'()") for word in words if word[:1].isupper() and word[1:2].islower()]
        return re.sub(r"[{}()|\\]", "", self.draw.choice(names)) if names else self.draw.choice(LAST_NAMES)

    def noun(self, words: Sequence[str]) -> str:
        """A thing to ask about: words of the context, or an object, a place or a name of our own."""
        draw = self.draw
        if draw.random() < 0.4 or not words:
            return draw.choice((
                "the " + draw.choice(OBJECTS), "the " + draw.choice(PLACES), draw.choice(TOWNS), draw.choice(FIRST_NAMES),
                f"{draw.choice(FIRST_NAMES)} {draw.choice(LAST_NAMES)}", f"the {draw.choice(COLOURS)} {draw.choice(OBJECTS)}",
            ))  # fmt: skip
        begin, count = draw.randrange(len(words)), draw.choice((1, 1, 2, 3))
        found = re.sub(r"[{}()|\\]", "", " ".join(words[begin : begin + count])).strip(".,;:!?\"'")
        return f"{draw.choice(ARTICLES)} {found}".strip()


QUESTION_FORMS = (
    "(Who|When|Where|Why|How) (was|is|did) {noun} {noun}?",
    "(What|Which) (is|was|did) {noun} {noun}?",
    "(Is|Was|Did|Does|Has|Can|Are|Were) {noun} {noun}?",
    "(How many|How much|How long|How old|How far|What year|What time|What kind of|Which) {noun} (is|was|are|were|did) {noun}?",
    "(What did|Where did|When did|Why did|How did) {name} (do|say|get|find|lose|make|want) {noun}?",
    "(Which|What) (city|man|woman|river|firm|team|book|day|law|model|method|metric|planet|song) (is|was|has|did) {noun}?",
)


def table(draw: random.Random, count: int) -> tuple[str, list[list[str]]]:
    """A table in one of four formats, and its rows with the header first."""
    columns = draw.sample(COLUMNS, draw.randint(2, 5))
    cells = (str(draw.randint(1, 99999)), draw.choice(TOWNS), draw.choice(LAST_NAMES), f"{draw.random() * 100:.1f}", "none")
    rows = [[draw.choice(("name", "id", "item", "model")), *columns]]
    for _ in range(count):
        cells = (str(draw.randint(1, 99999)), draw.choice(TOWNS), draw.choice(LAST_NAMES), f"{draw.random() * 100:.1f}", "none")
        first = draw.choice((draw.choice(FIRST_NAMES), draw.choice(TOWNS), f"{draw.choice('ABCDKQ')}-{draw.randint(1, 999)}"))
        rows.append([first, *(draw.choice(cells) for _ in columns)])
    shape = draw.choice(("|", ",", "\t", "json"))
    if shape == "json":
        lines = ["{" + ", ".join(f'"{k}": "{v}"' for k, v in zip(rows[0], row, strict=True)) + "}" for row in rows[1:]]
    elif shape == "|":
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|" + "---|" * len(rows[0]))
    else:
        lines = [shape.join(row) for row in rows]
    return "\n".join(lines), rows


def shots(draw: random.Random, texts: Sequence[str]) -> tuple[str, str]:
    """Labelled examples in a shape drawn for them, and the last one, which has no label yet."""
    prefix, suffix = draw.choice(SHOT_INPUTS), draw.choice(SHOT_OUTPUTS)
    labels = draw.choice(SHOT_LABELS).split() if draw.random() < 0.7 else draw.sample(FIRST_NAMES + COLUMNS + TOWNS, 3)
    gap, own_line = draw.choice(("\n", "\n\n")), suffix[0].isalpha()
    opening = f"{prefix}: " if prefix else ""
    middle = f"\n{suffix}:" if own_line else f" {suffix}"
    examples = [f"{opening}{text}{middle}" for text in texts]
    return gap.join(f"{text} {draw.choice(labels)}" for text in examples[:-1]), examples[-1]
