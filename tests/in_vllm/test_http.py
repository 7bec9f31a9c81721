"""A real vLLM server with connector and middleware: plain OpenAI requests on contexts answer as our own cache does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import winnowkv as wk
from winnowkv.contexts.context import Context
from winnowkv.contexts.export import export_context
from winnowkv.documents import Answer, Document
from winnowkv.integrations.vllm.launch import installed, server_command
from winnowkv.prompt.chat import apply_template, user_message

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a server starts
    pytest.mark.skipif(not (installed() and find_spec("openai")), reason="vLLM is not installed: make test-vllm"),
]

KEY, START_SECONDS, NEW_TOKENS = "secret", 280, 24
GREEDY: dict[str, Any] = {"model": "embedded", "temperature": 0, "max_tokens": NEW_TOKENS}
QUESTIONS = ("Who was the first keeper of the archive?", "How many rooms does the archive have?")
TEXT = (
    "The archive of Oakham was founded in 1712. Its first keeper, Mary Lund, wrote the town's history. It has nine rooms; the "
    "last was built in 1850, and the key to it was lost at sea. "
) + "In the winter of each year the keepers count the books, the maps and the letters, and write the sum into a ledger. " * 20


@dataclass
class Running:
    """A server on a store with one document, and what that answers in our own cache."""

    url: str
    store: Path
    document: Document
    context: Context
    answers: dict[str, Answer]

    @property
    def client(self) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def ask(self, messages: Any, extra: dict[str, Any] | None = None, **more: Any) -> Any:
        """A chat request on the context; a text is one message of the user."""
        body = {**GREEDY, "messages": user_message(messages) if isinstance(messages, str) else messages, **more}
        named = {"winnow_context": self.context.id, **(extra or {})}
        return self.client.chat.completions.create(**body, extra_body=named)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("vllm")
    model, tokenizer = wk.load("embedded", dtype=torch.float32, device="cpu")
    document = wk.read(model, tokenizer, TEXT, "snapkv", 128)
    context = export_context(document, folder / "store", name="archive")
    answers = {question: document.ask(question, NEW_TOKENS) for question in QUESTIONS}
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager",
             "--api-key", KEY]  # fmt: skip
    command = server_command("embedded", str(folder / "store"), flags)
    environment = {
        "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1", **os.environ, **command.environment,
    }  # fmt: skip
    log = folder / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen(command.arguments, env=environment, stdout=out, stderr=out, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_SECONDS
        while not healthy(url):
            if server.poll() is not None or time.monotonic() > until:
                pytest.fail(f"vLLM's server did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(1)
        yield Running(url, folder / "store", document, context, answers)
    finally:
        end(server)


def healthy(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
        return answer.status == 200
    return False


def end(server: subprocess.Popen[bytes]) -> None:
    """End a server and its workers, which are in a process group of their own."""
    server.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.wait(60)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(30)


def get(url: str, key: str | None = KEY) -> Any:
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_a_chat_question_is_answered_as_our_own_cache_does(running: Running) -> None:
    for question, answer in running.answers.items():
        found = running.ask(question, extra={"return_token_ids": True})
        (choice,) = found.choices
        assert choice.message.content == answer.text
        assert choice.token_ids[: len(answer.tokens)] == answer.tokens
        assert choice.finish_reason == answer.finish_reason
        assert found.usage.prompt_tokens == running.context.kept + answer.question_tokens


def test_the_whole_prompt_is_answered_so_too(running: Running) -> None:
    for question, answer in running.answers.items():
        found = running.ask(f"{TEXT.rstrip()}\n\n{question}")
        assert found.choices[0].message.content == answer.text
        assert found.usage.prompt_tokens == running.context.kept + answer.question_tokens


def test_streams_and_completions(running: Running) -> None:
    for question, answer in running.answers.items():
        chunks = list(running.ask(question, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.text
        assert len(chunks) > 2
        for prompt in (question, running.context.ask(running.document.tokenizer, question).ids[running.context.kept :]):
            found = running.client.completions.create(
                **GREEDY, prompt=prompt, extra_body={"winnow_context": running.context.id}
            )  # fmt: skip
            assert found.choices[0].text == answer.text


def test_later_turns_follow_the_first_question(running: Running) -> None:
    first, second = running.answers
    later = [{"role": "assistant", "content": "Mary Lund."}, *user_message(second)]
    whole = apply_template(running.document.tokenizer, [*user_message(f"{TEXT.rstrip()}\n\n{first}"), *later])
    expected = running.client.completions.create(
        **GREEDY, prompt=whole, extra_body={"winnow_context": running.context.id}
    )  # fmt: skip
    found = running.ask([*user_message(first), *later])
    assert found.choices[0].message.content == expected.choices[0].text
    assert found.usage.prompt_tokens == expected.usage.prompt_tokens == running.context.kept + len(whole) - running.context.seen


def test_a_plain_request_beside_it_is_plain(running: Running) -> None:
    (question, answer), *_ = running.answers.items()
    plain = [running.client.chat.completions.create(**GREEDY, messages=user_message(question)) for _ in range(2)]
    assert plain[0].choices == plain[1].choices
    assert plain[0].choices[0].message.content != answer.text
    assert plain[0].usage.prompt_tokens < running.context.kept
    assert running.ask(question).choices[0].message.content == answer.text


def test_the_store_is_listed_for_those_who_have_the_key(running: Running) -> None:
    url = f"{running.url}/v1/winnow/contexts"
    assert {"object": "context", **running.context.to_dict()} in get(url)["data"]
    for key in (None, "guess"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(url, key)
        assert refused.value.code == 401


@pytest.mark.parametrize(
    ("more", "field", "why"),
    [
        ({"extra": {"winnow_context": "0" * 32}}, "winnow_context", "there is no context 0+ in the server's store"),
        ({"extra": {"winnow_context": 3}}, "winnow_context", "3 is no context's id"),
        ({"extra": {"prompt_logprobs": 1}}, "prompt_logprobs", "have no probabilities: leave it out"),
        ({"extra": {"echo": True}}, "echo", "begins with placeholders"),
        ({"extra": {"truncate_prompt_tokens": 50}}, "truncate_prompt_tokens", "served whole, or not at all"),
        ({"extra": {"use_beam_search": True}}, "use_beam_search", "without the context"),
        ({"extra": {"add_generation_prompt": False}}, "add_generation_prompt", "where the assistant's answer begins"),
        ({"extra": {"cache_salt": "mine"}}, "cache_salt", "winnow_context sets it"),
        ({"extra": {"chat_template": "{{ messages }}"}}, "messages", "untrusted chat template"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "tools", "leave them out"),
        ({"max_tokens": 4000}, "max_tokens", "4000 new ones pass the server's 4096 tokens"),
        ({"messages": user_message("  ")}, "messages", "the question is empty"),
        ({"messages": user_message(TEXT.replace("1850", "1851"))}, "messages", "it begins with"),
        ({"messages": user_message(f"Read: {TEXT}")}, "messages", "put it first, unchanged, or send what follows it alone"),
        ({"messages": [{"role": "system", "content": "Be a bear."}, *user_message("Who?")]}, "messages", "--system"),
        ({"messages": user_message([{"type": "image_url", "image_url": {"url": "x"}}])}, "messages", "text alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(running: Running, more: dict[str, Any], field: str, why: str) -> None:
    from openai import BadRequestError

    messages = more.get("messages", QUESTIONS[0])
    with pytest.raises(BadRequestError, match=why) as refused:
        running.ask(messages, **{name: value for name, value in more.items() if name != "messages"})
    assert refused.value.status_code == 400
    assert refused.value.param == field


def test_other_models_and_endpoints(running: Running) -> None:
    from openai import BadRequestError, NotFoundError

    with pytest.raises(NotFoundError, match="'other' does not exist: there is embedded"):
        running.ask("Who?", model="other")
    with pytest.raises(BadRequestError, match="/v1/responses serves no contexts"):
        running.client.responses.create(model="embedded", input="hi", extra_body={"winnow_context": running.context.id})
    with pytest.raises(BadRequestError, match="one text, or the token ids of one prompt"):
        running.client.completions.create(**GREEDY, prompt=["a", "b"], extra_body={"winnow_context": running.context.id})


def test_damaged_files_end_their_requests_alone(running: Running) -> None:
    from openai import APIStatusError

    question, answer = next(iter(running.answers.items()))
    spoiled = []
    for part in ("header", "keys"):  # the middleware reads the one, the workers the other
        document = wk.read(running.document.model, running.document.tokenizer, f"{TEXT[:400]} {part}", "snapkv", 64)
        context = export_context(document, running.store, 64)
        file = running.store / f"{context.id}.context"
        data = bytearray(file.read_bytes())
        data[9 if part == "header" else len(data) // 2] ^= 255
        file.write_bytes(data)
        spoiled.append(context)
    for context, statuses in zip(spoiled, ({400}, {500}), strict=True):
        with pytest.raises(APIStatusError) as refused:
            running.ask("Who?", extra={"winnow_context": context.id})
        assert refused.value.status_code in statuses
        assert str(running.store) not in str(refused.value)
    assert running.ask(question).choices[0].message.content == answer.text
