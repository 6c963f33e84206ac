"""Every way in which a run can end badly, as a sentence, a next step and an exit code.

`CkptError` is the input's, the machine's or the caller's fault and is said without a traceback; anything unforeseen is
a defect of this tool and shows one.
"""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ckpt_tools.core import errors
from ckpt_tools.core.errors import CkptError, StorageError, TerminatedError, UsageError
from ckpt_tools.core.names import nearest

INTERNAL_ERROR = 70
BROKEN_PIPE = 141
INTERRUPTED = 130
EXIT_CODES = {
    **errors.EXIT_CODES,
    INTERNAL_ERROR: "a defect of this tool; the traceback is on stderr",
    BROKEN_PIPE: "the reader of stdout went away",
    TerminatedError.exit_code: "ended by SIGTERM; a rerun resumes",
}


class Interrupted(CkptError):
    """The user pressed Ctrl-C."""

    exit_code = INTERRUPTED


class TerminationSignal(KeyboardInterrupt):
    """What SIGTERM raises in the main thread, so that it ends a run in the way that Ctrl-C does."""


def _interrupt(*_: object) -> None:
    raise TerminationSignal


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM raises `TerminationSignal`; nothing changes outside the main thread, or where it is ignored."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def sigterm_left_alone() -> Iterator[None]:
    """Within `sigterm_interrupts`, SIGTERM does again what it does to any process."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not _interrupt:
        yield
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, _interrupt)


def failure(error: BaseException) -> CkptError | None:
    """The error as one of ours, or None when it is a defect."""
    if isinstance(error, CkptError):
        return error
    # Typer has its own copy of click in some versions and the package's in others: known by what it can do.
    message = getattr(error, "format_message", None)
    if callable(message):
        return _usage_error(error, str(message()).replace("Value error, ", ""))
    if isinstance(error, OSError):
        where = "" if error.filename is None else f": {error.filename}"
        return StorageError(f"{error.strerror or error}{where}")
    return None


def _usage_error(error: Any, message: str) -> UsageError:
    context = getattr(error, "ctx", None)
    option = getattr(error, "option_name", None)
    if context is None:
        return UsageError(message)
    if option is None or not message.lower().startswith("no such option"):
        return UsageError(message.rstrip("."), hint=f"{context.command_path} --help shows what it takes")
    options = _options(context.command)
    near = nearest(option, options)
    hint = f"did you mean {near}?" if near else f"{context.command_path} --help lists the options"
    verbs = getattr(context.command, "commands", {})
    if any(option in _options(command) for command in verbs.values()):
        hint = f"options come after the verb: {context.command_path} VERB {option}"
    return UsageError(f"{context.command_path} has no option {option}", hint=hint)


def unknown_verb(name: str, verbs: Iterable[str]) -> UsageError:
    """An error that names the nearest verb."""
    near = nearest(name, verbs)
    hint = f"did you mean ckpt {near}?" if near else "ckpt --help lists the verbs"
    return UsageError(f"there is no verb {name!r}", hint=hint)


def _options(command: Any) -> list[str]:
    texts = (text for parameter in command.params for text in (*parameter.opts, *parameter.secondary_opts))
    return [text for text in texts if text.startswith("-")]


def traceback_of(error: BaseException) -> str:
    """The traceback as text."""
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))
