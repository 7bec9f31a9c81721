"""lm-evaluation-harness: ``local-chat-completions`` and ``local-completions`` on a task of our own, without the hub."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import KEY, MODEL, base_url, check
from openai import OpenAI

HERE = Path(__file__).parent
QUESTIONS = [json.loads(line) for line in (HERE / "questions.jsonl").read_text().splitlines()]
UNTIL = ["\n", "Question:", "Text:", "Answer:", "###", "</s>"]  # of lm_eval_task.yaml
client = OpenAI(base_url=base_url(), api_key=KEY)
how = {"model": MODEL, "temperature": 0, "max_tokens": 16, "seed": 1234}


def evaluate(kind: str, path: str, *words: str) -> tuple[subprocess.CompletedProcess[str], dict, list[dict]]:
    """lm_eval's run, its results, and its samples in the order of the documents."""
    with tempfile.TemporaryDirectory() as folder:
        served = f"model={MODEL},base_url={base_url()}/{path},tokenizer_backend=None,num_concurrent=2,max_retries=1"
        command = [
            str(Path(sys.executable).with_name("lm_eval")), "--model", kind, "--model_args", served, "--include_path", ".",
            "--tasks", "winnow_clients", "--log_samples", "--output_path", f"{folder}/out", *words,
        ]  # fmt: skip
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": folder, "OPENAI_API_KEY": KEY}
        ran = subprocess.run(command, cwd=HERE, env=os.environ | offline, capture_output=True, text=True, timeout=300)
        found = {file.name.split("_")[0]: file.read_text() for file in Path(folder).glob("out/**/*.json*")}
    samples = [json.loads(line) for line in found.get("samples", "").splitlines()]
    return ran, json.loads(found.get("results", "{}")), sorted(samples, key=lambda one: one["doc_id"])


def asked(question: dict) -> str:
    return f"Text: {question['text']}\nQuestion: {question['question']}\nAnswer in one word."


ran, results, samples = evaluate("local-chat-completions", "chat/completions", "--apply_chat_template")
check("local-chat-completions: runs, four samples", ran.returncode == 0 and len(samples) == 4, ran.stderr[-3000:])
said = [one["resps"][0][0] for one in samples]
chat = [
    client.chat.completions.create(**how, messages=[{"role": "user", "content": asked(one)}], stop=UNTIL[:4])
    for one in QUESTIONS
]
texts = [one.choices[0].message.content for one in chat]
check("chat: answers as the openai client's", said == texts, said, texts)
score = results["results"]["winnow_clients"]["exact_match,none"]
right = [said.strip().strip(".").lower() == one["answer"].lower() for said, one in zip(texts, QUESTIONS, strict=True)]
check("chat: the score is theirs", score == sum(right) / len(right), score, texts)

ran, _, samples = evaluate("local-completions", "completions")
check("local-completions: runs, six stop strings", ran.returncode == 0 and len(samples) == 4, ran.stderr[-3000:])
said = [one["resps"][0][0] for one in samples]
plain = [client.completions.create(**how, prompt=asked(one), stop=UNTIL).choices[0].text for one in QUESTIONS]
check("completions: as the openai client's", said == plain, said, plain)
