"""Law 4: a left-padded batch equals the single runs, row by row, and padding is never kept."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.batch import BATCH_LENGTHS, batch_logits, padded, valid_columns
from support.cases import Case
from support.models import DEVICE, VOCABULARY, prompt
from support.reference import generate, positions, same_positions

CLOSE = {"rtol": 0, "atol": 1e-4}


def budgets(case: Case) -> list[int | float]:
    """Entries; entries that the shortest row has not got; a fraction, so that every row gets its own number."""
    return [case.budget, 50, 0.75]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["entries", "short_row_whole", "fraction"])
def test_batch_equals_single_runs(model: PreTrainedModel, case: Case, which: int) -> None:
    budget = budgets(case)[which]
    rows = [prompt(n, seed=i) for i, n in enumerate(BATCH_LENGTHS)]
    more = torch.cat([prompt(3, seed=10 + i) for i in range(3)])
    cache = wk.CompactCache(model, case.spec, budget, task=case.task)
    ids, mask = padded(rows)
    logits = batch_logits(model, cache, ids, mask, more)
    assert cache.report.prompt_tokens == list(BATCH_LENGTHS)
    singles = []
    for i, row in enumerate(rows):
        single = wk.CompactCache(model, case.spec, budget, task=case.task)
        expected = batch_logits(model, single, row, torch.ones_like(row), more[i : i + 1])
        singles.append(single)
        torch.testing.assert_close(logits[i : i + 1], expected, **CLOSE)
        assert same_positions(positions(cache, i), positions(single))
        assert cache.report.kept_entries[i] == single.report.kept_entries[0]
        same_storage(cache, i, single, whole=case.name == "full" or (budget == 50 and BATCH_LENGTHS[i] <= 50))
    assert cache.report.kept_bytes == sum(single.report.kept_bytes for single in singles)
    assert cache.report.full_bytes == sum(single.report.full_bytes for single in singles)


def same_storage(batch: wk.CompactCache, row: int, single: wk.CompactCache, whole: bool) -> None:
    """The valid columns of a row are the single run's columns, so no padding is among them."""
    for layer, alone in zip(batch.compact_layers, single.compact_layers, strict=True):
        for head in range(layer.keys.shape[1]):
            columns, theirs = valid_columns(layer, row, head), valid_columns(alone, 0, head)
            torch.testing.assert_close(layer.keys[row, head, columns], alone.keys[0, head, theirs], **CLOSE)
            torch.testing.assert_close(layer.values[row, head, columns], alone.values[0, head, theirs], **CLOSE)
        kept = alone.positions[0]
        assert alone.length == (BATCH_LENGTHS[row] if kept is None else kept.shape[-1]) + 3
        if whole:
            assert set(layer.counts(row)) == {BATCH_LENGTHS[row]}


def test_the_content_of_the_padding_changes_nothing(model: PreTrainedModel, case: Case) -> None:
    rows, more = [prompt(n, seed=i) for i, n in enumerate(BATCH_LENGTHS)], torch.cat([prompt(3, seed=9)] * 3)
    runs = []
    for filler in (0, VOCABULARY - 1):
        cache = wk.CompactCache(model, **case.settings)
        runs.append((batch_logits(model, cache, *padded(rows, filler), more), [positions(cache, i) for i in range(3)]))
    torch.testing.assert_close(runs[0][0], runs[1][0], **CLOSE)
    assert all(same_positions(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_the_cache_remembers_the_padding(llama: PreTrainedModel, case: Case) -> None:
    """Decoding without an attention mask equals decoding with it."""
    rows, more = [prompt(n, seed=i) for i, n in enumerate(BATCH_LENGTHS)], torch.cat([prompt(3, seed=9)] * 3)
    with_mask, without_mask = wk.CompactCache(llama, **case.settings), wk.CompactCache(llama, **case.settings)
    expected = batch_logits(llama, with_mask, *padded(rows), more)
    torch.testing.assert_close(batch_logits(llama, without_mask, *padded(rows), more, tell=False), expected, **CLOSE)


def test_generate_on_a_batch_equals_single_runs(model: PreTrainedModel, case: Case) -> None:
    rows = [prompt(n, seed=i) for i, n in enumerate(BATCH_LENGTHS)]
    ids, mask = padded(rows)
    with wk.compress(model, **case.settings):
        tokens = generate(model, ids, 8, attention_mask=mask)
        assert tokens == [generate(model, row, 8)[0] for row in rows]


def test_replay_of_a_batch_equals_the_live_batch(llama: PreTrainedModel, case: Case) -> None:
    ids, mask = padded([prompt(n, seed=i) for i, n in enumerate(BATCH_LENGTHS)])
    more = torch.cat([prompt(3, seed=9)] * 3)
    live, recorded = wk.CompactCache(llama, **case.settings), wk.CompactCache(llama, "full", record=120)
    expected = batch_logits(llama, live, ids, mask, more)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        llama(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=recorded)
        replayed = recorded.replay(case.spec, case.budget, task=case.task)
        logits = llama(
            input_ids=more[:, :2],
            attention_mask=torch.cat([mask, mask.new_ones(3, 2)], dim=1),
            position_ids=places[:, -1:] + torch.arange(1, 3, device=DEVICE),
            past_key_values=replayed,
        ).logits
    assert all(same_positions(positions(replayed, i), positions(live, i)) for i in range(3))
    torch.testing.assert_close(logits, expected[:, 1:3], **CLOSE)


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (slice(30, 40), "pad on the left"),  # after the prompt
        (slice(10, 12), "pad on the left"),  # inside the prompt
        (slice(0, 40), "padding only"),
    ],
    ids=["right", "hole", "all"],
)
def test_other_padding_is_refused(model: PreTrainedModel, hidden: slice, message: str) -> None:
    ids = torch.cat([prompt(40), prompt(40, seed=1)])
    mask = torch.ones_like(ids)
    mask[1, hidden] = 0
    with pytest.raises(wk.InputError, match=message), torch.no_grad():
        model(input_ids=ids, attention_mask=mask, past_key_values=wk.CompactCache(model, "snapkv:observe=4", 10))
    with wk.compress(model, "snapkv:observe=4", 10), pytest.raises(wk.InputError, match=message):
        generate(model, ids, 2, attention_mask=mask)


def test_a_ready_made_mask_is_refused(model: PreTrainedModel) -> None:
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool, device=DEVICE).tril()
    with pytest.raises(wk.InputError, match="2D"), torch.no_grad():
        model(input_ids=prompt(40), attention_mask=mask, past_key_values=wk.CompactCache(model, "snapkv:observe=4", 10))


def test_each_row_may_have_a_task_of_its_own(llama: PreTrainedModel) -> None:
    """A batch with two tasks keeps, row by row, what each prompt alone keeps with its own."""
    rows, tasks = [prompt(72), prompt(72, seed=1)], ["localization", "aggregation"]
    settings = {"policy": "windowkv:group=2", "budget": 40}
    cache = wk.CompactCache(llama, **settings, task=tasks)
    with torch.no_grad():
        llama(input_ids=torch.cat(rows), past_key_values=cache)
    for i, (row, task) in enumerate(zip(rows, tasks, strict=True)):
        single = wk.CompactCache(llama, **settings, task=task)
        with torch.no_grad():
            llama(input_ids=row, past_key_values=single)
        assert same_positions(positions(cache, i), positions(single))
    with pytest.raises(wk.InputError, match="2 tasks for a batch of 1"), torch.no_grad():
        llama(input_ids=rows[0], past_key_values=wk.CompactCache(llama, **settings, task=tasks))


def test_a_tokenizer_lets_every_row_be_classified(llama: PreTrainedModel) -> None:
    """The prompt is read back and classified, row by row, padding left out; a given task wins."""
    texts = ["Write a summary of the report. Summary:", "Question: Who was he? Answer:"]

    class Reader:
        def decode(self, ids: torch.Tensor, *, skip_special_tokens: bool = False) -> str:
            assert bool((ids > 0).all()), "padding was read"
            return texts[len(ids) < 72]

    ids = torch.cat([prompt(72), prompt(72, seed=1)])
    mask = torch.ones_like(ids)
    ids[1, :10] = mask[1, :10] = 0
    kept = []
    for options in ({"tokenizer": Reader()}, {"task": ["aggregation", "localization"]}):
        caches: list[wk.CompactCache] = []
        hook = llama.register_forward_hook(lambda *a, caches=caches: caches.append(a[-1].past_key_values))
        with wk.compress(llama, "windowkv:preset=repo:group=2:sure=0.5", 40, **options), torch.no_grad():
            llama(input_ids=ids, attention_mask=mask)
        hook.remove()
        kept.append([positions(caches[0], row) for row in range(2)])
    assert all(same_positions(a, b) for a, b in zip(*kept, strict=True))
