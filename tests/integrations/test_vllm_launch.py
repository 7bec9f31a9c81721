"""`winnow vllm`: the command line of vLLM's server, what is refused, and that nothing runs without vLLM."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from winnowkv.errors import InputError, ModelNotFoundError
from winnowkv.integrations.vllm import launch
from winnowkv.integrations.vllm.launch import MIDDLEWARE, option_value, server_command
from winnowkv.integrations.vllm.options import ConnectorOptions

Winnow = Callable[..., tuple[int, str, str]]


def value(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_the_command_names_model_connector_middleware_and_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = server_command("org/model", "a store", ["--port", "8001"], ram_gib=0.5, any_release=True)
    assert command.arguments[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert command.arguments[-2:] == ["--port", "8001"]
    assert value(command.arguments, "--model") == "org/model"
    assert "--served-model-name" not in command.arguments
    config = json.loads(value(command.arguments, "--kv-transfer-config"))
    assert config["kv_connector"] == "WinnowConnector"
    assert importlib.util.find_spec(config["kv_connector_module_path"]) is not None
    store = str(tmp_path / "a store")
    assert ConnectorOptions.of(config["kv_connector_extra_config"]) == ConnectorOptions(store, 0.5, any_release=True)
    assert command.environment == {"WINNOW_STORE": store}
    module, _, name = value(command.arguments, "--middleware").rpartition(".")
    assert value(command.arguments, "--middleware") == MIDDLEWARE
    assert isinstance(getattr(importlib.import_module(module), name), type)
    assert shlex.split(command.shell) == [f"WINNOW_STORE={store}", *command.arguments]


def test_a_handoff_brings_its_worker_extension_which_is_importable() -> None:
    command = server_command("m", "s", handoff_gib=0.5)
    options = json.loads(value(command.arguments, "--kv-transfer-config"))["kv_connector_extra_config"]
    assert ConnectorOptions.of(options).handoff_gib == 0.5
    module, _, _ = value(command.arguments, "--worker-extension-cls").rpartition(".")
    assert importlib.util.find_spec(module) is not None
    assert "--worker-extension-cls" not in server_command("m", "s").arguments
    with pytest.raises(InputError, match=r"^--worker-extension-cls cannot be passed on"):
        server_command("m", "s", ["--worker-extension-cls", "other"], handoff_gib=0.5)


def test_a_url_stays_as_it_is() -> None:
    assert server_command("m", "memory://contexts").environment == {"WINNOW_STORE": "memory://contexts"}


@pytest.mark.parametrize(
    "flag",
    ["--kv-transfer-config", "--kv-transfer-config={}", "--kv_transfer_config", "--kv-transfer-config.kv_role", "--model"],
)
def test_flags_that_are_set_already_are_refused_by_name(flag: str) -> None:
    with pytest.raises(InputError, match=f"^{flag.partition('=')[0]} cannot be passed on: "):
        server_command("m", "s", ["--port", "1", flag, "x"])


def test_what_no_server_could_be_started_with_is_refused() -> None:
    with pytest.raises(InputError, match="no number of GiB"):
        server_command("m", "s", ram_gib=-1)
    with pytest.raises(InputError, match="store 'nope://x'"):
        server_command("m", "nope://x")
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        server_command("/no/such/model", "s")


def test_a_packaged_model_is_its_folder_in_the_dtype_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "model_folder", lambda name, dtype: Path(f"/models/{name}-{dtype}"))
    for flags, dtype in (
        (["--dtype", "float32"], "float32"),
        (["--dtype=bfloat16"], "bfloat16"),
        (["--dtype=float"], "float32"),
    ):
        arguments = server_command("embedded", "s", flags).arguments
        assert value(arguments, "--model") == f"/models/embedded-torch.{dtype}"
        assert value(arguments, "--served-model-name") == "embedded"
    named = server_command("embedded", "s", ["--served-model-name", "mine"]).arguments
    assert named.count("--served-model-name") == 1


def test_the_last_value_of_a_flag_counts() -> None:
    flags = ["--dtype", "float32", "--x", "--dtype=bfloat16"]
    assert option_value(flags, "--dtype") == "bfloat16"
    assert option_value(flags[:3], "--dtype") == "float32"
    assert option_value(["--x"], "--dtype") is None


def test_it_prints_the_command_and_becomes_it(winnow: Winnow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *given: became.append(given))
    monkeypatch.setattr(launch, "installed", lambda: True)
    monkeypatch.delenv("WINNOW_STORE", raising=False)
    code, out, err = winnow("vllm", "org/model", "--store", tmp_path, "--", "--port", "8001", "--json-logs")
    assert (code, err) == (0, "")
    ((program, arguments, environment),) = became
    assert program == arguments[0] == sys.executable
    assert arguments[-3:] == ["--port", "8001", "--json-logs"]
    assert environment["WINNOW_STORE"] == str(tmp_path)
    assert environment["PATH"] == os.environ["PATH"]
    assert shlex.split(out) == [f"WINNOW_STORE={tmp_path}", *arguments]


def test_printing_runs_nothing(winnow: Winnow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execve", lambda *given: pytest.fail("it ran"))
    code, out, _ = winnow("vllm", "org/model", "--store", tmp_path, "--print")
    assert (code, out.startswith(f"WINNOW_STORE={tmp_path} ")) == (0, True)
    code, out, _ = winnow("vllm", "org/model", "--store", tmp_path, "--json")
    command = server_command("org/model", str(tmp_path))
    assert (code, json.loads(out)) == (0, {"command": command.arguments, "environment": command.environment})


def test_without_vllm_the_way_out_is_named(winnow: Winnow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: ModuleSpec(name, None))  # a folder that is called so
    monkeypatch.setattr(os, "execve", lambda *given: pytest.fail("it ran"))
    code, _, err = winnow("vllm", "org/model", "--store", tmp_path)
    assert code == 2
    assert "vLLM is not installed for" in err
    assert "--print shows the command" in err
