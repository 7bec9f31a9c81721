"""A store of contexts: a folder, or any URL that fsspec knows, with one safetensors file for each context.

A file's name is the digest of what is in it, so the same context is stored once, a changed byte is noticed when its tensors
are read, and a name that is known cannot come to mean something else.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import Tensor

from winnowkv.contexts.context import ID_LENGTH, Context, ContextHeader
from winnowkv.contexts.flat import FlatStates
from winnowkv.contexts.folder import ContextFiles, write_whole
from winnowkv.errors import StoreError
from winnowkv.files import first_fault, reason

TENSORS = ("keys", "tokens", "values")
TOKEN_BYTES = 4


class ContextStore(ContextFiles):
    """The contexts of one folder or URL (``/data/contexts``, ``s3://bucket/contexts``, ``memory://contexts``).

    Raises InputError for a URL of a kind that is not known or not installed.
    """

    suffix = ".context"

    def add(self, header: ContextHeader, states: FlatStates, tokens: Sequence[int]) -> Context:
        """Write a context, as a whole or not at all; one that is there already is left as it is.

        Raises StoreError if it cannot be written.
        """
        tensors = {"keys": states.keys, "tokens": torch.tensor(list(tokens), dtype=torch.int32), "values": states.values}
        text = header.model_dump_json()
        digest = digest_of(text, tensors)
        path = self._path(digest)
        data = save_tensors(tensors, metadata={"winnowkv": text, "digest": digest})
        if not self._files.exists(path):
            what = f"store {self.place}: context {digest[:ID_LENGTH]}"
            write_whole(self._files, path, data, lambda why: StoreError(f"{what} {why}"))
        return Context(digest, header, tuple(tokens), len(data))

    def context(self, context: str) -> Context:
        """What is known of a context, without its keys and values.

        Raises InputError for what is no id or not in the store, CacheError for a file that cannot be used.
        """
        path = self._known(context)
        try:
            size = int(self._files.size(path))
            length, table = self._table(context, path)
            header, _, digest = self._header(context, table.get("__metadata__") or {})
            shape = list(state_shape(header))
            if any(table[name]["shape"] != shape for name in ("keys", "values")):
                raise self._damaged(context, f"keys of shape {table['keys']['shape']}, its header says {shape}")
            ends = [table[name]["data_offsets"][1] for name in TENSORS]
            if 8 + length + max(ends) != size:
                raise self._damaged(context, f"it has {size} bytes, {8 + length + max(ends)} were written")
            begin, end = table["tokens"]["data_offsets"]
            if not 0 <= begin <= end or end - begin != TOKEN_BYTES * header.seen:
                raise self._damaged(context, f"it holds {end - begin} bytes of token ids, of {header.seen} tokens")
            data = self._files.cat_file(path, 8 + length + begin, 8 + length + end)
            tokens = torch.frombuffer(bytearray(data), dtype=torch.int32)
        except FileNotFoundError:
            raise self._unknown(context) from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(context, reason(error)) from None
        return Context(digest, header, tuple(tokens.tolist()), size)

    def states(self, context: str) -> FlatStates:
        """Keys and values of a context, once its digest was compared.

        Raises as :meth:`context` does, also for a changed byte.
        """
        path = self._known(context)
        try:
            data = self._files.cat_file(path)
        except FileNotFoundError:
            raise self._unknown(context) from None
        except OSError as error:
            raise self._damaged(context, reason(error)) from None
        try:
            tensors = load_tensors(data)
            length = int.from_bytes(data[:8], "little")
            header, text, digest = self._header(context, json.loads(data[8 : 8 + length]).get("__metadata__") or {})
        except (SafetensorError, ValueError) as error:
            raise self._damaged(context, reason(error)) from None
        shape = state_shape(header)
        if tuple(sorted(tensors)) != TENSORS or digest_of(text, tensors) != digest:
            raise self._damaged(context, "its content is not what its name says")
        if tensors["tokens"].shape != (header.seen,):
            raise self._damaged(
                context, f"it holds token ids of shape {tuple(tensors['tokens'].shape)}, of {header.seen} tokens"
            )
        if tensors["keys"].shape != shape or tensors["values"].shape != shape:
            raise self._damaged(context, f"keys of shape {tuple(tensors['keys'].shape)}, its header says {shape}")
        return FlatStates(tensors["keys"], tensors["values"], header.seen)

    def _header(self, context: str, about: dict[str, Any]) -> tuple[ContextHeader, str, str]:
        text, digest = about.get("winnowkv", ""), about.get("digest", "")
        if not digest.startswith(context) or len(digest) != 64:
            raise self._damaged(context, "its content is not what its name says")
        try:
            return ContextHeader.model_validate_json(text), text, digest
        except ValidationError as error:
            raise self._damaged(context, first_fault(error)) from None


class RememberedContexts:
    """The contexts of a store, of which the last that were asked for are not read again as long as they are there.

    Threads may ask at the same time.

    Parameters
    ----------
    limit: most that are held, since their token ids take memory; the least recently used go.
    """

    def __init__(self, store: ContextFiles, limit: int) -> None:
        self.store, self.limit = store, limit
        self._known: dict[str, Context] = {}
        self._lock = threading.Lock()  # of the dict; files are read outside of it

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, asked: Any) -> Context:
        """A context. Raises as :meth:`ContextStore.context`."""
        found = self._known.get(asked) if isinstance(asked, str) else None
        if found is None or found.id not in self.store:
            found = self.store.context(asked)
        with self._lock:
            self._known.pop(found.id, None)
            self._known[found.id] = found
            while len(self._known) > self.limit:
                del self._known[next(iter(self._known))]
        return found


def state_shape(header: ContextHeader) -> tuple[int, int, int, int]:
    """``[L, n', Hkv, D]`` of keys and values."""
    return header.layers, header.kept, header.kv_heads, header.head_dim


def digest_of(header: str, tensors: dict[str, Tensor]) -> str:
    """Of a header and its tensors, 64 hexadecimal characters."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
