"""RULER's 13 tasks (arXiv 2404.06654), their rows made by lm-evaluation-harness's own generators.

A row is made for a model's tokenizer and for a length in tokens, which includes the answer's. Nothing is stored: the
generators draw from Python's and numpy's random numbers, which are seeded here as lm-eval seeds them and put back, so
that the same tokenizer, length and packages give the same rows.

Needles in repeated sentences or among other needles (``niah_single_1``, ``niah_multikey_2``, ``niah_multikey_3``),
``vt``, ``cwe`` and ``fwe`` need no network. The other needle tasks fetch essays from the hub and sentence boundaries from
nltk, ``qa_squad`` and ``qa_hotpot`` their data sets.
"""

from __future__ import annotations

import hashlib
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from winnowkv.errors import InputError
from winnowkv.evaluate.tasks.tasks import INSTALL, RULER_TASKS, Doc, EvalTask, Row, definition, first_line, last_line
from winnowkv.files import shown
from winnowkv.models.load import EMBEDDED, PACKAGED, best_device, best_dtype, cannot_load, model_folder

DEFAULT_LENGTH = 4096  # lm-eval's, and the leaderboard's
LEAST_LENGTH = 1024  # of a row that has no room for its example and ten units of text, lm-eval tries shorter ones forever
# Where the question begins, at its last place in the prompt: as NVIDIA kvpress splits RULER's prompts for its leaderboard.
QUESTIONS: Mapping[str, str] = {
    "niah": "What ",
    "vt": "Question: ",
    "cwe": "Question: ",
    "fwe": "Question: ",
    "qa": "Answer the question based on the given documents.",
}
SEED, NUMPY_SEED, WORDS_SEED = 0, 1234, 42  # lm-eval's defaults; the last one is that of ``cwe``'s own generator


@dataclass(frozen=True)
class Ruler(EvalTask):
    """A RULER task (arXiv 2404.06654) with rows from a file. No chat template: the prompt itself begins the answer."""

    fields: ClassVar = {"input": "a text that is not empty", "outputs": "a list of texts"}

    @classmethod
    def make(cls, stem: str) -> Ruler:
        """The task of a file."""
        tokens = definition("ruler/niah_single_1.yaml", functions=False)["generation_kwargs"]["max_gen_toks"]
        return cls(f"ruler_{stem}", f"ruler/{stem}.jsonl", "localization", "string_match_all", tokens, chat=False)

    def row(self, number: int, doc: Doc) -> Row:
        """The row's prompt; its last line is the question."""
        context, after = last_line(doc["input"])
        return Row(self.name, str(doc.get("index", number)), "", context, after, tuple(doc["outputs"]), doc)

    def judge(self, doc: Doc, answer: str) -> float:
        """The share of the wanted strings that are in the answer."""
        from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

        found: float = string_match_all(postprocess_pred([answer]), [doc["outputs"]])
        return found


@dataclass(frozen=True)
class MadeRuler(EvalTask):
    """One of RULER's tasks. The prompt goes into the chat template, and the answer's first words follow it.

    Parameters
    ----------
    model: whose tokenizer measures lengths; length: tokens of a prompt and its answer.
    partial: whether one of the right answers is enough (questions on documents), else the share of all that were given.
    """

    model: str = EMBEDDED
    length: int = DEFAULT_LENGTH
    partial: bool = False
    fields: ClassVar = {"input": "a text that is not empty", "outputs": "a list of texts", "gen_prefix": "a text"}
    sized: ClassVar = True

    @classmethod
    def make(cls, stem: str) -> MadeRuler:
        """The task of one of lm-eval's files, such as ``niah_single_1``; its rows need more packages than it does."""
        # A file leaves out what is as in the first one.
        config = {name: value for file in ("niah_single_1", stem) for name, value in
                  definition(f"ruler/{file}.yaml", functions=False).items()}  # fmt: skip
        return cls(
            name=f"ruler_{stem}",
            file="",
            kind="aggregation" if stem in ("cwe", "fwe") else "localization",
            metric="string_match_part" if stem.startswith("qa") else "string_match_all",
            max_new_tokens=config["generation_kwargs"]["max_gen_toks"],
            partial=stem.startswith("qa"),
        )

    @property
    def stem(self) -> str:
        """The name of lm-eval's file."""
        return self.name.removeprefix("ruler_")

    def for_model(self, model: str, max_context: int | None) -> MadeRuler:
        """The task with rows for that model's tokenizer, as long as prompts may be."""
        return replace(self, model=model, length=max_context or DEFAULT_LENGTH)

    def docs(self, data: Any) -> Iterator[tuple[str, Doc]]:
        """Rows from lm-eval's generator; a data folder holds none of them.

        Raises InputError, with the way out, if a package, a download or room for a row is missing.
        """
        if self.length < LEAST_LENGTH:
            raise InputError(
                f"{self.name}: rows of {self.length} tokens are too short: give --max-context at least {LEAST_LENGTH}"
            )
        with redirect_stdout(sys.stderr):  # lm-eval prints while it is imported and while it makes rows
            made = definition(f"ruler/{self.stem}.yaml")["custom_dataset"]
            tokenizer = tokenizer_of(self.model)
            try:
                # lm-eval loads the tokenizer by name, and would run code of its repository: it gets ours, in a folder.
                with tempfile.TemporaryDirectory() as folder, seeded(made):
                    tokenizer.save_pretrained(folder)
                    rows = made(tokenizer=folder, max_seq_lengths=[self.length])["test"]
            except Exception as error:  # no network, no nltk data, a length with room for nothing: anything is raised
                raise InputError(
                    f"{self.name}: lm-eval cannot make rows of {self.length} tokens: {first_line(error)} (these "
                    f"need no download: {', '.join(OFFLINE)})"
                ) from None
        yield from ((f"{self.name}, row {number}", dict(doc)) for number, doc in enumerate(rows))

    def row(self, number: int, doc: Doc) -> Row:
        """Text, question, and the answer's first words. Raises InputError if lm-eval changed how a question begins."""
        text, begins = doc["input"], QUESTIONS[self.stem.partition("_")[0]]
        cut = text.rfind(begins)
        if cut <= 0:
            raise InputError(f"{self.name}: no question begins with {shown(begins)} in this lm-eval version's rows: {INSTALL}")
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]  # rows made otherwise have other names, and are not mixed
        return Row(self.name, f"{number}-{digest}", "", text[:cut], text[cut:], tuple(doc["outputs"]), doc, doc["gen_prefix"])

    def judge(self, doc: Doc, answer: str) -> float:
        """The share of the wanted strings that are in the answer, or whether one of them is, as in RULER.

        lm-eval 0.4.13 takes the share for both, so that a question with three right answers cannot score above a third.
        """
        from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

        found: list[float] = [string_match_all(postprocess_pred([answer]), [[wanted]]) for wanted in doc["outputs"]]
        return max(found) if self.partial else sum(found) / len(found)


OFFLINE = tuple(f"ruler_{stem}" for stem in RULER_TASKS if stem in (
    "niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"))  # fmt: skip


def tokenizer_of(name: str) -> Any:
    """A model's tokenizer, without its weights. ``name`` as for :func:`winnowkv.load`, which raises the same."""
    try:
        if name in PACKAGED:
            return PreTrainedTokenizerFast.from_pretrained(model_folder(name, best_dtype(best_device())))
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise cannot_load(name, error) from error


@contextmanager
def seeded(made: Any) -> Iterator[None]:
    """Seed the random numbers that a generator draws from; Python's and numpy's are put back."""
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(NUMPY_SEED)
    own = made.__globals__.get("RNG")
    if own is not None:  # a module's own generator goes on from call to call
        own.seed(WORDS_SEED)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)
