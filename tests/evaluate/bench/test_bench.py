"""``winnow bench``: every cell is measured once and completely; statistics on a clock of our own, targets on made-up lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import PROMPT, hybrid, prompt
from support.tokenizers import Letters
from winnowkv.attention.routing import is_routed
from winnowkv.evaluate.bench import (
    bench as runner,
    caches as bench_caches,
    cells as bench_cells,
    clock as bench_clock,
    plots as bench_plots,
    summary as bench_summary,
)
from winnowkv.evaluate.needle.prompts import PromptBuilder, read_haystack
from winnowkv.evaluate.settings import settings

SNAP = "snapkv:observe=8:kernel=3"
SPREAD = {"median", "low", "high", "least", "most", "count"}
ENTRY = 5 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, head size, bytes of float32
CPU = torch.device("cpu")


def ticking(*seconds: float) -> Callable[[], float]:
    """A clock that is read twice a piece of work, between which so many seconds pass, piece by piece."""

    def readings() -> Iterator[float]:
        now = 0.0
        for each in seconds:
            yield now
            now += each
            yield now

    return readings().__next__


def make(policies: tuple[str, ...] = (SNAP,), budgets: tuple[Any, ...] = (0.25,), **more: Any) -> runner.Bench:
    asked: dict[str, Any] = {
        "contexts": [300, 500], "batches": [1, 3], "rounds": 2, "steps": 3, "kv_memory": 600 * ENTRY * 2, "serve_context": 400,
        "new_tokens": 40, "requests": 10,
    }  # fmt: skip
    return runner.Bench(settings(policies, budgets), **{**asked, **more})


def go(bench: runner.Bench, model: PreTrainedModel, folder: Path, advance: Callable[[str], None] = print) -> dict[str, Any]:
    haystack = read_haystack()
    builder = PromptBuilder(Letters(), haystack, chat=False)
    bench.check(model, builder)
    store = runner.open_store(folder, model, "tiny", builder, bench)
    try:
        runner.run(bench, model, Letters(), builder, haystack, store, advance)
    finally:
        summary = bench_summary.write_summary(bench, store, "tiny")
        store.close()
    return summary


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One bench over everything, and its folder."""
    from support.models import tiny_model

    folder = tmp_path_factory.mktemp("bench")
    return go(make((SNAP, "full")), tiny_model("llama"), folder), folder


def test_every_cell_is_measured_once_and_written(done: tuple[dict[str, Any], Path]) -> None:
    summary, folder = done
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert len(lines) == len({runner.identity(line) for line in lines}) == summary["lines"] == summary["expected_lines"]
    kinds = {kind: len(summary[kind]) for kind in bench_summary.KINDS}
    # Two settings: each at two contexts, with two batches; what evicts nothing has no equal kept entries.
    assert kinds == {"prefill": 4, "decode": 8, "flat": 1, "serve": 2, "growth": 2}
    assert json.loads((folder / "bench.json").read_text()) == json.loads(json.dumps(summary))
    for name in ("decode.png", "throughput.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    for line in lines:
        assert set(line["versions"]) >= {"winnowkv", "torch", "transformers"}


def test_prefill_is_paired_and_counts_bytes(done: tuple[dict[str, Any], Path]) -> None:
    for line in done[0]["prefill"]:
        tokens = line["prompt_tokens"]
        assert tokens == line["context"]
        for name in ("prefill_s", "plain_s", "over_plain", "compress_s", "compress_share"):
            assert set(line[name]) == SPREAD
            assert line[name]["count"] == 2
            assert line[name]["least"] > 0
        assert line["full_bytes"] == tokens * ENTRY
        assert line["kept_bytes"] == (tokens // 4 if line["policy"] == SNAP else tokens) * ENTRY
        assert line["kept_entries"] == line["kept_bytes"] / ENTRY
        assert line["peak_memory"] >= line["kv_peak_bytes"]


def test_decode_steps_every_cache_equally_often(done: tuple[dict[str, Any], Path]) -> None:
    for line in done[0]["decode"]:
        caches = {"slots", "native", "dynamic"} | ({"static", "quantized"} if line["batch"] == 1 else set())
        assert set(line["ms"]) == caches - set(line["skipped"])
        assert set(line["over"]) == set(line["ms"]) - {"slots"}
        assert set(line["skipped"]) <= {"quantized"}  # where optimum-quanto is not installed
        assert {spread["count"] for spread in [*line["ms"].values(), *line["over"].values()]} == {3}
        for name, took in line["ms"].items():
            assert line["tokens_s"][name] == pytest.approx(1000 * line["batch"] / took["median"])
        added = bench_cells.WARMUP_STEPS - 1 + 3  # warm and counted steps; slots take one more, the first
        assert line["kv_bytes"]["dynamic"] == line["batch"] * (line["prompt_tokens"] + added) * ENTRY
        assert line["kv_bytes"]["native"] == line["batch"] * (line["entries"] + added) * ENTRY
        if line["policy"] == SNAP:
            assert line["kv_bytes"]["slots"] < line["kv_bytes"]["dynamic"] / 2
        if "static" in line["ms"]:
            assert line["kv_bytes"]["static"] == (line["prompt_tokens"] + added + 1) * ENTRY
        if "quantized" in line["ms"]:
            assert 0 < line["kv_bytes"]["quantized"] < line["kv_bytes"]["static"]


def test_serving_fills_the_memory_and_grows_none(done: tuple[dict[str, Any], Path]) -> None:
    summary = done[0]
    snap, full = summary["serve"]
    memory = snap["kv_memory"]
    assert snap["plain_fits"] == full["plain_fits"] == memory // (440 * ENTRY) == 2
    assert full["fits"] in (1, 2)  # what reading a prompt takes comes on top
    assert snap["fits"] > 3 * full["fits"]
    for line in (snap, full):
        assert line["kv_bytes"] <= memory
        assert set(line["speedup"]) == SPREAD
    for line in summary["growth"]:
        assert (line["requests"], line["first"]) == (10, 5)
        assert line["growth"] == line["held_all"] / line["held_first"] - 1 or "skipped" in line


@pytest.mark.slow
def test_a_bench_continues_where_it_stopped(llama: PreTrainedModel, tmp_path: Path) -> None:
    bench, told = make(contexts=[300], requests=0, batches=[1]), []

    def stop_at_two(what: str) -> None:
        told.append(what)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(bench, llama, tmp_path, stop_at_two)
    before = (tmp_path / "results.jsonl").read_text()
    assert json.loads((tmp_path / "bench.json").read_text())["lines"] == 2
    told.clear()
    summary = go(bench, llama, tmp_path, told.append)
    assert told[:2] == ["done before"] * 2
    assert "done before" not in told[2:]
    assert (tmp_path / "results.jsonl").read_text().startswith(before)
    assert summary["lines"] == summary["expected_lines"] == 3
    with pytest.raises(wk.InputError, match="holds results of another run"):
        go(replace(bench, rounds=5), llama, tmp_path)


def test_compiled_steps_have_cells_of_their_own() -> None:
    cells = make(compile=True).cells()
    assert [cell["context"] for cell in cells if cell["kind"] == "decode" and cell["compiled"]] == [300, 500]
    assert [cell["compiled"] for cell in cells if cell["kind"] == "serve"] == [False, True]
    assert len({runner.identity(cell) for cell in cells}) == len(cells)


def test_the_order_of_turns_rotates() -> None:
    calls: list[str] = []
    clock = bench_clock.Clock(CPU, ticking(*range(1, 10)))
    took = clock.turns({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=2, warm=1)
    assert "".join(calls) == "abcbcacab"
    assert took == {"a": [6, 8], "b": [4, 9], "c": [5, 7]}  # the first round is not counted


def test_spread_and_ratio_of_pairs() -> None:
    assert bench_clock.spread([4, 1, 3, 2, 5]) == {"median": 3, "low": 2, "high": 4, "least": 1, "most": 5, "count": 5}
    assert bench_clock.spread([7.0]) == dict.fromkeys(SPREAD, 7.0) | {"count": 1}
    # The median of the ratios, 3, and not the ratio of the medians, 2.
    assert bench_clock.ratio([3, 2, 4], [1, 4, 1])["median"] == 3


def test_the_plain_model_shares_weights_and_is_never_routed(model: PreTrainedModel) -> None:
    plain = bench_caches.plain_copy(model)
    assert all(mine is theirs for mine, theirs in zip(plain.parameters(), model.parameters(), strict=True))
    cache = wk.CompactCache(model, "full", 1)
    assert is_routed(model)
    assert not is_routed(plain)
    assert plain.config._attn_implementation == "sdpa"
    ids = prompt(PROMPT)
    assert torch.equal(plain(ids).logits, bench_caches.plain_copy(plain)(ids).logits)
    del cache


def test_copies_decode_as_what_they_were_copied_from(model: PreTrainedModel) -> None:
    """What is timed are real caches: each row of each gives the logits of a model that reads the whole text."""
    ids = prompt(PROMPT)
    source = bench_caches.PromptCaches(model, bench_caches.plain_copy(model), Letters(), ids[0].tolist())
    token = torch.tensor([5, 5])
    wanted = source.plain(torch.cat([ids, token[:1, None]], 1)).logits[0, -1]
    slots = source.slots("full", 1, 2, 4)
    assert torch.allclose(slots.step(token), wanted, atol=1e-5)
    for cache, rows in ((source.dynamic(2), 2), (source.static(4), 1)):
        logits = source.plain(token[:rows, None], past_key_values=cache).logits[:, -1]
        assert torch.allclose(logits, wanted, atol=1e-5)
    assert source.dynamic(1).get_seq_length() == PROMPT  # a copy went on, the original did not


def test_a_static_cache_of_sliding_layers_is_refused_and_slots_serve_them() -> None:
    model = hybrid()
    source = bench_caches.PromptCaches(model, bench_caches.plain_copy(model), Letters(), prompt(PROMPT)[0].tolist())
    with pytest.raises(wk.WinnowError, match="sliding-window layers"):
        source.static(4)
    logits = source.slots("full", 1, 1, 4).step(torch.tensor([5]))
    assert torch.allclose(logits, source.plain(torch.tensor([[5]]), past_key_values=source.dynamic(1)).logits[:, -1], atol=1e-5)


@pytest.mark.slow
def test_cells_that_do_not_fit_into_memory_are_left_out_with_the_sizes(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(contexts=[500], batches=[3], requests=0)
    monkeypatch.setattr(bench_cells, "free_memory", lambda device: 5 * 512 * ENTRY)
    (line,) = go(bench, llama, tmp_path / "some")["decode"]
    assert set(line["ms"]) == {"slots", "native"}
    assert line["skipped"]["dynamic"].startswith("3 x 540 tokens would take")
    monkeypatch.setattr(bench_cells, "free_memory", lambda device: 512 * ENTRY)
    summary = go(bench, llama, tmp_path / "none")
    assert "ms" not in summary["decode"][0]
    assert set(summary["decode"][0]["skipped"]) == {"slots", "native", "dynamic"}
    assert not (tmp_path / "none" / "decode.png").exists()


@pytest.mark.slow
def test_a_memory_too_small_for_one_request_is_a_result(llama: PreTrainedModel, tmp_path: Path) -> None:
    bench = make(contexts=[300], batches=[1], requests=0, kv_memory=20 * ENTRY)
    (line,) = go(bench, llama, tmp_path)["serve"]
    assert (line["fits"], line["plain_fits"]) == (0, 0)
    assert "kv_memory" in line["skipped"]
    assert "tokens_s" not in line


def spread_of(value: float) -> dict[str, float]:
    return bench_clock.spread([value])


def made_lines(policy: str = SNAP, budget: Any = 0.12, compress: float = 1.0, **value: float) -> list[dict[str, Any]]:
    """A bench's lines with the ratios given, at all contexts that targets speak of."""
    frame = {"policy": policy, "budget": budget, "compiled": False, "git": "a"}
    lines = []
    for context in (1024, 2048, 4096, 8192):
        more = {"over_plain": spread_of(value["prefill"]), "compress_s": spread_of(context**compress), "prompt_tokens": context}
        lines.append({**frame, "kind": "prefill", "context": context, **more})
    for batch, speed in ((1, value["one"]), (8, value["eight"])):
        over = {"native": spread_of(value["native"]), "dynamic": spread_of(1 / speed)}
        lines.append({**frame, "kind": "decode", "context": 8192, "batch": batch, "over": over})
    ends = {"shortest": 1024, "longest": 8192, "long_over_short": spread_of(value["flat"])}
    lines.append({**frame, "kind": "flat", "budget": 512, **ends})
    served = {"fits": 18, "plain_fits": 2, "speedup": spread_of(value["served"])}
    lines.append({**frame, "kind": "serve", "context": 4096, "kv_memory": 2**28, **served})
    lines.append({**frame, "kind": "growth", "budget": 128, "requests": 500, "first": 50, "growth": value["growth"]})
    return lines


GOOD = {"prefill": 1.01, "one": 2.0, "eight": 4.5, "native": 0.9, "flat": 1.04, "served": 3.1, "growth": 0.01}
BAD = {"prefill": 1.04, "one": 1.8, "eight": 3.9, "native": 1.04, "flat": 0.94, "served": 2.9, "growth": 0.03}
FULL = runner.Bench(settings([SNAP], [0.12]), contexts=[1024, 2048, 4096, 8192], batches=[1, 8], compile=False)


@pytest.mark.parametrize(("values", "compress", "met"), [(GOOD, 1.05, True), (BAD, 1.2, False)])
def test_targets_are_met_or_missed_as_measured(values: dict[str, float], compress: float, met: bool) -> None:
    summary = bench_summary.summarize(FULL, made_lines(compress=compress, **values), "m")
    found = {bar["name"]: bar for bar in summary["bars"]}
    fits = next(bar for name, bar in found.items() if name.startswith("requests that fit"))
    assert (fits["value"], fits["met"]) == (9.0, True)
    missing = [bar for bar in found.values() if bar["value"] is None]
    assert [bar["met"] for bar in missing] == [None]
    assert missing[0]["name"].startswith("compiled decode")
    assert {bar["met"] for bar in found.values() if bar is not fits and bar not in missing} == {met}
    assert len(found) == len(summary["bars"]) == 11
    assert summary["slopes"][0]["slope"] == pytest.approx(compress)


@pytest.mark.parametrize(("speed", "met"), [(2.5, True), (1.5, False)])
def test_compiled_steps_have_targets_of_their_own(speed: float, met: bool) -> None:
    over = {"native": spread_of(1.5 / speed), "dynamic": spread_of(1 / speed)}
    line = {
        "kind": "decode",
        "policy": SNAP,
        "budget": 0.12,
        "context": 8192,
        "batch": 1,
        "compiled": True,
        "over": over,
        "git": "a",
    }
    bars = {bar["name"]: bar for bar in bench_summary.summarize(replace(FULL, compile=True), [line], "m")["bars"]}
    compiled = f"compiled decode over eager transformers on the same kept length, {SNAP} at 12%"
    faster = f"decode speed-up over the full dynamic cache at 8k, batch 1, compiled, {SNAP} at 12%"
    assert bars[compiled]["met"] is met
    assert (bars[faster]["value"], bars[faster]["met"]) == (pytest.approx(speed), met)


def test_a_target_that_was_not_measured_is_not_met() -> None:
    summary = bench_summary.summarize(FULL, [], "m")
    assert summary["lines"] == 0
    assert {(bar["value"], bar["met"]) for bar in summary["bars"]} == {(None, None)}
    mixed = [*made_lines(**GOOD)[:-1], {**made_lines(**GOOD)[-1], "git": "b"}]
    assert bench_summary.summarize(FULL, mixed, "m")["notes"] == ["measured on several revisions of the code: a, b"]


def test_pictures_show_each_cache_once(done: tuple[dict[str, Any], Path]) -> None:
    summary = done[0]
    lines = bench_plots.decode_series(summary["decode"])
    assert list(lines)[:2] == [f"{SNAP} at 25%", "full"]
    assert set(lines) >= {bench_plots.TRANSFORMERS_LABELS["dynamic"], bench_plots.TRANSFORMERS_LABELS["static"]}
    assert all([point[0] for point in points] == [300, 500] for points in lines.values())
    paces = bench_plots.throughput_series(summary["decode"], summary["serve"])
    assert set(paces) == {"full", f"{SNAP} at 25%", bench_plots.TRANSFORMERS_LABELS["dynamic"]}
    assert all([point[2] for point in points] == [1, 3] for points in paces.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds is 0, it must be at least 1"),
        ({"batches": [0, 1]}, "batch is 0"),
        ({"new_tokens": 2}, "new_tokens is 2"),
        ({"requests": 3}, "3 requests in a row show no growth: ask for at least 10"),
        ({"contexts": [2048]}, "a context of 2048 tokens cannot be measured with 40 new ones on a model with 1024 positions"),
        ({"serve_context": 40}, "give 41 to 1024"),
        ({"contexts": [60]}, "is too short"),
        ({"settings": settings([SNAP], [3])}, "a budget of"),
        (
            {"settings": settings([f"{SNAP}:lookahead=4"], [30])},
            "chooses after its prompt, and prefill and decode are timed apart",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_read(
    llama: PreTrainedModel, change: dict[str, Any], message: str
) -> None:
    builder = PromptBuilder(Letters(), read_haystack(), chat=False)
    with pytest.raises(wk.WinnowError) as raised:
        replace(make(), **change).check(llama, builder)
    assert message in str(raised.value)
