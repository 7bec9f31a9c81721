"""``winnow generate``: answer one prompt with a compressed cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from winnowkv.budget import DEFAULT_BUDGET
from winnowkv.cli.options import (
    DEFAULT_POLICY,
    Chat,
    Device,
    Dtype,
    Json,
    Model,
    PromptBudget,
    PromptFile,
    PromptText,
    Quality,
    Task,
    with_quality,
)
from winnowkv.cli.progress import working
from winnowkv.cli.tables import note
from winnowkv.cli.texts import checked_text, standard_input
from winnowkv.errors import InputError
from winnowkv.files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnowkv.cache.cache import CompactCache
    from winnowkv.engine.sampling import Sampling
    from winnowkv.prompt.task import TaskProfile
    from winnowkv.report import Report


def generate(
    prompt: PromptText = None,
    file: PromptFile = None,
    model: Model = "embedded",
    device: Device = None,
    dtype: Dtype = None,
    policy: Annotated[
        str, typer.Option(help="Eviction policy; options after colons, windowkv:group=6:window=8.")
    ] = DEFAULT_POLICY,
    budget: PromptBudget = str(DEFAULT_BUDGET),
    quality: Quality = None,
    task: Task = None,
    chat: Chat = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            help="Read the prompt in chunks of so many tokens, at least 64: less memory, the same entries. Default: at once.",
            show_default=False,
        ),
    ] = None,
    decode_budget: Annotated[
        int | None,
        typer.Option(
            help="Most entries of generated tokens held per layer and KV head, at least 64. Default: all.", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: the most likely token each time; above 0: drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens that have this much probability together.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the most likely tokens; 0: from all.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Print why each layer kept a token of the prompt or not: its position (-1 is the last), or a text that ends "
            "with it.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a prompt, compress its KV cache and stream the answer; then print the policy, the budget and what was kept.

    Examples:

    winnow generate "What is the capital of France?" --policy full

    winnow generate -f report.txt --policy windowkv --task localization --budget 0.12

    winnow generate -f report.txt --explain "access code is 4417"
    """
    text = read_prompt(prompt, file)
    from winnowkv.budget import Budget
    from winnowkv.cache.generated import check_decode_budget
    from winnowkv.cli.loading import check_policies, load_model

    asked = Budget.of(budget)
    (policy,) = with_quality([policy], quality)
    check_decode_budget(decode_budget)
    check_policies([policy], [asked.asked])  # before transformers is imported, which takes seconds
    from winnowkv.cache.cache import CompactCache
    from winnowkv.cache.compression import Compression
    from winnowkv.cli.explain import as_dicts, find_token, lines
    from winnowkv.engine.sampling import Sampling
    from winnowkv.policies import policy as make_policy
    from winnowkv.prompt.chat import encode, uses_chat
    from winnowkv.prompt.task import TaskProfile

    given = TaskProfile.of(task)
    check_chunk(prefill_chunk)
    sampling = Sampling(max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    made = make_policy(policy)

    def check(checked: PreTrainedModel) -> None:
        Compression.of(checked, policy, asked, given, task_is_known=given.task is not None)

    with working(f"loading {model}"):
        loaded, tokenizer = load_model(model, check, device=device, dtype=dtype)
    ids = encode(tokenizer, text, chat=uses_chat(chat, tokenizer))
    check_length(ids, loaded, max_new_tokens)
    token = None if explain is None else find_token(tokenizer, ids, explain)
    profile = read_task(text, ids, given, made, tokenizer)
    cache = CompactCache(loaded, policy, asked, task=profile, decode_budget=decode_budget, keep_scores=token is not None)
    answer = write_answer(loaded, tokenizer, cache, ids, sampling, prefill_chunk, None if as_json else show_text)
    report = cache.report
    explained, its_text = [], ""
    if token is not None and cache.looking is None:
        explained = [cache.explain(layer, token) for layer in range(len(report.kept_entries[0]))]
        its_text = tokenizer.decode([ids[token]])
    if as_json:
        found = {"explain": as_dicts(explained, its_text)} if explained else {}
        print(json.dumps({"answer": answer, "model": model, **report.to_dict(), **found}, indent=2, ensure_ascii=False))
        return
    print()
    show_report(report, profile, decode_budget)
    if explained:
        print(*lines(explained, its_text), sep="\n")


def check_chunk(tokens: int | None) -> None:
    """Raise InputError for a chunk of fewer tokens than a prompt can be read in."""
    from winnowkv.cache.chunked import SMALLEST_CHUNK

    if tokens is not None and tokens < SMALLEST_CHUNK:
        raise InputError(f"--prefill-chunk {tokens} is too small: give at least {SMALLEST_CHUNK} tokens, or leave it out")


def check_length(ids: Sequence[int], model: PreTrainedModel, new_tokens: int) -> None:
    """Raise InputError for a prompt that passes the model's positions with its new tokens."""
    from winnowkv.models.info import position_limit

    limit = position_limit(model)
    if limit is not None and len(ids) + new_tokens > limit:
        raise InputError(
            f"the prompt has {len(ids)} tokens, with {new_tokens} new ones it passes the model's {limit} positions: "
            f"shorten it or lower --max-new-tokens"
        )


def read_task(text: str, ids: list[int], given: TaskProfile, policy: Any, tokenizer: Any) -> TaskProfile:
    """What the policy uses of the prompt: its task, classified if none is given, and its structure."""
    profile = given
    if policy.uses_task and given.task is None:
        from winnowkv.prompt.classifier import task_profile

        profile = task_profile(text)
    if policy.uses_structure:
        from winnowkv.prompt.structure import read_structure

        profile = replace(profile, structure=read_structure(tokenizer, ids))
    return profile


def write_answer(
    model: PreTrainedModel, tokenizer: Any, cache: CompactCache, ids: list[int], sampling: Sampling, chunk: int | None,
    show: Callable[[str], None] | None,
) -> str:  # fmt: skip
    """Read the prompt into the cache and generate the answer; ``show`` gets its text piece by piece.

    Raises InputError if the model's logits are not finite numbers.
    """
    import torch

    from winnowkv.cache.reading import prefill
    from winnowkv.engine.detokenizer import TextStream
    from winnowkv.engine.request import NOT_FINITE
    from winnowkv.engine.sampling import Sampler, choose
    from winnowkv.models.info import cache_argument, end_tokens

    stop, pieces = end_tokens(model, tokenizer), TextStream(tokenizer)
    sampler = Sampler(sampling, stop, model.device)
    show = show or (lambda piece: None)
    with working(f"reading {len(ids)} tokens"):
        logits = prefill(model, torch.tensor([ids], device=model.device), cache, chunk=chunk)
    while True:
        (chosen,) = choose(logits, [sampler])
        if chosen is None:
            raise InputError(NOT_FINITE)
        token, _ = chosen
        if token not in stop:
            show(pieces.push(token))
        if token in stop or len(sampler.tokens) == sampling.max_new_tokens:
            break
        with torch.no_grad():
            newest = torch.tensor([[token]], device=model.device)
            logits = model(input_ids=newest, **cache_argument(model, cache), use_cache=True).logits[:, -1]
    show(pieces.flush())
    return pieces.text


def show_text(piece: str) -> None:
    """Print a piece of the answer at once."""
    print(piece, end="", flush=True)


def show_report(report: Report, profile: TaskProfile, decode_budget: int | None) -> None:
    """Print what was kept, and what the user should know."""
    from winnowkv.budget import Budget
    from winnowkv.report import MIB, summary

    default = " (the default)" if Budget.of(report.budget) == Budget(DEFAULT_BUDGET) else ""
    pace = f"{1000 / report.decode_ms_per_token:.1f} tokens/s" if report.decode_tokens else "one token"
    note(
        f"policy {report.policy}, budget {report.budget}{default}: {report.kept_bytes / MIB:.2f} of "
        f"{report.full_bytes / MIB:.2f} MiB kept, {pace}, prefill {report.prefill_seconds:.2f} s"
    )
    note(f"entries per layer: {summary(report.kept_entries[0])}")
    if report.decode_entries < report.decode_tokens:
        note(f"decode budget {decode_budget}: {report.decode_entries} entries held of {report.decode_tokens} new tokens")
    if profile.probability is not None:
        note(f"task: {profile.task}, probability {profile.probability:.2f} (classified; --task sets it)")
    for sentence in report.looked:
        note(sentence)
    for sentence in report.notes:
        note(f"note: {sentence}")


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt's text from the argument, the file or standard input. Raises InputError if there is none."""
    if prompt is not None and file is not None:
        raise InputError("give the prompt as an argument or with --file, not both")
    if file is not None:
        text = read_text(file, lambda why: InputError(f"prompt file {file} {why}"))
    elif prompt is None or prompt == "-":
        if sys.stdin.isatty():
            raise InputError("no prompt: give one as an argument, with --file, or on standard input")
        text = standard_input("prompt")
    else:
        text = prompt
    return checked_text(text, "prompt")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(generate)
