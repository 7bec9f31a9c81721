"""Contexts whose layers and heads hold different numbers of entries: saved caches, which no engine with one block table serves.

They lie beside the others (store.py) under a suffix of their own. A file is what :func:`winnowkv.save_cache` writes, with the
header of a context beside its own; its name is the file's digest.
"""

from __future__ import annotations

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.snapshot import document_bytes, document_of
from winnowkv.cache.snapshot_header import TOKENS
from winnowkv.contexts.context import ID_LENGTH, Context, ContextHeader
from winnowkv.contexts.fit import model_fields
from winnowkv.contexts.folder import ContextFiles, write_whole
from winnowkv.contexts.load import check_fit
from winnowkv.documents import Document
from winnowkv.errors import StoreError
from winnowkv.files import first_fault, reason

SAVED_TOKEN_BYTES = 8


class SavedContexts(ContextFiles):
    """The saved caches of one folder or URL. ``kept`` of a context is the mean over its layers and heads, rounded."""

    suffix = ".saved"

    def add(self, document: Document, *, name: str = "") -> Context:
        """Write a document that was read without a decode budget, as a whole or not at all.

        Raises CacheError as :func:`winnowkv.save_cache`, StoreError if it cannot be written.
        """
        document.finish_answer()
        header = saved_header(document, name)
        data, digest = document_bytes(document.cache, document.model, document.ids, header.model_dump_json())
        what = f"store {self.place}: context {digest[:ID_LENGTH]}"
        write_whole(self._files, self._path(digest), data, lambda why: StoreError(f"{what} {why}"))
        return Context(digest, header, tuple(document.ids), len(data))

    def context(self, context: str) -> Context:
        """What is known of a context. Raises as :meth:`ContextFiles.context`."""
        path = self._known(context)
        try:
            size = int(self._files.size(path))
            length, table = self._table(context, path)
            about = table.get("__metadata__") or {}
            digest = about.get("digest", "")
            if not digest.startswith(context) or len(digest) != 64:
                raise self._damaged(context, "its content is not what its name says")
            header = ContextHeader.model_validate_json(about.get("about", ""))
            begin, end = table[TOKENS]["data_offsets"]
            if not 0 <= begin <= end <= size - 8 - length or end - begin != SAVED_TOKEN_BYTES * header.seen:
                raise self._damaged(context, f"it holds {end - begin} bytes of token ids, of {header.seen} tokens")
            data = self._files.cat_file(path, 8 + length + begin, 8 + length + end)
            tokens = torch.frombuffer(bytearray(data), dtype=torch.int64)
        except FileNotFoundError:
            raise self._unknown(context) from None
        except ValidationError as error:
            raise self._damaged(context, first_fault(error)) from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(context, reason(error)) from None
        return Context(digest, header, tuple(tokens.tolist()), size)

    def load(self, context: Context, model: PreTrainedModel, *, like: CompactCache | None = None) -> CompactCache:
        """A cache that goes on from a context. Raises as :func:`winnowkv.cache.snapshot.document_of` and :meth:`context`."""
        check_fit(context, model)
        try:
            data = self._files.cat_file(self._known(context.id))
        except FileNotFoundError:
            raise self._unknown(context.id) from None
        except OSError as error:
            raise self._damaged(context.id, reason(error)) from None
        cache, tokens = document_of(data, f"context {context.id}", model, like=like)
        if tuple(tokens) != context.tokens or cache.decode_budget is not None:
            raise self._damaged(context.id, "its content is not what its header says")
        return cache


def saved_header(document: Document, name: str) -> ContextHeader:
    """What a context of this document says of itself."""
    cache = document.cache
    shown: CompactLayer = cache.compact_layers[0]
    (entries,) = cache.report.kept_entries
    return ContextHeader(
        kept=max(1, round(sum(entries) / len(entries))), seen=len(document.ids), layers=len(cache.layers),
        kv_heads=shown.keys.shape[1], head_dim=shown.keys.shape[3], dtype=str(shown.keys.dtype).removeprefix("torch."),
        model=model_fields(cache.model.config), policy=cache.compression.policy.spec, budget=str(cache.report.budget),
        chat=document.chat_template, turns=len(document.ids) > document.text_tokens, name=name,
    )  # fmt: skip
