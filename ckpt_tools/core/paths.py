"""Names from a checkpoint turned into paths that cannot leave its directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

from ckpt_tools.core.errors import FormatError, NotFoundError, StorageError


def safe_join(root: Path, name: str, *, named_by: str) -> Path:
    """`root / name` for a relative name that a checkpoint's file gave.

    Args:
        root: directory of the checkpoint.
        name: the untrusted name; forward slashes separate folders.
        named_by: the file that gave the name, for the message.

    Raises:
        FormatError: the name is absolute, climbs out, or is not plain text under POSIX or Windows rules.
    """
    parts = PurePosixPath(name).parts
    windows = PureWindowsPath(name)
    bad = (
        not parts
        or name.startswith("/")
        or windows.drive
        or windows.root
        or ".." in parts
        or ".." in windows.parts
        or "\\" in name
        or any(ord(c) < 32 for c in name)
    )
    if bad:
        raise FormatError(
            f"{named_by} names the file {name!r}, which is not a plain relative path inside the checkpoint",
            hint="the checkpoint is damaged or hostile; nothing was read from that path",
        )
    return root.joinpath(*parts)


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
        raise StorageError(f"cannot look at {path}: {error.strerror}") from error
    return True


def close_input(fd: int, path: Path) -> None:
    """Closes what `open_input` gave; raises `StorageError` when the operating system fails that."""
    try:
        os.close(fd)
    except OSError as error:
        raise StorageError(f"cannot close {path}: {error.strerror}") from error


def open_input(path: Path) -> int:
    """A read-only descriptor of a regular file.

    Symbolic links are followed (the Hub cache is made of them); devices, pipes and directories are refused.

    Raises:
        NotFoundError: no such file.
        FormatError: not a regular file.
        StorageError: the operating system does not let it be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise FormatError(f"{path} is a directory, not a file") from None
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FormatError(f"{path} is not a regular file")
    return fd
