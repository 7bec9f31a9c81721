"""Everything that ``winnow serve`` takes, checked once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from winnowkv.budget import DEFAULT_BUDGET, Budget
from winnowkv.engine.sampling import check_number, check_whole
from winnowkv.errors import InputError
from winnowkv.files import shown
from winnowkv.memory.sizes import read_size
from winnowkv.policies.quality import check_quality

MAX_BODY = 4 * 2**20
LOOPBACK = ("127.0.0.1", "::1", "localhost")
SIZES = ("kv_memory", "context_memory", "context_disk", "max_body")


@dataclass(frozen=True)
class ServeSettings:
    """What a server serves, and its limits. Sizes may be given as ``"1GiB"`` and are bytes afterwards.

    Parameters
    ----------
    model: name under which the model is served.
    policy, budget, quality: of requests that do not give their own.
    keep_whole: prompts of so many tokens or fewer are kept whole, unless a request says otherwise: of a question of one
        sentence, 12% are a few words, and nothing is gained; 0 for none.
    kv_memory: most bytes of keys and values; None for no limit.
    max_rows: most choices that decode together.
    interleave: tokens of a prompt that are read between two decode steps of the others.
    compile: compiled decode steps.
    decode_budget: most entries of generated tokens that a row holds per layer and KV head; None for all.
    queue: most prompts that wait. queue_deadline: seconds after which a prompt that was not begun is given up.
    request_timeout: seconds after which a request ends, whatever it has generated.
    max_prompt_tokens: of one prompt; None for the model's limit.
    max_new_tokens: most that a request may ask for. default_new_tokens: of chat requests that do not say (OpenAI's have no
        limit, but memory for all new tokens is set aside when a request is admitted).
    max_body: bytes of a request's body. body_timeout: seconds in which it, and the head before it, has to arrive.
    write_timeout: seconds for which a client may leave a full connection unread.
    host, port: where it listens; port 0 takes any that is free.
    api_keys: keys of which a request must name one; none lets everybody in, which needs a loopback host or ``insecure``.
    cors: origins of pages that may ask from a browser, none by default.
    log_prompts: write prompts and answers into the log.
    context_memory, context_disk, store, context_auto: of stored contexts (:mod:`winnowkv.serve.contexts`).
    drain: seconds that running requests have to end after a stop was asked for.

    Raises
    ------
    InputError, BudgetError, PolicyError
        For a value outside its limits.
    """

    model: str = "embedded"
    policy: str = "winnow"
    budget: int | float | str = DEFAULT_BUDGET
    quality: str | None = None
    keep_whole: int = 128
    kv_memory: int | str | None = None
    max_rows: int = 32
    interleave: int = 512
    compile: bool = False
    decode_budget: int | None = None
    queue: int = 256
    queue_deadline: float = 60.0
    request_timeout: float = 600.0
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 4096
    default_new_tokens: int = 512
    max_body: int | str = MAX_BODY
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    insecure: bool = False
    cors: tuple[str, ...] = ()
    log_prompts: bool = False
    context_memory: int | str = "256MiB"
    context_disk: int | str = "4GiB"
    store: str | None = None
    context_auto: bool = False
    drain: float = 30.0

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, read_size(value, name))
        Budget.of(self.budget)
        if self.quality is not None:
            check_quality(self.quality)
        for name in ("max_rows", "interleave", "queue", "max_new_tokens", "default_new_tokens"):
            check_whole(name, getattr(self, name), 1)
        check_whole("keep_whole", self.keep_whole, 0, "; 0 keeps no prompt whole")
        for name in ("decode_budget", "max_prompt_tokens"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1, ", or None for no limit")
        for name in ("queue_deadline", "request_timeout", "body_timeout", "write_timeout", "drain"):
            value = getattr(self, name)
            check_number(name, value)
            if value < 0 or (value == 0 and name != "drain"):
                raise InputError(f"{name}={value} must be seconds above 0")
        if not isinstance(self.port, int) or not 0 <= self.port < 2**16:
            raise InputError(f"port={shown(self.port)} must be a whole number from 0 (any that is free) to 65535")
        self._check_names()

    def _check_names(self) -> None:
        if not self.model or len(self.model) > 200:
            raise InputError(f"model name {shown(self.model)} must have 1 to 200 characters")
        for key in self.api_keys:
            if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(
                    f"an API key of {len(key)} characters cannot be used: give at least 8 printable ASCII characters without "
                    "blanks"
                )
        for origin in self.cors:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise InputError(f"cors origin {shown(origin)} is none: write it as https://example.org, or *")
        if not (self.api_keys or self.insecure or self.loopback):
            raise InputError(
                f"host {self.host} can be reached from other machines, and no API key is set: give one with --api-key or "
                "--api-key-file, listen on 127.0.0.1, or say --insecure"
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in LOOPBACK

    def engine_options(self) -> dict[str, Any]:
        """What :class:`~winnowkv.engine.engine.Engine` is made with, beside model and tokenizer."""
        return {
            "policy": self.policy, "budget": self.budget, "quality": self.quality, "kv_memory": self.kv_memory,
            "max_rows": self.max_rows, "compile": self.compile, "interleave": self.interleave,
        }  # fmt: skip
