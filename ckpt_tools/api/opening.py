"""Opens what the functions of the API are given: paths as text, and the repository that config and tokenizer are of."""

from __future__ import annotations

from pathlib import Path

from ckpt_tools.engine.checkpoint import Checkpoint, open_checkpoint
from ckpt_tools.formats.hub import resolve_source


def opened(
    path: str | Path,
    *,
    family: str | None = None,
    form: str | None = None,
    dialect: str | None = None,
    like: str | Path | None = None,
) -> Checkpoint:
    """The checkpoint at `path`, a directory or a Hub repository.

    Args:
        path: where it is.
        family: as for `open_checkpoint`.
        form: as for `open_checkpoint`.
        dialect: as for `open_checkpoint`.
        like: a directory or a Hub repository, of which no weights are fetched.
    """
    return open_checkpoint(
        resolve_source(str(path)).path,
        family=family,
        form=form,
        dialect=dialect,
        like=None if like is None else resolve_source(str(like), weights=False).path,
    )


def opened_beside(path: str | Path, family: str | None, like: str | Path | None, form: str | None = None) -> Checkpoint:
    """One of two checkpoints of the same model: `like` is for that which has no config.json of its own."""
    checkpoint = opened(path, family=family, form=form)
    return checkpoint if like is None or checkpoint.config else opened(path, family=family, form=form, like=like)
