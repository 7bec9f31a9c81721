"""Prompts for an engine, the tokens of each alone, and the most bytes held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import prompt
from support.tokenizers import word_tokenizer
from winnowkv.engine.drafts import Drafts
from winnowkv.engine.engine import Engine
from winnowkv.engine.looking import LookingSteps
from winnowkv.engine.request import Event, Request
from winnowkv.engine.sampling import Sampling
from winnowkv.engine.slots import Slots

LENGTHS = (72, 45, 60, 91, 50, 72, 47)
NEW = (9, 4, 1, 7, 12, 2, 9)
SNAP = {"policy": "snapkv:observe=8:kernel=3", "budget": 20}


def ids(tokens: int, seed: int = 0) -> list[int]:
    return prompt(tokens, seed)[0].tolist()


def alone(model: PreTrainedModel, tokens: Sequence[int], new: int, policy: str, budget: float, task: Any = None) -> list[int]:
    """The slow reference: generate() on one prompt in a compress block."""
    read = torch.tensor([list(tokens)])
    with wk.compress(model, policy, budget, task=task, tokenizer=word_tokenizer()):
        return model.generate(read, max_new_tokens=new, do_sample=False)[0, len(tokens) :].tolist()


def asked(engine: Engine, lengths: Sequence[int] = LENGTHS, new: Sequence[int] = NEW) -> list[list[int]]:
    """The tokens of all prompts at once."""
    samplings = [Sampling(max_new_tokens=count) for count in new]
    done = engine.generate([ids(tokens, row) for row, tokens in enumerate(lengths)], samplings)
    assert [one.prompt_tokens for one in done] == list(lengths)
    assert [one.error for one in done] == [None] * len(done)
    return [one.tokens for one in done]


class Watch:
    """The most bytes held: between steps, at the peak of each prompt, and in a step whenever something was placed or chosen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most, self.waited, self.queued, self.peaks = 0, 0, 0, []
        self.looked = 0  # most choices that looked at once
        step, read = Engine.step, Engine._prompt_logits
        stepping: list[Engine] = []

        def watched_step(engine: Engine) -> list[Event]:
            stepping[:] = [engine]
            events = step(engine)
            self.most = max(self.most, engine.held_bytes)
            self.waited += engine._scheduler._prompt is not None
            self.queued = max(self.queued, engine.waiting)
            self.looked = max(self.looked, len(engine._scheduler._lookers))
            return events

        def watched_read(engine: Engine, request: Request, cache: wk.CompactCache) -> torch.Tensor:
            before = engine.held_bytes
            logits = read(engine, request, cache)
            self.most = max(self.most, before + cache.report.peak_bytes)
            self.peaks.append((cache.report.peak_bytes, request.claim.peak))
            return logits

        def sampled(target: Any, name: str) -> None:
            method = getattr(target, name)

            def watched(*args: Any, **more: Any) -> Any:
                done = method(*args, **more)
                if stepping:
                    self.most = max(self.most, stepping[0].held_bytes)
                return done

            monkeypatch.setattr(target, name, watched)

        for target, name in (
            (Slots, "place_all"), (Drafts, "begin"), (Drafts, "step"), (LookingSteps, "_look"), (LookingSteps, "_settle")
        ):  # fmt: skip
            sampled(target, name)
        monkeypatch.setattr(Engine, "step", watched_step)
        monkeypatch.setattr(Engine, "_prompt_logits", watched_read)


def least(engine: Engine, lengths: Sequence[int] = LENGTHS, new: Sequence[int] = NEW) -> int:
    """The memory in which each of these requests just fits."""
    needed = 0
    for row, (tokens, count) in enumerate(zip(lengths, new, strict=True)):
        request = engine.submit(ids(tokens, row), Sampling(max_new_tokens=count))
        claim = request.claim
        needed = max(needed, engine._admission._alone(claim, 1, engine._slots))
        engine.cancel(request)
    return needed
