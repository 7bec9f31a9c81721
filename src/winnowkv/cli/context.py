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
from winnowkv.contexts.defaults import EQUAL_BLIND_POLICY, EQUAL_HINTED_POLICY
from winnowkv.errors import InputError, WinnowError
from winnowkv.files import plain_lines, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnowkv.contexts.folder import ContextFiles

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
            help=f"Eviction policy, one that keeps equally many in all layers and heads. Default: {EQUAL_BLIND_POLICY}, with "
            f"--hint {EQUAL_HINTED_POLICY}.",
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
    chosen = policy or (EQUAL_HINTED_POLICY if hint is not None else EQUAL_BLIND_POLICY)
    place = ContextStore(store)
    from winnowkv.cache.compression import Compression
    from winnowkv.cache.study import Study
    from winnowkv.cli.loading import check_policies, load_model
    from winnowkv.contexts.export import export_context
    from winnowkv.contexts.making import plan_context

    check_policies([chosen], [])
    if study not in (None, "none"):
        Study.of(study)

    def check(checked: PreTrainedModel) -> None:
        Compression.of(checked, chosen, 1.0, None, task_is_known=True)

    with working(f"loading {model}"):
        loaded, tokenizer = load_model(model, check, device=device, dtype=dtype)
    started = time.perf_counter()
    plan = plan_context(
        loaded, tokenizer, text, policy=policy, budget=budget, study=study, hint=hint, system=system, chat=chat, block=block
    )
    notes = [one.replace("a hint", "a --hint") for one in plan.notes]
    with studying(f"reading {plan.tokens} tokens", shown=plan.study is not None) as progress:
        document = plan.read(progress=progress)
    title = name if name is not None else "" if file == "-" else file.replace("\\", "/").rpartition("/")[2]
    context = export_context(document, place, block, name=title)
    seconds = time.perf_counter() - started
    if as_json:
        print(
            json.dumps(
                {**context.to_dict(), "portable": True, "store": store, "seconds": round(seconds, 3), "notes": notes},
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


def list_contexts(store: Store = DEFAULT_STORE, as_json: Json = False) -> None:
    """List the contexts of a store; those that vLLM cannot serve were made by winnow serve, which serves both."""
    rows: list[dict[str, Any]] = []
    damaged: list[dict[str, str]] = []
    for portable, files in kinds(store).items():
        for each in files.ids():
            try:
                rows.append({**files.context(each).to_dict(), "portable": portable})
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
    if unequal := [row["id"][:8] for row in rows if not row["portable"]]:
        note(f"vLLM cannot serve {', '.join(unequal)}: their heads keep different numbers of entries, as winnow serve can")
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
    there = {one: files for files in kinds(store).values() for one in files.ids()}
    named = list(dict.fromkeys(full_id(asked, sorted(there), store) for asked in ids))
    for one in named:
        there[one].remove(one)
    if as_json:
        print(json.dumps({"store": store, "removed": named}, indent=2))
        return
    for one in named:
        print(f"removed {one}")


def kinds(store: str) -> dict[bool, ContextFiles]:
    """The files of a store by whether vLLM serves them, too."""
    from winnowkv.contexts.saved import SavedContexts
    from winnowkv.contexts.store import ContextStore

    return {True: ContextStore(store), False: SavedContexts(store)}


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
