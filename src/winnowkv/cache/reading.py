"""Reading tokens into compact caches: a prompt at once or in chunks, and what comes after it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.other_layers import fork_layer
from winnowkv.cache.stacked import row_mask
from winnowkv.errors import InputError
from winnowkv.models.info import cache_argument


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: CompactCache,
    attention_mask: Tensor | None = None,
    *,
    chunk: int | None = None,
    ceiling: int | float | None = None,
    hint: int = 0,
) -> Tensor:
    """Read a prompt ``[B, S]`` into a fresh cache and return the logits of its last token, ``[B, vocabulary]``.

    Parameters
    ----------
    chunk: read one prompt in chunks of so many tokens (at least 64), so that what the model computes meanwhile stays small.
    ceiling: most entries a layer keeps between chunks, in entries (int) or as a fraction of the prompt (float); a layer
        then never holds more than ``ceiling + chunk``, and the policy chooses from what is left. None: nothing goes before
        the policy has seen the whole prompt, and it keeps what it keeps without chunks.
    hint: how many of the last tokens are no part of the text: the policy chooses by them as by a question, then they are taken
        back, as if they had never been read. The budget is the text's alone.

    Raises
    ------
    InputError
        For an empty prompt, and for chunks of several or padded prompts, below 64 tokens or below the observation window.
    CacheError
        For chunks into a cache that is not fresh, or that records under a ceiling.
    """
    if input_ids.shape[1] == 0:
        raise InputError("the prompt is empty: give at least one token")
    if chunk is not None or hint:
        return _prefill_in_chunks(model, input_ids, cache, attention_mask, chunk, ceiling, hint)
    if ceiling is not None:
        raise InputError(f"ceiling={ceiling} is for what is held between chunks: give chunk= too, or leave it out")
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **cache_argument(model, cache)}
    logits: Tensor = model(**inputs, use_cache=True, logits_to_keep=1).logits
    cache.check_used()
    return logits[:, -1]


def _prefill_in_chunks(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: CompactCache,
    mask: Tensor | None,
    chunk: int | None,
    ceiling: int | float | None,
    hint: int,
) -> Tensor:
    if len(input_ids) > 1 or not (mask is None or bool(mask.all())):
        raise InputError(
            f"chunks are for one prompt without padding, and this is a batch of {len(input_ids)} or padded: read prompts one "
            "by one (winnowkv.cache.stacked.stack makes one batch of their caches), or leave chunk= out"
        )
    if not 0 <= hint < input_ids.shape[1]:
        raise InputError(f"hint={hint} of {input_ids.shape[1]} tokens leaves no text: give it after the text")
    sizes = cache.begin_chunks(input_ids.shape[1], chunk, ceiling, hint=hint)
    if len(sizes) > 1 and (kind := cache.recurrent_layer) is not None:
        warnings.warn(
            f"{type(model).__name__} keeps states ({kind}) that not every model carries exactly from one chunk to the next: "
            "see its row in docs/support.md, or read the prompt without chunk=",
            stacklevel=4,
        )
    others = {index: layer for index, layer in enumerate(cache.layers) if not isinstance(layer, CompactLayer)}
    try:
        for number, part in enumerate(input_ids.split(sizes, 1), 1):
            if hint and number == len(sizes):
                others = {index: fork_layer(layer) for index, layer in others.items()}
            logits: Tensor = model(input_ids=part, **cache_argument(model, cache), use_cache=True, logits_to_keep=1).logits
            cache.end_chunk()
        if hint:
            for index, layer in others.items():  # as they were before the hint
                cache.layers[index] = layer
    except BaseException:
        cache.reset()  # half a prompt must not pass for a whole one
        raise
    return logits[:, -1]


@torch.no_grad()
def greedy(
    model: PreTrainedModel, cache: CompactCache, logits: Tensor, max_new_tokens: int, stop: Collection[int] = ()
) -> Iterator[int]:
    """Tokens of one request, one by one, most likely first; ends after ``max_new_tokens`` or before a stop token."""
    for step in range(max_new_tokens):
        token = int(logits.argmax(-1))
        if token in stop:
            return
        yield token
        if step + 1 < max_new_tokens:
            ids = torch.tensor([[token]], device=logits.device)
            logits = model(input_ids=ids, **cache_argument(model, cache), use_cache=True).logits[:, -1]


@torch.no_grad()
def extend(model: PreTrainedModel, cache: CompactCache, ids: Tensor, positions: Sequence[int], last: int = 0) -> Tensor:
    """Read ``ids`` ``[B, k]`` into a (stacked) cache whose rows have seen ``positions`` tokens.

    Returns the logits ``[B, k, vocabulary]``, or of the ``last`` tokens only if that is not 0.
    """
    begin = torch.tensor(positions, device=ids.device)
    places = begin[:, None] + torch.arange(ids.shape[1], device=ids.device)
    mask = row_mask(cache, positions, ids.shape[1], ids.device)
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=places,
        **cache_argument(model, cache),
        use_cache=True,
        logits_to_keep=last,
    ).logits
    return logits
