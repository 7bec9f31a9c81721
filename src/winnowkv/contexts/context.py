"""A context: what is known of a compressed document that an engine with one block table a request can serve as a prefix.

The engine's request begins with as many placeholder token ids as the context keeps entries. Their keys and values are never
computed: the context's are loaded in their place (integrations/vllm). What follows is computed as ever.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from winnowkv.errors import InputError
from winnowkv.prompt.chat import next_turn, rest_of_turn, shared_tokens, text_ending

CONTEXT_PARAM = "winnow_context"  # in a request's kv_transfer_params, and in the body of a chat request
ID_LENGTH = 32  # of the 64 characters of a digest
CONTEXT_ID = re.compile(rf"[0-9a-f]{{{ID_LENGTH}}}")
SALT = re.compile(rf"winnow:([0-9a-f]{{{ID_LENGTH}}})[0-9a-f]+")  # no other's: digests alone are common salts
Count = Annotated[int, Field(ge=1, lt=2**31)]


class ContextHeader(BaseModel):
    """What a context says of itself beside its tensors.

    Attributes
    ----------
    kept: entries of each layer and KV head. seen: tokens that the document had.
    layers, kv_heads, head_dim: what the tensors' shapes are.
    model: the model's architecture and sizes, and how it rotates keys (:func:`winnowkv.contexts.fit.model_fields`).
    chat: whether the document begins a turn of the model's chat template.
    turns: whether questions and answers follow the text, so that another question begins a turn of its own.
    name: what a person calls it.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format: Literal[1] = 1
    kept: Count
    seen: Count
    layers: Count
    kv_heads: Count
    head_dim: Count
    dtype: str
    model: dict[str, str | int | float | None]
    policy: str
    budget: str
    chat: bool
    turns: bool = False
    name: str


@dataclass(frozen=True)
class EnginePrompt(ABC):
    """A request to vLLM: token ids, the salt that keeps its blocks apart from all others', and the connector's parameters."""

    ids: list[int]
    salt: str

    @property
    @abstractmethod
    def kv_transfer_params(self) -> dict[str, Any]:
        """What it says to the connector."""

    @property
    def inputs(self) -> dict[str, Any]:
        """For ``vllm.LLM.generate``, beside ``SamplingParams(extra_args=prompt.extra_args)``."""
        return {"prompt_token_ids": self.ids, "cache_salt": self.salt}

    @property
    def extra_args(self) -> dict[str, Any]:
        """For ``vllm.SamplingParams``."""
        return {"kv_transfer_params": self.kv_transfer_params}

    @property
    def body(self) -> dict[str, Any]:
        """For the body of ``POST /v1/completions``."""
        return {"prompt": self.ids, "cache_salt": self.salt, "kv_transfer_params": self.kv_transfer_params}


@dataclass(frozen=True)
class ContextPrompt(EnginePrompt):
    """A request on a context; ``ids`` are placeholders, then the tokens that follow the document."""

    context: str

    @property
    def kv_transfer_params(self) -> dict[str, Any]:
        """What names the context."""
        return {CONTEXT_PARAM: self.context}


@dataclass(frozen=True)
class Context:
    """A stored context.

    Attributes
    ----------
    digest: of header and tensors, 64 hexadecimal characters; ``id`` are the first of them.
    tokens: the token ids of the document.
    bytes: of the file.
    """

    digest: str
    header: ContextHeader
    tokens: tuple[int, ...]
    bytes: int

    @property
    def id(self) -> str:
        """The name in its store."""
        return self.digest[:ID_LENGTH]

    @property
    def salt(self) -> str:
        """Enters the hash of a request's first block, so that no other prompt can be given this context's blocks."""
        return f"winnow:{self.digest}"

    @property
    def kept(self) -> int:
        """Entries of each layer and KV head."""
        return self.header.kept

    @property
    def seen(self) -> int:
        """Tokens of the document."""
        return self.header.seen

    def to_dict(self) -> dict[str, Any]:
        """What is known of it, as plain data, without the document's tokens."""
        header = self.header
        return {
            "id": self.id, "name": header.name, "kept": self.kept, "seen": self.seen, "bytes": self.bytes,
            "policy": header.policy, "budget": header.budget, "dtype": header.dtype, "chat": header.chat,
        }  # fmt: skip

    @cached_property
    def placeholders(self) -> list[int]:
        """``kept`` token ids that stand for the entries.

        Drawn from the document's own ids by the digest. So a penalty on repeated tokens sees words of the document, and a
        prompt that happens to begin with them is as unlikely as one that guesses the digest.
        """
        drawn = hashlib.shake_256(self.digest.encode()).digest(8 * self.kept)
        size = len(self.tokens)
        return [self.tokens[int.from_bytes(drawn[at : at + 8], "big") % size] for at in range(0, 8 * self.kept, 8)]

    def prompt(self, ids: Sequence[int]) -> ContextPrompt:
        """The request whose prompt goes on after the document with these token ids.

        Raises InputError if there are none: a model needs one token to answer from.
        """
        if not ids:
            raise InputError(f"context {self.id}: no token follows the document: give at least one, such as a question's")
        return ContextPrompt([*self.placeholders, *ids], self.salt, self.id)

    def rest(self, ids: Sequence[int]) -> list[int]:
        """Of the token ids of a whole prompt those after the document.

        Raises InputError if the prompt does not begin with the document, or ends with it.
        """
        same = shared_tokens(ids, self.tokens)
        if same < self.seen:
            raise InputError(
                f"the prompt is not one on context {self.id}: of the document's {self.seen} tokens it begins with {same}; put "
                "the document first, unchanged, with the system message it was stored with"
            )
        if len(ids) == self.seen:
            raise InputError(f"context {self.id}: the prompt is the document alone: ask something after it")
        return list(ids[self.seen :])

    def ask(self, tokenizer: Any, question: str) -> ContextPrompt:
        """The request that asks a question about the document. Raises InputError as :meth:`question`."""
        return self.prompt(self.question(tokenizer, question))

    def question(self, tokenizer: Any, question: str) -> list[int]:
        """Token ids of a question after the document, in the model's chat template if the document was read in it.

        Raises InputError for an empty question, and for another tokenizer.
        """
        chat = self.header.chat
        if self.header.turns:
            return next_turn(tokenizer, question, chat=chat)
        return rest_of_turn(tokenizer, text_ending(tokenizer, self.tokens, chat=chat), question, chat=chat)


def check_id(asked: Any) -> str:
    """A context's id as it was asked for. Raises InputError for what can be none."""
    if not isinstance(asked, str) or not CONTEXT_ID.fullmatch(asked):
        shown = repr(asked)[:60]
        raise InputError(f"{shown} is no context's id: ids are {ID_LENGTH} hexadecimal characters, see winnow context list")
    return asked
