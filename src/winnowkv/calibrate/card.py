"""What is told of a profile: the facts that are listed, what it leaves unsaid, and the card of a repository."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

from winnowkv.models.calibration import CalibrationProfile

REPOSITORY_VARIABLE = "WINNOW_PROFILES"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a reader needs to trust a profile, and to make it anew: fields of `about`, and what each says.
EXPECTED = {
    "model_source": "where the weights came from", "dtype": "the dtype", "date": "the date", "seed": "the seed",
    "prompts": "how many prompts were asked", "answered": "how many were answered", "versions": "versions of the packages",
    "command": "the command",
}  # fmt: skip


def public_name(name: str) -> str:
    """A model's name as others may read it: of a path its last part."""
    return Path(name).name if is_path(name) else name


def is_path(name: str) -> bool:
    """Whether a model's name is a place on the machine on which it was calibrated."""
    return name[:1] in ("/", ".", "~") or "\\" in name or name.count("/") > 1 or os.path.isdir(name)


def unsaid(profile: CalibrationProfile) -> list[str]:
    """What a profile does not say of how it was measured: older ones know less."""
    return [words for name, words in EXPECTED.items() if profile.about.get(name) is None]


def facts(profile: CalibrationProfile) -> dict[str, Any]:
    """What is listed of a profile, as plain data; None for what it does not say."""
    about, info = profile.about, profile.model_info
    return {
        "model": profile.model, "model_info": info.to_dict(), "layers": len(profile.errors),
        "date": about.get("date"), "seed": about.get("seed"), "answered": about.get("answered"),
        "prompts": about.get("prompts"), "strong_heads": len(profile.strong_heads()),
        "heads": info.heads * len(profile.errors), "curves": {name: one.prompts for name, one in profile.curves.items()},
    }  # fmt: skip


def model_card(profile: CalibrationProfile, path: str, repo: str) -> str:
    """The README of a new repository of profiles, with what its first one says of itself."""
    about, known = profile.about, facts(profile)
    base = f"base_model: {profile.model}\n" if HUB_ID.fullmatch(profile.model) else ""
    rows = {
        "model": profile.model,
        "weights": " at ".join(str(part) for part in table(about.get("model_source")).values() if part),
        "class, layers, query heads, KV heads": ", ".join(
            str(known["model_info"][name]) for name in ("architecture", "layers", "heads", "kv_heads")
        ),
        "heads that stand out": f"{known['strong_heads']} of {known['heads']}",
        "prompts answered": f"{known['answered']} of {known['prompts']}",
        "seed": known["seed"], "dtype": about.get("dtype"), "date": known["date"],
        "versions": ", ".join(f"{name} {number}" for name, number in table(about.get("versions")).items()),
        "curves for `auto` budgets": ", ".join(known["curves"]),
        "command": about.get("command"),
    }  # fmt: skip
    lines = "\n".join(f"| {name} | {cell(value)} |" for name, value in rows.items())
    return (
        f"---\nlibrary_name: winnowkv\n{base}tags:\n- winnowkv\n- kv-cache\n---\n\n# Calibration profiles for winnowkv\n\n"
        "Each JSON file in `winnowkv/` says which attention heads of a model retrieve, and what eviction from its KV cache "
        "costs each layer. Policies of winnowkv read it once it is installed:\n\n"
        f"```\nwinnow profile fetch {shlex.quote(' '.join(profile.model.split()))} --repo {repo}\n```\n\n"
        f"`{path}`:\n\n| | |\n|---|---|\n{lines}\n"
    )


def table(value: Any) -> dict[str, Any]:
    """A mapping of ``about``; none if it is something else, since files of others may hold anything there."""
    return value if isinstance(value, dict) else {}


def cell(value: Any) -> str:
    """A value in a cell of a Markdown table, on one line."""
    return " ".join(str("not said" if value in (None, "") else value).replace("|", "\\|").split())


def default_repository() -> str | None:
    """The repository that ``WINNOW_PROFILES`` names; there is no other default."""
    return os.environ.get(REPOSITORY_VARIABLE) or None
