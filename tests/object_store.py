"""A small web server for tests: files with byte ranges, pages of links, and as much of S3 as its readers ask for.

It counts requests and fails on demand, as servers and networks do.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class ObjectStore(ThreadingHTTPServer):
    """The server.

    Attributes:
        objects: content by `/bucket/key`.
        requests: method, path and Range header of each request so far.
        busy: most requests at one time.
        ranges: whether parts of files are served.
        page: status and content of directories' pages; None for pages of links.
        fault: called with method, path and range of each request; what it returns goes wrong: a status to answer,
            `drop` (the connection ends in the middle), `short` (fewer bytes, and no word of it); None for nothing.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.ranges = True
        self.page: Callable[[str], tuple[int, bytes]] | None = None
        self.fault: Callable[[str, str, str], int | str | None] = lambda *_: None
        self.busy = self.now = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, name: str, folder: Path) -> None:
        """Uploads the files of a folder."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.objects[f"/{name}/{path.relative_to(folder)}"] = path.read_bytes()


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    with ObjectStore() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@lru_cache(maxsize=1000)
def _etag(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectStore

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path, query, wanted = unquote(parts.path), parse_qs(parts.query), self.headers.get("Range", "")
        with self.server.lock:
            self.server.requests.append((self.command, path, wanted))
            self.server.now += 1
            self.server.busy = max(self.server.busy, self.server.now)
        try:
            self._serve(path, query, wanted, self.server.fault(self.command, path, wanted))
        finally:
            with self.server.lock:
                self.server.now -= 1

    def _serve(self, path: str, query: dict[str, list[str]], wanted: str, fault: int | str | None) -> None:
        if isinstance(fault, int):
            self._send(fault, b"")
        elif "list-type" in query:
            self._send(200, self._listing(path.strip("/"), query), type="application/xml")
        elif path.endswith("/"):
            names = sorted(
                {name[len(path) :].split("/")[0] + "/" * ("/" in name[len(path) :]) for name in self._below(path)}
            )
            page = "".join(f'<a href="{name}">{name}</a>' for name in names)
            status, body = self.server.page(path) if self.server.page else (200, page.encode())
            self._send(status, body, type="text/html")
        elif path not in self.server.objects:
            self._send(404, b"")
        else:
            self._content(self.server.objects[path], wanted, fault)

    def _content(self, content: bytes, wanted: str, fault: str | None) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted) if self.server.ranges else None
        headers = {"ETag": f'"{_etag(content)}"', "Last-Modified": "Sun, 22 Nov 2026 00:00:00 GMT"}
        if match is None:
            self._send(200, content, fault, **headers)
            return
        low, high = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
        span = f"bytes {low}-{high}/{len(content)}"
        self._send(206, content[low : high + 1], fault, **headers, **{"Content-Range": span})

    def _send(self, status: int, body: bytes, fault: str | None = None, *, type: str = "", **headers: str) -> None:
        self.send_response(status)
        if type:
            self.send_header("Content-Type", type)
        for name, value in headers.items():
            self.send_header(name, value)
        if fault == "short":
            body = body[: len(body) // 2]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if fault == "drop" else body)
        self.close_connection = self.close_connection or fault == "drop"

    def _below(self, folder: str) -> list[str]:
        return sorted(name for name in self.server.objects if name.startswith(folder))

    def _listing(self, bucket: str, query: dict[str, list[str]]) -> bytes:
        prefix = query.get("prefix", [""])[0]
        found = "".join(
            f"<Contents><Key>{name[len(bucket) + 2 :]}</Key><Size>{len(self.server.objects[name])}</Size>"
            f"<ETag>&quot;{_etag(self.server.objects[name])}&quot;</ETag>"
            "<LastModified>2026-11-22T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for name in self._below(f"/{bucket}/{prefix}")
        )
        count = found.count("<Key>")
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix>{prefix}</Prefix><KeyCount>{count}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        ).encode()
