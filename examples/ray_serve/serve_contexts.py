"""vLLM with winnowkv's connector under Ray Serve LLM: replicas that share one store of contexts.

    serve run serve_contexts:contexts model=MODEL store=/data/contexts replicas=2

Every machine must reach the store (a shared folder, or a URL that fsspec knows), and have winnowkv, ray and vLLM installed.
With RAY_SERVE_ENABLE_HA_PROXY=1 and RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1, set before Ray starts, requests go straight to
vLLM's own server, and plain OpenAI requests may name a context ("winnow_context": ID).
"""

import os
from pathlib import Path

import torch
from pydantic import BaseModel
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_openai_app

from winnowkv.models.load import PACKAGED, model_folder

MIB = 1 << 20
DIRECT = os.environ.get("RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING") == "1"
MIDDLEWARE = "winnowkv.integrations.vllm.middleware.ContextMiddleware"  # serves "winnow_context"; stands in vLLM's own server


class Options(BaseModel, extra="forbid"):
    """What ``serve run`` takes as name=value, and a config file as ``args``.

    Attributes
    ----------
    store: folder or URL of the contexts.
    model: a hub id, a folder, or "embedded".
    replicas: how many vLLM engines.
    gpus: of each replica, for tensor parallelism; 0 is vLLM's CPU build.
    cpus: of each replica, as Ray counts them.
    max_model_len: most tokens of a request, a context's entries included.
    kv_cache_mib: MiB of vLLM's paged cache; None leaves it to vLLM.
    ram_gib: GiB of contexts that a worker keeps in memory.
    """

    store: str
    model: str = "embedded"
    dtype: str = "auto"
    replicas: int = 2
    gpus: int = 0
    cpus: float = 1
    max_model_len: int = 4096
    kv_cache_mib: int | None = None
    ram_gib: float = 4.0
    enforce_eager: bool = False


def llm_config(options: Options) -> LLMConfig:
    """Ray Serve LLM's description of one model: vLLM's own arguments, and where its replicas run."""
    source = str(model_folder(options.model, torch.float32)) if options.model in PACKAGED else options.model
    # Absolute: Ray's workers have working folders of their own.
    store = options.store if "://" in options.store else str(Path(options.store).absolute())
    connector = {
        "kv_connector": "WinnowConnector",
        "kv_connector_module_path": "winnowkv.integrations.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"store": store, "ram_gib": options.ram_gib},
    }
    return LLMConfig(
        model_loading_config={"model_id": options.model, "model_source": source},
        engine_kwargs={
            "dtype": options.dtype,
            "max_model_len": options.max_model_len,
            "kv_cache_memory_bytes": options.kv_cache_mib and options.kv_cache_mib * MIB,
            "tensor_parallel_size": max(1, options.gpus),
            "enforce_eager": options.enforce_eager,
            "kv_transfer_config": connector,
            "middleware": [MIDDLEWARE] if DIRECT else [],
        },
        runtime_env={"env_vars": {"WINNOW_STORE": store}},  # for the middleware
        # Bundles without a GPU are what tells Ray Serve LLM that this is vLLM's CPU build.
        placement_group_config={"bundle_per_worker": {"GPU": 1} if options.gpus else {"CPU": options.cpus}},
        deployment_config={
            "num_replicas": options.replicas,
            "ray_actor_options": {"num_cpus": 0},
            "health_check_period_s": 2,  # three failed checks replace a replica whose engine died; 10 s each is too slow
        },
    )


# Ray reads this annotation to make Options of name=value: it must be a class, not text.
def contexts(options: Options) -> Application:
    """The application: ``/v1/completions``, ``/v1/chat/completions`` and ``/v1/models`` of all replicas."""
    app = {"llm_configs": [llm_config(options)]}
    return build_openai_app(app if DIRECT else app | {"ingress_deployment_config": {"num_replicas": 1}})
