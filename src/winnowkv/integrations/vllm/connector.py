"""The KV connector that vLLM loads: ``--kv-transfer-config`` names this class, and vLLM asks it before each step.

vLLM makes one in the scheduler and one in each worker; each has one half (scheduler_side.py, worker_side.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from winnowkv.contexts.fit import model_fields, why_unmovable
from winnowkv.contexts.store import ContextStore
from winnowkv.errors import UnsupportedEngineError
from winnowkv.integrations.vllm.handoff import NO_HANDOFF, HandoffPass, HandoffScheduling, Tickets
from winnowkv.integrations.vllm.listening import listen_to
from winnowkv.integrations.vllm.options import ConnectorOptions
from winnowkv.integrations.vllm.recording import Recorder
from winnowkv.integrations.vllm.scheduler_side import ContextScheduler, Plan
from winnowkv.integrations.vllm.versions import check_release
from winnowkv.integrations.vllm.worker_side import ContextMemory, check_layers, load

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


@dataclass
class ConnectorMetadata(KVConnectorMetadata):
    """From the scheduler to the workers, before a step."""

    plan: Plan = field(default_factory=Plan)
    passes: tuple[HandoffPass, ...] = ()


class WinnowConnector(KVConnectorBase_V1, SupportsHMA):
    """Serves stored contexts as the first tokens of requests that name them (``kv_transfer_params: {"winnow_context": ID}``).

    Raises
    ------
    UnsupportedEngineError
        For a release of vLLM that was not tested, and for a model or a setting with which contexts cannot be served.
    InputError
        For an unknown or missing option in ``kv_connector_extra_config``.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        options = ConnectorOptions.of(self._kv_transfer_config.kv_connector_extra_config)
        check_release(vllm.__version__, any_release=options.any_release)
        check_engine(vllm_config, kv_cache_config)
        self._options, self._store = options, ContextStore(options.store)
        self._block = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._scheduler: ContextScheduler | None = None
        self._memory: ContextMemory | None = None
        self._layers: dict[int, Any] = {}  # vLLM's attention layers of this worker, by their number in the model
        self._handoff_scheduling: HandoffScheduling | None = None
        self._recorder: Recorder | None = None
        self._failed: set[int] = set()
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = ContextScheduler(self._store, model_fields(vllm_config.model_config.hf_config), self._block)
            refusal = None if options.handoff_bytes else NO_HANDOFF
            self._handoff_scheduling = HandoffScheduling(Tickets(self._store), self._block, refusal)

    # In the scheduler

    def on_new_request(self, request: Request) -> None:
        """A request came."""
        self._planner.add(request)
        self._handoffs.add(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that the connector has beyond those of the local prefix cache; they are loaded within the step."""
        return self._planner.matched(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """The request has its blocks."""
        self._planner.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What the workers load before this step."""
        running: dict[str, list[int]] = {}
        if self._kv_cache_manager is not None:
            scheduled = set(scheduler_output.scheduled_cached_reqs.req_ids)
            for name in self._planner.late():
                if name in scheduled:
                    running[name] = self._kv_cache_manager.get_block_ids(name)[0]
        return ConnectorMetadata(self._planner.plan(running), self._handoffs.passes(scheduler_output))

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The request is over; its blocks may be freed at once."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same; without this method vLLM turns its hybrid cache manager off."""
        self._planner.finished(request.request_id)
        return False, self._handoffs.finished(request)

    @property
    def _planner(self) -> ContextScheduler:
        assert self._scheduler is not None
        return self._scheduler

    @property
    def _handoffs(self) -> HandoffScheduling:
        assert self._handoff_scheduling is not None
        return self._handoff_scheduling

    # In a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The paged cache is there: check that it can be written to."""
        parallel = self._vllm_config.parallel_config
        ranks = parallel.tensor_parallel_size
        rank = get_tensor_model_parallel_rank() if ranks > 1 else 0
        self._memory = ContextMemory(self._store, self._options.ram_bytes, rank, ranks)
        model = self._vllm_config.model_config
        self._layers = attention_layers(self._vllm_config.compilation_config.static_forward_context)
        check_layers(self._layers, model.get_num_layers(parallel), model.get_num_kv_heads(parallel), self._block)

        if self._options.handoff_bytes:
            check_whole(parallel)
            self._recorder = Recorder(model.hf_config, self._store, self._options.handoff_bytes)
            self._recorder.layers = listen_to(self._layers, self._recorder)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """A step begins: what is computed of requests that are handed off is heard from now on."""
        super().bind_connector_metadata(connector_metadata)
        if self._recorder is not None:
            assert isinstance(connector_metadata, ConnectorMetadata)
            self._recorder.begin(connector_metadata.passes)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Load what the scheduler asked for, all layers at once."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, ConnectorMetadata)
        self._failed |= metadata.plan.failed
        if metadata.plan.loads:
            assert self._memory is not None
            self._failed |= load(self._memory, metadata.plan.loads, self._layers, self._vllm_config.model_config.dtype)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything was loaded before the step."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """The step is computed: prompts that were read to their end are handed off."""
        if self._recorder is not None:
            self._recorder.finish()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """These requests are over; none has transfers that go on."""
        if self._recorder is not None:
            self._recorder.forget(finished_req_ids)
        return None, None

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether attention must run between CUDA graphs and not in them: a replayed graph cannot be heard."""
        return ConnectorOptions.of(extra_config).handoff_bytes > 0

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be loaded: vLLM ends their requests with an error."""
        failed, self._failed = self._failed, set()
        return failed


def attention_layers(modules: dict[str, Any]) -> dict[int, Any]:
    """vLLM's attention layers of this worker, by their number in the model."""
    return {
        extract_layer_index(name): module
        for name, module in modules.items()
        if getattr(module, "kv_cache", None) is not None and hasattr(module, "impl")
    }


def check_whole(parallel: Any) -> None:
    """Raise UnsupportedEngineError if workers share the model: each would hear a part of a prompt's heads or layers."""
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    if ranks > 1:
        raise UnsupportedEngineError(
            f"winnowkv's connector: {ranks} workers share the model, and a handoff hears all heads and layers in one: leave "
            "handoff_gib out, or serve the model with one worker"
        )


def check_engine(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Raise UnsupportedEngineError for what is known before the model runs to be no place for contexts."""
    model, cache, transfer = vllm_config.model_config, vllm_config.cache_config, vllm_config.kv_transfer_config
    parallel = vllm_config.parallel_config
    why = None
    if len(kv_cache_config.kv_cache_groups) != 1:
        why = (
            f"{len(kv_cache_config.kv_cache_groups)} groups of layers with block tables of their own, contexts need one: where "
            "some layers slide, --disable-hybrid-kv-cache-manager gives all of them the same"
        )
    elif model.runner_type != "generate":
        why = f"a model that runs to {model.runner_type} has no use for contexts"
    elif max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
        why = "a context's entries would have to be divided among workers (context parallel): use tensor parallel"
    elif model.use_mla:
        why = "latent keys (MLA) cannot be moved to other positions"
    elif (unmovable := why_unmovable(model.hf_config)) is not None:
        why = unmovable
    elif str(cache.cache_dtype) not in ("auto", "float16", "bfloat16", "float32"):
        why = f"kv_cache_dtype {cache.cache_dtype} was not tested: leave it out"
    elif transfer is not None and transfer.kv_load_failure_policy != "fail":
        why = (
            f"kv_load_failure_policy {transfer.kv_load_failure_policy!r} would compute placeholders as text where a context is "
            'missing: use "fail"'
        )
    if why is not None:
        raise UnsupportedEngineError(f"winnowkv's connector: {why}")
