"""A page for each built-in policy, made of its docstring, its options and what was measured of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from website.docstrings import items, markdown, sections
from website.records import Record, read_records
from website.tables import markdown as table
from winnowkv.models.calibration import read_profile
from winnowkv.models.info import ModelInfo
from winnowkv.policies.base import Policy, TokenPolicy
from winnowkv.policies.parts import PromptInfo, Scorer
from winnowkv.policies.registry import BUILT_IN, INNER_OPTION, option_names, policy, policy_class
from winnowkv.prompt.structure import Structure
from winnowkv.prompt.task import TaskProfile
from winnowkv.report import MIB

MEASURED = {"policies-summaries": "summaries", "policies-questions": "questions"}  # records, and what they are of
PROMPT = 2048  # tokens of the prompt that a policy is bound to, to see its parts
MEASURED_WORDS = (
    "The columns are those of [winnow audit](../audit.md#3-read-the-table): means over prompts, 95% intervals in brackets, KL "
    "in nats a token. *holds*: what is really stored, where that is more than what is kept; compare rules at equal bytes by it."
)
SHARED_PARTS = ("winnowkv.policies.parts", "winnowkv.policies.base")  # their classes are in the API reference
NOTATION = (
    "`A[q, i]` is the attention that query `q` pays to token `i`, a softmax over all keys that the query sees. `k` and `v` are "
    "keys and values of a KV head, the *group* its query heads. What scores highest stays."
)


def pages() -> dict[str, str]:
    """Markdown of every policy's page by its path below ``docs``."""
    records = read_records()
    return {f"policies/{name}.md": page(name, records) for name in BUILT_IN}


def page(name: str, records: Mapping[str, Record]) -> str:
    """One policy's page."""
    kind = policy_class(name)
    said = {heading: linked(text) for heading, text in sections(kind.__doc__).items()}
    formula = f"{said['Formula']}\n\n{NOTATION}" if "[" in said["Formula"] else said["Formula"]
    parts = [
        f"# {name}\n\n{said['']}",
        f"## For whom\n\n{table(['', ''], facts(kind))}",
        f"## Formula\n\n{formula}",
        f"## Options\n\n{options(kind)}",
        f"## Source\n\n{linked(kind.source)}",
        f"## Where we differ\n\n{said['Departures']}",
        f"## Measured\n\n{measured(name, records)}",
        f"## The parts that it is made of\n\n{made_of(name)}",
    ]
    return "\n\n".join(parts) + "\n"


def linked(text: str) -> str:
    """arXiv numbers and pages of docs as links, Sphinx roles as code."""
    text = re.sub(r"arXiv\s+(\d{4}\.\d{5})((?:, \d{4}\.\d{5})*)", arxiv_links, markdown(text))
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](../\1)", text)


def arxiv_links(found: re.Match[str]) -> str:
    """One or more numbers of papers as links."""
    return "arXiv " + ", ".join(
        f"[{number}](https://arxiv.org/abs/{number})" for number in re.findall(r"\d{4}\.\d{5}", found[0])
    )


def facts(kind: type[Policy]) -> list[tuple[str, str]]:
    """What it is for, keeps, looks from, needs and frees."""
    made = kind()
    keeps = f"{kind.scope}, so all layers and heads keep the same number" if made.keeps_equal and made.evicts else kind.scope
    needs = {
        "a [calibration profile](../policies.md#profiles)": made.needs_profile,
        "a [task](../policies.md#tasks) (better with one)": made.uses_task,
        "the tokenizer, to know where the question is (better with it)": made.uses_structure,
        "plain output projections": made.needs_projection,
        "the whole text once more: only `wk.read` serves it": made.needs_study,
        "the package optimum-quanto": made.quantize is not None,
    }
    found = {
        "for": kind.purpose,
        "keeps": keeps,
        "looks from": getattr(made, "looks_from", ""),
        "needs": "; ".join(words for words, does in needs.items() if does) or "nothing more",
        "frees": frees(made),
        "in Python": f"`{in_python(made)}`",
        "on the command line": "" if made.needs_study else f"`winnow generate -f FILE --policy {command_spec(made)}`",
    }
    return [(name, said) for name, said in found.items() if said]


def command_spec(made: Policy) -> str:
    """How it is asked for on the command line."""
    return made.spec if hasattr(made, INNER_OPTION) else made.name


def frees(made: Policy) -> str:
    """Which bytes eviction frees."""
    if not made.evicts:
        return "bits, not entries" if made.quantize else "nothing"
    return "down to the longest head of each layer, to which the others are padded" if made.per_head else "all that it evicts"


def in_python(made: Policy) -> str:
    """How it is asked for in Python."""
    if made.needs_study:
        return f'wk.read(model, tokenizer, text, "{made.name}", 0.12)'
    inner = getattr(made, INNER_OPTION, None)
    asked = f'"{made.name}"' if inner is None else f'wk.{made.name}("{inner.name}")'
    reads = ", tokenizer=tokenizer" if made.uses_task or made.uses_structure else ""
    return f"wk.compress(model, {asked}, 0.12{reads})"


def options(kind: type[Policy]) -> str:
    """Two tables: options of its own, and those that most policies have."""
    help_texts = option_help(kind)
    hints = get_type_hints(kind)
    own = {*items(sections(kind.__doc__).get("Parameters", ""))} - {INNER_OPTION}
    in_order = sorted(option_names(kind), key=lambda name: name == INNER_OPTION)  # as in a spec, the inner policy last
    mine = [name for name in in_order if name in own or name not in option_names(TokenPolicy)]
    tables = []
    for title, names in (("", mine), ("Options of most policies:", [name for name in in_order if name not in mine])):
        rows = [(f"`{name}`", f"`{type_text(hints[name])}`", f"`{default(kind, name)}`", help_texts[name]) for name in names]
        if rows:
            tables.append(f"{title}\n\n{table(['option', 'type', 'default', 'what'], rows)}".strip())
    return "\n\n".join(tables) or "None."


def option_help(kind: type[Policy]) -> dict[str, str]:
    """What docstrings say of each option, the class's own before those that it derives from."""
    found: dict[str, str] = {}
    for base in kind.__mro__:
        for name, said in items(sections(base.__doc__).get("Parameters", "")).items():
            found.setdefault(name, linked(said))
    return found


def type_text(annotation: Any) -> str:
    """A type in words: ``int or None``; of a few words these."""
    if annotation is type(None):
        return "None"
    if get_origin(annotation) is Literal:
        return " or ".join(map(repr, get_args(annotation)))
    parts = get_args(annotation)
    return " or ".join(map(type_text, parts)) if parts else annotation.__name__


def default(kind: type[Policy], name: str) -> Any:
    """An option's default; a policy as its spec."""
    each = next(field for field in fields(kind) if field.name == name)  # type: ignore[arg-type]
    value = each.default if each.default is not MISSING else getattr(kind(), name)
    return getattr(value, "spec", value)


def measured(name: str, records: Mapping[str, Record]) -> str:
    """What ``winnow audit`` found of a policy, in the records of :data:`MEASURED`; says so if nothing was measured yet."""
    rows, notes = [], []
    for record_name, of in MEASURED.items():
        record = records.get(record_name)
        groups = record.get("groups") if record is not None and record.path.is_file() else []
        mine = [group for group in groups if str(group["policy"]).split(":")[0] == name and group["prompts"]]
        rows += [measured_row(of, group) for group in mine]
        if mine and record is not None:
            notes.append(f"{of}: {record.what}, {record.content['date']}, `{record.command}`")
    if not rows:
        return "Not measured yet."
    columns = ["of", "policy", "budget", "kept", "same token as the full cache", "KL", "same answer", "prompts"]
    return table(columns, rows) + "\n\n" + "\n\n".join([MEASURED_WORDS, *notes])


def measured_row(of: str, group: Mapping[str, Any]) -> list[str]:
    """One setting of an audit's summary (``winnow audit --json``)."""
    same, kl, exact = group["agreement"], group["kl_mean"], group["exact_match"]
    between = f" ({same['low']:.1%} to {same['high']:.1%})" if same["low"] is not None else ""
    kept = f"{group['kept_bytes'] / MIB:.1f} of {group['full_bytes'] / MIB:.1f} MiB"
    if group["held_bytes"] > 1.01 * group["kept_bytes"]:  # padding to the longest head, or answers that ended whole
        kept += f", holds {group['held_bytes'] / MIB:.1f}"
    return [
        of, f"`{group['policy']}`", str(group["budget"]), kept, f"{same['mean']:.1%}{between}", f"{kl['mean']:.3f}",
        f"{exact['mean']:.0%}", str(group["prompts"]),
    ]  # fmt: skip


@cache
def parts_of(name: str) -> dict[str, type]:
    """The classes of a policy's parts for a question about a long text, on the model whose profile ships."""
    profile = read_profile(next(Path(str(files("winnowkv"))).glob("data/profiles/*.json")))
    model: ModelInfo = profile.model_info
    place = Structure(PROMPT, 40, 5, tuple(range(20, PROMPT - 40, 20)))
    prompt = PromptInfo(PROMPT, model.layers, PROMPT // 8, TaskProfile("localization", None, place))
    bound = policy(name).bind(model, prompt).parts
    found = {"scorer": bound.scorer, "allocator": bound.allocator, "selector": bound.selector, "shared tokens": bound.shared}
    return {part: type(made) for part, made in found.items() if made is not None}


@cache
def homes() -> dict[type, str]:
    """Where each class of a part is documented: the policy whose module has it, else the first that uses it."""
    found: dict[type, str] = {}
    for name in BUILT_IN:
        for part in parts_of(name).values():
            if part.__module__ == policy_class(name).__module__ or part not in found:
                found[part] = name
    return {part: name for part, name in found.items() if part.__module__ not in SHARED_PARTS}


def made_of(name: str) -> str:
    """The parts, linked to where they are documented, and the source of those whose home is this page."""
    kind, lines = policy_class(name), []
    if not kind().evicts:
        return "Nothing is scored, shared or selected: every entry stays."
    found = parts_of(name)
    for part, made in found.items():
        if made is Scorer:
            continue
        first = (made.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"- {part}: [`{made.__name__}`][{made.__module__}.{made.__qualname__}]: {linked(first)}")
    own = [made for made in found.values() if homes().get(made) == name]
    shown = [f"::: {made.__module__}.{made.__qualname__}\n    options: {{show_source: true, heading_level: 3}}" for made in own]
    return "\n".join(lines) + "\n\n" + "\n\n".join(shown)


def with_links(overview: str) -> str:
    """The overview's tables, whose first cells name policies, with links to their pages."""

    def cell(row: re.Match[str]) -> str:
        return re.sub(
            r"`(\w+)`", lambda name: f"[{name[0]}](policies/{name[1]}.md)" if name[1] in BUILT_IN else name[0], row[0]
        )

    return re.sub(r"^\| [^|]* \|", cell, overview, flags=re.MULTILINE)
