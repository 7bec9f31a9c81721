"""``winnow vllm``: vLLM's server on a store of contexts."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from winnowkv.cli.options import DEFAULT_STORE, Store, model_name


def vllm(
    model: Annotated[str, typer.Argument(callback=model_name, help="'embedded', a folder, or a hub id.")],
    flags: Annotated[
        list[str] | None, typer.Argument(metavar="[-- FLAGS...]", help="vLLM's own flags, passed on as they are.")
    ] = None,
    store: Store = DEFAULT_STORE,
    ram_gib: Annotated[
        float, typer.Option("--ram-gib", help="Most GiB of contexts that each worker keeps in memory; 0 keeps none.")
    ] = 4.0,
    handoff_gib: Annotated[
        float,
        typer.Option("--handoff-gib", help="Most GiB of prompts that a worker holds to compress them itself; 0: none are."),
    ] = 0.0,
    any_release: Annotated[
        bool, typer.Option("--any-release", help="Also run with a release of vLLM that was not tested.")
    ] = False,
    show: Annotated[bool, typer.Option("--print", help="Print the command line, run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the command line as one JSON object, run nothing.")] = False,
) -> None:
    """Print and run the command line of a vLLM server that answers requests on the contexts of a store.

    vLLM itself is not changed: a connector and a middleware are named on its command line.

    winnow vllm Qwen/Qwen3-0.6B --store contexts -- --port 8001 --max-model-len 8192
    """
    from winnowkv.integrations.vllm.launch import as_dict, server_command

    command = server_command(model, store, flags or [], ram_gib=ram_gib, handoff_gib=handoff_gib, any_release=any_release)
    if as_json:
        print(json.dumps(as_dict(command), indent=2))
        return
    print(command.shell)
    if not show:
        command.run()


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(vllm)
