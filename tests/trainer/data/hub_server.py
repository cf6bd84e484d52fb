"""A Hugging Face hub on loopback: folders as repositories of one commit, at the addresses that its libraries ask."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(repositories: dict[str, Path], gated: Collection[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """Serve folders, named such as models/owner/name and datasets/owner/name; gated ones give no file without a token.

    Yields:
        The hub's address, and the requests so far.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer()

        def _answer(self) -> None:
            asked.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0].strip("/")
            for name, folder in repositories.items():
                if path == f"api/{name}" or path.startswith(f"api/{name}/"):
                    return self._info(name, folder, path.removeprefix(f"api/{name}").strip("/").split("/"))
                if (start := f"{name.removeprefix('models/')}/resolve/") and path.startswith(start):
                    if name in gated and "Authorization" not in self.headers:
                        return self._send(401, b"{}", {"X-Error-Code": "GatedRepo"})
                    return self._file(folder / path.removeprefix(start).partition("/")[2])
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _info(self, name: str, folder: Path, what: list[str]) -> None:
            files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
            if what[0] in ("", "revision"):
                if what[1:] not in ([], ["main"], [COMMIT]):
                    return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                identity = {"_id": "1", "id": name.partition("/")[2], "sha": COMMIT, "tags": [], "downloads": 0}
                return self._json(identity | {"private": False, "siblings": [{"rfilename": file} for file in files]})
            listed = [
                {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": _oid(folder / file)}
                for file in files
            ]
            return self._json(listed)

        def _file(self, file: Path) -> None:
            if not file.is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            content, wanted = file.read_bytes(), self.headers.get("Range")
            if wanted:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                begin, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
                headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
                return self._send(206, content[begin : end + 1], headers)
            return self._send(200, content, headers)

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()  # noqa: S324 - the hub's own way to name a file's content
