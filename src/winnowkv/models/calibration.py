"""A calibration profile: what was measured once of a model, offline, and policies read at every prompt.

Its head scores and layer errors are made by ``winnow calibrate``; one JSON file a model. Policies find it in the user's
folder of profiles (:func:`profile_folder`), else among those that ship with the package.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import platformdirs

from winnowkv.errors import ProfileError
from winnowkv.files import first_fault, parse_json, read_text, shown, write_text
from winnowkv.models.curve import Curve
from winnowkv.models.info import ModelInfo

if TYPE_CHECKING:
    from pydantic import TypeAdapter

PROFILE_SCHEMA = 1
Table = tuple[tuple[float, ...], ...]
HeadKind = Literal["semantic", "traditional"]
LARGEST_SCORE = 1e6  # scores and errors are shares; above it sums and powers of them have no end
WAY_OUT = "make one with: winnow calibrate --model M --out FILE"
GET_ONE = f"get one with: winnow profile fetch M --repo OWNER/NAME, or {WAY_OUT}"
FOLDER_VARIABLE = "WINNOW_PROFILE_FOLDER"
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]{0,99}")  # of a class or a hash, before it becomes the name of a file


@dataclass(frozen=True)
class CalibrationProfile:
    """Head scores ``[L, Hq]`` and layer errors ``[L]`` of one model, ``L`` its compressible layers.

    Attributes
    ----------
    model: the name it was calibrated under.
    model_info: what a model must have for the profile to serve it.
    semantic: attention mass on the whole answer span while the answer is generated
        (CompressKV, arXiv 2508.02401), mean over successful prompts.
    traditional: share of the answer copied by a head's strongest entry (arXiv 2404.15574).
    errors: share of the summed eviction error that falls on each layer; the sum is 1.
    about: seeds, versions, prompts and successes.
    curves: by a policy's name what ``budget="auto"`` expects of it.

    Raises
    ------
    ProfileError
        For tables whose shape is not that of the model, or values below zero or not finite.
    """

    model: str
    model_info: ModelInfo
    semantic: Table
    traditional: Table
    errors: tuple[float, ...]
    about: dict[str, Any] = field(default_factory=dict, compare=False)
    curves: dict[str, Curve] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        heads, layers, kv_heads = self.model_info.heads, len(self.errors), self.model_info.kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ProfileError(f"{heads} query heads cannot share {kv_heads} KV heads")
        if not 0 < layers <= self.model_info.layers:
            raise ProfileError(f"errors are given for {layers} layers, the model has {self.model_info.layers}")
        for kind in ("semantic", "traditional"):
            table = getattr(self, kind)
            if len(table) != layers or any(len(row) != heads for row in table):
                raise ProfileError(f"{kind} head scores are not {layers} layers x {heads} heads")
        values = [*self.errors, *(score for table in (self.semantic, self.traditional) for row in table for score in row)]
        if not all(0 <= value <= LARGEST_SCORE for value in values):  # not a number fails this too
            raise ProfileError(f"a score or an error is negative, above {LARGEST_SCORE:g} or not a finite number")

    def ranking(self, layer: int, kind: HeadKind) -> list[int]:
        """Query heads of a layer, best first; ties to the lower head."""
        row = getattr(self, kind)[layer]
        return sorted(range(len(row)), key=lambda head: (-row[head], head))

    def kv_weights(self, kind: HeadKind) -> list[float]:
        """A score for every KV head of the model, layer by layer: the mean of its query heads'."""
        size = self.model_info.heads // self.model_info.kv_heads
        return [sum(row[at : at + size]) / size for row in getattr(self, kind) for at in range(0, len(row), size)]

    def top_heads(self, count: int, kind: HeadKind = "semantic") -> list[tuple[int, int]]:
        """The best heads of the whole model as ``(layer, head)``, best first; ties to the lower layer and head."""
        table = getattr(self, kind)
        every = [(layer, head) for layer, row in enumerate(table) for head in range(len(row))]
        return sorted(every, key=lambda at: (-table[at[0]][at[1]], at))[:count]

    def strong_heads(self, least: float = 0.5) -> list[tuple[int, int]]:
        """The semantic heads that score at least ``least`` of what the best one does, best first."""
        bound = least * max(map(max, self.semantic))
        every = self.top_heads(self.model_info.heads * len(self.semantic))
        return [at for at in every if self.semantic[at[0]][at[1]] >= bound]

    def curve(self, policy: str) -> Curve:
        """What ``budget="auto"`` expects of a policy. Raises ProfileError if it was not measured."""
        if policy not in self.curves:
            raise ProfileError(
                f"the profile of {shown(self.model)} says nothing of what {policy} keeps at a budget (it knows "
                f"{', '.join(self.curves) or 'no policy'}): measure it on prompts of yours with "
                f"winnow audit --prompts FILE --policies {policy} --curves p.json, then use auto:0.95:p.json"
            )
        return self.curves[policy]

    def check(self, model: ModelInfo) -> None:
        """Raise ProfileError naming the first difference if a model is not the one that was calibrated."""
        if difference := self.model_info.difference(model):
            raise ProfileError(f"this profile is of {shown(self.model)} with {difference} as the model has: {WAY_OUT}")
        if model.compressed is not None and len(self.errors) != model.compressed:
            raise ProfileError(
                f"this profile of {shown(self.model)} holds {len(self.errors)} layers, {model.compressed} of the model's are "
                f"compressed: {WAY_OUT}"
            )

    def serves(self, model: ModelInfo) -> bool:
        """Whether :meth:`check` passes."""
        try:
            self.check(model)
        except ProfileError:
            return False
        return True

    def to_json(self) -> str:
        """The text of its file (docs/profiles.md)."""
        text = json.dumps({"schema": PROFILE_SCHEMA, **asdict(self), "model_info": self.model_info.to_dict()}, indent=1)
        return text + "\n"

    def write(self, path: Path) -> None:
        """Write it as JSON, as a whole or not at all. Raises ProfileError if the file cannot be written."""
        write_text(path, self.to_json(), lambda why: ProfileError(f"profile {path} {why}"))


def choose_heads(spec: str, profile: CalibrationProfile | None, layer: int, count: int, heads: int, seed: int) -> list[int]:
    """Query heads of a layer: the best ``count`` of ``srh`` or ``traditional``, ``all``, or ``random:k``.

    The draw depends on seed and layer only.
    """
    if spec == "all":
        return list(range(heads))
    if spec.startswith("random:"):
        return sorted(random.Random(seed * 1_000_003 + layer).sample(range(heads), int(spec.removeprefix("random:"))))
    assert profile is not None
    return profile.ranking(layer, "semantic" if spec == "srh" else "traditional")[:count]


def read_profile(path: Path) -> CalibrationProfile:
    """Read a profile; raises ProfileError for a file that is missing, cut off, of a newer schema or not a profile."""
    from pydantic import ValidationError

    def fail(why: str) -> ProfileError:
        return ProfileError(f"profile {path} {why}. {WAY_OUT}")

    text = read_text(Path(path), fail)
    data = parse_json(text, lambda why: fail(f"is cut off or broken: {why}"))
    schema = data.get("schema") if isinstance(data, dict) else None
    if type(schema) is not int or schema < 1:
        raise ProfileError(f"{path} is not a profile: it names no schema. {WAY_OUT}")
    if schema > PROFILE_SCHEMA:
        raise ProfileError(f"profile {path} has schema {schema}, this version reads up to {PROFILE_SCHEMA}: update winnowkv")
    try:
        return _schema().validate_json(text, strict=True)
    except ValidationError as error:
        raise fail(f"cannot be used: {first_fault(error)}") from None


@lru_cache(maxsize=1)
def _schema() -> TypeAdapter[CalibrationProfile]:
    from pydantic import TypeAdapter

    return TypeAdapter(CalibrationProfile)


def _read_once(path: Path) -> CalibrationProfile:
    """:func:`read_profile`, once for each state of a file: policies ask for it at every prompt."""
    try:
        state = path.stat()
    except (OSError, ValueError):
        return read_profile(path)  # which says what is wrong
    return _read_state(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=32)
def _read_state(path: Path, modified: int, size: int) -> CalibrationProfile:
    return read_profile(path)


def find_profile(asked: str | CalibrationProfile | None, model: ModelInfo) -> CalibrationProfile:
    """The profile that serves a model.

    ``asked`` is a profile, a file, a folder in which the model's own is looked for, or None for :func:`known_profile`.
    Raises ProfileError if none fits, naming the mismatch.
    """
    if isinstance(asked, CalibrationProfile):
        asked.check(model)
        return asked
    shape = f"({model.architecture}, {model.layers} layers, {model.heads} heads)"
    if asked is None:
        known = known_profile(model)
        if known is None:
            raise ProfileError(
                f"no profile ships with the package for this model {shape}, and none is in {profile_folder()}: {GET_ONE}"
            )
        return known
    if not os.path.isdir(asked):  # unlike Path.is_dir() it raises for no name
        profile = _read_once(Path(asked))
        profile.check(model)
        return profile
    for file in _json_files(Path(asked)):
        if (profile := _read_once(file)).model_info == model:
            profile.check(model)
            return profile
    raise ProfileError(f"folder {asked} holds no profile of this model {shape}: {WAY_OUT}")


def known_profile(model: ModelInfo) -> CalibrationProfile | None:
    """The profile that policies use of a model if none is named: the user's, else one that ships; None if there is none.

    Raises ProfileError if the user's file of this model cannot be used: a guess in its place would not be noticed.
    """
    try:
        mine = installed_file(model)
    except ProfileError:  # a model whose class has no plain name has no file there
        mine = None
    if mine is not None and os.path.exists(mine):
        profile = _read_once(mine)
        if profile.model_info != model:
            raise ProfileError(f"{mine} holds the profile of another model ({shown(profile.model)}): remove it")
        if profile.serves(model):
            return profile
    every = (_read_once(file) for file in shipped_files())
    return next((profile for profile in every if profile.serves(model)), None)


def profile_folder() -> Path:
    """Where a user's profiles lie: ``WINNOW_PROFILE_FOLDER``, else ``profiles`` in the user's data directory."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else platformdirs.user_data_path("winnowkv") / "profiles"


def file_name(model: ModelInfo) -> str:
    """The name of a profile's file, here and in repositories: ``LlamaForCausalLM-90836ae8b7801ca0.json``.

    It is made of what a profile is compared by, since a model's own name differs from machine to machine.
    Raises ProfileError for a class or a hash that makes no file name.
    """
    for part in (model.architecture, model.config):
        if not SAFE_NAME.fullmatch(part):
            raise ProfileError(f"{shown(part)} is neither the name of a model's class nor a hash: {WAY_OUT}")
    return f"{model.architecture}-{model.config}.json"


def installed_file(model: ModelInfo) -> Path:
    """Where a user's profile of a model lies, or would."""
    return profile_folder() / file_name(model)


def installed_files() -> Iterator[Path]:
    """The files of the user's folder, by name."""
    return _json_files(profile_folder())


def shipped_files() -> Iterator[Path]:
    """The profiles of the package, by name."""
    return _json_files(Path(str(files("winnowkv") / "data" / "profiles")))


def _json_files(folder: Path) -> Iterator[Path]:
    yield from sorted(file for file in folder.iterdir() if file.name.endswith(".json")) if folder.is_dir() else ()
