"""What hostile checkpoints would like to reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt_tools.core.dtypes import DTYPES
from tests.checkpoints import write_repository


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What a hostile checkpoint in `tmp_path / "made"` would like to reach."""
    folder = tmp_path / "outside"
    write_repository(folder, {"stolen": (DTYPES["U8"], (4,))}, {"model_type": "llama"})
    (folder / "model.safetensors").rename(folder / "secret.safetensors")
    for name in ("secret.json", "secret.distcp", "victim"):
        (folder / name).write_text('{"secret": 1}')
    return folder
