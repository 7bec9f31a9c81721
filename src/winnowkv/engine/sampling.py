"""How a request's next token is chosen, and how its tokens become text: each by itself, whatever decodes beside it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
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

COLDEST = 1e-6  # lower temperatures take logits out of float32's range
SEEDS = 2**63
HALF = "\ufffd"  # what a tokenizer makes of bytes that are no whole character, or not yet
WINDOW = 16  # tokens that are decoded anew with each new one, about


@dataclass(frozen=True)
class Sampling:
    """How a request is continued. Nothing of a model's generation config but its end tokens counts.

    Parameters
    ----------
    max_new_tokens: most tokens to generate.
    min_new_tokens: so many come before a token or a string may end the request.
    temperature: 0 takes the most likely token, above it tokens are drawn.
    top_p: draw from the fewest tokens with that much probability. top_k: draw from so many tokens, 0 for all.
    seed: of the draws; None for another one each time.
    stop: strings that end the request; they are not part of its text.
    logprobs: log probabilities of each token and of so many of the most likely ones; None for none.
    ignore_eos: end tokens end nothing.

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

    def __post_init__(self) -> None:
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole("min_new_tokens", self.min_new_tokens, 0)
        check_whole("top_k", self.top_k, 0, "; 0 draws from all tokens")
        if self.logprobs is not None:
            check_whole("logprobs", self.logprobs, 0, ", or None for none")
        if self.seed is not None:
            check_whole("seed", self.seed, 0, ", or None for another one each time")
            if self.seed >= SEEDS:
                raise InputError(f"seed={self.seed} is too large: give a number below 2**63")
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}: "
                "lower the one or raise the other"
            )
        check_number("temperature", self.temperature)
        if self.temperature != 0 and self.temperature < COLDEST:
            raise InputError(f"temperature={self.temperature} must be 0 (the most likely token) or at least {COLDEST}")
        check_number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} must be above 0 and at most 1; 1 draws from all tokens")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop={self.stop!r} must be strings of at least one character each: give stop=('...',)")
        object.__setattr__(self, "stop", tuple(self.stop))


def check_whole(name: str, value: Any, least: int, way_out: str = "") -> None:
    """Raise InputError for what is no whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}={value!r} must be a whole number of at least {least}{way_out}")


def check_number(name: str, value: Any) -> None:
    """Raise InputError for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name}={value!r} must be a finite number")


@dataclass(frozen=True)
class Logprob:
    """Natural log probability of a token in the model's own distribution, before temperature and all else.

    ``top``: the most likely tokens with theirs, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one request, with draws of its own.

    Parameters
    ----------
    sampling: what was asked. ends: tokens that end the request. device: of the logits.

    Attributes
    ----------
    tokens: chosen so far.
    """

    def __init__(self, sampling: Sampling, ends: Collection[int], device: torch.device) -> None:
        self.tokens: list[int] = []
        self._sampling = sampling
        self._processors = LogitsProcessorList()
        self._least = sampling.min_new_tokens if ends else 0
        if self._least:
            self._processors.append(MinNewTokensLengthLogitsProcessor(0, self._least, sorted(ends), device=str(device)))
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
        """The next token from its logits ``[1, vocabulary]``, of which one is known to be the largest."""
        token = likeliest
        if self._generator is not None or len(self.tokens) < self._least:
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


class TextStream:
    """Turns one request's tokens into text, piece by piece: what was handed out never changes.

    Half a character is held back, and so is what may be the begin of a stop string.

    Parameters
    ----------
    tokenizer: decodes; special tokens have no text.
    stop: strings that end the text. least: tokens behind which they count; a string that ends before is text.

    Attributes
    ----------
    stopped: whether a stop string was met.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), least: int = 0) -> None:
        self.stopped = False
        self._tokenizer, self._stop, self._least = tokenizer, stop, least
        self._tokens: list[int] = []  # the last ones, decoded together, as a token's text may hang on those before it
        self._clean = 0  # how many of them made whole characters when last seen
        self._shown = 0  # characters of theirs that are in the text
        self._count = 0
        self._text = ""
        self._given = 0

    @property
    def text(self) -> str:
        """Everything that was handed out."""
        return self._text[: self._given]

    def push(self, token: int) -> str:
        """Take the next token and hand out what is final."""
        self._tokens.append(token)
        self._count += 1
        seen = len(self._text)
        self._text += self._decoded()
        if self._count > self._least and (end := self._end(seen)) is not None:
            self.stopped, self._text = True, self._text[:end]
            return self._give(len(self._text))
        return self._give(len(self._text) - self._held())

    def flush(self) -> str:
        """Hand out what was held back: no token comes any more."""
        if not self.stopped:
            self._text += self._decode()[self._shown :]
            self._tokens.clear()
            self._shown = 0
        return self._give(len(self._text))

    def _decode(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True)

    def _decoded(self) -> str:
        """New whole characters."""
        decoded = self._decode()
        whole = decoded.rstrip(HALF)
        new = whole[self._shown :]
        self._shown = max(len(whole), self._shown)
        if len(whole) == len(decoded):
            self._cut()
            self._clean = len(self._tokens)
        return new

    def _cut(self) -> None:
        """Forget tokens where characters were whole before, or the rest would not read as it did."""
        if len(self._tokens) <= WINDOW:
            return
        rest = self._tokens[self._clean :]
        # Some tokenizers drop the blank in front of the first word: so there must be one.
        if shown := len(self._tokenizer.decode(rest, skip_special_tokens=True)):
            self._tokens, self._shown = rest, shown

    def _end(self, seen: int) -> int | None:
        """Where the text ends for a stop string that ends behind ``seen`` characters: the first to be complete."""
        found = [(self._text.find(stop, max(seen + 1 - len(stop), 0)), stop) for stop in self._stop]
        return min(((at + len(stop), at) for at, stop in found if at >= 0), default=(0, None))[1]

    def _held(self) -> int:
        """Characters at the end that may be the begin of a stop string."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(self._text))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._text[-n:]) for s in self._stop)), 0)

    def _give(self, end: int) -> str:
        begin, self._given = self._given, max(end, self._given)
        return self._text[begin : self._given]
