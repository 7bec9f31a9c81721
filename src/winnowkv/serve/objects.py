"""OpenAI's answers, for the OpenAPI page and the tests; answers.py writes them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Answered(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(extra="forbid")


class TopLogprob(Answered):
    """A likely token; ``bytes`` is null for one that is no whole character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer, with the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answered):
    """Log probabilities in the model's own distribution, before temperature, ``top_k`` and ``top_p``."""

    content: list[TokenLogprob]
    refusal: None = None


class AnsweredMessage(Answered):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


FinishReason = Literal["stop", "length"]


class ChatChoice(Answered):
    """One answer."""

    index: int
    message: AnsweredMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class KeptEntries(Answered):
    """Entries kept of the prompt, by layer: per KV head, mean over heads."""

    min: float
    mean: float
    max: float


class WinnowSeconds(Answered):
    """From arrival until the prompt was begun, until the first token, and until the end; null for what did not happen."""

    queue: float | None
    first_token: float | None
    total: float


class WinnowUsage(Answered):
    """What was kept; of several prompts the sums, and entries over all of them.

    ``kept_bytes``, ``full_bytes``: keys and values of the prompt after eviction and without any. ``notes``: what the user
    should know. ``context``: id of the stored context that was asked; ``context_tokens``: of its text, not read again.
    """

    policy: str
    budget: int | float | str
    prompt_tokens: int
    kept_entries: KeptEntries | None
    kept_bytes: int
    full_bytes: int
    seconds: WinnowSeconds
    notes: list[str]
    context: str | None
    context_tokens: int


class PromptDetails(Answered):
    """``cached_tokens``: of a stored context, which were not read again."""

    cached_tokens: int


class Usage(Answered):
    """Tokens, with what was kept of the prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    winnow: WinnowUsage


class KeptPrompt(Answered):
    """With ``winnow.explain``: which tokens of the prompt were kept, as :meth:`winnowkv.cache.kept.KeptTokens.to_dict` says it.

    ``texts``: of each token. In ``winnow_kept`` of the answer, or of a stream's last chunk; null there if the answer ended
    before the policy chose.
    """

    format: int
    policy: str
    budget: int | float | str
    tokens: int
    layers: int
    heads: int
    kept_fraction: float
    letters: dict[str, str]
    ids: list[int] | None
    entries: list[list[int]]
    positions: list[list[list[int]] | None]
    reasons: list[list[str]] | None
    thresholds: list[list[float | None]] | None
    scores: list[list[list[float | None]]] | None
    texts: list[str]


class ChatCompletion(Answered):
    """The answer to a chat request."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    winnow_kept: KeptPrompt | None = None


class ChatDelta(Answered):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Answered):
    """What a chunk adds to one choice; ``finish_reason`` in its last one."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Answered):
    """One server-sent event of a streamed chat answer; with ``include_usage`` the last has no choices and the usage."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    winnow_kept: KeptPrompt | None = None


class TextLogprobs(Answered):
    """Log probabilities of a completion's tokens, and where each begins in the text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Answered):
    """One completion, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletion(Answered):
    """The answer to a completions request, and one event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | None = None
    winnow_kept: KeptPrompt | None = None


class ModelCard(Answered):
    """A served model. ``max_model_len``: tokens of prompt and answer, null if the model does not say."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(Answered):
    """All served models."""

    object: Literal["list"]
    data: list[ModelCard]


class ErrorDetail(Answered):
    """An error in OpenAI's form; ``param`` names the field of the body, ``request_id`` finds it in the server's log."""

    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str


class ErrorAnswer(Answered):
    """The answer to a request that is not served."""

    error: ErrorDetail


class Health(Answered):
    """Of the process."""

    status: Literal["ok", "ready", "loading", "draining", "failed"]
