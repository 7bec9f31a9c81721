"""API keys: who may ask, and whose a context is."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request

from winnowkv.errors import InputError
from winnowkv.files import read_text
from winnowkv.serve.errors import ApiError, send_error

OPEN_PATHS = ("/", "/health", "/ready", "/openapi.json")  # also without a key, and everything under OPEN_FOLDERS
OPEN_FOLDERS = ("/static/",)
NO_KEY = ""  # owner of requests to a server without keys
OWNER_CHARACTERS = 16


def owner_name(key: str) -> str:
    """A key's identity in logs and for ownership: the beginning of its hash, from which the key cannot be had."""
    return hashlib.sha256(b"winnowkv owner " + key.encode()).hexdigest()[:OWNER_CHARACTERS]


class Keys:
    """The keys of a server. With none, every request is let in, and its owner is :data:`NO_KEY`."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._known = [(hashlib.sha256(key.encode()).digest(), owner_name(key)) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._known)

    def owner(self, authorization: str | None) -> str | None:
        """Whose key an ``Authorization`` header names; None for none that is known.

        Every key is compared, in constant time, so that the time taken says nothing about any of them.
        """
        scheme, _, given = (authorization or "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, owner in self._known:
            if hmac.compare_digest(known, digest):
                found = owner
        return found if scheme.lower() == "bearer" else None


class KeyCheck:
    """ASGI: lets requests with a key through and notes whose it is; answers the others with 401."""

    def __init__(self, app: Any, keys: Keys) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state, path = scope.setdefault("state", {}), scope["path"]
        state["owner"] = NO_KEY
        if self.keys:
            named = dict(scope["headers"]).get(b"authorization")
            owner = self.keys.owner(named.decode("latin-1") if named else None)
            if owner is None and path not in OPEN_PATHS and not path.startswith(OPEN_FOLDERS):
                why = "the API key is not one of this server's" if named else "an API key is missing"
                refused = ApiError(401, f"{why}: send it as 'Authorization: Bearer KEY'", code="invalid_api_key")
                await send_error(send, refused, state["request_id"], close=True)
                return
            state["owner"] = owner or NO_KEY
        await self.app(scope, receive, send)


def owner_of(request: Request) -> str:
    """Whose key a request names, as :func:`owner_name` writes it; :data:`NO_KEY` on a server without keys."""
    owner: str = request.scope["state"]["owner"]
    return owner


Owner = Annotated[str, Depends(owner_of)]


def read_keys(file: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; blank lines and those that begin with ``#`` are left out.

    Raises InputError for a file that cannot be read or has none.
    """
    text = read_text(file, lambda why: InputError(f"--api-key-file {file} {why}"))
    keys = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    if not keys:
        raise InputError(f"--api-key-file {file} has no key in it: write one a line")
    return keys
