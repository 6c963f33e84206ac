"""Which packages are installed, in which version, and how the others are: found without importing any of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True, slots=True)
class Package:
    """A package that something runs with, or faster with.

    Attributes:
        name: of its distribution.
        module: what is imported.
        purpose: what it is for, in a few words.
        install: arguments of `pip install`.
    """

    name: str
    module: str
    purpose: str
    install: str


@dataclass(frozen=True)
class PackageReport:
    """A package as it is found here.

    Attributes:
        name: of its distribution.
        version: `"unknown"` where it is installed without one; None where it is not installed.
        purpose: what it is for.
        install: the command that installs it.
    """

    name: str
    version: str | None
    purpose: str
    install: str


def is_found(module: str) -> bool:
    """Whether a module could be imported; of a dotted name the packages around it are."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        # A package whose parent is missing.
        return False


def look_for(packages: Iterable[Package]) -> tuple[PackageReport, ...]:
    """The packages as they are found here."""
    return tuple(PackageReport(p.name, _version(p), p.purpose, install_command(p)) for p in packages)


def install_command(package: Package) -> str:
    """What installs a package, for a shell."""
    return f"pip install {package.install}"


def _version(package: Package) -> str | None:
    # The module decides: a distribution may be there whose module is not, and the other way round.
    if not is_found(package.module):
        return None
    # It imports much that `ckpt --help` does not need.
    from importlib import metadata

    try:
        return metadata.version(package.name)
    except metadata.PackageNotFoundError:
        return "unknown"


_TOOL = "nemo-automodel-ckpt"
NEEDED = tuple(
    Package(name, module, purpose, _TOOL)
    for name, module, purpose in (
        ("huggingface-hub", "huggingface_hub", "repositories of the Hub"),
        ("ml-dtypes", "ml_dtypes", "FP8 and BF16 values"),
        ("numpy", "numpy", "rearranging and comparing values"),
        ("PyYAML", "yaml", "training configs"),
        ("rich", "rich", "progress bars"),
        ("typer", "typer", "the command line"),
        ("xxhash", "xxhash", "digests"),
    )
)
"""Packages that the checkpoint tools do not run without."""
EXTRAS = (
    Package("isal", "isal", "checksums of torch's files in half the time", f"'{_TOOL}[fast]'"),
    Package("fsspec", "fsspec", "checkpoints behind URLs", f"'{_TOOL}[remote]'"),
    Package("aiohttp", "aiohttp", "checkpoints behind http(s)", f"'{_TOOL}[remote]'"),
    Package("s3fs", "s3fs", "checkpoints in S3", "s3fs"),
    Package("gcsfs", "gcsfs", "checkpoints in Google Cloud Storage", "gcsfs"),
)
"""Packages that let them do more."""
