"""The example of vLLM under Ray Serve LLM: its configuration, and two replicas of which one is killed."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

INSTALLED = getattr(find_spec("vllm"), "origin", None)  # None also for a folder of that name
EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),  # three engines start
    pytest.mark.skipif(not (INSTALLED and find_spec("ray")), reason="vLLM or Ray is not installed: make ray-demo"),
]


@pytest.fixture
def serve_contexts(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("serve_contexts")


def test_cpu_replicas_ask_ray_for_no_gpu(serve_contexts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = serve_contexts.llm_config(serve_contexts.Options(store="contexts", cpus=2, replicas=3, kv_cache_mib=256))
    engine = config.get_engine_config()
    assert config.accelerator_config.kind == "cpu"
    assert engine.placement_bundles == [{"CPU": 2}]
    assert config.deployment_config["num_replicas"] == 3
    extra = engine.engine_kwargs["kv_transfer_config"]["kv_connector_extra_config"]
    assert extra == {"store": str(tmp_path / "contexts"), "ram_gib": 4.0}  # workers have folders of their own
    assert engine.engine_kwargs["kv_cache_memory_bytes"] == 256 << 20


def test_gpu_replicas_are_tensor_parallel(serve_contexts):
    config = serve_contexts.llm_config(serve_contexts.Options(store="s3://bucket/contexts", gpus=2))
    engine = config.get_engine_config()
    assert config.accelerator_config.kind == "gpu"
    assert engine.placement_bundles == [{"GPU": 1}, {"GPU": 1}]
    assert engine.engine_kwargs["tensor_parallel_size"] == 2
    assert config.runtime_env == {"env_vars": {"WINNOW_STORE": "s3://bucket/contexts"}}


def test_ray_makes_options_of_the_command_line(serve_contexts):
    (parameter,) = inspect.signature(serve_contexts.contexts).parameters.values()
    assert parameter.annotation is serve_contexts.Options
    options = serve_contexts.Options.model_validate({"store": "contexts", "replicas": "3", "enforce_eager": "true"})
    assert (options.replicas, options.enforce_eager) == (3, True)


def test_an_option_that_is_unknown_is_refused(serve_contexts):
    with pytest.raises(ValidationError, match="stores"):
        serve_contexts.Options(stores="contexts")


def test_a_killed_replica_costs_no_answer():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(EXAMPLE / "check.py"), "--each", "8", "--port", "8765"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    table = done.stdout[done.stdout.index("questions ") :].splitlines()[1:4]
    for asked, _, failed, right, _ in (line[28:].split(maxsplit=4) for line in table):
        assert failed == "0"
        assert right == asked
    assert "processes of the killed replica that are left: 0" in done.stdout
