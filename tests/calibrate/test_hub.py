"""Profiles on the Hub: what is uploaded and downloaded by huggingface_hub's own requests, and what goes wrong on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from support.hub import OWNER, TOKEN, StubHub
from support.profiles import random_profile
from winnowkv.calibrate import hub as hubs
from winnowkv.errors import HubError, InputError, ProfileError
from winnowkv.models.info import ModelInfo

SHAPE = ModelInfo("Drawn", 3, 4, 2, "abc")
PROFILE = replace(random_profile(SHAPE, 3), model="ann/drawn", about={"seed": 7, "answered": 8, "prompts": 9})
PATH = "winnowkv/Drawn-abc.json"
REPO = f"{OWNER}/profiles"


def test_a_published_profile_is_fetched_as_it_was(hub: StubHub) -> None:
    done = hubs.publish(PROFILE, REPO)
    assert (done.created, done.changed, done.path) == (True, True, PATH)
    assert done.address == f"{hub.endpoint}/{REPO}/blob/main/{PATH}"
    assert done.commit == hub.repositories[REPO].branches["main"]
    found = hubs.fetch(SHAPE, REPO)
    assert found.profile == PROFILE
    assert found.commit == done.commit
    fetched = found.profile.about.pop("fetched")
    assert found.profile.about == PROFILE.about
    assert (fetched["repo"], fetched["commit"]) == (REPO, done.commit)


def test_a_new_repository_gets_a_card_and_an_old_ones_own_stays(hub: StubHub) -> None:
    hubs.publish(PROFILE, REPO, message="first")
    card = hub.repositories[REPO].files()["README.md"].decode()
    assert card.startswith("---\nlibrary_name: winnowkv\nbase_model: ann/drawn\n")
    for words in (f"winnow profile fetch ann/drawn --repo {REPO}", PATH, "| prompts answered | 8 of 9 |", "| seed | 7 |"):
        assert words in card
    assert "| date | not said |" in card
    assert hub.repositories[REPO].messages == ["initial commit", "first"]
    hub.add("ann/mine", {"README.md": b"my own"})
    hubs.publish(PROFILE, "ann/mine")
    assert hub.repositories["ann/mine"].files() == {"README.md": b"my own", PATH: PROFILE.to_json().encode()}


def test_the_same_profile_is_not_committed_twice(hub: StubHub) -> None:
    first, again = hubs.publish(PROFILE, REPO), hubs.publish(PROFILE, REPO)
    assert (again.created, again.changed, again.commit) == (False, False, first.commit)
    other = hubs.publish(replace(PROFILE, model="another"), REPO)
    assert (other.created, other.changed) == (False, True)


def test_a_branch_is_made_and_read(hub: StubHub) -> None:
    hubs.publish(PROFILE, REPO)
    other = replace(PROFILE, errors=(0.5, 0.25, 0.25))
    done = hubs.publish(other, REPO, revision="next")
    assert done.address.endswith(f"/blob/next/{PATH}")
    assert hubs.fetch(SHAPE, REPO).profile == PROFILE
    for revision in ("next", done.commit):
        assert hubs.fetch(SHAPE, REPO, revision=revision).profile == other
    with pytest.raises(HubError, match="has no revision 'none'"):
        hubs.fetch(SHAPE, REPO, revision="none")


def test_a_private_repository_is_read_with_the_token_only(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hubs.publish(PROFILE, REPO, private=True)
    assert hub.repositories[REPO].private
    assert hubs.fetch(SHAPE, REPO).profile == PROFILE
    hubs.publish(replace(PROFILE, model="x"), REPO, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_SomebodyElse")
    with pytest.raises(HubError, match=r"is not at http.*or it is private: see to its name, and log in with hf auth login"):
        hubs.fetch(SHAPE, REPO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add("ann/open", {})
    with pytest.raises(InputError, match="exists and is public: leave --private out"):
        hubs.publish(PROFILE, "ann/open", private=True)
    assert hub.repositories["ann/open"].files() == {}


def test_who_may_not_write_is_told_so(hub: StubHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"answered 403: the token has no right to that.*You don't have the rights"):
        hubs.publish(PROFILE, "bob/profiles")
    hub.add("bob/open", {})
    with pytest.raises(HubError, match=r"bob/open cannot be written.*answered 403"):
        hubs.publish(PROFILE, "bob/open")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match="answered 401: log in with hf auth login, or set HF_TOKEN") as refused:
        hubs.publish(PROFILE, REPO)
    assert TOKEN not in str(refused.value)
    assert hub.tokens == {TOKEN, None}


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        ({"status": 404}, "cannot be read.*answered 404"),
        ({"status": 401}, "answered 401: log in"),
        ({"status": 403}, "answered 403: the token has no right"),
        ({"status": 429}, "answered 429: too many requests"),
        ({"status": 500}, "answered 500: the Hub has a fault"),
        ({"cut": True}, "cannot be reached|cannot be read"),
        ({"etag": "0" * 40}, "is damaged: its digest is [0-9a-f]{40}, the Hub announced 0{40}"),
        ({"etag": "0" * 64}, "is damaged: its digest is [0-9a-f]{64}, the Hub announced 0{64}"),
        ({"size": 2**30}, r"has 1073741824 bytes, a profile has at most 8388608"),
    ],
    ids=str,
)
def test_what_goes_wrong_is_one_sentence(hub: StubHub, faults: dict, says: str) -> None:
    hubs.publish(PROFILE, REPO)
    vars(hub).update(faults)
    with pytest.raises((HubError, ProfileError), match=says) as refused:
        hubs.fetch(SHAPE, REPO)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
    assert TOKEN not in str(refused.value)


def test_a_tag_that_is_no_digest_is_not_compared(hub: StubHub) -> None:
    hubs.publish(PROFILE, REPO)
    hub.etag = "of-a-mirror"
    assert hubs.fetch(SHAPE, REPO).profile == PROFILE


@pytest.mark.parametrize("status", [401, 500])
def test_a_fault_while_publishing_leaves_nothing(hub: StubHub, status: int) -> None:
    hub.add(REPO, {})
    hub.status, hub.only = status, "/commit/"
    with pytest.raises(HubError, match=f"cannot be written.*answered {status}"):
        hubs.publish(PROFILE, REPO)
    assert hub.repositories[REPO].files() == {}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (PROFILE.to_json()[:-40], f"profile {REPO}/{PATH} is cut off or broken"),
        (PROFILE.to_json().replace('"schema": 1', '"schema": 9'), "has schema 9, this version reads up to 1: update winnowkv"),
        (PROFILE.to_json().replace('"heads": 4', '"heads": 8'), "head scores are not 3 layers x 8 heads"),
        (PROFILE.to_json().replace('"Drawn"', '"Other"'), "is of 'ann/drawn' with architecture Other, not Drawn"),
        (random_profile(replace(SHAPE, layers=4), 2).to_json(), "with layers 4, not 3"),
        ("<html>", "is cut off or broken"),
    ],
)
def test_a_file_that_is_no_profile_of_the_model_is_refused(hub: StubHub, data: str, says: str) -> None:
    hub.add(REPO, {PATH: data.encode()})
    with pytest.raises(ProfileError, match=says):
        hubs.fetch(SHAPE, REPO)


def test_what_is_not_there_is_named(hub: StubHub) -> None:
    hubs.publish(PROFILE, REPO)
    with pytest.raises(HubError, match=r"has no profile of this model at main \(winnowkv/Other-abc.json\): see http"):
        hubs.fetch(replace(SHAPE, architecture="Other"), REPO)
    with pytest.raises(HubError, match="ann/none is not at http"):
        hubs.fetch(SHAPE, "ann/none")
    with pytest.raises(HubError, match="is no repository id: write it as owner/name"):
        hubs.fetch(SHAPE, "a/b/c")


def test_a_hub_that_cannot_be_reached_is_named(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ("http://127.0.0.1:1", "ftp://127.0.0.1"):
        with pytest.raises(HubError, match=f"{endpoint} cannot be reached.*see to the network and HF_ENDPOINT"):
            hubs.fetch(SHAPE, REPO, endpoint=endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for call in (lambda: hubs.fetch(SHAPE, REPO), lambda: hubs.publish(PROFILE, REPO)):
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set; unset it"):
            call()


def test_nothing_is_asked_for_a_profile_that_cannot_be_published(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProfileError, match=r"'a/../b' is neither the name of a model's class nor a hash"):
        hubs.publish(replace(PROFILE, model_info=replace(SHAPE, config="a/../b")), REPO)
    monkeypatch.setattr(hubs, "LARGEST", 100)
    with pytest.raises(ProfileError, match=r"the profile has \d+ bytes, a profile has at most 100"):
        hubs.publish(PROFILE, REPO)
    assert hub.asked == []


def test_a_card_holds_what_strangers_wrote_on_one_line(hub: StubHub) -> None:
    odd = {"versions": ["torch"], "model_source": "x", "command": "a | b\nc", "date": {"day": 1}}
    hubs.publish(replace(PROFILE, model="two\nlines", about=odd), REPO)
    card = hub.repositories[REPO].files()["README.md"].decode()
    assert "| command | a \\| b c |" in card
    assert "| model | two lines |" in card
    assert hub.repositories[REPO].messages[-1] == "Profile of two lines"
    hubs.publish(replace(PROFILE, model=""), REPO)
    assert hub.repositories[REPO].messages[-1] == "Profile of a model"
