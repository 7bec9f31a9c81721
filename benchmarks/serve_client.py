"""A client of completion servers on asyncio alone: streams with the time of every chunk, aborts, and figures in percentiles.

It sends to winnowkv's server and to vLLM's the same bytes, and costs little beside them: no HTTP library, no checks of types.
As a script it makes the calls of a job in a process of its own:

    python benchmarks/serve_client.py JOB.json

A job is ``{"port": 8000, "calls": [{"body": {...}}, ...], "clients": 16}``; the answer is one line of JSON with every outcome
and the processor time that the client took.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
COMPLETIONS = "/v1/completions"
MOST_LINE = 2**20  # bytes of a line of a head
PERCENTILES = (50, 95, 99)


@dataclass
class Outcome:
    """What came of one call.

    Attributes
    ----------
    status: of HTTP, 0 if none came. begun, ended: by ``time.time()``, which processes share. times: when each chunk with a
    choice came, which is one token unless chunks are joined. texts, finishes: of each choice. done: whether ``[DONE]`` came.
    aborted: the client closed the connection. error: what went wrong, in the server's words or the connection's.
    """

    status: int = 0
    begun: float = 0.0
    ended: float = 0.0
    times: list[float] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    done: bool = False
    usage: dict[str, Any] | None = None
    aborted: bool = False
    error: str | None = None
    request_id: str | None = None
    retry_after: str | None = None
    number: int = 0

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.texts.get(0, "")

    @property
    def tokens(self) -> int:
        """Generated tokens: those that usage counts, else the chunks."""
        return self.usage["completion_tokens"] if self.usage else len(self.times)

    @property
    def whole(self) -> bool:
        """Whether the stream ended as it should: a reason for each choice that began, and the terminator."""
        ended = self.finishes.keys() >= self.texts.keys() and set(self.finishes.values()) <= {"stop", "length"}
        return self.status == 200 and self.done and bool(self.finishes) and ended and self.error is None


class EndedError(ConnectionError):
    """The connection was closed before the answer's end."""


async def head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer, names in small letters."""
    line = await reader.readline()
    if not line:
        raise EndedError("the connection was closed before an answer came")
    status, headers = int(line.split()[1]), {}
    while (line := await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return status, headers


async def parts(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body, as it comes."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while True:
            line = await reader.readline()
            if not line.strip():
                raise EndedError("the connection was closed within the answer")
            size = int(line.split(b";")[0], 16)
            if not size:
                return
            yield await reader.readexactly(size)
            await reader.readexactly(2)
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while data := await reader.read(2**16):
            yield data


async def request(
    port: int, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which a request was sent."""
    reader, writer = await asyncio.open_connection(HOST, port, limit=MOST_LINE)
    named = {"host": f"{HOST}:{port}", "connection": "close", "content-length": str(len(body)), **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    writer.write(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body)
    return reader, writer


async def ask(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """Status and whole body of one request."""
    data = b"" if body is None else json.dumps(body).encode()
    more = {"content-type": "application/json", **(headers or {})}
    reader, writer = await request(port, method, path, data, more)
    try:
        status, found = await head(reader)
        return status, b"".join([part async for part in parts(reader, found)])
    finally:
        writer.close()


async def stream(
    port: int, body: dict[str, Any], *, path: str = COMPLETIONS, abort_after: int | None = None, number: int = 0,
    times: list[float] | None = None,
) -> Outcome:  # fmt: skip
    """Send one request with ``stream``.

    ``abort_after``: chunks after which the client goes, 0 for before the first. ``times``: takes the times as they come.
    """
    out = Outcome(begun=time.time(), number=number, times=[] if times is None else times)
    writer = None
    try:
        data = json.dumps({**body, "stream": True}, separators=(",", ":")).encode()
        reader, writer = await request(port, "POST", path, data, {"content-type": "application/json"})
        await writer.drain()
        if abort_after == 0:
            out.aborted = True
            return out
        out.status, headers = await head(reader)
        out.request_id, out.retry_after = headers.get("x-request-id"), headers.get("retry-after")
        if out.status != 200:
            out.error = said(b"".join([part async for part in parts(reader, headers)]))
            return out
        waiting = b""
        async for part in parts(reader, headers):
            *events, waiting = (waiting + part).split(b"\n\n")
            now = time.time()
            for event in events:
                take(out, event, now)
            if abort_after is not None and len(out.times) >= abort_after:
                out.aborted = True
                return out
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        out.error = f"{type(error).__name__}: {error}"
    finally:
        out.ended = time.time()
        if writer is not None:
            writer.transport.abort() if out.aborted else writer.close()
    return out


def take(out: Outcome, event: bytes, now: float) -> None:
    """Note one server-sent event."""
    if not event.startswith(b"data: "):
        return
    if event == b"data: [DONE]":
        out.done = True
        return
    chunk = json.loads(event[6:])
    if "error" in chunk:
        out.error = said(event[6:])
    out.usage = chunk.get("usage") or out.usage
    for choice in chunk.get("choices", ()):
        delta = choice["text"] if "text" in choice else choice["delta"].get("content")
        if "text" in choice or choice["delta"].get("role") is None:  # a chat's first chunk is no token
            out.times.append(now)
        index = choice["index"]
        out.texts[index] = out.texts.get(index, "") + (delta or "")
        if choice["finish_reason"]:
            out.finishes[index] = choice["finish_reason"]


def said(body: bytes) -> str:
    """What an error says, with the request's id if it names one."""
    try:
        error = json.loads(body)["error"]
        return f"{error['code']}: {error['message']} ({error.get('request_id')})"
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")


async def make(port: int, calls: Sequence[dict[str, Any]], clients: int) -> list[Outcome]:
    """Make calls, so many at once, in their order; a call is ``body`` and optionally ``path`` and ``abort_after``."""
    out: list[Outcome] = []
    coming = iter(enumerate(calls))

    async def client() -> None:
        for number, call in coming:
            out.append(await stream(port, call["body"], number=number, **{k: v for k, v in call.items() if k != "body"}))

    await asyncio.gather(*(client() for _ in range(min(clients, len(calls)))))
    return sorted(out, key=lambda one: one.number)


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95, p99 (the nearest value above) and the most; None of nothing."""
    if not values:
        return None
    ranked = sorted(values)
    found = {f"p{each}": ranked[min(len(ranked) * each // 100, len(ranked) - 1)] for each in PERCENTILES}
    return {**found, "max": ranked[-1]}


def gaps(outcomes: Sequence[Outcome]) -> list[float]:
    """Seconds from a chunk of a stream to its next one, of all streams."""
    return [after - before for one in outcomes for before, after in zip(one.times, one.times[1:], strict=False)]


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What a load of streams gave: tokens a second, time to first token, inter-token latency, and decoding at its fullest.

    ``decode_tokens_s`` is of the moments with the most streams at once, in which no stream got its first token: that number of
    streams, divided by the median time of a stream's token to its next one.
    """
    good = [one for one in outcomes if one.whole]
    if not good:
        return {"streams": 0, "failed": len(outcomes)}
    seconds = max(one.ended for one in good) - min(one.begun for one in good)
    tokens = sum(one.tokens for one in good)
    firsts = sorted(one.times[0] for one in good)
    changes = sorted([(one.times[0], 1) for one in good] + [(one.times[-1], -1) for one in good])
    at_once, now, fullest = 0, 0, []
    for at, change in changes:
        now += change
        if now > at_once:
            at_once, fullest = now, []
        if now == at_once and change > 0:
            fullest.append(at)
    spans = [(begin, min(end for end, change in changes if change < 0 and end > begin)) for begin in fullest]
    took = [
        after - before
        for one in good
        for before, after in zip(one.times, one.times[1:], strict=False)
        if any(begin <= before and after <= end for begin, end in spans) and not any(before < each <= after for each in firsts)
    ]
    step = percentiles(took)
    return {
        "streams": len(good), "failed": len(outcomes) - len(good), "tokens": tokens, "seconds": seconds,
        "tokens_s": tokens / seconds, "at_once": at_once, "decode_step_s": step and step["p50"],
        "decode_tokens_s": step and at_once / step["p50"], "first_token_s": percentiles([o.times[0] - o.begun for o in good]),
        "inter_token_s": percentiles(gaps(good)),
    }  # fmt: skip


def main() -> None:
    """Make the calls of a job and print the outcomes."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    began = time.process_time()
    outcomes = asyncio.run(make(job["port"], job["calls"], job["clients"]))
    print(json.dumps({"cpu_seconds": time.process_time() - began, "outcomes": [asdict(one) for one in outcomes]}))


if __name__ == "__main__":
    main()
