"""Two replicas of vLLM that share a store of contexts; one is killed while questions are asked.

    python check.py            # four to eight minutes on two cores, 9 GiB of memory; no GPU, no hub
    python check.py --direct   # the same without Ray's own front end: chat requests that name a context

Every answer must have the tokens that winnowkv's own cache gives for the same context and question. Exit code 1 if an answer
has not, if a question stays unanswered, or if there are not two healthy replicas again.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before ray and torch are imported: two engines on a few cores; Ray on this machine alone, with the priority of others.
os.environ.update(
    {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    | ({"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"} if "--direct" in sys.argv else {})
)

import httpx
import psutil
import ray
import torch
from ray import serve
from serve_contexts import Options, contexts

import winnowkv as wk
from winnowkv.contexts.export import export_context
from winnowkv.contexts.store import ContextStore
from winnowkv.evaluate.needle.prompts import read_haystack

QUESTIONS = ("What is this text about?", "Who is mentioned in it?", "What happens first?")
NEW_TOKENS, KEPT, TRIES = 24, 512, 6
SETTINGS = {"model": "embedded", "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
REPLICA = "ray::ServeReplica:default:LLMServer"
# In the replicas' logs: who answered what.
ANSWERED = re.compile(r"LLMServer:embedded (\w+) (check-\d+) -- (?:CALL completions OK|POST /v1/chat/completions 200)")


@dataclass(frozen=True)
class Question:
    """A request's path and body, and the tokens that must be answered."""

    path: str
    body: dict[str, Any]
    tokens: list[int]


@dataclass(frozen=True)
class Asked:
    """One question as it was asked: seconds on the clock, attempts, whether its tokens were right, and what went wrong."""

    name: str
    began: float
    ended: float
    attempts: int
    right: bool
    errors: tuple[str, ...]


def stored(place: str, direct: bool) -> list[Question]:
    """Two texts read and compressed by winnowkv and written to the store; questions on them with winnowkv's own answers.

    ``direct``: as plain chat requests that hold the text and name its context, else as placeholders and token ids.
    """
    model, tokenizer = wk.load("embedded", dtype=torch.float32)
    store, text, found = ContextStore(place), read_haystack(), []
    for part in (text[:9000].strip(), text[9000:18000].strip()):
        document = wk.read(model, tokenizer, part, "snapkv", KEPT)
        context = export_context(document, store)
        print(f"context {context.id}: {context.seen} tokens, {context.kept} entries kept, {context.bytes >> 20} MiB")
        for question in QUESTIONS:
            answer = document.ask(question, sampling=wk.Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True))
            chat = {"messages": [{"role": "user", "content": f"{part}\n\n{question}"}], "winnow_context": context.id}
            ids = context.ask(tokenizer, question).body
            path, body = ("chat/completions", chat) if direct else ("completions", ids)
            found.append(Question(path, body, answer.tokens))
    return found


class Clients:
    """Threads that ask the questions in turn until :meth:`stop`; a request that failed is sent again."""

    def __init__(self, url: str, questions: list[Question], count: int) -> None:
        self.asked: list[Asked] = []
        self._url, self._turn, self._numbers = url, itertools.cycle(questions), itertools.count()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask nothing new, and wait for the last answers."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            with self._lock:
                question, name = next(self._turn), f"check-{next(self._numbers)}"
            asked = self._ask(question, name)
            with self._lock:
                self.asked.append(asked)

    def _ask(self, question: Question, name: str) -> Asked:
        body = SETTINGS | question.body
        began, errors = time.monotonic(), []
        for attempt in range(1, TRIES + 1):
            try:
                answer = httpx.post(self._url + question.path, json=body, headers={"x-request-id": name}, timeout=300)
                answer.raise_for_status()
                right = answer.json()["choices"][0]["token_ids"] == question.tokens
                return Asked(name, began, time.monotonic(), attempt, right, tuple(errors))
            except httpx.HTTPStatusError as error:
                errors.append(f"{error.response.status_code} {error.response.text[:300]}".replace(name, "ID"))
            except httpx.HTTPError as error:
                errors.append(repr(error))
            time.sleep(0.5 * 2 ** (attempt - 1))  # longer than Ray takes to notice that an engine died
        return Asked(name, began, time.monotonic(), TRIES, False, tuple(errors))


def replicas() -> list[psutil.Process]:
    """The processes of the replicas that this process's Ray runs."""
    return [one for one in psutil.Process().children(recursive=True) if title(one).startswith(REPLICA)]


def title(process: psutil.Process) -> str:
    """What a process calls itself, nothing if it is gone."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def healthy() -> int:
    """How many replicas of vLLM Ray Serve calls running."""
    found = serve.status().applications["default"].deployments
    return next(one.replica_states.get("RUNNING", 0) for name, one in found.items() if name.startswith("LLMServer"))


def wait_for(true: Any, seconds: float) -> float:
    """Seconds until ``true()``; raises TimeoutError after ``seconds``."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"not within {seconds:.0f} s")
        time.sleep(0.25)
    return time.monotonic() - began


def answered_by(logs: Path) -> dict[str, str]:
    """For each request the replica that answered it, as Ray's logs say."""
    texts = (path.read_text(errors="replace") for path in logs.rglob("*") if path.suffix in (".log", ".err", ".out"))
    return {name: replica for text in texts for replica, name in ANSWERED.findall(text)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="folder of the contexts; a new one if it is left out")
    parser.add_argument("--each", type=int, default=12, help="questions before the kill, and after two replicas run again")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--direct", action="store_true", help="clients reach vLLM's own server, by Ray's HAProxy")
    parser.add_argument("--kill", choices=("replica", "engine"), default="replica", help="Ray's process, or vLLM's in it")
    asked = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        place = asked.store or f"{scratch}/contexts"
        questions = stored(place, asked.direct)
        # Two cores of Ray's counting for the replicas, one for the ingress, one for the download task of each new replica.
        started = ray.init("local", num_cpus=4, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": asked.port})
            options = Options(store=place, dtype="float32", kv_cache_mib=256, enforce_eager=True)
            began = time.monotonic()
            serve.run(contexts(options))
            print(f"two replicas run after {time.monotonic() - began:.0f} s")
            return killed(asked, questions, Path(started.address_info["session_dir"], "logs"))
        finally:
            serve.shutdown()
            ray.shutdown()


def killed(asked: argparse.Namespace, questions: list[Question], logs: Path) -> int:
    """Ask, kill, ask on, and print the table; the exit code."""
    clients = Clients(f"http://127.0.0.1:{asked.port}/v1/", questions, asked.clients)
    wait_for(lambda: len(clients.asked) >= asked.each, 600)
    victim = replicas()[0]
    engine = victim.children(recursive=True)
    target = victim if asked.kill == "replica" else next(one for one in engine if "EngineCore" in title(one))
    kill = time.monotonic()
    os.kill(target.pid, signal.SIGKILL)
    noticed = wait_for(lambda: healthy() < 2, 120)
    back = noticed + wait_for(lambda: healthy() == 2, 600)
    count = len(clients.asked)
    wait_for(lambda: len(clients.asked) >= count + asked.each, 600)
    clients.stop()
    left = [one for one in (victim, *engine) if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]

    who = answered_by(logs)
    print(f"{'questions':<28}{'asked':>6}{'again':>6}{'failed':>7}{'right':>6}  answered by")
    parts = ("before the kill", 0, kill), ("while one replica was up", kill, kill + back), ("after that", kill + back, math.inf)
    for part, first, last in parts:
        rows = [one for one in clients.asked if first <= one.ended < last]
        failed = sum(len(one.errors) == TRIES for one in rows)
        by = Counter(who.get(one.name, "?") for one in rows)
        again, right = sum(one.attempts > 1 for one in rows), sum(one.right for one in rows)
        told = ", ".join(f"{name} {number}" for name, number in by.most_common())
        print(f"{part:<28}{len(rows):>6}{again:>6}{failed:>7}{right:>6}  {told}")
    first = min(one.ended for one in clients.asked if one.began >= kill)
    print(f"seconds after the kill: next answer {first - kill:.1f}, Ray Serve noticed {noticed:.1f}, two replicas {back:.1f}")
    print(f"processes of the killed replica that are left: {len(left)}")
    for error, number in Counter(error for one in clients.asked for error in one.errors).items():
        print(f"error, {number} times: {error}")
    return 0 if all(one.right for one in clients.asked) and not left else 1


if __name__ == "__main__":
    sys.exit(main())
