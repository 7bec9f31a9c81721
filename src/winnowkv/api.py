"""The ``compress`` block: every prompt that a model reads inside it gets a compact cache."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from winnowkv.attention.generate import given_cache, named_inputs
from winnowkv.attention.routing import Routing, acquire, check_model, generate_call, release
from winnowkv.budget import DEFAULT_BUDGET, Budget
from winnowkv.cache.cache import CompactCache
from winnowkv.cache.compression import Compression
from winnowkv.cache.explain import Explanation
from winnowkv.cache.generated import check_decode_budget
from winnowkv.cache.kept import KeptTokens, NotedPrompt, note_kept
from winnowkv.errors import CacheError, InputError
from winnowkv.policies import Policy, Tasks
from winnowkv.policies.protected import read_spans
from winnowkv.policies.quality import with_quality
from winnowkv.prompt.classifier import task_profile
from winnowkv.prompt.structure import read_structure
from winnowkv.prompt.task import TaskProfile
from winnowkv.report import Report

CLASSIFIED_TOKENS = 1024  # tokens of a prompt's end that surely hold the 256 words that the classifier reads there


class Run:
    """One ``compress`` block: its settings and the reports of the prompts that went through it."""

    def __init__(
        self, model: PreTrainedModel, policy: Policy, settings: dict[str, Any], task: Tasks, tokenizer: Any, keep_scores: bool
    ) -> None:
        self.model, self.policy, self.task, self.tokenizer = model, policy, task, tokenizer
        self.keep_scores = keep_scores
        self.reports: list[Report] = []
        self._settings = settings
        self._cache: CompactCache | None = None
        self._noted: NotedPrompt | None = None  # of the latest prompt, once what it kept is decided
        self._undecided: tuple[weakref.ref[CompactCache], Tensor | None] | None = None  # until then
        self._caches: list[weakref.ref[CompactCache]] = []  # a list, because helper threads add to it while the owner leaves
        self._warned: set[str] = set()
        self._open = True

    @property
    def report(self) -> Report:
        """The report of the latest prompt. Raises CacheError before the first."""
        if not self.reports:
            raise CacheError("nothing was generated in this compress block yet, so there is no report")
        return self.reports[-1]

    def explain(self, layer: int, token: int, row: int = 0) -> list[Explanation]:
        """:meth:`CompactCache.explain` of the latest prompt. Raises CacheError without ``keep_scores=True``."""
        if not self.keep_scores:
            raise CacheError("explain() needs the importance scores: open the block with keep_scores=True and read a prompt")
        if self._cache is None:
            raise CacheError("explain() needs a prompt, and none was read in this compress block yet: read one first")
        return self._cache.explain(layer, token, row)

    @property
    def selection(self) -> KeptTokens:
        """What was kept of the latest prompt, also once its cache is gone: ``run.selection.save("kept.json")``.

        Positions only; scores and what decided come with ``keep_scores=True``. Raises CacheError before the first prompt and
        while what stays is not decided (lookahead), InputError for a batch of several prompts, which ``selections`` are of.
        """
        found = self._found_note()
        if found.rows > 1:
            raise InputError(f"the latest prompt was a batch of {found.rows} rows: take one of run.selections")
        return found.kept(0)

    @property
    def selections(self) -> list[KeptTokens]:
        """:attr:`selection` of every row of the latest batch, as it was read. Raises CacheError as that does."""
        found = self._found_note()
        return [found.kept(row) for row in range(found.rows)]

    def _found_note(self) -> NotedPrompt:
        if self._noted is not None:
            return self._noted
        if self._undecided is None:
            raise CacheError("selection needs a prompt, and none was read in this compress block yet: read one first")
        spec, needed = self.policy.spec, self.policy.lookahead + 1
        raise CacheError(
            f"what stays of the latest prompt is not decided: {spec} chooses once {needed} tokens of its answer are there; "
            "generate more, or leave lookahead and draft out of the policy"
        )

    @contextmanager
    def in_thread(self) -> Iterator[Run]:
        """Serve the thread that enters this, too, until it leaves again.

        A block serves the thread that opened it. A helper thread, such as one that generates while another prints a stream,
        enters this. Raises CacheError once the block has ended.

        Examples
        --------
        >>> def work():                                              # doctest: +SKIP
        ...     with run.in_thread():
        ...         model.generate(**inputs, streamer=streamer)
        """
        if not self._open:
            raise CacheError("this compress block has ended: open one in this thread")
        with _serving(self):
            yield self

    def new_cache(self, ids: Tensor | None, mask: Tensor | None) -> CompactCache:
        """The cache of a prompt. Raises InputError if it has to be read back and is not given as ids."""
        tasks, policy = self.task, self.policy
        if self.tokenizer is not None and (policy.uses_structure or (self.task is None and policy.uses_task)):
            tasks = read_tasks(self.tokenizer, ids, mask, self.task, policy)
        cache = CompactCache(self.model, task=tasks, keep_scores=self.keep_scores, hold=False, **self._settings)
        self.reports.append(cache.report)
        self._caches.append(weakref.ref(cache))
        self._cache = cache if self.keep_scores else None  # held only so that scores can be asked for
        self._noted, self._undecided = None, (weakref.ref(cache), ids)
        return cache

    def note(self, cache: CompactCache) -> None:
        """After a forward pass: what a prompt kept is noted as soon as it is decided, since its cache may be gone later."""
        if self._undecided is None or self._undecided[0]() is not cache:
            return
        if cache.session is None and cache.looking is None:
            self._noted, self._undecided = note_kept(cache, self._undecided[1]), None

    def end(self) -> None:
        """The block has ended: nothing of this thread holds the model, passes that failed in the middle neither."""
        self._open = False
        for made in self._caches:
            if (cache := made()) is not None:
                cache.let_go()

    def warn(self, message: str) -> None:
        """Warn of something once."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


@contextmanager
def compress(
    model: PreTrainedModel,
    policy: str | Policy = "winnow",
    budget: Budget | int | float | str = DEFAULT_BUDGET,
    *,
    task: Tasks = None,
    decode_budget: int | None = None,
    keep_scores: bool = False,
    keep: Sequence[tuple[int, int]] = (),
    quality: str | None = None,
    tokenizer: Any = None,
) -> Iterator[Run]:
    """Compress the KV cache of everything that this thread lets the model read inside the block.

    Each prompt gets a :class:`CompactCache` of its own in place of the model's default cache; a cache that the caller passes
    is left alone. On leaving, also by an exception, the model is as it was. Blocks nest (the innermost counts). A block serves
    the thread that opened it: other threads may open their own on the same model or enter :meth:`Run.in_thread`, and what they
    read without is computed as ever, with a warning that it is not compressed.

    ``generate(num_return_sequences=n)`` and beam search read each prompt once.

    Parameters
    ----------
    model, policy, budget, task, decode_budget, keep_scores, keep: as for :class:`CompactCache`.
    quality: how much memory and time at an answer's start is spent on choosing what stays. ``lean``: none, the prompt alone
        decides. ``balanced``: the whole prompt is held until the answer's first tokens are out, which are the full cache's, and
        they decide. ``best``: a draft is generated from what would stay, thrown away and heard, too, which is a pause in the
        answer, and values are refitted. None: as the policy's own options say.
    tokenizer: if the policy scores by task and ``task`` is None, each prompt is read back with it and
        classified (:func:`winnowkv.task_profile`), every row of a batch by itself; if the policy uses the prompt's
        structure, that is read with it, too.

    Yields
    ------
    Run
        Its ``report`` says what the latest prompt kept, in entries, bytes and seconds; its ``explain`` why a token stayed.

    Raises
    ------
    PolicyError, BudgetError, UnsupportedModelError
        Before anything is touched, or when a prompt's length shows that the budget is too small.
    InputError
        For a ``generate`` that could not be compressed: with ``use_cache=False``, another ``cache_implementation``, or
        ``prefill_chunk_size``.

    Examples
    --------
    >>> with compress(model, budget=0.12, tokenizer=tokenizer) as run:   # doctest: +SKIP
    ...     out = model.generate(**inputs, max_new_tokens=64)
    >>> print(run.report)                                            # doctest: +SKIP
    """
    check_model(model)
    check_decode_budget(decode_budget)
    read = Budget.of(budget)
    classified = tokenizer is not None and task is None
    # Complain now, not in the middle of a forward pass.
    policy = with_quality(policy, quality)
    made = Compression.of(model, policy, read, task, task_is_known=not classified).policy
    settings: dict[str, Any] = {"policy": policy, "budget": read, "decode_budget": decode_budget, "keep": read_spans(keep)}
    run = Run(model, made, settings, task, tokenizer, keep_scores)
    try:
        with _serving(run):
            yield run
    finally:
        run.end()


class _Block:
    """A compress block as one thread has it open."""

    def __init__(self, run: Run, routing: Routing) -> None:
        self.run, self.routing, self.thread = run, routing, threading.get_ident()
        self._repeats = 1  # of each row of the prompt that is read now

    def __deepcopy__(self, memo: dict[int, Any]) -> _Block:
        """This block: a copied model has its hooks, which do nothing there."""
        return self

    def give_cache(self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Before a forward pass: a prompt gets its cache."""
        if kwargs is None:  # torch's way to call a hook that another thread has just removed
            return None
        if module is not self.run.model:
            return None
        if not _starts_prompt(args, kwargs):
            given = given_cache(kwargs)[1]
            if isinstance(given, CompactCache):
                given.before_pass(named_inputs(args, kwargs))
            return None
        mine = [block for block in self.routing.blocks if block.thread == threading.get_ident()]
        if not mine:
            self.run.warn(
                "a prompt is read without compression: the compress block on this model was opened by another thread; open one "
                "in this thread, too, or enter run.in_thread()"
            )
        if not mine or mine[-1] is not self or not _can_compress(self.run, kwargs):
            return None
        args, kwargs, repeats = each_once(module, args, kwargs)
        cache = self.run.new_cache(_ids(args, kwargs), kwargs.get("attention_mask"))
        name, given = given_cache(kwargs)
        if given is not None and any(getattr(layer, "record_past", False) for layer in given.layers):
            cache.activate_past_recording()  # assisted decoding will take tokens back
        self._repeats = repeats
        return args, {**kwargs, name: cache}

    def check(self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
        """After a forward pass: the model must have used the cache; rows that were read once are put side by side."""
        if output is None:  # removed by another thread, as above
            return None
        cache = given_cache(kwargs)[1]
        if not isinstance(cache, CompactCache):
            return None
        cache.check_used()
        self.run.note(cache)
        mine = self.thread == threading.get_ident() and module is self.run.model
        repeats, self._repeats = (self._repeats, 1) if mine else (1, self._repeats)
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
            output.logits = output.logits.repeat_interleave(repeats, 0)
        return None


@contextmanager
def _serving(run: Run) -> Iterator[None]:
    """Let a run serve this thread."""
    model, routing = run.model, acquire(run.model)
    block = _Block(run, routing)
    hooks = [
        model.register_forward_pre_hook(block.give_cache, with_kwargs=True, prepend=True),
        model.register_forward_hook(block.check, with_kwargs=True),
    ]
    routing.blocks.append(block)
    try:
        yield
    finally:
        routing.blocks.remove(block)
        for hook in hooks:
            hook.remove()
        release(routing)


def read_tasks(tokenizer: Any, ids: Tensor | None, mask: Tensor | None, given: Tasks, policy: Policy) -> list[TaskProfile]:
    """What the policy uses of each row of a prompt: its task, classified if none is given, and its structure."""
    if ids is None:
        raise InputError(
            "a prompt given as embeddings cannot be read back: leave compress() the tokenizer= out, give it the task="
        )
    rows = [row if mask is None else row[mask[i, -row.shape[0] :].bool()] for i, row in enumerate(ids)]
    if given is None and policy.uses_task:
        tasks = [_classify(tokenizer, row) for row in rows]
    else:
        each = [given] if given is None or isinstance(given, TaskProfile | str) else list(given)
        tasks = [TaskProfile.of(task) for task in (each * len(rows) if len(each) == 1 else each)]
    if not policy.uses_structure or len(tasks) != len(rows):  # the cache says what is wrong with their number
        return tasks
    return [replace(task, structure=read_structure(tokenizer, row.tolist())) for task, row in zip(tasks, rows, strict=True)]


def _classify(tokenizer: Any, row: Tensor) -> TaskProfile:
    """The task of one prompt; both ends are all that the classifier reads."""
    ends = row if len(row) <= 2 * CLASSIFIED_TOKENS else torch.cat([row[:CLASSIFIED_TOKENS], row[-CLASSIFIED_TOKENS:]])
    return task_profile(tokenizer.decode(ends, skip_special_tokens=True))


def _ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return kwargs.get("input_ids", args[0] if args else None)


def _starts_prompt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this forward pass reads a prompt into a cache that is not ours: the default one, none, or another kind."""
    given = given_cache(kwargs)[1]
    if given is None or hasattr(given, "valid_entries"):  # compact caches and slots
        return given is None
    try:
        return bool(given.get_seq_length() == 0)
    except ValueError:  # newer releases: a cache of states alone has no length; the model is refused when it gets ours
        return True


def _can_compress(run: Run, kwargs: dict[str, Any]) -> bool:
    """Whether a prompt can be given a cache of ours. If not, it is refused if ``generate`` was asked for it, else warned of."""
    call, given = generate_call(run.model), given_cache(kwargs)[1]
    config: Any = run.model.config
    if kwargs.get("use_cache", getattr(config, "use_cache", True)) is False:
        if call is not None:
            raise InputError("use_cache=False: without a cache nothing can be compressed; leave it out, or leave the block")
        run.warn("a prompt is read without compression: use_cache is False; leave it out to compress")
        return False
    named = None if call is None else call.options("cache_implementation")
    if named not in (None, "dynamic", "dynamic_full"):
        raise InputError(
            f"cache_implementation={named!r} makes a cache that nothing compresses: leave it out, or leave the block"
        )
    if given is not None and type(given) is not DynamicCache:
        run.warn(f"a prompt is read without compression: a {type(given).__name__} was passed for it; leave past_key_values out")
        return False
    return True


def each_once(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """The inputs of a forward pass in which ``generate`` repeats every row, each row once, and how often it is repeated."""
    call, ids = generate_call(model), kwargs.get("input_ids")
    if call is None or ids is None or args or kwargs.get("output_hidden_states"):
        return args, kwargs, 1
    repeats = max(call.options("num_return_sequences") or 1, call.options("num_beams") or 1)
    rows = {
        name: value for name, value in kwargs.items() if isinstance(value, Tensor) and value.ndim and len(value) == len(ids)
    }
    known = set(rows) <= {"input_ids", "attention_mask", "position_ids", "token_type_ids"}
    if repeats == 1 or len(ids) % repeats or not known or ids.shape[1] == len(ids):  # cache_position may have as many numbers
        return args, kwargs, 1
    once = {name: value[::repeats] for name, value in rows.items()}
    if any(not torch.equal(value.repeat_interleave(repeats, 0), rows[name]) for name, value in once.items()):
        return args, kwargs, 1
    return args, {**kwargs, **once}, repeats
