"""Requests whose policy looks: each decodes from its own whole cache, may draft, and then gets its row like all others.

``prompt read -> lookahead, a pass with all that look -> (draft, a step with all drafts) -> choose, evict -> a row``
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedModel

from winnowkv.cache.cache import CompactCache
from winnowkv.cache.looking import Heard, settle
from winnowkv.cache.rows import read_rows
from winnowkv.cache.session import Selections
from winnowkv.engine.drafts import Draft, Drafts
from winnowkv.engine.request import Ahead, Event, Row, free_frames
from winnowkv.engine.sampling import choose
from winnowkv.engine.slot_row import SlotRow
from winnowkv.errors import WinnowError
from winnowkv.models.devices import input_device


class Looker:
    """One choice that looks, from its first token until it has its row.

    Parameters
    ----------
    row: the choice. cache: its own, held whole until it has settled.

    Attributes
    ----------
    chosen: what stays as far as it was heard, from which a draft begins. draft: the one that runs. rounds: drafts so far.
    """

    def __init__(self, row: Row, cache: CompactCache) -> None:
        self.row, self.cache = row, cache
        self.chosen: Selections | None = None
        self.draft: Draft | None = None
        self.rounds = 0

    @property
    def settled(self) -> bool:
        """Whether what stays was decided: it waits for its row."""
        return self.cache.looking is None

    @property
    def room(self) -> int:
        """New tokens that it has not read yet."""
        layer = self.cache.compact_layers[0]
        return self.row.request.sampling.max_new_tokens - 1 - (layer.seen - layer.prompt)

    @property
    def ahead(self) -> Ahead:
        """What it holds and will need."""
        claim = self.row.request.claim
        if self.settled or claim.looking is None:
            needed = SlotRow.of(self.cache, self.room)
            return Ahead(self.cache.held_bytes, needed.columns, observe=needed.observe)
        return claim.looking

    def draft_columns(self) -> list[int]:
        """Columns that a draft from what was chosen takes of each compressed layer."""
        looking, (chosen,) = self.cache.looking, self.chosen or (None,)
        assert looking is not None
        assert chosen is not None
        return [
            looking.policy.draft + (layer.length if kept is None else kept.shape[-1] + layer.generated)
            for layer, kept in zip(self.cache.compact_layers, chosen.kept, strict=True)
        ]


class LookingSteps:
    """The steps of all lookers. Called by who has the scheduler's turn.

    Parameters
    ----------
    model: the engine's. drafts: of its scheduler.
    may_draft: whether a looker's draft may begin now; raises InputError if it never may.
    postprocess, fail: the scheduler's: continue choices with their tokens; end a looker with an error.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drafts: Drafts,
        may_draft: Callable[[Looker], bool],
        postprocess: Callable[..., list[Event]],
        fail: Callable[[Looker, BaseException], list[Event]],
    ) -> None:
        self._model, self._drafts, self._device = model, drafts, input_device(model)
        self._may_draft, self._postprocess, self._fail = may_draft, postprocess, fail

    def run(self, lookers: list[Looker]) -> list[Event]:
        """One step of each: a token from its whole cache, or a step of its draft. Those that are over it settle.

        A WinnowError ends the looker that it comes from. Any other error does, too, and is raised; one of a forward pass, of
        those that look or of the drafts, ends all that were in it.
        """
        events: list[Event] = []
        for looker in lookers:
            events += self._guarded([looker], partial(self._choose, looker))
        waiting = [looker for looker in lookers if not (looker.settled or looker.row.ended or looker.chosen)]
        if waiting:
            events += self._guarded(waiting, partial(self._look, waiting))
        drafting = {id(looker.draft): looker for looker in lookers if looker.draft is not None and not looker.row.ended}
        try:
            over = self._drafts.step()
        except BaseException as error:
            self._drafts.clear()
            self._end(list(drafting.values()), error)
            raise
        for draft in over:
            if (found := drafting.get(id(draft))) is not None:
                events += self._guarded([found], partial(self._drafted, found))
        return events

    def _guarded(self, lookers: list[Looker], do: Callable[[], list[Event]]) -> list[Event]:
        try:
            return do()
        except BaseException as error:
            events = self._end(lookers, error)
            if isinstance(error, WinnowError):
                return events
            raise

    def _end(self, lookers: list[Looker], error: BaseException) -> list[Event]:
        free_frames(error)
        return [event for looker in lookers for event in self._fail(looker, error)]

    def _choose(self, looker: Looker) -> list[Event]:
        """If enough was heard, choose what stays, and begin a draft or settle."""
        looking = looker.cache.looking
        if looking is None or looker.draft is not None or looker.row.ended or not looking.ready:
            return []
        if looker.chosen is None:
            looker.chosen = looking.choose()
            if not looking.drafts_from(looker.chosen):
                self._settle(looker, None)
                return []
        if self._may_draft(looker):
            looker.draft = self._drafts.begin(looker.cache, looker.chosen, looker.row.sampler.tokens[-1])
        return []

    def _look(self, lookers: list[Looker]) -> list[Event]:
        """One forward pass, in which each attends to its own cache as if it were alone."""
        rows = [looker.row for looker in lookers]
        newest = [row.sampler.tokens[-1] for row in rows]
        logits = read_rows(self._model, [looker.cache for looker in lookers], newest, self._device)
        return self._postprocess(rows, choose(logits, [row.sampler for row in rows]))

    def _drafted(self, looker: Looker) -> list[Event]:
        """A draft is over: choose again from the whole cache."""
        looking, draft = looker.cache.looking, looker.draft
        assert looking is not None
        assert draft is not None
        looker.draft, looker.rounds = None, looker.rounds + 1
        looker.chosen = looking.choose(draft.heard)
        if looker.rounds == looking.policy.rounds:
            self._settle(looker, draft.heard)
        return []

    def _settle(self, looker: Looker, drafted: Heard | None) -> None:
        assert looker.chosen is not None
        settle(looker.cache, looker.chosen, drafted)
        looker.row.request.note_kept(looker.cache, [looker.row])
        looker.chosen = None
