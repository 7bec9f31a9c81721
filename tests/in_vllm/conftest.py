"""What the tests with vLLM share: one store of contexts, with what our own engine answers."""

from __future__ import annotations

import pytest
import torch

from support.vllm_engine import Stored, fill
from winnowkv.contexts.store import ContextStore


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> ContextStore:
    return ContextStore(tmp_path_factory.mktemp("contexts"))


@pytest.fixture(scope="session")
def stored(store: ContextStore) -> dict[str, Stored]:
    """Contexts in float32 by their labels."""
    return fill(store, torch.float32)
