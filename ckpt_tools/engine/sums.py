"""SHA-256 of whole files, in `SHA256SUMS` beside them: what the Hub, signing tools and `sha256sum -c` speak."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from ckpt_tools.core.errors import FormatError, MismatchError, listed
from ckpt_tools.core.paths import safe_join
from ckpt_tools.core.scratch import scratch
from ckpt_tools.core.storage import storage_errors
from ckpt_tools.engine.execute import Progress, run_threads
from ckpt_tools.engine.files import FileReader
from ckpt_tools.formats.documents import MAX_DOCUMENT_SIZE, read_whole
from ckpt_tools.formats.hf import SUMS

_BUFFER = 1 << 20
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def sums_document(root: Path, files: Iterable[str], *, threads: int | None, progress: Progress | None) -> bytes:
    """The content of `SHA256SUMS` for files of a directory, given by relative path."""
    found = _hash(root, sorted(files), threads, progress)
    return "".join(f"{digest}  {file}\n" for file, digest in found.items()).encode()


def verify_sums(root: Path, *, threads: int | None, progress: Progress | None) -> list[str]:
    """Compares the files that `SHA256SUMS` lists, where there is one; what was compared, in words.

    Raises:
        MismatchError: a file is missing or has another digest.
        FormatError: a line is not one of `sha256sum`, or names a file elsewhere.
    """
    if not os.path.lexists(root / SUMS):
        return []
    recorded = _read(root)
    there = [file for file in recorded if (root / file).is_file()]
    found = _hash(root, there, threads, progress)
    wrong = [file for file, digest in recorded.items() if found.get(file) != digest]
    if wrong:
        raise MismatchError(
            f"{root}: {len(wrong):,} files are missing or do not have the SHA-256 in {SUMS}\n{listed(wrong)}",
            hint="the files were changed or damaged after they were written; make or fetch them again",
        )
    return [f"digests: {len(found):,} files have the SHA-256 in {SUMS}"]


def _read(root: Path) -> dict[str, str]:
    path = root / SUMS
    found: dict[str, str] = {}
    for number, line in enumerate(read_whole(path, MAX_DOCUMENT_SIZE).decode("utf-8", "replace").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in found:
            raise FormatError(f"{path}: line {number} is not a SHA-256, two spaces and another file")
        safe_join(root, match[2], named_by=str(path))
        found[match[2]] = match[1]
    return found


def _hash(root: Path, files: Collection[str], threads: int | None, progress: Progress | None) -> dict[str, str]:
    """SHA-256 by file. One thread takes one file, the largest first: the digest of a file cannot be divided."""
    sizes: dict[str, int] = {}
    for file in files:
        with storage_errors("look at", root / file):
            sizes[file] = os.stat(root / file).st_size
    found = dict.fromkeys(files, "")
    with FileReader(root) as reader:

        def act(file: str) -> None:
            digest, size = hashlib.sha256(), sizes[file]
            for position in range(0, size, _BUFFER):
                data = scratch("window", min(_BUFFER, size - position))
                reader.read(file, position, data)
                digest.update(data)
                if progress is not None:
                    progress.advance(len(data))
            found[file] = digest.hexdigest()

        if progress is not None:
            progress.start("hashing files", sum(sizes.values()))
        run_threads(iter(sorted(files, key=lambda file: -sizes[file])), act, threads)
        reader.check_unchanged()
    return found
