"""How a request's next token is chosen; a request's choices do not depend on the rows that decode with it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from winnowkv.errors import InputError

LOWEST_TEMPERATURE = 1e-6  # logits divided by less leave float32's range
SEED_LIMIT = 2**63


@dataclass(frozen=True)
class Sampling:
    """How a request is continued. Of the model's generation config only the end tokens are used.

    Parameters
    ----------
    max_new_tokens: most tokens to generate.
    min_new_tokens: tokens that are generated before an end token or a stop string may end the request.
    temperature: 0 takes the most likely token; above 0 tokens are drawn.
    top_p: draw from the fewest tokens that have this much probability together.
    top_k: draw from this many of the most likely tokens; 0 for all.
    seed: of the draws; None for a new one each time.
    stop: strings that end the request; they are not part of its text.
    logprobs: return log probabilities of each token and of this many of the most likely ones; None for none.
    ignore_eos: go on after end tokens.
    n: choices: continuations of a prompt that is read once. Choice ``i`` is what ``n=1`` with seed ``seed + i`` gives
        (:meth:`choice`); at temperature 0 all choices are the same.

    Raises
    ------
    InputError
        For a value outside its limits.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole("min_new_tokens", self.min_new_tokens, 0)
        check_whole("n", self.n, 1)
        check_whole("top_k", self.top_k, 0, "; 0 draws from all tokens")
        if self.logprobs is not None:
            check_whole("logprobs", self.logprobs, 0, ", or None for none")
        if self.seed is not None:
            check_whole("seed", self.seed, 0, ", or None for a new one each time")
            if self.seed + self.n > SEED_LIMIT:
                more = f", less {self.n - 1} for the seeds of n={self.n} choices" if self.n > 1 else ""
                raise InputError(f"seed={self.seed} is too large: give a number below 2**63{more}")
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}: "
                "lower the first or raise the second"
            )
        check_number("temperature", self.temperature)
        if self.temperature != 0 and self.temperature < LOWEST_TEMPERATURE:
            raise InputError(
                f"temperature={self.temperature} must be 0 (the most likely token) or at least {LOWEST_TEMPERATURE}"
            )
        check_number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} must be above 0 and at most 1; 1 draws from all tokens")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop={self.stop!r} must be strings of at least one character each: give stop=('...',)")
        object.__setattr__(self, "stop", tuple(self.stop))

    def choice(self, index: int) -> Sampling:
        """How choice ``index`` alone is continued: one choice, the seed ``index`` higher. Choices count from 0."""
        if self.n == 1:
            return self
        return replace(self, n=1, seed=None if self.seed is None else self.seed + index)


def check_whole(name: str, value: Any, least: int, hint: str = "") -> None:
    """Raise InputError for a value that is not a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}={value!r} must be a whole number of at least {least}{hint}")


def check_number(name: str, value: Any) -> None:
    """Raise InputError for a value that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name}={value!r} must be a finite number")


@dataclass(frozen=True)
class Logprob:
    """Natural log probability of a token in the model's own distribution, before temperature, ``top_k`` and ``top_p``.

    ``top``: the most likely tokens and their log probabilities, most likely first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one request, with a random generator of its own.

    Parameters
    ----------
    sampling: how to choose. end_tokens: tokens that end the request. device: of the logits.

    Attributes
    ----------
    tokens: chosen so far.
    """

    def __init__(self, sampling: Sampling, end_tokens: Collection[int], device: torch.device) -> None:
        self.tokens: list[int] = []
        self._sampling = sampling
        self._processors = LogitsProcessorList()
        self._min_tokens = sampling.min_new_tokens if end_tokens else 0
        if self._min_tokens:
            no_end = MinNewTokensLengthLogitsProcessor(0, self._min_tokens, sorted(end_tokens), device=str(device))
            self._processors.append(no_end)
        self._generator: torch.Generator | None = None
        if sampling.temperature:
            self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self._processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._processors.append(TopPLogitsWarper(float(sampling.top_p)))
            self._generator = torch.Generator(device)
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    def take(self, logits: Tensor, likeliest: int) -> tuple[int, Logprob | None]:
        """Choose the next token from its logits ``[1, vocabulary]``; ``likeliest`` is the token with the largest logit."""
        token = likeliest
        if self._generator is not None or len(self.tokens) < self._min_tokens:
            before: Any = torch.tensor([self.tokens], dtype=torch.long, device=logits.device)
            scores: Any = logits.float()
            scores = self._processors(before, scores)
            if self._generator is None:
                token = int(scores.argmax(-1))
            else:
                token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        self.tokens.append(token)
        return token, self._logprob(logits[0], token)

    def _logprob(self, logits: Tensor, token: int) -> Logprob | None:
        count = self._sampling.logprobs
        if count is None:
            return None
        every = logits.float().log_softmax(-1)
        values, tokens = every.topk(min(count, len(every)))
        return Logprob(token, float(every[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[tuple[int, Logprob | None] | None]:
    """Each row's next token from logits ``[B, vocabulary]``; None for a row whose largest is not a finite number."""
    largest, likeliest = logits.max(-1)
    finite = largest.isfinite().tolist()
    return [
        sampler.take(logits[row : row + 1], token) if finite[row] else None
        for row, (sampler, token) in enumerate(zip(samplers, likeliest.tolist(), strict=True))
    ]
