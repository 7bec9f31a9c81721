"""langchain-openai: chat and text models, whole, streamed, in batches; what langchain adds to a request by itself."""

import openai
from common import KEY, MESSAGES, MODEL, NEW_TOKENS, PROMPT, base_url, check, engine_answer, raises
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

where = {"model": MODEL, "base_url": base_url(), "api_key": KEY, "temperature": 0}
model = ChatOpenAI(**where, max_tokens=NEW_TOKENS, stream_usage=True)  # sent as max_completion_tokens, stream_options

whole, own = model.invoke(PROMPT), engine_answer()
check("invoke: the engine's own answer", bool(whole.content) and (own is None or whole.content == own["text"]), whole, own)
usage, finish = whole.usage_metadata, whole.response_metadata["finish_reason"]
check(
    "invoke: usage, finish_reason", usage["total_tokens"] > usage["input_tokens"] > 200 and finish in ("length", "stop"), whole
)

parts = list(model.stream(PROMPT))
check("stream: the same text, in parts", "".join(one.text for one in parts) == whole.content and len(parts) > 8, parts)
total = parts[0]
for one in parts[1:]:
    total += one
check("stream: the chunks' sum has the usage", total.usage_metadata == usage, total)

answers = model.batch([PROMPT, "Name three fruits.", PROMPT])
check("batch: three at once", [one.content == whole.content for one in answers] == [True, False, True], answers)

chosen = model.generate([[HumanMessage("Name a fruit.")]], n=2, temperature=1.0, seed=3).generations[0]
check("generate: n=2", len(chosen) == 2 and chosen[0].text != chosen[1].text, chosen)

stop = whole.content.split()[4]
cut = model.bind(stop=[stop]).invoke(MESSAGES).content
check("bind: stop", cut == whole.content[: whole.content.index(stop)], stop, cut)

told = model.bind(logprobs=True, top_logprobs=2).invoke(MESSAGES).response_metadata["logprobs"]["content"]
check("bind: logprobs", "".join(one["token"] for one in told) == whole.content, told)

kept = ChatOpenAI(**where, max_tokens=4, extra_body={"winnow": {"policy": "snapkv"}}).invoke(PROMPT)
check("extra_body: a policy of its own", kept.response_metadata["token_usage"]["winnow"]["policy"] == "snapkv", kept)

plain = OpenAI(**where, max_tokens=8)  # /v1/completions
text = plain.invoke("One, two,")
check("OpenAI (completions): invoke, stream", text and "".join(plain.stream("One, two,")) == text, text)
check("OpenAI (completions): batch", plain.batch(["One, two,"] * 2) == [text] * 2)


class Fruit(BaseModel):
    name: str


error = raises(openai.BadRequestError, model.with_structured_output(Fruit).invoke, "Name a fruit.")
check("structured output is refused by its field", error is not None and error.param == "response_format", error)
