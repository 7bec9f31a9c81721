"""Logs with one JSON object a line, and the ids by which a request is found in them."""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time
from typing import Any, TextIO

GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}
LOGGERS = ("winnowkv.serve", "uvicorn.error")


def request_id(given: bytes | None) -> str:
    """The id that a request's ``X-Request-Id`` gives, if it is sane, else a new one."""
    text = (given or b"").decode("latin-1")
    return text if GIVEN_ID.fullmatch(text) else f"req-{secrets.token_hex(12)}"


def given(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as ``extra``; Ray adds a field of its own, with an underscore, to every record."""
    return {name: value for name, value in vars(record).items() if name not in STANDARD and not name.startswith("_")}


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time, level, message, what was given as ``extra``, and an error's trace."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(),
        }  # fmt: skip
        line |= given(record)
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class PlainLines(logging.Formatter):
    """A record as a line for people: time, level, message, and ``extra`` as ``name=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        more = "".join(f" {name}={value}" for name, value in given(record).items())
        text = f"{stamp} {record.levelname.lower()} {record.getMessage()}{more}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def set_up(as_json: bool = True, stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Write the server's and uvicorn's logs to a stream (standard error), and nowhere else."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if as_json else PlainLines())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
