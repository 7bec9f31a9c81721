"""RULER's 13 tasks: rows made by lm-eval for a tokenizer and a length, split where the question begins, without a network."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.evaluation import write_model
from winnowkv.errors import InputError, ModelNotFoundError
from winnowkv.evaluate.settings import settings
from winnowkv.evaluate.tasks import ruler, tasks
from winnowkv.evaluate.tasks.protocol import encode_row
from winnowkv.evaluate.tasks.run import Evaluation, Work, Worker
from winnowkv.evaluate.tasks.tasks import EvalTask, Row, find_tasks

LENGTH = ruler.LEAST_LENGTH
TEMPLATE = (
    "{% for message in messages %}<user>{{ message.content }}</user>{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% if enable_thinking is defined and not enable_thinking %}<no-thoughts>"
    "{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The folder of a tiny model, whose tokenizer makes a token of each word."""
    return str(write_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """Keeps nltk from looking for data in the network while lm-eval is imported."""
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)


@pytest.fixture
def made(model):
    """A function from a task's name to its first two rows."""
    pytest.importorskip("wonderwords", reason="wonderwords is not installed (pip install 'winnowkv[eval]')")

    def rows(name: str) -> list[tuple[EvalTask, Row]]:
        asked = Evaluation((name,), ("full",), (0.5,), "context-only", model=model, limit=2, max_context=LENGTH)
        return asked.rows()

    return rows


def test_the_13_tasks_are_known_without_the_packages_that_make_their_rows(monkeypatch):
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    found = {task.name: task for task in find_tasks(["ruler13"])}
    assert len(found) == 13
    tokens = {"niah_single_1": 128, "niah_multivalue": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa_squad": 32, "qa_hotpot": 32}
    assert {name: found[f"ruler_{name}"].max_new_tokens for name in tokens} == tokens
    assert {task.metric for name, task in found.items() if "_qa_" in name} == {"string_match_part"}
    assert {task.metric for name, task in found.items() if "_qa_" not in name} == {"string_match_all"}
    assert all(task.chat for task in found.values())


@pytest.mark.parametrize("name", ruler.OFFLINE)
def test_a_row_fits_the_length_hides_its_question_and_holds_its_answers(made, name):
    rows = made(name)
    assert len({row.id for _, row in rows}) == len(rows) == 2
    for task, row in rows:
        words = len(f"{row.prompt} {row.prefix}".split())
        assert LENGTH / 4 < words <= LENGTH  # a word is at least one of this tokenizer's tokens
        assert row.after.startswith(("What is the special magic", "Question: "))
        assert "\n" not in row.after
        assert row.context.endswith("\n")
        assert row.prompt == row.doc["input"]
        assert row.answers
        assert all(answer in row.context for answer in row.answers)
        assert row.prefix.split()[0] in ("The", "Answer:")
        assert task.score(row, f" {', '.join(row.answers)}.") == 1
        assert task.score(row, "none of them") == 0


def test_several_answers_count_by_their_share(made):
    (task, row), *_ = made("ruler_vt")
    assert task.score(row, row.answers[0]) == pytest.approx(1 / len(row.answers))
    one_is_enough = replace(find_tasks(["ruler_qa_squad"])[0], name="ruler_vt")
    assert one_is_enough.score(row, row.answers[0]) == 1


def test_the_same_rows_are_made_again_and_random_numbers_are_put_back(made):
    random.seed(7)
    np.random.seed(7)
    before, numpy_before = random.getstate(), np.random.get_state()[1].tolist()
    names = ("ruler_niah_single_1", "ruler_cwe", "ruler_vt", "ruler_fwe")
    first = [[row.prompt for _, row in made(name)] for name in names]
    assert [[row.prompt for _, row in made(name)] for name in reversed(names)] == first[::-1]
    assert random.getstate() == before
    assert np.random.get_state()[1].tolist() == numpy_before


def test_the_raw_prompt_is_the_one_that_lm_eval_asks(made, model):
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    (_, row), *_ = made("ruler_niah_single_1")
    config = tasks.definition("ruler/niah_single_1.yaml")
    theirs = ConfigurableTask(config={**config, "custom_dataset": lambda **_: {"test": Dataset.from_list([row.doc])}})
    encoded = encode_row(row, replace(find_tasks(["ruler_vt"])[0]), ruler.tokenizer_of(model), "official", None, chat=False)
    assert encoded.text == f"{theirs.fewshot_context(row.doc, num_fewshot=0)} {row.prefix}"


@pytest.mark.parametrize("chat", [True, False])
def test_the_question_and_the_answers_first_words_are_read_after_the_text(model, chat):
    tokenizer = ruler.tokenizer_of(model)
    tokenizer.chat_template = TEMPLATE
    task = find_tasks(["ruler_niah_single_1"])[0]
    row = Row(task.name, "0", "", "w1 w2 w3\n", "w4 w5", ("w9",), {}, "w6 w7")
    encoded = encode_row(row, task, tokenizer, "context-only", None, chat=chat)
    assert tokenizer.decode(encoded.ids[: encoded.context_end]).split()[-3:] == ["w1", "w2", "w3"]
    assert tokenizer.decode(encoded.ids[encoded.context_end :]).split()[:2] == ["w4", "w5"]
    assert encoded.text == ("<user>w1 w2 w3\nw4 w5</user><answer><no-thoughts>w6 w7" if chat else "w1 w2 w3\nw4 w5 w6 w7")
    assert encode_row(replace(row, prefix=""), task, tokenizer, "official", None, chat=True).text.endswith("</user><answer>")


def test_two_rows_are_answered_whole_by_every_setting(made, model):
    asked = Evaluation(
        ("ruler_niah_single_1",), ("full", "snapkv:observe=8"), (0.5,), "context-only", model=model, limit=2, max_context=LENGTH
    )
    # A limit of prompts does not cut what was made for a length.
    worker = Worker(replace(asked, max_context=64))
    every = settings(asked.policies, asked.budgets)
    lines = worker.answer([Work(task.name, row, every) for task, row in asked.rows()])
    assert len(lines) == 4
    assert [line["failed"] for line in lines] == [None] * 4
    assert all(line["truncated_tokens"] == 0 and 64 < line["prompt_tokens"] <= LENGTH for line in lines)
    full, snap = lines[:2]
    question = len(f"{made('ruler_niah_single_1')[0][1].after}".split())
    assert full["kept_entries"] < full["prompt_tokens"] - question  # the question is no part of what is counted
    assert snap["kept_entries"] == full["kept_entries"] // 2


def test_a_missing_package_is_named_with_the_command_that_gets_it(model, monkeypatch):
    tasks.definition.cache_clear()
    for module in [name for name in sys.modules if "prepare_niah" in name or "niah_utils" in name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(
        InputError, match=r"task niah_single_1 cannot be used: .*wonderwords.* \(pip install 'winnowkv\[eval\]'\)"
    ):
        find_tasks(["ruler_niah_single_1"])[0].for_model(model, None).rows(None)


@pytest.mark.parametrize("error", [ConnectionError("no way\nmore"), LookupError("\n****\n  Resource punkt_tab not found.")])
def test_what_cannot_be_fetched_is_reported_with_what_needs_no_download(model, monkeypatch, error):
    def generator(**_: Any) -> None:
        raise error

    read = tasks.definition
    config = {"custom_dataset": generator}
    monkeypatch.setattr(ruler, "definition", lambda path, functions=True: config if functions else read(path, functions=False))
    said = (
        r"ruler_qa_squad: lm-eval cannot make rows of 4096 tokens: (no way|Resource punkt_tab not found\.) \(these need no down"
    )
    with pytest.raises(InputError, match=said):
        find_tasks(["ruler_qa_squad"])[0].for_model(model, None).rows(Path("anywhere"))


def test_questions_that_lm_eval_words_otherwise_are_not_guessed():
    with pytest.raises(InputError, match="no question begins with 'What ' in this lm-eval version's rows"):
        find_tasks(["ruler_niah_single_1"])[0].row(
            0, {"input": "Some text.\nWhich one?", "outputs": ["a"], "gen_prefix": "It is"}
        )


def test_lengths_at_which_lm_eval_may_not_end_are_refused(model):
    with pytest.raises(InputError, match="ruler_vt: rows of 1023 tokens are too short: give --max-context at least 1024"):
        find_tasks(["ruler_vt"])[0].for_model(model, 1023).rows(None)


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ModelNotFoundError, match="'/nowhere' cannot be loaded"):
        ruler.tokenizer_of("/nowhere")
