"""``winnow generate``: answer one prompt with a compressed cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from winnowkv.budget import DEFAULT_BUDGET
from winnowkv.cli.options import Chat, Json, Model, Task
from winnowkv.errors import InputError


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt. Without it, --file or standard input is read.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    model: Model = "embedded",
    policy: Annotated[str, typer.Option(help="Eviction policy; options after colons, windowkv:group=6:window=8.")] = "winnow",
    budget: Annotated[
        str, typer.Option(help="Kept fraction of the prompt (0.12), entries kept per layer and KV head (512), or auto:0.95.")
    ] = str(DEFAULT_BUDGET),
    task: Task = None,
    chat: Chat = None,
    decode_budget: Annotated[
        int | None,
        typer.Option(
            help="Most entries of generated tokens held per layer and KV head, at least 64. Default: all.", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy decoding; above 0: sampling.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
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
    import torch
    from transformers import TextStreamer

    from winnowkv.api import compress
    from winnowkv.budget import Budget
    from winnowkv.cache.generated import check_decode_budget
    from winnowkv.cli.explain import as_dicts, find_token, lines
    from winnowkv.cli.options import load_model
    from winnowkv.models.info import position_limit
    from winnowkv.policies import policy as make_policy
    from winnowkv.prompt.chat import encode, uses_chat
    from winnowkv.prompt.task import TaskProfile

    made = make_policy(policy)  # reports bad options before the model is loaded
    profile = TaskProfile.of(task)
    if made.uses_task and profile.task is None:
        from winnowkv.prompt.classifier import task_profile

        profile = task_profile(text)
    asked = Budget.of(budget)
    check_decode_budget(decode_budget)
    loaded, tokenizer = load_model(model)
    ids = torch.tensor([encode(tokenizer, text, chat=uses_chat(chat, tokenizer))], device=loaded.device)
    limit, tokens = position_limit(loaded), ids.shape[1]
    if limit is not None and tokens + max_new_tokens > limit:
        raise InputError(
            f"the prompt has {tokens} tokens, with {max_new_tokens} new ones it passes the model's {limit} positions: "
            f"shorten it or lower --max-new-tokens"
        )
    token = None if explain is None else find_token(tokenizer, ids[0].tolist(), explain)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options: dict[str, Any] = {"decode_budget": decode_budget, "keep_scores": token is not None}
    with compress(loaded, policy, asked, task=profile, tokenizer=tokenizer, **options) as run:
        output = loaded.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=streamer, **sampling
        )
    answer = tokenizer.decode(output[0][tokens:], skip_special_tokens=True)
    report = run.report
    explained, its_text = [], ""
    if token is not None:
        explained = [run.explain(layer, token) for layer in range(len(report.kept_entries[0]))]
        its_text = tokenizer.decode([ids[0, token]])
    if as_json:
        found = {"explain": as_dicts(explained, its_text)} if explained else {}
        print(json.dumps({"answer": answer, "model": model, **report.to_dict(), **found}, indent=2, ensure_ascii=False))
        return
    from winnowkv.report import MIB, summary

    default = " (the default)" if asked == Budget(DEFAULT_BUDGET) else ""
    pace = f"{1000 / report.decode_ms_per_token:.1f} tokens/s" if report.decode_tokens else "one token"
    print(
        f"-- policy {report.policy}, budget {report.budget}{default}: {report.kept_bytes / MIB:.2f} of "
        f"{report.full_bytes / MIB:.2f} MiB kept, "
        f"{pace}, prefill {report.prefill_seconds:.2f} s, entries per layer {summary(report.kept_entries[0])}"
    )
    if report.decode_entries < report.decode_tokens:
        print(f"-- decode budget {decode_budget}: {report.decode_entries} entries held of {report.decode_tokens} new tokens")
    if profile.probability is not None:
        print(f"-- task: {profile.task}, probability {profile.probability:.2f} (classified; --task sets it)")
    for note in report.notes:
        print(f"-- note: {note}")
    if explained:
        print(*lines(explained, its_text), sep="\n")


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt's text from the argument, the file or standard input. Raises InputError if there is none."""
    if prompt is not None and file is not None:
        raise InputError("give the prompt as an argument or with --file, not both")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"prompt file {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    elif prompt is None or prompt == "-":
        if sys.stdin.isatty():
            raise InputError("no prompt: give one as an argument, with --file, or on standard input")
        text = sys.stdin.read()
    else:
        text = prompt
    if not text.strip():
        raise InputError("the prompt is empty: give at least one word")
    return text


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(generate)
