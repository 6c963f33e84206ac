"""File systems to share blocks on: real ones in loop-mounted images, and a stand-in that holds every rule of theirs."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

MAKE = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}
BLOCK = 4096

# Those of the system, whoever counts the engine's calls.
_fstat, _pread, _pwrite = os.fstat, os.pread, os.pwrite


@dataclass
class StandIn:
    """`FICLONERANGE` by copying, under the kernel's rules (`generic_remap_file_range_prep` of fs/remap_range.c).

    Attributes:
        calls: how often it was called.
        nbytes: that were shared.
        fails: by number of the call, the error that it ends with; 0 shares nothing and says that it did.
        refusing: inodes of source files that cannot be shared.
    """

    calls: int = 0
    nbytes: int = 0
    fails: dict[int, int] = field(default_factory=dict)
    refusing: set[int] = field(default_factory=set)

    def __call__(self, target: int, request: int, arguments: bytes) -> int:
        assert request == 0x4020940D
        source, position, nbytes, at = struct.unpack("=qQQQ", arguments)
        fault = self.fails.get(self.calls)
        self.calls += 1
        if fault is None:
            fault = self._fault(source, position, nbytes, target, at)
        if fault:
            raise OSError(fault, os.strerror(fault))
        self.nbytes += nbytes
        data = _pread(source, nbytes, position)
        assert _pwrite(target, data, at) == len(data)
        return 0

    def _fault(self, source: int, position: int, nbytes: int, target: int, at: int) -> int:
        if _fstat(source).st_ino in self.refusing:
            return errno.EOPNOTSUPP
        size, room = _fstat(source).st_size, _fstat(target).st_size
        ends = position + nbytes == size and at + nbytes >= room
        if position % BLOCK or at % BLOCK or (nbytes % BLOCK and not ends) or position + nbytes > size:
            return errno.EINVAL
        assert nbytes, "a range of no bytes would mean the whole file"
        return 0


@contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Path]:
    """A new file system of that kind; skips the test where there cannot be one."""
    if os.geteuid() or not shutil.which(MAKE[kind][0]):
        pytest.skip(f"needs root and {MAKE[kind][0]}")
    image, mount = folder / f"{kind}.img", folder / kind
    image.touch()
    os.truncate(image, 512 << 20)
    mount.mkdir()
    subprocess.run([*MAKE[kind], str(image)], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(mount)], capture_output=True, check=False).returncode:
        pytest.skip("this machine mounts no images")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)  # a failed test may hold files open
        image.unlink()


def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Puts the stand-in in the place of the system call."""
    double = StandIn()
    monkeypatch.setattr(fcntl, "ioctl", double)
    return double
