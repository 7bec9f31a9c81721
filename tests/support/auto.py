"""A profile with one curve, and a prompt read with ``budget="auto"``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import winnowkv as wk
from support.models import PROMPT, prompt
from support.profiles import random_profile
from winnowkv.cache.reading import prefill
from winnowkv.models.curve import Curve
from winnowkv.models.info import ModelInfo

SPECS = [
    "expected:observe=4:samples=16",
    "winnow:observe=4:samples=16:least=4",
    "snapkv:observe=4",
    "adakv:of=snapkv:observe=4",
    "windowkv:observe=4:window=4:top=2:group=2",
]


def profile_file(model: Any, folder: Path, curve: Curve | None) -> Path:
    """A profile of the model whose policies all have one curve."""
    made = random_profile(ModelInfo.of(model), model.config.num_hidden_layers)
    if curve is not None:
        made.curves.update({spec.split(":")[0]: curve for spec in SPECS})
    made.write(folder / "p.json")
    return folder / "p.json"


def read(model: Any, spec: str, budget: Any) -> wk.CompactCache:
    """The cache of a usual prompt, recorded whole."""
    cache = wk.CompactCache(model, spec, budget, task="localization", record=PROMPT, keep_scores=True)
    prefill(model, prompt(PROMPT), cache)
    return cache
