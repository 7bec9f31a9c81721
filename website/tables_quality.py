"""What compression costs in answers, time and bytes: tables of ``winnow demo``, ``winnow audit`` and benchmarks/levels.py."""

from __future__ import annotations

from website.audit_groups import Group, held_share, holds_more
from website.records import Record
from website.tables import Records, markdown, table
from winnowkv.budget import DEFAULT_BUDGET
from winnowkv.errors import InputError
from winnowkv.policies.quality import LEVELS, spec_of_quality
from winnowkv.report import MIB

DEFAULT, BUDGET = "winnow", DEFAULT_BUDGET
FULL = "full cache"
COLUMNS = (FULL, *LEVELS)
# What is no published rule that evicts: these, and winnow and expected, which are ours.
NOT_PUBLISHED = ("full", "int8", "int4", "random", "streaming", "winnow", "expected")
DEMO_WIDTHS = (6, 6, 8)  # of found, MiB, ms/token
PAPERS = {"windowkv": "WindowKV", "compresskv": "CompressKV", "dynamickv": "DynamicKV", "snapkv": "SnapKV"}


def group(record: Record, policy: str, budget: float = BUDGET) -> Group:
    """The group of a policy at a budget. Raises InputError if the record has none."""
    for found in record.get("groups"):
        if found["policy"] == policy and found["budget"] == budget:
            return dict(found)
    raise InputError(f"record {record.name} has no {policy} at {budget}: measure it with both")


def published(groups: list[Group]) -> list[Group]:
    """The groups of published rules that evict, with the options that are not their default left out."""
    return [found for found in groups if found["policy"] not in NOT_PUBLISHED and ":" not in found["policy"]]


@table
def demo(records: Records) -> str:
    """What ``winnow demo`` prints, of the full cache, the default and the published rule that found most."""
    groups = records["demo"].get("groups")
    budgets = list(dict.fromkeys(one["budget"] for one in groups))
    found = {(one["policy"], one["budget"]): one for one in groups}
    rivals = dict.fromkeys(one["policy"] for one in published(groups))
    best = max(rivals, key=lambda policy: [found[policy, budget]["accuracy"] for budget in budgets])
    titles = [f"at {budget:.0%}" if isinstance(budget, float) else f"at {budget}" for budget in budgets]
    lines = [["", *("found", "MiB", "ms/token") * len(budgets)], ["policy", *(title for title in titles for _ in range(3))]]
    for policy in ("full", DEFAULT, best):
        mine = [found[policy, budget] for budget in budgets]
        cells = [
            (f"{one['accuracy']:.0%}", f"{one['kept_bytes'] / MIB:.1f}", f"{one['decode_ms_per_token']:.1f}") for one in mine
        ]
        lines.append([policy, *(cell for three in cells for cell in three)])
    widths = DEMO_WIDTHS * len(budgets)
    texts = [
        f"{line[0]:10}" + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths, strict=True)) for line in lines
    ]
    return "\n".join(["```text", *texts, "```"])


@table
def costs(records: Records) -> str:
    """README: what the levels lose and cost, beside the full cache and the best published rule."""
    summaries, questions = records["policies-summaries"], records["policies-questions"]
    rows = [
        [f"summaries: same token after {summaries.get('after')} of an answer", *agreements(summaries, "agreement_after")],
        ["answers to questions: same token", *agreements(questions, "agreement")],
    ]
    made = levels(records)
    full, *_ = made.values()
    first = [f"{row['first_token_s']:.2f} s" for row in made.values()]
    pauses = [f"{row['pause_s']:.1f} s" if LEVELS.get(name, {}).get("lookahead") else "" for name, row in made.items()]
    held = [f"{row['peak_bytes'] / MIB:.1f}, {row['held_bytes'] / MIB:.1f}" for row in made.values()]
    whole = f"{full['held_bytes'] / MIB:.1f}"
    rows += [
        [f"first token of {records['levels'].get('tokens'):,} tokens", first[0], "", *first[1:]],
        [f"pause after the {LEVELS['balanced']['lookahead']}th token", pauses[0], "", *pauses[1:]],
        [f"held at most, and then (of {whole} MiB)", whole, "", *held[1:]],
    ]
    names = [f"{name} (default)" if name == "lean" else name for name in LEVELS]
    return markdown([f"SmolLM2-135M, {BUDGET:.0%} kept", FULL, "best published", *names], rows)


def agreements(record: Record, metric: str) -> list[str]:
    """Shares of the full cache's tokens: its own, the best published rule's, and each level's."""
    rivals = [one for one in published(record.get("groups")) if one["budget"] == BUDGET and one[metric]["mean"] is not None]
    best = max(rivals, key=lambda one: one[metric]["mean"])
    more = f", holds {held_share(best):.0%}" if holds_more(best) else ""
    cells = [f"{best[metric]['mean']:.1%} (`{best['policy']}`{more})"]
    for level in LEVELS:
        one = group(record, spec_of_quality(DEFAULT, level))
        # Answers that end before anything is evicted are the full cache's own, and say nothing of what is lost.
        ended = " (never compressed)" if one.get("whole_answers", 0) >= one["prompts"] else ""
        cells.append(f"{one[metric]['mean']:.1%}{ended}")
    return ["100%", *cells]


def levels(records: Records) -> dict[str, Group]:
    """The rows of benchmarks/levels.py, the full cache's first."""
    return {name: records["levels"].get(f"rows.level={name}") for name in COLUMNS}


@table
def level_costs(records: Records) -> str:
    """What the levels of quality cost, of ``benchmarks/levels.py``."""
    columns = ["level", "first token", "pause", "step before", "step after", "held at most", "held then"]
    return markdown(
        columns,
        (
            [
                name, f"{row['first_token_s']:.2f} s",
                "" if row["pause_s"] is None else f"{row['pause_s']:.2f} s",
                f"{row['before_ms']:.0f} ms",
                f"{row['step_ms']:.0f} ms", f"{row['peak_bytes'] / MIB:.1f} MiB", f"{row['held_bytes'] / MIB:.1f} MiB",
            ]
            for name, row in levels(records).items()
        ),
    )  # fmt: skip


@table
def levels_and_answers(records: Records) -> str:
    """winnow-policy.md: the levels side by side, agreement of the table of parts, time and bytes of benchmarks/levels.py."""
    parts, made, result = records["winnow-parts"], levels(records), records["levels"]
    labels = ("lean", "balanced: lookahead of 64", "best: lookahead of 64, two drafts, refit")
    after = [[parts.get(f"tables.parts.rows.0={label}.{column}") for label in labels] for column in (1, 2)]
    full, *rest = made.values()
    paused = [f"{row['pause_s']:.2g} s" if LEVELS[name]["lookahead"] else "" for name, row in list(made.items())[1:]]
    held = [f"{row['peak_bytes'] / MIB:.1f}, {row['held_bytes'] / MIB:.1f} MiB" for row in rest]
    return markdown(
        ["", *COLUMNS],
        [
            ["summaries at 12%: same token / KL after 32 tokens of an answer", "100%", *after[0]],
            ["... after 64", "100%", *after[1]],
            [f"first token of {result.get('tokens'):,} tokens", *(f"{row['first_token_s']:.2f} s" for row in made.values())],
            [
                "a step while all is held, and after",
                *(f"{row['before_ms']:.1f}, {row['step_ms']:.1f} ms" for row in made.values()),
            ],
            ["pause where it is chosen", "", *paused],
            [f"an answer of {result.get('new')} tokens", *(f"{row['answer_s']:.1f} s" for row in made.values())],
            ["held at most, and after the choice", f"{full['held_bytes'] / MIB:.1f} MiB", *held],
        ],
    )


@table
def windows_of_papers(records: Records) -> str:
    """claims.md: needles found from the paper's window and from the question, at 12% / 128 entries."""
    rows = []
    for cell, *found in records["question-window"].get("tables.found.rows"):
        policy, options = cell.split(" ", 1) if " " in cell else (cell, "")
        rows.append([f"{PAPERS[policy.strip('`')]} {options}".strip(), f"{found[2]} / {found[3]}", f"{found[0]} / {found[1]}"])
    return markdown(["", "paper's window", "question"], rows)
