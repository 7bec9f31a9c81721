"""A context makes the requests that go on from it."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import winnowkv as wk
from support.contexts import add_context
from support.tokenizers import ChatLetters, Letters
from winnowkv.contexts.context import Context
from winnowkv.contexts.export import export_context, whole_blocks
from winnowkv.contexts.fit import fields_difference, model_fields
from winnowkv.contexts.store import ContextStore

TEXT = "The wind went round the old mill and no one said a word. "
SNAPKV = "snapkv:observe=8:kernel=3"
AGAIN = """
import json, sys
from winnowkv.contexts.store import ContextStore
context = ContextStore(sys.argv[1]).context(sys.argv[2])
print(json.dumps([context.placeholders, context.salt, context.prompt([5, 6]).body]))
"""


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return add_context(ContextStore(tmp_path))


def test_placeholders_are_ids_of_the_document(tmp_path: Path) -> None:
    """As many as entries, drawn by the digest: other contexts of the same document have others."""
    store = ContextStore(tmp_path)
    one, other = add_context(store, kept=40), add_context(store, kept=40, name="another")
    for each in (one, other):
        assert len(each.placeholders) == 40
        assert set(each.placeholders) <= set(each.tokens)
    assert one.placeholders != other.placeholders
    assert one.salt != other.salt


def test_another_process_makes_the_same_request(context: Context, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", AGAIN, tmp_path, context.id], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [context.placeholders, context.salt, context.prompt([5, 6]).body]


def test_a_prompt_is_placeholders_and_what_follows(context: Context) -> None:
    prompt = context.prompt([5, 6])
    assert prompt.ids == [*context.placeholders, 5, 6]
    assert prompt.inputs == {"prompt_token_ids": prompt.ids, "cache_salt": context.salt}
    assert prompt.extra_args == {"kv_transfer_params": {"winnow_context": context.id}}
    assert prompt.body == {"prompt": prompt.ids, "cache_salt": context.salt, **prompt.extra_args}
    with pytest.raises(wk.InputError, match="no token follows the document"):
        context.prompt([])


def test_the_rest_of_a_prompt_is_what_follows_the_document(context: Context) -> None:
    tokens = list(context.tokens)
    assert context.rest([*tokens, 1, 2, 3]) == [1, 2, 3]
    for other, same in (([*tokens[:30], tokens[30] + 1, *tokens[31:], 9], 30), (tokens[:7], 7), ([], 0)):
        with pytest.raises(wk.InputError, match=f"of the document's 50 tokens it begins with {same}; put the document first"):
            context.rest(other)
    with pytest.raises(wk.InputError, match="the prompt is the document alone: ask something after it"):
        context.rest(tokens)


@pytest.mark.parametrize("chat", [False, True])
def test_a_question_becomes_the_tokens_that_the_document_reads(llama: PreTrainedModel, tmp_path: Path, chat: bool) -> None:
    tokenizer = ChatLetters() if chat else Letters()
    doc = wk.read(llama, tokenizer, TEXT, SNAPKV, 24, chat=chat)
    context = export_context(doc, tmp_path, block=8, name="mill")
    assert (context.header.chat, context.header.name, context.header.policy) == (chat, "mill", SNAPKV)
    before = len(doc.ids)
    asked = context.ask(tokenizer, "who spoke?").ids[context.kept :]
    doc.chat("who spoke?", 1)
    assert asked == doc.ids[before : before + len(asked)]
    with pytest.raises(wk.InputError, match="the question is empty"):
        context.ask(tokenizer, " ")


def test_another_tokenizer_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    class Shifted(Letters):
        def decode(self, ids, skip_special_tokens=False):
            return super().decode([each + 1 for each in ids])

    context = export_context(wk.read(llama, Letters(), TEXT, SNAPKV, 24), tmp_path, block=8)
    with pytest.raises(wk.InputError, match="this tokenizer gives other token ids"):
        context.ask(Shifted(), "who spoke?")


def test_entries_that_do_not_fill_blocks_are_warned_of(llama: PreTrainedModel, tmp_path: Path) -> None:
    doc = wk.read(llama, Letters(), TEXT, SNAPKV, 20)
    with pytest.warns(UserWarning, match=r"20 entries are no multiple of 8: .* last 4; budget=24 fills whole blocks"):
        export_context(doc, tmp_path, block=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_context(wk.read(llama, Letters(), TEXT, SNAPKV, whole_blocks(len(TEXT), 20, 8)), tmp_path, block=8)
        export_context(wk.read(llama, Letters(), TEXT, "full", 1.0), tmp_path, block=8)


@pytest.mark.parametrize(
    ("tokens", "budget", "block", "entries"),
    [
        (4000, 512, 128, 512),
        (4000, 500, 128, 512),
        (4000, 0.12, 128, 512),
        (4000, 1, 16, 16),
        (100, 90, 128, 100),
        (4000, 1.0, 128, 4000),
    ],
)
def test_whole_blocks(tokens: int, budget: int | float, block: int, entries: int) -> None:
    assert whole_blocks(tokens, budget, block) == entries


def test_whole_blocks_need_a_number() -> None:
    with pytest.raises(wk.BudgetError, match="a context needs a number beforehand"):
        whole_blocks(100, "auto:0.9")


def test_what_fits_is_told_by_the_config(llama: PreTrainedModel) -> None:
    mine = model_fields(llama.config)
    assert fields_difference(mine, dict(mine)) is None
    assert fields_difference(mine, mine | {"hidden_size": 65}) == "its model's hidden_size is 64, here 65"
    theta = mine["rope.rope_theta"]
    assert isinstance(theta, float | int)
    assert fields_difference(mine, mine | {"rope.rope_theta": theta * (1 + 1e-9)}) is None
    assert "rope.rope_theta" in str(fields_difference(mine, mine | {"rope.rope_theta": theta * 2}))
    assert "rope.factor" in str(fields_difference(mine, mine | {"rope.factor": 2.0}))
