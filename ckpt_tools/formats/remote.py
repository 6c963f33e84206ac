"""Checkpoints in object stores and behind URLs, through fsspec: everything but tensor data is fetched, once.

A remote checkpoint gets a shell on this machine: a temporary directory with all of its files at their sizes, in which
the small files are whole, files of tensors have their headers, and the rest is a hole that takes no space. So every
format is opened from it as from any directory. Tensor bytes are read from where they are (`engine/ranges.py`).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import re
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar

from ckpt_tools.core.errors import CkptError, FormatError, InputChangedError, NotFoundError, StorageError, UsageError
from ckpt_tools.core.paths import safe_join
from ckpt_tools.formats.dcp.description import parse
from ckpt_tools.formats.dcp.metadata import METADATA_FILE
from ckpt_tools.formats.hf import WEIGHT_SUFFIXES
from ckpt_tools.formats.safetensors import MAX_HEADER_SIZE

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")

REQUESTS: Final = 16
"""Requests at a time."""
ATTEMPTS: Final = 5
FIRST_PAUSE: Final = 0.2
"""Seconds before the second attempt; each further pause is three times as long."""

_HEADER_GUESS: Final = 128 << 10  # headers of published models are mostly shorter; longer ones take a second request
_EDGE: Final = 4096  # where torch.save keeps all but the tensor, on both ends
_NEARBY: Final = 256 << 10  # pieces so near to each other come in one request
_MAX_FILES: Final = 100_000
_MAX_SMALL_FILE: Final = 1 << 30
_DEPTH: Final = 4
_IDENTITY: Final = (
    *("ETag", "etag", "e_tag", "generation", "VersionId", "md5Hash", "content_md5", "Content-MD5", "Digest"),
    *("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "ino", "created"),
)


class Version(NamedTuple):
    """A file as it was when the checkpoint was opened: its size, and what else tells whether it is still the same."""

    size: int
    mark: str


class RemoteFiles:
    """The files of a remote checkpoint.

    Attributes:
        url: of the directory, without credentials.
        root: directory of the shell.
        versions: of each file, by relative path.
    """

    def __init__(self, url: str, filesystem: Any, path: str) -> None:
        self.url = re.sub(r"//[^/@]*@", "//", url).rstrip("/")
        self._filesystem = filesystem
        self._path = path.rstrip("/")
        # Those that are not asynchronous inside mostly have one connection or one open file.
        self._turn = contextlib.nullcontext() if filesystem.async_impl else threading.Lock()
        self.versions = self._list()
        folder = Path(tempfile.mkdtemp(prefix="ckpt-remote-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        self.root = folder.joinpath(*(part for part in self.url.partition("://")[2].split("/") if part.strip(".")))
        self.root.mkdir(parents=True)
        self._fill()

    def fetch(self, file: str, begin: int, end: int) -> bytes:
        """The bytes `[begin, end)` of a file, asked for up to `ATTEMPTS` times.

        Raises:
            StorageError: the server fails again and again, refuses, or does not serve ranges of bytes.
        """

        def ask() -> bytes:
            data = self._range(file, begin, end)
            if len(data) > end - begin:
                raise no_ranges(f"{self.url}/{file}")
            if len(data) < end - begin:
                raise OSError(f"{len(data):,} bytes came in place of {end - begin:,}")
            return data

        return self._patiently(file, ask)

    def changed(self, files: Sequence[str]) -> list[str]:
        """Those of the files that are no longer what they were when the checkpoint was opened."""
        now = self._list()
        return [file for file in files if now.get(file) != self.versions[file]]

    def check_unchanged(self, files: Sequence[str]) -> None:
        """Raises `InputChangedError` when one of the files is no longer what it was."""
        changed = self.changed(files)
        if changed:
            raise InputChangedError(
                f"{self.url}/{changed[0]} changed while it was being read; nothing was written under the final name",
                hint="stop whatever writes there and run the command again",
            )

    def is_current(self) -> bool:
        """Whether the checkpoint still has the same files."""
        return self._list() == self.versions

    def _range(self, file: str, begin: int, end: int) -> bytes:
        with self._turn:
            return bytes(self._filesystem.cat_file(self._name(file), start=begin, end=end)) if end > begin else b""

    def _name(self, file: str) -> str:
        return f"{self._path}/{file}"

    def _patiently(self, file: str, ask: Callable[[], T]) -> T:
        """What a request gives, asked again where that may help."""
        name, fault = f"{self.url}/{file}".rstrip("/"), ""
        for pause in (*(FIRST_PAUSE * 3**attempt for attempt in range(ATTEMPTS - 1)), 0.0):
            try:
                return ask()
            except CkptError:
                raise
            except FileNotFoundError:
                raise NotFoundError(f"{name} does not exist", hint="check the URL") from None
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
                if not _may_pass(error):
                    raise StorageError(f"cannot read {name}: {fault}", hint="check URL and credentials") from error
            time.sleep(pause)
        raise StorageError(
            f"cannot read {name}: {fault} ({ATTEMPTS} attempts)",
            hint="the server or the network fails; the same command goes on later where it stopped",
        )

    def _list(self) -> dict[str, Version]:
        """Every file below the URL that is not hidden, by relative path."""

        def find() -> Mapping[str, Any]:
            with self._turn:
                self._filesystem.invalidate_cache()
                found: Mapping[str, Any] = self._filesystem.find(self._path, maxdepth=_DEPTH, detail=True)
            return found

        found = self._patiently("", find)
        return self._kept({name: version_of(found[path]) for name, path in self._relative(found).items()})

    def _relative(self, paths: Iterable[str]) -> dict[str, str]:
        """The paths below the URL that are not hidden, by their relative ones."""
        prefix = f"{self._path}/"
        names = {path[len(prefix) :]: path for path in paths if path.startswith(prefix)}
        return {name: path for name, path in names.items() if name == METADATA_FILE or not _is_hidden(name)}

    def _kept(self, versions: dict[str, Version]) -> dict[str, Version]:
        """The versions in order, if there are some and not too many."""
        if len(versions) > _MAX_FILES:
            raise FormatError(f"{self.url} holds {len(versions):,} files; the limit is {_MAX_FILES:,}")
        if not versions:
            raise NotFoundError(f"{self.url} holds no files", hint="give the URL of a checkpoint's directory")
        return dict(sorted(versions.items()))

    def _fill(self) -> None:
        """Makes the shell."""
        for file, version in self.versions.items():
            path = safe_join(self.root, file, named_by=self.url)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as made:
                made.truncate(version.size)
        small = [file for file in self.versions if not file.lower().endswith(WEIGHT_SUFFIXES)]
        for file in small:
            if self.versions[file].size > _MAX_SMALL_FILE:
                raise FormatError(f"{self.url}/{file} is too large for a file beside the weights")
        tensors = [file for file in self.versions if file.endswith(".safetensors") and "/" not in file]
        works: list[Callable[[], None]] = [functools.partial(self._put, file, 0, None) for file in small]
        works += [functools.partial(self._put_header, file) for file in tensors]
        in_parallel(lambda work: work(), works)
        if METADATA_FILE in self.versions:
            in_parallel(lambda piece: self._put(*piece), self._edges())

    def _put(self, file: str, begin: int, end: int | None) -> None:
        size = self.versions[file].size
        data = self.fetch(file, begin, size if end is None else min(end, size))
        with open(self.root / file, "r+b") as made:
            made.seek(begin)
            made.write(data)

    def _put_header(self, file: str) -> None:
        size = self.versions[file].size
        head = self.fetch(file, 0, min(size, _HEADER_GUESS))
        with open(self.root / file, "r+b") as made:
            made.write(head)
        if len(head) >= 8:
            end = 8 + min(MAX_HEADER_SIZE, *struct.unpack("<Q", head[:8]))
            if len(head) < min(end, size):
                self._put(file, len(head), end)

    def _edges(self) -> Iterator[tuple[str, int, int]]:
        """(file, begin, end) of the pieces that hold both ends of each stored tensor, near ones together."""
        description = parse((self.root / METADATA_FILE).read_bytes(), f"{self.url}/{METADATA_FILE}")
        ends: dict[str, list[tuple[int, int]]] = {}
        for place in description.locations.values():
            if place.file in self.versions:
                last = place.position + place.length
                ends.setdefault(place.file, []).append((place.position, min(last, place.position + _EDGE)))
                ends[place.file].append((max(place.position, last - _EDGE), last))
        for file, pieces in ends.items():
            begin, end = 0, 0
            for low, high in sorted(pieces):
                if low > end + _NEARBY and end:
                    yield file, begin, end
                    end = 0
                begin, end = (low, high) if not end else (begin, max(end, high))
            yield file, begin, end


_opened: dict[str, RemoteFiles] = {}
_shells: dict[str, RemoteFiles] = {}
_lock = threading.Lock()


def open_remote(url: str) -> RemoteFiles:
    """The files behind a URL, with their shell. The one made before in this process is used while it is current.

    Raises:
        UsageError: the URL cannot be used, or needs a package that is not installed.
        NotFoundError: there is nothing there.
        StorageError: the server cannot be reached, or does not serve ranges of bytes.
    """
    with _lock:
        found = _opened.get(url)
        if found is None or not found.is_current():
            found = _opened[url] = _remote(url)
            _shells[str(found.root)] = found
        return found


def remote_files(root: Path) -> RemoteFiles | None:
    """The remote files whose shell a directory is, None for any other directory."""
    return _shells.get(str(root))


def place(root: Path) -> str:
    """Where the files of a directory are: their URL, or the directory itself."""
    remote = remote_files(root)
    return str(root) if remote is None else remote.url


def by_url(function: Callable[P, T]) -> Callable[P, T]:
    """A function whose errors name remote files by their URLs, not by those of their shells."""

    @functools.wraps(function)
    def wrapped(*arguments: P.args, **keywords: P.kwargs) -> T:
        try:
            return function(*arguments, **keywords)
        except CkptError as error:
            for root, remote in _shells.items():
                error.message = error.message.replace(root, remote.url)
                error.hint = error.hint and error.hint.replace(root, remote.url)
            error.args = (error.message,)
            raise

    return wrapped


def _remote(url: str) -> RemoteFiles:
    try:
        import fsspec

        filesystem, path = fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise UsageError(
            f"{url} needs a package: {error}",
            hint="pip install 'nemo-automodel-ckpt[remote]', or the one that it names",
        ) from None
    except ValueError as error:
        raise UsageError(f"{url} cannot be read: {error}", hint="s3://, gs://, https:// and so on") from None
    if "http" in filesystem.protocol:
        from ckpt_tools.formats.web import WebFiles

        return WebFiles(url, filesystem, path)
    return RemoteFiles(url, filesystem, path)


def in_parallel(ask: Callable[[A], T], of: Iterable[A]) -> list[T]:
    """What requests give, several made at a time; after one that failed no more are begun."""
    pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="ckpt-remote")
    try:
        return list(pool.map(ask, of))
    finally:
        pool.shutdown(cancel_futures=True)


def version_of(info: Mapping[str, Any]) -> Version:
    size = info.get("size")
    if not isinstance(size, int):
        raise OSError("the server does not tell its size")
    return Version(size, " ".join(f"{key}={info[key]}" for key in _IDENTITY if info.get(key) is not None))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: not where the server has understood and says no."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 425, 429)
    return not isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | ValueError | ImportError)


def no_ranges(name: str) -> StorageError:
    return StorageError(
        f"{name} cannot be read in parts: the server does not serve ranges of bytes",
        hint="download the checkpoint and give its directory",
    )
