"""The client and the figures of the server's benchmarks and soak, without a model: against a server of a few lines."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from support.paths import BENCHMARKS
from winnowkv.errors import InputError

sys.path.insert(0, str(BENCHMARKS))
try:
    import serve_client
    import serve_servers
    import serve_speed
finally:
    sys.path.remove(str(BENCHMARKS))

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nX-Request-Id: req-1\r\ntransfer-encoding: chunked\r\n\r\n"


def event(body: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\n\n"


def piece(data: bytes) -> bytes:
    """A chunk of a chunked body."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def token(text: str, index: int = 0, ended: str | None = None) -> dict[str, Any]:
    """A chunk with one choice."""
    return {"choices": [{"index": index, "text": text, "finish_reason": ended}]}


def streamed(sent: list[bytes], **options: Any) -> Any:
    """What the client notes of an answer of these bytes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for data in sent:
            writer.write(data)
            await writer.drain()
        writer.close()

    async def run() -> Any:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            return await serve_client.stream(server.sockets[0].getsockname()[1], {"prompt": "x"}, **options)

    return asyncio.run(run())


def test_a_whole_stream_is_read_however_it_is_cut() -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 3}}
    data = b"".join(map(event, (token("a"), token("b"), token("c", ended="stop"), usage, b"[DONE]")))
    for size in (1, 7, len(data)):
        pieces = [piece(data[at : at + size]) for at in range(0, len(data), size)]
        out = streamed([HEAD, *pieces, b"0\r\n\r\n"])
        assert (out.whole, out.text, out.tokens, len(out.times), out.request_id) == (True, "abc", 3, 3, "req-1")


def test_choices_are_told_apart_and_each_must_end() -> None:
    data = [token("a"), token("x", 1), token("b", ended="length")]
    ended = streamed([HEAD, *(piece(event(each)) for each in [*data, b"[DONE]"]), b"0\r\n\r\n"])
    assert (ended.texts, ended.finishes, ended.whole) == ({0: "ab", 1: "x"}, {0: "length"}, False)


@pytest.mark.parametrize("kept", range(1, 5))
def test_a_stream_that_breaks_off_is_an_error(kept: int) -> None:
    sent = [HEAD, piece(event(token("a"))), piece(event(token("b", ended="stop"))), piece(event(b"[DONE]"))][:kept]
    out = streamed(sent)
    assert not out.whole
    assert out.error


def test_an_error_is_told_with_its_id() -> None:
    body = json.dumps({"error": {"code": "queue_full", "message": "full", "request_id": "req-7"}}).encode()
    head = f"HTTP/1.1 429 Too Many\r\nretry-after: 3\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    out = streamed([head + body])
    assert (out.status, out.retry_after, out.error) == (429, "3", "queue_full: full (req-7)")


def test_a_client_leaves_after_so_many_chunks() -> None:
    out = streamed([HEAD, *[piece(event(token("a")))] * 5], abort_after=2)
    assert (out.aborted, out.error, len(out.times)) == (True, None, 2)
    assert streamed([HEAD], abort_after=0).aborted


def stream_of(begun: float, *times: float) -> Any:
    """A whole stream with tokens at these times."""
    return serve_client.Outcome(
        status=200, begun=begun, ended=times[-1], times=list(times), texts={0: ""}, finishes={0: "length"}, done=True
    )


def test_decoding_is_measured_where_most_streams_run_and_none_begins() -> None:
    streams = [
        stream_of(0, 1, 5, 6, 7),
        stream_of(0, 4, 5.5, 6.5, 12),
    ]  # both run from 4 to 7, where tokens come a second apart
    found = serve_client.figures(streams)
    assert (found["streams"], found["at_once"], found["tokens"]) == (2, 2, 8)
    assert found["decode_step_s"] == pytest.approx(1.0)
    assert found["decode_tokens_s"] == pytest.approx(2.0)
    assert found["tokens_s"] == pytest.approx(8 / 12)
    assert found["first_token_s"]["max"] == pytest.approx(4)
    assert found["inter_token_s"]["max"] == pytest.approx(5.5)


def test_streams_that_failed_are_counted_and_not_measured() -> None:
    assert serve_client.figures([serve_client.Outcome(status=500)]) == {"streams": 0, "failed": 1}


def test_percentiles_are_values_that_were_measured() -> None:
    assert serve_client.percentiles([float(n) for n in range(1, 101)]) == {"p50": 51, "p95": 96, "p99": 100, "max": 100}
    assert serve_client.percentiles([]) is None


def test_metrics_are_added_up_over_labels() -> None:
    page = b'# HELP x y\nvllm:running{engine="0"} 2.0\nwinnow_all_total{a="1",b="c"} 3.0\nwinnow_all_total{a="2"} 4\nx 1e+06\n'
    assert serve_servers.parsed(page) == {"vllm:running": 2, "winnow_all_total": 7, "x": 1e6}


@pytest.mark.parametrize("text", ["full", "full=0", "other=3", "vllm=x", ""])
def test_sides_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="is none: give"):
        serve_speed.read_sides(text)


def test_prompts_have_beginnings_of_their_own() -> None:
    prompts = serve_speed.prompts_of(lambda text, **_: {"input_ids": list(range(500))}, 5, 800)
    assert [len(one) for one in prompts] == [800] * 5
    assert len({one[0] for one in prompts}) == 5
