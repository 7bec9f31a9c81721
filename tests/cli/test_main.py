"""The command line: help worth reading, JSON alone on standard output, errors as one sentence with exit code 2."""

import json

import pytest

from winnowkv.models import load as models
from winnowkv.policies import names, policy, policy_class
from winnowkv.policies.compose import Wrapper
from winnowkv.policies.registry import BUILT_IN

needs_model = pytest.mark.skipif(models.find_wheel() is None, reason=f"the embedded model is missing ({models.INSTALL})")


@pytest.mark.parametrize(
    "command", [(), ("demo",), ("generate",), ("audit",), ("needle",), ("eval",), ("report",), ("policies",), ("plan",)]
)
def test_every_command_has_help(winnow, command):
    code, out, _ = winnow(*command, "--help")
    assert code == 0
    assert "Usage" in out
    if command:
        assert "--json" in out


def test_policies_as_json(winnow):
    code, out, _ = winnow("policies", "--json")
    rows = {row["policy"]: row for row in json.loads(out)["policies"]}
    assert code == 0
    assert set(rows) == set(names())
    assert rows["windowkv"]["options"]["sure"] == 0.75


def test_policies_say_what_each_is_for_and_which_is_the_default(winnow):
    code, out, _ = winnow("policies")
    assert code == 0
    rows = {row["policy"]: row for row in json.loads(winnow("policies", "--json")[1])["policies"]}
    assert [name for name, row in rows.items() if row["default"]] == ["winnow"]
    assert [line.split()[0] for line in out.splitlines() if "(the default)" in line] == ["winnow"]
    assert all(policy_class(name).purpose for name in BUILT_IN)
    assert len({row["purpose"] for row in rows.values()}) == len(rows)
    assert all(row["purpose"] in out for row in rows.values())


def test_a_named_policy_is_shown_with_options_and_source(winnow):
    code, out, _ = winnow("policies", "windowkv")
    assert code == 0
    assert "2503.17922" in out
    assert "sure=0.75" in out
    assert [row["policy"] for row in json.loads(winnow("policies", "windowkv", "full", "--json")[1])["policies"]] == [
        "windowkv",
        "full",
    ]
    code, out, err = winnow("policies", "snapvk")
    assert (code, out) == (2, "")
    assert "Did you mean 'snapkv'" in err


def test_policies_show_what_a_wrapper_changes(winnow, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = winnow("policies", "all")
    assert code == 0
    assert all(len(line) <= 80 for line in out.splitlines())
    wrappers = [name for name in names() if issubclass(policy_class(name), Wrapper)]
    assert wrappers == ["adakv", "chunkkv", "criticalkv"]
    assert sum(line.endswith("of=snapkv") for line in out.splitlines()) == len(wrappers)
    assert "of= is the policy that a wrapper changes" in out
    made = policy(out.split()[-1])
    assert (made.floor, made.of.name, made.of.observe) == (0.1, "snapkv", 16)
    rows = {row["policy"]: row["options"] for row in json.loads(winnow("policies", "--json")[1])["policies"]}
    assert list(rows["adakv"].items()) == [("floor", 0.2), ("of", "snapkv")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("needle", "--budgets", "0"), "budget 0 keeps nothing"),
        (("needle", "--budgets=-5"), "budget -5 keeps nothing"),
        (("needle", "--budgets", "1.5"), "budget 1.5 is a fraction above 1"),
        (("needle", "--budgets", "many"), "budget 'many' is not a number"),
        (("needle", "--budgets", ","), "--budgets is empty"),
        (("needle", "--lengths", "3k"), "--lengths: '3k' is not a number"),
        (("needle", "--policies", "snapvk"), "Did you mean 'snapkv'"),
        (("needle", "--policies", "snapkv:kernl=3"), "Did you mean 'kernel'"),
        (("needle", "--policies", "snapkv:kernel=three"), "kernel='three' is not of type int"),
        (("needle", "--policies", "snapkv:kernel"), "'kernel' is not option=value"),
        (("needle", "--policies", ""), "no policy was named"),
        (("needle", "--task", "poetry"), "task 'poetry' is unknown"),
        (("needle", "--needles", "/no/such/file"), "needle file /no/such/file cannot be read"),
        (("needle", "--haystack", "/no/such/file"), "haystack /no/such/file cannot be read"),
        (("generate", "   "), "the prompt is empty"),
        (("generate", "--file", "/no/such/file"), "prompt file /no/such/file cannot be read"),
        (("generate", "a", "--file", "b"), "not both"),
        (("task",), "give one prompt as an argument"),
        (("task", " "), "the prompt is empty"),
        (("task", "--file", "/no/such/file"), "prompt file /no/such/file cannot be read"),
        (("task", "hello", "--classifier", "/no/such/folder"), "classifier /no/such/folder cannot be loaded"),
        (("calibrate", "--prompts", "/no/such/file"), "needle file /no/such/file cannot be read"),
        (("calibrate", "--lengths", "1k"), "--lengths: '1k' is not a number"),
        (("generate", "hello", "--budget", "0.0"), "budget 0.0 keeps nothing"),
        (("generate", "hello", "--model", "/no/such/model"), "'/no/such/model' does not exist"),
    ],
)
def test_bad_values_exit_with_two_and_one_sentence(winnow, arguments, message):
    code, out, err = winnow(*arguments)
    assert code == 2
    assert message in err
    assert out == ""
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("winnow: ")]) == 1


def test_an_empty_standard_input(winnow):
    code, _, err = winnow("generate", stdin="\n")
    assert code == 2
    assert "the prompt is empty" in err


@pytest.mark.slow
@needs_model
def test_an_output_folder_that_cannot_be_written(winnow, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = winnow("needle", "--lengths", "300", "--out", str(tmp_path / "file"))
    assert code == 2
    assert "cannot be written" in err


@pytest.mark.slow
@needs_model
def test_generate_streams_the_answer_and_reports_what_was_kept(winnow):
    question = "What is the capital of France?"
    code, out, _ = winnow("generate", "--policy", "snapkv:observe=8", "--budget", "36", stdin=question)
    answer, *lines = out.strip().splitlines()
    kept = " ".join(" ".join(lines).split())
    assert code == 0
    assert answer == "The capital of France is Paris."
    assert kept.startswith("-- policy snapkv:observe=8, budget 36: 0.79 of 0.81 MiB kept")
    assert "tokens/s" in kept
    assert "36 x 30" in kept


def test_task_prints_a_label_and_a_probability_a_row(winnow, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = ["Write a summary of this report.\n\nIt rained.\n\nSummary:", "It rained.\n\nQuestion: When did it rain?\nAnswer:"]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    code, out, _ = winnow("task", "--file", str(file), "--json")
    tasks = json.loads(out)["tasks"]
    assert code == 0
    assert [row["label"] for row in tasks] == ["aggregation", "localization"]
    assert all(0.5 <= row["probability"] <= 1 for row in tasks)


@pytest.mark.slow
@needs_model
def test_generate_classifies_the_prompt_if_no_task_is_given(winnow):
    code, out, _ = winnow(
        "generate", "Question: What is the capital of France?\nAnswer:", "--policy", "windowkv", "--budget", "64"
    )
    assert code == 0
    assert "-- task: localization, probability" in out


@pytest.mark.slow
@needs_model
def test_generate_as_json(winnow):
    code, out, _ = winnow("generate", "What is the capital of France?", "--policy", "full", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["answer"] == "The capital of France is Paris."
    assert answer["kept_bytes"] == answer["full_bytes"]
    assert answer["kept_entries"] == [answer["prompt_tokens"] * 30]


@pytest.mark.slow
@needs_model
def test_a_prompt_shorter_than_the_window_is_kept_whole_with_a_note(winnow):
    code, out, _ = winnow("generate", "Hi", "--budget", "5", "--max-new-tokens", "2")
    assert code == 0
    assert "no longer than the observation window of 32: everything is kept" in " ".join(out.split())


@pytest.mark.slow
@needs_model
def test_a_budget_below_the_window(winnow):
    code, _, err = winnow("generate", "word " * 60, "--policy", "snapkv", "--budget", "7")
    assert code == 2
    assert "is below sinks + window = 0 + 32: keep at least 32 entries" in err
    code, _, err = winnow("generate", "word " * 60, "--budget", "4")
    assert code == 2
    assert "is below 4 sinks and the last token: keep at least 5 entries" in err
    code, _, _ = winnow("generate", "word " * 60, "--budget", "0.01", "--max-new-tokens", "2")
    assert code == 0  # a fraction is raised to what always stays


@pytest.mark.slow
@needs_model
def test_needle_as_json_and_as_table(winnow, tmp_path):
    arguments = ("needle", "--policies", "full,streaming", "--budgets", "0.5", "--lengths", "250", "--depths", "0.5",
                 "--max-new-tokens", "4", "--out", str(tmp_path))  # fmt: skip
    code, out, _ = winnow(*arguments, "--json")
    assert code == 0
    assert [group["policy"] for group in json.loads(out)["groups"]] == ["full", "streaming"]
    code, out, _ = winnow(*arguments)
    assert code == 0
    assert "streaming" in out
    assert "found" in out
