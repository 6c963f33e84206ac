"""The end of a process that torch ran in."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """End the process with what is to be done at exit, but not the interpreter first.

    A thread of gloo may still have to let go of the last collective's tensors, for which it needs the interpreter; if
    that is ending, the process dies by SIGABRT, and a job that is done has failed (pytorch/pytorch#190489).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
