"""The API reference: every public name of ``winnowkv`` on the page of its area, rendered by mkdocstrings."""

from __future__ import annotations

from typing import NamedTuple


class Area(NamedTuple):
    """One page: its title, a sentence, and the names on it."""

    title: str
    about: str
    names: tuple[str, ...]


AREAS = {
    "compress": Area(
        "Compressing", "Everything that the model reads inside a block.", ("compress", "Run", "Report", "Budget")
    ),
    "caches": Area(
        "Caches",
        "Compact caches of your own: to read prompts, go on, keep and explain them.",
        (
            "CompactCache", "prefill", "extend", "greedy", "stack", "save_cache", "load_cache", "Explanation", "KeptTokens",
        ),
    ),
    "documents": Area("Documents", "One text, many questions.", ("read", "open_document", "Document", "Answer", "Study")),
    "engine": Area(
        "Engine", "Many requests at once.", ("Engine", "Request", "Sampling", "Completion", "Event", "Logprob")
    ),
    "policies": Area(
        "Policies", "To make, combine and write them.",
        ("policy", "register_policy", "adakv", "chunkkv", "criticalkv", "Policy", "PromptInfo", "LayerStates"),
    ),
    "models": Area("Models and profiles", "", ("load", "ModelInfo", "CalibrationProfile", "read_profile")),
    "prompts": Area(
        "Prompts", "What is read of a prompt before it is scored.",
        ("task_profile", "TaskProfile", "read_structure", "Structure"),
    ),
    "errors": Area(
        "Errors", "All derive from `WinnowError`, and name the value, the limit and the way out.",
        (
            "WinnowError", "BudgetError", "CacheError", "InputError", "ModelNotFoundError", "PolicyError", "ProfileError",
            "UnsupportedEngineError", "UnsupportedModelError",
        ),
    ),
}  # fmt: skip
PARTS = (  # what a policy of one's own derives from
    "base.TokenPolicy", "observation.WindowPolicy", "compose.Wrapper", "parts.Scorer", "parts.QueryFreeScorer",
    "parts.Allocator", "parts.Selector", "parts.SharedTokens", "parts.Parts", "base.BoundPolicy",
)  # fmt: skip


def pages() -> dict[str, str]:
    """Markdown of the overview and of a page for each area by path below ``docs``."""
    listed = [
        f"## [{area.title}]({name}.md)\n\n" + ", ".join(f"[`{each}`][winnowkv.{each}]" for each in area.names)
        for name, area in AREAS.items()
    ]
    about = "`import winnowkv as wk`: every name below is there. What is not named here may change without notice."
    found = {"api/index.md": "\n\n".join(["# Python", about, *listed, PARTS_LINK]) + "\n"}
    for name, area in AREAS.items():
        found[f"api/{name}.md"] = page(area.title, area.about, [f"winnowkv.{each}" for each in area.names])
    found["api/policy-parts.md"] = page(
        "A policy's parts", "What policies of your own derive from.", [f"winnowkv.policies.{each}" for each in PARTS]
    )
    return found


PARTS_LINK = "## [A policy's parts](policy-parts.md)\n\nFor policies of your own: scorer, allocator, selector."


def page(title: str, about: str, names: list[str]) -> str:
    """A page of names for mkdocstrings."""
    return "\n\n".join(filter(None, [f"# {title}", about, *(f"::: {name}" for name in names)])) + "\n"
