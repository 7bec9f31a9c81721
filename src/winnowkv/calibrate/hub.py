"""Profiles in repositories of the Hugging Face Hub: published, and fetched. The only file that knows huggingface_hub.

A repository holds one file for each shape of a model, ``winnowkv/<class>-<hash of sizes>.json``. Only the functions here
reach the network, and nothing but ``winnow profile publish`` and ``winnow profile fetch`` calls them. The token is the one
that huggingface_hub finds by itself (``HF_TOKEN``, or ``hf auth login``); it is neither read nor printed here.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo as RepositoryInfo
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from winnowkv import __version__
from winnowkv.calibrate.card import model_card
from winnowkv.errors import HubError, InputError, ProfileError, WinnowError
from winnowkv.files import reason, shown
from winnowkv.models.calibration import CalibrationProfile, file_name, read_profile
from winnowkv.models.info import ModelInfo

FOLDER = "winnowkv"  # of a repository
CARD = "README.md"
LARGEST = 8 * 2**20  # bytes of a profile; a model of 126 layers with 128 heads has half a MiB
LOG_IN = "log in with hf auth login, or set HF_TOKEN"
# Of httpx, and from huggingface_hub 2 on of httpx2: what every request may raise.
TransportError = HfHubHTTPError.__bases__[0]


@dataclass(frozen=True)
class Published:
    """Where a profile is now.

    ``address`` opens it in a browser, ``commit`` is the revision that holds it. ``created``: the repository is new.
    ``changed``: False if it held this file already.
    """

    address: str
    path: str
    commit: str
    created: bool
    changed: bool


@dataclass(frozen=True)
class Fetched:
    """A profile that was downloaded and serves its model; ``commit`` is the revision it was read from."""

    profile: CalibrationProfile
    address: str
    commit: str


def path_in_repository(model: ModelInfo) -> str:
    """Where a repository holds the profile of a model. Raises ProfileError as :func:`file_name` does."""
    return f"{FOLDER}/{file_name(model)}"


def publish(
    profile: CalibrationProfile,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    message: str | None = None,
    endpoint: str | None = None,
) -> Published:
    """Upload a profile as one commit, into a repository that is made if it is not there.

    Parameters
    ----------
    repo: ``owner/name``. revision: a branch, made if it is not there; None: the main one.
    private: make a new repository private. message: of the commit.
    endpoint: the Hub's address; None: ``HF_ENDPOINT``, else huggingface.co.

    Raises
    ------
    HubError
        If the repository cannot be made or written, or the Hub cannot be reached.
    InputError
        With ``private`` for a repository that is public.
    ProfileError
        For a profile that is too large, before any request.
    """
    path, data = path_in_repository(profile.model_info), profile.to_json().encode()
    check_size(len(data), "the profile")
    hub = client(endpoint)
    with hub_errors(hub, repo, revision, "written"):
        info, created = repository(hub, repo, private)
        if private and not created and info.private is False:
            raise InputError(f"{repo} exists and is public: leave --private out, or name another repository")
        if revision is not None:
            info = branch(hub, repo, revision)
        operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=data)]
        if CARD not in {file.rfilename for file in info.siblings or ()}:
            card = model_card(profile, path, repo).encode()
            operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card))
        commit = hub.create_commit(
            repo,
            operations,
            commit_message=message or f"Profile of {' '.join(profile.model.split())[:60] or 'a model'}",
            revision=revision,
        )
    address = f"{hub.endpoint}/{repo}/blob/{revision or 'main'}/{path}"
    return Published(address, path, commit.oid, created, commit.oid != info.sha)


def repository(hub: HfApi, repo: str, private: bool) -> tuple[RepositoryInfo, bool]:
    """What the Hub says of a repository, and whether it was made just now."""
    try:
        return hub.model_info(repo), False
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        hub.create_repo(repo, private=private or None, exist_ok=True)
        return hub.model_info(repo), True


def branch(hub: HfApi, repo: str, revision: str) -> RepositoryInfo:
    """What the Hub says of a branch, which is made if it is not there."""
    try:
        return hub.model_info(repo, revision=revision)
    except RevisionNotFoundError:
        hub.create_branch(repo, branch=revision, exist_ok=True)
        return hub.model_info(repo, revision=revision)


def fetch(model: ModelInfo, repo: str, *, revision: str | None = None, endpoint: str | None = None) -> Fetched:
    """Download the profile of a model and check it: its size before, its digest and contents after.

    ``repo``, ``revision`` (a branch, a tag or a commit) and ``endpoint`` as for :func:`publish`. What comes is noted in its
    ``about``, as ``fetched``. Nothing stays in the Hub's own cache. Raises HubError for what cannot be reached or is not
    what was announced, ProfileError for a file that is no profile, or of another model.
    """
    path, hub = path_in_repository(model), client(endpoint)
    with hub_errors(hub, repo, revision, "read", path), tempfile.TemporaryDirectory(prefix="winnow-") as scratch:
        found = hub.get_hf_file_metadata(url=hf_hub_url(repo, path, revision=revision, endpoint=hub.endpoint))
        if found.size is None or found.commit_hash is None or found.etag is None:
            raise HubError(
                f"{hub.endpoint} answers as no Hub does: it does not say size, commit and digest of {path} in {repo}"
            )
        check_size(found.size, f"{path} in {repo}")
        # Of the commit that was just looked at, and into a cache of its own: a file of an earlier day is not what was asked.
        with no_progress_bars():
            file = Path(hub.hf_hub_download(repo, path, revision=found.commit_hash, cache_dir=scratch))
        data = file.read_bytes()
        check_size(len(data), f"{path} in {repo}")
        check_digest(data, found.etag, f"{path} in {repo}")
        profile = read_fetched(file, f"{repo}/{path}")
    profile.check(model)
    origin = {"repo": repo, "commit": found.commit_hash, "date": datetime.now(UTC).date().isoformat()}
    made = replace(profile, about={**profile.about, "fetched": origin})
    return Fetched(made, f"{hub.endpoint}/{repo}/blob/{found.commit_hash}/{path}", found.commit_hash)


def read_fetched(file: Path, name: str) -> CalibrationProfile:
    """The profile in a downloaded file. Raises ProfileError, which names the repository's file in place of the scratch one."""
    try:
        return read_profile(file)
    except ProfileError as error:
        raise ProfileError(str(error).replace(str(file), name)) from None


def client(endpoint: str | None) -> HfApi:
    """The Hub at an address."""
    return HfApi(endpoint=endpoint, library_name="winnowkv", library_version=__version__)


def check_size(size: int, what: str) -> None:
    """Raise ProfileError for more bytes than a profile can have."""
    if size > LARGEST:
        raise ProfileError(f"{what} has {size} bytes, a profile has at most {LARGEST}: it is no profile of ours")


def check_digest(data: bytes, etag: str, what: str) -> None:
    """Raise HubError if bytes are not those that were announced by their git hash or SHA-256.

    Another kind of tag (of a mirror) says nothing that could be compared.
    """
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    expected = {40: blob, 64: hashlib.sha256(data).hexdigest()}.get(len(etag), etag)
    if etag != expected:
        raise HubError(f"{what} is damaged: its digest is {expected}, the Hub announced {etag}; fetch it again")


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without huggingface_hub's progress bars: a profile is a few thousand bytes."""
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


@contextmanager
def hub_errors(hub: HfApi, repo: str, revision: str | None, done: str, path: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises into a HubError of one sentence; ``done``: what would have been done, in one word."""
    try:
        yield
    except WinnowError:
        raise
    except Exception as error:  # for a bad address, proxy or answer its HTTP client raises errors of many kinds
        raise HubError(said(error, hub.endpoint, repo, revision or "main", done, path)) from None


def said(error: Exception, endpoint: str, repo: str, revision: str, done: str, path: str | None) -> str:
    """What went wrong, and the way out."""
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo} cannot be {done}: HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, HFValidationError):
        return f"{shown(repo)} is no repository id: write it as owner/name ({reason(error)})"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: ask for access at {endpoint}/{repo}, and {LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {shown(revision)}: see {endpoint}/{repo}/tree/main"
    if isinstance(error, EntryNotFoundError) and isinstance(error, HfHubHTTPError):
        return (
            f"{repo} has no profile of this model at {revision} ({path}): see {endpoint}/{repo}/tree/{revision}, or make one "
            "with winnow calibrate"
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo} is not at {endpoint}, or it is private: see to its name, and {LOG_IN}"
    if isinstance(error, HfHubHTTPError):
        return refused(error, endpoint, repo, done)
    if isinstance(error, TransportError):
        return f"{endpoint} cannot be reached ({reason(error) or type(error).__name__}): see to the network and HF_ENDPOINT"
    return f"{repo} cannot be {done} at {endpoint}: {reason(error)}"


def refused(error: HfHubHTTPError, endpoint: str, repo: str, done: str) -> str:
    """What to say of a status that names no reason of its own; the server's own words follow, if it has some."""
    status = error.response.status_code
    ways = {
        401: LOG_IN, 403: f"the token has no right to that: use one that may, or another repository; {LOG_IN}",
        429: "too many requests: wait a while",
    }  # fmt: skip
    way = ways.get(status, "the Hub has a fault: try again later" if status >= 500 else "see the Hub's answer")
    words = f"; it says: {shown(error.server_message)}" if error.server_message else ""
    return f"{repo} cannot be {done}: {endpoint} answered {status}: {way}{words}"
