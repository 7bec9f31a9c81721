"""``winnow explain``: a page that shows what policies kept of a prompt, token by token, and what decided."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from winnowkv.budget import DEFAULT_BUDGET
from winnowkv.cli.generate import read_prompt, read_task
from winnowkv.cli.options import (
    DEFAULT_POLICY,
    Chat,
    Device,
    Dtype,
    Json,
    Model,
    Policies,
    PromptBudget,
    PromptFile,
    PromptText,
    Quality,
    Task,
    with_quality,
)
from winnowkv.cli.progress import working
from winnowkv.cli.tables import Column, ResultTable, keys, note, numbers
from winnowkv.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnowkv.budget import Budget
    from winnowkv.cache.kept import KeptTokens
    from winnowkv.evaluate.lookahead import FirstTokens
    from winnowkv.prompt.task import TaskProfile
    from winnowkv.report import Report

DEFAULT_POLICIES = f"{DEFAULT_POLICY},snapkv,pyramidkv"


@dataclass(frozen=True)
class Explained:
    """What one policy kept of the prompt, and its report."""

    kept: KeptTokens
    report: Report


class Used(NamedTuple):
    """What any of the policies uses of a prompt: one reading serves all."""

    uses_task: bool
    uses_structure: bool


def explain(
    prompt: PromptText = None,
    file: PromptFile = None,
    out: Annotated[Path, typer.Option("--out", help="The page to write; one that is there is replaced.")] = Path("why.html"),
    model: Model = "embedded",
    device: Device = None,
    dtype: Dtype = None,
    policies: Policies = DEFAULT_POLICIES,
    budget: PromptBudget = str(DEFAULT_BUDGET),
    quality: Quality = None,
    task: Task = None,
    chat: Chat = None,
    as_json: Json = False,
) -> None:
    """Read a prompt once and show side by side what each policy keeps of it: a page of HTML that needs no network.

    The prompt's tokens by how many layers keep them, a map of layers and positions, each layer's entries, and for
    every token its score and what decided.

    Examples:

    winnow explain -f report.txt --out why.html

    winnow explain -f report.txt --policies winnow,h2o,streaming --budget 256
    """
    text = read_prompt(prompt, file)
    from winnowkv.budget import Budget
    from winnowkv.cli.loading import check_file, check_policies, load_model
    from winnowkv.policies import split_policies

    check_file(out, "--out")
    specs, asked = with_quality(list(dict.fromkeys(split_policies(policies))), quality), Budget.of(budget)
    check_policies(specs, [asked.asked])  # before transformers is imported, which takes seconds
    from winnowkv.cache.compression import Compression
    from winnowkv.explain.page import component_data, write_page
    from winnowkv.explain.texts import token_texts
    from winnowkv.policies import policy as make_policy
    from winnowkv.prompt.chat import encode, uses_chat
    from winnowkv.prompt.task import TaskProfile

    given = TaskProfile.of(task)

    def check(checked: PreTrainedModel) -> None:
        for spec in specs:
            Compression.of(checked, spec, asked, given, task_is_known=given.task is not None)

    with working(f"loading {model}"):
        loaded, tokenizer = load_model(model, check, device=device, dtype=dtype)
    ids = encode(tokenizer, text, chat=uses_chat(chat, tokenizer))
    made = [make_policy(spec) for spec in specs]
    check_length(ids, loaded, max(policy.lookahead + policy.draft for policy in made))
    used = Used(any(policy.uses_task for policy in made), any(policy.uses_structure for policy in made))
    found = compare(loaded, tokenizer, ids, specs, asked, read_task(text, ids, given, used, tokenizer))
    with working(f"writing {out}"):
        data = component_data(
            token_texts(tokenizer, ids), [one.kept for one in found], [[*one.report.looked, *one.report.notes] for one in found]
        )
        facts = {"model": model, "prompt": f"{len(ids)} tokens", "budget": str(asked.asked)}
        write_page(out, data, title=f"What was kept of {file.name if file else 'the prompt'}", facts=facts)
    if as_json:
        print(json.dumps({"model": model, "page": str(out), "tokens": len(ids), "policies": [summary(one) for one in found]}))
        return
    show(found, len(ids), out)


def check_length(ids: Sequence[int], model: PreTrainedModel, more: int) -> None:
    """Raise InputError for a prompt that passes the model's positions with the tokens that a policy looks at."""
    from winnowkv.models.info import position_limit

    limit = position_limit(model)
    if limit is not None and len(ids) + more > limit:
        looked = f", with the {more} that a policy looks at it passes" if more else ", more than"
        raise InputError(f"the prompt has {len(ids)} tokens{looked} the model's {limit} positions: shorten it")


def compare(
    model: PreTrainedModel, tokenizer: Any, ids: list[int], specs: Sequence[str], budget: Budget, task: TaskProfile
) -> list[Explained]:
    """What each policy keeps of a prompt, which is read once. Raises the errors of a prompt that is compressed."""
    from winnowkv.evaluate.lookahead import FirstTokens
    from winnowkv.evaluate.settings import read_prompt as record_prompt
    from winnowkv.models.info import end_tokens
    from winnowkv.policies import policy as make_policy

    made, stop, found = [make_policy(spec) for spec in specs], end_tokens(model, tokenizer), []
    with working(f"reading {len(ids)} tokens"):
        recorded, logits, _ = record_prompt(model, ids, made, task)
    # For a policy that looks: so many tokens of the answer, and two after them, by which it goes on.
    longest = max(policy.lookahead for policy in made) + 2
    first = FirstTokens(model, logits, longest, lambda tokens: tokens[-1] in stop)
    for spec in specs:
        with working(f"choosing by {spec}"):
            found.append(chosen(recorded, spec, budget, task, first, ids))
    return found


def chosen(recorded: Any, spec: str, budget: Budget, task: TaskProfile, first: FirstTokens, ids: list[int]) -> Explained:
    """What one policy keeps of a recorded prompt. Raises InputError if the answer ends while it looks."""
    from winnowkv.cache.kept import KeptTokens

    cache = recorded.replay(spec, budget, task=task, keep_scores=True)
    if first.begin(cache).over:
        raise InputError(
            f"{spec} chooses by the answer's first tokens, and the answer to this prompt ends before: nothing is evicted; give "
            "--quality lean, or another prompt"
        )
    return Explained(KeptTokens.of(cache, ids), cache.report)


def summary(one: Explained) -> dict[str, Any]:
    """What one policy kept, as plain data."""
    kept, layers = one.kept, one.kept.layer_counts()
    means = [sum(layer) / len(layer) for layer in kept.entries]
    return {
        "policy": kept.policy, "budget": kept.budget, "kept_fraction": kept.kept_fraction, "layers": kept.layers,
        "heads": kept.heads, "entries": means, "tokens_in_all_layers": int((layers == kept.layers).sum()),
        "tokens_in_no_layer": int((layers == 0).sum()), "decided": kept.reason_counts(),
        "kept_bytes": one.report.kept_bytes, "full_bytes": one.report.full_bytes,
        "notes": [*one.report.looked, *one.report.notes],
    }  # fmt: skip


def show(found: Sequence[Explained], tokens: int, out: Path) -> None:
    """Print a table of what was kept, a row for each policy and part that decided on something that stayed, and the page."""
    columns = [
        *keys("policy"),
        *numbers(("kept", "of a layer", "tokens in all\nlayers", "in none")),
        Column("kept by", least=20),
    ]
    table = ResultTable(columns, f"What was kept of {tokens} tokens")
    for one in map(summary, found):
        few, most = min(one["entries"]), max(one["entries"])
        span = f"{few:.5g}" if few == most else f"{few:.5g} to {most:.5g}"
        table.add(
            one["policy"], f"{100 * one['kept_fraction']:.1f}%", span, str(one["tokens_in_all_layers"]),
            str(one["tokens_in_no_layer"]), shares(one["decided"]),
        )  # fmt: skip
    table.print()
    for sentence in dict.fromkeys(each for one in found for each in (*one.report.looked, *one.report.notes)):
        note(sentence)
    note(f"page: {out}")


def shares(decided: dict[str, int]) -> str:
    """What kept how much of what stayed, the largest part first."""
    stayed = {name: count for name, count in decided.items() if not name.startswith("evicted")}
    total = sum(stayed.values())
    return ", ".join(f"{name} {100 * n / total:.0f}%" for name, n in sorted(stayed.items(), key=lambda item: -item[1]))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(explain)
