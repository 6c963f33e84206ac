"""The errors of the project, one small tree, each with a documented exit code.

An error is a sentence that says what is wrong and where, followed by a `hint` that names the next step.
The command line prints it without a traceback and exits with `exit_code`; Python callers catch `CkptError`.
"""

from __future__ import annotations

from collections.abc import Iterable


class CkptError(Exception):
    """Base of every error that is the input's, the machine's or the caller's fault (exit code 1).

    Args:
        message: what is wrong and where, one sentence or a short list.
        hint: what to do next, a command where there is one.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(CkptError):
    """An argument that cannot be used as given."""

    exit_code = 2


class FormatError(CkptError):
    """A file that is malformed, truncated or hostile."""

    exit_code = 3


class LayoutError(CkptError):
    """Names, shapes or dtypes that are not those of the model family."""

    exit_code = 4


class MismatchError(CkptError):
    """Values that differ from the recorded digest or from the other checkpoint."""

    exit_code = 5


class ResourceError(CkptError):
    """Too little disk or memory for the plan; refused before the first write."""

    exit_code = 6


class StorageError(CkptError):
    """The operating system failed a read or a write (no space, I/O error, permission)."""

    exit_code = 7


class LockedError(CkptError):
    """Another run holds the output."""

    exit_code = 8


class OutputExistsError(CkptError):
    """The output exists and `--overwrite` was not given."""

    exit_code = 9


class InputChangedError(CkptError):
    """An input file changed while it was being read."""

    exit_code = 10


class NotFoundError(CkptError):
    """The source, or a file that it names, does not exist."""

    exit_code = 11


class RankError(CkptError):
    """Another process of a run that several share failed, went away or did not come."""

    exit_code = 12


class TerminatedError(CkptError):
    """SIGTERM came: a scheduler takes the machine back."""

    exit_code = 143


EXIT_CODES: dict[int, str] = {
    0: "success",
    **{
        cls.exit_code: (cls.__doc__ or "").split("\n")[0]
        for cls in (
            CkptError,
            UsageError,
            FormatError,
            LayoutError,
            MismatchError,
            ResourceError,
            StorageError,
            LockedError,
            OutputExistsError,
            InputChangedError,
            NotFoundError,
            RankError,
        )
    },
    130: "interrupted; a rerun resumes",
}


def listed(names: Iterable[str], limit: int = 10) -> str:
    """Indented lines of the first `limit` names, and how many more there are."""
    ordered = list(names)
    lines = [f"  {name}" for name in ordered[:limit]]
    if len(ordered) > limit:
        lines.append(f"  ... and {len(ordered) - limit:,} more")
    return "\n".join(lines)
