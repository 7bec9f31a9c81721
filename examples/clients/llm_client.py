"""``llm``, Simon Willison's command line: a model of its own in extra-openai-models.yaml, streamed and not, a conversation."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import KEY, MODEL, NEW_TOKENS, PROMPT, base_url, check, engine_answer

MODELS = f"""
- model_id: winnow
  supports_schema: true
  model_name: {MODEL}
  api_base: {base_url()}
  api_key_name: winnow
- model_id: winnow-text
  model_name: {MODEL}
  api_base: {base_url()}
  api_key_name: winnow
  completion: true
"""

folder = tempfile.TemporaryDirectory()
(Path(folder.name) / "extra-openai-models.yaml").write_text(MODELS)
environment = os.environ | {"LLM_USER_PATH": folder.name}
greedy = ["-o", "temperature", "0", "-o", "max_tokens", str(NEW_TOKENS)]


def llm(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("llm")), *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=300)


llm("keys", "set", "winnow", "--value", KEY)
check("models: lists it", "winnow" in llm("models").stdout)

whole, own = llm("-m", "winnow", "--no-stream", *greedy, PROMPT), engine_answer()
same = own is None or whole.stdout.strip() == own["text"].strip()
check("--no-stream: the engine's own answer", bool(whole.stdout.strip()) and same, whole, own)

streamed = llm("-m", "winnow", *greedy, "--usage", PROMPT)
check("streamed: the same text", streamed.stdout == whole.stdout, streamed)
check("--usage: tokens", "Token usage: " in streamed.stderr and "input" in streamed.stderr, streamed.stderr)

piped = llm("-m", "winnow", *greedy, "Summarize this in one sentence.", "-s", "Be short.", stdin="Winter is cold.")
check("a text piped in, a system prompt", piped.returncode == 0 and bool(piped.stdout.strip()), piped)

further = llm("-m", "winnow", "-c", *greedy, "Say more.")
check("-c: a conversation goes on", further.returncode == 0 and bool(further.stdout.strip()), further)

text = [llm("-m", "winnow-text", *more, *greedy, "One, two, three,") for more in ([], ["--no-stream"])]
check("completion: true, streamed and not", text[0].stdout == text[1].stdout != "" and text[0].returncode == 0, text)

seeded = [llm("-m", "winnow", "-o", "seed", "5", "-o", "max_tokens", "12", "Name a fruit.").stdout for _ in range(2)]
check("-o seed: the same again", seeded[0] == seeded[1] != "\n", seeded)

error = llm("-m", "winnow", "--schema", "name, age int", "Invent a dog.")
check("--schema is refused in one line", error.returncode == 1 and "response_format" in error.stderr, error)
