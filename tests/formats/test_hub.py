"""Sources on disk and on the Hub. The Hub is a server in this process; nothing leaves the machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ckpt_tools.core.errors import NotFoundError, UsageError
from ckpt_tools.formats.hub import ResolvedSource, is_url, resolve_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "tiny"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"hi",
    "modeling_tiny.py": b"raise SystemExit('ran')",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"other format",
    "original/consolidated.00.safetensors": b"other format",
}


class Hub(BaseHTTPRequestHandler):
    """The endpoints that a snapshot download asks for."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        if "/gated" in path:
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        if "org/name" not in path:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if "/revision/" in path and not path.endswith(("/main", "/v1", COMMIT)):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        if "/resolve/" in path:
            name = path.split(f"/resolve/{COMMIT}/")[1]
            headers = {"ETag": f'"{hashlib.sha1(FILES[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self.send(200, FILES[name], headers, body)
        if "/tree/" in path:
            tree = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in FILES.items()
            ]
            return self.send(200, json.dumps(tree).encode(), {}, body)
        info = {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
        return self.send(200, json.dumps(info).encode(), {}, body)

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def resolve(hub: str, home: Path, *sources: str, **environment: str) -> list[list[str]]:
    """Results or errors of `resolve_source` in a fresh process, which reads the Hub's address when it starts."""
    code = (
        "import sys\n"
        "from ckpt_tools.core.errors import CkptError\n"
        "from ckpt_tools.formats.hub import resolve_source\n"
        "import json\n"
        "for source in sys.argv[1:]:\n"
        "    try:\n"
        "        found = resolve_source(source.removesuffix('#'), weights=not source.endswith('#'))\n"
        "        print(json.dumps([str(found.path), str(found.repository), str(found.revision)]))\n"
        "    except CkptError as error:\n"
        "        print(json.dumps([type(error).__name__, error.message, error.hint]))\n"
    )
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    run = subprocess.run(
        [sys.executable, "-c", code, *sources],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **settings},
    )
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_a_repository_is_fetched_without_pickles_and_other_formats(hub: str, tmp_path: Path) -> None:
    light, main, tagged = resolve(hub, tmp_path, "org/name#", "org/name@main", f"hf://org/name@{COMMIT}")
    assert light[1:] == main[1:] == tagged[1:] == ["org/name", COMMIT]
    assert light[0] == main[0] == tagged[0]
    kept = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "modeling_tiny.py"}
    assert {str(p.relative_to(main[0])) for p in Path(main[0]).rglob("*")} == kept
    assert (Path(main[0]) / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("name", ["../../../../evil.json", "C:\\evil.json"])
def test_a_listing_that_names_a_file_outside_is_refused(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(FILES, name, b"{}")
    ((kind, message, _),) = resolve(hub, tmp_path / "home", "org/name#")
    assert kind == "FormatError"
    assert "the Hub client refuses org/name" in message
    assert not list(tmp_path.rglob("*evil*"))
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_weights_can_be_left_on_the_hub(hub: str, tmp_path: Path) -> None:
    ((path, _, _),) = resolve(hub, tmp_path, "org/name#")
    assert (Path(path) / "config.json").exists()
    assert not (Path(path) / "model.safetensors").exists()


def test_what_cannot_be_fetched_is_explained(hub: str, tmp_path: Path) -> None:
    missing, gated, revision = resolve(hub, tmp_path, "org/other", "org/gated", "org/name@v9")
    assert missing[0] == gated[0] == revision[0] == "NotFoundError"
    assert "org/other is neither a directory nor a repository" in missing[1]
    assert "org/gated is gated" in gated[1]
    assert "hf auth login" in gated[2]
    assert "org/name has no revision v9" in revision[1]


def test_offline_without_a_cached_copy_is_explained(tmp_path: Path) -> None:
    offline, unreachable = (
        resolve("http://127.0.0.1:9", tmp_path, "org/name", HF_HUB_OFFLINE=flag)[0] for flag in ("1", "0")
    )
    for kind, message, hint in (offline, unreachable):
        assert kind == "NotFoundError"
        assert "org/name is not in the local Hub cache" in message
        assert "HF_HUB_OFFLINE" in hint


def test_a_directory_wins_over_a_repository_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert resolve_source("org/name") == ResolvedSource(Path("org/name"), None, None)
    with pytest.raises(UsageError, match="has no revision"):
        resolve_source("org/name", revision="main")


@pytest.mark.parametrize("source", ["/no/such/place", "./org/name", "~/no/such", "a/b/c", "name", "org/na me", ""])
def test_a_path_that_is_no_repository_name_is_not_asked_of_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match="does not exist"):
        resolve_source(source)


def test_two_revisions_are_refused() -> None:
    with pytest.raises(UsageError, match="two revisions"):
        resolve_source("org/name@a", revision="b")


@pytest.mark.parametrize(
    ("source", "url"),
    [("s3://bucket/model", True), ("https://host/model", True), ("hf://org/name", False), ("org/name@v1", False)],
)
def test_urls_other_than_the_hubs_are_read_from_where_they_are(source: str, url: bool) -> None:
    assert is_url(source) is url
