"""Levels of quality: which options each policy gets, and what contradicts them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from transformers import PreTrainedModel

import winnowkv as wk
from support.cases import CASES
from support.models import prompt
from winnowkv.cache.reading import prefill
from winnowkv.policies import policy
from winnowkv.policies.base import Policy
from winnowkv.policies.quality import LEVELS, check_quality, with_quality
from winnowkv.policies.snapkv import SnapKV


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_policy_that_evicts_gets_the_options_and_keeps_its_own(case: object, level: str) -> None:
    spec = case.spec  # type: ignore[attr-defined]
    text = with_quality(spec, level)
    before, made, other = policy(spec), policy(text), with_quality(policy(spec), level)
    assert made == other, "a spec and a policy get the same"
    if not before.evicts:
        assert text == spec
        return
    assert {option: getattr(made, option) for option in LEVELS[level]} == LEVELS[level]
    assert with_quality(text, level) == text, "given twice is given once"

    def without(one: Policy) -> Policy:
        return (
            replace(one, of=without(one.of))
            if hasattr(one, "of")
            else replace(one, lookahead=0, draft=0, rounds=1, refit=False)
        )

    assert without(made) == before


def test_levels_are_written_into_specs() -> None:
    assert with_quality("snapkv:observe=8", None) == "snapkv:observe=8" == with_quality("snapkv:observe=8", "lean")
    assert with_quality("winnow", "balanced") == "winnow:lookahead=64"
    assert with_quality("winnow:heard=0.5", "best") == "winnow:heard=0.5:lookahead=64:draft=64:rounds=2:refit=true"
    assert with_quality("winnow:lookahead=64:refit=yes", "best") == "winnow:lookahead=64:refit=yes:draft=64:rounds=2"
    assert with_quality("adakv", "balanced") == "adakv:of=snapkv:lookahead=64"
    assert with_quality("adakv:of=criticalkv", "balanced").startswith("adakv:of=criticalkv:of=")
    assert with_quality("full:quantize=int8", "best") == "full:quantize=int8"
    made = SnapKV(observe=8)
    assert with_quality(made, None) is with_quality(made, "lean") is made


@pytest.mark.parametrize(
    ("spec", "level", "message"),
    [
        ("snapkv:lookahead=8", "balanced", "lookahead=8 contradicts quality=balanced, which is lookahead=64"),
        ("snapkv:lookahead=8", "lean", "lookahead=8 contradicts quality=lean, which is lookahead=0"),
        ("snapkv:lookahead=0", "best", "lookahead=0 contradicts quality=best, which is lookahead=64"),
        ("adakv:of=snapkv:refit=true", "balanced", "refit=true contradicts quality=balanced, which is refit=false"),
        (SnapKV(draft=8), "best", "draft=8 contradicts quality=best, which is draft=64"),
        ("snapkv", "better", "quality 'better' is unknown: it is one of lean, balanced, best"),
    ],
)
def test_what_contradicts_a_level_is_refused_by_name(spec: str | Policy, level: str, message: str) -> None:
    with pytest.raises(wk.PolicyError, match=message):
        with_quality(spec, level)


def test_a_policy_without_these_options_is_refused() -> None:
    @dataclass(frozen=True)
    class Bare(Policy):
        name: ClassVar[str] = "bare"

    with pytest.raises(wk.PolicyError, match="bare has no option lookahead, which quality=balanced sets"):
        with_quality(Bare(), "balanced")
    with pytest.raises(wk.PolicyError, match="unknown"):
        check_quality("")


def test_doors_take_a_level(llama: PreTrainedModel) -> None:
    cache = wk.CompactCache(llama, "snapkv:observe=8", 24, quality="best")
    assert cache.report.policy == "snapkv:observe=8:lookahead=64:draft=64:rounds=2:refit=true"
    prefill(llama, prompt(72), cache)
    assert cache.looking is not None
    with wk.compress(llama, "snapkv:observe=8", 24, quality="balanced") as run:
        llama.generate(prompt(72), max_new_tokens=66, do_sample=False)
    assert run.report.policy == "snapkv:observe=8:lookahead=64"
    assert run.report.lookahead_tokens == 64
    with pytest.raises(wk.PolicyError, match="contradicts"), wk.compress(llama, "snapkv:lookahead=3", 24, quality="best"):
        pass
    with pytest.raises(wk.PolicyError, match="quality 'lavish' is unknown"):
        wk.CompactCache(llama, quality="lavish")
