"""Summary of an audit: means with intervals for each setting, and which setting to use."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from winnowkv.budget import budget_text
from winnowkv.evaluate.audit.audit import after as after_tokens
from winnowkv.evaluate.lookahead import lookahead_of
from winnowkv.evaluate.report.machine import machine, versions
from winnowkv.evaluate.report.stats import mean_interval, small
from winnowkv.evaluate.report.store import ResultStore, write_json
from winnowkv.evaluate.settings import Setting
from winnowkv.policies import policy as make_policy
from winnowkv.report import MIB

MEASURES = ("agreement", "kl_mean", "kl_p99", "exact_match")
SIZE_FIELDS = ("kept_bytes", "full_bytes", "held_bytes")
Z95 = 1.96  # half the width of a 95% interval, in standard errors
MAX_MORE_PROMPTS = 10_000  # a larger number of prompts is not suggested
Line = dict[str, Any]
Group = dict[str, Any]


def write_summary(
    store: ResultStore, expected: Sequence[Line], keep: float, config: dict[str, Any], after: int | None = None
) -> dict[str, Any]:
    """Write ``summary.json`` of the finished lines among ``expected`` (prompt, policy, budget); returns it."""
    summary = summarize(store.lines, expected, keep, config, after)
    write_json(store.folder / "summary.json", summary)
    return summary


def summarize(
    lines: Sequence[Line], expected: Sequence[Line], keep: float, config: dict[str, Any], after: int | None = None
) -> dict[str, Any]:
    """One group per setting in the order asked, the recommendation for the target ``keep``, and notes.

    ``after``: agreement and KL are also those of the tokens after so many; None: after the largest lookahead of the settings.
    """
    if after is None:
        after = max((lookahead_of(policy) for policy in {line["policy"] for line in expected}), default=0)
    wanted = {(line["prompt"], setting_of(line)) for line in expected}
    mine = [line for line in lines if (line["prompt"], setting_of(line)) in wanted]
    by_setting: dict[Setting, list[Line]] = {setting_of(line): [] for line in expected}
    for line in mine:
        by_setting[setting_of(line)].append(line)
    groups = [summed(setting, rows, after) for setting, rows in by_setting.items() if rows]
    return {
        **config, "after": after, "groups": groups, "recommendation": recommend(groups, keep),
        "notes": notes(mine, groups, config), "lines": len(mine), "expected_lines": len(wanted),
        "machine": machine(), "versions": versions(),
    }  # fmt: skip


def setting_of(line: Line) -> Setting:
    """The setting of a line or of a group."""
    return Setting(line["policy"], line["budget"])


def summed(setting: Setting, rows: Sequence[Line], after: int = 0) -> Group:
    """One setting over its prompts: every measure as mean, low and high of a 95% interval, None if there is none.

    ``prompts`` counts those compared, ``trivial`` those whose continuation is one token, which every cache
    gives, ``failed`` those without a result; only the compared ones are in the means. With ``after``, ``agreement_after``
    and ``kl_after`` are over the ``prompts_after`` whose continuation has tokens after so many. ``whole_answers`` ended within
    the lookahead, so that nothing was evicted.
    """
    compared = [row for row in rows if row["failed"] is None and row["compared_tokens"]]
    trivial = sum(row["failed"] is None and not row["compared_tokens"] for row in rows)
    agreements = [row["agreement"] for row in compared]
    later = [found for row in compared if after and (found := after_tokens(row, after)) is not None]
    return {
        "policy": setting.policy, "budget": setting.budget, "whole": not make_policy(setting.policy).evicts,
        "prompts": len(compared), "trivial": trivial, "failed": len(rows) - trivial - len(compared),
        **{name: _interval([float(row[name]) for row in compared]) for name in MEASURES},
        "deviation": stdev(agreements) if len(agreements) > 1 else None,
        "undiverged": sum(row["first_divergence"] is None for row in compared),
        "prompts_after": len(later), "agreement_after": _interval([same for same, _ in later]),
        "kl_after": _interval([nats for _, nats in later]), "whole_answers": sum(bool(row.get("whole")) for row in rows),
        **{name: mean(row[name] for row in compared) if compared else None for name in SIZE_FIELDS},
    }  # fmt: skip


def _interval(values: Sequence[float]) -> dict[str, float | None]:
    found = zip(("mean", "low", "high"), mean_interval(values), strict=True)
    return {name: None if math.isnan(value) else value for name, value in found}


def recommend(groups: Sequence[Group], keep: float) -> dict[str, Any]:
    """The cheapest setting whose agreement is at least ``keep`` at the lower end of its interval.

    Cheapest: fewest bytes really held on average (heads of a layer are stored padded to its longest), ties by agreement.
    Settings that save nothing, or lack prompts that others have, are no candidates. ``closest`` is the best setting if none
    reaches the target; ``undecided`` is the cheapest of which only the mean does, with the number of prompts that might
    settle it.
    """
    most = max((group["prompts"] for group in groups), default=0)
    measured = [group for group in groups if group["prompts"] == most > 0 and group["held_bytes"] < group["full_bytes"]]
    measured.sort(key=lambda group: (group["held_bytes"], -group["agreement"]["mean"]))
    reached = next((group for group in measured if at_least(group["agreement"]["low"], keep)), None)
    closest = (
        None if reached else max(measured, key=lambda g: (g["agreement"]["low"] or 0, g["agreement"]["mean"]), default=None)
    )
    cheaper = measured[: measured.index(reached)] if reached else measured
    undecided = next((group for group in cheaper if at_least(group["agreement"]["mean"], keep)), None)
    more = more_prompts(undecided, keep) if undecided else None
    return {
        "keep": keep, "prompts": most, "setting": _named(reached), "closest": _named(closest),
        "undecided": _named(undecided), "more_prompts": more,
        "sentence": sentence(reached, closest, undecided, more, keep, most),
    }  # fmt: skip


def at_least(value: float | None, keep: float) -> bool:
    """Whether a share reaches the target; the mean of ten times 0.99 may lie a rounding error below it."""
    return value is not None and value >= keep - 1e-9


def more_prompts(group: Group, keep: float) -> int | None:
    """Roughly how many more prompts would lift the interval above the target, if they vary as these do."""
    above = group["agreement"]["mean"] - keep
    if group["deviation"] is None or above <= 0:
        return None
    needed = (Z95 * group["deviation"] / above) ** 2
    return max(math.ceil(needed) - group["prompts"], 1) if needed < MAX_MORE_PROMPTS else None


def _named(group: Group | None) -> dict[str, Any] | None:
    return group and {name: group[name] for name in ("policy", "budget", "agreement", *SIZE_FIELDS)}


def sentence(
    reached: Group | None, closest: Group | None, undecided: Group | None, more: int | None, keep: float, prompts: int
) -> str:
    """The recommendation in words."""
    over = f"{prompts} prompt{'' if prompts == 1 else 's'}"
    if reached:
        saved = 1 - reached["held_bytes"] / reached["full_bytes"]
        text = (
            f"Use {name_of(reached)}: it gives {share_of(reached)} of the full cache's tokens over {over}, in "
            f"{mebibytes(reached['held_bytes'])} instead of {mebibytes(reached['full_bytes'])} MiB ({percent(saved)} less); "
            f"nothing cheaper has its interval at or above {percent(keep)}."
        )
    elif closest:
        text = (
            f"No setting has its interval at or above {percent(keep)} of the full cache's tokens: the closest is "
            f"{name_of(closest)} with {share_of(closest)} over {over}. "
            f"The full cache ({mebibytes(closest['full_bytes'])} MiB) is what keeps the target."
        )
    elif prompts:
        return f"None of these settings is smaller than the full cache, which keeps the target of {percent(keep)}."
    else:
        return f"Nothing could be compared, so nothing is recommended; the full cache keeps the target of {percent(keep)}."
    if undecided:
        settle = "more prompts are needed to settle it" if more is None else f"about {more} more prompts might settle it"
        text += (
            f" {name_of(undecided)} ({mebibytes(undecided['held_bytes'])} MiB) reaches it on average, "
            f"{share_of(undecided)}: {settle}."
        )
    return text


def name_of(group: Group) -> str:
    """A setting as text: ``snapkv at 12%``, ``snapkv at 128 entries``, ``int8``."""
    if group["whole"]:
        return str(group["policy"])
    return f"{group['policy']} at {budget_text(group['budget'])}"


def share_of(group: Group) -> str:
    """Mean agreement and its interval."""
    share = group["agreement"]
    if share["low"] is None:
        return f"{percent(share['mean'])} (no interval)"
    return f"{percent(share['mean'])} (95% interval {percent(share['low'])} to {percent(share['high'])})"


def percent(share: float) -> str:
    """A share in percent, rounded down so that a value below a target is never shown as the target."""
    return f"{math.floor(1000 * share + 1e-6) / 10:.1f}%"


def mebibytes(size: float) -> str:
    """Bytes in MiB, three digits."""
    mib = size / MIB
    return f"{mib:.0f}" if mib >= 100 else f"{mib:.3g}"


def notes(lines: Sequence[Line], groups: Sequence[Group], config: dict[str, Any]) -> list[str]:
    """Notes for the reader: small sets, prompts that were cut, trivial or failed, padded heads, rounding."""
    found = []
    prompts = {line["prompt"]: line for line in lines}
    compared = max((group["prompts"] for group in groups), default=0)
    if few := small(compared):
        found.append(few)
    if cut := [line for line in prompts.values() if line["truncated_tokens"]]:
        lost = sum(line["truncated_tokens"] for line in cut)
        found.append(f"{len(cut)} of {len(prompts)} prompts were too long and lost {lost} tokens of their middle")
    if trivial := max((group["trivial"] for group in groups), default=0):
        found.append(
            f"{trivial} of {len(prompts)} prompts are answered in one token, which every cache gives: they are left out"
        )
    for group in groups:
        mine = [line for line in lines if setting_of(line) == setting_of(group)]
        reasons = Counter(str(line["failed"]) for line in mine if line["failed"] is not None)
        for reason, times in reasons.most_common(1):
            found.append(f"{name_of(group)} failed on {group['failed']} of {len(prompts)} prompts ({times}: {reason})")
        if 0 < group["prompts"] < compared:
            found.append(f"{name_of(group)} lacks prompts that other settings have, so it is not recommended")
    found += [
        f"{name_of(group)}: {group['whole_answers']} of {group['prompts'] + group['trivial']} answers ended before anything "
        "was evicted, and count with the whole cache"
        for group in groups
        if group["whole_answers"]
    ]
    found += [
        f"{name_of(group)} holds {mebibytes(group['held_bytes'])} MiB to keep {mebibytes(group['kept_bytes'])}: heads are "
        "stored padded to the longest of their layer; the recommendation counts what is held"
        for group in groups
        if group["prompts"] and make_policy(group["policy"]).per_head and group["held_bytes"] > 1.01 * group["kept_bytes"]
    ]
    own = {line["prompt"]: line["full_agreement"] for line in lines if line.get("full_agreement") is not None}
    if own and mean(own.values()) < 1:
        found.append(
            f"the full cache, read in one pass, gives {percent(mean(own.values()))} of its own tokens: rounding in "
            f"{config['dtype']}; agreement can hardly be higher (--float32 leaves rounding out)"
        )
    return found
