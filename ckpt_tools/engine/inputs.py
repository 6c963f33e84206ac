"""What the files of a source were before the first of them was read, so that a change at any later time is found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckpt_tools.core.errors import UsageError
from ckpt_tools.core.paths import is_there
from ckpt_tools.core.storage import storage_errors
from ckpt_tools.engine.checkpoint import Checkpoint
from ckpt_tools.engine.files import check_identity, identity_of
from ckpt_tools.engine.manifest import MANIFEST
from ckpt_tools.formats import hf
from ckpt_tools.formats.hf import SideFile
from ckpt_tools.formats.remote import remote_files

_DOCUMENTS = (hf.CONFIG, f"hf/{hf.CONFIG}", hf.INDEX, ".metadata", MANIFEST)
"""Small files of which a plan is made; those that were not there must not appear either."""


def check_unchanged(source: Checkpoint) -> None:
    """Raises `InputChangedError` when a file that the plan was made of is no longer what it was before it was read."""
    remote = remote_files(source.root)
    if remote is not None:
        remote.check_unchanged([name for name in (*_DOCUMENTS, *source.store.files) if name in remote.versions])
        return
    if not source.inputs:
        return
    for name in (*_DOCUMENTS, *(file for file in source.store.files if file in source.inputs)):
        path = source.root / name
        check_identity(path, source.inputs.get(name), identity_of(path))


def check_apart(source: Checkpoint, side_files: Mapping[str, SideFile | bytes], places: tuple[Path, ...]) -> None:
    """Raises `UsageError` when one of the directories, which the run replaces or empties, holds a file that it reads.

    Links are followed: a Hub cache's snapshot is made of links to files that lie elsewhere.
    """
    existing = [place.resolve() for place in places if is_there(place)]
    if not existing:
        return
    read = [source.root / file for file in source.store.files]
    read += [content.root / content.name for content in side_files.values() if isinstance(content, SideFile)]
    for path in (source.root, *read):
        with storage_errors("look at", path):
            real = (path.parent.resolve() / path.name, path.resolve())
        for place in existing:
            if any(part.is_relative_to(place) for part in real):
                raise UsageError(
                    f"{path} is read by this run and lies in {place}, which it would replace",
                    hint="choose another output",
                )
