"""A store of contexts: a folder, or any URL that fsspec knows, with one safetensors file for each context.

A file's name is the digest of what is in it, so the same context is stored once, a changed byte is noticed when its tensors
are read, and a name that is known cannot come to mean something else.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors, save as save_tensors
from torch import Tensor

from winnowkv.contexts.context import CONTEXT_ID, ID_LENGTH, Context, ContextHeader, check_id
from winnowkv.contexts.flat import FlatStates
from winnowkv.errors import CacheError, InputError, UnknownContextError
from winnowkv.files import Fail, first_fault, reason

SUFFIX = ".context"
TENSORS = ("keys", "tokens", "values")
TOKEN_BYTES = 4
LONGEST_HEADER = 1 << 20  # bytes; ours have a thousand


class ContextStore:
    """The contexts of one folder or URL (``/data/contexts``, ``s3://bucket/contexts``, ``memory://contexts``).

    Raises InputError for a URL of a kind that is not known or not installed.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = str(place)
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.place)
        except (ValueError, ImportError) as error:
            raise InputError(f"store {self.place!r}: {reason(error)}: give a folder, or a URL that fsspec knows") from None

    def __repr__(self) -> str:
        return f"ContextStore({self.place!r})"

    def add(self, header: ContextHeader, states: FlatStates, tokens: Sequence[int]) -> Context:
        """Write a context, as a whole or not at all; one that is there already is left as it is.

        Raises CacheError if it cannot be written.
        """
        tensors = {"keys": states.keys, "tokens": torch.tensor(list(tokens), dtype=torch.int32), "values": states.values}
        text = header.model_dump_json()
        digest = digest_of(text, tensors)
        path = self._path(digest)
        data = save_tensors(tensors, metadata={"winnowkv": text, "digest": digest})
        if not self._files.exists(path):
            what = f"store {self.place}: context {digest[:ID_LENGTH]}"
            write_whole(self._files, path, data, lambda why: CacheError(f"{what} {why}"))
        return Context(digest, header, tuple(tokens), len(data))

    def ids(self) -> list[str]:
        """The ids of all contexts, in order; none of a folder that is not there. Raises CacheError if it cannot be listed."""
        try:
            names = [Path(name).name for name in self._files.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CacheError(f"store {self.place} cannot be listed: {reason(error)}") from None
        ids = (name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX))
        return sorted(one for one in ids if CONTEXT_ID.fullmatch(one))

    def __iter__(self) -> Iterator[Context]:
        """All contexts; one that is deleted meanwhile is left out. Raises CacheError for a file that cannot be used."""
        for one in self.ids():
            try:
                found = self.context(one)
            except UnknownContextError:
                continue
            yield found

    def __contains__(self, context: str) -> bool:
        return self._files.exists(self._path(check_id(context)))

    def context(self, context: str) -> Context:
        """What is known of a context, without its keys and values.

        Raises InputError for what is no id or not in the store, CacheError for a file that cannot be used.
        """
        path = self._known(context)
        try:
            size = int(self._files.size(path))
            length = int.from_bytes(self._files.cat_file(path, 0, 8), "little")
            if not 0 < length <= LONGEST_HEADER:
                raise self._damaged(context, f"its header would have {length} bytes")
            table = json.loads(self._files.cat_file(path, 8, 8 + length))
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

    def remove(self, context: str) -> None:
        """Delete a context. Raises InputError if it is not there, CacheError if it cannot be deleted."""
        path = self._known(context)
        try:
            self._files.rm_file(path)
        except FileNotFoundError:
            raise self._unknown(context) from None
        except OSError as error:
            raise CacheError(f"store {self.place}: context {context} cannot be deleted: {reason(error)}") from None

    def stored_at(self, context: str) -> datetime | None:
        """When a context was written; None if the store does not say."""
        try:
            return self._files.modified(self._path(check_id(context))).astimezone(UTC)
        except (NotImplementedError, OSError, KeyError, AttributeError):
            return None

    def _path(self, context: str) -> str:
        return f"{self._root}/{context[:ID_LENGTH]}{SUFFIX}"

    def _known(self, context: str) -> str:
        return self._path(check_id(context))

    def _header(self, context: str, about: dict[str, Any]) -> tuple[ContextHeader, str, str]:
        text, digest = about.get("winnowkv", ""), about.get("digest", "")
        if not digest.startswith(context) or len(digest) != 64:
            raise self._damaged(context, "its content is not what its name says")
        try:
            return ContextHeader.model_validate_json(text), text, digest
        except ValidationError as error:
            raise self._damaged(context, first_fault(error)) from None

    def _unknown(self, context: str) -> UnknownContextError:
        return UnknownContextError(
            f"there is no context {context} in store {self.place}: see winnow context list --store {self.place}"
        )

    def _damaged(self, context: str, why: str) -> CacheError:
        return CacheError(f"context {context} in store {self.place} cannot be used ({why}): remove it and add it anew")


class RememberedContexts:
    """The contexts of a store, of which the last that were asked for are not read again as long as they are there.

    Parameters
    ----------
    limit: most that are held, since their token ids take memory; the least recently used go.
    """

    def __init__(self, store: ContextStore, limit: int) -> None:
        self.store, self.limit = store, limit
        self._known: dict[str, Context] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, asked: Any) -> Context:
        """A context. Raises as :meth:`ContextStore.context`."""
        found = self._known.pop(asked, None) if isinstance(asked, str) else None
        if found is None or found.id not in self.store:
            found = self.store.context(asked)
        self._known[found.id] = found
        while len(self._known) > self.limit:
            del self._known[next(iter(self._known))]
        return found


def write_whole(files: Any, path: str, data: bytes, fail: Fail) -> None:
    """Write a file of an fsspec file system as a whole or not at all. Raises the error that ``fail`` makes of the reason."""
    folder = path.rpartition("/")[0]
    scratch = f"{folder}/.{secrets.token_hex(8)}.part"
    try:
        files.makedirs(folder, exist_ok=True)
        files.pipe_file(scratch, data)
        files.mv(scratch, path)
    except (OSError, NotImplementedError) as error:
        with suppress(OSError):
            files.rm_file(scratch)
        raise fail(f"cannot be written: {reason(error)}") from None


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
