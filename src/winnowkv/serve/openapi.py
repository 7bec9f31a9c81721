"""The OpenAPI document: as FastAPI makes it, with this server's errors in place of FastAPI's, and its keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

FASTAPIS = ("HTTPValidationError", "ValidationError")  # schemas of errors that never leave this server


def describe(app: FastAPI, keys: bool) -> None:
    """Have an application describe itself so; ``keys``: whether it asks for API keys."""
    made: Callable[[], dict[str, Any]] = app.openapi

    def page() -> dict[str, Any]:
        found = made()
        parts = found.setdefault("components", {})
        for name in FASTAPIS:
            parts.get("schemas", {}).pop(name, None)
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
