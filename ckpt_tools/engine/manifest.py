"""`ckpt-manifest.json`: what a checkpoint written by this project holds, and the digests that prove it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ckpt_tools.core.errors import FormatError
from ckpt_tools.core.paths import is_there, safe_join
from ckpt_tools.engine.digest import ALGORITHM
from ckpt_tools.formats.documents import read_json_object

MANIFEST = "ckpt-manifest.json"
VERSION = 1


@dataclass
class Manifest:
    """The record beside a checkpoint.

    Attributes:
        family: name of the family, `identity` where names are as on disk.
        layout_version: version of the families' layouts that it was written with.
        side: `hf` or `native`.
        tool: name and version of the writer.
        form: form of the Hugging Face side whose names `tensors` has, empty for the plain one.
        source: where it came from (directory name or Hub repository and revision, optimizer step), as text.
        tensors: digest of each leaf (`ckpt_tools.engine.digest`) by its Hugging Face name; None: not recorded.
        side_files: xxh3-128 of each side file by relative path.
        blobs: for checkpoints that training saved: by file, [position, length, xxh3-128] of each tensor's bytes.
    """

    family: str
    layout_version: int
    side: str
    tool: str
    form: str = ""
    source: dict[str, str] = field(default_factory=dict)
    digest: str = ALGORITHM
    tensors: dict[str, str] | None = None
    side_files: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)

    @property
    def foreign_digests(self) -> str:
        """Why its digests of tensors cannot be compared, in words; empty where they can, or where there are none."""
        if self.tensors is None or self.digest == ALGORITHM:
            return ""
        return f"the manifest, by {self.tool}, records digests by {self.digest!r}; this version makes {ALGORITHM!r}"

    def to_json(self) -> bytes:
        """The manifest as UTF-8 JSON; the same manifest gives the same bytes."""
        body = {"version": VERSION, **{k: v for k, v in asdict(self).items() if v not in (None, {}, "")}}
        return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


def read_manifest(root: Path) -> Manifest | None:
    """The manifest of a checkpoint, or None when it has none.

    Raises:
        FormatError: it is malformed or of a newer version.
    """
    path = root / MANIFEST
    if not is_there(path):
        return None
    body = read_json_object(path)
    if body.get("version") != VERSION:
        found = str(body.get("version"))[:40]
        raise FormatError(f"{path} is of version {found}, this tool reads {VERSION}", hint="upgrade the tool")
    return _checked(root, path, body)


def _checked(root: Path, path: Path, body: dict[str, Any]) -> Manifest:
    def require(condition: bool, what: str) -> None:
        if not condition:
            raise FormatError(f"{path}: {what} is missing or of the wrong kind", hint="the manifest is damaged")

    def texts(name: str) -> dict[str, str]:
        value = body.get(name, {})
        require(isinstance(value, dict) and all(isinstance(v, str) for v in value.values()), name)
        return dict(value)

    for name in ("family", "side", "tool", "digest"):
        require(isinstance(body.get(name), str), name)
    require(isinstance(body.get("form", ""), str), "form")
    require(body["side"] in ("hf", "native"), "side")
    layout_version = body.get("layout_version")
    require(type(layout_version) is int and 0 <= layout_version < 1 << 31, "layout_version")
    side_files = texts("side_files")
    blobs = body.get("blobs", {})
    require(isinstance(blobs, dict), "blobs")
    for entries in blobs.values():
        require(isinstance(entries, list) and all(map(_is_blob, entries)), "blobs")
    for name in (*blobs, *side_files):
        safe_join(root, name, named_by=str(path))
    return Manifest(
        family=body["family"],
        layout_version=body["layout_version"],
        side=body["side"],
        tool=body["tool"],
        form=body.get("form", ""),
        source=texts("source"),
        digest=body["digest"],
        tensors=texts("tensors") if "tensors" in body else None,
        side_files=side_files,
        blobs={file: [(e[0], e[1], e[2]) for e in entries] for file, entries in blobs.items()},
    )


def _is_blob(entry: object) -> bool:
    if not isinstance(entry, list) or list(map(type, entry)) != [int, int, str]:
        return False
    return all(0 <= number < 1 << 62 for number in entry[:2])
