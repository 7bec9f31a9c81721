"""Contexts of texts that no model read: their entries are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from winnowkv.contexts.context import Context, ContextHeader
from winnowkv.contexts.flat import FlatStates
from winnowkv.contexts.store import ContextStore
from winnowkv.prompt.chat import open_turn

TEXT = "The archive of Oakham was founded in 1712. Its first keeper, Mary Lund, wrote the town's history in nine volumes."


def drawn_context(
    store: Path | str, tokenizer: Any, text: str = TEXT, *, kept: int = 8, chat: bool = True, system: str | None = None,
    model: dict[str, Any] | None = None, name: str = "archive",
) -> Context:  # fmt: skip
    """A stored context of a text."""
    ids = open_turn(tokenizer, text, chat=chat, system=system)
    generator = torch.Generator().manual_seed(len(ids))
    keys, values = (torch.randn(2, kept, 1, 4, generator=generator) for _ in range(2))
    header = ContextHeader(
        kept=kept, seen=len(ids), layers=2, kv_heads=1, head_dim=4, dtype="float32", model=model or {"architecture": "Tiny"},
        policy="snapkv", budget=str(kept), chat=chat, name=name,
    )  # fmt: skip
    return ContextStore(store).add(header, FlatStates(keys, values, len(ids)), ids)
