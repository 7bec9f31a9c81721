"""A scheduler with vLLM's rules (v1/core/sched/scheduler.py), as far as a KV connector meets them, and layers that write.

Blocks, a prefix cache by the hash of salt and ids that is filled when blocks are given out, chunks of a prompt, preemption of
the request that came last, and requests that fail where a block is reported as not loaded. ``steps_ahead`` is asynchronous
scheduling: a step's outcome is only seen after the next step was scheduled.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from winnowkv.contexts.context import ContextPrompt
from winnowkv.integrations.vllm.scheduler_side import ContextScheduler, Plan
from winnowkv.integrations.vllm.worker_side import ContextMemory, load

COMPUTED = "computed"  # in a slot: written by the model, not by the connector


class Sampling(SimpleNamespace):
    """Of ``vllm.SamplingParams`` what is looked at."""

    def clone(self) -> Sampling:
        return Sampling(**vars(self))


def sampling(**options: Any) -> Sampling:
    return Sampling(**({"prompt_logprobs": None, "min_tokens": 0, "skip_reading_prefix_cache": False} | options))


class Request:
    """Of vLLM's ``Request`` what the scheduler and the connector look at."""

    def __init__(
        self, name: str, ids: list[int], block: int, *, salt: str | None = None, params: dict[str, Any] | None = None,
        max_tokens: int = 3, sampling_params: Sampling | None = None, **more: Any,
    ) -> None:  # fmt: skip
        self.request_id, self.prompt_token_ids, self.cache_salt, self.kv_transfer_params = name, list(ids), salt, params
        self.sampling_params = sampling_params or sampling()
        self.max_tokens, self.lora_request, self.mm_features, self.prompt_embeds = max_tokens, None, [], None
        self.skip_reading_prefix_cache = self.sampling_params.skip_reading_prefix_cache
        vars(self).update(more)
        self._block = block
        self.all_ids, self.prompt, self.outputs = list(ids), len(ids), 0
        self.block_hashes: list[int] = []
        self.update_block_hashes()
        self.computed = self.preemptions = self.pending = 0
        self.preempted_now = False
        self.blocks: list[int] = []
        self.state = "waiting"
        self.read: list[Any] = []  # what its first tokens' slots held when its prompt was done

    @classmethod
    def on(cls, name: str, prompt: ContextPrompt, block: int, **options: Any) -> Request:
        """On a context."""
        options = {"salt": prompt.salt, "params": prompt.kv_transfer_params} | options
        return cls(name, options.pop("ids", prompt.ids), block, **options)

    @property
    def num_tokens(self) -> int:
        return len(self.all_ids)

    def update_block_hashes(self) -> None:
        size = self._block
        while (len(self.block_hashes) + 1) * size <= len(self.all_ids):
            at = len(self.block_hashes)
            before: Any = self.block_hashes[-1] if at else self.cache_salt
            self.block_hashes.append(hash((before, tuple(self.all_ids[at * size : (at + 1) * size]))))


@dataclass
class Impl:
    """A backend: a slot's keys and values are what was written last."""

    written: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def do_kv_cache_update(self, layer: Any, keys: Any, values: Any, cache: Any, slots: torch.Tensor) -> None:
        for at, slot in enumerate(slots.tolist()):
            self.written[slot] = keys[at].clone(), values[at].clone()


class Layer:
    """An attention layer of the engine."""

    def __init__(self, kv_heads: int, blocks: int, block: int, head_dim: int) -> None:
        self.impl, self.num_kv_heads = Impl(), kv_heads
        self.kv_cache = torch.empty(2, blocks, kv_heads, block, head_dim)


class Engine:
    """Scheduler and one worker. ``loaded`` counts the tokens that the connector was asked to load."""

    def __init__(
        self, planner: ContextScheduler, memory: ContextMemory, *, layers: int, kv_heads: int, head_dim: int,
        blocks: int = 64, chunk: int = 1000, steps_ahead: int = 0, caching: bool = True,
    ) -> None:  # fmt: skip
        self.planner, self.memory, self.block, self.chunk, self.ahead = planner, memory, planner.block, chunk, steps_ahead
        self.layers = {at: Layer(kv_heads, blocks, self.block, head_dim) for at in range(layers)}
        self.free, self.users = list(range(1, blocks)), dict[int, int]()
        self.caching, self.cached = caching, dict[int, int]()  # hash: block
        self.waiting, self.running = deque[Request](), list[Request]()
        self.done: dict[str, str] = {}
        self.loaded: list[int] = []
        self._unseen: deque[tuple[dict[str, int], set[int]]] = deque()

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.waiting.append(request)
            self.planner.add(request)

    def run(self, *requests: Request) -> list[str]:
        """Until all are done: how each ended."""
        self.add(*requests)
        for _ in range(10_000):
            if not self.waiting and not self.running and not self._unseen:
                return [self.done[request.request_id] for request in requests]
            self.step()
        raise AssertionError("the scheduler does not end")

    def step(self) -> None:
        """Schedule and run a step, and look at the outcome of the oldest that is not looked at yet."""
        scheduled, before = self._schedule()
        plan = self.planner.plan({one.request_id: one.blocks for one in before if one.request_id in set(self.planner.late())})
        self._unseen.append((scheduled, self._execute(scheduled, plan)))
        while len(self._unseen) > (self.ahead if scheduled else 0):
            self._update(*self._unseen.popleft())

    def _schedule(self) -> tuple[dict[str, int], list[Request]]:
        budget, scheduled, before = self.chunk, dict[str, int](), list[Request]()
        for request in list(self.running):
            if request not in self.running:  # preempted meanwhile
                continue
            count = min(request.num_tokens + request.pending - request.computed, budget)
            if not count:
                continue
            while not self._allocate(request, request.computed + count):
                victim = self.running.pop()
                self._preempt(victim)
                scheduled.pop(victim.request_id, None)
                before = [one for one in before if one is not victim]
                if victim is request:
                    break
            else:
                budget -= count
                scheduled[request.request_id] = count
                before.append(request)
                request.computed += count
                self._expect(request)
                continue
            break
        while self.waiting and budget and not any(one.preempted_now for one in self.waiting):
            request = self.waiting[0]
            hits = self._hits(request)
            local = len(hits) * self.block
            external = self.planner.matched(request, local)
            if request.skip_reading_prefix_cache:
                external = 0
            assert local + external < request.num_tokens, "nothing would be left to compute"
            count = min(request.num_tokens - local - external, budget)
            for block in hits:
                self._take(block)
            request.blocks = list(hits)
            if not self._allocate(request, local + external + count):
                self._release(request)
                break
            self.waiting.popleft()
            self.running.append(request)
            resumed = request.preemptions > 0
            request.state = "running"
            self.planner.allocated(request, request.blocks, external)
            self.loaded.append(external)
            scheduled[request.request_id] = count
            if resumed:
                before.append(request)
            budget -= count
            request.computed = local + external + count
            self._cache(request)
            self._expect(request)
        for one in self.waiting:
            one.preempted_now = False
        return scheduled, before

    def _execute(self, scheduled: dict[str, int], plan: Plan) -> set[int]:
        loaded = load(self.memory, plan.loads, self.layers, torch.float32)
        for request in self.running:
            if count := scheduled.get(request.request_id):
                for at in range(request.computed - count, request.computed):
                    slot = request.blocks[at // self.block] * self.block + at % self.block
                    for layer in self.layers.values():
                        layer.impl.written[slot] = COMPUTED
                if not request.read and request.computed >= request.num_tokens:
                    request.read = [self._slots(request, layer) for layer in self.layers.values()]
        return plan.failed | loaded

    def _slots(self, request: Request, layer: Layer) -> list[Any]:
        places = [request.blocks[at // self.block] * self.block + at % self.block for at in range(request.prompt)]
        return [layer.impl.written.get(slot) for slot in places]

    def _update(self, scheduled: dict[str, int], failed: set[int]) -> None:
        evicted = set[int]()
        for request in list(self.running):
            # Blocks that may hold what was computed before this step; of steps ahead also what they compute.
            known = request.computed - scheduled.get(request.request_id, 0)
            held = request.blocks[: -(-known // self.block)]
            if wrong := [at for at, block in enumerate(held) if block in failed]:
                evicted |= set(request.blocks[wrong[0] :])
                self._end(request, "error")
        self.cached = {key: block for key, block in self.cached.items() if block not in evicted}
        for request in list(self.running):
            if request.request_id in scheduled and request.pending and request.computed >= request.num_tokens:
                request.pending -= 1
                request.outputs += 1
                request.all_ids.append(1_000 + request.outputs)
                request.update_block_hashes()
                if request.outputs >= request.max_tokens:
                    self._end(request, "length")

    def _expect(self, request: Request) -> None:
        """A token comes of this step, if the prompt is done."""
        if request.computed >= request.num_tokens + request.pending:
            request.pending += 1

    def _hits(self, request: Request) -> list[int]:
        if not self.caching or request.skip_reading_prefix_cache:
            return []
        found = []
        for key in request.block_hashes[: (request.num_tokens - 1) // self.block]:
            if key not in self.cached:
                break
            found.append(self.cached[key])
        return found

    def _cache(self, request: Request) -> None:
        """Whole blocks can be hit by others from now on."""
        if self.caching:
            for key, block in zip(request.block_hashes[: request.computed // self.block], request.blocks, strict=False):
                self.cached.setdefault(key, block)

    def _take(self, block: int) -> None:
        if block in self.free:
            self.free.remove(block)
        self.users[block] = self.users.get(block, 0) + 1

    def _allocate(self, request: Request, tokens: int) -> bool:
        need = -(-tokens // self.block) - len(request.blocks)
        if need > len(self.free):
            return False
        for _ in range(need):
            block = self.free[0]
            self.cached = {key: other for key, other in self.cached.items() if other != block}
            for layer in self.layers.values():
                for slot in range(block * self.block, (block + 1) * self.block):
                    layer.impl.written.pop(slot, None)
            self._take(block)
            request.blocks.append(block)
        return True

    def _release(self, request: Request) -> None:
        for block in reversed(request.blocks):
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)
        request.blocks = []

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.computed, request.pending, request.state, request.read = 0, 0, "waiting", []
        request.preemptions += 1
        request.preempted_now = True
        self.waiting.appendleft(request)

    def _end(self, request: Request, how: str) -> None:
        self.running.remove(request)
        self._release(request)
        self.done[request.request_id] = request.state = how
        self.planner.finished(request.request_id)
