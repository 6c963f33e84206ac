"""Names from a checkpoint turned into paths that cannot leave its directory, and files opened so that they are in it.

Checkpoints are hostile input: a name is plain under POSIX and Windows rules or it is refused, and a link is followed
only to where a checkpoint may keep its files.
"""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ckpt_tools.core.errors import FormatError, NotFoundError
from ckpt_tools.core.storage import storage_error, storage_errors

_MAX_LENGTH: Final = 1024
_MAX_COMPONENT: Final = 255  # bytes, on every file system that matters
_NOT_IN_NAMES: Final = frozenset('\\:*?"<>|')  # separators, streams and wildcards of Windows
_DEVICES: Final = frozenset(
    {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", "CLOCK$"}
    | {f"{port}{digit}" for port in ("COM", "LPT") for digit in "0123456789¹²³"}
)
_FOLDER: Final = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
_FILE: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY
_BAD_PATHS: Final = {
    errno.ELOOP: "is a symbolic link that leads nowhere, or appeared while it was opened",
    errno.ENOTDIR: "leads through something that is not a directory",
    errno.ENAMETOOLONG: "has too long a name",
    errno.ENXIO: "is not a regular file",
}


def safe_join(root: Path, name: str, *, named_by: str) -> Path:
    """`root / name` for a relative name that a checkpoint's file gave.

    Args:
        root: directory of the checkpoint.
        name: the untrusted name; forward slashes separate folders.
        named_by: the file that gave the name, for the message.

    Raises:
        FormatError: the name is absolute, climbs out, or is not plain text under POSIX or Windows rules.
    """
    parts = name.split("/")
    if len(name) > _MAX_LENGTH or not name.isprintable() or not all(map(_is_plain, parts)):
        raise FormatError(
            f"{named_by} names the file {name[:200]!r}, which is not a plain relative path inside the checkpoint",
            hint="the checkpoint is damaged or hostile; nothing was read from that path",
        )
    return root.joinpath(*parts)


def _is_plain(part: str) -> bool:
    """Whether a name means one and the same file of its folder on every system; it is printable text."""
    return (
        part.rstrip(". ") == part != ""
        and _NOT_IN_NAMES.isdisjoint(part)
        and len(part.encode()) <= _MAX_COMPONENT
        and part.partition(".")[0].rstrip().upper() not in _DEVICES
        and unicodedata.is_normalized("NFC", part)
    )


def is_there(path: Path) -> bool:
    """Whether there is something of that name, a link to nothing included.

    Raises:
        StorageError: the operating system does not tell, which `os.path.exists` takes for a no.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise storage_error("look at", path, error) from error
    return True


def close_input(fd: int, path: Path) -> None:
    """Closes what `open_input` gave; raises `StorageError` when the operating system fails that."""
    with storage_errors("close", path):
        os.close(fd)


def open_input(path: Path, root: Path | None = None) -> int:
    """A read-only descriptor of a regular file of a checkpoint, which never waits.

    No component below the root is a symbolic link, unless the link ends below the root as well, or in the `blobs` of
    the Hub cache whose snapshot the root is. Folders are opened one from another, so nothing that is swapped for a
    link meanwhile is followed. Devices, pipes and directories are refused without being opened.

    Args:
        path: the file.
        root: directory of the checkpoint, which the caller chose and trusts; by default the file's own.

    Raises:
        NotFoundError: no such file.
        FormatError: not a regular file, or a link out of the checkpoint.
        StorageError: it may not be read.
    """
    base = path.parent if root is None else root
    try:
        found = _open_below(base, path.relative_to(base).parts)
        if found is None:
            found = _open_linked(path, base)
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except OSError as error:
        fault = _BAD_PATHS.get(error.errno or 0)
        if fault is not None:
            raise FormatError(f"{path} {fault}") from None
        raise storage_error("open", path, error) from error
    if found is None:
        raise FormatError(f"{path} was exchanged for a link while it was opened")
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise FormatError(f"{path} is not a regular file")
    return found


def _open_below(base: Path, names: Sequence[str]) -> int | None:
    """The file that `names` lead to from the directory `base`, or None where one of them is a link."""
    folder = os.open(base, _FOLDER)
    try:
        for name in names[:-1]:
            if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                return None
            inner = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        mode = os.stat(names[-1], dir_fd=folder, follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            return None
        if not stat.S_ISREG(mode):
            kind = "a directory, not a file" if stat.S_ISDIR(mode) else "not a regular file"
            raise FormatError(f"{base.joinpath(*names)} is {kind}")
        return os.open(names[-1], _FILE, dir_fd=folder)
    finally:
        os.close(folder)


def _open_linked(path: Path, base: Path) -> int | None:
    """The file that a link leads to, if a checkpoint in `base` may keep it there."""
    target, root = Path(os.path.realpath(path, strict=True)), Path(os.path.realpath(base, strict=True))
    for home in (root, *_hub_blobs(root)):
        if target.is_relative_to(home) and target != home:
            return _open_below(home, target.relative_to(home).parts)
    raise FormatError(
        f"{path} is a link to {target}, outside of the checkpoint",
        hint="nothing was read from there; if the file belongs to the checkpoint, put a copy in place of the link",
    )


def _hub_blobs(root: Path) -> tuple[Path, ...]:
    """Where the Hub cache keeps the files of the snapshot that `root` is or is in: `models--ORG--NAME/blobs`."""
    for folder in (root, *root.parents):
        snapshots = folder.parent
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            return (snapshots.parent / "blobs",)
    return ()
