"""``winnow audit``: what compression costs on prompts without labels, against the full cache's own answers.

The full cache continues each prompt greedily. Every compressed cache then reads these tokens (it is
*forced* along them), all settings of similar length in one pass, and its own most likely token is
compared at each. The first token of a continuation comes from the prompt's own logits, which no
eviction changes: it is left out of every number, and a prompt whose continuation is that one token
has nothing to compare (``trivial``). A policy with lookahead reads the first tokens over the whole cache,
as it does live; there it is compared as the full cache itself.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from winnowkv.budget import Asked
from winnowkv.cache.cache import CompactCache
from winnowkv.cache.reading import extend
from winnowkv.cache.stacked import stack
from winnowkv.engine.step import greedy_rows
from winnowkv.errors import InputError, WinnowError
from winnowkv.evaluate.lookahead import FirstTokens, looked
from winnowkv.evaluate.needle.prompts import read_rows
from winnowkv.evaluate.report.machine import revision, versions
from winnowkv.evaluate.report.store import ResultStore
from winnowkv.evaluate.settings import Kept, Setting, batches, continue_all, policies_for, read_prompt, replay, settings
from winnowkv.evaluate.tasks.protocol import middle_out
from winnowkv.evaluate.tasks.tasks import find_tasks
from winnowkv.files import read_text, shown
from winnowkv.models.info import end_tokens, position_limit, prompt_limit
from winnowkv.models.load import dtype_name
from winnowkv.prompt.chat import encode
from winnowkv.prompt.classifier import task_profile
from winnowkv.prompt.structure import read_structure
from winnowkv.prompt.task import TaskProfile

LOGITS_AT_ONCE = 2**24  # numbers, 64 MiB in float32: bounds the memory for any vocabulary and length
NOT_A_NUMBER = "a logit is not a number"
Advance = Callable[[str], None]
Line = dict[str, Any]


@dataclass(frozen=True)
class AuditPrompt:
    """A prompt; ``template`` False leaves out the chat template, as the protocols of some tasks do."""

    id: str
    text: str
    template: bool = True

    @property
    def digest(self) -> str:
        """A hash of the content, which tells prompts apart independent of their ids."""
        return hashlib.sha256(f"{self.template}\n{self.text}".encode()).hexdigest()[:16]


def file_prompts(path: Path) -> list[AuditPrompt]:
    """Prompts of a JSONL file, rows ``{"prompt": ...}`` with an optional ``id``; any other file is one prompt.

    Raises InputError with file and line for a broken row, and for a file that cannot be read or is empty.
    """
    if path.suffix == ".jsonl":
        rows = read_rows(path, "prompt", ("prompt",))
        ids = [row.get("id", f"{path.name}:{n}") for n, row in enumerate(rows, 1)]
        if wrong := [one for one in ids if isinstance(one, bool) or not isinstance(one, str | int)]:
            raise InputError(f"prompt file {path}: the id {shown(wrong[0])} is neither a text nor a whole number")
        return [AuditPrompt(str(one), row["prompt"]) for one, row in zip(ids, rows, strict=True)]
    text = read_text(path, lambda why: InputError(f"prompt file {path} {why}"))
    if not text.strip():
        raise InputError(f"prompt file {path} is empty: give at least one word")
    return [AuditPrompt(path.name, text)]


def gather_prompts(
    files: Sequence[Path], tasks: Sequence[str], data: Path | None, skip: int = 0, limit: int | None = None
) -> list[AuditPrompt]:
    """Prompts of files and of tasks, ``limit`` of each after its first ``skip``; equal prompts count once.

    Raises InputError if none is left.
    """
    sources = [file_prompts(path) for path in files]
    for task in find_tasks(tasks) if tasks else []:
        sources.append([AuditPrompt(f"{task.name}/{row.id}", row.prompt, task.chat) for row in task.rows(data)])
    if not sources:
        raise InputError("no prompts to audit: give --prompts FILE.jsonl, or --tasks and --data")
    end = None if limit is None else skip + limit
    found: dict[str, AuditPrompt] = {}
    for source in sources:
        for prompt in source[skip:end]:
            found.setdefault(prompt.digest, prompt)
    if not found:
        raise InputError(f"--skip {skip} passes over every prompt: the longest source has {max(map(len, sources))}")
    return list(found.values())


@dataclass(frozen=True)
class Audit:
    """What to measure. ``policies`` and ``budgets`` stay as the user wrote them, for the results.

    ``max_context``: most prompt tokens, None for the model's limit; longer prompts lose their middle.
    """

    prompts: Sequence[AuditPrompt]
    policies: Sequence[str]
    budgets: Sequence[Asked]
    chat: bool
    max_new_tokens: int = 64
    max_context: int | None = None

    @property
    def settings(self) -> list[Setting]:
        """Every policy at every budget."""
        return settings(self.policies, self.budgets)

    def limit(self, model: PreTrainedModel) -> int | None:
        """Most prompt tokens that leave positions for the continuation. Raises InputError if none are left."""
        positions = position_limit(model)
        if positions is not None and positions <= self.max_new_tokens:
            raise InputError(
                f"{self.max_new_tokens} new tokens leave no room for a prompt in the model's {positions} positions: "
                f"lower --max-new-tokens"
            )
        return prompt_limit(model, self.max_new_tokens, self.max_context)

    def check(self, model: PreTrainedModel) -> None:
        """Raise a WinnowError for what this model cannot be asked, before any work. The model needs no weights."""
        self.limit(model)
        policies_for(self.settings, model, TaskProfile.of("localization"))

    def config(self, model: PreTrainedModel, name: str, served: torch.dtype) -> dict[str, Any]:
        """What all lines of one result folder must have in common."""
        return {
            "command": "audit", "model": name, "dtype": dtype_name(model.dtype), "served_dtype": dtype_name(served),
            "chat": self.chat, "max_new_tokens": self.max_new_tokens, "max_context": self.limit(model),
        }  # fmt: skip

    def encoded(self, prompt: AuditPrompt, model: PreTrainedModel, tokenizer: Any) -> tuple[list[int], int]:
        """A prompt's token ids, and how many were cut out of its middle."""
        ids, limit = encode(tokenizer, prompt.text, chat=self.chat and prompt.template), self.limit(model)
        left = ids if limit is None else middle_out(ids, limit)
        return left, len(ids) - len(left)

    def expected(self) -> list[Line]:
        """The identifying fields of every line of this audit: prompts x settings."""
        return [{"prompt": p.digest, "id": p.id, **asdict(s)} for p in self.prompts for s in self.settings]


def identity(line: Line) -> Hashable:
    """The identity of a result line: lines of one measurement have the same."""
    return (line["prompt"], *Setting(line["policy"], line["budget"]).key)


def run(
    test: Audit, model: PreTrainedModel, tokenizer: Any, store: ResultStore, advance: Advance, served: torch.dtype | None = None
) -> None:
    """Measure what the store does not hold yet; ``advance`` is called once for every line, old and new.

    ``served``: the dtype in which bytes are counted, if the model is used in another dtype than it has here.
    Raises ProfileError, before any work, if a policy needs a calibration profile and this model has none.
    """
    asked, frame = test.settings, {"versions": versions(), "git": revision()}
    test.check(model)
    for prompt in test.prompts:
        named: Line = {"prompt": prompt.digest, "id": prompt.id}
        lacking = [setting for setting in asked if not store.has(identity({**named, **asdict(setting)}))]
        for _ in range(len(asked) - len(lacking)):
            advance("done before")
        if not lacking:
            continue
        ids, cut = test.encoded(prompt, model, tokenizer)
        named |= {"prompt_tokens": len(ids), "truncated_tokens": cut}
        try:
            lines = measure(ids, prompt.text, lacking, model, tokenizer, test.max_new_tokens, served or model.dtype)
        except (WinnowError, torch.OutOfMemoryError) as error:
            torch.cuda.empty_cache()
            lines = [{**asdict(setting), "failed": str(error)} for setting in lacking]
        for line in lines:
            store.add({**named, **line, **frame})
            advance(prompt.id)


def measure(
    ids: list[int], text: str, asked: Sequence[Setting], model: PreTrainedModel, tokenizer: Any, limit: int, served: torch.dtype
) -> list[Line]:
    """One line for each setting of a prompt, from one prefill. Raises InputError if a logit of the full cache is NaN."""
    stop, task = end_tokens(model, tokenizer), replace(task_profile(text), structure=read_structure(tokenizer, ids))
    made = policies_for(asked, model, task)
    recorded, logits, seconds = read_prompt(model, ids, made.values(), task)
    tokens = full_answer(model, recorded, logits, limit, stop)
    truth = full_logits(model, recorded, tokens)
    first = FirstTokens.known(model, tokens, torch.cat([logits, truth]))
    kept = replay(recorded, asked, made, task, first=first, keep_scores=True)
    spent = [costs(one, seconds, served) for one in kept]
    found = compare(model, kept, logits, tokens, truth, len(ids))
    answer = tokenizer.decode([token for token in tokens if token not in stop], skip_special_tokens=True)
    return [{**asdict(one.setting), "continuation": answer, **found[one.setting], **cost}
            for one, cost in zip(kept, spent, strict=True)]  # fmt: skip


def full_answer(model: PreTrainedModel, recorded: CompactCache, logits: Tensor, limit: int, stop: frozenset[int]) -> list[int]:
    """The full cache's greedy continuation of a recorded prompt, stop token included.

    ``logits`` ``[1, V]`` are those of the prompt's last token. Raises InputError if a logit is NaN.
    """
    (tokens,) = greedy_rows([recorded.replay("full", 1)], logits, limit, lambda made: made[-1] in stop)
    if tokens is None:
        raise InputError(NOT_A_NUMBER)
    return tokens


def full_logits(model: PreTrainedModel, recorded: CompactCache, tokens: Sequence[int]) -> Tensor:
    """The full cache's logits ``[n - 1, V]`` after each of a continuation's ``n`` tokens but the last."""
    parts = forced(model, recorded.replay("full", 1), tokens[:-1], recorded.report.prompt_tokens[0], 1)
    none = torch.empty(0, model.config.get_text_config(decoder=True).vocab_size, device=model.device, dtype=model.dtype)
    return torch.cat([part[0] for part in parts] or [none])


def compare(
    model: PreTrainedModel, kept: Sequence[Kept], logits: Tensor, tokens: list[int], truth: Tensor, seen: int
) -> dict[Setting, Line]:
    """How close each setting comes to the full cache's continuation ``tokens`` of a prompt of ``seen`` tokens.

    ``logits`` ``[1, V]`` are those of the prompt's last token, ``truth`` those of :func:`full_logits`.
    """
    found: dict[Setting, Line] = {
        one.setting: {"failed": one.failed, "compared_tokens": len(tokens) - 1, **looked(one.cache)} for one in kept
    }
    if len(tokens) == 1:
        return found
    itself = agreement(truth, tokens[1:]).float().mean().item()
    clock: dict[Setting, float] = {}
    for batch in (batch for group in by_spoken(kept) for batch in batches(group)):
        begin = time.perf_counter()
        caches = [one.cache for one in batch if one.cache is not None]
        rows = fidelity(model, caches, truth, tokens, seen, len(batch[0].spoken))
        seconds = (time.perf_counter() - begin) / len(batch)
        for one, row in zip(batch, rows, strict=True):
            found[one.setting] |= {"full_agreement": itself, **row}
            clock[one.setting] = seconds
    for one in kept:
        if one.ended is not None:
            found[one.setting] |= {"full_agreement": itself, **of_full_cache(truth, tokens)}
            clock[one.setting] = 0.0
    # Free greedy decoding, up to the first token that differs: nothing after it can make the answers equal again.
    free = continue_all(model, kept, logits, [], len(tokens), lambda made: made[-1] != tokens[len(made) - 1])
    for setting, answer in free.items():
        line = found[setting]
        if answer.tokens is None:
            line["failed"] = NOT_A_NUMBER
        else:
            line["exact_match"] = answer.tokens == tokens
        line["compare_s"] = round(clock[setting] + answer.seconds / answer.batch, 4)
    return found


def by_spoken(kept: Sequence[Kept]) -> list[list[Kept]]:
    """Settings grouped by how many tokens of the answer their caches have read."""
    return [[one for one in kept if len(one.spoken) == read] for read in sorted({len(one.spoken) for one in kept})]


def fidelity(
    model: PreTrainedModel, caches: Sequence[CompactCache], truth: Tensor, tokens: list[int], seen: int, spoken: int = 0
) -> list[Line]:
    """Agreement, KL divergence and first divergence of each cache when it is forced along ``tokens``.

    ``truth`` ``[n - 1, V]`` are the full cache's logits after all tokens but the last. The caches have read the first
    ``spoken`` tokens, over the whole prompt: after these they are the full cache.
    """
    begin = spoken
    agrees = [agreement(truth[:spoken], tokens[1 : 1 + spoken]).expand(len(caches), -1)]
    kl = [torch.zeros(len(caches), spoken, device=truth.device)]
    for logits in forced(model, stack(caches), tokens[spoken:-1], seen + spoken, len(caches)):
        end = begin + logits.shape[1]
        agrees.append(agreement(logits, tokens[1 + begin : 1 + end]))
        kl.append(divergence(truth[begin:end], logits))
        begin = end
    return [measured(same, nats) for same, nats in zip(torch.cat(agrees, 1), torch.cat(kl, 1), strict=True)]


def of_full_cache(truth: Tensor, tokens: Sequence[int]) -> Line:
    """The measures of an answer that ended while the whole prompt was held: the full cache's own."""
    same = agreement(truth, tokens[1:])
    return measured(same, torch.zeros(len(same), device=same.device))


def measured(same: Tensor, nats: Tensor) -> Line:
    """The measures of one answer by token ``[n - 1]``: whether the most likely one is the same, and the KL divergence."""
    if not nats.isfinite().all():
        return {"failed": NOT_A_NUMBER}
    apart = (~same).nonzero()
    return {
        "agreement": same.float().mean().item(),
        "kl_mean": nats.mean().item(),
        "kl_p99": nats.quantile(0.99).item(),
        "first_divergence": 1 + int(apart[0]) if len(apart) else None,  # its index in the continuation
        "same_tokens": "".join("01"[one] for one in same.tolist()),
        "kl_tokens": [float(f"{one:.4g}") for one in nats.tolist()],
    }


def after(line: Line, tokens: int) -> tuple[float, float] | None:
    """Agreement and KL divergence of the tokens after an answer's first ``tokens``; None if there are none."""
    begin = max(tokens - 1, 0)  # the first token is in no number
    same, nats = line["same_tokens"][begin:], line["kl_tokens"][begin:]
    return (same.count("1") / len(same), sum(nats) / len(nats)) if same else None


def forced(model: PreTrainedModel, cache: CompactCache, tokens: Sequence[int], seen: int, rows: int) -> Iterator[Tensor]:
    """Logits ``[B, k, V]`` after each of ``tokens``, in blocks, read into every row of a cache of ``seen`` tokens."""
    step = max(LOGITS_AT_ONCE // (rows * model.config.get_text_config(decoder=True).vocab_size), 1)
    for begin in range(0, len(tokens), step):
        ids = torch.tensor([list(tokens[begin : begin + step])], device=model.device).expand(rows, -1)
        yield extend(model, cache, ids, [seen + begin] * rows)


def agreement(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Whether the most likely token is the given one, ``[..., k]``, for ``logits`` ``[..., k, V]`` and ``k`` tokens."""
    return logits.argmax(-1) == torch.tensor(list(tokens), device=logits.device)


def divergence(truth: Tensor, logits: Tensor) -> Tensor:
    """KL(truth || other) in nats per token, float32 ``[...]``, of logits ``[..., V]``; not finite if a logit is not."""
    p, q = truth.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).masked_fill(p.isneginf(), 0).sum(-1).clamp(min=0)


def costs(one: Kept, seconds: float, served: torch.dtype) -> Line:
    """Bytes and seconds of a setting; nothing if it has no cache.

    Bytes are counted as if entries, scales and zero points had dtype ``served``: an audit may compute in float32,
    which would make eviction look larger beside 8-bit codes than it is.
    """
    if one.cache is None:
        return {}
    report, layers = one.cache.report, one.cache.compact_layers
    codes = sum(sum(layer.counts(0)) * part.codes.shape[-1] for layer in layers for part in layer.quantized)
    held = sum(part.codes.nbytes for layer in layers for part in layer.quantized)
    itemsize = layers[0].keys.itemsize

    def in_served(total: int, as_codes: int) -> int:
        return as_codes + (total - as_codes) * served.itemsize // itemsize

    return {
        "kept_mass": report.kept_mass[0] if one.ended is None else 1.0,  # nothing was chosen of an answer that ended early
        "kept_bytes": in_served(report.kept_bytes, codes),
        "full_bytes": in_served(report.full_bytes, 0),
        "held_bytes": in_served(report.held_bytes, held),
        "prefill_s": round(seconds + report.compress_seconds, 4),
        "compress_s": round(report.compress_seconds, 4),
    }
