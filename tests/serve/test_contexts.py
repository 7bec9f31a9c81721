"""Contexts in memory and on disk: loaded once however many ask, within their bounds, and never another key's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from transformers import PreTrainedModel

import winnowkv as wk
from support.tokenizers import ChatLetters
from winnowkv.contexts.export import export_context
from winnowkv.serve.context_files import Found
from winnowkv.serve.context_prompts import ContextPrompts
from winnowkv.serve.contexts import ServedContexts, held_bytes
from winnowkv.serve.errors import ApiError
from winnowkv.serve.keys import NO_KEY, owner_name

TEXTS = [f"The archive number {n} was founded in 17{n}2. Its keeper wrote the history. " * 2 for n in range(4)]
MIB = 2**20
ANNE, BERT = owner_name("anne-anne"), owner_name("bert-bert")


def document(model: PreTrainedModel, text: int = 0) -> wk.Document:
    return wk.read(model, ChatLetters(), TEXTS[text], "snapkv:observe=4", 24, decode_budget=None)


def served(model: PreTrainedModel, place: Path | str, **options: Any) -> ServedContexts:
    return ServedContexts(model, str(place), **{"memory": 64 * MIB, "disk": 64 * MIB, "patience": 30.0, **options})


def stored(contexts: ServedContexts, count: int = 1, owner: str = NO_KEY, *, portable: bool = True) -> list[Found]:
    """Documents stored as requests would store them; each takes the same room."""
    documents = [document(contexts.model, text) for text in range(count)]
    with pytest.warns(UserWarning, match="no multiple of 128") if portable else nullcontext():
        return [contexts.store(owner, one, 0, portable, f"text {at}") for at, one in enumerate(documents)]


def size_of(contexts: ServedContexts, found: Found) -> int:
    lease = contexts.lease(NO_KEY, found)
    lease.release()
    return held_bytes(lease.cache)


@pytest.mark.parametrize("portable", [True, False], ids=["portable", "saved"])
def test_a_context_is_read_once_and_goes_on_as_the_document(llama: PreTrainedModel, tmp_path: Path, portable: bool) -> None:
    contexts = served(llama, tmp_path)
    (found,) = stored(contexts, portable=portable)
    assert contexts.find(NO_KEY, found.context.id) == found
    with ThreadPoolExecutor(16) as threads:
        leases = list(threads.map(lambda _: contexts.lease(NO_KEY, found), range(32)))
    assert contexts.reads == 1
    assert len({id(lease.cache) for lease in leases}) == 1
    asked = torch.tensor([[40, 41, 42, 43]])
    with torch.no_grad():
        expected = llama(input_ids=asked, past_key_values=document(llama).cache).logits
        torch.testing.assert_close(llama(input_ids=asked, past_key_values=leases[0].cache).logits, expected)


def test_the_least_recently_used_goes_from_memory_and_comes_back(llama: PreTrainedModel, tmp_path: Path) -> None:
    contexts = served(llama, tmp_path)
    found = stored(contexts, 3)
    size = max(size_of(contexts, one) for one in found)
    small = served(llama, tmp_path, memory=int(2.5 * size))
    for at, reads in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        small.lease(NO_KEY, found[at]).release()
        assert small.reads == reads
        assert small.used_bytes <= small.memory
    assert len(list(tmp_path.glob("*.context"))) == 3


def test_what_is_in_use_stays_and_others_wait_for_it(llama: PreTrainedModel, tmp_path: Path) -> None:
    contexts = served(llama, tmp_path)
    found = stored(contexts, 2)
    small = served(llama, tmp_path, memory=int(1.5 * size_of(contexts, found[0])))
    first = small.lease(NO_KEY, found[0])
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(small.lease, NO_KEY, found[1])
        first.release()
        first.release()
        second = waiting.result(timeout=30)
    assert small.used_bytes == held_bytes(second.cache)
    small.patience = 0.0
    with pytest.raises(ApiError, match="other requests use all") as caught:
        small.lease(NO_KEY, found[0])
    assert (caught.value.status, caught.value.retry_after) == (429, 0.0)
    second.release()
    small.lease(NO_KEY, found[0]).release()
    assert small.used_bytes <= small.memory


def test_what_can_never_be_in_memory_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    contexts = served(llama, tmp_path, memory=1000)
    (found,) = stored(contexts)
    with pytest.raises(
        ApiError, match=r"takes \d+ bytes, the server's memory for contexts is 1000: .* --context-memory"
    ) as caught:
        contexts.lease(NO_KEY, found)
    assert caught.value.status == 507
    with pytest.raises(ApiError, match="takes 1001 bytes"):
        contexts.reserve(1001)
    assert contexts.used_bytes == 0


def test_an_error_is_that_of_all_who_wait_and_the_next_one_tries_again(
    llama: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contexts = served(llama, tmp_path)
    (found,) = stored(contexts)
    (file,) = tmp_path.glob("*.context")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    def status(_: int) -> int:
        with pytest.raises(ApiError, match=f"context {found.context.id} cannot be used, the server's log says why") as caught:
            contexts.lease(NO_KEY, found)
        return caught.value.status

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(status, range(8))) == {500}
    assert "its content is not what its name says" in caplog.text
    assert contexts.used_bytes == 0
    file.write_bytes(whole)
    contexts.lease(NO_KEY, found).release()


def test_a_deleted_context_lives_on_in_what_uses_it(llama: PreTrainedModel, tmp_path: Path) -> None:
    contexts = served(llama, tmp_path)
    (found,) = stored(contexts)
    lease = contexts.lease(NO_KEY, found)
    contexts.remove(NO_KEY, found.context.id)
    assert not list(tmp_path.glob("*.context"))
    with torch.no_grad():
        assert llama(input_ids=torch.tensor([[40, 41]]), past_key_values=lease.cache).logits.isfinite().all()
    lease.release()
    for call in (contexts.find, contexts.remove):
        with pytest.raises(ApiError, match="there is no context") as caught:
            call(NO_KEY, found.context.id)
        assert caught.value.status == 404
    with pytest.raises(ApiError, match="there is no context"):  # found before it was deleted
        served(llama, tmp_path).lease(NO_KEY, found)


def test_owners_see_their_own_contexts_and_the_operators(llama: PreTrainedModel, tmp_path: Path) -> None:
    contexts = served(llama, tmp_path)
    (operators,) = stored(contexts)
    (annes,) = [one for one in stored(contexts, 2, ANNE) if one.context.id != operators.context.id]
    bert = [found.context.id for found in contexts.listed(BERT) if isinstance(found, Found)]
    assert bert == contexts.names(BERT) == [operators.context.id]
    with pytest.raises(ApiError, match="there is no context"):
        contexts.find(BERT, annes.context.id)
    with pytest.raises(ApiError, match="there is no context"):
        contexts.remove(BERT, annes.context.id)
    assert contexts.find(BERT, operators.context.id).shared
    with pytest.raises(ApiError, match="is the operator's") as caught:
        contexts.remove(BERT, operators.context.id)
    assert caught.value.status == 403
    assert not contexts.find(ANNE, annes.context.id).shared
    contexts.remove(ANNE, annes.context.id)
    contexts.remove(ANNE, operators.context.id)  # her own copy of the same content
    assert contexts.find(ANNE, operators.context.id).shared
    contexts.remove(NO_KEY, operators.context.id)


@pytest.mark.parametrize("asked", ["..", "../../etc/passwd", "a" * 31, "A" * 32, "a" * 32 + "/..", "", "*", "a" * 31 + "\n"])
def test_what_is_no_id_never_becomes_a_path(llama: PreTrainedModel, tmp_path: Path, asked: str) -> None:
    contexts = served(llama, tmp_path)
    for call in (contexts.find, contexts.remove):
        with pytest.raises(ApiError, match="is no context's id") as caught:
            call(ANNE, asked)
        assert caught.value.status == 400


def test_a_file_more_than_the_disk_may_hold_is_refused_and_none_is_deleted(llama: PreTrainedModel, tmp_path: Path) -> None:
    """The files of all keys count, and the operator's; whoever deletes one makes room."""
    contexts = served(llama, tmp_path)
    (operators,) = stored(contexts)
    annes = stored(contexts, 2, ANNE, portable=False)
    used = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    contexts.disk = used + 100
    contexts.check_disk(100)
    why = rf"take {used} bytes and this one about 101 more, .* limit of {used + 100}: delete one"
    with pytest.raises(ApiError, match=why) as caught:
        contexts.store(BERT, document(llama, 3), 101, False, "more")
    assert caught.value.status == 507
    assert not (tmp_path / BERT).exists()
    contexts.remove(ANNE, annes[0].context.id)
    contexts.store(BERT, document(llama, 3), 101, False, "more")
    assert contexts.find(NO_KEY, operators.context.id)


def test_a_store_that_cannot_be_written_says_so_without_its_place(llama: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    contexts = served(llama, tmp_path / "file")
    with pytest.raises(ApiError, match="store of contexts cannot be written") as caught:
        contexts.store(NO_KEY, document(llama), 0, False, "text")
    assert caught.value.status == 507
    assert str(tmp_path) not in str(caught.value)


def test_a_store_that_cannot_be_read_says_so_without_its_place(
    llama: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat that names no context is read as ever."""
    contexts = served(llama, tmp_path)

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(LocalFileSystem, "ls", refused)
    for call in (contexts.names, lambda owner: list(contexts.listed(owner)), lambda owner: contexts.check_disk(1)):
        with pytest.raises(ApiError, match="store of contexts cannot be read") as caught:
            call(NO_KEY)
        assert caught.value.status == 500
    assert "cannot be listed" in caplog.text
    messages = [{"role": "user", "content": TEXTS[0]}]
    assert ContextPrompts(ChatLetters(), contexts, auto=True).chat(messages, None, NO_KEY).context is None


def test_a_context_of_another_model_is_named_and_leaves_nothing(llama: PreTrainedModel, tmp_path: Path) -> None:
    (found,) = stored(served(llama, tmp_path))
    llama.config.rope_parameters = {**llama.config.rope_parameters, "rope_theta": 500000.0}
    contexts = served(llama, tmp_path)
    with pytest.raises(ApiError, match=r"is of another model: its model's rope.rope_theta") as caught:
        contexts.lease(NO_KEY, found)
    assert caught.value.status == 400
    assert contexts.used_bytes == 0


def test_damaged_files_are_listed_by_their_id_and_can_be_deleted(llama: PreTrainedModel, tmp_path: Path) -> None:
    contexts = served(llama, tmp_path)
    (found,) = stored(contexts, portable=False)
    name = "0" * 32
    (tmp_path / f"{name}.context").write_bytes(b"nothing")
    assert list(contexts.listed(NO_KEY)) == [name, found]
    with pytest.raises(ApiError, match="cannot be used"):
        contexts.find(NO_KEY, name)
    contexts.remove(NO_KEY, name)
    assert list(contexts.listed(NO_KEY)) == [found]


def test_a_store_may_be_a_url(llama: PreTrainedModel, tmp_path: Path) -> None:
    contexts = served(llama, f"memory://{tmp_path.name}")
    found = [*stored(contexts), *stored(contexts, owner=ANNE, portable=False)]
    assert [contexts.find(ANNE, one.context.id).portable for one in found] == [True, False]
    contexts.lease(ANNE, found[1]).release()
    contexts.disk = sum(one.context.bytes for one in found)
    contexts.check_disk(0)
    with pytest.raises(ApiError, match="delete one"):
        contexts.check_disk(1)


def test_what_the_operator_adds_while_the_server_runs_is_seen(llama: PreTrainedModel, tmp_path: Path) -> None:
    contexts = served(llama, tmp_path)
    assert not contexts.names(ANNE)
    added = export_context(document(llama), tmp_path, block=1)
    assert contexts.find(ANNE, added.id).context == added
