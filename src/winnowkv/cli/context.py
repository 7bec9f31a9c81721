"""``winnow context``: documents compressed once and stored, for engines that serve them as a prefix (vLLM)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from winnowkv.budget import DEFAULT_BUDGET
from winnowkv.cli.options import DEFAULT_STORE, Chat, Device, Dtype, Json, Model, Store
from winnowkv.cli.progress import working
from winnowkv.cli.tables import Column, ResultTable, keys, note, say
from winnowkv.cli.texts import checked_text, standard_input
from winnowkv.errors import InputError, PolicyError, WinnowError
from winnowkv.files import plain_lines, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnowkv.cache.study import Study
    from winnowkv.contexts.context import Context
    from winnowkv.contexts.store import ContextStore

# Policies that keep the same number of entries in every layer and head, as engines with one block table need.
BLIND_POLICY = "winnow:observe=context:equal=true"  # of texts whose questions are not known
HINTED_POLICY = "winnow:equal=true"
SHORTEST_PREFIX = 4  # characters of an id that name a context


def add(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The document, UTF-8 text; - reads standard input.")],
    store: Store = DEFAULT_STORE,
    model: Model = "embedded",
    device: Device = None,
    dtype: Dtype = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help=f"Eviction policy, one that keeps equally many in all layers and heads. Default: {BLIND_POLICY}, with --hint "
            f"{HINTED_POLICY}.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(help="Kept fraction (0.12), or entries per layer and KV head; rounded up to whole blocks."),
    ] = str(DEFAULT_BUDGET),
    study: Annotated[
        str | None,
        typer.Option(
            help="Find out first what matters: lean reads the document again, full also writes about it, none does not. "
            "Default: lean, without --hint and --policy.",
            show_default=False,
        ),
    ] = None,
    hint: Annotated[
        str | None, typer.Option(help="What the questions will be about, as a question.", show_default=False)
    ] = None,
    block: Annotated[int, typer.Option(min=1, help="Tokens of a block of the engine's cache; vLLM's on a CPU has 128.")] = 128,
    name: Annotated[str | None, typer.Option(help="What people call it. Default: the file's name.", show_default=False)] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the document.", show_default=False)] = None,
    chat: Chat = None,
    as_json: Json = False,
) -> None:
    """Compress a document and store it.

    winnow context add report.txt --store contexts --hint "Who wrote it, when, and why?"
    """
    text = read_document(file)
    from winnowkv.contexts.export import whole_blocks
    from winnowkv.contexts.store import ContextStore

    whole_blocks(1, budget, block)  # before transformers is imported, which takes seconds
    chosen = policy or (HINTED_POLICY if hint is not None else BLIND_POLICY)
    by_default = policy is None and hint is None and study is None
    level = "lean" if by_default else study
    place = ContextStore(store)
    from winnowkv.cache.compression import Compression
    from winnowkv.cache.study import Study
    from winnowkv.cli.loading import check_policies, load_model
    from winnowkv.prompt.chat import open_turn, uses_chat

    check_policies([chosen], [])
    asked = None if level in (None, "none") else Study.of(level)

    def check(checked: PreTrainedModel) -> None:
        Compression.of(checked, chosen, 1.0, None, task_is_known=True)

    with working(f"loading {model}"):
        loaded, tokenizer = load_model(model, check, device=device, dtype=dtype)
    tokens = len(open_turn(tokenizer, text, chat=uses_chat(chat, tokenizer), system=system))
    notes: list[str] = []
    if by_default and not study_fits(loaded, tokens):
        notes.append("the model has no positions left to read the document again: a --hint says what must not be lost")
        asked = None
    started = time.perf_counter()
    context = compressed(
        loaded, tokenizer, text, tokens, chosen, budget, place, block=block, study=asked, hint=hint, system=system, chat=chat,
        name=name if name is not None else "" if file == "-" else file.replace("\\", "/").rpartition("/")[2],
    )  # fmt: skip
    seconds = time.perf_counter() - started
    if as_json:
        print(
            json.dumps(
                {**context.to_dict(), "store": store, "seconds": round(seconds, 3), "notes": notes},
                indent=2,
                ensure_ascii=False,
            )
        )
        return
    print(context.id)
    for text in notes:
        note(text)
    note(
        f"{context.kept} of {context.seen} entries kept by {context.header.policy}, {mebibytes(context.bytes)} MiB in {store}, "
        f"{seconds:.1f} s"
    )
    note(f'ask it: winnow vllm {model} --store {store}, then requests with "winnow_context": "{context.id}"')


def study_fits(model: PreTrainedModel, tokens: int) -> bool:
    """Whether the model has positions left after a text of so many tokens to read it again."""
    from winnowkv.cache.study import Study, fitted

    try:
        fitted(Study.of("lean"), model, tokens)
    except InputError:
        return False
    return True


def compressed(
    model: PreTrainedModel, tokenizer: Any, text: str, tokens: int, policy: str, budget: str, store: ContextStore, *,
    block: int, study: Study | None, hint: str | None, system: str | None, chat: bool | None, name: str,
) -> Context:  # fmt: skip
    """Read, compress and store a document of so many tokens; with a progress bar while it is studied.

    Raises PolicyError, before the document is read, for a policy that may keep different numbers in layers and heads.
    """
    from winnowkv.contexts.export import export_context, whole_blocks
    from winnowkv.contexts.flat import EQUAL_POLICIES, context_rotation
    from winnowkv.documents import read
    from winnowkv.policies import policy as make_policy
    from winnowkv.policies.studied import StudiedPolicy

    context_rotation(model)  # what no context can be made of is told before the work
    entries = whole_blocks(tokens, budget, block)
    made = make_policy(policy)
    studied = study is not None or made.needs_study
    if entries < tokens and made.evicts and not (StudiedPolicy(of=made) if studied else made).keeps_equal:
        raise PolicyError(
            f"{made.spec} may keep different numbers of entries in layers and heads{' of a text that is studied' * studied}, a "
            f"context needs the same number in all: use {'a policy with equal=true' if studied else EQUAL_POLICIES}"
        )
    with studying(f"reading {tokens} tokens", shown=studied) as progress:
        document = read(
            model, tokenizer, text, policy, entries, hint=hint, system=system, chat=chat, study=study, progress=progress,
        )  # fmt: skip
    return export_context(document, store, block, name=name)


def list_contexts(store: Store = DEFAULT_STORE, as_json: Json = False) -> None:
    """List the contexts of a store."""
    from winnowkv.contexts.store import ContextStore

    place = ContextStore(store)
    rows: list[dict[str, Any]] = []
    damaged: list[dict[str, str]] = []
    for each in place.ids():
        try:
            rows.append(place.context(each).to_dict())
        except WinnowError as error:
            damaged.append({"id": each, "error": str(error)})
    if as_json:
        print(json.dumps({"store": store, "contexts": rows, "damaged": damaged}, indent=2, ensure_ascii=False))
        return
    if not rows and not damaged:
        say(f"no contexts in {store}: add one with winnow context add FILE --store {store}")
        return
    table = ResultTable(
        [*keys("id"), Column("kept"), Column("seen"), Column("MiB"), Column("name", least=8), Column("policy", least=6)]
    )
    for row in rows:
        table.add(row["id"], str(row["kept"]), str(row["seen"]), mebibytes(row["bytes"]), printable(row["name"]), row["policy"])
    if rows:
        table.print()
    for one in damaged:
        note(one["error"])


def remove(
    ids: Annotated[
        list[str], typer.Argument(metavar="ID...", help=f"Ids, or their first characters, at least {SHORTEST_PREFIX}.")
    ],
    store: Store = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Delete contexts; all that are named, or none if one of them is not there."""
    from winnowkv.contexts.store import ContextStore

    place = ContextStore(store)
    there = place.ids()
    named = list(dict.fromkeys(full_id(asked, there, store) for asked in ids))
    for one in named:
        place.remove(one)
    if as_json:
        print(json.dumps({"store": store, "removed": named}, indent=2))
        return
    for one in named:
        print(f"removed {one}")


def full_id(asked: str, there: Sequence[str], store: str) -> str:
    """The one context of a store whose id begins like this. Raises InputError if there is none, or several."""
    found = [one for one in there if one.startswith(asked)] if len(asked) >= SHORTEST_PREFIX else []
    if len(found) == 1:
        return found[0]
    if len(asked) < SHORTEST_PREFIX:
        raise InputError(f"id {asked!r} is too short: give at least {SHORTEST_PREFIX} characters")
    if found:
        raise InputError(f"{len(found)} contexts of store {store} begin with {asked!r}: give more of the id")
    raise InputError(f"no context of store {store} begins with {asked!r}: see winnow context list --store {store}")


def read_document(file: str) -> str:
    """The text of a file, or of standard input. Raises InputError if there is none."""
    if file != "-":
        from pathlib import Path

        text = read_text(Path(file), lambda why: InputError(f"document {file} {why}"))
    else:
        text = plain_lines(standard_input("document"))
    return checked_text(text, "document")


def mebibytes(count: int) -> str:
    """Bytes as MiB."""
    from winnowkv.report import MIB

    return f"{count / MIB:.2f}"


def printable(text: str) -> str:
    """A name on one line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@contextmanager
def studying(what: str, *, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on standard error over the tokens of a study; without one, what is done."""
    if not shown:
        with working(what):
            yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(bar, description="studying", completed=done, total=total)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Documents compressed once and stored, for vLLM.")
    group.command("add")(add)
    group.command("list")(list_contexts)
    group.command("rm")(remove)
    app.add_typer(group, name="context")
