"""Which setting an audit recommends, on made-up lines."""

from __future__ import annotations

from typing import Any

import pytest

from winnowkv.evaluate.audit.recommend import more_prompts, recommend, summarize


def made(policy: str = "snapkv", budget: int | float = 0.5, agreement: float = 1.0, kept: int = 500, prompt: str = "a") -> Any:
    """A made-up result line."""
    return {
        "prompt": prompt, "id": prompt, "policy": policy, "budget": budget, "failed": None, "compared_tokens": 10,
        "agreement": agreement, "kl_mean": 0.1, "kl_p99": 0.2, "exact_match": agreement == 1, "first_divergence": None,
        "full_agreement": 1.0, "kept_bytes": kept, "full_bytes": 1000, "held_bytes": kept, "truncated_tokens": 0,
    }  # fmt: skip


def advised(keep: float, *settings: tuple[str, float, int, list[float]]) -> dict[str, Any]:
    lines = [made(policy, budget, share, kept, str(number)) for policy, budget, kept, shares in settings
             for number, share in enumerate(shares)]  # fmt: skip
    return recommend(summarize(lines, lines, keep, {"dtype": "float32"})["groups"], keep)


def test_the_cheapest_setting_that_reaches_the_target_is_recommended() -> None:
    found = advised(
        0.9,
        ("snapkv", 0.5, 500, [0.99, 0.97, 0.98] * 4),
        ("snapkv", 0.12, 120, [0.5, 0.6, 0.7] * 4),
        ("windowkv", 0.3, 300, [0.93, 0.95, 0.94] * 4),
        ("full", 0.5, 1000, [1.0] * 12),
    )
    assert (found["setting"]["policy"], found["setting"]["budget"]) == ("windowkv", 0.3)
    assert found["setting"]["agreement"]["mean"] == pytest.approx(0.94)
    assert found["setting"]["agreement"]["low"] >= 0.9
    assert found["closest"] is found["undecided"] is None
    assert found["sentence"].startswith("Use windowkv at 30%: it gives 94.0% (95% interval 93.")
    assert "(70.0% less)" in found["sentence"]


def test_equal_bytes_go_to_the_better_agreement() -> None:
    shares = [0.96, 0.97] * 8
    found = advised(0.9, ("snapkv", 0.3, 300, shares), ("windowkv", 0.3, 300, [share + 0.01 for share in shares]))
    assert found["setting"]["policy"] == "windowkv"


def test_none_reaches_the_target() -> None:
    found = advised(0.99, ("snapkv", 0.5, 500, [0.9, 0.92] * 6), ("snapkv", 0.25, 250, [0.7, 0.8] * 6))
    assert found["setting"] is found["undecided"] is None
    assert found["closest"]["budget"] == 0.5
    assert "No setting has its interval at or above 99.0%" in found["sentence"]
    assert "the closest is snapkv at 50% with 91.0% (95% interval" in found["sentence"]
    assert "The full cache" in found["sentence"]


def test_the_mean_reaches_and_the_interval_does_not() -> None:
    scattered = [1.0, 0.85, 1.0, 0.9]
    found = advised(0.9, ("snapkv", 0.25, 250, scattered), ("snapkv", 0.5, 500, [0.99, 0.98, 0.99, 0.98]))
    assert found["setting"]["budget"] == 0.5
    assert found["undecided"]["budget"] == 0.25
    # mean 0.9375, deviation 0.075: 1.96 x 0.075 / sqrt(16) is just below 0.0375
    assert found["more_prompts"] == 12
    assert "snapkv at 25% (0.000238 MiB) reaches it on average, 93.7% (95% interval " in found["sentence"]
    assert found["sentence"].endswith("about 12 more prompts might settle it.")
    alone = advised(0.9, ("snapkv", 0.25, 250, scattered))
    assert alone["setting"] is None
    assert alone["closest"]["budget"] == alone["undecided"]["budget"] == 0.25


def test_no_number_of_prompts_settles_a_mean_on_the_target() -> None:
    group = {"agreement": {"mean": 0.9}, "deviation": 0.1, "prompts": 10}
    assert more_prompts(group, 0.9) is None
    assert more_prompts(group, 0.8999) is None  # millions
    assert more_prompts(group, 0.89) == 375
    assert more_prompts(group, 0.5) == 1


def test_one_prompt_has_no_interval_and_gives_no_recommendation() -> None:
    found = advised(0.9, ("snapkv", 0.25, 250, [0.8]), ("snapkv", 0.5, 500, [1.0]))
    assert found["setting"] is None
    assert found["closest"]["budget"] == found["undecided"]["budget"] == 0.5
    assert "100.0% (no interval) over 1 prompt." in found["sentence"]
    assert "more prompts are needed to settle it" in found["sentence"]


def test_a_setting_that_lacks_prompts_or_saves_nothing_is_no_candidate() -> None:
    found = advised(0.9, ("snapkv", 0.1, 100, [1.0] * 3), ("windowkv", 0.5, 500, [1.0] * 5), ("full", 0.1, 1000, [1.0] * 5))
    assert found["setting"]["policy"] == "windowkv"
    assert "None of these settings is smaller" in advised(0.9, ("full", 0.1, 1000, [1.0] * 5))["sentence"]
    assert "Nothing could be compared" in recommend([], 0.9)["sentence"]


def test_only_the_asked_settings_are_summed() -> None:
    lines = [made(budget=budget, prompt=prompt) for budget in (0.5, 1, 1.0) for prompt in "ab"]
    summary = summarize(
        lines, [line for line in lines if line["budget"] is not lines[0]["budget"]][:2], 0.9, {"dtype": "float32"}
    )
    assert [(type(g["budget"]), g["prompts"]) for g in summary["groups"]] == [(int, 2)]
    assert summary["lines"] == summary["expected_lines"] == 2


def test_tokens_after_the_lookahead_are_compared_by_themselves() -> None:
    """By default after the largest lookahead of the settings; an answer that is no longer has none."""
    long = {
        "same_tokens": "1110",
        "kl_tokens": [0.0, 0.0, 0.25, 0.75],
    }  # of answers of 5 tokens and 3: the first is in no number
    short = {"same_tokens": "11", "kl_tokens": [0.0, 0.0]}
    lines = [
        made(policy, prompt=prompt) | (short if prompt == "c" else long)
        for policy in ("snapkv:lookahead=3", "snapkv:lookahead=2") for prompt in "abc"
    ]  # fmt: skip
    summary = summarize(lines, lines, 0.9, {"dtype": "float32"})
    assert summary["after"] == 3
    for group in summary["groups"]:
        assert (group["prompts"], group["prompts_after"]) == (3, 2)
        assert group["agreement_after"]["mean"] == 0.5
        assert group["kl_after"]["mean"] == 0.5
    other = summarize(lines, lines, 0.9, {"dtype": "float32"}, after=4)
    assert [(g["agreement_after"]["mean"], g["kl_after"]["mean"]) for g in other["groups"]] == [(0.0, 0.75)] * 2
    none = summarize([made()], [made()], 0.9, {"dtype": "float32"})
    assert (none["after"], none["groups"][0]["prompts_after"], none["groups"][0]["kl_after"]["mean"]) == (0, 0, None)


def test_rounding_is_noted() -> None:
    lines = [made(prompt=str(n)) | {"full_agreement": 0.96} for n in range(3)]
    notes = summarize(lines, lines, 0.9, {"dtype": "bfloat16"})["notes"]
    assert any("96.0% of its own tokens: rounding in bfloat16" in note for note in notes)
    assert not any("rounding" in note for note in summarize([made()], [made()], 0.9, {"dtype": "float32"})["notes"])


def test_cheapest_is_what_holds_least() -> None:
    padded = [made("adakv", 0.12, 0.95, 120, str(number)) | {"held_bytes": 260} for number in range(12)]
    lines = [*padded, *(made("snapkv", 0.25, 0.95, 250, str(number)) for number in range(12))]
    found = recommend(summarize(lines, lines, 0.9, {"dtype": "float32"})["groups"], 0.9)
    assert (found["setting"]["policy"], found["setting"]["held_bytes"]) == ("snapkv", 250)


def test_padded_heads_are_noted() -> None:
    lines = [made("adakv", 0.12) | {"kept_bytes": 6 << 20, "held_bytes": 9 << 20}, made("snapkv")]
    found = [note for note in summarize(lines, lines, 0.9, {"dtype": "float32"})["notes"] if "holds" in note]
    assert len(found) == 1
    assert found[0].startswith("adakv at 12% holds 9 MiB to keep 6: heads are stored padded")
