"""A small server that speaks the hub's protocol on loopback, as huggingface_hub asks it, and misbehaves when told to.

It keeps what was asked and how much it sent, by repository, so that a test can say what was *not* asked.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@dataclass(kw_only=True)
class Repository:
    """A repository's files, and how it is served."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    members: frozenset[str] | None = None
    """Tokens that may read its files; None is everyone's. What it holds is told to all, as the hub does."""
    renamed: str | None = None
    api_waits_s: float = 0.0
    """Seconds before the repository's description is sent."""
    api_status: int = 200
    api_text: str | None = None
    """Sent in the description's place."""
    api_cut: bool = False
    """Whether the description breaks off in its middle."""
    cuts: int = 0
    """How many of the answers with a file's content break off in their middle."""
    resumes: bool = True
    """Whether a request for the rest of a file is answered with the rest."""
    drips_s: float = 0.0
    """Seconds between any two pieces of a file."""
    drip_bytes: int = 1
    """How many bytes a piece has."""
    says_bytes: int | None = None
    """What is said of a file's size, in place of the truth."""


class Hub(ThreadingHTTPServer):
    """The server; `repositories` may be changed while it runs."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, repositories: Mapping[str, Repository]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = dict(repositories)
        self.asked: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def paths(self, repository: str) -> list[str]:
        """Return the paths asked for within one repository, its description being ""."""
        return [path for name, path in self.asked if name == repository]


@contextmanager
def running(repositories: Mapping[str, Repository]) -> Iterator[Hub]:
    """Run a hub with these repositories."""
    hub = Hub(repositories)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"] and (len(parts) == 4 or parts[4:5] in (["revision"], ["tree"]))
        if is_api:
            owner, name, rest = parts[2], parts[3], parts[4:]
        elif len(parts) > 4 and parts[2] == "resolve":
            owner, name, rest = parts[0], parts[1], parts[3:]
        else:
            self.server.asked.append(("", self.path))
            self._refuse(404, "EntryNotFound", "there is nothing here")
            return
        self.name = f"{owner}/{name}"
        self.server.asked.append((self.name, "" if is_api else "/".join(rest[1:])))
        repository = self.server.repositories.get(self.name)
        if repository is None:
            # The hub tells a stranger nothing, not even that there is nothing.
            status = 404 if self._token() else 401
            self._refuse(status, "RepoNotFound" if status == 404 else None, "Repository not found")
        elif self._token() == "stale":
            self._refuse(401, None, "Invalid credentials in Authorization header")
        elif repository.renamed is not None:
            self._send(307, b"", {"Location": self.path.replace(self.name, repository.renamed)})
        elif is_api and rest[:1] == ["tree"]:
            listed = [{"type": "file", "path": n, "size": len(f), "oid": "0" * 40} for n, f in repository.files.items()]
            self._send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
        elif is_api:
            self._describe(repository, rest[-1] if rest else "main")
        else:
            self._file(repository, rest[0], "/".join(rest[1:]))

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip() or None

    def _describe(self, repository: Repository, revision: str) -> None:
        time.sleep(repository.api_waits_s)
        commit = self._commit(revision)
        if commit is None:
            return
        if repository.api_status != 200:
            self._refuse(repository.api_status, None, "the server is told to say so")
            return
        told = {
            "_id": "0" * 24,
            "id": self.name,
            "sha": commit,
            "private": False,
            "gated": False if repository.members is None else "auto",
            "siblings": [{"rfilename": f} for f in repository.files],
        }
        text = json.dumps(told) if repository.api_text is None else repository.api_text
        self._send(200, text.encode(), {"Content-Type": "application/json"}, is_cut=repository.api_cut)

    def _commit(self, revision: str) -> str | None:
        commit = COMMITS.get(revision, revision if revision in COMMITS.values() else None)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _file(self, repository: Repository, revision: str, path: str) -> None:
        if repository.members is not None and self._token() not in repository.members:
            status = 403 if self._token() else 401
            self._refuse(status, "GatedRepo", f"Access to model {self.name} is restricted")
            return
        commit = self._commit(revision)
        if commit is None:
            return
        if path not in repository.files:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        body, start = repository.files[path], 0
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted and repository.resumes:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        with self.server.lock:
            is_cut = self.command == "GET" and repository.cuts > 0
            repository.cuts -= is_cut
        self._send(
            206 if start else 200,
            body[start:],
            headers,
            is_cut=is_cut,
            drips_s=repository.drips_s,
            drip_bytes=repository.drip_bytes,
            says_bytes=repository.says_bytes,
        )

    def _refuse(self, status: int, code: str | None, text: str, more: Mapping[str, str] | None = None) -> None:
        headers = {"X-Error-Message": text, **({"X-Error-Code": code} if code else {}), **(more or {})}
        self._send(status, json.dumps({"error": text}).encode(), headers)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str],
        *,
        is_cut: bool = False,
        drips_s: float = 0.0,
        drip_bytes: int = 1,
        says_bytes: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if says_bytes is None else says_bytes))
        self.end_headers()
        if self.command == "HEAD":
            return
        shown = body[: len(body) // 2] if is_cut else body
        pieces = [shown] if not drips_s else [shown[i : i + drip_bytes] for i in range(0, len(shown), drip_bytes)]
        try:
            for piece in pieces:
                self.wfile.write(piece)
                with self.server.lock:
                    self.server.sent[getattr(self, "name", "")] += len(piece)
                time.sleep(drips_s)
        except OSError:  # who asked has gone
            is_cut = True
        if is_cut:
            self.close_connection = True
