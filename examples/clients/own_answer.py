"""The engine's own answer to the conversation of common.py, without a server: greedy, as JSON. Run by the server's Python."""

import json

from common import MESSAGES, MODEL, NEW_TOKENS

import winnowkv as wk

model, tokenizer = wk.load(MODEL, dtype="float32")
answer = wk.Engine(model, tokenizer).generate([MESSAGES], wk.Sampling(max_new_tokens=NEW_TOKENS, temperature=0))[0]
print(json.dumps({"text": answer.text, "prompt_tokens": answer.prompt_tokens, "tokens": len(answer.tokens)}))
