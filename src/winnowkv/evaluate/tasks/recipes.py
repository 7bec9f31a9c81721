"""Recipes: one YAML file for each headline claim, with the protocol and the models that it was made for.

::

    claim: ...                      # what the paper says
    source: WindowKV, arXiv 2503.17922
    command: eval                   # or needle
    note: ...                       # how this differs from the paper; optional
    tasks: [longbench]              # and the command's other settings, see EVAL_KEYS and NEEDLE_KEYS
    models:
      - name: Qwen/Qwen2.5-1.5B-Instruct
        layers: 28                  # and the other sizes of its config, so that --dry-run needs no hub
        max_context: 31500          # a setting that differs for this model; optional

A whole recipe is checked before anything runs: its keys, values, tasks, policies and budgets, and its
contexts against the models' positions.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig

from winnowkv.budget import Budget
from winnowkv.errors import InputError, WinnowError
from winnowkv.evaluate.needle.needle import METRICS
from winnowkv.evaluate.needle.prompts import NEEDLE_FIELDS, Needle
from winnowkv.evaluate.settings import settings
from winnowkv.evaluate.tasks.run import Evaluation
from winnowkv.files import SHOWN, parse_yaml, read_text, shown
from winnowkv.memory.plan import LayerShape
from winnowkv.memory.shape import read_shape
from winnowkv.models.load import EMBEDDED
from winnowkv.policies import policy as make_policy
from winnowkv.prompt.task import TaskProfile

Check = tuple[Callable[[Any], bool], str]  # a test of a value, and the words for what passes it
MOST_COUNTED = 10**9  # of tokens, layers and sizes: more is a slip
PLANNED_BYTES = 2  # a number of a key or value, in the sizes of --dry-run: bfloat16


def _list_of(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(right, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST_COUNTED


TEXT: Check = (_is_text, "a text")
TEXTS: Check = (_list_of(_is_text), "a list of texts")
NUMBERS: Check = (_list_of(_is_number), "a list of numbers")
COUNTS: Check = (_list_of(_is_count), "a list of whole numbers above 0")
COUNT: Check = (_is_count, "a whole number above 0")
COUNT_OR_NONE: Check = (lambda value: value is None or _is_count(value), "a whole number above 0, or null")
BOOL_OR_NONE: Check = (lambda value: value is None or isinstance(value, bool), "true, false or null")
MAPPINGS: Check = (_list_of(lambda value: isinstance(value, dict)), "a list of mappings")

HEAD_KEYS: Mapping[str, Check] = {"claim": TEXT, "source": TEXT, "command": TEXT, "models": MAPPINGS}
NOTE_KEYS: Mapping[str, Check] = {"note": TEXT}
SHARED_KEYS: Mapping[str, Check] = {"policies": TEXTS, "budgets": NUMBERS, "chat": BOOL_OR_NONE}
EVAL_KEYS: Mapping[str, Check] = {**SHARED_KEYS, "tasks": TEXTS, "protocol": TEXT, "max_context": COUNT_OR_NONE}
NEEDLE_KEYS: Mapping[str, Check] = {
    **SHARED_KEYS, "lengths": COUNTS, "depths": NUMBERS, "needles": MAPPINGS, "haystack": TEXT, "metric": TEXT,
    "max_new_tokens": COUNT,
}  # fmt: skip
COMMANDS = {"eval": EVAL_KEYS, "needle": NEEDLE_KEYS}


@dataclass(frozen=True)
class Facts:
    """The sizes that a plan reads of a model's config; the layers are taken to be alike.

    ``positions`` is 0 if the model's config does not say.
    """

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    positions: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Facts:
        """Read them from a run of the config's model without weights. Raises UnsupportedModelError if it has no such run."""
        shape = read_shape(config, PLANNED_BYTES)
        layer = shape.layers[0]
        return cls(len(shape.layers), shape.model_info.heads, layer.kv_heads, layer.key_size, shape.positions or 0)

    def kv_bytes(self, entries: int) -> int:
        """Bytes of keys and values of that many entries per layer and KV head."""
        layer = LayerShape(self.kv_heads, self.head_size, self.head_size)
        return self.layers * layer.kv_bytes(entries, PLANNED_BYTES)


SMOLLM2_135M = Facts(layers=30, heads=9, kv_heads=3, head_size=64, positions=8192)
MODEL_KEYS: Mapping[str, Check] = {"name": TEXT, **NOTE_KEYS, **{field.name: COUNT for field in fields(Facts)}}


def least(*limits: int | None) -> int | None:
    """The smallest of the limits that are not None; None if all are."""
    return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True)
class Plan:
    """One model's part of a recipe: ``asked`` are the command's settings, ``facts`` None if the model is not described."""

    command: str
    model: str
    facts: Facts | None
    asked: dict[str, Any]
    note: str | None = None

    def evaluation(self, **more: Any) -> Evaluation:
        """What ``winnow eval`` is to measure; values of ``more`` that are not None add to the recipe's, or replace them."""
        asked = {name: tuple(value) if isinstance(value, list) else value for name, value in self.asked.items()}
        return Evaluation(model=self.model, **{**asked, **{name: value for name, value in more.items() if value is not None}})

    def lengths(self, most: int | None = None) -> list[int]:
        """The prompt lengths of a needle test that are at most ``most`` and leave the model positions for its answer."""
        positions = self.facts.positions - self.asked["max_new_tokens"] if self.facts else None
        end = least(most, positions)
        return [length for length in self.asked["lengths"] if end is None or length <= end]

    @property
    def needles(self) -> list[Needle]:
        """What a needle test hides."""
        return [Needle(**row) for row in self.asked["needles"]]

    def context(self, most: int | None = None) -> int | None:
        """Tokens of the longest prompt; None if neither the recipe nor the model's facts say."""
        if self.command == "needle":
            return max(self.lengths(most), default=None)
        return least(most or self.asked.get("max_context"), self.facts.positions if self.facts else None)

    def sizes(self, context: int | None) -> list[dict[str, Any]]:
        """Entries per layer and KV head, and bytes, of the full cache and of each budget at a prompt of ``context`` tokens."""
        if context is None or self.facts is None:
            return []
        entries = {"full": context, **{str(budget): Budget.of(budget).entries(context) for budget in self.asked["budgets"]}}
        return [{"budget": name, "entries": n, "bytes": self.facts.kv_bytes(n)} for name, n in entries.items()]

    def check(self) -> None:
        """Check everything that needs neither model nor rows. Raises a WinnowError that names what is wrong."""
        if self.command == "eval":
            self.evaluation().check()
        else:
            settings(self.asked["policies"], self.asked["budgets"])
            self._check_needles()
        context = self.context()
        asked = self.asked.get("max_context") if self.command == "eval" else max(self.asked["lengths"])
        if self.facts and asked is not None and asked != context:
            raise InputError(f"a context of {asked} passes the {self.facts.positions} positions of {self.model}: lower it")
        if context is None:
            return
        for spec in self.asked["policies"]:
            made = make_policy(spec)
            for budget in self.asked["budgets"]:
                made.check_prompt(made.prompt_info(Budget.of(budget), context, 1, TaskProfile.of("localization")))

    def _check_needles(self) -> None:
        for depth in self.asked["depths"]:
            if not 0 <= depth <= 1:
                raise InputError(f"depth {depth} is outside 0 (start of the text) to 1 (its end)")
        if self.asked["metric"] not in METRICS:
            raise InputError(f"metric {shown(self.asked['metric'])} is unknown: it is one of {', '.join(METRICS)}")
        for row in self.asked["needles"]:
            if set(row) != set(NEEDLE_FIELDS) or not all(isinstance(text, str) and text.strip() for text in row.values()):
                raise InputError(f"a needle is a mapping of the texts {', '.join(NEEDLE_FIELDS)}, not {shown(row)}")

    def compare(self, *, offline: bool) -> bool:
        """Compare the facts with the model's own config; False if there is none, or if its model cannot be read.

        ``offline`` looks only at folders and at the hub's cache. Raises InputError for a difference.
        """
        if self.facts is None or self.model == EMBEDDED:
            return False
        try:
            theirs = Facts.of(transformers.AutoConfig.from_pretrained(self.model, local_files_only=offline))
        except Exception:  # not there, not known to this transformers, not served; a broken config raises anything
            return False
        for name, value in asdict(self.facts).items():
            if getattr(theirs, name) != value:
                raise InputError(
                    f"the recipe says that {self.model} has {name} {value}, its config says {getattr(theirs, name)}"
                )
        return True


@dataclass(frozen=True)
class Recipe:
    """A claim, and how it is measured: one plan for each model, ``defaults`` for any other."""

    file: Path
    claim: str
    source: str
    command: str
    note: str | None
    defaults: dict[str, Any]
    plans: tuple[Plan, ...]

    def chosen(self, model: str | None) -> tuple[Plan, ...]:
        """All plans, or that of one model; a model that the recipe does not list gets the recipe's defaults."""
        if model is None:
            return self.plans
        known = {plan.model: plan for plan in self.plans}
        return (known.get(model) or Plan(self.command, model, facts_of(model), dict(self.defaults)),)


def facts_of(model: str) -> Facts | None:
    """The facts of a model that no recipe describes, None if they are not known here."""
    return SMOLLM2_135M if model == EMBEDDED else None


def read_recipe(file: Path) -> Recipe:
    """Read and check a recipe. Raises InputError that names the file, and the nearest known name for an unknown one."""

    def fail(why: str) -> InputError:
        return InputError(f"recipe {file} {why}")

    raw = parse_yaml(read_text(file, fail), fail)
    try:
        return _recipe(file, raw)
    except WinnowError as error:
        raise InputError(f"recipe {file}: {error}") from None


def _recipe(file: Path, raw: Any) -> Recipe:
    if not isinstance(raw, dict):
        raise InputError("it is not a YAML mapping of keys to values")
    command = raw.get("command")
    if not isinstance(command, str) or command not in COMMANDS:
        raise InputError(f"command {shown(command)} is unknown: it is one of {', '.join(COMMANDS)}")
    keys = COMMANDS[command]
    checked(raw, {**HEAD_KEYS, **NOTE_KEYS, **keys}, required=(*HEAD_KEYS, *keys), what="")
    defaults = {name: raw[name] for name in keys}
    plans = []
    for entry in raw["models"]:
        name = entry.get("name")
        called = f"model {name if isinstance(name, str) else shown(name)}: "
        checked(entry, {**MODEL_KEYS, **keys}, required=[key for key in MODEL_KEYS if key not in NOTE_KEYS], what=called)
        facts = Facts(**{field.name: entry[field.name] for field in fields(Facts)})
        own = {key: value for key, value in entry.items() if key in keys}
        plan = Plan(command, name, facts, {**defaults, **own}, entry.get("note"))
        plan.check()
        plans.append(plan)
    return Recipe(file, raw["claim"], raw["source"], command, raw.get("note"), defaults, tuple(plans))


def checked(found: Mapping[Any, Any], keys: Mapping[str, Check], required: Any, what: str) -> None:
    """Raise InputError for a key that is unknown (with the nearest) or missing, and for a value of another kind."""
    for key, value in found.items():
        if key not in keys:
            near = difflib.get_close_matches(str(key)[:SHOWN], keys, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{what}key {shown(key)} is unknown.{hint} Known: {', '.join(keys)}")
        right, words = keys[key]
        if not right(value):
            raise InputError(f"{what}{key} is {shown(value)}, it must be {words}")
    for key in required:
        if key not in found:
            raise InputError(f"{what}key {key!r} is missing, it must be {keys[key][1]}")
