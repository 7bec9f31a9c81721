"""From a text to a stored context: what was asked is checked before anything is read, then it is read, then it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from winnowkv.budget import DEFAULT_BUDGET, Budget
from winnowkv.cache.listening import Progress
from winnowkv.cache.study import INSTRUCTION_TOKENS, Study, fitted
from winnowkv.contexts.defaults import EQUAL_BLIND_POLICY, EQUAL_HINTED_POLICY
from winnowkv.contexts.export import VLLM_BLOCK, whole_blocks
from winnowkv.contexts.flat import EQUAL_POLICIES, context_rotation
from winnowkv.documents import BLIND_POLICY, HINTED_POLICY, STUDIED_POLICY, Document, read, studied
from winnowkv.errors import InputError, PolicyError
from winnowkv.policies import Policy, policy as make_policy
from winnowkv.policies.studied import StudiedPolicy
from winnowkv.prompt.chat import open_turn, rest_of_turn, text_ending, uses_chat
from winnowkv.types import Between

NO_ROOM = "the model has no positions left to read the document again: a hint says what must not be lost"


@dataclass(frozen=True)
class ContextPlan:
    """A text that may be read as it was asked for. :func:`plan_context` makes one.

    Attributes
    ----------
    tokens: of the text, the template's before it included. hint_tokens: of the hint, which are taken back.
    portable: whether every layer and head keeps equally many, for engines with one block table.
    notes: what the user should know, in sentences.
    """

    model: PreTrainedModel
    tokenizer: Any
    text: str
    tokens: int
    policy: Policy
    budget: Budget
    portable: bool
    study: Study | None = None
    hint: str | None = None
    hint_tokens: int = 0
    system: str | None = None
    chat: bool | None = None
    notes: tuple[str, ...] = ()

    @property
    def entries(self) -> int:
        """Entries that will be kept per layer and KV head, mean over them; of a budget ``auto`` the most that it may be."""
        return self.tokens if self.budget.target is not None else min(self.budget.entries(self.tokens), self.tokens)

    @property
    def held_tokens(self) -> int:
        """Most tokens whose keys and values are held while the text is read and studied."""
        if self.study is None:
            return self.tokens + self.hint_tokens
        again = min(self.study.chunk, self.tokens) + INSTRUCTION_TOKENS
        return self.tokens + max(again, self.study.tokens + INSTRUCTION_TOKENS)

    def read(self, *, progress: Progress | None = None, between: Between | None = None) -> Document:
        """Read and compress the text. Raises as :func:`winnowkv.read`."""
        return read(
            self.model, self.tokenizer, self.text, self.policy, self.budget, hint=self.hint, system=self.system,
            chat=self.chat, study=self.study, decode_budget=None, progress=progress, between=between,
        )  # fmt: skip


def plan_context(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    *,
    policy: str | None = None,
    budget: Budget | int | float | str = DEFAULT_BUDGET,
    study: str | None = None,
    hint: str | None = None,
    system: str | None = None,
    chat: bool | None = None,
    portable: bool = True,
    block: int = VLLM_BLOCK,
) -> ContextPlan:
    """Check what was asked for a text.

    Parameters
    ----------
    policy, budget, hint, system, chat: as for :func:`winnowkv.read`; the policy of a portable context keeps equally many in all
        layers and heads, and its budget is rounded up to whole blocks.
    study: ``none``, ``lean`` or ``full``; None is ``lean``, if there is neither policy nor hint and the model has room for it.
    block: tokens of a block of the other engine's cache.

    Raises
    ------
    InputError, PolicyError, BudgetError, UnsupportedModelError
        For whatever cannot be read or stored as it was asked.
    """
    if portable:
        context_rotation(model)
    templated = uses_chat(chat, tokenizer)
    ids = open_turn(tokenizer, text, chat=templated, system=system)
    asked, notes = _study(model, len(ids), policy, hint, study)
    blind, hinted = (EQUAL_BLIND_POLICY, EQUAL_HINTED_POLICY) if portable else (BLIND_POLICY, HINTED_POLICY)
    if asked is not None and not portable:
        blind = STUDIED_POLICY
    made = make_policy(policy or (blind if hint is None else hinted))
    kept = Budget.of(whole_blocks(len(ids), budget, block) if portable else budget)
    if portable and kept.entries(len(ids)) < len(ids):
        check_equal(made, is_studied=asked is not None or made.needs_study)
    asked = studied(model, made, kept, asked, tokens=len(ids), hint=hint, ceiling=None)
    asking = [] if hint is None else rest_of_turn(tokenizer, text_ending(tokenizer, ids, chat=templated), hint, chat=templated)
    return ContextPlan(
        model, tokenizer, text, len(ids), made, kept, portable, study=asked, hint=hint, hint_tokens=len(asking),
        system=system, chat=chat, notes=notes,
    )  # fmt: skip


def check_equal(made: Policy, *, is_studied: bool) -> None:
    """Raise PolicyError for a policy that may keep different numbers of entries in layers and heads."""
    if made.evicts and not (StudiedPolicy(of=made) if is_studied else made).keeps_equal:
        raise PolicyError(
            f"{made.spec} may keep different numbers of entries in layers and heads{' of a text that is studied' * is_studied}"
            f", a context needs the same number in all: use {'a policy with equal=true' if is_studied else EQUAL_POLICIES}"
        )


def _study(
    model: PreTrainedModel, tokens: int, policy: str | None, hint: str | None, study: str | None
) -> tuple[Study | None, tuple[str, ...]]:
    """How the text is to be studied, and what is to be said about that."""
    if study is not None or policy is not None or hint is not None:
        return (None if study in (None, "none") else Study.of(study)), ()
    try:
        return fitted(Study.of("lean"), model, tokens), ()
    except InputError:
        return None, (NO_ROOM,)
