"""The front of ``winnow serve --ray`` over a replica in this process: what a client sees is what it sees without Ray."""

import asyncio
import importlib.util
import json
import os

import httpx
import pytest

# Ray reads it when it is imported, here or in another test of this process: it listens on loopback only.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

from support.ray_serving import LocalHandle, LocalReplica, slow_engine
from support.serving import chat, check_nothing_left, chunks_of, tiny_app, tiny_engine, words
from winnowkv.errors import InputError
from winnowkv.scale.front import context_of, make_front, merged
from winnowkv.scale.serving import ReplicaOptions
from winnowkv.serve.settings import ServeSettings

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("opencensus") is None, reason="ray[serve] is not installed (pip install 'winnowkv[scale]')"
)
KEY = "a-key-of-tests"


def through(ask, *, fail=None, replica_settings=None, engine=None, **settings):
    """What a coroutine returns that is given a client of a front, the front's handle, and the replica's application."""

    async def run():
        app = tiny_app(engine or tiny_engine(), **(replica_settings or {}))
        handle = LocalHandle(LocalReplica(app, "one"), fail)
        front = make_front(ServeSettings(**{"model": "tiny", "policy": "snapkv", **settings}), handle)
        transport = httpx.ASGITransport(front)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            found = await ask(client, handle, app)
        check_nothing_left(app)
        return found

    return asyncio.run(run())


def died():
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


def post(body, **options):
    async def ask(client, handle, app):
        return await client.post("/v1/chat/completions", json=body, **options)

    return ask


@needs_ray
def test_an_answer_is_that_of_the_server_without_ray():
    """Whole and streamed, with the client's id, the replica's name and one header of each kind."""

    async def ask(client, handle, app):
        whole = await client.post("/v1/chat/completions", json=chat(words(30)), headers={"x-request-id": "mine"})
        stream = await client.post("/v1/chat/completions", json=chat(words(30), stream=True))
        direct = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t")
        return whole, stream, await direct.post("/v1/chat/completions", json=chat(words(30)))

    whole, stream, direct = through(ask)
    assert whole.status_code == stream.status_code == 200
    assert whole.json()["choices"] == direct.json()["choices"]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks_of(stream.text))
    assert text == direct.json()["choices"][0]["message"]["content"]
    assert whole.headers["x-winnow-replica"] == "one"
    assert whole.headers.get_list("x-request-id") == ["mine"]


@needs_ray
def test_errors_keys_and_limits_are_those_without_ray():
    """The front refuses what it can, the replica the rest; both in OpenAI's form."""

    async def ask(client, handle, app):
        key = {"authorization": f"Bearer {KEY}"}
        none = await client.post("/v1/chat/completions", json=chat("w3"))
        large = await client.post("/v1/chat/completions", json=chat("w3 " * 2000), headers=key)
        calls = len(handle.answers)
        model = await client.post("/v1/chat/completions", json={**chat("w3"), "model": "other"}, headers=key)
        route = await client.get("/nothing", headers=key)
        good = await client.post("/v1/chat/completions", json=chat("w3"), headers=key)
        return [(one.status_code, one.json().get("error", {}).get("code")) for one in (none, large, model, route, good)], calls

    limits = {"api_keys": (KEY,), "max_body": 4000}
    found, calls = through(ask, replica_settings=limits, **limits)
    assert found == [
        (401, "invalid_api_key"), (413, "body_too_large"), (404, "model_not_found"), (404, "unknown_route"), (200, None)
    ]  # fmt: skip
    assert not calls  # the replica never saw the first two


@needs_ray
@pytest.mark.parametrize("items", [0, 1, 2])
def test_a_request_of_a_lost_replica_may_be_sent_again(items):
    """Before anything of the answer was sent: status 503 with Retry-After."""
    answer = through(post(chat(words(30), stream=True)), fail=(items, died()))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "replica_lost"
    assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]


@needs_ray
def test_a_stream_of_a_lost_replica_ends_with_an_error_and_its_terminator():
    """What was said stays said."""
    answer = through(post(chat(words(30), stream=True, max_tokens=60, ignore_eos=True)), fail=(4, died()), engine=slow_engine())
    chunks = chunks_of(answer.text)
    assert answer.status_code == 200
    assert len(chunks) > 1
    assert chunks[-1]["error"]["code"] == "replica_lost"


@needs_ray
def test_without_a_replica_a_request_is_given_up():
    """Nobody takes it within the queue's deadline."""

    class Nobody(LocalHandle):
        def remote(self, call):
            async def never():
                await asyncio.Event().wait()
                yield None

            self._replica.answer = lambda call: never()
            return super().remote(call)

    async def run():
        app = tiny_app()
        handle = Nobody(LocalReplica(app, "one"))
        front = make_front(ServeSettings(queue_deadline=0.05), handle)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://t") as client:
            answer = await client.post("/v1/chat/completions", json=chat("w3"))
        return answer, handle.answers[0].cancelled

    answer, cancelled = asyncio.run(run())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica")
    assert cancelled


@needs_ray
def test_a_front_that_stops_lets_answers_end_and_takes_no_new_ones():
    """As the server does without Ray."""

    async def ask(client, handle, app):
        running = asyncio.create_task(client.post("/v1/chat/completions", json=chat("w3", max_tokens=40, ignore_eos=True)))
        while not handle.answers:
            await asyncio.sleep(0)
        stopping = asyncio.create_task(client._transport.app.state.serving.loop.stop(20))
        await asyncio.sleep(0)
        late = await client.post("/v1/chat/completions", json=chat("w3"))
        await stopping
        return await running, late

    ended, late = through(ask, engine=slow_engine())
    assert ended.json()["choices"][0]["finish_reason"] == "length"
    assert (late.status_code, late.json()["error"]["code"]) == (503, "stopping")


@needs_ray
def test_a_client_that_leaves_ends_its_request():
    """The replica hears of it, and its row is free."""

    async def ask(client, handle, app):
        front, given = client._transport.app, asyncio.Queue()
        body = json.dumps(chat("w3", max_tokens=100, stream=True, ignore_eos=True)).encode()
        given.put_nowait({"type": "http.request", "body": body, "more_body": False})
        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions",
            "query_string": b"", "headers": [(b"content-type", b"application/json")], "client": ("t", 1), "root_path": "",
        }  # fmt: skip

        async def send(message):
            if message.get("body"):
                given.put_nowait({"type": "http.disconnect"})

        await front(scope, given.get, send)
        assert handle.answers[0].cancelled
        while app.state.serving.engine.active or app.state.serving.loop._tickets:
            await asyncio.sleep(0.01)
        return app.state.serving.metrics.cancelled.labels("disconnected")._value.get()

    assert through(ask, engine=slow_engine()) == 1


@needs_ray
def test_a_request_on_a_context_is_routed_by_it():
    """Named in the body, in either field, or in the path."""

    async def ask(client, handle, app):
        for body in (chat("w3"), chat("w3", winnow_context="c1"), chat("w3", winnow={"context": "c2"})):
            await client.post("/v1/chat/completions", json=body)
        await client.get("/v1/contexts/c3")
        return handle.sessions

    assert through(ask) == ["", "c1", "c2", "c3"]


@pytest.mark.parametrize(
    "body",
    [b"", b'{"winnow_context"', b'["winnow_context"]', b'{"winnow_context": 3}', b'{"winnow": {"context": []}}', b"\xff"],
)
def test_a_body_that_names_no_context(body):
    """Is left to the replica, which says what is wrong with it."""
    assert context_of("/v1/chat/completions", body) is None


@needs_ray
def test_metrics_are_of_all_replicas():
    """Each sample says whose it is."""

    async def ask(client, handle, app):
        await client.post("/v1/chat/completions", json=chat("w3"))
        return (await client.get("/metrics")).text

    page = through(ask)
    assert 'winnow_generated_tokens_total{replica="one"} 6.0' in page
    assert 'winnow_requests_total{route="/v1/chat/completions",status="200",replica="front"} 1.0' in page
    assert page.count("# TYPE winnow_requests_total counter") == 1


def test_pages_are_merged_by_family():
    """With types, and values as they were."""
    one = b'# HELP a_total As\n# TYPE a_total counter\na_total{x="1"} 2.0\n'
    assert merged([("r", one), ("s", one)]).decode().splitlines() == [
        "# HELP a_total As", "# TYPE a_total counter", 'a_total{x="1",replica="r"} 2.0', 'a_total{x="1",replica="s"} 2.0',
    ]  # fmt: skip


@needs_ray
def test_a_context_keeps_its_replica_until_that_is_overloaded():
    """And most contexts keep theirs when a replica goes."""
    from winnowkv.scale.routing import overloaded, weight

    assert not overloaded([3], [3, 0], rows=4)
    assert not overloaded([4], [4, 4], rows=4)
    assert overloaded([4], [4, 3], rows=4)
    assert not overloaded([4, 1], [4, 1, 0], rows=4)  # two have it
    names = [f"r{at}" for at in range(8)]
    contexts = [f"c{at}" for at in range(400)]
    first = {one: max(names, key=lambda name: weight(one, name)) for one in contexts}
    assert all(sum(name == at for at in first.values()) > 20 for name in names)
    left = {one: max(names[1:], key=lambda name: weight(one, name)) for one in contexts}
    assert all(left[one] == first[one] for one in contexts if first[one] != "r0")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"count": 0}, "--replicas 0"),
        ({"count": 2, "least": 3}, "in this order"),
        ({"count": 4, "least": 1, "most": 3}, "in this order"),
        ({"target": 2.0}, "give --min-replicas"),
        ({"target": 0.0, "most": 3}, "above 0"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(options, why):
    """With the options' names."""
    with pytest.raises(InputError, match=why):
        ReplicaOptions(**options)
