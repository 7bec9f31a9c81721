"""LangChain's ChatOpenAI on `winnow serve`: a text is stored once, and every question of a chain is asked about it.

    python examples/langchain_chat.py                                              # starts a server of its own
    python examples/langchain_chat.py --url http://127.0.0.1:8000/v1 --model NAME  # asks one that runs

The server keeps the text compressed; requests name it (winnow_context) and send the question alone. It takes langchain-openai.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from tempfile import TemporaryDirectory

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

from winnowkv.evaluate.needle.prompts import read_haystack, read_needles

FACTS = read_needles()[3:5]  # a month and a capital
QUESTIONS = [fact.question for fact in FACTS]
TEXT = f"{read_haystack()[:1600]} {FACTS[0].needle} {read_haystack()[1600:2200]} {FACTS[1].needle}"


@contextmanager
def server(asked: argparse.Namespace) -> Iterator[str]:
    """Where to ask: the server that was named, or a new one on a free port of this machine."""
    if asked.url:
        yield asked.url
        return
    command = [sys.executable, "-m", "winnowkv", "serve", "--model", asked.model, "--port", "0", "--json", "--store"]
    with TemporaryDirectory() as store, subprocess.Popen([*command, store], stdout=subprocess.PIPE, text=True) as process:
        try:
            said = takewhile(lambda line: line != "}\n", process.stdout)  # a JSON object, once it listens
            yield json.loads("".join(said) + "}")["url"] + "/v1"
        finally:
            process.terminate()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="of a running server, with /v1")
    parser.add_argument("--model", default="embedded", help="what the server serves")
    asked = parser.parse_args(arguments)
    with server(asked) as url:
        chat = ChatOpenAI(model=asked.model, base_url=url, api_key="none", temperature=0, max_tokens=24)
        body = {"text": TEXT, "hint": " ".join(QUESTIONS), "budget": 128}  # the hint names what will be asked
        stored = chat.root_client.post("/contexts", body=body, cast_to=object)
        print(f"stored: {stored['kept']} entries a head of {stored['seen']} tokens, {stored['bytes'] / 2**20:.1f} MiB")
        chain = ChatPromptTemplate([("user", "{question}")]) | chat.bind(extra_body={"winnow_context": stored["id"]})
        for question, answer in zip(QUESTIONS, chain.batch([{"question": one} for one in QUESTIONS]), strict=True):
            print(f"\n{question}\n  {answer.content.strip()}\n  {answer.usage_metadata}")


if __name__ == "__main__":
    main()
