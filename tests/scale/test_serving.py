"""``winnow serve --ray`` on a local Ray: two replicas, one of which is killed while both stream."""

import importlib.util
import json
import os
import signal
import sys
import threading
from contextlib import ExitStack, contextmanager

import httpx
import psutil
import pytest

from support.ray_serving import build_slow
from support.serving import MODEL, chat, wait_until
from winnowkv.scale.serving import ReplicaOptions, replicas
from winnowkv.serve.server import Server, listen
from winnowkv.serve.settings import ServeSettings

# Ray itself is not imported here: it listens on loopback only if scale/ imports it first.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("opencensus") is None, reason="ray[serve] is not installed (pip install 'winnowkv[scale]')"
    ),
]
LONG = {"max_tokens": 400, "ignore_eos": True, "stream": True}  # two seconds and more
POLICY, QUESTION = "snapkv:observe=4", "Who wrote it?"
TEXT = "The archive of Oakham was founded in 1712. Its first keeper, Mary Lund, wrote its history in nine volumes."
REPLICA = "x-winnow-replica"


@contextmanager
def served(settings, options):
    """The URL of a front, and a client of it."""
    with replicas(build_slow, settings, options) as app:
        server, bound = Server(app), listen(settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{bound.getsockname()[1]}", timeout=60) as client:
                yield client
        finally:
            server._events.call_soon_threadsafe(server.begin_stop)
            thread.join(30)
    assert not thread.is_alive()


def processes():
    """Process ids of the replicas of this process's Ray."""
    found = psutil.Process().children(recursive=True)
    return [one.pid for one in found if one.is_running() and "ray::ServeReplica:winnow-" in " ".join(one.cmdline())]


def names(client):
    """The replicas that answer."""
    page = client.get("/metrics").text.splitlines()
    return {line.split('"')[1] for line in page if line.startswith("winnow_active_requests{")}


def test_a_killed_replica_is_replaced_and_its_requests_may_be_sent_again(tmp_path, monkeypatch):
    """Its streams end with an error that says so, those of the other go on, and stored contexts are answered as before."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # of Ray's workers, for tests/support
    settings = ServeSettings(model=MODEL, policy=POLICY, budget=40, port=0, store=str(tmp_path), drain=10)
    with served(settings, ReplicaOptions(2)) as client, ExitStack() as stack:
        body = {"text": TEXT, "policy": POLICY, "budget": 64}
        made = client.post("/v1/contexts", json=body)
        assert made.status_code == 200, made.text
        question = chat(QUESTION, winnow_context=made.json()["id"])
        answers = [client.post("/v1/chat/completions", json=question) for _ in range(4)]
        assert all(one.status_code == 200 for one in answers), answers[0].text
        assert len({one.headers[REPLICA] for one in answers}) == 1  # the one that has it
        before = names(client)

        streams = [
            stack.enter_context(client.stream("POST", "/v1/chat/completions", json=chat(f"Say {at}.", **LONG))) for at in (0, 1)
        ]
        lines = [one.iter_lines() for one in streams]
        assert all(next(one).startswith("data: {") for one in lines)
        assert {one.headers[REPLICA] for one in streams} == before  # the second went where nothing ran
        os.kill(processes()[0], signal.SIGKILL)
        ends = [[json.loads(line[6:]) for line in one if line.startswith("data: {")][-1] for one in lines]
        lost, whole = sorted(ends, key=lambda end: "error" not in end)
        assert lost["error"]["code"] == "replica_lost"
        assert whole["choices"][0]["finish_reason"] == "length"

        again = client.post("/v1/chat/completions", json=question)
        assert again.json()["choices"] == answers[0].json()["choices"]
        wait_until(lambda: len(names(client) - before) == 1, seconds=120)
        assert len(names(client)) == 2
