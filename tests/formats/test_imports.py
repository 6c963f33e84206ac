"""The formats start fast: importing them loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys


def test_importing_every_format_loads_no_heavy_package() -> None:
    code = (
        "import sys\n"
        "from ckpt_tools.formats import config, dcp, hf, hub, safetensors, sharded_safetensors\n"
        "heavy = ('torch', 'numpy', 'transformers', 'safetensors', 'huggingface_hub', 'pickle', 'hashlib', 'asyncio')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
