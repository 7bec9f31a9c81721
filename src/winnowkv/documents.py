"""One text, many questions: it is read and compressed once, kept, and asked as often as one likes.

>>> doc = wk.read(model, tokenizer, text, budget=0.12)    # doctest: +SKIP
>>> print(doc.ask("Who wrote it?"))                       # doctest: +SKIP
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from winnowkv.api import read_tasks
from winnowkv.budget import DEFAULT_BUDGET, Budget
from winnowkv.cache.cache import CompactCache
from winnowkv.cache.forks import fork
from winnowkv.cache.generated import LEAST_DECODE_BUDGET, check_decode_budget
from winnowkv.cache.listening import Progress
from winnowkv.cache.reading import prefill
from winnowkv.cache.snapshot import load_document, save_cache
from winnowkv.cache.study import Level, Study, fitted, study_text, text_structure, wait_for_study
from winnowkv.engine.detokenizer import TextStream
from winnowkv.engine.request import NOT_FINITE
from winnowkv.engine.sampling import Sampler, Sampling, choose
from winnowkv.errors import BudgetError, InputError
from winnowkv.models.devices import input_device
from winnowkv.models.info import cache_argument, end_tokens, position_limit
from winnowkv.policies import Policy, Tasks, policy as make_policy
from winnowkv.prompt.chat import next_turn, open_turn, rest_of_turn, text_begin, text_ending, uses_chat
from winnowkv.prompt.structure import read_structure
from winnowkv.report import Report
from winnowkv.types import Between

BLIND_POLICY = "winnow:observe=context"  # for questions that are not known yet
STUDIED_POLICY = "winnow:observe=context:refit=true"
HINTED_POLICY = "winnow"
TURN_BUDGET = 512  # entries per layer and KV head of questions and answers
Messages = str | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What a document answered; as text, the answer.

    Attributes
    ----------
    tokens: all that were chosen, an end token included. finish_reason: ``stop`` or ``length``.
    question_tokens: how many were read for this question, the chat template's included.
    first_token_seconds, seconds: from the question to the first token, and to the last.
    report: what is held of the document, and of the tokens after it.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    question_tokens: int
    first_token_seconds: float
    seconds: float
    report: Report

    def __str__(self) -> str:
        return self.text


class Document:
    """A text in a compact cache. :func:`read` and :func:`open_document` make one.

    Parameters
    ----------
    model, tokenizer: that read it. cache: after the text was read. ids: all tokens that were.
    chat: whether they are a chat template's, and questions go into it, too.

    Attributes
    ----------
    ids: the tokens of text, questions and answers that were read into ``cache``.
    text_tokens: how many of them are the text's.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, cache: CompactCache, ids: Sequence[int], *, chat: bool) -> None:
        self.model, self.tokenizer, self.cache, self.ids, self.chat_template = model, tokenizer, cache, list(ids), chat
        self.text_tokens = cache.compact_layers[0].prompt
        self._coming: list[int] = []  # the last token of an answer, which is read with the next turn
        self._ending = text_ending(tokenizer, self.ids[: self.text_tokens], chat=chat)
        for layer in cache.compact_layers:
            layer.watched = True

    def __repr__(self) -> str:
        held = f"{self.held_entries} entries a layer in {self.held_bytes / 2**20:.1f} MiB"
        return f"Document({self.text_tokens} tokens of text, {len(self.ids) - self.text_tokens} of turns; {held})"

    @property
    def report(self) -> Report:
        """What was kept of the text, in entries, bytes and seconds."""
        return self.cache.report

    @property
    def held_bytes(self) -> int:
        """Bytes of keys and values in use; a fork counts those that it shares, too."""
        return self.cache.held_bytes

    @property
    def held_entries(self) -> int:
        """Entries of text and turns that the largest layer holds for each KV head."""
        return max(layer.length for layer in self.cache.compact_layers)

    @property
    def turn_entries(self) -> int:
        """Entries of questions and answers that every layer holds for each KV head."""
        return self.cache.compact_layers[0].generated

    def ask(self, question: str, max_new_tokens: int | None = None, *, sampling: Sampling | None = None) -> Answer:
        """Answer one question and forget it: the document stays as it is. Threads may ask at the same time.

        Without ``sampling`` the most likely token is taken, ``max_new_tokens`` (128) at most.
        Raises InputError for a question that is empty or too long for the model's positions.
        """
        return finished(self.fork()._turn(question, settings(max_new_tokens, sampling)))

    def stream(self, question: str, max_new_tokens: int | None = None, *, sampling: Sampling | None = None) -> Iterator[str]:
        """As :meth:`ask`, the answer's text piece by piece."""
        return self.fork()._turn(question, settings(max_new_tokens, sampling))

    def chat(self, messages: Messages, max_new_tokens: int | None = None, *, sampling: Sampling | None = None) -> Answer:
        """Answer and remember: the turn becomes part of this document, and later questions see it.

        ``messages``: a question, or new messages of user and assistant in turn, the last one the user's. To keep the document
        as it was read, chat with its :meth:`fork`. If this raises, the document is as it was before.
        Raises InputError as :meth:`ask`, and for other messages.
        """
        other = self.fork()
        answer = finished(other._turn(messages, settings(max_new_tokens, sampling)))
        self.cache, self.ids, self._coming = other.cache, other.ids, other._coming
        return answer

    def fork(self) -> Document:
        """A document that goes on by itself. It shares this one's storage until it reads its first token."""
        other = object.__new__(Document)
        vars(other).update(vars(self), cache=fork(self.cache), ids=list(self.ids), _coming=list(self._coming))
        return other

    def compact(self, budget: Budget | int | float | str = DEFAULT_BUDGET) -> None:
        """Evict entries of the turns after the text, all together, down to ``budget``; the text's entries are not touched.

        The newest 32 stay and, per KV head, those of the older ones that the newest 32 queries attended to most, as under a
        decode budget. ``budget``: entries (int), or a fraction of the turns' tokens, which is raised to 64 entries.
        Raises BudgetError for an int below 64 and for auto, CacheError for a document just opened, before its next turn.
        """
        asked = Budget.of(budget)
        entries = asked.entries(max(len(self.ids) - self.text_tokens, LEAST_DECODE_BUDGET))
        if isinstance(asked.asked, int):
            check_decode_budget(asked.asked)
        if asked.target is not None:
            raise BudgetError(
                f"budget {asked.asked!r} is for a text, turns have no curve: give entries (128) or a fraction (0.12)"
            )
        for layer in self.cache.compact_layers:
            layer.compact(max(entries, LEAST_DECODE_BUDGET))

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the cache and the ids of its tokens to one file, for :func:`open_document`.

        Raises CacheError as :func:`winnowkv.save_cache`.
        """
        self.finish_answer()
        save_cache(self.cache, self.model, path, tokens=self.ids, overwrite=overwrite)

    def finish_answer(self) -> None:
        """Read the last token of the last answer, which else waits for the next turn."""
        if self._coming:
            self._read([])

    @torch.no_grad()
    def _read(self, ids: Sequence[int]) -> Tensor:
        """Read what is still to come of the last answer, then ``ids``; the logits after it, ``[1, vocabulary]``."""
        ids = [*self._coming, *ids]
        inputs = torch.tensor([ids], device=input_device(self.model))
        read = self.model(input_ids=inputs, **cache_argument(self.model, self.cache), use_cache=True, logits_to_keep=1)
        logits: Tensor = read.logits
        self.ids += ids
        self._coming = []
        return logits[:, -1]

    def _turn(self, messages: Messages, sampling: Sampling) -> Generator[str, None, Answer]:
        """Read new messages into this document and answer, piece by piece."""
        started, question = time.perf_counter(), self._message_ids(messages)
        self._check_length(len(question) + sampling.max_new_tokens)
        logits = self._read(question)
        ends = frozenset[int]() if sampling.ignore_eos else end_tokens(self.model, self.tokenizer)
        sampler = Sampler(sampling, ends, logits.device)
        text, reason, first = TextStream(self.tokenizer, sampling.stop, sampling.min_new_tokens), "length", 0.0
        while True:
            (chosen,) = choose(logits, [sampler])
            if chosen is None:
                raise InputError(NOT_FINITE)
            token, first = chosen[0], first or time.perf_counter()
            if token in ends:
                reason = "stop"
                break
            self._coming = [token]
            if piece := text.push(token):
                yield piece
            if text.stopped:
                reason = "stop"
                break
            if len(sampler.tokens) == sampling.max_new_tokens:
                break
            logits = self._read([])
        if piece := text.flush():
            yield piece
        seconds = time.perf_counter() - started
        report = replace(self.cache.report)
        return Answer(text.text, sampler.tokens, reason, len(question), first - started, seconds, report)

    def _message_ids(self, messages: Messages) -> list[int]:
        """Token ids of new messages, from where the document stands to where the answer begins."""
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns]
        if roles != [("user", "assistant")[at % 2] for at in range(len(turns))] or len(turns) % 2 == 0:
            raise InputError(
                f"messages of {roles} cannot follow: give user and assistant in turn, a user's first and last (instructions "
                "that come before the text go into read(system=...))"
            )
        if not all(isinstance(turn.get("content"), str) for turn in turns):
            raise InputError("a message's content must be text")
        ids: list[int] = []
        for turn in turns:
            if turn["role"] == "assistant":
                ids += self.tokenizer(turn["content"], add_special_tokens=False).input_ids
            elif ids or self._coming or len(self.ids) > self.text_tokens:
                ids += next_turn(self.tokenizer, turn["content"], chat=self.chat_template)
            else:
                ids += rest_of_turn(self.tokenizer, self._ending, turn["content"], chat=self.chat_template)
        return ids

    def _check_length(self, more: int) -> None:
        limit, tokens = position_limit(self.model), len(self.ids) + len(self._coming)
        if limit is not None and tokens + more > limit:
            raise InputError(
                f"{tokens} tokens of document and turns and {more} more pass the model's {limit} positions: ask for fewer "
                "(max_new_tokens=), or go on from a fork without these turns"
            )


def settings(max_new_tokens: int | None, sampling: Sampling | None) -> Sampling:
    """How to answer. Raises InputError for a value outside its limits."""
    sampling = sampling or Sampling()
    return sampling if max_new_tokens is None else replace(sampling, max_new_tokens=max_new_tokens)


def finished(turn: Generator[str, None, Answer]) -> Answer:
    """The answer of a turn, once it is whole."""
    while True:
        try:
            next(turn)
        except StopIteration as end:
            answer: Answer = end.value
            return answer


def read(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    policy: str | Policy | None = None,
    budget: Budget | int | float | str = DEFAULT_BUDGET,
    *,
    hint: str | None = None,
    keep: Sequence[tuple[int, int]] = (),
    task: Tasks = None,
    system: str | None = None,
    chat: bool | None = None,
    decode_budget: int | None = TURN_BUDGET,
    chunk: int | None = None,
    ceiling: int | float | None = None,
    study: Level | Study | None = None,
    progress: Progress | None = None,
    between: Between | None = None,
) -> Document:
    """Read a text once, keep ``budget`` of its cache, and ask it many questions.

    If the tokenizer has a chat template, the text begins a user's turn and each question ends it: the token ids are those
    that the template gives for text and question together.

    Parameters
    ----------
    policy: what stays; without one ``winnow:observe=context``, which needs no question (with a ``study`` values are refitted,
        too, ``:refit=true``), or with a ``hint`` ``winnow``.
    budget: as for :class:`CompactCache`, of the text's tokens, the template's before it included.
    hint: what the questions will be about, as a question. The policy chooses as if it were asked; it is not kept.
    keep: spans of token positions that stay whatever they score; they count in the budget.
    task: for policies that score by task, if it is not to be told from the hint.
    system: a system message before the text.
    chat: whether to use the chat template; None uses it if there is one.
    decode_budget: most entries per layer and KV head to hold of questions and answers, as for :class:`CompactCache`: however
        many turns there are, no layer holds more than what it kept of the text and ``decode_budget + 63`` entries.
    chunk, ceiling: as for :func:`winnowkv.prefill`.
    study: find out what of the text matters before anything is evicted: ``lean`` reads it again, ``full`` also lets the model
        write a summary, facts and questions (:class:`Study`). The whole cache is held meanwhile; ``report.study_seconds`` says
        what it took. Without it nothing is studied, but for the policy ``kvzip``, which reads the text again.
    progress: called while a text is studied, with the tokens done and those in all.
    between: called between the layers while the text is read and studied, as for :class:`CompactCache`.

    Raises
    ------
    InputError, PolicyError, BudgetError, ProfileError, UnsupportedModelError
        Before anything is read.
    """
    templated = uses_chat(chat, tokenizer)
    ids = open_turn(tokenizer, text, chat=templated, system=system)
    blind = BLIND_POLICY if study is None else STUDIED_POLICY
    made = make_policy(policy or (blind if hint is None else HINTED_POLICY))
    asked_study = studied(model, made, budget, study, tokens=len(ids), hint=hint, ceiling=ceiling)
    asked: list[int] = []
    tasks = task
    if hint is not None:
        asked = rest_of_turn(tokenizer, text_ending(tokenizer, ids, chat=templated), hint, chat=templated)
        tasks = hinted_tasks(tokenizer, [*ids, *asked], len(asked), task, made)
    cache = CompactCache(model, made, budget, task=tasks, decode_budget=decode_budget, keep=keep, between=between)
    inputs = torch.tensor([[*ids, *asked]], device=input_device(model))
    if asked_study is not None:
        wait_for_study(cache, asked_study, text_structure(tokenizer, ids))
    prefill(model, inputs, cache, chunk=chunk, ceiling=ceiling, hint=len(asked))
    if asked_study is not None:
        begin = text_begin(tokenizer, ids, chat=templated, system=system)
        study_text(cache, tokenizer, ids, begin, asked_study, chat=templated, progress=progress)
    cache.between = None
    return Document(model, tokenizer, cache, ids, chat=templated)


def studied(
    model: PreTrainedModel, policy: Policy, budget: Any, study: Level | Study | None, *, tokens: int, hint: Any, ceiling: Any
) -> Study | None:
    """How a text of so many tokens is to be studied, None if it is not. Raises InputError for what cannot go with a study."""
    if study is None and not policy.needs_study:
        if policy.evicts and (policy.lookahead or policy.draft):
            raise InputError(
                f"{policy.spec}: a text is asked many things, and lookahead and draft choose by one answer: leave both out"
            )
        return None
    asked = Study.of("lean" if study is None else study)
    if not policy.evicts:
        raise InputError(f"{policy.name} keeps everything, so there is nothing to study: leave study= out")
    if policy.needs_study and len(asked.sources) > 1:
        raise InputError(f"{policy.name} scores by the text read again, nothing else: give study='lean', or leave it out")
    for what, why in (
        (hint is not None, "a hint tells what will be asked, a study is for when that is not known: give one of the two"),
        (ceiling is not None, "a study needs the whole text, and a ceiling evicts before it: leave ceiling= out"),
        (
            Budget.of(budget).target is not None,
            "no curve tells what a study gives, so there is no budget 'auto': give a number",
        ),
        (policy.lookahead or policy.draft, f"{policy.spec}: nothing is answered while a text is studied: leave both out"),
    ):
        if what:
            raise InputError(f"study: {why}")
    return fitted(asked, model, tokens)


def hinted_tasks(tokenizer: Any, ids: Sequence[int], question: int, task: Tasks, policy: Policy) -> Tasks:
    """Task and structure of a text and a hint, as far as the policy uses them; the question is the hint's tokens."""
    if not policy.uses_task and not policy.uses_structure:
        return task
    (found,) = read_tasks(tokenizer, torch.tensor([list(ids)]), None, task, policy)
    if policy.uses_structure:
        found = replace(found, structure=replace(read_structure(tokenizer, ids), question=question))
    return found


def open_document(path: str | Path, model: PreTrainedModel, tokenizer: Any, *, chat: bool | None = None) -> Document:
    """A document that :meth:`Document.save` wrote, with the turns that it had. ``chat`` as for :func:`read`.

    Raises CacheError for a file that is none, or of another model, InputError for another tokenizer.
    """
    cache, ids = load_document(path, model)
    return Document(model, tokenizer, cache, ids, chat=uses_chat(chat, tokenizer))
