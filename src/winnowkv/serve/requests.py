"""What a request asks of the engine: its prompts, how they are continued, and what is kept of them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from winnowkv.engine.sampling import LOWEST_TEMPERATURE, Sampling
from winnowkv.errors import WinnowError
from winnowkv.files import shown
from winnowkv.models.info import position_limit
from winnowkv.serve.errors import ApiError, of_winnow
from winnowkv.serve.kept import check_explained, check_explained_tokens
from winnowkv.serve.prompts import Prompt, PromptReader, release
from winnowkv.serve.schemas import ChatRequest, CompletionRequest, WinnowOptions
from winnowkv.serve.settings import ServeSettings
from winnowkv.serve.ticket import Asked, How

# What a request may write into a policy's spec: nothing that could be the name of a file.
SPEC = re.compile(r"[A-Za-z0-9_.:=,+-]*")
FILE_OPTION = re.compile(r"(^|:)profile=")
OWN_SETTINGS = {"policy", "budget", "quality", "task", "explain"}  # with these no context is gone on from unasked
BUDGET = re.compile(r"[0-9.eE+-]+|auto(:[0-9.]+)?")


def check_model(name: str, settings: ServeSettings) -> None:
    """Raise ApiError of status 404 for a model that is not served."""
    if name != settings.model:
        raise ApiError(
            404, f"model {shown(name)} is not served: there is {settings.model}", code="model_not_found", param="model"
        )  # fmt: skip


def asked_of(
    body: ChatRequest | CompletionRequest, reader: PromptReader, model: Any, settings: ServeSettings, owner: str
) -> Asked:
    """What a request asks. Raises ApiError for what no engine could be asked."""
    check_model(body.model, settings)
    if body.n > settings.max_rows:
        raise ApiError(
            400, f"n={body.n} choices decode together, and this server has {settings.max_rows} rows: ask for fewer",
            code="invalid_value", param="n",
        )  # fmt: skip
    field = "max_completion_tokens" if getattr(body, "max_completion_tokens", None) is not None else "max_tokens"
    if body.asked_tokens is not None and body.asked_tokens > settings.max_new_tokens:
        raise ApiError(
            400, f"{field}={body.asked_tokens} passes the server's limit of {settings.max_new_tokens}: ask for fewer",
            code="invalid_value", param=field,
        )  # fmt: skip
    if body.asked_tokens is not None and body.min_tokens > body.asked_tokens:
        raise ApiError(
            400, f"min_tokens={body.min_tokens} is above {field}={body.asked_tokens}: lower the first or raise the second",
            code="invalid_value", param="min_tokens",
        )  # fmt: skip
    chat, context, options = isinstance(body, ChatRequest), context_of(body), options_of(body.winnow, settings)
    own, explain = bool(options.keys() & OWN_SETTINGS), bool(options.get("explain"))
    count = 1 if isinstance(body, ChatRequest) else len(body.prompts)
    if explain:
        check_explained(count * body.n, context)

    def read() -> list[Prompt]:
        found: list[Prompt] = []
        try:
            if isinstance(body, ChatRequest):
                messages = [{"role": one.role.replace("developer", "system"), "content": one.text} for one in body.messages]
                found.append(reader.chat(messages, context, owner, own=own))
            else:
                found += (reader.text(prompt, context, owner) for prompt in body.prompts)
        except BaseException:
            release(found)
            raise
        return found

    def how(prompt: Prompt) -> How:
        if explain:
            check_explained_tokens(len(prompt.ids))
        temperature = body.temperature if body.temperature >= LOWEST_TEMPERATURE else 0.0  # some clients write 1e-8 for 0
        before = 0 if prompt.after is None else prompt.after.get_seq_length()
        new = new_tokens(len(prompt.ids) + before, body.asked_tokens, model, settings, chat)
        try:
            sampling = Sampling(
                max_new_tokens=new, min_new_tokens=body.min_tokens, temperature=temperature, top_p=body.top_p,
                top_k=max(body.top_k, 0), seed=body.seed, stop=body.stops, logprobs=body.top, ignore_eos=body.ignore_eos,
                n=body.n,
            )  # fmt: skip
        except WinnowError as error:
            raise of_winnow(error) from None
        return kept_whole(How(sampling, options), prompt, settings)

    return Asked(read, how, count, body.n)


def kept_whole(how: How, prompt: Prompt, settings: ServeSettings) -> How:
    """The same, but a short prompt whose request says nothing of policy and budget is kept whole."""
    own = {"policy", "budget", "quality"} & set(how.options)
    if own or prompt.after is not None or len(prompt.ids) > settings.keep_whole or settings.policy == "full":
        return how
    note = f"the prompt has {len(prompt.ids)} tokens, and up to {settings.keep_whole} are kept whole (--keep-whole)"
    return replace(how, options={**how.options, "policy": "full"}, note=note)


def context_of(body: ChatRequest | CompletionRequest) -> str | None:
    """The context that a request names. Raises ApiError if it names two."""
    here, there = body.winnow_context, None if body.winnow is None else body.winnow.context
    if here is not None and there is not None and here != there:
        raise ApiError(
            400, f"winnow_context={shown(here)} contradicts winnow.context={shown(there)}: give one of them",
            code="invalid_value", param="winnow_context",
        )  # fmt: skip
    return there if here is None else here


def new_tokens(tokens: int, asked: int | None, model: Any, settings: ServeSettings, chat: bool) -> int:
    """Most new tokens of a prompt of that length. Raises ApiError for a prompt that is too long."""
    param, positions = "messages" if chat else "prompt", position_limit(model)
    least = 1 if asked is None else asked
    limit, what = settings.max_prompt_tokens, "this server's limit for prompts"
    if limit is None or (positions is not None and positions - least < limit):
        limit = None if positions is None else positions - least
        what = f"what the model's {positions} positions leave beside {least} new ones"
    if limit is not None and tokens > limit:
        raise ApiError(
            400, f"the prompt has {tokens} tokens, {what} is {max(limit, 0)}: shorten it{' or lower max_tokens' * (least > 1)}",
            code="context_length_exceeded", param=param,
        )  # fmt: skip
    if asked is not None:
        return asked
    most = min(settings.default_new_tokens, settings.max_new_tokens)
    return most if positions is None else min(most, positions - tokens)


def check_names_no_file(spec: str | None, budget: Any, fields: str = "") -> None:
    """Raise ApiError for a policy or budget that would name a file; ``fields`` stands before their names in the body."""
    if spec is not None and (not SPEC.fullmatch(spec) or FILE_OPTION.search(spec)):
        raise ApiError(
            400, f"policy {shown(spec)} cannot be asked for: a spec is a name and options such as snapkv:observe=16, and no "
            "option may name a file", code="invalid_policy", param=f"{fields}policy",
        )  # fmt: skip
    if isinstance(budget, str) and not BUDGET.fullmatch(budget):
        raise ApiError(
            400, f"budget {shown(budget)} cannot be asked for: give entries (128), a fraction (0.12) or auto:0.95",
            code="invalid_budget", param=f"{fields}budget",
        )  # fmt: skip


def options_of(winnow: WinnowOptions | None, settings: ServeSettings) -> dict[str, Any]:
    """Options of :meth:`Engine.submit` for what a request says of winnow, without what it leaves out.

    Raises ApiError for a policy or budget that would name a file.
    """
    default = {} if settings.decode_budget is None else {"decode_budget": settings.decode_budget}
    if winnow is None:
        return default
    spec = winnow.policy
    check_names_no_file(spec, winnow.budget, "winnow.")
    heard = {name: value for name in ("lookahead", "draft") if (value := getattr(winnow, name)) is not None}
    if heard:
        spec = ":".join([spec or settings.policy, *(f"{name}={value}" for name, value in heard.items())])
    given = {
        "policy": spec, "budget": winnow.budget, "quality": winnow.quality, "task": winnow.task,
        "decode_budget": winnow.decode_budget, "explain": winnow.explain or None,
    }  # fmt: skip
    return default | {name: value for name, value in given.items() if value is not None}
