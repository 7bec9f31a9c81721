"""Errors of the server: OpenAI's form, with the id of the request, and never a path or a traceback."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from winnowkv.errors import BudgetError, InputError, PolicyError, UnknownContextError, WinnowError

KINDS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
    504: "timeout_error",
}  # fmt: skip
UNION_TAGS = {"str", "int", "float", "bool", "function-before", "function-after", "nullable"}
PLAIN_WORDS = {"missing": "is missing: give it", "extra_forbidden": "is not a field that this server knows: leave it out"}


class ApiError(Exception):
    """The answer to a request that is not served.

    Parameters
    ----------
    status: of HTTP. message: one sentence with value, limit and way out. code: for programs. param: field of the body.
    retry_after: seconds after which the client may try again; None if trying again would change nothing. headers: more of the
    answer's.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        retry_after: float | None = None, headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after
        self.more = dict(headers or {})

    def body(self, request_id: str) -> dict[str, Any]:
        """The error as OpenAI writes it, with the request's id."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {
            "error": {
                "message": self.message, "type": kind, "param": self.param, "code": self.code, "request_id": request_id,
            }
        }  # fmt: skip

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer: when to try again, or that OpenAI's clients should not, and those that were given."""
        if self.retry_after is not None:
            return {"retry-after": str(max(1, math.ceil(self.retry_after)))} | self.more
        return {"x-should-retry": "false"} | self.more if self.status >= 500 else self.more


class ClientGoneError(Exception):
    """The client has closed the connection: an answer would not be read."""


def of_winnow(error: WinnowError, param: str | None = None) -> ApiError:
    """What a client is told of an error of ours: what its request caused, and nothing of the server's files."""
    message = str(error)
    if isinstance(error, UnknownContextError):
        return ApiError(404, message, code="context_not_found", param="winnow_context")
    if isinstance(error, PolicyError):
        return ApiError(400, message, code="invalid_policy", param=param or "winnow.policy")
    if isinstance(error, BudgetError):
        return ApiError(400, message, code="invalid_budget", param=param or "winnow.budget")
    if isinstance(error, InputError):
        return ApiError(400, message, param=param)
    # Of profiles, models and stored caches: the message may name files of the server.
    why = "this server cannot serve what was asked for: its log says why under the request's id"
    return ApiError(400, why, code="unsupported_value", param=param)


def refusal(error: WinnowError) -> dict[str, str]:
    """What the log says of a request that was refused with an error of ours: its kind, and why if the client is not told."""
    told = isinstance(error, PolicyError | BudgetError | InputError)
    return {"kind": type(error).__name__} | ({} if told else {"why": str(error)})


def failed(error: BaseException | None) -> ApiError:
    """What a client is told of a request that ended with an error in the engine."""
    if isinstance(error, WinnowError):
        return of_winnow(error)
    return ApiError(500, "the request failed in the engine: the server's log says why under the request's id", code="engine")


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's or FastAPI's errors about a request; of a field that may be of several types, the deepest,
    and rather one about its value than that it is of another type."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    same = [error for error in errors if field_name(error["loc"]).startswith(field_name(first["loc"]))]
    first = max(same, key=lambda error: (len(field_name(error["loc"])), not error["type"].endswith("_type")))
    param = field_name(first["loc"])
    if first["type"] == "refused":  # our own, which may name a field deeper than where it was raised
        return ApiError(400, first["msg"], code="unsupported_value", param=first.get("ctx", {}).get("param") or param or None)
    if not param:
        return ApiError(400, "the body must be a JSON object, sent as application/json", code="invalid_body")
    words = PLAIN_WORDS.get(first["type"])
    message = f"{param} {words}" if words else f"{param}: {first['msg'][0].lower()}{first['msg'][1:]}"
    code = {"missing": "missing_field", "extra_forbidden": "unknown_field"}.get(first["type"], "invalid_value")
    return ApiError(400, message, code=code, param=param)


def field_name(places: Sequence[Any]) -> str:
    """``messages[0].content`` of the places that pydantic names, without the names of union members."""
    name = ""
    for place in places[1:] if places and places[0] in ("body", "query", "path") else places:
        if isinstance(place, int):
            name += f"[{place}]"
        elif place not in UNION_TAGS and not any(sign in place for sign in "[(-"):
            name += f".{place}" if name else str(place)
    return name


async def send_error(send: Any, error: ApiError, request_id: str, close: bool = False) -> None:
    """Answer with an error, below FastAPI; ``close`` asks the client to close the connection."""
    data = json.dumps(error.body(request_id), ensure_ascii=False).encode()
    named = {"content-type": "application/json", "content-length": str(len(data)), **error.headers}
    if close:
        named["connection"] = "close"
    headers = [(name.encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": data, "more_body": False})
