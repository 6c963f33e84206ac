"""What is fuzzed: one function for each document of a checkpoint. It returns whether the input was accepted.

An input that raises one of our errors was refused, which is right; any other exception is a finding, and so is an input
that is accepted although the reference library refuses it or reads it otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import safetensors

from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import CkptError
from ckpt_tools.core.tensors import TargetFiles
from ckpt_tools.engine.checkpoint import read_config
from ckpt_tools.engine.manifest import read_manifest
from ckpt_tools.families import family_of
from ckpt_tools.families.readers import READERS, config_for
from ckpt_tools.formats import hf, sharded_safetensors
from ckpt_tools.formats.config import config_dtype, portable_config
from ckpt_tools.formats.dcp import open_dcp, plan_dcp
from ckpt_tools.formats.dcp.blob import locate
from ckpt_tools.formats.safetensors import plan_file, read_header

NAMES = ("model.embed_tokens.weight", "model.layers.0.a.weight", "model.norm.weight")
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARD = "shard-00001-model-00001-of-00001.safetensors"


class Finding(AssertionError):
    """An input that was accepted and should not have been."""


class Targets:
    """The functions, over a private folder that is made once: what is fuzzed is one file of a whole checkpoint."""

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        self.root = Path(tempfile.mkdtemp(prefix="ckpt-fuzz-", dir=memory if memory.is_dir() else None))
        self.functions: dict[str, Callable[[bytes], None]] = {
            "safetensors": self._safetensors,
            "index": self._index,
            "metadata": self._metadata,
            "archive": self._archive,
            "manifest": self._manifest,
            "config": self._config,
            "sharded": self._sharded,
        }
        for name in self.functions:
            (self.root / name).mkdir()
        for file, names in zip(FILES, (NAMES[:2], NAMES[2:]), strict=True):
            header, _, size = plan_file(dict.fromkeys(names, (DTYPES["F32"], (2, 3))), {"format": "pt"})
            (self.root / "index" / file).write_bytes(header + bytes(size - len(header)))
        self.archive = self._bytes_of(plan_dcp({NAMES[0]: (DTYPES["F32"], (2, 3), [((0, 0), (2, 3), "__0_0.distcp")])}))
        target = plan_dcp({name: (DTYPES["F32"], (2, 3), [((0, 0), (2, 3), "__0_0.distcp")]) for name in NAMES})
        (self.root / "metadata" / "__0_0.distcp").write_bytes(self._bytes_of(target))
        self.metadata = target.documents[".metadata"]

    @staticmethod
    def _bytes_of(target: TargetFiles) -> bytes:
        content = bytearray(target.store.files["__0_0.distcp"])
        for frame in target.framing:
            content[frame.position : frame.position + len(frame.data)] = frame.data
        return bytes(content)

    def close(self) -> None:
        shutil.rmtree(self.root)

    def run(self, target: str, data: bytes) -> bool:
        """Whether the input was accepted.

        Raises:
            Exception: anything but one of our errors is a finding.
        """
        try:
            self.functions[target](data)
        except CkptError as error:
            if len(str(error)) > 20_000:
                raise Finding(f"a message of {len(str(error)):,} characters") from error
            return False
        return True

    def _put(self, name: str, data: bytes) -> Path:
        path = self.root / name
        path.write_bytes(data)
        return path

    def _safetensors(self, data: bytes) -> None:
        header = read_header(self._put("safetensors/model.safetensors", data))
        try:
            reference = dict(safetensors.deserialize(data))
        except safetensors.SafetensorError as error:
            raise Finding(f"safetensors refuses it: {error}") from error
        ours = {
            name: (entry.dtype.name, list(entry.shape), data[entry.position : entry.position + entry.nbytes])
            for name, entry in header.tensors.items()
        }
        theirs = {name: (str(t["dtype"]), list(t["shape"]), bytes(t["data"])) for name, t in reference.items()}
        if ours != theirs:
            raise Finding("safetensors reads other tensors")

    def _index(self, data: bytes) -> None:
        self._put(f"index/{hf.INDEX}", data)
        found = hf.open_repository(self.root / "index").store
        if found.tensors.keys() != set(NAMES) or found.files.keys() != set(FILES):
            raise Finding("an index that does not list the tensors")

    def _metadata(self, data: bytes) -> None:
        self._put("metadata/.metadata", data)
        found = open_dcp(self.root / "metadata")
        size = os.stat(self.root / "metadata" / "__0_0.distcp").st_size
        for tensor in found.tensors.values():
            for chunk in tensor.chunks:
                if chunk.position + tensor.dtype.nbytes(chunk.numel) > size:
                    raise Finding("a chunk outside of its file")

    def _archive(self, data: bytes) -> None:
        path = self._put("archive/blob", data)
        fd = os.open(path, os.O_RDONLY)
        try:
            found = locate(fd, 0, len(data), path)
        finally:
            os.close(fd)
        strides = found.strides or ()
        reach = sum((n - 1) * stride for n, stride in zip(found.sizes, strides, strict=False))
        if 0 not in found.sizes and found.position + (reach + 1) * found.dtype.itemsize > len(data):
            raise Finding("a tensor outside of its archive")

    def _manifest(self, data: bytes) -> None:
        self._put("manifest/ckpt-manifest.json", data)
        manifest = read_manifest(self.root / "manifest")
        if manifest is not None:
            manifest.to_json()
            for name in (*manifest.side_files, *manifest.blobs):
                if ".." in name.split("/") or name.startswith("/"):
                    raise Finding(f"the name {name!r}")

    def _config(self, data: bytes) -> None:
        self._put("config/config.json", data)
        config = read_config(self.root / "config")
        config_dtype(dict(config))
        family = family_of(config)
        refused: CkptError | None = None
        for act in (
            lambda: json.dumps(portable_config(dict(config)), indent=2, sort_keys=True, ensure_ascii=False).encode(),
            lambda: config_for(config, READERS, "fp8"),
            lambda: family and family.quantization_config(config, family.layout(config)),
        ):
            try:
                act()
            except CkptError as error:
                refused = error
        if refused is not None:
            raise refused

    def _sharded(self, data: bytes) -> None:
        """The input is the text of DCP_SHARDING_INFO of a file that is whole otherwise."""
        info = data.decode("utf-8", "replace")
        header: dict[str, object] = {"__metadata__": {sharded_safetensors.INFO: info}}
        for number, name in enumerate(NAMES):
            header[name] = {"dtype": "U8", "shape": [2, 3], "data_offsets": [6 * number, 6 * number + 6]}
        text = json.dumps(header).encode()
        self._put(f"sharded/{SHARD}", struct.pack("<Q", len(text)) + text + bytes(18))
        store = sharded_safetensors.open_sharded(self.root / "sharded")
        if any(sum(chunk.numel for chunk in t.chunks) != t.numel for t in store.tensors.values()):
            raise Finding("a tensor with elements that are in no file")
