"""``winnow serve``: an OpenAI-compatible server over the engine."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from winnowkv.budget import DEFAULT_BUDGET
from winnowkv.cli.options import DEFAULT_POLICY, DEFAULT_STORE, Device, Dtype, Json, Model, Quality, Store, token_count

if TYPE_CHECKING:
    from socket import socket

    from fastapi import FastAPI

    from winnowkv.scale.serving import ReplicaOptions
    from winnowkv.serve.serving import Serving
    from winnowkv.serve.settings import ServeSettings

QUESTION = "Name three fruits."
WARM_UP_TOKENS = 1024  # of the prompts for which compiled steps are made before the first request


def serve(
    model: Model = "embedded",
    name: Annotated[
        str | None, typer.Option(help="Name under which the model is served. Default: --model.", show_default=False)
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    policy: Annotated[str, typer.Option(help="Eviction policy of requests that name none.")] = DEFAULT_POLICY,
    budget: Annotated[str, typer.Option(help="Their budget: a fraction (0.12), entries (512), or auto:0.95.")] = str(
        DEFAULT_BUDGET
    ),
    quality: Quality = None,
    keep_whole: Annotated[
        int, typer.Option(help="Prompts of so many tokens or fewer are kept whole if a request says nothing; 0: none.")
    ] = 128,
    kv_memory: Annotated[
        str | None, typer.Option(help="Most bytes of keys and values, 1GiB. Default: no limit.", show_default=False)
    ] = None,
    max_rows: Annotated[int, typer.Option(help="Most answers that decode together.")] = 32,
    interleave: Annotated[int, typer.Option(help="Tokens of a prompt read between two decode steps of the others.")] = 512,
    compile: Annotated[bool, typer.Option("--compile", help="Compiled decode steps, made before the first request.")] = False,
    decode_budget: Annotated[
        int | None,
        typer.Option(help="Most entries of generated tokens held per layer and KV head. Default: all.", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; elsewhere only with a key or --insecure.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="A key of which requests must name one; may be repeated.", envvar="WINNOW_API_KEY", show_envvar=True),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file of keys, one a line.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let everybody in who reaches --host.")] = False,
    cors: Annotated[
        list[str] | None, typer.Option(help="Origin of a page that may ask from a browser; may be repeated. Default: none.")
    ] = None,
    queue: Annotated[int, typer.Option(help="Most prompts that wait; more are answered with 429.")] = 256,
    queue_deadline: Annotated[float, typer.Option(help="Seconds after which a prompt that was not begun gets 429.")] = 60.0,
    request_timeout: Annotated[float, typer.Option(help="Seconds after which a request is ended.")] = 600.0,
    max_prompt_tokens: Annotated[
        str | None, typer.Option(help="Most tokens of a prompt, 4096 or 4k. Default: the model's limit.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most new tokens that a request may ask for.")] = 4096,
    default_new_tokens: Annotated[int, typer.Option(help="New tokens of chat requests that do not say.")] = 512,
    max_body: Annotated[str, typer.Option(help="Most bytes of a request's body.")] = "4MiB",
    drain: Annotated[float, typer.Option(help="Seconds that running requests have to end after SIGTERM.")] = 30.0,
    store: Store = DEFAULT_STORE,
    context_memory: Annotated[str, typer.Option(help="Most bytes of stored contexts in memory.")] = "256MiB",
    context_disk: Annotated[str, typer.Option(help="Most bytes of stored contexts in --store.")] = "4GiB",
    context_auto: Annotated[
        bool, typer.Option("--context-auto", help="Find contexts by the text that messages begin with, of the same key alone.")
    ] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts and answers into the log.")] = False,
    json_logs: Annotated[bool, typer.Option("--json-logs/--plain-logs", help="Logs on standard error.")] = True,
    as_json: Json = False,
    ray: Annotated[bool, typer.Option("--ray", help="Serve with replicas on Ray.")] = False,
    replicas: Annotated[int, typer.Option(help="With --ray: replicas, each with its own model and --kv-memory.")] = 2,
    address: Annotated[
        str | None,
        typer.Option(help="With --ray: a cluster, auto for the one of this machine. Default: a new Ray on this machine alone."),
    ] = None,
    min_replicas: Annotated[int | None, typer.Option(help="With --ray: autoscaling, fewest replicas.")] = None,
    max_replicas: Annotated[int | None, typer.Option(help="With --ray: autoscaling, most replicas.")] = None,
    target_ongoing_requests: Annotated[
        float | None, typer.Option(help="With --ray: autoscaling, running and waiting requests a replica. Default: --max-rows.")
    ] = None,
) -> None:
    """Serve OpenAI's chat and text completions, many at once, from compressed caches.

    Ends after SIGTERM or Ctrl-C, when the running requests have ended.

    winnow serve --model embedded --budget 0.12 --kv-memory 1GiB --port 8000
    """
    from winnowkv.budget import Budget
    from winnowkv.cli.loading import check_policies, require

    require("winnow serve", "fastapi", "uvicorn", "prometheus-client")
    check_policies([policy], [Budget.of(budget).asked])
    from winnowkv.serve.keys import read_keys
    from winnowkv.serve.logs import set_up
    from winnowkv.serve.server import address_of, listen
    from winnowkv.serve.settings import ServeSettings

    settings = ServeSettings(
        model=name or model, policy=policy, budget=Budget.of(budget).asked, quality=quality,
        keep_whole=keep_whole, kv_memory=kv_memory,
        max_rows=max_rows, interleave=interleave, compile=compile, decode_budget=decode_budget, queue=queue,
        queue_deadline=queue_deadline, request_timeout=request_timeout,
        max_prompt_tokens=None if max_prompt_tokens is None else token_count(max_prompt_tokens, "--max-prompt-tokens"),
        max_new_tokens=max_new_tokens, default_new_tokens=default_new_tokens, max_body=max_body, host=host, port=port,
        api_keys=(*(api_key or ()), *(read_keys(api_key_file) if api_key_file else ())), insecure=insecure,
        cors=tuple(cors or ()), log_prompts=log_prompts, context_memory=context_memory, context_disk=context_disk, store=store,
        context_auto=context_auto, drain=drain,
    )  # fmt: skip
    options = None
    if ray:
        require("winnow serve --ray", "ray")
        from winnowkv.scale.serving import ReplicaOptions

        options = ReplicaOptions(replicas, address, min_replicas, max_replicas, target_ongoing_requests)
    bound = listen(settings)
    set_up(as_json=json_logs)
    if options is None:
        run(settings, model, device, dtype, bound, address_of(bound, settings), as_json)
    else:
        run_on_ray(settings, partial(build, model, device, dtype), options, bound, address_of(bound, settings), as_json)


def run(
    settings: ServeSettings, model: str, device: str | None, dtype: str | None, bound: socket, address: str, as_json: bool
) -> None:
    """Serve on a bound socket until a signal comes. Raises what loading the model raised."""
    from winnowkv.serve.allocator import give_large_blocks_back
    from winnowkv.serve.server import Server

    give_large_blocks_back()

    def loaded(serving: Serving) -> None:
        if serving.failure is not None:
            server.begin_stop()
        else:
            print(said(settings, address, as_json), flush=True)

    server = Server(build(model, device, dtype, settings, loaded))
    print(f"winnow serve: loading {model}, then listening on {address}", file=sys.stderr, flush=True)
    server.run(sockets=[bound])
    if server.serving.failure is not None:
        raise server.serving.failure


def build(
    model: str, device: str | None, dtype: str | None, settings: ServeSettings, loaded: Callable[[Serving], None]
) -> FastAPI:
    """The whole application; the model is loaded when it starts, here or in a replica of Ray's."""
    from winnowkv.cache.compression import Compression
    from winnowkv.cli.loading import load_model
    from winnowkv.engine.engine import Engine
    from winnowkv.serve.app import make_app

    def load() -> Engine:
        asked = settings.policy, settings.budget
        found, tokenizer = load_model(
            model, lambda one: Compression.of(one, *asked, quality=settings.quality), device=device, dtype=dtype
        )
        engine = Engine(found, tokenizer, **settings.engine_options())
        if settings.compile:
            engine.warm_up(WARM_UP_TOKENS, settings.default_new_tokens)
        return engine

    return make_app(load, settings, loaded=loaded)


def run_on_ray(
    settings: ServeSettings, build_one: Callable[[ServeSettings, Callable[[Serving], None]], FastAPI], options: ReplicaOptions,
    bound: socket, address: str, as_json: bool,
) -> None:  # fmt: skip
    """Serve on a bound socket with replicas on Ray until a signal comes."""
    from winnowkv.scale.serving import replicas
    from winnowkv.serve.server import Server

    print(f"winnow serve: starting {options.count} replicas, then listening on {address}", file=sys.stderr, flush=True)
    with replicas(build_one, settings, options) as app:
        print(said(settings, address, as_json), flush=True)
        Server(app).run(sockets=[bound])


def said(settings: ServeSettings, address: str, as_json: bool) -> str:
    """What the command prints once requests are served."""
    return as_object(settings, address) if as_json else "\n".join(lines_to_try(settings, address))


def as_object(settings: ServeSettings, address: str) -> str:
    """Where the server listens and what it serves, as JSON."""
    said = {"url": address, "model": settings.model, "policy": settings.policy, "budget": settings.budget}
    return json.dumps(said, indent=2)


def lines_to_try(settings: ServeSettings, address: str) -> list[str]:
    """Where the server listens, and three lines to try: curl, the openai client, a browser."""
    key = "YOUR_KEY" if settings.api_keys else "none"
    header = f" -H 'authorization: Bearer {key}'" if settings.api_keys else ""
    body = f'{{"model": "{settings.model}", "messages": [{{"role": "user", "content": "{QUESTION}"}}], "temperature": 0}}'
    client = f"OpenAI(base_url='{address}/v1', api_key='{key}').chat.completions.create"
    said = f"model='{settings.model}', messages=[{{'role': 'user', 'content': '{QUESTION}'}}], temperature=0"
    return [
        f"winnow serve: {settings.model}, {settings.policy} at {settings.budget}, on {address} (Ctrl-C ends it)",
        f"curl {address}/v1/chat/completions -H 'content-type: application/json'{header} -d '{body}'",
        f'{shlex.quote(sys.executable)} -c "from openai import OpenAI; print({client}({said}).choices[0].message.content)"',
        f"browser: {address}/",
    ]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(serve)
