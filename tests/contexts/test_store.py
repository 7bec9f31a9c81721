"""A store gives back what was added, or says in one sentence why not; no damage of a file raises anything else."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load, save

import winnowkv as wk
from support.contexts import add_context, made_header, made_states, made_tokens
from winnowkv.contexts.store import ContextStore, digest_of


def file_of(store: ContextStore, context: str) -> Path:
    return Path(store.place) / f"{context}.context"


@pytest.mark.parametrize("kind", ["folder", "file", "memory"])
def test_what_was_added_is_given_back(kind: str, tmp_path: Path) -> None:
    """From a folder that was not there, and from URLs."""
    place = {"folder": tmp_path / "new" / "store", "file": f"file://{tmp_path}/new", "memory": f"memory://{tmp_path.name}"}[
        kind
    ]
    store = ContextStore(place)
    assert (store.ids(), list(store)) == ([], [])
    one, other = add_context(store), add_context(store, seed=1, name="another")
    again = ContextStore(place)
    assert again.ids() == sorted([one.id, other.id])
    assert {each.id: each for each in again} == {one.id: one, other.id: other}
    assert again.context(one.id) == one
    assert one.id in again
    states = again.states(one.id)
    assert torch.equal(states.keys, made_states(20, 50).keys)
    assert torch.equal(states.values, made_states(20, 50).values)
    assert (states.kept, states.seen) == (20, 50)
    again.remove(one.id)
    assert one.id not in store
    assert store.ids() == [other.id]


def test_a_context_is_added_once(tmp_path: Path) -> None:
    store = ContextStore(tmp_path)
    one = add_context(store)
    before = file_of(store, one.id).stat().st_mtime_ns
    assert add_context(store) == one
    assert file_of(store, one.id).stat().st_mtime_ns == before
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("changed", ["kept", "name", "tokens", "values"])
def test_whatever_differs_gives_another_id(changed: str, tmp_path: Path) -> None:
    """An id means one content: header, tokens, keys and values."""
    store = ContextStore(tmp_path)
    one = add_context(store)
    states, tokens, header = made_states(20, 50), made_tokens(50), made_header(20, 50)
    if changed == "kept":
        states, header = made_states(19, 50), made_header(19, 50)
    elif changed == "name":
        header = made_header(20, 50, name="Made")
    elif changed == "tokens":
        tokens[3] += 1
    else:
        states.values[1, 2, 3, 4] += 1
    assert store.add(header, states, tokens).id != one.id


@pytest.mark.parametrize(
    "asked", ["0" * 32, "../" + "0" * 29, "/etc/passwd", "A" * 32, "0" * 31, "0" * 33, "0" * 32 + "\n", "", 7]
)
def test_what_is_no_context_is_an_input_error(asked: Any, tmp_path: Path) -> None:
    """Also ids that are paths: nothing outside of the store is looked at."""
    store = ContextStore(tmp_path / "store")
    add_context(store)
    (tmp_path / f"{'0' * 29}.context").write_text("outside")
    for ask in (store.context, store.states, store.remove):
        with pytest.raises(
            wk.InputError, match=r"there is no context 0{32} in store|is no context's id: ids are 32 hexadecimal"
        ):
            ask(asked)
    assert (tmp_path / f"{'0' * 29}.context").exists()


def test_a_kind_of_url_that_is_unknown_is_an_input_error() -> None:
    with pytest.raises(wk.InputError, match=r"store 'nosuch://place': .*: give a folder, or a URL that fsspec knows"):
        ContextStore("nosuch://place")


def test_a_store_that_cannot_be_written_is_a_cache_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(wk.CacheError, match=r"store .*/file/store: context [0-9a-f]{32} cannot be written"):
        add_context(ContextStore(tmp_path / "file" / "store"))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ContextStore(tmp_path)

    def full(path: str, data: bytes) -> None:
        Path(path).write_bytes(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store._files, "pipe_file", full)
    with pytest.raises(wk.CacheError, match="cannot be written: No space left on device"):
        add_context(store)
    assert os.listdir(tmp_path) == []


def test_other_files_of_the_folder_are_no_contexts(tmp_path: Path) -> None:
    store = ContextStore(tmp_path)
    one = add_context(store)
    for name in ("notes.txt", f".{'0' * 16}.part", "0.context", f"{'g' * 32}.context"):
        (tmp_path / name).write_text("something else")
    assert store.ids() == [one.id]
    assert list(store) == [one]


def test_a_context_that_is_deleted_while_they_are_listed_is_left_out(tmp_path: Path) -> None:
    store = ContextStore(tmp_path)
    made = sorted((add_context(store, seed=seed) for seed in range(3)), key=lambda one: one.id)
    found = iter(store)
    assert next(found) == made[0]
    store.remove(made[1].id)
    assert list(found) == made[2:]
    with pytest.raises(wk.InputError, match=f"there is no context {made[1].id}"):
        store.states(made[1].id)


def test_truncated_files_are_refused_at_once(tmp_path: Path) -> None:
    """Wherever they end; also when only the header is read."""
    store = ContextStore(tmp_path)
    one = add_context(store)
    file = file_of(store, one.id)
    whole = file.read_bytes()
    for end in (0, 3, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:end])
        for ask in (store.context, store.states):
            with pytest.raises(wk.CacheError, match=rf"context {one.id} .* cannot be used \(.*\): remove it and add it anew"):
                ask(one.id)
    file.write_bytes(whole)
    assert store.context(one.id) == one


def test_a_changed_byte_is_noticed_before_keys_are_used(tmp_path: Path) -> None:
    """Any byte that means something: of numbers, shapes, names, tokens, keys and values."""
    store = ContextStore(tmp_path)
    one = add_context(store)
    file = file_of(store, one.id)
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    drawn = random.Random(3)
    spots = [*range(8), *drawn.sample(range(8, 8 + length), 60), *drawn.sample(range(8 + length, len(whole)), 60)]
    for spot in spots:
        file.write_bytes(whole[:spot] + bytes([whole[spot] ^ 1]) + whole[spot + 1 :])
        try:
            states = store.states(one.id)
        except wk.CacheError:
            continue
        assert whole[spot : spot + 1].isspace(), f"byte {spot} was changed and not noticed"
        assert torch.equal(states.keys, made_states(20, 50).keys)


def test_a_renamed_file_is_refused(tmp_path: Path) -> None:
    store = ContextStore(tmp_path)
    one = add_context(store)
    file_of(store, one.id).rename(file_of(store, "0" * 32))
    for ask in (store.context, store.states):
        with pytest.raises(wk.CacheError, match="its content is not what its name says"):
            ask("0" * 32)


def forged(store: ContextStore, about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """A file whose digest is right and whose content is not."""
    text = json.dumps(about)
    digest = digest_of(text, tensors)
    file_of(store, digest[:32]).write_bytes(save(tensors, metadata={"winnowkv": text, "digest": digest}))
    return digest[:32]


@pytest.mark.parametrize("what", ["fewer entries", "other heads", "fewer tokens", "no values", "numbers", "unknown field"])
def test_a_header_of_another_shape_is_refused(what: str, tmp_path: Path) -> None:
    store = ContextStore(tmp_path)
    one = add_context(store)
    tensors = load(file_of(store, one.id).read_bytes())
    about = json.loads(one.header.model_dump_json())
    if what == "fewer entries":
        about["kept"] = 19
    elif what == "other heads":
        about["kv_heads"] = 5
    elif what == "fewer tokens":
        tensors["tokens"] = tensors["tokens"][:-1].clone()
    elif what == "no values":
        del tensors["values"]
    elif what == "numbers":
        tensors = {name: torch.tensor(1.0) for name in tensors}
    else:
        about["unknown"] = 1
    name = forged(store, about, tensors)
    for ask in (store.context, store.states):
        with pytest.raises(wk.CacheError, match="cannot be used"):
            ask(name)


def tables() -> st.SearchStrategy[bytes]:
    """Headers of files: JSON of the right outline with anything in it."""
    number = st.integers() | st.sampled_from([2**31, 2**63, 10**30, -1]) | st.floats(allow_nan=False) | st.text(max_size=3)
    anything = st.recursive(st.none() | number, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
    tensor = st.fixed_dictionaries({"dtype": st.just("F32"), "shape": anything, "data_offsets": st.lists(number, max_size=3)})
    table = st.fixed_dictionaries(
        {"__metadata__": st.fixed_dictionaries({"winnowkv": anything, "digest": anything}) | anything},
        optional=dict.fromkeys(("keys", "tokens", "values"), tensor | anything),
    )
    return table.map(lambda one: json.dumps(one).encode()).map(lambda text: len(text).to_bytes(8, "little") + text)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60) | tables(), tail=st.binary(max_size=20))
def test_whatever_a_file_holds_it_is_refused(data: bytes, tail: bytes) -> None:
    """Of its own name's digest or none: an error of ours and no other."""
    store = ContextStore("memory://damages")
    name = "0" * 32
    store._files.pipe_file(f"{store._root}/{name}.context", data + tail)
    for ask in (store.context, store.states, lambda _: list(store)):
        with pytest.raises((wk.InputError, wk.CacheError)):
            ask(name)


HUGE = {"dtype": "I32", "shape": [2], "data_offsets": [10**30, 10**30 + 8]}


@pytest.mark.parametrize("fault", ["nested", "huge", "folder", "empty tokens", "digest"])
def test_damages_that_once_raised_something_else(fault: str, tmp_path: Path) -> None:
    """With a header that is right as far as it goes."""
    store = ContextStore(tmp_path)
    one = add_context(store)
    file = file_of(store, one.id)
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    table = json.loads(whole[8 : 8 + length])
    if fault == "nested":
        text = b"[" * (1 << 19)
    elif fault == "huge":
        text = json.dumps(table | {"tokens": HUGE}).encode()
    elif fault == "empty tokens":
        text = json.dumps(table | {"tokens": table["tokens"] | {"data_offsets": [0, 0]}}).encode()
    else:
        table["__metadata__"]["digest"] = 7
        text = json.dumps(table).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    if fault == "folder":
        file.unlink()
        file.mkdir()
    for ask in (store.context, store.states):
        with pytest.raises(wk.CacheError, match="cannot be used"):
            ask(one.id)
