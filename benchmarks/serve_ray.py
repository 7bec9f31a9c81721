"""``winnow serve --ray`` on this machine: what Ray costs, what two replicas bring, and what happens when one is killed.

    python benchmarks/serve_ray.py               # all of it: ten minutes on two cores, 5 GiB of memory, no GPU
    python benchmarks/serve_ray.py kill          # two replicas under streaming clients, one gets SIGKILL (make serve-ray-check)
    python benchmarks/serve_ray.py overhead      # beside the server without Ray, and beside Ray's own HTTP proxy
    python benchmarks/serve_ray.py replicas      # requests a second of one and of two

Exit code 1 if after the kill a stream ends without its terminator, an error does not say that it may be sent again, a question
on a stored context is not answered as before, or there are not two replicas again.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from serve_client import Outcome, ask, figures, make, stream
from serve_servers import Served, free_port, ticks, tree, winnow_server

from winnowkv.evaluate.needle.prompts import read_haystack

CHAT = "/v1/chat/completions"
REPLICA = b"ray::ServeReplica:winnow-"
QUESTIONS = ("What is this text about?", "Who is mentioned in it?", "What happens first?")
BACK_SECONDS = 240.0  # in which two replicas have to be there again
Body = dict[str, Any]


def completion(number: int, tokens: int) -> Body:
    """A short prompt with a long answer."""
    return {
        "model": "embedded", "prompt": f"{number} Once upon a time there was a fox.", "max_tokens": tokens, "ignore_eos": True,
        "temperature": 0, "stream_options": {"include_usage": True},
    }  # fmt: skip


def question(context: str, text: str) -> Body:
    """A question on a stored context."""
    return {
        "model": "embedded", "messages": [{"role": "user", "content": text}], "winnow_context": context, "max_tokens": 24,
        "temperature": 0, "ignore_eos": True,
    }  # fmt: skip


@contextmanager
def behind_rays_proxy(log: Path) -> Iterator[Served]:
    """One replica whose front is a deployment of Ray Serve's, reached by Ray's HTTP proxy: this script as a server."""
    port = free_port()
    with log.open("wb") as out:
        command = [sys.executable, __file__, "--serve-behind-proxy", str(port)]
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )  # fmt: skip
    served = Served(process, port, log)
    try:
        while b"\nready\n" not in log.read_bytes():
            if process.poll() is not None:
                raise RuntimeError(served.tail())
            time.sleep(0.2)
        yield served
    finally:
        served.stop()


def serve_behind_proxy(port: int) -> None:
    """The server of :func:`behind_rays_proxy`, until SIGTERM."""
    from functools import partial

    from winnowkv.cli.serve import build
    from winnowkv.scale.rayrun import join
    from winnowkv.scale.serving import ReplicaOptions, app_name, deployment
    from winnowkv.serve.settings import ServeSettings

    settings = ServeSettings(port=port)
    name = app_name(settings)
    join(2, None)
    import ray
    from ray import serve

    def front() -> Any:
        from winnowkv.scale.front import make_front

        return make_front(settings, serve.get_deployment_handle("Replica", name))

    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(deployment(partial(build, "embedded", None, None), settings, ReplicaOptions(1)), name=name, route_prefix=None)
    made: Any = serve.deployment(max_ongoing_requests=500, ray_actor_options={"num_cpus": 0})(serve.ingress(front)())
    serve.run(made.bind(), name="front", route_prefix="/")
    print("\nready", flush=True)
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    ray.shutdown()


def overhead(logs: Path, rounds: int) -> list[Body]:
    """The same work on all three servers in turn; processor time tells what other work on the machine does not change."""
    found: dict[str, list[Body]] = {}
    with ExitStack() as stack:
        servers = {
            "without Ray": stack.enter_context(winnow_server(logs / "plain.log")),
            "--ray --replicas 1": stack.enter_context(winnow_server(logs / "ray.log", "--ray", "--replicas", "1")),
            "Ray's proxy": stack.enter_context(behind_rays_proxy(logs / "proxy.log")),
        }
        for number, (name, served) in itertools.product(range(-1, rounds), servers.items()):
            models = [seconds(served.port, "/v1/models") for _ in range(60)]
            single = asyncio.run(make(served.port, [{"body": completion(number, 8)}] * 8, 1))
            cpu, front = served.cpu_seconds, ticks(served.process.pid)
            outcomes = asyncio.run(make(served.port, [{"body": completion(at, 96)} for at in range(8)], 8))
            cpu, front = served.cpu_seconds - cpu, (ticks(served.process.pid) - front) / os.sysconf("SC_CLK_TCK")
            began, idle = time.perf_counter(), served.cpu_seconds
            time.sleep(4)
            idle = (served.cpu_seconds - idle) / (time.perf_counter() - began)
            if any(not one.whole for one in outcomes):
                raise RuntimeError(f"{name}: {[one.error for one in outcomes]}")
            work = figures(outcomes)
            line = {
                "server": name, "models_ms": statistics.median(models) * 1000, "models_least_ms": min(models) * 1000,
                "first_token_ms": statistics.median(one.times[0] - one.begun for one in single) * 1000,
                "tokens_s": work["tokens_s"], "inter_token_ms": work["inter_token_s"]["p50"] * 1000,
                "cpu_ms_a_token": cpu / work["tokens"] * 1000, "idle_cores": idle,
                "first_process_cpu_ms_a_token": front / work["tokens"] * 1000, "rss_mib": served.rss >> 20,
            }  # fmt: skip
            if number >= 0:  # the first round warms up
                found.setdefault(name, []).append(line)
    return [medians(lines) for lines in found.values()]


def medians(lines: list[Body]) -> Body:
    """Of several rounds one line."""
    first = lines[0]
    return {
        key: value if isinstance(value, str) else statistics.median(line[key] for line in lines) for key, value in first.items()
    }


def seconds(port: int, path: str) -> float:
    """Seconds of one small request."""
    began = time.perf_counter()
    asyncio.run(ask(port, "GET", path))
    return time.perf_counter() - began


def scaling(logs: Path, rounds: int) -> list[Body]:
    """Requests a second of one and of two replicas with one thread each, 16 clients."""
    found: dict[str, list[Body]] = {}
    with ExitStack() as stack:
        servers = {
            str(count): stack.enter_context(winnow_server(logs / f"ray{count}.log", "--ray", "--replicas", str(count)))
            for count in (1, 2)
        }
        for number, (count, served) in itertools.product(range(-1, rounds), servers.items()):
            calls = [{"body": completion(at, 48)} for at in range(48 if number >= 0 else 8)]
            began, cpu = time.perf_counter(), served.cpu_seconds
            outcomes = asyncio.run(make(served.port, calls, 16))
            took, cpu = time.perf_counter() - began, served.cpu_seconds - cpu
            line = {
                "replicas": int(count), "requests_s": len(outcomes) / took, "tokens_s": figures(outcomes)["tokens_s"],
                "cores": cpu / took, "failed": sum(not one.whole for one in outcomes),
            }  # fmt: skip
            if number >= 0:
                found.setdefault(count, []).append(line)
    return [medians(lines) for lines in found.values()]


class Clients:
    """Tasks that stream until they are stopped: long answers, and questions on contexts. Nothing is sent again."""

    def __init__(self, port: int, contexts: list[str], count: int) -> None:
        self.outcomes: list[tuple[str, Outcome]] = []
        self.running = True
        self._port, self._contexts, self._numbers = port, contexts, itertools.count()
        self._tasks = [asyncio.create_task(self._run(at % 3 == 0)) for at in range(count)]

    async def stop(self) -> None:
        """Wait for the last answers."""
        self.running = False
        await asyncio.gather(*self._tasks)

    async def _run(self, asks: bool) -> None:
        while self.running:
            number = next(self._numbers)
            if asks:
                context, text = self._contexts[number % len(self._contexts)], QUESTIONS[number % len(QUESTIONS)]
                name, out = f"{context} {text}", await stream(self._port, question(context, text), path=CHAT)
            else:
                name, out = "", await stream(self._port, completion(number, 64))
            self.outcomes.append((name, out))
            if out.status == 503:
                await asyncio.sleep(float(out.retry_after or 1))


async def names(port: int) -> set[str]:
    """The replicas that answer ``/metrics``."""
    status, page = await ask(port, "GET", "/metrics")
    found = re.findall(rb'^winnow_active_requests\{replica="([^"]+)"', page, re.MULTILINE)
    return {name.decode() for name in found if name != b"front"} if status == 200 else set()


def processes(served: Served) -> list[int]:
    """Process ids of the replicas."""
    found = []
    for pid in tree(served.process.pid):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(REPLICA):
            found.append(pid)
    return found


async def killed(served: Served, clients: int) -> tuple[Body, bool]:
    """What came of it, and whether all is as it should be."""
    port, text = served.port, read_haystack()
    contexts, expected = [], {}
    for at in range(3):
        body = {"text": text[at * 4000 : (at + 1) * 4000], "name": f"part {at}", "policy": "snapkv", "budget": 256}
        status, answer = await ask(port, "POST", "/v1/contexts", body)
        assert status == 200, answer
        contexts.append(json.loads(answer)["id"])
    for context, asked in itertools.product(contexts, QUESTIONS):
        expected[f"{context} {asked}"] = (await stream(port, question(context, asked), path=CHAT)).text
    before = await names(port)
    load = Clients(port, contexts, clients)
    await asyncio.sleep(10)
    pid = processes(served)[0]
    os.kill(pid, signal.SIGKILL)
    kill, at = time.time(), time.perf_counter()
    back = None
    while back is None and time.perf_counter() - at < BACK_SECONDS:
        await asyncio.sleep(0.5)
        if len(now := await names(port)) == 2 and now != before:
            back = time.perf_counter() - at
    await asyncio.sleep(5)
    await load.stop()
    after = {name: (await stream(port, question(*name.split(" ", 1)), path=CHAT)).text for name in expected}
    hit = [one for _, one in load.outcomes if not one.whole]
    later = [one.ended - kill for _, one in load.outcomes if one.whole and one.begun > kill]
    in_stream = [one for one in hit if one.status == 200]
    report = {
        "requests": len(load.outcomes), "hit": len(hit), "hit_in_mid_stream": len(in_stream),
        "errors": dict(Counter((one.error or "no error").split(":")[0] for one in hit)),
        "hit_without_terminator": sum(not one.done for one in in_stream),
        "503_without_retry_after": sum(one.retry_after is None for one in hit if one.status == 503),
        "last_error_after_s": max((one.ended - kill for one in hit), default=0.0),
        "next_good_answer_after_s": min(later, default=None),
        "two_replicas_after_s": back,
        "questions_on_contexts": sum(bool(name) and one.whole for name, one in load.outcomes),
        "of_those_other_answers": sum(one.whole and one.text != expected[name] for name, one in load.outcomes if name),
        "afterwards_other_answers": sum(after[name] != text for name, text in expected.items()),
    }  # fmt: skip
    fine = (
        back is not None and bool(hit) and set(report["errors"]) == {"replica_lost"} and not report["hit_without_terminator"]
        and not report["503_without_retry_after"] and not report["of_those_other_answers"]
        and not report["afterwards_other_answers"]
    )  # fmt: skip
    return report, fine


def kill(logs: Path, clients: int) -> tuple[Body, bool]:
    """Two replicas with a store, clients on them, and a SIGKILL. In float32, in which answers do not depend on company."""
    options = "--ray", "--replicas", "2", "--store", str(logs / "store"), "--dtype", "float32"
    with winnow_server(logs / "kill.log", *options) as served:
        report, fine = asyncio.run(killed(served, clients))
        return {"start_s": served.start_s, **report}, fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["overhead", "replicas", "kill"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--serve-behind-proxy", type=int, metavar="PORT", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve_behind_proxy is not None:
        serve_behind_proxy(asked.serve_behind_proxy)
        return 0
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        for part in asked.parts:
            load = os.getloadavg()[0]
            if part == "kill":
                result, fine = kill(logs, asked.clients)
                lines = [result]
            else:
                lines = {"overhead": overhead, "replicas": scaling}[part](logs, asked.rounds)
            for line in lines:
                shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()}
                print(json.dumps({"part": part, **shown, "load": [round(load, 1), round(os.getloadavg()[0], 1)]}), flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
