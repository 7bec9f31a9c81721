"""Lookahead in evaluation: the answer's first tokens are read over the whole prompt, then what stays is decided, as it is live.

A replayed cache of a policy with lookahead or draft still holds the whole prompt. The tokens it looks at are the full cache's,
hence the same for all settings of a prompt: they are found once, one by one, and every later setting reads them in one forward
pass, which gives the same queries up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.reading import extend
from winnowkv.errors import InputError
from winnowkv.policies import Policy, policy as make_policy


class Begun(NamedTuple):
    """How an answer begins from one cache.

    ``tokens`` were read over the whole prompt; ``logits`` ``[1, V]`` are those of the token after them. ``over``: the answer
    ended with these tokens, so that nothing was evicted; ``failed``: it ended because a logit is not a finite number.
    """

    tokens: tuple[int, ...] = ()
    logits: Tensor | None = None
    over: bool = False
    failed: bool = False


class FirstTokens:
    """The first tokens of the full cache's answer to one prompt, found as far as any setting looks.

    Parameters
    ----------
    logits: of the prompt's last token, ``[1, V]``.
    limit: most tokens of an answer, at least 1.
    done: called with the tokens so far after each new one; True ends the answer, which keeps the token.
    """

    def __init__(self, model: PreTrainedModel, logits: Tensor, limit: int, done: Callable[[list[int]], bool]) -> None:
        self._model, self._limit, self._done = model, limit, done
        self._logits = [logits]  # before each token
        self._tokens: list[int] = []
        self._over = self._failed = False

    @classmethod
    def known(cls, model: PreTrainedModel, tokens: Sequence[int], logits: Tensor) -> FirstTokens:
        """Those of an answer that is known to its end; ``logits`` ``[n, V]`` are those before each of its ``n`` tokens."""
        made = cls(model, logits[:1], len(tokens), lambda _: False)
        made._tokens, made._logits, made._over = list(tokens), list(logits.split(1)), True
        return made

    @torch.no_grad()
    def begin(self, cache: CompactCache) -> Begun:
        """Let a cache that holds one whole prompt read the first tokens and evict; one that evicted already stays as it is.

        Does what a live answer does: the token after the lookahead is known when a draft begins, and an answer that ends
        before it is never evicted. Raises the errors of a prompt that is compressed.
        """
        if cache.looking is None:
            return Begun()
        ahead, seen = cache.looking.policy.lookahead, cache.report.prompt_tokens[0]
        read = min(ahead, len(self._logits) - 1)  # tokens that another cache has read
        while read and not self._goes_on(read - 1):
            read -= 1
        if read:
            self._read(cache, self._tokens[:read], seen)
        while read < ahead and self._goes_on(read):
            self._logits.append(self._read(cache, self._tokens[read : read + 1], seen + read))
            read += 1
        if not self._goes_on(read):
            return Begun(tuple(self._tokens), None, True, self._failed)
        after = torch.tensor([self._tokens[read : read + 1]], device=self._model.device)
        cache.before_pass({"input_ids": after, "position_ids": torch.full_like(after, seen + read)})
        return Begun(tuple(self._tokens[:read]), self._logits[read])

    def _goes_on(self, at: int) -> bool:
        """Whether the answer has a token ``at``, and another one after it; it is found if it was not asked for before."""
        if at == len(self._tokens) and not self._over:
            largest, likeliest = self._logits[at].max(-1)
            self._failed = not bool(largest.isfinite())
            if not self._failed:
                self._tokens.append(int(likeliest))
            self._over = self._failed or len(self._tokens) == self._limit or self._done(list(self._tokens))
        return at < len(self._tokens) - self._over

    def _read(self, cache: CompactCache, tokens: Sequence[int], seen: int) -> Tensor:
        return extend(self._model, cache, torch.tensor([list(tokens)], device=self._model.device), [seen], last=1)[:, -1]


@torch.no_grad()
def read_answer(model: PreTrainedModel, cache: CompactCache, tokens: Tensor) -> Tensor:
    """Logits ``[1, k, V]`` after each of an answer's first ``tokens`` ``[1, k]``, read into the cache of its prompt.

    A cache that holds the whole prompt evicts after its lookahead, as it does when the answer comes token by token.
    """
    seen, parts = cache.report.prompt_tokens[0], []
    ahead = 0 if cache.looking is None else min(cache.looking.policy.lookahead, tokens.shape[1])
    if ahead:
        parts.append(extend(model, cache, tokens[:, :ahead], [seen]))
    if (rest := tokens[:, ahead:]).shape[1]:
        cache.before_pass({"input_ids": rest[:, :1], "position_ids": torch.full_like(rest[:, :1], seen + ahead)})
        parts.append(extend(model, cache, rest, [seen + ahead]))
    return torch.cat(parts, 1)


def lookahead_of(policy: str | Policy) -> int:
    """Tokens of the answer that are read over the whole prompt."""
    made = make_policy(policy)
    return made.lookahead if made.looks else 0


def check_asked_later(policies: Sequence[str]) -> None:
    """Raise InputError for a policy that hears the answer, where the text is compressed before its question is known."""
    for spec in policies:
        made = make_policy(spec)
        if made.looks and (made.lookahead or made.draft):
            raise InputError(
                f"{spec} hears the answer before it evicts, and this protocol compresses a text before its question is known: "
                "leave lookahead and draft out, or ask with --protocol official"
            )


def looked(cache: CompactCache | None) -> dict[str, Any]:
    """The fields of a result line about lookahead, draft and refit.

    ``whole``: the answer ended while the whole prompt was held, so that nothing was evicted.
    """
    if cache is None:
        return {}
    report = cache.report
    return {
        "whole": cache.looking is not None, "lookahead_tokens": report.lookahead_tokens, "draft_tokens": report.draft_tokens,
        "draft_s": round(report.draft_seconds, 4), "refitted": round(report.refitted, 4),
    }  # fmt: skip
