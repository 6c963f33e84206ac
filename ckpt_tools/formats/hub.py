"""Where a source is: a directory, a Hub repository downloaded to the Hub cache, or a URL of which a shell is made.

Only safetensors, JSON, tokenizer, template and text files are fetched. Pickled weights are left on the Hub; Python
files of a repository are fetched as text, because a converted model carries them along, and are never imported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckpt_tools.core.errors import CkptError, FormatError, NotFoundError, StorageError, UsageError
from ckpt_tools.core.paths import is_there

_SCHEME: Final = "hf://"
_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://.+", re.IGNORECASE)
_REPOSITORY: Final = re.compile(r"(?P<name>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[^@\s]+))?")
_LEGACY_REPOSITORY: Final = re.compile(r"(?P<name>[\w][\w.-]*)(?:@(?P<revision>[^@\s]+))?")
_SMALL_FILES: Final = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.md", "*.py", "LICENSE*", "NOTICE*")
_IGNORED: Final = ("*/*.safetensors", "consolidated*.safetensors", "original/*", "onnx/*", "*.bin.index.json")


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """A source on this machine.

    Attributes:
        path: directory that holds the files; for a URL all of them but tensor data (`formats/remote.py`).
        repository: `org/name` when it came from the Hub.
        revision: commit that was fetched, None for a plain directory.
    """

    path: Path
    repository: str | None
    revision: str | None


def is_url(source: str) -> bool:
    """Whether a source is read from where it is, through fsspec; repositories of the Hub are not."""
    return not source.startswith(_SCHEME) and _URL.fullmatch(source) is not None


def resolve_source(source: str, *, revision: str | None = None, weights: bool = True) -> ResolvedSource:
    """The directory that `source` names.

    Args:
        source: a directory, `org/name`, `org/name@revision` or `hf://org/name@revision`, or a directory's URL that
            fsspec knows, such as `s3://bucket/name`. A directory of that name wins over a repository unless `hf://`
            is given.
        revision: branch, tag or commit, when it is not part of `source`.
        weights: False fetches configuration and tokenizer alone.

    Raises:
        NotFoundError: neither a directory nor a repository that can be reached; also for gated repositories.
        UsageError: two revisions, a revision of a directory, or one that cannot be a name.
        FormatError: the repository lists a file under a name that leaves its directory.
        StorageError: the download failed.
    """
    named = source.removeprefix(_SCHEME)
    if is_url(source):
        from ckpt_tools.formats.remote import open_remote

        if revision is not None:
            raise UsageError(f"{source} is no repository on the Hub and has no revision")
        return ResolvedSource(open_remote(source).root, None, None)
    if named == source:
        path = Path(source).expanduser()
        if source and is_there(path):
            if revision is not None:
                hint = f"write {_SCHEME}{source} for the Hub"
                raise UsageError(f"{source} is a directory and has no revision", hint=hint)
            return ResolvedSource(path, None, None)
        match = _REPOSITORY.fullmatch(named)
    else:
        match = _REPOSITORY.fullmatch(named) or _LEGACY_REPOSITORY.fullmatch(named)
    if match is None:
        raise NotFoundError(
            f"{source!r} does not exist", hint="give a directory, or a Hub repository as org/name or org/name@revision"
        )
    if revision is not None and match["revision"] not in (None, revision):
        raise UsageError(f"{source} and the revision {revision} name two revisions")
    chosen = match["revision"] or revision
    if chosen is not None:
        _check_revision(chosen)
    return _download(match["name"], chosen, weights)


def _check_revision(revision: str) -> None:
    """The Hub client makes a file of this name in its cache.

    Raises:
        UsageError: it is no name that git gives a branch or a tag.
    """
    parts = revision.split("/")
    if not revision.isprintable() or "\\" in revision or any(not part or part.startswith(".") for part in parts):
        raise UsageError(f"{revision!r} cannot be the name of a revision", hint="give a branch, a tag or a commit")


def _download(name: str, revision: str | None, weights: bool) -> ResolvedSource:
    from huggingface_hub import snapshot_download

    patterns = [*_SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=list(_IGNORED)))
    except Exception as error:
        explained = _explain(name, revision, error)
        if explained is None:
            raise
        raise explained from error
    return ResolvedSource(path, name, path.name if path.parent.name == "snapshots" else revision)


def _explain(name: str, revision: str | None, error: Exception) -> CkptError | None:
    """The sentence for an error of huggingface_hub, None for one that is a defect."""
    from huggingface_hub import errors

    where = f"{name}@{revision}" if revision else name
    if isinstance(error, errors.GatedRepoError):
        return NotFoundError(
            f"{where} is gated and this account has no access to it",
            hint=f"accept its terms at https://huggingface.co/{name}, then run `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFoundError(f"{name} has no revision {revision}", hint=f"see https://huggingface.co/{name}/tree/main")
    if isinstance(error, errors.RepositoryNotFoundError):
        return NotFoundError(
            f"{where} is neither a directory nor a repository on the Hub",
            hint="check the spelling; for a private repository run `hf auth login`",
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return NotFoundError(
            f"{where} is not in the local Hub cache, at least not whole, and the Hub cannot be reached",
            hint="connect to the network and unset HF_HUB_OFFLINE, or give a directory",
        )
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{where} is not a valid repository name: {error}")
    if type(error) is ValueError:
        return FormatError(
            f"the Hub client refuses {where}: {error}",
            hint="the repository is hostile or damaged; nothing of it was used",
        )
    # Most HTTP errors of huggingface_hub are OSErrors too; those of its transport are not.
    if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
        return StorageError(f"the download of {where} failed: {error}", hint="a rerun continues where it stopped")
    return None
