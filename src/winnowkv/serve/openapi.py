"""The OpenAPI document: as FastAPI makes it, with this server's errors in place of FastAPI's, its keys and its limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from winnowkv.serve.settings import ServeSettings

FASTAPIS = ("HTTPValidationError", "ValidationError")  # schemas of errors that never leave this server
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
