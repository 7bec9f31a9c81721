"""OpenAI's routes: chat, completions, models."""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse

from winnowkv.errors import WinnowError
from winnowkv.models.info import position_limit
from winnowkv.serve.answers import Answer, ChatAnswer, TextAnswer, problem
from winnowkv.serve.errors import ApiError, ClientGoneError, of_winnow, refusal
from winnowkv.serve.keys import Owner
from winnowkv.serve.objects import ChatCompletion, ErrorAnswer, ModelCard, ModelList, TextCompletion
from winnowkv.serve.requests import asked_of, check_model
from winnowkv.serve.schemas import ChatRequest, CompletionRequest
from winnowkv.serve.serving import Serving, ServingNow
from winnowkv.serve.ticket import Asked, Ticket

logger = logging.getLogger("winnowkv.serve")
router = APIRouter(prefix="/v1", tags=["OpenAI"])
WHEN = {
    400: "A field cannot be honoured, or the prompt is too long",
    401: "No API key, or one that is not known",
    404: "No such model or context",
    408: "The body came too slowly",
    413: "The body is too large",
    429: "The queue is full, or the request was not begun in time; see Retry-After",
    500: "The server failed; its log says why under the request's id",
    503: "The server is loading or stopping; see Retry-After",
    504: "The request was not answered within its time",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in WHEN.items()
}  # fmt: skip
STREAM: dict[str, Any] = {"text/event-stream": {}}  # with stream=true; openapi.py says what its events are


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Of :data:`ERRORS` those with these statuses, for a route's ``responses``."""
    return {status: ERRORS[status] for status in statuses}


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    responses={200: {"content": STREAM, "description": "The answer"}, **ERRORS},
)
async def chat_completions(
    body: Annotated[ChatRequest, Body()], request: Request, owner: Owner, serving: ServingNow
) -> Response:
    """Continue a conversation."""
    return await answered(body, request, owner, serving, ChatAnswer)


@router.post(
    "/completions",
    response_model=TextCompletion,
    responses={200: {"content": STREAM, "description": "The answer"}, **ERRORS},
)
async def completions(
    body: Annotated[CompletionRequest, Body()], request: Request, owner: Owner, serving: ServingNow
) -> Response:
    """Continue one text, or several."""
    return await answered(body, request, owner, serving, TextAnswer)


@router.get("/models", response_model=ModelList, responses=errors(401, 500, 503))
async def models(serving: ServingNow) -> Response:
    """The served model."""
    return JSONResponse({"object": "list", "data": [card(serving)]})


@router.get("/models/{model:path}", response_model=ModelCard, responses=errors(401, 404, 500, 503))
async def model_card(model: str, serving: ServingNow) -> Response:
    """One model."""
    check_model(model, serving.settings)
    return JSONResponse(card(serving))


def card(serving: Serving) -> dict[str, Any]:
    """What ``/v1/models`` says of the served model."""
    return {
        "id": serving.settings.model, "object": "model", "created": serving.created, "owned_by": "winnowkv",
        "max_model_len": position_limit(serving.engine.model),
    }  # fmt: skip


async def answered(
    body: ChatRequest | CompletionRequest, request: Request, owner: str, serving: Serving, kind: type[Answer]
) -> Response:
    """The answer to a request; errors before its first event have a status of their own, streamed or not."""
    asked = asked_of(body, serving.prompts, serving.engine.model, serving.settings, owner)
    state = request.scope["state"]
    if serving.settings.log_prompts:
        logger.info("prompt", extra={"request_id": state["request_id"], "body": body.model_dump(exclude_unset=True)})
    ticket = await submitted(request, serving, asked)
    gone = asyncio.create_task(watch(request, ticket))
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    answer = kind(ticket, serving.engine.tokenizer, serving.settings, choices=body.n, include_usage=include_usage)
    stream = None
    try:
        await serving.loop.begin(ticket)
        events = await ticket.events()
        error = answer.take(events)
        if error is None and not events:  # cancelled before all prompts were submitted
            error = problem(ticket, None, serving.settings)
        if error is not None:
            raise error
        if body.stream:
            stream = EventStream(answer, events, gone, state, serving.settings.write_timeout)
            return stream
        while events := await ticket.events():
            if (error := answer.take(events)) is not None:
                raise error
        await answer.explain()
        whole = answer.whole()
        state["log"] = log_of(answer)
        if serving.settings.log_prompts:
            logger.info("answer", extra={"request_id": ticket.id, "choices": whole["choices"]})
        return JSONResponse(whole)
    finally:
        if stream is None:
            gone.cancel()
            ticket.cancel("disconnected")


async def submitted(request: Request, serving: Serving, asked: Asked) -> Ticket:
    """The request on its way. Raises ApiError for what is refused."""
    try:
        return await serving.loop.submit(request.scope["state"]["request_id"], asked)
    except WinnowError as error:
        logger.info("refused", extra={"request_id": request.scope["state"]["request_id"], **refusal(error)})
        raise of_winnow(error) from None


async def watch(request: Request, ticket: Ticket) -> None:
    """Cancel a request as soon as its client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.cancel("disconnected")


def log_of(answer: Answer) -> dict[str, Any]:
    """What a log line says of an answer: numbers, no texts."""
    ends = answer.completions.values()
    ticket = answer.ticket
    return {
        "prompt_tokens": sum(len(prompt.ids) for prompt in ticket.prompts), "generated_tokens": ticket.generated,
        "finish": ",".join(sorted({ended.finish_reason for ended in ends})) or None, "cancelled": ticket.why,
    }  # fmt: skip


class EventStream(Response):
    """A streamed answer: headers and the first events at once, then each batch of events as it comes."""

    media_type = "text/event-stream"

    def __init__(
        self, answer: Answer, begun: list[tuple[int, Any]], gone: asyncio.Task[None], state: dict[str, Any], timeout: float
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._answer, self._begun, self._gone, self._state, self._timeout = answer, begun, gone, state, timeout

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the stream; a client that leaves, or reads nothing for too long, ends the request."""
        answer, ticket = self._answer, self._answer.ticket
        error: ApiError | None = None

        async def write(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(self._timeout):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await write(answer.first() + answer.chunks(self._begun))
            while error is None and (events := await ticket.events()):
                error = answer.take(events)
                if error is None:
                    await write(answer.chunks(events))
            if error is not None:
                ticket.cancel("failed")
            else:
                await answer.explain()
            await write(answer.last(error), more=False)
        except TimeoutError:
            ticket.cancel("slow")
            raise ClientGoneError from None
        finally:
            self._gone.cancel()
            ticket.cancel("disconnected")
            self._state["log"] = log_of(answer) | ({"error_code": error.code} if error is not None else {})
