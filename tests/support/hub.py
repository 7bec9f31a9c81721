"""A Hub on loopback: the part of the Hugging Face Hub's HTTP API that huggingface_hub uses for the files of a model repository.

Commits are kept in memory. Faults are asked for by name, see :class:`StubHub`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_OfTheTestsOnly"
OWNER = "ann"  # whom the token belongs to
API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|preupload|commit|branch)/(?P<revision>[^/]+))?")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repository:
    """Files of each commit, and the commit of each branch."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """A commit on top of a branch."""
        made = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        name = hashlib.sha1(f"{len(self.commits)} {sorted(made)}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = made, name
        self.messages.append(message)
        return name

    def find(self, revision: str) -> str | None:
        """The commit of a branch or a commit's name."""
        found = self.branches.get(revision, revision)
        return found if found in self.commits else None

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch."""
        return self.commits[self.branches[branch]]


@dataclass
class StubHub:
    """Its state, what it was asked, and its faults.

    Attributes
    ----------
    status: a status with which everything is answered, or nothing if None. only: a part of the paths that this is for.
    cut: bodies of files end in the middle, and cannot be continued. etag: the tag that is announced in place of a file's own.
    size: bytes that are announced in place of a file's own.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    status: int | None = None
    only: str = ""
    cut: bool = False
    etag: str | None = None
    size: int | None = None

    def add(self, repo: str, files: dict[str, bytes], *, private: bool = False) -> Repository:
        """A repository that is there already."""
        made = self.repositories[repo] = Repository(private)
        made.commit("main", files, "initial commit")
        return made


@contextmanager
def stub_hub() -> Iterator[StubHub]:
    """A Hub that runs while the block does."""
    hub = StubHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: StubHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: a client that waits for the second one costs 40 ms
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.handle_one()

    def do_HEAD(self) -> None:
        self.handle_one()

    def do_POST(self) -> None:
        self.handle_one()

    def handle_one(self) -> None:
        """One request: its body is read in any case, since the connection stays open."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        hub = self.state
        hub.asked.append(f"{self.command} {path}")
        hub.tokens.add(token)
        if hub.status is not None and hub.only in path:
            return self.answer(hub.status, {"error": "the stub was told to"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body), token)
        found = API.fullmatch(path) or FILE.fullmatch(path)
        if found is None:
            return self.answer(404, {"error": "no such page"})
        return self.in_repository(found, body, token)

    def in_repository(self, found: re.Match[str], body: bytes, token: str | None) -> None:
        """A request about a repository that may not be there, or not for everybody."""
        name, repository = found["repo"], self.state.repositories.get(found["repo"])
        if repository is None or (repository.private and token != TOKEN):
            if token is None:
                return self.answer(401, {"error": "Invalid username or password."})
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        revision = found["revision"] or "main"
        what = "file" if found.re is FILE else found["what"]
        if what in ("preupload", "commit", "branch") and (token != TOKEN or name.split("/")[0] != OWNER):
            return self.answer(403, {"error": "you may not write here"})
        if what == "branch":
            repository.branches[revision] = repository.branches["main"]
            return self.answer(201, {})
        commit = repository.find(revision)
        if commit is None:
            return self.answer(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        if what == "file":
            return self.file(repository, commit, found["path"])
        if what == "preupload":
            return self.preupload(repository.commits[commit], json.loads(body))
        if what == "commit":
            return self.commit(name, repository, revision, body)
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        return self.answer(200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings})

    def create(self, asked: dict[str, Any], token: str | None) -> None:
        """A new repository, in the name of the token's owner."""
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if token != TOKEN:
            return self.answer(401, {"error": "Invalid username or password."})
        if not name.startswith(f"{OWNER}/"):
            return self.answer(403, {"error": f"You don't have the rights to create a model under {asked['organization']}"})
        if name in self.state.repositories:
            return self.answer(409, {"error": "You already created this model repo"})
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.state.add(name, {".gitattributes": b""}, private=private)
        return self.answer(200, {"url": f"{self.state.endpoint}/{name}"})

    def preupload(self, files: dict[str, bytes], asked: dict[str, Any]) -> None:
        """All files are small, and go into git."""
        found = [
            {
                "path": one["path"], "uploadMode": "regular", "shouldIgnore": False,
                "oid": git_hash(files[one["path"]]) if one["path"] in files else None,
            }
            for one in asked["files"]
        ]  # fmt: skip
        self.answer(200, {"files": found})

    def commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        """A commit in lines of JSON: a header, and a line for each file."""
        header, *lines = (json.loads(line) for line in body.splitlines())
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines}
        made = repository.commit(branch, files, header["value"]["summary"])
        self.answer(200, {"success": True, "commitOid": made, "commitUrl": f"{self.state.endpoint}/{name}/commit/{made}"})

    def file(self, repository: Repository, commit: str, path: str) -> None:
        """A file of a commit, or what is said of it."""
        hub, data = self.state, repository.commits[commit].get(path)
        if data is None:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        size = len(data) if hub.size is None else hub.size
        more = {"X-Repo-Commit": commit, "ETag": f'"{hub.etag or git_hash(data)}"'}
        if hub.cut and self.command == "GET":
            sent = b"" if self.headers.get("Range") else data[: len(data) // 2]
            self.begin(206 if self.headers.get("Range") else 200, size, {**more, "Connection": "close"})
            self.wfile.write(sent)
            self.close_connection = True
            return None
        return self.answer(200, data, more, size)

    def answer(
        self, status: int, content: dict[str, Any] | bytes, more: dict[str, str] | None = None, size: int | None = None
    ) -> None:
        """Send an answer; of a HEAD request the headers only."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.begin(status, len(data) if size is None else size, more or {})
        if self.command != "HEAD":
            self.wfile.write(data)

    def begin(self, status: int, size: int, more: dict[str, str]) -> None:
        """Send the status and the headers."""
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(size), **more}.items():
            self.send_header(name, value)
        self.end_headers()


def git_hash(data: bytes) -> str:
    """The name of a file's contents in git."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
