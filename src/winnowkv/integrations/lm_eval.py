"""winnowkv in lm-evaluation-harness: the model ``winnow``, and our tasks in the harness's form.

lm-eval does not search for plug-ins, so ``winnowkv.evaluate`` must be imported before it looks the
model up: ``python -m winnowkv.evaluate`` does so (the same command line), and so does any task file
of ``local_tasks/`` that is named by its path, since lm-eval reads it first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from winnowkv.api import Run, compress
from winnowkv.budget import DEFAULT_BUDGET, Asked, Budget
from winnowkv.errors import InputError
from winnowkv.evaluate.lookahead import read_answer
from winnowkv.evaluate.tasks.protocol import middle_out
from winnowkv.evaluate.tasks.tasks import find_tasks
from winnowkv.models.load import best_device, best_dtype, load

DATA_VARIABLE = "WINNOW_DATA"  # environment variable that names the data folder
Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("winnow")
class WinnowLM(HFLM):
    """lm-eval's Hugging Face model with a compressed KV cache.

    The whole prompt is read and then compressed, few-shot examples and question included. A prompt
    longer than ``max_length`` keeps its first and last half, as in LongBench (lm-eval keeps only its
    end). The results file holds the number of prompts that were cut, and the bytes kept.

    Parameters
    ----------
    pretrained: ``embedded``, a hub id or a folder; or a model, with its ``tokenizer``.
    policy, budget, task: as for :func:`winnowkv.compress`; without a task each prompt is classified.
    dtype: the name of a torch dtype; None or ``auto``: what :func:`winnowkv.load` chooses.
    device: None, or a device that is not available: the best one available.
    options: batch_size, max_length and other arguments of lm-eval's own model.

    Raises
    ------
    PolicyError, BudgetError, InputError
        At once for bad arguments; while generating, for a prompt for which the budget is too small.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel = "embedded",
        policy: str = "winnow",
        budget: Asked = DEFAULT_BUDGET,
        task: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        self.settings: dict[str, Any] = {"policy": policy, "budget": Budget.of(budget), "task": task}
        self.counts = {"truncated_prompts": 0, "kept_bytes": 0, "full_bytes": 0}
        if isinstance(pretrained, str):
            device = device if device and can_use(device) else best_device()
            pretrained, own = load(pretrained, dtype=dtype_of(dtype, device), device=device)
            tokenizer = tokenizer or own
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **options)
        with self.compressing():
            pass  # raises now for bad arguments

    def compressing(self) -> AbstractContextManager[Run]:
        """A compress block with this model's settings."""
        return compress(self.model, **self.settings, tokenizer=self.tokenizer)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """lm-eval's generation, over compressed prompts."""
        with self.compressing() as run:
            answers: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        self._count(run)
        return answers

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Prompts as a padded batch ``[B, S]`` and its mask; those over ``left_truncate_len`` tokens lose their middle."""
        rows = [self.tok_encode(string) for string in strings]
        kept = [middle_out(row, left_truncate_len or len(row)) for row in rows]
        self.counts["truncated_prompts"] += sum(len(a) < len(b) for a, b in zip(kept, rows, strict=True))
        batch = self.tokenizer.pad({"input_ids": kept}, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation over its compressed context, and whether greedy decoding would write it.

        Requests run one at a time. As in generation, a continuation's first token is predicted by the prefill
        over the full cache, so continuations of one token do not measure compression. A context within the
        policy's observation window is kept whole, as is that of rolling likelihoods, which is one token.
        """
        answers = []
        with self.compressing() as run, torch.no_grad():
            for text, context, continuation in tqdm(requests, "Running loglikelihood requests", disable=disable_tqdm):
                room = self.max_length + 1 - len(continuation)  # the continuation's last token is never read
                if room < 1:
                    raise InputError(f"a continuation of {len(continuation)} tokens passes max_length {self.max_length}")
                kept = middle_out(context, room)
                self.counts["truncated_prompts"] += len(kept) < len(context)
                answers.append(self._continue(kept, continuation))
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, answers[-1])
        self._count(run)
        return answers

    def _continue(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        wanted = torch.tensor([continuation], device=self.device)
        output = self.model(input_ids=torch.tensor([context], device=self.device), use_cache=True, logits_to_keep=1)
        logits = output.logits
        if len(continuation) > 1:
            more = read_answer(self.model, output.past_key_values, wanted[:, :-1])
            logits = torch.cat([logits, more], dim=1)
        chances = logits.float().log_softmax(-1).gather(-1, wanted[..., None])
        return float(chances.sum()), bool((logits.argmax(-1) == wanted).all())

    def _count(self, run: Run) -> None:
        for report in run.reports:
            self.counts["kept_bytes"] += report.kept_bytes
            self.counts["full_bytes"] += report.full_bytes

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's facts for the results file, with the number of cut prompts and the bytes kept so far."""
        return {**super().get_model_info(), **self.counts}


class LocalTask(ConfigurableTask):
    """One of our tasks in lm-eval's form, with the rows, prompts, clean-up and scores of ``winnow eval``.

    Rows come from the folder in ``WINNOW_DATA``, else from the hub.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        (self.source,) = find_tasks([config["task"]])
        data = os.environ.get(DATA_VARIABLE)
        self.rows = self.source.rows(Path(data) if data else None)
        docs = [{"number": i, "prompt": row.prompt, "answers": list(row.answers)} for i, row in enumerate(self.rows)]
        metrics = dict.fromkeys(("score", self.source.metric))  # lm-eval's own group means are means of "score"
        super().__init__(
            config={
                "task": self.source.name,
                "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
                "test_split": "test",
                "output_type": "generate_until",
                "doc_to_text": "prompt",
                "doc_to_target": "answers",
                "process_results": self.score,
                "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
                "generation_kwargs": {"max_gen_toks": self.source.max_new_tokens, "do_sample": False, "until": []},
                "num_fewshot": 0,
                "metadata": {"version": 1.0, **(config.get("metadata") or {})},
            }
        )

    def score(self, doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        """The score of an answer, under both of its names."""
        value = self.source.score(self.rows[doc["number"]], results[0])
        return {"score": value, self.source.metric: value}


def can_use(device: str) -> bool:
    """Whether a device is available: lm-eval's command line always names ``cuda:0``."""
    return not device.startswith("cuda") or torch.cuda.is_available()


def dtype_of(name: str | None, device: str) -> torch.dtype:
    """A dtype from its name. Raises InputError for an unknown name."""
    if name is None or name == "auto":
        return best_dtype(device.partition(":")[0])
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype {name!r} is unknown: use auto, float32, bfloat16 or float16")
    return dtype
