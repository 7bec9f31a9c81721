"""OpenAI's own client: chat and text completions, whole and streamed, sampling, log probabilities, many at once."""

import asyncio

from common import KEY, MESSAGES, MODEL, NEW_TOKENS, base_url, check, engine_answer
from openai import AsyncOpenAI, OpenAI

client = OpenAI(base_url=base_url(), api_key=KEY)
greedy = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": NEW_TOKENS}
sampled = {"model": MODEL, "messages": MESSAGES, "temperature": 1.0, "max_tokens": 12, "n": 3, "seed": 7}

names = [one.id for one in client.models.list()]
check("models: list, retrieve", names == [MODEL] and client.models.retrieve(MODEL).id == MODEL, names)

whole = client.chat.completions.create(**greedy)
text, usage, own = whole.choices[0].message.content, whole.usage, engine_answer()
check("chat: the engine's own answer", bool(text) and (own is None or text == own["text"]), text, own)
check(
    "usage: the engine's tokens, entries kept",
    usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    and usage.winnow["kept_entries"]["mean"] < usage.prompt_tokens / 4
    and (own is None or (usage.prompt_tokens, usage.completion_tokens) == (own["prompt_tokens"], own["tokens"])),
    usage, own,
)  # fmt: skip

chunks = list(client.chat.completions.create(**greedy, stream=True, stream_options={"include_usage": True}))
parts = [one.choices[0].delta.content or "" for one in chunks if one.choices]
check("stream: the same text, in parts", "".join(parts) == text and len(parts) > NEW_TOKENS / 2, parts)
check("stream: usage in the last chunk", not chunks[-1].choices and chunks[-1].usage.total_tokens == usage.total_tokens)

first, again = (client.chat.completions.create(**sampled).choices for _ in range(2))
texts = [one.message.content for one in first]
check("n, seed: three texts, the same again", len(set(texts)) == 3 and texts == [one.message.content for one in again], texts)

stop = text.split()[4]
cut = client.chat.completions.create(**greedy, stop=[stop, "never said"]).choices[0]
check("stop", (cut.message.content, cut.finish_reason) == (text[: text.index(stop)], "stop"), stop, cut)

with client.chat.completions.stream(**greedy, stop=stop) as events:  # raises if max_tokens ended the answer
    said = events.get_final_completion().choices[0].message.content
check("stream: the client's own accumulator", said == cut.message.content, said)

told = client.chat.completions.create(**greedy, logprobs=True, top_logprobs=2).choices[0].logprobs.content
likely = all(one.top_logprobs[0].logprob == one.logprob <= 0 for one in told)
check("logprobs: their tokens make up the text", "".join(one.token for one in told) == text and likely, told)

two = client.completions.create(model=MODEL, prompt=["One, two,", "Red, green,"], temperature=0, max_tokens=8)
one = client.completions.create(model=MODEL, prompt="Red, green,", temperature=0, max_tokens=8, logprobs=1).choices[0]
check("completions: two prompts, each as alone", [x.index for x in two.choices] == [0, 1] and two.choices[1].text == one.text)
check("completions: logprobs, offsets", "".join(one.logprobs.tokens) == one.text and one.logprobs.text_offset[0] == 0, one)

options = {"winnow": {"policy": "full"}}
full = client.chat.completions.create(**greedy, extra_body=options).usage.winnow
check("extra_body: a policy of its own", full["policy"] == "full" and full["kept_bytes"] == full["full_bytes"], full)


async def eight() -> list[str]:
    async with AsyncOpenAI(base_url=base_url(), api_key=KEY) as many:
        answers = await asyncio.gather(*(many.chat.completions.create(**greedy) for _ in range(8)))
    return [one.choices[0].message.content for one in answers]


check("async: eight at once, each as alone", asyncio.run(eight()) == [text] * 8)
