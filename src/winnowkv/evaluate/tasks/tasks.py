"""Evaluation tasks: their rows, prompts, answer clean-up and scores, taken from lm-evaluation-harness if it defines them.

A prompt is ``before + context + after``: the context is what may be compressed before the
question is known, and the question is in ``after``. LongBench's and BABILong's prompts and metrics
are read from the installed lm-eval; what departs from the authors' is corrected
(:data:`CORRECTIONS`, :func:`code_similarity`, :attr:`EvalTask.first_line`); RULER's metric is
lm-eval's too, and so are the rows of its 13 tasks (:mod:`ruler`); LongEval, which lm-eval does not
have, is scored as its authors do.
"""

from __future__ import annotations

import difflib
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

from winnowkv.errors import InputError
from winnowkv.evaluate.tasks.rows import json_rows
from winnowkv.files import SHOWN, shown
from winnowkv.prompt.task import Task

INSTALL = "pip install 'winnowkv[eval]'"
CONTEXT, QUESTION = "{{context}}", "{{question}}"
Doc = dict[str, Any]

# LongBench's English data sets by what they ask of the context.
LOCALIZATION = (
    "narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa", "passage_retrieval_en",
)  # fmt: skip
AGGREGATION = ("gov_report", "qmsum", "multi_news", "trec", "samsum", "passage_count", "lcc", "repobench-p")
FIRST_LINE = ("trec", "triviaqa", "samsum")
CODE = ("lcc", "repobench-p")
# RULER's tasks by lm-eval's files, whose rows lm-eval makes.
RULER_TASKS = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multiquery", "niah_multivalue", "vt", "cwe", "fwe", "qa_squad", "qa_hotpot",
)  # fmt: skip
# Ends of prompts in lm-eval 0.4.13 that differ from LongBench's dataset2prompt.json: wrong, right.
CORRECTIONS: Mapping[str, tuple[str, str]] = {
    "triviaqa": (f"{CONTEXT}\n{QUESTION}", f"{CONTEXT}\n\n{QUESTION}"),  # the blank line before the question is lost
    "samsum": (f"{CONTEXT}\n{QUESTION}", f"{CONTEXT}\n\n{QUESTION}"),  # as triviaqa
    "passage_count": ("answer is:", "answer is: "),  # the space at the end is lost
    "passage_retrieval_en": ("answer is:", "answer is: "),  # as passage_count
    "lcc": ("line of code:", "line of code:\n"),  # the newline at the end is lost: a model would write it first
    "repobench-p": ("line of code:", "line of code:\n"),  # as lcc
}

FIELD_TESTS: Mapping[str, Callable[[Any], bool]] = {
    "a text that is not empty": lambda value: isinstance(value, str) and bool(value.strip()),
    "a text": lambda value: isinstance(value, str),
    "a list of texts": lambda value: isinstance(value, list) and bool(value) and all(isinstance(t, str) for t in value),
    "a whole number": lambda value: type(value) is int,
}


@dataclass(frozen=True)
class Row:
    """One prompt of a task, with the answers that count as right and the row as it was read."""

    task: str
    id: str
    before: str
    context: str
    after: str
    answers: tuple[str, ...]
    doc: Doc
    prefix: str = ""  # the answer's first words, if the task gives them

    @property
    def prompt(self) -> str:
        """The whole prompt, without a chat template and without the answer's first words."""
        return self.before + self.context + self.after


@dataclass(frozen=True)
class EvalTask(ABC):
    """A data set, the prompts made of it, and how an answer is scored.

    Parameters
    ----------
    name: its name in results; file: its rows, relative to the data folder.
    kind: localization or aggregation, for policies that score by task.
    metric: name of the score, which is between 0 and 1.
    max_new_tokens: most tokens of an answer.
    chat: whether the official protocol puts the prompt into the chat template.
    first_line: whether only an answer's first line that is not empty counts. lm-eval stops at the first newline
        instead, which loses every answer that begins with one.
    fields: what a row must hold, in the words of :data:`FIELD_TESTS`; aliases: other names, read if a field is absent.
    """

    name: str
    file: str
    kind: Task
    metric: str
    max_new_tokens: int
    chat: bool = True
    first_line: bool = False
    fields: ClassVar[Mapping[str, str]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}
    sized: ClassVar[bool] = False  # rows are made as long as prompts may be, and so are not cut

    def for_model(self, model: str, max_context: int | None) -> EvalTask:
        """The task for a model, if its rows depend on the tokenizer and on how long prompts may be."""
        return self

    def rows(self, data: Path | None, limit: int | None = None) -> list[Row]:
        """The first ``limit`` rows (None: all) from a data folder, or from the hub if ``data`` is None.

        Raises InputError with file and line for a broken row, and if no rows can be read.
        """
        docs = list(self.docs(data))
        for where, doc in docs:
            self.check(doc, where)
        return [self.row(number, doc) for number, doc in enumerate(self.ordered([doc for _, doc in docs])[:limit])]

    def docs(self, data: Path | None) -> Iterable[tuple[str, Doc]]:
        """Every row as it is read, each with its place in words for error messages."""
        return self.hub() if data is None else json_rows(data / self.file, self.name, "; --data is the folder above")

    def check(self, doc: Doc, where: str) -> None:
        """Raise InputError for a row that lacks a field."""
        for field, wanted in self.fields.items():
            alias = self.aliases.get(field, field)
            doc.setdefault(field, doc.get(alias))
            if not FIELD_TESTS[wanted](doc[field]):
                raise InputError(f"{where}: field {alias!r} is missing or not {wanted}")

    def ordered(self, docs: list[Doc]) -> list[Doc]:
        """The rows in the order in which a limit takes them: that of the file."""
        return docs

    def hub(self) -> Iterator[tuple[str, Doc]]:
        """Rows from the hub, each with its place in words for error messages."""
        raise InputError(f"task {self.name} has no data set on the hub: give --data a folder that holds {self.file}")

    @abstractmethod
    def row(self, number: int, doc: Doc) -> Row:
        """The row's prompt, split into what is before, in and after its context."""

    @abstractmethod
    def judge(self, doc: Doc, answer: str) -> float:
        """The score of a cleaned answer, 0..1."""

    def score(self, row: Row, prediction: str) -> float:
        """The score of what a model wrote, 0..1."""
        return float(self.judge(row.doc, prediction.lstrip("\n").split("\n")[0] if self.first_line else prediction))

    @property
    def ends_early(self) -> bool:
        """Whether :meth:`complete` has to be called after every token."""
        return self.first_line

    def complete(self, prediction: str) -> bool:
        """Whether more text can no longer change the score, so that decoding may stop."""
        return self.first_line and "\n" in prediction.lstrip("\n")


@dataclass(frozen=True)
class LongBench(EvalTask):
    """One of LongBench's English data sets (arXiv 2308.14508); template, metric and hub data set are lm-eval's."""

    template: str = ""
    scorer: Callable[[Doc, list[str]], Mapping[str, float]] | None = None
    source: tuple[str, str, str] = ("", "", "")
    fields: ClassVar = {"context": "a text that is not empty", "question": "a text", "answers": "a list of texts"}
    aliases: ClassVar = {"question": "input"}  # its name at LongBench; lm-eval renames it

    @classmethod
    def make(cls, dataset: str) -> LongBench:
        """The task of a data set."""
        config = definition(f"longbench/{dataset}.yaml")
        return cls(
            name=f"longbench_{dataset}",
            file=f"longbench/{dataset}.jsonl",
            kind="localization" if dataset in LOCALIZATION else "aggregation",
            metric=next(entry["metric"] for entry in config["metric_list"] if entry["metric"] != "score"),
            max_new_tokens=config["generation_kwargs"]["max_gen_toks"],
            chat=dataset not in (*FIRST_LINE, *CODE),
            first_line=dataset in FIRST_LINE,
            template=corrected(dataset, config["doc_to_text"]),
            scorer=code_similarity if dataset in CODE else config["process_results"],
            source=(config["dataset_path"], config["dataset_name"], config["test_split"]),
        )

    def check(self, doc: Doc, where: str) -> None:
        """As :meth:`EvalTask.check`; a row of a classification task must also name the classes."""
        super().check(doc, where)
        if self.metric == "classification_score" and not FIELD_TESTS["a list of texts"](doc.get("all_classes")):
            raise InputError(f"{where}: field 'all_classes' is missing or not a list of texts")

    def hub(self) -> Iterator[tuple[str, Doc]]:
        """Rows of lm-eval's data set."""
        return from_hub(*self.source)

    def row(self, number: int, doc: Doc) -> Row:
        """The prompt of LongBench's template."""
        before, _, after = self.template.partition(CONTEXT)
        after = after.replace(QUESTION, doc["question"])
        return Row(self.name, str(doc.get("_id", number)), before, doc["context"], after, tuple(doc["answers"]), doc)

    def judge(self, doc: Doc, answer: str) -> float:
        """The best score over all right answers."""
        assert self.scorer is not None
        return self.scorer(doc, [answer])[self.metric]


def corrected(dataset: str, template: str) -> str:
    """lm-eval's prompt template, corrected to that of LongBench's authors. Raises InputError for one that cannot be read."""
    wrong, right = CORRECTIONS.get(dataset, ("", ""))
    if template.endswith(wrong):
        template = template.removesuffix(wrong) + right
    if template.count(CONTEXT) != 1 or "{{" in template.replace(CONTEXT, "").replace(QUESTION, ""):
        raise InputError(f"longbench_{dataset}: the prompt template of this lm-eval version cannot be read: {INSTALL}")
    return template


def code_similarity(doc: Doc, results: list[str]) -> dict[str, float]:
    """Edit similarity of the first line that is no comment, as in LongBench: lm-eval's skips blank lines as well."""
    from fuzzywuzzy import fuzz

    lines = results[0].lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return {"code_sim_score": max(fuzz.ratio(line, answer) for answer in doc["answers"]) / 100}


@dataclass(frozen=True)
class Babilong(EvalTask):
    """BABILong (arXiv 2406.10149): bAbI's facts in a book. Prompt, examples and metric are lm-eval's, by kind of question."""

    fields: ClassVar = {
        "input": "a text that is not empty", "question": "a text that is not empty", "target": "a text that is not empty",
        "task": "a text that is not empty", "index": "a whole number",
    }  # fmt: skip

    def check(self, doc: Doc, where: str) -> None:
        """As :meth:`EvalTask.check`; the kind of question names one of lm-eval's files."""
        super().check(doc, where)
        if not re.fullmatch(r"qa\d{1,2}", doc["task"]):
            raise InputError(f"{where}: field 'task' is {shown(doc['task'])}, it must be a kind of question such as qa1")

    @classmethod
    def make(cls, length: str) -> Babilong:
        """The task of a length, such as ``1k``."""
        tokens = definition("babilong/babilong_qa1.yaml")["generation_kwargs"]["max_gen_toks"]
        return cls(f"babilong_{length}", f"babilong/babilong_{length}.jsonl", "localization", "acc", tokens)

    def ordered(self, docs: list[Doc]) -> list[Doc]:
        """The kinds of question in turn: files hold one kind after the other, and a limit would take only the first kind."""
        return sorted(docs, key=lambda doc: doc["index"])

    def hub(self) -> Iterator[tuple[str, Doc]]:
        """The first five kinds of question, which every length has."""
        config = definition("babilong/babilong_qa1.yaml")
        for kind in ("qa1", "qa2", "qa3", "qa4", "qa5"):
            docs = from_hub(config["dataset_path"], self.name.removeprefix("babilong_"), kind)
            yield from ((where, {**doc, "task": kind, "index": index}) for index, (where, doc) in enumerate(docs))

    def row(self, number: int, doc: Doc) -> Row:
        """Instruction and examples, the book, the question."""
        from lm_eval.utils import apply_template

        config = definition(f"babilong/babilong_{doc['task']}.yaml")
        template, shots = config["doc_to_text"], config["fewshot_config"]["samples"][: config["num_fewshot"]]
        examples = [f"{apply_template(template, shot)} {shot['target']}\n\n" for shot in shots]
        context = doc["input"].strip()
        lead, _, after = apply_template(template, doc).partition(context)
        before = "".join([config["description"], *examples, lead])
        return Row(self.name, f"{doc['task']}-{doc['index']}", before, context, after, (doc["target"],), doc)

    def judge(self, doc: Doc, answer: str) -> float:
        """Whether the answer names the target."""
        results = definition(f"babilong/babilong_{doc['task']}.yaml")["process_results"](doc, [answer])
        score: float = results[self.metric]
        return score


@dataclass(frozen=True)
class LongEval(EvalTask):
    """LongEval's line retrieval (LongChat, 2023): the first number of the answer must be the right one."""

    fields: ClassVar = {"prompt": "a text that is not empty", "expected_number": "a whole number"}

    @classmethod
    def make(cls, stem: str) -> LongEval:
        """The task of a file."""
        return cls(f"longeval_{stem}", f"longeval/{stem}.jsonl", "localization", "first_number", 100)

    def row(self, number: int, doc: Doc) -> Row:
        """The row's prompt; its last line is the question."""
        context, after = last_line(doc["prompt"])
        return Row(self.name, str(number), "", context, after, (str(doc["expected_number"]),), doc)

    def judge(self, doc: Doc, answer: str) -> float:
        """1 if the answer's first number is the expected one, else 0."""
        found = re.search(r"\d+", answer)
        return float(found is not None and int(found[0]) == doc["expected_number"])

    @property
    def ends_early(self) -> bool:
        """Always: an answer is a number."""
        return True

    def complete(self, prediction: str) -> bool:
        """Whether a number has ended: nothing after the first number counts."""
        return re.search(r"\d\D", prediction) is not None


def ruler(stem: str, *, made: bool) -> EvalTask:
    """A RULER task with rows that lm-eval makes, or with rows from a file."""
    from winnowkv.evaluate.tasks.ruler import MadeRuler, Ruler

    return (MadeRuler if made else Ruler).make(stem)


GROUPS: Mapping[str, Mapping[str, Callable[[], EvalTask]]] = {
    "longbench": {f"longbench_{dataset}": partial(LongBench.make, dataset) for dataset in (*LOCALIZATION, *AGGREGATION)},
    "babilong": {f"babilong_{length}": partial(Babilong.make, length) for length in ("1k", "2k")},
    "ruler": {f"ruler_{stem}": partial(ruler, stem, made=False) for stem in ("niah_multikey_3_4096",)},
    "ruler13": {f"ruler_{stem}": partial(ruler, stem, made=True) for stem in RULER_TASKS},
    "longeval": {f"longeval_{stem}": partial(LongEval.make, stem) for stem in ("lines_200",)},
}
MAKERS = {name: maker for makers in GROUPS.values() for name, maker in makers.items()}


def find_tasks(names: Sequence[str]) -> list[EvalTask]:
    """Tasks by name, each once; a group's name (``longbench``) gives all of its tasks.

    Raises InputError for an unknown name, with the nearest known one, and if lm-eval is missing.
    """
    found: dict[str, Callable[[], EvalTask]] = {}
    for name in names:
        makers = GROUPS.get(name) or {known: maker for known, maker in MAKERS.items() if known == name}
        if not makers:
            near = difflib.get_close_matches(name[:SHOWN], [*GROUPS, *MAKERS], n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(f"task {shown(name)} is unknown.{hint} Known: {', '.join([*GROUPS, *MAKERS])}")
        found.update(makers)
    if not found:
        raise InputError("no task was named: give at least one, for example longbench_qasper")
    return [maker() for maker in found.values()]


@cache
def definition(path: str, *, functions: bool = True) -> Doc:
    """A task definition of the installed lm-eval. Raises InputError if it, or a package that its metric needs, is missing."""
    try:
        import lm_eval.tasks
        from lm_eval.tasks._yaml_loader import load_yaml

        with warnings.catch_warnings():  # fuzzywuzzy recommends a package that changes its scores
            warnings.filterwarnings("ignore", message="Using slow pure-python SequenceMatcher")
            task: dict[str, Any] = load_yaml(Path(lm_eval.tasks.__file__).parent / path, resolve_func=functions)
    except (ImportError, OSError) as error:
        raise InputError(f"lm-eval's task {Path(path).stem} cannot be used: {first_line(error)} ({INSTALL})") from None
    return task


def from_hub(path: str, name: str, split: str) -> Iterator[tuple[str, Doc]]:
    """Rows of a data set on the hub, each with its place in words. Raises InputError if it cannot be loaded."""
    from datasets import load_dataset

    try:
        rows = load_dataset(path, name, split=split)
    except (OSError, ValueError) as error:
        raise InputError(
            f"data set {path} ({name}) cannot be read from the hub: {first_line(error)} (give --data a folder with its rows)"
        ) from None
    yield from ((f"data set {path} ({name}), row {number}", dict(row)) for number, row in enumerate(rows))


def last_line(prompt: str) -> tuple[str, str]:
    """A prompt split before its last line break."""
    cut = max(prompt.rstrip().rfind("\n"), 0)
    return prompt[:cut], prompt[cut:]


def first_line(error: Exception) -> str:
    """The first line of another package's error message; nltk puts a line of stars above it."""
    return (str(error).strip("* \n").splitlines() or [type(error).__name__])[0]
