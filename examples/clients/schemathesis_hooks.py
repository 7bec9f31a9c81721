"""For schemathesis_client.py: what an OpenAPI document cannot say of a request, so that all the others must be accepted."""

from typing import Any

import schemathesis
from schemathesis import GenerationMode

VOCABULARY = 49152  # of the embedded model
SHORT = 4  # tokens of an answer, so that many requests fit into the time


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """Mend requests that fit the document while their fields contradict each other, or name no policy, context or token."""
    body = case.body
    if isinstance(body, dict) and case.meta is not None and case.meta.generation.mode == GenerationMode.POSITIVE:
        case.body = mended(body)
    return case


def mended(body: dict[str, Any]) -> dict[str, Any]:
    body = {name: value for name, value in body.items() if name != "winnow_context"}
    if body.get("top_logprobs"):
        body["logprobs"] = True
    if body.get("stream_options") is not None:
        body["stream"] = True
    body["max_tokens"] = min(body.get("max_tokens") or SHORT, SHORT)
    if body.get("max_completion_tokens") is not None:
        body["max_completion_tokens"] = body["max_tokens"]
    if body.get("min_tokens") is not None:
        body["min_tokens"] = min(body["min_tokens"], body["max_tokens"])
    if isinstance(body.get("winnow"), dict):
        known = {"task", "quality", "lookahead", "draft"}
        body["winnow"] = {"budget": 0.5} | {name: value for name, value in body["winnow"].items() if name in known}
    if "prompt" in body:
        body["prompt"] = within(body["prompt"])
    return body


def within(prompt: Any) -> Any:
    """The prompt, with token ids that the model has."""
    if isinstance(prompt, list):
        return [within(one) for one in prompt]
    return prompt % VOCABULARY if isinstance(prompt, int | float) else prompt
