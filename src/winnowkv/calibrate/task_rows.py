"""The prompts that the task classifier is trained and tested on.

Templates and definitions of other people (``DIR/task_classifier``), filled with neutral text, and instructions of our own
(:mod:`winnowkv.calibrate.task_prompts`, :mod:`winnowkv.calibrate.task_instructions`); for testing only, LongBench in its
official prompts, and prompts written for the tests.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnowkv.calibrate.prompts import FIRST_NAMES, read_filler
from winnowkv.calibrate.task_instructions import SHOT_ORDERS, Words, read_families, shots, table
from winnowkv.calibrate.task_prompts import AGGREGATION, LOCALIZATION, QUESTIONS, TOPICS
from winnowkv.errors import InputError
from winnowkv.evaluate.needle.prompts import read_haystack, read_rows
from winnowkv.evaluate.tasks.tasks import AGGREGATION as AGGREGATION_SETS, LOCALIZATION as LOCALIZATION_SETS
from winnowkv.files import parse_json, read_text, reason
from winnowkv.prompt.task import TASKS

CONTEXTS_PER_KIND = 300
PROMPTS_PER_FILE_FAMILY = 200  # for each family of the packaged file
PROMPTS_PER_FAMILY = 80  # for each family of instructions
FILLINGS_PER_TEMPLATE = 3  # for each template
CHAT_FRAMES = (
    ("", ""),
    ("", ""),
    ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ("[INST] ", " [/INST]"),
    ("User: ", "\nAssistant:"),
    ("user\n", "\nassistant\n"),  # as decoded without special tokens
    ("system\nYou are a helpful assistant.\nuser\n", "\nassistant\n"),
    (
        "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    ("<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
    ("", ""),
    ("", ""),
)
# The labelling rules are wrong for these categories and datasets: they ask about a word, a number or one short sentence,
# with neither examples nor a text to search, or they are cloze tests.
DROPPED_CATEGORIES = (
    "Program Execution", "Keyword Tagging", "Dialogue Act Recognition", "Section Classification", "Sentiment Analysis",
    "Text Categorization", "Code to Text", "Text to Code",
)  # fmt: skip
# Categories and datasets that the rules left without a task, labelled by hand: claims to be checked against a text are
# localization; translations, rewriting, texts made from data, and the sentiment or category of a whole text are aggregation.
# A kind is one group when data is split.
ADDED_CATEGORIES = {
    "Answerability Classification": ("localization", "answerable"), "Fact Verification": ("localization", "entailment"),
    "Speaker Identification": ("localization", "speaker"), "Translation": ("aggregation", "translation"),
    "Text Simplification": ("aggregation", "rewriting"), "Style Transfer": ("aggregation", "rewriting"),
    "Paraphrasing": ("aggregation", "rewriting"), "Grammar Error Correction": ("aggregation", "rewriting"),
    "Sentence Compression": ("aggregation", "rewriting"), "Data to Text": ("aggregation", "data_to_text"),
    "Sentiment Analysis": ("aggregation", "whole_class"), "Text Categorization": ("aggregation", "whole_class"),
    "Story Composition": ("aggregation", "story"), "Poem Generation": ("aggregation", "story"),
}  # fmt: skip
ADDED_DATASETS = {
    "entailment": ("localization", "rte anli cb mnli snli esnli qnli wnli multi_nli xnli glue/rte glue/mnli glue/wnli hans "
                   "super_glue/rte super_glue/cb super_glue/axb super_glue/axg glue/mnli_matched tab_fact "
                   "glue/mnli_mismatched"),
    "translation": ("aggregation", "wmt14_enfr wmt16_translate para_crawl"),
    "rewriting": ("aggregation", "fix_punct true_case asset/simplification turk wiki_split jfleg"),
    "data_to_text": ("aggregation", "dart e2e_nlg web_nlg_en e2e_nlg_cleaned enriched_web_nlg"),
}  # fmt: skip
MOST_ADDED = 100  # rows of one kind, so that no kind outweighs the rest
# Their examples hold questions that no labelled row has: these fill ours and the templates.
QUESTION_CATEGORIES = (
    "Question Generation", "Question Rewriting", "Question Understanding", "Question Decomposition", "Text Quality Evaluation",
)  # fmt: skip
DROPPED_DATASETS = (
    "tweet",
    "trec",
    "yahoo",
    "snips",
    "sms",
    "banking77",
    "record",
    "cbt",
    "piqa",
    "rotten",
    "kilt",
    "super",
    "head",
    "dbpedia",
)
LABELS = (
    "positive",
    "negative",
    "person",
    "place",
    "number",
    "description",
    "sports",
    "business",
    "refund",
    "greeting",
    "abbreviation",
)
SPEAKERS = (
    "Anna",
    "Ben",
    "Speaker 1",
    "Speaker 2",
    "Chair",
    "Project Manager",
    "Marketing",
    "Minister",
    "Professor D",
    "Grad A",
)
# Templates that reverse their dataset's task: they ask for a question given the answer, or for a text given its summary.
REVERSED = {
    "localization": re.compile(
        r"(ask|generate|write|make|suggest|create|come up with|form)\b.{0,40}questions?|which entity|title|do you have any"
    ),
    "aggregation": re.compile(
        r"(write|generate|develop|expand|compose|produce|create)\b.{0,30}"
        r"(article|document|story|email|review|text|news|dialog)\b(?!.{0,20}summar)|docstring|code above|claim can be made"
    ),
}
PLACEHOLDER = re.compile(r"\{\{(.*?)\}\}|\{(\w+)\}", re.S)
ASKS = re.compile(r"\b(question|query|answer|option|choice|hypothesis|claim|summary|statement|title)s?\b.{0,10}:|\?\W*$", re.I)
ENGLISH = re.compile(
    r"(Who|What|When|Where|Which|Why|How|Is|Are|Was|Were|Did|Does|Do|Can|Could|Will|Has|Have|Should|In|At|On)\b"
)
JINJA_BLOCK = re.compile(r"\{%.*?%\}", re.S)


@dataclass(frozen=True)
class Row:
    """A prompt, its task, the dataset by which rows are split, and the text that its instruction is about, if it is known."""

    text: str
    task: str
    dataset: str
    context: str = ""


class Filler:
    """Neutral text of any length, used in prompts of both tasks alike, so that it does not reveal the task."""

    def __init__(self, data: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        essays = [file.read_text(encoding="utf-8", errors="replace") for file in sorted((data / "needle").rglob("*.txt"))]
        inputs = [
            str(row["example_input"])
            for row in read_rows(data / "task_classifier" / "niv2_definitions.jsonl", "task", ("text",))
        ]
        self.questions = [*QUESTIONS, *found_questions(data)]
        self._passages = [text for text in inputs if text.isascii() and len(text.split()) >= 20 and not ASKS.search(text)]
        self._words = [text.split() for text in (read_filler(), read_haystack(), *essays, " ".join(inputs))]
        self._code = [row["text"] for row in read_rows(data / "task_classifier" / "humaneval_prompts.jsonl", "task", ("text",))]

    def text(self, least: int, most: int) -> str:
        """Some words from the middle of one of the texts."""
        words = self.draw.choice(self._words)
        begin = self.draw.randrange(max(len(words) - most, 1))
        return " ".join(words[begin : begin + self.draw.randint(least, most)])

    def code(self) -> str:
        """A few functions."""
        return "\n\n".join(self.draw.sample(self._code, self.draw.randint(1, 6)))

    def context(self, family: str, after: str) -> str:
        """The text between the instructions: examples, numbered paragraphs, records, dialogue, or plain text."""
        count = self.draw.randint(4, 24)
        if family.startswith("fewshot"):
            shape = after.rsplit("\n\n", 1)[-1]
            labels = self.draw.sample(LABELS, 4) if not family.endswith(("qa", "summary")) else None
            shots = (shape.replace("{q}", self.question() if labels is None else self.either()) for _ in range(count))
            return "\n\n".join(f"{shot} {self.draw.choice(labels) if labels else self.text(2, 10)}" for shot in shots)
        if family in ("which_passage", "find_source", "counting", "duplicates"):
            return "\n\n".join(f"Paragraph {at}: {self.text(20, 120)}" for at in range(1, count))
        if family in ("lookup", "key_value"):
            return "\n".join(f"{self.text(1, 2)}: {self.draw.randint(100, 99999)}" for _ in range(4 * count))
        if family.startswith(("meeting", "interview", "committee", "dialogue")):
            return "\n".join(f"{self.draw.choice(SPEAKERS)}: {self.text(4, 60)}" for _ in range(2 * count))
        return self.text(40, 900)

    def any_context(self, kind: str) -> tuple[str, list[list[str]]]:
        """A context of one kind, and its rows if it is a table; the kind ``any`` is whatever comes, code and tables too."""
        if kind == "any":
            kind = self.draw.choice(
                ("prose", "prose", "passage", "passage", "passage", "passages", "dialogue", "code", "table")
            )
        count = self.draw.randint(3, 24)
        if kind == "table":
            return table(self.draw, count)
        if kind == "code":
            return self.code(), []
        if kind == "passages":
            mark = self.draw.choice(("Paragraph {}: ", "[{}] ", "({}) ", "{}. ", "Document {}\n", "Passage {}: "))
            return "\n\n".join(mark.format(at) + self.text(15, 90) for at in range(1, count)), []
        if kind == "dialogue":
            names = self.draw.sample(SPEAKERS + FIRST_NAMES, self.draw.randint(2, 5))
            clock = self.draw.choice(("", "", "[{:02}:{:02}] "))
            lines = (
                f"{clock.format(at // 60, at % 60)}{self.draw.choice(names)}: {self.text(2, 30)}"
                for at in range(600, 600 + 2 * count)
            )
            return "\n".join(lines), []
        if kind == "passage":
            return "\n\n".join(self.draw.sample(self._passages, self.draw.choice((1, 1, 2, 4)))), []
        return self.draw.choice(("", "", "## ", "Dear all, ", "1. ")) + self.text(40, 900), []

    def shots(self) -> tuple[str, str]:
        """Labelled examples and the one to be labelled."""
        return shots(self.draw, [self.either() for _ in range(self.draw.randint(3, 16))])

    def either(self) -> str:
        """The text of one classification example: a question or a phrase."""
        return self.question() if self.draw.random() < 0.5 else self.text(4, 20)

    def question(self) -> str:
        """A question about a text."""
        return self.draw.choice(self.questions)


def composed(filler: Filler) -> list[Row]:
    """Our own instructions around neutral text, with and without chat templates."""
    rows = []
    for task, families in zip(TASKS, (LOCALIZATION, AGGREGATION), strict=True):
        for family, instructions in families.items():
            for _ in range(PROMPTS_PER_FAMILY):
                before, after = filler.draw.choice(instructions)
                code = family.startswith("code") or filler.draw.random() < 0.05
                context = filler.code() if code else filler.context(family, after)
                question = filler.question()
                before, after = before.replace("{q}", question), after.replace("{q}", question)
                after = after.replace("{topic}", filler.draw.choice(TOPICS))
                opening, closing = filler.draw.choice(CHAT_FRAMES)
                gap = filler.draw.choice(("\n", "\n\n"))
                text = opening + gap.join(part for part in (before, context, after) if part) + closing
                rows.append(Row(text, task, f"ours/{family}", context))
    return rows


def instructed(filler: Filler) -> list[Row]:
    """Instructions of the packaged file around contexts of every kind, and labelled examples without much of an instruction."""
    rows, draw, families = [], filler.draw, read_families()
    # Every context stands in prompts of both tasks, so that its words cannot tell the task.
    contexts = {kind: [filler.any_context(kind) for _ in range(CONTEXTS_PER_KIND)] for kind in {f.context: 0 for f in families}}
    for family in families:
        for _ in range(PROMPTS_PER_FILE_FAMILY):
            context, table_rows = draw.choice(contexts[family.context])
            words = Words(draw, filler.questions, context, table_rows)
            before, after = (words.fill(part) for part in draw.choice(family.lines))
            rows.append(Row(framed(draw, before, context, after), family.task, f"file/{family.name}", context))
    for _ in range(PROMPTS_PER_FILE_FAMILY):
        examples, last = filler.shots()
        rows.append(Row(framed(draw, draw.choice(SHOT_ORDERS), examples, last), "aggregation", "file/shots", examples))
    return rows


def framed(draw: random.Random, *parts: str) -> str:
    """The parts that are not empty, in a chat template's frame or in none."""
    opening, closing = draw.choice(CHAT_FRAMES)
    return opening + draw.choice(("\n", "\n\n", "\n\n")).join(part for part in parts if part) + closing


def found_questions(data: Path) -> list[str]:
    """Questions of task definitions whose own task is not labelled."""
    found = set()
    for row in read_rows(data / "task_classifier" / "niv2_definitions.jsonl", "task", ("text",)):
        if row["category"] in QUESTION_CATEGORIES and "English" in str(row["languages"]):
            text = f"{row['example_input']}\n{row['example_output']}"
            found.update(re.findall(r"(?:^|[.\n:!?] *)([A-Z][^.\n:?!(){}|]{10,100}\?)", text))
    return sorted(question for question in found if question.isascii() and ENGLISH.match(question))


def added_templates(data: Path, filler: Filler) -> list[Row]:
    """Templates and definitions of :data:`ADDED_DATASETS` and :data:`ADDED_CATEGORIES`, in groups by kind."""
    folder, kinds = (
        data / "task_classifier",
        {name: (task, kind) for kind, (task, names) in ADDED_DATASETS.items() for name in names.split()},
    )
    rows: list[Row] = []
    for source in ("flan_templates", "promptsource_templates"):
        for row in read_rows(folder / f"{source}.jsonl", "task", ("text",)):
            name = row["dataset"].lower()
            found = kinds.get(name) or kinds.get(name.split("/")[0])
            if found and not row["label"]:
                rows.append(filled(row["text"], filler, found[0], f"added/{found[1]}"))
    for row in read_rows(folder / "niv2_definitions.jsonl", "task", ("text",)):
        if row["category"] in ADDED_CATEGORIES and "English" in str(row["languages"]):
            task, kind = ADDED_CATEGORIES[row["category"]]
            rows.append(defined(row, task, f"added/{kind}"))
    filler.draw.shuffle(rows)
    counts: Counter[str] = Counter()
    kept = []
    for added in rows:
        counts[added.dataset] += 1
        if counts[added.dataset] <= MOST_ADDED:
            kept.append(added)
    return kept


def filled(template: str, filler: Filler, task: str, dataset: str) -> Row:
    """A template with its holes filled: questions by a question, texts by neutral text, the rest by a few words."""
    texts = []

    def fill(match: re.Match[str]) -> str:
        name = (match[1] or match[2] or "").lower()
        if "question" in name or "query" in name:
            return filler.question()
        if re.search(
            r"context|passage|document|article|text|dialog|story|paragraph|review|content|highlights|body|source", name
        ):
            texts.append(filler.text(30, 500))
            return texts[-1]
        return filler.text(2, 12)

    text = PLACEHOLDER.sub(fill, JINJA_BLOCK.sub(" ", template)).replace("|||", "\n").strip()
    return Row(text, task, dataset, "\n".join(texts))


def templates(data: Path, filler: Filler) -> list[Row]:
    """Labelled instruction templates and task definitions; rows without a clear task are dropped."""
    folder, rows = data / "task_classifier", []
    for name in ("flan_templates", "promptsource_templates"):
        for row in read_rows(folder / f"{name}.jsonl", "task", ("text",)):
            group = re.split(r"[/_]", row["dataset"].lower())[0]
            is_reversed = row["label"] and REVERSED[row["label"]].search(row["text"].lower())
            if row["label"] and group not in DROPPED_DATASETS and not is_reversed:
                rows += [filled(row["text"], filler, row["label"], f"templates/{group}") for _ in range(FILLINGS_PER_TEMPLATE)]
    for row in read_rows(folder / "niv2_definitions.jsonl", "task", ("text",)):
        if row["label"] and row["category"] not in DROPPED_CATEGORIES and "English" in str(row["languages"]):
            group = row["task"].split("_")[1]
            rows.append(defined(row, row["label"], f"templates/{group}"))
    code = read_rows(folder / "humaneval_prompts.jsonl", "task", ("text",))
    return rows + [Row(row["text"], "aggregation", f"code/{at % 8}") for at, row in enumerate(code)]


def defined(row: dict[str, Any], task: str, dataset: str) -> Row:
    """A task definition with its example; an input that asks is part of the instruction."""
    example = str(row["example_input"])
    return Row(f"{row['text']}\n\n{example}", task, dataset, "" if ASKS.search(example) or task == TASKS[0] else example)


def longbench(data: Path) -> list[Row]:
    """Every row of LongBench, in its official prompt."""
    prompts = parse_json(read_text(data / "longbench_config" / "dataset2prompt.json", InputError), InputError)
    rows = []
    for task, names in zip(TASKS, (LOCALIZATION_SETS, AGGREGATION_SETS), strict=True):
        for name in names:
            for row in read_rows(data / "longbench" / f"{name}.jsonl", "LongBench", ("context",)):
                rows.append(Row(prompts[name].format(context=row["context"], input=row["input"]), task, name))
    return rows


def read_prompts(file: Path) -> list[Row]:
    """Prompts of a JSON file: ``contexts`` by name; ``prompts``, each a task, a family, and texts around its context."""
    found = parse_json(read_text(file, InputError), InputError)
    try:
        return [
            Row(
                "\n\n".join(part for part in (row["before"], found["contexts"][row["context"]], row["after"]) if part),
                row["task"], row["family"],
            )
            for row in found["prompts"]
        ]  # fmt: skip
    except (KeyError, TypeError) as error:
        raise InputError(f"{file} holds no prompts: it needs 'contexts' and 'prompts' ({reason(error)})") from None
