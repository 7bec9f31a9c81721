"""``winnow serve``: what it refuses in one sentence, what it prints, and how it ends."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.serving import chat, chunks_of
from winnowkv.cli.serve import lines_to_try
from winnowkv.errors import ModelNotFoundError
from winnowkv.models import load as models
from winnowkv.serve.settings import ServeSettings

Winnow = Callable[..., tuple[int, str, str]]
needs_model = pytest.mark.skipif(models.find_wheel() is None, reason=f"the embedded model is missing ({models.INSTALL})")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--host", "0.0.0.0"), "--insecure"),
        (("--budget", "0"), "budget"),
        (("--policy", "nosuch"), "nosuch"),
        (("--kv-memory", "much"), "kv_memory"),
        (("--max-prompt-tokens", "x"), "--max-prompt-tokens"),
        (("--api-key", "short"), "at least 8"),
        (("--api-key-file", "/nowhere/at/all"), "--api-key-file"),
        (("--host", "no.such.host.invalid", "--insecure"), "--host"),
        (("--model", "/no/such/model"), "does not exist"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(winnow: Winnow, given: tuple[str, ...], message: str) -> None:
    code, out, err = winnow("serve", "--port", "0", *given)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_port_that_is_taken_is_one_sentence(winnow: Winnow) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = winnow("serve", "--port", taken.getsockname()[1])
    assert code == 2
    assert "is in use: give another with --port" in err


def test_missing_packages_are_named_with_the_way_to_get_them(winnow: Winnow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "winnowkv.cli.loading.find_spec", lambda name: None if name == "uvicorn" else importlib.util.find_spec(name)
    )
    code, _, err = winnow("serve", "--port", "0")
    assert code == 2
    assert "uvicorn" in err
    assert "pip install 'winnowkv[serve]'" in err


def test_a_model_that_cannot_be_loaded_is_one_sentence_and_ends_the_server(
    winnow: Winnow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise ModelNotFoundError("there is no such model: name another")

    monkeypatch.setattr("winnowkv.cli.loading.load_model", load)
    code, out, err = winnow("serve", "--port", "0")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "winnow: there is no such model: name another"
    assert "Traceback" not in err


def test_three_lines_to_try() -> None:
    plain = lines_to_try(ServeSettings(), "http://127.0.0.1:9")
    assert [line.split()[0] for line in plain] == ["winnow", "curl", sys.executable, "browser:"]
    assert not any("uthorization" in line for line in plain)
    body = plain[1].split("-d '")[1].removesuffix("'")
    assert json.loads(body)["model"] == "embedded"
    compile(plain[2].split('"')[1], "line", "exec")
    keyed = lines_to_try(ServeSettings(api_keys=("very-secret",)), "http://127.0.0.1:9")
    assert "authorization: Bearer YOUR_KEY" in keyed[1]
    assert "very-secret" not in "".join(keyed)


@pytest.mark.slow
@needs_model
def test_it_serves_the_embedded_model_and_ends_in_order_after_sigterm(tmp_path: Path) -> None:
    command = "from winnowkv.cli import main; main()"
    options = ["serve", "--port", "0", "--kv-memory", "256MiB", "--json"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", command, *options], stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    said = ""
    while not said.endswith("}\n"):
        said += process.stdout.readline()
    url = json.loads(said)["url"]
    body: dict[str, Any] = chat("What is the capital of France?", model="embedded", max_tokens=40, ignore_eos=True)
    assert "Paris" in httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).text
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=60) as answer:
        pieces = answer.iter_text()
        text = next(pieces)
        process.send_signal(signal.SIGTERM)
        text += "".join(pieces)
    assert chunks_of(text)[-1]["choices"][0]["finish_reason"] == "length"
    assert process.wait(60) == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()[1:]]
    assert [line["generated_tokens"] for line in lines if line["message"] == "request"] == [40, 40]
    assert "capital" not in (tmp_path / "log").read_text()
