"""The files of one owner's contexts, of both kinds: portable ones, which vLLM serves, too, and saved caches."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from winnowkv.cache.cache import CompactCache
from winnowkv.contexts.context import Context
from winnowkv.contexts.export import export_context
from winnowkv.contexts.folder import ContextFiles, subfolders
from winnowkv.contexts.load import load_context
from winnowkv.contexts.saved import SavedContexts
from winnowkv.contexts.store import ContextStore, RememberedContexts
from winnowkv.documents import Document
from winnowkv.errors import UnknownContextError, WinnowError
from winnowkv.serve.keys import OWNER_CHARACTERS

logger = logging.getLogger("winnowkv.serve")
REMEMBERED = 32  # contexts of a folder and kind whose token ids are held in memory
OWNER = re.compile(f"[0-9a-f]{{{OWNER_CHARACTERS}}}")


@dataclass(frozen=True)
class Found:
    """A context of a store.

    Attributes
    ----------
    portable: whether vLLM serves it, too. shared: whether it is the operator's, and whoever asked has a key.
    """

    context: Context
    portable: bool
    shared: bool = False


class OwnedContexts:
    """The contexts of one folder or URL."""

    def __init__(self, place: str) -> None:
        self._flat, self._saved = ContextStore(place), SavedContexts(place)
        self._known = {True: RememberedContexts(self._flat, REMEMBERED), False: RememberedContexts(self._saved, REMEMBERED)}

    def files(self, portable: bool) -> ContextFiles:
        """The files of one kind."""
        return self._flat if portable else self._saved

    def find(self, asked: str) -> Found:
        """A context. Raises as :meth:`ContextFiles.context`."""
        try:
            return Found(self._known[True][asked], True)
        except UnknownContextError:
            return Found(self._known[False][asked], False)

    def listed(self) -> Iterator[tuple[str, Found | None]]:
        """All ids with what is known of them; None of a file that cannot be used. One that is deleted meanwhile is left out."""
        for portable in (True, False):
            for asked in self.files(portable).ids():
                try:
                    yield asked, Found(self.files(portable).context(asked), portable)
                except UnknownContextError:
                    continue
                except WinnowError as error:
                    logger.error("%s", error)
                    yield asked, None

    @property
    def bytes(self) -> int:
        """Of all files of contexts, those that cannot be used included."""
        return self._flat.bytes + self._saved.bytes

    def load(self, found: Found, model: PreTrainedModel, like: CompactCache) -> CompactCache:
        """The cache of a context. Raises WinnowErrors for one that cannot be gone on from."""
        if found.portable:
            return load_context(self._flat, found.context, model, like=like)
        return self._saved.load(found.context, model, like=like)

    def add(self, document: Document, *, portable: bool, name: str) -> Found:
        """Write a document. Raises StoreError for a full disk, other WinnowErrors for what cannot be stored so."""
        if portable:
            return Found(export_context(document, self._flat, name=name), True)
        return Found(self._saved.add(document, name=name), False)


def owner_places(place: str) -> list[str]:
    """The store itself, and the folders of all owners in it. Raises CacheError if it cannot be listed."""
    return [place, *(f"{place}/{name}" for name in subfolders(place) if OWNER.fullmatch(Path(name).name))]
