"""What ``generate`` was asked for, where a forward pass cannot see it, and drafts of assisted decoding kept out of prompts."""

from __future__ import annotations

import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from winnowkv.errors import InputError

DRAFTING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")  # options that make generate() use drafts
# Inputs of a forward pass whose last axis is tokens.
BY_TOKEN = ("input_ids", "attention_mask", "position_ids", "cache_position", "token_type_ids")


@dataclass(frozen=True)
class GenerateCall:
    """One call of ``generate``.

    Attributes
    ----------
    prompt_tokens: of each row, padding included; None if it is not given as ids.
    options: generation options of the call; those of its generation config and of the model's where it names none.
    """

    prompt_tokens: int | None
    options: Callable[[str], Any]

    @property
    def assisted(self) -> bool:
        """Whether an assistant drafts tokens, so that the first forward pass reads the prompt and a draft."""
        return any(self.options(name) is not None for name in DRAFTING)


class WatchedGenerate:
    """Stands for a routed model's ``generate``: notes what was asked for while it runs, by thread."""

    def __init__(self, model: PreTrainedModel, calls: dict[int, GenerateCall]) -> None:
        self.earlier = vars(model).get("generate")  # set on the instance by other code
        self._model, self._calls = weakref.ref(model), calls
        own: Any = model.generate
        self.__signature__ = inspect.signature(own)
        self.__doc__, self.__name__ = own.__doc__, "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate``."""
        thread, model = threading.get_ident(), self._model()
        assert model is not None
        kind: Any = type(model)
        generate = self.earlier or partial(kind.generate, model)
        outer = self._calls.get(thread)
        call = read_call(model, args, kwargs)
        check_unread(call, kwargs)
        self._calls[thread] = call
        try:
            with drafts_apart(model, call):
                return generate(*args, **kwargs)
        finally:
            if outer is None:
                del self._calls[thread]
            else:
                self._calls[thread] = outer

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied model gets its own ``generate`` back."""
        model = self._model()
        kind: Any = type(model)
        return types.MethodType(kind.generate, memo.get(id(model), model))


def watch_generate(model: PreTrainedModel, calls: dict[int, GenerateCall]) -> None:
    """Note the calls of a model's ``generate`` until :func:`stop_watching`."""
    model.generate = WatchedGenerate(model, calls)  # type: ignore[assignment]


def stop_watching(model: PreTrainedModel) -> None:
    """Put a model's ``generate`` back."""
    watched: Any = vars(model).pop("generate")
    if watched.earlier is not None:
        model.generate = watched.earlier


def given_cache(kwargs: dict[str, Any]) -> tuple[str, Any]:
    """The name under which a forward pass is given its cache, which is ``cache`` from transformers 5.24 on, and the cache."""
    name = "past_key_values" if kwargs.get("cache") is None else "cache"
    return name, kwargs.get(name)


def named_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a forward pass, the token ids by their name, too."""
    return {**kwargs, "input_ids": args[0]} if args else kwargs


def check_unread(call: GenerateCall, kwargs: dict[str, Any]) -> None:
    """Raise InputError if a cache of ours has read all tokens already, which transformers would then read once more."""
    cache = given_cache(kwargs)[1]
    mask, tokens = kwargs.get("attention_mask"), call.prompt_tokens
    if not hasattr(cache, "valid_entries") or tokens is None:
        return
    whole = mask is None or mask.shape[-1] == tokens  # with a longer mask the ids are the new ones alone
    if whole and 0 < tokens <= (seen := cache.get_seq_length()):
        raise InputError(
            f"the cache has read {seen} tokens already and generate() was given {tokens}: give all tokens so far and at least "
            "one more, such as torch.cat([ids, logits.argmax(-1, keepdim=True)], 1) after wk.prefill()"
        )


def refuse_chunks(call: GenerateCall | None) -> None:
    """Raise InputError if ``generate`` was asked to read the prompt in chunks of its own."""
    chunk = None if call is None else call.options("prefill_chunk_size")
    if chunk is not None and call is not None and (call.prompt_tokens or chunk + 1) > chunk:
        raise InputError(
            f"prefill_chunk_size={chunk} would compress the first chunk alone: leave it out, or read the prompt with "
            f"wk.prefill(model, ids, cache, chunk={chunk}) and let generate() go on from there"
        )


class PassWatch:
    """Tells a cache of the inputs of each forward pass into it (``before_pass``), until either is gone or it is closed."""

    def __init__(self, model: PreTrainedModel, cache: Any) -> None:
        self._model, self._cache = weakref.ref(model), weakref.ref(cache)
        self._hook = model.register_forward_pre_hook(self._tell, with_kwargs=True)
        weakref.finalize(cache, self._hook.remove).atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> PassWatch:
        """This one: a copied model has its hooks, which do nothing there."""
        return self

    def close(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()

    def _tell(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        cache = self._cache()
        if kwargs is None or cache is None or module is not self._model() or given_cache(kwargs)[1] is not cache:
            return
        cache.before_pass(named_inputs(args, kwargs))


@contextmanager
def drafts_apart(model: PreTrainedModel, call: GenerateCall) -> Iterator[None]:
    """In assisted decoding: let the model read the prompt by itself, so that what stays of it does not depend on a draft.

    transformers reads prompt and first draft in one forward pass. Here that is two, and their logits are put together.
    """
    if not call.assisted or call.prompt_tokens is None:
        yield
        return
    thread, prompt, last = threading.get_ident(), call.prompt_tokens, []

    # A pass of another thread may call these without kwargs while they are removed: torch looks those up apart.
    def read_prompt(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if threading.get_ident() != thread or kwargs is None:
            return None
        cache = given_cache(kwargs)[1]
        ids = kwargs.get("input_ids")
        if not hasattr(cache, "valid_entries") or ids is None or ids.shape[1] <= prompt:
            return None
        if cache.get_seq_length():
            return None
        if kwargs.get("output_hidden_states"):
            raise InputError("this assistant needs the model's hidden states, which a compact cache's first pass does not give")
        last.append(module(**{**parts(kwargs, slice(prompt)), "logits_to_keep": 1}).logits[:, -1:])
        rest = parts(kwargs, slice(prompt, None))
        if kwargs.get("attention_mask") is not None:
            rest["attention_mask"] = kwargs["attention_mask"]
        if kwargs.get("logits_to_keep"):
            rest["logits_to_keep"] = kwargs["logits_to_keep"] - 1
        return args, rest

    def join(module: Any, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> None:
        if threading.get_ident() == thread and last and kwargs["input_ids"].shape[1] != prompt:
            output.logits = torch.cat([last.pop(), output.logits], 1)

    hooks = [
        model.register_forward_pre_hook(read_prompt, with_kwargs=True),
        model.register_forward_hook(join, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def parts(inputs: dict[str, Any], tokens: slice) -> dict[str, Any]:
    """Inputs of a forward pass for some of its tokens."""
    cut = {name: inputs[name][..., tokens] for name in BY_TOKEN if inputs.get(name) is not None}
    return {**inputs, **cut}


def read_call(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GenerateCall:
    """What a call asks for, before transformers has looked at it."""
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")

    def option(name: str) -> Any:
        values = (kwargs.get(name), *(getattr(config, name, None) for config in (given, model.generation_config)))
        return next((value for value in values if value is not None), None)

    return GenerateCall(None if ids is None else ids.shape[-1], option)
