"""A Hugging Face hub on the loopback interface: just enough of it for `huggingface_hub` to download from.

Repositories are dicts of bytes. Every request is recorded, and a repository can be gated, private, or cut off
in the middle of a file.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import unquote, urlsplit


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@dataclass
class StubRepository:
    """One model repository.

    Attributes:
        revisions: revision name -> path -> content.
        token: a token that must be sent; other requests get 401.
        is_gated: whether the refusal says that the repository is gated.
        cuts: path -> how many more times its download breaks off half way.
        broken: paths whose download breaks off half way and is refused from then on.
    """

    revisions: dict[str, dict[str, bytes]]
    token: str | None = None
    is_gated: bool = False
    cuts: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)

    def commit(self, revision: str) -> str | None:
        """Returns the commit of a branch or of itself; None if there is none."""
        commits = {name: _sha1(name.encode()) for name in self.revisions}
        return commits.get(revision) or (revision if revision in commits.values() else None)

    def files(self, revision: str) -> dict[str, bytes]:
        """Returns path -> content of a revision or commit."""
        return next(v for k, v in self.revisions.items() if revision in (k, _sha1(k.encode())))


class HubStub:
    """The server; a context manager. `url` is its address and `requests` what was asked: (method, path,
    headers)."""

    def __init__(self, repositories: dict[str, StubRepository]) -> None:
        self.repositories = repositories
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        stub = self

        class Handler(_Handler):
            hub = stub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self) -> list[str]:
        """Returns the paths of the files that were fetched."""
        return [
            path.split("/resolve/", 1)[1].split("/", 1)[1]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, dict(self.headers)))
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        owner_and_name = "/".join(parts[2:4] if is_api else parts[:2])
        repository = self.hub.repositories.get(owner_and_name)
        if repository is None:
            return self._refuse(404, "RepoNotFound")
        if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
            return self._refuse(401, "GatedRepo" if repository.is_gated else "RepoNotFound")
        if is_api:
            return self._api(owner_and_name, repository, parts[4:])
        return self._file(repository, parts[3], "/".join(parts[4:]))

    def _api(self, name: str, repository: StubRepository, rest: list[str]) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repository.commit(revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        files = repository.files(revision)
        if rest and rest[0] == "tree":
            self._json(
                [{"type": "file", "path": p, "size": len(d), "oid": _sha1(d)} for p, d in files.items()]
            )
        else:
            self._json(
                {"id": name, "modelId": name, "sha": commit, "siblings": [{"rfilename": p} for p in files]}
            )

    def _file(self, repository: StubRepository, revision: str, path: str) -> None:
        commit = repository.commit(revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        data = repository.files(revision).get(path)
        if data is None:
            return self._refuse(404, "EntryNotFound")
        if path in repository.broken and "Range" in self.headers:
            return self._refuse(503, "ServerError")
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_sha1(data)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if repository.cuts.get(path, 0) > 0 or path in repository.broken:
            repository.cuts[path] = repository.cuts.get(path, 0) - 1
            self.wfile.write(data[start : start + (len(data) - start) // 2])
            self.close_connection = True
            return
        self.wfile.write(data[start:])

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
