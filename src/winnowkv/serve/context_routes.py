"""Routes of stored contexts: a text is compressed once and asked by its id."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from winnowkv.budget import DEFAULT_BUDGET
from winnowkv.contexts.context import CONTEXT_ID
from winnowkv.contexts.making import ContextPlan, plan_context
from winnowkv.documents import Document
from winnowkv.engine.engine import Engine
from winnowkv.errors import InputError, WinnowError
from winnowkv.models.info import position_limit
from winnowkv.serve.context_files import Found
from winnowkv.serve.context_prompts import ContextPrompts
from winnowkv.serve.contexts import FILE_BYTES, ServedContexts
from winnowkv.serve.errors import ApiError, ClientGoneError, of_winnow
from winnowkv.serve.keys import Owner
from winnowkv.serve.objects import Answered, ErrorAnswer
from winnowkv.serve.prompts import PlainPrompts, PromptReader
from winnowkv.serve.requests import check_names_no_file
from winnowkv.serve.routes import ERRORS, errors
from winnowkv.serve.schemas import Strict, Text
from winnowkv.serve.serving import Serving, ServingNow

router = APIRouter(prefix="/v1", tags=["contexts"])
LONGEST_NAME = 200  # characters
TOKEN_BYTES = 8  # of a token id in a file, at most
MORE_ERRORS: dict[int | str, dict[str, Any]] = {
    403: {"model": ErrorAnswer, "description": "The context is the operator's"},
    507: {
        "model": ErrorAnswer,
        "description": "No room for another context, on disk or in memory, or the store cannot be written",
    },
}
ContextId = Annotated[str, Path(pattern=f"^{CONTEXT_ID.pattern}$", examples=["0" * 32])]


class ContextRequest(Strict):
    """``POST /v1/contexts``.

    ``portable``: every layer and KV head keeps equally many, so that vLLM serves the context, too; without, they are spread as
    the policy likes, which finds more if the questions are not known. ``study``: find out first what matters: ``lean`` reads
    the text again, ``full`` also writes about it, ``none`` does not; left out it is ``lean``, if there is neither ``hint`` nor
    ``policy``. ``hint``: what will be asked, as a question. ``system``: a system message before the text.
    """

    text: Text = Field(min_length=1)
    name: Text = Field("", max_length=LONGEST_NAME)
    hint: Text | None = Field(None, min_length=1)
    study: Literal["none", "lean", "full"] | None = None
    policy: str | None = Field(None, max_length=500, examples=["snapkv"])
    budget: int | float | Annotated[str, Field(max_length=40)] = Field(DEFAULT_BUDGET, examples=[0.12, 1024])
    system: Text | None = None
    portable: bool = True


class ContextObject(Answered):
    """A stored context.

    ``seen``: tokens of the text. ``kept``: entries per layer and KV head, mean over them. ``bytes``: of its file. ``chat``:
    whether it begins a turn of the model's chat template. ``created``: seconds since 1970, null if the store does not say.
    ``shared``: the operator's, visible to every key. ``error``: of a file that cannot be used, all else is null then.
    """

    id: str
    object: Literal["context"] = "context"
    name: str | None = None
    seen: int | None = None
    kept: int | None = None
    bytes: int | None = None
    policy: str | None = None
    budget: str | None = None
    portable: bool | None = None
    chat: bool | None = None
    created: int | None = None
    shared: bool | None = None
    error: str | None = None


class MadeContext(ContextObject):
    """A context that was just made. ``seconds``: reading and compressing it, without waiting. ``notes``: what to know."""

    seconds: float
    notes: list[str]


class ContextList(Answered):
    """All contexts that a key sees."""

    object: Literal["list"]
    data: list[ContextObject]


class DeletedContext(Answered):
    """A context that is gone; requests on it that were running go on."""

    id: str
    object: Literal["context.deleted"]
    deleted: Literal[True]


def context_prompts(serving: Serving, engine: Engine) -> PromptReader:
    """What reads prompts, for ``make_app(prompts=)``: on a server with a store one that knows its contexts."""
    settings = serving.settings
    if settings.store is None:
        return PlainPrompts(engine.tokenizer)
    memory, disk = int(settings.context_memory), int(settings.context_disk)
    contexts = ServedContexts(engine.model, settings.store, memory=memory, disk=disk, patience=settings.queue_deadline)
    serving.metrics.watch_contexts(lambda: contexts.used_bytes, lambda: contexts.reads)
    return ContextPrompts(engine.tokenizer, contexts, auto=settings.context_auto)


def contexts_of(serving: Serving) -> ServedContexts:
    """The contexts of a server. Raises ApiError if it keeps none."""
    if not isinstance(serving.prompts, ContextPrompts):
        raise ApiError(404, "this server keeps no contexts: start it with --store", code="no_contexts")
    return serving.prompts.contexts


@router.post("/contexts", response_model=MadeContext, responses=ERRORS | MORE_ERRORS)
async def make_context(
    body: Annotated[ContextRequest, Body()], request: Request, owner: Owner, serving: ServingNow
) -> Response:
    """Read a text, compress it and store it; requests name it as ``winnow_context``."""
    contexts = contexts_of(serving)
    plan = await asyncio.to_thread(planned, body, serving)
    size = plan.entries * contexts.entry_bytes
    written = size + plan.tokens * TOKEN_BYTES + FILE_BYTES
    await asyncio.to_thread(contexts.check_disk, written)
    making = asyncio.create_task(made(contexts, plan, size, written, body.name, owner, serving))
    gone = asyncio.create_task(left(request))
    try:
        async with asyncio.timeout(serving.settings.request_timeout):
            await asyncio.wait({making, gone}, return_when=asyncio.FIRST_COMPLETED)
    except TimeoutError:
        raise ApiError(
            504, f"the text was not read within {serving.settings.request_timeout:g} s: send a shorter one, or study=none",
            code="request_timeout",
        ) from None  # fmt: skip
    finally:
        gone.cancel()
        if not making.done():
            making.cancel()
    if not making.done():
        raise ClientGoneError
    found, seconds = making.result()
    answer = await asyncio.to_thread(shown, contexts, owner, found)
    return JSONResponse(answer | {"seconds": round(seconds, 3), "notes": list(plan.notes)})


@router.get("/contexts", response_model=ContextList, responses=errors(401, 404, 500, 503))
async def list_contexts(owner: Owner, serving: ServingNow) -> Response:
    """The contexts of the request's key, then the operator's."""
    contexts = contexts_of(serving)
    return JSONResponse({"object": "list", "data": await asyncio.to_thread(listed, contexts, owner)})


@router.get("/contexts/{context}", response_model=ContextObject, responses=errors(400, 401, 404, 500, 503))
async def get_context(context: ContextId, owner: Owner, serving: ServingNow) -> Response:
    """One context."""
    contexts = contexts_of(serving)

    def found() -> dict[str, Any]:
        return shown(contexts, owner, contexts.find(owner, context))

    return JSONResponse(await asyncio.to_thread(found))


@router.delete(
    "/contexts/{context}", response_model=DeletedContext, responses=errors(400, 401, 404, 500, 503) | {403: MORE_ERRORS[403]}
)
async def delete_context(context: ContextId, owner: Owner, serving: ServingNow) -> Response:
    """Delete a context of the request's key."""
    await asyncio.to_thread(contexts_of(serving).remove, owner, context)
    return JSONResponse({"id": context, "object": "context.deleted", "deleted": True})


def planned(body: ContextRequest, serving: Serving) -> ContextPlan:
    """What is asked, checked. Raises ApiError for what cannot be read or stored so."""
    check_names_no_file(body.policy, body.budget)
    engine, settings = serving.engine, serving.settings
    try:
        plan = plan_context(
            engine.model, engine.tokenizer, body.text, policy=body.policy, budget=body.budget, study=body.study, hint=body.hint,
            system=body.system, portable=body.portable,
        )  # fmt: skip
    except WinnowError as error:
        raise of_request(error) from None
    positions = position_limit(engine.model)
    for limit, what in (
        (settings.max_prompt_tokens, "this server's limit for prompts"),
        (None if positions is None else positions - 2 - plan.hint_tokens, "what the model's positions leave beside a question"),
    ):
        if limit is not None and plan.tokens > limit:
            raise ApiError(
                400, f"the text has {plan.tokens} tokens, {what} is {limit}: shorten it", code="context_length_exceeded",
                param="text",
            )  # fmt: skip
    return plan


async def made(
    contexts: ServedContexts, plan: ContextPlan, size: int, written: int, name: str, owner: str, serving: Serving
) -> tuple[Found, float]:
    """Read a text on the engine's thread, and store it; with the seconds of reading. Memory is set aside meanwhile."""
    release = await reserved(contexts, size)
    try:
        began = 0.0

        def work(between: Any) -> Document:
            nonlocal began
            began = time.perf_counter()
            return plan.read(between=between)

        try:
            document = await serving.loop.run_job(work, serving.engine.whole_bytes(plan.held_tokens))
            seconds = time.perf_counter() - began
            found = await asyncio.to_thread(contexts.store, owner, document, written, plan.portable, name)
        except WinnowError as error:
            raise of_request(error) from None
    finally:
        release()
    return found, seconds


async def reserved(contexts: ServedContexts, size: int) -> Callable[[], None]:
    """Set memory aside; what gives it back. If this is cancelled while it waits, what comes too late is given back."""
    waiting = asyncio.ensure_future(asyncio.to_thread(contexts.reserve, size))
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        waiting.add_done_callback(lambda late: None if late.exception() else late.result()())
        raise


def of_request(error: WinnowError) -> ApiError:
    """The answer to a text that cannot be read or stored as it was asked."""
    answer = of_winnow(error)
    if answer.param is not None:
        answer.param = answer.param.removeprefix("winnow.")
    elif isinstance(error, InputError):
        answer.code = answer.code or "invalid_value"
    return answer


async def left(request: Request) -> None:
    """Until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def shown(contexts: ServedContexts, owner: str, found: Found) -> dict[str, Any]:
    """A context in an answer."""
    context = found.context
    about = context.to_dict()
    del about["dtype"]
    made_at = contexts.created(owner, found)
    return {**about, "object": "context", "portable": found.portable, "created": made_at, "shared": found.shared}


def listed(contexts: ServedContexts, owner: str) -> list[dict[str, Any]]:
    """All contexts that an owner sees."""
    return [
        {"id": one, "object": "context", "error": f"context {one} cannot be used: delete it, and store the text anew"}
        if isinstance(one, str) else shown(contexts, owner, one)
        for one in contexts.listed(owner)
    ]  # fmt: skip
