"""Small contexts without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from winnowkv.contexts.context import Context, ContextHeader
from winnowkv.contexts.flat import FlatStates
from winnowkv.contexts.store import ContextStore
from winnowkv.prompt.chat import open_turn

TEXT = "The archive of Oakham was founded in 1712. Its first keeper, Mary Lund, wrote the town's history in nine volumes."
LAYERS, KV_HEADS, HEAD_DIM = 2, 4, 8
MODEL = {"architecture": "TinyForCausalLM", "hidden_size": 32, "rope.rope_theta": 10000.0}


def made_states(kept: int, seen: int, seed: int = 0) -> FlatStates:
    """Random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(LAYERS, kept, KV_HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    return FlatStates(keys, values, seen)


def made_header(kept: int, seen: int, **fields: object) -> ContextHeader:
    """Of :func:`made_states`."""
    about = {
        "kept": kept, "seen": seen, "layers": LAYERS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "float32",
        "model": MODEL, "policy": "snapkv", "budget": str(kept), "chat": False, "name": "made",
    }  # fmt: skip
    return ContextHeader(**(about | fields))  # type: ignore[arg-type]


def made_tokens(seen: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return torch.randint(0, 500, (seen,), generator=torch.Generator().manual_seed(100 + seed)).tolist()


def add_context(store: ContextStore, kept: int = 20, seen: int = 50, seed: int = 0, **fields: object) -> Context:
    """Put a made context into a store."""
    return store.add(made_header(kept, seen, **fields), made_states(kept, seen, seed), made_tokens(seen, seed))


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
