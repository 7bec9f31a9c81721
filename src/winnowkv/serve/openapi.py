"""The OpenAPI document: as FastAPI makes it, with this server's errors in place of FastAPI's, its streams, keys and limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from winnowkv.serve.objects import ChatChunk, ErrorAnswer, TextCompletion
from winnowkv.serve.settings import ServeSettings

FASTAPIS = ("HTTPValidationError", "ValidationError")  # schemas of errors that never leave this server
STREAMED: dict[str, type[BaseModel]] = {"/v1/chat/completions": ChatChunk, "/v1/completions": TextCompletion}
REF = "#/components/schemas/{model}"
REQUESTS = ("ChatRequest", "CompletionRequest")


def describe(app: FastAPI, settings: ServeSettings) -> None:
    """Have an application describe itself so."""
    made: Callable[[], dict[str, Any]] = app.openapi
    keys = bool(settings.api_keys)

    def page() -> dict[str, Any]:
        found = made()
        parts = found.setdefault("components", {})
        for name in FASTAPIS:
            parts.get("schemas", {}).pop(name, None)
        for name in REQUESTS:
            limit(parts["schemas"][name]["properties"], settings)
        for path, chunk in STREAMED.items():
            own = chunk.model_json_schema(mode="serialization", ref_template=REF)
            for name, schema in {**own.pop("$defs", {}), chunk.__name__: own}.items():
                parts["schemas"].setdefault(name, schema)
            found["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"] = {"itemSchema": event_of(chunk)}
        if keys:
            parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for methods in found["paths"].values():
            for operation in methods.values():
                answers = operation["responses"]
                answers.pop("422", None)  # such requests are answered with 400
                if keys and "401" in answers:
                    operation["security"] = [{"key": []}]
        return found

    app.openapi = page  # type: ignore[method-assign]


def event_of(chunk: type[BaseModel]) -> dict[str, Any]:
    """The schema of a server-sent event, OpenAPI 3.2's ``itemSchema``: a chunk, an error, or the terminator."""
    data = {"anyOf": [{"$ref": REF.format(model=one.__name__)} for one in (chunk, ErrorAnswer)]}
    as_json = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {"type": "object", "properties": {"data": {"anyOf": [{"const": "[DONE]"}, as_json]}}, "required": ["data"]}


def limit(fields: dict[str, Any], settings: ServeSettings) -> None:
    """Write this server's model and limits into the schemas of a request's fields."""
    fields["model"] |= {"enum": [settings.model], "examples": [settings.model]}
    for name, most in (
        ("n", settings.max_rows), ("max_tokens", settings.max_new_tokens), ("max_completion_tokens", settings.max_new_tokens),
        ("min_tokens", settings.max_new_tokens),
    ):  # fmt: skip
        field = fields.get(name, {})
        for schema in (field, *field.get("anyOf", ())):
            if "maximum" in schema:
                schema["maximum"] = min(schema["maximum"], most)
