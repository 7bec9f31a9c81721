"""The one door through which commands load models: everything that needs no weights is checked before they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnowkv.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnowkv.budget import Asked

# Packages that a command may need, the name of each to import, and the extra that brings it.
PACKAGES = {
    "matplotlib": ("matplotlib", "demo"), "rouge-score": ("rouge_score", "demo"),
    "fastapi": ("fastapi", "serve"), "uvicorn": ("uvicorn", "serve"), "prometheus-client": ("prometheus_client", "serve"),
    "ray": ("ray", "scale"),
}  # fmt: skip
Check = Callable[["PreTrainedModel"], object]


def load_model(
    name: str, check: Check, *, random: bool = False, device: str | None = None, dtype: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its tokenizer without the library's progress bars.

    Parameters
    ----------
    check: raises a WinnowError for what this model cannot be asked. It is called with the model before its weights are
        read, and again with the loaded one; it must not use weights.
    random: random weights of the model's shape.
    device, dtype: as for :func:`winnowkv.load`, by name.

    Raises ModelNotFoundError for a model that is not there.
    """
    import torch
    import transformers

    from winnowkv.models import load as models

    transformers.utils.logging.disable_progress_bar()
    check_config(name, check)
    how: dict[str, Any] = {"device": device, "dtype": None if dtype is None else getattr(torch, dtype)}
    loaded, tokenizer = models.load_random(name, **how) if random else models.load(name, **how)
    check(loaded)
    return loaded, tokenizer


def check_config(name: str, check: Check) -> None:
    """Call ``check`` with the model before its weights are read, if its config is enough to make it."""
    hollow = without_weights(name)
    if hollow is not None:
        check(hollow)


def without_weights(name: str) -> PreTrainedModel | None:
    """The model of a config, with no storage behind its weights; None if only the weights can tell.

    Raises ModelNotFoundError for a model that is not there.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from winnowkv.models.load import load_config

    config = load_config(name)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception:  # what a config cannot tell differs from model to model: loading says what is wrong
        return None
    return model


def check_policies(specs: Iterable[str], budgets: Iterable[Asked]) -> None:
    """Raise PolicyError, BudgetError, ProfileError or InputError for what no model could be asked.

    That is: unknown policies and options, profiles that cannot be read, and packages that are missing.
    """
    from winnowkv.budget import Budget
    from winnowkv.cache.quantized import quanto
    from winnowkv.models.calibration import read_profile
    from winnowkv.policies import policy as make_policy

    made = [make_policy(spec) for spec in specs]
    named = [profile for one in made if (profile := getattr(one, "profile", None)) is not None]
    named += [profile for budget in budgets if (profile := Budget.of(budget).profile) is not None]
    for profile in dict.fromkeys(one for one in named if isinstance(one, str)):
        if not Path(profile).is_dir():
            read_profile(Path(profile))
    if any(one.quantize for one in made):
        quanto()


def require(what: str, *packages: str) -> None:
    """Raise InputError if a package that ``what`` needs is not installed."""
    for package in packages:
        module, extra = PACKAGES[package]
        if find_spec(module) is None:
            raise InputError(f"{what} needs the package {package}, which is not installed: pip install 'winnowkv[{extra}]'")


def check_file(file: Path, option: str) -> None:
    """Raise InputError for a file that will not be writable: a folder, or one in a folder that does not exist."""
    if file.is_dir():
        raise InputError(f"{option} {file} is a folder: give the name of a file")
    if not file.absolute().parent.is_dir():
        raise InputError(f"{option} {file} cannot be written: the folder {file.parent} does not exist, so make it first")


def check_folder(out: Path, known: Mapping[str, Any]) -> None:
    """Raise InputError if a folder of results cannot be written, or holds those of another run.

    ``known``: what is known of the run's settings before its model is loaded.
    """
    from winnowkv.evaluate.report.store import CONFIG, read_config

    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise InputError(f"output folder {out} cannot be written: {nearest} is a file")
    if not (out / CONFIG).exists():
        return
    before = read_config(out)
    for name, now in known.items():
        if before.get(name) != now:
            mixed = "mixed protocols: " if name == "protocol" else ""
            raise InputError(
                f"{mixed}{out} holds results of another run ({name}: {before.get(name)!r}, now {now!r}): "
                f"use another --out or remove the folder"
            )
