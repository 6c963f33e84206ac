"""`verify` and `roundtrip`: proofs that a checkpoint is whole and that nothing is lost on the way through."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from ckpt_tools.api.copying import consolidate, convert
from ckpt_tools.api.opening import opened, opened_beside
from ckpt_tools.api.reports import RoundtripReport, VerifyReport
from ckpt_tools.engine.checksums import verify_checksums
from ckpt_tools.engine.execute import Progress
from ckpt_tools.engine.sums import verify_sums
from ckpt_tools.engine.verify import Checks, check_duplicates, compare, verify_digests, verify_structure
from ckpt_tools.formats.hub import resolve_source
from ckpt_tools.formats.remote import by_url


@by_url
def verify(
    path: str | Path,
    *,
    against: str | Path | None = None,
    family: str | None = None,
    dialect: str | None = None,
    like: str | Path | None = None,
    digests: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Proves that a checkpoint is whole, has the values that were written, and equals another one.

    Args:
        path: any checkpoint: Hugging Face repository, native, or saved by training.
        against: another one of the same model, on either side of the layout; compared bit for bit.
        family: name of the family; None reads it from config.json.
        dialect: whose names a trainer's checkpoint has, such as `torchtitan`; None finds it out from the names.
        like: a repository of the same model, for a checkpoint without config.json of its own.
        digests: compare the digests of the manifest, the checksums that torch left in DCP files, and `SHA256SUMS`,
            where there are any.
        threads: worker threads.
        progress: told of bytes as they are read.

    Raises:
        LayoutError: a tensor is missing, unexpected, incomplete or of the wrong shape.
        MismatchError: a value differs from its digest or from the other checkpoint.
    """
    started = time.perf_counter()
    checkpoint = opened(path, family=family, dialect=dialect, like=like)
    checks: Checks = verify_structure(checkpoint)
    check_duplicates(checkpoint)
    if digests:
        checks.done += verify_digests(checkpoint, threads=threads, progress=progress)
        checks.done += verify_checksums(checkpoint, threads=threads, progress=progress)
        checks.done += verify_sums(checkpoint.root, threads=threads, progress=progress)
    if against is not None:
        other = opened_beside(against, family, like, checkpoint.layout.form)
        # A native checkpoint can be seen against any form: against that of the other side.
        if other.layout.form != checkpoint.layout.form and checkpoint.side == "native":
            form = other.layout.form
            checkpoint = opened(path, family=family, form=form, dialect=dialect, like=like)
        count = compare(checkpoint, other, threads=threads, progress=progress)
        checks.done.append(f"values: {count:,} tensors equal those of {against} bit for bit")
    return VerifyReport(
        str(path),
        checkpoint.layout.family,
        checkpoint.side,
        checkpoint.spelling,
        checks.tensors,
        checks.elements,
        checks.nbytes,
        tuple(checks.done),
        time.perf_counter() - started,
    )


@by_url
def roundtrip(
    source: str | Path,
    *,
    work: str | Path | None = None,
    mesh: str | None = None,
    family: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> RoundtripReport:
    """Converts a repository, consolidates the result and compares it with the source bit for bit.

    A quantised repository is dequantised on the way, and its values compared.

    Args:
        source: a directory or a Hub repository.
        work: directory for the two copies, which are removed; None takes the system's temporary directory.
        mesh: convert for this mesh.
        family: name of the family; None reads it from config.json.
        threads: worker threads.
        progress: told of bytes as they move.
    """
    path = resolve_source(str(source)).path
    with tempfile.TemporaryDirectory(prefix="ckpt-roundtrip-", dir=work) as folder:
        native, back = Path(folder, "native"), Path(folder, "hf")
        there = convert(path, native, mesh=mesh, dequantize=True, family=family, threads=threads, progress=progress)
        again = consolidate(native, back, family=family, threads=threads, progress=progress)
        # A quantised source is compared with what it was dequantised to, and that with the plain repository.
        encoded = opened(path, family=family).is_encoded
        if encoded:
            verify(native, against=path, family=family, threads=threads, progress=progress)
        checked = verify(back, against=native if encoded else path, family=family, threads=threads, progress=progress)
    return RoundtripReport(
        str(source), there.family, checked.tensors, checked.nbytes, there.seconds, again.seconds, checked.seconds
    )
