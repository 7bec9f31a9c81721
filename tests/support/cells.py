"""What is tried with every family of models: the columns of docs/support.md. Each check raises if its law does not hold."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support import chunks
from support.batch import BATCH_LENGTHS, batch_logits, padded
from support.families import Family
from support.models import PROMPT, prompt
from support.own_attention import kept_of, own_logits
from support.reference import chunked, compact_logits, generate, positions, same_positions
from support.slots import LENGTHS, alone, assert_same, more, read, together
from winnowkv.cache.reading import prefill
from winnowkv.engine.slots import Slots

SNAP = "snapkv:observe=8:kernel=3"
SETTINGS: dict[str, object] = {"policy": SNAP, "budget": 20}
CLOSE = {"rtol": 0, "atol": 1e-4}
WORKS = "works"


def equal(model: PreTrainedModel, family: Family) -> None:
    """A budget that covers the prompt gives the uncompressed generation."""
    ids = prompt(40)
    expected = generate(model, ids, 8)
    with wk.compress(model, SNAP, 40):
        assert generate(model, ids, 8) == expected, "other tokens than without compression"


def block(model: PreTrainedModel, family: Family) -> None:
    """A compress block keeps as many entries as asked in every layer, holds no more bytes, and leaves the model as it was."""
    before = model.config._attn_implementation
    with wk.compress(model, SNAP, 20) as run:
        generate(model, prompt(PROMPT), 4)
    assert run.report.kept_entries == [[20] * (family.kept or 0)], f"kept {run.report.kept_entries}"
    assert run.report.held_bytes == run.report.kept_bytes < run.report.full_bytes
    assert run.report.decode_tokens == 3, f"{run.report.decode_tokens} tokens after the prompt were counted, not 3"
    assert model.config._attn_implementation == before


def padded_batch(model: PreTrainedModel, family: Family) -> None:
    """The rows of a left-padded batch compute and keep what each computes and keeps alone."""
    rows = [prompt(n, seed=i) for i, n in enumerate(BATCH_LENGTHS)]
    after = torch.cat([prompt(3, seed=10 + i) for i in range(3)])
    cache = wk.CompactCache(model, **SETTINGS)
    logits = batch_logits(model, cache, *padded(rows), after)
    for i, row in enumerate(rows):
        single = wk.CompactCache(model, **SETTINGS)
        expected = batch_logits(model, single, row, torch.ones_like(row), after[i : i + 1])
        torch.testing.assert_close(logits[i : i + 1], expected, **CLOSE)
        assert same_positions(positions(cache, i), positions(single)), "a row keeps other entries than alone"


def against_reference(model: PreTrainedModel, sizes: Sequence[int]) -> None:
    """Logits of further tokens, in passes of these sizes, equal masked attention over the full cache; and eviction shows."""
    ids, after = prompt(PROMPT), prompt(sum(sizes), seed=1)
    cache = wk.CompactCache(model, **SETTINGS)
    with torch.no_grad():
        logits = compact_logits(model, cache, ids, chunked(after, sizes))
    kept = kept_of(cache)
    del cache
    if not exact(model, [PROMPT, *sizes]):
        raise AsTransformersError
    torch.testing.assert_close(logits, own_logits(model, ids, after, kept), **CLOSE)
    whole = own_logits(model, ids, after, {})
    assert (logits[1:] - whole[1:]).abs().max() > 1e-3, "what was evicted is still seen"


class AsTransformersError(Exception):
    """The framework's own cache does not keep this law with this model, and ours gives what it gives."""


@torch.no_grad()
def exact(model: PreTrainedModel, sizes: Sequence[int]) -> bool:
    """Whether transformers' own cache, read into in passes of these sizes, gives the logits of one pass.

    Raises AssertionError if a compact cache that keeps everything does not give what that one gives.
    """
    ids, own, ours, cache, compact = prompt(sum(sizes)), [], [], None, wk.CompactCache(model, "full", 1.0)
    for part in chunked(ids, sizes):
        output = model(input_ids=part, past_key_values=cache, use_cache=True)
        own.append(output.logits)
        cache = output.past_key_values
        ours.append(model(input_ids=part, past_key_values=compact, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(ours, 1), torch.cat(own, 1), **CLOSE)
    return bool((torch.cat(own, 1) - model(input_ids=ids).logits).abs().max() < CLOSE["atol"])


def eviction(model: PreTrainedModel, family: Family) -> None:
    """Decoding over what was kept equals masked attention over the full cache."""
    against_reference(model, [1, 1, 2, 1])


def in_chunks(model: PreTrainedModel, family: Family) -> None:
    """A prompt read in chunks keeps and computes what it does when it is read at once."""
    whole, parts = (wk.CompactCache(model, SNAP, 40, keep_scores=True) for _ in range(2))
    chunks.read(model, parts, chunk=chunks.CHUNK)
    chunks.read(model, whole)
    if not exact(model, [8, 64, 64, 64]):
        raise AsTransformersError
    chunks.assert_same(model, parts, whole, CLOSE)


def turns(model: PreTrainedModel, family: Family) -> None:
    """A second turn, a few answered tokens later, equals masked attention over the full cache."""
    against_reference(model, [1, 1, 1, 12, 1, 1])


def slots(model: PreTrainedModel, family: Family) -> None:
    """Requests side by side in slots compute what each computes alone."""
    expected = [alone(model, row, SETTINGS) for row in range(len(LENGTHS))]
    assert_same(together(model, Slots(model), SETTINGS, 3), expected)


def compiled_slots(model: PreTrainedModel, family: Family) -> None:
    """A step of two requests, compiled as one graph, computes what each computes alone."""
    at = [0, 2]
    lookup = torch._dynamo.lookup_backend
    with patch.object(torch._dynamo, "lookup_backend", lambda name: lookup("eager" if name == "inductor" else name)):
        compare_compiled(model, at)


def compare_compiled(model: PreTrainedModel, at: Sequence[int]) -> None:
    made = Slots(model, compile=True)
    made.place_all([read(model, row, SETTINGS) for row in at], 8)
    steps = [made.step(torch.cat([more(row)[0, step : step + 1] for row in at])) for step in range(3)]
    assert_same([torch.stack(lines) for lines in zip(*steps, strict=True)], [alone(model, row, SETTINGS)[:3] for row in at])


def save(model: PreTrainedModel, family: Family) -> None:
    """A saved and loaded cache goes on with the same logits."""
    cache = wk.CompactCache(model, **SETTINGS)
    prefill(model, prompt(PROMPT), cache)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        wk.save_cache(cache, model, Path(folder) / "cache.safetensors")
        loaded = wk.load_cache(Path(folder) / "cache.safetensors", model)
        got, expected = (model(prompt(4, seed=1), past_key_values=each).logits for each in (loaded, cache))
    torch.testing.assert_close(got, expected, **CLOSE)


def look(model: PreTrainedModel, family: Family) -> None:
    """With lookahead, a draft and refit the first tokens are the full cache's, and then every layer keeps its budget."""
    ids = prompt(PROMPT)
    expected = generate(model, ids, 5)
    with wk.compress(model, f"{SNAP}:lookahead=4:draft=3:refit=true", 20) as run:
        tokens = generate(model, ids, 9)
    assert [row[:5] for row in tokens] == expected, "other first tokens than without compression"
    report = run.report
    assert report.kept_entries == [[20] * (family.kept or 0)], f"kept {report.kept_entries}"
    assert (report.lookahead_tokens, report.draft_tokens, report.decode_tokens) == (4, 3, 8)


CELLS: dict[str, Callable[[PreTrainedModel, Family], None]] = {
    "equal": equal, "block": block, "batch": padded_batch, "eviction": eviction, "chunks": in_chunks, "turns": turns,
    "slots": slots, "compile": compiled_slots, "save": save, "look": look,
}  # fmt: skip


def outcome(family: Family, cell: str) -> str:
    """``works``, ``refused: <our sentence>``, or ``FAILS: <what was wrong>``, of a model made for this check alone."""
    try:
        model = family.build()
        with named_warnings() as said:
            CELLS[cell](model, family)
    except AsTransformersError:
        return "transformers: its own cache gives other logits than one pass, too"
    except wk.WinnowError as error:
        return f"refused: {one_sentence(error)}"
    except Exception as error:
        return f"FAILS: {type(error).__name__}: {one_sentence(error)}"
    fallback = next((text for text in said if "decode steps are eager" in text), None)
    return WORKS if fallback is None else f"refused: {fallback}"


@contextmanager
def named_warnings() -> Iterator[list[str]]:
    """The texts of the warnings that come up inside."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [one_sentence(warning.message) for warning in caught]


def one_sentence(error: object) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split()) if lines else type(error).__name__
