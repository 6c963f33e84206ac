"""What the verbs that reach the training half (`ckpt train`, `ckpt doctor`) need before they import it."""

from __future__ import annotations

import sys

from ckpt_tools.core.errors import CkptError


def require_packages() -> None:
    """Refuses before torch is imported or a process is started.

    Raises:
        CkptError: torch or transformers is not installed.
    """
    from ckpt_tools.core.packages import is_found

    missing = [name for name in ("torch", "transformers") if not is_found(name)]
    if missing:
        raise CkptError(
            f"training needs {' and '.join(missing)}, which this Python does not have",
            hint=f"{sys.executable} -m pip install 'nemo-automodel-ckpt[train]'",
        )
