"""Whether a context and a model fit each other, by the model's config alone; weights are not compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from winnowkv.models.info import HASHED, full_attention_config
from winnowkv.models.rope import LENGTH_DEPENDENT

Fields = dict[str, str | int | float | None]


def rope_options(config: Any) -> dict[str, Any]:
    """The RoPE options of a config, flat; of models whose kinds of layers turn otherwise, each with the kind before it."""
    found = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if found and all(isinstance(each, dict) for each in found.values()):
        return {f"{kind}.{name}": value for kind, each in found.items() for name, value in each.items()}
    return dict(found)


def model_fields(config: Any) -> Fields:
    """What must be equal of two models for one to go on from the other's keys and values."""
    sizes = full_attention_config(config)
    fields: Fields = {"architecture": (getattr(config, "architectures", None) or ["unknown"])[0]}
    fields |= {name: getattr(sizes, name, None) for name in HASHED}
    options = rope_options(config)
    return fields | {f"rope.{name}": value for name, value in options.items() if isinstance(value, str | int | float)}


def fields_difference(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str | None:
    """The first thing in which a context's model is another than this one, in words."""
    for name in sorted({*theirs, *mine}):
        one, other = theirs.get(name), mine.get(name)
        numbers = isinstance(one, int | float) and isinstance(other, int | float)
        if not (math.isclose(one, other, rel_tol=1e-6) if numbers else one == other):  # type: ignore[arg-type]
            return f"its model's {name} is {one}, here {other}"
    return None


def why_unmovable(config: Any) -> str | None:
    """Why keys of the model cannot be moved to other positions, as far as its config tells; None if they can."""
    if (kind := length_dependent(config)) is not None:
        return f"the model's rotation ({kind}) changes with the prompt's length"
    return "the model scales queries by their position" if scales_by_position(config) else None


def length_dependent(config: Any) -> str | None:
    """The kind of RoPE whose frequencies change with the length of the prompt, if the model has one."""
    kinds = [value for name, value in rope_options(config).items() if name.rpartition(".")[2] == "rope_type"]
    return next((kind for kind in kinds if kind in LENGTH_DEPENDENT), None)


def scales_by_position(config: Any) -> bool:
    """Whether queries are scaled by their position (Llama 4, Ministral 3), so that distances alone do not make the scores."""
    tuned = getattr(config.get_text_config(decoder=True), "attn_temperature_tuning", None)
    return bool(tuned) or any("llama_4_scaling" in name and value for name, value in rope_options(config).items())
