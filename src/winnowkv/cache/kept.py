"""What was kept of one prompt, as plain data: which layers and KV heads keep which tokens, and what decided.

:class:`KeptTokens` outlives the cache: :func:`note_kept` takes references to a cache's small tensors of positions (and, with
``keep_scores``, to what was chosen), and copies them to the CPU only when they are asked for. A selection in this package is
what decides (cache/selection.py); this is what came of it. Files of it: cache/kept_file.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from winnowkv.cache.explain import Choices, Competition, Reason, check_range, competition, head_scores
from winnowkv.cache.looking import check_chosen
from winnowkv.errors import CacheError, InputError

if TYPE_CHECKING:
    from winnowkv.cache.cache import CompactCache

REASONS: tuple[Reason, ...] = get_args(Reason)  # a reason's number is its place here
SCORE_DIGITS = 4  # of scores in JSON


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """What was kept of one prompt of ``S`` tokens, padding not counted.

    Attributes
    ----------
    policy, budget: as they were asked.
    tokens, layers, heads: ``S``; compressed layers; KV heads of a layer (of this process, if several share them and scores
        were not kept).
    positions: of each layer the prompt positions kept, ascending int32 ``[1 or heads, n]``, -1 in front of a shorter head's;
        one row if all heads keep the same; None if the layer keeps all.
    ids: token ids; None for a prompt that was given as embeddings.
    reasons: with scores only, of each layer uint8 ``[1 or heads, S]``: what decided, as a place in :data:`REASONS`.
    scores: with scores only, of each layer float32 ``[1 or heads, S]``; not a number where a token does not compete.
    thresholds: with scores only, of each layer float32 ``[1 or heads]``: the lowest score that stayed by itself, not a number
        if none did.
    """

    policy: str
    budget: int | float | str
    tokens: int
    heads: int
    positions: tuple[Tensor | None, ...]
    ids: tuple[int, ...] | None = None
    reasons: tuple[Tensor, ...] | None = None
    scores: tuple[Tensor, ...] | None = None
    thresholds: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, cache: CompactCache, ids: Sequence[int] | Tensor | None = None, row: int = 0) -> KeptTokens:
        """What a cache kept of the prompt that was read into it; the cache may go afterwards.

        Parameters
        ----------
        ids: the prompt's token ids, of this row, without padding.
        row: of the batch as it was read if scores were kept, else as the cache holds it now.

        Raises CacheError before a prompt was read and while it is held whole (lookahead), InputError for a row that is not
        there, and for ids of another length.
        """
        noted = note_kept(cache)
        check_range("row", row, noted.rows)
        given = None if ids is None else torch.as_tensor(ids).flatten().tolist()
        if given is not None and len(given) != (tokens := noted.tokens[row]):
            raise InputError(
                f"{len(given)} token ids were given, the prompt of row {row} has {tokens}: give it without padding"
            )
        return noted.kept(row, given)

    @property
    def layers(self) -> int:
        """Compressed layers."""
        return len(self.positions)

    @property
    def entries(self) -> list[list[int]]:
        """Entries kept, of each layer and head: each layer's part of the budget."""
        counts = []
        for held in self.positions:
            each = [self.tokens] if held is None else (held >= 0).sum(-1).tolist()
            counts.append(each * (self.heads // len(each)))
        return counts

    @property
    def kept_fraction(self) -> float:
        """Entries kept over all entries of the prompt."""
        return sum(map(sum, self.entries)) / (self.tokens * self.heads * self.layers)

    def kept_in(self, layer: int) -> Tensor:
        """Which tokens a layer keeps, bool ``[1 or heads, S]``."""
        check_range("layer", layer, self.layers)
        held = self.positions[layer]
        if held is None:
            return torch.ones(1, self.tokens, dtype=torch.bool)
        stays = torch.zeros(len(held), self.tokens + 1, dtype=torch.bool)
        # A missing entry, -1, goes into the column after all others.
        return stays.scatter_(1, held.long().remainder(self.tokens + 1), True)[:, : self.tokens]

    def layer_counts(self) -> Tensor:
        """Of each token the layers in which at least one head keeps it, int64 ``[S]``."""
        return torch.stack([self.kept_in(layer).any(0) for layer in range(self.layers)]).sum(0)

    def head_counts(self) -> Tensor:
        """Of each token the heads of all layers that keep it, int64 ``[S]``; at most ``layers * heads``."""
        each = (self.kept_in(layer) for layer in range(self.layers))
        return torch.stack([stays.sum(0) * (self.heads // len(stays)) for stays in each]).sum(0)

    def reason_counts(self) -> dict[str, int]:
        """How many tokens of all layers and heads each part decided on; empty without scores."""
        counts = dict.fromkeys(REASONS, 0)
        for part in self.reasons or ():
            for number, count in enumerate(part.flatten().long().bincount(minlength=len(REASONS)).tolist()):
                counts[REASONS[number]] += count * (self.heads // len(part))
        return {name: count for name, count in counts.items() if count}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON, scores with four digits: :class:`winnowkv.cache.kept_file.KeptJson`."""
        from winnowkv.cache.kept_file import to_dict

        return to_dict(self)

    def save(self, path: str | Path) -> None:
        """Write a ``.json`` or ``.safetensors`` file, whole or not at all; a file that is there is replaced.

        Raises InputError for another ending, and for a path that cannot be written.
        """
        from winnowkv.cache.kept_file import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> KeptTokens:
        """Read what :meth:`save` wrote. Raises InputError, in one sentence, for any other file."""
        from winnowkv.cache.kept_file import load

        return load(Path(path))


@dataclass(frozen=True, eq=False)
class NotedPrompt:
    """What a cache, or a padded batch in one, held when its prompt was read: references to what no later step changes.

    Attributes
    ----------
    tokens: of each row. positions: of each layer and row, as :attr:`CompactLayer.positions`. choices: if scores were kept.
    ids: ``[B, S]``, padded on the left.
    """

    policy: str
    budget: int | float | str
    heads: int
    tokens: tuple[int, ...]
    positions: tuple[tuple[Tensor | None, ...], ...]
    choices: Choices | None
    ids: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.tokens)

    def kept(self, row: int, ids: Sequence[int] | None = None) -> KeptTokens:
        """What was kept of one row, on the CPU."""
        if ids is None and self.ids is not None:
            ids = self.ids[row, -self.tokens[row] :].tolist()
        known = None if ids is None else tuple(ids)
        if self.choices is not None:
            return _explained(self, self.choices, row, known)
        positions = tuple(None if layer[row] is None else layer[row].cpu() for layer in self.positions)  # type: ignore[union-attr]
        return KeptTokens(self.policy, self.budget, self.tokens[row], self.heads, positions, known)


def note_kept(cache: CompactCache, ids: Tensor | None = None) -> NotedPrompt:
    """Note what a cache keeps of the prompt that was read into it; copies nothing but ``ids`` ``[B, S]``, padded on the left.

    Raises CacheError before a prompt was read, in the middle of one, and while it is held whole.
    """
    layers = cache.compact_layers
    if cache.session is not None or not layers[0].prompt:
        raise CacheError("what was kept is known once a prompt is read, and none was read into this cache: read one first")
    check_chosen(cache, "described")
    choices: Choices | None = cache._choices
    tokens = tuple(layers[0].prompt - pad for pad in layers[0].pads)
    if choices is not None:  # rows as they were read, whatever beams made of them since
        tokens = tuple(cache.report.prompt_tokens)
    known = ids.detach().clone() if ids is not None and len(ids) == len(tokens) else None
    return NotedPrompt(
        cache.report.policy, cache.report.budget, layers[0].keys.shape[1], tokens,
        tuple(tuple(layer.positions) for layer in layers), choices, known,
    )  # fmt: skip


def _explained(noted: NotedPrompt, choices: Choices, row: int, ids: tuple[int, ...] | None) -> KeptTokens:
    """What was kept of one row, with scores and what decided."""
    selection, tokens = choices.selections[row], noted.tokens[row]
    held = None if choices.held is None else choices.held.cpu().long()
    positions: list[Tensor | None] = []
    reasons, scores, thresholds = [], [], []
    for layer, chosen in enumerate(selection.kept):
        if chosen is None:
            positions.append(None if held is None else held[held < tokens][None].int())
            reasons.append(_spread(torch.full((1, 1), REASONS.index("everything kept")), held, tokens))
            scores.append(torch.full((1, tokens), torch.nan))
            thresholds.append(torch.full((1,), torch.nan))
            continue
        kept, scored = chosen[0].cpu(), head_scores(selection, layer).cpu()
        heads = [
            competition(selection, scored[h % len(scored)], kept[h % len(kept)]) for h in range(max(len(scored), len(kept)))
        ]
        positions.append(_text_positions(kept.long(), held, tokens))
        reasons.append(_spread(torch.stack([reasons_of(head) for head in heads]), held, tokens))
        scores.append(_spread_scores(torch.stack([_shown_scores(head) for head in heads]), held, tokens))
        thresholds.append(torch.tensor([torch.nan if head.threshold is None else head.threshold for head in heads]))
    return KeptTokens(
        noted.policy, noted.budget, tokens, selection.bound.model.kv_heads, tuple(positions), ids,
        tuple(reasons), tuple(scores), tuple(thresholds),
    )  # fmt: skip


def reasons_of(head: Competition) -> Tensor:
    """What decided on each place that a head held, ``[S]``; as :meth:`CompactCache.explain` says of one."""
    competing, stays = len(head.scores), head.stays
    found = torch.full(stays.shape, REASONS.index("evicted"))
    # From the weakest to the strongest: a later one takes the place of an earlier one.
    found[:competing][stays[:competing]] = REASONS.index("its span")
    found[:competing][head.winners] = REASONS.index("score")
    found[stays & head.shared] = REASONS.index("shared by all layers")
    found[: head.sinks][stays[: head.sinks]] = REASONS.index("sink")
    found[competing:][stays[competing:]] = REASONS.index("recent window")
    found[stays & head.protected] = REASONS.index("protected")
    return found


def _shown_scores(head: Competition) -> Tensor:
    """A head's scores at all places ``[S]``, as an explanation shows them: none where nothing competes, or is protected."""
    shown = torch.full(head.stays.shape, torch.nan)
    shown[: len(head.scores)] = head.scores
    return shown.masked_fill_(head.stays & head.protected, torch.nan)


def _text_positions(kept: Tensor, held: Tensor | None, tokens: int) -> Tensor:
    """Places ``[H, n]`` among what was held as positions of the text; those of a hint, at its end, left out."""
    found = kept if held is None else held[kept.clamp(min=0)].masked_fill(kept < 0, -1)
    past = int((found >= tokens).any(0).sum())
    return found[:, : found.shape[1] - past].int()


def _spread(reasons: Tensor, held: Tensor | None, tokens: int) -> Tensor:
    """Reasons at all ``tokens`` of the text, of those at the places that were held (or one for all of them)."""
    rows = len(reasons)
    if held is None:
        return reasons.expand(rows, max(tokens, reasons.shape[1]))[:, :tokens].to(torch.uint8).clone()
    spread = torch.full((rows, max(tokens, int(held[-1]) + 1)), REASONS.index("evicted between chunks"))
    spread[:, held] = reasons.expand(rows, len(held))
    return spread[:, :tokens].to(torch.uint8)


def _spread_scores(scores: Tensor, held: Tensor | None, tokens: int) -> Tensor:
    """The same of scores."""
    if held is None:
        return scores[:, :tokens].clone()
    spread = torch.full((len(scores), max(tokens, int(held[-1]) + 1)), torch.nan)
    spread[:, held] = scores
    return spread[:, :tokens].clone()
