"""Summaries of an evaluation: means, pairs by row, protocols apart, notes."""

import json
from statistics import mean

import pytest

from support.results import CONFIG, FULL_SCORES, MACHINE, SNAPKV_SCORES, broken, group, line, lines_of
from winnowkv.evaluate.report.stats import mean_interval, paired
from winnowkv.evaluate.report.summary import OVER_ROWS, OVER_TASKS, failed, rows_text, summarize


@pytest.fixture
def two():
    return summarize([*lines_of("full", FULL_SCORES), *lines_of("snapkv", SNAPKV_SCORES)], CONFIG)


def test_scores_of_a_task_and_both_means_equal_worked_examples(two):
    assert group(two, "a", "snapkv")["score"] == pytest.approx(mean(SNAPKV_SCORES["a"]))
    assert group(two, OVER_ROWS, "snapkv")["score"] == pytest.approx(mean(SNAPKV_SCORES["a"] + SNAPKV_SCORES["b"]))
    assert group(two, OVER_TASKS, "snapkv")["score"] == pytest.approx((mean(SNAPKV_SCORES["a"]) + mean(SNAPKV_SCORES["b"])) / 2)
    interval = mean_interval(SNAPKV_SCORES["a"] + SNAPKV_SCORES["b"], strata=list("aaaabb"))
    assert (group(two, OVER_TASKS, "snapkv")["low"], group(two, OVER_TASKS, "snapkv")["high"]) == interval[1:]
    assert {key: two["sections"][0][key] for key in ("protocol", "model", "dtype")} == {
        "protocol": "official", "model": "tiny", "dtype": "float32"}  # fmt: skip


def test_against_full_is_paired_by_row_and_not_by_place(two):
    shuffled = summarize([*lines_of("snapkv", SNAPKV_SCORES)[::-1], *lines_of("full", FULL_SCORES)], CONFIG)
    for summary in (two, shuffled):
        pair = group(summary, OVER_ROWS, "snapkv")["against_full"]
        expected = paired(FULL_SCORES["a"] + FULL_SCORES["b"], SNAPKV_SCORES["a"] + SNAPKV_SCORES["b"])
        assert (pair["wins"], pair["ties"], pair["losses"], pair["rows"], pair["excluded"]) == (1, 2, 3, 6, 0)
        assert pair["mean_difference"] == pytest.approx(expected.mean_difference)
    assert group(two, "b", "snapkv")["against_full"]["mean_difference"] == pytest.approx(-0.5)
    over_tasks = group(two, OVER_TASKS, "snapkv")["against_full"]["mean_difference"]
    assert over_tasks == pytest.approx((mean(SNAPKV_SCORES["a"]) - mean(FULL_SCORES["a"]) - 0.5) / 2)
    assert group(two, OVER_ROWS, "full")["against_full"] is None


def test_bytes_and_times_equal_worked_examples():
    sizes = [
        {"kept_bytes": 10, "held_bytes": 20, "full_bytes": 100, "prefill_s": 1.0},
        {"kept_bytes": 30, "held_bytes": 50, "full_bytes": 300, "prefill_s": 9.0},
        {"kept_bytes": 80, "held_bytes": 80, "full_bytes": 800, "prefill_s": 2.0},
    ]
    tasks = ["a", "a", "b"]
    made = [line("snapkv", 0.1, task=task, row=str(r), **size) for r, (task, size) in enumerate(zip(tasks, sizes, strict=True))]
    summary = summarize(made, CONFIG)
    over_rows, over_tasks = group(summary, OVER_ROWS, "snapkv"), group(summary, OVER_TASKS, "snapkv")
    assert [over_rows[name] for name in ("kept_bytes", "held_bytes", "full_bytes")] == [40, 50, 400]
    assert [over_tasks[name] for name in ("kept_bytes", "held_bytes", "full_bytes")] == [50, 57.5, 500]
    assert over_rows["kept_fraction"] == pytest.approx(0.12)
    assert over_rows["prefill_ms_per_token"] == pytest.approx(2.0)  # the median: 1, 2, 9
    assert over_rows["compress_ms_per_token"] == pytest.approx(0.1)
    assert over_rows["decode_ms_per_step"] == pytest.approx(25.0)
    assert over_rows["against_full"] is None
    assert any("nothing is compared with the uncompressed cache" in note for note in summary["sections"][0]["notes"])


def test_kept_fraction_is_of_what_was_compressed():
    # With the context alone compressed, the full cache keeps the context: 800 of 1000 prompt tokens.
    summary = summarize(
        [line("full", kept_entries=800), line("snapkv", kept_entries=200), line("int8", kept_entries=800)], CONFIG
    )
    assert group(summary, "qa", "snapkv")["kept_fraction"] == 0.25
    assert group(summary, "qa", "full")["whole"]
    assert group(summary, "qa", "int8")["whole"]
    assert not group(summary, "qa", "snapkv")["whole"]


def test_protocols_are_never_mixed():
    official = [*lines_of("full", FULL_SCORES), *lines_of("snapkv", SNAPKV_SCORES)]
    other = [{**one, "protocol": "context-only", "score": 0.25} for one in official]
    summary = summarize(official + other, CONFIG)
    assert [section["protocol"] for section in summary["sections"]] == ["official", "context-only"]
    assert group(summary, OVER_ROWS, "full")["score"] == pytest.approx(mean(FULL_SCORES["a"] + FULL_SCORES["b"]))
    assert group(summary, OVER_ROWS, "full", section=1)["score"] == 0.25
    assert group(summary, OVER_ROWS, "snapkv", section=1)["against_full"]["ties"] == 6
    assert "2 protocols (official, context-only): shown side by side, never averaged, never paired." in summary["notes"]


def test_a_protocol_without_the_full_cache_is_not_paired_with_that_of_another():
    summary = summarize([line("full", 0.9), line("snapkv", 0.4, protocol="context-only")], CONFIG)
    assert group(summary, "qa", "snapkv", section=1)["against_full"] is None
    assert summary["sections"][1]["worst"] == []


def test_entries_and_fractions_are_two_budgets():
    summary = summarize([line("snapkv", 0.2, budget=1), line("snapkv", 0.6, budget=1.0, kept_entries=900)], CONFIG)
    found = [(type(g["budget"]), g["score"]) for g in summary["sections"][0]["groups"] if g["task"] == "qa"]
    assert found == [(int, 0.2), (float, 0.6)]


def test_a_policy_that_evicts_nothing_is_one_setting_at_any_budget():
    summary = summarize([line("full", 0.3, budget=0.12), line("full", 0.3, budget=128), line("snapkv", budget=128)], CONFIG)
    found = [(g["policy"], g["rows"], g["whole"]) for g in summary["sections"][0]["groups"] if g["task"] == "qa"]
    assert found == [("full", 1, True), ("snapkv", 1, False)]


def test_failed_rows_are_counted_left_out_and_noted():
    lines = [line("full", 0.8, row="1"), line("full", 0.6, row="2"), line("full", 0.4, row="3"),
             line("snapkv", 0.5, row="1"), broken("out of memory", row="2"), line("snapkv", float("nan"), row="3")]  # fmt: skip
    summary = summarize(lines, CONFIG)
    snap = group(summary, "qa", "snapkv")
    assert (snap["rows"], snap["failed_rows"], snap["score"], snap["low"]) == (1, 2, 0.5, None)
    assert snap["against_full"]["excluded"] == 2
    assert snap["against_full"]["mean_difference"] == pytest.approx(-0.3)
    notes = summary["sections"][0]["notes"]
    assert "1 of 6 measurements failed and have no score: out of memory." in notes
    assert "1 of 6 measurements failed and have no score: the score is not a number." in notes
    assert (
        "Means at 12% are over the 1 of 3 rows that all policies answered: "
        "snapkv lacks 2 (out of memory; the score is not a number)." in notes
    )


def test_a_row_on_which_the_full_cache_failed_is_in_no_pair():
    lines = [line("full", None, failed="a logit is not a number"), line("full", 0.4, row="r1"),
             line("snapkv", 0.1), line("snapkv", 0.1, row="r1")]  # fmt: skip
    pair = group(summarize(lines, CONFIG), "qa", "snapkv")["against_full"]
    assert (pair["rows"], pair["excluded"], pair["losses"]) == (1, 1, 1)


def test_means_are_over_the_rows_that_all_policies_answered():
    """A hard row that one policy could not answer must not make it look better than the others."""
    scores = {"1": 0.9, "2": 0.8, "3": 0.1}
    lines = [line(policy, score, row=row, budget=budget) for budget in (0.12, 64) for policy in ("full", "cake", "snapkv")
             for row, score in scores.items() if (policy, row, budget) != ("snapkv", "3", 64)]  # fmt: skip
    lines += [broken("a budget of 64 entries is below sinks + window.", policy="snapkv", row="3", budget=64),
              *[broken("never", policy="tova", row=row, budget=0.12) for row in scores]]  # fmt: skip
    summary = summarize(lines, CONFIG)
    for scope in ("qa", OVER_TASKS, OVER_ROWS):
        at = {(g["policy"], g["budget"]): g for g in summary["sections"][0]["groups"] if g["task"] == scope}
        assert at["snapkv", 64]["score"] == at["cake", 64]["score"] == pytest.approx(0.85)
        assert at["snapkv", 0.12]["score"] == at["cake", 0.12]["score"] == at["full", 64]["score"] == pytest.approx(0.6)
        counts = ("rows", "all_rows", "answered_rows", "failed_rows")
        assert [at["cake", 64][name] for name in counts] == [2, 3, 3, 0]
        assert [at["snapkv", 64][name] for name in counts] == [2, 3, 2, 1]
        assert [at["tova", 0.12][name] for name in counts] == [0, 3, 0, 3]
        assert at["tova", 0.12]["score"] is None  # and it takes nothing from the others
        assert (at["cake", 64]["against_full"]["rows"], at["cake", 64]["against_full"]["excluded"]) == (2, 1)
        assert (rows_text(at["cake", 64]), rows_text(at["cake", 0.12])) == ("2 of 3", "3")
    notes = summary["sections"][0]["notes"]
    assert (
        "Means at 64 are over the 2 of 3 rows that all policies answered: "
        "snapkv lacks 1 (a budget of 64 entries is below sinks + window)." in notes
    )
    assert "Means at 12% are over the 3 of 3 rows that all policies answered: tova lacks 3 (never)." in notes


def test_the_full_cache_is_averaged_over_the_same_rows_at_a_single_budget():
    lines = [line(policy, score, row=row) for policy in ("full", "cake") for row, score in (("1", 0.9), ("2", 0.1))]
    lines += [line("snapkv", 0.9, row="1"), broken("out of memory", row="2")]
    summary = summarize(lines, CONFIG)
    assert [g["score"] for g in summary["sections"][0]["groups"]] == [0.9] * 9
    missing = summarize([one for one in lines if failed(one) is None], CONFIG)  # a run that was stopped
    assert [g["score"] for g in missing["sections"][0]["groups"]] == [0.9] * 9
    assert any("snapkv lacks 1 (not measured)." in note for note in missing["sections"][0]["notes"])


def test_a_policy_that_did_not_run_on_a_task_takes_no_rows_of_it():
    lines = [*lines_of("full", FULL_SCORES), *lines_of("snapkv", SNAPKV_SCORES), *lines_of("cake", {"a": [0.5] * 4})]
    summary = summarize(lines, CONFIG)
    assert group(summary, OVER_ROWS, "snapkv")["rows"] == 6
    assert (group(summary, OVER_ROWS, "cake")["rows"], group(summary, OVER_ROWS, "cake")["all_rows"]) == (4, 6)
    assert not any("lacks" in note for note in summary["sections"][0]["notes"])


def test_many_reasons_are_summed_up():
    lines = [broken(f"reason {r}", row=str(r)) for r in range(7)]
    notes = summarize(lines, CONFIG)["sections"][0]["notes"]
    assert sum("failed and have no score" in note for note in notes) == 3
    assert "7 measurements failed in all, for 7 reasons." in notes


def test_truncated_rows_are_counted_once_a_prompt():
    lines = [line(policy, row=row, truncated_tokens=cut) for policy in ("full", "snapkv") for row, cut in (("1", 0), ("2", 40))]
    summary = summarize(lines, CONFIG)
    assert (group(summary, "qa", "snapkv")["truncated_rows"], group(summary, "qa", "snapkv")["truncated_tokens"]) == (1, 40)
    assert "1 of 2 prompts were longer than the context: 40 tokens were cut out of them." in summary["sections"][0]["notes"]


def test_small_sets_are_noted(two):
    assert "a: only 4 rows: the interval is a rough guide." in two["sections"][0]["notes"]
    assert "b: only 2 rows: the interval is a rough guide." in two["sections"][0]["notes"]
    assert two["sections"][0]["tasks"][0] == {"task": "a", "rows": 4, "small": "only 4 rows: the interval is a rough guide"}
    large = summarize([line(row=str(r)) for r in range(30)], CONFIG)
    assert large["sections"][0]["notes"] == []
    equal = summarize([line(task=task, row=str(r)) for task in "abc" for r in range(3)], CONFIG)
    assert equal["sections"][0]["notes"] == ["Each of the 3 tasks: only 3 rows: the interval is a rough guide."]


def test_the_worst_regressions_are_the_largest_losses_each_row_once():
    full = [line("full", 1.0, row=str(r)) for r in range(8)]
    snap = [line("snapkv", r / 10, row=str(r), prediction=f"snap {r}") for r in range(8)]
    wide = [line("snapkv", r / 10, row=str(r), budget=0.5, prediction=f"wide {r}") for r in range(2)]
    better = [line("cake", 1.0, row="0"), line("int8", None, row="0", failed="no")]
    worst = summarize([*full, *snap, *wide, *better], CONFIG)["sections"][0]["worst"]
    assert [bad["prediction"] for bad in worst] == ["wide 0", "wide 1", "snap 2", "snap 3", "snap 4"]
    assert {key: worst[2][key] for key in ("task", "row", "policy", "budget", "score", "full_score", "full_prediction")} == {
        "task": "qa", "row": "2", "policy": "snapkv", "budget": 0.12, "score": 0.2, "full_score": 1.0,
        "full_prediction": "what full said"}  # fmt: skip
    assert worst[2]["answers"] == ["right"]
    assert worst[2]["prompt_tail"].endswith("Answer:")


def test_a_summary_is_plain_json_and_says_where_it_was_made(two):
    lone = summarize([line("full"), line("snapkv")], {**CONFIG, "machine": MACHINE})  # a single row: no interval
    text = json.dumps(lone, allow_nan=False)
    assert json.loads(text) == lone
    assert lone["machine"] == MACHINE
    assert (lone["versions"]["torch"], lone["git"], lone["seeds"]) == (["2.13.0"], ["0123456789ab"], [0])
    assert two["machine"] is None


def test_no_line_and_no_finished_line_are_summaries_too():
    assert summarize([], CONFIG)["sections"] == []
    only = group(summarize([broken("too long")], CONFIG), OVER_TASKS, "snapkv")
    assert (only["rows"], only["failed_rows"], only["score"], only["kept_bytes"], only["prefill_ms_per_token"]) == (
        0, 1, None, None, None)  # fmt: skip
