"""``python -m winnowkv.calibrate.task --data DIR``: train the built-in task classifier and report its accuracy.

Training rows are instruction templates of ``DIR/task_classifier``, filled with neutral text, and
instructions of our own (:mod:`winnowkv.calibrate.task_prompts`). Every dataset is held out once:
reported predictions come from models that saw no row of it. ``DIR/longbench`` is used only for testing.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from winnowkv.calibrate.prompts import read_filler
from winnowkv.calibrate.task_prompts import AGGREGATION, LOCALIZATION, QUESTIONS, TOPICS
from winnowkv.errors import InputError
from winnowkv.evaluate.needle.prompts import read_haystack, read_rows
from winnowkv.evaluate.report.machine import versions
from winnowkv.evaluate.tasks.tasks import AGGREGATION as AGGREGATION_SETS, LOCALIZATION as LOCALIZATION_SETS
from winnowkv.files import parse_json, read_text
from winnowkv.prompt.classifier import CLASSIFIER_FORMAT, HASHED_FEATURES, LinearClassifier, vectorizer
from winnowkv.prompt.task import TASKS

PACKAGED_WEIGHTS = Path(__file__).resolve().parents[1] / "data" / "task.safetensors"
PROMPTS_PER_FAMILY = 80  # for each family of instructions
FILLINGS_PER_TEMPLATE = 3  # for each template
FOLDS = 30
CHAT_FRAMES = (
    ("", ""),
    ("", ""),
    ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ("[INST] ", " [/INST]"),
    ("User: ", "\nAssistant:"),
)
# The labelling rules are wrong for these categories and datasets: they ask about a word, a number or one short sentence,
# with neither examples nor a text to search, or they are cloze tests.
DROPPED_CATEGORIES = (
    "Program Execution", "Keyword Tagging", "Dialogue Act Recognition", "Section Classification", "Sentiment Analysis",
    "Text Categorization", "Code to Text", "Text to Code",
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
JINJA_BLOCK = re.compile(r"\{%.*?%\}", re.S)


@dataclass(frozen=True)
class Row:
    """A prompt, its task, and the dataset by which rows are split."""

    text: str
    task: str
    dataset: str


class Filler:
    """Neutral text of any length, used in prompts of both tasks alike, so that it does not reveal the task."""

    def __init__(self, data: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        essays = [file.read_text(encoding="utf-8", errors="replace") for file in sorted((data / "needle").rglob("*.txt"))]
        inputs = [
            str(row["example_input"])
            for row in read_rows(data / "task_classifier" / "niv2_definitions.jsonl", "task", ("text",))
        ]
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

    def either(self) -> str:
        """The text of one classification example: a question or a phrase."""
        return self.question() if self.draw.random() < 0.5 else self.text(4, 20)

    def question(self) -> str:
        """A question about a text."""
        return self.draw.choice(QUESTIONS)


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
                rows.append(
                    Row(opening + gap.join(part for part in (before, context, after) if part) + closing, task, f"ours/{family}")
                )
    return rows


def filled(template: str, filler: Filler) -> str:
    """A template with its holes filled: questions by a question, texts by neutral text, the rest by a few words."""

    def fill(match: re.Match[str]) -> str:
        name = (match[1] or match[2] or "").lower()
        if "question" in name or "query" in name:
            return filler.question()
        if re.search(
            r"context|passage|document|article|text|dialog|story|paragraph|review|content|highlights|body|source", name
        ):
            return filler.text(30, 500)
        return filler.text(2, 12)

    return PLACEHOLDER.sub(fill, JINJA_BLOCK.sub(" ", template)).replace("|||", "\n").strip()


def templates(data: Path, filler: Filler) -> list[Row]:
    """Labelled instruction templates and task definitions; rows without a clear task are dropped."""
    folder, rows = data / "task_classifier", []
    for name in ("flan_templates", "promptsource_templates"):
        for row in read_rows(folder / f"{name}.jsonl", "task", ("text",)):
            group = re.split(r"[/_]", row["dataset"].lower())[0]
            is_reversed = row["label"] and REVERSED[row["label"]].search(row["text"].lower())
            if row["label"] and group not in DROPPED_DATASETS and not is_reversed:
                rows += [
                    Row(filled(row["text"], filler), row["label"], f"templates/{group}") for _ in range(FILLINGS_PER_TEMPLATE)
                ]
    for row in read_rows(folder / "niv2_definitions.jsonl", "task", ("text",)):
        if row["label"] and row["category"] not in DROPPED_CATEGORIES and "English" in str(row["languages"]):
            group = row["task"].split("_")[1]
            text = f"{row['text']}\n\n{row['example_input']}"
            rows.append(Row(text, row["label"], f"templates/{group}"))
    code = read_rows(folder / "humaneval_prompts.jsonl", "task", ("text",))
    return rows + [Row(row["text"], "aggregation", f"code/{at % 8}") for at, row in enumerate(code)]


def longbench(data: Path) -> list[Row]:
    """Every row of LongBench, in its official prompt."""
    prompts = parse_json(read_text(data / "longbench_config" / "dataset2prompt.json", InputError), InputError)
    rows = []
    for task, names in zip(TASKS, (LOCALIZATION_SETS, AGGREGATION_SETS), strict=True):
        for name in names:
            for row in read_rows(data / "longbench" / f"{name}.jsonl", "LongBench", ("context",)):
                rows.append(Row(prompts[name].format(context=row["context"], input=row["input"]), task, name))
    return rows


def fit(features: Any, rows: Sequence[Row]) -> tuple[torch.Tensor, float]:
    """Weights ``[features]`` and bias of a logistic regression with equal weights for both tasks; above 0: localization."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=100.0, class_weight="balanced", solver="liblinear", random_state=0)
    model.fit(features, [row.task == TASKS[0] for row in rows])
    return torch.from_numpy(model.coef_[0]).half(), float(model.intercept_[0])


def held_out(rows: Sequence[Row]) -> list[str]:
    """A prediction for every row, by one of ``FOLDS`` models that saw no row of its dataset."""
    from sklearn.model_selection import GroupKFold

    features = vectorizer().transform([row.text for row in rows])
    predictions = [""] * len(rows)
    for seen, unseen in GroupKFold(FOLDS, shuffle=True, random_state=0).split(features, groups=[row.dataset for row in rows]):
        weights, bias = fit(features[seen], [rows[i] for i in seen])
        for i, logit in zip(unseen, features[unseen] @ weights.float().numpy() + bias, strict=True):
            predictions[i] = TASKS[0] if logit >= 0 else TASKS[1]
    return predictions


def report(rows: Sequence[Row], predictions: Sequence[str]) -> dict[str, Any]:
    """Accuracy, recall and F1 of each task, the confusion matrix (rows are true tasks), accuracy of each dataset group."""
    from sklearn.metrics import classification_report, confusion_matrix

    truth = [row.task for row in rows]
    scores = classification_report(truth, predictions, labels=list(TASKS), output_dict=True, zero_division=0)
    groups: dict[str, list[bool]] = {}
    for row, predicted in zip(rows, predictions, strict=True):
        groups.setdefault(row.dataset, []).append(row.task == predicted)
    return {
        "rows": len(rows),
        "accuracy": sum(a == b for a, b in zip(truth, predictions, strict=True)) / len(rows),
        **{task: {"recall": scores[task]["recall"], "f1": scores[task]["f1-score"]} for task in TASKS},
        "confusion": confusion_matrix(truth, predictions, labels=list(TASKS)).tolist(),
        "by_dataset": {name: f"{sum(right)} of {len(right)}" for name, right in sorted(groups.items())},
    }


def train(
    data: Annotated[Path, typer.Option(help="Folder with task_classifier/, needle/, longbench/ and longbench_config/.")],
    out: Annotated[Path, typer.Option(help="File for the weights.")] = PACKAGED_WEIGHTS,
    seed: Annotated[int, typer.Option(help="Seed of fillings and composed prompts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train the task classifier; report it on held-out datasets and on LongBench."""
    filler = Filler(data, seed)
    rows = [*templates(data, filler), *composed(filler)]
    predictions = held_out(rows)
    result = {}
    for name, ours in (("held_out", False), ("held_out_composed", True)):
        mine = [at for at, row in enumerate(rows) if row.dataset.startswith("ours/") == ours]
        result[name] = report([rows[at] for at in mine], [predictions[at] for at in mine])
    weights, bias = fit(vectorizer().transform([row.text for row in rows]), rows)
    tests = longbench(data)
    profiles = LinearClassifier(weights, bias)([row.text for row in tests])
    result["longbench"] = report(tests, [str(profile.task) for profile in profiles])
    about = {
        "format": CLASSIFIER_FORMAT, "bias": bias, "features": HASHED_FEATURES, "seed": seed, "rows": len(rows),
        "versions": versions(),
        "held_out": result["held_out"]["accuracy"], "longbench": result["longbench"]["accuracy"],
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weights": weights}, out, metadata={"winnowkv": json.dumps(about)})
    if as_json:
        print(json.dumps({"weights": str(out), "bytes": out.stat().st_size, **result}, indent=2))
        return
    for name, scores in result.items():
        print(f"{name}: {100 * scores['accuracy']:.1f}% of {scores['rows']} rows")
        for task, (first, second) in zip(TASKS, scores["confusion"], strict=True):
            recall, f1 = scores[task]["recall"], scores[task]["f1"]
            print(f"  {task}: recall {recall:.3f}, F1 {f1:.3f}; predicted {TASKS[0]} {first}, {TASKS[1]} {second}")
    print("LongBench: " + ", ".join(f"{name} {right}" for name, right in result["longbench"]["by_dataset"].items()))
    print(f"{out}: {out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    typer.run(train)
