"""vLLM: compressed documents as the first tokens of its requests, through its own KV connector interface.

>>> context = export_context(doc, "/data/contexts")                                              # doctest: +SKIP
>>> config = {"kv_connector": "WinnowConnector", "kv_role": "kv_both",
...           "kv_connector_module_path": "winnowkv.integrations.vllm",
...           "kv_connector_extra_config": {"store": "/data/contexts"}}
>>> llm = vllm.LLM(model, kv_transfer_config=config)                                             # doctest: +SKIP

Nothing here imports vLLM before :class:`WinnowConnector` is asked for. docs/vllm.md says how it works and what is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from winnowkv.contexts.context import Context, ContextPrompt
from winnowkv.contexts.export import export_context, whole_blocks
from winnowkv.contexts.store import ContextStore
from winnowkv.integrations.vllm.handoff import Handoff, HandoffPrompt, go_on

if TYPE_CHECKING:
    from winnowkv.integrations.vllm.connector import WinnowConnector

__all__ = [
    "Context", "ContextPrompt", "ContextStore", "Handoff", "HandoffPrompt", "WinnowConnector", "export_context", "go_on",
    "whole_blocks",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "WinnowConnector":
        from winnowkv.integrations.vllm.connector import WinnowConnector

        return WinnowConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
