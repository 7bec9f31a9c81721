"""From a document or a cache to a context in a store."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from winnowkv.budget import Budget
from winnowkv.cache.cache import CompactCache
from winnowkv.contexts.context import Context, ContextHeader
from winnowkv.contexts.fit import model_fields
from winnowkv.contexts.flat import FlatStates, flat_states
from winnowkv.contexts.store import ContextStore
from winnowkv.documents import Document
from winnowkv.errors import BudgetError, InputError

VLLM_BLOCK = 128  # tokens of a block of vLLM's CPU cache; on a GPU blocks of 16 are usual, which divide it


def export_context(
    source: Document | CompactCache,
    store: ContextStore | str | Path,
    block: int = VLLM_BLOCK,
    *,
    tokens: Sequence[int] | None = None,
    name: str = "",
) -> Context:
    """Store a compressed document for engines that serve it as a prefix (vLLM).

    Parameters
    ----------
    source: a document (:func:`winnowkv.read`), or a cache of one prompt; with the turns that it had.
    store: a :class:`ContextStore`, its folder or its URL.
    block: tokens of a block of the engine's cache. Requests share whole blocks, so a number of entries that is no multiple
        of it is warned of; :func:`whole_blocks` gives a budget that is one.
    tokens: of a cache the token ids that were read into it.
    name: what people call the document.

    Raises
    ------
    CacheError, UnsupportedModelError
        As :func:`~winnowkv.contexts.flat.flat_states`; also if the store cannot be written.
    InputError
        For a cache without its tokens.
    """
    chat = turns = False
    if isinstance(source, Document):
        source.finish_answer()
        tokens, chat, turns = source.ids, source.chat_template, len(source.ids) > source.text_tokens
    cache = source.cache if isinstance(source, Document) else source
    if tokens is None:
        raise InputError("a cache does not know its token ids: give those that were read into it, tokens=")
    states = flat_states(cache)
    if len(tokens) != states.seen:
        raise InputError(f"tokens= holds {len(tokens)} token ids, the cache has seen {states.seen}: give all that were read")
    if states.kept % block and states.kept < states.seen:
        warnings.warn(
            f"{states.kept} entries are no multiple of {block}: every request holds its own copy of the last "
            f"{states.kept % block}; budget={whole_blocks(len(tokens), states.kept, block)} fills whole blocks",
            stacklevel=2,
        )
    about = {"policy": cache.compression.policy.spec, "budget": str(cache.report.budget), "name": name}
    header = header_of(states, cache.model.config, **about, chat=chat, turns=turns)
    return (store if isinstance(store, ContextStore) else ContextStore(store)).add(header, states, tokens)


def header_of(
    states: FlatStates, config: Any, *, policy: str, budget: str, name: str, chat: bool = False, turns: bool = False
) -> ContextHeader:
    """The header of a context with these entries, of the model with this config."""
    layers, kept, kv_heads, head_dim = states.keys.shape
    return ContextHeader(
        kept=kept, seen=states.seen, layers=layers, kv_heads=kv_heads, head_dim=head_dim,
        dtype=str(states.keys.dtype).removeprefix("torch."), model=model_fields(config), policy=policy, budget=budget,
        chat=chat, turns=turns, name=name,
    )  # fmt: skip


def whole_blocks(tokens: int, budget: Budget | int | float | str, block: int = VLLM_BLOCK) -> int:
    """A budget in entries that fills whole blocks: the least that is no smaller than ``budget``, or the whole document.

    Raises BudgetError for a budget below one entry or ``auto``, which has no number before the document is read.
    """
    asked = Budget.of(budget)
    if asked.target is not None:
        raise BudgetError(
            f"budget {asked.asked!r}: a context needs a number beforehand: give entries (512) or a fraction (0.12)"
        )
    return min(-(-asked.entries(tokens) // block) * block, tokens)
