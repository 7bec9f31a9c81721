"""``winnow eval``: tasks x policies x budgets on real prompts, in one process or many, or a whole recipe."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from winnowkv.cli.options import (
    BUDGETS_HELP,
    DEFAULT_BUDGETS,
    POLICIES_HELP,
    Chat,
    Data,
    Json,
    MaxContext,
    Profile,
    Quality,
    budgets as read_budgets,
    model_name,
    with_quality,
)
from winnowkv.cli.progress import resumable
from winnowkv.cli.tables import Column, ResultTable, keys, note, numbers, say
from winnowkv.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from winnowkv.evaluate.tasks.recipes import Plan, Recipe
    from winnowkv.evaluate.tasks.run import Evaluation

DEFAULT_TASKS, DEFAULT_POLICIES = "longbench", "full,winnow,snapkv"
DEFAULT_OUT = Path("winnow-out")
GROUP_NAMES = "longbench, babilong, ruler, ruler13, longeval"


class RayCommand(TyperCommand):
    """A command in which ``--ray`` without an address means ``--ray auto``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the address if it is missing."""
        if "--ray" in args:
            after = args.index("--ray") + 1
            if after == len(args) or args[after].startswith("-"):
                args = [*args[:after], "auto", *args[after:]]
        return super().parse_args(ctx, args)


def evaluate(
    tasks: Annotated[
        str | None,
        typer.Option(help=f"Comma-separated tasks or groups ({GROUP_NAMES}). Default: {DEFAULT_TASKS}."),
    ] = None,
    policies: Annotated[str | None, typer.Option(help=f"{POLICIES_HELP}. Default: {DEFAULT_POLICIES}.")] = None,
    budgets: Annotated[str | None, typer.Option(help=f"{BUDGETS_HELP}. Default: {DEFAULT_BUDGETS}.")] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="'official' or 'context-only' (compressed before the question is known). Default: official."),
    ] = None,
    chat: Chat = None,
    model: Annotated[
        str | None,
        typer.Option(
            callback=model_name, help="'embedded', a folder, or a hub id. Default: 'embedded', or all models of the recipe."
        ),
    ] = None,
    data: Data = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows of each task.")] = None,
    max_context: MaxContext = None,
    batch: Annotated[
        int,
        typer.Option(min=1, help="Rows of a task that decode together; as many full caches are held at once."),
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed that draws the rows of --limit; 0 takes the first rows.")] = 0,
    quality: Quality = None,
    profile: Profile = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file of recipes/, which replaces --tasks, --policies, --quality, --budgets, --protocol and --chat."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print what would be measured; loads no model.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that each load the model. Default: only this one.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="[ADDRESS]", help="Run on the Ray cluster at this address; without one, on this machine's."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results; an interrupted run continues there. Default: in winnow-out/.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score the model's answers to real prompts with compressed caches.

    Writes results.jsonl (a line for each row and setting), summary.json and report.html to --out. An interrupted or
    killed run continues where it stopped. A recipe is a paper's claim with its protocol; each of its models has a
    folder of its own.
    """
    from winnowkv.cli.loading import check_policies
    from winnowkv.cli.needle import asked_policies

    if policies is not None and recipe is None:
        named = with_quality(asked_policies(policies, False), quality)
        check_policies(named, read_budgets(budgets or DEFAULT_BUDGETS))  # before transformers
    from winnowkv.evaluate.tasks.recipes import read_recipe

    if recipe is not None:
        decided = {"--tasks": tasks, "--policies": policies, "--quality": quality, "--budgets": budgets,
                   "--protocol": protocol, "--chat": chat}  # fmt: skip
        if given := [option for option, value in decided.items() if value is not None]:
            raise InputError(f"{', '.join(given)}: {recipe} decides that; leave it out, or run without the recipe")
        read = read_recipe(recipe)
        plans: Sequence[Plan] = read.chosen(model)
        folders = [(out or DEFAULT_OUT / recipe.stem) / re.sub(r"[^\w.-]+", "_", plan.model).strip("_") for plan in plans]
    else:
        read, folders = None, [out or DEFAULT_OUT / "eval"]
        plans = [plan_of(tasks, policies, budgets, protocol, chat, model)]
    if plans[0].command == "needle" and (workers or ray):
        raise InputError(f"{recipe} is a needle test, which runs in one process: leave out --workers and --ray")
    specs = [with_quality(asked_policies(",".join(plan.asked["policies"]), False, profile), quality) for plan in plans]
    plans = [replace(plan, asked={**plan.asked, "policies": mine}) for plan, mine in zip(plans, specs, strict=True)]
    for plan in plans:
        check_policies(plan.asked["policies"], plan.asked["budgets"])
    more = {"data": data and str(data), "limit": limit, "max_context": max_context, "seed": seed, "batch": batch}
    if dry_run:
        show_plans(read, [planned(plan, more) for plan in plans], as_json)
        return
    summaries = {}
    for plan, folder in zip(plans, folders, strict=True):
        plan.compare(offline=False)
        if plan.command == "needle":
            summaries[plan.model] = measure_needle_recipe(plan, folder, data, max_context, as_json)
        else:
            summaries[plan.model] = measure(plan.evaluation(**more), folder, workers, ray)
            if not as_json:
                show(summaries[plan.model], folder)
    if as_json:
        json.dump(summaries if recipe else next(iter(summaries.values())), sys.stdout, indent=2, ensure_ascii=False)
        print()


def plan_of(
    tasks: str | None, policies: str | None, budgets: str | None, protocol: str | None, chat: bool | None, model: str | None
) -> Plan:
    """The checked plan of the command's options, with defaults for those that are None."""
    from winnowkv.evaluate.tasks.recipes import Plan, facts_of
    from winnowkv.models.load import EMBEDDED
    from winnowkv.policies import split_policies

    asked = {
        "tasks": [name for name in (part.strip() for part in (DEFAULT_TASKS if tasks is None else tasks).split(",")) if name],
        "policies": list(dict.fromkeys(split_policies(DEFAULT_POLICIES if policies is None else policies))),
        "budgets": read_budgets(DEFAULT_BUDGETS if budgets is None else budgets),
        "protocol": "official" if protocol is None else protocol,
        "chat": chat,
    }
    name = EMBEDDED if model is None else model
    plan = Plan("eval", name, facts_of(name), asked)
    plan.check()
    return plan


def measure(asked: Evaluation, out: Path, workers: int | None, address: str | None) -> dict[str, Any]:
    """Run an evaluation with a progress bar; returns its summary."""
    from rich.console import Console

    from winnowkv.cli.loading import check_folder
    from winnowkv.evaluate.report.lines import line_fault
    from winnowkv.evaluate.report.store import ResultStore
    from winnowkv.evaluate.settings import settings
    from winnowkv.evaluate.tasks.run import identity, missing, write_summary

    asked.check()
    check_folder(out, {"protocol": asked.protocol, "command": "eval", "model": asked.model})
    rows = asked.rows()
    console = Console(stderr=True)
    with answering(asked, workers, address, console) as (config, answer):
        store = ResultStore(out, config, identity, line_fault)
        work = missing(store, asked, rows)
        total = len(rows) * len(settings(asked.policies, asked.budgets))
        try:
            with resumable(console, store, "rows", total, total - sum(len(lacking) for *_, lacking in work)) as advance:
                answer(store, work, advance)
        except KeyboardInterrupt:
            with suppress(InputError):
                write_summary(store, config, asked)
            raise
        else:
            try:
                return write_summary(store, config, asked)
            except InputError as error:  # summary or page; the store reports lines that cannot be written
                raise InputError(
                    f"{error}. All {len(store.lines)} lines are safe in {store.file}; make room and run the same command again"
                ) from None
        finally:
            store.close()


@contextmanager
def answering(
    asked: Evaluation, workers: int | None, address: str | None, console: Console
) -> Iterator[tuple[dict[str, Any], Callable[..., None]]]:
    """Start what answers rows, this process or workers on Ray; yields the config of its lines and the function to call."""
    from winnowkv.cli.loading import check_config, load_model
    from winnowkv.evaluate.settings import policies_for, settings
    from winnowkv.prompt.task import TaskProfile

    def check(checked: Any) -> None:
        policies_for(settings(asked.policies, asked.budgets), checked, TaskProfile.of("localization"))

    if workers is None and address is None:
        from winnowkv.evaluate.tasks.run import Worker, run

        with console.status(f"loading {asked.model}"):
            worker = Worker(asked, load_model(asked.model, check))
        yield worker.config, partial(run, worker)
        return
    check_config(asked.model, check)
    from winnowkv.scale import pool

    console.print(f"waiting for {'workers' if workers is None else f'{workers} workers'} to load {asked.model}")
    with pool(asked, workers, address) as many:
        yield many.config, many.run
        if many.deaths:
            console.print(f"{many.deaths} workers died and were replaced")


def measure_needle_recipe(plan: Plan, out: Path, data: Path | None, max_context: int | None, as_json: bool) -> dict[str, Any]:
    """Run a recipe's needle test; returns its summary. With ``as_json``, its table goes to standard error."""
    from winnowkv.cli.needle import measure as measure_needles
    from winnowkv.evaluate.needle.prompts import read_haystack

    lengths = plan.lengths(max_context)
    if left_out := [n for n in plan.asked["lengths"] if n not in lengths]:
        print(f"lengths that {plan.model} or --max-context does not allow are left out: {left_out}", file=sys.stderr)
    if not lengths:
        raise InputError(f"the shortest prompt of this recipe is {min(plan.asked['lengths'])} tokens: raise --max-context")
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        return measure_needles(
            model=plan.model,
            out=out,
            as_json=False,
            haystack=read_haystack(data and data / plan.asked["haystack"]),
            lengths=lengths,
            needles=plan.needles,
            variant="single",
            task="localization",
            timed=False,
            **{name: plan.asked[name] for name in ("chat", "policies", "budgets", "depths", "metric", "max_new_tokens")},
        )


def planned(plan: Plan, more: dict[str, Any]) -> dict[str, Any]:
    """What a plan would measure: the number of rows if it can be counted without the hub, and the sizes of caches."""
    from winnowkv.evaluate.settings import settings

    context = plan.context(more["max_context"])
    rows: dict[str, int | None]
    if plan.command == "needle":
        rows = {"needles": len(plan.lengths(more["max_context"])) * len(plan.asked["depths"]) * len(plan.asked["needles"])}
    else:
        from winnowkv.evaluate.tasks.tasks import find_tasks

        asked = plan.evaluation(**more)
        asked.check()
        counts = Counter(task.name for task, _ in asked.rows()) if asked.data else {}
        rows = {task.name: counts.get(task.name) for task in find_tasks(asked.tasks)}
    return {
        "model": plan.model, "command": plan.command, **plan.asked, "context": context, "rows": rows,
        "settings": [asdict(setting) for setting in settings(plan.asked["policies"], plan.asked["budgets"])],
        "facts": plan.facts and asdict(plan.facts), "compared_with_config": plan.compare(offline=True),
        "sizes": plan.sizes(context), "note": plan.note,
    }  # fmt: skip


def show_plans(recipe: Recipe | None, plans: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print what would be measured."""
    from winnowkv.report import MIB

    head = {name: getattr(recipe, name) for name in ("claim", "source", "note")} if recipe else {}
    if as_json:
        json.dump({**head, "plans": plans}, sys.stdout, indent=2, ensure_ascii=False)
        print()
        return
    for name, text in head.items():
        if text:
            say(f"{name}: {text}")
    for plan in plans:
        counts = list(plan["rows"].values())
        rows = "rows of the hub, or made by lm-eval," if None in counts else f"{sum(counts)} rows"
        facts = plan["facts"]
        shape = f", {facts['layers']} layers x {facts['kv_heads']} KV heads of {facts['head_size']}" if facts else ""
        checked = ", as its config says" if plan["compared_with_config"] else ""
        print()
        say(f"{plan['model']}{shape}{checked}: {rows} x {len(plan['settings'])} settings")
        say(f"  {'tasks' if plan['command'] == 'eval' else 'test'}: {', '.join(plan['rows'])}", indent=4)
        say(f"  policies: {', '.join(plan['policies'])}", indent=4)
        for size in plan["sizes"]:
            share = 100 * size["entries"] / plan["context"]
            say(f"  KV of {plan['context']} tokens at {size['budget']}: {size['bytes'] / MIB:.1f} MiB ({share:.1f}%)")
        if plan["note"]:
            say(f"  note: {plan['note']}", indent=4)


def show(summary: dict[str, Any], out: Path) -> None:
    """Print a table over all tasks and by task, and notes."""
    from winnowkv.cli.report import between, points
    from winnowkv.evaluate.report.summary import OVER_ROWS, group_budget_text, rows_text
    from winnowkv.report import MIB

    columns = ("rows", "score", "95% interval", "against\nfull", "95% interval", "W / T / L", "kept", "KV MiB", "ms/step")
    for section in summary["sections"]:
        title = f"{section['protocol']}: {section['model']} in {section['dtype']}"
        task = Column("task", key=True, left=True, least=9, short=str)
        policy, budget = keys("policy", "budget")
        table = ResultTable([task, policy, budget, *numbers(columns)], title)
        groups = [group for group in section["groups"] if group["task"] != OVER_ROWS]
        for group, following in zip(groups, [*groups[1:], None], strict=True):
            pair = group["against_full"] or {"mean_difference": None, "low": None, "high": None}
            table.add(
                group["task"],
                group["policy"],
                group_budget_text(group),
                rows_text(group),
                points(group["score"]),
                between(group),
                points(pair["mean_difference"], "+"),
                between(pair),
                " / ".join(str(pair[name]) for name in ("wins", "ties", "losses")) if "wins" in pair else "-",
                "-" if group["kept_fraction"] is None else f"{100 * group['kept_fraction']:.1f}%",
                "-" if group["kept_bytes"] is None else f"{group['kept_bytes'] / MIB:.1f}",
                "-" if group["decode_ms_per_step"] is None else f"{group['decode_ms_per_step']:.1f}",
            )
            if following is not None and following["task"] != group["task"]:
                table.section()
        table.print()
        for sentence in section["notes"]:
            note(sentence)
    for sentence in summary["notes"]:
        note(sentence)
    say(f"page: {out / 'report.html'}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="eval", cls=RayCommand)(evaluate)
