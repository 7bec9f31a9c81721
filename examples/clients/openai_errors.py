"""OpenAI's own client: its exceptions, raw responses, and streams that are given up."""

import re
import time

import httpx
import openai
from common import KEY, MESSAGES, MODEL, base_url, check, raises

client = openai.OpenAI(base_url=base_url(), api_key=KEY, max_retries=0)
create, asked = client.chat.completions.create, {"model": MODEL, "messages": MESSAGES, "max_tokens": 4}

error = raises(openai.NotFoundError, create, **asked | {"model": "gpt-4"})
check("NotFoundError: an unknown model", error is not None and error.code == "model_not_found", error)

error = raises(openai.BadRequestError, create, **asked, temperature=3)
check("BadRequestError: names the field", error is not None and error.param == "temperature" and error.body["message"], error)

error = raises(openai.BadRequestError, create, **asked, tools=[{"type": "function", "function": {"name": "now"}}])
check("BadRequestError: what is not served", error is not None and error.param == "tools", error)

error = raises(openai.BadRequestError, create, **asked | {"messages": [{"role": "user", "content": "word " * 9000}]})
check("BadRequestError: too long a prompt", error is not None and error.code == "context_length_exceeded", error)

error = raises(openai.APIStatusError, create, **asked | {"messages": [{"role": "user", "content": "word " * 10**6}]})
check("APIStatusError 413: too large a body", error is not None and error.status_code == 413, error)

if KEY != "none":
    error = raises(openai.AuthenticationError, client.with_options(api_key="not-a-key").chat.completions.create, **asked)
    check("AuthenticationError: another key", error is not None and error.code == "invalid_api_key", error)

error = raises(openai.APITimeoutError, client.with_options(timeout=0.2).chat.completions.create, **asked | {"max_tokens": 64})
check("APITimeoutError: the client's own limit", error is not None, error)

raw = client.chat.completions.with_raw_response.create(**asked, extra_headers={"x-request-id": "my-request-1"})
named = raw.headers["x-request-id"], raw.parse().id, raw.parse()._request_id
check("with_raw_response: the request's id", named == ("my-request-1", "chatcmpl-my-request-1", "my-request-1"), named)


def value(name: str) -> float:
    """A number of the server's /metrics."""
    page = httpx.get(base_url().removesuffix("/v1") + "/metrics", headers={"authorization": f"Bearer {KEY}"}).text
    found = re.search(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)
    return float(found[1]) if found else 0.0


gone = 'winnow_cancelled_requests_total{reason="disconnected"}'
before = value(gone)
with create(**asked | {"max_tokens": 64}, stream=True, extra_body={"ignore_eos": True}) as stream:
    next(stream)
    next(stream)
until = time.monotonic() + 30
while (value("winnow_active_requests"), value(gone)) != (0, before + 1) and time.monotonic() < until:
    time.sleep(0.1)
left = value("winnow_active_requests"), value("winnow_kv_bytes"), value(gone)
check("a closed stream gives back row and memory", left == (0, 0, before + 1), left)
