"""A hub for tests: the part of the Hugging Face hub's HTTP that fetching a model uses, on localhost."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories of files that are served, interrupted, hidden and counted.

    Attributes:
        repositories: id -> revision -> name -> content.
        large: files of at least as many bytes are LFS files.
        token: what has to be sent, None: nothing.
        gated: repositories whose terms nobody has accepted.
        break_after: name -> bytes after which the connection breaks, once for each item of the list.
        sent: name -> bytes of content sent.
        requests: (method, path) in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.large = 10_000
        self.token: str | None = None
        self.gated: set[str] = set()
        self.break_after: dict[str, list[int]] = {}
        self.status: int | None = None
        self.slow = threading.Event()
        self.slow.set()
        self.sent: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.slow.set()
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repository: str, revision: str) -> str | None:
        """The commit that a revision is, which follows from the content."""
        revisions = self.repositories.get(repository, {})
        commits = {self._commit(name, files): name for name, files in revisions.items()}
        if revision in commits:
            return revision
        return self._commit(revision, revisions[revision]) if revision in revisions else None

    @staticmethod
    def _commit(name: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(name.encode())
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        return digest.hexdigest()

    def _files(self, repository: str, commit: str) -> dict[str, bytes]:
        revisions = self.repositories[repository]
        return next(files for name, files in revisions.items() if self._commit(name, files) == commit)

    def _answer(self, http: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(http.path).path)
        self.requests.append((http.command, path))
        if self.status is not None:
            return self._refuse(http, self.status, "")
        api = re.fullmatch(r"/api/models/(.+?)/(revision|tree)/([^/]+)/?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        plain = re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)
        match = api or file or plain
        if match is None:
            return self._refuse(http, 404, "EntryNotFound")
        repository = match[1]
        revision = "main" if match is plain else match[3] if match is api else match[2]
        if repository not in self.repositories or (
            self.token is not None and http.headers.get("Authorization") != f"Bearer {self.token}"
        ):
            return self._refuse(http, 401, "RepoNotFound")
        if repository in self.gated:
            return self._refuse(http, 403, "GatedRepo")
        commit = self.commit(repository, revision)
        if commit is None:
            return self._refuse(http, 404, "RevisionNotFound")
        files = self._files(repository, commit)
        if match is file:
            return self._send(http, commit, match[3], files)
        if match is api and match[2] == "tree":
            return self._json(http, [self._listed(name, content) for name, content in files.items()])
        siblings = [{"rfilename": name} for name in files]
        self._json(
            http, {"_id": "0", "id": repository, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0}
        )

    def _listed(self, name: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": self._oid(content)}
        if len(content) >= self.large:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    @staticmethod
    def _oid(content: bytes) -> str:
        return hashlib.sha1(content).hexdigest()

    def _send(self, http: BaseHTTPRequestHandler, commit: str, name: str, files: dict[str, bytes]) -> None:
        if name not in files:
            return self._refuse(http, 404, "EntryNotFound")
        content = files[name]
        large = len(content) >= self.large
        etag = hashlib.sha256(content).hexdigest() if large else self._oid(content)
        asked = re.fullmatch(r"bytes=(\d+)-", http.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        body = content[start:]
        http.send_response(206 if asked else 200)
        http.send_header("ETag", f'"{etag}"')
        http.send_header("X-Repo-Commit", commit)
        http.send_header("Accept-Ranges", "bytes")
        http.send_header("Content-Length", str(len(body)))
        if asked:
            http.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        http.end_headers()
        if http.command == "HEAD":
            return
        breaks = self.break_after.get(name, [])
        limit = breaks.pop(0) if breaks else None
        for at in range(0, len(body), 65536):
            self.slow.wait(30)
            piece = body[at : at + 65536] if limit is None else body[at : min(at + 65536, limit)]
            try:
                http.wfile.write(piece)
                http.wfile.flush()
            except OSError:
                http.close_connection = True
                return
            self.sent[name] += len(piece)
            if limit is not None and at + 65536 >= limit:
                http.close_connection = True
                http.connection.shutdown(2)
                return

    def _refuse(self, http: BaseHTTPRequestHandler, status: int, code: str) -> None:
        http.send_response(status)
        if code:
            http.send_header("X-Error-Code", code)
        http.send_header("Content-Length", "0")
        http.end_headers()

    def _json(self, http: BaseHTTPRequestHandler, value: object) -> None:
        body = json.dumps(value).encode()
        http.send_response(200)
        http.send_header("Content-Type", "application/json")
        http.send_header("Content-Length", str(len(body)))
        http.end_headers()
        if http.command != "HEAD":
            http.wfile.write(body)
