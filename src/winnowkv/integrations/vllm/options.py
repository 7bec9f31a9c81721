"""What ``kv_connector_extra_config`` may say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from winnowkv.errors import InputError

GIB = 1 << 30


@dataclass(frozen=True)
class ConnectorOptions:
    """Options of the connector.

    Attributes
    ----------
    store: the folder or URL of the contexts.
    ram_gib: most GiB of contexts that each worker keeps in memory; the least recently used go first. 0 keeps none.
    handoff_gib: most GiB that the worker holds of prompts that it compresses while vLLM computes them (handoff.py); 0: it
        compresses none.
    any_release: also go on with a release of vLLM that was not tested.
    """

    store: str
    ram_gib: float = 4.0
    handoff_gib: float = 0.0
    any_release: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> ConnectorOptions:
        """Read them. Raises InputError for an option that is unknown, missing or of another type."""
        given = dict(given or {})
        known = [each.name for each in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise InputError(f"kv_connector_extra_config has no option {unknown[0]!r}: there are {', '.join(known)}")
        if not isinstance(given.get("store"), str) or not given["store"]:
            raise InputError('kv_connector_extra_config needs "store": the folder or URL of the contexts')
        for name in ("ram_gib", "handoff_gib"):
            size = given.get(name, 0)
            if isinstance(size, bool) or not isinstance(size, int | float) or not 0 <= size < math.inf:
                raise InputError(f'"{name}": {size!r} is no number of GiB: give 0 or more')
        if not isinstance(given.get("any_release", False), bool):
            raise InputError(f'"any_release": {given["any_release"]!r} is neither true nor false')
        return cls(**given)

    @property
    def ram_bytes(self) -> int:
        """The same as ``ram_gib``."""
        return int(self.ram_gib * GIB)

    @property
    def handoff_bytes(self) -> int:
        """The same as ``handoff_gib``."""
        return int(self.handoff_gib * GIB)


def transfer_config(store: str, **options: Any) -> dict[str, Any]:
    """What vLLM's ``kv_transfer_config`` is for the contexts of a store; ``options`` of :class:`ConnectorOptions`.

    Raises InputError as :meth:`ConnectorOptions.of`.
    """
    extra = {"store": store, **options}
    ConnectorOptions.of(extra)
    return {
        "kv_connector": "WinnowConnector", "kv_connector_module_path": "winnowkv.integrations.vllm", "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }  # fmt: skip
