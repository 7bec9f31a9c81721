"""Curves for ``budget="auto"``: the agreement expected at a kept attention mass, fitted to an audit of the user's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from winnowkv.budget import Asked
from winnowkv.errors import InputError
from winnowkv.models.calibration import CalibrationProfile, find_profile
from winnowkv.models.curve import Curve, fit_curve
from winnowkv.models.info import ModelInfo
from winnowkv.policies import policy as make_policy

MIN_CURVE_PROMPTS = 8  # with fewer, a curve does not predict the next prompt
Line = dict[str, Any]


def check_curves(policies: Sequence[str], budgets: Sequence[Asked], prompts: int) -> None:
    """Raise InputError if an audit of these settings and so many prompts gives no curve, or two for one policy name."""
    if prompts < MIN_CURVE_PROMPTS:
        raise InputError(
            f"--curves: {prompts} prompt{'' if prompts == 1 else 's'} make no curve: give at least {MIN_CURVE_PROMPTS} "
            "(--prompts, --limit), or leave --curves out"
        )
    evicting = [spec for spec in policies if make_policy(spec).evicts]
    names = [spec.split(":")[0] for spec in evicting]
    if not names:
        raise InputError("--curves: none of the policies evicts anything: give one that does, such as winnow")
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"--curves: {sorted(twice)[0]} is asked for twice, a profile holds one curve of it: leave one out")
    if words := [budget for budget in budgets if isinstance(budget, str)]:
        raise InputError(f"--curves: a curve is measured at budgets in numbers, not at {words[0]}")
    if len(budgets) < 3:
        raise InputError(f"--curves: {len(budgets)} budgets make no curve: give at least 3, such as 0.06,0.12,0.25,0.5,0.75")


def curves_of(lines: Sequence[Line]) -> dict[str, Curve]:
    """For each policy, the curve fitted to an audit's lines. Raises InputError if there are too few prompts."""
    curves = {}
    for spec in dict.fromkeys(line["policy"] for line in lines if make_policy(line["policy"]).evicts):
        mine = [line for line in lines if line["policy"] == spec and line["failed"] is None and line["compared_tokens"]]
        prompts = {line["prompt"] for line in mine}
        if len(prompts) < MIN_CURVE_PROMPTS:
            raise InputError(
                f"--curves: {spec} was compared on {len(prompts)} prompts, a curve takes at least {MIN_CURVE_PROMPTS}"
            )
        name = spec.split(":")[0]
        curves[name] = fit_curve([(line["kept_mass"], line["agreement"]) for line in mine], len(prompts))
    return curves


def write_curves(path: Path, model: PreTrainedModel, lines: Sequence[Line], expected: Sequence[Line]) -> CalibrationProfile:
    """Write the model's profile with the curves of an audit to ``path``; curves of other policies stay in it.

    The profile is the one that ``path`` holds already, else the one that a policy of the audit names, else the one that
    policies find by themselves.
    Raises ProfileError if this model has none, InputError if there are too few prompts.
    """
    asked = {(line["prompt"], line["policy"], line["budget"]) for line in expected}
    mine = [line for line in lines if (line["prompt"], line["policy"], line["budget"]) in asked]
    profile = find_base(path, model, [line["policy"] for line in expected])
    made = replace(profile, curves={**profile.curves, **curves_of(mine)})
    made.write(path)
    return made


def find_base(path: Path, model: PreTrainedModel, policies: Sequence[str]) -> CalibrationProfile:
    """The profile into which curves are written: the one at ``path``, else the one a policy names, else the one
    that policies find by themselves.

    Raises ProfileError if this model has none. The model needs no weights.
    """
    named = (getattr(make_policy(spec), "profile", None) for spec in policies)
    return find_profile(str(path) if path.exists() else next(filter(None, named), None), ModelInfo.of(model))
