"""Calibration profiles with random scores, and the folder in which each tiny model has one."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import winnowkv as wk
from support.models import built
from winnowkv.models.info import ModelInfo

# Where write_profiles() below puts a calibration profile for each tiny model: a spec names the folder. Test processes that
# run side by side share it, since the ids of their tests, which have the folder's name in them, must be the same.
PROFILES = os.environ.get("WINNOW_TEST_PROFILES") or tempfile.mkdtemp(prefix="winnowkv-profiles-")
os.environ["WINNOW_TEST_PROFILES"] = PROFILES
# Profiles that the developer has installed are none of the tests' business: they look into a folder that is not there.
os.environ["WINNOW_PROFILE_FOLDER"] = str(Path(PROFILES) / "installed")


def random_profile(model: ModelInfo, layers: int, seed: int = 0) -> wk.CalibrationProfile:
    """A profile with random scores; the laws must hold for any."""
    draw = random.Random(seed)
    heads = range(model.heads)
    semantic, traditional = (tuple(tuple(draw.random() for _ in heads) for _ in range(layers)) for _ in range(2))
    errors = [draw.random() for _ in range(layers)]
    return wk.CalibrationProfile("tiny", model, semantic, traditional, tuple(error / sum(errors) for error in errors))


def write_profiles() -> None:
    """Write a profile of each tiny model into PROFILES."""
    for family in ("llama", "qwen2"):
        model = built(family)
        random_profile(ModelInfo.of(model), model.config.num_hidden_layers).write(Path(PROFILES) / f"{family}.json")
