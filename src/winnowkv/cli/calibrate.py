"""``winnow calibrate``: a profile of a model's retrieval heads and layer errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from winnowkv.cli.options import Chat, Json, Model, fraction_list, numbers
from winnowkv.cli.progress import resumable
from winnowkv.cli.tables import note

if TYPE_CHECKING:
    from rich.console import Console

    from winnowkv.models.calibration import CalibrationProfile


def calibrate(
    model: Model = "embedded",
    out: Annotated[
        Path, typer.Option(help="The profile file. Finished prompts are in FILE.parts, where an interrupted run continues.")
    ] = Path("winnow-out/profile.json"),
    show: Annotated[
        bool,
        typer.Option(
            "--show", help="Draw a map of the heads as PNG beside the profile; an existing profile is not measured again."
        ),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSONL with needle, question, answer (a part of the needle): prompts of your own, in addition."),
    ] = None,
    count: Annotated[int, typer.Option(min=0, help="Number of generated prompts.")] = 60,
    lengths: Annotated[str, typer.Option(help="Comma-separated prompt lengths in tokens.")] = "500,1000,2000",
    depths: Annotated[
        str, typer.Option(help="Comma-separated depths of the hidden fact: 0 is the start of the text, 1 its end.")
    ] = "0.1,0.3,0.5,0.7,0.9",
    seed: Annotated[int, typer.Option(help="Seed of the generated prompts.")] = 0,
    error_entries: Annotated[
        int, typer.Option(min=9, help="Entries per KV head to which one layer at a time is limited.")
    ] = 32,
    error_sum: Annotated[
        bool, typer.Option("--error-sum", help="Sum errors over decode steps instead of averaging them.")
    ] = False,
    chat: Chat = None,
    as_json: Json = False,
) -> None:
    """Find a model's retrieval heads and the eviction error of each layer; takes a few minutes, once per model.

    Policies such as compresskv and headkv read the profile: compresskv:profile=FILE. winnow profile add FILE installs it for
    all of them, winnow profile publish FILE OWNER/NAME shares it.
    """
    from rich.console import Console

    from winnowkv.calibrate.prompts import read_prompts
    from winnowkv.calibrate.run import Calibration
    from winnowkv.cli.loading import require
    from winnowkv.models.calibration import read_profile

    console = Console(stderr=True)
    if show:
        require("--show", "matplotlib")
    if show and out.exists():
        profile = read_profile(out)
    else:
        asked = Calibration(
            prompts=count,
            lengths=numbers(lengths, int, "--lengths"),
            depths=fraction_list(depths, "--depths"),
            seed=seed,
            own=tuple(read_prompts(prompts)) if prompts else (),
            error_entries=error_entries,
            error_mean=not error_sum,
        )
        profile = measure(asked, model, chat, out, console)
    picture = None
    if show:
        from winnowkv.evaluate.report.plot import head_map

        picture = out.with_suffix(".png")
        head_map(profile, picture)
    if as_json:
        top = [{"layer": at[0], "head": at[1], "score": profile.semantic[at[0]][at[1]]} for at in profile.top_heads(16)]
        print(
            json.dumps({"profile": str(out), "picture": picture and str(picture), "top_heads": top, **profile.about}, indent=2)
        )
    else:
        show_profile(profile, out, picture)


def measure(asked: Any, model: str, chat: bool | None, out: Path, console: Console) -> CalibrationProfile:
    """Run a calibration with a progress bar and write its profile."""
    from winnowkv.calibrate.prompts import read_filler
    from winnowkv.calibrate.run import calibrate as run, open_store
    from winnowkv.cli.loading import check_file, check_folder, load_model
    from winnowkv.prompt.chat import uses_chat

    asked.check_prompts()
    out.parent.mkdir(parents=True, exist_ok=True)
    check_file(out, "--out")
    parts = out.with_name(out.name + ".parts")
    check_folder(parts, {"model": model, "seed": asked.seed, "prompts": asked.prompts})
    with console.status(f"loading {model}"):
        loaded, tokenizer = load_model(model, asked.check)
    wanted = uses_chat(chat, tokenizer)
    store = open_store(parts, model, loaded, wanted, asked)
    total = asked.prompts + len(asked.own)
    try:
        with resumable(console, store, "calibrating", total + min(asked.error_prompts, total)) as advance:
            profile = run(asked, model, loaded, tokenizer, read_filler(), chat=wanted, store=store, advance=advance)
    finally:
        store.close()
    profile.write(out)
    return profile


def show_profile(profile: CalibrationProfile, out: Path, picture: Path | None) -> None:
    """Print the profile in a few lines."""
    heads = " ".join(f"{layer}.{head}" for layer, head in profile.top_heads(16))
    worst = sorted(range(len(profile.errors)), key=lambda layer: -profile.errors[layer])[:5]
    about = profile.about
    print(f"profile of {profile.model}: {out}")
    print(f"answered {about.get('answered')} of {about.get('prompts')} prompts")
    print(f"strongest semantic retrieval heads (layer.head): {heads}")
    print(f"layers with the largest eviction error: {', '.join(map(str, worst))}")
    if picture:
        print(f"head map: {picture}")
    note(f"use it: winnow profile add {out}; share it: winnow profile publish {out} OWNER/NAME")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(calibrate)
