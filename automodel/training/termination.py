"""SIGTERM, which a scheduler sends some time before it takes the machine away: time enough to save."""

from __future__ import annotations

import os
import signal
import threading
from types import TracebackType


class Termination:
    """As a context, keeps SIGTERM from ending the process; whoever uses it looks at `requested` from time to time.

    A signal that nobody acted on, by an error, ends the process at the end of the context. Nothing changes outside the
    main thread, or where the program handles or ignores the signal itself.

    Attributes:
        requested: whether it came.
    """

    def __init__(self) -> None:
        self.requested = False
        self._installed = False

    def __enter__(self) -> Termination:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._note)
            self._installed = True
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if not self._installed:
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.requested and error is None:
            os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, *_: object) -> None:
        self.requested = True
