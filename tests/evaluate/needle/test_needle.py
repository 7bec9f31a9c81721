"""The needle runner: on the embedded model with prompts short enough for a test, and on a tiny one that reads letters."""

import json

import pytest
import torch
from matplotlib.image import imread

import winnowkv as wk
from support.tokenizers import Letters
from winnowkv.cache.reading import greedy, prefill
from winnowkv.cli.needle import asked_policies, found_text, needle as command, whole_notes
from winnowkv.evaluate.needle import needle as runner
from winnowkv.evaluate.needle.prompts import PromptBuilder, read_chains, read_haystack, read_needles, read_variant
from winnowkv.evaluate.report import plot
from winnowkv.models import load as models

FIELDS = {
    "variant", "policy", "budget", "length", "depth", "needle", "question", "answer", "output", "failed", "correct", "found",
    "rouge1_recall", "rouge1_f1", "kept_entries_per_layer", "kept_bytes", "full_bytes", "held_bytes", "prefill_s", "compress_s",
    "decode_ms_per_token", "decode_batch", "prompt_tokens", "versions",
}  # fmt: skip
MIXED = [
    "full",
    "snapkv:observe=8",
    "streaming",
    "adakv:of=snapkv:observe=8",
    "pyramidkv:observe=8",
    "int8",
    "snapkv:observe=8:quantize=int8",
]

NEWER = "keydiff,knorm,lagkv,defensivekv,criticalkv:of=snapkv,adakv:of=expected,chunkkv:of=snapkv"


@pytest.fixture(scope="module")
def embedded():
    if models.find_wheel() is None:
        pytest.skip(f"the embedded model's wheel is not installed ({models.INSTALL})")
    return wk.load("embedded")


def make(policies=("full", "snapkv:observe=16"), budgets=(0.25, 100), depths=(0.5,), needles=1, **more):
    return runner.NeedleTest(
        policies=list(policies), budgets=list(budgets), lengths=[300], depths=list(depths), needles=read_needles()[:needles],
        max_new_tokens=12, **more,
    )  # fmt: skip


def go(test, embedded, folder):
    model, tokenizer = embedded
    haystack = read_haystack()
    builder = PromptBuilder(tokenizer, haystack, chat=True)
    test.check(model, builder)
    store = runner.open_store(folder, model, "embedded", builder, haystack, test)
    try:
        runner.run(test, model, tokenizer, builder, store, lambda what: None)
        return runner.write_summary(test, store), store.lines
    finally:
        store.close()


def tiny_test(policies=("full", "snapkv:observe=8"), budgets=(0.25, 100), depths=(0.5,), variant="single", needles=1, **more):
    hidden = read_variant(variant, count=2 if variant == "multi" else None)[:needles]
    return runner.NeedleTest(
        policies=list(policies), budgets=list(budgets), lengths=[400], depths=list(depths), needles=hidden, variant=variant,
        max_new_tokens=9, **more,
    )  # fmt: skip


def go_tiny(test, model, folder, advance=lambda what: None):
    haystack = read_haystack()
    builder = PromptBuilder(Letters(), haystack, chat=False)
    test.check(model, builder)
    store = runner.open_store(folder, model, "tiny", builder, haystack, test)
    try:
        runner.run(test, model, Letters(), builder, store, advance)
        return runner.write_summary(test, store), store.lines
    finally:
        store.close()


def group(policy, budget, length=1000, score=0.5, evicts=True, kept=0.1):
    at = {str(depth): score for depth in (0.1, 0.5, 0.9)}
    return {
        "policy": policy, "budget": budget, "length": length, "evicts": evicts, "correct": score, "kept_bytes": kept * 1000,
        "full_bytes": 1000, "by_depth": {"correct": at},
    }  # fmt: skip


def test_lines_hold_what_was_asked_and_measured(embedded, tmp_path):
    summary, lines = go(make(), embedded, tmp_path)
    assert [(line["policy"], line["budget"]) for line in lines] == [
        ("full", 0.25), ("full", 100), ("snapkv:observe=16", 0.25), ("snapkv:observe=16", 100)
    ]  # fmt: skip
    for line in lines:
        assert set(line) >= FIELDS
        assert line["correct"] == (line["answer"].casefold() in line["output"].casefold())
        entries = {0.25: line["prompt_tokens"] // 4, 100: 100}[line["budget"]]
        if line["policy"] == "full":
            entries = line["prompt_tokens"]
        # 30 layers, 3 KV heads, keys and values of 64 numbers in the model's dtype.
        size = 3 * 2 * 64 * embedded[0].dtype.itemsize
        assert sum(line["kept_entries_per_layer"]) == 30 * entries
        assert line["kept_bytes"] == 30 * entries * size
        assert line["full_bytes"] == 30 * line["prompt_tokens"] * size
    assert lines[0]["correct"]  # the full cache finds a needle in 300 tokens
    assert summary["lines"] == summary["expected_lines"] == 4
    assert summary["variant"] == "single"
    assert summary["failed"] == 0
    for picture in ("needle.png", "needle_kept.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "summary.json").read_text())["groups"] == summary["groups"]


def test_finished_lines_are_never_computed_twice(llama, tmp_path, monkeypatch):
    go_tiny(tiny_test(), llama, tmp_path)
    before = (tmp_path / "results.jsonl").read_bytes()
    calls = []
    real = runner.read_prompt
    monkeypatch.setattr(runner, "read_prompt", lambda *args: calls.append(1) or real(*args))
    go_tiny(tiny_test(), llama, tmp_path)
    assert not calls
    assert (tmp_path / "results.jsonl").read_bytes() == before
    # One more policy: only its lines are added, and one prefill serves them.
    _, lines = go_tiny(tiny_test(("full", "snapkv:observe=8", "streaming")), llama, tmp_path)
    assert calls == [1]
    assert [line["policy"] for line in lines[4:]] == ["streaming", "streaming"]


@pytest.mark.parametrize("timed", [True, False])
def test_an_interrupt_loses_at_most_the_running_batch(llama, tmp_path, timed):
    told = []

    def stop_at_three(what):
        told.append(what)
        if len(told) == 3:
            raise KeyboardInterrupt

    test = tiny_test(depths=(0.2, 0.8), timed=timed)
    with pytest.raises(KeyboardInterrupt):
        go_tiny(test, llama, tmp_path, stop_at_three)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3
    _, lines = go_tiny(test, llama, tmp_path)
    assert len(lines) == test.steps() == len({runner.identity(line) for line in lines}) == 8


def test_replayed_answers_equal_live_ones(embedded, tmp_path):
    """What one shared prefill gives for a policy is what a prefill with that policy gives."""
    model, tokenizer = embedded
    specs = ("snapkv:observe=16", "windowkv", "dynamickv", "pyramidkv", "streaming", "random")
    _, lines = go(make(policies=specs, budgets=(0.25,)), embedded, tmp_path)
    builder = PromptBuilder(tokenizer, read_haystack(), chat=True)
    ids = torch.tensor([builder.build(read_needles()[0], 300, 0.5)], device=model.device)
    for line in lines:
        with wk.compress(model, line["policy"], 0.25, task="localization", tokenizer=tokenizer) as run:
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert run.report.kept_entries == [line["kept_entries_per_layer"]]
        assert tokenizer.decode(output[0][ids.shape[1] :], skip_special_tokens=True) == line["output"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": (4,)}, "a budget of 4 entries .* is below sinks . window = 0 . 16"),
        ({"depths": (1.5,)}, "depth 1.5 is outside"),
        ({"policies": ("snapvk",)}, "Did you mean 'snapkv'"),
        ({"needles": 0}, "at least one policy"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_work(embedded, tmp_path, change, message):
    with pytest.raises(wk.WinnowError, match=message):
        go(make(**change), embedded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lengths_beyond_the_model_or_the_haystack_are_refused(embedded, tmp_path):
    model, tokenizer = embedded
    long = runner.NeedleTest(["full"], [0.5], [9000], [0.5], read_needles()[:1])
    with pytest.raises(wk.InputError, match="8192 positions: ask for at most 8168"):
        long.check(model, PromptBuilder(tokenizer, read_haystack(), chat=True))
    short = runner.NeedleTest(["full"], [0.5], [3000], [0.5], read_needles()[:1])
    with pytest.raises(wk.InputError, match="the haystack has"):
        short.check(model, PromptBuilder(tokenizer, "Too short. " * 50, chat=True))


def test_rouge_and_containment():
    judged = runner.judge("blue flowerpot", "It is under the BLUE flowerpot.")
    assert judged == {"correct": True, "found": 1.0, "rouge1_recall": 1.0, "rouge1_f1": 0.5}
    nothing = {"correct": False, "found": 0.0, "rouge1_recall": 0.0, "rouge1_f1": 0.0}
    assert runner.judge("blue flowerpot", "no idea") == nothing


def test_some_of_several_needles_are_a_fraction():
    judged = runner.judge(("silver pelican", "4817", "October"), "4817, in october")
    assert judged == {"correct": False, "found": 0.6667, "rouge1_recall": 0.5, "rouge1_f1": 0.5714}
    assert runner.judge(["4817", "October"], "October 4817")["correct"] is True


@pytest.mark.parametrize("variant", ["single", "multi", "multi-hop"])
def test_batched_answers_equal_single_ones(llama, tmp_path, variant):
    """In float32 token for token: what decodes together is only faster."""
    _, alone = go_tiny(tiny_test(MIXED, variant=variant, timed=True), llama, tmp_path / "alone")
    _, together = go_tiny(tiny_test(MIXED, variant=variant, timed=False), llama, tmp_path / "together")
    assert {line["decode_batch"] for line in alone} == {1}
    assert all(line["decode_ms_per_token"] > 0 for line in alone)
    batched = {runner.identity(line): line for line in together}
    assert len(batched) == len(alone) == len(MIXED) * 2
    for line in alone:
        other = batched[runner.identity(line)]
        assert len(line["output"]) == 9
        for name in ("output", "kept_entries_per_layer", "kept_bytes", "held_bytes", "prompt_tokens"):
            assert other[name] == line[name]
    shared = [line for line in together if line["decode_batch"] > 1]
    assert len(shared) >= 6
    assert all(line["decode_ms_per_token"] is None for line in shared)
    whole = [line for line in together if line["policy"] in ("full", "int8")]
    assert all(line["decode_batch"] == 1 and line["decode_ms_per_token"] > 0 for line in whole)


def test_waiting_settings_hold_no_more_than_a_full_cache_and_the_last_compressed_one(llama, tmp_path, monkeypatch):
    held = []
    real = runner.continue_all

    def watched(model, kept, *rest):
        held.append([one.cache.report.kept_bytes for one in kept])
        return real(model, kept, *rest)

    monkeypatch.setattr(runner, "continue_all", watched)
    budgets = [0.3, 0.31, 0.32, 0.33, 0.34, 0.35, 0.36]
    _, lines = go_tiny(tiny_test(["snapkv:observe=8"], budgets, timed=False), llama, tmp_path)
    assert [len(sizes) for sizes in held if sizes] == [4, 3]
    assert all(sum(sizes[:-1]) <= lines[0]["full_bytes"] for sizes in held)
    assert [line["budget"] for line in lines] == budgets


def test_a_variant_is_in_its_lines_and_is_not_computed_twice(llama, tmp_path, monkeypatch):
    test = tiny_test(variant="multi-hop", needles=2)
    summary, lines = go_tiny(test, llama, tmp_path)
    chain = read_chains()[0]
    assert lines[0]["variant"] == "multi-hop"
    assert (tuple(lines[0]["needles"]), tuple(lines[0]["answers"])) == (chain.needles, chain.answers)
    assert summary["lines"] == summary["expected_lines"] == len(lines) == 8
    assert summary["groups"][0]["example"]["answer"] == ", ".join(read_chains()[1].answers)
    monkeypatch.setattr(runner, "read_prompt", None)
    assert go_tiny(test, llama, tmp_path)[0]["groups"] == summary["groups"]
    with pytest.raises(wk.InputError, match="variant: 'multi-hop', now 'multi'"):
        go_tiny(tiny_test(variant="multi"), llama, tmp_path)


def test_wrappers_stand_in_a_list_with_other_policies(llama, tmp_path):
    specs = asked_policies(NEWER, factorial=False)
    assert specs == NEWER.split(",")
    summary, lines = go_tiny(tiny_test(specs, [0.25], timed=False), llama, tmp_path)
    assert [group["policy"] for group in summary["groups"]] == specs
    assert [(line["policy"], line["failed"]) for line in lines] == [(spec, None) for spec in specs]
    ids = PromptBuilder(Letters(), read_haystack(), chat=False).build(read_needles()[0], 400, 0.5)
    task = wk.TaskProfile("localization", structure=wk.read_structure(Letters(), ids))  # as the test reads its prompts
    for line in lines:
        live = wk.CompactCache(llama, line["policy"], 0.25, task=task)
        logits = prefill(llama, torch.tensor([ids]), live)
        assert line["kept_entries_per_layer"] == live.report.kept_entries[0]
        assert sum(line["kept_entries_per_layer"]) == pytest.approx(5 * 100)
        assert line["output"] == Letters().decode(list(greedy(llama, live, logits, 9))).strip()


def test_policies_that_look_at_the_answer_answer_as_they_do_live(llama, tmp_path):
    specs = [f"snapkv:observe=8{more}" for more in ("", ":lookahead=3", ":lookahead=4:draft=5:refit=true", ":lookahead=20")]
    alone, together = (
        go_tiny(tiny_test(specs, timed=timed), llama, tmp_path / str(timed)) for timed in (True, False)
    )  # fmt: skip
    ids = PromptBuilder(Letters(), read_haystack(), chat=False).build(read_needles()[0], 400, 0.5)
    for summary, lines in (alone, together):
        for line in lines:
            cache = wk.CompactCache(llama, line["policy"], line["budget"], task="localization")
            tokens = list(greedy(llama, cache, prefill(llama, torch.tensor([ids]), cache), 9))
            assert line["output"] == Letters().decode(tokens).strip()
            assert line["kept_entries_per_layer"] == cache.report.kept_entries[0]
            assert line["lookahead_tokens"] == cache.report.lookahead_tokens
            assert line["whole"] is (line["policy"] == specs[3])
        assert [group["whole_answers"] for group in summary["groups"]] == [0] * 6 + [1] * 2
        told = f"{specs[3]}: 2 of 2 answers ended before anything was evicted, and count with the whole cache"
        assert whole_notes(summary["groups"]) == [told]
    assert [line["decode_ms_per_token"] is None for line in alone[1]] == [False] * 6 + [True] * 2  # nothing came after


def test_a_profile_goes_to_the_policy_that_a_wrapper_changes():
    asked = "adakv:floor=0:of=compresskv:observe=8,chunkkv:of=snapkv,compresskv,adakv:of=compresskv:profile=mine"
    assert asked_policies(asked, factorial=False, profile="P") == [
        "adakv:floor=0:of=compresskv:observe=8:profile=P", "chunkkv:of=snapkv", "compresskv:profile=P",
        "adakv:of=compresskv:profile=mine",
    ]  # fmt: skip


def test_a_logit_that_is_no_number_fails_its_lines_and_not_the_run(llama, tmp_path):
    llama.lm_head.weight.data[5] = torch.nan
    summary, lines = go_tiny(tiny_test(timed=False), llama, tmp_path)
    assert [line["failed"] for line in lines] == ["a logit was not a number"] * 4
    assert not any(line["correct"] for line in lines)
    assert (summary["failed"], summary["lines"], summary["groups"]) == (4, 4, [])
    assert not (tmp_path / "needle.png").exists()


def test_the_longest_length_leaves_room_for_the_answer(llama, monkeypatch):
    assert runner.fit_lengths([300, "max", 1012], llama, 12) == [300, 1012]
    monkeypatch.setattr(runner, "position_limit", lambda model: None)
    assert runner.fit_lengths([300], llama, 12) == [300]
    with pytest.raises(wk.InputError, match="give a number in place of 'max'"):
        runner.fit_lengths(["max"], llama, 12)


def test_means_of_every_metric_by_depth():
    scores = {"correct": False, "found": 0.5, "rouge1_f1": 0.2, "rouge1_recall": 0.4, "kept_bytes": 1, "full_bytes": 2}
    timing = {"prefill_s": 1, "compress_s": 0, "question": "q", "answers": ["a", "b"], "output": "o"}
    rows = [
        {**scores, **timing, "depth": 0.1, "decode_ms_per_token": None},
        {**scores, **timing, "depth": 0.9, "decode_ms_per_token": 7.0, "correct": True, "found": 1.0},
    ]
    made = runner.means(rows)
    assert (made["accuracy"], made["correct"], made["found"], made["decode_ms_per_token"]) == (0.5, 0.5, 0.75, 7.0)
    assert made["by_depth"]["found"] == {"0.1": 0.5, "0.9": 1.0}
    assert made["by_depth"]["rouge1_f1"] == {"0.1": 0.2, "0.9": 0.2}
    assert made["example"]["answer"] == "a, b"
    assert found_text(made, "multi") == "50% (75% of needles)"
    assert found_text(made, "single") == "50%"


def test_a_section_of_maps_for_each_budget_or_for_each_policy():
    full = [group("full", budget, evicts=False) for budget in (0.12, 128)]
    many = [group(policy, budget) for policy in ("snapkv", "tova", "cake") for budget in (0.12, 128)]
    names = [
        [{(g["policy"], g["budget"]) for g in panel} for panel in section] for section in plot.map_sections([*full, *many])
    ]
    assert names == [
        [{("full", 0.12), ("full", 128)}, {("snapkv", 0.12)}, {("tova", 0.12)}, {("cake", 0.12)}],
        [set(), {("snapkv", 128)}, {("tova", 128)}, {("cake", 128)}],
    ]
    few = [group("snapkv", budget) for budget in (1, 1.0, 0.12)]  # 1 entry is not the whole prompt
    assert [len(section) for section in plot.map_sections([*full, *few])] == [4]
    assert [len(section) for section in plot.map_sections(full)] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [1, 10])
@pytest.mark.parametrize("policies", [0, 2, 12])
def test_pictures_stay_readable(tmp_path, lengths, policies):
    groups = [
        made
        for length in range(1000, 1000 * (lengths + 1), 1000)
        for made in (
            group("full", 0.12, length, 1.0, evicts=False, kept=1),
            group("int8", 0.12, length, 0.9, evicts=False, kept=0.5),
            *(group(f"policy{n}", b, length, n / 12) for n in range(policies) for b in (0.12, 128)),
        )
    ]
    plot.needle_maps(groups, "correct", tmp_path / "maps.png")
    plot.kept_lines(groups, "correct", tmp_path / "lines.png")
    for name in ("maps.png", "lines.png"):
        picture = imread(tmp_path / name)
        assert 400 < picture.shape[1] < 2000
        assert len({tuple(pixel) for pixel in picture[:, :, :3].reshape(-1, 3)[::50]}) > 2  # something is drawn


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"variant": "double"}, "variant 'double' is unknown: use one of single, multi, multi-hop"),
        ({"count": 2}, "a count of 2 needles is for the variant 'multi'"),
        ({"variant": "multi", "count": 9}, "9 needles a prompt cannot be made of the 8 in the file: ask for 2 to 8"),
        ({"metric": "bleu"}, "metric 'bleu' is unknown: use one of correct, found"),
        ({"lengths": "longest"}, "--lengths: 'longest' is not a number"),
    ],
)
def test_bad_values_are_refused_before_the_model_loads(asked, message):
    with pytest.raises(wk.InputError, match=message):
        command(model="/no/such/model", **asked)
