"""Where a model's files are: a repository, a native checkpoint, or the Hub cache after a download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_tools.core.errors import NotFoundError, UsageError
from ckpt_tools.formats.dcp.metadata import METADATA_FILE
from ckpt_tools.formats.hf import CONFIG
from ckpt_tools.formats.hub import is_url, resolve_source

_DOWNLOAD_OPTIONS = frozenset({"cache_dir", "force_download", "local_files_only", "token"})
HUB_OPTIONS = _DOWNLOAD_OPTIONS | {"code_revision", "proxies", "resume_download", "subfolder"}
"""Arguments of transformers' `from_pretrained` that say where files come from."""


@dataclass(frozen=True, slots=True)
class Location:
    """A source on this machine.

    Attributes:
        root: directory of the tensors.
        side_root: directory of config.json, tokenizer and other side files.
        repository: `org/name` when it came from the Hub.
        has_weights: whether the tensors were fetched too.
    """

    root: Path
    side_root: Path
    repository: str | None
    has_weights: bool

    @property
    def is_native(self) -> bool:
        """Whether it is a native checkpoint, which carries its side files in a folder."""
        return self.side_root != self.root


def locate(
    source: str | Path, *, revision: str | None, options: Mapping[str, object], weights: bool = True
) -> Location:
    """The directory that holds `source`, downloaded if it is a Hub repository.

    Args:
        source: a directory, `org/name`, `org/name@revision` or `hf://org/name`.
        revision: branch, tag or commit on the Hub.
        options: the caller's keyword arguments; those of `HUB_OPTIONS` that are set steer the download.
        weights: False fetches configuration and tokenizer alone.

    Raises:
        UsageError: another URL than the Hub's.
        NotFoundError: neither a directory nor a reachable repository, or no such subfolder in it.
    """
    name = str(source)
    if is_url(name):
        raise UsageError(
            f"{name} is a URL; models load from directories and the Hub", hint=f"ckpt convert {name} native"
        )
    given = {key: options[key] for key in HUB_OPTIONS if options.get(key)}
    subfolder = str(given.pop("subfolder", ""))
    steering = {key: value for key, value in given.items() if key in _DOWNLOAD_OPTIONS}
    is_directory = Path(name).expanduser().exists()
    if steering and not is_directory:
        root, repository = _download(name, revision, steering, weights), name
    else:
        # transformers ignores the revision of a directory, and callers pass one along.
        resolved = resolve_source(name, revision=None if is_directory else revision, weights=weights)
        root, repository = resolved.path, resolved.repository
    root = root / subfolder
    if not root.is_dir():
        raise NotFoundError(f"{name} has no folder {subfolder!r}" if subfolder else f"{name} is not a directory")
    native = (root / "hf" / CONFIG).is_file() and not (root / CONFIG).exists()
    return Location(root, root / "hf" if native else root, repository, weights or repository is None)


def require_config(location: Location) -> None:
    """Raises `NotFoundError` for a DCP checkpoint without a config, which transformers takes for a wrong name."""
    if (location.root / METADATA_FILE).exists() and not (location.side_root / CONFIG).exists():
        raise NotFoundError(
            f"{location.root} is a checkpoint without {CONFIG}, so its architecture is not known",
            hint=f"put the {CONFIG} of the model's repository into {location.root / 'hf'}, or give it as config=",
        )


def without_hub_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for transformers once the files are here."""
    return {name: value for name, value in kwargs.items() if name not in HUB_OPTIONS}


def _download(name: str, revision: str | None, options: Mapping[str, object], weights: bool) -> Path:
    """A download steered by arguments (token, cache, offline), which `resolve_source` takes from the environment."""
    from huggingface_hub import snapshot_download

    repository, _, at = name.removeprefix("hf://").partition("@")
    patterns = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", *(["*.safetensors"] if weights else [])]
    return Path(snapshot_download(repository, revision=revision or at or None, allow_patterns=patterns, **options))
