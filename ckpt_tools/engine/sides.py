"""The files beside the tensors: what a native checkpoint carries and what a repository is published with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tools.core.dtypes import DType
from ckpt_tools.core.paths import is_there
from ckpt_tools.core.storage import storage_errors
from ckpt_tools.engine.checkpoint import Checkpoint
from ckpt_tools.families import family_of
from ckpt_tools.formats import hf
from ckpt_tools.formats.config import portable_config
from ckpt_tools.formats.hf import SideFile
from ckpt_tools.layouts.layout import Layout

HF_FOLDER = "hf"

MODELOPT = "hf_quant_config.json"
"""modelopt's own description of a quantised repository: beside plain tensors it would make readers misread them."""

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Where config.json describes quantised tensors; the second is compressed-tensors' older name."""


def native_side_files(source: Checkpoint) -> dict[str, SideFile | bytes]:
    """config.json and every other side file, byte for byte, under `hf/`."""
    names = source.side_files
    with storage_errors("look at", source.side_root):
        if is_there(source.side_root / hf.CONFIG):
            names = (hf.CONFIG, *names)
    return {f"{HF_FOLDER}/{name}": SideFile(source.side_root, name) for name in names}


def repository_side_files(
    config: Mapping[str, Any], side_root: Path | None, layout: Layout, leaf_dtypes: Mapping[str, DType]
) -> dict[str, SideFile | bytes]:
    """Side files byte for byte, and a config.json that every reader understands.

    Args:
        config: the source's config; fields are added, none dropped but a `quantization_config` that no longer holds.
        side_root: directory of the other side files, None for none; `hf_quant_config.json` is left out.
        layout: of the repository that is written.
        leaf_dtypes: of the leaves' values; the most frequent floating-point one is the config's dtype.
    """
    files: dict[str, SideFile | bytes] = {}
    if side_root:
        with storage_errors("read", side_root):
            files = {name: SideFile(side_root, name) for name in hf.side_files(side_root) if name != MODELOPT}
    if config:
        floats = Counter(dtype for dtype in leaf_dtypes.values() if dtype.is_float)
        dtype = floats.most_common(1)[0][0] if floats else None
        written = portable_config(dict(config), dtype=dtype)
        family = family_of(config)
        if family is not None:
            written["architectures"] = written.get("architectures") or [family.architecture]
        if family is not None and not layout.is_identity:
            for key in QUANTIZATION_KEYS:
                written.pop(key, None)
            quantization = family.quantization_config(config, layout)
            if quantization is not None:
                written["quantization_config"] = dict(quantization)
        files[hf.CONFIG] = (json.dumps(written, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    return files
