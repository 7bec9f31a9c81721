"""Handoff of a long prompt that is asked once: vLLM reads it, it is compressed in vLLM's worker, a second request goes on.

Request A is the prompt with ``max_tokens=1`` and ``{"winnow_compress": {"policy": "snapkv", "budget": 0.12}}`` in its
``kv_transfer_params``. While vLLM computes it a worker hears its queries, keys and values (recording.py), keeps what the policy
chooses and writes that as a context into the store. A's answer names the context in its ``kv_transfer_params``; A's blocks are
free by then. Request B (:func:`go_on`) is the context's placeholders and the tokens that A generated.

Here is what the two sides of the connector and its clients say to each other; nothing here imports vLLM.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from winnowkv.budget import DEFAULT_BUDGET, Budget
from winnowkv.contexts.context import CONTEXT_PARAM, ContextPrompt, EnginePrompt, check_id
from winnowkv.contexts.folder import write_whole
from winnowkv.contexts.store import ContextStore
from winnowkv.errors import CacheError, InputError, PolicyError, WinnowError
from winnowkv.files import first_fault
from winnowkv.integrations.vllm.listening import WORKER_EXTENSION
from winnowkv.policies import Policy, policy as make_policy
from winnowkv.prompt.structure import Structure, read_structure
from winnowkv.prompt.task import TaskProfile

HANDOFF_PARAM = "winnow_compress"  # in the kv_transfer_params of request A
ERROR_PARAM = "winnow_error"  # in those of its answer, if there is no context
TICKETS = "handoff"  # the folder of a store in which a worker leaves what it has to answer
SALT_BYTES = 16
EQUAL = "snapkv, winnow:equal=true, expected:equal=true or keydiff"
UNEQUAL = f"a context has the same number of entries in every layer and head: use {EQUAL}"
NO_HANDOFF = (
    'vLLM was started without handoff: give "handoff_gib" in kv_connector_extra_config, and --worker-extension-cls '
    f"{WORKER_EXTENSION}"
)


class Asked(BaseModel):
    """What request A asks for.

    Attributes
    ----------
    policy: a spec. budget: entries, or the fraction of the prompt that is kept.
    question: tokens from the start of the prompt's question to its end; ``tail``: how many of these belong to the chat template
        after it. 0 if it is not known, and the policy's own number of last tokens looks.
    ends: of sentences and lines, for policies that keep them whole.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    policy: str = "snapkv"
    budget: int | float = DEFAULT_BUDGET
    question: int = Field(default=0, ge=0)
    tail: int = Field(default=0, ge=0)
    ends: list[int] = []

    @classmethod
    def read(cls, given: Any) -> Asked:
        """Read it from a request. Raises InputError for what it cannot be, PolicyError and BudgetError as :meth:`made`."""
        try:
            asked = cls.model_validate(given)
        except ValidationError as error:
            raise InputError(f"{HANDOFF_PARAM}: {first_fault(error)}: give policy and budget") from None
        asked.made()
        return asked

    def made(self) -> tuple[Policy, Budget]:
        """Policy and budget.

        Raises PolicyError for a policy that does not exist or cannot be served by hearing a prompt once, BudgetError for a
        budget that is none.
        """
        made, budget = make_policy(self.policy), Budget(self.budget)
        check_policy(made)
        return made, budget

    def task(self, tokens: int) -> TaskProfile:
        """Where the question stands in a prompt of so many tokens, if that was said."""
        if not 0 < self.question <= tokens or self.tail >= self.question:
            return TaskProfile()
        ends = tuple(sorted({end for end in self.ends if 0 < end < tokens}))
        return TaskProfile(structure=Structure(tokens, self.question, self.tail, ends))


def check_policy(policy: Policy) -> None:
    """Raise PolicyError for a policy that needs more than each layer's queries, keys and values, once."""
    needs = {
        "stores entries quantized (quantize=)": policy.quantize is not None,
        "waits for tokens of the answer (lookahead=, draft=, refit=)": policy.looks,
        "studies the text": policy.needs_study,
        "reads output projections": policy.needs_projection,
        "reads a calibration profile": policy.needs_profile or getattr(policy, "profile", None) is not None,
    }
    found = [what for what, true in needs.items() if true]
    if found:
        raise PolicyError(f"{policy.name} {found[0]}, and in a handoff each layer is heard once: use {EQUAL}")
    if not policy.keeps_equal:
        raise PolicyError(f"{policy.spec}: {UNEQUAL}")


@dataclass(frozen=True)
class HandoffPrompt(EnginePrompt):
    """Request A, to be sent with ``max_tokens=1``; its salt is its own."""

    asked: Asked

    @property
    def kv_transfer_params(self) -> dict[str, Any]:
        """What tells the connector to compress this prompt."""
        return {HANDOFF_PARAM: self.asked.model_dump()}

    @property
    def body(self) -> dict[str, Any]:
        """For the body of ``POST /v1/completions``."""
        return {**super().body, "max_tokens": 1, "return_token_ids": True}


@dataclass(frozen=True)
class Handoff:
    """How prompts are compressed that vLLM reads.

    Parameters
    ----------
    policy: a spec of a policy that keeps the same number in every layer and head.
    budget: entries (int) or the fraction of the prompt that is kept (float).
    tokenizer: finds the question that looks, and sentences; without it the policy's own number of last tokens looks.
    """

    policy: str = "snapkv"
    budget: int | float = DEFAULT_BUDGET
    tokenizer: Any = None

    def prompt(self, ids: Sequence[int]) -> HandoffPrompt:
        """Request A for these token ids.

        Its salt is drawn, so that vLLM computes all of it: what comes from vLLM's own prefix cache is not heard.
        Raises InputError for no ids, PolicyError and BudgetError for what cannot be handed off.
        """
        if not ids:
            raise InputError("the prompt has no tokens: there is nothing to hand off")
        asked = Asked.read({"policy": self.policy, "budget": self.budget})
        if self.tokenizer is not None and asked.made()[0].uses_structure:
            place = read_structure(self.tokenizer, ids)
            asked = asked.model_copy(update={"question": place.question, "tail": place.tail, "ends": list(place.ends)})
        return HandoffPrompt(list(ids), secrets.token_hex(SALT_BYTES), asked)


def go_on(answer: Mapping[str, Any] | None, store: ContextStore, generated: Sequence[int]) -> ContextPrompt:
    """Request B: what goes on from request A.

    ``answer``: the ``kv_transfer_params`` of A's answer; ``generated``: the token ids that A generated.
    Raises InputError if A was not compressed, with the reason that its answer gives, and what the store raises.
    """
    found = answer or {}
    if ERROR_PARAM in found:
        raise InputError(f"the prompt was not compressed: {found[ERROR_PARAM]}")
    if CONTEXT_PARAM not in found:
        raise InputError("the answer names no context: was the request sent with the parameters of Handoff.prompt?")
    return store.context(check_id(found[CONTEXT_PARAM])).prompt(generated)


class Tickets:
    """What a worker has to answer, left in the store for the scheduler, which is another process.

    vLLM hands the scheduler what workers report only after it has asked for a finished request's parameters. So a worker writes
    a small file, whose name the scheduler drew.
    """

    def __init__(self, store: ContextStore) -> None:
        self._files, root = fsspec.core.url_to_fs(store.place)
        self._folder = f"{root}/{TICKETS}"

    def put(self, ticket: str, answer: Mapping[str, Any]) -> None:
        """Leave an answer, as a whole or not at all. Raises CacheError if it cannot be written."""
        path = f"{self._folder}/{ticket}"
        write_whole(self._files, path, json.dumps(answer).encode(), lambda why: CacheError(f"{path} {why}"))

    def take(self, ticket: str) -> dict[str, Any] | None:
        """An answer that was left, and remove it; None if there is none, or if it cannot be read."""
        path = f"{self._folder}/{ticket}"
        try:
            answer: dict[str, Any] = json.loads(self._files.cat_file(path))
            self._files.rm_file(path)
        except (OSError, ValueError):
            return None
        return answer


@dataclass(frozen=True)
class HandoffPass:
    """What one forward pass computes of a request that is handed off; from the scheduler to the worker.

    Attributes
    ----------
    request: vLLM's id of it. ticket: where the answer goes.
    ids: of the whole prompt, and empty but in the pass that computes its last token. tokens: how many they are.
    start, count: the prompt tokens of this pass.
    blocks: the request's blocks; its token ``i`` is in slot ``blocks[i // block_size] * block_size + i % block_size``.
    """

    request: str
    ticket: str
    asked: Asked
    tokens: int
    start: int
    count: int
    blocks: tuple[int, ...]
    block_size: int
    ids: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Prompt tokens that are computed after this pass."""
        return self.start + self.count

    @property
    def last(self) -> bool:
        """Whether the prompt is computed then."""
        return self.end == self.tokens

    def slots(self) -> list[int]:
        """Where vLLM stores the tokens of this pass."""
        size = self.block_size
        return [self.blocks[at // size] * size + at % size for at in range(self.start, self.end)]


@dataclass
class _Request:
    """A request that asks to be handed off, as the scheduler knows it."""

    ticket: str
    ids: tuple[int, ...]
    asked: Asked | None
    error: str = ""
    computed: bool = False  # whether a pass with the prompt's last token was planned


class HandoffScheduling:
    """The scheduler's side: which requests are handed off, what each pass computes of them, and what they are answered.

    Parameters
    ----------
    tickets: of the store that the workers write to.
    block_size: tokens of a block.
    refusal: why this engine can hand off no request; None if it can.
    """

    def __init__(self, tickets: Tickets, block_size: int, refusal: str | None = None) -> None:
        self._tickets, self._block_size, self._refusal = tickets, block_size, refusal
        self._requests: dict[str, _Request] = {}

    def add(self, request: Any) -> None:
        """vLLM has a new request."""
        params = request.kv_transfer_params
        given = params.get(HANDOFF_PARAM) if isinstance(params, dict) else None  # a client may send anything
        if given is None:
            return
        ids, error, asked = tuple(request.prompt_token_ids or ()), self._refusal or "", None
        try:
            asked = Asked.read(given)
            error = error or unfit(request)
        except WinnowError as wrong:
            error = str(wrong)
        self._requests[request.request_id] = _Request(secrets.token_hex(SALT_BYTES), ids, asked, error)

    def passes(self, scheduled: Any) -> tuple[HandoffPass, ...]:
        """What the next forward pass computes of them; ``scheduled`` is vLLM's ``SchedulerOutput``."""
        if not self._requests:
            return ()
        cached = scheduled.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        found = []
        for name, start in computed.items():
            request = self._requests.get(name)
            if request is None or request.asked is None or request.error or request.computed or start >= len(request.ids):
                continue
            (blocks,) = scheduled.kv_connector_block_state.get_block_ids(name)
            count = min(scheduled.num_scheduled_tokens[name], len(request.ids) - start)
            request.computed = start + count == len(request.ids)
            found.append(
                HandoffPass(
                    name, request.ticket, request.asked, len(request.ids), start, count, tuple(blocks), self._block_size,
                    request.ids if request.computed else (),
                )
            )  # fmt: skip
        return tuple(found)

    def finished(self, request: Any) -> dict[str, Any] | None:
        """What the answer's ``kv_transfer_params`` say; None for a request that is not handed off."""
        known = self._requests.pop(request.request_id, None)
        if known is None:
            return None
        if known.error:
            return {ERROR_PARAM: known.error}
        answer = self._tickets.take(known.ticket) if known.computed else None
        return answer or {ERROR_PARAM: "the request ended before its prompt was read and compressed: send it again"}


def unfit(request: Any) -> str:
    """Why this request cannot be handed off, in a sentence; empty if it can."""
    if CONTEXT_PARAM in request.kv_transfer_params:
        return f"{HANDOFF_PARAM} and {CONTEXT_PARAM} cannot stand in one request: a prompt that begins with a context is short"
    if not request.prompt_token_ids or getattr(request, "prompt_embeds", None) is not None:
        return "a prompt that is handed off is token ids, not embeddings: they are stored with the context"
    if getattr(request, "mm_features", None):
        return "a prompt with images or sound is not handed off: its token ids do not tell what is in it"
    if getattr(request, "lora_request", None) is not None:
        return "a prompt that is read with an adapter (LoRA) is not handed off: a context does not say which"
    return ""


__all__ = [
    "HANDOFF_PARAM", "Asked", "Handoff", "HandoffPass", "HandoffPrompt", "HandoffScheduling", "Tickets", "go_on",
]  # fmt: skip
