"""Contexts with unequal layers and heads: saved caches beside the others, found by their digest, damage noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import prompt
from support.tokenizers import ChatLetters
from winnowkv.cache.forks import fork
from winnowkv.cache.snapshot import read_one
from winnowkv.contexts.context import Context
from winnowkv.contexts.export import export_context
from winnowkv.contexts.saved import SavedContexts
from winnowkv.contexts.store import ContextStore

TEXT = "The archive of Oakham was founded in 1712. Its keeper, Mary Lund, wrote the history. " * 2


def document(model: PreTrainedModel, policy: str = "adakv:floor=0:of=snapkv:observe=4") -> wk.Document:
    return wk.read(model, ChatLetters(), TEXT, policy, 24, decode_budget=None)


def added(model: PreTrainedModel, store: SavedContexts) -> tuple[wk.Document, Context]:
    doc = document(model)
    assert doc.cache.compact_layers[0].valid is not None, "heads keep equally many: the test shows nothing"
    return doc, store.add(doc, name="archive")


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_what_was_saved_goes_on_as_the_document(kind: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    """From a folder and from a URL; with a cache that shows the layers nothing is read."""
    store = SavedContexts(tmp_path / "new" if kind == "folder" else f"memory://{tmp_path.name}")
    doc, context = added(llama, store)
    assert store.ids() == [context.id]
    found = SavedContexts(store.place).context(context.id)
    assert found == context
    assert (list(found.tokens), found.seen, found.header.chat, found.header.name) == (doc.ids, len(doc.ids), True, "archive")
    assert found.kept == 24
    like, passes = read_one(llama), []
    hook = llama.register_forward_pre_hook(lambda *_: passes.append(1))
    loaded = store.load(found, llama, like=like)
    hook.remove()
    assert not passes
    more = prompt(9, seed=3)
    with torch.no_grad():
        expected = llama(input_ids=more, past_key_values=fork(doc.cache)).logits
        assert torch.equal(llama(input_ids=more, past_key_values=fork(loaded)).logits, expected)
    store.remove(context.id)
    assert context.id not in store


def test_both_kinds_lie_side_by_side(llama: PreTrainedModel, tmp_path: Path) -> None:
    """vLLM's store sees nothing of the saved ones, and the file opens as any saved document."""
    _, context = added(llama, SavedContexts(tmp_path))
    flat = export_context(document(llama, "snapkv:observe=4"), tmp_path, block=1)
    assert (ContextStore(tmp_path).ids(), SavedContexts(tmp_path).ids()) == ([flat.id], [context.id])
    opened = wk.open_document(tmp_path / f"{context.id}.saved", llama, ChatLetters())
    assert tuple(opened.ids) == context.tokens


def test_a_changed_byte_is_noticed(llama: PreTrainedModel, tmp_path: Path) -> None:
    store = SavedContexts(tmp_path)
    _, context = added(llama, store)
    file = tmp_path / f"{context.id}.saved"
    whole = file.read_bytes()
    for at in (len(whole) - 90, len(whole) // 2):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(wk.CacheError, match=f"context {context.id} .*damaged"):
            store.load(context, llama)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x20" + bytes(7) + b"{" * 32], ids=["empty", "noise", "no header"])
def test_what_is_no_saved_context_is_said_to_be_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"{'0' * 32}.saved").write_bytes(content)
    with pytest.raises(wk.CacheError, match=f"context {'0' * 32} in store .* cannot be used"):
        SavedContexts(tmp_path).context("0" * 32)


def test_a_saved_cache_under_another_name_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    store = SavedContexts(tmp_path)
    _, context = added(llama, store)
    (tmp_path / f"{context.id}.saved").rename(tmp_path / f"{'0' * 32}.saved")
    with pytest.raises(wk.CacheError, match="its content is not what its name says"):
        store.context("0" * 32)
    with pytest.raises(wk.InputError, match=f"there is no context {context.id}"):
        store.context(context.id)
    with pytest.raises(wk.InputError, match=f"there is no context {context.id}"):
        store.load(context, llama)


def test_a_context_of_another_model_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    """By its header, and a file whose header says nothing of it by what was saved."""
    store = SavedContexts(tmp_path)
    _, context = added(llama, store)
    with pytest.raises(wk.CacheError, match=f"context {context.id} was made with another model .*bfloat16"):
        store.load(context, llama.bfloat16())
    llama.config.rope_parameters = {**llama.config.rope_parameters, "rope_theta": 500000.0}
    with pytest.raises(wk.CacheError, match=f"context {context.id} is of another model: its model's rope.rope_theta"):
        store.load(context, llama)
