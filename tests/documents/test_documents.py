"""Documents: a text is read once, questions follow it as in one prompt, and answering leaves it as it was."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import winnowkv as wk
from support.models import hybrid
from support.tokenizers import ChatLetters, Letters
from winnowkv.prompt.chat import apply_template, open_turn, rest_of_turn, text_ending, user_message

TEXT = (
    "The archive of Oakham was founded in 1712.\nIts first keeper, Mary Lund, wrote the town's history. It has nine rooms; the "
    "last was built in 1850, and the key to it was lost at sea."
)
QUESTION = "Who wrote the history?"
SNAPKV = "snapkv:observe=4:kernel=3"
HINTED = [
    SNAPKV, "adakv:floor=0:of=snapkv:observe=4", "expected:observe=4:samples=16", "winnow:observe=4", "tova", "h2o",
    "snapkv:observe=4:kernel=3:quantize=int8",
]  # fmt: skip


@pytest.fixture(scope="module")
def embedded() -> Any:
    return wk.load("embedded", dtype=torch.float32, device="cpu")


def tiny(model: PreTrainedModel, budget: float | int = 0.3, **options: Any) -> wk.Document:
    return wk.read(model, ChatLetters(), TEXT, options.pop("policy", SNAPKV), budget, **options)


@pytest.mark.parametrize("text", [TEXT, TEXT + "\n\n", "Short.", "Ends in a number 17", "A list:\n- one\n", "Ça va «bien»"])
@pytest.mark.parametrize("system", [None, "You are a librarian."])
def test_text_and_question_are_what_the_template_gives_for_both(embedded: Any, text: str, system: str | None) -> None:
    tokenizer = embedded[1]
    ids = open_turn(tokenizer, text, chat=True, system=system)
    ending = text_ending(tokenizer, ids, chat=True)
    before = [] if system is None else [{"role": "system", "content": system}]
    for question in ("Who wrote it?", "1. What is it?", "(Which one?)", "...and then?", "¿Qué?", "\U0001f642?", " x"):
        whole = apply_template(tokenizer, [*before, *user_message(f"{text.rstrip()}\n\n{question.strip()}")])
        assert ids + rest_of_turn(tokenizer, ending, question, chat=True) == whole
    plain = open_turn(tokenizer, text, chat=False)
    rest = rest_of_turn(tokenizer, text_ending(tokenizer, plain, chat=False), QUESTION, chat=False)
    assert plain + rest == tokenizer(f"{text.rstrip()}\n\n{QUESTION}").input_ids


@pytest.mark.parametrize("chat", [True, False])
def test_with_the_whole_budget_it_answers_as_the_model_does(model: PreTrainedModel, chat: bool) -> None:
    tokenizer = ChatLetters()
    doc = wk.read(model, tokenizer, TEXT, budget=1.0, chat=chat)
    said = f"{TEXT}\n\n{QUESTION}"
    ids = torch.tensor([apply_template(tokenizer, user_message(said)) if chat else tokenizer(said).input_ids])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
    assert doc.ask(QUESTION, 8).tokens == plain.tolist()


def test_asking_leaves_the_document_as_it_was_read(llama: PreTrainedModel) -> None:
    doc = tiny(llama)
    ids, held, entries = list(doc.ids), doc.held_bytes, [layer.keys.clone() for layer in doc.cache.compact_layers]
    answers = [doc.ask(QUESTION, 8) for _ in range(2)]
    assert answers[0].tokens == answers[1].tokens
    assert "".join(doc.stream(QUESTION, 8)) == str(answers[0])
    assert (doc.ids, doc.held_bytes, doc.turn_entries) == (ids, held, 0)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(doc.cache.compact_layers, entries, strict=True))
    assert answers[0].report.decode_tokens == answers[0].question_tokens + 7
    assert doc.report.decode_tokens == 0
    assert answers[0].seconds >= answers[0].first_token_seconds > 0


def test_a_chat_is_one_cache_that_reads_on(llama: PreTrainedModel) -> None:
    tokenizer, doc = ChatLetters(), tiny(llama)
    cache = wk.CompactCache(llama, SNAPKV, 0.3)
    ids = open_turn(tokenizer, TEXT, chat=True)
    wk.prefill(llama, torch.tensor([ids]), cache)
    coming = tokenizer(f"\n\n{QUESTION}|<a>").input_ids
    clean = doc.fork()
    for turn in range(3):
        answer = doc.chat(QUESTION, 6)
        with torch.no_grad():
            logits = llama(input_ids=torch.tensor([coming]), past_key_values=cache, use_cache=True).logits[:, -1]
        expected = list(wk.greedy(llama, cache, logits, 6))
        assert answer.tokens == expected, turn
        coming = expected[-1:] + tokenizer(f"|<u>{QUESTION}|<a>").input_ids
    assert doc.turn_entries == cache.compact_layers[0].generated
    assert (clean.turn_entries, len(clean.ids)) == (0, len(ids))
    assert clean.ask(QUESTION, 6).tokens == tiny(llama).ask(QUESTION, 6).tokens


def test_messages_may_hold_earlier_turns(llama: PreTrainedModel) -> None:
    doc = tiny(llama)
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Two?"},
    ]
    doc.chat(messages, 1)
    assert ChatLetters().decode(doc.ids) == f"<u>{TEXT}\n\nOne?|<a>Yes|<u>Two?|<a>"
    for wrong in ([], messages[:2], messages[1:], [{"role": "system", "content": "x"}], ["x"]):
        with pytest.raises(wk.InputError, match="user and assistant in turn"):
            doc.chat(wrong)
    with pytest.raises(wk.InputError, match="must be text"):
        doc.chat([{"role": "user", "content": [{"type": "text"}]}])


def test_a_chat_that_fails_leaves_the_document_as_it_was(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    doc = tiny(llama)
    doc.chat("One?", 3)
    ids, entries, want = list(doc.ids), doc.turn_entries, doc.ask("Two?", 5).tokens
    monkeypatch.setattr(llama.model.layers[2], "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        doc.chat("Two?", 5)
    monkeypatch.undo()
    assert (doc.ids, doc.turn_entries) == (ids, entries)
    assert doc.ask("Two?", 5).tokens == want
    with pytest.raises(wk.InputError, match="pass the model's 1024 positions"):
        doc.chat("Two?", 1000)


def test_twenty_turns_stay_within_the_decode_budget(llama: PreTrainedModel) -> None:
    doc = tiny(llama, decode_budget=64)
    text = doc.held_entries
    for turn in range(20):
        doc.chat(f"And number {turn}?", 12)
        assert doc.turn_entries <= 64 + 63
        assert doc.held_entries <= text + 64 + 63
    assert len(doc.ids) - doc.text_tokens > 500
    assert doc.report.prompt_tokens == [doc.text_tokens]


def test_compacting_evicts_of_the_turns_only(llama: PreTrainedModel) -> None:
    doc = tiny(llama, decode_budget=None)
    text = doc.held_entries
    for turn in range(4):
        doc.chat(f"And number {turn}?", 20)
    before, other = doc.turn_entries, doc.fork()
    keys = [layer.keys[:, :, : layer.length].clone() for layer in doc.cache.compact_layers]
    doc.compact(64)
    assert (doc.turn_entries, doc.held_entries, other.turn_entries) == (64, text + 64, before)
    for layer, old in zip(doc.cache.compact_layers, keys, strict=True):
        kept = old.shape[2] - before
        assert torch.equal(layer.keys[:, :, :kept], old[:, :, :kept])
        assert torch.equal(layer.keys[:, :, layer.length - 32 : layer.length], old[:, :, -32:])
        # By the rule of the decode budget, over the newest queries.
        generated = old[:, :, -before:]
        assert layer.queries is not None
        stays = layer.decode_eviction.select(layer.queries, generated, generated, layer.scale, None, 64)
        places = stays[..., None].expand(-1, -1, -1, old.shape[3])
        assert torch.equal(layer.keys[:, :, kept : layer.length], generated.gather(2, places))
    doc.compact()  # there is nothing more to take
    assert doc.turn_entries == 64
    doc.chat("More?", 4)
    for wrong in (20, "auto"):
        with pytest.raises(wk.BudgetError):
            doc.compact(wrong)


@pytest.mark.parametrize("make", [None, hybrid])
def test_a_saved_document_goes_on(llama: PreTrainedModel, tmp_path: Path, make: Any) -> None:
    model = make() if make else llama
    doc = tiny(model, hint=QUESTION)
    doc.save(tmp_path / "read")
    again = wk.open_document(tmp_path / "read", model, ChatLetters())
    assert again.ask(QUESTION, 8).tokens == doc.ask(QUESTION, 8).tokens
    doc.chat("One?", 5)
    doc.save(tmp_path / "chat")
    again = wk.open_document(tmp_path / "chat", model, ChatLetters())
    with pytest.raises(wk.CacheError, match="read another turn first"):
        again.cache.compact_layers[0].compact(1)
    assert again.ids == doc.ids
    assert again.text_tokens == doc.text_tokens
    assert again.chat("Two?", 8).tokens == doc.chat("Two?", 8).tokens


def test_another_tokenizer_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    class Shifted(ChatLetters):
        def __call__(self, text: str, **options: Any) -> Any:
            found = super().__call__(text, **options)
            found["input_ids"] = [(token + 1) % 128 for token in found["input_ids"]]
            return found

    tiny(llama).save(tmp_path / "doc")
    with pytest.raises(wk.InputError, match="other token ids"):
        wk.open_document(tmp_path / "doc", llama, Shifted())


@pytest.mark.parametrize("policy", HINTED)
@pytest.mark.parametrize("reading", [{}, {"chunk": 64}, {"chunk": 64, "ceiling": 90}])
def test_a_hint_chooses_and_is_not_kept(llama: PreTrainedModel, policy: str, reading: dict[str, int]) -> None:
    docs = [tiny(llama, 0.3, policy=policy, hint=hint, **reading) for hint in (QUESTION, "How many rooms are there?")]
    for doc in docs:
        layers = doc.cache.compact_layers
        budget = wk.Budget(0.3).entries(doc.text_tokens)
        assert doc.report.prompt_tokens == [doc.text_tokens]
        assert sum(doc.report.kept_entries[0]) == pytest.approx(budget * len(layers))
        assert all(layer.seen == doc.text_tokens and int(layer.positions[0].max()) < doc.text_tokens for layer in layers)
        assert doc.ask(QUESTION, 3).tokens
    kept = [[layer.positions[0].tolist() for layer in doc.cache.compact_layers] for doc in docs]
    assert kept[0] != kept[1]


@pytest.mark.parametrize("make", [None, hybrid])
def test_with_the_whole_budget_a_hint_leaves_no_trace(llama: PreTrainedModel, make: Any) -> None:
    model = make() if make else llama
    docs = [tiny(model, 1.0, hint=hint) for hint in (None, "How many rooms are there?")]
    assert docs[0].ask(QUESTION, 8).tokens == docs[1].ask(QUESTION, 8).tokens
    for one, other in zip(docs[0].cache.layers, docs[1].cache.layers, strict=True):
        assert one.keys.shape == other.keys.shape
        torch.testing.assert_close(one.keys, other.keys)


def test_protected_spans_stay(llama: PreTrainedModel) -> None:
    doc = tiny(llama, 60, keep=[(3, 12), (100, 110)], hint=QUESTION)
    wanted = {*range(3, 12), *range(100, 110)}
    for layer in doc.cache.compact_layers:
        assert all(wanted <= set(head) for head in layer.positions[0].tolist())
    assert set(doc.report.kept_entries[0]) == {60}
    with pytest.raises(wk.InputError, match="ends after the prompt"):
        tiny(llama, 60, keep=[(3, 1000)], hint=QUESTION)


def test_threads_ask_one_document(llama: PreTrainedModel) -> None:
    doc = tiny(llama)
    questions = [f"What about {n}?" for n in range(4)]
    want = [doc.ask(question, 6).tokens for question in questions]
    got: dict[str, list[int]] = {}
    threads = [threading.Thread(target=lambda q=q: got.update({q: doc.ask(q, 6).tokens})) for q in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[question] for question in questions] == want


def test_what_cannot_be_read_is_refused_by_name(llama: PreTrainedModel) -> None:
    with pytest.raises(wk.InputError, match="the text is empty"):
        wk.read(llama, ChatLetters(), " \n")
    with pytest.raises(wk.InputError, match="the question is empty"):
        tiny(llama).ask(" ")
    with pytest.raises(wk.InputError, match="the question is empty"):
        tiny(llama, hint="")
    with pytest.raises(wk.InputError, match="system="):
        wk.read(llama, Letters(), TEXT, system="Be brief.")
    with pytest.raises(wk.InputError, match="no chat template: use chat=False"):
        wk.read(llama, Letters(), TEXT, chat=True)
    with pytest.raises(wk.BudgetError):
        tiny(llama, 0.3, decode_budget=3)
    with pytest.raises(wk.InputError, match="max_new_tokens"):
        tiny(llama).ask(QUESTION, 0)
