"""The application: routes, layers around them, and what happens when it starts and stops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import winnowkv
from winnowkv.engine.engine import Engine
from winnowkv.errors import WinnowError
from winnowkv.serve import context_routes, page, routes
from winnowkv.serve.errors import ApiError, of_validation, of_winnow, refusal
from winnowkv.serve.keys import KeyCheck, Keys
from winnowkv.serve.limits import BodyLimit, Observed
from winnowkv.serve.loop import MOST_RETRY, EngineLoop
from winnowkv.serve.metrics import CONTENT_TYPE, Metrics
from winnowkv.serve.objects import Health
from winnowkv.serve.openapi import describe
from winnowkv.serve.prompts import PromptReader
from winnowkv.serve.serving import Serving, ServingNow
from winnowkv.serve.settings import ServeSettings

logger = logging.getLogger("winnowkv.serve")
state_routes = APIRouter(tags=["state"])
PLAIN_TEXT = {"text/plain": {"schema": {"type": "string"}}}
MakePrompts = Callable[[Serving, Engine], PromptReader]


def make_app(
    engine: Engine | Callable[[], Engine],
    settings: ServeSettings | None = None,
    *,
    routers: Sequence[APIRouter] = (),
    prompts: MakePrompts | None = None,
    loaded: Callable[[Serving], None] | None = None,
) -> FastAPI:
    """The application, for uvicorn or any other ASGI server that runs its lifespan.

    Parameters
    ----------
    engine: the engine, or what makes it: called in a thread when the application starts, while ``/ready`` answers 503.
    settings: what is served, and its limits; made with the engine's own settings if None.
    routers: further routes. They get the server as an argument of the type ``ServingNow`` and the owner of the request's key
        as one of the type ``Owner``; what they raise (:class:`ApiError`, WinnowErrors) becomes an answer in OpenAI's form.
    prompts: makes what reads prompts, once the engine is there; :func:`context_prompts` if None.
    loaded: called on the event loop once the server is ready, or has failed (``serving.failure``).

    ``app.state.serving`` is the :class:`Serving`.
    """
    settings = settings or ServeSettings()
    serving = Serving(settings)
    make_prompts: MakePrompts = prompts or context_routes.context_prompts

    async def load() -> None:
        try:
            made = engine if isinstance(engine, Engine) else await asyncio.to_thread(engine)
            reader = await asyncio.to_thread(make_prompts, serving, made)
            loop = EngineLoop(made, settings, serving.metrics)
            serving.metrics.watch(made, lambda: loop.waiting)
            loop.start()
            serving.begin(made, loop, reader)
        except Exception as error:
            serving.failure = error
            if not isinstance(error, WinnowError):
                logger.exception("the model could not be loaded")
        if loaded is not None:
            loaded(serving)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(load())
        if isinstance(engine, Engine):
            await loading
        yield
        if not loading.done():
            loading.cancel()
        if serving.loaded:
            await serving.loop.stop(settings.drain)

    app = FastAPI(
        title="winnowkv", version=winnowkv.__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="OpenAI's API over compressed KV caches. Fields that would change an answer and cannot are refused.",
    )  # fmt: skip
    app.state.serving = serving
    for router in (state_routes, routes.router, context_routes.router, page.router, *routers):
        app.include_router(router)
    describe(app, settings)
    guard(app, settings, serving.metrics)
    return app


def guard(app: Starlette, settings: ServeSettings, metrics: Metrics) -> None:
    """Errors in OpenAI's form, and the layers around the routes: ids and logs, CORS, keys, limits of bodies."""
    app.add_exception_handler(ApiError, answer_error)
    app.add_exception_handler(WinnowError, answer_error)
    app.add_exception_handler(RequestValidationError, answer_error)
    app.add_exception_handler(HTTPException, answer_error)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, most=int(settings.max_body), seconds=settings.body_timeout)
    app.add_middleware(KeyCheck, keys=Keys(settings.api_keys))
    if settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors), allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "x-request-id"], expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
    app.add_middleware(Observed, metrics=metrics)


async def answer_error(request: Request, error: Exception) -> Response:
    """An error as OpenAI writes it."""
    name = request.scope["state"]["request_id"]
    if isinstance(error, RequestValidationError):
        error = of_validation(error.errors())
    elif isinstance(error, WinnowError):
        logger.info("refused", extra={"request_id": name, **refusal(error)})
        error = of_winnow(error)
    elif isinstance(error, HTTPException):
        error = of_http(error, request)
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(name), error.status, headers=error.headers)


def of_http(error: HTTPException, request: Request) -> ApiError:
    """What FastAPI answers by itself: unknown routes, wrong methods, bodies that are no JSON."""
    if error.status_code == 404:
        return ApiError(404, "there is no such route: see /openapi.json", code="unknown_route")
    if error.status_code == 405:
        return ApiError(
            405, f"{request.method} is not served here: see /openapi.json", code="unknown_method", headers=error.headers
        )
    return ApiError(error.status_code, "the body is not valid JSON in UTF-8", code="invalid_json")


@state_routes.get("/health", response_model=Health, responses=routes.errors(503))
async def health(serving: ServingNow) -> Response:
    """Whether the process is alive and its engine's thread runs, if it was started."""
    if serving.state == "failed":
        raise ApiError(503, "the engine has failed: start the server anew", code="failed")
    return JSONResponse({"status": "ok"})


@state_routes.get("/ready", response_model=Health, responses=routes.errors(503))
async def ready(serving: ServingNow) -> Response:
    """Whether requests are served now."""
    if serving.state != "ready":
        raise ApiError(503, f"the server is {serving.state}", code=serving.state, retry_after=MOST_RETRY / 6)
    return JSONResponse({"status": "ready"})


@state_routes.get("/metrics", response_class=Response, responses={200: {"content": PLAIN_TEXT}, **routes.errors(401)})
async def metrics(serving: ServingNow) -> Response:
    """What is counted, in Prometheus' text format."""
    return Response(await asyncio.to_thread(serving.metrics.page), media_type=CONTENT_TYPE)
