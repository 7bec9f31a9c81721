"""Which function attends to the entries of a compact cache: the model's own wherever it can, else torch's SDPA.

==================== ======================== ================================================
the model's own      a prompt without padding everything else
==================== ======================== ================================================
sdpa                 torch's SDPA (sdpa.py)   the same
eager                its own, query blocks    the same, with a mask that we build
flash                its own                  its own, unless rows or heads differ in length
flex, a custom one   its own                  its own for one token, unless rows or heads differ
==================== ======================== ================================================

Where it cannot, SDPA computes the same function, and a warning says so. Softcapped logits and learned sinks, which SDPA does
not know, are left to the model's own eager function.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from winnowkv.attention.sdpa import attend
from winnowkv.errors import UnsupportedModelError
from winnowkv.types import Valid

EAGER_TERMS = ("softcap", "s_aux", "sinks")  # what the model's own eager function computes beside plain attention
POSITION_TERMS = ("position_bias",)  # what belongs to positions, which eviction changes
EAGER_BLOCK = 256  # queries at once: no weights are larger than [Hq, 256, K]

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def own_attention(module: nn.Module, base: str) -> Attention:
    """The function that an attention module calls if it is not routed.

    Model files may overwrite functions of the framework in an interface of their own, and define their eager one.
    """
    kinds = [kind for kind in type(module).__mro__ if "forward" in vars(kind)]
    file = sys.modules.get(kinds[0].__module__)
    interface: Any = getattr(file, "ALL_ATTENTION_FUNCTIONS", None) or AttentionInterface()
    found: Attention = interface.get_interface(base, getattr(file, "eager_attention_forward", None))
    return found


def eager_attention(module: nn.Module) -> Attention:
    """The eager function of the file that a module comes from. Raises UnsupportedModelError if there is none."""
    own = own_attention(module, "eager")
    if own is None:
        raise UnsupportedModelError(
            f"{type(module).__name__}: its file defines no eager_attention_forward, which it needs here"
        )
    return own


def attend_as(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    valid: Valid | None = None,
    dropout: float = 0.0,
    *,
    mask: Any = None,
    **kwargs: Any,
) -> Tensor:
    """Causal attention ``[B, q, Hq, D]`` of the newest ``q`` tokens over all ``K`` entries, by the model's own function.

    Parameters
    ----------
    base: the model's own attention.
    valid: which entries count, ``[B, 1 or Hkv, K]``, None if all do.
    mask: the model's own mask of a whole prompt without padding; None if it makes none, or for anything else.
    kwargs: what the model passes beside, for its own function.
    """
    for term in POSITION_TERMS:
        if kwargs.get(term) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__}: attention with {term!r} belongs to positions that eviction changes"
            )
    queries, entries = query.shape[2], key.shape[2]
    # SDPA knows no such terms: releases in which such a model may run on it leave them out, and so it computes here.
    terms = base != "sdpa" and any(kwargs.get(term) is not None for term in EAGER_TERMS)
    flash = "flash" in base
    if base in ("sdpa", "eager"):
        serves = mask is not None  # of a prompt that is not plainly causal
    else:
        serves = valid is None and (flash or (queries in (1, entries) and not terms))
    if serves:
        own = own_attention(module, base)
        return own(module, query, key, value, mask, scaling=scale, dropout=dropout, **kwargs)[0]
    if terms or base == "eager":
        return attend_eagerly(module, query, key, value, scale, valid, dropout, **kwargs)
    if base != "sdpa":
        warnings.warn(
            f"{type(module).__name__}: {base} cannot serve a compact cache with padded rows, heads of different lengths or "
            "several tokens after the prompt; torch's SDPA does",
            stacklevel=3,
        )
    return attend(query, key, value, scale, valid, dropout).transpose(1, 2).contiguous()


def attend_rows(
    base: str,
    module: nn.Module,
    query: Tensor,
    rows: Sequence[tuple[Tensor, Tensor, Valid | None]],
    scale: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """:func:`attend_as` of one query a row ``[B, Hq, 1, D]``, each over keys and values ``[1, Hkv, n, D]`` of its own."""
    parts = []
    for row, (keys, values, valid) in enumerate(rows):
        given = {name: value[row : row + 1] if of_rows(value, len(rows)) else value for name, value in kwargs.items()}
        parts.append(attend_as(base, module, query[row : row + 1], keys, values, scale, valid, dropout, **given))
    return torch.cat(parts)


def of_rows(value: Any, rows: int) -> bool:
    """Whether something that a model passes beside has a part for each row, as positions have."""
    return isinstance(value, Tensor) and value.ndim > 1 and len(value) == rows


def attend_eagerly(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    valid: Valid | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """The same by the model's own eager function, in blocks of queries, each over the keys that it can see."""
    own, (queries, entries) = eager_attention(module), (query.shape[2], key.shape[2])
    parts = []
    for begin in range(0, queries, EAGER_BLOCK):
        end = min(begin + EAGER_BLOCK, queries)
        seen = entries - queries + end
        block = slice(begin, end)
        mask = additive_mask(end - begin, seen, valid, query)
        part = own(
            module, query[:, :, block], key[:, :, :seen], value[:, :, :seen], mask, scaling=scale, dropout=dropout, **kwargs
        )
        parts.append(part[0])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def additive_mask(queries: int, seen: int, valid: Valid | None, like: Tensor) -> Tensor | None:
    """Zero where one of the last ``queries`` of ``seen`` tokens attends, else the least, ``[B or 1, Hq or 1, q, seen]``."""
    if queries == 1 and valid is None:
        return None
    causal = torch.ones(queries, seen, dtype=torch.bool, device=like.device).tril(seen - queries)
    attends = causal[None, None]
    if valid is not None:
        counts = valid[..., :seen]
        if counts.shape[1] > 1:
            counts = counts.repeat_interleave(like.shape[1] // counts.shape[1], 1)
        attends = attends & counts[:, :, None]
        if queries > 1:  # a padded query sees no entry at all; let it see itself, or its output is not a number
            attends = attends | torch.ones_like(causal).triu(seen - queries) & causal
    return torch.zeros(attends.shape, dtype=like.dtype, device=like.device).masked_fill(~attends, torch.finfo(like.dtype).min)
