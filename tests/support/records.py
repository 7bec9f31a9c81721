"""Records of website/ with content that a test gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from website.records import Record


@dataclass(frozen=True)
class Given(Record):
    """A record with content that is given."""

    held: dict[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> dict[str, Any]:
        return self.held


def given(name: str, result: Any, **more: Any) -> dict[str, Record]:
    """A record of that name by its name: ``result`` and further fields of its file."""
    return {name: Given(name, "", "", ("README.md",), held={**more, "result": result})}
