"""The page at ``/``: its files, and what it offers to choose from. It asks this server alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from winnowkv.cache.compression import Compression
from winnowkv.engine.engine import Engine
from winnowkv.errors import WinnowError
from winnowkv.models.info import position_limit
from winnowkv.policies import names, policy_class
from winnowkv.policies.quality import LEVELS, with_quality
from winnowkv.serve.errors import ApiError
from winnowkv.serve.kept import MOST_EXPLAINED
from winnowkv.serve.objects import Answered
from winnowkv.serve.routes import errors
from winnowkv.serve.serving import Serving, ServingNow
from winnowkv.serve.settings import ServeSettings

router = APIRouter(tags=["page"])
# Everything that is served under /static/: name, folder of the package, type. Nothing else is, whatever a request names.
FILES: Mapping[str, tuple[str, str]] = {
    "page.css": ("serve/static", "text/css"),
    **{f"{name}.js": ("serve/static", "text/javascript") for name in ("page", "server", "answer", "kept", "words")},
    "icon.svg": ("serve/static", "image/svg+xml"),
    "explain.css": ("explain/data", "text/css"),
    "explain.js": ("explain/data", "text/javascript"),
}
POLICY_OF_CONTENT = {
    "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "img-src": "'self'", "connect-src": "'self'",
    "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'", "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}  # fmt: skip
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY_OF_CONTENT.items()),
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin", "cache-control": "no-cache",
}  # fmt: skip
EXAMPLE_CHARACTERS, EXAMPLE_PLACE = 12_000, 0.4  # of the example text, and where in it the answer stands


class Level(Answered):
    """A level of quality, and what it does."""

    name: str
    about: str


class PolicyChoice(Answered):
    """A policy that a request may name. ``levels``: of quality that it can be given. ``evicts``: whether the budget matters."""

    name: str
    purpose: str
    scope: str
    evicts: bool
    levels: list[str]


class Choices(Answered):
    """What ``winnow`` of a request may hold on this server.

    ``policy``, ``budget``, ``quality``: of requests that say nothing. ``positions``: of the model, prompt and answer together;
    null without a limit. ``explain_tokens``: most tokens of a prompt that can be explained.
    """

    model: str
    policy: str
    budget: int | float | str
    quality: str | None
    levels: list[Level]
    policies: list[PolicyChoice]
    positions: int | None
    max_prompt_tokens: int | None
    max_new_tokens: int
    max_body: int
    explain_tokens: int


@cache
def content(name: str, folder: str) -> bytes:
    """A file of the package."""
    return files("winnowkv").joinpath(folder, name).read_bytes()


@router.get("/", response_class=Response, responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}})
async def page() -> Response:
    """The page: a long text, a question, and the answers from the compressed and the full cache."""
    return Response(content("page.html", "serve/static"), media_type="text/html", headers=HEADERS)


@router.get("/static/example.json", response_class=Response, include_in_schema=False)
async def example() -> Response:
    """A text to try, and a question about it."""
    return Response(example_body(), media_type="application/json", headers=HEADERS)


@router.get("/static/{name}", response_class=Response, include_in_schema=False)
async def static(name: str) -> Response:
    """A file of the page."""
    if name not in FILES:
        raise ApiError(404, f"the page has no such file: it has {', '.join(FILES)}", code="unknown_route")
    folder, kind = FILES[name]
    return Response(content(name, folder), media_type=kind, headers=HEADERS)


@router.get("/v1/winnow/policies", response_model=Choices, responses=errors(401, 500, 503))
async def policies(serving: ServingNow) -> Response:
    """The policies, budgets and levels of quality that requests may name here."""
    return JSONResponse(await asyncio.to_thread(choices, serving))


@cache
def example_body() -> bytes:
    """Essays of this project's own with a sentence hidden in them, and the question that it answers."""
    text = content("haystack.txt", "evaluate/needle/data").decode()
    hidden = json.loads(content("needles.jsonl", "evaluate/needle/data").splitlines()[0])
    parts = text[: text.index("\n\n", EXAMPLE_CHARACTERS)].split("\n\n")
    at = int(len(parts) * EXAMPLE_PLACE)
    parts[at] = f"{parts[at]} {hidden['needle']}"
    return json.dumps({"text": "\n\n".join(parts), "question": hidden["question"]}).encode()


def choices(serving: Serving) -> dict[str, Any]:
    """The body of :func:`policies`."""
    settings, engine = serving.settings, serving.engine
    known = [policy_choice(engine, settings, name) for name in dict.fromkeys([settings.policy, *names()])]
    return {
        "model": settings.model, "policy": settings.policy, "budget": settings.budget, "quality": settings.quality,
        "levels": [{"name": name, "about": about_level(options)} for name, options in LEVELS.items()],
        "policies": [choice for choice in known if choice is not None],
        "positions": position_limit(engine.model), "max_prompt_tokens": settings.max_prompt_tokens,
        "max_new_tokens": settings.max_new_tokens, "max_body": settings.max_body, "explain_tokens": MOST_EXPLAINED,
    }  # fmt: skip


def policy_choice(engine: Engine, settings: ServeSettings, spec: str) -> dict[str, Any] | None:
    """One policy; None for one that no request of this model can be served with."""
    try:
        asked = Compression.of(engine.model, spec, settings.budget, task_is_known=False)
        asked.check_study()
    except WinnowError:
        return None
    kind = policy_class(asked.policy.name)
    levels = []
    for level in LEVELS:
        try:
            with_quality(spec, level)
            levels.append(level)
        except WinnowError:
            pass
    purpose = kind.purpose or kind.scope
    return {"name": spec, "purpose": purpose, "scope": kind.scope, "evicts": asked.policy.evicts, "levels": levels}


def about_level(options: Mapping[str, Any]) -> str:
    """What a level of quality does, in a sentence."""
    if not options["lookahead"]:
        return "Chooses from the prompt alone: least memory, no pause."
    words = f"Holds the whole text for the first {options['lookahead']} tokens of the answer, and keeps what they looked for"
    if options["draft"]:
        words += f" and {options['rounds']} drafts of {options['draft']} tokens"
    return f"{words}."
