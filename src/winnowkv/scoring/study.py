"""What the queries of a study attend to, reduced while they come: a text read again has as many queries as it has tokens.

A study's queries are those of a text that is read again after an instruction to repeat it, and of what the model writes about
it. They are never held: :meth:`Studied.add` takes a forward pass's and leaves sums and maxima over them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from winnowkv.scoring.attention import group_reduce, hide_future, tiles
from winnowkv.scoring.values import TOKENS_AT_ONCE
from winnowkv.types import HeadScores, Keys, Projection, Queries, Scores, Values

AGAIN_WEIGHT = 0.7  # of the text read again beside what the model wrote about it


@dataclass(frozen=True)
class Contribution:
    """What makes attention a share of the residual stream, as in KVzip+: attention times ``values`` over ``stream``.

    values: norm of each entry's projected value, ``[Hq, S]``; stream: norm of each query's hidden state, ``[q]``.
    """

    values: Float[Tensor, "Hq S"]
    stream: Float[Tensor, " q"]


class Studied:
    """Attention on the first ``context`` tokens of one layer, float32, over all queries that came.

    Attributes
    ----------
    queries: how many came.
    total, square: sums over them of attention and of its square, ``[1, Hq, context]``.
    most: the most that one of them pays, over the GQA group, too, ``[1, Hkv, context]``; of :class:`Contribution` if given.
    entropy: ``-p log p`` summed over everything.
    """

    def __init__(self, query_heads: int, kv_heads: int, context: int, device: torch.device) -> None:
        self.queries = 0
        self.total, self.square = torch.zeros(2, 1, query_heads, context, device=device)
        self.most = torch.zeros(1, kv_heads, context, device=device)
        self.entropy = torch.zeros((), device=device)

    @property
    def context(self) -> int:
        """Tokens that are scored."""
        return self.most.shape[-1]

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer."""
        return self.most.shape[1]

    @property
    def held_bytes(self) -> int:
        """Bytes of sums and maxima."""
        return int(self.total.nbytes + self.square.nbytes + self.most.nbytes)

    def add(self, queries: Queries, keys: Keys, scale: float, share: Contribution | None = None) -> None:
        """Take in queries ``[1, Hq, q, D]``, the newest of ``keys`` ``[1, Hkv, S', D]``, which begin with the context's.

        The softmax is causal and over all keys, those of the study itself included.
        """
        count, members = queries.shape[2], queries.shape[1] // keys.shape[1]
        self.queries += count
        for _, heads, begin, logits in tiles(queries, keys, scale):
            hide_future(logits, count, begin)
            normalizer = logits.logsumexp(-1)
            seen = logits[..., : self.context]
            attention = (seen - normalizer[..., None]).exp_()
            self.entropy -= (attention * seen).sum() - (attention.sum(-1) * normalizer).sum()
            self.total[0, heads] += attention.sum(-2)
            most = attention
            if share is not None:
                most = attention / share.stream[begin : begin + attention.shape[1], None] * share.values[heads, None]
            kv = heads.start // members
            self.most[0, kv] = torch.maximum(self.most[0, kv], most.amax((0, 1)))
            self.square[0, heads] += attention.square_().sum(-2)

    def mean_square(self) -> HeadScores:
        """Mean over the queries of squared attention, ``[1, Hq, context]``."""
        mean: Tensor = self.square / max(self.queries, 1)
        return mean

    def root_mean_square(self) -> Scores:
        """Root of it, mean over each GQA group, ``[1, Hkv, context]``."""
        return group_reduce(self.mean_square().sqrt(), self.kv_heads)


def projected_lengths(values: Values, projection: Projection) -> Float[Tensor, "Hq S"]:
    """Euclidean norm of ``W_O v`` for each query head and entry, float32. ``values`` ``[1, Hkv, S, D]``.

    From the Gram matrix of each head's projection, so that no projected value is made.
    """
    weights = projection.float()
    gram = weights @ weights.transpose(-1, -2)  # [Hq, D, D]
    members = len(weights) // values.shape[1]
    found = []
    for part in values[0].float().split(TOKENS_AT_ONCE, 1):
        mine = part.repeat_interleave(members, 0)
        found.append(((mine @ gram) * mine).sum(-1).clamp(min=0).sqrt())
    return torch.cat(found, -1)


@dataclass(frozen=True)
class Evidence:
    """What a study says of one layer: attention from each source of queries, and how sources are put together.

    Attributes
    ----------
    again: of the text read again. written: of what the model wrote about it, source by source.
    maximum: whether a token scores the most that a query pays, and not the root mean square over the queries.
    """

    again: Studied
    written: tuple[Studied, ...] = ()
    maximum: bool = False

    @property
    def most(self) -> Scores:
        """The most attention that a query of any source pays, ``[1, Hkv, S]``."""
        return torch.stack([each.most for each in (self.again, *self.written)]).amax(0)

    def scores(self) -> Scores:
        """Attention of the study's queries on each token, ``[1, Hkv, S]``: :attr:`most` or the root mean square.

        The text read again counts by :data:`AGAIN_WEIGHT`, what was written by the rest; the mean over each GQA group.
        """
        if self.maximum:
            return self.most
        square = self.again.mean_square()
        if self.written:
            rest = torch.stack([each.mean_square() for each in self.written]).mean(0)
            square = square * AGAIN_WEIGHT + rest * (1 - AGAIN_WEIGHT)
        return group_reduce(square.sqrt(), self.again.kv_heads)

    def pooled(self, scores: Scores, weight: float) -> Scores:
        """The study's scores and a policy's own, ``[1, H, C]``, which count by ``1 - weight``.

        Both are brought to the sum that the study's have over the layer: by it layers are compared.
        """
        found = self.scores()[..., : scores.shape[-1]]
        if scores.shape[1] == 1:
            found = found.mean(1, keepdim=True)
        found = found.repeat_interleave(scores.shape[1] // found.shape[1], 1)
        return found * weight + scores * ((1 - weight) * found.sum() / scores.sum().clamp(min=1e-30))
