"""Handoff inside vLLM: a prompt that vLLM read is the context that our own cache would give, and answers go on alike.

One engine for all: 20 blocks of 128 tokens, of which one prompt takes 17, and passes of 512 tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import winnowkv as wk
from winnowkv.contexts.flat import FlatStates, flat_states
from winnowkv.contexts.store import ContextStore
from winnowkv.integrations.vllm import Handoff, go_on
from winnowkv.integrations.vllm.listening import WORKER_EXTENSION
from winnowkv.integrations.vllm.options import transfer_config
from winnowkv.models.load import EMBEDDED, INSTALL, find_wheel, model_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make test-vllm has an environment for it)"),
    pytest.mark.skipif(find_wheel() is None, reason=f"the embedded model's wheel is not installed ({INSTALL})"),
]

BLOCK, BLOCKS, PASS = 128, 20, 512
BLOCK_BYTES = BLOCK * 30 * 2 * 3 * 64 * 4  # of SmolLM2-135M in float32
LONG, SHORT = 2100, 400  # tokens of prompts: one comes in five passes, the other in one
NEW = 16
SETTINGS = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler is in this process, the worker in another
}  # fmt: skip


class Engine:
    """vLLM with the connector, and the tokens of our own cache beside it."""

    def __init__(self, place: Path) -> None:
        from vllm import LLM

        self.store = ContextStore(place)
        self.model, self.tokenizer = wk.load(EMBEDDED, dtype=torch.float32)
        text = (resources.files("winnowkv.evaluate.needle") / "data" / "haystack.txt").read_text(encoding="utf-8")
        self.ids: list[int] = self.tokenizer.encode(text)
        transfer = transfer_config(str(place), handoff_gib=0.5)
        self.llm: Any = LLM(
            str(model_folder(EMBEDDED, torch.float32)), dtype="float32", enforce_eager=True, max_model_len=2304,
            max_num_batched_tokens=PASS, kv_cache_memory_bytes=BLOCKS * BLOCK_BYTES, kv_transfer_config=transfer,
            worker_extension_cls=WORKER_EXTENSION, disable_log_stats=False,
        )  # fmt: skip

    def ask(self, *requests: tuple[dict[str, Any], int, dict[str, Any] | None]) -> list[Any]:
        """Answers to requests of one batch: inputs, tokens to generate, extra arguments."""
        from vllm import SamplingParams

        params = [SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, extra_args=more) for _, new, more in requests]
        found: list[Any] = self.llm.generate([inputs for inputs, _, _ in requests], params, use_tqdm=False)
        return found

    def preemptions(self) -> int:
        """How often vLLM has preempted a request so far."""
        return int(next(metric.value for metric in self.llm.get_metrics() if metric.name == "vllm:num_preemptions"))

    def ours(self, ids: list[int], policy: str, budget: int) -> tuple[FlatStates, list[int]]:
        """What our own cache keeps of a prompt, and the tokens that it goes on with."""
        task = wk.TaskProfile(structure=wk.read_structure(self.tokenizer, ids))
        cache = wk.CompactCache(self.model, policy, budget, task=task)
        with torch.inference_mode():
            token = self.model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax()
            states, tokens = flat_states(cache), [int(token)]
            while len(tokens) < NEW:
                token = self.model(torch.tensor([[tokens[-1]]]), past_key_values=cache).logits[0, -1].argmax()
                tokens.append(int(token))
        return states, tokens

    def hand_off(self, ids: list[int], policy: str, budget: int, *beside: Any) -> tuple[dict[str, Any], list[int], list[Any]]:
        """Request A, in one batch with others: its answer's parameters, the tokens it generated, the answers of the others."""
        asked = Handoff(policy, budget, self.tokenizer).prompt(ids)
        *others, found = self.ask(*beside, (asked.inputs, 1, asked.extra_args))
        return found.kv_transfer_params, list(found.outputs[0].token_ids), others

    def go_on(self, answer: dict[str, Any], first: list[int]) -> list[int]:
        """All tokens of A and B."""
        after = go_on(answer, self.store, first)
        (found,) = self.ask((after.inputs, NEW - len(first), after.extra_args))
        assert found.num_cached_tokens == answer["kept"]
        return [*first, *found.outputs[0].token_ids]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """It takes half a minute to start."""
    before = {name: os.environ.get(name) for name in SETTINGS}
    os.environ.update(SETTINGS)
    made = Engine(tmp_path_factory.mktemp("store"))
    yield made
    made.llm.llm_engine.engine_core.shutdown()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def close(found: FlatStates, expected: FlatStates) -> bool:
    """Whether two contexts hold the same positions: their keys and values differ by rounding."""
    assert found.seen == expected.seen
    return torch.allclose(found.keys, expected.keys, atol=1e-4, rtol=0) and torch.allclose(
        found.values, expected.values, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("tokens", [LONG, SHORT], ids=["in five passes", "in one pass"])
@pytest.mark.parametrize("policy", ["snapkv", "keydiff", "streaming", "expected:equal=true", "winnow:equal=true"])
def test_a_handed_off_prompt_goes_on_as_in_our_own_cache(engine: Engine, policy: str, tokens: int) -> None:
    ids, budget = engine.ids[:tokens], tokens // 8
    states, expected = engine.ours(ids, policy, budget)
    answer, first, _ = engine.hand_off(ids, policy, budget)
    assert close(engine.store.states(answer["winnow_context"]), states)
    assert engine.go_on(answer, first) == expected


def test_everything_kept_goes_on_as_vllm_does(engine: Engine) -> None:
    ids = engine.ids[:LONG]
    (plain,) = engine.ask(({"prompt_token_ids": ids}, NEW, None))
    answer, first, _ = engine.hand_off(ids, "full", LONG)
    assert (answer["kept"], answer["seen"]) == (LONG, LONG)
    assert engine.go_on(answer, first) == list(plain.outputs[0].token_ids)


def test_a_plain_request_in_the_same_passes_is_untouched(engine: Engine) -> None:
    beside = ({"prompt_token_ids": engine.ids[3000:3300], "cache_salt": "once"}, NEW, None)
    (alone,) = engine.ask(beside)
    ids = engine.ids[100 : 100 + SHORT]
    answer, first, (found,) = engine.hand_off(ids, "snapkv", 64, ({**beside[0], "cache_salt": "again"}, NEW, None))
    assert list(found.outputs[0].token_ids) == list(alone.outputs[0].token_ids)
    assert found.kv_transfer_params is None
    assert engine.go_on(answer, first) == engine.ours(ids, "snapkv", 64)[1]


def test_a_preempted_prompt_is_heard_to_its_end(engine: Engine) -> None:
    # One block is vLLM's own. Both requests fit when they come, 3 and 16 of 19, and the first grows before the second is read.
    ids, before = engine.ids[: 16 * BLOCK - 10], engine.preemptions()
    growing = ({"prompt_token_ids": engine.ids[3000 : 3000 + 3 * BLOCK - 3], "cache_salt": "growing"}, 20, None)
    answer, first, _ = engine.hand_off(ids, "snapkv", 256, growing)
    assert engine.preemptions() > before
    states, expected = engine.ours(ids, "snapkv", 256)
    assert close(engine.store.states(answer["winnow_context"]), states)
    assert engine.go_on(answer, first) == expected


def test_what_vllm_had_in_its_prefix_cache_is_refused(engine: Engine) -> None:
    ids = engine.ids[500 : 500 + SHORT]
    asked = Handoff("snapkv", 64).prompt(ids)
    engine.ask(({"prompt_token_ids": ids}, 1, None))
    (found,) = engine.ask(({"prompt_token_ids": ids}, 1, asked.extra_args))
    assert "took them from its prefix cache" in found.kv_transfer_params["winnow_error"]
    (found,) = engine.ask((asked.inputs, 1, asked.extra_args))
    assert found.kv_transfer_params["seen"] == SHORT


def test_a_bad_request_is_answered_and_ends_alone(engine: Engine) -> None:
    ids = engine.ids[:SHORT]
    for asked in ({"policy": "pyramidkv"}, {"policy": "nobody"}, {"budget": 3}, {"budget": -1}):
        more = {"kv_transfer_params": {"winnow_compress": asked}}
        (found,) = engine.ask(({"prompt_token_ids": ids, "cache_salt": str(asked)}, 1, more))
        assert len(found.outputs[0].token_ids) == 1
        assert "winnow_context" not in found.kv_transfer_params
        assert str(next(iter(asked.values()))) in found.kv_transfer_params["winnow_error"]
