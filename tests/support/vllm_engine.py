"""Stored contexts of the embedded model, and vLLM engines that serve them (tests/in_vllm)."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import winnowkv as wk
from winnowkv.contexts.context import Context, ContextPrompt
from winnowkv.contexts.export import export_context
from winnowkv.contexts.store import ContextStore
from winnowkv.evaluate.needle.prompts import read_haystack
from winnowkv.integrations.vllm.options import transfer_config
from winnowkv.models.load import model_folder

QUESTIONS = ["What is this text about?", "Who is mentioned in it?"]
TEXTS = {"first": (0, 3000), "second": (20000, 23000)}  # characters of the needle test's essays: 650 tokens
SETTINGS = [
    ("full", "first", "full", 1.0), ("snapkv-256", "first", "snapkv", 256), ("snapkv-250", "first", "snapkv", 250),
    ("streaming-256", "first", "streaming", 256), ("second", "second", "snapkv", 256),
]  # fmt: skip
ANSWER = 32  # tokens
MIB = 1 << 20

for name, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that a test can look into the scheduler
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(name, value)


@dataclass
class Stored:
    """A context, what is asked of it, and what our own cache answers: token ids."""

    context: Context
    prompts: list[ContextPrompt]
    answers: list[list[int]]
    document: list[int] = field(default_factory=list)

    def whole(self, question: int) -> list[int]:
        """The prompt with the document itself in place of its entries."""
        return [*self.document, *self.prompts[question].ids[self.context.kept :]]


def fill(
    store: ContextStore, dtype: torch.dtype, settings: Sequence[tuple[str, str, str, Any]] = SETTINGS
) -> dict[str, Stored]:
    """Read the texts, store what each policy keeps, and ask our own engine."""
    model, tokenizer = wk.load("embedded", dtype=dtype)
    sampling = wk.Sampling(max_new_tokens=ANSWER, ignore_eos=True)
    stored = {}
    for label, text, policy, budget in settings:
        begin, end = TEXTS[text]
        document = wk.read(model, tokenizer, read_haystack()[begin:end], policy, budget)
        context = export_context(document, store, block=1, name=label)
        stored[label] = Stored(
            context,
            [context.ask(tokenizer, question) for question in QUESTIONS],
            [document.ask(question, sampling=sampling).tokens for question in QUESTIONS],
            document.ids,
        )
    return stored


@contextmanager
def engine(store: ContextStore | None, dtype: str = "float32", **options: Any) -> Iterator[Any]:
    """A vLLM engine in this process, with the connector if there is a store."""
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"max_model_len": 2048, "kv_cache_memory_bytes": 512 * MIB, "enforce_eager": True, **options}
    if store is not None:
        settings["kv_transfer_config"] = transfer_config(store.place)
    llm = vllm.LLM(model=str(model_folder("embedded", getattr(torch, dtype))), dtype=dtype, **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def sampling(prompt: ContextPrompt | None = None, **options: Any) -> Any:
    """Greedy sampling of :data:`ANSWER` tokens, on a context if there is one."""
    import vllm

    settings = {"temperature": 0, "max_tokens": ANSWER, "ignore_eos": True, "detokenize": False, **options}
    return vllm.SamplingParams(**settings, **({} if prompt is None else {"extra_args": prompt.extra_args}))


def generate(llm: Any, requests: Sequence[ContextPrompt | list[int] | tuple[dict[str, Any], Any]], **options: Any) -> list[Any]:
    """Run requests together: prompts on contexts, plain token ids, or pairs of what ``vllm.LLM.generate`` takes."""
    inputs, parameters = [], []
    for request in requests:
        if isinstance(request, ContextPrompt):
            inputs.append(request.inputs)
            parameters.append(sampling(request, **options))
        elif isinstance(request, tuple):
            inputs.append(request[0])
            parameters.append(request[1])
        else:
            inputs.append({"prompt_token_ids": request})
            parameters.append(sampling(**options))
    return llm.generate(inputs, parameters, use_tqdm=False)


def tokens(output: Any) -> list[int]:
    """What a request generated."""
    return list(output.outputs[0].token_ids)


def failed(output: Any) -> bool:
    """Whether vLLM ended a request with an error."""
    return output.outputs[0].finish_reason == "error"


def worker(llm: Any) -> Any:
    """The connector of the engine's worker."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def scheduler(llm: Any) -> Any:
    """The engine's scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler
