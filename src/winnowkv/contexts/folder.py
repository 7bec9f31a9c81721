"""The files of contexts in one place, a folder or any URL that fsspec knows; each is named by the digest of its content."""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec

from winnowkv.contexts.context import CONTEXT_ID, ID_LENGTH, Context, check_id
from winnowkv.errors import CacheError, InputError, UnknownContextError
from winnowkv.files import Fail, reason

LONGEST_HEADER = 1 << 20  # bytes; those of contexts have a thousand


class ContextFiles(ABC):
    """Files of one kind in a folder or under a URL (``/data/contexts``, ``s3://bucket/contexts``, ``memory://contexts``).

    ``suffix`` tells the kind. Raises InputError for a URL of a kind that is not known or not installed.
    """

    suffix: str

    def __init__(self, place: str | Path) -> None:
        self.place = str(place)
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.place)
        except (ValueError, ImportError) as error:
            raise InputError(f"store {self.place!r}: {reason(error)}: give a folder, or a URL that fsspec knows") from None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.place!r})"

    @abstractmethod
    def context(self, context: str) -> Context:
        """What is known of a context, without its keys and values.

        Raises InputError for what is no id or not in the store, CacheError for a file that cannot be used.
        """

    def ids(self) -> list[str]:
        """The ids of all contexts, in order; none of a folder that is not there. Raises CacheError if it cannot be listed."""
        names = [Path(one["name"]).name for one in listing(self._files, self._root, self.place)]
        ids = (name.removesuffix(self.suffix) for name in names if name.endswith(self.suffix))
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
        return bool(self._files.exists(self._path(check_id(context))))

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
            written: datetime = self._files.modified(self._path(check_id(context)))
            return written.astimezone(UTC)
        except (NotImplementedError, OSError, KeyError, AttributeError):
            return None

    @property
    def bytes(self) -> int:
        """Of all files of contexts. Raises CacheError if they cannot be listed."""
        return sum(
            int(one["size"] or 0) for one in listing(self._files, self._root, self.place) if one["name"].endswith(self.suffix)
        )

    def _path(self, context: str) -> str:
        return f"{self._root}/{context[:ID_LENGTH]}{self.suffix}"

    def _known(self, context: str) -> str:
        return self._path(check_id(context))

    def _table(self, context: str, path: str) -> tuple[int, dict[str, Any]]:
        """The length of a safetensors file's header, and the header: the tensors by name, and the metadata."""
        length = int.from_bytes(self._files.cat_file(path, 0, 8), "little")
        if not 0 < length <= LONGEST_HEADER:
            raise self._damaged(context, f"its header would have {length} bytes")
        return length, json.loads(self._files.cat_file(path, 8, 8 + length))

    def _unknown(self, context: str) -> UnknownContextError:
        return UnknownContextError(
            f"there is no context {context} in store {self.place}: see winnow context list --store {self.place}"
        )

    def _damaged(self, context: str, why: str) -> CacheError:
        return CacheError(f"context {context} in store {self.place} cannot be used ({why}): remove it and add it anew")


def listing(files: Any, root: str, place: str) -> list[dict[str, Any]]:
    """Name, type and size of what is in a folder; nothing if it is not there. Raises CacheError if it cannot be listed."""
    try:
        found: list[dict[str, Any]] = files.ls(root, detail=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CacheError(f"store {place} cannot be listed: {reason(error)}") from None
    return found


def subfolders(place: str) -> list[str]:
    """Names of the folders in a folder or under a URL. Raises CacheError if it cannot be listed."""
    files, root = fsspec.core.url_to_fs(place)
    return [Path(one["name"]).name for one in listing(files, root, place) if one["type"] == "directory"]


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
