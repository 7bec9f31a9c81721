"""Stored contexts as a server holds them: files of each owner, and compact caches in memory as long as there is room.

A cache in memory is read from its file when a request names it, and dropped when others need the room, the least recently used
first; while a request uses it, it stays. A file goes only when it is deleted by name, since its id was given out.
Everything here may be called from any thread, and much of it reads files.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.layer import CompactLayer
from winnowkv.cache.snapshot import read_one
from winnowkv.contexts.context import Context
from winnowkv.contexts.load import check_fit
from winnowkv.documents import Document
from winnowkv.errors import CacheError, StoreError, UnknownContextError, WinnowError
from winnowkv.serve.context_files import Found, OwnedContexts, owner_places
from winnowkv.serve.errors import ApiError
from winnowkv.serve.keys import NO_KEY

logger = logging.getLogger("winnowkv.serve")
PATIENCE = 60.0  # seconds that a request waits for room in memory
FILE_BYTES = 4096  # of a file beside its keys, values and token ids: more than a header has
FIELD = "winnow_context"


class Lease:
    """A context in use: its cache stays in memory until :meth:`release`, which may be called often, from any thread."""

    def __init__(self, found: Found, cache: CompactCache, give_back: Callable[[], None]) -> None:
        self.found, self.cache = found, cache
        self._give_back: Callable[[], None] | None = give_back
        self._lock = threading.Lock()

    @property
    def context(self) -> Context:
        """What is known of it."""
        return self.found.context

    def release(self) -> None:
        """The request has ended."""
        with self._lock:
            give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


@dataclass
class _Held:
    """A cache in memory, or being read; ``uses``: requests that have it or wait for it.

    ``found``: what its file said of itself when it was read, and all of it was compared with its digest.
    """

    found: Found
    size: int = 0
    uses: int = 0
    cache: CompactCache | None = None
    error: Exception | None = None


class ServedContexts:
    """The contexts of a store, for the requests of a server.

    Parameters
    ----------
    model: that reads and answers; it reads one token here.
    place: folder or URL of the store. Contexts of a key lie in a folder of their own in it, named by the key's hash; those in
        the store itself are visible to all keys and can be deleted by its operator alone.
    memory: most bytes of caches in memory, those included that are being read. disk: most bytes of files.
    patience: seconds that a request waits until others give up what they use.

    Attributes
    ----------
    reads: files that were read into memory.
    """

    def __init__(self, model: PreTrainedModel, place: str, *, memory: int, disk: int, patience: float = PATIENCE) -> None:
        self.model, self.place, self.memory, self.disk, self.patience = model, place, memory, disk, patience
        self.reads = 0
        self._like = read_one(model)
        self._operator = OwnedContexts(place)
        self._owned: dict[str, OwnedContexts] = {}
        self._changed = threading.Condition()
        self._held: OrderedDict[tuple[str, bool], _Held] = OrderedDict()
        self._used = 0
        self._writing = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Bytes in memory, or set aside."""
        return self._used

    @property
    def in_memory(self) -> list[str]:
        """Ids of the contexts whose caches are in memory, the least recently used first."""
        with self._changed:
            return [name for (name, _), held in self._held.items() if held.cache is not None]

    @property
    def entry_bytes(self) -> int:
        """Bytes of a key and a value in all layers whose cache is compressed."""
        return sum(layer.entry_bytes for layer in self._like.compact_layers)

    def folders(self, owner: str) -> list[OwnedContexts]:
        """The contexts that an owner sees: its own, then the operator's."""
        if owner == NO_KEY:
            return [self._operator]
        if owner not in self._owned:
            self._owned[owner] = OwnedContexts(f"{self.place}/{owner}")
        return [self._owned[owner], self._operator]

    def _shared(self, folder: OwnedContexts, owner: str) -> bool:
        """Whether the contexts of a folder are the operator's, and not the owner's to delete."""
        return folder is self._operator and owner != NO_KEY

    def find(self, owner: str, asked: str) -> Found:
        """A context by its id. Raises ApiError for one that is not there, is no id, or cannot be used."""
        for folder in self.folders(owner):
            try:
                found = folder.find(asked)
            except UnknownContextError:
                continue
            except CacheError as error:
                raise damaged(asked, error) from None
            except WinnowError as error:
                raise ApiError(400, str(error), code="invalid_value", param=FIELD) from None
            return Found(found.context, found.portable, shared=self._shared(folder, owner))
        raise missing(asked)

    def listed(self, owner: str) -> Iterator[Found | str]:
        """All contexts that an owner sees; of a file that cannot be used its id. Raises ApiError as :meth:`names`."""
        try:
            for folder in self.folders(owner):
                for asked, found in folder.listed():
                    if found is None:
                        yield asked
                    else:
                        yield Found(found.context, found.portable, shared=self._shared(folder, owner))
        except CacheError as error:
            raise unreadable(error) from None

    def names(self, owner: str) -> list[str]:
        """Ids of all contexts that an owner sees, its own first. Raises ApiError if the store cannot be read."""
        folders = self.folders(owner)
        try:
            return [one for folder in folders for portable in (True, False) for one in folder.files(portable).ids()]
        except CacheError as error:
            raise unreadable(error) from None

    def created(self, owner: str, found: Found) -> int | None:
        """When it was written, in seconds since 1970; None if the store does not say."""
        folder = self._operator if found.shared else self.folders(owner)[0]
        at = folder.files(found.portable).stored_at(found.context.id)
        return None if at is None else int(at.timestamp())

    def remove(self, owner: str, asked: str) -> None:
        """Delete a context; requests that use it go on. Raises ApiError as :meth:`find`, and for one of the operator's."""
        try:
            found = self.find(owner, asked)
            portable, shared = found.portable, found.shared
        except ApiError as error:
            if error.code != "context_damaged":
                raise
            portable, shared = self.kind_of_damaged(owner, asked)
        if shared:
            raise ApiError(
                403, f"context {asked} is the operator's, who alone can delete it: with winnow context rm", code="not_yours",
                param=FIELD,
            )  # fmt: skip
        try:
            self.folders(owner)[0].files(portable).remove(asked)
        except UnknownContextError:
            pass  # another thread was quicker
        except CacheError as error:
            logger.error("%s", error)
            raise ApiError(500, f"context {asked} cannot be deleted: the server's log says why", code="store_failed") from None
        with self._changed:
            held = self._held.get((asked, portable))
            if held is not None and not held.uses:
                self._drop((asked, portable))

    def kind_of_damaged(self, owner: str, asked: str) -> tuple[bool, bool]:
        """Whether the file of a context that cannot be used is a portable one's, and whether it is the operator's."""
        for folder in self.folders(owner):
            for portable in (True, False):
                if asked in folder.files(portable):
                    return portable, self._shared(folder, owner)
        raise missing(asked)

    def lease(self, owner: str, found: Found) -> Lease:
        """The cache of a context that :meth:`find` gave, from memory or read from its file, once however many ask for it.

        Raises ApiError for a context that is gone, damaged, of another model or larger than the memory for contexts, and if
        others use all of it for too long.
        """
        key = found.context.id, found.portable
        with self._changed:
            mine = key not in self._held
            held = self._held.setdefault(key, _Held(found))
            held.uses += 1
            self._held.move_to_end(key)
        try:
            if mine:
                self._read(held, key, found, owner)
            with self._changed:
                self._changed.wait_for(lambda: held.cache is not None or held.error is not None)
                if held.error is not None:
                    raise held.error.with_traceback(None)
                assert held.cache is not None
                return Lease(held.found, held.cache, lambda: self._give_back(held))
        except BaseException:
            self._give_back(held)
            raise

    def _read(self, held: _Held, key: tuple[str, bool], found: Found, owner: str) -> None:
        """Read a cache from its file. An error is that of all who wait for it."""
        try:
            folder = self._operator if found.shared else self.folders(owner)[0]
            check_fit(found.context, self.model)
            size = self.loaded_bytes(found)
            self.check_memory(size, f"context {found.context.id}")
            self._make_room(size)
            held.size = size
            self.reads += 1
            cache = folder.load(found, self.model, self._like)
            with self._changed:
                self._used += (real := held_bytes(cache)) - held.size
                held.size, held.cache = real, cache
                self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._used -= held.size
                held.size = 0
                held.error = answer_to(found.context.id, error)
                self._held.pop(key, None)
                self._changed.notify_all()
            if not isinstance(error, Exception):
                raise

    def loaded_bytes(self, found: Found) -> int:
        """About how many bytes a context takes in memory; its file's, in the model's dtype."""
        stored = getattr(torch, found.context.header.dtype, self.model.dtype)
        return found.context.bytes * self.model.dtype.itemsize // stored.itemsize

    def check_memory(self, size: int, what: str) -> None:
        """Raise ApiError if something can never be in memory."""
        if size > self.memory:
            raise ApiError(
                507, f"{what} takes {size} bytes, the server's memory for contexts is {self.memory}: store the text with a "
                "smaller budget, or start the server with --context-memory", code="context_too_large",
            )  # fmt: skip

    def reserve(self, size: int) -> Callable[[], None]:
        """Set so many bytes aside for a document that is read; what gives them back. Raises ApiError as :meth:`lease`."""
        self.check_memory(size, "the context")
        self._make_room(size)

        def release() -> None:
            with self._changed:
                self._used -= size
                self._changed.notify_all()

        return release

    def _make_room(self, size: int) -> None:
        """Set so many bytes aside, as soon as others give up theirs."""
        until = time.monotonic() + self.patience
        with self._changed:
            while self._used + size > self.memory:
                unused = next((key for key, held in self._held.items() if held.cache is not None and not held.uses), None)
                if unused is not None:
                    self._drop(unused)
                elif not self._changed.wait(until - time.monotonic()):
                    raise ApiError(
                        429, f"other requests use all {self.memory} bytes of memory for contexts: try again later, or start "
                        "the server with --context-memory", code="contexts_busy", retry_after=self.patience / 10,
                    )  # fmt: skip
            self._used += size

    def _drop(self, key: tuple[str, bool]) -> None:
        """Let go of a cache in memory. With the lock."""
        self._used -= self._held.pop(key).size
        self._changed.notify_all()

    def _give_back(self, held: _Held) -> None:
        with self._changed:
            held.uses -= 1
            self._changed.notify_all()

    def check_disk(self, size: int) -> None:
        """Raise ApiError if a file of so many bytes does not fit beside the others. Nothing is deleted to make room."""
        try:
            used = sum(OwnedContexts(place).bytes for place in owner_places(self.place))
        except CacheError as error:
            raise unreadable(error) from None
        if used + size > self.disk:
            raise ApiError(
                507, f"the server's contexts take {used} bytes and this one about {size} more, which passes the limit of "
                f"{self.disk}: delete one with DELETE /v1/contexts/ID, or start the server with --context-disk",
                code="store_full",
            )  # fmt: skip

    def store(self, owner: str, document: Document, size: int, portable: bool, name: str) -> Found:
        """Write a document of about so many bytes into the owner's folder.

        Raises ApiError if it does not fit or the store cannot be written, other WinnowErrors for what cannot be stored so.
        """
        with self._writing:
            self.check_disk(size)
            try:
                return self.folders(owner)[0].add(document, portable=portable, name=name)
            except StoreError as error:
                raise unwritable(error) from None


def held_bytes(cache: CompactCache) -> int:
    """Bytes of everything that a cache holds."""
    parts: list[Any] = []
    for layer in cache.layers:
        parts += [getattr(layer, "keys", None), getattr(layer, "values", None)]
        if isinstance(layer, CompactLayer):
            parts += [layer.valid, layer.queries, *layer.positions]
            parts += [tensor for part in layer.quantized for tensor in (part.codes, part.scales, part.zeros)]
    return sum(part.untyped_storage().nbytes() for part in parts if part is not None)


def answer_to(context: str, error: BaseException) -> Exception:
    """What a client is told of a context that could not be read."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownContextError):  # deleted meanwhile
        return missing(context)
    if isinstance(error, CacheError) and "is of another model" in str(error):
        return ApiError(400, str(error), code="context_of_another_model", param=FIELD)
    return damaged(context, error)


def missing(context: str) -> ApiError:
    """The answer about a context that is not there."""
    return ApiError(404, f"there is no context {context}: see GET /v1/contexts", code="context_not_found", param=FIELD)


def damaged(context: str, error: BaseException) -> ApiError:
    """The answer about a file that cannot be used; the log says why."""
    logger.error("context %s cannot be used: %s", context, error, exc_info=not isinstance(error, WinnowError))
    return ApiError(
        500, f"context {context} cannot be used, the server's log says why: delete it, and store the text anew",
        code="context_damaged", param=FIELD,
    )  # fmt: skip


def unreadable(error: CacheError) -> ApiError:
    """The answer about a store that cannot be listed."""
    logger.error("%s", error)
    return ApiError(500, "the server's store of contexts cannot be read: its log says why", code="store_failed")


def unwritable(error: CacheError) -> ApiError:
    """The answer about a store that cannot be written; where it is stays in the log."""
    logger.error("%s", error)
    why = str(error).rpartition(": ")[2]
    return ApiError(
        507, f"the server's store of contexts cannot be written ({why}): delete a context, or ask the server's operator",
        code="store_failed",
    )  # fmt: skip
